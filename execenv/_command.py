"""A command that speaks the protocol on its stdin and stdout: started, spoken to, and ended with its tree."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from logging import getLogger

import trio

from execenv._service import open_nursery
from execenv.errors import ConnectFailed, InternalError
from execenv.local.spawn import Spawned, abandon, spawn
from execenv.local.tree import Marks, Root, birthmark, find_leftovers, kill_tree, set_mark, subreaper
from execenv.transports.stdio import PipeChannel, pipe_channel

logger = getLogger(__name__)

TERMINATION_GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL (environments.md §2)."""
MAX_STDERR_LINE = 64 * 1024


@asynccontextmanager
async def open_command(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> AsyncIterator[PipeChannel]:
    """Start a command and get the channel over its stdin and stdout.

    It leads a session, hence a process group, of its own. Its stderr is logged, line by line, at level
    debug. When the block is left, by cancellation too, the group gets SIGTERM, and 2 s later SIGKILL goes
    to whatever is left of its tree; the block does not end before that is gone.

    Args:
        argv: the program, found on PATH, and its arguments. No shell.
        env: laid over this process's environment.
        cwd: this process's own, if `None`.

    Raises:
        ConnectFailed: if the command cannot be started.
    """
    with subreaper():
        with birthmark() as born:
            child = _start(argv, env, cwd)
            try:
                mark = Marks().new()
                root = Root.of(child.pid, mark if set_mark(child.pid, mark, born=born) else None)
            except OSError as error:
                abandon(child)
                raise ConnectFailed(f"failed to spawn exec-server {argv[0]!r}: {error}") from error
        (_, stdout), (_, stderr) = child.outputs
        assert child.stdin_fd is not None
        pump = pipe_channel(f"stdio of {argv[0]}", stdout, child.stdin_fd)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(_log_stderr, argv[0], stderr)
                try:
                    yield pump
                finally:
                    with trio.CancelScope(shield=True):
                        await _end(child, root)
                    nursery.cancel_scope.cancel()
        finally:
            pump.close_fds()
            os.close(stderr)
            if child.pidfd is not None:
                os.close(child.pidfd)


def _start(argv: Sequence[str], env: Mapping[str, str] | None, cwd: str | None) -> Spawned:
    try:
        return spawn(
            argv,
            os.fsencode(cwd or os.getcwd()),
            {**os.environ, **(env or {})},
            arg0=None,
            tty=False,
            pipe_stdin=True,
        )
    except (InternalError, OSError) as error:
        raise ConnectFailed(f"failed to spawn exec-server {argv[0]!r}: {error}") from error


async def _log_stderr(program: str, fd: int) -> None:
    # Read on for as long as the child lives, or it blocks in a write to stderr.
    rest = b""
    while True:
        await trio.lowlevel.wait_readable(fd)
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            continue
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        rest = rest[:MAX_STDERR_LINE]
        for line in lines:
            logger.debug("exec-server %s stderr: %s", program, line.decode(errors="replace"))


async def _end(child: Spawned, root: Root) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
    with trio.move_on_after(TERMINATION_GRACE):
        await _wait_exit(child)
        while find_leftovers(root.reaped(), ()):  # noqa: ASYNC110 - they are not children to wait for
            await trio.sleep(0.02)
    reaped = child.poll() is not None
    receipt = await kill_tree(root.reaped() if reaped else root)
    for survivor in receipt.survivors:
        logger.warning("pid %d could not be ended: %s", survivor.pid, survivor.reason)
    if not reaped and not receipt.survivors:
        await _wait_exit(child)


async def _wait_exit(child: Spawned) -> None:
    if child.pidfd is not None:
        await trio.lowlevel.wait_readable(child.pidfd)
    while child.poll() is None:  # noqa: ASYNC110 - no pidfd, or the kernel is a moment behind it
        await trio.sleep(0.01)
