"""How long an executor waits for a slow harness, with sockets and links that are played."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio
import trio.testing
from attrs import define, field

from execenv.relay import frames
from execenv.relay.frames import Data, Frame, Reset, Resume
from execenv.relay_service import Settings
from execenv.relay_service.exchange import Link, Offline
from execenv.relay_service.metrics import Metrics
from execenv.relay_service.sockets import DISCONNECTED, SLOW, ExecutorSocket
from execenv.transports.websocket import WebsocketChannel

FRAME = frames.encode(Frame("s", Data(1, b"x" * 60)))
QUEUE = 3 * len(FRAME) - 1
"""Two frames may wait, and three may not; with one that waits there is room again."""


@define(eq=False)
class PlayedLink(Link):
    """A link whose other end takes as many frames as it has room for."""

    room: int = 0
    frames: list[bytes] = field(factory=list)
    reasons: list[str] = field(factory=list)
    _changed: trio.Event = field(factory=trio.Event)

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.room -= 1

    @property
    def congested(self) -> bool:
        return self.room <= 0

    async def wait_room(self) -> None:
        while self.congested:
            await self._changed.wait()

    def close(self, reason: str) -> None:
        self.reasons.append(reason)

    def take(self, count: int) -> None:
        """Have room for so many."""
        self.room = count
        self._changed.set()
        self._changed = trio.Event()


@define(eq=False)
class PlayedChannel:
    """An executor's websocket that takes everything."""

    hold_reading: Callable[[], Awaitable[None]] | None = None
    receive: Callable[[bytes], None] | None = None
    queued: int = 0
    unfinished: int = 0
    congested: bool = False
    close_code: int | None = None
    sent: list[bytes] = field(factory=list)

    def send_nowait(self, frame: bytes) -> None:
        self.sent.append(frame)

    async def run(self, receive: Callable[[bytes], None]) -> None:
        self.receive = receive
        await trio.sleep_forever()

    async def arrive(self, *frames: bytes) -> float:
        """Have frames arrive; the seconds until more is read."""
        assert self.receive is not None
        assert self.hold_reading is not None
        for frame in frames:
            self.receive(frame)
        began = trio.current_time()
        await self.hold_reading()
        return trio.current_time() - began


@define(eq=False)
class Played:
    """An executor with a harness, and what goes through."""

    socket: ExecutorSocket
    channel: PlayedChannel
    metrics: Metrics
    nursery: trio.Nursery

    def link(self, stream_id: str) -> PlayedLink:
        link = PlayedLink()
        end = self.socket.accept(link)
        end.received(stream_id.encode())  # who it is
        end.received(frames.encode(Frame(stream_id, Resume())))
        return link


async def start(nursery: trio.Nursery, *, node_queue: int = 1 << 30) -> Played:
    settings = Settings("http://relay", harness_queue=QUEUE, node_queue=node_queue, patience=10)
    metrics = Metrics()
    socket, channel = ExecutorSocket(settings, metrics), PlayedChannel()
    nursery.start_soon(socket.run, cast(WebsocketChannel, channel))
    await trio.testing.wait_all_tasks_blocked()
    return Played(socket, channel, metrics, nursery)


async def test_executor_is_held_up_by_what_is_too_much_and_not_before(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    played = await start(nursery)
    link = played.link("s")
    assert await played.channel.arrive(FRAME, FRAME) == 0
    assert played.metrics.waiting == 2 * len(FRAME)
    assert await played.channel.arrive(FRAME) == 10
    assert link.reasons == [SLOW]
    assert played.metrics.waiting == 0
    assert frames.decode(played.channel.sent[-1]) == Frame("s", Reset(DISCONNECTED))
    assert played.metrics.slow_harnesses == 1


@pytest.mark.parametrize("alone", [True, False])
async def test_harness_that_is_slow_for_long_is_cut_only_if_it_holds_up_others(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, alone: bool
) -> None:
    played = await start(nursery)
    link = played.link("s")
    if not alone:
        played.link("other")
    played.channel.receive(FRAME)  # type: ignore[misc]
    held = []
    for _ in range(5):

        async def take() -> None:
            await trio.sleep(4)
            link.take(2)

        played.nursery.start_soon(take)
        held.append(await played.channel.arrive(FRAME, FRAME))
        if link.reasons:
            break
        await trio.testing.wait_all_tasks_blocked()
        link.room = 0
    assert held == ([4] * 5 if alone else [4, 4, 2])
    assert link.reasons == ([] if alone else [SLOW])


async def test_harness_that_has_taken_everything_has_all_patience_again(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    played = await start(nursery)
    link = played.link("s")
    played.link("other")
    for _ in range(4):
        link.room = 0

        async def take() -> None:
            await trio.sleep(9)
            link.take(100)

        played.nursery.start_soon(take)
        assert await played.channel.arrive(FRAME, FRAME, FRAME) == 9
        await trio.testing.wait_all_tasks_blocked()
    assert link.reasons == []
    assert link.frames == [FRAME] * 12


async def test_what_waits_for_all_harnesses_is_bounded_and_the_one_with_most_is_cut(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    played = await start(nursery, node_queue=3 * len(FRAME))
    most, less = played.link("s"), played.link("t")
    other = frames.encode(Frame("t", Data(1, b"x" * 60)))
    assert await played.channel.arrive(FRAME, FRAME, other) == 0
    assert await played.channel.arrive(other[:-1] + b"y") == 10
    # Both had the same then; one has to go.
    assert sorted([most.reasons, less.reasons]) == [[], [SLOW]]
    assert played.metrics.waiting == 2 * len(FRAME)


async def test_no_link_is_taken_once_the_websocket_has_ended(nursery: trio.Nursery) -> None:
    played = await start(nursery)
    link = played.link("s")
    played.socket.end()
    assert len(link.reasons) == 1
    assert played.metrics.links == 0
    with pytest.raises(Offline):
        played.socket.accept(PlayedLink())
