"""A peer: calls, notifications and routes over one channel. The only place where an exception becomes an
error object, or comes back from one.

Requests are decoded and their handlers called in the reader, in the order of arrival. A handler is a plain
function; what is quick it does at once, and what may wait it returns as a coroutine, which then runs as a
task of its own. So nothing that waits delays anything else, and what must keep an order takes its place
before it starts to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from itertools import count
from logging import getLogger
from types import CoroutineType
from typing import Any, Generic, TypeVar

import outcome
import trio
from attrs import frozen

from execenv import codec
from execenv._service import service
from execenv.codec import Id, Json
from execenv.errors import (
    ConnectionLost,
    InternalError,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    NotSupported,
    ProtocolViolation,
    RpcError,
    error_from_code,
    error_from_os,
)
from execenv.paths import ForeignPathError
from execenv.protocol import Method, Nothing, Notification
from execenv.transports.channel import ANSWER_LIMIT, Channel, MessageTooLong

logger = getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

MAX_REQUESTS = 16_384
"""Requests of one connection that may wait at once; further ones are refused."""

SETTLE = 0.05
"""Seconds for requests that are under way when the peer has said that it will send no more."""

MAX_REQUEST_BYTES = 256 * 1024 * 1024
"""What those requests may hold together."""


@frozen
class Route(Generic[P, R]):
    """A method and what answers it.

    `alone` holds back everything behind the request until it is answered, as `initialize` needs it (§9).
    """

    method: Method[P, R]
    handler: Callable[[P], R | Coroutine[Any, Any, R]]
    alone: bool = False


@frozen
class Streamed:
    """A result as pieces of its JSON, made while they are sent. What fails before the first piece is an error
    as any other; later it ends the connection, since half an answer has gone out."""

    parts: AsyncGenerator[bytes, None]


@frozen
class Answer(Generic[R]):
    """A result, and what follows it: `then` is called when the result is queued, before anything else can be
    sent."""

    result: R
    then: Callable[[], object]


class Call(Generic[R]):
    """A request that was sent. Got from `Peer.call_nowait`."""

    __slots__ = ("_forget", "_result", "_task", "method")

    def __init__(self, method: Method[Any, R], forget: Callable[[], object]) -> None:
        self.method = method
        self._forget = forget
        self._result: outcome.Outcome[R] | None = None
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> R:
        """The answer. For one task, once; if that is cancelled, the answer is dropped."""
        if self._result is not None:
            await trio.lowlevel.checkpoint()
            return self._result.unwrap()
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self.drop()
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)  # type: ignore[no-any-return]

    def drop(self) -> None:
        """Nobody wants the answer any more."""
        self._forget()

    def settle(self, result: outcome.Outcome[R]) -> None:
        if self._task is not None:
            trio.lowlevel.reschedule(self._task, result)
        else:
            self._result = result


class Peer:
    """One end of a connection. `run` must run for anything to happen: see `open_peer`.

    Args:
        routes: the requests that this end answers.
        notifications: what to call with the parameters of each notification that this end knows.
            A function that raises `ProtocolViolation` or `InvalidParams` ends the connection.
        guard: called before a handler, with its route; raises what refuses the request.
        strict: a server's rules (§2.5): what this end does not know ends the connection, and what cannot
            be parsed is answered. Otherwise a client's: unknown things are ignored, unparsable ones fatal.
    """

    def __init__(
        self,
        channel: Channel,
        routes: Iterable[Route[Any, Any]] = (),
        notifications: Mapping[str, Callable[[Json], None]] | None = None,
        *,
        guard: Callable[[Route[Any, Any]], None] | None = None,
        strict: bool = False,
    ) -> None:
        self.channel = channel
        channel.settle = self._settle
        self._idle = trio.lowlevel.ParkingLot()
        self._routes = {route.method.name: route for route in routes}
        self._notifications = dict(notifications or {})
        self._guard = guard
        self._strict = strict
        self._ids = count(1)
        self._waiting: dict[Id, Call[Any]] = {}
        self._held: deque[bytes] | None = None
        self._alone = False
        self._ending = False
        self._turns = trio.StrictFIFOLock()
        self._streaming = trio.StrictFIFOLock()
        self.answered = 0
        """How many calls were answered."""
        self._requests = 0
        self._request_bytes = 0
        self._nursery: trio.Nursery | None = None
        self.on_end: Callable[[], object] = lambda: None
        """Called when the channel has ended, before the waiting calls fail, and while the handlers are still
        being cancelled, which may go on for a while."""

    async def run(self) -> None:
        """Serve until the channel ends. Handlers that still wait are cancelled; waiting calls fail."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await self.channel.run(self._receive)
                finally:
                    nursery.cancel_scope.cancel()
                    self.on_end()
        finally:
            self._nursery = None
            self.channel.close_nowait()
            for call in self._waiting.values():
                call.settle(outcome.Error(self.channel.lost("unknown")))
            self._waiting.clear()

    # Calling.

    async def call(self, method: Method[P, R], params: P) -> R:
        """Send a request and wait for its answer. A cancelled caller leaves; a late answer is dropped.

        Raises:
            RpcError: what the other side answered.
            ConnectionLost: if the connection ended before the answer came.
        """
        channel = self.channel
        if channel.congested:
            await channel.wait_room()
        return await self.call_nowait(method, params).wait()

    def call_nowait(self, method: Method[P, R], params: P) -> Call[R]:
        """Send a request, behind all that were sent before, and wait for its answer another time, or never.

        Raises:
            ConnectionLost: if the connection has ended.
        """
        id_ = next(self._ids)
        self.channel.send_nowait(codec.encode_request(id_, method.name, codec.unstructure(params)))
        call = self._waiting[id_] = Call(method, lambda: self._waiting.pop(id_, None))
        return call

    def notify(self, notification: Notification[P], params: P) -> None:
        """Queue a notification.

        Raises:
            ConnectionLost: if the connection has ended.
        """
        self.channel.send_nowait(codec.encode_notification(notification.name, codec.unstructure(params)))

    # Receiving. All of it is called by the channel's reader and never waits.

    def _receive(self, data: bytes) -> None:
        if self._held is not None:
            self._held.append(data)
            self._request_bytes += len(data)
            if self._request_bytes > MAX_REQUEST_BYTES:
                self._end("too much was sent behind a request that is answered alone")
            return
        self._handle(data)

    def _handle(self, data: bytes) -> None:
        try:
            message = codec.decode(data, limited=self._strict)
        except codec.MalformedMessage as error:
            self._malformed(error)
            return
        kind = type(message)
        if kind is codec.Request:
            self._request(message, len(data))  # type: ignore[arg-type]
        elif kind is codec.NotificationMessage:
            self._notification(message)  # type: ignore[arg-type]
        else:
            self._answer(message)  # type: ignore[arg-type]

    def _malformed(self, error: codec.MalformedMessage) -> None:
        if not self._strict:
            self._end(f"a message could not be parsed: {error}")
            return
        label = self.channel.label
        kind = label.split(" ", 1)[0]
        kind = "websocket JSON-RPC" if kind == "websocket" else "JSON-RPC"
        text = f"failed to parse {kind} message from exec-server {label}: {error}"
        self._send(codec.encode_error(codec.CONNECTION_LEVEL_ID, InvalidRequest.code, text))

    def _request(self, request: codec.Request, size: int) -> None:
        route = self._routes.get(request.method)
        try:
            if route is None:
                raise MethodNotFound(f"exec-server stub does not implement `{request.method}` yet")
            params = codec.structure(request.params, route.method.params)
            if self._guard is not None:
                self._guard(route)
            self._check_capacity(size)
            result = route.handler(params)
            if type(result) is CoroutineType:
                self._start(request.id, route, result, size)
                return
            answer = _encode_result(request.id, result)
        except Exception as error:
            answer = _encode_failure(request.id, request.method, error)
        self._send(answer, request.id)

    def _check_capacity(self, size: int) -> None:
        # Before the handler is called: it takes an id or a turn, which nobody would give back.
        if self._requests >= MAX_REQUESTS or self._request_bytes + size > MAX_REQUEST_BYTES:
            raise InternalError(
                f"too many unanswered requests on this connection (limits: {MAX_REQUESTS} requests, "
                f"{MAX_REQUEST_BYTES} bytes); nothing was done, wait for answers before sending more"
            )

    def _start(self, id_: Id, route: Route[Any, Any], handling: Coroutine[Any, Any, Any], size: int) -> None:
        assert self._nursery is not None
        self._requests += 1
        self._request_bytes += size
        if route.alone:
            self._alone = True
            self._held = self._held if self._held is not None else deque()
        self._nursery.start_soon(self._finish, id_, route, handling, size, name=route.method.name)

    async def _finish(
        self, id_: Id, route: Route[Any, Any], handling: Coroutine[Any, Any, Any], size: int
    ) -> None:
        try:
            then: Callable[[], object] | None = None
            try:
                result = await handling
                await self._wait_room()
                if type(result) is Streamed:
                    await self._stream(id_, result)
                    return
                if type(result) is Answer:
                    result, then = result.result, result.then
                answer = _encode_result(id_, result)
            except Exception as error:
                answer = _encode_failure(id_, route.method.name, error)
                then = None
            self._send(answer, id_)
            if then is not None and not self.channel.closed:
                then()
        finally:
            self._requests -= 1
            self._request_bytes -= size
            if not self._requests:
                self._idle.unpark_all()
        if route.alone:
            await self._release_held()

    async def _stream(self, id_: Id, result: Streamed) -> None:
        # In turn from the beginning: a thousand that wait must not hold a thousand files open.
        async with self._streaming, aclosing(result.parts) as parts:
            part = await anext(parts)
            try:
                async with self.channel.open_message() as send:
                    await send(codec.result_head(id_) + part)
                    async for part in parts:
                        await send(part)
                    await send(codec.RESULT_TAIL)
            except MessageTooLong as error:
                self._send(codec.encode_error(id_, InternalError.code, str(error)))
            except Exception as error:
                self._end(f"a long answer could not be finished: {error}")

    async def _wait_room(self) -> None:
        """Until the peer takes what it asked for before, an answer stays what it is made of: output that is
        retained anyway, and not an encoded copy of it for each of a thousand reads.

        One answer waits for the channel, the others for their turn: room for one must not wake a thousand.
        """
        if self.channel.congested or self._turns.locked():
            async with self._turns:
                with suppress(ConnectionLost):
                    await self.channel.wait_room()

    async def _release_held(self) -> None:
        self._alone = False
        while self._held and not self._alone and not self._ending:
            await trio.lowlevel.checkpoint()
            data = self._held.popleft()
            self._request_bytes -= len(data)
            self._handle(data)
            if self.channel.queued > ANSWER_LIMIT:  # as the channel's reader would have waited
                with suppress(ConnectionLost):
                    await self.channel.wait_room()
        if not self._alone:
            self._held = None
            self._idle.unpark_all()

    async def _settle(self) -> None:
        """Answer what the peer asked before it said that it was done, except what waits for long."""
        while self._held is not None:
            await self._idle.park()
        with trio.move_on_after(SETTLE):
            while self._requests:
                await self._idle.park()

    def _notification(self, message: codec.NotificationMessage) -> None:
        handler = self._notifications.get(message.method)
        if handler is None:
            if self._strict:
                self._end(f"unexpected notification {message.method[:80]!r}")
            else:
                logger.debug("ignored notification %.80r", message.method)
            return
        try:
            handler(message.params)
        except (ProtocolViolation, InvalidParams) as error:
            self._end(f"exec-server notification handling failed: {message.method}: {error}")

    def _answer(self, message: codec.Response | codec.ErrorMessage) -> None:
        call = self._waiting.pop(message.id, None)
        if call is None:
            if self._strict:
                self._end("an answer to no request")
            elif message.id == codec.CONNECTION_LEVEL_ID and isinstance(message, codec.ErrorMessage):
                logger.warning("the exec-server could not parse a message: %s", message.message)
            return
        self.answered += 1
        result: outcome.Outcome[Any]
        if isinstance(message, codec.ErrorMessage):
            result = outcome.Error(error_from_code(message.code, message.message))
        else:
            try:
                result = outcome.Value(_structure_result(message.result, call.method.result))
            except InvalidParams as error:
                text = f"the answer to {call.method.name} does not decode: {error}"
                result = outcome.Error(ProtocolViolation(text))
        call.settle(result)

    # Sending.

    def _send(self, data: bytes, id_: Id | None = None) -> None:
        try:
            self.channel.send_nowait(data)
        except MessageTooLong as error:
            if id_ is not None:
                self._send(codec.encode_error(id_, InternalError.code, str(error)))
        except ConnectionLost:
            # The one who asked is gone, and the reader is about to notice.
            logger.debug("an answer had nobody to go to")

    def _end(self, reason: str) -> None:
        self._ending = True
        self.channel.loss = self.channel.loss or reason
        logger.debug("ending %s: %s", self.channel.label, reason)
        self.channel.close_nowait(1002, "protocol error")


def _structure_result(value: Json, cls: type[R]) -> R:
    if cls is Nothing:
        return cls()
    return codec.structure(value, cls)


def _encode_result(id_: Id, result: object) -> bytes:
    return codec.encode_result(id_, codec.unstructure(result))


def _encode_failure(id_: Id, method: str, error: Exception) -> bytes:
    if isinstance(error, RpcError):
        return codec.encode_error(id_, error.code, error.message)
    if isinstance(error, OSError):
        error = error_from_os(error)
        return codec.encode_error(id_, error.code, error.message)
    if isinstance(error, ForeignPathError):
        return codec.encode_error(id_, InvalidRequest.code, str(error))
    if isinstance(error, NotSupported | ConnectionLost):
        return codec.encode_error(id_, InternalError.code, str(error))
    logger.error("handling %s failed", method, exc_info=error)
    return codec.encode_error(id_, InternalError.code, "internal error")


@asynccontextmanager
async def open_peer(peer: Peer) -> AsyncIterator[Peer]:
    """Run a peer beside the body. Leaving the block closes the channel; what is queued is still sent."""
    async with service(peer.run, stop=peer.channel.close_nowait):
        yield peer
