"""`execenv run`: a process of some environment, joined to our own stdin, stdout, stderr and signals."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import trio
from attrs import evolve, frozen

from execenv._locations import Access, Target
from execenv._service import open_nursery
from execenv._standard_streams import pieces, tell_of_losses, write
from execenv.environment import Environment
from execenv.errors import NotSupported, OutputGap, ProcessNotStarted, UsageError
from execenv.process import Process
from execenv.sandbox.policy import Network, SandboxProfile

NOT_FOUND, NOT_EXECUTABLE = 127, 126


@frozen
class Job:
    """What the command line asked for."""

    target: Target
    access: Access
    argv: tuple[str, ...]
    tty: bool
    cwd: str | None
    extra_env: dict[str, str]
    sandbox: str | None = None
    network: bool = True


async def run_job(job: Job) -> int:
    """Run it; the exit status for our own process."""
    async with job.access.open(job.target) as environment, open_nursery() as nursery:
        nursery.start_soon(tell_of_losses, environment)
        try:
            confined = await _confined(environment, job)
            if confined is not environment:
                job = evolve(job, cwd=None)  # it is that of the sandbox, so it would be from there
            return await _run(confined, job)
        except ProcessNotStarted as error:
            print(f"execenv: {' '.join(str(error).split())}", file=sys.stderr)
            if "os error 2)" in error.reason or "No viable candidates" in error.reason:
                return NOT_FOUND
            return NOT_EXECUTABLE
        except BrokenPipeError:  # whoever reads our output has seen enough
            return 128 + signal.SIGPIPE
        finally:
            nursery.cancel_scope.cancel()


async def _confined(environment: Environment, job: Job) -> Environment:
    """The environment under the sandbox that the command line names."""
    if job.sandbox is None and job.network:
        return environment
    network: Network = "enabled" if job.network else "restricted"
    mode, *roots = (job.sandbox or "").split(":")
    if mode == "read-only":
        profile = SandboxProfile.read_only(network=network)
    elif mode == "workspace-write":
        profile = SandboxProfile.workspace_write(network=network)
    else:
        profile = SandboxProfile.unrestricted(network)
    cwd = job.cwd
    if cwd is None and environment.name == "local":
        cwd = os.getcwd()
    if mode == "workspace-write" and cwd is None and not roots:
        raise UsageError(
            "--sandbox workspace-write needs to know the workspace there: --sandbox workspace-write:DIR, "
            "or --cwd DIR"
        )
    confined = await environment.sandboxed(profile, cwd=cwd, workspace_roots=roots)
    for root in roots:  # one that is not there would grant nothing, without a word
        try:
            await confined.files.get_metadata(root)
        except FileNotFoundError:
            raise UsageError(f"--sandbox names {root!r}, which is not there") from None
    return confined


async def _run(environment: Environment, job: Job) -> int:
    can_end_stdin = environment.name == "local" or (await environment.info()).capabilities.get(
        "processCloseStdin", False
    )
    whole: bytes | None = None
    if not job.tty and not can_end_stdin:
        # This server cannot be told of the end of stdin, but it can be given one of a known length.
        whole = b"" if os.isatty(0) else b"".join([piece async for piece in pieces(0)])
    extra_env = dict(job.extra_env)
    if job.tty:
        extra_env.setdefault("TERM", os.environ.get("TERM", "dumb"))
    status: int | None = None  # stays so if a signal ended us
    async with environment.open_process(
        job.argv,
        stdin=whole is None or bool(whole),
        cwd=job.cwd,
        extra_env=extra_env,
        tty=job.tty,
        _input_size=len(whole) if whole else None,
    ) as process:
        with _raw_terminal(job.tty), trio.open_signal_receiver(*_SIGNALS) as signals:
            async with open_nursery() as nursery:
                nursery.start_soon(_forward_signals, signals, process, nursery.cancel_scope)
                if job.tty and os.isatty(0):
                    await _adopt_size(process)
                if whole is not None:
                    nursery.start_soon(_send, process, whole)
                else:
                    nursery.start_soon(_forward_stdin, process)
                await _forward_output(process)
                status = await process.wait()
                nursery.cancel_scope.cancel()
    return 128 + signal.SIGTERM if status is None else status


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)


async def _forward_signals(
    signals: AsyncIterator[int], process: Process, everything: trio.CancelScope
) -> None:
    interrupted = False
    async for signum in signals:
        if signum == signal.SIGWINCH:
            await _adopt_size(process)
        elif signum != signal.SIGINT:
            everything.cancel()
        elif interrupted:
            await process.kill()
        else:
            interrupted = True
            await process.interrupt()


async def _adopt_size(process: Process) -> None:
    with suppress(OSError, NotSupported):
        size = os.get_terminal_size(0)
        await process.resize(size.lines, size.columns)


async def _forward_stdin(process: Process) -> None:
    assert process.stdin is not None
    with suppress(trio.BrokenResourceError):
        async for piece in pieces(0):
            await process.stdin.send_all(piece)
        await process.stdin.aclose()


async def _send(process: Process, data: bytes) -> None:
    if process.stdin is not None and data:
        with suppress(trio.BrokenResourceError):
            await process.stdin.send_all(data)
            await process.stdin.aclose()


async def _forward_output(process: Process) -> None:
    while True:
        try:
            async for chunk in process:
                await write(2 if chunk.stream == "stderr" else 1, chunk.data)
            return
        except OutputGap as gap:
            print(f"execenv: {gap}", file=sys.stderr)


@contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    """Every key goes to the program; the terminal is as it was when the block is left."""
    if not wanted or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
