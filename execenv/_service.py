"""A background task beside the body of an `async with`, and the body's own exception out of it.

Every long-lived object of execenv is opened this way, so that its tasks have a nursery a reader can
point at. The body ends first: when the caller is cancelled, its `finally` may still need the service
(to terminate a process over a connection), so the service outlives the body.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """`trio.open_nursery`, except that a single error comes out as itself and not inside a group.

    The caller of `execenv.run` should be able to write `except ProcessFailed`. Where several tasks
    failed at once, the group stays: nothing is thrown away.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = _single(group)
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # not the group: it would bring back what was just unwrapped
            del error


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error inside nested groups, with cancellations of siblings left out; else the group."""
    _, rest = group.split(trio.Cancelled)
    if rest is None:  # nothing but cancellations: any of them will do, they have one reason
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return error
    error = rest
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def service(
    run: Callable[[], Awaitable[None]], stop: Callable[[], None] | None = None, grace: float = 5.0
) -> AsyncIterator[None]:
    """Run `run()` beside the body, and end it when the body has ended, however it ended.

    The service is sheltered from the caller's cancellation while the body cleans up. At the end `stop` is
    called, and `run` has `grace` seconds to return; without `stop` it is cancelled. If `run` raises, the
    body is cancelled and the error comes out of the block.
    """
    async with open_nursery() as nursery:
        shelter = trio.CancelScope(shield=True)

        async def sheltered() -> None:
            with shelter:
                await run()

        nursery.start_soon(sheltered)
        try:
            yield
        finally:
            if stop is None:
                shelter.cancel()
            else:
                stop()
                shelter.deadline = min(shelter.deadline, trio.current_time() + grace)


class Turns:
    """Who comes first goes first, however long each takes.

    before, done = turns.take()  # at once, in the order that is to be kept
    if before is not None:
        await before.wait()
    ...
    done.set()
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: trio.Event | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody is at it, and nobody waits."""
        return self._last is None or self._last.is_set()

    def take(self) -> tuple[trio.Event | None, trio.Event]:
        """What to wait for before, and what to set at the end."""
        before, self._last = self._last, trio.Event()
        return before, self._last


class Wakeup:
    """A flag that one task waits for and anything may raise; waiting lowers it again.

    Lighter than making a new `trio.Event` for each turn of a pump.
    """

    __slots__ = ("_lot", "_raised")

    def __init__(self) -> None:
        self._raised = False
        self._lot = trio.lowlevel.ParkingLot()

    def set(self) -> None:
        self._raised = True
        self._lot.unpark_all()

    async def wait(self) -> None:
        while not self._raised:
            await self._lot.park()
        self._raised = False
