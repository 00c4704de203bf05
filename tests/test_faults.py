"""Plans of faults: the same seed does the same, and nothing is done that the protocol does not permit."""

from __future__ import annotations

from functools import partial

import pytest

from execenv.testing import Cut, Delay, Duplicate, FaultPlan, Frame, Reorder, Rule, Stall, Throttle
from execenv.testing import faults as module
from execenv.testing.faults import Direction, Fault, FrameLog

everything = partial(FaultPlan, cut=0.1, delay=0.1, duplicate=0.2, reorder=0.2, stall=0.05, throttle=0.05)


def frames(connection: int = 1, count: int = 400) -> list[Frame]:
    """A conversation of all kinds of frames."""
    log = FrameLog(connection)
    found = []
    for number in range(count // 8):
        found += [
            log.message("to_server", 90, {"id": number, "method": "process/read", "params": {}}),
            log.message("to_client", 80, {"method": "process/output", "params": {}}),
            log.message("to_client", 80, {"id": number, "result": {}}),
            log.message("to_client", 80, {"method": "http/request/bodyDelta", "params": {}}),
            log.frame("to_client", "ping", 2),
            log.frame("to_server", "pong", 6),
            log.message("to_client", 80, {"method": "process/exited", "params": {}}),
            log.frame("to_client", "part", 8000),
        ]
    return found


def decisions(plan: FaultPlan, conversation: list[Frame]) -> list[Fault | None]:
    return [plan.decide(frame) for frame in conversation]


def test_plan_without_rules_and_seed_does_nothing() -> None:
    plan = FaultPlan()
    assert set(decisions(plan, frames())) == {None}
    assert plan.counts == {"frames": 400}


def test_same_seed_does_the_same() -> None:
    first, second, other = (decisions(everything(seed), frames()) for seed in (7, 7, 8))
    assert first == second
    assert first != other


def test_every_fault_occurs_by_chance() -> None:
    done = {type(fault) for fault in decisions(everything(7), frames(count=4000))}
    assert done == {type(None), Cut, Delay, Duplicate, Reorder, Stall, Throttle}


def test_chance_does_not_depend_on_how_the_directions_interleave() -> None:
    conversation = frames()
    other_order = sorted(conversation, key=lambda frame: frame.direction)
    first = dict(zip(conversation, decisions(everything(7), conversation), strict=True))
    second = dict(zip(other_order, decisions(everything(7), other_order), strict=True))
    assert first == second


def test_rate_of_one_fault_changes_nothing_about_the_places_of_another() -> None:
    conversation = frames()

    def cuts(plan: FaultPlan) -> list[int]:
        return [n for n, fault in enumerate(decisions(plan, conversation)) if isinstance(fault, Cut)]

    assert cuts(everything(7)) == cuts(everything(7, delay=0.9, duplicate=0.0, stall=0.5)) != []


def test_plan_is_read_back_from_its_repr() -> None:
    plan = FaultPlan(3, rules=[Rule(Cut("middle", at=4, refuse=2), method="process/write", skip=1)], cut=0.5)
    again = eval(repr(plan), vars(module))
    assert repr(again) == repr(plan)
    assert decisions(again, frames()) == decisions(plan, frames())


def test_counts_say_what_was_done() -> None:
    rules = [Rule(Cut(where, refuse=1), kind="ping") for where in ("before", "middle", "after")]
    plan = FaultPlan(rules=[*rules, Rule(Delay(1), kind="pong", times=None)])
    decisions(plan, frames(count=80))
    assert [plan.admits() for _ in range(4)] == [False, False, False, True]
    assert plan.counts == {
        "frames": 80,
        "cut before": 1,
        "cut middle": 1,
        "cut after": 1,
        "delay": 10,
        "refused": 3,
    }


def test_inactive_plan_lets_everything_pass() -> None:
    plan = everything(7)
    plan.active = False
    assert set(decisions(plan, frames())) == {None}


@pytest.mark.parametrize(
    ("rule", "hit"),
    [
        (Rule(Cut()), [0]),
        (Rule(Cut(), times=2, skip=3), [3, 4]),
        (Rule(Cut(), kind="ping"), [4]),
        (Rule(Cut(), direction="to_client"), [1]),
        (Rule(Cut(), method="process/read", kind="reply"), [2]),
        (Rule(Cut(), direction="to_client", index=4), [4]),
        (Rule(Cut(), connection=2), []),
        (Rule(Cut(), when=lambda frame: frame.size > 1000), [7]),
        (Rule(Cut(), method="process/exited", times=None), [6, 14]),
    ],
)
def test_rule_is_for_the_frames_that_it_names(rule: Rule, hit: list[int]) -> None:
    done = decisions(FaultPlan(rules=[rule]), frames(count=16))
    assert [number for number, fault in enumerate(done) if fault] == hit


def test_first_rule_that_matches_decides_and_the_next_one_is_not_used_up() -> None:
    plan = FaultPlan(rules=[Rule(Delay(1)), Rule(Stall())])
    assert decisions(plan, frames(count=8))[:3] == [Delay(1), Stall(), None]


def test_only_what_says_nothing_new_may_come_twice() -> None:
    done = decisions(FaultPlan(rules=[Rule(Duplicate(), times=None)]), frames(count=8))
    doubled = [(f.kind, f.method) for f, fault in zip(frames(count=8), done, strict=True) if fault]
    assert doubled == [
        ("notification", "process/output"),
        ("ping", None),
        ("pong", None),
        ("notification", "process/exited"),
    ]


def test_only_what_nothing_puts_in_order_may_cross() -> None:
    done = decisions(FaultPlan(rules=[Rule(Reorder(), times=None)]), frames(count=8))
    crossed = [(f.kind, f.method) for f, fault in zip(frames(count=8), done, strict=True) if fault]
    assert crossed == [
        ("notification", "process/output"),
        ("reply", "process/read"),
        ("notification", "process/exited"),
    ]


@pytest.mark.parametrize("method", ["initialize", "http/request", "fs/watchMissing"])
def test_answers_that_something_must_follow_do_not_cross(method: str) -> None:
    log = FrameLog(1)
    log.message("to_server", 9, {"id": 1, "method": method})
    reply = log.message("to_client", 9, {"id": 1, "result": {}})
    assert reply.method == method
    assert not reply.may_cross


def test_answer_is_named_after_its_request_in_either_direction() -> None:
    log = FrameLog(1)
    log.message("to_server", 9, {"id": 1, "method": "a"})
    log.message("to_client", 9, {"id": 1, "method": "b"})
    names = [
        log.message(direction, 9, {"id": 1, "error": {}}).method
        for direction in ("to_server", "to_client", "to_client")
    ]
    assert names == ["b", "a", None]


@pytest.mark.parametrize("message", [None, 3, [], {}, {"id": []}, {"method": 3}, {"id": {}, "method": "x"}])
@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_any_json_has_a_frame(direction: Direction, message: object) -> None:
    frame = FrameLog(1).message(direction, 9, message)
    assert frame.kind in ("other", "reply", "request")


def test_repr_of_a_frame_has_nothing_of_its_content() -> None:
    frame = FrameLog(1).message("to_server", 9, {"id": 1, "method": "x", "params": {"token": "hush"}})
    assert "hush" not in repr(frame)


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="cut must be between 0 and 1"):
        FaultPlan(1, cut=1.5)
    with pytest.raises(ValueError, match="delay must be between 0 and 1"):
        FaultPlan(1, delay=-0.1)
    with pytest.raises(ValueError, match="longest_delay must be more than 0"):
        FaultPlan(1, longest_delay=0)


@pytest.mark.parametrize("make", [Delay, Throttle, Reorder])
def test_faults_that_take_no_time_are_refused(make: type[Delay]) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        make(0)
