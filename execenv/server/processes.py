"""The routes of `process/*`, over `abc.Processes` (protocol.md §4)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from execenv import codec
from execenv._service import Turns, Wakeup
from execenv.abc import Closed, Event, Exited, KillReceipt, Lost, Output, Process
from execenv.errors import ConnectionLost, InvalidRequest
from execenv.protocol import (
    CHUNK_OVERHEAD,
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

MAX_WINDOW = 16 * 1024 * 1024
MAX_WINDOWS = 256 * 1024 * 1024
"""What the windows of one session may come to together; then further ones get no more than the least."""
LEAST_WINDOW = 2 * 1024 * 1024
"""No client that asks for more gets less: it may take a good deal of its window before it says so."""
WINDOW_SLACK = 1024 * 1024
"""How far a window may be overrun: what was read already when it became full."""
UNDER_WAY_STEP = 64 * 1024
HOLD_DETACHED = 10.0
"""Seconds that a full window holds the child back while nobody is there to take anything, and then again
until the client that came back has said that it keeps to the window."""
MAX_RETAINED = 64 * 1024 * 1024
"""Output that the closed processes of one session may keep together; above it the oldest forget theirs, but
not the one that was closed last: `--retain` may be more than this."""
MAX_CLOSED = 1024
"""Closed processes that a session keeps beyond their time because its client was away."""


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
        self.counted = 0  # of its output, in the table's sum
        self._window: int | None = None
        self._largest_window = 0
        self._counted_window = 0
        self._closed = False
        self._holds_until = math.inf  # for ever, while the client is known to say what it took
        self._drop_window_at = math.inf
        self._under_way: deque[tuple[int, int]] = deque()  # seq and size of what the client has not taken
        self._under_way_bytes = 0
        self._newest = 0
        self._taken_seq = 0
        self._taken = trio.lowlevel.ParkingLot()

    # Events, to the connection that is attached. While there is none they are only retained.

    @property
    def full(self) -> bool:
        channel = self._session.channel
        return (channel is not None and channel.congested) or self._beyond_window

    @property
    def _beyond_window(self) -> bool:
        return (
            self._window is not None
            and self._under_way_bytes >= self._window
            and trio.current_time() < self._holds_until
        )

    async def wait_room(self) -> None:
        channel = self._session.channel
        if self._beyond_window:
            with trio.move_on_at(self._holds_until):
                await self._taken.park()
        elif channel is None:
            await trio.lowlevel.checkpoint()
        else:
            with suppress(ConnectionLost):
                await channel.wait_room()

    def _note_under_way(self, seq: int, size: int) -> None:
        # Small chunks are counted together: a child that writes bytes must not cost a tuple for each.
        size += CHUNK_OVERHEAD
        if self._under_way and self._under_way[-1][1] < UNDER_WAY_STEP:
            size_before = self._under_way.pop()[1]
            self._under_way.append((seq, size_before + size))
        else:
            self._under_way.append((seq, size))
        self._under_way_bytes += size
        while self._under_way_bytes > self._most_kept:  # not held back any more, and evicted by now
            self._under_way_bytes -= self._under_way.popleft()[1]

    @property
    def _most_kept(self) -> int:
        return self._largest_window + WINDOW_SLACK

    def set_window(self, window: int) -> None:
        """Let no more than this be on its way to the client that is attached."""
        if self._closed:
            return
        most = max(self._largest_window, min(MAX_WINDOW, self._session.processes.windows_left), LEAST_WINDOW)
        self._window = min(window, most)
        # What was sent in a larger one is still kept.
        self._largest_window = max(self._largest_window, self._window)
        self.count_window(self._largest_window)
        self._retain()

    def count_window(self, size: int) -> None:
        """What this process has of the session's windows now."""
        self._session.processes.windows_left += self._counted_window - size
        self._counted_window = size

    def note_taken(self, seq: int) -> None:
        """The client took everything up to `seq`. So it knows of windows."""
        self._holds_until = self._drop_window_at = math.inf
        while self._under_way and self._under_way[0][0] <= seq:
            self._under_way_bytes -= self._under_way.popleft()[1]
        self._taken_seq = max(self._taken_seq, min(seq, self._newest))
        self._retain()
        self._taken.unpark_all()

    def _retain(self) -> None:
        if self._window is not None and self.process is not None:
            self.process.retain_behind(self._taken_seq, self._most_kept)

    def started_as(self, process: Process) -> None:
        self.process = process
        self._retain()
        self.started.set()

    def connection_lost(self) -> None:
        """What was under way may have arrived or not, and is kept; the child is held back for a moment."""
        self._holds_until = trio.current_time() + HOLD_DETACHED
        self._drop_window_at = math.inf
        self._taken.unpark_all()

    def connection_made(self, patience: float) -> None:
        """Whoever has come may be a client that knows of no window, and reads what it missed when it likes.

        If nothing is said to be taken within `patience` seconds, the window is dropped.
        """
        if self._window is not None:
            self._holds_until = trio.current_time() + HOLD_DETACHED
            self._drop_window_at = trio.current_time() + patience
        self._taken.unpark_all()

    def _drop_window(self) -> None:
        self._window = None
        self.count_window(0)
        self._holds_until = self._drop_window_at = math.inf
        self._under_way.clear()
        self._under_way_bytes = 0
        if self.process is not None:
            self.process.retain_behind(None)

    def put(self, event: Event) -> None:
        channel = self._session.channel
        if type(event) is Output:
            self._newest = event.seq
            if self._window is not None:
                self._note_under_way(event.seq, len(event.data))
                if self._drop_window_at < math.inf and trio.current_time() >= self._drop_window_at:
                    self._drop_window()
        elif not isinstance(event, Lost):
            self._session.processes.note_exited(self)
        if channel is not None:
            with suppress(ConnectionLost):
                if type(event) is Output:
                    channel.send_nowait(*self._template.encode(event.seq, event.stream, event.data))
                else:
                    data = self._encode(event)
                    if data:
                        channel.send_nowait(data)
        if isinstance(event, Closed):
            self._closed = True
            self.count_window(0)
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
        self._running: set[_Entry] = set()
        self.last_exit = -math.inf
        self._closed: deque[tuple[float, _Entry]] = deque()  # and when
        self._attached_since = math.inf
        self._wakeup = Wakeup()
        self._retained: deque[_Entry] = deque()  # closed, the oldest first, and not forgotten
        self._retained_bytes = 0
        self.windows_left = MAX_WINDOWS

    # Retention (§4.9).

    def note_closed(self, entry: _Entry) -> None:
        self._closed.append((trio.current_time(), entry))
        if len(self._closed) == 1 or len(self._closed) > MAX_CLOSED:
            self._wakeup.set()
        self._retained.append(entry)
        self._count_retained(entry)
        while self._retained_bytes > MAX_RETAINED and len(self._retained) > 1:
            old = self._retained.popleft()
            if old.process is not None:
                old.process.forget_output()
            self._count_retained(old)

    def _count_retained(self, entry: _Entry) -> None:
        now = entry.process.retained if entry.process is not None else 0
        self._retained_bytes += now - entry.counted
        entry.counted = now

    async def expire_for_ever(self) -> None:
        """Free the ids of processes that have been closed for long enough, until cancelled."""
        while True:
            with trio.move_on_at(self._free_next_at()):
                await self._wakeup.wait()
            while self._free_next_at() <= trio.current_time():
                self._free(self._closed.popleft()[1])

    def _free_next_at(self) -> float:
        """While the client is away its processes stay, and then until it has had time to come for them."""
        if not self._closed:
            return math.inf
        closed_at = self._closed[0][0]
        since = closed_at if len(self._closed) > MAX_CLOSED else max(closed_at, self._attached_since)
        return since + self._retention

    def _free(self, entry: _Entry) -> None:
        if self._entries.get(entry.process_id) is entry:
            del self._entries[entry.process_id]
        if self._retained and self._retained[0] is entry:
            self._retained.popleft()
            self._retained_bytes -= entry.counted
        if entry.process is not None:
            entry.process.release()

    # The life of the session.

    @property
    def running(self) -> bool:
        """Whether any process has not exited, or is being started."""
        return bool(self._running)

    def note_exited(self, entry: _Entry) -> None:
        if entry in self._running:
            self._running.discard(entry)
            self.last_exit = trio.current_time()
            self._session.process_exited()

    def connection_lost(self) -> None:
        """Nobody is attached any more."""
        self._attached_since = math.inf
        self._wakeup.set()
        for entry in self._entries.values():
            entry.connection_lost()

    def connection_made(self) -> None:
        """Another connection is attached."""
        self._attached_since = trio.current_time()
        self._wakeup.set()
        for entry in self._entries.values():
            entry.connection_made(self._retention)

    # Handlers. The part before the first `await` runs in the order of arrival.

    def start(self, params: ProcessStartParams) -> Coroutine[Any, Any, ProcessStartResult]:
        if params.process_id in self._entries:
            raise InvalidRequest(f"process {params.process_id} already exists")
        entry = self._entries[params.process_id] = _Entry(self._session, params.process_id)
        self._running.add(entry)
        if params.output_window is not None:
            entry.set_window(params.output_window)
        return self._start(entry, params)

    async def _start(self, entry: _Entry, params: ProcessStartParams) -> ProcessStartResult:
        try:
            with entry.starting:
                entry.started_as(await self._backend.start(params, entry))
                return ProcessStartResult(
                    params.process_id, "none" if params.sandbox is None else "linuxSeccomp"
                )
            raise InvalidRequest(f"process {params.process_id} start was cancelled")
        finally:
            if entry.process is None:
                del self._entries[params.process_id]
                entry.count_window(0)
                self.note_exited(entry)
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
                entry.set_window(params.window)
            entry.note_taken(params.seq)
            if entry.counted:
                self._count_retained(entry)

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
