"""The exchange of one node: a frame goes from socket to socket by plain calls, without tasks or queues."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from attrs import define, field

from execenv.relay_service.exchange import Accept, Exchange, ExecutorPresence, Link, LinkEnd, Offline

REPLACED = "a newer executor has taken its place"
EXECUTOR_GONE = "the executor has disconnected"
HARNESS_GONE = "the harness has disconnected"


class LocalExchange(Exchange):
    """All sockets of this process.

    Args:
        node: the id of this node.
    """

    def __init__(self, node: str = "local") -> None:
        self.node = node
        self._seats: dict[str, Seat] = {}

    def seat(self, environment_id: str) -> Seat | None:
        """The executor of an environment that is connected here."""
        return self._seats.get(environment_id)

    def take_seat(self, seat: Seat) -> None:
        """Make it the executor of its environment. One that was there is told, and its links end."""
        older = self._seats.get(seat.environment_id)
        self._seats[seat.environment_id] = seat
        if older is not None:
            older.lose()

    def leave_seat(self, seat: Seat, reason: str) -> None:
        """End the links of an executor, which is not told. Idempotent."""
        if self._seats.get(seat.environment_id) is seat:
            del self._seats[seat.environment_id]
        seat.leave(reason)

    def lose_seat(self, seat: Seat) -> None:
        """Tell an executor that a newer one has come elsewhere, and end its links."""
        if self._seats.get(seat.environment_id) is seat:
            del self._seats[seat.environment_id]
        seat.lose()

    def connect(self, environment_id: str, end: LinkEnd) -> Link:
        """A harness's side of a new link to an executor that is connected here.

        Raises:
            Offline: if there is none.
        """
        seat = self._seats.get(environment_id)
        if seat is None:
            raise Offline(environment_id)
        return seat.connect(end)

    async def presence(self, environment_id: str) -> ExecutorPresence | None:
        seat = self._seats.get(environment_id)
        return None if seat is None else ExecutorPresence(seat.registration_id, self.node)

    @asynccontextmanager
    async def executor(
        self,
        environment_id: str,
        registration_id: str,
        accept: Accept,
        replaced: Callable[[], None],
    ) -> AsyncIterator[None]:
        seat = Seat(environment_id, registration_id, accept, replaced)
        self.take_seat(seat)
        try:
            yield
        finally:
            self.leave_seat(seat, EXECUTOR_GONE)

    @asynccontextmanager
    async def harness(self, environment_id: str, end: LinkEnd) -> AsyncIterator[Link]:
        link = self.connect(environment_id, end)
        try:
            yield link
        finally:
            link.close(HARNESS_GONE)


@define(eq=False)
class Seat:
    """An executor that is connected here, and its links."""

    environment_id: str
    registration_id: str
    _accept: Accept
    _replaced: Callable[[], None]
    _links: set[_Side] = field(factory=set)  # the executor's sides

    def connect(self, end: LinkEnd) -> Link:
        harness, executor = _Side(end), _Side(None)
        harness.other, executor.other = executor, harness
        executor.seat = self
        self._links.add(executor)
        try:
            executor.end = self._accept(executor)
        except BaseException:
            self._links.discard(executor)
            harness.over = executor.over = True
            raise
        return harness

    def lose(self) -> None:
        """A newer one has come: tell the executor first, so that it takes the end of its links for that."""
        self._replaced()
        for link in tuple(self._links):
            link.cut(REPLACED)

    def leave(self, reason: str) -> None:
        for link in tuple(self._links):
            link.close(reason)

    def forget(self, link: _Side) -> None:
        self._links.discard(link)


@define(eq=False)
class _Side(Link):
    """A link, seen from one of its ends."""

    end: LinkEnd | None
    """What this side tells; `None` while the executor is accepting."""
    other: _Side = field(init=False)
    seat: Seat | None = None
    over: bool = False
    _waiting: set[trio.CancelScope] = field(factory=set)

    def send(self, frame: bytes) -> None:
        if not self.over and self.other.end is not None:
            self.other.end.received(frame)

    @property
    def congested(self) -> bool:
        return not self.over and self.other.end is not None and self.other.end.congested

    async def wait_room(self) -> None:
        if self.over or self.other.end is None:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                await self.other.end.wait_room()
            finally:
                self._waiting.discard(scope)

    def close(self, reason: str) -> None:
        if not self.over:
            self._finish()
            if self.other.end is not None:
                self.other.end.closed(reason)

    def cut(self, reason: str) -> None:
        """End the link from between: both ends are told."""
        if not self.over:
            self._finish()
            for side in (self, self.other):
                if side.end is not None:
                    side.end.closed(reason)

    def _finish(self) -> None:
        for side in (self, self.other):
            side.over = True
            for scope in side._waiting:  # the other side's too: no frame gets anywhere now
                scope.cancel()
            if side.seat is not None:
                side.seat.forget(side)
