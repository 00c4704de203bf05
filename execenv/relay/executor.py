"""The executor's end of a relay: many streams on one websocket, each with a session of its own (§4.3, 4.5).

Streams belong to the executor and not to a socket: one whose harness resumes outlives the loss of either
socket for a while. All others end with the socket.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from logging import WARNING, Filter, LogRecord, getLogger
from typing import TypeAlias

import trio

from execenv._service import open_nursery
from execenv.relay.frames import Data, Frame, Handshake, InvalidFrame, Reset, Resume
from execenv.relay.keys import PublicKey
from execenv.relay.noise import Identity, NoiseFailed, Responder, Transport, prologue
from execenv.relay.reliable import Reliable, Window
from execenv.relay.streams import CLOSED, Cipher, RelaySocket, RelayStream
from execenv.transports.channel import DEFAULT_MAX_MESSAGE, HIGH_WATER, Channel

logger = getLogger(__name__)


class _Enough(Filter):
    """Lets a few warnings through at a time: another end can cause one with every frame, and fill a disk."""

    MOST = 20
    SECONDS = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._began = -math.inf
        self._count = 0

    def filter(self, record: LogRecord) -> bool:
        if record.levelno != WARNING:
            return True
        if not 0 <= record.created - self._began < self.SECONDS:
            left_out = self._count - self.MOST
            if left_out > 0:
                record.msg = f"{record.getMessage()} ({left_out} warnings before it left out)"
                record.args = ()
            self._began = record.created
            self._count = 0
        self._count += 1
        return self._count <= self.MOST


logger.addFilter(_Enough())

MAX_STREAMS = 128
MAX_PENDING = 32
MAX_FAILED = 8
COOL_DOWN = 10.0
"""Seconds in which every handshake is refused, after `MAX_FAILED` of one socket have failed."""
VALIDATE_TIMEOUT = 10.0
MAX_OFFERS = 256
"""Resumes of streams that have not begun, remembered for each socket."""
STREAM_TTL = 30.0
"""Seconds that a stream waits for its harness to resume. A session may outlive it (protocol.md §3.3)."""

PROTOCOL_ERROR = "noise_relay_protocol_error"
"""The one reason that an executor gives (relay.md §4.5)."""
HARNESS_DISCONNECTED = "harness_disconnected"
"""The reason of a rendezvous that has lost the harness's socket: it may come back over another one."""

ServeStream: TypeAlias = Callable[[Channel], Awaitable[None]]
"""Serves the protocol on a channel until that ends, as on an accepted websocket."""

Validate: TypeAlias = Callable[[str, PublicKey, str], Awaitable[bool]]
"""Asks the registry about a harness: stream id, its key, its authorisation. Raises nothing but Cancelled."""


class ExecutorStream(RelayStream):
    """A stream as the executor has it. Made when it begins: clear text with its first message, Noise with the
    handshake that the registry has approved of."""

    def __init__(
        self,
        stream_id: str,
        socket: RelaySocket,
        *,
        transport: Transport | None,
        identity: bytes | None,
        reliable: bool,
        max_message: float,
    ) -> None:
        super().__init__(stream_id, f"relay stream {stream_id}", max_message=max_message)
        self.identity = identity
        self.socket = socket
        self._cipher = None if transport is None else Cipher(transport)
        self._open = True
        self._segments = reliable and transport is None
        if reliable:
            self._reliable = Reliable(max_message=max_message)
        elif transport is not None:
            self._window = Window()
        self._forget_at = math.inf

    @property
    def _encrypts(self) -> bool:
        return self._cipher is not None

    @property
    def resumable(self) -> bool:
        """Whether it may go on over another socket."""
        return self._reliable is not None

    def greet(self) -> None:
        """Tell a harness that offered it that this end acknowledges and resumes too."""
        if self._reliable is not None:
            self._send_control(self._what_we_have())

    def lose(self, reason: str) -> None:
        """The socket that led to the harness is gone."""
        if self._reliable is None or self._ending:
            self.end(reason)
            return
        if not self.interrupted:
            self._forget_at = trio.current_time() + STREAM_TTL
        self._interrupt(reason)

    def _resume(self, resume: Resume) -> None:
        super()._resume(resume)
        if self._reliable is not None and resume.reliability:
            self._forget_at = math.inf

    def _deadline(self) -> float:
        return min(super()._deadline(), self._forget_at)

    def _look_at_the_clock(self, now: float) -> None:
        if self._forget_at <= now:
            self.end(f"{self.interrupted}, and the harness did not resume within {STREAM_TTL:g} s")
        else:
            super()._look_at_the_clock(now)

    def _deliver(self, message: bytes) -> None:
        if self._cipher is None and not _is_object(message):
            logger.warning("%s: a message that is no JSON object was dropped", self.label)
            return
        super()._deliver(message)

    def _handshake(self, payload: bytes) -> None:
        # One more for a stream that is there already: this attempt is refused, the stream goes on.
        self._send_control(Reset(PROTOCOL_ERROR))

    def _reset(self, reason: str) -> None:
        if reason == HARNESS_DISCONNECTED:
            self.lose("the harness is disconnected from the relay")
        else:
            self.end("the harness reset the stream")

    def _break(self, reason: str) -> None:
        logger.warning("%s: %s", self.label, reason)
        self._said_goodbye = True
        self._send_control(Reset(PROTOCOL_ERROR))
        self.end(reason)


