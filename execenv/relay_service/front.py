"""The front door of a relay: one port, one request per connection, which a websocket may follow.

By these rules, in this order: no `Origin` (a browser is asking), `/readyz`, `/metrics`, the registry's
operations, the rendezvous. A connection has `handshake_deadline` for all that goes before a websocket.
"""

from __future__ import annotations

import http
import ipaddress
import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from logging import getLogger

import h11
import orjson
import trio
from attrs import evolve, field, frozen

from execenv.errors import ConnectFailed
from execenv.relay_service import audit
from execenv.relay_service.api import ROLES, Clock, Denied, Gate, Registry, store_away
from execenv.relay_service.audit import Caller
from execenv.relay_service.exchange import Exchange, Offline
from execenv.relay_service.limits import Buckets, Entry, Table, TooMany
from execenv.relay_service.metrics import Metrics
from execenv.relay_service.rendezvous import Admission, Rendezvous, too_many
from execenv.relay_service.settings import Settings
from execenv.relay_service.sockets import ExecutorSocket, HarnessSocket
from execenv.relay_service.store import Store, StoreUnavailable
from execenv.relay_service.tokens import is_current, is_environment_id
from execenv.transports import websocket
from execenv.transports.http import MAX_HEAD, Head, not_an_upgrade, peer_address, read_head

logger = getLogger(__name__)

REJECTION = "x-codex-rendezvous-rejection-reason"
TOKEN_GONE = (1008, "its token is no longer valid")
ENDING = (1012, "the relay ends")
UNREGISTERED = (1012, "the relay has lost its registration")
LOOK_UPS = 500
"""Registrations of connected executors that are looked for in one sweep."""
DISCARDED = 256 * 1024
"""Bytes of a request that is refused before its end, which are read so that the answer is."""
DISCARD_TIME = 1.0

_REGISTRY = re.compile(r"/cloud/environment/([^/]*)/([a-z]+)")
_RENDEZVOUS = re.compile(r"/rendezvous/([^/]*)")


