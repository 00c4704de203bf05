"""Websockets: trio-websocket opens, accepts and refuses them; our codec and pump carry the frames.

Why not trio-websocket for the frames too: its reader task is a second owner of the socket (it writes
pongs and close frames, and stops answering while its queue is full), a message through it costs five to
ten times the CPU, and two ends that only write can block each other (performance.md, decision c2). So it
sees the HTTP heads only, through `_Handshake`, an adapter stream that hands them over and then parks.
permessage-deflate is never offered and never accepted.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from execenv.errors import ConnectFailed
from execenv.targets import shown_url
from execenv.transports._frames import Close, FrameCodec, Ping, Pong, Text, Violation
from execenv.transports._pump import Buffer, ByteIO, FdIO, Framing, Pump, StreamIO
from execenv.transports.channel import DEFAULT_MAX_MESSAGE

if TYPE_CHECKING:
    import ssl


PING_INTERVAL = 30.0
PONG_TIMEOUT = 60.0
PROBE_TIMEOUT = 5.0
READ_IN_TIME = 64 * 1024
"""Bytes that a living client is trusted to read within a pong timeout, and no more than that."""
MOST_PATIENCE = 10  # pong timeouts
MAX_HEAD = 64 * 1024
NOT_SENT_LOW_WATER = 128 * 1024
NO_BINARY = b""
"""What a binary channel hands over for a text message, which has no meaning there."""
REFUSALS = (401, 403)
"""Statuses of a refused handshake that say who is not let in. What else is answered may be a proxy's word on
a server that is about to come back."""

Headers = Sequence[tuple[bytes, bytes]]


class WebsocketFraming(Framing):
    """Between the codec's events and the pump: pongs are queued, violations and closes end the channel."""

    def __init__(self, pump: WebsocketChannel, codec: FrameCodec, leftover: bytes) -> None:
        self._pump = pump
        self._codec = codec
        self.leftover = leftover

    def messages(self, data: bytes) -> Iterable[bytes]:
        pump = self._pump
        pump.hear()
        for event in self._codec.receive(data):
            if type(event) is bytes:
                yield event
            elif type(event) is Ping:
                pump.send_urgent(self._codec.encode_pong(event.payload))
            elif type(event) is Violation:
                pump.loss = pump.loss or f"websocket protocol error: {event.reason}"
                pump.close_nowait(event.code, event.reason)
            elif type(event) is Text:
                yield NO_BINARY
            elif type(event) is Close:
                pump.close_code = event.code
                if event.code not in (None, 1000, 1001):
                    pump.loss = pump.loss or f"websocket closed with code {event.code}"
                pump.close_nowait(event.code or 1000)
            else:
                assert type(event) is Pong
                pump.hear_pong()

    def frames(self, parts: tuple[bytes, ...]) -> list[list[Buffer]]:
        return self._codec.encode_message(*parts)

    def part(self, data: bytes, *, first: bool, last: bool) -> list[Buffer]:
        return self._codec.encode_part(data, first=first, last=last)

    def farewell(self, code: int, reason: str) -> bytes:
        return self._codec.encode_close(code, reason)