class ExecutorStreams:
    """All streams of an executor, over one socket after the other. Got from `open_streams`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        serve: ServeStream,
        identity: Identity | None,
        max_message: int,
    ) -> None:
        self._nursery = nursery
        self._serve = serve
        self.identity = identity
        self.max_message = max_message
        self._streams: dict[str, ExecutorStream] = {}

    async def run_socket(
        self,
        channel: Channel,
        environment_id: str,
        registration_id: str | None,
        validate: Validate | None,
    ) -> None:
        """Serve the streams of one websocket until that ends.

        Args:
            registration_id, validate: what Noise needs; `None` for clear text.
        """
        socket = _ExecutorSocket(self, channel, environment_id, registration_id, validate)
        try:
            await socket.run()
        finally:
            reason = channel.loss or "the relay closed the connection"
            for stream in list(self._streams.values()):
                if stream.socket is socket.socket:
                    stream.lose(reason)

    def get(self, stream_id: str) -> ExecutorStream | None:
        stream = self._streams.get(stream_id)
        return None if stream is None or stream.closed else stream

    @property
    def full(self) -> bool:
        return len(self._streams) >= MAX_STREAMS

    def add(self, stream: ExecutorStream) -> None:
        """Serve a stream that has begun, in a task of its own."""
        self._streams[stream.stream_id] = stream
        self._nursery.start_soon(self._run, stream)

    async def _run(self, stream: ExecutorStream) -> None:
        try:
            await self._serve(stream)
        except Exception:
            logger.exception("%s ended with an error", stream.label)
        finally:
            stream.end(CLOSED)
            if self._streams.get(stream.stream_id) is stream:
                del self._streams[stream.stream_id]


class _Pending:
    """A handshake that the registry is asked about."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()


