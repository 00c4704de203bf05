"""Frames of a relay: their bytes, as the released programs have them, and which are none (relay.md §3)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import execenv.relay
from execenv.relay import schema_pb2
from execenv.relay.frames import (
    MAX_REASON,
    MAX_SEQ,
    MAX_STREAM_ID,
    Ack,
    Data,
    Frame,
    Handshake,
    Heartbeat,
    InvalidFrame,
    Reset,
    Resume,
    decode,
    encode,
    routing_of,
)

HEAD = b"\x08\x01\x12\x01s"
"""Version 1, and the stream `s`."""


def member(number: int, payload: bytes) -> bytes:
    """A member of wire type 2 that is shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(payload)]) + payload


DATA = member(5, b"\x18\x01\x22\x02{}")
"""The first data frame of a stream: count 1 and the payload; index and seq are 0, and not there."""


@pytest.mark.parametrize(
    ("frame", "data"),
    [
        (Frame("s", Data(0, b"{}")), HEAD + DATA),
        (Frame("s", Data(7, b"{}")), HEAD + member(5, b"\x08\x07\x18\x01\x22\x02{}")),
        (Frame("s", Data(7, b"x", 2, 3)), HEAD + member(5, b"\x08\x07\x10\x02\x18\x03\x22\x01x")),
        (Frame("s", Ack(), 5, 3), b"\x08\x01\x12\x01s\x18\x05\x20\x03\x32\x00"),
        (Frame("s", Resume()), HEAD + b"\x3a\x00"),
        (Frame("s", Resume(4, 1)), HEAD + member(7, b"\x08\x04\xa0\x06\x01")),
        (Frame("s", Reset("why")), HEAD + member(8, b"\x0a\x03why")),
        (Frame("s", Heartbeat()), HEAD + b"\x4a\x00"),
        (Frame("s", Handshake(b"hello")), HEAD + member(10, b"\x0a\x05hello")),
    ],
    ids=lambda value: type(value.body).__name__ if isinstance(value, Frame) else "",
)
def test_frame_has_the_bytes_of_the_schema(frame: Frame, data: bytes) -> None:
    assert encode(frame) == data
    assert decode(data) == frame
    assert routing_of(data) == ("s", isinstance(frame.body, Reset))


def test_members_in_another_order_and_unknown_ones_change_nothing() -> None:
    unknown = b"\xf8\x07\x01" + member(15, b"later") + b"\xfa\x07\x03abc"
    trace = member(11, b"00-1-2-01") + member(12, b"a=b")
    assert decode(unknown + DATA + trace + b"\x12\x01s\x08\x01") == Frame("s", Data(0, b"{}"))


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\x00",
        HEAD + b"\x2a\x80",  # a length that does not end
        HEAD + b"\x2a\x05ab",  # less than it says
        HEAD[:-1],
        b"\x08" + b"\xff" * 11,  # a number that does not end
        HEAD + DATA + member(11, b"\xff"),
        HEAD + DATA + member(12, b"\xc3"),
        member(2, b"\xff") + b"\x08\x01" + DATA,
        HEAD + member(8, b"\x0a\x01\xff"),
    ],
)
def test_what_cannot_be_decoded_is_no_frame(data: bytes) -> None:
    for read in (decode, routing_of):
        with pytest.raises(InvalidFrame, match="cannot be decoded") as caught:
            read(data)
        assert caught.value.stream_id == ""


BROKEN = [
    (b"\x12\x01s" + DATA, "version is 0"),
    (b"\x08\x02\x12\x01s" + DATA, "version is 2"),
    (b"\x08\x01" + DATA, "stream id is blank"),
    (b"\x08\x01" + member(2, b"  ") + DATA, "stream id is blank"),
    (b"\x08\x01" + member(2, b" s") + DATA, "stream id has blanks"),
    (HEAD, "has no body"),
    (HEAD + member(5, b"\x10\x01\x18\x01\x22\x01x"), "segment cannot be"),
    (HEAD + member(5, b"\x22\x01x"), "segment cannot be"),
    (HEAD + member(5, b"\x18\x01"), "payload is empty"),
    (HEAD + member(8, b""), "reason is empty"),
    (HEAD + member(10, b""), "payload is empty"),
]


@pytest.mark.parametrize(("data", "reason"), BROKEN)
def test_frame_that_breaks_a_rule_is_refused_with_the_rule(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidFrame, match=reason):
        decode(data)


def test_rules_are_looked_at_in_their_order() -> None:
    """Whoever breaks two of them is told of the first: version, stream id, body."""
    order = (b"\x08\x02" + member(2, b" "), b"\x08\x01" + member(2, b" "), HEAD)
    for data, reason in zip(order, ("version", "stream id", "no body"), strict=True):
        with pytest.raises(InvalidFrame, match=reason):
            decode(data)


def test_error_says_whose_frame_it_is_only_if_its_stream_id_can_be_one() -> None:
    for data, stream_id in ((HEAD, "s"), (b"\x08\x02\x12\x01s", "s"), (b"\x08\x01" + member(2, b" s"), "")):
        with pytest.raises(InvalidFrame) as caught:
            decode(data)
        assert caught.value.stream_id == stream_id


@pytest.mark.parametrize("letter", ["x", "ä"])
def test_stream_id_and_reason_have_limits_in_bytes(letter: str) -> None:
    size = len(letter.encode())
    longest = Frame(letter * (MAX_STREAM_ID // size), Reset(letter * (MAX_REASON // size)))
    assert decode(encode(longest)) == longest
    for frame in (
        Frame(longest.stream_id + "x", Heartbeat()),
        Frame("s", Reset(letter * (MAX_REASON // size) + "x")),
    ):
        with pytest.raises(InvalidFrame, match="more than"):
            decode(encode(frame))


def test_largest_numbers_pass() -> None:
    frame = Frame("s", Data(MAX_SEQ, b"x", 65535, 65536), 2**32 - 1, 2**32 - 1)
    assert decode(encode(frame)) == frame


def test_error_quotes_no_payload() -> None:
    for body in (
        member(5, b"\x10\x01\x18\x01\x22\x06secret"),
        member(5, b"\x22\x06secret"),
        b"\x2a\x7fsecret",
    ):
        with pytest.raises(InvalidFrame) as caught:
            decode(HEAD + body)
        assert "secret" not in str(caught.value)


def test_generated_module_is_that_of_the_schema() -> None:
    """Nothing generates it again by itself: who changes one of the two has to change the other."""
    source = (Path(execenv.relay.__path__[0]) / "schema.proto").read_text()
    written = set()
    message_name = ""
    for line in source.splitlines():
        if found := re.match(r"message (\w+)", line):
            message_name = found[1]
        elif found := re.match(r" +(?:optional )?(\w+) (\w+) = (\d+);", line):
            written.add((message_name, found[2], int(found[3]), found[1]))
    kinds = {13: "uint32", 9: "string", 12: "bytes"}
    generated = set()
    for name, message in schema_pb2.DESCRIPTOR.message_types_by_name.items():
        for field in message.fields:
            kind = field.message_type.name if field.message_type else kinds[field.type]
            generated.add((name, field.name, field.number, kind))
    assert generated == written
    assert len(written) == 20
