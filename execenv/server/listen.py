"""Connections in: the HTTP front door of a websocket listener, and stdio (protocol.md §1).

Every request is answered by these rules, in this order: no `Origin` (a browser is asking), `/readyz`,
nothing but `/`, GET only, the bearer token if one is wanted, a websocket upgrade.
"""

from __future__ import annotations

import re
from logging import getLogger

import trio
from attrs import field, frozen

from execenv.errors import ConnectFailed
from execenv.server.auth import Authenticator, Unauthorized
from execenv.server.connection import ServerConnection
from execenv.server.sessions import Sessions
from execenv.transports.channel import DEFAULT_MAX_MESSAGE, Channel

logger = getLogger(__name__)

HEAD_DEADLINE = 10.0  # seconds for a client to say what it wants
MAX_HEAD = 64 * 1024


@frozen
class Head:
    """The head of an HTTP request, and the bytes that it and what followed it came in."""

    method: str
    path: str
    headers: dict[str, bytes]
    raw: bytes
    leftover: bytes


@frozen
class Refusal:
    """An answer that is no upgrade."""

    status: int
    body: str = ""
    headers: dict[str, str] = field(factory=dict)


def route(head: Head, auth: Authenticator | None) -> Refusal | None:
    """What to answer instead of an upgrade; `None` if the upgrade may go ahead. Pure."""
    headers = head.headers
    if "origin" in headers:
        return Refusal(403)
    if head.path == "/readyz":
        if head.method in ("GET", "HEAD"):
            return Refusal(200)
        return Refusal(405, headers={"allow": "GET,HEAD"})
    if head.path != "/":
        return Refusal(404)
    if head.method != "GET":
        return Refusal(405, "Request method must be `GET`")
    if auth is not None:
        try:
            auth.check_header(headers.get("authorization"))
        except Unauthorized as refused:
            return Refusal(401, str(refused))
    if "upgrade" not in _tokens(headers, "connection"):
        return Refusal(400, "Connection header did not include 'upgrade'")
    if "websocket" not in _tokens(headers, "upgrade"):
        return Refusal(400, "`Upgrade` header did not include 'websocket'")
    if headers.get("sec-websocket-version") != b"13":
        return Refusal(400, "`Sec-WebSocket-Version` header did not include '13'")
    if "sec-websocket-key" not in headers:
        return Refusal(400, "`Sec-WebSocket-Key` header missing")
    return None


def _tokens(headers: dict[str, bytes], name: str) -> set[str]:
    return {token.strip().lower() for token in headers.get(name, b"").decode("latin-1").split(",")}


async def read_head(stream: trio.abc.ReceiveStream) -> Head | None:
    """The head of the one request that a connection may make; `None` if that is no HTTP or is cut off."""
    import h11

    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    data = b""
    while True:
        piece = bytes(await stream.receive_some(MAX_HEAD))
        if not piece:
            return None
        data += piece
        try:
            parser.receive_data(piece)
            event = parser.next_event()
        except h11.RemoteProtocolError:
            return None
        if isinstance(event, h11.Request):
            leftover = bytes(parser.trailing_data[0])
            end = len(data) - len(leftover)
            headers: dict[str, bytes] = {}
            for name, value in event.headers:
                key = name.decode()
                headers[key] = headers[key] + b"," + value if key in headers else value
            return Head(event.method.decode(), _path(event.target), headers, data[:end], leftover)
        if b"\n" not in data and not _METHOD_START.match(data):
            return None  # no HTTP, and no need to wait for more of it


_METHOD_START = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+( |$)")


def _path(target: bytes) -> str:
    """The path of a request target, which may be an absolute URL (RFC 9112, section 3.2.2)."""
    text = target.decode("latin-1")
    if "://" in text.partition("?")[0]:
        text = "/" + text.partition("://")[2].partition("/")[2]
    return text.partition("?")[0]


async def send_refusal(stream: trio.abc.SendStream, refusal: Refusal, method: str = "GET") -> None:
    """Answer and say that the connection ends."""
    import http

    body = refusal.body.encode()
    lines = [f"HTTP/1.1 {refusal.status} {http.HTTPStatus(refusal.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in refusal.headers.items()]
    if body:
        lines.append("content-type: text/plain; charset=utf-8")
    lines += [f"content-length: {len(body)}", "connection: close", "", ""]
    await stream.send_all("\r\n".join(lines).encode() + (b"" if method == "HEAD" else body))


class Listener:
    """Serves websockets on sockets that listen already.

    Args:
        auth: what a client has to show; `None` lets everybody in who can reach the socket.
        max_message: the largest message taken, in bytes.
        ping_interval, pong_timeout: see `WebsocketChannel`.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        auth: Authenticator | None = None,
        max_message: int = DEFAULT_MAX_MESSAGE,
        ping_interval: float = 30.0,
        pong_timeout: float = 60.0,
    ) -> None:
        self._sessions = sessions
        self._auth = auth
        self._max_message = max_message
        self._ping_interval = ping_interval
        self._pong_timeout = pong_timeout

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Accept connections until cancelled."""
        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(self._serve_one, listeners, handler_nursery=nursery)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                channel = await self._open(stream)
                if channel is not None:
                    await ServerConnection(channel, self._sessions, detachable=True).run()
            except (ConnectFailed, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                logger.debug("a connection ended early: %s", error)
            except Exception:
                logger.exception("a connection ended with an error")

    async def _open(self, stream: trio.SocketStream) -> Channel | None:
        from execenv.transports import websocket

        with trio.move_on_after(HEAD_DEADLINE):
            head = await read_head(stream)
            if head is None:
                await send_refusal(stream, Refusal(400))
                return None
            refusal = route(head, self._auth)
            if refusal is not None:
                await send_refusal(stream, refusal, head.method)
                return None
            return await websocket.accept(
                stream,
                head.raw,
                head.leftover,
                f"websocket {_address(stream)}",
                max_message=self._max_message,
                ping_interval=self._ping_interval,
                pong_timeout=self._pong_timeout,
            )
        return None


def _address(stream: trio.SocketStream) -> str:
    peer = stream.socket.getpeername()
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"


async def serve_channel(channel: Channel, sessions: Sessions) -> None:
    """Serve one connection whose session ends with it: stdio, or memory."""
    await ServerConnection(channel, sessions, detachable=False).run()
