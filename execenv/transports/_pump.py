"""The pump: one object that owns a file descriptor pair or a stream, and moves messages through it.

Two tasks in one nursery, and nothing else touches the descriptors. The reader parses 64 KiB at a time,
hands the messages over, and flushes what they caused before it waits again; the writer sends what others
queued and what the peer did not take at once. The reader never waits for the writer, so two full peers
cannot lock up; only a peer that lets 64 MiB of answers lie is not read any further until it takes some.

Websocket and stdio differ only in the framing (`Framing`) and in the way bytes move (`ByteIO`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from time import perf_counter

import trio

from execenv._service import Wakeup
from execenv.transports.channel import ANSWER_LIMIT, HIGH_WATER, Channel, SendPart

READ_SIZE = 64 * 1024
WRITE_BATCH = 256 * 1024
MAX_BUFFERS = 512  # below IOV_MAX (1024) everywhere
WORK_SLICE = 0.0005  # seconds of handling messages before other tasks get a turn
CLOSE_GRACE = 2.0  # seconds for the last queued bytes, once the channel is told to end
END_GRACE = 0.5  # the same, once the peer has ended it
LINGER = (
    0.3  # seconds for the peer to end its side too, before what it still sends makes it lose our last bytes
)

Buffer = bytes | memoryview


class ByteIO(ABC):
    """Bytes in and out of something that can be waited for."""

    @abstractmethod
    async def receive(self) -> bytes:
        """At least one byte; `b""` at the end. Raises OSError or trio.BrokenResourceError."""

    @abstractmethod
    async def send(self, buffers: list[Buffer]) -> int:
        """Send some of it, at least one byte, waiting if need be; the number of bytes taken."""

    @abstractmethod
    def send_now(self, buffers: list[Buffer]) -> int:
        """Send what can be sent without waiting; 0 if nothing."""

    async def linger(self) -> None:
        """Say that nothing follows, and discard what still arrives, until the peer ends its side."""
        await trio.lowlevel.checkpoint()

    @abstractmethod
    async def close(self) -> None: ...


class FdIO(ByteIO):
    """Non-blocking descriptors, used bare: a socket, or a pipe for each direction.

    Args:
        read_fd, write_fd: set to non-blocking by the caller, and closed by `close_fds`.
        half_close: ends our direction only, where that can be done.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        close_fds: Callable[[], object],
        half_close: Callable[[], object] | None = None,
    ) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._close_fds = close_fds
        self._half_close = half_close
        self._drained = False  # the last read took all there was, so the next would find nothing

    async def receive(self) -> bytes:
        if self._drained:
            await self._wait_readable()
        else:
            await trio.lowlevel.checkpoint()
        while True:
            try:
                data = os.read(self._read_fd, READ_SIZE)
            except BlockingIOError:
                await self._wait_readable()
            else:
                self._drained = len(data) < READ_SIZE
                return data

    async def _wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._read_fd)
        except PermissionError:  # a regular file is always ready, and epoll refuses to say so
            await trio.lowlevel.checkpoint()

    async def send(self, buffers: list[Buffer]) -> int:
        while True:
            count = self.send_now(buffers)
            if count:
                return count
            await trio.lowlevel.wait_writable(self._write_fd)

    def send_now(self, buffers: list[Buffer]) -> int:
        try:
            return os.writev(self._write_fd, buffers)
        except BlockingIOError:
            return 0

    async def linger(self) -> None:
        if self._half_close is not None:
            with suppress(OSError):
                self._half_close()
                while await self.receive():
                    pass

    async def close(self) -> None:
        for fd in {self._read_fd, self._write_fd}:
            trio.lowlevel.notify_closing(fd)
        self._close_fds()


