"""A TCP proxy that knows where websocket frames begin and end, and does to them what a plan says."""

from __future__ import annotations

import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import trio
from attrs import evolve

from execenv._service import open_nursery
from execenv.errors import UsageError
from execenv.testing.carrier import Carrier, End, Link
from execenv.testing.faults import Direction, FaultPlan, Frame, FrameLog
from execenv.testing.recordings import Recorder, decode
from execenv.transports._frames import mask_in_python

_READ_SIZE = 64 * 1024
_KINDS = {0x8: "close", 0x9: "ping", 0xA: "pong"}
_MAX_HEAD = 64 * 1024
# A refusal may name the upgrade, too (RFC 9110, section 15.5.22); what follows that one is no frame.
_IS_UPGRADE = re.compile(rb"(GET |HTTP/1.1 101 )(.*\r\n)+upgrade:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)


class FrameSplitter:
    """Cuts one direction of a websocket connection into frames: first the HTTP head, then frame by frame.

    What follows a head that asks for no websocket, or is none, is passed on as it comes.
    """

    def __init__(self, log: FrameLog, direction: Direction) -> None:
        self._log = log
        self._direction: Direction = direction
        self._buffer = bytearray()
        self._state = "head"
        self._parts: list[bytes] | None = None  # payloads of a message in several frames

    def feed(self, data: bytes) -> list[tuple[Frame, bytes]]:
        """The frames that `data` completes, each with its bytes."""
        self._buffer += data
        frames = []
        while (found := self._next()) is not None:
            frames.append(found)
        return frames

    def rest(self) -> bytes:
        """What an end has cut off."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _next(self) -> tuple[Frame, bytes] | None:
        if not self._buffer:
            return None
        if self._state == "head":
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0 and len(self._buffer) < _MAX_HEAD:
                return None
            raw = self._take(end + 4 if end >= 0 else len(self._buffer))
            self._state = "frames" if _IS_UPGRADE.match(raw) else "bytes"
            return self._log.frame(self._direction, "http", len(raw)), raw
        if self._state == "bytes":
            raw = self._take(len(self._buffer))
            return self._log.frame(self._direction, "other", len(raw)), raw
        header = self._header()
        if header is None:
            return None
        start, length, key = header
        if len(self._buffer) < start + length:
            return None
        raw = self._take(start + length)
        payload = raw[start:]
        return self._frame(raw, mask_in_python(payload, key) if key else payload), raw

    def _header(self) -> tuple[int, int, bytes] | None:
        """Where the payload begins, how long it is, and the mask; `None` if that is not known yet."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length = buffer[1] & 0x7F
        extra = {126: 2, 127: 8}.get(length, 0)
        start = 2 + extra + (4 if buffer[1] & 0x80 else 0)
        if len(buffer) < start:
            return None
        if extra:
            length = int.from_bytes(buffer[2 : 2 + extra], "big")
        return start, length, bytes(buffer[start - 4 : start]) if buffer[1] & 0x80 else b""

    def _frame(self, raw: bytes, payload: bytes) -> Frame:
        last, opcode = bool(raw[0] & 0x80), raw[0] & 0x0F
        if opcode in _KINDS:
            return self._log.frame(self._direction, _KINDS[opcode], len(raw))  # type: ignore[arg-type]
        if opcode == 0 and self._parts is not None:
            self._parts.append(payload)
            if not last:
                return self._log.frame(self._direction, "part", len(raw))
            payload, self._parts = b"".join(self._parts), None
            frame = self._log.message(self._direction, len(raw), decode(payload))
            return evolve(frame, whole=False)
        if not last:
            self._parts = [payload]
            return self._log.frame(self._direction, "part", len(raw))
        return self._log.message(self._direction, len(raw), decode(payload))


class _SocketEnd(End):
    """One of the two sockets of a connection."""

    in_pieces = True

    def __init__(self, stream: trio.SocketStream, log: FrameLog, sends: Direction) -> None:
        self._socket = stream.socket
        self._stream = stream
        self._splitter = FrameSplitter(log, sends)
        self._log = log
        self._sends: Direction = sends
        self._ready: deque[tuple[Frame, bytes]] = deque()

    async def receive(self) -> tuple[Frame, bytes] | None:
        await trio.lowlevel.checkpoint()
        while not self._ready:
            data = await self._socket.recv(_READ_SIZE)
            if not data:
                rest = self._splitter.rest()
                if not rest:
                    return None
                return self._log.frame(self._sends, "other", len(rest)), rest
            self._ready.extend(self._splitter.feed(data))
        return self._ready.popleft()

    async def send(self, data: bytes, *, part: bool = False, again: bool = False) -> None:
        await self._stream.send_all(data)

    async def flush(self) -> None:
        # Writable is from here on who has nothing left to send. On loopback what is sent has arrived: an
        # abort drops what waits to be sent, and nothing else.
        self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, 1)
        await trio.lowlevel.wait_writable(self._socket)

    def send_end(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def finish(self) -> None:
        self._socket.close()

    def abort(self) -> None:
        _reset(self._socket)

    def discarded(self, data: bytes) -> None:
        pass


_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)  # linux/tcp.h
_NO_LINGER = struct.pack("ii", 1, 0)


