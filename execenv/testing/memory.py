"""A server within this program, and connections to it that fail as a plan says. No sockets, any clock."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from execenv._service import Wakeup, open_nursery
from execenv.errors import ConnectFailed
from execenv.server.connection import ServerConnection
from execenv.server.sessions import (
    DETACHED_TTL,
    RETENTION,
    DetachedTtl,
    OpenEnvironment,
    Sessions,
    open_sessions,
)
from execenv.testing.carrier import Carrier, End, Link
from execenv.testing.faults import Direction, FaultPlan, Frame, FrameLog
from execenv.testing.recordings import Recorder, decode
from execenv.transports.channel import ANSWER_LIMIT, Channel, SendPart

PROBE_PATIENCE = 5.0
"""Seconds that a side which is asked for a sign of life has for it."""

Serve = Callable[[Channel], Awaitable[None]]


class MemoryEnd(Channel, End):
    """The channel that one side uses, and the end of it that the carrier has."""

    in_pieces = False

    def __init__(self, label: str, log: FrameLog, sends: Direction) -> None:
        super().__init__(label)
        self.peer: MemoryEnd
        self._log = log
        self._sends: Direction = sends
        self._inbox: deque[bytes] = deque()
        self._outbox: deque[bytes] = deque()
        self._behind: list[bytes] | None = None  # messages that wait for the end of one in parts
        self._wakeup = Wakeup()  # of `run`
        self._mail = Wakeup()  # of the carrier
        self._no_more = False  # nothing more will come in
        self.on_probe: Callable[[], object] = lambda: None

    # The side that uses it.

    async def run(self, receive: Callable[[bytes], None]) -> None:
        try:
            while not self._closed:
                while self._inbox and not self._closed:
                    message = self._inbox.popleft()
                    self.peer._sent(len(message))
                    receive(message)
                    await trio.lowlevel.checkpoint()
                    while self.queued > ANSWER_LIMIT and not self._closed:
                        await self._room.park()
                if self._no_more or self._closed:
                    return
                await self._wakeup.wait()
        finally:
            self.close_nowait()

    def send_nowait(self, *parts: bytes) -> None:
        if self._closed or self._no_more:
            raise self.lost()
        message = b"".join(parts)
        self.queued += len(message)
        if self._behind is not None:
            self._behind.append(message)
            return
        self._outbox.append(message)
        self._mail.set()

    def _begin_message(self) -> tuple[SendPart, Callable[[], None]]:
        parts: list[bytes] = []
        behind = self._behind = []

        async def send(part: bytes) -> None:
            if self._closed or self._no_more:
                raise self.lost()
            parts.append(part)
            await trio.lowlevel.checkpoint()

        def end() -> None:
            self._behind = None
            self.send_nowait(*parts)
            self._outbox.extend(behind)

        return send, end

    def close_nowait(self, code: int = 1000, reason: str = "") -> None:
        if not self._closed:
            self._ended()
            self._wakeup.set()
            self._mail.set()

    def probe_nowait(self) -> None:
        self.on_probe()

    # The carrier.

    async def receive(self) -> tuple[Frame, bytes] | None:
        await trio.lowlevel.checkpoint()
        while not self._outbox:
            if self._closed:
                return None
            await self._mail.wait()
        data = self._outbox.popleft()
        return self._log.message(self._sends, len(data), decode(data)), data

    async def send(self, data: bytes, *, part: bool = False, again: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.BrokenResourceError
        if again:
            self.peer.queued += len(data)
        self._inbox.append(data)
        self._wakeup.set()

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def send_end(self) -> None:
        if not self._no_more:
            self._no_more = True
            # What this side has queued will never be taken.
            self.queued = 0
            self._room.unpark_all()
            self._wakeup.set()

    def finish(self) -> None:
        self.send_end()

    def abort(self) -> None:
        # What has arrived already is still read, as it is from a socket.
        if not self._no_more and not self._closed:
            self.loss = "connection reset by peer"
        self.send_end()

    def discarded(self, data: bytes) -> None:
        if not self._no_more:
            self._sent(len(data))

    def vanish(self, loss: str) -> None:
        """This side finds out that the other one is gone."""
        if not self._closed:
            self.loss = self.loss or loss
            self.close_nowait()


class MemoryListener(Carrier):
    """Hands out connections to `serve`, which is called with the server's end of each. Got from
    `open_memory_listener`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        serve: Serve,
        plan: FaultPlan | None,
        recorder: Recorder | None,
        label: str,
    ) -> None:
        super().__init__(plan, recorder)
        self._nursery = nursery
        self._serve = serve
        self._label = label

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Channel]:
        """A new connection: the client's end of it, which nobody has used. Leaving the block ends it.

        Raises:
            ConnectFailed: if it is refused.
        """
        await trio.lowlevel.checkpoint()
        if not self.plan.admits() or not self._ready:
            raise ConnectFailed(f"{self._label} refused the connection")
        log = self.next_log()
        client, server = MemoryEnd(self._label, log, "to_server"), MemoryEnd(self._label, log, "to_client")
        client.peer, server.peer = server, client
        link = Link(self, log, client, server)
        for end in (client, server):
            end.on_probe = partial(self._nursery.start_soon, _probe, link, end)
        self._nursery.start_soon(self.run_link, link)
        self._nursery.start_soon(self._serve_one, server)
        try:
            yield client
        finally:
            client.close_nowait()

    @property
    def _ready(self) -> bool:
        return True

    async def _serve_one(self, channel: MemoryEnd) -> None:
        try:
            await self._serve(channel)
        finally:
            channel.close_nowait()


