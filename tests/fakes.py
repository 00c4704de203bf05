"""Stand-ins for tests: an environment without processes, and small programs for real ones."""

from __future__ import annotations

import math
import os
import select
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from textwrap import dedent
from typing import cast

import pytest
import trio
from attrs import Factory, define

from execenv.abc import (
    EnvironmentBackend,
    Event,
    HttpClient,
    KillReceipt,
    Process,
    Processes,
    Sink,
    Termination,
)
from execenv.errors import ConnectionLost, InternalError, InvalidRequest
from execenv.local.filesystem import LocalFileSystem
from execenv.local.mounts import Mounts
from execenv.local.output_log import OutputLog
from execenv.protocol import (
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentInfo,
    ProcessReadResult,
    ProcessStartParams,
    Shell,
)
from execenv.remote.session import Dial
from execenv.status import Status
from execenv.transports.channel import Channel

MOUNTS = Mounts()


def unmeasured() -> dict[str, str]:
    """Our environment, for a program whose coverage other tests measure in less time."""
    return {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}


def python(code: str, *args: str) -> list[str]:
    """The command line that runs `code` in a Python that starts quickly."""
    return [sys.executable, "-I", "-S", "-c", dedent(code), *args]


@contextmanager
def program_file(text: str, mode: int = 0o755) -> Iterator[str]:
    """The path of a file with that text, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "program")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, mode)
        yield path


@define(eq=False)
class Watched:
    """Processes that were alive when they were added, told apart from later ones of the same pid (Linux)."""

    _pidfds: dict[int, int] = Factory(dict)

    def add(self, pid: int) -> None:
        self._pidfds[pid] = os.pidfd_open(pid)

    @property
    def pids(self) -> set[int]:
        return set(self._pidfds)

    def alive(self) -> set[int]:
        """Those that run at this moment."""
        return {pid for pid, fd in self._pidfds.items() if not select.select([fd], [], [], 0)[0]}

    async def wait_gone(self) -> None:
        """Return when all have ended."""
        for pidfd in self._pidfds.values():
            await trio.lowlevel.wait_readable(pidfd)

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()


def only(channel: Channel) -> Dial:
    """Dials that channel, which works once."""

    @asynccontextmanager
    async def dial() -> AsyncIterator[Channel]:
        yield channel

    return dial


class FakeProcess(Process):
    """A process that does what the test tells it.

    Attributes:
        ending: `terminate` waits for it, whoever is cancelled.
        written: what was taken from `process/write`, in order; `None` for the end of stdin.
        room: how many more writes are taken at once; those beyond wait for `take`.
        reads: how many more `process/read` are answered at once; those beyond wait for `answer_reads`.
        readers: how many `process/read` wait now.
        signals: names of what was sent to it.
    """

    def __init__(self, process_id: str, *, room: float = math.inf) -> None:
        self.process_id = process_id
        self.written: list[bytes | None] = []
        self.room = room
        self.reads = math.inf
        self.readers = 0
        self.signals: list[str] = []
        self.released = False
        self.ending = trio.Event()
        self.ending.set()
        self._log = OutputLog()
        self._sinks: list[Sink] = []
        self._write_ids: set[str] = set()
        self._changed = trio.lowlevel.ParkingLot()
        self._waiting = trio.lowlevel.ParkingLot()

    # What the test does.

    def emit(self, data: bytes, stream: str = "stdout") -> None:
        self._publish(self._log.append(stream, data))

    async def emit_all(self, data: bytes, count: int) -> None:
        """Emit `data` so many times, held back as a real process is while a sink is full."""
        for _ in range(count):
            self.emit(data)
            for sink in list(self._sinks):
                while sink.full:
                    with suppress(ConnectionLost):
                        await sink.wait_room()

    def exit(self, code: int = 0) -> None:
        self._publish(self._log.exit(code))

    def close(self) -> None:
        self._publish(self._log.close())

    def take(self, count: int = 1) -> None:
        """Take so many more writes."""
        self.room += count
        self._waiting.unpark_all()

    def answer_reads(self) -> None:
        """Answer all that wait, and all that come."""
        self.reads = math.inf
        self._changed.unpark_all()

    def _publish(self, event: Event) -> None:
        for sink in self._sinks:
            sink.put(event)
        self._changed.unpark_all()

    # What an environment does.

    @property
    def retained(self) -> int:
        return self._log.size

    def retain_behind(self, seq: int | None, max_bytes: int = 0) -> None:
        self._log.retain_behind(seq, max_bytes)

    def forget_output(self) -> None:
        self._log.forget()

    def subscribe(self, sink: Sink, *, history: bool = False) -> None:
        for event in self._log.history() if history else ():
            sink.put(event)
        self._sinks.append(sink)

    def unsubscribe(self, sink: Sink) -> None:
        self._sinks.remove(sink)

    async def read(
        self, after_seq: int = 0, max_bytes: int | None = None, wait: float = 0.0
    ) -> ProcessReadResult:
        self.readers += 1
        try:
            while self.reads < 1:
                await self._changed.park()
            self.reads -= 1
            with trio.move_on_after(wait):
                while not self._log.answers(after_seq):
                    await self._changed.park()
        finally:
            self.readers -= 1
        return self._log.read(after_seq, max_bytes)

    def write_nowait(self, data: bytes, write_id: str) -> str | None:
        if write_id in self._write_ids:
            return "accepted"
        if self._log.exited:
            raise InternalError("failed to write to process stdin")
        if self.room < 1:
            return None
        self.room -= 1
        self._write_ids.add(write_id)
        self.written.append(data)
        return "accepted"

    async def write(self, data: bytes, write_id: str) -> str:
        while (status := self.write_nowait(data, write_id)) is None:
            await self._waiting.park()
        return status

    async def close_stdin(self) -> None:
        await trio.lowlevel.checkpoint()
        self.written.append(None)

    async def interrupt(self) -> None:
        await trio.lowlevel.checkpoint()
        self.signals.append("interrupt")

    async def resize(self, rows: int, columns: int) -> None:
        await trio.lowlevel.checkpoint()

    async def terminate(self, *, receipt: bool = True, grace: float = 0.0) -> Termination:
        with trio.CancelScope(shield=True):
            await self.ending.wait()
        running = not self._log.exited
        self.signals.append("terminate")
        if running:
            self.exit(137)
            self.close()
        return Termination(running, KillReceipt() if receipt else None)

    def release(self) -> None:
        self.released = True


class FakeProcesses(Processes):
    """Starts `FakeProcess`es.

    Attributes:
        started: those of each id, the newest last.
        may_start: `start` waits for it.
        failure: what `start` raises instead.
        room: of the processes that are started next.
    """

    def __init__(self) -> None:
        self.started: dict[str, list[FakeProcess]] = {}
        self.may_start = trio.Event()
        self.may_start.set()
        self.failure: Exception | None = None
        self.room = math.inf

    async def start(
        self, params: ProcessStartParams, sink: Sink | None = None, *, input_size: int | None = None
    ) -> FakeProcess:
        await self.may_start.wait()
        if self.failure is not None:
            raise self.failure
        process = FakeProcess(params.process_id, room=self.room)
        if sink is not None:
            process.subscribe(sink)
        self.started.setdefault(params.process_id, []).append(process)
        return process

    async def attach(self, process_id: str) -> FakeProcess:
        await trio.lowlevel.checkpoint()
        raise InvalidRequest(f"unknown process id {process_id}")


class FakeEnvironment(EnvironmentBackend):
    """An environment that runs nothing.

    Attributes:
        closed: whether its block was left.
        may_inform: `info` waits for it.
    """

    def __init__(self) -> None:
        self.name = "fake"
        self.status = Status()
        self.fakes = FakeProcesses()
        self.processes = self.fakes
        self.files = LocalFileSystem(MOUNTS)
        self.http = cast(HttpClient, None)  # no test with this one asks for HTTP
        self.closed = False
        self.capabilities: dict[str, bool] = {}
        self.may_inform = trio.Event()
        self.may_inform.set()

    async def info(self) -> EnvironmentInfo:
        await self.may_inform.wait()
        return EnvironmentInfo(Shell("sh", "/bin/sh"), capabilities=self.capabilities)

    async def probe(self) -> str:
        await trio.lowlevel.checkpoint()
        return "ready"

    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        raise NotImplementedError


class FakeHost:
    """Opens a `FakeEnvironment` for each session.

    Attributes:
        opened: all of them, the newest last.
        failure: what the next `open` raises instead.
        may_open: `open` waits for it.
        may_inform: whether `info` of those opened next answers at once.
        capabilities: of those opened next.
    """

    def __init__(self) -> None:
        self.opened: list[FakeEnvironment] = []
        self.failure: Exception | None = None
        self.may_open = trio.Event()
        self.may_open.set()
        self.may_inform = True
        self.capabilities: dict[str, bool] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[EnvironmentBackend]:
        await self.may_open.wait()
        if self.failure is not None:
            raise self.failure
        environment = FakeEnvironment()
        environment.capabilities = self.capabilities
        if not self.may_inform:
            environment.may_inform = trio.Event()
        self.opened.append(environment)
        try:
            yield environment
        finally:
            environment.closed = True


lacks_bubblewrap = shutil.which("bwrap") is None and os.environ.get("EXECENV_REQUIRE_TOOLS") != "1"

requires_bubblewrap = pytest.mark.skipif(lacks_bubblewrap, reason="bubblewrap is not installed")
"""For tests of what needs it. Where tools are required they run all the same, and fail."""
