"""Both ends of a relay in one process, and between them a rendezvous of queues that can be cut anywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing
from attrs import define, field

from execenv.errors import ConnectFailed, ConnectionLost
from execenv.relay import frames
from execenv.relay.executor import HARNESS_DISCONNECTED, ExecutorStreams, open_streams
from execenv.relay.frames import Frame, Reset
from execenv.relay.harness import HarnessStream
from execenv.relay.keys import PublicKey
from execenv.relay.noise import Identity, Initiator, prologue
from execenv.transports.channel import Channel
from execenv.transports.memory import MemoryChannel, memory_pair

ENVIRONMENT = "env-1"
REGISTRATION = "reg-1"
AUTHORIZATION = "let-me-in"


@define(eq=False)
class Rendezvous:
    """Routes by stream id, as every rendezvous does.

    Attributes:
        frames: all that has passed, either way.
        watch: called before a frame is passed on, with its direction ("up" is to the executor) and the frame;
            False for one that is lost.
    """

    nursery: trio.Nursery
    frames: list[tuple[str, bytes]] = field(factory=list)
    watch: Callable[[str, bytes], bool] = lambda way, frame: True
    executor: MemoryChannel | None = None
    harnesses: list[MemoryChannel] = field(factory=list)
    _streams: dict[str, MemoryChannel] = field(factory=dict)

    def connect_executor(self) -> Channel:
        theirs, ours = memory_pair("executor")
        self.executor = ours
        self.nursery.start_soon(self._run_executor, ours)
        return theirs

    async def connect_harness(self) -> Channel:
        await trio.lowlevel.checkpoint()
        if self.executor is None:
            raise ConnectFailed("the environment is offline")
        theirs, ours = memory_pair("harness")
        self.harnesses.append(ours)
        self.nursery.start_soon(self._run_harness, ours)
        return theirs

    def cut_executor(self) -> None:
        if self.executor is not None:
            self.executor.close_nowait()

    def cut_harnesses(self) -> None:
        for channel in list(self.harnesses):
            channel.close_nowait()

    async def _run_executor(self, channel: MemoryChannel) -> None:
        def receive(data: bytes) -> None:
            if self._passes("down", data):
                stream_id = frames.routing_of(data)[0]
                harness = self._streams.get(stream_id)
                if harness is None:
                    self._disconnected(stream_id)
                else:
                    _send(harness, data)

        await channel.run(receive)
        if self.executor is channel:
            self.executor = None
        self.cut_harnesses()

    async def _run_harness(self, channel: MemoryChannel) -> None:
        def receive(data: bytes) -> None:
            if self._passes("up", data):
                self._streams[frames.routing_of(data)[0]] = channel
                if self.executor is not None:
                    _send(self.executor, data)

        await channel.run(receive)
        self.harnesses.remove(channel)
        for stream_id, owner in list(self._streams.items()):
            if owner is channel:
                del self._streams[stream_id]
                self._disconnected(stream_id)

    def _passes(self, way: str, data: bytes) -> bool:
        self.frames.append((way, data))
        return self.watch(way, data)

    def _disconnected(self, stream_id: str) -> None:
        if self.executor is not None:
            _send(self.executor, frames.encode(Frame(stream_id, Reset(HARNESS_DISCONNECTED))))


def _send(channel: MemoryChannel, data: bytes) -> None:
    try:
        channel.send_nowait(data)
    except ConnectionLost:
        channel.close_nowait()


@define(eq=False)
class Pair:
    """An executor that stays connected, and harnesses as they are wanted."""

    rendezvous: Rendezvous
    streams: ExecutorStreams
    identity: Identity | None
    validate: Callable[[str, PublicKey, str], Awaitable[bool]]
    harness_identity: Identity | None = None
    ids: int = 0
    reconnect: bool = True

    async def run(self) -> None:
        while self.reconnect:
            channel = self.rendezvous.connect_executor()
            await self.streams.run_socket(
                channel, ENVIRONMENT, REGISTRATION if self.identity else None, self.validate
            )

    async def harness(
        self, *, deadline: float = 25.0, executor: Identity | None = None, authorization: str = AUTHORIZATION
    ) -> HarnessStream:
        self.ids += 1
        stream_id = f"stream-{self.ids}"
        initiator = None
        if self.identity is not None:
            self.harness_identity = self.harness_identity or Identity.generate()
            initiator = Initiator(
                self.harness_identity,
                (executor or self.identity).public,
                prologue(ENVIRONMENT, REGISTRATION, stream_id),
                authorization.encode(),
            )
        return HarnessStream(
            stream_id,
            f"relay {ENVIRONMENT}",
            await self.rendezvous.connect_harness(),
            self.rendezvous.connect_harness,
            initiator=initiator,
            identity=None if self.identity is None else self.identity.public.x25519,
            deadline=deadline,
        )

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Channel]:
        stream = await self.harness()
        try:
            yield stream
        finally:
            await stream.discard()


@asynccontextmanager
async def open_pair(
    serve: Callable[[Channel], Awaitable[None]],
    *,
    noise: bool,
    validate: Callable[[str, PublicKey, str], Awaitable[bool]] | None = None,
) -> AsyncIterator[Pair]:
    """An executor that serves each stream with `serve`, and the rendezvous before it."""

    async def right_word(stream_id: str, key: PublicKey, authorization: str) -> bool:
        await trio.lowlevel.checkpoint()
        return authorization == AUTHORIZATION

    identity = Identity.generate() if noise else None
    async with trio.open_nursery() as nursery, open_streams(serve, identity=identity) as streams:
        pair = Pair(Rendezvous(nursery), streams, identity, validate or right_word)
        nursery.start_soon(pair.run)
        await trio.testing.wait_all_tasks_blocked()
        yield pair
        nursery.cancel_scope.cancel()
