"""An HTTP/1.1 origin on loopback, for tests: h11 over Trio, in the nursery of the test.

Beside well-behaved paths it has broken ones, and paths that the test drives: what `/held` answers is sent by
`Origin.send_held`, and `Origin.left` counts the clients that went away before their answer was complete.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import h11
import trio
import trustme
from attrs import define, field, frozen

from execenv._service import open_nursery

Headers = list[tuple[bytes, bytes]]

PIECE = bytes(range(256)) * 256  # 64 KiB
GZIPPED = gzip.compress(b"zipped text", mtime=0)


@frozen
class Received:
    """A request as it arrived. Header names as they were sent, in the order of arrival."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


@define(eq=False)
class Origin:
    """A running origin.

    Attributes:
        received: every request, in the order of arrival.
        connections: how many connections were accepted.
        left: how many answers were given up because the client went away.
        sent: bytes of bodies that the client's side has taken.
    """

    scheme: str
    port: int
    received: list[Received] = field(factory=list)
    connections: int = 0
    left: int = 0
    sent: int = 0
    _changed: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot)
    _held: tuple[trio.MemorySendChannel[bytes], trio.MemoryReceiveChannel[bytes]] = field(
        factory=lambda: trio.open_memory_channel[bytes](math.inf)
    )

    def url(self, path: str = "/", host: str = "127.0.0.1", scheme: str | None = None) -> str:
        return f"{scheme or self.scheme}://{host}:{self.port}{path}"

    def send_held(self, data: bytes) -> None:
        """Have the next of `/held` send a piece; `b""` ends its body."""
        self._held[0].send_nowait(data)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.park()

    def note(self) -> None:
        self._changed.unpark_all()

    async def next_held(self) -> bytes:
        return await self._held[1].receive()


@define(eq=False)
class Exchange:
    """One request and the connection to answer it on."""

    origin: Origin
    request: Received
    stream: trio.abc.Stream
    machine: h11.Connection

    async def send(self, *events: Any) -> None:
        data = b"".join(self.machine.send(event) or b"" for event in events)
        await self.stream.send_all(data)

    async def answer(self, status: int, headers: Headers, body: bytes = b"") -> None:
        bodiless = self.request.method == "HEAD" or status in (204, 304)
        length = [] if status in (204, 304) else [(b"Content-Length", b"%d" % len(body))]
        events: list[Any] = [h11.Response(status_code=status, headers=headers + length)]
        if body and not bodiless:
            events.append(h11.Data(data=body))
        await self.send(*events, h11.EndOfMessage())

    async def until_left(self) -> None:
        """Return when the client goes away."""
        with suppress(trio.BrokenResourceError):
            while await self.stream.receive_some():
                pass
        raise trio.BrokenResourceError("the client went away")

    @property
    def last_word(self) -> str:
        return urlsplit(self.request.target).path.rpartition("/")[2]

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.request.target).query).items()}


async def echo(exchange: Exchange) -> None:
    request = exchange.request
    text = json.dumps(
        {
            "method": request.method,
            "target": request.target,
            "headers": request.headers,
            "body": request.body.decode("latin-1"),
        }
    )
    await exchange.answer(200, [(b"Content-Type", b"application/json")], text.encode())


async def headers(exchange: Exchange) -> None:
    found = [(b"X-A", b"1"), (b"X-B", b"between"), (b"X-A", b"2"), (b"X-Bytes", b"\xe9"), (b"X-Empty", b"")]
    await exchange.answer(200, found, b"ok")


async def status(exchange: Exchange) -> None:
    await exchange.answer(int(exchange.last_word), [(b"X-Status", b"yes")], b"text")


async def zipped(exchange: Exchange) -> None:
    await exchange.answer(200, [(b"Content-Encoding", b"gzip")], GZIPPED)


async def redirect(exchange: Exchange) -> None:
    """`/redirect/302?to=/echo`"""
    code = int(exchange.last_word)
    location = exchange.query.get("to")
    found = [] if location is None else [(b"Location", unquote(location).encode("latin-1"))]
    await exchange.answer(code, found, b"moved")


async def redirects(exchange: Exchange) -> None:
    """`/redirects/3` leads to `/echo` after three redirects."""
    left = int(exchange.last_word)
    await exchange.answer(302, [(b"Location", b"/redirects/%d" % (left - 1) if left > 1 else b"/echo")])


async def some_bytes(exchange: Exchange) -> None:
    """`/bytes/1000`: so many bytes of a known length."""
    left = int(exchange.last_word)
    await exchange.send(h11.Response(status_code=200, headers=[("Content-Length", str(left))]))
    while left:
        piece = PIECE[:left]
        await exchange.send(h11.Data(data=piece))
        left -= len(piece)
        exchange.origin.sent += len(piece)
        exchange.origin.note()
    await exchange.send(h11.EndOfMessage())