class StreamIO(ByteIO):
    """Any Trio stream, for TLS: it has no descriptor of its own to write to."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        return bytes(await self._stream.receive_some(READ_SIZE))

    async def send(self, buffers: list[Buffer]) -> int:
        data = b"".join(buffers)
        await self._stream.send_all(data)
        return len(data)

    def send_now(self, buffers: list[Buffer]) -> int:
        return 0

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)


class Framing(ABC):
    """How messages are cut out of bytes, and what is said besides them."""

    @abstractmethod
    def messages(self, data: bytes) -> Iterable[bytes]:
        """The messages that `data` completes. May call back into the pump (a pong, an end)."""

    @abstractmethod
    def frames(self, parts: tuple[bytes, ...]) -> list[list[Buffer]]:
        """One message as frames; between two frames something urgent may be sent."""

    @abstractmethod
    def part(self, data: bytes, *, first: bool, last: bool) -> list[Buffer]:
        """A piece of one message, as a frame; only control frames go between the pieces."""

    def farewell(self, code: int, reason: str) -> bytes:
        """What is sent last when this side ends the channel."""
        return b""

    def at_end(self) -> Iterable[bytes]:
        """The messages that the end of the stream completes."""
        return ()


class Pump(Channel):
    """A channel over a `ByteIO`. Made and run by a transport.

    Args:
        io: closed when `run` ends.
        framing: may be given later, through `framing`, by a transport that needs the pump to make it.
    """

    framing: Framing

    def __init__(self, label: str, io: ByteIO) -> None:
        super().__init__(label)
        self._io = io
        self._urgent: deque[Buffer] = deque()
        self._frames: deque[list[Buffer]] = deque()
        self._behind: deque[list[Buffer]] | None = None  # frames that wait for the end of a long message
        self._behind_bytes = 0
        self._batch: list[Buffer] = []  # in this order, whatever comes later
        self._wakeup = Wakeup()
        self._sending = False  # the writer is inside `io.send`, which must not be overtaken
        self._ending = False
        self._scope = trio.CancelScope()
        self._read_scope = trio.CancelScope()
        self._below_limit = trio.lowlevel.ParkingLot()
        self.hold_reading: Callable[[], Awaitable[None]] | None = None
        """Waited for before more is read: a moment for those to whom the messages go on."""

    # Sending.

    def send_nowait(self, *parts: bytes) -> None:
        if self._closed or self._ending:
            raise self.lost()
        frames = self.framing.frames(parts)
        size = 0
        for frame in frames:
            for buffer in frame:
                size += len(buffer)
        self.queued += size
        if self._behind is not None:
            self._behind.extend(frames)
            self._behind_bytes += size
            return
        self._frames.extend(frames)
        self._wakeup.set()

    def _begin_message(self) -> tuple[SendPart, Callable[[], None]]:
        self._behind = deque()
        first = True

        def put(data: bytes, *, last: bool) -> None:
            nonlocal first
            if self._closed or self._ending:
                raise self.lost()
            frame = self.framing.part(data, first=first, last=last)
            first = False
            self.queued += sum(map(len, frame))
            self._frames.append(frame)
            self._wakeup.set()

        async def send(data: bytes) -> None:
            put(data, last=False)
            while self.queued - self._behind_bytes > HIGH_WATER and not self._closed:
                await self._room.park()
            await trio.lowlevel.checkpoint()

        def end() -> None:
            put(b"", last=True)
            assert self._behind is not None
            self._frames.extend(self._behind)
            self._behind, self._behind_bytes = None, 0

        return send, end

    def send_urgent(self, data: bytes) -> None:
        """Queue a control frame: it goes before all messages, between two frames."""
        if not self._closed:
            self.queued += len(data)
            self._urgent.append(data)
            self._wakeup.set()

    def close_nowait(self, code: int = 1000, reason: str = "") -> None:
        if self._ending or self._closed:
            return
        self._ending = True
        farewell = self.framing.farewell(code, reason)
        if farewell:
            self._frames.append([farewell])
            self.queued += len(farewell)
        self._scope.deadline = trio.current_time() + CLOSE_GRACE
        self._read_scope.cancel()
        self._wakeup.set()

    def fail(self, loss: str) -> None:
        """End at once: the peer is gone or not to be talked to any more."""
        self.loss = self.loss or loss
        self._scope.cancel()

    # Moving.

    async def run(self, receive: Callable[[bytes], None]) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    await self._read_loop(receive)
                    # Our own end waits for the writer; the peer's end gives it a moment.
                    if not self._ending:
                        if not self.loss:
                            await self._send_last_answers()
                        nursery.cancel_scope.cancel()
                if self._ending:
                    with trio.move_on_after(LINGER):
                        await self._io.linger()
        finally:
            self._ended()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_GRACE):
                await self._io.close()

    async def _send_last_answers(self) -> None:
        with trio.move_on_after(END_GRACE):
            if self.settle is not None:
                await self.settle()
            while self.queued:
                await self._below_limit.park()

    def _ended(self) -> None:
        super()._ended()
        self._below_limit.unpark_all()

    async def _read_loop(self, receive: Callable[[bytes], None]) -> None:
        with self._read_scope:
            try:
                while True:
                    data = await self._io.receive()
                    await self._hand_over(
                        self.framing.messages(data) if data else self.framing.at_end(), receive
                    )
                    if not data:
                        return
                    await self._wait_below_limit()
                    if self.hold_reading is not None:
                        await self.hold_reading()
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.loss = self.loss or str(error.__cause__ or error)

    async def _wait_below_limit(self) -> None:
        while self.queued > ANSWER_LIMIT or len(self._urgent) > MAX_BUFFERS:
            await self._below_limit.park()

    async def _hand_over(self, messages: Iterable[bytes], receive: Callable[[bytes], None]) -> None:
        began = perf_counter()
        for message in messages:
            if self._scope.cancel_called or self._read_scope.cancel_called:
                return  # the message before it, or something between the two, has ended the channel
            receive(message)
            if self.queued > ANSWER_LIMIT:  # a few bytes may ask for a thousand times as many
                self._flush_now()
                await self._wait_below_limit()
                began = perf_counter()
            elif perf_counter() - began > WORK_SLICE:
                self._flush_now()
                await trio.lowlevel.checkpoint()
                began = perf_counter()
        self._flush_now()

    def _flush_now(self) -> None:
        """Send what the messages just handled have caused, as far as the peer takes it at once."""
        while not self._sending and self._fill():
            try:
                count = self._io.send_now(self._batch)
            except OSError as error:
                self.fail(str(error))
                return
            if not count:
                return
            self._took(count)

    async def _write_loop(self) -> None:
        try:
            while True:
                while self._fill():
                    self._sending = True
                    try:
                        count = await self._io.send(self._batch)
                    finally:
                        self._sending = False
                    self._took(count)
                if self._ending:
                    return
                await self._wakeup.wait()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.fail(str(error.__cause__ or error))

    def _fill(self) -> bool:
        """Move what is to go next into the batch, urgent things first; whether there is anything."""
        batch = self._batch
        if batch:
            return True
        size = 0
        while self._urgent and len(batch) < MAX_BUFFERS:
            size += len(self._urgent[0])
            batch.append(self._urgent.popleft())
        while self._frames and size < WRITE_BATCH and len(batch) < MAX_BUFFERS:
            frame = self._frames.popleft()
            batch.extend(frame)
            for buffer in frame:
                size += len(buffer)
        return bool(batch)

    def _took(self, count: int) -> None:
        self._sent(count)
        if self._behind is not None and self.queued - self._behind_bytes <= HIGH_WATER:
            self._room.unpark_all()
        if self.queued <= ANSWER_LIMIT and len(self._urgent) <= MAX_BUFFERS:
            self._below_limit.unpark_all()
        batch = self._batch
        done = 0
        for buffer in batch:
            if count < len(buffer):
                break
            count -= len(buffer)
            done += 1
        del batch[:done]
        if count:
            batch[0] = memoryview(batch[0])[count:]
