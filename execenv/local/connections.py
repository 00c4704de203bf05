"""Connections to HTTP servers in httpcore2's pool.

The pool is httpcore2's; the connections in it are not. Theirs give up a body when one wait for a piece of it
is cancelled, and a small request costs them half as much again.

Imported with httpcore2, at the first request.
"""

from __future__ import annotations

import base64
import os
import select
import ssl

import h11
import httpcore2
import trio

from execenv.local.urls import HttpUrl

READ_SIZE = 64 * 1024
MAX_HEAD = 100 * 1024
KEPT_CONNECTIONS = 100
KEPT_SECONDS = 90.0
CLOSE_SECONDS = 1.0
EVENTS_A_TURN = 16  # of what was read at once, about half a millisecond; then others get a turn
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))


class Pool(httpcore2.AsyncConnectionPool):
    """Connections for URLs of one scheme, all through one proxy or all without.

    Args:
        tls: for `https` URLs.
        proxy_tls: for a proxy that is spoken to with TLS itself.
    """

    def __init__(
        self, proxy: HttpUrl | None, tls: ssl.SSLContext | None, proxy_tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(
            max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS, keepalive_expiry=KEPT_SECONDS
        )
        self._via = proxy
        self._tls = tls
        self._proxy_tls = proxy_tls

    def create_connection(self, origin: httpcore2.Origin) -> httpcore2.AsyncConnectionInterface:
        return _Connection(origin, self._via, self._tls, self._proxy_tls)


class Body:
    """The body of a response; it is in the extensions of one, under `"body"`."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._ended = False
        self._closed = False

    async def receive(self) -> bytes:
        """The next piece, `b""` at the end. May be cancelled, and called again.

        Raises:
            httpcore2.NetworkError, httpcore2.ProtocolError: if it breaks off.
        """
        if self._ended:
            await trio.lowlevel.checkpoint()
            return b""
        event = await self._connection.next_event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self._ended = True
        return b""

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._connection.finish()

    # What the pool makes sure of; nobody reads it so.

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.receive()
        if not piece:
            raise StopAsyncIteration
        return piece


class _Connection(httpcore2.AsyncConnectionInterface):
    """One request at a time, as it is asked for by the pool."""

    def __init__(
        self,
        origin: httpcore2.Origin,
        proxy: HttpUrl | None,
        tls: ssl.SSLContext | None,
        proxy_tls: ssl.SSLContext | None,
    ) -> None:
        self._origin = origin
        self._proxy = proxy
        self._tls = tls
        self._proxy_tls = proxy_tls
        self._stream: trio.abc.Stream | None = None
        self._fd = -1
        self._is_plain = True
        self._machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._busy = False
        self._answered = False  # something of the response has come
        self._events = 0  # since others last had a turn
        self._closed = False
        self._expiry = 0.0

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        if self._busy or self._closed:
            raise httpcore2.ConnectionNotAvailable
        self._busy = True
        used_before = self._stream is not None
        self._answered = False
        try:
            if not used_before:
                await self._connect()
            headers = request.headers
            if self._proxy is not None and self._tls is None:
                headers = [*headers, *_proxy_headers(self._proxy)]
            await self._send(request.method, request.url.target, headers, request.extensions.get("body", b""))
            response = await self._response_head()
        except BaseException as error:
            await self.aclose()
            stale = isinstance(error, httpcore2.ReadError | httpcore2.RemoteProtocolError) and used_before
            if stale and not self._answered and request.method in IDEMPOTENT:
                # The server ended the connection while the request was on its way; the pool tries another.
                raise httpcore2.ConnectionNotAvailable from error
            raise
        body = Body(self)
        return httpcore2.Response(
            response.status_code,
            headers=response.headers.raw_items(),
            content=body,
            extensions={"body": body},
        )

    # Connecting.

    async def _connect(self) -> None:
        server = self._proxy
        host, port = (self._origin.host.decode(), self._origin.port)
        try:
            if server is None:
                await self._open(host, port, self._tls)
                return
            await self._open(server.host, server.port, self._proxy_tls)
            if self._tls is not None:
                await self._tunnel(host, port)
                await self._start_tls(host, self._tls)
        except (OSError, ValueError, trio.BrokenResourceError) as error:  # ValueError: no name for a host
            raise httpcore2.ConnectError(str(error)) from error

    async def _open(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        stream = await trio.open_tcp_stream(host, port)  # with TCP_NODELAY
        self._stream = stream
        self._fd = stream.socket.fileno()
        if tls is not None:
            await self._start_tls(host, tls)

    async def _start_tls(self, host: str, tls: ssl.SSLContext) -> None:
        assert self._stream is not None
        stream = trio.SSLStream(self._stream, tls, server_hostname=host, https_compatible=True)
        self._stream = stream
        self._is_plain = False
        await stream.do_handshake()

    async def _tunnel(self, host: str, port: int) -> None:
        assert self._proxy is not None
        target = b"%b:%d" % ((f"[{host}]" if ":" in host else host).encode(), port)
        await self._send(b"CONNECT", target, [(b"host", target), *_proxy_headers(self._proxy)], b"")
        status = (await self._response_head()).status_code
        if not 200 <= status < 300:
            raise httpcore2.ProxyError(f"the proxy answered {status}")
        self._machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)

    # Sending and receiving.

    async def _send(
        self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> None:
        machine = self._machine
        events: list[h11.Request | h11.Data | h11.EndOfMessage] = []
        try:
            events.append(h11.Request(method=method, target=target, headers=headers))
            if body:
                events.append(h11.Data(data=body))
            events.append(h11.EndOfMessage())
            buffers = [data for event in events for data in machine.send_with_data_passthrough(event) or ()]
        except h11.LocalProtocolError as error:
            raise httpcore2.LocalProtocolError(str(error)) from error
        if len(body) < READ_SIZE:
            buffers = [b"".join(buffers)]
        try:
            for data in buffers:
                await self._write(data)
        except httpcore2.WriteError:
            pass  # a server may answer without having read all; if it has not, reading says so

    async def _write(self, data: bytes) -> None:
        assert self._stream is not None
        try:
            if not self._is_plain:
                await self._stream.send_all(data)
                return
            view = memoryview(data)
            while view:  # the answer is waited for anyway, so no turn is given to others here
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._fd)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore2.WriteError(str(error)) from error

    async def _response_head(self) -> h11.Response | h11.InformationalResponse:
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response):
                return event
            assert isinstance(event, h11.InformationalResponse)
            if event.status_code == 101:
                return event  # what follows is not HTTP, and nobody's business

    async def next_event(self) -> object:
        """What comes next of the response."""
        machine = self._machine
        self._events += 1
        if self._events > EVENTS_A_TURN:
            self._events = 0
            await trio.lowlevel.checkpoint()
        try:
            while (event := machine.next_event()) is h11.NEED_DATA:
                data = await self._read()
                self._events = 0
                self._answered = self._answered or bool(data)
                machine.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise httpcore2.RemoteProtocolError(str(error)) from error
        if isinstance(event, h11.ConnectionClosed):
            raise httpcore2.RemoteProtocolError("the server ended the connection without a response")
        return event

    async def _read(self) -> bytes:
        assert self._stream is not None
        if self._closed:
            raise httpcore2.ReadError("the connection was closed")
        try:
            if not self._is_plain:
                return bytes(await self._stream.receive_some(READ_SIZE))
            await trio.lowlevel.checkpoint_if_cancelled()
            waited = False
            while True:
                try:
                    data = os.read(self._fd, READ_SIZE)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._fd)
                    waited = True
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()  # what was read must not be lost
            return data
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore2.ReadError(str(error)) from error

    # Ending.

    async def finish(self) -> None:
        """The response is not wanted any more. If it was read to its end, the connection is for others."""
        machine = self._machine
        if machine.our_state is h11.DONE and machine.their_state is h11.DONE and not self._closed:
            machine.start_next_cycle()
            self._expiry = trio.current_time() + KEPT_SECONDS
            self._busy = False
        else:
            await self.aclose()

    async def aclose(self) -> None:
        self._closed = True
        if self._stream is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_SECONDS):
                await self._stream.aclose()

    # What the pool asks.

    def can_handle_request(self, origin: httpcore2.Origin) -> bool:
        return origin == self._origin

    def is_available(self) -> bool:
        return self.is_idle()

    def is_idle(self) -> bool:
        return self._stream is not None and not self._busy and not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def is_connected(self) -> bool:
        return self._stream is not None and not self._closed

    def has_expired(self) -> bool:
        """Too old; or the server has ended it, which is the only thing that it can have to say now."""
        if not self.is_idle():
            return False
        if trio.current_time() > self._expiry:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def info(self) -> str:
        return "closed" if self._closed else "busy" if self._busy else "idle"


def _proxy_headers(proxy: HttpUrl) -> list[tuple[bytes, bytes]]:
    if proxy.credentials is None:
        return []
    return [(b"proxy-authorization", b"Basic " + base64.b64encode(b":".join(proxy.credentials)))]
