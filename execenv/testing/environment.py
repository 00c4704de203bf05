"""An environment whose programs are functions of the test. Runs nothing, touches no disk, needs no clock.

async def build(process):
    process.write_stdout(b"compiling\\n")
    await trio.sleep(3600)  # no time at all, under trio.testing.MockClock(autojump_threshold=0)
    return 2

async with open_fake_environment({"make": build}) as env:
    done = await env.run(["make"], check=False)
    assert done.returncode == 2
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Literal

import trio
from attrs import define, field, frozen

from execenv._service import open_nursery
from execenv._version import __version__
from execenv.abc import (
    EnvironmentBackend,
    Event,
    HttpClient,
    HttpStream,
    KillReceipt,
    Process,
    Processes,
    Sink,
    Termination,
)
from execenv.environment import Environment
from execenv.errors import InternalError, InvalidParams, InvalidRequest, NotSupported
from execenv.local.environment import child_environment
from execenv.local.output_log import RETAINED_BYTES, OutputLog
from execenv.paths import ForeignPathError, PathUri
from execenv.protocol import (
    SERVER_CAPABILITIES,
    ConfigLayers,
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentInfo,
    HttpHeader,
    HttpRequestParams,
    ProcessReadResult,
    ProcessStartParams,
    Shell,
)
from execenv.status import Status
from execenv.testing.files import MemoryFileSystem

Script = Callable[["ScriptedProcess"], Awaitable[int | None]]
"""A program: told its process, returns the exit code; `None` for 0."""

SignalName = Literal["interrupt", "terminate"]
_SIGNALS: dict[SignalName, int] = {"interrupt": 2, "terminate": 15}
_KILLED = 128 + 9

INPUT_CHUNKS = 128  # protocol.md §4.6
_INTERRUPT, _END_OF_FILE = b"\x03", b"\x04"


class ScriptedProcess(Process):
    """A process that is a function. The first part is for that function, and for the test beside it.

    Signals end it with 128 + n, unless it has a `trap`; a kill always does. On a terminal, Ctrl-C and Ctrl-D
    in the input are an interrupt and an end of file; nothing is echoed, and no line is edited.

    Attributes:
        pid: a number that no process of this machine has anything to do with.
        argv: program and arguments.
        cwd: the working directory, as text.
        env: the variables it was given.
        tty: whether it is on a terminal.
        size: rows and columns of that.
        files: those of its environment.
        signals: names of what was sent to it, in order: `"interrupt"`, `"terminate"`, `"kill"`.
        returncode: `None` while it runs.
        finished: set when the last of its output was seen.
    """

    def __init__(
        self,
        params: ProcessStartParams,
        owner: ScriptedProcesses,
        env: Mapping[str, str],
        files: MemoryFileSystem,
        retained_bytes: int,
    ) -> None:
        self.process_id = params.process_id
        self.pid = next(owner.pids)
        self.argv = params.argv
        self.cwd = _native(params.cwd)
        self.env = dict(env)
        self.tty = params.tty
        self.size = (24, 80)
        self.files = files
        self.signals: list[str] = []
        self.finished = trio.Event()
        self._owner = owner
        self._open_stdin = params.tty or params.pipe_stdin
        self._log = OutputLog(retained_bytes)
        self._sinks: list[Sink] = []
        self._changed = trio.lowlevel.ParkingLot()
        self._input: deque[bytes] = deque()
        self._input_ended = not self._open_stdin
        self._input_changed = trio.lowlevel.ParkingLot()
        self._line = b""
        self._write_ids: set[str] = set()
        self._traps: dict[str, trio.Event] = {}
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<execenv.testing.ScriptedProcess {self.argv[0]!r}>"

    # For the script.

    @property
    def returncode(self) -> int | None:
        return self._log.exit_code

    def write_stdout(self, data: bytes) -> None:
        """Print; one call is one chunk. Goes on also when nobody reads, see `send_stdout`."""
        self._print("stdout", data)

    def write_stderr(self, data: bytes) -> None:
        """Print on stderr; on a terminal there is no difference."""
        self._print("stderr", data)

    async def send_stdout(self, data: bytes) -> None:
        """Print, and wait while too much of it is unread, as a program with a full pipe does."""
        self._print("stdout", data)
        await trio.lowlevel.checkpoint()
        while True:
            full = next((sink for sink in self._sinks if sink.full), None)
            if full is None:
                return
            await full.wait_room()

    async def read_stdin(self) -> bytes:
        """What was written to stdin in one piece; `b""` at the end of file."""
        await trio.lowlevel.checkpoint()
        if self._line:
            line, self._line = self._line, b""
            return line
        return await self._next_input()

    async def read_line(self) -> bytes:
        """The next line of stdin, with its end; without one at the end of file, and then `b""`.

        Loses nothing when it is cancelled.
        """
        await trio.lowlevel.checkpoint()
        while b"\n" not in self._line:
            data = await self._next_input()
            if not data:
                break
            self._line += data
        end = self._line.find(b"\n") + 1 or len(self._line)
        line, self._line = self._line[:end], self._line[end:]
        return line

    async def _next_input(self) -> bytes:
        while not self._input:
            if self._input_ended:
                return b""
            await self._input_changed.park()
        data = self._input.popleft()
        self._input_changed.unpark_all()
        return data

    def trap(self, signal: SignalName) -> trio.Event:
        """From now on that signal does not end the process but sets the event that this returns.

        To wait for another one, call it again.
        """
        event = self._traps[signal] = trio.Event()
        return event

    def exit(self, code: int = 0) -> None:
        """The program itself ends now; what its function goes on to do is done by what it has left behind."""
        if not self._log.exited:
            self._publish(self._log.exit(code))
            self._input.clear()
            self._input_ended = True
            self._input_changed.unpark_all()

    def _print(self, stream: str, data: bytes) -> None:
        if not self._log.closed and data:
            self._publish(self._log.append("pty" if self.tty else stream, bytes(data)))

    def _publish(self, event: Event) -> None:
        for sink in list(self._sinks):
            sink.put(event)
        self._changed.unpark_all()

    async def run(self, script: Script) -> None:
        """The life of the process. What the function raises ends the environment: it is part of the test."""
        code: int | None = None
        try:
            with self._scope:
                code = await script(self) or 0
        finally:
            self.exit(_KILLED if code is None else code)
            if not self._log.closed:
                self._publish(self._log.close())
            self.finished.set()

    # What an environment does.

    def subscribe(self, sink: Sink, *, history: bool = False) -> None:
        for event in self._log.history() if history else ():
            sink.put(event)
        self._sinks.append(sink)

    def unsubscribe(self, sink: Sink) -> None:
        with suppress(ValueError):
            self._sinks.remove(sink)

    async def read(
        self, after_seq: int = 0, max_bytes: int | None = None, wait: float = 0.0
    ) -> ProcessReadResult:
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(wait):
            while wait > 0 and not self._log.answers(after_seq):
                await self._changed.park()
        return self._log.read(after_seq, max_bytes)

    def write_nowait(self, data: bytes, write_id: str) -> str | None:
        if write_id in self._write_ids:
            return "accepted"
        if not self._open_stdin:
            return "stdinClosed"
        if self._log.exited:
            raise InternalError("failed to write to process stdin")
        if len(self._input) >= INPUT_CHUNKS and not self._input_ended:
            return None
        self._write_ids.add(write_id)
        if not self._input_ended:
            self._type(data) if self.tty else self._take(data)
        return "accepted"

    def _take(self, data: bytes) -> None:
        if data:
            self._input.append(data)
        self._input_changed.unpark_all()

    def _type(self, data: bytes) -> None:
        """Input of a terminal."""
        before, interrupt, after = data.partition(_INTERRUPT)
        text, end, _ = before.partition(_END_OF_FILE)
        self._take(text)
        if end:
            self._input_ended = True
            self._input_changed.unpark_all()
        if interrupt:
            self._signal("interrupt")
            self._type(after)

    async def write(self, data: bytes, write_id: str) -> str:
        await trio.lowlevel.checkpoint()
        while (status := self.write_nowait(data, write_id)) is None:
            await self._input_changed.park()
        return status

    async def close_stdin(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.tty:
            raise NotSupported("a terminal has no end of file: write the character for it, 0x04")
        self._input_ended = True
        self._input_changed.unpark_all()

    async def interrupt(self) -> None:
        await trio.lowlevel.checkpoint()
        self._signal("interrupt")

    def _signal(self, name: SignalName) -> None:
        if self._log.exited:
            return
        self.signals.append(name)
        trap = self._traps.get(name)
        if trap is not None:
            trap.set()
        else:
            self.exit(128 + _SIGNALS[name])
            self._scope.cancel()

    async def resize(self, rows: int, columns: int) -> None:
        await trio.lowlevel.checkpoint()
        if not self.tty:
            raise NotSupported("the process has no terminal: start it with tty")
        self.size = (rows, columns)

    async def terminate(self, *, receipt: bool = True, grace: float = 0.0) -> Termination:
        await trio.lowlevel.checkpoint()
        running = not self._log.exited
        began = trio.current_time()
        if running and grace > 0:
            self._signal("terminate")
            with trio.move_on_after(grace):
                await self.finished.wait()
        if self.finished.is_set() or not (running or receipt):
            return Termination(running, KillReceipt() if receipt else None)
        self.signals.append("kill")
        self._scope.cancel()
        if not receipt:
            return Termination(running)
        with trio.CancelScope(shield=True):
            await self.finished.wait()
        return Termination(running, KillReceipt((self.pid,), trio.current_time() - began))

    @property
    def retained(self) -> int:
        return self._log.size

    def retain_behind(self, seq: int | None, max_bytes: int = 0) -> None:
        self._log.retain_behind(seq, max_bytes)

    def forget_output(self) -> None:
        self._log.forget()

    def release(self) -> None:
        self._owner.forget(self)


class ScriptedProcesses(Processes):
    """Starts functions.

    Attributes:
        started: all that were started, the newest last.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        programs: Mapping[str, Script],
        files: MemoryFileSystem,
        variables: Mapping[str, str],
        retained_bytes: int,
    ) -> None:
        self.started: list[ScriptedProcess] = []
        self.pids = count(1001)
        self._nursery = nursery
        self._programs = programs
        self._files = files
        self._variables = variables
        self._retained_bytes = retained_bytes
        self._by_id: dict[str, ScriptedProcess] = {}

    async def start(
        self, params: ProcessStartParams, sink: Sink | None = None, *, input_size: int | None = None
    ) -> ScriptedProcess:
        await trio.lowlevel.checkpoint()
        script = self._check(params)
        env = child_environment(params.env, params.env_policy, self._variables)
        process = ScriptedProcess(params, self, env, self._files, self._retained_bytes)
        if sink is not None:
            process.subscribe(sink)
        self._by_id[params.process_id] = process
        self.started.append(process)
        self._nursery.start_soon(process.run, script)
        return process

    def _check(self, params: ProcessStartParams) -> Script:
        if not params.argv:
            raise InvalidParams("argv must not be empty")
        confined = ("managed_network", "network_proxy", "shell_snapshot", "credential_providers")
        sandboxed = params.sandbox is not None and params.sandbox.profile.enforces
        if (
            sandboxed
            or params.enforce_managed_network
            or any(getattr(params, name) is not None for name in confined)
        ):
            raise NotSupported("a fake environment confines nothing, so the process was not started")
        taken = self._by_id.get(params.process_id)
        if taken is not None:
            raise InvalidRequest(f"process {params.process_id} already exists")
        try:
            if not self._files.is_directory(params.cwd):
                raise InternalError("Not a directory (os error 20)")
        except (FileNotFoundError, ForeignPathError):
            raise InternalError("No such file or directory (os error 2)") from None
        name = params.argv[0]
        names = (name, os.path.basename(name), "*")
        script = next((self._programs[name] for name in names if name in self._programs), None)
        if script is None:
            raise InternalError("No such file or directory (os error 2)")
        return script

    async def attach(self, process_id: str) -> ScriptedProcess:
        await trio.lowlevel.checkpoint()
        process = self._by_id.get(process_id)
        if process is None:
            raise InvalidRequest(f"unknown process id {process_id}")
        return process

    def forget(self, process: ScriptedProcess) -> None:
        """Its id is free again."""
        if self._by_id.get(process.process_id) is process:
            del self._by_id[process.process_id]


