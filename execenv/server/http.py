"""The route of `http/request`, over `abc.HttpClient` (protocol.md §7).

Requests belong to a connection, and end with it. What fails is logged by method, request id and the class of
the failure: URLs, headers and bodies are secrets of those who send them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from logging import getLogger
from time import perf_counter
from typing import Any

import trio

from execenv import codec
from execenv.abc import EnvironmentBackend, HttpStream, body_failed
from execenv.errors import ConnectionLost, InternalError, InvalidParams, RpcError
from execenv.protocol import HttpBodyTakenParams, HttpHeader, HttpRequestParams
from execenv.rpc import Answer, Streamed
from execenv.transports.channel import Channel

logger = getLogger(__name__)

MAX_STREAMS = 1024
"""Bodies that one connection may have streamed to it at once."""

MAX_BUFFERED = 256 * 1024 * 1024
"""Bytes of bodies that one connection may have collected for it at once."""

MAX_WINDOW = 64 * 1024 * 1024
WORK_SLICE = 0.0005  # seconds of passing on pieces before others get a turn
WHOLE_BYTES = 256 * 1024
"""A body up to this size is one piece of an answer; a longer one is encoded while it is sent."""
BLOCK = 72 * 1024  # a multiple of 3, so that the pieces are base64 without padding


class _Active:
    """A request that is under way, and for a stream how much of its body the client has not taken yet."""

    def __init__(self, window: int | None = None) -> None:
        self.scope = trio.CancelScope()
        self.answered = trio.Event()
        self._window = None if window is None else min(window, MAX_WINDOW)
        self._sent = 0
        self._taken = 0
        self._room = trio.lowlevel.ParkingLot()

    @property
    def full(self) -> bool:
        return self._window is not None and self._sent - self._taken >= self._window

    def note_sent(self, size: int) -> None:
        self._sent += size

    def note_taken(self, taken: int) -> None:
        self._taken = max(self._taken, taken)
        self._room.unpark_all()

    async def wait_room(self) -> None:
        while self.full:
            await self._room.park()


class HttpTable:
    """The requests of one connection that are under way, and the handler of `http/request`.

    Args:
        nursery: where bodies are streamed.
    """

    def __init__(self, environment: EnvironmentBackend, channel: Channel, nursery: trio.Nursery) -> None:
        self._environment = environment
        self._channel = channel
        self._nursery = nursery
        self._streams: dict[str, _Active] = {}
        self._buffered: dict[str, _Active] = {}
        self._buffered_bytes = 0

    def request(self, params: HttpRequestParams) -> Coroutine[Any, Any, Any]:
        """The handler. The part before the first `await` runs in the order of arrival."""
        if not params.stream_response:
            active = self._buffered[params.request_id] = _Active()
            return self._request(params, active)
        if params.request_id in self._streams:
            raise InvalidParams(
                f"http/request streamResponse requestId `{params.request_id}` is already active"
            )
        if len(self._streams) >= MAX_STREAMS:
            raise InternalError(
                f"http/request failed: {MAX_STREAMS} bodies are being streamed on this connection"
            )
        active = self._streams[params.request_id] = _Active(params.body_window)
        return self._open_stream(params, active)

    def body_taken(self, params: HttpBodyTakenParams) -> None:
        """What the client says of a request; it may have ended meanwhile."""
        for requests in (self._streams, self._buffered):
            active = requests.get(params.request_id)
            if active is not None:
                active.note_taken(params.taken)
                if params.stop:
                    active.scope.cancel()

    # The whole body in the answer.

    async def _request(self, params: HttpRequestParams, active: _Active) -> Any:
        held = 0
        body = bytearray()  # not a list: an origin may send bytes one by one
        try:
            with active.scope:
                stream = await self._environment.http.open_stream(params)
                try:
                    while piece := await stream.receive():
                        body += piece
                        held += len(piece)
                        self._buffered_bytes += len(piece)
                        if self._buffered_bytes > MAX_BUFFERED:
                            raise InternalError(f"more than {MAX_BUFFERED} bytes; use streamResponse")
                except InternalError as error:
                    raise body_failed(error) from error.__cause__
                finally:
                    await stream.aclose()
                headers = _on_the_wire(stream.headers)
                release = partial(self._release, held)
                held = 0
                if len(body) <= WHOLE_BYTES:
                    return Answer(codec.http_result(stream.status, headers, bytes(body)), release)
                return Streamed(_result_parts(stream.status, headers, body, release))
            raise InternalError("http/request was stopped by the client")
        except RpcError as error:
            _log_failure(params, error)
            raise
        finally:
            self._release(held)
            if self._buffered.get(params.request_id) is active:
                del self._buffered[params.request_id]

    def _release(self, size: int) -> None:
        """A body is counted until its answer is queued, however long that waits for the client."""
        self._buffered_bytes -= size

    # The body in notifications behind the answer.

    async def _open_stream(self, params: HttpRequestParams, active: _Active) -> Any:
        stream: HttpStream = await self._nursery.start(self._run_stream, params, active)
        result = codec.http_result(stream.status, _on_the_wire(stream.headers), b"")
        return Answer(result, active.answered.set)

    async def _run_stream(
        self,
        params: HttpRequestParams,
        active: _Active,
        *,
        task_status: trio.TaskStatus[HttpStream] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        begun = False
        try:
            with active.scope:
                stream = await self._environment.http.open_stream(params)
                try:
                    begun = True
                    task_status.started(stream)
                    await active.answered.wait()
                    with suppress(ConnectionLost):
                        await self._pass_on(params, active, stream)
                finally:
                    await stream.aclose()
            if not begun:
                raise InternalError("http/request was stopped by the client")
        except RpcError as error:
            _log_failure(params, error)
            raise
        finally:
            del self._streams[params.request_id]

    async def _pass_on(self, params: HttpRequestParams, active: _Active, stream: HttpStream) -> None:
        template = codec.HttpDeltaTemplate(params.request_id)
        channel, seq, failure = self._channel, 0, None
        began = perf_counter()
        try:
            while piece := await stream.receive():
                seq += 1
                channel.send_nowait(*template.encode(seq, piece))
                active.note_sent(len(piece))
                while active.full or channel.congested:
                    await active.wait_room()
                    await channel.wait_room()
                if perf_counter() - began > WORK_SLICE:
                    await trio.lowlevel.checkpoint()
                    began = perf_counter()
        except ConnectionLost:
            raise
        except Exception as error:  # of one body, whatever it is; the others go on
            _log_failure(params, error)
            failure = error.message if isinstance(error, InternalError) else "internal error"
        channel.send_nowait(template.encode_end(seq + 1, failure))


def _on_the_wire(headers: tuple[HttpHeader, ...]) -> list[dict[str, str]]:
    return [{"name": header.name, "value": header.value} for header in headers]


async def _result_parts(
    status: int, headers: list[dict[str, str]], body: bytearray, release: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    try:
        yield codec.http_result_head(status, headers)
        for start in range(0, len(body), BLOCK):
            yield codec.encode_base64(bytes(body[start : start + BLOCK]))
        yield codec.HTTP_RESULT_TAIL
    finally:
        release()


def _log_failure(params: HttpRequestParams, error: Exception) -> None:
    if not isinstance(error, InvalidParams):
        kind = type(error.__cause__ or error).__name__
        logger.info("http/request %.80r %.20r failed: %s", params.request_id, params.method, kind)