class WebsocketChannel(Pump):
    """One websocket, after its handshake.

    Args:
        ping_interval: seconds between pings, the first one a full interval after the start.
        pong_timeout: seconds that a peer may stay silent after a ping.
        binary: messages are binary ones, as those of a relay are (relay.md §2).

    Attributes:
        close_code: what the peer's close frame said; `None` without one.

    A server is patient with a client that does not take what was sent to it: the ping lies behind that. It is
    for TCP to say then whether the client is still there. What the kernels have taken may lie unread for long
    too, so who has much to read before the ping has up to `MOST_PATIENCE` times as long to answer it.
    """

    def __init__(
        self,
        label: str,
        io: ByteIO,
        *,
        client: bool,
        leftover: bytes,
        max_message: int = DEFAULT_MAX_MESSAGE,
        ping_interval: float = PING_INTERVAL,
        pong_timeout: float = PONG_TIMEOUT,
        binary: bool = False,
    ) -> None:
        super().__init__(label, io)
        self.close_code: int | None = None
        self._patient = not client
        self._codec = FrameCodec(client=client, max_message=max_message, binary=binary)
        self.framing = WebsocketFraming(self, self._codec, leftover)
        self._leftover = leftover
        self._ping_interval = ping_interval
        self._pong_timeout = pong_timeout
        self._heard: trio.Event | None = None  # set by the next bytes that arrive
        self._nursery: trio.Nursery | None = None
        self._probing = False
        self._bytes_sent = 0
        self._bytes_read = 0  # of those, at least; the pong to a ping behind them tells
        self._sent_before_ping: int | None = None  # the oldest one that was not answered

    @property
    def unfinished(self) -> int:
        """Bytes that are kept of a message whose end has not arrived."""
        return self._codec.unfinished

    def hear(self) -> None:
        """Something has arrived, whatever it is."""
        if self._heard is not None:
            self._heard.set()
            self._heard = None

    def hear_pong(self) -> None:
        """The peer has read everything up to a ping."""
        if self._sent_before_ping is not None:
            self._bytes_read, self._sent_before_ping = self._sent_before_ping, None

    def _sent(self, count: int) -> None:
        self._bytes_sent += count
        super()._sent(count)

    async def run(self, receive: Callable[[bytes], None]) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_alive)
            leftover, self._leftover = self._leftover, b""
            if leftover:
                self._io = _Replayed(leftover, self._io)
            await super().run(receive)
            nursery.cancel_scope.cancel()

    async def _keep_alive(self) -> None:
        next_ping = trio.current_time() + self._ping_interval
        while True:
            await trio.sleep_until(next_ping)
            asked, answer = trio.current_time(), self._ping()
            if self._pong_timeout < math.inf:
                stuck = False
                while not await _is_set_within(answer, self._patience()):
                    refused = self._patient and self.queued > self._behind_bytes
                    if not refused and not stuck:
                        self.fail(f"no answer to a ping within {trio.current_time() - asked:.3g} s")
                        return
                    # Once it has taken everything it has as long again to answer.
                    stuck = refused
            next_ping = max(next_ping + self._ping_interval, trio.current_time())

    def _patience(self) -> float:
        if not self._patient:
            return self._pong_timeout
        unread = (self._bytes_sent - self._bytes_read) / READ_IN_TIME
        return self._pong_timeout * min(max(unread, 1), MOST_PATIENCE)

    def _ping(self) -> trio.Event:
        if self._sent_before_ping is None:
            self._sent_before_ping = self._bytes_sent
        if self._heard is None:
            self._heard = trio.Event()
        self.send_urgent(self._codec.encode_ping())
        return self._heard

    def probe_nowait(self) -> None:
        if self._nursery is not None and not self._probing and not self._ending and not self.closed:
            self._probing = True
            self._nursery.start_soon(self._probe)

    async def _probe(self) -> None:
        if not await _is_set_within(self._ping(), PROBE_TIMEOUT):
            self.fail(f"no answer to a ping within {PROBE_TIMEOUT:g} s")
        self._probing = False


