"""A proxy before a relay, for both of its legs: it knows whose connection is whose, and cuts or swallows."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Literal, TypeAlias

import trio
from attrs import define, field, frozen

from execenv.relay import frames
from execenv.relay.frames import Body, InvalidFrame
from execenv.transports._frames import mask_in_python

Leg = Literal["executor", "harness"]
Way = Literal["in", "out"]
Fate = Literal["pass", "cut", "tear", "swallow"]
"""What becomes of a piece: it arrives; the connection is reset instead of it; the same in the middle of it;
or the connection is half open from here on: neither this nor anything else arrives, nor an end."""

_OPERATIONS: dict[str, Leg] = {"register": "executor", "validate": "executor", "connect": "harness"}
_TARGET = re.compile(rb"[A-Z]+ (\S+) HTTP/1\.1\r\n")
_NO_LINGER = struct.pack("ii", 1, 0)


@frozen
class Piece:
    """The head of a request or an answer with what follows it, or a frame of a websocket.

    Attributes:
        operation: of the registry, or `socket`.
        way: `in` to the relay, `out` of it.
        index: which piece of its connection and way, from 0, the head.
        payload: of a frame unmasked.
    """

    leg: Leg
    operation: str
    way: Way
    index: int
    payload: bytes = field(repr=False)

    @property
    def body(self) -> Body | None:
        """What a frame of a relay says; `None` for all else."""
        if self.operation != "socket" or not self.index:
            return None
        try:
            return frames.decode(self.payload).body
        except InvalidFrame:
            return None


Watch: TypeAlias = Callable[[Piece], Fate]


def pass_all(piece: Piece) -> Fate:
    return "pass"


class _Splitter:
    """One way of a connection, as pieces: each with its bytes as they travel, and its payload."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.websocket = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        self._buffer += data
        while found := self._next():
            yield found

    def _next(self) -> tuple[bytes, bytes] | None:
        buffer = self._buffer
        if not self.websocket:
            end = buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return None
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", buffer[:end])
            end += int(length[1]) if length else 0
            if len(buffer) < end:
                return None
            raw = self._take(end)
            self.websocket = b"upgrade: websocket" in raw.lower()
            return raw, raw
        if len(buffer) < 2:
            return None
        start, length_ = 2, buffer[1] & 0x7F
        extra = {126: 2, 127: 8}.get(length_, 0)
        masked = buffer[1] & 0x80
        start += extra + (4 if masked else 0)
        if len(buffer) < start:
            return None
        if extra:
            length_ = int.from_bytes(buffer[2 : 2 + extra], "big")
        if len(buffer) < start + length_:
            return None
        raw = self._take(start + length_)
        payload = raw[start:]
        return raw, mask_in_python(payload, raw[start - 4 : start]) if masked else payload

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


@define(eq=False)
class Connection:
    """One of a client to the relay.

    Attributes:
        upgraded: whether it is a websocket that the relay has accepted.
    """

    client: trio.SocketStream
    server: trio.SocketStream
    leg: Leg = "harness"
    operation: str = ""
    upgraded: bool = False
    swallows: bool = False

    def reset(self) -> None:
        _reset(self.client)
        _reset(self.server)


def _reset(stream: trio.SocketStream) -> None:
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        stream.socket.close()


@define(eq=False)
class RelayProxy:
    """See `open_relay_proxy`.

    Attributes:
        port, target: of the proxy, and of the relay.
        watch: asked about every piece before it is passed on.
        recorded: all that has passed, while it is a list.
        sockets: how many websockets of each leg the relay has accepted.
    """

    port: int
    target: int
    watch: Watch = pass_all
    recorded: list[Piece] | None = None
    sockets: dict[Leg, int] = field(factory=lambda: dict[Leg, int](executor=0, harness=0))
    connections: set[Connection] = field(factory=set)
    _changed: trio.Event = field(factory=trio.Event)

    def open_sockets(self, leg: Leg) -> list[Connection]:
        return [one for one in self.connections if one.leg == leg and one.upgraded and not one.swallows]

    def cut(self, leg: Leg) -> None:
        """Reset all websockets of a leg, of which there are some."""
        found = self.open_sockets(leg)
        assert found, f"no websocket of the {leg} is open"
        for one in found:
            one.reset()
            self.connections.discard(one)

    def swallow(self, leg: Leg) -> None:
        """Let nothing more through the websockets that a leg has now, without an end of them."""
        found = self.open_sockets(leg)
        assert found, f"no websocket of the {leg} is open"
        for one in found:
            one.swallows = True

    def cut_client(self, leg: Leg) -> None:
        """Reset the client's side of the websockets of a leg; the relay hears nothing of it."""
        found = self.open_sockets(leg)
        self.swallow(leg)
        for one in found:
            _reset(one.client)

    async def wait_sockets(self, leg: Leg, count: int) -> None:
        """Wait until so many websockets of a leg were accepted since the beginning."""
        while self.sockets[leg] < count:
            await self._changed.wait()

    async def serve(self, client: trio.SocketStream) -> None:
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            _reset(client)
            return
        connection = Connection(client, server)
        self.connections.add(connection)
        try:
            async with trio.open_nursery() as nursery:
                ended = trio.Event()
                nursery.start_soon(self._pump, connection, "in", client, server, ended)
                nursery.start_soon(self._pump, connection, "out", server, client, ended)
                await ended.wait()
        finally:
            self.connections.discard(connection)
            client.socket.close()
            server.socket.close()

    async def _pump(
        self,
        connection: Connection,
        way: Way,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        ended: trio.Event,
    ) -> None:
        splitter = _Splitter()
        index = 0
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            while data := await source.receive_some(64 * 1024):
                for raw, payload in splitter.feed(data):
                    if not index and way == "in":
                        _identify(connection, raw)
                    piece = Piece(connection.leg, connection.operation, way, index, payload)
                    index += 1
                    if not await self._pass_on(connection, piece, raw, sink):
                        return
        if connection.swallows:
            await trio.sleep_forever()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            await sink.send_eof()
        ended.set()

    async def _pass_on(
        self, connection: Connection, piece: Piece, raw: bytes, sink: trio.SocketStream
    ) -> bool:
        fate: Fate = "swallow" if connection.swallows else self.watch(piece)
        if fate == "pass":
            if self.recorded is not None:
                self.recorded.append(piece)
            await sink.send_all(raw)
            if piece.way == "out" and not piece.index and raw.startswith(b"HTTP/1.1 101 "):
                connection.upgraded = True
                self.sockets[connection.leg] += 1
                self._changed.set()
                self._changed = trio.Event()
            return True
        if fate == "swallow":
            connection.swallows = True
            return True
        if fate == "tear":
            await sink.send_all(raw[: len(raw) // 2])
        connection.reset()
        return False


def _identify(connection: Connection, head: bytes) -> None:
    found = _TARGET.match(head)
    path, _, query = found[1].decode().partition("?") if found else ("", "", "")
    if path.startswith("/rendezvous/"):
        connection.operation = "socket"
        connection.leg = "executor" if "role=executor" in query else "harness"
    else:
        connection.operation = path.rpartition("/")[2]
        connection.leg = _OPERATIONS.get(connection.operation, "harness")


@asynccontextmanager
async def open_relay_proxy(listening: socket.socket, target: int) -> AsyncIterator[RelayProxy]:
    """Serve a port of loopback for a relay that listens on the port `target`, until the block is left.

    The socket stays open then, and may be served again.
    """
    port = listening.getsockname()[1]
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening.dup()))
    proxy = RelayProxy(port, target)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
        yield proxy
        nursery.cancel_scope.cancel()
