"""A registry and a rendezvous that do what a test tells them, on streams in memory or on loopback."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import httpcore2
import trio
import trio.testing
from attrs import Factory, define, field, frozen

from execenv._service import open_nursery
from execenv.relay.frames import Frame, InvalidFrame, decode, encode
from execenv.relay.keys import PublicKey
from execenv.relay.registry import NOISE_PROFILE, Headers, Registration, Registry, open_registry
from execenv.transports import websocket
from execenv.transports._pump import StreamIO
from execenv.transports.http import Head, Refusal, read_head, send_refusal
from execenv.transports.websocket import WebsocketChannel

ID = "env_abc-1"
API_KEY = "sk-secret-of-the-executor"
SIGNATURE = "sig=secret-signature"
AUTHORIZATION = "secret-authorization"
REGISTRATION_ID = "reg-1"
SOCKET_URL = f"wss://relay.example/rendezvous/{ID}?role=executor&{SIGNATURE}"
KEY = PublicKey(b"x" * 32, b"m" * 1184)
HARNESS_KEY = PublicKey(b"y" * 32, b"n" * 1184)


def bearer(key: str = API_KEY) -> Headers:
    return lambda: {"authorization": f"Bearer {key}"}


@frozen
class Answer:
    """What a registry answers.

    Attributes:
        body: bytes as they are, everything else as JSON.
        hangs: nothing follows the body, and the connection stays open: it is shorter than promised.
        delay: seconds before the first byte.
        announces_end: whether it is said that the connection ends with the answer, as it does.
    """

    body: Any = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    hangs: bool = False
    delay: float = 0.0
    announces_end: bool = True

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


GARBAGE = Answer(status=0)
"""No HTTP at all."""
NOTHING = Answer(status=-1)
"""The connection is closed."""
NO_SUCH_OPERATION = Answer(status=404)
TEXT_FRAME = b"\x81\x02{}"
"""What a text message of a websocket server looks like."""


def error_answer(status: int, code: str | None = None, message: str | None = None) -> Answer:
    error = {"code": code, "message": message}
    return Answer({"error": {name: value for name, value in error.items() if value is not None}}, status)


def registered(url: str = SOCKET_URL, **changes: Any) -> Answer:
    """A good answer to `register`, with changes; `None` leaves a member out."""
    answer = {
        "environment_id": ID,
        "url": url,
        "security_profile": NOISE_PROFILE,
        "executor_registration_id": REGISTRATION_ID,
    }
    answer |= changes
    return Answer({name: value for name, value in answer.items() if value is not None})


def connected(**changes: Any) -> Answer:
    """A good answer to `connect`, with changes; `None` leaves a member out."""
    more = {
        "executor_public_key": KEY.to_json(),
        "harness_key_authorization": AUTHORIZATION,
    }
    return registered(**(more | changes))


def clear(url: str = SOCKET_URL, **changes: Any) -> Answer:
    """A good answer to `register` in clear text."""
    return registered(url, **({"security_profile": None, "executor_registration_id": None} | changes))


@frozen
class Asked:
    """A request that a registry got."""

    head: Head
    body: bytes

    @property
    def line(self) -> str:
        return self.head.raw.decode().partition("\r\n")[0]

    @property
    def operation(self) -> str:
        """What follows the environment id: `register`, `connect`, `validate`."""
        return self.head.path.rpartition("/")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        value = self.head.headers.get(name)
        return None if value is None else value.decode()


Respond: TypeAlias = Callable[[Asked], Answer]
"""What makes an answer when it is asked for."""


@define(eq=False)
class FakeRegistry:
    """Records what it is asked, and answers from a table: by operation, the last answer again and again. An
    operation without any gets 404."""

    answers: dict[str, list[Answer | Respond]] = Factory(dict)
    asked: list[Asked] = Factory(list)
    url: str = "http://127.0.0.1:1"
    _given: int = field(default=0, init=False)
    _changed: trio.Event = field(factory=trio.Event, init=False)
    _open: int = field(default=0, init=False)
    _closed: trio.Event = field(factory=trio.Event, init=False)

    async def wait_closed(self) -> None:
        """Return when all connections are closed at this end."""
        while self._open:
            await self._closed.wait()

    def answer(self, operation: str, *answers: Answer | Respond) -> None:
        self.answers[operation] = list(answers)

    async def request(self, operation: str) -> Asked:
        """The next request that this has not given yet, which is to be one of `operation`."""
        self._given += 1
        while len(self.asked) < self._given:
            await self._changed.wait()
        asked = self.asked[self._given - 1]
        assert asked.operation == operation, asked
        return asked

    def count(self, operation: str) -> int:
        return sum(asked.operation == operation for asked in self.asked)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One request, and its answer."""
        async with stream:
            head = await read_head(stream)
            if head is None:
                return
            body = head.leftover
            while len(body) < int(head.headers.get("content-length", b"0")):
                more = await stream.receive_some()
                if not more:
                    return
                body += more
            asked = Asked(head, bytes(body))
            self.asked.append(asked)
            self._changed.set()
            self._changed = trio.Event()
            answers = self.answers.get(asked.operation, [NO_SUCH_OPERATION])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if not isinstance(answer, Answer):
                answer = answer(asked)
            await trio.sleep(answer.delay)
            await self._send(stream, answer)

    async def _send(self, stream: trio.abc.Stream, answer: Answer) -> None:
        if answer == NOTHING:
            return
        if answer == GARBAGE:
            await stream.send_all(b"\x00\x01 this is no HTTP\r\n\r\n")
            return
        lines = [f"HTTP/1.1 {answer.status} So"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        length = len(answer.data) + answer.hangs
        if answer.announces_end:
            lines.append("connection: close")
        lines += [f"content-length: {length}", "", ""]
        try:
            await stream.send_all("\r\n".join(lines).encode())
            await stream.send_all(answer.data)
        except trio.BrokenResourceError:
            return  # who asked has seen enough
        if answer.hangs:
            await trio.sleep_forever()

    async def serve_quietly(self, stream: trio.abc.Stream) -> None:
        self._open += 1
        try:
            with suppress(trio.BrokenResourceError):
                await self.serve(stream)
        finally:
            self._open -= 1
            self._closed.set()
            self._closed = trio.Event()

    @asynccontextmanager
    async def open_client(self, headers: Headers | None = None) -> AsyncIterator[Registry]:
        """A client whose connections stay in memory, for a mock clock."""
        async with trio.open_nursery() as nursery:
            backend = _Backend(nursery, self.serve_quietly)
            url = "https://registry.example/base"
            async with open_registry(url, headers=headers or bearer(), network_backend=backend) as registry:
                yield registry
            nursery.cancel_scope.cancel()


@define(eq=False)
class _Backend(httpcore2.AsyncNetworkBackend):
    _nursery: trio.Nursery
    _serve: Callable[[trio.abc.Stream], Awaitable[None]]

    async def connect_tcp(self, *_args: Any, **_options: Any) -> httpcore2.AsyncNetworkStream:
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return _Stream(ours)


@define(eq=False)
class _Stream(httpcore2.AsyncNetworkStream):
    _stream: trio.abc.Stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as error:
            raise httpcore2.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(self, *_args: Any, **_options: Any) -> httpcore2.AsyncNetworkStream:
        return self

    def get_extra_info(self, info: str) -> None:
        return None


@asynccontextmanager
async def _listening(
    serve: Callable[[trio.SocketStream], Awaitable[None]],
) -> AsyncIterator[int]:
    async with open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(partial(trio.serve_listeners, serve, [listener]))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_fake_registry(tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeRegistry]:
    """A registry on a free port of loopback."""
    registry = FakeRegistry()

    async def serve(stream: trio.SocketStream) -> None:
        if tls is None:
            await registry.serve_quietly(stream)
        else:
            await registry.serve_quietly(trio.SSLStream(stream, tls, server_side=True, https_compatible=True))

    async with _listening(serve) as port:
        registry.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
        yield registry


class RelaySocket:
    """A websocket that somebody has opened to the rendezvous.

    Attributes:
        head: of the request that opened it.
        channel: for what this class has no method for, such as the peer's `close_code`.
        received: all that came, of which `receive` gives one after the other.
        ended: set when the websocket is over.
    """

    def __init__(self, head: Head, channel: WebsocketChannel, changed: Callable[[], None]) -> None:
        self.head = head
        self.channel = channel
        self.received: list[bytes] = []
        self.ended = trio.Event()
        self._arrived, self._arriving = trio.open_memory_channel[bytes](10_000)
        self._changed = changed

    async def receive(self) -> Frame:
        """The next frame. What is none fails the test.

        Raises:
            trio.EndOfChannel: if the websocket is over.
        """
        data = await self._arriving.receive()
        try:
            return decode(data)
        except InvalidFrame as invalid:
            raise AssertionError(f"{data[:100]!r} is no frame: {invalid}") from invalid

    def send(self, *frames: Frame) -> None:
        for frame in frames:
            self.channel.send_nowait(encode(frame))

    def send_raw(self, data: bytes) -> None:
        """A binary message that may be no frame."""
        self.channel.send_nowait(data)

    def send_text(self) -> None:
        """A text message, which has no meaning here."""
        self.channel.send_urgent(TEXT_FRAME)

    def close(self, code: int = 1000, reason: str = "") -> None:
        self.channel.close_nowait(code, reason)

    async def run(self) -> None:
        with self._arrived:
            await self.channel.run(self._take)
        self.ended.set()
        self._changed()

    def _take(self, data: bytes) -> None:
        self.received.append(data)
        self._arrived.send_nowait(data)
        self._changed()


@define(eq=False)
class FakeRendezvous:
    """Refuses, closes or keeps websockets, as it is told; the last of `plan` again and again.

    Attributes:
        plan: the status of a refusal; 101 to keep the socket, 102 to keep it
            and never read it; or the code of a close at once.
        heads: of all requests, also of those that were refused.
        sockets: those that were kept.
    """

    plan: list[int] = field(factory=lambda: [101])
    heads: list[Head] = Factory(list)
    sockets: list[RelaySocket] = Factory(list)
    base: str = ""
    _given: int = field(default=0, init=False)
    _changed: trio.Event = field(factory=trio.Event, init=False)

    @property
    def url(self) -> str:
        return f"{self.base}/rendezvous/{ID}?role=executor&{SIGNATURE}"

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when that is so; asked again at everything that happens here."""
        while not condition():
            await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await self._serve(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            head = await read_head(stream)
            if head is None:
                return
            self.heads.append(head)
            step = self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]
            self._change()
            if step not in (101, 102) and step < 1000:
                await send_refusal(stream, Refusal(step, f"not with {head.query}"))
                return
            channel = await websocket.accept(stream, head.raw, head.leftover, "executor", binary=True)
            if step == 102:
                await trio.sleep_forever()
            if step != 101:
                channel.close_nowait(step, "so it was told")
                await channel.run(lambda message: None)
                return
            socket = RelaySocket(head, channel, self._change)
            self.sockets.append(socket)
            self._change()
            await socket.run()

    @property
    def received(self) -> list[bytes]:
        """What came on all of the sockets, one socket after the other."""
        return [data for socket in self.sockets for data in socket.received]

    async def accept(self) -> RelaySocket:
        """The next socket that was opened and that this has not given yet."""
        self._given += 1
        await self.wait_until(lambda: len(self.sockets) >= self._given)
        return self.sockets[self._given - 1]


@asynccontextmanager
async def open_fake_rendezvous(plan: Iterable[int] = (101,)) -> AsyncIterator[FakeRendezvous]:
    """A rendezvous on a free port of loopback."""
    rendezvous = FakeRendezvous(list(plan))
    async with _listening(rendezvous.serve) as port:
        rendezvous.base = f"ws://127.0.0.1:{port}"
        yield rendezvous


class EchoStreams:
    """In place of `ExecutorStreams`: what comes goes back."""

    async def run_socket(
        self,
        channel: WebsocketChannel,
        environment_id: str,
        registration_id: str | None,
        validate: object,
    ) -> None:
        await channel.run(channel.send_nowait)


class ScriptedRegistry(Registry):
    """Gives one answer after the other to `register`, the last again and again; an exception is raised."""

    def __init__(self, *answers: Registration | Exception) -> None:
        self._answers = list(answers)
        self.times: list[float] = []

    @property
    def shown(self) -> str:
        return "https://registry.example"

    async def register(self, environment_id: str, key: PublicKey | None) -> Registration:
        await trio.lowlevel.checkpoint()
        self.times.append(trio.current_time())
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def memory_socket(**options: Any) -> tuple[WebsocketChannel, trio.StapledStream[Any, Any]]:
    """The executor's end of a relay socket after its handshake, and the stream of the other end."""
    ours, theirs = trio.testing.memory_stream_pair()
    channel = WebsocketChannel("relay", StreamIO(ours), client=True, leftover=b"", binary=True, **options)
    return channel, theirs
