"""The websockets of a rendezvous: frames pass by their stream id, unchanged (relay.md §2, §3).

All rules about streams are at the executor's socket, where the frames of all its harnesses meet. A harness's
socket knows its link and nothing else. The first frame of a link, from the harness's side, says who the
harness is; no client has a hand in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from logging import getLogger

import trio

from execenv.errors import ConnectionLost
from execenv.relay import frames
from execenv.relay.frames import Frame, InvalidFrame, Reset
from execenv.relay_service.exchange import Link, LinkEnd, Offline
from execenv.relay_service.metrics import Metrics
from execenv.relay_service.settings import Settings
from execenv.transports.websocket import WebsocketChannel

logger = getLogger(__name__)

DISCONNECTED = "harness_disconnected"
"""Why a stream is reset whose harness has gone: a released executor detaches its session by that."""
FOREIGN = "stream_of_another_harness"
TOO_MANY_STREAMS = "too_many_streams"

GOING_AWAY = 1012
TOO_MUCH_UNFINISHED = (1013, "the relay holds too much of frames that have no end yet")
REPLACED = (4409, "replaced by a newer executor")

EXECUTOR_GONE = "the executor has disconnected"
SLOW = "the harness does not take what the executor sends"
TAKEN_OVER = "the harness has come back on another socket"
_CODES = {SLOW: 1013, TAKEN_OVER: 4409}
"""Close codes for the ends of links; all others mean that the executor has gone."""


class RelaySocket(ABC):
    """What the sockets of both roles have in common.

    Attributes:
        bytes_in, bytes_out: of frames, since the beginning.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._channel: WebsocketChannel | None = None
        self._started = trio.Event()
        self._early: list[bytes] = []
        self._close: tuple[int, str] | None = None
        self._unfinished = 0
        self.bytes_in = 0
        self.bytes_out = 0

    def close(self, code: int, reason: str) -> None:
        """End the websocket, also one that has not begun yet. The first one to say so says why."""
        if self._close is None:
            self._close = (code, reason)
            if self._channel is not None:
                self._channel.close_nowait(code, reason)

    def probe(self) -> None:
        """End the websocket soon, unless the client gives a sign of life."""
        if self._channel is not None:
            self._channel.probe_nowait()

    @property
    def close_code(self) -> int:
        """How it has ended: by what we said, or the client; 1006 where nobody has said anything."""
        if self._close is not None:
            return self._close[0]
        return (self._channel.close_code if self._channel is not None else None) or 1006

    @property
    def queued(self) -> int:
        """Bytes that wait in the websocket."""
        return self._channel.queued if self._channel is not None else sum(map(len, self._early))

    @property
    def is_congested(self) -> bool:
        return self._channel.congested if self._channel is not None else bool(self._early)

    async def wait_until_sent(self) -> None:
        """Wait until the websocket takes more, or has ended."""
        await self._started.wait()
        if self._channel is not None:
            with suppress(ConnectionLost):
                await self._channel.wait_room()

    def send(self, frame: bytes) -> None:
        self.bytes_out += len(frame)
        if self._channel is None:
            self._early.append(frame)
            return
        try:
            self._channel.send_nowait(frame)
        except ConnectionLost:
            return

    async def run(self, channel: WebsocketChannel) -> None:
        """Move frames until the websocket ends."""
        self._channel = channel
        channel.hold_reading = self._after_reading
        early, self._early = self._early, []
        for frame in early:
            channel.send_nowait(frame)
        self._started.set()
        if self._close is not None:
            channel.close_nowait(*self._close)
        try:
            await channel.run(self._receive)
        finally:
            self._count_unfinished(0)

    async def _after_reading(self) -> None:
        assert self._channel is not None
        unfinished = self._channel.unfinished
        if unfinished or self._unfinished:
            self._count_unfinished(unfinished)
            settings = self._settings
            # Clear text has frames of any size, and who begins many and ends none would fill the memory.
            if self._metrics.unfinished > settings.node_unfinished and unfinished > settings.max_noise_frame:
                self.close(*TOO_MUCH_UNFINISHED)
        await self._hold()

    def _count_unfinished(self, size: int) -> None:
        self._metrics.unfinished += size - self._unfinished
        self._unfinished = size

    def end(self) -> None:
        """Let go of all who wait for a websocket that never was, or has ended."""
        self._started.set()

    @abstractmethod
    def _receive(self, frame: bytes) -> None: ...

    @abstractmethod
    async def _hold(self) -> None: ...


