"""One connection of a server: the handshake, the routes, and what is left when it ends."""

from __future__ import annotations

from typing import Any

from execenv import codec
from execenv.codec import Json
from execenv.errors import InvalidRequest, ProtocolViolation
from execenv.protocol import (
    ENVIRONMENT_INFO,
    ENVIRONMENT_STATUS,
    INITIALIZE,
    INITIALIZED,
    PROCESS_OUTPUT_TAKEN,
    EnvironmentStatusResult,
    InitializeParams,
    InitializeResult,
    ProcessOutputTakenParams,
    Unit,
)
from execenv.rpc import Peer, Route
from execenv.server import processes
from execenv.server.sessions import Session, Sessions
from execenv.transports.channel import Channel


class ServerConnection:
    """The server's end of one channel.

    Args:
        detachable: whether the session survives the connection; over stdio it does not (§1.3).
    """

    def __init__(self, channel: Channel, sessions: Sessions, *, detachable: bool) -> None:
        self.channel = channel
        self._sessions = sessions
        self._detachable = detachable
        self._session: Session | None = None
        self._encoded_info: Any = None
        self._ready = False
        self._peer = Peer(
            channel,
            self._routes(),
            {INITIALIZED.name: self._initialized, PROCESS_OUTPUT_TAKEN.name: self._output_taken},
            guard=self._check_handshake,
            strict=True,
        )

    async def run(self) -> None:
        """Serve until the connection ends."""
        try:
            await self._peer.run()
        finally:
            if self._session is not None:
                self._session.detach(self)
                if not self._detachable:
                    self._session.close()

    def _routes(self) -> list[Route[Any, Any]]:
        routes: list[Route[Any, Any]] = [
            Route(INITIALIZE, self._initialize, alone=True),
            Route(ENVIRONMENT_INFO, self._info),
            Route(ENVIRONMENT_STATUS, self._status),
        ]
        for method, handler in processes.ROUTES:
            routes.append(Route(method, self._of_session(handler)))
        return routes

    def _of_session(self, handler: Any) -> Any:
        def handle(params: Any) -> Any:
            assert self._session is not None  # `_check_handshake` saw to it
            return handler(self._session.processes, params)

        return handle

    def _check_handshake(self, route: Route[Any, Any]) -> None:
        if self._ready or route.method is INITIALIZE:
            return
        missing = "call initialize" if self._session is None else "send initialized"
        raise InvalidRequest(f"client must {missing} before using {route.method.family} methods")

    async def _initialize(self, params: InitializeParams) -> InitializeResult:
        if self._session is not None:
            raise InvalidRequest("initialize may only be sent once per connection")
        resumed = params.resume_session_id
        session = await self._sessions.open(self) if resumed is None else self._sessions.resume(resumed, self)
        try:
            info = await session.environment.info()
        except BaseException:
            # The client never got the id of a new session, and can try again with that of an old one.
            session.detach(self)
            if resumed is None:
                session.close()
            raise
        self._encoded_info = codec.encoded(info)
        self._session = session
        return InitializeResult(session.session_id, info)

    def _initialized(self, params: Json) -> None:
        if self._session is None:
            raise ProtocolViolation("initialized before initialize")
        self._ready = True

    def _info(self, params: Unit) -> Any:
        return self._encoded_info

    def _output_taken(self, params: Json) -> None:
        if self._session is None:
            raise ProtocolViolation("process/outputTaken before initialize")
        self._session.processes.output_taken(codec.structure(params, ProcessOutputTakenParams))

    async def _status(self, params: Unit) -> EnvironmentStatusResult:
        assert self._session is not None
        return EnvironmentStatusResult(await self._session.environment.status())
