"""One connection of a server: the handshake, the routes, and what is left when it ends."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any

import trio

from execenv import codec
from execenv._service import open_nursery
from execenv.codec import Json
from execenv.errors import InvalidParams, InvalidRequest, ProtocolViolation
from execenv.protocol import (
    ENVIRONMENT_CONFIG_READ,
    ENVIRONMENT_INFO,
    ENVIRONMENT_STATUS,
    HTTP_BODY_TAKEN,
    HTTP_REQUEST,
    INITIALIZE,
    INITIALIZED,
    PROCESS_OUTPUT_TAKEN,
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentStatusResult,
    HttpBodyTakenParams,
    HttpRequestParams,
    InitializeParams,
    InitializeResult,
    ProcessOutputTakenParams,
    Unit,
)
from execenv.rpc import Answer, Peer, Route
from execenv.server import filesystem, processes
from execenv.server.filesystem import FileTable
from execenv.server.http import HttpTable
from execenv.server.sessions import Session, Sessions
from execenv.transports.channel import Channel


class ServerConnection:
    """The server's end of one channel.

    Args:
        detachable: whether the session survives the connection; over stdio it does not (§1.3).
    """

    def __init__(self, channel: Channel, sessions: Sessions, *, detachable: bool) -> None:
        self.channel = channel
        self.nursery: trio.Nursery
        self._sessions = sessions
        self._detachable = detachable
        self._session: Session | None = None
        self._files: FileTable | None = None
        self._http: HttpTable | None = None
        self._encoded_info: Any = None
        self._ready = False
        self._peer = Peer(
            channel,
            self._routes(),
            {
                INITIALIZED.name: self._initialized,
                PROCESS_OUTPUT_TAKEN.name: self._output_taken,
                HTTP_BODY_TAKEN.name: self._body_taken,
            },
            guard=self._check_handshake,
            strict=True,
        )
        self._peer.on_end = self._detach

    async def run(self) -> None:
        """Serve until the connection ends. What its requests have left running ends with it."""
        try:
            async with open_nursery() as self.nursery:
                await self._peer.run()
                self.nursery.cancel_scope.cancel()
        finally:
            self._detach()
            if self._session is not None and not self._detachable:
                self._session.close()
            if self._files is not None:
                await self._files.aclose()

    def _detach(self) -> None:
        # As soon as the channel has ended: a handler that is slow to leave must not keep the client out.
        if self._session is not None:
            self._session.detach(self)

    def _routes(self) -> list[Route[Any, Any]]:
        routes: list[Route[Any, Any]] = [
            Route(INITIALIZE, self._initialize, alone=True),
            Route(ENVIRONMENT_INFO, self._info),
            Route(ENVIRONMENT_STATUS, self._status),
            Route(ENVIRONMENT_CONFIG_READ, self._config),
            Route(HTTP_REQUEST, self._request),
        ]
        routes += [Route(method, self._of_session(handler)) for method, handler in processes.ROUTES]
        routes += [Route(method, self._of_files(handler)) for method, handler in filesystem.ROUTES]
        return routes

    def _of_session(self, handler: Any) -> Any:
        def handle(params: Any) -> Any:
            assert self._session is not None  # `_check_handshake` saw to it
            return handler(self._session.processes, params)

        return handle

    def _of_files(self, handler: Any) -> Any:
        def handle(params: Any) -> Any:
            assert self._files is not None
            return handler(self._files, params)

        return handle

    def _check_handshake(self, route: Route[Any, Any]) -> None:
        if self._ready or route.method is INITIALIZE:
            return
        missing = "call initialize" if self._session is None else "send initialized"
        raise InvalidRequest(f"client must {missing} before using {route.method.family} methods")

    async def _initialize(self, params: InitializeParams) -> Answer[InitializeResult]:
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
        self._files = FileTable(session.environment.files, self.nursery, self._peer.notify)
        self._http = HttpTable(session.environment, self.channel, self.nursery)
        return Answer(InitializeResult(session.session_id, info), partial(session.begin, self))

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

    def _request(self, params: HttpRequestParams) -> Any:
        assert self._http is not None
        return self._http.request(params)

    def _body_taken(self, params: Json) -> None:
        if self._http is None:
            raise ProtocolViolation("http/request/bodyTaken before initialize")
        self._http.body_taken(codec.structure(params, HttpBodyTakenParams))

    def _config(self, params: EnvironmentConfigReadParams) -> Coroutine[Any, Any, EnvironmentConfig]:
        if not params.config_paths and not params.requirements_paths:
            raise InvalidParams("at least one config or requirements path is required")
        if not all(params.config_paths) or not all(params.requirements_paths):
            raise InvalidParams("TOML paths must contain at least one key segment")
        assert self._session is not None
        return self._session.environment.read_config(params)

    async def _status(self, params: Unit) -> EnvironmentStatusResult:
        assert self._session is not None
        return EnvironmentStatusResult(await self._session.environment.probe())