@frozen
class FakeResponse:
    """What a fake environment's HTTP gives back.

    Attributes:
        body: the whole of it, or its pieces as they are to come.
        headers: names in lower case.
        error: instead of the end of the body, it breaks off with these words.
    """

    status: int = 200
    body: bytes | tuple[bytes, ...] = b""
    headers: Mapping[str, str] = field(factory=dict)
    error: str | None = None


HttpHandler = Callable[[HttpRequestParams], FakeResponse | Awaitable[FakeResponse]]


class _FakeStream(HttpStream):
    def __init__(self, response: FakeResponse) -> None:
        self.status = response.status
        self.headers = tuple(HttpHeader(name, value) for name, value in response.headers.items())
        body = response.body
        self._pieces = deque([body] if isinstance(body, bytes) else body)
        self._error = response.error

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while self._pieces:
            if piece := self._pieces.popleft():
                return piece
        if self._error is not None:
            raise InternalError(self._error)
        return b""

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._pieces.clear()


class _FakeHttp(HttpClient):
    def __init__(self, handler: HttpHandler | None) -> None:
        self._handler = handler

    async def open_stream(self, params: HttpRequestParams) -> HttpStream:
        await trio.lowlevel.checkpoint()
        if self._handler is None:
            raise InternalError("http/request failed: this fake environment has no http")
        answer = self._handler(params)
        if inspect.isawaitable(answer):
            if params.timeout_ms is None:
                answer = await answer
            else:
                with trio.move_on_after(params.timeout_ms / 1000):
                    answer = await answer
                if inspect.isawaitable(answer):
                    raise InternalError("http/request failed: request timed out")
        assert isinstance(answer, FakeResponse)
        return _FakeStream(answer)


