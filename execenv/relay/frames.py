"""The frames of a relay: values to protobuf bytes and back, and what makes one invalid (relay.md §3).

Machine: no I/O. The only module that knows the schema.
"""

from __future__ import annotations

from typing import TypeAlias

from attrs import frozen
from google.protobuf.message import DecodeError

from execenv.relay.schema_pb2 import (
    RelayAck,
    RelayHandshake,
    RelayHeartbeat,
    RelayMessageFrame,
    RelayReset,
    RelayResume,
)

VERSION = 1
MAX_STREAM_ID = 128  # bytes
MAX_REASON = 256  # bytes
MAX_SEGMENTS = 1 << 16
SEGMENT = 60 * 1024
"""The largest piece of a message that a frame carries between ends that segment."""
OFFER, ANSWER = 1, 2
"""What a `Resume` is: one that the other end answers, and one that it does not. Were every one answered, a
single one too many would go to and fro for ever."""
MAX_SEQ = 2**32 - 2
"""The last sequence number of a stream and direction (relay.md §5.5)."""


class InvalidFrame(Exception):
    """What arrived is no frame, or one that breaks the rules of §3.1. The text never quotes payload.

    Attributes:
        stream_id: whose it seems to be; empty if that cannot be told.
    """

    def __init__(self, reason: str, stream_id: str = "") -> None:
        super().__init__(reason)
        self.stream_id = stream_id


@frozen
class Data:
    """A message, or a segment of one."""

    seq: int
    payload: bytes
    segment_index: int = 0
    segment_count: int = 1


@frozen
class Ack:
    """Nothing but the acknowledgement that every frame has."""


@frozen
class Resume:
    """What its sender has received: everything before `next_seq`.

    Attributes:
        reliability: `OFFER` or `ANSWER` if the sender acknowledges, resumes and resends, and expects as much;
            0 of a program that knows nothing of that.
    """

    next_seq: int = 0
    reliability: int = 0


@frozen
class Reset:
    """The stream is over."""

    reason: str


@frozen
class Heartbeat:
    """A question for a sign of life."""


@frozen
class Handshake:
    """A message of the Noise handshake."""

    payload: bytes


Body: TypeAlias = Data | Ack | Resume | Reset | Heartbeat | Handshake


@frozen
class Frame:
    """One frame of a stream.

    Attributes:
        ack: all sequence numbers before this one were received.
        ack_bits: bit i says that `ack + 1 + i` was received too.
    """

    stream_id: str
    body: Body
    ack: int = 0
    ack_bits: int = 0


def encode(frame: Frame) -> bytes:
    """The bytes of a frame: one binary message of a websocket."""
    body = frame.body
    message = RelayMessageFrame(
        version=VERSION, stream_id=frame.stream_id, ack=frame.ack, ack_bits=frame.ack_bits
    )
    if type(body) is Data:
        data = message.data  # filled in place: another message would be copied, with its payload
        data.seq = body.seq
        data.segment_index = body.segment_index
        data.segment_count = body.segment_count
        data.payload = body.payload
    elif type(body) is Ack:
        message.ack_frame.CopyFrom(RelayAck())
    elif type(body) is Resume:
        message.resume.CopyFrom(RelayResume(next_seq=body.next_seq, reliability=body.reliability))
    elif type(body) is Reset:
        message.reset.CopyFrom(RelayReset(reason=body.reason))
    elif type(body) is Heartbeat:
        message.heartbeat.CopyFrom(RelayHeartbeat())
    else:
        assert type(body) is Handshake
        message.handshake.CopyFrom(RelayHandshake(payload=body.payload))
    return message.SerializeToString()


def decode(data: bytes) -> Frame:
    """The frame in `data`. Unknown fields are skipped.

    Whether a stream takes segments is its own matter: see `Data.segment_count`.

    Raises:
        InvalidFrame: in the order of §3.1.
    """
    message = _parsed(data)
    stream_id = message.stream_id
    return Frame(stream_id, _body(message, stream_id), message.ack, message.ack_bits)


def _parsed(data: bytes) -> RelayMessageFrame:
    try:
        message = RelayMessageFrame.FromString(data)
    except DecodeError:
        raise InvalidFrame("it cannot be decoded") from None
    stream_id = message.stream_id
    if message.version != VERSION:
        raise InvalidFrame(f"its version is {message.version} and not {VERSION}", stream_id)
    if not stream_id.strip():
        raise InvalidFrame("its stream id is blank")
    if stream_id != stream_id.strip() or len(stream_id.encode()) > MAX_STREAM_ID:
        raise InvalidFrame(f"its stream id has blanks around it, or more than {MAX_STREAM_ID} bytes")
    if not stream_id.isprintable():  # it stands in logs
        raise InvalidFrame("its stream id cannot be printed")
    return message


def _body(message: RelayMessageFrame, stream_id: str) -> Body:
    kind = message.WhichOneof("body")
    if kind == "data":
        data = message.data
        if not data.segment_index < data.segment_count <= MAX_SEGMENTS or data.segment_index > data.seq:
            raise InvalidFrame("its segment cannot be", stream_id)
        payload = data.payload  # a copy each time
        if not payload:
            raise InvalidFrame("its payload is empty", stream_id)
        return Data(data.seq, payload, data.segment_index, data.segment_count)
    if kind == "ack_frame":
        return Ack()
    if kind == "resume":
        return Resume(message.resume.next_seq, message.resume.reliability)
    if kind == "reset":
        reason = message.reset.reason
        if not reason or len(reason.encode()) > MAX_REASON:
            raise InvalidFrame(f"its reason is empty, or has more than {MAX_REASON} bytes", stream_id)
        return Reset(reason)
    if kind == "heartbeat":
        return Heartbeat()
    if kind == "handshake":
        if not message.handshake.payload:
            raise InvalidFrame("its payload is empty", stream_id)
        return Handshake(message.handshake.payload)
    raise InvalidFrame("it has no body", stream_id)


def routing_of(data: bytes) -> tuple[str, bool]:
    """Whose frame `data` is, and whether it is a reset, for who only passes it on. The body is not checked.

    All of it is parsed (which took 0.4 µs, and 2.6 µs for 60 KiB): of a stream id that is there twice the
    last one counts, at both ends too, so who reads only the beginning can be led astray.

    Raises:
        InvalidFrame: if that cannot be told.
    """
    message = _parsed(data)
    return message.stream_id, message.HasField("reset")
