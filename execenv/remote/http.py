"""HTTP requests that a server makes for us, by its protocol: the proxy of `abc.HttpClient`.

Pieces of bodies arrive as notifications, in the reader, which must not wait for anybody. A server of ours
sends no more of a body than its window, until it is told what was taken (`http/request/bodyTaken`). Another
server pushes on: a stream whose reader is so slow that too much would wait here fails, and only that one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sized
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

import trio
from attrs import evolve

from execenv.abc import HttpClient, HttpStream
from execenv.codec import Json, structure
from execenv.errors import ConnectionLost, ExecenvError, InternalError, NotSupported, ProtocolViolation
from execenv.protocol import (
    HTTP_BODY_TAKEN,
    HTTP_REQUEST,
    U64,
    HttpBodyDeltaParams,
    HttpBodyTakenParams,
    HttpHeader,
    HttpRequestParams,
    HttpRequestResult,
)
from execenv.rpc import Peer

if TYPE_CHECKING:
    from execenv.remote.connection import RemoteEnvironment

MAX_QUEUED = 16 * 1024 * 1024
"""Bytes of bodies that may wait here for their readers, of all streams together."""

MAX_DELTA = 1024 * 1024
"""A larger piece ends the connection (environments.md §1.8)."""

OVERSHOOT = 64 * 1024  # the piece that a server of ours sends beyond a window
LEAST_WINDOW = 64 * 1024


class RemoteHttpStream(HttpStream):
    """One body of a server. The methods that begin with `on_` are called by the connection's reader."""

    def __init__(self, owner: RemoteHttp, peer: Peer, request_id: str, window: int | None) -> None:
        self.request_id = request_id
        self.peer = peer
        self.window = window
        self._owner = owner
        self._pieces: deque[bytes] = deque()
        self.queued = 0
        self._next_seq = 1
        self._taken = 0
        self._told = 0
        self._done = False
        self._error: ExecenvError | None = None
        self._changed = trio.lowlevel.ParkingLot()

    def begin(self, status: int, headers: tuple[HttpHeader, ...]) -> None:
        self.status = status
        self.headers = headers

    async def receive(self) -> bytes:
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._done:
                await trio.lowlevel.checkpoint()
                return b""
            await self._changed.park()
        await trio.lowlevel.checkpoint_if_cancelled()
        piece = self._pieces.popleft()
        self._note_queued(-len(piece))
        self._taken += len(piece)
        if self.window is not None and not self._done and self._taken - self._told >= self.window // 4:
            self._told = self._taken
            self._owner.tell(self.peer, self.request_id, self._taken)
        return piece

    async def aclose(self) -> None:
        if self._owner.remove(self) and self.window is not None:
            self._owner.tell(self.peer, self.request_id, self._taken, stop=True)
        self.let_go()
        self._owner.open_streams.discard(self)
        await trio.lowlevel.checkpoint()

    def on_delta(self, delta: HttpBodyDeltaParams) -> None:
        if delta.seq != self._next_seq:
            text = (
                f"the body of {self.request_id!r} has piece {delta.seq} where {self._next_seq} was expected"
            )
            self.fail(ProtocolViolation(text))
            return
        self._next_seq += 1
        piece = delta.delta_base64
        if piece:
            self._pieces.append(piece)
            self._note_queued(len(piece))
            self._owner.check_queued()
            if self._error is not None:
                return
        if delta.error is not None:
            self._finish(InternalError(delta.error))
        elif delta.done:
            self._finish(None)
        self._changed.unpark_all()

    def on_lost(self, error: ConnectionLost) -> None:
        self.let_go()
        self._finish(error)

    def fail(self, error: ExecenvError) -> None:
        """Give up, and what is queued with it: a body that has a hole is of no use."""
        self.let_go()
        if self.window is not None and not self._done:
            self._owner.tell(self.peer, self.request_id, self._taken, stop=True)
        self._finish(error)

    def _finish(self, error: ExecenvError | None) -> None:
        self._done = True
        self._error = error
        self._owner.remove(self)
        self._changed.unpark_all()

    def let_go(self) -> None:
        self._pieces.clear()
        self._note_queued(-self.queued)

    def _note_queued(self, size: int) -> None:
        self.queued += size
        self._owner.queued += size