@define(eq=False)
class FakeEnvironment(EnvironmentBackend):
    """An environment of functions. Got from `open_fake_backend`.

    Attributes:
        processes: starts them, and has those that were started.
        files: its files.
    """

    name: str
    processes: ScriptedProcesses
    files: MemoryFileSystem
    http: HttpClient
    _cwd: PathUri
    _home: PathUri
    status: Status = field(factory=Status, init=False)

    async def info(self) -> EnvironmentInfo:
        await trio.lowlevel.checkpoint()
        return EnvironmentInfo(
            shell=Shell("sh", "/bin/sh"),
            cwd=self._cwd,
            executor_version=__version__,
            user_home_dir=self._home,
            temp_dir=PathUri.from_native("/tmp"),  # noqa: S108 - of the fake
            platform_os="linux",
            capabilities=dict(SERVER_CAPABILITIES),
        )

    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        await trio.lowlevel.checkpoint()
        nothing = ConfigLayers((), 0)
        return EnvironmentConfig(self._home, self._home.join(".codex"), self.name, nothing, nothing)

    async def probe(self) -> str:
        await trio.lowlevel.checkpoint()
        return "ready"


def _native(path: PathUri) -> str:
    return os.fsdecode(path.to_native())


@asynccontextmanager
async def open_fake_backend(
    programs: Mapping[str, Script] | None = None,
    *,
    files: Mapping[str, bytes | str] | None = None,
    http: HttpHandler | None = None,
    variables: Mapping[str, str] | None = None,
    cwd: str = "/work",
    name: str = "fake",
    retained_bytes: int = RETAINED_BYTES,
) -> AsyncIterator[FakeEnvironment]:
    """What `open_fake_environment` wraps, for who serves it: `partial(open_fake_backend, programs)` is what
    `open_memory_server` and `execenv.server.sessions` want. The arguments are the same."""
    disk = MemoryFileSystem(files or {}, directories=(cwd, "/tmp", "/home/user"))  # noqa: S108 - of the fake
    async with open_nursery() as nursery:
        processes = ScriptedProcesses(nursery, programs or {}, disk, variables or {}, retained_bytes)
        try:
            yield FakeEnvironment(
                name,
                processes,
                disk,
                _FakeHttp(http),
                PathUri.from_native(cwd),
                PathUri.from_native("/home/user"),
            )
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_fake_environment(
    programs: Mapping[str, Script] | None = None,
    *,
    files: Mapping[str, bytes | str] | None = None,
    http: HttpHandler | None = None,
    variables: Mapping[str, str] | None = None,
    cwd: str = "/work",
    name: str = "fake",
    retained_bytes: int = RETAINED_BYTES,
) -> AsyncIterator[Environment]:
    """An environment to test a program with. Leaving the block ends its processes.

    What a function of `programs` raises comes out of the block.

    Args:
        programs: by name, or by whole path; `"*"` is for all others.
        files: by absolute path. Directories are made as needed; `cwd`, `/tmp` and `/home/user` are there.
        http: answers the requests that the environment is told to make; may be async.
        variables: of the environment, which policies choose from.
        cwd: the working directory.
        name: for messages.
        retained_bytes: how much output of each process is kept for reading again.
    """
    async with open_fake_backend(
        programs,
        files=files,
        http=http,
        variables=variables,
        cwd=cwd,
        name=name,
        retained_bytes=retained_bytes,
    ) as backend:
        yield Environment(backend)