async def chunked(exchange: Exchange) -> None:
    await exchange.send(h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")]))
    for number in range(3):
        await exchange.send(h11.Data(data=b"chunk%d" % number))
    await exchange.send(h11.EndOfMessage())


async def held(exchange: Exchange) -> None:
    """Headers at once, then the pieces that the test sends."""
    await exchange.send(h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange.until_left)
        while piece := await exchange.origin.next_held():
            await exchange.send(h11.Data(data=piece))
        await exchange.send(h11.EndOfMessage())
        nursery.cancel_scope.cancel()
    raise trio.BrokenResourceError("the watcher may have eaten the next request")


async def silent(exchange: Exchange) -> None:
    """No answer."""
    await exchange.until_left()


async def half(exchange: Exchange) -> None:
    """5 of 10 bytes, and no more."""
    await exchange.send(
        h11.Response(status_code=200, headers=[("Content-Length", "10")]), h11.Data(data=b"12345")
    )
    await exchange.until_left()


async def cut(exchange: Exchange) -> None:
    """5 of 10 bytes, and the end of the connection."""
    await exchange.send(
        h11.Response(status_code=200, headers=[("Content-Length", "10")]), h11.Data(data=b"12345")
    )
    raise trio.BrokenResourceError


async def cut_chunked(exchange: Exchange) -> None:
    await exchange.stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n")
    raise trio.BrokenResourceError


async def until_close(exchange: Exchange) -> None:
    """A body that ends with the connection."""
    await exchange.stream.send_all(b"HTTP/1.0 200 OK\r\n\r\nto the end")
    raise trio.BrokenResourceError


async def garbage(exchange: Exchange) -> None:
    await exchange.stream.send_all(b"SSH-2.0-nothing\r\n\r\n")
    raise trio.BrokenResourceError


async def hang_up(exchange: Exchange) -> None:
    """The end of the connection, and no answer."""
    await trio.lowlevel.checkpoint()
    raise trio.BrokenResourceError


Handler = Callable[[Exchange], Awaitable[None]]

PATHS: dict[str, Handler] = {
    "/echo": echo,
    "/headers": headers,
    "/status/": status,
    "/gzip": zipped,
    "/redirect/": redirect,
    "/redirects/": redirects,
    "/bytes/": some_bytes,
    "/chunked": chunked,
    "/held": held,
    "/silent": silent,
    "/half": half,
    "/cut": cut,
    "/cut-chunked": cut_chunked,
    "/until-close": until_close,
    "/garbage": garbage,
    "/hang-up": hang_up,
}


def _handler(target: str) -> Handler | None:
    # As a proxy it is asked for whole URLs.
    path = urlsplit(target).path if target.startswith("http") else target.partition("?")[0]
    return PATHS.get(path) or PATHS.get(re.sub(r"[^/]*$", "", path))


async def _receive(machine: h11.Connection, stream: trio.abc.Stream) -> Received | None:
    request: h11.Request | None = None
    body = b""
    while True:
        event = machine.next_event()
        if event is h11.NEED_DATA:
            machine.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            found = tuple(
                (name.decode(), value.decode("latin-1")) for name, value in request.headers.raw_items()
            )
            return Received(request.method.decode(), request.target.decode(), found, body)
        else:
            return None


async def _serve_connection(origin: Origin, stream: trio.abc.Stream) -> None:
    origin.connections += 1
    async with stream:
        machine = h11.Connection(h11.SERVER)
        while True:
            request = None
            with suppress(h11.RemoteProtocolError, trio.BrokenResourceError):
                request = await _receive(machine, stream)
            if request is None:
                return
            origin.received.append(request)
            origin.note()
            exchange = Exchange(origin, request, stream, machine)
            if request.method == "CONNECT":
                await _tunnel(exchange)
                return
            handler = _handler(request.target)
            try:
                await (handler(exchange) if handler else exchange.answer(404, [], b"no such path"))
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                machine.send_failed()
                origin.left += 1
                origin.note()
            if machine.our_state is not h11.DONE:
                return
            machine.start_next_cycle()


async def _tunnel(exchange: Exchange) -> None:
    host, _, port = exchange.request.target.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as there, trio.open_nursery() as nursery:
        await exchange.send(h11.Response(status_code=200, headers=[]))

        async def pass_on(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for data in source:
                    await sink.send_all(data)
            nursery.cancel_scope.cancel()

        nursery.start_soon(pass_on, there, exchange.stream)
        nursery.start_soon(pass_on, exchange.stream, there)


@asynccontextmanager
async def open_origin(tls: trustme.CA | None = None) -> AsyncIterator[Origin]:
    """An origin on a free port of 127.0.0.1; with `tls`, of a certificate for 127.0.0.1 and localhost."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    origin = Origin("http" if tls is None else "https", listener.socket.getsockname()[1])
    listeners: list[trio.abc.Listener[trio.abc.Stream]] = [listener]
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        listeners = [trio.SSLListener(listener, context, https_compatible=True)]
    async with open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, partial(_serve_connection, origin), listeners))
        yield origin
        nursery.cancel_scope.cancel()
