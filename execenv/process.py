"""A running process, as a program that uses execenv sees it: the same for every environment."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count

import trio

from execenv import abc
from execenv.abc import Closed, Event, Exited, Failed, KillReceipt, Lost, Output
from execenv.errors import ConnectionLost, ExecenvError, NotSupported, OutputGap, UsageError

INBOX_BYTES = 1024 * 1024
"""Output that waits for its reader; above it the child is held back (a remote one: see `Process`)."""


class Inbox:
    """The events of one process, between its producer and the program that reads them (a `Sink`)."""

    def __init__(self, limit: int = INBOX_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._queues: dict[str, deque[Output | Lost]] = {"stdout": deque(), "stderr": deque()}
        self._lot = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self.exit_code: int | None = None
        self.sandbox_denied: bool | None = False
        self.closed = False
        self.error: Exception | None = None
        self.exited = trio.Event()
        self._abandoned = False

    @property
    def full(self) -> bool:
        return self._size >= self._limit and not self._abandoned

    def abandon(self) -> None:
        """Nobody will read any more: hold back nobody."""
        self._abandoned = True
        self._room.unpark_all()

    def put(self, event: Event) -> None:
        if type(event) is Output:
            self._size += len(event.data)
            self._queue(event.stream).append(event)
        elif isinstance(event, Exited):
            self.exit_code = event.exit_code
            self.sandbox_denied = event.sandbox_denied
            self.exited.set()
        elif isinstance(event, Closed):
            self.closed = True
        elif isinstance(event, Failed):
            self.error = self.error or event.error
            self.exited.set()
        elif isinstance(event, Lost):
            # Whichever stream the lost bytes were of, both readers must hear of it.
            for queue in self._queues.values():
                queue.append(event)
        self._lot.unpark_all()

    async def wait_room(self) -> None:
        while self.full:
            await self._room.park()

    def _queue(self, stream: str) -> deque[Output | Lost]:
        return self._queues["stderr" if stream == "stderr" else "stdout"]

    async def take(self, *streams: str) -> Output | None:
        """The next chunk of these streams, in the order of seq; `None` at the end of all output.

        Raises:
            OutputGap: where some is missing; the next call goes on behind it.
            ExecenvError: if the process was lost.
        """
        while True:
            queue = self._next(streams)
            if queue is not None:
                await trio.lowlevel.checkpoint_if_cancelled()
                return self._pop(queue, streams)
            if self.closed:
                return None
            if self.error is not None:
                raise _again(self.error)
            await self._lot.park()

    def _next(self, streams: tuple[str, ...]) -> deque[Output | Lost] | None:
        best: deque[Output | Lost] | None = None
        for stream in streams:
            queue = self._queues[stream]
            if queue and (best is None or _position(queue[0]) < _position(best[0])):
                best = queue
        return best

    def _pop(self, queue: deque[Output | Lost], streams: tuple[str, ...]) -> Output:
        event = queue.popleft()
        if isinstance(event, Lost):
            for stream in streams:  # one report is enough for who reads both
                other = self._queues[stream]
                if other and other[0] is event:
                    other.popleft()
            raise OutputGap(event.from_seq, event.to_seq, event.size)
        self._size -= len(event.data)
        if self._size < self._limit:
            self._room.unpark_all()
        return event


def _position(event: Output | Lost) -> int:
    return event.seq if isinstance(event, Output) else event.from_seq


def _again(error: Exception) -> Exception:
    """The same error once more, for another task: a traceback belongs to one raise."""
    copy = type(error)(*error.args) if isinstance(error, ConnectionLost) else error
    copy.__cause__ = error.__cause__
    return copy


class ProcessInput(trio.abc.SendStream):
    """The stdin of a process. `aclose` is end of file, behind all that was sent.

    On a terminal `aclose` sends the end-of-file character (Ctrl-D).
    """

    def __init__(self, process: abc.Process, environment: str, *, tty: bool) -> None:
        self._process = process
        self._environment = environment
        self._tty = tty
        self._at_line_start = True
        # The id of a write tells a repeated one from a new one, so it must differ from those of others who
        # write to this process, before us or beside us.
        self._writer = os.urandom(4).hex()
        self._numbers = count(1)
        self._closed = False
        self._order = trio.StrictFIFOLock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of `data`; waits while the child is slow to read.

        Raises:
            trio.ClosedResourceError: after `aclose`.
            trio.BrokenResourceError: if the process has ended, or has no stdin to write to.
        """
        async with self._order:
            if self._closed:
                raise trio.ClosedResourceError("this stdin was closed")
            await trio.lowlevel.checkpoint_if_cancelled()
            view = memoryview(data)
            for start in range(0, len(view), _WRITE_PIECE):
                try:
                    await self._send(bytes(view[start : start + _WRITE_PIECE]))
                except ConnectionLost as error:
                    if start:  # what came before was taken
                        error.outcome = "unknown"
                    raise
            if view:
                self._at_line_start = view[-1] == ord("\n")

    async def _send(self, data: bytes) -> None:
        try:
            status = await self._process.write(data, f"{self._writer}-{next(self._numbers)}")
        except ConnectionLost:
            raise
        except ExecenvError as error:
            raise trio.BrokenResourceError(f"the process in {self._environment} has ended") from error
        if status != "accepted":
            raise trio.BrokenResourceError(f"stdin of the process in {self._environment}: {status}")

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: only the other side knows."""
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        if not self._tty:
            await self._process.close_stdin()
            return
        # Within a line the first one only hands over what was typed so far.
        with suppress(trio.BrokenResourceError):
            await self._send(END_OF_FILE if self._at_line_start else END_OF_FILE * 2)


END_OF_FILE = b"\x04"
_WRITE_PIECE = 256 * 1024


class ProcessOutput(trio.abc.ReceiveStream):
    """One output stream of a process, as bytes.

    Raises `OutputGap` where output was lost for good, and goes on behind it at the next call.
    """

    def __init__(self, process: Process, stream: str) -> None:
        self._process = process
        self._stream = stream
        self._rest = b""
        self._closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte; `b""` at the end, which comes when all who could write have ended."""
        if self._closed:
            raise trio.ClosedResourceError
        if self._rest:
            await trio.lowlevel.checkpoint()
            data = self._rest
        else:
            chunk = await self._process._take(self._stream)
            data = chunk.data if chunk is not None else b""
        if max_bytes is not None:
            self._rest = data[max_bytes:]
            return data[:max_bytes]
        self._rest = b""
        return data

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()


