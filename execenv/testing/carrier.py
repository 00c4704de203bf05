"""What carries frames between clients and a server, and does to them what a plan says.

The proxy and the memory server differ only in what a frame is and how it is moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Literal

import trio
from attrs import Factory, define

from execenv.testing.faults import (
    Cut,
    Delay,
    Direction,
    Duplicate,
    FaultPlan,
    Frame,
    FrameLog,
    Reorder,
    Side,
    Stall,
    Throttle,
)
from execenv.testing.recordings import Recorder

FrameTest = Callable[[Frame], bool]

_SLICES = 20  # of a second, in which a throttled direction is moved


@define(eq=False)
class _Watch:
    """Somebody waits for a frame; with `gate`, the frame waits too until that is set."""

    test: FrameTest
    seen: trio.Event = Factory(trio.Event)
    frame: Frame | None = None
    gate: trio.Event | None = None


class Carrier:
    """Connections between clients and a server, under a plan of faults.

    Got as a `FaultProxy` from `open_fault_proxy`, or as a `MemoryServer` from `open_memory_server`.

    What is done by hand is done to the connections that are open at that moment, not to later ones.

    Attributes:
        plan: what happens by itself.
        connections: how many connections were let in so far.
        frames: how many frames have arrived so far, in both directions.
    """

    def __init__(self, plan: FaultPlan | None, recorder: Recorder | None) -> None:
        self.plan = FaultPlan() if plan is None else plan
        self.connections = 0
        self.frames = 0
        self._recorder = recorder
        self._links: list[Link] = []
        self._watches: list[_Watch] = []
        self._admitted = trio.lowlevel.ParkingLot()
        self._ended = trio.lowlevel.ParkingLot()

    @property
    def open_connections(self) -> int:
        """How many connections are open now, on one side at least."""
        return len(self._links)

    def cut(self, side: Side = "both") -> None:
        """Lose the connections, as when a network goes away: both ends get an error, what was under way is
        gone. With a `side`, only that end learns of it, and the other's connection is half open."""
        for link in list(self._links):
            link.cut(side)

    def close(self) -> None:
        """End the connections in good order: each end is told that nothing more comes."""
        for link in list(self._links):
            link.close()

    def stall(self, direction: Direction | Literal["both"] = "both") -> None:
        """Let nothing arrive any more, not even an end, until `resume`. Senders notice nothing."""
        for link in list(self._links):
            link.stall(direction)

    def resume(self) -> None:
        """Let everything go on that was stalled, by hand or by the plan."""
        for link in list(self._links):
            link.resume()

    def refuse(self, count: int = 1) -> None:
        """Refuse so many connections more."""
        self.plan.refuse_next(count)

    async def wait_connection(self, number: int | None = None) -> int:
        """Wait for the next connection, or for the one of that number, from 1, if that has not come yet.

        Returns its number.
        """
        wanted = self.connections + 1 if number is None else number
        while self.connections < wanted:
            await self._admitted.park()
        await trio.lowlevel.checkpoint_if_cancelled()
        return wanted

    async def wait_no_connection(self) -> None:
        """Wait until no connection is open, on either side."""
        await trio.lowlevel.checkpoint()
        while self._links:
            await self._ended.park()

    async def wait_frame(self, test: FrameTest) -> Frame:
        """Wait until a frame for which `test` is true has been passed on, from now on."""
        watch = _Watch(test)
        self._watches.append(watch)
        try:
            await watch.seen.wait()
        finally:
            self._forget(watch)
        assert watch.frame is not None
        return watch.frame

    @asynccontextmanager
    async def hold_frame(self, test: FrameTest) -> AsyncIterator[Frame]:
        """Wait until a frame comes for which `test` is true, and hold it, and what is behind it, back.

        async with proxy.hold_frame(lambda frame: frame.method == "process/write" and frame.kind == "reply"):
            proxy.cut()  # the write was done, and its answer does not arrive

        Leaving the block lets it go on, if its connection is still there.
        """
        gate = trio.Event()
        watch = _Watch(test, gate=gate)
        self._watches.append(watch)
        try:
            await watch.seen.wait()
            assert watch.frame is not None
            yield watch.frame
        finally:
            self._forget(watch)
            gate.set()

    def _forget(self, watch: _Watch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)

    # What the lanes call.

    async def pass_gates(self, frame: Frame) -> None:
        """Wait as long as somebody holds `frame`."""
        for watch in list(self._watches):
            if watch.gate is not None and not watch.seen.is_set() and watch.test(frame):
                watch.frame = frame
                watch.seen.set()
                self._forget(watch)
                await watch.gate.wait()

    def passed(self, frame: Frame) -> None:
        """`frame` has arrived."""
        self.frames += 1
        if self._recorder is not None:
            self._recorder.add(frame)
        for watch in list(self._watches):
            if watch.gate is None and watch.test(frame):
                watch.frame = frame
                watch.seen.set()
                self._forget(watch)

    # What the implementations call.

    def next_log(self) -> FrameLog:
        """Let a connection in, and number it."""
        self.connections += 1
        self._admitted.unpark_all()
        return FrameLog(self.connections)

    async def run_link(self, link: Link) -> None:
        """Carry one connection to its end."""
        self._links.append(link)
        try:
            await link.run()
        finally:
            self._links.remove(link)
            self._ended.unpark_all()
            if self._recorder is not None:
                self._recorder.end(link.log.connection)


