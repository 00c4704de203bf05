"""Connections whose other end is silent, slow or gone, over real sockets; sessions of a real server."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pybase64
import pytest
import trio

from execenv.server import open_local_sessions
from execenv.server.listen import Listener
from execenv.transports._frames import Event, FrameCodec, Ping
from tests.conftest import ANY_PORT, SERVE, run_websocket_server
from tests.fakes import Watched, python
from tests.test_robustness import HEAD

TIME_LIMIT = 30.0
MIB = 1024 * 1024
Message = dict[str, Any]


class RawClient:
    """A websocket that reads only when it is told to, and answers a ping only if it `lives`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.lives = True
        self.stops = 0.0  # seconds that everything in this program stands still behind each answer
        self.pings = 0
        self._codec = FrameCodec(client=True, max_message=1 << 30)
        self._events: deque[Event] = deque()
        self._last_id = 0

    async def notify(self, method: str, **members: Any) -> None:
        message = json.dumps({"method": method, **members}).encode()
        for frame in self._codec.encode_message(message):
            await self.stream.send_all(b"".join(bytes(part) for part in frame))

    async def next(self) -> Message | None:
        """The next message; `None` if the server has ended the connection."""
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, bytes):
                    message: Message = json.loads(event)
                    return message
                if isinstance(event, Ping):
                    self.pings += 1
                    if self.lives:
                        os.write(self.stream.socket.fileno(), self._codec.encode_pong(event.payload))
                        time.sleep(self.stops)  # noqa: ASYNC251 - nobody gets a turn
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return None
            self._events.extend(self._codec.receive(data))

    async def call(self, method: str, **params: Any) -> Message:
        """The answer, result or error, to a request."""
        self._last_id += 1
        await self.notify(method, id=self._last_id, params=params)
        while True:
            message = await self.next()
            assert message is not None
            if message.get("id") == self._last_id:
                return message

    async def initialize(self, session_id: str | None = None) -> str:
        answer = await self.call("initialize", clientName="", resumeSessionId=session_id)
        await self.notify("initialized")
        found: str = answer["result"]["sessionId"]
        return found

    async def start(self, argv: list[str], **changes: Any) -> None:
        params = {"processId": "p", "argv": argv, "cwd": "file:///", "env": {}, "tty": False} | changes
        assert "result" in await self.call("process/start", **params)


