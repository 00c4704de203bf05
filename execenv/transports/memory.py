"""Two channels that are each other's peer, without a wire. For tests, and for use within a process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from execenv._service import Wakeup
from execenv.transports.channel import ANSWER_LIMIT, Channel, SendPart


class MemoryChannel(Channel):
    """One end of a pair. Closing either end ends both, behind what was already sent."""

    _peer: MemoryChannel

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._inbox: deque[bytes] = deque()
        self._behind: list[bytes] | None = None  # messages that wait for the end of one in parts
        self._wakeup = Wakeup()
        self._peer_ended = False

    async def run(self, receive: Callable[[bytes], None]) -> None:
        try:
            while not self._closed:
                while self._inbox and not self._closed:
                    message = self._inbox.popleft()
                    self._peer._sent(len(message))
                    receive(message)
                    await trio.lowlevel.checkpoint()
                    while self.queued > ANSWER_LIMIT and not self._closed:
                        await self._room.park()
                if self._peer_ended or self._closed:
                    return
                await self._wakeup.wait()
        finally:
            self.close_nowait()

    def send_nowait(self, *parts: bytes) -> None:
        if self._closed or self._peer._closed:
            raise self.lost()
        message = b"".join(parts)
        self.queued += len(message)
        if self._behind is not None:
            self._behind.append(message)
            return
        self._peer._inbox.append(message)
        self._peer._wakeup.set()

    def _begin_message(self) -> tuple[SendPart, Callable[[], None]]:
        parts: list[bytes] = []
        behind = self._behind = []

        async def send(part: bytes) -> None:
            if self._closed or self._peer._closed:
                raise self.lost()
            parts.append(part)
            await trio.lowlevel.checkpoint()

        def end() -> None:
            self._behind = None
            self.send_nowait(*parts)
            self._peer._inbox.extend(behind)

        return send, end

    def close_nowait(self, code: int = 1000, reason: str = "") -> None:
        if not self._closed:
            self._ended()
            self._wakeup.set()
            peer = self._peer
            peer._peer_ended = True
            peer._wakeup.set()
            # What the peer has queued for this end will never be taken.
            peer.queued = 0
            peer._room.unpark_all()


def memory_pair(label: str = "memory") -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected ends. Each moves messages while its `run` runs."""
    one, other = MemoryChannel(label), MemoryChannel(label)
    one._peer, other._peer = other, one
    return one, other
