"""Environments as programs use them: open one, run things in it, leave it, and nothing of it is left.

async with execenv.open_environment("ws://127.0.0.1:8765") as env:
    done = await env.run(["make", "test"], cwd="/src")
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count

import trio
from attrs import Factory, define, frozen

from execenv._service import open_nursery
from execenv.abc import EnvironmentBackend, KillReceipt
from execenv.environment_path import EnvironmentPath
from execenv.errors import (
    ConnectionLost,
    ExecenvError,
    NotSupported,
    OutputGap,
    ProcessFailed,
    ProcessNotStarted,
    RpcError,
    UsageError,
)
from execenv.files import AnyPath, Files
from execenv.http import Http
from execenv.paths import PathUri, PathUriError
from execenv.process import Inbox, Process
from execenv.protocol import EnvironmentInfo, EnvPolicy, ProcessStartParams
from execenv.sandbox.policy import Sandbox, SandboxProfile
from execenv.status import Status

TERMINATE_DEADLINE = 15.0
"""Seconds that leaving a block waits for the environment to end a process, when nothing else does."""

LOST_DEADLINE = 3.0
"""The same, where the block is left by an error or a cancellation while the connection is being made again:
whoever ends it then, the next connection does."""

INHERIT_ALL = EnvPolicy("all", True, (), {}, ())


@frozen
class CompletedProcess:
    """What `Environment.run` gives back.

    Attributes:
        argv: the program and its arguments.
        returncode: 0-255; death by signal n is 128 + n.
        stdout, stderr: what was captured, or `None` with `capture=False`. A terminal has only `stdout`.
        receipt: what had to be ended when the program had ended (descendants that it left behind).
        sandbox_denied: it failed, and by what it said its sandbox was the reason: a guess. `None` where the
            environment does not say.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes | None
    stderr: bytes | None
    receipt: KillReceipt | None = None
    sandbox_denied: bool | None = False


@define
class CapturedOutput:
    """Output as it is collected. Pass one to `run` to have it also when `run` does not return.

    output = CapturedOutput()
    with trio.move_on_after(10):
        await env.run(["make"], capture=output)
    print(output.stdout)
    """

    stdout: bytearray = Factory(bytearray)
    stderr: bytearray = Factory(bytearray)


def captured_output(error: BaseException) -> CapturedOutput | None:
    """What a `run` that ended with `error` had captured until then; `None` if `error` came from no `run`.

    Works for every exception that comes out of `run`, cancellation included, also inside a group.
    """
    found = getattr(error, "captured_output", None)
    if isinstance(found, CapturedOutput):
        return found
    nested = (
        error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__, error.__context__)
    )
    for inner in nested:
        if inner is not None and (found := captured_output(inner)) is not None:
            return found
    return None


