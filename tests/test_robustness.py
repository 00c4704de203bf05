"""What a server must bear: nonsense, crowds, clients that die and clients that are slow."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import pybase64
import pytest
import trio
from attrs import Factory, define, field, frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execenv import codec, open_environment
from execenv.server.listen import serve_channel
from execenv.server.sessions import open_sessions
from execenv.transports._frames import Close, FrameCodec
from execenv.transports.memory import memory_pair
from tests.conftest import SERVE
from tests.fakes import FakeHost, Watched

TIME_LIMIT = 60.0
MIB = 1024 * 1024
Json = Any

HEAD = (
    b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


# A server, seen from outside (Linux), and a client that says whatever it is told.


@frozen
class Server:
    pid: int
    port: int
    url: str

    def rss(self) -> int:
        """Bytes of memory that it uses."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the server is gone")

    def descriptors(self) -> list[str]:
        return sorted(os.listdir(f"/proc/{self.pid}/fd"), key=int)

    def children(self) -> list[str]:
        return Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of one test, that forgets clients when they go. It may log nothing and must end well."""
    log = tmp_path / "log"
    argv = [*SERVE, "ws://127.0.0.1:0", "--detached-ttl", "0"]
    with log.open("wb") as stderr, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().decode().strip()
            yield Server(process.pid, int(url.rpartition(":")[2]), url)
            process.terminate()
            status = process.wait(TIME_LIMIT)
        finally:
            process.kill()
    assert (log.read_text(), status) == ("", 0)


@define(eq=False)
class Client:
    """One websocket, without rules."""

    port: int
    ended: bool = False
    close_code: int | None = None
    _sock: socket.socket = field(init=False)
    _codec: FrameCodec = Factory(lambda: FrameCodec(client=True, max_message=1 << 30))
    _messages: list[bytes] = Factory(list)
    _ids: count[int] = Factory(lambda: count(1_000_000))

    def __attrs_post_init__(self) -> None:
        self._sock = socket.create_connection(("127.0.0.1", self.port), TIME_LIMIT)
        self._sock.sendall(HEAD)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._sock.recv(1)

    def close(self) -> None:
        self._sock.close()

    def frames(self, message: bytes) -> bytes:
        return b"".join(bytes(b) for frame in self._codec.encode_message(message) for b in frame)

    def send_bytes(self, data: bytes) -> None:
        with suppress(OSError):  # the server ended the connection: what it said before is still to be read
            self._sock.sendall(data)

    def send(self, *messages: bytes) -> None:
        # As binary messages, because a text message that is not UTF-8 ends the connection.
        self.send_bytes(
            b"".join(bytes((frame[0] & 0xF0 | 2,)) + frame[1:] for frame in map(self.frames, messages))
        )

    def finish(self) -> None:
        """Say that nothing follows, and wait until the server has ended the connection."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        while not self.ended:
            self._receive()

    def _receive(self, size: int = 1 << 20) -> None:
        try:
            data = self._sock.recv(size)
        except ConnectionError:
            data = b""
        self.ended = self.ended or not data
        for event in self._codec.receive(data):
            if isinstance(event, bytes):
                self._messages.append(event)
            elif isinstance(event, Close):
                self.close_code = event.code
                self.ended = True

    def take(self, size: int = 1 << 20) -> list[bytes]:
        """The next messages; none at the end."""
        while not self._messages and not self.ended:
            self._receive(size)
        messages, self._messages = self._messages, []
        return messages

    def request(self, method: str, params: Json = None) -> Json:
        """The reply; `None` if the server ends the connection instead."""
        id_ = next(self._ids)
        self.send(json.dumps({"id": id_, "method": method, "params": params}).encode())
        while messages := self.take():
            for message in messages:
                reply = json.loads(message)
                if reply.get("id") == id_:
                    return reply
        return None

    def shake_hands(self) -> None:
        assert "result" in self.request("initialize", {"clientName": "robust"})
        self.send(b'{"method":"initialized"}')


# Nonsense. Every message begins as a valid one.

