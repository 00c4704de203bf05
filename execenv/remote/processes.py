"""Processes of a server, by its protocol: the proxy of `abc.Processes`.

Events arrive as notifications, in the reader, and are put into order by seq. A consumer that is slower than
the network must not hold back the connection for everybody else. A server of ours is told what was taken, and
holds back the child (`process/outputTaken`). Another server pushes on: above a bound the events are let go,
and fetched again by `process/read` when there is room (`_fetch_missed`); what the server does not retain any
more by then is reported as `Lost`.

The same is done when the connection was lost and the session was resumed: what is pushed from then on waits
until all that was missed has been read.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

import trio
from attrs import evolve

from execenv.abc import (
    Closed,
    Event,
    Exited,
    Failed,
    KillReceipt,
    Lost,
    Output,
    Process,
    Processes,
    Sink,
    Survivor,
    Termination,
)
from execenv.codec import Json, structure
from execenv.errors import (
    ConnectionLost,
    ExecenvError,
    InvalidRequest,
    NotSupported,
    ProtocolViolation,
)
from execenv.protocol import (
    CHUNK_OVERHEAD,
    PROCESS_CLOSE_STDIN,
    PROCESS_OUTPUT_TAKEN,
    PROCESS_READ,
    PROCESS_RESIZE,
    PROCESS_SIGNAL,
    PROCESS_START,
    PROCESS_TERMINATE,
    PROCESS_WRITE,
    U64,
    Base64,
    ProcessClosedParams,
    ProcessCloseStdinParams,
    ProcessExitedParams,
    ProcessOutputParams,
    ProcessOutputTakenParams,
    ProcessReadParams,
    ProcessReadResult,
    ProcessResizeParams,
    ProcessSignalParams,
    ProcessStartParams,
    ProcessTerminateParams,
    ProcessWriteParams,
)
from execenv.remote.session import Session, Tries, again
from execenv.status import waiting

if TYPE_CHECKING:
    from execenv.remote.connection import RemoteEnvironment

REORDER_EVENTS = 256  # environments.md §1.6
REORDER_BYTES = 1024 * 1024
HELD_BYTES = 16 * 1024 * 1024
"""Pushed output that one process may have waiting here, above its sink's own bound, before it is let go."""
CATCH_UP_BYTES = 1024 * 1024
STILL_STARTING = 0.05
OUTPUT_WINDOW = 8 * 1024 * 1024
"""How much output of one process may be under way: 80 MB/s at a round trip of 100 ms."""
TAKEN_STEP = 1024 * 1024
"""How much is taken before the server is told."""


