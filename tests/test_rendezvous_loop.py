"""An executor's main loop, row by row (relay.md §1.4), and its websocket (§2, §4.6)."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
from attrs import Factory, define
from trio.testing import MockClock

from execenv.errors import ConnectFailed, UsageError
from execenv.relay.registry import Registration, RegistryFailed, open_registry
from execenv.relay.rendezvous import (
    LASTING_SESSION,
    Replaced,
    SocketRunner,
    open_socket,
    serve_rendezvous,
    socket_pause,
)
from execenv.transports._frames import Event, FrameCodec, Ping
from execenv.transports.websocket import NO_BINARY, HandshakeRefused, WebsocketChannel
from tests.fake_relay import (
    API_KEY,
    AUTHORIZATION,
    HARNESS_KEY,
    ID,
    KEY,
    SIGNATURE,
    Answer,
    EchoStreams,
    FakeRegistry,
    FakeRendezvous,
    ScriptedRegistry,
    bearer,
    clear,
    error_answer,
    memory_socket,
    open_fake_registry,
    open_fake_rendezvous,
    registered,
)

FIRST = Registration(ID, f"wss://relay.example/first?{SIGNATURE}", "reg-1")
SECOND = Registration(ID, f"wss://relay.example/second?{SIGNATURE}", "reg-2")


def refused(status: int, code: str | None = None) -> RegistryFailed:
    """What the client of a registry makes of an answer."""
    retryable = status >= 500 or status in (408, 429)
    return RegistryFailed(f"request failed ({status})", status=status, code=code, retryable=retryable)


CONFLICT = refused(503, "registration_conflict")
UNAVAILABLE = refused(502, "authentication_service_unavailable")
UNREACHABLE = RegistryFailed("connection refused", retryable=True)
SENSELESS = RegistryFailed("its answer is not about the environment", retryable=False)


@define(eq=False)
class Lasts:
    """A socket that can be opened, and ends after some seconds, with a close code."""

    seconds: float = 0.0
    close_code: int | None = None


@define(eq=False)
class Loop:
    """The loop with all that it uses replaced: a plan says what each try to open a socket comes to.

    Attributes:
        plan: a status that refuses the handshake, an error, `"hangs"`, or how a socket lasts. When it has
            come to its end the loop is cancelled.
        opened: when and with which URL each try was made.
        ranges: of each pause; the longest is taken.
        served: the registration id of each socket that was served.
    """

    registry: ScriptedRegistry
    plan: list[int | Exception | str | Lasts]
    opened: list[tuple[float, str]] = Factory(list)
    ranges: list[tuple[float, float]] = Factory(list)
    served: list[str | None] = Factory(list)
    connected: list[str] = Factory(list)
    _scope: trio.CancelScope = Factory(trio.CancelScope)
    _now: Lasts = Factory(Lasts)

    async def run(self) -> None:
        with trio.fail_after(3600), self._scope:  # on a clock that jumps
            await serve_rendezvous(
                self.registry,
                ID,
                self,
                key=KEY,
                connected=self.connected.append,
                open_socket=self._open,
                uniform=self._uniform,
            )

    def _uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return high

    async def _open(self, url: str) -> WebsocketChannel:
        self.opened.append((trio.current_time(), url))
        if not self.plan:
            self._scope.cancel()
        await trio.lowlevel.checkpoint()
        step = self.plan.pop(0)
        if step == "hangs":
            await trio.sleep_forever()
        if isinstance(step, Exception):
            raise step
        if isinstance(step, int):
            raise HandshakeRefused(f"{url} refused, and repeats {AUTHORIZATION}", step)
        assert isinstance(step, Lasts)
        self._now = step
        channel, _ = memory_socket()
        return channel

    async def run_socket(
        self,
        channel: WebsocketChannel,
        environment_id: str,
        registration_id: str | None,
        validate: Callable[..., Any] | None,
    ) -> None:
        assert environment_id == ID
        self.served.append(registration_id)
        await trio.sleep(self._now.seconds)
        channel.close_code = self._now.close_code

    @property
    def urls(self) -> list[str]:
        return [url for _, url in self.opened]

    @property
    def pauses(self) -> list[float]:
        """How long each try came after the one before."""
        times = [time for time, _ in self.opened]
        return [after - before for before, after in pairwise(times)]


async def run_plan(*plan: int | Exception | str | Lasts, answers: Iterable[Any] = (FIRST, SECOND)) -> Loop:
    loop = Loop(ScriptedRegistry(*answers), list(plan))
    await loop.run()
    return loop


# Pauses.


async def test_pause_is_between_half_and_all_of_what_doubles_up_to_thirty_seconds(
    autojump_clock: MockClock,
) -> None:
    loop = await run_plan(*[Lasts()] * 8)
    longest = [1, 2, 4, 8, 16, 30, 30, 30]
    assert loop.ranges == [(seconds / 2, seconds) for seconds in longest]
    assert loop.pauses == longest


def test_pauses_are_spread_over_their_range() -> None:
    pauses = [socket_pause(3) for _ in range(200)]
    assert 4 <= min(pauses) < 5
    assert 7 < max(pauses) <= 8
    assert socket_pause(10_000) <= 30


async def test_pauses_begin_small_again_after_a_session_of_thirty_seconds(autojump_clock: MockClock) -> None:
    loop = await run_plan(500, 500, 500, Lasts(LASTING_SESSION), 500)
    assert [high for _, high in loop.ranges] == [1, 2, 4, 1, 2]


async def test_pauses_go_on_growing_after_shorter_sessions(autojump_clock: MockClock) -> None:
    loop = await run_plan(500, Lasts(LASTING_SESSION - 0.01), Lasts(), 500)
    assert [high for _, high in loop.ranges] == [1, 2, 4, 8]


# The same registration, or a new one.


async def test_socket_that_ended_is_opened_again_with_the_same_registration(
    autojump_clock: MockClock,
) -> None:
    loop = await run_plan(Lasts(), Lasts(5, 1000), Lasts(60, 1006), Lasts(1, 1012))
    assert loop.urls == [FIRST.url] * 5
    assert loop.served == ["reg-1"] * 4
    assert len(loop.registry.times) == 1


@pytest.mark.parametrize("status", [400, 402, 408, 426, 500, 502, 503, 504])
async def test_other_refusals_keep_the_registration(status: int, autojump_clock: MockClock) -> None:
    loop = await run_plan(status, status)
    assert loop.urls == [FIRST.url] * 3
    assert len(loop.registry.times) == 1
    assert loop.pauses == [1, 2]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 410, 429])
async def test_refusal_of_the_registration_registers_at_once_and_then_waits(
    status: int, autojump_clock: MockClock
) -> None:
    loop = await run_plan(status, Lasts())
    assert loop.urls == [FIRST.url, SECOND.url, SECOND.url]
    assert loop.served == ["reg-2"]
    first, again = loop.registry.times
    assert again - first == 0, "at once"
    assert loop.pauses == [1, 2]


async def test_every_refusal_of_the_registration_registers(autojump_clock: MockClock) -> None:
    loop = await run_plan(403, 404, 429)
    assert len(loop.registry.times) == 4
    assert loop.pauses == [1, 2, 4]


@pytest.mark.parametrize("retryable", [True, False])
async def test_connect_errors_wait_and_take_the_same_url(
    retryable: bool, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    loop = await run_plan(ConnectFailed("cannot connect", retryable=retryable))
    assert loop.urls == [FIRST.url] * 2
    assert loop.pauses == [1]
    assert "cannot connect (where the registry says that the rendezvous is); retry in 1.0 s" in caplog.text


async def test_websocket_has_ten_seconds_to_open(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    loop = await run_plan("hangs", Lasts())
    assert loop.pauses == [10 + 1, 2]
    assert loop.urls == [FIRST.url] * 3
    assert "cannot connect to wss://relay.example/first: no answer within 10 s; retry in 1.0 s" in caplog.text


# Registering.


@pytest.mark.parametrize("passing", [CONFLICT, UNAVAILABLE])
async def test_first_registration_waits_for_what_the_registry_calls_passing(
    passing: RegistryFailed, autojump_clock: MockClock
) -> None:
    loop = await run_plan(Lasts(), answers=[*[passing] * 6, FIRST])
    times = loop.registry.times
    assert loop.ranges[:6] == [(0, 0.25), (0, 0.5), (0, 1), (0, 2), (0, 2.5), (0, 2.5)]
    pauses = [round(after - before, 6) for before, after in pairwise(times)]
    assert pauses == [0.75, 1.5, 3, 6, 7.5, 7.5]
    assert loop.served == ["reg-1"]


FATAL_AT_FIRST = [
    UNREACHABLE,
    SENSELESS,
    refused(401),
    refused(403, "registration_conflict"),
    refused(307),
    refused(400),
    refused(408),
    refused(409),
    refused(429),
    refused(500),
    refused(502),
    refused(502, "registration_conflict"),
    refused(503),
    refused(503, "authentication_service_unavailable"),
]


@pytest.mark.parametrize("error", FATAL_AT_FIRST, ids=lambda error: f"{error.status}-{error.code}")
async def test_first_registration_fails_for_every_other_reason(
    error: RegistryFailed, autojump_clock: MockClock
) -> None:
    loop = Loop(ScriptedRegistry(error), [])
    with pytest.raises(RegistryFailed) as caught:
        await loop.run()
    assert caught.value is error
    assert (len(loop.registry.times), loop.opened) == (1, [])


@pytest.mark.parametrize(
    "error",
    [UNREACHABLE, CONFLICT, UNAVAILABLE, *map(refused, (408, 429, 500, 502, 503))],
    ids=lambda error: f"{error.status}-{error.code}",
)
async def test_later_registration_waits_for_whatever_can_pass(
    error: RegistryFailed, autojump_clock: MockClock
) -> None:
    loop = await run_plan(Lasts(), 403, Lasts(), answers=[FIRST, error, error, SECOND])
    assert loop.served == ["reg-1", "reg-2"]
    _, *again = loop.registry.times
    assert [after - before for before, after in pairwise(again)] == [0.75, 1.5]


@pytest.mark.parametrize(
    "error",
    [
        SENSELESS,
        RegistryFailed("offline", status=409, code="environment_offline", retryable=True),
        *map(refused, (307, 400, 401, 403, 404, 409, 410)),
    ],
    ids=lambda error: f"{error.status}-{error.code}",
)
async def test_later_registration_fails_for_what_cannot_pass(
    error: RegistryFailed, autojump_clock: MockClock
) -> None:
    loop = Loop(ScriptedRegistry(FIRST, error), [Lasts(), 403])
    with pytest.raises(RegistryFailed) as caught:
        await loop.run()
    assert caught.value is error
    assert loop.served == ["reg-1"]


async def test_environment_id_that_is_none_is_refused() -> None:
    async with open_registry("https://registry.example", headers=bearer()) as registry:
        with pytest.raises(UsageError, match="environment id"):
            await serve_rendezvous(registry, "a/b", EchoStreams(), key=None)


async def test_executor_that_was_replaced_ends_and_says_so(autojump_clock: MockClock) -> None:
    loop = Loop(ScriptedRegistry(FIRST), [Lasts(), Lasts(100, 4409), Lasts()])
    with pytest.raises(Replaced, match=f"a newer executor has taken the place of this one for {ID}"):
        await loop.run()
    assert loop.served == ["reg-1", "reg-1"]


async def test_validation_asks_for_the_registration_of_the_socket(autojump_clock: MockClock) -> None:
    asked: list[object] = []

    class Registry(ScriptedRegistry):
        async def validate(self, *args: object) -> bool:
            asked.append(args)
            return True

    class Streams:
        async def run_socket(
            self, channel: object, environment_id: str, registration_id: str | None, validate: Any
        ) -> None:
            assert await validate("stream", HARNESS_KEY, AUTHORIZATION) is True
            scope.cancel()

    async def open_nothing(url: str) -> WebsocketChannel:
        return memory_socket()[0]

    with trio.CancelScope() as scope:
        await serve_rendezvous(Registry(SECOND), ID, Streams(), key=KEY, open_socket=open_nothing)
    assert asked == [("stream", ID, "reg-2", HARNESS_KEY, AUTHORIZATION)]


async def test_clear_text_has_nothing_to_validate(autojump_clock: MockClock) -> None:
    seen: list[object] = []

    class Streams:
        async def run_socket(
            self, channel: object, environment_id: str, registration_id: str | None, validate: Any
        ) -> None:
            seen.extend((registration_id, validate))
            scope.cancel()

    async def open_nothing(url: str) -> WebsocketChannel:
        return memory_socket()[0]

    registry = ScriptedRegistry(Registration(ID, FIRST.url, None))
    with trio.CancelScope() as scope:
        await serve_rendezvous(registry, ID, Streams(), key=None, open_socket=open_nothing)
    assert seen == [None, None]


async def test_what_happens_is_logged_for_people(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loop = await run_plan(
        Lasts(0, 1000),
        403,
        ConnectFailed("cannot connect to wss://relay.example/second"),
        answers=[CONFLICT, FIRST, SECOND],
    )
    ours = [record for record in caplog.records if record.name == "execenv.relay.rendezvous"]
    assert [(record.levelname, record.getMessage()) for record in ours] == [
        ("WARNING", f"{ID}: request failed (503); retry in 0.8 s"),
        ("INFO", f"{ID}: registered at https://registry.example"),
        ("INFO", f"{ID}: connected to wss://relay.example/first"),
        (
            "WARNING",
            f"{ID}: the connection to wss://relay.example/first ended: the other side closed it; "
            "retry in 1.0 s",
        ),
        (
            "WARNING",
            f"{ID}: wss://relay.example/first refused the websocket with status 403; registering again",
        ),
        ("INFO", f"{ID}: registered at https://registry.example"),
        ("WARNING", f"{ID}: wss://relay.example/first refused the websocket with status 403; retry in 2.0 s"),
        (
            "WARNING",
            f"{ID}: cannot connect to wss://relay.example/second (where the registry says that the "
            "rendezvous is); retry in 4.0 s",
        ),
    ]
    assert loop.connected == ["wss://relay.example/first"]


# The websocket.


@define(eq=False)
class Peer:
    """The other end of a socket in memory, frame by frame. Answers no ping by itself."""

    stream: trio.abc.Stream
    codec: FrameCodec = Factory(lambda: FrameCodec(client=False, max_message=1 << 20, binary=True))
    pings: list[float] = Factory(list)
    events: list[Event] = Factory(list)

    async def run(self, answer: bool) -> None:
        async for data in self.stream:
            for event in self.codec.receive(bytes(data)):
                self.events.append(event)
                if isinstance(event, Ping):
                    assert event.payload == b""
                    self.pings.append(trio.current_time())
                    if answer:
                        await self.stream.send_all(self.codec.encode_pong(event.payload))


async def test_executor_pings_every_thirty_seconds(autojump_clock: MockClock) -> None:
    channel, stream = memory_socket()
    peer = Peer(stream)
    with trio.move_on_after(125):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.run, True)
            await channel.run(lambda message: None)
    assert peer.pings == [30, 60, 90, 120]


async def test_socket_whose_peer_answers_no_ping_is_dropped_after_ninety_seconds(
    autojump_clock: MockClock,
) -> None:
    channel, stream = memory_socket()
    peer = Peer(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.run, False)
        await channel.run(lambda message: None)
        assert trio.current_time() == 90
        nursery.cancel_scope.cancel()
    assert peer.pings == [30], "no other ping while one is not answered"
    assert channel.loss == "no answer to a ping within 60 s"


@asynccontextmanager
async def serving(
    rendezvous: FakeRendezvous,
    answers: Iterable[Answer] = (),
    streams: SocketRunner | None = None,
    **options: Any,
) -> AsyncIterator[FakeRegistry]:
    """The loop with real sockets, on loopback, without pauses."""
    with trio.fail_after(20):
        async with (
            open_fake_registry() as fake,
            open_registry(fake.url, headers=bearer()) as registry,
            trio.open_nursery() as nursery,
        ):
            fake.answer("register", *(answers or [registered(rendezvous.url)]))
            nursery.start_soon(
                partial(
                    serve_rendezvous,
                    registry,
                    ID,
                    streams or EchoStreams(),
                    key=KEY,
                    open_socket=partial(open_socket, **options),
                    uniform=lambda low, high: 0.0,
                )
            )
            yield fake
            nursery.cancel_scope.cancel()


async def test_handshake_has_a_request_id_and_neither_origin_nor_protocol_nor_credential() -> None:
    async with open_fake_rendezvous([1000, 1000, 101]) as rendezvous, serving(rendezvous):
        await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
    ids = {head.headers["x-request-id"].decode() for head in rendezvous.heads}
    assert len(ids) == 3, "each try has its own"
    assert all(re.fullmatch("req_[0-9a-f]{32}", text) for text in ids)
    for head in rendezvous.heads:
        assert f"{head.path}?{head.query}" == f"/rendezvous/{ID}?role=executor&{SIGNATURE}"
        assert not head.headers.keys() & {"origin", "sec-websocket-protocol", "authorization"}
        assert API_KEY.encode() not in head.raw


async def test_messages_are_binary_in_both_directions() -> None:
    async with open_fake_rendezvous() as rendezvous, serving(rendezvous):
        await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
        rendezvous.sockets[0].send_raw(b"\x00\xff")
        await rendezvous.wait_until(lambda: bool(rendezvous.received))
        assert rendezvous.received == [b"\x00\xff"]


async def test_text_message_reaches_the_streams_as_nothing_and_the_socket_stays() -> None:
    got: list[bytes] = []

    class Streams:
        async def run_socket(self, channel: WebsocketChannel, *_args: object) -> None:
            def receive(message: bytes) -> None:
                got.append(message)
                channel.send_nowait(b"got it")

            await channel.run(receive)

    async with open_fake_rendezvous() as rendezvous, serving(rendezvous, streams=Streams()):
        await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
        socket = rendezvous.sockets[0].channel
        socket.send_urgent(b"\x81\x04text")
        socket.send_nowait(b"binary")
        await rendezvous.wait_until(lambda: len(rendezvous.received) == 2)
        assert got == [NO_BINARY, b"binary"]


async def test_message_as_large_as_allowed_is_taken_with_its_frame_and_a_larger_one_ends_the_socket() -> None:
    async with open_fake_rendezvous() as rendezvous, serving(rendezvous, max_message=4096):
        await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
        rendezvous.sockets[0].send_raw(b"x" * (4096 + 1024))
        await rendezvous.wait_until(lambda: bool(rendezvous.received))
        rendezvous.sockets[0].send_raw(b"x" * (4096 + 1025))
        await rendezvous.wait_until(lambda: len(rendezvous.sockets) == 2)
        assert rendezvous.sockets[0].channel.close_code == 1009


async def test_real_socket_is_dropped_and_opened_again_when_nobody_answers_pings() -> None:
    async with (
        open_fake_rendezvous([102, 101]) as rendezvous,
        serving(rendezvous, ping_interval=0.02, pong_timeout=0.1),
    ):
        await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
    assert len(rendezvous.heads) == 2


async def test_rows_of_the_rendezvous_with_real_sockets() -> None:
    plan = [1000, 500, 403, 404, 409, 410, 429, 401, 1012, 101]
    async with open_fake_rendezvous(plan) as rendezvous:
        urls = [f"{rendezvous.url}&n={n}" for n in range(20)]
        async with serving(rendezvous, [registered(url) for url in urls]) as registry:
            await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
            numbers = [head.query.rpartition("=")[2] for head in rendezvous.heads]
            assert numbers == ["0", "0", "0", "1", "2", "3", "4", "5", "6", "6"]
            assert registry.count("register") == 7


async def test_replaced_executor_ends_with_a_real_socket() -> None:
    with trio.fail_after(20), pytest.RaisesGroup(Replaced, flatten_subgroups=True, allow_unwrapped=True):
        async with (
            open_fake_rendezvous([4409]) as rendezvous,
            serving(rendezvous),
            trio.open_nursery(),
        ):
            await trio.sleep_forever()


async def test_no_secret_is_logged_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [KEY.to_json(), HARNESS_KEY.to_json()]

    class Streams:
        async def run_socket(
            self, channel: WebsocketChannel, _id: str, _registration_id: str | None, validate: Any
        ) -> None:
            assert await validate("stream-1", HARNESS_KEY, AUTHORIZATION) is False
            await channel.run(channel.send_nowait)

    async with (
        open_fake_rendezvous([403, 500, 1000, 101]) as rendezvous,
        serving(rendezvous, streams=Streams()) as registry,
    ):
        registry.answer("validate", error_answer(500, "c", f"{AUTHORIZATION} {API_KEY}"))
        await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
        rendezvous.sockets[0].send_raw(b"x")
        await rendezvous.wait_until(lambda: bool(rendezvous.received))
    assert f"connected to {rendezvous.base}/rendezvous/{ID}" in caplog.text
    for secret in (API_KEY, SIGNATURE, "sig=", AUTHORIZATION, *(key["x25519_public_key"] for key in keys)):
        assert secret not in caplog.text


async def test_clear_text_registers_without_a_body_and_serves() -> None:
    with trio.fail_after(20):
        async with (
            open_fake_rendezvous() as rendezvous,
            open_fake_registry() as fake,
            open_registry(fake.url, headers=bearer()) as registry,
            trio.open_nursery() as nursery,
        ):
            fake.answer("register", clear(rendezvous.url))
            nursery.start_soon(partial(serve_rendezvous, registry, ID, EchoStreams(), key=None))
            await rendezvous.wait_until(lambda: bool(rendezvous.sockets))
            assert [asked.body for asked in fake.asked] == [b""]
            nursery.cancel_scope.cancel()