class Process:
    """A process that runs in an environment. Got from `Environment.open_process`.

    Read its output in one of two ways: iterate over the process for chunks as they came, with the name of
    the stream and the sequence number, or use the byte streams `stdout` and `stderr`. Output that nobody
    reads holds the child back after 1 MiB, as a full pipe does; a remote server that cannot be told so
    keeps its newest 1 MiB, and `OutputGap` says what is missing.

    Attributes:
        argv: the program and its arguments.
        process_id: its id in the environment; not a pid.
        stdin: a `trio.abc.SendStream`, or `None` if the process was opened without `stdin`.
        stdout, stderr: `trio.abc.ReceiveStream`s. A terminal has all output on `stdout`.
        receipt: after the block: what it took to end the process; `None` if that could not be learned.
    """

    def __init__(
        self,
        backend: abc.Process,
        inbox: Inbox,
        argv: tuple[str, ...],
        environment: str,
        *,
        stdin: bool,
        tty: bool,
    ) -> None:
        self.argv = argv
        self.process_id = backend.process_id
        self.stdin = ProcessInput(backend, environment, tty=tty) if stdin else None
        self.stdout = ProcessOutput(self, "stdout")
        self.stderr = ProcessOutput(self, "stderr")
        self.receipt: KillReceipt | None = None
        self._environment = environment
        self._backend = backend
        self._tty = tty
        self._inbox = inbox
        self._reading: set[str] = set()

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"ended with {self.returncode}"
        return f"<execenv.Process {self.argv[0]!r} in {self._environment}, {state}>"

    @property
    def returncode(self) -> int | None:
        """`None` while it runs; then 0-255, where death by signal n is 128 + n."""
        return self._inbox.exit_code

    @property
    def sandbox_denied(self) -> bool | None:
        """Whether it failed and, by what it said, its sandbox was the reason: a guess.

        False while it runs; `None` where the environment does not say.
        """
        return self._inbox.sandbox_denied

    async def wait(self) -> int:
        """Wait until the program itself has ended; its descendants may still write. The return code.

        Output that is not read holds the child back: read it in another task meanwhile.

        Raises:
            ConnectionLost: if the environment was lost first.
        """
        await self._inbox.exited.wait()
        if self.returncode is None:
            assert self._inbox.error is not None
            raise _again(self._inbox.error)
        return self.returncode

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        chunk = await self._take("stdout", "stderr")
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def _take(self, *streams: str) -> Output | None:
        busy = self._reading.intersection(streams)
        if busy:
            raise UsageError(
                f"two tasks read {' and '.join(sorted(busy))} of {self.argv[0]!r} at once: "
                "let one task iterate over the process, or one task read each stream"
            )
        self._reading.update(streams)
        try:
            return await self._inbox.take(*streams)
        finally:
            self._reading.difference_update(streams)

    async def interrupt(self) -> None:
        """Send SIGINT to the process group, as Ctrl-C does. Nothing happens if it has ended."""
        await self._backend.interrupt()

    async def terminate(self, grace: float = 2.0) -> KillReceipt:
        """Ask the process to end (SIGTERM), and after `grace` seconds end it and everything it started.

        Descendants that left its process group or session are found and ended too. A server that knows no
        SIGTERM for us (the reference) ends it at once.
        """
        return await self._terminate(grace)

    async def kill(self) -> KillReceipt:
        """End the process and everything it started, at once (SIGKILL)."""
        return await self._terminate(0.0)

    async def _terminate(self, grace: float) -> KillReceipt:
        termination = await self._backend.terminate(grace=grace)
        self.receipt = termination.receipt
        return self.receipt or KillReceipt()

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal, in characters.

        Raises:
            NotSupported: if it has no terminal, or the environment has no such call.
        """
        if not self._tty:
            raise NotSupported(f"{self.argv[0]!r} has no terminal to resize: start it with tty=True")
        await self._backend.resize(rows, columns)