class RemoteHttp(HttpClient):
    """Sends requests to a server, and routes the bodies that it streams.

    Attributes:
        queued: bytes that wait for their readers.
    """

    def __init__(self, environment: RemoteEnvironment) -> None:
        self._environment = environment
        self._numbers = count(1)
        self._streams: dict[str, RemoteHttpStream] = {}  # those that are still sent
        self.open_streams: set[RemoteHttpStream] = set()  # those that may still be read
        self._granted = 0
        self.queued = 0

    async def request(self, params: HttpRequestParams) -> HttpRequestResult:
        await self._check(params)
        request_id = f"http-{next(self._numbers)}"
        params = evolve(params, request_id=request_id, stream_response=False, body_window=None)
        stoppable = await self._has_window()

        async def request(peer: Peer) -> HttpRequestResult:
            try:
                return await peer.call(HTTP_REQUEST, params)
            except trio.Cancelled:
                if stoppable:
                    self.tell(peer, request_id, 0, stop=True)
                raise

        return await self._environment.with_peer(request)

    async def open_stream(self, params: HttpRequestParams) -> RemoteHttpStream:
        await self._check(params)
        windowed = await self._has_window()
        return await self._environment.with_peer(lambda peer: self._open(peer, params, windowed))

    async def _open(self, peer: Peer, params: HttpRequestParams, windowed: bool) -> RemoteHttpStream:
        window = self._grant() if windowed else None
        stream = RemoteHttpStream(self, peer, f"http-{next(self._numbers)}", window)
        params = evolve(
            params,
            request_id=stream.request_id,
            stream_response=True,
            body_window=None if window is None else U64(window),
        )
        # Before the request goes out: an early piece finds its stream.
        self._streams[stream.request_id] = stream
        try:
            result = await peer.call(HTTP_REQUEST, params)
        except BaseException as error:
            if self.remove(stream) and window is not None and isinstance(error, trio.Cancelled):
                self.tell(peer, stream.request_id, 0, stop=True)
            stream.let_go()
            raise
        stream.begin(result.status, result.headers)
        self.open_streams.add(stream)
        return stream

    async def _check(self, params: HttpRequestParams) -> None:
        # A server that does not know the member would send the header without its secret.
        if any(header.value_env_var is not None for header in params.headers):
            capabilities = (await self._environment.info()).capabilities
            if not capabilities.get("httpHeaderEnvVars", False):
                raise NotSupported(
                    f"the exec-server behind {self._environment.name} cannot put its variables into headers "
                    "(its environment info does not list httpHeaderEnvVars)"
                )

    async def _has_window(self) -> bool:
        return (await self._environment.info()).capabilities.get("httpBodyWindow", False)

    def check_queued(self) -> None:
        """If too much waits, the stream with the most of it fails: its reader is the slow one."""
        if self.queued > MAX_QUEUED:
            slowest = max(self.open_streams | set(self._streams.values()), key=lambda stream: stream.queued)
            text = f"its reader was too slow: {MAX_QUEUED} bytes of bodies wait on this connection"
            slowest.fail(InternalError(text))

    def _grant(self) -> int:
        """A quarter of what is left, so that all windows together are no more than may be queued."""
        window = max(LEAST_WINDOW, (MAX_QUEUED - self._granted) // 4)
        self._granted += window + OVERSHOOT
        return window

    def remove(self, stream: RemoteHttpStream) -> bool:
        """Route no more pieces to it; whether any could have come."""
        if self._streams.get(stream.request_id) is not stream:
            return False
        del self._streams[stream.request_id]
        if stream.window is not None:
            self._granted -= stream.window + OVERSHOOT
        return True

    def tell(self, peer: Peer, request_id: str, taken: int, *, stop: bool = False) -> None:
        with suppress(ConnectionLost):  # with it, the request has ended
            peer.notify(HTTP_BODY_TAKEN, HttpBodyTakenParams(request_id, U64(taken), stop))

    def disconnected(self, error: ConnectionLost) -> None:
        for stream in list(self._streams.values()):
            stream.on_lost(error)

    def on_delta(self, params: Json) -> None:
        """A notification. Called by the reader; must not wait."""
        encoded = params.get("deltaBase64") if isinstance(params, dict) else None
        if isinstance(encoded, Sized) and len(encoded) > MAX_DELTA // 3 * 4 + 4:
            raise ProtocolViolation(f"a piece of a body is larger than {MAX_DELTA} bytes")
        delta = structure(params, HttpBodyDeltaParams)
        stream = self._streams.get(delta.request_id)
        if stream is not None:
            stream.on_delta(delta)
