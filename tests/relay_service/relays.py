"""A relay on a real port, and plain clients of it."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import trio
from attrs import define, field, frozen

from execenv.relay import frames
from execenv.relay.frames import Body, Data, Frame
from execenv.relay.keys import PublicKey
from execenv.relay.registry import NOISE_PROFILE
from execenv.relay_service import Settings, serve_relay, tokens
from execenv.relay_service.exchange import Exchange
from execenv.relay_service.exchange_local import LocalExchange
from execenv.relay_service.redis import open_redis
from execenv.relay_service.sqlite import open_sqlite
from execenv.relay_service.store import Role, Store
from execenv.transports import websocket
from execenv.transports.websocket import WebsocketChannel

NOW = 1_800_000_000.0
BOX = "box"


@define
class Clock:
    """Seconds since the epoch, as a test has them."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


def new_key() -> PublicKey:
    return PublicKey(os.urandom(32), os.urandom(1184))


def noise_body(key: PublicKey) -> dict[str, Any]:
    return {"security_profile": NOISE_PROFILE, "executor_public_key": key.to_json()}


async def new_token(
    store: Store, role: Role, environment_id: str = BOX, *, now: float = NOW, expires: float | None = None
) -> str:
    token, record = tokens.make_token(environment_id, role, "test", now=now, expires=expires)
    await store.add_token(record)
    return token


@frozen
class Reply:
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


async def ask(port: int, data: bytes) -> Reply:
    """What is answered to these bytes, up to the end of the connection."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(data)
        return await read_reply(stream)


async def read_reply(stream: trio.abc.ReceiveStream) -> Reply:
    received = b""
    while piece := await stream.receive_some():
        received += piece
    top, _, body = received.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Reply(int(status.split()[1]), headers, body)


def head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "host: relay", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


UPGRADE = {
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@define(eq=False)
class Client:
    """One end of a relay: a websocket, and what has arrived on it."""

    channel: WebsocketChannel
    send_arrived: trio.MemorySendChannel[bytes]
    arrived: trio.MemoryReceiveChannel[bytes]
    ended: trio.Event = field(factory=trio.Event)

    async def run(self) -> None:
        await self.channel.run(self.send_arrived.send_nowait)
        self.send_arrived.close()
        self.ended.set()

    def send(self, stream_id: str, body: Body) -> bytes:
        frame = frames.encode(Frame(stream_id, body))
        self.channel.send_nowait(frame)
        return frame

    async def receive(self) -> Frame:
        return frames.decode(await self.arrived.receive())

    async def end(self) -> int | None:
        """Wait for the end; the close code."""
        await self.ended.wait()
        return self.channel.close_code


@define(eq=False)
class Relay:
    """A relay that runs, and what it was made of."""

    ports: list[int]
    store: Store
    exchange: Exchange
    clock: Clock
    nursery: trio.Nursery
    stop: trio.CancelScope
    stopped: trio.Event

    @property
    def port(self) -> int:
        """Of the node that executors are at. Harnesses are at the last one."""
        return self.ports[0]

    async def request(
        self,
        operation: str,
        token: str | None,
        body: object = None,
        *,
        environment_id: str = BOX,
    ) -> Reply:
        data = b"" if body is None else orjson.dumps(body)
        given = {"authorization": f"Bearer {token}"} if token is not None else {}
        given |= {"content-length": str(len(data))}
        port = self.ports[-1 if operation == "connect" else 0]
        return await ask(port, head("POST", f"/cloud/environment/{environment_id}/{operation}", given) + data)

    async def get(self, target: str, headers: Mapping[str, str] | None = None) -> Reply:
        return await ask(self.port, head("GET", target, headers or {}))

    async def metrics(self) -> Counter[str]:
        """Those of all nodes together."""
        total: Counter[str] = Counter()
        for port in self.ports:
            lines = (await ask(port, head("GET", "/metrics", {}))).body.decode().splitlines()
            for line in lines:
                if not line.startswith("#"):
                    name, _, value = line.removeprefix("execenv_relay_").rpartition(" ")
                    total[name] += int(value)
        return total

    async def wait_metric(self, name: str, value: int) -> None:
        """Wait until a counter has come to a value."""
        while (await self.metrics())[name] != value:  # noqa: ASYNC110 - there is nothing to be told by
            await trio.sleep(0.01)

    async def wait_offline(self, environment_id: str = BOX) -> None:
        while await self.exchange.presence(environment_id):  # noqa: ASYNC110
            await trio.sleep(0.01)

    async def open(self, url: str, headers: websocket.Headers = ()) -> Client:
        channel = await websocket.connect(url, headers=headers, max_message=1 << 30, binary=True)
        client = Client(channel, *trio.open_memory_channel[bytes](1 << 30))
        self.nursery.start_soon(client.run)
        return client

    async def executor(self, key: PublicKey | None = None, environment_id: str = BOX) -> Client:
        """An executor that is connected: with Noise if it has a key."""
        token = await new_token(self.store, "executor", environment_id)
        body = None if key is None else noise_body(key)
        reply = await self.request("register", token, body, environment_id=environment_id)
        assert reply.status == 200, reply
        return await self.open(reply.json["url"])

    async def bundle(self, token: str, key: PublicKey | None = None, environment_id: str = BOX) -> Any:
        body = {} if key is None else {"harness_public_key": key.to_json()}
        reply = await self.request("connect", token, body, environment_id=environment_id)
        assert reply.status == 200, reply
        return reply.json

    async def harness(
        self, token: str | None = None, key: PublicKey | None = None, environment_id: str = BOX
    ) -> Client:
        """A harness that is connected, each as another principal if no token is given."""
        token = token or await new_token(self.store, "harness", environment_id)
        return await self.open((await self.bundle(token, key, environment_id))["url"])


@asynccontextmanager
async def open_relay(folder: Path, redis_url: str | None = None, **limits: Any) -> AsyncIterator[Relay]:
    """A relay on loopback with a store of its own; two nodes of one, if there is a Redis for them."""
    clock, stop = Clock(), trio.CancelScope()
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            nodes: list[tuple[Store, Exchange]] = []
            if redis_url is None:
                store = await stack.enter_async_context(open_sqlite(str(folder / "relay.sqlite3")))
                nodes = [(store, LocalExchange())]
            else:
                states = [open_redis(redis_url, node_id=name) for name in ("a", "b")]
                nodes = [await stack.enter_async_context(state) for state in states]
            socks = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in nodes]
            ports = [sock.getsockname()[1] for sock in socks]
            nursery = await stack.enter_async_context(trio.open_nursery())
            stopped = trio.Event()

            async def run() -> None:
                with stop:
                    async with trio.open_nursery() as serving:
                        for sock, port, (store, exchange) in zip(socks, ports, nodes, strict=True):
                            settings = Settings(f"http://127.0.0.1:{port}", **limits)
                            serve = partial(serve_relay, store=store, exchange=exchange, settings=settings)
                            serving.start_soon(partial(serve, sock, clock=clock))
                stopped.set()

            nursery.start_soon(run)
            yield Relay(ports, *nodes[0], clock, nursery, stop, stopped)
            nursery.cancel_scope.cancel()


def data_frames(stream_id: str, size: int, count: int) -> Iterator[bytes]:
    """`count` frames with `size` bytes of payload each."""
    for seq in range(count):
        yield frames.encode(Frame(stream_id, Data(seq, bytes([seq % 256]) * size)))
