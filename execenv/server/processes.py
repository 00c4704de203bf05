"""The routes of `process/*`, over `abc.Processes` (protocol.md §4)."""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from execenv import codec
from execenv._service import Turns
from execenv.abc import Closed, Event, Exited, KillReceipt, Output, Process
from execenv.errors import ConnectionLost, InvalidRequest
from execenv.protocol import (
    PROCESS_CLOSE_STDIN,
    PROCESS_CLOSED,
    PROCESS_EXITED,
    PROCESS_READ,
    PROCESS_RESIZE,
    PROCESS_SIGNAL,
    PROCESS_START,
    PROCESS_TERMINATE,
    PROCESS_WRITE,
    Nothing,
    ProcessClosedParams,
    ProcessCloseStdinParams,
    ProcessExitedParams,
    ProcessOutputTakenParams,
    ProcessReadParams,
    ProcessReadResult,
    ProcessResizeParams,
    ProcessSignalParams,
    ProcessStartParams,
    ProcessStartResult,
    ProcessTerminateParams,
    ProcessTerminateResult,
    ProcessWriteParams,
    ProcessWriteResult,
    WireReceipt,
    WireSurvivor,
)

if TYPE_CHECKING:
    from execenv.server.sessions import Session

MAX_WINDOW = 64 * 1024 * 1024
UNDER_WAY_STEP = 64 * 1024
MAX_RETAINED = 64 * 1024 * 1024
"""Output that the closed processes of one session may keep together; above it the oldest forget theirs."""


class _Entry:
    """One process id of a session: its process, and who waits to write to it. A `Sink` of its events."""

    def __init__(self, session: Session, process_id: str) -> None:
        self.process_id = process_id
        self.process: Process | None = None
        self.starting = trio.CancelScope()
        self.started = trio.Event()
        self._session = session
        self._template = codec.OutputTemplate(process_id)
        self.turns = Turns()  # of who writes
        self._window: int | None = None
        self._under_way: deque[tuple[int, int]] = deque()  # seq and size of what the client has not taken
        self._under_way_bytes = 0
        self._taken = trio.lowlevel.ParkingLot()

    # Events, to the connection that is attached. While there is none they are only retained.

    @property
    def full(self) -> bool:
        channel = self._session.channel
        return channel is not None and (channel.congested or self._beyond_window)

    @property
    def _beyond_window(self) -> bool:
        return self._window is not None and self._under_way_bytes >= self._window

    async def wait_room(self) -> None:
        channel = self._session.channel
        if channel is None:
            await trio.lowlevel.checkpoint()
        elif self._beyond_window:
            await self._taken.park()
        else:
            with suppress(ConnectionLost):
                await channel.wait_room()

    def _note_under_way(self, seq: int, size: int) -> None:
        # Small chunks are counted together: a child that writes bytes must not cost a tuple for each.
        if self._under_way and self._under_way[-1][1] < UNDER_WAY_STEP:
            size_before = self._under_way.pop()[1]
            self._under_way.append((seq, size_before + size))
        else:
            self._under_way.append((seq, size))
        self._under_way_bytes += size

    def set_window(self, window: int | None) -> None:
        self._window = window

    def note_taken(self, seq: int) -> None:
        """The client took everything up to `seq`."""
        while self._under_way and self._under_way[0][0] <= seq:
            self._under_way_bytes -= self._under_way.popleft()[1]
        self._taken.unpark_all()

    def connection_changed(self) -> None:
        """Nothing is under way any more: what was lost with a connection is fetched by `process/read`.

        The window goes too: whoever comes next may be a client that knows of none.
        """
        self._window = None
        self._under_way.clear()
        self._under_way_bytes = 0
        self._taken.unpark_all()

    def put(self, event: Event) -> None:
        channel = self._session.channel
        if channel is not None:
            with suppress(ConnectionLost):
                if type(event) is Output:
                    channel.send_nowait(*self._template.encode(event.seq, event.stream, event.data))
                    if self._window is not None:
                        self._note_under_way(event.seq, len(event.data))
                else:
                    data = self._encode(event)
                    if data:
                        channel.send_nowait(data)
        if isinstance(event, Closed):
            self._session.processes.note_closed(self)

    def _encode(self, event: Event) -> bytes:
        if isinstance(event, Exited):
            exited = ProcessExitedParams(self.process_id, event.seq, event.exit_code, event.sandbox_denied)
            return codec.encode_notification(PROCESS_EXITED.name, codec.unstructure(exited))
        if isinstance(event, Closed):
            closed = ProcessClosedParams(self.process_id, event.seq)
            return codec.encode_notification(PROCESS_CLOSED.name, codec.unstructure(closed))
        return b""  # the client learns of holes from the seqs, and of failures from its next call


