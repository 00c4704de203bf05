"""What goes between two nodes, without Redis: entries and messages, and a link's window at its boundary."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st

from execenv.relay_service.crossing import (
    FRAME_COST,
    WINDOW,
    Crossing,
    Entry,
    Kind,
    Message,
    NearHarness,
    pack_count,
    pack_entry,
    pack_message,
    unpack_count,
)
from tests.relay_service.ends import PlayedEnd

COUNTS = st.integers(0, 2**64 - 1)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(Kind), st.booleans(), COUNTS, st.binary(max_size=99)), max_size=20
)


@given(MESSAGES, st.text(max_size=40), COUNTS, COUNTS, COUNTS)
def test_entry_comes_back_as_it_was_packed(
    messages: list[Message], sender: str, session: int, answers: int, number: int
) -> None:
    body = b"".join(pack_message(one.kind, one.from_harness, one.number, one.payload) for one in messages)
    packed = pack_entry(sender, session, answers, number, body)
    assert Entry.unpack(packed) == Entry(sender, session, answers, number, messages)


@given(st.binary(max_size=60))
def test_what_is_no_entry_is_a_value_error(data: bytes) -> None:
    for garbage in (data, pack_entry("a", 1, 2, 3, data)):
        with suppress(ValueError):
            assert Entry.unpack(garbage)


def test_entry_that_was_cut_or_is_of_another_version_is_a_value_error() -> None:
    whole = pack_entry("a", 1, 2, 3, pack_message(Kind.FRAME, True, 3, b"frame"))
    for cut in (0, 5, 25, len(whole) - 6, len(whole) - 1):
        with pytest.raises(ValueError):
            Entry.unpack(whole[:cut])
    with pytest.raises(ValueError, match="its format is 2, ours is 1"):
        Entry.unpack(b"\x02" + whole[1:])


@define(eq=False)
class Side:
    """A crossing whose messages are kept, and the socket near to it."""

    end: PlayedEnd = field(factory=PlayedEnd)
    put: list[Message] = field(factory=list)
    spawned: list[Callable[[], Awaitable[None]]] = field(factory=list)
    forgotten: int = 0
    crossing: Crossing = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.crossing = Crossing(7, True, self._put, self.spawned.append, self._forget, NearHarness(self.end))
        self.crossing.accept()

    def _put(self, data: bytes) -> None:
        self.put.extend(Entry.unpack(pack_entry("", 0, 0, 0, data)).messages)

    def _forget(self, crossing: Crossing) -> None:
        assert crossing is self.crossing
        self.forgotten += 1

    def kinds(self) -> list[Kind]:
        return [message.kind for message in self.put]


def congested(side: Side) -> bool:
    return side.crossing.congested


FULL = bytes(WINDOW - FRAME_COST)
"""A frame that is the whole window by itself."""


def test_window_is_full_at_its_last_byte_and_not_before() -> None:
    side = Side()
    side.crossing.send(FULL[:-1])
    assert not congested(side)
    side.crossing.send(b"")
    assert congested(side)
    assert side.kinds() == [Kind.FRAME, Kind.FRAME]
    exact = Side()
    exact.crossing.send(FULL)
    assert congested(exact)


def test_frame_longer_than_the_window_passes_alone() -> None:
    side = Side()
    side.crossing.send(bytes(3 * WINDOW))
    assert side.kinds() == [Kind.FRAME]
    assert congested(side)


def test_frames_beyond_the_window_are_held_until_there_is_credit() -> None:
    side = Side()
    side.crossing.send(FULL)
    for frame in (b"a", FULL, b"b"):
        side.crossing.send(frame)
    assert side.kinds() == [Kind.FRAME]
    side.crossing.credit(0)
    assert side.kinds() == [Kind.FRAME]
    side.crossing.credit(1)
    assert [message.payload for message in side.put[1:]] == [b"a"]
    assert congested(side)
    side.crossing.credit(WINDOW)
    assert [message.payload for message in side.put[1:]] == [b"a", FULL]
    side.crossing.credit(1)  # an old one: nothing is taken back
    side.crossing.credit(2 * WINDOW + FRAME_COST + 1)
    assert [message.payload for message in side.put[1:]] == [b"a", FULL, b"b"]
    assert not congested(side)


def test_small_frames_are_no_way_around_the_window() -> None:
    side = Side()
    for _ in range(2 * WINDOW // FRAME_COST):
        side.crossing.send(b"")
    assert len(side.put) == WINDOW // FRAME_COST


def test_credit_is_given_for_each_quarter_of_the_window() -> None:
    side = Side()
    quarter = bytes(WINDOW // 4 - FRAME_COST)
    side.crossing.take(quarter[:-1])
    assert side.put == []
    side.crossing.take(b"")
    side.crossing.take(quarter)
    assert [unpack_count(message.payload) for message in side.put] == [
        WINDOW // 4 + FRAME_COST - 1,
        WINDOW // 2 + FRAME_COST - 1,
    ]
    assert side.kinds() == [Kind.CREDIT, Kind.CREDIT]


async def test_no_credit_is_given_while_the_socket_is_full() -> None:
    side = Side()
    side.end.set_full(True)
    for _ in range(8):
        side.crossing.take(bytes(WINDOW // 8))
    assert side.put == []
    (drain,) = side.spawned
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        assert side.put == []
        side.end.set_full(False)
    assert [unpack_count(message.payload) for message in side.put] == [WINDOW + 8 * FRAME_COST]
    side.end.set_full(True)
    side.crossing.take(b"again")
    assert len(side.spawned) == 2


async def test_waiting_for_room_ends_with_credit_or_with_the_link() -> None:
    ends: list[Callable[[Side], None]] = [
        lambda side: side.crossing.credit(WINDOW),
        lambda side: side.crossing.cut("gone"),
        lambda side: side.crossing.close("done"),
    ]
    for end in ends:
        side = Side()
        side.crossing.send(FULL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.crossing.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            end(side)


async def test_socket_that_stays_full_holds_up_no_end() -> None:
    side = Side()
    side.end.set_full(True)
    side.crossing.take(b"frame")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.spawned[0])
        await trio.testing.wait_all_tasks_blocked()
        side.crossing.close("done")
    assert side.kinds() == [Kind.CLOSE]


def test_link_ends_once() -> None:
    side = Side()
    side.crossing.send(FULL)
    side.crossing.send(b"held")
    side.crossing.close("done")
    side.crossing.close("again")
    side.crossing.cut("and again")
    side.crossing.send(b"late")
    side.crossing.take(b"late")
    side.crossing.credit(WINDOW)
    assert side.kinds() == [Kind.FRAME, Kind.CLOSE]
    assert side.put[-1] == Message(Kind.CLOSE, True, 7, b"done")
    assert (side.end.frames, side.end.reasons, side.forgotten) == ([], [], 1)


def test_other_end_that_closes_is_told_nothing() -> None:
    side = Side()
    side.crossing.cut("theirs")
    side.crossing.close("ours")
    assert (side.put, side.end.reasons, side.forgotten) == ([], ["theirs"], 1)


def test_socket_is_not_told_of_a_link_that_was_never_taken() -> None:
    side = Side()
    side.crossing.accepted = False
    side.crossing.cut("refused")
    assert side.end.reasons == []


def test_count_comes_back() -> None:
    assert unpack_count(pack_count(2**63 + 1)) == 2**63 + 1
