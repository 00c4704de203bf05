"""Environments of every kind, for the contract tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import IO

import pytest
import trio
from attrs import define

from execenv import Environment, SandboxProfile, open_environment
from execenv._service import service
from execenv.providers import NOISE_VARIABLES
from execenv.remote.connection import open_remote
from execenv.remote.session import Recovery
from execenv.server import open_local_sessions
from execenv.server.connection import ServerConnection
from execenv.server.listen import serve_channel
from execenv.transports.channel import Channel
from execenv.transports.memory import MemoryChannel, memory_pair
from tests.fakes import only
from tests.relay_pair import Pair, open_pair

SERVE = (sys.executable, "-m", "execenv", "serve", "--listen")
ANY_PORT = "ws://127.0.0.1:0"
KINDS = ("local", "memory", "stdio", "websocket", "relay")
TIME_LIMIT = 30.0
"""Seconds for one contract test. Far more than any needs, also on a busy machine."""

SLOW_FILES = (
    "test_codex_relay",
    "test_reference_server",
    "test_relay_end_to_end",
    "test_redis",
    "test_relay_chaos",
    "test_recipes",
    "test_cli_remote",
    "test_pure_codec",
    "test_every_frame",
)
"""Files that take long for their number of tests. They begin first: nobody waits for them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {name: rank for rank, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


SERVER_VARIABLES = {"CONTRACT_PLAIN": "plain", "CONTRACT_SECRET": "secret"}
"""In the environment of every environment: variables for policies to choose from."""


@asynccontextmanager
async def time_limit(seconds: float = TIME_LIMIT) -> AsyncIterator[None]:
    """For fixtures, whose block surrounds the test: fail the test if it takes longer."""

    async def expire() -> None:
        await trio.sleep(seconds)
        raise trio.TooSlowError(f"the test took more than {seconds:g} s")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expire)
        yield
        nursery.cancel_scope.cancel()


@define
class WebsocketServer:
    """A server process of its own."""

    url: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@pytest.fixture(scope="session", autouse=True)
def nothing_configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever this user has configured, tests and the programs that they start do not see it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "CODEX_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        for name in ("EXECENV_URL", "EXECENV_TOKEN", "CODEX_EXEC_SERVER_URL"):
            patch.delenv(name, raising=False)
        for name in NOISE_VARIABLES:
            patch.delenv(name, raising=False)
        # What sandboxes of other test runs of this user have claimed, and their lock, are not waited for.
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as runtime:
            patch.setenv("XDG_RUNTIME_DIR", runtime)
            yield


@pytest.fixture(scope="session")
def server_variables() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVER_VARIABLES.items():
            patch.setenv(name, value)
        yield


@contextmanager
def run_websocket_server(
    argv: Sequence[str] = (*SERVE, ANY_PORT), env: Mapping[str, str] | None = None
) -> Iterator[WebsocketServer]:
    """A server whose first line of output is its URL. What it logs goes to `WebsocketServer.log`."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, env=env)
        assert process.stdout is not None
        try:
            yield WebsocketServer(process.stdout.readline().decode().strip(), process, stderr)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="session")
def websocket_server(server_variables: None) -> Iterator[WebsocketServer]:
    """A server that many tests share. Nothing may be logged there, and SIGTERM must end it well."""
    with run_websocket_server() as server:
        yield server
        server.process.terminate()
        status = server.process.wait(10)
        server.log.seek(0)
        assert (status, server.log.read().decode()) == (0, "")


@asynccontextmanager
async def open_memory() -> AsyncIterator[tuple[Environment, MemoryChannel]]:
    """A server in this process, and the client's end of the channel to it, to be cut."""
    async with open_local_sessions() as sessions, trio.open_nursery() as nursery:
        ours, theirs = memory_pair()
        nursery.start_soon(serve_channel, theirs, sessions)
        async with open_remote(only(ours), "memory") as remote:
            yield Environment(remote), ours


@asynccontextmanager
async def open_relayed() -> AsyncIterator[tuple[Environment, Pair]]:
    """A server in this process behind a relay in memory, encrypted from end to end."""
    opened: list[Pair] = []
    ready, stop = trio.Event(), trio.Event()

    async def serve_all() -> None:
        async with open_local_sessions() as sessions:

            async def serve(channel: Channel) -> None:
                await ServerConnection(channel, sessions, detachable=True).run()

            async with open_pair(serve, noise=True) as pair:
                opened.append(pair)
                ready.set()
                await stop.wait()

    # As a server elsewhere, it is not cancelled with its client.
    async with service(serve_all, stop=stop.set):
        await ready.wait()
        (pair,) = opened
        async with open_remote(pair.dial, "relay", redial=True, recovery=Recovery()) as remote:
            yield Environment(remote), pair


@asynccontextmanager
async def open_kind(kind: str, websocket_url: str) -> AsyncIterator[Environment]:
    """A new environment of one of `KINDS`, or `"sandboxed"`: this machine, where little is restricted."""
    if kind == "memory":
        async with open_memory() as (environment, _):
            yield environment
        return
    if kind == "relay":
        async with open_relayed() as (environment, _):
            yield environment
        return
    if kind == "sandboxed":
        profile = SandboxProfile.workspace_write([tempfile.gettempdir()], network="enabled", temporary=False)
        async with open_environment("local") as environment:
            yield await environment.sandboxed(profile)
        return
    target = {"local": "local", "stdio": [*SERVE, "stdio"], "websocket": websocket_url}[kind]
    async with open_environment(target) as environment:
        yield environment


@pytest.fixture(params=KINDS)
async def environment(
    request: pytest.FixtureRequest, server_variables: None, websocket_server: WebsocketServer
) -> AsyncIterator[Environment]:
    async with time_limit(), open_kind(request.param, websocket_server.url) as environment:
        yield environment
