"""What is kept of an output, and what is said of the rest."""

from __future__ import annotations

import pytest

from execenv import OutputGap
from execenv.abc import Closed, Exited, Lost, Output
from execenv.local.output_log import OutputLog
from execenv.process import Inbox
from execenv.protocol import CHUNK_OVERHEAD


def log_of(*sizes: int, retained_bytes: int = 100) -> OutputLog:
    log = OutputLog(retained_bytes)
    for size in sizes:
        log.append("stdout", bytes(size))
    return log


def seqs(log: OutputLog, after: int = 0) -> list[int]:
    return [chunk.seq for chunk in log.read(after).chunks]


def test_what_is_evicted_is_counted() -> None:
    log = log_of(60, 40)
    assert log.read().evicted_bytes == 0
    log.append("stderr", bytes(1))
    assert (seqs(log), log.size, log.read().evicted_bytes) == ([2, 3], 41, 60)
    log.append("stderr", bytes(1000))  # larger than all that may be kept
    assert (seqs(log), log.size, log.read().evicted_bytes) == ([], 0, 1101)


def test_what_is_forgotten_is_counted_too() -> None:
    log = log_of(60, 40, 30)
    log.forget()
    assert (seqs(log), log.size, log.read().evicted_bytes) == ([], 0, 130)


def test_history_says_how_much_is_lost() -> None:
    log = log_of(60, 50, 30)
    lost, kept, newest = log.history()
    assert lost == Lost(1, 1, 60)
    assert [event.seq for event in (kept, newest) if isinstance(event, Output)] == [2, 3]


def test_history_says_how_much_is_lost_on_each_side_of_the_exit() -> None:
    log = log_of(60, 50)
    log.exit(0)
    for _ in range(4):
        log.append("stdout", bytes(60))
    log.close()
    events = log.history()
    assert events[0] == Lost(1, 2, 110)
    assert isinstance(events[1], Exited)
    assert events[2] == Lost(4, 6, 180)
    assert isinstance(events[3], Output)
    assert isinstance(events[4], Closed)
    assert log.read().evicted_bytes == 290


def test_what_somebody_still_has_to_take_is_kept_beyond_the_usual() -> None:
    log = log_of()
    log.retain_behind(0, 10_000)
    for _ in range(10):
        log.append("stdout", bytes(60))
    assert (seqs(log), log.read().evicted_bytes) == (list(range(1, 11)), 0)
    log.retain_behind(4, 10_000)
    assert seqs(log) == [5, 6, 7, 8, 9, 10]
    log.retain_behind(10, 10_000)
    assert seqs(log) == [10]
    log.append("stdout", bytes(60))
    assert seqs(log) == [11]
    log.append("stdout", bytes(60))
    assert seqs(log) == [11, 12]
    log.retain_behind(None)
    assert seqs(log) == [12]


def test_what_somebody_still_has_to_take_is_bounded_with_what_each_chunk_costs() -> None:
    log = log_of()
    log.retain_behind(0, 100 * (CHUNK_OVERHEAD + 2))
    for _ in range(1000):
        log.append("stdout", b"xy")
    assert seqs(log) == list(range(901, 1001))
    assert log.read().evicted_bytes == 1800


@pytest.mark.parametrize(("size", "words"), [(1234, "seq 3 to 9 (1234 bytes) was"), (None, "seq 3 to 9 was")])
async def test_reader_learns_how_much_is_lost(size: int | None, words: str) -> None:
    inbox = Inbox()
    inbox.put(Lost(3, 9, size))
    with pytest.raises(OutputGap) as gap:
        await inbox.take("stdout", "stderr")
    assert (gap.value.from_seq, gap.value.to_seq, gap.value.bytes) == (3, 9, size)
    assert words in str(gap.value)
