"""A relay and executors as processes of their own, made by the commands that a user has."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import frozen

from execenv.relay_service.store import Role
from execenv.targets import RelayTarget, Security, WebsocketTarget
from tests.fakes import unmeasured
from tests.relay_proxy import RelayProxy, open_relay_proxy

EXECENV = (sys.executable, "-m", "execenv")
BOX = "box-1"


@frozen
class RelayServer:
    """A relay that runs.

    Attributes:
        url: the public one, of the registry.
        listening: the socket of that, where a proxy is to serve; `None` if that is the relay itself.
        port: of the relay itself.
        folder: of the store, and of what the processes log.
    """

    url: str
    listening: socket.socket | None
    port: int
    folder: Path
    executor_token: str
    harness_token: str


@contextmanager
def run_relay(folder: Path, *, proxied: bool = True) -> Iterator[RelayServer]:
    """`execenv relay serve` on a free port, with a store of its own and a token for each role of `BOX`.

    SIGTERM must end it well.
    """
    store = str(folder / "relay.sqlite3")
    executor_token, harness_token = (_token(store, role) for role in ("executor", "harness"))
    argv = [*EXECENV, "relay", "serve", "--store", store]
    with ExitStack() as stack:
        listening = None
        if proxied:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            argv += ["--public-url", f"http://127.0.0.1:{listening.getsockname()[1]}"]
        stderr = stack.enter_context((folder / "relay.log").open("wb"))
        process = subprocess.Popen(
            argv, env=unmeasured(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        )
        assert process.stdout is not None
        try:
            url = process.stdout.readline().decode().strip()
            yield RelayServer(
                argv[-1] if proxied else url,
                listening,
                int(url.rpartition(":")[2]),
                folder,
                executor_token,
                harness_token,
            )
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_for_executor(relay: RelayServer) -> None:
    """Wait until an executor has connected, by what the relay logs."""
    for _ in range(400):
        if b'"event":"connect"' in (relay.folder / "relay.log").read_bytes():
            return
        time.sleep(0.05)
    raise TimeoutError("no executor has connected within 20 s")


def _token(store: str, role: Role) -> str:
    argv = [*EXECENV, "relay", "token", "create", "--environment", BOX, "--role", role, "--store", store]
    return subprocess.run(
        argv, env=unmeasured(), stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()


@frozen
class Relay:
    """A relay behind a proxy that both legs go through."""

    server: RelayServer
    proxy: RelayProxy

    @property
    def url(self) -> str:
        """Of the registry."""
        return self.server.url

    def target(self, security: Security = "noise") -> RelayTarget:
        return RelayTarget(self.url, BOX, self.server.harness_token, security=security)

    @property
    def harness_url(self) -> str:
        """Where a harness finds the environment in clear text without asking the registry."""
        return f"ws://127.0.0.1:{self.proxy.port}/rendezvous/{BOX}?role=harness"

    @property
    def clear_target(self) -> WebsocketTarget:
        return WebsocketTarget(self.harness_url, self.server.harness_token)


@asynccontextmanager
async def open_proxied(server: RelayServer) -> AsyncIterator[Relay]:
    assert server.listening is not None
    async with open_relay_proxy(server.listening, server.port) as proxy:
        yield Relay(server, proxy)


@asynccontextmanager
async def open_executor(
    relay: Relay, security: Security = "noise", env: Mapping[str, str] | None = None
) -> AsyncIterator[int]:
    """`execenv serve --remote`, connected, until the block is left; SIGTERM must end it. Its process id.

    Raises:
        RuntimeError: if it ends before that; with what it has logged.
    """
    argv = (*EXECENV, "serve", "--remote", relay.url, "--environment-id", BOX, "--remote-transport", security)
    log = relay.server.folder / "executor.log"
    with log.open("ab") as stderr:
        process = await trio.lowlevel.open_process(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # A home of its own: what codex runs there are login shells, which may do anything in ours.
            env={
                **unmeasured(),
                "HOME": str(relay.server.folder),
                **(env or {}),
                "EXECENV_API_KEY": relay.server.executor_token,
            },
        )
    assert process.stdout is not None
    try:
        line = b""
        while not line.endswith(b"\n"):
            data = await process.stdout.receive_some()
            if not data:
                raise RuntimeError(f"the executor ended: {log.read_text()}")
            line += data
        assert line == f"registered {BOX} at ws://127.0.0.1:{relay.proxy.port}/rendezvous/{BOX}\n".encode()
        yield process.pid
    finally:
        with trio.CancelScope(shield=True):
            with trio.move_on_after(10) as waiting:
                process.terminate()
                await process.wait()
            process.kill()
            await process.wait()
            await process.stdout.aclose()
        assert not waiting.cancelled_caught, "SIGTERM has not ended it"