class _ExecutorSocket:
    """What an executor does with the frames of one socket (relay.md §4.3, §4.5)."""

    def __init__(
        self,
        streams: ExecutorStreams,
        channel: Channel,
        environment_id: str,
        registration_id: str | None,
        validate: Validate | None,
    ) -> None:
        self.socket = RelaySocket(channel)
        self._streams = streams
        self._environment_id = environment_id
        self._registration_id = registration_id or ""
        self._validate = validate
        self._offers: OrderedDict[str, None] = OrderedDict()
        self._pending: dict[str, _Pending] = {}
        self._failed = 0
        self._refuses_until = -math.inf
        self._nursery: trio.Nursery

    async def run(self) -> None:
        async with open_nursery() as self._nursery:
            await self.socket.run(self._receive, self._invalid)
            self._nursery.cancel_scope.cancel()

    def _invalid(self, error: InvalidFrame) -> None:
        logger.warning("%s: a frame was dropped: %s", self.socket.channel.label, error)

    def _receive(self, frame: Frame) -> None:
        stream = self._streams.get(frame.stream_id)
        body = frame.body
        if stream is not None:
            if type(body) is Resume and stream.resumable:
                stream.attach(self.socket)
            if stream.socket is self.socket:  # else the harness has to say first what it has
                stream.receive_frame(frame)
        elif type(body) is Handshake:
            self._handshake(frame.stream_id, body.payload)
        elif type(body) is Data:
            self._data_of_a_new_stream(frame, body)
        elif type(body) is Reset:
            self._drop_pending(frame.stream_id)
        elif type(body) is Resume and body.reliability:
            if body.next_seq:  # it goes on with what is forgotten here
                self._refuse(frame.stream_id)
                return
            self._offers[frame.stream_id] = None
            if len(self._offers) > MAX_OFFERS:
                self._offers.popitem(last=False)

    def _data_of_a_new_stream(self, frame: Frame, data: Data) -> None:
        if self._streams.identity is not None:
            if self._drop_pending(frame.stream_id):
                self._charge()
            self._refuse(frame.stream_id)
        elif self._streams.full:
            logger.warning("%s: too many streams", self.socket.channel.label)
            self._refuse(frame.stream_id)
        elif data.segment_count != 1 and (data.segment_index or frame.stream_id not in self._offers):
            # What was on its way on a stream that has ended: thousands may come, and none can begin another.
            self._refuse(frame.stream_id)
        elif data.segment_count == 1 and not _is_object(data.payload):
            logger.warning("%s: what is no JSON object begins no stream", self.socket.channel.label)
        else:
            stream = self._begin(frame.stream_id, transport=None, identity=None)
            stream.greet()
            stream.receive_frame(frame)

    def _begin(self, stream_id: str, transport: Transport | None, identity: bytes | None) -> ExecutorStream:
        reliable = stream_id in self._offers
        self._offers.pop(stream_id, None)
        stream = ExecutorStream(
            stream_id,
            self.socket,
            transport=transport,
            identity=identity,
            reliable=reliable,
            max_message=self._streams.max_message,
        )
        self._streams.add(stream)
        return stream

    # Handshakes.

    def _handshake(self, stream_id: str, payload: bytes) -> None:
        identity = self._streams.identity
        if identity is None:
            return  # clear text: ignored, as by the harness (§4.2)
        if trio.current_time() < self._refuses_until:
            self._refuse(stream_id)
            return
        if self._drop_pending(stream_id):
            self._charge()
            self._refuse(stream_id)
            return
        if self._streams.full or len(self._pending) >= MAX_PENDING:
            logger.warning("%s: too many streams or handshakes", self.socket.channel.label)
            self._refuse(stream_id)
            return
        responder = Responder(identity, prologue(self._environment_id, self._registration_id, stream_id))
        try:
            key, authorization = responder.read(payload)
            text = authorization.decode()
        except (NoiseFailed, UnicodeDecodeError) as error:
            logger.warning("%s: a handshake failed: %s", self.socket.channel.label, error)
            self._charge()
            self._refuse(stream_id)
            return
        pending = self._pending[stream_id] = _Pending()
        self._nursery.start_soon(self._ask_registry, pending, stream_id, responder, key, text)

    async def _ask_registry(
        self, pending: _Pending, stream_id: str, responder: Responder, key: PublicKey, authorization: str
    ) -> None:
        assert self._validate is not None
        valid = False
        with pending.scope, trio.move_on_after(VALIDATE_TIMEOUT):
            valid = await self._validate(stream_id, key, authorization)
        if self._pending.get(stream_id) is not pending:
            return  # the id was used for something else meanwhile
        del self._pending[stream_id]
        if not valid or self._streams.full or self._streams.get(stream_id) is not None:
            self._charge()
            self._refuse(stream_id)
            return
        message, transport = responder.answer()
        stream = self._begin(stream_id, transport, key.x25519 + key.mlkem768)
        stream.greet()
        self.socket.send(Frame(stream_id, Handshake(message)))

    def _drop_pending(self, stream_id: str) -> bool:
        pending = self._pending.pop(stream_id, None)
        if pending is not None:
            pending.scope.cancel()
        return pending is not None

    def _charge(self) -> None:
        self._failed += 1
        if self._failed >= MAX_FAILED:
            self._failed = 0
            self._refuses_until = trio.current_time() + COOL_DOWN

    def _refuse(self, stream_id: str) -> None:
        if self.socket.channel.queued <= HIGH_WATER:  # for who floods us and reads nothing it is dropped
            self.socket.send(Frame(stream_id, Reset(PROTOCOL_ERROR)))


def _is_object(text: bytes) -> bool:
    """Whether it can be a JSON object, as every message is; whether it is one shows when it is parsed."""
    stripped = text.strip()
    return stripped[:1] == b"{" and stripped[-1:] == b"}"


@asynccontextmanager
async def open_streams(
    serve: ServeStream, *, identity: Identity | None, max_message: int = DEFAULT_MAX_MESSAGE
) -> AsyncIterator[ExecutorStreams]:
    """A place for the streams of an executor. Leaving the block ends them all.

    Args:
        serve: called for each stream, with its channel.
        identity: the keys of this executor; `None` for clear text.
        max_message: the largest message taken, in bytes, where it is clear text; Noise has its own limit.
    """
    async with open_nursery() as nursery:
        yield ExecutorStreams(nursery, serve, identity, max_message)
        nursery.cancel_scope.cancel()
