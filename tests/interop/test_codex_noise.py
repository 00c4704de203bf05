"""Our initiator and a released executor, our responder and a released harness; what is between is the test.

What is not ours alone to decide is checked here too: that neither takes notice of what our frames say
besides, so that two ends of ours may use it.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, field, frozen

from execenv.relay.frames import Ack, Body, Data, Frame, Handshake, Heartbeat, Reset, Resume, encode
from execenv.relay.keys import PublicKey
from execenv.relay.noise import (
    Identity,
    Initiator,
    RecordReader,
    RecordWriter,
    Responder,
    Transport,
    prologue,
)
from execenv.server import open_local_sessions
from execenv.server.listen import serve_channel
from execenv.transports.memory import memory_pair
from tests.fake_relay import (
    Answer,
    Asked,
    FakeRegistry,
    FakeRendezvous,
    RelaySocket,
    open_fake_registry,
    open_fake_rendezvous,
)
from tests.interop.codex import ExecResult, NoiseEnvironment, ProcessMark, real_executor, run_codex
from tests.interop.conftest import exec_command

pytestmark = pytest.mark.interop

RESET = Reset("noise_relay_protocol_error")
AUTHORIZATION = "a word of the registry"
REGISTERED = {
    "environment_id": "env-1",
    "security_profile": "noise_hybrid_ik_v1",
    "executor_registration_id": "reg-1",
}


@frozen
class Executor:
    """A released executor that has registered and connected.

    Attributes:
        request: how it registered.
    """

    registry: FakeRegistry
    rendezvous: FakeRendezvous
    socket: RelaySocket
    request: Asked

    @property
    def key(self) -> PublicKey:
        return PublicKey.from_json(self.request.json["executor_public_key"])

    async def harness(self) -> Harness:
        """One that has shaken hands."""
        harness = Harness(self)
        harness.shake()
        await harness.finish()
        return harness


@define(eq=False)
class Harness:
    """A stream of ours. `environment_id` and `key` may be others than the executor's."""

    executor: Executor
    environment_id: str = "env-1"
    key: PublicKey | None = None
    authorization: str = AUTHORIZATION
    ack: int = 0
    ack_bits: int = 0
    stream_id: str = field(factory=lambda: str(uuid.uuid4()))
    identity: Identity = field(factory=Identity.generate)
    initiator: Initiator = field(init=False)
    transport: Transport = field(init=False)
    received: list[Frame] = field(init=False, factory=list)
    record_sizes: list[int] = field(init=False, factory=list)
    _sent: int = field(init=False, default=0)
    _calls: int = field(init=False, default=0)
    _reader: RecordReader = field(init=False, factory=RecordReader)

    def __attrs_post_init__(self) -> None:
        self.initiator = Initiator(
            self.identity,
            self.key or self.executor.key,
            prologue(self.environment_id, "reg-1", self.stream_id),
            self.authorization.encode(),
        )

    def send(self, body: Body) -> None:
        self.executor.socket.send(Frame(self.stream_id, body, self.ack, self.ack_bits))

    async def receive(self) -> Body:
        frame = await self.executor.socket.receive()
        assert frame.stream_id == self.stream_id
        self.received.append(frame)
        return frame.body

    def shake(self) -> None:
        self.send(Resume())
        self.send(Handshake(self.initiator.message1))

    async def finish(self) -> None:
        body = await self.receive()
        assert isinstance(body, Handshake)
        assert len(body.payload) == 3424
        self.transport = self.initiator.finish(body.payload)

    def send_message(self, message: dict[str, Any]) -> None:
        for record in RecordWriter().records(json.dumps(message).encode()):
            self.send(Data(self._sent, self.transport.encrypt(record)))
            self._sent += 1

    async def call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """The result of a call; notifications are passed over."""
        self._calls += 1
        message = {"id": self._calls, "method": method}
        self.send_message(message | ({} if params is None else {"params": params}))
        while True:
            body = await self.receive()
            assert isinstance(body, Data)
            assert (body.segment_index, body.segment_count) == (0, 1)
            assert body.seq == len(self.record_sizes)
            self.record_sizes.append(len(body.payload))
            for message in map(json.loads, self._reader.feed(self.transport.decrypt(body.payload))):
                if message.get("id") == self._calls:
                    return message["result"]

    async def initialize(self) -> None:
        assert (await self.call("initialize", {"clientName": "test"}))["sessionId"]
        self.send_message({"method": "initialized", "params": {}})


@pytest.fixture
async def executor(codex: Path, tmp_path: Path) -> AsyncIterator[Executor]:
    async with _open_executor(codex, tmp_path) as executor:
        yield executor


