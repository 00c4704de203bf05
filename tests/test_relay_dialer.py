"""A harness as a registry, a rendezvous and an executor see it: frame by frame (relay.md §1.4, 4.2, 4.4)."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from attrs import define, evolve, field

from execenv import ConnectFailed, ConnectionLost
from execenv._service import Wakeup
from execenv.relay.frames import Ack, Body, Data, Frame, Handshake, Heartbeat, Reset, Resume
from execenv.relay.harness import RelayDialer, dial_clear
from execenv.relay.noise import Identity, RecordReader, RecordWriter, Responder, Transport, prologue
from execenv.targets import RelayTarget, WebsocketTarget
from execenv.transports import websocket
from execenv.transports.channel import Channel
from execenv.transports.websocket import WebsocketChannel
from tests.fake_relay import (
    Answer,
    FakeRegistry,
    FakeRendezvous,
    RelaySocket,
    error_answer,
    open_fake_registry,
    open_fake_rendezvous,
)

ID = "env-1"
TOKEN = "harness-token"
AUTHORIZATION = "authorization-text"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@define(eq=False)
class Relay:
    registry: FakeRegistry
    rendezvous: FakeRendezvous
    identity: Identity
    got: list[bytes] = field(factory=list)
    bundles: int = 0
    changed: Wakeup = field(factory=Wakeup)

    def take(self, message: bytes) -> None:
        self.got.append(message)
        self.changed.set()

    async def wait_got(self, count: int = 1) -> None:
        """Return when so many messages have come out of the channel."""
        while len(self.got) < count:
            await self.changed.wait()

    @property
    def target(self) -> RelayTarget:
        return RelayTarget(self.registry.url, ID, TOKEN)

    def bundle(self, asked: object = None, **changes: object) -> Answer:
        self.bundles += 1
        return Answer(
            {
                "environment_id": ID,
                "url": f"{self.rendezvous.base}/{ID}?role=harness&bundle={self.bundles}",
                "security_profile": "noise_hybrid_ik_v1",
                "executor_registration_id": "reg-1",
                "executor_public_key": self.identity.public.to_json(),
                "harness_key_authorization": AUTHORIZATION,
                **changes,
            },
        )


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    with trio.fail_after(30):
        async with open_fake_registry() as registry, open_fake_rendezvous() as rendezvous:
            relay = Relay(registry, rendezvous, Identity.generate())
            registry.answer("connect", relay.bundle)
            yield relay


@asynccontextmanager
async def running(dial: Callable[[], object], relay: Relay) -> AsyncIterator[Channel]:
    async with dial() as channel, trio.open_nursery() as nursery:  # type: ignore[attr-defined]
        nursery.start_soon(channel.run, relay.take)
        yield channel
        channel.close_nowait()


async def begin(relay: Relay) -> tuple[RelaySocket, str, Responder]:
    """The executor's part up to the first message of the handshake."""
    socket = await relay.rendezvous.accept()
    resume, handshake = await socket.receive(), await socket.receive()
    assert isinstance(handshake.body, Handshake)
    responder = Responder(relay.identity, prologue(ID, "reg-1", resume.stream_id))
    responder.read(handshake.body.payload)
    return socket, resume.stream_id, responder


async def agree(relay: Relay) -> tuple[RelaySocket, str, Transport]:
    socket, stream_id, responder = await begin(relay)
    message, transport = responder.answer()
    socket.send(Frame(stream_id, Handshake(message)))
    return socket, stream_id, transport


def sealed(transport: Transport, message: bytes) -> bytes:
    (record,) = RecordWriter().records(message)
    return transport.encrypt(record)


async def message_of(socket: RelaySocket, transport: Transport) -> bytes:
    frame = await socket.receive()
    assert isinstance(frame.body, Data)
    (message,) = RecordReader().feed(transport.decrypt(frame.body.payload))
    return message


async def ended(channel: Channel) -> str:
    while not channel.closed:  # noqa: ASYNC110 - the end of a channel has no event
        await trio.sleep(0.01)
    return str(channel.lost())


# Looking up.


