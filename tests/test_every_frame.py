"""A conversation whose connection is lost at each of its frames, and at any combination of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from execenv.testing import Cut, FaultPlan, Frame, Rule
from tests.soak import Result, converse, run_one

STRAIGHT = ("program", "post", "mkdir", "write", "copy", "kill")


def run(plan: FaultPlan | None, restart_at: int | None = None) -> tuple[Result, int]:
    """One conversation of one task, checked; and how many frames it took."""
    result = Result()
    talk = partial(converse, plan, 1, result, ways=[STRAIGHT], restart_at=restart_at)
    frames = trio.run(talk, clock=MockClock(autojump_threshold=0))
    assert (result.lost, result.duplicated, result.wrong) == (0, 0, 0)
    return result, frames


def at(numbers: Iterator[int]) -> Callable[[Frame], bool]:
    """Whether a frame is one of those, counted over all connections from 0; in growing order."""
    passed, wanted = -1, next(numbers, None)

    def test(frame: Frame) -> bool:
        nonlocal passed, wanted
        passed += 1
        if passed != wanted:
            return False
        wanted = next(numbers, None)
        return True

    return test


def cuts(*numbers: int, where: str = "before", refuse: int = 0) -> FaultPlan:
    fault = Cut(where, refuse=refuse)  # type: ignore[arg-type]
    return FaultPlan(rules=[Rule(fault, when=at(iter(numbers)), times=None)])


RESULT, FRAMES = run(None)


def test_conversation_has_something_of_everything() -> None:
    assert RESULT.output_bytes > 10_000
    assert RESULT.input_bytes > 100
    assert RESULT.calls == len(STRAIGHT)
    assert FRAMES > 50
    assert not RESULT.failed


@pytest.mark.parametrize("where", ["before", "after"])
def test_conversation_survives_a_cut_at_any_frame(where: str) -> None:
    for number in range(FRAMES - 1):
        result, _ = run(cuts(number, where=where))
        assert result.cuts == 1, number
        assert sum(result.failed.values()) <= 1
        assert result.failed.keys() <= {"unknown"}


def test_conversation_survives_a_cut_at_any_frame_of_its_recovery() -> None:
    for number in range(FRAMES - 1):
        for behind in (1, 2, 5):
            result, _ = run(cuts(number, number + behind, refuse=behind % 3))
            assert result.cuts in (1, 2)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(gaps=st.lists(st.integers(1, 25), max_size=30), where=st.sampled_from(["before", "after"]))
def test_conversation_survives_cuts_at_any_frames(gaps: list[int], where: str) -> None:
    run(cuts(*(sum(gaps[: end + 1]) for end in range(len(gaps))), where=where))


def test_conversation_with_a_server_that_restarts_at_any_frame_is_told_so() -> None:
    failed = 0
    for number in range(FRAMES - 1):
        result, _ = run(FaultPlan(), restart_at=number)
        failed += sum(result.failed.values())
    assert failed > FRAMES // 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_conversations_under_any_plan_of_faults(seed: int) -> None:
    result = Result()
    run_one(seed, result)
    assert (result.lost, result.duplicated, result.wrong) == (0, 0, 0)