class RemoteProcess(Process):
    """One process of a server. `publish` is called by the connection's reader for each of its events."""

    def __init__(
        self, owner: RemoteProcesses, session: Session, process_id: str, *, attached: bool = False
    ) -> None:
        self.process_id = process_id
        self.session = session
        self._owner = owner
        self._sinks: list[Sink] = []
        self._next_seq = 1
        self._early: dict[int, Event] = {}
        self._early_bytes = 0
        self._held = 0
        self._newest = 0  # the highest seq that is known to exist
        self._passed: int | None = 0  # bytes of output before `_next_seq`; `None` if that is not known
        self._catching_up = attached  # what is pushed before the history was read is part of it
        self._fetching = False  # `_fetch_missed` runs
        self._stale = False  # the connection was lost since it asked last
        self._started = attached
        self._silent = False  # it had done nothing yet when it was attached to
        self._terminal: dict[int, Event] = {}  # exit and close, seen while catching up
        self._exit_passed = False
        self._ended = False
        self._closed = False
        self._failure: Exception | None = None
        self._stdin_by_size = False
        self._windowed = False
        self._untold = 0  # bytes taken since the server was told
        self._holding = False  # `_tell_when_room` waits for the sinks

    # Events.

    def subscribe(self, sink: Sink, *, history: bool = False) -> None:
        self._sinks.append(sink)
        if self._failure is not None:
            sink.put(Failed(self._failure))
        elif history and self._silent and not self._newest and not self._stale:
            self._catching_up = False  # there is nothing to catch up with: all of it will be pushed
        elif history:
            self._fetch()

    def unsubscribe(self, sink: Sink) -> None:
        with suppress(ValueError):
            self._sinks.remove(sink)
        if not self._sinks:
            self._owner.remove(self)

    def publish(self, seq: int, event: Event) -> None:
        """Take an event off the wire, in whatever order, and pass on what is in order now.

        Raises:
            ProtocolViolation: if so much is out of order that it cannot be kept.
        """
        self._newest = max(self._newest, seq)
        if seq < self._next_seq or seq in self._early or self._ended:
            return
        if self._catching_up:
            if not isinstance(event, Output):
                self._terminal[seq] = event
            return
        if seq != self._next_seq:
            self._early_bytes += len(event.data) if isinstance(event, Output) else 0
            if len(self._early) >= REORDER_EVENTS or self._early_bytes > REORDER_BYTES:
                self.fail(
                    ProtocolViolation(
                        f"the events of process {self.process_id!r} have a hole at {self._next_seq}"
                    )
                )
                return
            self._early[seq] = event
            return
        self._pass_on(event, seq)
        while self._early and self._next_seq in self._early:
            early = self._early.pop(self._next_seq)
            self._early_bytes -= len(early.data) if isinstance(early, Output) else 0
            self._pass_on(early, self._next_seq)

    def _pass_on(self, event: Event, seq: int) -> None:
        self._next_seq = seq + 1
        for sink in self._sinks:
            sink.put(event)
        if isinstance(event, Exited):
            self._exit_passed = True
        elif isinstance(event, Closed):
            self._ended = self._closed = True
            self._owner.remove(self)
        elif isinstance(event, Output):
            if self._passed is not None:
                self._passed += len(event.data)
            self._note_taken(len(event.data) + CHUNK_OVERHEAD)

    def _note_taken(self, size: int) -> None:
        self._untold += size
        if not any(sink.full for sink in self._sinks):
            self._held = 0
            if self._windowed and self._untold >= TAKEN_STEP and not self._holding:
                self._tell()
        else:
            self._held += size
            if self._held > HELD_BYTES:
                self._catch_up()
            elif self._windowed and not self._holding:
                self._holding = True
                self.session.nursery.start_soon(self._tell_when_room)

    def open_window(self) -> None:
        """Have the server hold back the child when this end is slow."""
        self._windowed = True
        self._tell(U64(OUTPUT_WINDOW))

    def _tell(self, window: U64 | None = None) -> None:
        self._untold = 0
        taken = ProcessOutputTakenParams(self.process_id, U64(self._next_seq - 1), window)
        if self.session.peer is not None:
            with suppress(ConnectionLost):
                self.session.peer.notify(PROCESS_OUTPUT_TAKEN, taken)

    async def _tell_when_room(self) -> None:
        while any(sink.full for sink in self._sinks):
            for sink in list(self._sinks):
                await sink.wait_room()
        self._holding = False
        self._held = 0
        self._tell()

    def fail(self, error: Exception) -> None:
        """No more events will come."""
        if not self._ended:
            self._ended = True
            self._failure = error
            self._owner.remove(self)
            for sink in self._sinks:
                sink.put(Failed(error))

    # The connection.

    def note_started(self) -> None:
        """The server has confirmed the start, if need be at the second time of asking."""
        self._started = True
        if self._catching_up and self._sinks:
            self._fetch()

    def disconnected(self) -> None:
        """What is pushed from now on, by the next connection, is not what follows."""
        self._miss()
        self._stale = True

    def connected(self) -> None:
        """The session was resumed."""
        if self._windowed:
            self._tell(U64(OUTPUT_WINDOW))  # it went with the connection
        if self._started and self._sinks:
            self._fetch()

    def _catch_up(self) -> None:
        if not self._catching_up:
            self._miss()
            self._fetch()

    def _miss(self) -> None:
        self._catching_up = True
        self._early.clear()
        self._early_bytes = 0

    def _fetch(self) -> None:
        if not self._fetching:
            self._fetching = True
            self.session.nursery.start_soon(self._fetch_missed)

    async def _fetch_missed(self) -> None:
        """Read what was let go, as the sinks have room, until nothing is missing up to the newest event."""
        try:
            with waiting():  # whoever has started it may be in a block of `fail_fast`, and leave that
                await self._fetch_all()
            self._catching_up = False
            self._held = 0
            if self._windowed and not self._ended:
                self._tell()
        except ConnectionLost as error:
            self.fail(error)
        except ExecenvError as error:
            if self._exit_known and any(isinstance(event, Closed) for event in self._terminal.values()):
                self._pass_terminal(self._newest + 1)  # it is over, and what is missing is lost
            else:
                text = f"failed to recover process {self.process_id!r}: {error}"
                self.fail(ConnectionLost(text, "unknown"))
                self._owner.end_later(self.session, ProcessTerminateParams(self.process_id))
        finally:
            self._fetching = False

    async def _fetch_all(self) -> None:
        while not self._ended:
            for sink in list(self._sinks):
                await sink.wait_room()
            self._stale = False
            result = await self._read_started(self._next_seq - 1)
            self._publish_read(result)
            if not result.chunks and self._next_seq > self._newest and not self._stale:
                return

    async def _read_started(self, after_seq: int) -> ProcessReadResult:
        """`read`, also while the server still is at a start whose answer was lost (§4.5)."""
        while True:
            try:
                return await self.read(after_seq, CATCH_UP_BYTES)
            except InvalidRequest as error:
                if not error.message.endswith("is starting"):
                    raise
            await trio.sleep(STILL_STARTING)

    def _publish_read(self, result: ProcessReadResult) -> None:
        for chunk in result.chunks:
            self._pass_terminal(chunk.seq)
            if chunk.seq == self._next_seq + 1 and result.exited and not self._exit_known:
                self._pass_on(self._exit_at(self._next_seq, result), self._next_seq)
            self._skip_to(chunk.seq, result.evicted_bytes)
            self._pass_on(Output(chunk.seq, chunk.stream, chunk.chunk), chunk.seq)
        self._newest = max(self._newest, result.next_seq - 1)
        if result.chunks:
            return
        # Nothing is retained behind here, so what is left of the answer is exit and close, or lost.
        if result.closed:
            self._terminal.setdefault(result.next_seq - 1, Closed(result.next_seq - 1))
        if result.exited and not self._exit_known:
            self._infer_exit(result)
        # Only as far as the answer goes: what was pushed since then is for the next read.
        self._pass_terminal(result.next_seq)
        if not self._ended:
            self._skip_to(result.next_seq, result.evicted_bytes)

    def _pass_terminal(self, before: int) -> None:
        """Pass on what was pushed meanwhile and comes before that seq."""
        for seq in sorted(seq for seq in self._terminal if seq < before):
            event = self._terminal.pop(seq)
            self._skip_to(seq)
            if seq == self._next_seq:
                self._pass_on(event, seq)

    @property
    def _exit_known(self) -> bool:
        return self._exit_passed or any(isinstance(event, Exited) for event in self._terminal.values())

    @staticmethod
    def _exit_at(seq: int, result: ProcessReadResult) -> Exited:
        return Exited(seq, -1 if result.exit_code is None else result.exit_code, result.sandbox_denied)

    def _infer_exit(self, result: ProcessReadResult) -> None:
        """The exit was before our time, and has no chunk of its own: it is one of the missing seqs."""
        last = result.next_seq - (2 if result.closed else 1)
        if self._next_seq <= last:
            self._terminal[last] = self._exit_at(last, result)
        else:  # its seq was in a hole that has been reported as lost
            self._exit_passed = True
            for sink in self._sinks:
                sink.put(self._exit_at(last, result))

    def _skip_to(self, seq: int, evicted: int = 0) -> None:
        """Report what is missing before `seq`.

        `evicted` is how much output the server has dropped before `seq`, if it says that (ours does): of all
        that this one has seen a part, and the rest is what is missing.
        """
        if seq > self._next_seq:
            size = evicted - self._passed if evicted and self._passed is not None else None
            self._passed = evicted or None
            first, self._next_seq = self._next_seq, seq
            for sink in self._sinks:
                sink.put(Lost(first, seq - 1, size))

    def release(self) -> None:
        self._owner.remove(self)

    # Calls.

    async def read(
        self, after_seq: int = 0, max_bytes: int | None = None, wait: float = 0.0
    ) -> ProcessReadResult:
        params = ProcessReadParams(
            self.process_id,
            U64(after_seq),
            None if max_bytes is None else U64(max_bytes),
            U64(min(math.ceil(wait * 1000), 2**63)),
        )
        return await self.session.call(PROCESS_READ, params)

    async def write(self, data: bytes, write_id: str) -> str:
        params = ProcessWriteParams(self.process_id, Base64(data), write_id)
        while True:
            status = (await self.session.call(PROCESS_WRITE, params)).status
            if status != "starting":  # it is, where the answer to a start was lost (§4.6)
                return status
            await trio.sleep(STILL_STARTING)

    async def close_stdin(self) -> None:
        if self._stdin_by_size:
            return  # `_ending_input` ends it behind the last byte
        what = "end of file on the stdin of a running process"
        await self._owner.require(self.session, "processCloseStdin", what)
        await self.session.call(PROCESS_CLOSE_STDIN, ProcessCloseStdinParams(self.process_id))

    async def interrupt(self) -> None:
        params = ProcessSignalParams(self.process_id, "interrupt")
        await self.session.call(PROCESS_SIGNAL, params, repeat=False)

    async def resize(self, rows: int, columns: int) -> None:
        await self._owner.require(self.session, "processResize", "resizing a terminal")
        await self.session.call(PROCESS_RESIZE, ProcessResizeParams(self.process_id, U64(rows), U64(columns)))

    async def terminate(self, *, receipt: bool = True, grace: float = 0.0) -> Termination:
        extended = await self._owner.has(self.session, "processReceipt")
        if not extended and self._closed:
            return Termination(False)
        params = ProcessTerminateParams(self.process_id)
        if extended:
            params = evolve(params, receipt=receipt, grace_ms=U64(math.ceil(grace * 1000)))
        try:
            result = await self.session.call(PROCESS_TERMINATE, params)
        except trio.Cancelled:
            self._owner.end_later(self.session, params)
            raise
        except ConnectionLost as error:
            if self.session.lost is not None:
                raise
            self._owner.end_later(self.session, params)
            raise again(error, "unknown") from error.__cause__  # since it is to be done yet
        if result.receipt is None:
            return Termination(result.running)
        survivors = tuple(Survivor(one.pid, one.reason) for one in result.receipt.survivors)
        return Termination(
            result.running, KillReceipt(result.receipt.signalled, result.receipt.seconds, survivors)
        )


