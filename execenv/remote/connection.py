"""An environment on a server: the proxy of `abc.EnvironmentBackend`, over one session after another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio

from execenv._service import Wakeup, service
from execenv.abc import EnvironmentBackend
from execenv.errors import ConnectFailed, ConnectionLost
from execenv.protocol import (
    ENVIRONMENT_CONFIG_READ,
    ENVIRONMENT_INFO,
    ENVIRONMENT_STATUS,
    FS_MISSING_CHANGED,
    HTTP_BODY_DELTA,
    PROCESS_CLOSED,
    PROCESS_EXITED,
    PROCESS_OUTPUT,
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentInfo,
    Method,
    Unit,
)
from execenv.remote.filesystem import RemoteFileSystem
from execenv.remote.http import RemoteHttp
from execenv.remote.processes import RemoteProcesses
from execenv.remote.session import Dial, Recovery, Session, Tries, again
from execenv.rpc import Peer
from execenv.status import Status, refuse_to_wait, waiting
from execenv.targets import INITIALIZE_TIMEOUT

P = TypeVar("P")
R = TypeVar("R")


class RemoteEnvironment(EnvironmentBackend):
    """An environment behind connections. `run` must run for anything to happen: see `open_remote`."""

    processes: RemoteProcesses
    files: RemoteFileSystem
    http: RemoteHttp

    def __init__(
        self,
        dial: Dial,
        name: str,
        *,
        resume_session_id: str | None = None,
        initialize_timeout: float = INITIALIZE_TIMEOUT,
        redial: bool = False,
        recovery: Recovery | None = None,
    ) -> None:
        self.name = name
        self.status = Status("idle")
        self._dial = dial
        self._resume_session_id = resume_session_id
        self._initialize_timeout = initialize_timeout
        self._redial = redial
        self._recovery = recovery
        self._session: Session | None = None
        self._wanted = Wakeup()
        self._opening: _Opening | None = None
        self._closing = False
        self.processes = RemoteProcesses(self)
        self.files = RemoteFileSystem(self)
        self.http = RemoteHttp(self)

    @property
    def session_id(self) -> str | None:
        """What the server calls the session, to resume it: a secret. `None` before the first connection."""
        return None if self._session is None else self._session.session_id or None

    async def run(self) -> None:
        """Hold one session after the other, each when somebody wants it, until `close_nowait`."""
        try:
            while not self._closing:
                await self._wanted.wait()
                if self._opening is not None and not self._closing:
                    await self._hold_session(self._opening)
        finally:
            if self._opening is not None:  # wanted when it was too late
                self._opened(self._opening, self._closed())
            self.status.end()

    async def _hold_session(self, opening: _Opening) -> None:
        self.status.set("connecting")
        resume, self._resume_session_id = self._resume_session_id, None
        session = self._session = Session(
            self._dial,
            self,
            {
                PROCESS_OUTPUT.name: self.processes.on_output,
                PROCESS_EXITED.name: self.processes.on_exited,
                PROCESS_CLOSED.name: self.processes.on_closed,
                FS_MISSING_CHANGED.name: self.files.on_missing_changed,
                HTTP_BODY_DELTA.name: self.http.on_delta,
            },
            name=self.name,
            resume_session_id=resume,
            initialize_timeout=self._initialize_timeout,
            recovery=self._recovery,
        )
        try:
            await session.run()
        except ConnectFailed as error:
            self._session = None
            self._resume_session_id = resume
            self._opened(opening, error)
            self.status.set("failed", error)
        finally:
            if self._opening is opening:  # closed, or cancelled, before there was a connection
                self._opened(opening, self._closed())

    def _closed(self) -> ConnectFailed:
        return ConnectFailed(f"{self.name} was closed", retryable=False)

    def _opened(self, opening: _Opening, error: ConnectFailed | None) -> None:
        opening.error = error
        opening.finished.set()
        self._opening = None

    def close_nowait(self) -> None:
        """End the session here, behind what was sent."""
        self._closing = True
        if self._session is not None:
            self._session.close()
        self._wanted.set()

    # What the session tells. None of these wait.

    def connected(self, session: Session) -> None:
        if self._opening is not None:
            self._opened(self._opening, None)
        self.status.set("connected")
        self.processes.connected()

    def disconnected(self, session: Session, error: ConnectionLost) -> None:
        self.processes.disconnected()
        self.http.disconnected(error)
        self.files.disconnected()
        if not self._closing and self._recovery is not None:
            self.status.set("recovering", error)

    def still_disconnected(self, session: Session, error: ConnectionLost) -> None:
        self.status.set("recovering", error)

    def undisturbed(self, session: Session) -> None:
        self.status.set("connected")

    def failed(self, session: Session, error: ConnectionLost) -> None:
        self.processes.session_lost(session, error)
        if not self._closing and session.session_id:
            self.status.set("failed", error)

    # Calls.

    async def session(self) -> Session:
        """The session, connected. One that is not there yet, or is lost, is opened, for all who want it.

        Raises:
            ConnectFailed: if it cannot be opened.
            ConnectionLost: if this environment has no second session, or was closed.
        """
        while True:
            session = self._session
            if self._closing:
                raise ConnectionLost(f"{self.name} was closed", "not sent")
            if session is not None and session.session_id:
                if session.peer is not None:
                    return session
                if session.lost is None:
                    # Whether it is lost in the end is not this call's business: it can go to the next one.
                    await session.wait_settled()
                    continue
                if not self._redial:
                    raise again(session.lost, "not sent")
            await self._open_session()

    async def _open_session(self) -> None:
        refuse_to_wait(state="not ready")
        opening = self._opening
        if opening is None:
            opening = self._opening = _Opening()
            self._wanted.set()
        await opening.finished.wait()
        if opening.error is not None:
            copy = ConnectFailed(str(opening.error), retryable=opening.error.retryable)
            raise copy from (opening.error.__cause__ or opening.error)

    async def with_peer(self, use: Callable[[Peer], Awaitable[R]], *, repeat: bool = False) -> R:
        """Do something over the connection that there is, or will be.

        Args:
            repeat: do it again if the connection is lost meanwhile. Otherwise only what was not sent is.

        Raises:
            ConnectionLost: if it cannot be done (again). Its `outcome` is that of all attempts.
            ConnectFailed: if it never was sent.
        """
        tries: Tries | None = None
        while True:
            session = self._session
            peer = None if session is None else session.peer
            if session is None or peer is None:
                try:
                    session = await self.session()
                except (ConnectFailed, ConnectionLost) as error:
                    if tries is not None and tries.sent:
                        raise ConnectionLost(str(error), "unknown") from error
                    raise
                assert session.peer is not None
                peer = session.peer
            if peer.channel.interrupted:
                refuse_to_wait(tries.outcome if tries is not None else "not sent")
            try:
                return await use(peer)
            except ConnectionLost as error:
                tries = tries or Tries(self._recovery)
                tries.note(error)
                if not self._may_come_back or (tries.sent and not repeat):
                    raise again(error, tries.outcome) from error.__cause__
                await session.wait_lost(peer, tries.outcome)

    @property
    def _may_come_back(self) -> bool:
        return self._recovery is not None and not self._closing

    def call(self, method: Method[P, R], params: P, *, repeat: bool = False) -> Coroutine[Any, Any, R]:
        """A call that has nothing to do with what the session holds. See `with_peer`."""
        return self.with_peer(lambda peer: peer.call(method, params), repeat=repeat)

    async def info(self) -> EnvironmentInfo:
        session = self._session
        if session is None or session.info is None:
            session = await self.session()
            if session.info is None:
                session.info = await self.call(ENVIRONMENT_INFO, Unit(), repeat=True)
        return session.info

    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        return await self.call(ENVIRONMENT_CONFIG_READ, params, repeat=True)

    async def probe(self) -> str:
        return (await self.call(ENVIRONMENT_STATUS, Unit(), repeat=True)).status


class _Opening:
    """An attempt to open a session, which all who want one wait for."""

    def __init__(self) -> None:
        self.finished = trio.Event()
        self.error: ConnectFailed | None = None


@asynccontextmanager
async def open_remote(
    dial: Dial,
    name: str,
    *,
    resume_session_id: str | None = None,
    initialize_timeout: float = INITIALIZE_TIMEOUT,
    redial: bool = False,
    recovery: Recovery | None = None,
    connect: bool = True,
) -> AsyncIterator[RemoteEnvironment]:
    """Speak to the server that `dial` reaches.

    Args:
        name: of the environment, for messages.
        resume_session_id: a session to go on with.
        redial: whether `dial` works more than once, so that a lost session can be followed by another.
        recovery: how a lost connection of a session is made again; `None` for not at all.
        connect: now. Without it, the first call connects.

    Raises:
        ConnectFailed: if the server does not answer in time, or refuses.
    """
    environment = RemoteEnvironment(
        dial,
        name,
        resume_session_id=resume_session_id,
        initialize_timeout=initialize_timeout,
        redial=redial,
        recovery=recovery,
    )
    async with service(environment.run, stop=environment.close_nowait):
        if connect:
            with waiting():
                await environment.session()
        yield environment