@asynccontextmanager
async def _open_executor(codex: Path, home: Path) -> AsyncIterator[Executor]:
    async with open_fake_rendezvous() as rendezvous, open_fake_registry() as registry:
        url = rendezvous.base + "/rendezvous?role=executor&sig=1"
        registry.answer("register", Answer({**REGISTERED, "url": url}))
        registry.answer("validate", Answer({"valid": True}))
        async with real_executor(codex, home, registry.url, "env-1"):
            with trio.fail_after(30):
                request = await registry.request("register")
                socket = await rendezvous.accept()
            yield Executor(registry, rendezvous, socket, request)


async def test_executor_talks_with_us_from_the_registration_to_a_large_file(
    executor: Executor, tmp_path: Path
) -> None:
    content = bytes(range(250)) * 800
    (tmp_path / "large").write_bytes(content)
    with trio.fail_after(30):
        assert executor.request.head.method == "POST"
        assert executor.request.head.path == "/cloud/environment/env-1/register"
        assert executor.request.header("authorization") == "Bearer sk-test"
        assert executor.request.json == {
            "security_profile": "noise_hybrid_ik_v1",
            "executor_public_key": executor.key.to_json(),
        }
        assert (executor.socket.head.path, executor.socket.head.query) == (
            "/rendezvous",
            "role=executor&sig=1",
        )

        harness = await executor.harness()
        asked = await executor.registry.request("validate")
        assert asked.header("x-codex-noise-stream-id") == harness.stream_id
        assert asked.json == {
            "executor_registration_id": "reg-1",
            "harness_public_key": harness.identity.public.to_json(),
            "harness_key_authorization": AUTHORIZATION,
        }
        await harness.initialize()
        assert (await harness.call("environment/info"))["cwd"]
        before = len(harness.record_sizes)
        result = await harness.call("fs/readFile", {"path": (tmp_path / "large").as_uri()})
        assert base64.b64decode(result["dataBase64"]) == content
    sizes = harness.record_sizes[before:]
    assert sizes[:-1] == [61440 + 16] * 4
    assert 16 < sizes[-1] < 61440 + 16
    assert {(frame.ack, frame.ack_bits) for frame in harness.received} == {(0, 0)}


async def test_large_request_is_put_together_by_the_executor(executor: Executor, tmp_path: Path) -> None:
    content = bytes(range(256)) * 800
    path = tmp_path / "written"
    with trio.fail_after(30):
        harness = await executor.harness()
        await harness.initialize()
        sent = {"path": path.as_uri(), "dataBase64": base64.b64encode(content).decode()}
        await harness.call("fs/writeFile", sent)
    assert path.read_bytes() == content


async def test_executor_takes_no_notice_of_what_our_frames_say_about_reliability(executor: Executor) -> None:
    resume = Resume(0, reliability=1)
    assert b"\xa0\x06\x01" in encode(Frame("s", resume))  # field 100
    with trio.fail_after(30):
        harness = Harness(executor, ack=17, ack_bits=0xFFFF_FFFF)
        harness.send(resume)
        harness.send(Ack())
        harness.send(Heartbeat())
        harness.send(Handshake(harness.initiator.message1))
        harness.send(Ack())  # while the registry is asked
        harness.send(Resume(5, reliability=1))
        await harness.finish()
        for body in (resume, Ack(), Heartbeat(), Resume(7, reliability=1)):
            harness.send(body)
        await harness.initialize()
        harness.send(Resume(1, reliability=1))
        harness.ack, harness.ack_bits = 0xFFFF_FFFF, 1
        harness.send(Ack())
        assert (await harness.call("environment/info"))["cwd"]
    assert [type(frame.body) for frame in harness.received] == [Handshake, Data, Data]
    assert {(frame.ack, frame.ack_bits) for frame in harness.received} == {(0, 0)}


async def test_executor_refuses_who_is_wrong_and_stays_with_the_others(executor: Executor) -> None:
    with trio.fail_after(30):
        good = await executor.harness()
        await executor.registry.request("validate")
        await good.initialize()

        for wrong in (
            Harness(executor, environment_id="env-2"),
            Harness(executor, key=Identity.generate().public),
        ):
            wrong.shake()
            assert await wrong.receive() == RESET
        executor.registry.answer("validate", Answer({"valid": False}))
        refused = Harness(executor)
        refused.shake()
        assert await refused.receive() == RESET
        assert (await executor.registry.request("validate")).json[
            "harness_key_authorization"
        ] == AUTHORIZATION

        early = Harness(executor)
        early.send(Data(0, b"no handshake before"))
        assert await early.receive() == RESET

        executor.socket.send_text()
        executor.socket.send_raw(b"garbage")
        assert (await good.call("environment/info"))["cwd"]
        assert len(executor.registry.asked) == 3  # register, and validate twice