class ProcessTable:
    """The processes of one session, by id, and the handlers of `process/*`."""

    def __init__(self, session: Session, retention: float) -> None:
        self._session = session
        self._backend = session.environment.processes
        self._retention = retention
        self._entries: dict[str, _Entry] = {}
        self._closed: deque[tuple[float, _Entry]] = deque()
        self._some_closed = trio.Event()
        self._retained: deque[_Entry] = deque()  # closed, the oldest first, and not forgotten
        self._retained_bytes = 0

    # Retention (§4.9).

    def note_closed(self, entry: _Entry) -> None:
        self._closed.append((trio.current_time() + self._retention, entry))
        self._some_closed.set()
        self._retained.append(entry)
        self._retained_bytes += entry.process.retained if entry.process else 0
        while self._retained_bytes > MAX_RETAINED:
            old = self._retained.popleft()
            if old.process is not None:
                self._retained_bytes -= old.process.retained
                old.process.forget_output()

    async def expire_for_ever(self) -> None:
        """Free the ids of processes that have been closed for long enough, until cancelled."""
        while True:
            await self._some_closed.wait()
            while self._closed:
                deadline, entry = self._closed[0]
                await trio.sleep_until(deadline)
                self._closed.popleft()
                if self._entries.get(entry.process_id) is entry:
                    del self._entries[entry.process_id]
                if self._retained and self._retained[0] is entry:
                    self._retained.popleft()
                    self._retained_bytes -= entry.process.retained if entry.process else 0
                if entry.process is not None:
                    entry.process.release()
            self._some_closed = trio.Event()

    # Handlers. The part before the first `await` runs in the order of arrival.

    def start(self, params: ProcessStartParams) -> Coroutine[Any, Any, ProcessStartResult]:
        if params.process_id in self._entries:
            raise InvalidRequest(f"process {params.process_id} already exists")
        entry = self._entries[params.process_id] = _Entry(self._session, params.process_id)
        entry.set_window(_bounded(params.output_window))
        return self._start(entry, params)

    async def _start(self, entry: _Entry, params: ProcessStartParams) -> ProcessStartResult:
        try:
            with entry.starting:
                entry.process = await self._backend.start(params, entry)
                return ProcessStartResult(params.process_id, "none")
            raise InvalidRequest(f"process {params.process_id} start was cancelled")
        finally:
            if entry.process is None:
                del self._entries[params.process_id]
            entry.started.set()

    async def _process(self, entry: _Entry) -> Process | None:
        if entry.process is None:
            await entry.started.wait()
        return entry.process

    async def read(self, params: ProcessReadParams) -> ProcessReadResult:
        entry = self._entries.get(params.process_id)
        process = await self._process(entry) if entry is not None else None
        if process is None:
            raise InvalidRequest(f"unknown process id {params.process_id}")
        channel = self._session.channel
        if channel is not None:  # before the answer is made, or a thousand of them wait as objects
            with suppress(ConnectionLost):
                while channel.congested:
                    await channel.wait_room()
        return await process.read(params.after_seq or 0, params.max_bytes, (params.wait_ms or 0) / 1000)

    def write(
        self, params: ProcessWriteParams
    ) -> ProcessWriteResult | Coroutine[Any, Any, ProcessWriteResult]:
        entry = self._entries.get(params.process_id)
        if entry is None:
            return ProcessWriteResult("unknownProcess")
        if entry.process is not None and entry.turns.idle:
            status = entry.process.write_nowait(params.chunk, params.write_id)
            if status is not None:
                return ProcessWriteResult(status)
        return self._write_in_turn(entry, params, *entry.turns.take())

    async def _write_in_turn(
        self, entry: _Entry, params: ProcessWriteParams, before: trio.Event | None, done: trio.Event
    ) -> ProcessWriteResult:
        try:
            if before is not None:
                await before.wait()
            process = await self._process(entry)
            if process is None:
                return ProcessWriteResult("unknownProcess")
            return ProcessWriteResult(await process.write(params.chunk, params.write_id))
        finally:
            done.set()

    def close_stdin(self, params: ProcessCloseStdinParams) -> Coroutine[Any, Any, Nothing]:
        entry = self._known(params.process_id)
        return self._close_stdin_in_turn(entry, *entry.turns.take())

    async def _close_stdin_in_turn(
        self, entry: _Entry, before: trio.Event | None, done: trio.Event
    ) -> Nothing:
        try:
            if before is not None:
                await before.wait()
            process = await self._process(entry)
            if process is not None:
                await process.close_stdin()
            return Nothing()
        finally:
            done.set()

    def _known(self, process_id: str) -> _Entry:
        try:
            return self._entries[process_id]
        except KeyError:
            raise InvalidRequest(f"unknown process id {process_id}") from None

    def output_taken(self, params: ProcessOutputTakenParams) -> None:
        entry = self._entries.get(params.process_id)
        if entry is not None:
            if params.window is not None:
                entry.set_window(_bounded(params.window))
            entry.note_taken(params.seq)

    def connection_changed(self) -> None:
        """Another connection is attached, or none any more."""
        for entry in self._entries.values():
            entry.connection_changed()

    async def signal(self, params: ProcessSignalParams) -> Nothing:
        entry = self._entries.get(params.process_id)
        process = await self._process(entry) if entry is not None else None
        if process is not None:
            await process.interrupt()
        return Nothing()

    async def resize(self, params: ProcessResizeParams) -> Nothing:
        process = await self._process(self._known(params.process_id))
        if process is not None:
            await process.resize(params.rows, params.columns)
        return Nothing()

    async def terminate(self, params: ProcessTerminateParams) -> ProcessTerminateResult:
        entry = self._entries.get(params.process_id)
        if entry is None:
            return ProcessTerminateResult(False)
        if entry.process is None:
            entry.starting.cancel()
            await entry.started.wait()
            if entry.process is None:
                return ProcessTerminateResult(True)
        done = await entry.process.terminate(receipt=params.receipt, grace=params.grace_ms / 1000)
        return ProcessTerminateResult(
            done.running, None if done.receipt is None else _on_the_wire(done.receipt)
        )


def _bounded(window: int | None) -> int | None:
    return None if window is None else min(window, MAX_WINDOW)


def _on_the_wire(receipt: KillReceipt) -> WireReceipt:
    survivors = tuple(WireSurvivor(one.pid, one.reason) for one in receipt.survivors)
    return WireReceipt(receipt.signalled, receipt.seconds, survivors)


ROUTES = (
    (PROCESS_START, ProcessTable.start),
    (PROCESS_READ, ProcessTable.read),
    (PROCESS_WRITE, ProcessTable.write),
    (PROCESS_SIGNAL, ProcessTable.signal),
    (PROCESS_TERMINATE, ProcessTable.terminate),
    (PROCESS_CLOSE_STDIN, ProcessTable.close_stdin),
    (PROCESS_RESIZE, ProcessTable.resize),
)
