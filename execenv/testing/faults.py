"""A plan of faults: what happens to each frame of a connection. No I/O, no `await`.

A plan is asked about every frame, in both directions, and answers with a fault or with nothing. The answer
depends on the rules, or on the seed and the place of the frame (which connection, which direction, which
number there), and on nothing else: not on time, and not on how the two directions interleave. So what a seed
has found is found again.

What the protocol permits:

* A *cut*, a *delay*, a *stall* and a *throttle* can befall any frame.
* *Doubled* can be pings and pongs, which say nothing that a second one would change, and `process/output`,
  `process/exited` and `process/closed`: after a resume the same event may come as an answer to `process/read`
  and as a notification, so a client must drop what it has by its seq. Never a request (the server would do it
  twice, and an answer to an id that waits for none ends the connection), nor an answer, nor a piece of an
  HTTP body.
* *Crossed* can be, on the way to the client, notifications of processes with each other and with answers
  (protocol.md §4.4: they are forwarded by tasks of their own, and there is no barrier at the start), and
  answers with each other (§9: a server may work on several requests at once). Never the answer to
  `initialize`, nothing of HTTP or of watches, whose order has a meaning, and nothing on the way to the
  server, which takes requests in their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, Literal, TypeAlias

from attrs import define, evolve, field, frozen

Direction = Literal["to_server", "to_client"]
Side = Literal["both", "client", "server"]
Kind = Literal["http", "request", "reply", "notification", "part", "ping", "pong", "close", "other"]

_EVENTS = ("process/output", "process/exited", "process/closed")
_IN_THEIR_PLACE = (None, "initialize", "http/request", "fs/watchMissing")


@frozen
class Frame:
    """One frame on its way: a websocket frame, the head of the HTTP upgrade, or a message in memory.

    Attributes:
        connection: which connection, from 1, in the order in which they came.
        direction: `"to_server"` or `"to_client"`.
        index: which frame of that connection and direction, from 1.
        kind: what it is; `"part"` for a frame that does not hold a message of its own.
        method: of a request or notification; of an answer, that of the request which it answers.
        size: in bytes, as it travels.
        whole: whether it holds a message of its own, and not the last part of one.
        message: the decoded JSON; `None` where there is none. Not in the repr: there may be secrets in it.
    """

    connection: int
    direction: Direction
    index: int
    kind: Kind
    method: str | None = None
    size: int = 0
    whole: bool = True
    message: Any = field(default=None, repr=False, eq=False)

    @property
    def may_double(self) -> bool:
        """Whether a receiver has to bear it twice."""
        if self.kind == "notification":
            return self.whole and self.direction == "to_client" and self.method in _EVENTS
        return self.kind in ("ping", "pong")

    @property
    def may_cross(self) -> bool:
        """Whether it may be overtaken by another frame that may cross."""
        if self.direction != "to_client" or not self.whole:
            return False
        if self.kind == "notification":
            return self.method in _EVENTS
        return self.kind == "reply" and self.method not in (
            None,
            "initialize",
            "http/request",
            "fs/watchMissing",
        )


@define(eq=False)
class FrameLog:
    """Numbers the frames of one connection, and knows which request an answer is for."""

    connection: int
    _counts: dict[Direction, int] = field(factory=lambda: {"to_server": 0, "to_client": 0})
    _methods: dict[Direction, dict[Any, str]] = field(factory=lambda: {"to_server": {}, "to_client": {}})

    def message(self, direction: Direction, size: int, message: Any) -> Frame:
        """The frame that holds a whole message, or ends one; `message` is its JSON, `None` if it has none."""
        if not isinstance(message, dict):
            return self.frame(direction, "other", size, message)
        method, identifier = message.get("method"), message.get("id")
        if not isinstance(identifier, str | int):
            identifier = None
        if isinstance(method, str):
            if "id" in message:
                self._methods[direction][identifier] = method
                return self.frame(direction, "request", size, message, method)
            return self.frame(direction, "notification", size, message, method)
        asked = self._methods["to_client" if direction == "to_server" else "to_server"]
        return self.frame(direction, "reply", size, message, asked.pop(identifier, None))

    def frame(
        self, direction: Direction, kind: Kind, size: int, message: Any = None, method: str | None = None
    ) -> Frame:
        """The next frame of that direction."""
        self._counts[direction] += 1
        return Frame(self.connection, direction, self._counts[direction], kind, method, size, message=message)


def _positive(instance: object, attribute: Any, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{attribute.name} must be more than 0, not {value!r}")


@frozen
class Cut:
    """The connection ends, as it does when the network or a program goes away.

    Attributes:
        where: before the frame, in the middle of it, or after it has arrived. A message in memory is in one
            piece: of one that is cut in the middle nothing arrives.
        at: in the middle, how many of its bytes still arrive; half of them if `None`.
        side: who learns of it. With `"client"` the server's connection stays half open, silent, and the
            other way round.
        refuse: how many connections are refused after that.
    """

    where: Literal["before", "middle", "after"] = "before"
    at: int | None = None
    side: Side = "both"
    refuse: int = 0


@frozen
class Delay:
    """The frame, and with it everything behind it in its direction, comes so many seconds later."""

    seconds: float = field(validator=_positive)


@frozen
class Duplicate:
    """The frame arrives twice, where it may (see `Frame.may_double`)."""


@frozen
class Reorder:
    """The next frame of the direction overtakes this one, where both may cross (see `Frame.may_cross`).

    Attributes:
        within: seconds to wait for a next frame. If none comes, the frame goes on as it was.
    """

    within: float = field(default=0.05, validator=_positive)


@frozen
class Stall:
    """The frame, and everything behind it in its direction, does not arrive, and neither does an end.

    The other direction goes on. The sender notices nothing until its buffers are full.
    """


@frozen
class Throttle:
    """From this frame on the direction takes no more than so many bytes in a second."""

    bytes_per_second: float = field(validator=_positive)


Fault: TypeAlias = Cut | Delay | Duplicate | Reorder | Stall | Throttle


def _permits(fault: Fault, frame: Frame) -> bool:
    if isinstance(fault, Duplicate):
        return frame.may_double
    return frame.may_cross if isinstance(fault, Reorder) else True


@frozen
class Rule:
    """A fault, and the frames that it is for: those that have all that is given here.

    A rule does not apply to a frame to which its fault may not be done.

    Attributes:
        method: of a request or notification, or of the request that an answer is for.
        when: told the frame, says whether it is one. Not in the repr in a form that could be read back.
        skip: how many such frames are let through first.
        times: how often it is done; `None` for always.
    """

    fault: Fault
    direction: Direction | None = None
    kind: Kind | None = None
    method: str | None = None
    connection: int | None = None
    index: int | None = None
    when: Callable[[Frame], bool] | None = None
    skip: int = 0
    times: int | None = 1

    def matches(self, frame: Frame) -> bool:
        """Whether `frame` is one of those, however often it was done."""
        wanted = (
            (self.direction, frame.direction),
            (self.kind, frame.kind),
            (self.method, frame.method),
            (self.connection, frame.connection),
            (self.index, frame.index),
        )
        if any(ours is not None and ours != theirs for ours, theirs in wanted):
            return False
        return _permits(self.fault, frame) and (self.when is None or self.when(frame))


def _chance(instance: object, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{attribute.name} must be between 0 and 1, not {value!r}")


def _as_tuple(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(rules)


@define(eq=False)
class FaultPlan:
    """What is to happen to which frame. With neither rules nor a seed: nothing.

    `repr` shows what makes the same plan again. A plan has a memory (how often a rule was applied), so use
    one for one test.

    Args:
        seed: with one, frames that no rule is for meet a fault by chance.
        rules: the first that matches a frame decides.
        cut, delay, duplicate, reorder, stall, throttle: how likely each is, of a frame that may have it.
            A stall ends by itself only where a peer notices the silence, so there is none unless asked for.
        refuse: how likely it is that a cut by chance is followed by refused connections, one to three.
        longest_delay: seconds.
        slowest, fastest: bytes in a second, of a throttled direction.

    Attributes:
        active: set it to false to let everything pass from now on.
        counts: how often each thing was done: `"frames"`, `"cut before"`, `"cut middle"`, `"cut after"`,
            `"delay"`, `"duplicate"`, `"reorder"` (the overtaken), `"stall"`, `"throttle"`, `"refused"`.
    """

    seed: int | None = None
    rules: tuple[Rule, ...] = field(default=(), converter=_as_tuple, kw_only=True)
    cut: float = field(default=0.02, validator=_chance, kw_only=True)
    delay: float = field(default=0.02, validator=_chance, kw_only=True)
    duplicate: float = field(default=0.05, validator=_chance, kw_only=True)
    reorder: float = field(default=0.05, validator=_chance, kw_only=True)
    stall: float = field(default=0.0, validator=_chance, kw_only=True)
    throttle: float = field(default=0.0, validator=_chance, kw_only=True)
    refuse: float = field(default=0.1, validator=_chance, kw_only=True)
    longest_delay: float = field(default=0.2, validator=_positive, kw_only=True)
    slowest: float = field(default=10_000.0, validator=_positive, kw_only=True)
    fastest: float = field(default=10_000_000.0, validator=_positive, kw_only=True)
    active: bool = field(default=True, init=False, repr=False)
    counts: Counter[str] = field(factory=Counter, init=False, repr=False)
    _matched: list[int] = field(init=False, repr=False)
    _refusals: int = field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._matched = [0] * len(self.rules)

    def decide(self, frame: Frame) -> Fault | None:
        """What is to be done to `frame`; `None` to let it pass. Asked once for each frame, as it passes."""
        self.counts["frames"] += 1
        if not self.active:
            return None
        fault = self._by_rule(frame)
        if fault is None and self.seed is not None:
            place = f"{self.seed} {frame.connection} {frame.direction} {frame.index}"
            fault = self._by_chance(frame, Random(place))  # noqa: S311 - to be foreseen is the point
        if isinstance(fault, Cut):
            self.refuse_next(fault.refuse)
            self.counts[f"cut {fault.where}"] += 1
        elif fault is not None and not isinstance(fault, Reorder):
            self.counts[type(fault).__name__.lower()] += 1
        return fault

    def reordered(self) -> None:
        """A frame was overtaken. Told by who does it: only then is it known whether another came."""
        self.counts["reorder"] += 1

    def refuse_next(self, count: int = 1) -> None:
        """Refuse so many connections more."""
        self._refusals += count

    def admits(self) -> bool:
        """Whether a new connection is let in. Asked once for each."""
        if self._refusals:
            self._refusals -= 1
            self.counts["refused"] += 1
            return False
        return True

    def _by_rule(self, frame: Frame) -> Fault | None:
        for number, rule in enumerate(self.rules):
            if rule.times is not None and self._matched[number] >= rule.skip + rule.times:
                continue
            if rule.matches(frame):
                self._matched[number] += 1
                if self._matched[number] > rule.skip:
                    return rule.fault
        return None

    def _by_chance(self, frame: Frame, random: Random) -> Fault | None:
        # Each has a draw of its own, always made: another rate for one changes nothing about the others.
        draws = [random.random() for _ in range(7)]
        detail = random.random()
        if draws[0] < self.cut:
            where: Literal["before", "middle", "after"] = random.choice(("before", "middle", "after"))
            cut = Cut(where, random.randrange(max(frame.size, 1)) if where == "middle" else None)
            return evolve(cut, refuse=random.randint(1, 3)) if draws[6] < self.refuse else cut
        if draws[1] < self.stall:
            return Stall()
        if draws[2] < self.duplicate and frame.may_double:
            return Duplicate()
        if draws[3] < self.reorder and frame.may_cross:
            return Reorder()
        if draws[4] < self.delay:
            return Delay(max(detail, 0.001) * self.longest_delay)
        if draws[5] < self.throttle:
            return Throttle(self.slowest * (self.fastest / self.slowest) ** detail)
        return None