class Environment:
    """A place where work runs. Got from `open_environment`.

    Attributes:
        name: for messages, such as `local` or `websocket ws://127.0.0.1:8765/`.
        files: its files, see `Files`.
        http: requests that it makes, see `Http`.
    """

    def __init__(self, backend: EnvironmentBackend) -> None:
        self.name = backend.name
        self._backend = backend
        self.files = Files(backend.files, self._locate)
        self.http = Http(backend)
        self._numbers = count(1)
        self._token = os.urandom(4).hex()

    def __repr__(self) -> str:
        return f"<execenv.Environment {self.name}>"

    @property
    def session_id(self) -> str | None:
        """The session on the server, to resume it with; a secret. `None` where there is none, or not yet."""
        return getattr(self._backend, "session_id", None)

    async def info(self) -> EnvironmentInfo:
        """Shell, working directory and what else the environment says of itself."""
        return await self._backend.info()

    async def sandboxed(
        self,
        profile: SandboxProfile,
        *,
        cwd: AnyPath | os.PathLike[str] | None = None,
        workspace_roots: Iterable[AnyPath | os.PathLike[str]] = (),
    ) -> Environment:
        """The same environment, as far as `profile` lets it be touched: its processes and its files.

        work = await env.sandboxed(SandboxProfile.workspace_write(), cwd="/srv/w")
        await work.run(["make"])
        await work.files.write_file("notes.txt", b"done")

        What cannot be enforced there is refused, never ignored: each call says so. It ends with the
        environment.

        Args:
            cwd: the working directory of what is done through it, and what relative patterns are from.
            workspace_roots: what `project_roots` in the profile stands for; `cwd` if there are none. It is
                never the directory that the environment itself works in. Relative ones are from `cwd`.

        Raises:
            UsageError: the profile speaks of `project_roots` or relative patterns, and neither was given; or
                there is one path for `workspace_roots`, and no list.
            NotSupported: this environment is under a sandbox already, or has none.
        """
        from execenv._sandboxed import SandboxedEnvironment

        if isinstance(workspace_roots, str | os.PathLike | PathUri | EnvironmentPath):
            raise UsageError(
                f"workspace_roots are several, so a list of them is wanted: [{str(workspace_roots)!r}]"
            )
        where = None if cwd is None else await self._locate(cwd)
        roots = tuple([await self._locate(root, where) for root in workspace_roots])
        return Environment(SandboxedEnvironment(self._backend, _sandbox(profile, where, roots)))

    @property
    def status(self) -> Status:
        """Whether it can be reached: `env.status.state`, and `async for change in env.status`."""
        return self._backend.status

    async def probe(self) -> str:
        """Ask it: `"ready"` when the environment answers and can run things."""
        return await self._backend.probe()

    def path(self, path: str | PathUri) -> EnvironmentPath:
        """A path object for the files of this environment. The path must be absolute.

        Raises:
            PathUriError: if it is not.
        """
        return EnvironmentPath(self.files, path if isinstance(path, PathUri) else PathUri.parse(path))

    async def run(
        self,
        argv: Sequence[str | EnvironmentPath],
        *,
        input: bytes | None = None,  # noqa: A002 - the name that subprocess has for it
        capture: bool | CapturedOutput = True,
        check: bool = True,
        cwd: AnyPath | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        extra_env: Mapping[str, str] | None = None,
        env_policy: EnvPolicy | None = None,
        tty: bool = False,
        arg0: str | None = None,
        sandbox: SandboxProfile | None = None,
        allow_gaps: bool = False,
    ) -> CompletedProcess:
        """Run a program to its end, as `trio.run_process` does here.

        **Input**: `input` is all that the program can read; then, and with `None`, stdin is at end of file.
        **Output**: with `capture`, what it writes is in the result. All of it: `run` returns when the
        program has ended *and* nobody has its output open any more.
        **Error checking**: with `check`, a status other than 0 raises `ProcessFailed`.
        **Cancellation**: ends the program and everything it started, then raises `trio.Cancelled`. What was
        captured until then is in `capture`, if that is a `CapturedOutput`, and at `captured_output(error)`.

        Args:
            argv: program and arguments. No shell is involved.
            cwd: the environment's own working directory if `None`; a relative one is from there.
            env: the complete environment, if given. Else that of the environment.
            extra_env: laid over it.
            env_policy: how to make it from the environment's own variables instead.
            tty: run it on a terminal, which merges stdout and stderr.
            arg0: what the program sees as its own name.
            sandbox: what the program, and all that it starts, may touch; `sandboxed` has more to say. Its
                `project_roots` are `cwd`, which must be given then. Refused where `sandboxed` has given
                one already.
            allow_gaps: go on when output was lost for good; without it that raises `OutputGap`.

        Raises:
            ProcessNotStarted: if it could not be started, with the reason as `__cause__`.
            ProcessFailed: see `check`.
            OutputGap: if the environment lost output before it could be fetched.
            ConnectionLost: if the environment was lost.
        """
        wanted = isinstance(capture, CapturedOutput) or capture
        output = capture if isinstance(capture, CapturedOutput) else CapturedOutput()
        process: Process | None = None
        try:
            async with self.open_process(
                argv,
                stdin=bool(input),
                cwd=cwd,
                env=env,
                extra_env=extra_env,
                env_policy=env_policy,
                tty=tty,
                arg0=arg0,
                sandbox=sandbox,
                _input_size=len(input) if input else None,
            ) as process:
                if tty and not input:
                    assert process.stdin is not None
                    await process.stdin.aclose()
                if input:
                    async with open_nursery() as nursery:
                        nursery.start_soon(_feed, process, input)
                        await _collect(process, output if wanted else None, allow_gaps)
                        nursery.cancel_scope.cancel()  # it has ended without reading its input
                else:
                    await _collect(process, output if wanted else None, allow_gaps)
                returncode = await process.wait()
        except BaseException as error:
            if process is not None:
                error.captured_output = output  # type: ignore[attr-defined]
            raise
        stdout = bytes(output.stdout) if wanted else None
        stderr = bytes(output.stderr) if wanted else None
        if check and returncode:
            failed = ProcessFailed(
                process.argv, self.name, returncode, stdout, stderr, process.receipt, process.sandbox_denied
            )
            failed.captured_output = output  # type: ignore[attr-defined]
            raise failed
        return CompletedProcess(
            process.argv, returncode, stdout, stderr, process.receipt, process.sandbox_denied
        )

    @asynccontextmanager
    async def open_process(
        self,
        argv: Sequence[str | EnvironmentPath],
        *,
        stdin: bool = False,
        cwd: AnyPath | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        extra_env: Mapping[str, str] | None = None,
        env_policy: EnvPolicy | None = None,
        tty: bool = False,
        arg0: str | None = None,
        sandbox: SandboxProfile | None = None,
        _input_size: int | None = None,
    ) -> AsyncIterator[Process]:
        """Start a program and work with it while it runs. The arguments are those of `run`, and `stdin`.

        Leaving the block, by cancellation too, ends the program and everything that it started, here or
        there; `process.receipt` says what that took. Call `process.wait()` first to let it finish.

        Args:
            stdin: open a pipe to the program's stdin; without it stdin is at end of file. A terminal's
                stdin is always open.

        Raises:
            ProcessNotStarted: if it could not be started, with the reason as `__cause__`.
        """
        process = await self._start(
            argv, stdin, cwd, env, extra_env, env_policy, tty, arg0, sandbox, input_size=_input_size
        )
        try:
            yield process
        except BaseException:
            await self._end(process, body_failed=True)
            raise
        await self._end(process, body_failed=False)

    async def start_detached(
        self,
        name: str,
        argv: Sequence[str | EnvironmentPath],
        *,
        cwd: AnyPath | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        extra_env: Mapping[str, str] | None = None,
        env_policy: EnvPolicy | None = None,
        tty: bool = False,
        stdin: bool = False,
        sandbox: SandboxProfile | None = None,
    ) -> None:
        """Start a program that is to outlive the block that starts it, under a name to find it by.

        It ends with its environment: a local one when `open_environment` is left, one on a server when its
        session ends. `attach` gives access to it; only `kill` or `terminate` there end it before.

        Raises:
            ProcessNotStarted: as `open_process`; also if the name is taken.
        """
        await self._start(argv, stdin, cwd, env, extra_env, env_policy, tty, None, sandbox, detached_as=name)

    @asynccontextmanager
    async def attach(self, name: str, *, stdin: bool = False, tty: bool = False) -> AsyncIterator[Process]:
        """Work with a program that `start_detached` started. Leaving the block leaves it running.

        Its output is delivered from the beginning, or from what is retained, with `OutputGap` for the rest.

        Args:
            stdin: whether to write to it; it must have been started with `stdin`, or on a terminal.
            tty: whether it was started on a terminal, as far as its input and its size are concerned.

        Raises:
            InvalidRequest: if there is no process of that name.
        """
        backend = await self._backend.processes.attach(name)
        inbox = Inbox()
        backend.subscribe(inbox, history=True)
        try:
            yield Process(backend, inbox, (name,), self.name, stdin=stdin, tty=tty)
        finally:
            backend.unsubscribe(inbox)
            inbox.abandon()

    async def _start(
        self,
        argv: Sequence[str | EnvironmentPath],
        stdin: bool,
        cwd: AnyPath | os.PathLike[str] | None,
        env: Mapping[str, str] | None,
        extra_env: Mapping[str, str] | None,
        env_policy: EnvPolicy | None,
        tty: bool,
        arg0: str | None,
        sandbox: SandboxProfile | None,
        *,
        detached_as: str | None = None,
        input_size: int | None = None,
    ) -> Process:
        words = _checked_argv(argv)
        if env is not None and env_policy is not None:
            raise UsageError("env is the complete environment: give either env or env_policy")
        try:
            where = await (self._working_directory() if cwd is None else self._locate(cwd))
            params = ProcessStartParams(
                process_id=f"{self._token}-{next(self._numbers)}" if detached_as is None else detached_as,
                argv=words,
                cwd=where,
                env={**(env or {}), **(extra_env or {})},
                tty=tty,
                env_policy=env_policy or (INHERIT_ALL if env is None else None),
                pipe_stdin=stdin and not tty,
                arg0=arg0,
                sandbox=None if sandbox is None else _sandbox(sandbox, None if cwd is None else where, ()),
            )
            inbox = Inbox()
            sink = inbox if detached_as is None else None  # detached, it must not wait for a reader
            backend = await self._backend.processes.start(params, sink, input_size=input_size)
        except (RpcError, NotSupported, PathUriError) as error:
            raise ProcessNotStarted(words[0], self.name, str(error)) from error
        return Process(backend, inbox, words, self.name, stdin=stdin or tty, tty=tty)

    async def _locate(self, path: AnyPath | os.PathLike[str], base: PathUri | None = None) -> PathUri:
        if isinstance(path, PathUri):
            return path
        if isinstance(path, EnvironmentPath):
            if path._files is not self.files:
                raise UsageError(f"{path} belongs to another environment: copy it by EnvironmentPath.copy_to")
            return path.uri
        text = os.fspath(path)
        try:
            return PathUri.parse(text)
        except PathUriError:
            if text.startswith("file:") or not text:
                raise
        return (base or await self._working_directory()).join(text)

    async def _working_directory(self) -> PathUri:
        return (await self.info()).cwd or PathUri.parse("file:///")

    async def _end(self, process: Process, *, body_failed: bool) -> None:
        backend, inbox = process._backend, process._inbox
        hurried = body_failed and self.status.state != "connected"
        patience = LOST_DEADLINE if hurried else TERMINATE_DEADLINE
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + patience) as scope:
                termination = await backend.terminate()
                process.receipt = termination.receipt
            if scope.cancelled_caught and not body_failed:
                raise ConnectionLost(f"{self.name} did not confirm the end of {process.argv[0]!r}")
        except (ExecenvError, OSError):
            # With the connection gone nothing can be learned; the error that matters is the body's, if the
            # process had not already ended by itself.
            if not body_failed and not inbox.closed:
                raise
        finally:
            backend.unsubscribe(inbox)
            inbox.abandon()
            backend.release()


