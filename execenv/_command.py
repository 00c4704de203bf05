"""A command that speaks the protocol on its stdin and stdout: started, spoken to, and ended with its tree."""

from __future__ import annotations

import errno
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from logging import getLogger

import trio

from execenv import _bootstrap
from execenv._service import open_nursery
from execenv._standard_streams import printable
from execenv.errors import ConnectFailed, ConnectionLost, InternalError
from execenv.local.spawn import Spawned, abandon, spawn
from execenv.local.tree import Marks, Root, birthmark, find_leftovers, kill_tree, set_mark, subreaper
from execenv.transports.stdio import PipeChannel

logger = getLogger(__name__)

TERMINATION_GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL (environments.md §2)."""
MAX_STDERR_LINE = 64 * 1024
LAST_WORDS = 1.0
"""Seconds for a command to end by itself, once it has closed its stdout, so that its status can be told."""
SHOWN_LINES = 8
SHOWN_LENGTH = 300


class CommandChannel(PipeChannel):
    """The channel to a command, and what is known of how the command fares."""

    def __init__(self, child: Spawned, program: str, read_fd: int, write_fd: int) -> None:
        super().__init__(f"stdio of {program}", read_fd, write_fd, max_message=1 << 62)
        self.noise: list[str] = []
        self.stderr: deque[str] = deque(maxlen=SHOWN_LINES)
        self.stderr_ended = trio.Event()
        self._child = child
        self._program = program

    async def explained(self, error: ConnectFailed, *, bootstrap: bool = False) -> ConnectFailed:
        """The same error with the command's own last words, which are the most useful ones that there are."""
        text = str(error)
        status: int | None = None
        if error.__cause__ is None or isinstance(error.__cause__, ConnectionLost):  # not by our own deadline
            with trio.move_on_after(LAST_WORDS):
                status = await _wait_status(self._child)
                await self.stderr_ended.wait()
        if status is not None:
            ended = f"status {status}" if status >= 0 else f"signal {-status}"
            text += f"; {self._program} ended with {ended}"
        said = [
            printable(line.strip())[:SHOWN_LENGTH] for line in (*self.noise, *self.stderr) if line.strip()
        ]
        if said:
            text += f"{' and' if status is not None else ';'} said: {' / '.join(said[-SHOWN_LINES:])}"
        elif status == 0 and (not self.loss or os.strerror(errno.EPIPE) in self.loss):
            text += " and without a word: was its stdin closed? docker exec and kubectl exec need -i"
        elif status == 127:
            text += ": a program was not found at the other side" + (" (sh)" if bootstrap else "")
        return ConnectFailed(text, retryable=error.retryable)


@asynccontextmanager
async def open_command(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    bootstrap_timeout: float | None = None,
) -> AsyncIterator[CommandChannel]:
    """Start a command and get the channel over its stdin and stdout.

    It leads a session, hence a process group, of its own. Its stderr is logged, line by line, at level
    debug. When the block is left, by cancellation too, the group gets SIGTERM, and 2 s later SIGKILL goes
    to whatever is left of its tree; the block does not end before that is gone.

    Args:
        argv: the program, found on PATH, and its arguments. No shell.
        env: laid over this process's environment.
        cwd: this process's own, if `None`.
        bootstrap_timeout: seconds for a Python at the other side of the command, where a server is brought
            to first (`execenv._bootstrap`); `None` if the command is the server.

    Raises:
        ConnectFailed: if the command cannot be started, or no server be brought to its other side.
    """
    bootstrap = bootstrap_timeout is not None
    with subreaper():
        with birthmark() as born:
            child = _start((*argv, _bootstrap.SHELL) if bootstrap else argv, env, cwd)
            try:
                mark = Marks().new()
                root = Root.of(child.pid, mark if set_mark(child.pid, mark, born=born) else None)
            except OSError as error:
                abandon(child)
                raise ConnectFailed(f"failed to spawn exec-server {argv[0]!r}: {error}") from error
        (_, stdout), (_, stderr) = child.outputs
        assert child.stdin_fd is not None
        pump = CommandChannel(child, argv[0], stdout, child.stdin_fd)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(_log_stderr, argv[0], stderr, pump)
                try:
                    if bootstrap_timeout is not None:
                        await _bring_server(pump, stdout, child.stdin_fd, bootstrap_timeout)
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


async def _bring_server(channel: CommandChannel, read_fd: int, write_fd: int, timeout: float) -> None:
    try:
        await _bootstrap.start_server(channel.label, read_fd, write_fd, timeout=timeout, noise=channel.noise)
    except ConnectFailed as error:
        raise await channel.explained(error, bootstrap=True) from error
    channel.noise.clear()


async def _log_stderr(program: str, fd: int, channel: CommandChannel) -> None:
    # Read on for as long as the child lives, or it blocks in a write to stderr.
    rest = b""
    while True:
        await trio.lowlevel.wait_readable(fd)
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            continue
        if not data:
            channel.stderr.append(rest.decode(errors="replace"))
            channel.stderr_ended.set()
            return
        *lines, rest = (rest + data).split(b"\n")
        rest = rest[:MAX_STDERR_LINE]
        for line in lines:
            text = line.decode(errors="replace")
            channel.stderr.append(text)
            logger.debug("exec-server %s stderr: %s", program, text)


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


async def _wait_status(child: Spawned) -> int:
    """How it ended, as `Popen.returncode` has it. It is not reaped, so its group stays its own."""
    if child.pidfd is not None:
        await trio.lowlevel.wait_readable(child.pidfd)
    while True:
        found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # noqa: ASYNC222
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        await trio.sleep(0.01)


async def _wait_exit(child: Spawned) -> None:
    if child.pidfd is not None:
        await trio.lowlevel.wait_readable(child.pidfd)
    while child.poll() is None:  # noqa: ASYNC110 - no pidfd, or the kernel is a moment behind it
        await trio.sleep(0.01)
