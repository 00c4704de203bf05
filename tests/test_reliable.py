"""The reliable stream as a machine: two of them, and a way between that loses, cuts and is slow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from execenv.relay.frames import MAX_SEQ, Data
from execenv.relay.reliable import (
    ACK_BYTES,
    ACK_DELAY,
    ACK_EVERY,
    MAX_PAYLOAD,
    STALL,
    WINDOW,
    WINDOW_BYTES,
    Reliable,
    StreamBroken,
    Window,
)


def sent(reliable: Reliable, *payloads: bytes, now: float = 0.0) -> list[Data]:
    return [reliable.add(payload, now=now) for payload in payloads]


def received(reliable: Reliable, frames: Sequence[Data], now: float = 0.0) -> list[bytes]:
    return [message for frame in frames for message in reliable.receive(frame, now)]


def has_room(reliable: Reliable) -> bool:
    return reliable.room


def resends(reliable: Reliable) -> list[int]:
    found = []
    while (data := reliable.next_resend()) is not None:
        found.append(data.seq)
    return found


# Sending.


def test_frames_are_numbered_from_zero_and_kept_until_they_are_acknowledged() -> None:
    ours = Reliable()
    assert [data.seq for data in sent(ours, b"a", b"b", b"c")] == [0, 1, 2]
    assert ours.unacknowledged == 3
    ours.acknowledged(2, 0, now=0)
    assert (ours.unacknowledged, ours.next_seq) == (1, 3)
    ours.acknowledged(1, 0, now=0)  # an old one, overtaken
    assert ours.unacknowledged == 1
    ours.acknowledged(3, 0, now=0)
    assert (ours.unacknowledged, resends(ours)) == (0, [])


def test_window_of_frames_is_full_at_its_limit_and_not_before() -> None:
    ours = Reliable()
    for _ in range(WINDOW - 1):
        ours.add(b"x", now=0)
    assert has_room(ours)
    ours.add(b"x", now=0)
    assert not has_room(ours)
    ours.acknowledged(1, 0, now=0)
    assert has_room(ours)


def test_window_of_bytes_is_full_at_its_limit_and_not_before() -> None:
    ours = Reliable()
    ours.add(bytes(WINDOW_BYTES - 1), now=0)
    assert has_room(ours)
    ours.add(b"x", now=0)
    assert not has_room(ours)
    ours.acknowledged(1, 0, now=0)
    assert has_room(ours)


def test_what_is_missing_before_something_that_is_there_is_sent_again_once() -> None:
    ours = Reliable()
    sent(ours, *[b"x"] * 6)
    ours.acknowledged(1, 0b101, now=0)  # 2 and 4 are there, 1 and 3 are not
    assert resends(ours) == [1, 3]
    ours.acknowledged(1, 0b101, now=0)
    assert resends(ours) == []
    ours.acknowledged(3, 0b11, now=0)  # 5 is there too, which was sent before 1 and 3 were sent again
    assert resends(ours) == []


def test_gap_that_shows_after_a_resend_is_sent_again() -> None:
    ours = Reliable()
    sent(ours, *[b"x"] * 3)
    ours.acknowledged(0, 0b1, now=0)
    assert resends(ours) == [0]
    sent(ours, *[b"x"] * 3)
    ours.acknowledged(3, 0b10, now=0)  # 5 is there, 3 and 4 are not
    assert resends(ours) == [3, 4]


def test_resume_sends_again_what_the_other_end_has_not() -> None:
    ours = Reliable()
    sent(ours, *[b"x"] * 5)
    ours.acknowledged(1, 0b1, now=0)
    resends(ours)
    ours.resumed(2, now=0)
    assert resends(ours) == [2, 3, 4]
    ours.resumed(5, now=0)
    assert (resends(ours), ours.unacknowledged) == ([], 0)


@pytest.mark.parametrize("ack", [4, 2**32 - 1])
def test_acknowledgement_of_what_was_not_sent_breaks_the_stream(ack: int) -> None:
    ours = Reliable()
    sent(ours, *[b"x"] * 3)
    with pytest.raises(StreamBroken):
        ours.acknowledged(ack, 0, now=0)


@pytest.mark.parametrize(("ack", "bits"), [(2, 1), (1, 0b10), (0, 1 << 31)])
def test_bit_for_what_was_not_sent_breaks_the_stream(ack: int, bits: int) -> None:
    ours = Reliable()
    sent(ours, *[b"x"] * 3)
    with pytest.raises(StreamBroken):
        ours.acknowledged(ack, bits, now=0)


@pytest.mark.parametrize("next_seq", [0, 4])
def test_resume_where_nothing_is_breaks_the_stream(next_seq: int) -> None:
    ours = Reliable()
    sent(ours, *[b"x"] * 3)
    ours.acknowledged(1, 0, now=0)
    with pytest.raises(StreamBroken):
        ours.resumed(next_seq, now=0)


def test_stream_ends_when_its_numbers_do() -> None:
    ours = Reliable()
    ours._acked = MAX_SEQ  # sending four thousand million frames takes too long
    assert ours.add(b"x", now=0).seq == MAX_SEQ
    with pytest.raises(StreamBroken):
        ours.add(b"x", now=0)


# Receiving.


def test_frames_come_out_in_order_and_once() -> None:
    ours, theirs = Reliable(), Reliable()
    a, b, c, d = sent(ours, b"a", b"b", b"c", b"d")
    assert received(theirs, [b, b, d]) == []
    assert (theirs.ack, theirs.ack_bits) == (0, 0b101)
    assert received(theirs, [a]) == [b"a", b"b"]
    assert (theirs.ack, theirs.ack_bits) == (2, 0b1)
    assert received(theirs, [a, b, c]) == [b"c", b"d"]
    assert (theirs.ack, theirs.ack_bits) == (4, 0)


def test_frame_ahead_of_the_window_breaks_the_stream() -> None:
    theirs = Reliable()
    assert theirs.receive(Data(WINDOW, b"x"), 0) == []
    with pytest.raises(StreamBroken, match="257 ahead"):
        theirs.receive(Data(WINDOW + 1, b"x"), 0)


def test_bytes_ahead_of_what_is_missing_are_bounded() -> None:
    theirs = Reliable()
    assert theirs.receive(Data(1, bytes(WINDOW_BYTES)), 0) == []
    assert theirs.receive(Data(2, bytes(MAX_PAYLOAD)), 0) == []  # the sender may send one more than fits
    with pytest.raises(StreamBroken, match="too much"):
        theirs.receive(Data(3, b"x"), 0)


def test_segments_become_one_message() -> None:
    theirs = Reliable()
    assert theirs.receive(Data(0, b"ab", 0, 3), 0) == []
    assert theirs.receive(Data(2, b"e", 2, 3), 0) == []
    assert theirs.receive(Data(1, b"cd", 1, 3), 0) == [b"abcde"]
    assert theirs.receive(Data(3, b"f"), 0) == [b"f"]


@pytest.mark.parametrize(
    "second",
    [Data(1, b"x"), Data(1, b"x", 0, 2), Data(1, b"x", 1, 3), Data(1, b"x", 2, 3)],
    ids=["another message", "begun again", "another count", "one left out"],
)
def test_segments_that_do_not_fit_break_the_stream(second: Data) -> None:
    theirs = Reliable()
    theirs.receive(Data(0, b"x", 0, 2), 0)
    with pytest.raises(StreamBroken, match="do not fit"):
        theirs.receive(second, 0)


def test_message_over_the_limit_breaks_the_stream_however_it_is_cut() -> None:
    whole, cut = Reliable(max_message=4), Reliable(max_message=4)
    assert whole.receive(Data(0, b"1234"), 0) == [b"1234"]
    with pytest.raises(StreamBroken, match="longer than 4"):
        whole.receive(Data(1, b"12345"), 0)
    cut.receive(Data(0, b"123", 0, 2), 0)
    with pytest.raises(StreamBroken, match="longer than 4"):
        cut.receive(Data(1, b"45", 1, 2), 0)


# Time.


def test_acknowledgement_waits_for_a_frame_to_go_with_and_not_for_long() -> None:
    theirs = Reliable()
    theirs.receive(Data(0, b"x"), now=10)
    assert (theirs.ack_due(10), theirs.deadline) == (False, 10 + ACK_DELAY)
    theirs.receive(Data(1, b"x"), now=10 + ACK_DELAY / 2)
    assert theirs.deadline == 10 + ACK_DELAY
    assert theirs.ack_due(10 + ACK_DELAY)
    theirs.ack_sent()
    assert (theirs.ack_due(1000), theirs.deadline) == (False, float("inf"))


def test_acknowledgement_is_due_at_once_after_many_frames_or_bytes_or_a_gap() -> None:
    frames, large, gap = Reliable(), Reliable(), Reliable()
    for seq in range(ACK_EVERY - 1):
        frames.receive(Data(seq, b"x"), now=0)
    assert not frames.ack_due(0)
    frames.receive(Data(ACK_EVERY - 1, b"x"), now=0)
    assert frames.ack_due(0)
    large.receive(Data(0, bytes(ACK_BYTES - 1)), now=0)
    assert not large.ack_due(0)
    large.receive(Data(1, b"x"), now=0)
    assert large.ack_due(0)
    gap.receive(Data(1, b"x"), now=0)
    assert gap.ack_due(0)


def test_stream_is_stalled_when_nothing_is_acknowledged_for_long() -> None:
    ours = Reliable()
    assert not ours.stalled(1e9)
    sent(ours, b"x", b"x", now=5)
    assert ours.deadline == 5 + STALL
    assert not ours.stalled(5 + STALL - 0.01)
    assert ours.stalled(5 + STALL)
    assert not ours.stalled(5 + STALL)  # it was just asked
    ours.acknowledged(1, 0, now=50)
    assert ours.deadline == 50 + STALL
    ours.acknowledged(2, 0, now=60)
    assert not ours.stalled(1e9)


# Both ends, and a way that fails.


@define
class End:
    reliable: Reliable = field(factory=lambda: Reliable(window=8, window_bytes=64))
    outbox: deque[bytes] = field(factory=deque)
    got: list[bytes] = field(factory=list)

    def frames(self, now: float) -> list[tuple[Data | None, int, int]]:
        found: list[tuple[Data | None, int, int]] = []
        while True:
            data = self.reliable.next_resend()
            if data is None and self.reliable.room and self.outbox:
                data = self.reliable.add(self.outbox.popleft(), now=now)
            if data is None:
                break
            found.append((data, self.reliable.ack, self.reliable.ack_bits))
            self.reliable.ack_sent()
        found.append((None, self.reliable.ack, self.reliable.ack_bits))
        return found

    def take(self, frame: tuple[Data | None, int, int], now: float) -> None:
        data, ack, bits = frame
        self.reliable.acknowledged(ack, bits, now)
        if data is not None:
            self.got += self.reliable.receive(data, now)


PAYLOADS = st.lists(st.binary(min_size=1, max_size=20), max_size=40)


@settings(max_examples=300, deadline=None)
@given(here=PAYLOADS, there=PAYLOADS, choices=st.data())
def test_everything_arrives_once_and_in_order_over_sockets_that_are_cut(
    here: list[bytes], there: list[bytes], choices: st.DataObject
) -> None:
    ends = End(outbox=deque(here)), End(outbox=deque(there))
    ways: tuple[deque[tuple[Data | None, int, int]], ...] = (deque(), deque())
    now = 0.0
    for _ in range(40):
        now += 1
        for end, way in zip(ends, ways, strict=True):
            way.extend(end.frames(now))
        for i in choices.draw(st.lists(st.integers(0, 1), max_size=6)):
            for _ in range(choices.draw(st.integers(0, 5))):
                if ways[i]:
                    ends[1 - i].take(ways[i].popleft(), now)
        if choices.draw(st.integers(0, 3)) == 0:  # the socket is lost with all that was on the way
            for way in ways:
                way.clear()
            have = [end.reliable.ack for end in ends]
            ends[0].reliable.resumed(have[1], now)
            ends[1].reliable.resumed(have[0], now)
    for i, way in enumerate(ways):  # this socket lasts: what is on the way arrives
        while way:
            ends[1 - i].take(way.popleft(), now)
    for _ in range(200):
        for i, end in enumerate(ends):
            for frame in end.frames(now):
                ends[1 - i].take(frame, now)
    assert (ends[1].got, ends[0].got) == (here, there)
    assert [end.reliable.unacknowledged for end in ends] == [0, 0]


@settings(max_examples=300, deadline=None)
@given(messages=PAYLOADS, choices=st.data())
def test_everything_arrives_once_and_in_order_over_a_way_that_loses_frames(
    messages: list[bytes], choices: st.DataObject
) -> None:
    ours, theirs = End(outbox=deque(messages)), End()
    now = 0.0
    for _ in range(60):
        now += 1
        for frame in ours.frames(now):
            if choices.draw(st.integers(0, 4)):
                theirs.take(frame, now)
        for frame in theirs.frames(now):
            ours.take(frame, now)
    ours.reliable.resumed(theirs.reliable.ack, now)  # the last frames have none behind them to tell of a gap
    for _ in range(60):
        for frame in ours.frames(now):
            theirs.take(frame, now)
        for frame in theirs.frames(now):
            ours.take(frame, now)
    assert theirs.got == messages


# The window of who does not acknowledge.


def test_window_releases_in_order_and_ignores_what_came_already() -> None:
    window = Window()
    assert window.receive(Data(1, b"b"), 0) == []
    assert window.receive(Data(1, b"B"), 0) == []  # the first copy is kept
    assert window.deadline == Window.GAP
    assert window.receive(Data(0, b"a"), 0) == [b"a", b"b"]
    assert window.receive(Data(0, b"a"), 0) == []
    assert window.deadline == float("inf")


def test_window_takes_64_frames_and_1_mib_ahead_and_no_more() -> None:
    frames, large = Window(), Window()
    assert frames.receive(Data(64, b"x"), 0) == []
    with pytest.raises(StreamBroken, match="too far ahead"):
        frames.receive(Data(65, b"x"), 0)
    assert large.receive(Data(1, bytes(1024 * 1024)), 0) == []
    with pytest.raises(StreamBroken, match="too far ahead"):
        large.receive(Data(2, b"x"), 0)


def test_window_takes_no_segments() -> None:
    with pytest.raises(StreamBroken, match="segment"):
        Window().receive(Data(0, b"x", 0, 2), 0)


def test_second_of_two_missing_frames_may_come_before_the_first() -> None:
    """Found by chance: what waits behind the first was counted as if nothing else could be missing."""
    ours, theirs = Reliable(), Reliable()
    sizes = [1, *[60_000] * 34, 1, 60_000]
    frames = sent(ours, *map(bytes, sizes))
    assert not has_room(ours)
    received(theirs, [frame for frame in frames if len(frame.payload) > 1])
    assert received(theirs, [frames[35]]) == []
    assert len(received(theirs, [frames[0]])) == len(frames)
