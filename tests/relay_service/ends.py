"""Sockets of a relay, played: what they were told, and whether they take more."""

from __future__ import annotations

from collections.abc import Callable

import trio
from attrs import define, field

from execenv.relay_service.exchange import Link, LinkEnd


@define(eq=False)
class PlayedEnd(LinkEnd):
    """An end that keeps everything. While it is `full`, it is congested."""

    frames: list[bytes] = field(factory=list)
    size: int = 0
    reasons: list[str] = field(factory=list)
    full: bool = False
    changed: trio.Event = field(factory=trio.Event)

    def received(self, frame: bytes) -> None:
        assert not self.reasons, "a frame after the end"
        self.frames.append(frame)
        self.size += len(frame)
        self._changed()

    @property
    def congested(self) -> bool:
        return self.full and not self.reasons

    async def wait_room(self) -> None:
        await self.wait(lambda: not self.congested)

    def closed(self, reason: str) -> None:
        assert not self.reasons, "told twice"
        self.reasons.append(reason)
        self._changed()

    def set_full(self, full: bool) -> None:
        self.full = full
        self._changed()

    async def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()
        await trio.lowlevel.checkpoint()

    async def wait_frames(self, count: int) -> list[bytes]:
        await self.wait(lambda: len(self.frames) >= count)
        return self.frames

    async def wait_closed(self) -> str:
        await self.wait(lambda: bool(self.reasons))
        return self.reasons[0]

    def _changed(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@define(eq=False)
class PlayedExecutor:
    """An executor's socket: its links and their ends, in the order in which they came."""

    links: list[Link] = field(factory=list)
    ends: list[PlayedEnd] = field(factory=list)
    lost: trio.Event = field(factory=trio.Event)
    losses: trio.Semaphore = field(factory=lambda: trio.Semaphore(0))
    """Released when it is lost; may be one for several."""
    _linked: trio.Event = field(factory=trio.Event)

    def accept(self, link: Link) -> LinkEnd:
        self.links.append(link)
        self.ends.append(PlayedEnd())
        self._linked.set()
        self._linked = trio.Event()
        return self.ends[-1]

    def replaced(self) -> None:
        assert not self.lost.is_set(), "told twice"
        self.lost.set()
        self.losses.release()

    async def wait_links(self, count: int) -> None:
        while len(self.links) < count:
            await self._linked.wait()
