"""Streams over the websockets of a relay: each is a channel, and one socket may carry many (relay.md §4).

A stream has a socket, or has none for the time being. The socket gives its streams their turns to send: a
frame each, as long as the socket is not congested, so that one with much to say delays no other.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from logging import getLogger

import trio

from execenv._service import Wakeup, open_nursery
from execenv.errors import ConnectionLost
from execenv.relay.frames import (
    ANSWER,
    OFFER,
    SEGMENT,
    Ack,
    Body,
    Data,
    Frame,
    Handshake,
    Heartbeat,
    InvalidFrame,
    Reset,
    Resume,
    decode,
    encode,
)
from execenv.relay.noise import NoiseFailed, RecordReader, RecordWriter, Transport
from execenv.relay.reliable import Reliable, StreamBroken, Window
from execenv.transports._pump import CLOSE_GRACE
from execenv.transports.channel import (
    ANSWER_LIMIT,
    DEFAULT_MAX_MESSAGE,
    HIGH_WATER,
    Channel,
    MessageTooLong,
    SendPart,
)
from execenv.transports.websocket import PROBE_TIMEOUT

logger = getLogger(__name__)

MAX_HELD = 128
"""Messages that may arrive before they can be taken (relay.md §4.7)."""
MAX_HELD_BYTES = DEFAULT_MAX_MESSAGE
"""One more is held when there are fewer."""

CLOSED = "closed"
"""Why a stream is reset that has come to its end."""


class RelaySocket:
    """One websocket of a relay. `run` must run for anything to happen."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._ready: deque[RelayStream] = deque()
        self._wakeup = Wakeup()

    async def run(self, receive: Callable[[Frame], None], invalid: Callable[[InvalidFrame], None]) -> None:
        """Move frames until the socket ends; `channel.loss` says why it did."""

        def receive_bytes(data: bytes) -> None:
            try:
                frame = decode(data)
            except InvalidFrame as error:
                invalid(error)
            else:
                receive(frame)

        async with open_nursery() as nursery:
            nursery.start_soon(self._give_turns)
            await self.channel.run(receive_bytes)
            nursery.cancel_scope.cancel()

    def send(self, frame: Frame) -> None:
        """Queue a frame before what streams have to send. Nothing happens once the socket has ended."""
        try:
            self.channel.send_nowait(encode(frame))
        except ConnectionLost:
            logger.debug("a frame had no socket to go to")

    def want(self, stream: RelayStream) -> None:
        """The stream has something to send: that goes out now, or when it is its turn."""
        if stream.waits_for_turn:
            return
        if not self._ready:
            while not self.channel.congested:
                frame = stream.next_frame()
                if frame is None:
                    return
                self.send(frame)
        stream.waits_for_turn = True
        self._ready.append(stream)
        self._wakeup.set()

    def forget(self, stream: RelayStream) -> None:
        """The stream sends over another socket, or not at all any more."""
        if stream.waits_for_turn:
            stream.waits_for_turn = False
            self._ready.remove(stream)

    async def _give_turns(self) -> None:
        while True:
            await self._wakeup.wait()
            while self._ready:
                try:
                    await self.channel.wait_room()
                except ConnectionLost:
                    return
                await trio.lowlevel.checkpoint()
                self._one_round()

    def _one_round(self) -> None:
        for _ in range(len(self._ready)):
            if self.channel.congested:
                return
            stream = self._ready.popleft()
            stream.waits_for_turn = False
            frame = stream.next_frame()
            if frame is not None:
                self.send(frame)
                stream.waits_for_turn = True
                self._ready.append(stream)