class RemoteProcesses(Processes):
    """Starts processes on a server, and routes their events."""

    def __init__(self, environment: RemoteEnvironment) -> None:
        self._environment = environment
        self._starting: set[str] = set()
        # Ids of what is to end as soon as that can be done, each with what is set when it is done.
        self._endings: dict[str, trio.Event] = {}
        # More than one of an id where several tasks attach to it: each reads at its own pace.
        self._by_id: dict[str, list[RemoteProcess]] = {}
        self._enforcing: Session | None = None  # its server enforces sandboxes, as an answer has said once

    async def start(
        self, params: ProcessStartParams, sink: Sink | None = None, *, input_size: int | None = None
    ) -> RemoteProcess:
        session = await self._environment.session()
        id_ = params.process_id
        if id_ in self._starting:
            raise _exists(id_)
        self._starting.add(id_)
        try:
            if sink is None:
                await self._check_free(session, id_)
            return await self._start(session, params, sink, input_size)
        finally:
            self._starting.discard(id_)

    async def _check_free(self, session: Session, process_id: str) -> None:
        """Refuse a name that is taken, before the start: where the answer to that is lost, the name tells
        whether it was done, unless it was taken by another process.
        """
        if process_id in self._endings:
            await self._endings[process_id].wait()  # or the one that is to end would be this one
        try:
            await session.call(PROCESS_READ, ProcessReadParams(process_id, U64(0), U64(0), U64(0)))
        except InvalidRequest as error:
            if not error.message.endswith("is starting"):
                return
        except ConnectionLost as error:
            raise again(error, "not sent") from error.__cause__  # the start was not
        raise _exists(process_id)

    async def _start(
        self, session: Session, params: ProcessStartParams, sink: Sink | None, input_size: int | None
    ) -> RemoteProcess:
        process = RemoteProcess(self, session, params.process_id)
        if sink is not None and await self.has(session, "processOutputWindow"):
            process._windowed = True
            params = evolve(params, output_window=U64(OUTPUT_WINDOW))
        closable = not params.pipe_stdin or await self.has(session, "processCloseStdin")
        if not closable and input_size is not None:
            params = evolve(params, argv=_ending_input(params.argv, params.arg0, input_size), arg0=None)
            process._stdin_by_size = True
        if sink is not None:
            process.subscribe(sink)
        # Before the request goes out: an early event finds its owner.
        self._add(process)
        tries = session.tries()
        try:
            await self._ask_to_start(session, params, tries)
            process.note_started()
        except BaseException as error:
            self.remove(process)
            # It may have started all the same, and nobody would end it.
            if tries.sent and isinstance(error, ConnectionLost):
                self.end_later(session, ProcessTerminateParams(params.process_id))
            elif tries.sent and isinstance(error, trio.Cancelled):
                with suppress(ExecenvError), trio.CancelScope(shield=True) as scope:
                    scope.deadline = trio.current_time() + 5
                    await process.terminate(receipt=False)
            raise
        if sink is None:
            self.remove(process)  # nobody listens; `attach` begins anew
        return process

    async def _ask_to_start(self, session: Session, params: ProcessStartParams, tries: Tries) -> None:
        """Start it once. The id tells whether a start whose answer was lost was done."""
        while True:
            peer = await session.wait_peer(tries.outcome)
            try:
                result = await peer.call(PROCESS_START, params)
                if params.sandbox is not None and params.sandbox.profile.enforces:
                    if result.sandbox_type in (None, "none"):
                        self.end_later(session, ProcessTerminateParams(params.process_id))
                        raise NotSupported(
                            f"{self._environment.name} ignored the sandbox, and was told to end the process"
                        )
                    self._enforcing = session
                return
            except ConnectionLost as error:
                tries.note(error)
                await session.wait_lost(peer, tries.outcome)
            except trio.Cancelled:
                tries.sent = True  # perhaps
                raise
            except InvalidRequest as error:
                if tries.sent and error.message.endswith("already exists"):
                    if params.sandbox is None or self._enforcing is session:
                        return
                    self.end_later(session, ProcessTerminateParams(params.process_id))
                    text = "the answer to a start was lost, and so whether its sandbox is enforced"
                    raise ConnectionLost(text) from error
                raise

    def end_later(self, session: Session, params: ProcessTerminateParams) -> None:
        """End a process as soon as that can be done: nobody waits for it any more."""
        if session.lost is None and params.process_id not in self._endings:
            self._endings[params.process_id] = trio.Event()
            session.nursery.start_soon(self._end, session, params)

    async def _end(self, session: Session, params: ProcessTerminateParams) -> None:
        try:
            with waiting(), suppress(ExecenvError):
                await session.call(PROCESS_TERMINATE, params)
        finally:
            self._endings.pop(params.process_id).set()

    async def attach(self, process_id: str) -> RemoteProcess:
        session = await self._environment.session()
        process = RemoteProcess(self, session, process_id, attached=True)
        self._add(process)
        try:
            found = await process.read(wait=0.0, max_bytes=0)  # unknown ids are refused
            process._silent = found.next_seq == 1
            if await self.has(session, "processOutputWindow"):
                process.open_window()
        except BaseException:
            self.remove(process)
            raise
        return process

    def _add(self, process: RemoteProcess) -> None:
        self._by_id.setdefault(process.process_id, []).append(process)

    def remove(self, process: RemoteProcess) -> None:
        """Route no more events to it."""
        listening = self._by_id.get(process.process_id, [])
        if process in listening:
            listening.remove(process)
        if not listening:
            self._by_id.pop(process.process_id, None)

    def connected(self) -> None:
        """The session was opened, or resumed. Called before anything is received over its connection."""
        for process in self._listening():
            process.connected()

    def disconnected(self) -> None:
        for process in self._listening():
            process.disconnected()

    def session_lost(self, session: Session, error: ConnectionLost) -> None:
        for process in self._listening():
            if process.session is session:
                process.fail(error)

    def _listening(self) -> list[RemoteProcess]:
        return [one for listening in self._by_id.values() for one in listening]

    async def has(self, session: Session, capability: str) -> bool:
        info = session.info or await self._environment.info()
        return info.capabilities.get(capability, False)

    async def require(self, session: Session, capability: str, what: str) -> None:
        if not await self.has(session, capability):
            raise NotSupported(
                f"the exec-server behind {self._environment.name} has no call for {what} "
                f"(its environment info does not list {capability})"
            )

    # Notifications. Called by the reader; must not wait.

    def on_output(self, params: Json) -> None:
        event = structure(params, ProcessOutputParams)
        self._publish(event.process_id, event.seq, Output(event.seq, event.stream, event.chunk))

    def on_exited(self, params: Json) -> None:
        event = structure(params, ProcessExitedParams)
        self._publish(event.process_id, event.seq, Exited(event.seq, event.exit_code, event.sandbox_denied))

    def on_closed(self, params: Json) -> None:
        event = structure(params, ProcessClosedParams)
        self._publish(event.process_id, event.seq, Closed(event.seq))

    def _publish(self, process_id: str, seq: int, event: Event) -> None:
        for process in tuple(self._by_id.get(process_id, ())):
            process.publish(seq, event)


def _exists(process_id: str) -> InvalidRequest:
    return InvalidRequest(f"process {process_id} already exists")


def _ending_input(argv: tuple[str, ...], arg0: str | None, size: int) -> tuple[str, ...]:
    """The same program with a stdin that ends after `size` bytes, for servers without `process/closeStdin`.

    The exit status is the program's: a pipeline has that of its last command.
    """
    if arg0 is not None:
        raise NotSupported("arg0 together with input needs a server that can close a stdin")
    return ("sh", "-c", 'head -c "$0" | "$@"', str(size), *argv)
