"""A registry and a rendezvous for tests, on loopback: both do what the test says and tell what they saw."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import trio
from attrs import field, frozen

from execenv._service import open_nursery
from execenv.relay.frames import Frame, InvalidFrame, decode, encode
from execenv.transports.http import Head, Refusal, not_an_upgrade, read_head, send_refusal
from execenv.transports.websocket import WebsocketChannel, accept

TEXT_FRAME = b"\x81\x02{}"
"""What a text message of a websocket server looks like."""


@frozen
class RegistryRequest:
    """What somebody asked the registry.

    Attributes:
        headers: with names in lower case.
        body: `None` without one.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def operation(self) -> str:
        """What follows the environment id: `register`, `connect`, `validate`."""
        return self.path.rpartition("/")[2]


@frozen
class Answer:
    """What the registry answers; `body` is sent as it is if it is bytes, and as JSON else."""

    status: int = 200
    body: Any = field(factory=dict)
    headers: Mapping[str, str] = field(factory=dict)


def error(status: int, code: str | None = None, message: str | None = None) -> Answer:
    """A refusal with the registry's error body."""
    return Answer(status, {"error": {"code": code, "message": message}})


NEVER = Answer(0)
"""The request is read, and no answer ever comes."""

Respond: TypeAlias = Callable[[RegistryRequest], Answer]
Answers: TypeAlias = Answer | Respond | list[Answer | Respond]


class FakeRegistry:
    """Answers from a table: operation to an answer, what gives one, or several of these, for a request each.

    Attributes:
        url: the base URL, without a slash at the end.
        answers: may be changed at any time. The last of several stays. An operation without one gets 404.
        requests: all of them, in the order in which they came.
    """

    def __init__(self, url: str, answers: Mapping[str, Answers]) -> None:
        self.url = url
        self.answers: dict[str, Answers] = dict(answers)
        self.requests: list[RegistryRequest] = []
        self._arrived, self._arriving = trio.open_memory_channel[RegistryRequest](1000)

    async def request(self, operation: str) -> RegistryRequest:
        """The next request that was not asked for yet, which is to be one of `operation`."""
        request = await self._arriving.receive()
        assert request.operation == operation, request
        return request

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                head = await read_head(stream)
                if head is None:
                    return
                request = await _request(stream, head)
                self.requests.append(request)
                self._arrived.send_nowait(request)
                answer = self._answer(request)
                if answer is NEVER:
                    await stream.receive_some(1)  # until the client gives up
                    return
                await stream.send_all(_response(answer))

    def _answer(self, request: RegistryRequest) -> Answer:
        answer = self.answers.get(request.operation, Answer(404, b"no such operation"))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return answer if isinstance(answer, Answer) else answer(request)


async def _request(stream: trio.SocketStream, head: Head) -> RegistryRequest:
    headers = {name: value.decode() for name, value in head.headers.items()}
    body, size = head.leftover, int(headers.get("content-length", "0"))
    while len(body) < size:
        more = await stream.receive_some()
        if not more:
            raise trio.BrokenResourceError("the request was cut off")
        body += more
    return RegistryRequest(head.method, head.path, headers, json.loads(body) if body else None)


def _response(answer: Answer) -> bytes:
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    lines = [f"HTTP/1.1 {answer.status} Whatever"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def open_fake_registry(answers: Mapping[str, Answers]) -> AsyncIterator[FakeRegistry]:
    """A registry until the block is left."""
    async with _listening() as (port, serve):
        registry = FakeRegistry(f"http://127.0.0.1:{port}", answers)
        serve(registry._serve)
        yield registry


class RelaySocket:
    """A websocket that somebody has opened to the rendezvous. What it sends is a frame, or the test fails.

    Attributes:
        head: of the request that opened it.
        channel: for what this class has no method for, such as the peer's `close_code`.
        ended: set when the websocket is over.
    """

    def __init__(self, head: Head, channel: WebsocketChannel) -> None:
        self.head = head
        self.channel = channel
        self.ended = trio.Event()
        self._arrived, self._arriving = trio.open_memory_channel[bytes](10_000)

    async def receive(self) -> Frame:
        """The next frame.

        Raises:
            trio.EndOfChannel: if the websocket is over.
        """
        data = await self._arriving.receive()
        try:
            return decode(data)
        except InvalidFrame as invalid:
            raise AssertionError(f"{data[:100]!r} is no frame: {invalid}") from invalid

    def receive_nowait(self) -> Frame:
        """The next frame if it is here already.

        Raises:
            trio.WouldBlock: if it is not.
        """
        return decode(self._arriving.receive_nowait())

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

    async def _run(self) -> None:
        with self._arrived:
            await self.channel.run(self._arrived.send_nowait)
        self.ended.set()


class FakeRendezvous:
    """Accepts or refuses websockets as the test says.

    Attributes:
        url: without a query, which the test may add.
        refusals: answers for the next sockets, instead of accepting them; one is used up by each.
        refused: the heads of the sockets that were refused.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.refusals: list[Refusal] = []
        self.refused: list[Head] = []
        self._arrived, self._arriving = trio.open_memory_channel[RelaySocket](1000)

    async def accept(self) -> RelaySocket:
        """The next websocket that was opened."""
        return await self._arriving.receive()

    async def _serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            head = await read_head(stream)
            if head is None:
                await stream.aclose()
                return
            refusal = self.refusals.pop(0) if self.refusals else not_an_upgrade(head)
            if refusal:
                self.refused.append(head)
                await send_refusal(stream, refusal)
                await stream.aclose()
                return
            channel = await accept(stream, head.raw, head.leftover, "fake rendezvous", binary=True)
            socket = RelaySocket(head, channel)
            self._arrived.send_nowait(socket)
            await socket._run()


@asynccontextmanager
async def open_fake_rendezvous() -> AsyncIterator[FakeRendezvous]:
    """A rendezvous until the block is left."""
    async with _listening() as (port, serve):
        rendezvous = FakeRendezvous(f"ws://127.0.0.1:{port}/rendezvous")
        serve(rendezvous._serve)
        yield rendezvous


Serve: TypeAlias = Callable[[trio.SocketStream], Any]


@asynccontextmanager
async def _listening() -> AsyncIterator[tuple[int, Callable[[Serve], None]]]:
    """A port, and what begins to serve it; both end with the block, whose own exception leaves it."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with open_nursery() as nursery:
        yield port, lambda serve: nursery.start_soon(partial(trio.serve_listeners, serve, listeners))
        nursery.cancel_scope.cancel()