async def _is_set_within(event: trio.Event, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        await event.wait()
    if not event.is_set():  # after a pause of this whole program the answer lies there, to be read first
        await trio.lowlevel.checkpoint()
    return event.is_set()


class _Replayed(ByteIO):
    """A `ByteIO` whose first bytes were already read."""

    def __init__(self, first: bytes, io: ByteIO) -> None:
        self._first = first
        self._io = io

    async def receive(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._io.receive()

    async def send(self, buffers: list[Buffer]) -> int:
        return await self._io.send(buffers)

    def send_now(self, buffers: list[Buffer]) -> int:
        return self._io.send_now(buffers)

    async def linger(self) -> None:
        await self._io.linger()

    async def close(self) -> None:
        await self._io.close()


class HandshakeRefused(ConnectFailed):
    """The server answered the handshake with `status` and not with 101."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, retryable=status not in REFUSALS)
        self.status = status


class _Refused(Exception):
    """The server answered the handshake with another status than 101."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class _Handshake(trio.abc.Stream):
    """What trio-websocket gets for a stream: the peer's HTTP head, then nothing for ever.

    A server has read the head already (`head`). A client reads it here; what follows it stays in
    `leftover`, unless the answer is no 101: then everything is passed on, since it explains the refusal.
    """

    def __init__(self, stream: trio.abc.Stream, head: bytes | None = None) -> None:
        self._stream = stream
        self._head = head
        self._upgraded = head is not None
        self._seen = b""
        self.leftover = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._head is not None:
            head, self._head = self._head, None
            return head
        if self._upgraded:
            await trio.sleep_forever()
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        except (OSError, trio.BrokenResourceError) as error:
            # Not as it is: trio-websocket takes that for an end, and then waits for ever.
            raise ConnectFailed(
                f"the connection broke in the websocket handshake: {_reason(error)}"
            ) from error
        if not data:
            raise self._cut_off()
        before = self._seen
        self._seen += data
        if len(self._seen) > MAX_HEAD:
            raise ConnectFailed(f"the answer to the websocket handshake is longer than {MAX_HEAD} bytes")
        end = self._seen.find(b"\r\n\r\n")
        if end >= 0 and self._seen.split(b" ", 2)[1:2] == [b"101"]:
            self._upgraded = True
            self.leftover = self._seen[end + 4 :]
            return self._seen[len(before) : end + 4]
        return data

    def _cut_off(self) -> Exception:
        head, end, body = self._seen.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        if end and status and status[0].isdigit():  # a refusal whose body lasts until the end
            return _Refused(int(status[0]), body)
        return ConnectFailed("the server closed the connection before the websocket handshake was done")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except (OSError, trio.BrokenResourceError) as error:
            raise ConnectFailed(
                f"the connection broke in the websocket handshake: {_reason(error)}"
            ) from error

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Leave the stream alone: it outlives the handshake."""
        await trio.lowlevel.checkpoint()


def _io_of(stream: trio.abc.Stream) -> ByteIO:
    if isinstance(stream, trio.SocketStream):
        sock = stream.socket
        if hasattr(socket, "TCP_NOTSENT_LOWAT") and sock.family in (socket.AF_INET, socket.AF_INET6):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER)
        return FdIO(sock.fileno(), sock.fileno(), sock.close, lambda: sock.shutdown(socket.SHUT_WR))
    return StreamIO(stream)


async def accept(
    stream: trio.abc.Stream,
    head: bytes,
    leftover: bytes,
    label: str,
    *,
    max_message: int = DEFAULT_MAX_MESSAGE,
    ping_interval: float = PING_INTERVAL,
    pong_timeout: float = PONG_TIMEOUT,
    binary: bool = False,
) -> WebsocketChannel:
    """Answer an upgrade request with 101 and take the stream over.

    Args:
        head: the request's head, whole, already found to be an upgrade.
        leftover: what was read of the stream behind it.

    Raises:
        ConnectFailed: if the request is no valid websocket handshake after all.
        trio.BrokenResourceError: if the client has gone.
    """
    from trio_websocket import HandshakeError, wrap_server_stream

    adapter = _Handshake(stream, head)
    try:
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, adapter)
            await request.accept()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        cause = _first(group)
        if isinstance(cause, HandshakeError | ValueError):
            raise ConnectFailed(f"not a websocket handshake: {cause}") from cause
        raise cause from cause.__cause__
    return WebsocketChannel(
        label,
        _io_of(stream),
        client=False,
        leftover=leftover,
        max_message=max_message,
        ping_interval=ping_interval,
        pong_timeout=pong_timeout,
        binary=binary,
    )


async def connect(
    url: str,
    *,
    headers: Headers = (),
    ssl_context: ssl.SSLContext | None = None,
    max_message: int | None = None,
    ping_interval: float = PING_INTERVAL,
    pong_timeout: float = PONG_TIMEOUT,
    binary: bool = False,
) -> WebsocketChannel:
    """Open a `ws://` or `wss://` URL. The caller sets the deadline.

    Args:
        headers: sent besides those of the handshake, such as `Authorization`.
        max_message: in bytes; `None` lifts the limit, as a client must that reads large files.

    Raises:
        HandshakeRefused: if the server answered with another status than 101.
        ConnectFailed: naming the URL (without its query) and what went wrong.
    """
    from trio_websocket import ConnectionRejected, wrap_client_stream

    shown = shown_url(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text repeats what may be a piece of a password
        text = (
            f"{shown!r} is no websocket URL: its host or its port cannot be read; write it as ws://HOST:PORT"
        )
        raise ConnectFailed(text, retryable=False) from None
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        text = f"{shown!r} is no websocket URL: it should look like ws://HOST:PORT"
        raise ConnectFailed(text, retryable=False)
    if any(byte < 0x20 or byte == 0x7F for _, value in headers for byte in value):
        text = "a header, such as the bearer token, holds a control character"
        raise ConnectFailed(text, retryable=False)
    secure = parts.scheme == "wss"
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    stream: trio.abc.Stream | None = None
    try:
        stream = await trio.open_tcp_stream(parts.hostname, (443 if secure else 80) if port is None else port)
        if secure:
            stream = secured = trio.SSLStream(
                stream, ssl_context or default_ssl(), server_hostname=parts.hostname
            )
            await secured.do_handshake()
        adapter = _Handshake(stream)
        async with trio.open_nursery() as nursery:
            await wrap_client_stream(nursery, adapter, host, resource, extra_headers=list(headers))  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()
    except BaseException as error:
        if stream is not None:
            await trio.aclose_forcefully(stream)
        cause = _first(error)
        if not isinstance(cause, Exception):
            raise
        if isinstance(cause, ConnectionRejected):
            cause = _Refused(cause.status_code, cause.body or b"")
        if isinstance(cause, _Refused):
            body = " ".join(cause.body.decode(errors="replace").split())[:200]
            detail = f": {body}" if body else ""
            text = f"{shown} refused the websocket with status {cause.status}{detail}"
            raise HandshakeRefused(text, cause.status) from cause
        if isinstance(cause, UnicodeError):
            text = f"cannot connect to {shown}: no host can have that name"
            raise ConnectFailed(text, retryable=False) from cause
        if isinstance(cause, OSError | ConnectFailed | trio.BrokenResourceError):
            raise ConnectFailed(f"cannot connect to {shown}: {_reason(cause)}") from cause
        # trio-websocket, wsproto and h11 each have errors of their own for an answer that makes no sense.
        raise ConnectFailed(f"cannot connect to {shown}: its answer is no websocket handshake") from cause
    return WebsocketChannel(
        f"websocket {shown}",
        _io_of(stream),
        client=True,
        leftover=adapter.leftover,
        max_message=max_message if max_message is not None else 1 << 62,
        ping_interval=ping_interval,
        pong_timeout=pong_timeout,
        binary=binary,
    )


@cache
def default_ssl() -> ssl.SSLContext:
    """Whom to trust: the system's certificates, read once (25 ms)."""
    import ssl

    return ssl.create_default_context()


def _first(error: BaseException) -> BaseException:
    if isinstance(error, BaseExceptionGroup):
        _, rest = error.split(trio.Cancelled)
        return _first((rest or error).exceptions[0])
    return error


def _reason(error: BaseException) -> str:
    cause = error.__cause__
    with suppress(AttributeError, IndexError):
        if isinstance(cause, BaseExceptionGroup):  # every address of the host was tried
            cause = cause.exceptions[0]
    return str(cause or error) or type(error).__name__