def _sandbox(profile: SandboxProfile, cwd: PathUri | None, roots: tuple[PathUri, ...]) -> Sandbox:
    if not isinstance(profile, SandboxProfile):
        raise UsageError(f"a sandbox is a profile, such as SandboxProfile.read_only(), not {profile!r}")
    roots = roots or (() if cwd is None else (cwd,))
    if profile.needs_workspace_roots and not roots:
        raise UsageError("this profile is about a workspace: say which, by workspace_roots= or cwd=")
    if profile.needs_cwd and cwd is None:
        raise UsageError("this profile has relative patterns: say by cwd= what they are relative to")
    return Sandbox(profile, cwd, roots)


def _checked_argv(argv: Sequence[str | EnvironmentPath]) -> tuple[str, ...]:
    if isinstance(argv, str | bytes):
        raise UsageError(
            f"argv must be a list of strings, not one string: write [{argv!r}], "
            f"or for a shell ['sh', '-c', {argv!r}]"
        )
    words = tuple(str(word) if isinstance(word, EnvironmentPath) else os.fspath(word) for word in argv)
    if not words:
        raise UsageError("argv must name a program")
    return words


async def _feed(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    try:
        await process.stdin.send_all(data)
        await process.stdin.aclose()
    except trio.BrokenResourceError:
        return  # it ended without reading all; its status tells whether that was an error
    except ConnectionLost:
        if process._inbox.error is None:  # or else who collects its output raises the same
            raise


async def _collect(process: Process, output: CapturedOutput | None, allow_gaps: bool) -> None:
    while True:
        try:
            async for chunk in process:
                if output is not None:
                    (output.stderr if chunk.stream == "stderr" else output.stdout).extend(chunk.data)
            return
        except OutputGap:
            if not allow_gaps:
                raise