PROCESS_IDS = ("a", "b", "c")


def _start(process_id: str, argv: list[str], **more: Json) -> Json:
    params = {"processId": process_id, "argv": argv, "cwd": "file:///tmp", "env": {"PATH": "/bin:/usr/bin"}}
    return {"id": 1, "method": "process/start", "params": {**params, "tty": False, **more}}


def _about(method: str, **params: Json) -> Json:
    return {"id": "x", "method": f"process/{method}", "params": {"processId": "a", **params}}


VALID: tuple[Json, ...] = (
    {"id": 1, "method": "initialize", "params": {"clientName": "x", "resumeSessionId": None}},
    {"method": "initialized", "params": {}},
    {"id": 2, "method": "environment/info"},
    {"id": 3, "method": "environment/status", "trace": {"traceparent": "00-0-0-01"}},
    _start("a", ["true"]),
    _start("b", ["cat"], pipeStdin=True, arg0="dog"),
    _start("c", ["cat"], tty=True, envPolicy=None, outputWindow=1000),
    _start(
        "a",
        ["true"],
        envPolicy={
            "inherit": "core",
            "ignoreDefaultExcludes": True,
            "exclude": ["X*"],
            "set": {},
            "includeOnly": [],
        },
        sandbox=None,
        enforceManagedNetwork=False,
    ),
    _about("read", afterSeq=0, maxBytes=10, waitMs=1),
    _about("write", chunk="aGk=", writeId="w"),
    _about("signal", signal="interrupt"),
    _about("terminate", receipt=True, graceMs=1),
    _about("closeStdin"),
    _about("resize", rows=10, columns=20),
    {"method": "process/outputTaken", "params": {"processId": "c", "seq": 1, "window": 5}},
    {"id": 4, "method": "fs/readFile", "params": {"path": "file:///tmp"}},
)

ODD_JSON: st.SearchStrategy[Json] = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1.5,
        2**63,
        2**64,
        10**40,
        "",
        "a",
        "b",
        "\x00",
        "é\U0001f600",
        "file:///",
        "file:///C:/x",
        "/tmp",
        "a" * 300,
        [],
        {},
        [[]],
        ["true"],
        ["\x00"],
        {"a": "b"},
        {"": "\x00"},
        {"A=B": "c"},
    ]
)
NAMES = (
    "id",
    "method",
    "params",
    "result",
    "error",
    "trace",
    "processId",
    "argv",
    "cwd",
    "env",
    "tty",
    "chunk",
)


@st.composite
def nonsense(draw: st.DrawFn) -> bytes:
    """A valid message with up to three things wrong, in its structure or in its bytes."""
    message = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 2))):
        place = message
        if isinstance(message.get("params"), dict) and draw(st.booleans()):
            place = message["params"]
        name = draw(st.sampled_from([*place, *NAMES]))
        if draw(st.integers(0, 3)):
            place[name] = deepcopy(draw(ODD_JSON))  # the next thing that goes wrong may be inside of it
        else:
            place.pop(name, None)
    data = json.dumps(message, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return mutated(draw, data) if draw(st.integers(0, 2)) == 0 else data


def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(len(data), start + 20)))
    middle = draw(
        st.sampled_from([b"", b"\x00", b"\xff", b'"', b"{", b"[[[[", b"\\", b"1e999", data[start:stop] * 2])
    )
    return data[:start] + middle + data[stop:]


def may_end_the_connection(data: bytes) -> bool:
    """Whether a server may end the connection for this message (§2.5)."""
    try:
        message = codec.decode(data)
    except codec.MalformedMessage:
        return False
    # The notifications that it knows do so too, before `initialize` or with parameters that do not fit.
    return not isinstance(message, codec.Request)


def harmless_first(messages: list[bytes]) -> list[bytes]:
    """Those that leave the connection open, and behind them one that may not."""
    fatal = list(filter(may_end_the_connection, messages))
    return [message for message in messages if not may_end_the_connection(message)] + fatal[:1]