async def test_registry_is_asked_with_the_key_of_the_harness_and_its_token(relay: Relay) -> None:
    dialer = RelayDialer(evolve(relay.target, account_id="acct1"), 25)
    for _ in range(2):
        async with dialer.dial():
            await relay.rendezvous.accept()
    one, other = [await relay.registry.request("connect") for _ in range(2)]
    assert one.head.path == f"/cloud/environment/{ID}/connect"
    assert one.header("authorization") == f"Bearer {TOKEN}"
    assert one.header("chatgpt-account-id") == "acct1"
    assert set(one.json) == {"harness_public_key"}
    assert one.json == other.json, "it is the same harness"


async def test_first_frames_are_a_resume_and_a_handshake_of_a_new_stream(relay: Relay) -> None:
    dialer = RelayDialer(relay.target, 25)
    ids = set()
    for number in (1, 2):
        async with running(dialer.dial, relay):
            socket = await relay.rendezvous.accept()
            assert socket.head.query == f"role=harness&bundle={number}"
            resume, handshake = await socket.receive(), await socket.receive()
            assert resume.body == Resume(0, reliability=1)
            assert isinstance(handshake.body, Handshake)
            assert len(handshake.body.payload) == 3568 + len(AUTHORIZATION)
            assert UUID.fullmatch(resume.stream_id)
            assert handshake.stream_id == resume.stream_id
            ids.add(resume.stream_id)
    assert len(ids) == 2


async def test_executor_that_is_being_connected_is_waited_for(relay: Relay) -> None:
    relay.registry.answer(
        "connect", error_answer(409, "environment_offline"), error_answer(503), relay.bundle
    )
    async with RelayDialer(relay.target, 25).dial():
        await relay.rendezvous.accept()
    assert len(relay.registry.asked) == 3