def _reset(sock: trio.socket.SocketType) -> None:
    """Close so that the peer sees a reset, and nothing that was not sent yet. Twice does no harm."""
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        sock.close()


class FaultProxy(Carrier):
    """A proxy that listens on loopback. Got from `open_fault_proxy`.

    Attributes:
        port: where it listens.
        url: what to give a client instead of the server's own URL.
        target: host and port of the server; set it to send later connections to another one.
    """

    def __init__(
        self,
        listener: trio.SocketListener,
        target: str | tuple[str, int],
        plan: FaultPlan | None,
        recorder: Recorder | None,
    ) -> None:
        super().__init__(plan, recorder)
        self.port: int = listener.socket.getsockname()[1]
        path = urlsplit(target).path if isinstance(target, str) else ""
        self.url = f"ws://127.0.0.1:{self.port}{path}"
        self.target = host_and_port(target)
        self._listener = listener

    async def _serve(self) -> None:
        await trio.serve_listeners(self._serve_one, [self._listener])

    async def _serve_one(self, client: trio.SocketStream) -> None:
        if not self.plan.admits():
            _reset(client.socket)
            return
        try:
            server = await trio.open_tcp_stream(*self.target)
        except OSError:  # nobody listens there: the client is told so as well as a proxy can
            _reset(client.socket)
            return
        log = self.next_log()
        await self.run_link(
            Link(self, log, _SocketEnd(client, log, "to_server"), _SocketEnd(server, log, "to_client"))
        )


def host_and_port(target: str | tuple[str, int]) -> tuple[str, int]:
    """Of a `ws://` URL, or as given.

    Raises:
        UsageError: for another URL.
    """
    if not isinstance(target, str):
        return target
    parts = urlsplit(target)
    if parts.scheme != "ws" or parts.hostname is None:
        raise UsageError(f"a proxy can look into ws:// only, not into {parts.scheme or target!r}")
    return parts.hostname, parts.port or 80


@asynccontextmanager
async def open_fault_proxy(
    target: str | tuple[str, int], plan: FaultPlan | None = None, *, recorder: Recorder | None = None
) -> AsyncIterator[FaultProxy]:
    """Stand between clients and a websocket server, on a free port of loopback.

    async with open_fault_proxy("ws://127.0.0.1:8765", FaultPlan(seed=7)) as proxy:
        async with execenv.open_environment(proxy.url) as env: ...

    A connection that is refused is accepted and reset at once, since the port must stay ours. Leaving the
    block resets what is open.

    Args:
        target: a `ws://` URL, or host and port.
        plan: what happens to the frames; without one, only what is done by hand.
        recorder: gets every frame that arrives.

    Raises:
        UsageError: if the target is another URL.
    """
    host_and_port(target)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, open_nursery() as nursery:
        proxy = FaultProxy(listener, target, plan, recorder)
        nursery.start_soon(proxy._serve)
        yield proxy
        nursery.cancel_scope.cancel()