class End(ABC):
    """One end of a connection, as the carrier has it: what that side sends and what it is sent."""

    in_pieces: bool
    """Whether a part of a frame can arrive."""

    @abstractmethod
    async def receive(self) -> tuple[Frame, bytes] | None:
        """The next frame that this side sends; `None` at the end. Loses nothing when it is cancelled.

        Raises:
            OSError, trio.BrokenResourceError, trio.ClosedResourceError: if the connection was lost.
        """

    @abstractmethod
    async def send(self, data: bytes, *, part: bool = False, again: bool = False) -> None:
        """Let this side have a frame, or with `part` some of its bytes; `again` if it has had it already."""

    @abstractmethod
    async def flush(self) -> None:
        """Return when everything sent has arrived."""

    @abstractmethod
    def send_end(self) -> None:
        """Tell this side that nothing more comes."""

    @abstractmethod
    def finish(self) -> None:
        """Let go of this side, to which everything was sent, the end too."""

    @abstractmethod
    def abort(self) -> None:
        """End this side's connection with an error, unless it has ended. More than once does no harm."""

    @abstractmethod
    def discarded(self, data: bytes) -> None:
        """What this side has sent will not arrive."""


_LOST = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Link:
    """One connection: two ends, and a lane for each direction."""

    def __init__(self, carrier: Carrier, log: FrameLog, client: End, server: End) -> None:
        self.carrier = carrier
        self.log = log
        self.ends: dict[Direction, End] = {"to_client": client, "to_server": server}
        self._stalled: set[Direction] = set()
        self._resumed = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._gone: set[Direction] = set()  # whose end is no more, named by what it got
        self.mute = False
        """Nothing passes any more; what is still sent is taken and dropped."""

    async def run(self) -> None:
        """Carry until both directions have ended, or the connection was cut. Leaves neither end open."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_Lane(self, "to_server", "to_client").run)
                    nursery.start_soon(_Lane(self, "to_client", "to_server").run)
                for end in self.ends.values():
                    end.finish()
        finally:
            for end in self.ends.values():
                end.abort()

    def cut(self, side: Side = "both") -> None:
        if side == "both":
            for end in self.ends.values():
                end.abort()
            self._scope.cancel()
        else:
            gone: Direction = "to_client" if side == "client" else "to_server"
            self.mute = True
            self._gone.add(gone)
            self.ends[gone].abort()
            self._resumed.unpark_all()

    def close(self) -> None:
        self.mute = True
        for end in self.ends.values():
            end.send_end()
        self._resumed.unpark_all()

    def stall(self, direction: Direction | Literal["both"]) -> None:
        self._stalled |= {"to_server", "to_client"} if direction == "both" else {direction}

    def resume(self) -> None:
        self._stalled.clear()
        self._resumed.unpark_all()

    async def wait_clear(self, direction: Direction) -> None:
        """Wait while the direction is stalled."""
        while direction in self._stalled and not self.mute:
            await self._resumed.park()

    async def wait_answering(self) -> None:
        """Wait until a question would be answered: nothing is stalled, and both ends are there."""
        while self._stalled or self.mute:
            await self._resumed.park()
        await trio.lowlevel.checkpoint()

    def lost(self, towards: Direction) -> None:
        """The end that got what goes in this direction is gone: by itself, unless we have cut it off."""
        if towards not in self._gone:
            self.cut()


class _Lane:
    """One direction of a connection."""

    def __init__(self, link: Link, towards: Direction, back: Direction) -> None:
        self._link = link
        self._carrier = link.carrier
        self._direction: Direction = towards
        self._from = link.ends[back]
        self._to = link.ends[towards]
        self._back: Direction = back
        self._rate: float | None = None
        self._held: tuple[Frame, bytes] | None = None
        self._within = 0.0
        # Who gets it is gone. That is told to the sender by the other lane, behind all that came from there.
        self._in_vain = False

    async def run(self) -> None:
        link = self._link
        while True:
            try:
                item = await self._next()
            except _LOST:
                await self._release()
                await link.wait_clear(self._direction)
                if not link.mute:
                    with suppress(*_LOST):
                        await self._to.flush()
                link.lost(self._back)
                return
            await link.wait_clear(self._direction)
            if item is None:
                if not link.mute:
                    self._to.send_end()
                return
            if link.mute or self._in_vain:
                self._from.discarded(item[1])
            else:
                with suppress(*_LOST):  # another task has cut the connection
                    await self._carry(*item)

    async def _next(self) -> tuple[Frame, bytes] | None:
        if self._held is not None:
            with trio.move_on_after(self._within) as scope:
                item = await self._from.receive()
            if not scope.cancelled_caught:
                if item is None:
                    await self._release()
                return item
            await self._release()  # nothing came that could overtake it
        return await self._from.receive()

    async def _carry(self, frame: Frame, data: bytes) -> None:
        await self._carrier.pass_gates(frame)
        if self._link.mute:
            self._from.discarded(data)
            return
        fault = self._carrier.plan.decide(frame)
        if self._held is not None and fault is None and frame.may_cross:
            await self._deliver(frame, data)
            self._carrier.plan.reordered()
            await self._release()
            return
        await self._release()
        match fault:
            case Cut(where="before", side=side):
                self._link.cut(side)
                self._from.discarded(data)
            case Cut(where="middle", at=at, side=side):
                if self._to.in_pieces:
                    await self._to.send(
                        data[: len(data) // 2 if at is None else min(at, len(data) - 1)], part=True
                    )
                    await self._to.flush()
                self._link.cut(side)
                self._from.discarded(data)
            case Cut(side=side):
                await self._deliver(frame, data)
                await self._to.flush()
                self._link.cut(side)
            case Delay(seconds=seconds):
                await trio.sleep(seconds)
                await self._deliver(frame, data)
            case Duplicate():
                await self._deliver(frame, data)
                await self._deliver(frame, data, again=True)
            case Reorder(within=within):
                self._held, self._within = (frame, data), within
            case Stall():
                self._link.stall(self._direction)
                await self._deliver(frame, data)
            case Throttle(bytes_per_second=rate):
                self._rate = rate
                await self._deliver(frame, data)
            case _:
                await self._deliver(frame, data)

    async def _release(self) -> None:
        """Let a frame go on that waits to be overtaken."""
        if self._held is not None:
            (frame, data), self._held = self._held, None
            await self._deliver(frame, data)

    async def _deliver(self, frame: Frame, data: bytes, *, again: bool = False) -> None:
        await self._link.wait_clear(self._direction)
        if not self._link.mute:
            try:
                if self._rate is None:
                    await self._to.send(data, again=again)
                else:
                    await self._send_slowly(data, self._rate, again=again)
            except _LOST:
                self._in_vain = True
            else:
                self._carrier.passed(frame)
                return
        if not again:
            self._from.discarded(data)

    async def _send_slowly(self, data: bytes, rate: float, *, again: bool) -> None:
        step = max(1, int(rate / _SLICES))
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            await trio.sleep(len(piece) / rate)
            if self._to.in_pieces:
                await self._to.send(piece, part=True)
        if not self._to.in_pieces:
            await self._to.send(data, again=again)
