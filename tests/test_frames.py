"""The frame codec, alone and judged by two others: wsproto in both roles, and websockets."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise

import pytest
import websockets.frames
import websockets.protocol
import wsproto.events
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.frame_protocol import CloseReason

from execenv.transports._frames import (
    Buffer,
    Close,
    Event,
    FrameCodec,
    Masker,
    Ping,
    Pong,
    Violation,
    fastest_masker,
    mask_in_python,
)

FIN, CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x80, 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
LIMIT = 1 << 20
SIZES = [0, 1, 125, 126, 127, 65535, 65536, 70001]
BAD_UTF8 = [b"\xff", b"caf\xc3", b"\xc3(", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\x80"]
GOOD_CODES = [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999]
BAD_CODES = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]

repeatable = settings(max_examples=300, deadline=None, derandomize=True, database=None)
both_roles = pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
both_maskers = pytest.mark.parametrize(
    "masker", [fastest_masker(), mask_in_python], ids=["fastest", "python"]
)


def codec(client: bool, max_message: int = LIMIT, max_fragment: int = 128 * 1024) -> FrameCodec:
    return FrameCodec(client=client, max_message=max_message, max_fragment=max_fragment)


def mask_by_definition(data: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(data))


class Wire:
    """Writes frames, right and wrong ones, as the peer of a codec in the role `client` would."""

    def __init__(self, client: bool) -> None:
        self.masked = not client

    def header(self, first: int, size: int, form: int | None = None, masked: bool | None = None) -> bytes:
        """Up to the mask key. `form` is the length field to use: 7, 16 or 64 bits."""
        bit = 0x80 if (self.masked if masked is None else masked) else 0
        form = form or (7 if size < 126 else 16 if size < 65536 else 64)
        if form == 7:
            return struct.pack("!BB", first, bit | size)
        if form == 16:
            return struct.pack("!BBH", first, bit | 126, size)
        return struct.pack("!BBQ", first, bit | 127, size)

    def frame(
        self, first: int, payload: bytes = b"", form: int | None = None, masked: bool | None = None
    ) -> bytes:
        header = self.header(first, len(payload), form, masked)
        if not (self.masked if masked is None else masked):
            return header + payload
        key = b"\x1f\x00\xa7\x80"
        return header + key + (mask_in_python if len(payload) > 500 else mask_by_definition)(payload, key)


def wsproto_events(stream: bytes, client: bool) -> list[Event]:
    """What wsproto makes of `stream`, in our words."""
    peer = Connection(ConnectionType.CLIENT if client else ConnectionType.SERVER)
    peer.receive_data(stream)
    events: list[Event] = []
    message = b""
    for event in peer.events():
        match event:
            case wsproto.events.Ping():
                events.append(Ping(bytes(event.payload)))
            case wsproto.events.Pong():
                events.append(Pong(bytes(event.payload)))
            case wsproto.events.CloseConnection() if peer.state is ConnectionState.OPEN:
                events.append(Violation(event.code, ""))
            case wsproto.events.CloseConnection():
                code = None if event.code == CloseReason.NO_STATUS_RCVD else int(event.code)
                events.append(Close(code, event.reason or ""))
            case wsproto.events.Message():
                message += event.data.encode() if isinstance(event.data, str) else bytes(event.data)
                if event.message_finished:
                    events.append(message)
                    message = b""
    return events


def websockets_events(stream: bytes, client: bool, max_message: int = LIMIT) -> list[Event]:
    """What websockets makes of `stream`, in our words. It checks neither UTF-8 nor minimal lengths."""
    side = websockets.protocol.CLIENT if client else websockets.protocol.SERVER
    peer = websockets.protocol.Protocol(side, max_size=max_message)
    peer.receive_data(stream)
    events: list[Event] = []
    message = b""
    for frame in peer.events_received():
        assert isinstance(frame, websockets.frames.Frame)
        data = bytes(frame.data)
        if frame.opcode == PING:
            events.append(Ping(data))
        elif frame.opcode == PONG:
            events.append(Pong(data))
        elif frame.opcode == CLOSE:
            events.append(Close(struct.unpack("!H", data[:2])[0] if data else None, data[2:].decode()))
        else:
            message += data
            if frame.fin:
                events.append(message)
                message = b""
    if peer.parser_exc is not None and peer.close_sent is not None:
        events.append(Violation(peer.close_sent.code, ""))
    return events


def without_reasons(events: Iterable[Event]) -> list[Event]:
    return [Violation(e.code, "") if isinstance(e, Violation) else e for e in events]


def received(client: bool, pieces: Iterable[bytes], max_message: int = LIMIT) -> list[Event]:
    receiver = codec(client, max_message)
    return [event for piece in pieces for event in receiver.receive(piece)]


def joined(frames: Iterable[Iterable[Buffer]]) -> bytes:
    return b"".join(buffer for frame in frames for buffer in frame)


# --- What is allowed -------------------------------------------------------------------------------------


@both_roles
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("size", SIZES)
def test_message_of_any_size_arrives_whole(client: bool, opcode: int, size: int) -> None:
    payload = bytes(range(97, 123)) * (size // 26 + 1)
    stream = Wire(client).frame(FIN | opcode, payload[:size])
    expected: list[Event] = [payload[:size]]
    assert received(client, [stream]) == expected
    assert received(client, (stream[i : i + 997] for i in range(0, len(stream), 997))) == expected
    assert wsproto_events(stream, client) == expected
    assert websockets_events(stream, client) == expected


ALLOWED: dict[str, tuple[list[tuple[int, bytes]], list[Event]]] = {
    "ping": ([(FIN | PING, b"")], [Ping(b"")]),
    "longest ping": ([(FIN | PING, b"\xfe" * 125)], [Ping(b"\xfe" * 125)]),
    "pong": ([(FIN | PONG, b"late")], [Pong(b"late")]),
    "two fragments": ([(TEXT, b"ab"), (FIN, b"cd")], [b"abcd"]),
    "empty fragments": ([(TEXT, b""), (0, b""), (FIN, b"")], [b""]),
    "one full among empty": ([(BINARY, b""), (0, b"\xff"), (0, b""), (FIN, b"")], [b"\xff"]),
    "ping inside": ([(TEXT, b"a"), (FIN | PING, b"p"), (FIN, b"b")], [Ping(b"p"), b"ab"]),
    "pong inside": ([(BINARY, b"a"), (FIN | PONG, b"p"), (0, b"b"), (FIN, b"")], [Pong(b"p"), b"ab"]),
    "close inside": ([(TEXT, b"a"), (FIN | CLOSE, b"")], [Close(None, "")]),
    "fragmented twice": ([(TEXT, b"a"), (FIN, b"b"), (BINARY, b"c"), (FIN, b"d")], [b"ab", b"cd"]),
    "split character": ([(TEXT, b"\xf0\x9f"), (0, b"\x98"), (FIN, b"\x80")], ["😀".encode()]),
    "binary not UTF-8": ([(FIN | BINARY, b"\xff\xfe")], [b"\xff\xfe"]),
    "large fragments": ([(TEXT, b"a" * 9001), (0, b"b"), (0, b"c"), (FIN, b"d" * 70001)],
                        [b"a" * 9001 + b"bc" + b"d" * 70001]),
    "noncharacters": ([(FIN | TEXT, "\uffff\U0010ffff\0".encode())], ["\uffff\U0010ffff\0".encode()]),
    "close with reason": ([(FIN | CLOSE, b"\x03\xe8bye \xe2\x9c\x93")], [Close(1000, "bye ✓")]),
    "longest close": ([(FIN | CLOSE, b"\x0f\xa0" + b"x" * 123)], [Close(4000, "x" * 123)]),
}  # fmt: skip


@both_roles
@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_frames_give_their_events(client: bool, name: str) -> None:
    frames, expected = ALLOWED[name]
    stream = b"".join(Wire(client).frame(first, payload) for first, payload in frames)
    assert received(client, [stream]) == expected
    assert received(client, (bytes([byte]) for byte in stream)) == expected
    assert wsproto_events(stream, client) == expected
    if name != "close inside":  # an error to websockets, though RFC 6455 section 5.4 allows it
        assert websockets_events(stream, client) == expected


@both_roles
@pytest.mark.parametrize("code", GOOD_CODES)
def test_close_code_that_may_be_sent_is_accepted(client: bool, code: int) -> None:
    stream = Wire(client).frame(FIN | CLOSE, struct.pack("!H", code) + b"why")
    assert received(client, [stream]) == [Close(code, "why")]
    assert websockets_events(stream, client) == [Close(code, "why")]
    if code != 1014:  # registered after wsproto's list was written
        assert wsproto_events(stream, client) == [Close(code, "why")]


@both_roles
def test_nothing_is_read_after_a_close(client: bool) -> None:
    wire = Wire(client)
    receiver = codec(client)
    close, message = wire.frame(FIN | CLOSE, b"\x03\xe8"), wire.frame(FIN | TEXT, b"late")
    assert receiver.receive(message + close + message + b"\xff\xff") == [b"late", Close(1000, "")]
    assert receiver.receive(message) == []


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@both_roles
def test_any_kind_of_buffer_gives_bytes_of_its_own(
    client: bool, kind: Callable[[bytearray], bytes | bytearray | memoryview]
) -> None:
    source = bytearray(Wire(client).frame(FIN | TEXT, b"mine") + Wire(client).frame(FIN | PING, b"p")[:-1])
    receiver = codec(client)
    (message,) = receiver.receive(kind(source))
    source[:] = bytes(len(source))
    assert type(message) is bytes
    assert message == b"mine"
    last = Wire(client).frame(FIN | PING, b"p")[-1:]
    assert receiver.receive(kind(bytearray(last))) == [Ping(b"p")]


# --- What is not -----------------------------------------------------------------------------------------


def violations(client: bool) -> Iterator[tuple[str, int, bytes]]:
    """Name, close code, and frames whose last one is wrong."""
    wire = Wire(client)
    for bit in (0x40, 0x20, 0x10, 0x70):
        yield f"reserved bits {bit:#x}", 1002, wire.frame(FIN | bit | TEXT, b"x")
        yield f"reserved bits {bit:#x} on ping", 1002, wire.frame(FIN | bit | PING)
        yield f"reserved bits {bit:#x} inside", 1002, wire.frame(TEXT, b"a") + wire.frame(FIN | bit, b"x")
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield f"opcode {opcode}", 1002, wire.frame(FIN | opcode)
        yield f"opcode {opcode}, fragmented", 1002, wire.frame(opcode)
        yield f"opcode {opcode} inside", 1002, wire.frame(BINARY) + wire.frame(FIN | opcode, b"x")
    for opcode in (CLOSE, PING, PONG):
        yield f"fragmented control {opcode}", 1002, wire.frame(opcode)
        yield f"long control {opcode}", 1002, wire.frame(FIN | opcode, b"x" * 126)
        yield f"control {opcode}, 64 bit length", 1002, wire.frame(FIN | opcode, b"x" * 65536)
        yield f"control {opcode}, needless length", 1002, wire.frame(FIN | opcode, b"x", form=16)
    yield "stray continuation", 1002, wire.frame(0, b"x")
    yield "stray last continuation", 1002, wire.frame(FIN, b"x")
    for opcode in (TEXT, BINARY):
        yield f"interrupted by {opcode}", 1002, wire.frame(TEXT, b"a") + wire.frame(FIN | opcode, b"x")
        yield f"interrupted by part {opcode}", 1002, wire.frame(BINARY, b"a") + wire.frame(opcode, b"x")
    for first in (FIN | TEXT, BINARY, FIN | PING, FIN | CLOSE):
        yield f"wrong masking {first:#x}", 1002, wire.frame(first, b"", masked=client)
    for form, size in ((16, 0), (16, 125), (64, 0), (64, 125), (64, 126), (64, 65535)):
        yield f"length {size} in {form} bits", 1002, wire.frame(FIN | TEXT, b"x" * size, form=form)
    for size in (1 << 63, (1 << 64) - 1):
        yield f"length {size}", 1002, wire.header(FIN | TEXT, size) + bytes(4)
    for text in BAD_UTF8:
        yield f"text {text!r}", 1007, wire.frame(FIN | TEXT, text)
        yield f"fragmented {text!r}", 1007, wire.frame(TEXT, text[:-1]) + wire.frame(FIN, text[-1:])
        yield f"close reason {text!r}", 1007, wire.frame(FIN | CLOSE, b"\x03\xe8" + text)
    for code in BAD_CODES:
        yield f"close {code}", 1002, wire.frame(FIN | CLOSE, struct.pack("!H", code) + b"x")
    yield "close of one byte", 1002, wire.frame(FIN | CLOSE, b"\x03")


VIOLATIONS = [(client, *case) for client in (False, True) for case in violations(client)]


@pytest.mark.parametrize(
    ("client", "name", "code", "wrong"),
    VIOLATIONS,
    ids=[f"{'client' if case[0] else 'server'}: {case[1]}" for case in VIOLATIONS],
)
def test_violation_comes_behind_the_messages_before_it_and_ends_the_stream(
    client: bool, name: str, code: int, wrong: bytes
) -> None:
    wire = Wire(client)
    stream = wire.frame(FIN | TEXT, b"before") + wire.frame(FIN | PING, b"p") + wrong
    expected = [b"before", Ping(b"p"), Violation(code, "")]
    after = wire.frame(FIN | TEXT, b"after")
    assert without_reasons(received(client, [stream + after, after])) == expected
    assert without_reasons(received(client, (bytes([byte]) for byte in stream + after))) == expected
    assert without_reasons(received(client, [stream])) == expected
    assert wsproto_events(stream, client) == expected
    if code == 1002 and "length" not in name:
        assert websockets_events(stream, client) == expected


@both_roles
def test_bad_text_is_reported_where_its_message_ends(client: bool) -> None:
    wire = Wire(client)
    receiver = codec(client)
    assert receiver.receive(wire.frame(TEXT, b"\xff") + wire.frame(FIN | PING, b"p")) == [Ping(b"p")]
    (event,) = receiver.receive(wire.frame(FIN))
    assert without_reasons([event]) == [Violation(1007, "")]


@pytest.mark.parametrize("at", [0, 1, 65532, 65533, 65534, 65535, 65536, 131071, 131072])
@both_roles
def test_long_text_is_checked_across_the_steps_of_the_check(client: bool, at: int) -> None:
    wire = Wire(client)
    good = b"x" * at + "😀".encode() + b"y" * 70000
    bad = good.replace(b"\x98", b"x")
    assert received(client, [wire.frame(FIN | TEXT, good)]) == [good]
    events = received(client, [wire.frame(FIN | TEXT, bad)])
    assert without_reasons(events) == [Violation(1007, "")]
    cut = b"x" * at + "😀".encode()[:-1]
    assert without_reasons(received(client, [wire.frame(FIN | TEXT, cut)])) == [Violation(1007, "")]


# --- Limits ----------------------------------------------------------------------------------------------


@both_roles
@pytest.mark.parametrize("limit", [0, 1, 125, 126, 65535, 65536])
def test_message_over_the_limit_is_refused_at_its_header(client: bool, limit: int) -> None:
    wire = Wire(client)
    exact = wire.frame(FIN | BINARY, b"x" * limit)
    assert received(client, [exact], limit) == [b"x" * limit]
    events = received(client, [exact + wire.header(FIN | BINARY, limit + 1)], limit)
    assert without_reasons(events) == [b"x" * limit, Violation(1009, "")]
    if limit:  # 0 is no limit to websockets
        over = wire.frame(FIN | BINARY, b"x" * (limit + 1))
        assert websockets_events(exact + over, client, limit) == without_reasons(events)


@both_roles
def test_fragments_over_the_limit_together_are_refused_at_the_header_of_the_last(client: bool) -> None:
    wire = Wire(client)
    fragments = wire.frame(TEXT, b"abc") + wire.frame(0, b"") + wire.frame(0, b"de")
    assert received(client, [fragments + wire.frame(FIN, b"f")], 6) == [b"abcdef"]
    events = received(client, [fragments + wire.header(FIN, 2)], 6)
    assert without_reasons(events) == [Violation(1009, "")]


@both_roles
def test_limit_counts_neither_control_frames_nor_earlier_messages(client: bool) -> None:
    wire = Wire(client)
    message = wire.frame(TEXT, b"ab") + wire.frame(FIN | PING, b"p" * 125) + wire.frame(FIN, b"c")
    assert received(client, [message * 3], 3) == [Ping(b"p" * 125), b"abc"] * 3


@both_roles
def test_huge_declared_length_is_refused_without_payload(client: bool) -> None:
    assert without_reasons(received(client, [Wire(client).header(FIN | TEXT, 1 << 40)])) == [
        Violation(1009, "")
    ]


@both_roles
@pytest.mark.parametrize("size", [0, 1, 16])
def test_tiny_fragments_cost_no_more_memory_than_their_message(client: bool, size: int) -> None:
    wire = Wire(client)
    total = 1 << 18
    receiver = codec(client, total)
    batch = wire.frame(0, b"x" * size) * 1024
    receiver.receive(wire.frame(TEXT))
    tracemalloc.start()
    try:
        for _ in range(total // max(size, 16) // 1024):
            assert receiver.receive(batch) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < total * 1.5
    (message,) = receiver.receive(wire.frame(FIN))
    assert message == b"x" * (total // max(size, 16) * size)


@both_roles
def test_unfinished_message_does_not_hold_the_rest_of_the_reads_it_came_in(client: bool) -> None:
    wire = Wire(client)
    receiver = codec(client)
    fragment, pongs = wire.frame(0, b"x" * 5000), wire.frame(FIN | PONG, b"p" * 125) * 400
    receiver.receive(wire.frame(TEXT))
    tracemalloc.start()
    try:
        for _ in range(10):
            assert len(receiver.receive(fragment + pongs)) == 400
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * (50_000 + len(pongs))
    assert receiver.receive(wire.frame(FIN)) == [b"x" * 50_000]


@pytest.mark.parametrize("fragment", [1 << 26, 1 << 17, 100_000])
def test_large_message_in_pieces_is_handled_once_byte_for_byte(fragment: int) -> None:
    masked: list[int] = []

    def counting_masker(data: Buffer, key: bytes) -> bytes:
        masked.append(len(data))
        return fastest_masker()(data, key)

    total, step = 1 << 26, 1 << 16
    payload = b"x" * total
    frames = FrameCodec(client=True, max_message=0, max_fragment=fragment).encode_message(payload)
    stream = memoryview(joined(frames))
    receiver = FrameCodec(client=False, max_message=total, mask=counting_masker)
    events: list[Event] = []
    for start in range(0, len(stream), step):
        events += receiver.receive(stream[start : start + step])
        assert len(receiver._unread) < 14  # what is joined with the next piece, so copied again
    assert len(events) == 1
    assert events[0] == payload
    assert sum(masked) == total
    assert len(masked) <= len(stream) // step + 1 + len(frames)


def test_many_small_messages_in_one_read_are_masked_once_each() -> None:
    masked: list[int] = []

    def counting_masker(data: Buffer, key: bytes) -> bytes:
        masked.append(len(data))
        return mask_in_python(data, key)

    receiver = FrameCodec(client=False, max_message=LIMIT, mask=counting_masker)
    stream = Wire(False).frame(FIN | TEXT, b"x" * 100) * 2000
    events = [e for i in range(0, len(stream), 65536) for e in receiver.receive(stream[i : i + 65536])]
    assert events == [b"x" * 100] * 2000
    assert sum(masked) == 200_000
    assert len(masked) <= 2000 + len(stream) // 65536  # one more where a read cuts a message


# --- Any chopping, any damage ----------------------------------------------------------------------------

Frames = list[tuple[int, bytes]]

controls = st.tuples(st.sampled_from([FIN | PING, FIN | PONG]), st.binary(max_size=125))
closes = st.builds(
    lambda code, reason: (FIN | CLOSE, struct.pack("!H", code) + reason.encode()),
    st.sampled_from([1000, 1001, 1011, 3000, 1005]),
    st.text(max_size=10),
)
payloads = st.one_of(
    st.text(max_size=40).map(str.encode),
    st.binary(max_size=40),
    st.sampled_from([b"x" * 126, b"y" * 5000, "é".encode() * 40_000]),
)


@st.composite
def messages(draw: st.DrawFn) -> Frames:
    opcode, payload = draw(st.sampled_from([TEXT, BINARY])), draw(payloads)
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
    pieces = [payload[a:b] for a, b in pairwise([0, *cuts, len(payload)])]
    frames: Frames = []
    for i, piece in enumerate(pieces):
        frames += draw(st.lists(controls, max_size=1)) if i else []
        frames.append((opcode * (i == 0) | FIN * (i == len(pieces) - 1), piece))
    return frames


stray = st.tuples(st.integers(0, 255), st.binary(max_size=130))
single = st.one_of(controls, closes, stray).map(lambda frame: [frame])
streams_of_frames = st.lists(st.one_of(messages(), messages(), single), max_size=6).map(
    lambda groups: [frame for group in groups for frame in group]
)


@st.composite
def damaged_streams(draw: st.DrawFn, client: bool) -> bytes:
    wire = Wire(client)
    stream = bytearray(b"".join(wire.frame(*frame) for frame in draw(streams_of_frames)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(len(stream), 400)))
        if draw(st.booleans()):
            stream[at : at + 1] = [byte ^ 1 << draw(st.integers(0, 7)) for byte in stream[at : at + 1]]
        else:
            stream[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(stream)


@given(data=st.data(), client=st.booleans())
@repeatable
def test_any_chopping_of_any_stream_gives_the_same_events(data: st.DataObject, client: bool) -> None:
    stream = data.draw(damaged_streams(client))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    whole = received(client, [stream])
    assert received(client, (stream[a:b] for a, b in pairwise([0, *cuts, len(stream)]))) == whole
    if len(stream) < 3000:
        assert received(client, (bytes([byte]) for byte in stream)) == whole


@given(data=st.data(), client=st.booleans())
@repeatable
def test_damaged_stream_is_judged_as_wsproto_does(data: st.DataObject, client: bool) -> None:
    # The zeros complete a header that is cut off, so that both have seen every rule's bytes.
    stream = data.draw(damaged_streams(client)) + bytes(14)
    ours, theirs = without_reasons(received(client, [stream])), wsproto_events(stream, client)
    if theirs[-1:] == [Violation(1007, "")]:  # it notices bad UTF-8 where it is, we at the message's end
        assert ours[: len(theirs) - 1] == theirs[:-1]
        assert not any(isinstance(event, bytes) for event in ours[len(theirs) - 1 :])
    elif ours[-1:] == [Violation(1009, "")]:  # it has no limit
        assert ours[:-1] == theirs[: len(ours) - 1]
    elif ours and isinstance(ours[-1], Close) and ours[-1].code == 1014:  # which it does not know
        assert ours[:-1] == theirs[:-1]
    else:
        assert ours == theirs


# --- Sending ---------------------------------------------------------------------------------------------


@both_roles
@pytest.mark.parametrize("size", SIZES)
@both_maskers
def test_what_is_encoded_is_read_by_others(client: bool, size: int, masker: Masker) -> None:
    payload = b"x" * size
    sender = FrameCodec(client=client, max_message=0, mask=masker)
    receiver = FrameCodec(client=not client, max_message=LIMIT, mask=masker)
    stream = joined(sender.encode_message(payload)) + sender.encode_ping(b"ping") + sender.encode_pong(b"")
    stream += sender.encode_close(1001, "going")
    expected: list[Event] = [payload, Ping(b"ping"), Pong(b""), Close(1001, "going")]
    assert wsproto_events(stream, not client) == expected
    assert websockets_events(stream, not client) == expected
    assert receiver.receive(stream) == expected


@given(
    texts=st.lists(st.text(max_size=30), max_size=5),
    max_fragment=st.integers(1, 40),
    client=st.booleans(),
    cut=st.integers(1, 50),
)
@repeatable
def test_message_in_parts_and_fragments_arrives_with_pings_between(
    texts: list[str], max_fragment: int, client: bool, cut: int
) -> None:
    sender = codec(client, max_fragment=max_fragment)
    whole = "".join(texts).encode()
    frames = sender.encode_message(*(text.encode() for text in texts))
    assert len(frames) == max(1, -(-len(whole) // max_fragment))
    ping = sender.encode_ping(b"p")
    stream = ping.join(joined([frame]) for frame in frames)
    expected: list[Event] = [*[Ping(b"p")] * (len(frames) - 1), whole]
    assert wsproto_events(stream, not client) == expected
    pieces = (stream[i : i + cut] for i in range(0, len(stream), cut))
    assert received(not client, pieces) == expected


@both_roles
def test_every_fragment_but_the_last_is_full(client: bool) -> None:
    frames = codec(client, max_fragment=10).encode_message(b"abc", b"", b"d" * 17, b"e" * 10)
    assert [sum(map(len, frame[1:])) for frame in frames] == [10, 10, 10]
    assert [frame[0][0] for frame in frames] == [TEXT, CONTINUATION, FIN]
    assert len(codec(client, max_fragment=10).encode_message(b"d" * 10)) == 1


def test_server_copies_no_payload() -> None:
    parts = [b"head", b"x" * 300, b"tail"]
    (frame,) = codec(False).encode_message(*parts)
    assert all(buffer is part for buffer, part in zip(frame[1:], parts, strict=True))
    for fragment in codec(False, max_fragment=100).encode_message(*parts):
        for buffer in fragment[1:]:
            assert isinstance(buffer, memoryview)
            assert any(buffer.obj is part for part in parts)


def test_client_takes_a_fresh_mask_key_for_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count(1)
    monkeypatch.setattr("os.urandom", lambda n: b"".join(next(numbers).to_bytes(4) for _ in range(n // 4)))
    sender = codec(True, max_fragment=1)
    sent = [bytes(frame[0]) for _ in range(70) for frame in sender.encode_message(b"a", b"b")]
    sent += [sender.encode_ping(), sender.encode_pong(b""), sender.encode_close(1000)]
    assert [int.from_bytes(header[2:6]) for header in sent] == list(range(1, 144))


@both_roles
@pytest.mark.parametrize("code", BAD_CODES)
def test_close_code_that_may_not_be_sent_is_refused(client: bool, code: int) -> None:
    with pytest.raises(ValueError, match=f"^{code} is not a close code"):
        codec(client).encode_close(code)


@both_roles
def test_long_close_reason_is_cut_at_a_character(client: bool) -> None:
    stream = codec(client).encode_close(1011, "x" * 122 + "é and more")
    assert received(not client, [stream]) == [Close(1011, "x" * 122)]
    stream = codec(client).encode_close(1011, "x" * 121 + "é and more")
    assert wsproto_events(stream, not client) == [Close(1011, "x" * 121 + "é")]


@both_roles
def test_control_payload_over_125_bytes_is_refused(client: bool) -> None:
    longest = codec(client).encode_ping(b"x" * 125)
    assert wsproto_events(longest, not client) == [Ping(b"x" * 125)]
    with pytest.raises(ValueError, match="at most 125 bytes"):
        codec(client).encode_ping(b"x" * 126)
    with pytest.raises(ValueError, match="at most 125 bytes"):
        codec(client).encode_pong(b"x" * 126)


# --- Masking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(10), 126, 4093, 4094, 4095, 4096, 4097, 4098, 4099, 70001])
@pytest.mark.parametrize("key", [b"\0\0\0\0", b"\x01\x02\x04\xff"])
@both_maskers
def test_masker_does_what_the_rfc_defines(masker: Masker, size: int, key: bytes) -> None:
    data = bytes(range(251)) * (size // 251 + 2)
    expected = mask_by_definition(data[3 : size + 3], key)
    assert masker(data[3 : size + 3], key) == expected
    masked = masker(memoryview(data)[3 : size + 3], key)
    assert type(masked) is bytes
    assert masked == expected


def test_masker_in_c_is_taken_when_it_is_there() -> None:
    speedups = pytest.importorskip("websockets.speedups")
    assert fastest_masker() is speedups.apply_mask


def test_masker_in_python_is_taken_when_that_in_c_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.speedups", None)
    assert fastest_masker() is mask_in_python