def times(number: int) -> settings:
    return settings(
        deadline=None,
        database=None,
        derandomize=True,
        max_examples=number,
        suppress_health_check=list(HealthCheck),
    )


def test_server_survives_ten_thousand_messages_of_nonsense(server: Server) -> None:
    client: Client | None = None
    sent = 0
    sizes: list[int] = []

    @times(190)
    @given(st.lists(nonsense(), min_size=60, max_size=80), st.booleans())
    def talk(drawn: list[bytes], shakes_hands: bool) -> None:
        nonlocal client, sent
        messages = harmless_first(drawn)
        if client is None:
            client = Client(server.port)
            if shakes_hands:
                client.shake_hands()
        client.send(*messages)
        sent += len(messages)
        if client.request("environment/status") is None:
            assert client.close_code == 1002
            assert may_end_the_connection(messages[-1])
            client.close()
            client = None
        sizes.append(server.rss())

    talk()
    if client is not None:
        client.close()
    assert sent >= 10_000
    assert sizes[-1] - sizes[len(sizes) // 4] < 24 * MIB


@times(100)
@given(messages=st.lists(nonsense(), min_size=10, max_size=20))
def test_nonsense_is_no_error_of_ours(messages: list[bytes]) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("execenv")
    logger.addHandler(handler)
    try:
        trio.run(serve_in_memory, messages)
    finally:
        logger.removeHandler(handler)
    assert log.getvalue() == ""


async def serve_in_memory(messages: list[bytes]) -> None:
    """Each message alone on a connection of its own that was shaken hands on, with nothing behind it."""
    with trio.fail_after(TIME_LIMIT):
        async with open_sessions(FakeHost().open, detached_ttl=0) as sessions:
            for message in messages:
                ours, theirs = memory_pair("websocket 127.0.0.1:1")
                replies: list[bytes] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(serve_channel, theirs, sessions)
                    nursery.start_soon(ours.run, replies.append)
                    ours.send_nowait(b'{"id":"first","method":"initialize","params":{"clientName":"x"}}')
                    ours.send_nowait(b'{"method":"initialized"}')
                    ours.send_nowait(message)
                    await trio.testing.wait_all_tasks_blocked()
                    if not ours.closed:
                        ours.send_nowait(b'{"id":"last","method":"environment/status"}')
                        await trio.testing.wait_all_tasks_blocked()
                        assert b'{"id":"last","result":{"status":"ready"}}' in replies
                    else:
                        assert may_end_the_connection(message)
                    ours.close_nowait()


@st.composite
def broken_frames(draw: st.DrawFn) -> bytes:
    client = FrameCodec(client=True, max_message=1000)
    messages = draw(st.lists(nonsense(), min_size=1, max_size=4))
    data = b"".join(bytes(b) for m in messages for frame in client.encode_message(m) for b in frame)
    for _ in range(draw(st.integers(1, 3))):
        data = mutated(draw, data)
    return data


def test_server_survives_broken_frames(server: Server) -> None:
    @times(300)
    @given(data=broken_frames() | st.binary(max_size=200))
    def talk(data: bytes) -> None:
        with closing(Client(server.port)) as client:
            client.send_bytes(data)
            client.finish()

    talk()
    with closing(Client(server.port)) as client:
        client.shake_hands()
        assert client.request("environment/status")["result"] == {"status": "ready"}


# Crowds.


async def test_three_hundred_processes_at_once_all_answer_and_close(server: Server) -> None:
    number = 300
    outputs: dict[int, bytes] = {}
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(server.url) as environment:

            async def run(index: int) -> None:
                done = await environment.run(["sh", "-c", f"read x; echo {index} $x"], input=b"in\n")
                assert done.stdout is not None
                outputs[index] = done.stdout

            async with trio.open_nursery() as nursery:
                for index in range(number):
                    nursery.start_soon(run, index)
            assert outputs == {index: f"{index} in\n".encode() for index in range(number)}


async def test_thousand_runs_leave_no_descriptor_and_no_child(server: Server) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(server.url) as environment:

            async def run(times: int, *, tty: bool) -> None:
                for _ in range(times):
                    await environment.run(["true"], tty=tty)

            async def run_all(times: int) -> None:
                async with trio.open_nursery() as nursery:
                    for index in range(10):
                        nursery.start_soon(lambda tty=index < 3: run(times, tty=tty))  # type: ignore[misc]

            await run_all(2)
            before = len(server.descriptors()), server.children()
            await run_all(100)
            while (len(server.descriptors()), server.children()) != before:  # noqa: ASYNC110
                await trio.sleep(0.01)  # what is reaped behind the answers; the time limit is the judge


# Clients that die.

STREAMS = """
import sys, trio, execenv
async def main():
    async with execenv.open_environment(sys.argv[1]) as environment:
        script = "echo $$; while :; do echo more; done"
        async with environment.open_process(["sh", "-c", script]) as process:
            async for piece in process:
                sys.stdout.buffer.write(piece.data[:8192])
                sys.stdout.buffer.flush()
trio.run(main)
"""


async def test_client_that_is_killed_in_mid_stream_leaves_the_others_served(server: Server) -> None:
    watched = Watched()
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(server.url) as environment:
            argv = [sys.executable, "-c", STREAMS, server.url]
            client = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
            assert client.stdout is not None
            async with client.stdout:
                received = b""
                while len(received) < 100_000:
                    received += await client.stdout.receive_some()
                watched.add(int(received.split(b"\n")[0]))
                client.kill()
                await client.wait()
            await watched.wait_gone()
            assert (await environment.run(["echo", "served"])).stdout == b"served\n"
    watched.close()


# Clients that are slow.


def test_slow_client_gets_everything_and_costs_the_server_little(server: Server) -> None:
    total = 256 * MIB
    with closing(Client(server.port)) as client:
        client.shake_hands()
        base = highest = server.rss()
        start = _start("a", ["head", "-c", str(total), "/dev/zero"])
        client.send(json.dumps(start).encode())
        received = seq = 0
        closed = False
        while not closed:
            messages = client.take(1 << 18)
            assert messages
            highest = max(highest, server.rss())
            for message in messages:
                pushed = json.loads(message)
                if "method" in pushed:
                    seq += 1
                    assert pushed["params"]["seq"] == seq
                    received += len(pybase64.b64decode(pushed["params"].get("chunk", "")))
                    closed = pushed["method"] == "process/closed"
        assert received == total
    assert highest - base < 32 * MIB


def test_client_that_takes_no_answers_costs_the_server_little(server: Server) -> None:
    with closing(Client(server.port)) as client:
        client.shake_hands()
        client.send(json.dumps(_start("a", ["head", "-c", str(MIB), "/dev/zero"])).encode())
        while not any(b"process/closed" in message for message in client.take()):
            pass
        base = server.rss()
        number = 200
        read = json.dumps({"id": 5, "method": "process/read", "params": {"processId": "a"}}).encode()
        client.send(*[read] * number)
        with closing(Client(server.port)) as other:  # served meanwhile, and behind it in time
            other.shake_hands()
            for _ in range(50):
                assert other.request("environment/status") is not None
        assert server.rss() - base < 32 * MIB
        answered = 0
        while answered < number:
            messages = client.take()
            assert messages
            answered += sum(b'"nextSeq"' in message[-200:] for message in messages)
        assert server.rss() - base < 32 * MIB


def test_thousands_of_pings_at_once_end_nothing(server: Server) -> None:
    with closing(Client(server.port)) as client:
        client.shake_hands()
        client.send_bytes(
            b"".join(FrameCodec(client=True, max_message=1).encode_ping(b"x") for _ in range(5000))
        )
        assert client.request("environment/status") is not None


def test_thousands_of_initialize_at_once_leave_the_server_answering(server: Server) -> None:
    message = b'{"id":1,"method":"initialize","params":{"clientName":"x"}}'
    with closing(Client(server.port)) as flood, closing(Client(server.port)) as bystander:
        flood.send(*[message] * 20_000)
        bystander.shake_hands()
        assert bystander.request("environment/status") is not None