async def _probe(link: Link, end: MemoryEnd) -> None:
    """What a ping does elsewhere: end the channel of a side that gets no answer."""
    with trio.move_on_after(PROBE_PATIENCE):
        await link.wait_answering()
        return
    end.vanish(f"no answer to a probe within {PROBE_PATIENCE:g} s")


@asynccontextmanager
async def open_memory_listener(
    serve: Serve,
    plan: FaultPlan | None = None,
    *,
    recorder: Recorder | None = None,
    label: str = "memory",
) -> AsyncIterator[MemoryListener]:
    """Connections to `serve`, whatever that is. Leaving the block ends them all.

    Args:
        serve: run for each connection, with the server's end of it. What it raises comes out of the block.
        label: what the clients' channels are called in messages.
    """
    async with open_nursery() as nursery:
        yield MemoryListener(nursery, serve, plan, recorder, label)
        nursery.cancel_scope.cancel()


class MemoryServer(MemoryListener):
    """A server of environments. Got from `open_memory_server`.

    Attributes:
        sessions: those of the server; others after `restart`.
    """

    sessions: Sessions

    def __init__(
        self, nursery: trio.Nursery, plan: FaultPlan | None, recorder: Recorder | None, label: str
    ) -> None:
        super().__init__(nursery, self._serve_session, plan, recorder, label)
        self._life = trio.CancelScope()
        self._up = trio.Event()

    async def restart(self) -> None:
        """End all connections and all sessions, as when the server is killed, and start anew."""
        self._up = trio.Event()
        self.cut()
        self._life.cancel()
        await self._up.wait()

    @property
    def _ready(self) -> bool:
        return self._up.is_set()

    async def _serve_session(self, channel: Channel) -> None:
        await ServerConnection(channel, self.sessions, detachable=True).run()

    async def _run(
        self, open_environment: OpenEnvironment, detached_ttl: DetachedTtl | float, retention: float
    ) -> None:
        while True:
            self._life = trio.CancelScope()
            with self._life:
                async with open_sessions(
                    open_environment, detached_ttl=detached_ttl, retention=retention
                ) as self.sessions:
                    self._up.set()
                    await trio.sleep_forever()


@asynccontextmanager
async def open_memory_server(
    open_environment: OpenEnvironment,
    plan: FaultPlan | None = None,
    *,
    detached_ttl: DetachedTtl | float = DETACHED_TTL,
    retention: float = RETENTION,
    recorder: Recorder | None = None,
    label: str = "memory",
) -> AsyncIterator[MemoryServer]:
    """A server in this program, of sessions that outlive their connections, as `execenv serve` has them.

    What a session raises, such as a function of a fake environment, does not come out of the block: it is
    logged and ends that session and its connection, as it does in a server.

    Args:
        open_environment: what each session serves, such as `partial(open_fake_backend, {"make": make})`.
        plan: what happens to the frames of its connections.
        detached_ttl: seconds that a session waits for its client to come back.
        retention: seconds that a process stays readable after it was closed.
        recorder: gets every frame that arrives.
        label: what the clients' channels are called in messages.
    """
    async with open_nursery() as nursery:
        server = MemoryServer(nursery, plan, recorder, label)
        nursery.start_soon(server._run, open_environment, detached_ttl, retention)
        await server._up.wait()
        yield server
        nursery.cancel_scope.cancel()