@frozen
class Response:
    """What is answered instead of a websocket."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(factory=dict)

    def encoded(self, method: str) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.body:
            lines.append(f"content-type: {self.content_type}")
        lines += [f"content-length: {len(self.body)}", "cache-control: no-store", "connection: close", "", ""]
        return "\r\n".join(lines).encode() + (b"" if method == "HEAD" else self.body)


def _denial(denied: Denied, *, rendezvous: bool = False) -> Response:
    answer = denied.answer
    headers = dict(answer.headers)
    if rendezvous:
        headers[REJECTION] = answer.code
    return Response(answer.status, orjson.dumps(answer.body), headers=headers)


class Node:
    """One process of a relay: its sockets, and what they share."""

    def __init__(self, store: Store, exchange: Exchange, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._exchange = exchange
        self._settings = settings
        self._clock = clock
        self._metrics = Metrics()
        self._table = Table(settings)
        self._gate = Gate(store, settings, self._metrics, clock)
        self._registry = Registry(store, exchange, self._gate, settings, self._metrics, clock)
        self._rendezvous = Rendezvous(store, self._gate, settings, clock)
        self._pending = trio.CapacityLimiter(settings.max_pending)
        self._silent: dict[trio.CancelScope, float] = {}  # whose request is not there yet, and since when
        self._refusals = Buckets(settings.failure_rate, settings.failure_burst, settings.max_buckets)
        self._accepting = trio.CancelScope()
        self._to_look_up: list[Entry] = []

    async def run(self, listener: trio.SocketListener) -> None:
        """Serve until `stop`, and until the last socket has ended then."""
        async with trio.open_nursery() as nursery, listener:
            with self._accepting:
                async with trio.open_nursery() as tasks:
                    tasks.start_soon(self._sweep)
                    await trio.serve_listeners(self._serve_one, [listener], handler_nursery=nursery)

    def stop(self) -> None:
        """Take no more connections, and end all websockets."""
        self._accepting.cancel()
        for entry in self._table:
            entry.close(*ENDING)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(self._settings.sweep_interval)
            await self.sweep()

    async def sweep(self) -> None:
        """End the sockets whose token was revoked, or has expired, and executors' that nobody can look up."""
        entries = tuple(self._table)  # before the store is asked: what comes later has a token that it knew
        if not entries:
            return
        try:
            known = {token.token_id: token for token in await self._store.tokens()}
        except StoreUnavailable as error:
            logger.warning("the store cannot be asked which tokens hold: %s", error)
            return
        now = self._clock()
        for entry in entries:
            token = known.get(entry.token_id)
            if token is None or not is_current(token, now):
                entry.close(*TOKEN_GONE)
        await self._sweep_registrations()

    async def _sweep_registrations(self) -> None:
        """Some executors at a time, as each has to be asked for."""
        if not self._to_look_up:
            self._to_look_up = [entry for entry in self._table if entry.role == "executor"]
        some, self._to_look_up = self._to_look_up[:LOOK_UPS], self._to_look_up[LOOK_UPS:]
        try:
            for entry in some:
                if await self._store.registration(entry.environment_id) is None:
                    entry.close(*UNREGISTERED)  # its URL is not taken then, so that it registers again
        except StoreUnavailable as error:
            logger.warning("the store cannot be asked which executors are registered: %s", error)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await self._serve(stream)
            except (ConnectFailed, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                logger.debug("a connection ended early: %s", error)
            except Exception:
                logger.exception("a connection ended with an error")

    async def _serve(self, stream: trio.SocketStream) -> None:
        if self._pending.statistics().tasks_waiting >= self._settings.max_waiting:
            denied = Denied(503, "too_many_connections", "too many connections wait: try again")
            await self._refuse(stream, "POST", denied, Caller(peer_address(stream)))
            return
        if not self._pending.available_tokens:
            self._hurry_a_silent_one()
        with trio.CancelScope() as scope:
            async with self._pending:
                scope.deadline = trio.current_time() + self._settings.handshake_deadline
                with self._listening(scope):
                    head = await read_head(stream)
                if head is None:
                    await stream.send_all(Response(400).encoded("GET"))
                    return
                caller = Caller(peer_address(stream), audit.request_id(head.headers.get("x-request-id")))
                found = _RENDEZVOUS.fullmatch(head.path)
                if found is None or "origin" in head.headers:
                    await self._answer(stream, head, caller, scope)
                    return
                caller = evolve(caller, environment=found[1])
                admission, caller = await self._admit(stream, head, caller)
            if admission is not None:
                await self._serve_socket(stream, head, admission, caller, scope)

    @contextmanager
    def _listening(self, scope: trio.CancelScope) -> Iterator[None]:
        """While a client still has to say what it wants."""
        deadline = scope.deadline
        self._silent[scope] = trio.current_time()
        try:
            yield
        finally:
            self._silent.pop(scope, None)
            scope.deadline = deadline

    def _hurry_a_silent_one(self) -> None:
        """Somebody waits for a place: who has one and says nothing has it for `max_silence` from then on.
        Otherwise some hundred connections per second, which cost nothing, would keep out everybody."""
        scope = next(iter(self._silent), None)
        if scope is not None:
            scope.deadline = min(scope.deadline, self._silent.pop(scope) + self._settings.max_silence)

    # Requests.

    async def _answer(
        self, stream: trio.SocketStream, head: Head, caller: Caller, scope: trio.CancelScope
    ) -> None:
        found = _REGISTRY.fullmatch(head.path)
        try:
            if "origin" in head.headers:
                raise Denied(403, "origin_refused", "this is not for browsers")
            if head.path in ("/readyz", "/metrics"):
                _check_method(head, "GET", "HEAD")
                response = await (
                    self._readyz() if head.path == "/readyz" else self._metrics_text(stream, head)
                )
                await stream.send_all(response.encoded(head.method))
                return
            if found is None or found[2] not in ROLES:
                raise Denied(404, "not_found", "there is nothing here")
            _check_method(head, "POST")
            caller = evolve(caller, environment=found[1], role=ROLES[found[2]])
            with self._listening(scope):
                body = await read_body(stream, head, self._settings.max_body)
        except Denied as denied:
            await self._refuse(stream, head.method, denied, caller)
            return
        answer, caller = await self._registry.answer(
            found[2], caller, head.headers.get("authorization"), body
        )
        if answer.code:
            self._note_refusal(caller, answer.status, answer.code)
        else:
            audit.write("request", caller, now=self._clock(), operation=found[2])
        await stream.send_all(
            Response(answer.status, orjson.dumps(answer.body), headers=answer.headers).encoded(head.method)
        )

    async def _readyz(self) -> Response:
        try:
            await self._store.ping()
        except StoreUnavailable:
            return Response(503)
        return Response(200)

    async def _metrics_text(self, stream: trio.SocketStream, head: Head) -> Response:
        # A proxy on this machine asks for others.
        proxied = not head.headers.keys().isdisjoint(("forwarded", "x-forwarded-for"))
        local = ipaddress.ip_address(stream.socket.getpeername()[0]).is_loopback and not proxied
        if not local and not self._settings.public_metrics:
            raise Denied(403, "metrics_refused", "metrics are for this machine only: --public-metrics")
        text = self._metrics.text(self._table)
        return Response(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    async def _refuse(
        self,
        stream: trio.SocketStream,
        method: str,
        denied: Denied,
        caller: Caller,
        *,
        rendezvous: bool = False,
    ) -> None:
        self._note_refusal(caller, denied.answer.status, denied.answer.code)
        await stream.send_all(_denial(denied, rendezvous=rendezvous).encoded(method))
        if method == "POST":  # or not known
            await _discard(stream)

    def _note_refusal(self, caller: Caller, status: int, code: str) -> None:
        self._metrics.refusals[code] += 1
        # Who only tries does not fill the log, neither with lines nor with what he calls an environment.
        if not is_environment_id(caller.environment) or code == "too_many_failures":
            return
        if caller.token_id or not self._refusals.take(caller.address.rpartition(":")[0], self._clock()):
            audit.write("refusal", caller, now=self._clock(), status=status, reason=code)

    # Websockets.

    async def _admit(
        self, stream: trio.SocketStream, head: Head, caller: Caller
    ) -> tuple[Admission | None, Caller]:
        """What a client may open, `None` if nothing, which it has been told then; and who it is."""
        try:
            _check_method(head, "GET")
            ticket = await self._rendezvous.ticket(caller, head.query)
            role = "harness" if ticket is None else ticket.role
            caller = evolve(caller, role=role, token_id="" if ticket is None else ticket.token_id)
            admission = await self._rendezvous.admit(caller, ticket, head.headers.get("authorization"))
            caller = evolve(caller, token_id=admission.token_id)
            wrong = not_an_upgrade(head)
            if wrong is not None:
                raise Denied(wrong.status, "no_upgrade", wrong.body)
        except StoreUnavailable:
            denied = store_away()
        except Denied as error:
            denied = error
        else:
            return admission, caller
        await self._refuse(stream, head.method, denied, caller, rendezvous=True)
        return None, caller

    async def _serve_socket(
        self,
        stream: trio.SocketStream,
        head: Head,
        admission: Admission,
        caller: Caller,
        scope: trio.CancelScope,
    ) -> None:
        socket: ExecutorSocket | HarnessSocket
        if admission.role == "executor":
            socket = ExecutorSocket(self._settings, self._metrics)
        else:
            socket = HarnessSocket(self._settings, self._metrics, admission.principal)
        entry = Entry(
            admission.role,
            admission.environment_id,
            admission.token_id,
            socket.close,
            lambda: socket.queued,
            admission.principal,
            socket.probe,
        )
        channel = None
        try:
            self._table.add(entry)
        except TooMany as error:
            await self._refuse(stream, "GET", too_many(error), caller, rendezvous=True)
            return
        try:
            await self._rendezvous.use_up(admission)
            async with self._attached(socket, admission):
                channel = await websocket.accept(
                    stream,
                    head.raw,
                    head.leftover,
                    f"websocket {caller.address}",
                    max_message=admission.max_frame,
                    ping_interval=self._settings.ping_interval,
                    pong_timeout=self._settings.pong_timeout,
                    binary=True,
                )
                scope.deadline = math.inf
                began = self._clock()
                audit.write("connect", caller, now=began)
                try:
                    await socket.run(channel)
                finally:
                    now = self._clock()
                    audit.write(
                        "disconnect",
                        caller,
                        now=now,
                        code=socket.close_code,
                        seconds=round(now - began, 3),
                        bytes_in=socket.bytes_in,
                        bytes_out=socket.bytes_out,
                    )
                    socket.end()
        except (Denied, Offline, StoreUnavailable) as error:
            if channel is None:
                await self._refuse(stream, "GET", _as_denied(error), caller, rendezvous=True)
        finally:
            socket.end()
            self._table.remove(entry)

    @asynccontextmanager
    async def _attached(
        self, socket: ExecutorSocket | HarnessSocket, admission: Admission
    ) -> AsyncIterator[None]:
        environment_id = admission.environment_id
        if isinstance(socket, HarnessSocket):
            presence = await self._exchange.presence(environment_id)
            if presence is None or presence.registration_id != admission.registration_id:
                raise Offline  # or one that is about to be replaced, and knows nothing of this registration
            async with self._exchange.harness(environment_id, socket) as link:
                socket.attach(link)
                yield
            return
        async with self._exchange.executor(
            environment_id, admission.registration_id, socket.accept, socket.replaced
        ):
            yield


def _as_denied(error: Exception) -> Denied:
    if isinstance(error, Denied):
        return error
    if isinstance(error, Offline):
        return Denied(409, "environment_offline", "the executor of this environment is not connected")
    return store_away()


def _check_method(head: Head, *methods: str) -> None:
    if head.method not in methods:
        raise Denied(405, "method_not_allowed", "not with this method", {"allow": ",".join(methods)})


async def read_body(stream: trio.SocketStream, head: Head, most: int) -> bytes:
    """The body of a request whose head was read.

    Raises:
        Denied: if it has more than `most` bytes, is cut off, or is no HTTP.
    """
    length = head.headers.get("content-length", b"")
    if length.isdigit() and (len(length) > 18 or int(length) > most):
        raise _too_large(most)
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    parser.receive_data(head.raw + head.leftover)
    body = bytearray()
    try:
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                if parser.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[])
                    await stream.send_all(parser.send(go_on) or b"")
                parser.receive_data(bytes(await stream.receive_some(MAX_HEAD)))
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > most:
                    raise _too_large(most)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
    except h11.RemoteProtocolError:
        raise Denied(400, "invalid_request", "the body is no HTTP, or is cut off") from None


def _too_large(most: int) -> Denied:
    return Denied(413, "too_large", f"a body has at most {most} bytes")


async def _discard(stream: trio.SocketStream) -> None:
    """Read what a client still sends: closed before that, the connection would lose our answer."""
    await stream.send_eof()
    left = DISCARDED
    with trio.move_on_after(DISCARD_TIME):
        while left > 0 and (data := await stream.receive_some(MAX_HEAD)):
            left -= len(data)
