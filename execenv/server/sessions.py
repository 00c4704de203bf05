"""Sessions: what of a client outlives its connection (protocol.md §3.3).

A session is a task that holds an environment open; its processes end with it. Connections come and go:
detaching sets a deadline on the session's scope, attaching removes it, the exit of a process may move it. So
expiry is cancellation, and there is no timer to forget.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from logging import getLogger
from typing import Protocol

import trio
from attrs import frozen

from execenv._service import open_nursery
from execenv.abc import EnvironmentBackend
from execenv.errors import InvalidRequest, SessionAttached
from execenv.server.processes import ProcessTable
from execenv.transports.channel import Channel

logger = getLogger(__name__)

DETACHED_TTL = 80.0  # protocol.md §11
RETENTION = 80.0


@frozen
class DetachedTtl:
    """How long a session waits for its client to come back. Seconds; either may be infinite.

    Attributes:
        running: counted from the loss of the connection, as long as a process of the session runs.
        exited: counted once no process runs, from the last exit or from the loss, whichever was later;
            `None` if exits make no difference.
    """

    running: float = DETACHED_TTL
    exited: float | None = None


OpenEnvironment = Callable[[], AbstractAsyncContextManager[EnvironmentBackend]]


class Attachment(Protocol):
    """A connection, as far as a session knows it."""

    channel: Channel


class Session:
    """One client's environment and processes. Made by `Sessions.open`."""

    def __init__(self, detached_ttl: DetachedTtl, retention: float) -> None:
        self.session_id = str(uuid.uuid4())
        self.environment: EnvironmentBackend
        self.processes: ProcessTable
        self.channel: Channel | None = None
        """Where notifications go now; `None` while detached."""
        self._attached: Attachment | None = None
        self._detached_at = math.inf
        self._detached_ttl = detached_ttl
        self._retention = retention
        self._scope = trio.CancelScope()

    async def run(
        self,
        open_environment: OpenEnvironment,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hold the environment open until the session expires or is closed."""
        with self._scope:
            async with open_environment() as self.environment:
                self.processes = ProcessTable(self, self._retention)
                task_status.started()
                await self.processes.expire_for_ever()

    def attach(self, attachment: Attachment) -> None:
        """Make the session this connection's, and nobody else's.

        Raises:
            SessionAttached: if another connection holds it. That one is asked for a sign of life, and ended
                if it gives none: its client may have noticed before us that it is gone.
        """
        if self._attached is not None:
            self._attached.channel.probe_nowait()
            raise SessionAttached(f"session {self.session_id} is already attached to another connection")
        self._attached = attachment
        self._scope.deadline = math.inf

    def begin(self, attachment: Attachment) -> None:
        """Notify the connection of what happens from now on. Nothing is replayed.

        Called when the client's `initialize` was answered, so that no notification precedes the answer.
        """
        if self._attached is attachment:
            self.channel = attachment.channel
            self.processes.connection_made()

    def detach(self, attachment: Attachment) -> None:
        """The connection has ended; the session lives on for a while."""
        if self._attached is attachment:
            self._attached = None
            if self.channel is not None:
                self.channel = None
                self.processes.connection_lost()
            self._detached_at = trio.current_time()
            self._scope.deadline = self._expires_at()

    def process_exited(self) -> None:
        """A process that ran does not run any more."""
        if self._attached is None and not self.expired:
            self._scope.deadline = self._expires_at()

    def _expires_at(self) -> float:
        ttl = self._detached_ttl
        if ttl.exited is None or self.processes.running:
            return self._detached_at + ttl.running
        return max(self._detached_at, self.processes.last_exit) + ttl.exited

    def end_connection(self) -> None:
        """The session is over: its client is to come again, and gets another one."""
        if self._attached is not None:
            self._attached.channel.close_nowait(1011, "the session has ended")

    def close(self) -> None:
        """End the session now, with its processes."""
        self._scope.cancel()

    @property
    def expired(self) -> bool:
        """Whether it is over. Decided by the clock, so a resume at the same moment comes too late."""
        return self._scope.cancel_called or trio.current_time() >= self._scope.deadline


class Sessions:
    """All sessions of a server. Got from `open_sessions`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        open_environment: OpenEnvironment,
        detached_ttl: DetachedTtl,
        retention: float,
    ) -> None:
        self._nursery = nursery
        self._open_environment = open_environment
        self._detached_ttl = detached_ttl
        self._retention = retention
        self._by_id: dict[str, Session] = {}

    async def open(self, attachment: Attachment) -> Session:
        """A new session with an environment of its own, attached."""
        session = Session(self._detached_ttl, self._retention)
        await self._nursery.start(self._run, session)
        session.attach(attachment)
        return session

    def resume(self, session_id: str, attachment: Attachment) -> Session:
        """Attach to a session whose connection was lost.

        Raises:
            InvalidRequest: if there is none of that id, or it has expired.
            SessionAttached: if its connection is still there.
        """
        session = self._by_id.get(session_id)
        if session is None or session.expired:
            raise InvalidRequest(f"unknown session id {session_id}")
        session.attach(attachment)
        return session

    async def _run(
        self, session: Session, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._by_id[session.session_id] = session
        try:
            await session.run(self._open_environment, task_status)
        except Exception:
            # Before `started` this goes to who opened the session; later nobody else would hear of it.
            if not hasattr(session, "processes"):
                raise
            logger.exception("a session ended with an error")
            session.end_connection()
        finally:
            del self._by_id[session.session_id]


@asynccontextmanager
async def open_sessions(
    open_environment: OpenEnvironment,
    *,
    detached_ttl: DetachedTtl | float = DETACHED_TTL,
    retention: float = RETENTION,
) -> AsyncIterator[Sessions]:
    """A place for sessions. Leaving the block ends them all.

    Args:
        open_environment: what each session serves.
        detached_ttl: seconds that a session waits for its client to come back; may be infinite.
        retention: seconds that a process stays readable, and its id taken, after it was closed. They begin
            anew when the client comes back, and none is forgotten while it is away.
    """
    if not isinstance(detached_ttl, DetachedTtl):
        detached_ttl = DetachedTtl(detached_ttl)
    async with open_nursery() as nursery:
        yield Sessions(nursery, open_environment, detached_ttl, retention)
        nursery.cancel_scope.cancel()
