"""One connection to a server, from the handshake to its end: the proxy of `abc.EnvironmentBackend`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from execenv._service import open_nursery, service
from execenv.abc import EnvironmentBackend
from execenv.errors import ConnectFailed, ConnectionLost, ExecenvError, RpcError
from execenv.protocol import (
    ENVIRONMENT_CONFIG_READ,
    ENVIRONMENT_INFO,
    ENVIRONMENT_STATUS,
    FS_MISSING_CHANGED,
    HTTP_BODY_DELTA,
    INITIALIZE,
    INITIALIZED,
    PROCESS_CLOSED,
    PROCESS_EXITED,
    PROCESS_OUTPUT,
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentInfo,
    InitializeParams,
    Nothing,
    Unit,
)
from execenv.remote.filesystem import RemoteFileSystem
from execenv.remote.http import RemoteHttp
from execenv.remote.processes import RemoteProcesses
from execenv.rpc import Peer
from execenv.transports.channel import Channel

CLIENT_NAME = "execenv"
INITIALIZE_TIMEOUT = 10.0  # environments.md §1.1


class RemoteEnvironment(EnvironmentBackend):
    """An environment behind a connection.

    Attributes:
        session_id: what the server calls this session; to resume it, and a secret.
    """

    session_id: str
    processes: RemoteProcesses
    files: RemoteFileSystem
    http: RemoteHttp

    def __init__(self, channel: Channel, nursery: trio.Nursery) -> None:
        self.name = channel.label
        self.peer = Peer(
            channel,
            notifications={
                PROCESS_OUTPUT.name: lambda params: self.processes.on_output(params),
                PROCESS_EXITED.name: lambda params: self.processes.on_exited(params),
                PROCESS_CLOSED.name: lambda params: self.processes.on_closed(params),
                FS_MISSING_CHANGED.name: lambda params: self.files.on_missing_changed(params),
                HTTP_BODY_DELTA.name: lambda params: self.http.on_delta(params),
            },
        )
        self.processes = RemoteProcesses(self, nursery)
        self.files = RemoteFileSystem(self)
        self.http = RemoteHttp(self)
        self._info: EnvironmentInfo | None = None
        self._fetching = trio.StrictFIFOLock()

    async def run(self) -> None:
        """Move messages until the connection ends; then every process of it has failed."""
        try:
            await self.peer.run()
        finally:
            self.processes.connection_lost(self.peer.channel.lost())
            self.http.connection_lost(self.peer.channel.lost())
            self.files.connection_lost()

    async def handshake(self, resume_session_id: str | None) -> None:
        result = await self.peer.call(INITIALIZE, InitializeParams(CLIENT_NAME, resume_session_id))
        self.session_id = result.session_id
        self._info = result.environment_info
        self.peer.notify(INITIALIZED, Nothing())

    async def info(self) -> EnvironmentInfo:
        if self._info is None:
            async with self._fetching:
                if self._info is None:
                    self._info = await self.peer.call(ENVIRONMENT_INFO, Unit())
        return self._info

    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        return await self.peer.call(ENVIRONMENT_CONFIG_READ, params)

    async def status(self) -> str:
        return (await self.peer.call(ENVIRONMENT_STATUS, Unit())).status


@asynccontextmanager
async def open_remote(
    channel: Channel,
    *,
    resume_session_id: str | None = None,
    initialize_timeout: float = INITIALIZE_TIMEOUT,
) -> AsyncIterator[RemoteEnvironment]:
    """Shake hands over a channel that nobody has used yet, and speak to the server behind it.

    Raises:
        ConnectFailed: if the server does not answer in time, or refuses.
    """
    async with open_nursery() as nursery:
        environment = RemoteEnvironment(channel, nursery)
        async with service(environment.run, stop=channel.close_nowait):
            await _shake_hands(environment, resume_session_id, initialize_timeout)
            yield environment
        nursery.cancel_scope.cancel()


async def _shake_hands(environment: RemoteEnvironment, resume_session_id: str | None, timeout: float) -> None:
    name = environment.name
    try:
        with trio.fail_after(timeout):
            await environment.handshake(resume_session_id)
    except trio.TooSlowError as error:
        raise ConnectFailed(f"{name} did not answer initialize within {timeout:g} s") from error
    except RpcError as error:
        raise ConnectFailed(f"{name} rejected initialize: {error.message} (code {error.code})") from error
    except ConnectionLost as error:
        raise ConnectFailed(f"{name} ended the connection before it was initialized: {error}") from error
    except ExecenvError as error:
        raise ConnectFailed(f"{name}: {error}") from error
