"""The HTTP front door of whatever accepts websockets: the one request of a connection, and its refusal."""

from __future__ import annotations

import re

import trio
from attrs import field, frozen

HEAD_DEADLINE = 10.0  # seconds for a client to say what it wants
MAX_HEAD = 64 * 1024


@frozen
class Head:
    """The head of an HTTP request, and the bytes that it and what followed it came in."""

    method: str
    path: str
    query: str
    headers: dict[str, bytes]
    raw: bytes
    leftover: bytes


@frozen
class Refusal:
    """An answer that is no upgrade."""

    status: int
    body: str = ""
    headers: dict[str, str] = field(factory=dict)


def not_an_upgrade(head: Head) -> Refusal | None:
    """What is wrong with a request as the beginning of a websocket; `None` if nothing is. Pure."""
    headers = head.headers
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
            return Head(event.method.decode(), *_target(event.target), headers, data[:end], leftover)
        if b"\n" not in data and not _METHOD_START.match(data):
            return None  # no HTTP, and no need to wait for more of it


_METHOD_START = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+( |$)")


def _target(target: bytes) -> tuple[str, str]:
    """Path and query of a request target, which may be an absolute URL (RFC 9112, section 3.2.2)."""
    text = target.decode("latin-1")
    if not text.startswith("/") and "://" in text.partition("?")[0]:
        text = "/" + text.partition("://")[2].partition("/")[2]
    path, _, query = text.partition("?")
    return path, query


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


def peer_address(stream: trio.SocketStream) -> str:
    """Who is at the other end, as `IP:PORT`."""
    peer = stream.socket.getpeername()
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
