"""The front door of a relay: HTTP, and clients that mean no good."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from execenv.relay import frames
from execenv.relay.frames import Data, Frame, Resume
from execenv.relay_service.front import REJECTION
from execenv.relay_service.store import StoreUnavailable
from tests.relay_service.relays import (
    BOX,
    UPGRADE,
    Relay,
    ask,
    head,
    new_token,
    open_relay,
    read_reply,
)

REGISTER = f"/cloud/environment/{BOX}/register"


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    async with open_relay(tmp_path) as relay:
        yield relay


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# What there is.


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /readyz", 200),
        ("HEAD /readyz", 200),
        ("POST /readyz", 405),
        ("GET /metrics", 200),
        ("DELETE /metrics", 405),
        ("GET /", 404),
        ("GET /rendezvous", 404),
        ("GET /rendezvous/", 400),
        ("GET /rendezvous/a/b", 404),
        ("GET http://relay/readyz", 200),
        ("GET /public://relay/metrics", 404),
        ("GET /rendezvous/box", 403),
        (f"GET {REGISTER}", 405),
        ("POST /cloud/environment/box/direct/register", 404),
        ("POST /cloud/environment/box/unregister", 404),
        ("POST /cloud/environment/a/b/register", 404),
        ("POST /cloud/environment/a%2Fb/register", 400),
        ("POST /cloud/environment//register", 400),
        (f"POST {REGISTER}", 401),
        (f"POST http://relay{REGISTER}", 401),
        (f"POST {REGISTER}?query", 401),
    ],
)
async def test_there_is_this_and_no_more(relay: Relay, line: str, status: int) -> None:
    method, target = line.split()
    reply = await ask(relay.port, head(method, target, {"content-length": "0"}))
    assert reply.status == status
    assert reply.headers["connection"] == "close"
    if status == 405:
        assert reply.headers["allow"] in ("GET,HEAD", "POST")


async def test_browser_is_refused_everywhere(relay: Relay) -> None:
    for line in (
        "GET /readyz",
        "GET /metrics",
        f"POST {REGISTER}",
        "GET /rendezvous/box?role=harness",
        "GET /",
    ):
        method, target = line.split()
        reply = await ask(relay.port, head(method, target, UPGRADE | {"origin": "null"}))
        assert (reply.status, reply.code) == (403, "origin_refused")


async def test_metrics_are_for_this_machine_unless_they_are_public(tmp_path: Path, relay: Relay) -> None:
    for name in ("X-Forwarded-For", "Forwarded"):
        reply = await relay.get("/metrics", {name: "1.2.3.4"})
        assert (reply.status, reply.code) == (403, "metrics_refused")
    reply = await relay.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'execenv_relay_refusals_total{reason="metrics_refused"} 2\n' in reply.body
    async with open_relay(tmp_path / "other", public_metrics=True) as public:
        assert (await public.get("/metrics", {"x-forwarded-for": "1.2.3.4"})).status == 200


async def test_store_that_is_away_is_told_to_load_balancers_and_to_clients(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await new_token(relay.store, "executor")
    url = (await relay.request("register", token)).json["url"]
    assert (await relay.get("/readyz")).status == 200

    async def away(*args: object) -> None:
        raise StoreUnavailable

    for name in ("ping", "token", "registration"):
        monkeypatch.setattr(relay.store, name, away)
    assert (await relay.get("/readyz")).status == 503
    reply = await relay.request("register", token)
    assert (reply.status, reply.code) == (502, "authentication_service_unavailable")
    reply = await ask(relay.port, head("GET", url.partition(str(relay.port))[2], UPGRADE))
    assert (reply.status, reply.headers[REJECTION]) == (503, "store_unavailable")


async def test_sockets_stay_while_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_relay(tmp_path, sweep_interval=0.01) as relay:
        executor = await relay.executor()
        asked = trio.Event()

        async def away() -> None:
            asked.set()
            raise StoreUnavailable("away")

        monkeypatch.setattr(relay.store, "tokens", away)
        await asked.wait()
        harness = await relay.harness()
        harness.send("s", Resume())
        assert await executor.receive() == Frame("s", Resume())


# Bodies.


def body_of(size: int) -> bytes:
    return b'{"pad":"' + b"x" * (size - 10) + b'"}'


@pytest.mark.parametrize(("size", "status"), [(32 * 1024, 400), (32 * 1024 + 1, 413)])
async def test_body_has_32_kib_at_most(relay: Relay, size: int, status: int) -> None:
    headers = {"authorization": f"Bearer {await new_token(relay.store, 'executor')}"}
    body = body_of(size)
    assert len(body) == size
    reply = await ask(relay.port, head("POST", REGISTER, headers | {"content-length": str(size)}) + body)
    assert (reply.status, reply.code) == (
        status,
        "too_large" if status == 413 else "unsupported_security_profile",
    )
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, size, 999)
    )
    data = head("POST", REGISTER, headers | {"transfer-encoding": "chunked"}) + chunks + b"0\r\n\r\n"
    assert (await ask(relay.port, data)).status == status


async def test_body_that_would_never_end_is_answered_before_it_does(relay: Relay) -> None:
    token = await new_token(relay.store, "executor")
    headers = {"authorization": f"Bearer {token}", "transfer-encoding": "chunked"}
    with trio.fail_after(5):
        async with await trio.open_tcp_stream("127.0.0.1", relay.port) as stream:
            await stream.send_all(head("POST", REGISTER, headers))
            await stream.send_all(b"8000\r\n" + b"x" * 0x8000 + b"\r\n8000\r\n" + b"x" * 0x8000)
            assert (await read_reply(stream)).status == 413


async def test_client_that_waits_to_be_told_to_go_on_is_told(relay: Relay) -> None:
    token = await new_token(relay.store, "executor")
    headers = {"authorization": f"Bearer {token}", "content-length": "2", "expect": "100-continue"}
    async with await trio.open_tcp_stream("127.0.0.1", relay.port) as stream:
        await stream.send_all(head("POST", REGISTER, headers))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
        await stream.send_all(b"{}")
        assert (await read_reply(stream)).code == "unsupported_security_profile"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-length": "10"},
        {"content-length": "-1"},
        {"content-length": "9" * 5000},
        {"content-length": "1, 2"},
        {"transfer-encoding": "gzip"},
        {"transfer-encoding": "chunked"},
    ],
)
async def test_body_that_is_cut_off_or_makes_no_sense_is_refused(
    relay: Relay, headers: dict[str, str]
) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", relay.port) as stream:
        await stream.send_all(head("POST", REGISTER, headers) + b"zz")
        await stream.send_eof()
        assert (await read_reply(stream)).status in (400, 413, 501)


# Who means no good.


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 70_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(8000)) + b"\r\n",
    ],
)
async def test_head_that_is_none_or_too_long_is_refused(relay: Relay, data: bytes) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", relay.port) as stream:
        try:
            await stream.send_all(data)
            received = await stream.receive_some()
        except trio.BrokenResourceError:  # closed while there is more to read: our system forgets the answer
            received = b""
        assert received.split(b" ")[1:2] in ([b"400"], [])
    assert (await relay.get("/readyz")).status == 200


@pytest.mark.parametrize("kind", ["nothing", "head", "body"])
async def test_client_that_takes_its_time_is_cut(tmp_path: Path, kind: str) -> None:
    async with open_relay(tmp_path, handshake_deadline=1) as relay:
        data = {
            "nothing": b"",
            "head": b"GET /readyz HTTP/1.1\r\nx-slow: ",
            "body": head("POST", REGISTER, {"content-length": "1000"}),
        }[kind]
        began = trio.current_time()
        async with await trio.open_tcp_stream("127.0.0.1", relay.port) as stream:
            await stream.send_all(data)
            with trio.fail_after(20):
                while True:
                    try:
                        await stream.send_all(b"x" if kind != "nothing" else b"")
                        with trio.move_on_after(0.02):
                            if not await stream.receive_some():
                                break
                    except trio.BrokenResourceError:
                        break
        assert trio.current_time() - began > 0.9
        assert (await relay.get("/readyz")).status == 200


async def test_socket_has_no_deadline_once_it_is_open(tmp_path: Path) -> None:
    async with open_relay(tmp_path, handshake_deadline=2) as relay:
        executor, harness = await relay.executor(), await relay.harness()
        await trio.sleep(2.2)  # nothing is to happen
        harness.send("s", Resume())
        assert await executor.receive() == Frame("s", Resume())


async def test_connections_that_say_nothing_are_as_many_as_they_may_be(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_pending=3, max_waiting=1, handshake_deadline=3) as relay:
        executor, harness = await relay.executor(), await relay.harness()  # these have said it
        answers: list[int] = []

        async def look() -> None:
            answers.append((await relay.get("/readyz")).status)

        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", relay.port))
            await trio.testing.wait_all_tasks_blocked(0.05)
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(look)
                harness.send("s", Resume())
                assert await executor.receive() == Frame("s", Resume())
        assert answers == [503, 200]  # the second one when the three were cut


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n", head("POST", REGISTER, {"content-length": "9"})]
)
async def test_connections_that_say_nothing_are_cut_while_others_wait(tmp_path: Path, said: bytes) -> None:
    limits: dict[str, Any] = {"max_pending": 3, "handshake_deadline": 60, "max_silence": 0.1}
    async with open_relay(tmp_path, **limits) as relay, AsyncExitStack() as stack:
        silent = []
        for _ in range(3):
            stream = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", relay.port))
            await stream.send_all(said)
            silent.append(stream)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await relay.get("/readyz")).status == 200
        assert await silent[0].receive_some() == b""


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        ("DELETE /rendezvous/box", {}),
        (f"POST {REGISTER}", {"content-length": "99999"}),
        (f"POST /cloud/environment/{'x' * 50_000}/register", {}),
        (f"GET /rendezvous/{'x' * 50_000}", {}),
    ],
)
async def test_who_has_no_token_does_not_fill_the_log(
    relay: Relay, caplog: pytest.LogCaptureFixture, line: str, headers: dict[str, str]
) -> None:
    caplog.set_level("INFO", "execenv.relay.audit")
    method, target = line.split()
    for _ in range(30):
        await ask(relay.port, head(method, target, headers))
    assert len(caplog.messages) <= 20
    assert sum(map(len, caplog.messages)) < 10_000


async def test_harness_that_reads_no_refusals_costs_no_memory(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_harness_streams=1) as relay:
        await relay.executor()
        url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
        frame = frames.encode(Frame("x" * 100, Resume()))
        flood = b"".join(
            bytes([0x82, 0x80 | len(data)]) + bytes(4) + data
            for data in (frames.encode(Frame("one", Resume())), *[frame] * 50_000)
        )
        async with await trio.open_tcp_stream("127.0.0.1", relay.port) as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await stream.send_all(head("GET", url.partition(str(relay.port))[2], UPGRADE))
            await stream.send_all(flood)
            await relay.wait_metric('frames_dropped_total{reason="foreign"}', 50_000)
            assert (await relay.metrics())["queue_bytes"] < 1024 * 1024


async def test_garbage_at_speed_costs_no_memory_and_no_socket(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    harness.send("s", Resume())
    await executor.receive()
    before = resident()
    unknown = frames.encode(Frame("nobody", Data(0, b"x" * 100)))
    for _ in range(20):
        for _ in range(500):
            harness.channel.send_nowait(os.urandom(1000))
            executor.channel.send_nowait(os.urandom(1000))
            executor.channel.send_nowait(unknown)
        await harness.channel.wait_room()
        await executor.channel.wait_room()
        while executor.arrived.statistics().current_buffer_used:
            executor.arrived.receive_nowait()
    executor.send("s", Data(0, b"x"))
    assert await harness.receive() == Frame("s", Data(0, b"x"))
    assert resident() - before < 40 * 1024 * 1024