@asynccontextmanager
async def raw_client(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[RawClient]:
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await sock.connect(("127.0.0.1", port))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(HEAD)
        received = b""
        while b"\r\n\r\n" not in received:
            received += await stream.receive_some(1)
        yield RawClient(stream)


@asynccontextmanager
async def listening(ping_interval: float, pong_timeout: float) -> AsyncIterator[int]:
    """The port of a server in this process."""
    with trio.fail_after(TIME_LIMIT):
        async with open_local_sessions() as sessions, trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            server = Listener(sessions, ping_interval=ping_interval, pong_timeout=pong_timeout)
            nursery.start_soon(server.serve, [listener])
            yield listener.socket.getsockname()[1]
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(*options: str) -> AsyncIterator[int]:
    """The port of a server of its own."""
    with trio.fail_after(TIME_LIMIT), run_websocket_server([*SERVE, ANY_PORT, *options]) as server:
        yield int(server.url.rpartition(":")[2])


async def test_client_that_answers_nothing_is_dropped_and_may_resume() -> None:
    async with listening(0.2, 0.3) as port, raw_client(port) as client:
        session_id = await client.initialize()
        client.lives = False
        began = trio.current_time()
        assert await client.next() is None
        assert trio.current_time() - began == pytest.approx(0.5, abs=0.25)
        assert client.pings == 1
        async with raw_client(port) as other:
            assert await other.initialize(session_id) == session_id


async def test_client_that_answers_pings_idles_as_long_as_it_likes() -> None:
    async with listening(0.05, 0.3) as port, raw_client(port) as client:
        await client.initialize()
        with trio.move_on_after(2) as idling:
            await client.next()
        assert idling.cancelled_caught
        assert client.pings > 20


async def test_answer_that_came_while_the_whole_program_stood_still_counts() -> None:
    async with listening(0.02, 0.1) as port, raw_client(port) as client:
        await client.initialize()
        client.stops = 0.15
        with trio.move_on_after(2) as idling:
            await client.next()
        assert idling.cancelled_caught
        assert client.pings >= 8


async def test_client_that_is_slow_to_read_is_never_dropped() -> None:
    """The kernel takes no more for it, so its silence means nothing."""
    async with listening(0.2, 0.4) as port, raw_client(port, receive_buffer=8192) as client:
        await client.initialize()
        await client.start(["head", "-c", str(32 * MIB), "/dev/zero"])
        await trio.sleep(2)  # a silent client is given 0.6
        received = seq = 0
        while True:
            pushed = await client.next()
            assert pushed is not None
            seq += 1
            assert pushed["params"]["seq"] == seq
            received += len(pybase64.b64decode(pushed["params"].get("chunk", "")))
            if pushed["method"] == "process/closed":
                break
        assert received == 32 * MIB


async def test_resume_gets_in_although_the_old_connection_was_never_closed() -> None:
    async with serving() as port, raw_client(port) as stopped, raw_client(port) as client:
        session_id = await stopped.initialize()
        await stopped.start(["sleep", "1000"])
        stopped.lives = False
        began = trio.current_time()
        refusals = 0
        while True:
            answer = await client.call("initialize", clientName="", resumeSessionId=session_id)
            if "result" in answer:
                break
            assert answer["error"]["code"] == -32010
            refusals += 1
            await trio.sleep(0.1)
        assert refusals > 0
        assert trio.current_time() - began == pytest.approx(5, abs=1.5)
        assert await stopped.next() is None
        await client.notify("initialized")
        answer = await client.call("process/terminate", processId="p")
        assert answer["result"]["running"] is True


async def test_detached_session_is_kept_by_a_process_that_runs() -> None:
    async with serving("--detached-ttl", "running=never,exited=0.2") as port:
        async with raw_client(port) as client:
            session_id = await client.initialize()
            await client.start(["sleep", "1000"])
        await trio.sleep(0.5)
        async with raw_client(port) as client:
            assert await client.initialize(session_id) == session_id
            assert (await client.call("process/terminate", processId="p"))["result"]["running"] is True
            while (message := await client.next()) and message.get("method") != "process/closed":
                pass
        await trio.sleep(0.5)
        async with raw_client(port) as client:
            refusal = await client.call("initialize", clientName="", resumeSessionId=session_id)
            assert refusal["error"]["message"] == f"unknown session id {session_id}"


async def test_detached_session_waits_longer_for_somebody_to_read_what_has_ended() -> None:
    watched = Watched()
    async with serving("--detached-ttl", "running=0.2,exited=never") as port:
        async with raw_client(port) as ending, raw_client(port) as running:
            ended_id = await ending.initialize()
            await ending.start(["echo", "done"])
            while (message := await ending.next()) and message.get("method") != "process/closed":
                pass
            running_id = await running.initialize()
            await running.start(python("import os, time; print(os.getpid(), flush=True); time.sleep(1000)"))
            pushed = await running.next()
            assert pushed is not None
            watched.add(int(pybase64.b64decode(pushed["params"]["chunk"])))
        await watched.wait_gone()
        async with raw_client(port) as client:
            refusal = await client.call("initialize", clientName="", resumeSessionId=running_id)
            assert refusal["error"]["message"] == f"unknown session id {running_id}"
            assert await client.initialize(ended_id) == ended_id
            chunks = (await client.call("process/read", processId="p"))["result"]["chunks"]
            assert [pybase64.b64decode(chunk["chunk"]) for chunk in chunks] == [b"done\n"]
    watched.close()


NUMBERS = """
import os
for number in range(3_000_000):
    if number % 8192 == 0:
        block = b"".join(b"%010d" % n for n in range(number, number + 8192))
        while block:
            block = block[os.write(1, block):]
"""


async def test_no_output_is_lost_at_any_of_many_cuts() -> None:
    """A child that writes as fast as it can, and a client that comes back without the last 3 MiB."""
    choose = random.Random(7)
    received = bytearray()
    seq = cuts = 0
    session_id = None
    closed = False

    def take(message: Message) -> None:
        nonlocal seq, closed
        params = message["params"]
        if params["seq"] == seq + 1:  # not what was read already
            seq += 1
            received.extend(pybase64.b64decode(params.get("chunk", "")))
            closed = message["method"] == "process/closed"

    async with serving() as port:
        while not closed:
            async with raw_client(port) as client:
                begins = session_id is None
                session_id = await client.initialize(session_id)
                window = 4 * MIB
                if begins:
                    await client.start(python(NUMBERS), outputWindow=window)
                else:
                    found = (await client.call("process/read", processId="p", afterSeq=seq))["result"]
                    assert found.get("evictedBytes", 0) <= len(received)
                    for chunk in found["chunks"]:
                        assert chunk["seq"] == seq + 1
                        take({"method": "process/output", "params": chunk})
                    if found["exited"]:
                        closed = found["closed"]
                        continue
                    taken = {"processId": "p", "seq": seq, "window": window}
                    await client.notify("process/outputTaken", params=taken)
                until = len(received) + choose.randrange(2 * MIB, 8 * MIB)
                while len(received) < until and not closed:
                    message = await client.next()
                    assert message is not None
                    if "method" in message:
                        take(message)
                        if seq % 16 == 0:
                            taken = {"processId": "p", "seq": seq}
                            await client.notify("process/outputTaken", params=taken)
                if not closed:
                    await client.notify("process/outputTaken", params={"processId": "p", "seq": seq})
                    lost = 0
                    while lost < 3 * MIB and (message := await client.next()):
                        if message["method"] != "process/output":
                            break
                        lost += len(message["params"]["chunk"]) * 3 // 4
                    cuts += 1
    assert cuts >= 3
    count = (3_000_000 + 8191) // 8192 * 8192
    assert len(received) == count * 10
    assert received == b"".join(b"%010d" % number for number in range(count))