async def test_executor_that_stays_away_is_told_when_the_time_is_over(relay: Relay) -> None:
    relay.registry.answer("connect", error_answer(409, "environment_offline", "nobody is there"))
    with pytest.raises(ConnectFailed, match="nobody is there") as caught:
        async with RelayDialer(evolve(relay.target, connect_timeout=0.4), 25).dial():
            raise AssertionError("it was opened")
    assert caught.value.retryable
    assert len(relay.registry.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
async def test_refusal_of_the_registry_is_final(relay: Relay, status: int) -> None:
    relay.registry.answer("connect", error_answer(status, "no", "you may not"))
    with pytest.raises(ConnectFailed, match="authentication failed") as caught:
        async with RelayDialer(relay.target, 25).dial():
            raise AssertionError("it was opened")
    assert not caught.value.retryable
    assert len(relay.registry.asked) == 1


async def test_registry_that_says_nothing_is_given_the_connect_timeout(relay: Relay) -> None:
    relay.registry.answer("connect", Answer(b"", hangs=True))
    with trio.fail_after(5), pytest.raises(ConnectFailed, match=r"did not answer within 0\.2 s") as caught:
        async with RelayDialer(evolve(relay.target, connect_timeout=0.2), 25).dial():
            pass
    assert caught.value.retryable


async def test_websocket_refused_with_401_is_tried_once_more_with_a_fresh_bundle(relay: Relay) -> None:
    relay.rendezvous.plan = [401, 101]
    async with RelayDialer(relay.target, 25).dial():
        await relay.rendezvous.accept()
    assert relay.bundles == 2
    relay.rendezvous.plan = [401]
    with pytest.raises(ConnectFailed, match="status 401"):
        async with RelayDialer(relay.target, 25).dial():
            raise AssertionError("it was opened")
    assert relay.bundles == 4


async def test_environment_in_clear_text_is_refused_unless_it_was_asked_for(relay: Relay) -> None:
    plain = {"environment_id": ID, "url": f"{relay.rendezvous.base}?role=harness"}
    relay.registry.answer("connect", Answer(plain | {"security_profile": "clear_relay_v1"}))
    with pytest.raises(ConnectFailed) as caught:
        async with RelayDialer(relay.target, 25).dial():
            raise AssertionError("it was opened")
    assert not caught.value.retryable
    async with running(RelayDialer(evolve(relay.target, security="clear"), 25).dial, relay):
        socket = await relay.rendezvous.accept()
        assert (await socket.receive()).body == Resume(0, reliability=1)
    assert relay.registry.asked[-1].json == {}


async def test_environment_with_noise_is_not_reached_in_clear_text(relay: Relay) -> None:
    with pytest.raises(ConnectFailed):
        async with RelayDialer(evolve(relay.target, security="clear"), 25).dial():
            raise AssertionError("it was opened")


# Noise, frame by frame (§4.4).


async def test_nothing_is_said_before_the_handshake_is_done(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        channel.send_nowait(b'{"n":1}')
        socket, stream_id, responder = await begin(relay)
        for body in (Ack(), Resume(), Heartbeat()):
            socket.send(Frame(stream_id, body))
        for other in (Reset("r"), Data(0, b"x"), Handshake(b"x")):
            socket.send(Frame("another stream", other))
        message, transport = responder.answer()
        socket.send(Frame(stream_id, Handshake(message)))
        first = await message_of(socket, transport)
        assert first == b'{"n":1}', "what had been said before it would have come before it"
        socket.send(Frame(stream_id, Data(0, sealed(transport, b'{"n":2}'))))
        await relay.wait_got()
        assert relay.got == [b'{"n":2}']


@pytest.mark.parametrize(
    "body", [Data(0, b"x"), Handshake(bytes(3424)), Reset("because")], ids=["data", "handshake", "reset"]
)
async def test_anything_else_before_the_handshake_ends_the_stream(relay: Relay, body: Body) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, _ = await begin(relay)
        socket.send(Frame(stream_id, body))
        text = await ended(channel)
    assert "because" not in text, "the peer's text is untrusted"
    if isinstance(body, Reset):
        assert "Noise relay stream reset" in text


@pytest.mark.parametrize("garbage", ["text", "bytes", "version"])
async def test_what_is_no_frame_ends_the_stream(relay: Relay, garbage: str) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, transport = await agree(relay)
        if garbage == "text":
            socket.send_text()
        elif garbage == "bytes":
            socket.send_raw(b"\xff\xff\xff")
        else:
            socket.send_raw(b"\x08\x02\x12" + bytes([len(stream_id)]) + stream_id.encode() + b"\x32\x00")
        assert "binary protobuf frames" in await ended(channel)
        await socket.ended.wait()
    assert transport is not None


async def test_invalid_frame_of_another_stream_is_ignored(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, transport = await agree(relay)
        socket.send_raw(b"\x08\x02\x12\x01x\x32\x00")
        socket.send(Frame(stream_id, Data(0, sealed(transport, b"{}"))))
        await relay.wait_got()
        assert not channel.closed


async def test_record_that_was_changed_on_the_way_ends_the_stream(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, transport = await agree(relay)
        record = bytearray(sealed(transport, b"{}"))
        record[3] ^= 1
        socket.send(Frame(stream_id, Data(0, bytes(record))))
        await ended(channel)
    assert relay.got == []


async def test_released_executor_gets_no_acknowledgements(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, transport = await agree(relay)
        for number in range(3):
            socket.send(Frame(stream_id, Data(number, sealed(transport, b"{}"))))
        await relay.wait_got(3)
        channel.send_nowait(b'{"n":1}')
        frame = await socket.receive()
        assert (frame.ack, frame.ack_bits) == (0, 0)
        assert isinstance(frame.body, Data)
        socket.close()
        assert "disconnected" in await ended(channel)
    assert relay.bundles == 1, "there is nothing to resume"


async def test_reset_is_sent_at_the_end(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay):
        socket, stream_id, _ = await agree(relay)
    frame = await socket.receive()
    assert (frame.stream_id, type(frame.body)) == (stream_id, Reset)
    await socket.ended.wait()


async def test_stream_is_resumed_with_a_fresh_bundle_and_the_same_id(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, responder = await begin(relay)
        message, transport = responder.answer()
        socket.send(
            Frame(stream_id, Resume(0, reliability=1)),
            Frame(stream_id, Handshake(message)),
            Frame(stream_id, Data(0, sealed(transport, b'{"n":1}'))),
        )
        channel.send_nowait(b'{"m":1}')
        sent = await socket.receive()
        assert isinstance(sent.body, Data)
        socket.close(1012)
        again = await relay.rendezvous.accept()
        assert again.head.query == "role=harness&bundle=2"
        resume = await again.receive()
        assert (resume.stream_id, resume.body) == (stream_id, Resume(1, reliability=1))
        again.send(Frame(stream_id, Resume(0, reliability=1)))
        resent = await again.receive()
        assert resent.body == sent.body, "the same ciphertext: a record is encrypted once"
        assert resent.ack == 1


async def test_stream_is_not_resumed_where_the_key_of_the_executor_has_changed(relay: Relay) -> None:
    async with running(RelayDialer(relay.target, 25).dial, relay) as channel:
        socket, stream_id, responder = await begin(relay)
        message, transport = responder.answer()
        socket.send(
            Frame(stream_id, Resume(0, reliability=1)),
            Frame(stream_id, Handshake(message)),
            Frame(stream_id, Data(0, sealed(transport, b'{"n":1}'))),
        )
        await relay.wait_got()
        relay.identity = Identity.generate()
        socket.close(1012)
        assert "executor key changed during session recovery" in await ended(channel)


async def test_sockets_of_a_harness_ping_every_30_seconds_and_wait_60_for_the_answer(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[WebsocketChannel] = []
    connect = websocket.connect

    async def watched(url: str, **options: Any) -> WebsocketChannel:
        channel = await connect(url, **options)
        opened.append(channel)
        return channel

    monkeypatch.setattr(websocket, "connect", watched)
    async with (
        RelayDialer(relay.target, 25).dial(),
        dial_clear(WebsocketTarget(f"{relay.rendezvous.base}?role=harness"), 25),
    ):
        assert [(channel._ping_interval, channel._pong_timeout) for channel in opened] == [(30, 60)] * 2


# Clear text (§4.2).


async def test_url_with_the_role_of_a_harness_is_spoken_to_in_frames(relay: Relay) -> None:
    url = f"{relay.rendezvous.base}/{ID}?role=harness&sig=secret"
    async with running(lambda: dial_clear(WebsocketTarget(url, TOKEN), 25), relay) as channel:
        socket = await relay.rendezvous.accept()
        assert socket.head.headers["authorization"] == f"Bearer {TOKEN}".encode()
        resume = await socket.receive()
        assert UUID.fullmatch(resume.stream_id)
        long = json.dumps({"x": "y" * 100_000}).encode()
        channel.send_nowait(b'{"n":1}')
        channel.send_nowait(long)
        assert (await socket.receive()).body == Data(0, b'{"n":1}')
        assert (await socket.receive()).body == Data(1, long), "not in segments, as nobody agreed on that"
        socket.send(Frame("another", Data(0, b'{"n":0}')))
        for body in (Ack(), Resume(), Heartbeat(), Handshake(b"x")):
            socket.send(Frame(resume.stream_id, body))
        socket.send(Frame(resume.stream_id, Data(9, b'{"n":2}')))
        socket.send(Frame(resume.stream_id, Data(4, b'{"n":3}')))
        await relay.wait_got(2)
        assert relay.got == [b'{"n":2}', b'{"n":3}'], "sequence numbers of clear text are not checked"
        socket.send(Frame(resume.stream_id, Reset("the reason")))
        assert "relay stream reset: the reason" in await ended(channel)


async def test_closed_socket_of_who_does_not_resume_ends_the_stream(relay: Relay) -> None:
    url = f"{relay.rendezvous.base}?role=harness"
    async with running(lambda: dial_clear(WebsocketTarget(url), 25), relay) as channel:
        socket = await relay.rendezvous.accept()
        await socket.receive()
        socket.close()
        assert "disconnected" in await ended(channel)
        with pytest.raises(ConnectionLost):
            channel.send_nowait(b"{}")