class Cipher:
    """What is between the messages of a stream and the payloads of its frames: Noise (relay.md §5.5)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._writer = RecordWriter()
        self._reader = RecordReader()

    def seal(self, parts: tuple[bytes, ...]) -> Iterator[bytes]:
        """A message as payloads, each encrypted when it is asked for: their order is that of the nonces.

        Raises:
            StreamBroken: if there are no nonces left.
        """
        try:
            for record in self._writer.records(*parts):
                yield self._transport.encrypt(record)
        except NoiseFailed as error:
            raise StreamBroken(str(error)) from error

    def open(self, payload: bytes) -> list[bytes]:
        """The messages that a payload completes.

        Raises:
            StreamBroken: if it is not what the other end has sent next.
        """
        try:
            return self._reader.feed(self._transport.decrypt(payload))
        except NoiseFailed as error:
            raise StreamBroken(str(error)) from error


class RelayStream(Channel):
    """One end of a stream, as a channel of messages.

    Args:
        max_message: the largest message taken, in bytes, where the payload is clear text.

    Attributes:
        socket: what it is sent over now; `None` without one.
        waits_for_turn: of the socket.
    """

    socket: RelaySocket | None = None
    waits_for_turn = False

    def __init__(self, stream_id: str, label: str, *, max_message: float = DEFAULT_MAX_MESSAGE) -> None:
        super().__init__(label)
        self.stream_id = stream_id
        self._max_message = max_message
        self._cipher: Cipher | None = None
        self._open = False  # whether messages may be sent, which only a handshake or a resume can hold up
        self._reliable: Reliable | None = None
        self._segments = False  # whether a long message may be sent as segments
        self._window: Window | None = None
        self._seq = 0  # of what is sent without a `Reliable`
        self._outgoing: deque[tuple[bytes, ...]] = deque()
        self._payloads: Iterator[tuple[bytes, int, int]] | None = None  # of the message that is being sent
        self._size_now = 0  # of that message
        self._behind: list[tuple[bytes, ...]] | None = None  # messages that wait for the end of one in parts
        self._receive: Callable[[bytes], None] | None = None
        # What can't be taken yet: nobody serves the stream so far, or answers lie there and are not taken.
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._ending = False
        self._close_by = math.inf
        self._said_goodbye = False
        self._asked = False  # whether a resume of ours waits for one of the other end
        self._probe_until = math.inf
        self._sleeps_until = -math.inf
        self._wakeup = Wakeup()

    # Sending.

    def send_nowait(self, *parts: bytes) -> None:
        if self._closed or self._ending:
            raise self.lost()
        self._check_length(sum(map(len, parts)))
        if self._behind is not None:
            self._behind.append(parts)
            return
        self._queue(parts)

    def _check_length(self, size: int) -> None:
        # Noise has that limit, and so has whoever takes a message in one frame, the relay to begin with.
        if size > DEFAULT_MAX_MESSAGE and not self._segments:
            raise MessageTooLong(
                f"a message of {size} bytes cannot go through a relay: the limit is {DEFAULT_MAX_MESSAGE}; "
                "ask for less at a time"
            )

    @property
    @abstractmethod
    def _encrypts(self) -> bool:
        """Whether the payload is encrypted, now or as soon as the handshake is done."""

    def _queue(self, parts: tuple[bytes, ...]) -> None:
        self._outgoing.append(parts)
        self.queued += sum(map(len, parts))
        self._send_more()

    def _begin_message(self) -> tuple[SendPart, Callable[[], None]]:
        # As a whole: both kinds of payload say at the beginning how long the message is.
        parts: list[bytes] = []
        size = 0
        self._behind = []

        async def send(part: bytes) -> None:
            nonlocal size
            if self._closed or self._ending:
                raise self.lost()
            size += len(part)
            try:
                self._check_length(size)
            except MessageTooLong:
                parts.clear()
                self._end_behind()
                raise
            parts.append(part)
            await trio.lowlevel.checkpoint()

        def end() -> None:
            if self._closed or self._ending:
                raise self.lost()
            self._queue(tuple(parts))
            self._end_behind()

        return send, end

    def _end_behind(self) -> None:
        behind, self._behind = self._behind or [], None
        for message in behind:
            self._queue(message)

    def _send_more(self) -> None:
        if self.socket is not None and self._open:
            self.socket.want(self)

    def next_frame(self) -> Frame | None:
        """What is to be sent next; `None` if there is nothing, or nothing that may be sent."""
        if not self._open or self._closed:
            return None
        try:
            data = self._next_data()
        except StreamBroken as error:
            self._break(str(error))
            return None
        return None if data is None else self._frame(data)

    def _next_data(self) -> Data | None:
        reliable = self._reliable
        if reliable is None:
            payload = self._next_payload()
            return None if payload is None else Data(self._next_seq(), *payload)
        data = reliable.next_resend()
        if data is None and reliable.room:
            payload = self._next_payload()
            if payload is not None:
                data = reliable.add(*payload, now=trio.current_time())
                self._note_deadline()
        return data

    def _next_seq(self) -> int:
        seq = self._seq
        self._seq = seq + 1 & 0xFFFFFFFF  # as the released programs count (relay.md §4.2)
        return seq

    def _next_payload(self) -> tuple[bytes, int, int] | None:
        while True:
            if self._payloads is None:
                if not self._outgoing or self._must_wait():
                    return None
                parts = self._outgoing.popleft()
                self._size_now = sum(map(len, parts))
                self._payloads = self._cut(parts)
            for payload in self._payloads:
                return payload
            self._payloads = None
            self._sent(self._size_now)
            if self._ending and not self._outgoing:
                self._wakeup.set()

    def _must_wait(self) -> bool:
        """Whether the next message is not to be begun yet; who says so calls `_send_more` later."""
        return False

    def _cut(self, parts: tuple[bytes, ...]) -> Iterator[tuple[bytes, int, int]]:
        if self._cipher is not None:
            for payload in self._cipher.seal(parts):
                yield payload, 0, 1
            return
        if self._encrypts:  # whatever has opened the stream before its handshake was done
            raise StreamBroken("a message would have gone out in clear text")
        message = b"".join(parts)
        if not self._segments or len(message) <= SEGMENT:
            yield message, 0, 1
            return
        count = -(-len(message) // SEGMENT)
        for index in range(count):
            yield message[index * SEGMENT : (index + 1) * SEGMENT], index, count

    def _frame(self, body: Body) -> Frame:
        reliable = self._reliable
        if reliable is None:
            return Frame(self.stream_id, body)
        frame = Frame(self.stream_id, body, reliable.ack, reliable.ack_bits)
        reliable.ack_sent()
        return frame

    def _send_control(self, body: Body) -> None:
        if self.socket is not None:
            self.socket.send(self._frame(body))

    # Receiving. All of it is called by the reader of a socket and never waits.

    def receive_frame(self, frame: Frame) -> None:
        """A frame of this stream has arrived."""
        if self._closed:
            return
        body = frame.body
        try:
            if self._reliable is not None:
                self._reliable.acknowledged(frame.ack, frame.ack_bits, trio.current_time())
            if type(body) is Data:
                self._data(body)
            elif type(body) is Reset:
                self._reset(body.reason)
            elif type(body) is Handshake:
                self._handshake(body.payload)
            elif type(body) is Resume:
                self._resume(body)
            elif type(body) is Heartbeat and self._reliable is not None:
                self._send_control(Ack())
        except StreamBroken as error:
            self._break(str(error))
            return
        self._probe_until = math.inf
        if self._reliable is not None:
            if self._reliable.ack_due(trio.current_time()):
                self._send_control(Ack())
            self._note_deadline()
            self._send_more()

    def _data(self, data: Data) -> None:
        if self._reliable is not None:
            payloads = self._reliable.receive(data, trio.current_time())
        elif self._window is not None:
            payloads = self._window.receive(data, trio.current_time())
            self._note_deadline()
        elif data.segment_count != 1:
            raise StreamBroken("a frame is a segment, which was not agreed on")
        else:
            payloads = [data.payload]
        cipher = self._cipher
        for payload in payloads:
            if cipher is None:
                self._deliver(payload)
                continue
            for message in cipher.open(payload):
                self._deliver(message)

    def _deliver(self, message: bytes) -> None:
        if self._closed or self._ending:
            return
        if self._receive is not None and not self._held and self.queued <= ANSWER_LIMIT:
            self._receive(message)
            return
        if len(self._held) >= MAX_HELD or self._held_bytes > MAX_HELD_BYTES:
            raise StreamBroken("the other end asks and asks, and takes no answer")
        self._held.append(message)
        self._held_bytes += len(message)

    def _deliver_held(self, receive: Callable[[bytes], None]) -> None:
        while self._held and self.queued <= ANSWER_LIMIT and not self._closed and not self._ending:
            message = self._held.popleft()
            self._held_bytes -= len(message)
            receive(message)

    def _sent(self, count: int) -> None:
        super()._sent(count)
        if self._held and self.queued <= ANSWER_LIMIT:
            self._wakeup.set()

    def _resume(self, resume: Resume) -> None:
        if self._reliable is None or not resume.reliability:
            return
        asked, self._asked = self._asked, False
        if resume.reliability == ANSWER and not asked:
            return
        self._reliable.resumed(resume.next_seq, trio.current_time())
        if not asked:
            self._send_control(self._what_we_have(ANSWER))
        self._open = True
        self._set_interrupted("")

    def _what_we_have(self, kind: int = OFFER) -> Resume:
        assert self._reliable is not None
        return Resume(self._reliable.ack, reliability=kind)

    def _ask(self) -> None:
        """Have the other end say what it has."""
        self._asked = True
        self._send_control(self._what_we_have())

    @abstractmethod
    def _handshake(self, payload: bytes) -> None: ...

    @abstractmethod
    def _reset(self, reason: str) -> None: ...

    @abstractmethod
    def _break(self, reason: str) -> None:
        """The other end broke the rules."""

    # The channel's life.

    def attach(self, socket: RelaySocket) -> None:
        """Send over that socket from now on."""
        if self.socket is not socket:
            self.detach()
            self.socket = socket

    def detach(self) -> None:
        """There is no socket for the time being."""
        if self.socket is not None:
            self.socket.forget(self)
            self.socket = None

    def _interrupt(self, reason: str) -> None:
        """The socket is gone, and there may be another one."""
        self.detach()
        self._open = False
        self._asked = False
        self._probe_until = math.inf
        self._set_interrupted(reason)

    def _set_interrupted(self, reason: str) -> None:
        if bool(reason) != bool(self.interrupted):
            self.interrupted_at = trio.current_time()
        if reason != self.interrupted:
            self.interrupted = reason
            self.on_interrupted()
            self._wakeup.set()
            if not reason:
                self._room.unpark_all()

    async def run(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive
        try:
            while not self._closed:
                self._deliver_held(receive)
                if self._ending and not (self._can_send and (self._outgoing or self._payloads)):
                    break
                self._sleeps_until = self._deadline()
                with trio.move_on_at(self._sleeps_until):
                    await self._wakeup.wait()
                self._sleeps_until = -math.inf
                self._look_at_the_clock(trio.current_time())
        finally:
            self._say_goodbye()
            self.end("")

    @property
    def _can_send(self) -> bool:
        return self._open and self.socket is not None

    def _note_deadline(self) -> None:
        if self._deadline() < self._sleeps_until:
            self._wakeup.set()

    def _deadline(self) -> float:
        deadline = min(self._probe_until, self._close_by)
        if self._reliable is not None and self._can_send:
            deadline = min(deadline, self._reliable.deadline)
        if self._window is not None:
            deadline = min(deadline, self._window.deadline)
        return deadline

    def _look_at_the_clock(self, now: float) -> None:
        if self._close_by <= now:
            self.end("")
        elif self._probe_until <= now:
            self.end(f"no sign of life within {PROBE_TIMEOUT:g} s")
        elif self._window is not None and self._window.deadline <= now:
            self._break("a frame was missing for too long")
        elif self._reliable is not None and self._can_send:
            if self._reliable.ack_due(now):
                self._send_control(Ack())
            if self._reliable.stalled(now):
                self._stalled()

    def _stalled(self) -> None:
        """Nothing was acknowledged for long."""
        self._ask()

    def _say_goodbye(self) -> None:
        if not self._closed and not self._said_goodbye:
            self._said_goodbye = True
            self._send_control(Reset(CLOSED))

    def end(self, loss: str) -> None:
        """It is over, at once."""
        if not self._closed:
            self.loss = self.loss or loss
            self.detach()
            self._ended()
            self._wakeup.set()

    def close_nowait(self, code: int = 1000, reason: str = "") -> None:
        if not self._ending and not self._closed:
            self._ending = True
            self._close_by = trio.current_time() + CLOSE_GRACE
            self._wakeup.set()

    def probe_nowait(self) -> None:
        if self.interrupted:
            self.end("its client is to come back over another stream")
        elif self._reliable is not None and self._probe_until == math.inf and not self._ending:
            self._probe_until = trio.current_time() + PROBE_TIMEOUT
            self._ask()
            self._note_deadline()

    @property
    def congested(self) -> bool:
        return (self.queued > HIGH_WATER or bool(self.interrupted)) and not self._closed