async def test_record_that_is_not_ours_ends_its_stream_alone(executor: Executor) -> None:
    with trio.fail_after(30):
        good, bad = await executor.harness(), await executor.harness()
        await good.initialize()
        await bad.initialize()
        record = bytearray(bad.transport.encrypt(b"\0\0\0\2{}"))
        record[0] ^= 1
        bad.send(Data(2, bytes(record)))
        assert await bad.receive() == RESET
        assert (await good.call("environment/info"))["cwd"]


async def test_longest_authorization_is_taken(executor: Executor) -> None:
    with trio.fail_after(30):
        harness = Harness(executor, authorization="é" * 2048)
        harness.shake()
        await harness.finish()
        asked = await executor.registry.request("validate")
        assert asked.json["harness_key_authorization"] == "é" * 2048


async def test_executor_registers_again_when_the_rendezvous_does_not_know_it(executor: Executor) -> None:
    with trio.fail_after(30):
        executor.rendezvous.plan = [404, 101]
        executor.socket.close()
        again = await executor.registry.request("register")
        assert again.json == executor.request.json  # with the same keys
        socket = await executor.rendezvous.accept()
        assert len(executor.rendezvous.heads) == 3  # the second was refused
        harness = await Executor(executor.registry, executor.rendezvous, socket, again).harness()
        await harness.initialize()


# Our responder, and codex for a harness.


async def _serve_harness(socket: RelaySocket, identity: Identity, seen: list[Body]) -> None:
    """Shake hands on the one stream of a harness's socket, and serve it."""
    resume, shake = await socket.receive(), await socket.receive()
    stream_id = resume.stream_id
    seen += [resume.body, shake.body]
    assert isinstance(shake.body, Handshake)
    responder = Responder(identity, prologue("env-1", "reg-1", stream_id))
    key, authorization = responder.read(shake.body.payload)
    assert (len(key.mlkem768), authorization) == (1184, AUTHORIZATION.encode())
    message2, transport = responder.answer()
    answers: tuple[Body, ...] = (Resume(0, reliability=1), Ack(), Handshake(message2), Ack(), Resume(0, 1))
    for body in answers:
        socket.send(Frame(stream_id, body, ack=3, ack_bits=5))

    ours, theirs = memory_pair()
    seqs = iter(range(2**32))
    reader, writer = RecordReader(), RecordWriter()

    def send(message: bytes) -> None:
        for record in writer.records(message):
            socket.send(Frame(stream_id, Data(next(seqs), transport.encrypt(record)), ack=7, ack_bits=1))

    async with open_local_sessions() as sessions, trio.open_nursery() as nursery:
        nursery.start_soon(serve_channel, theirs, sessions)
        nursery.start_soon(ours.run, send)
        try:
            while True:
                body = (await socket.receive()).body
                assert isinstance(body, Data)
                seen.append(body)
                for message in reader.feed(transport.decrypt(body.payload)):
                    ours.send_nowait(message)
        except trio.EndOfChannel:
            nursery.cancel_scope.cancel()


async def test_released_harness_works_behind_our_responder(
    codex: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Codex asks for a login shell, and a profile of this machine may take its time.
    monkeypatch.setenv("HOME", str(tmp_path))
    identity = Identity.generate()
    seen: list[Body] = []
    async with open_fake_rendezvous() as rendezvous:
        bundle = {
            **REGISTERED,
            "url": rendezvous.base + "/rendezvous?role=harness&sig=1",
            "executor_public_key": identity.public.to_json(),
            "harness_key_authorization": AUTHORIZATION,
        }
        async with open_fake_registry() as registry:
            registry.answer("connect", Answer(bundle))
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:

                    async def serve() -> None:
                        await _serve_harness(await rendezvous.accept(), identity, seen)

                    nursery.start_soon(serve)
                    run = await run_codex(
                        codex,
                        NoiseEnvironment(registry.url, "env-1", "a token"),
                        [exec_command("echo one; head -c 300000 /dev/zero | tr '\\0' x")],
                        cwd=tmp_path,
                        home=tmp_path / "client",
                        mark=ProcessMark(),
                    )
                    nursery.cancel_scope.cancel()
    assert run.returncode == 0, run.stderr
    (result,) = map(ExecResult.parse, run.tool_outputs)
    assert (result.exit_code, result.tokens) == (0, (300_004 + 3) // 4)
    assert "one\nx" in result.output
    (asked,) = registry.asked
    assert asked.header("authorization") == "Bearer a token"
    assert list(asked.json) == ["harness_public_key"]
    assert [type(body) for body in seen[:2]] == [Resume, Handshake]
    assert [body.seq for body in seen[2:] if isinstance(body, Data)] == list(range(len(seen) - 2))