class HarnessSocket(RelaySocket, LinkEnd):
    """A harness's websocket, and its end of the link.

    Args:
        principal: who it is: what belongs to another one is not for it.
    """

    def __init__(self, settings: Settings, metrics: Metrics, principal: bytes) -> None:
        super().__init__(settings, metrics)
        self._principal = principal
        self._link: Link | None = None

    def attach(self, link: Link) -> None:
        self._link = link
        link.send(self._principal)

    # From the link.

    def received(self, frame: bytes) -> None:
        self._metrics.frames_to_harness += 1
        self._metrics.bytes_to_harness += len(frame)
        self.send(frame)

    @property
    def congested(self) -> bool:
        return self.is_congested

    async def wait_room(self) -> None:
        await self.wait_until_sent()

    def closed(self, reason: str) -> None:
        self.close(_CODES.get(reason, GOING_AWAY), reason)

    # From the websocket.

    def _receive(self, frame: bytes) -> None:
        assert self._link is not None
        if not frame:  # text, which no frame is; the rest is looked at where all frames meet
            self._metrics.frames_invalid += 1
            return
        self.bytes_in += len(frame)
        self._link.send(frame)

    async def _hold(self) -> None:
        assert self._link is not None
        if self._link.congested:
            await self._link.wait_room()


class ExecutorSocket(RelaySocket):
    """An executor's websocket, and which of its streams belongs to which harness."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._streams: dict[str, _HarnessLink] = {}
        self._owners: OrderedDict[str, bytes] = OrderedDict()
        self._links: set[_HarnessLink] = set()
        self._nursery: trio.Nursery | None = None
        self._ended = False

    # To the exchange.

    def accept(self, link: Link) -> LinkEnd:
        """Take a link to a harness.

        Raises:
            Offline: if the websocket has ended.
        """
        if self._ended:
            raise Offline
        harness = _HarnessLink(self, link)
        self._links.add(harness)
        self._metrics.links += 1
        return harness

    def replaced(self) -> None:
        """Another executor has this environment now."""
        self.close(*REPLACED)

    # From the websocket.

    async def run(self, channel: WebsocketChannel) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await super().run(channel)
            finally:
                self._nursery = None
            nursery.cancel_scope.cancel()

    def end(self) -> None:
        super().end()
        self._ended = True
        for harness in tuple(self._links):
            harness.end(EXECUTOR_GONE)

    def _receive(self, frame: bytes) -> None:
        self.bytes_in += len(frame)
        try:
            stream_id, is_reset = frames.routing_of(frame)
        except InvalidFrame:
            self._metrics.frames_invalid += 1
            return
        harness = self._streams.get(stream_id)
        if harness is None:
            # A reset is never answered, or two ends could go on for ever. And who asks without reading the
            # answers gets none: there will be more such frames once it reads.
            if not is_reset and not self.is_congested:
                self._reset(stream_id)
            return
        if is_reset:
            self._forget(stream_id, harness)
        harness.pass_on(frame)

    async def _hold(self) -> None:
        while (slow := self._slowest()) is not None:
            # While it is the only one it holds up nobody else, and may go on being slow.
            left = max(self._settings.patience - (slow.held if len(self._links) > 1 else 0.0), 0.0)
            began = trio.current_time()
            with trio.move_on_after(left) as scope:
                await slow.wait_drained()
            slow.held = slow.held + trio.current_time() - began if slow.waiting else 0.0
            if scope.cancelled_caught:
                self._metrics.slow_harnesses += 1
                slow.end(SLOW)

    def _slowest(self) -> _HarnessLink | None:
        """The harness for which too much is waiting."""
        slowest = max(self._links, key=lambda harness: harness.waiting, default=None)
        if slowest is None or not slowest.waiting:
            return None
        return slowest if self.is_too_much(slowest.waiting, self._settings.harness_queue) else None

    def is_too_much(self, waiting: int, most: int) -> bool:
        """Whether a harness for which so much is waiting is to be waited for."""
        return waiting > most or (waiting > 0 and self._metrics.waiting > self._settings.node_queue)

    # From the links.

    def from_harness(self, harness: _HarnessLink, frame: bytes) -> None:
        try:
            stream_id, is_reset = frames.routing_of(frame)
        except InvalidFrame:
            self._metrics.frames_invalid += 1
            return
        if self._streams.get(stream_id) is not harness:
            refused = self._claim(stream_id, harness)
            if refused:
                self._metrics.frames_foreign += 1
                if not is_reset:
                    harness.answer(frames.encode(Frame(stream_id, Reset(refused))))
                return
        if is_reset:
            self._forget(stream_id, harness)
        self._metrics.frames_to_executor += 1
        self._metrics.bytes_to_executor += len(frame)
        self.send(frame)

    def _claim(self, stream_id: str, harness: _HarnessLink) -> str:
        """Give a stream to a harness; why not, if it can't have it."""
        if self._owners.get(stream_id, harness.principal) != harness.principal:
            return FOREIGN
        if len(harness.streams) >= self._settings.max_harness_streams:
            return TOO_MANY_STREAMS
        before = self._streams.get(stream_id)
        self._streams[stream_id] = harness
        harness.streams.add(stream_id)
        self._owners[stream_id] = harness.principal
        self._owners.move_to_end(stream_id)
        if before is not None:
            before.streams.discard(stream_id)
            before.end(TAKEN_OVER)
        self._trim_owners()
        return ""

    def _trim_owners(self) -> None:
        # Those in use are bounded by the sockets that there may be, and never forgotten.
        for _ in range(2):
            if len(self._owners) <= self._settings.max_remembered_streams + len(self._streams):
                return
            oldest = next(iter(self._owners))
            if oldest in self._streams:
                self._owners.move_to_end(oldest)
            else:
                del self._owners[oldest]

    def _forget(self, stream_id: str, harness: _HarnessLink) -> None:
        del self._streams[stream_id]
        harness.streams.discard(stream_id)

    def _reset(self, stream_id: str) -> None:
        self._metrics.resets_to_executor += 1
        self.send(frames.encode(Frame(stream_id, Reset(DISCONNECTED))))

    def leave(self, harness: _HarnessLink) -> None:
        """A link is over: the executor learns it for each of its streams."""
        if harness in self._links:
            self._links.discard(harness)
            self._metrics.links -= 1
            for stream_id in sorted(harness.streams):
                del self._streams[stream_id]
                if not self._ended:
                    self._reset(stream_id)
            harness.streams.clear()

    def start_draining(self, drain: Callable[[], Awaitable[None]]) -> bool:
        """Have frames sent as soon as they can be; False if this websocket has ended."""
        if self._nursery is None:
            return False
        self._nursery.start_soon(drain)
        return True

    def count_waiting(self, size: int) -> None:
        self._metrics.waiting += size

    def count_answer(self) -> None:
        self._metrics.resets_to_harness += 1

    @property
    def most_waiting(self) -> int:
        return self._settings.harness_queue


class _HarnessLink(LinkEnd):
    """A harness, as its executor's socket has it: the executor's end of a link.

    Attributes:
        streams: the ids of those that it has now.
        waiting: bytes that wait here, as the link takes no more for now.
        held: seconds that the executor was held up by it since it last had taken everything.
    """

    def __init__(self, socket: ExecutorSocket, link: Link) -> None:
        self._socket = socket
        self._link = link
        self._queue: deque[bytes] = deque()
        self._drained = trio.lowlevel.ParkingLot()
        self._over = False
        self.principal = b""
        self.streams: set[str] = set()
        self.waiting = 0
        self.held = 0.0

    # From the link.

    def received(self, frame: bytes) -> None:
        if self.principal:
            self._socket.from_harness(self, frame)
        else:
            self.principal = frame

    @property
    def congested(self) -> bool:
        return self._socket.is_congested

    async def wait_room(self) -> None:
        await self._socket.wait_until_sent()

    def closed(self, reason: str) -> None:
        self._finish()

    # From the executor.

    def pass_on(self, frame: bytes) -> None:
        """Send a frame to the harness, as soon as it takes it."""
        if self._over:
            return
        if not self._queue and not self._link.congested:
            self._link.send(frame)
            return
        if not self._queue and not self._socket.start_draining(self._drain):
            return
        self._queue.append(frame)
        self._count(len(frame))

    def answer(self, frame: bytes) -> None:
        """Send a frame that its harness has caused, unless that takes none."""
        if not self._queue and not self._link.congested:
            self._socket.count_answer()
            self._link.send(frame)

    def end(self, reason: str) -> None:
        """End the link; the harness is told the reason."""
        if not self._over:
            self._link.close(reason)
            self._finish()

    async def wait_drained(self) -> None:
        """Wait until at most half of what may wait here does, or the link is over."""
        most = self._socket.most_waiting // 2
        while not self._over and self._socket.is_too_much(self.waiting, most):
            await self._drained.park()

    async def _drain(self) -> None:
        while self._queue and not self._over:
            await self._link.wait_room()
            while self._queue and not self._over and not self._link.congested:
                frame = self._queue.popleft()
                self._count(-len(frame))
                self._link.send(frame)
            self._drained.unpark_all()
        self.held = 0.0

    def _count(self, size: int) -> None:
        self.waiting += size
        self._socket.count_waiting(size)

    def _finish(self) -> None:
        self._over = True
        self._queue.clear()
        self._count(-self.waiting)
        self._drained.unpark_all()
        self._socket.leave(self)
