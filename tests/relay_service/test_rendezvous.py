"""Websockets of a rendezvous, with plain clients over a real port."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import trio

from execenv.errors import ConnectionLost
from execenv.relay import frames
from execenv.relay.frames import Ack, Data, Frame, Handshake, Heartbeat, Reset, Resume
from execenv.relay_service.front import REJECTION
from execenv.relay_service.sockets import DISCONNECTED, FOREIGN, TOO_MANY_STREAMS
from tests.relay_service.redis_server import RedisServer
from tests.relay_service.relays import (
    BOX,
    UPGRADE,
    Client,
    Relay,
    Reply,
    ask,
    data_frames,
    head,
    new_key,
    new_token,
    noise_body,
    open_relay,
)


@pytest.fixture(params=["one node", "two nodes"])
async def relay(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Relay]:
    redis = request.getfixturevalue("redis").url if request.param == "two nodes" else None
    async with open_relay(tmp_path, redis) as relay:
        yield relay


def target(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


async def refusal(relay: Relay, url: str, token: str | None = None) -> Reply:
    """How a handshake is refused."""
    headers = UPGRADE | ({"authorization": f"Bearer {token}"} if token else {})
    return await ask(relay.port, head("GET", target(url), headers))


def rejected(reply: Reply, status: int, code: str) -> bool:
    return (reply.status, reply.code, reply.headers[REJECTION]) == (status, code, code)


# Frames.


async def test_frames_of_every_kind_pass_unchanged_in_both_directions(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    for body in (Resume(3, 1), Ack(), Heartbeat(), Handshake(b"h"), Data(5, b"payload")):
        sent = harness.send("s", body)
        assert await executor.arrived.receive() == sent
        sent = executor.send("s", body)
        assert await harness.arrived.receive() == sent


async def test_frame_with_fields_that_nobody_knows_passes_unchanged(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    # The stream id behind the body, and field 99 behind that.
    body = frames.encode(Frame("s", Data(0, b"x")))
    frame = b"\x08\x01" + body.partition(b"\x12\x01s")[2] + b"\x12\x01s" + b"\x9a\x06\x03new"
    harness.channel.send_nowait(frame)
    assert await executor.arrived.receive() == frame


async def test_two_harnesses_have_each_their_own_streams(relay: Relay) -> None:
    executor, one, other = await relay.executor(), await relay.harness(), await relay.harness()
    one.send("1", Resume())
    other.send("2", Resume())
    assert {(await executor.receive()).stream_id for _ in range(2)} == {"1", "2"}
    executor.send("2", Data(0, b"for 2"))
    executor.send("1", Data(0, b"for 1"))
    assert await one.receive() == Frame("1", Data(0, b"for 1"))
    assert await other.receive() == Frame("2", Data(0, b"for 2"))


async def test_order_is_kept_over_many_frames_of_all_sizes(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    sent = [*data_frames("s", 1, 500), *data_frames("s", 60 * 1024, 50), *data_frames("s", 300 * 1024, 5)]
    harness.send("s", Resume())
    await executor.receive()
    for frame in sent:
        executor.channel.send_nowait(frame)
        harness.channel.send_nowait(frame)
    assert [await harness.arrived.receive() for _ in sent] == sent
    assert [await executor.arrived.receive() for _ in sent] == sent


async def test_garbage_and_text_are_dropped_and_no_socket_ends(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    harness.send("s", Resume())
    await executor.receive()
    garbage = [
        b"\xff\xff",
        b"\x08\x02\x12\x01s",
        b"\x08\x01\x12\x01 ",
        b"\x08\x01",
        b"\x08\x01\x12\x02\xff\xff",
    ]
    for client in (executor, harness):
        for frame in garbage:
            client.channel.send_nowait(frame)
        client.channel._codec._binary = False
        client.channel.send_nowait(b"text")
        client.channel._codec._binary = True
    harness.send("s", Data(0, b"x"))
    assert await executor.receive() == Frame("s", Data(0, b"x"))
    executor.send("s", Data(0, b"y"))
    assert await harness.receive() == Frame("s", Data(0, b"y"))
    assert (await relay.metrics())['frames_dropped_total{reason="invalid"}'] == 2 * (len(garbage) + 1)


async def test_frame_of_an_executor_for_a_stream_that_nobody_has_is_answered_with_a_reset(
    relay: Relay,
) -> None:
    executor = await relay.executor()
    executor.send("nobody", Reset("over"))  # which is not answered
    executor.send("nobody", Data(0, b"x"))
    assert await executor.receive() == Frame("nobody", Reset(DISCONNECTED))
    executor.send("other", Ack())
    assert await executor.receive() == Frame("other", Reset(DISCONNECTED))


async def test_end_of_a_harness_resets_its_streams_and_no_others(relay: Relay) -> None:
    executor, one, other = await relay.executor(), await relay.harness(), await relay.harness()
    for stream_id in ("a", "b"):
        one.send(stream_id, Resume())
        await executor.receive()
    other.send("c", Resume())
    await executor.receive()
    one.channel.close_nowait()
    assert await executor.receive() == Frame("a", Reset(DISCONNECTED))
    assert await executor.receive() == Frame("b", Reset(DISCONNECTED))
    executor.send("c", Data(0, b"x"))
    assert await other.receive() == Frame("c", Data(0, b"x"))


async def test_end_of_an_executor_ends_its_harnesses_with_1012(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    harness.send("s", Resume())
    await executor.receive()
    executor.channel.fail("cut")
    assert await harness.end() == 1012


async def test_reset_frees_its_stream_for_both_sides(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    for sender, receiver in ((harness, executor), (executor, harness)):
        harness.send("s", Resume())
        assert await executor.receive() == Frame("s", Resume())
        sender.send("s", Reset("over"))
        assert await receiver.receive() == Frame("s", Reset("over"))
        executor.send("s", Data(0, b"late"))
        assert await executor.receive() == Frame("s", Reset(DISCONNECTED))


# Whose stream it is.


async def test_stream_of_another_token_is_not_for_anybody_else(relay: Relay) -> None:
    executor, owner, thief = await relay.executor(), await relay.harness(), await relay.harness()
    owner.send("s", Data(0, b"mine"))
    await executor.receive()
    thief.send("s", Data(1, b"stolen"))
    assert await thief.receive() == Frame("s", Reset(FOREIGN))
    thief.send("s", Reset("over"))  # dropped, and not answered
    thief.send("t", Data(0, b"own"))
    assert await executor.receive() == Frame("t", Data(0, b"own"))
    executor.send("s", Data(0, b"secret"))
    assert await owner.receive() == Frame("s", Data(0, b"secret"))
    assert (await relay.metrics())['frames_dropped_total{reason="foreign"}'] == 2


async def test_frame_with_two_stream_ids_counts_for_the_one_that_its_receiver_sees(relay: Relay) -> None:
    executor, owner, thief = await relay.executor(), await relay.harness(), await relay.harness()
    owner.send("victim", Data(0, b"mine"))
    await executor.receive()
    frame = frames.encode(Frame("thief", Data(0, b"x"))) + b"\x12\x06victim"
    assert frames.decode(frame).stream_id == "victim"
    thief.channel.send_nowait(frame)
    assert await thief.receive() == Frame("victim", Reset(FOREIGN))


async def test_stream_stays_its_owners_while_the_owner_is_away(relay: Relay) -> None:
    executor = await relay.executor()
    token = await new_token(relay.store, "harness")
    owner, thief = await relay.harness(token), await relay.harness()
    owner.send("s", Data(0, b"mine"))
    await executor.receive()
    owner.channel.fail("cut")
    assert await executor.receive() == Frame("s", Reset(DISCONNECTED))
    thief.send("s", Data(1, b"stolen"))
    assert await thief.receive() == Frame("s", Reset(FOREIGN))
    owner = await relay.harness(token)
    owner.send("s", Data(2, b"back"))
    assert await executor.receive() == Frame("s", Data(2, b"back"))


async def test_other_key_of_the_same_token_is_somebody_else(relay: Relay) -> None:
    executor = await relay.executor(new_key())
    token = await new_token(relay.store, "harness")
    owner, other = await relay.harness(token, new_key()), await relay.harness(token, new_key())
    owner.send("s", Handshake(b"x"))
    await executor.receive()
    other.send("s", Handshake(b"y"))
    assert await other.receive() == Frame("s", Reset(FOREIGN))


async def test_same_harness_on_a_newer_socket_takes_its_stream_over(relay: Relay) -> None:
    executor = await relay.executor()
    token = await new_token(relay.store, "harness")
    old = await relay.harness(token)
    for stream_id in ("s", "t"):
        old.send(stream_id, Resume(0, 1))
        await executor.receive()
    new = await relay.harness(token)
    new.send("s", Resume(7, 1))
    assert await old.end() == 4409
    # Of the stream that goes on the executor hears nothing; the other one ended with its socket.
    assert [await executor.receive() for _ in range(2)] == [
        Frame("t", Reset(DISCONNECTED)),
        Frame("s", Resume(7, 1)),
    ]
    executor.send("s", Data(0, b"x"))
    assert await new.receive() == Frame("s", Data(0, b"x"))


async def test_seventeenth_stream_of_a_harness_is_reset(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    for number in range(16):
        harness.send(f"s{number}", Resume())
        await executor.receive()
    harness.send("s16", Resume())
    assert await harness.receive() == Frame("s16", Reset(TOO_MANY_STREAMS))
    harness.send("s3", Reset("over"))
    harness.send("s16", Resume())
    assert await executor.receive() == Frame("s3", Reset("over"))
    assert await executor.receive() == Frame("s16", Resume())


async def test_streams_that_are_over_are_remembered_up_to_a_number(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_remembered_streams=4) as relay:
        executor, one, other = await relay.executor(), await relay.harness(), await relay.harness()
        one.send("kept", Resume())
        await executor.receive()
        for number in range(6):
            one.send(f"s{number}", Resume())
            one.send(f"s{number}", Reset("over"))
            await executor.receive()
            await executor.receive()
        other.send("s4", Resume())
        assert await other.receive() == Frame("s4", Reset(FOREIGN))
        other.send("s0", Resume())  # forgotten
        assert await executor.receive() == Frame("s0", Resume())
        other.send("kept", Resume())  # in use, hence not
        assert await other.receive() == Frame("kept", Reset(FOREIGN))


# Who may open a websocket.


async def test_newer_executor_replaces_the_older_one(relay: Relay) -> None:
    old = await relay.executor(new_key())
    harness = await relay.harness(key=new_key())
    new = await relay.executor(new_key())
    assert await old.end() == 4409
    assert await harness.end() == 1012
    assert not new.ended.is_set()
    again = await relay.harness(key=new_key())
    again.send("s", Handshake(b"x"))
    assert await new.receive() == Frame("s", Handshake(b"x"))


async def test_replaced_executor_can_neither_connect_nor_register_again(relay: Relay) -> None:
    token, key = await new_token(relay.store, "executor"), new_key()
    url = (await relay.request("register", token, noise_body(key))).json["url"]
    await relay.open(url)
    await relay.executor(new_key())
    assert rejected(await refusal(relay, url), 403, "superseded")
    reply = await relay.request("register", token, noise_body(key))
    assert (reply.status, reply.code) == (409, "superseded")
    assert "newer executor" in reply.json["error"]["message"]


async def test_url_of_an_executor_is_good_for_many_websockets_until_it_expires(relay: Relay) -> None:
    token = await new_token(relay.store, "executor")
    url = (await relay.request("register", token)).json["url"]
    for _ in range(3):
        client = await relay.open(url)
        client.channel.close_nowait()
        await client.end()
        await relay.wait_offline()
    relay.clock.now += 899
    await relay.open(url)
    relay.clock.now += 1
    assert rejected(await refusal(relay, url), 403, "url_expired")


async def test_url_of_a_harness_is_good_for_one_websocket(relay: Relay) -> None:
    await relay.executor()
    token = await new_token(relay.store, "harness")
    url = (await relay.bundle(token))["url"]
    await relay.open(url)
    assert rejected(await refusal(relay, url), 401, "url_used")
    late = (await relay.bundle(token))["url"]
    relay.clock.now += 60
    assert rejected(await refusal(relay, late), 401, "url_expired")


@pytest.mark.parametrize("name", ["role", "registration", "token", "key", "expires", "nonce", "signature"])
async def test_url_with_another_part_is_refused(relay: Relay, name: str) -> None:
    await relay.executor()
    parts = urlsplit((await relay.bundle(await new_token(relay.store, "harness")))["url"])
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    changes = {"role": "executor", "expires": str(int(query["expires"]) + 1)}
    query[name] = changes.get(name, query[name][:-1] + ("0" if query[name][-1:] != "0" else "1"))
    url = parts._replace(query=urlencode(query)).geturl()
    assert rejected(await refusal(relay, url), 403, "invalid_signature")


async def test_url_for_another_environment_is_refused(relay: Relay) -> None:
    await relay.executor()
    await relay.executor(environment_id="other")
    url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
    assert rejected(await refusal(relay, url.replace(f"/{BOX}?", "/other?")), 403, "invalid_signature")


async def test_harness_with_a_bearer_token_needs_no_url_where_text_is_clear(relay: Relay) -> None:
    executor = await relay.executor()
    token = await new_token(relay.store, "harness")
    url = f"ws://127.0.0.1:{relay.port}/rendezvous/{BOX}?role=harness"
    harness = await relay.open(url, [(b"authorization", f"Bearer {token}".encode())])
    harness.send("s", Resume())
    assert await executor.receive() == Frame("s", Resume())
    reply = await refusal(relay, url)
    assert rejected(reply, 401, "not_authenticated")
    assert reply.headers["www-authenticate"] == "Bearer"
    wrong = await new_token(relay.store, "executor")
    assert rejected(await refusal(relay, url, wrong), 403, "wrong_role")
    wrong = await new_token(relay.store, "harness", "other")
    assert rejected(await refusal(relay, url, wrong), 403, "wrong_environment")
    assert rejected(await refusal(relay, url.replace("harness", "executor"), token), 403, "invalid_signature")


async def test_bearer_token_opens_no_websocket_to_an_executor_with_noise(relay: Relay) -> None:
    await relay.executor(new_key())
    token = await new_token(relay.store, "harness")
    url = f"ws://127.0.0.1:{relay.port}/rendezvous/{BOX}?role=harness"
    assert rejected(await refusal(relay, url, token), 409, "security_profile_mismatch")


async def test_harness_comes_too_late_for_an_executor_that_has_gone(relay: Relay) -> None:
    executor = await relay.executor()
    url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
    executor.channel.close_nowait()
    await relay.wait_offline()
    assert rejected(await refusal(relay, url), 409, "environment_offline")


async def test_bundle_for_an_executor_that_has_registered_anew_is_refused(relay: Relay) -> None:
    await relay.executor()
    token = await new_token(relay.store, "harness")
    url = (await relay.bundle(token))["url"]
    await relay.request("register", await new_token(relay.store, "executor"))
    assert rejected(await refusal(relay, url), 401, "superseded")
    reply = await relay.request("connect", token, {})  # the older one is still there, but not for long
    assert (reply.status, reply.code) == (409, "environment_offline")


async def test_environment_has_as_many_harnesses_as_it_may(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_environment_harnesses=2) as relay:
        await relay.executor()
        await relay.harness()
        last = await relay.harness()
        url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
        reply = await refusal(relay, url)
        assert rejected(reply, 429, "too_many_harnesses")
        assert reply.headers["retry-after"] == "1"
        last.channel.close_nowait()
        await last.end()
        await relay.wait_metric('sockets{role="harness"}', 1)
        await relay.open(url)  # it was not used up by the refusal


async def test_token_has_as_many_harnesses_as_it_may(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_token_harnesses=1) as relay:
        await relay.executor()
        token = await new_token(relay.store, "harness")
        await relay.harness(token)
        url = (await relay.bundle(token))["url"]
        assert rejected(await refusal(relay, url), 429, "too_many_harnesses_of_token")
        await relay.harness()


async def test_node_has_as_many_sockets_as_it_may(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_sockets=2) as relay:
        await relay.executor()
        await relay.executor(environment_id="other")
        token = await new_token(relay.store, "executor", "third")
        url = (await relay.request("register", token, environment_id="third")).json["url"]
        assert rejected(await refusal(relay, url), 503, "too_many_sockets")


async def test_frame_may_be_as_large_as_the_profile_says(tmp_path: Path) -> None:
    async with open_relay(tmp_path, max_clear_frame=300_000) as relay:
        for environment_id, key, most in (("clear", None, 300_000), ("noise", new_key(), 128 * 1024)):
            executor = await relay.executor(key, environment_id)
            harness = await relay.harness(key=key and new_key(), environment_id=environment_id)
            largest = next(data_frames("s", most - 20, 1))
            largest += b"\x9a\x06" + bytes([most - len(largest) - 3]) + bytes(most - len(largest) - 3)
            assert len(largest) == most
            harness.channel.send_nowait(largest)
            assert await executor.arrived.receive() == largest
            harness.channel.send_nowait(largest + b"\x18\x00")
            assert await harness.end() == 1009
            assert await executor.receive() == Frame("s", Reset(DISCONNECTED))


async def test_no_websocket_for_a_browser_nor_without_an_upgrade(relay: Relay) -> None:
    await relay.executor()
    url = target((await relay.bundle(await new_token(relay.store, "harness")))["url"])
    reply = await ask(relay.port, head("GET", url, UPGRADE | {"origin": "https://example.com"}))
    assert (reply.status, reply.code) == (403, "origin_refused")
    reply = await ask(relay.port, head("GET", url, {}))
    assert rejected(reply, 400, "no_upgrade")
    reply = await ask(relay.port, head("POST", url, UPGRADE))
    assert rejected(reply, 405, "method_not_allowed")


async def test_relay_that_wants_noise_refuses_clear_text_everywhere(tmp_path: Path) -> None:
    async with open_relay(tmp_path) as relay:
        executor_token, token = (
            await new_token(relay.store, "executor"),
            await new_token(relay.store, "harness"),
        )
        await relay.request("register", executor_token)
    async with open_relay(tmp_path, require_noise=True) as relay:
        reply = await relay.request("register", executor_token)
        assert (reply.status, reply.code) == (403, "clear_text_refused")
        url = f"ws://127.0.0.1:{relay.port}/rendezvous/{BOX}?role=harness"
        assert rejected(await refusal(relay, url, token), 403, "clear_text_refused")


# Tokens that end.


async def test_sockets_of_a_revoked_token_end(tmp_path: Path) -> None:
    async with open_relay(tmp_path, sweep_interval=0.05) as relay:
        executor = await relay.executor()
        token = await new_token(relay.store, "harness")
        revoked, other = await relay.harness(token), await relay.harness()
        url = (await relay.bundle(token))["url"]
        assert await relay.store.revoke_token(token.split("_")[1])
        assert await revoked.end() == 1008
        assert rejected(await refusal(relay, url), 403, "token_revoked")
        assert not other.ended.is_set()
        assert not executor.ended.is_set()


async def test_sockets_of_an_expired_token_end(tmp_path: Path) -> None:
    async with open_relay(tmp_path, sweep_interval=0.05) as relay:
        await relay.executor()
        token = await new_token(relay.store, "harness", expires=relay.clock.now + 10)
        harness = await relay.harness(token)
        relay.clock.now += 9.9
        await trio.sleep(0.2)  # several sweeps: nothing is to happen
        assert not harness.ended.is_set()
        relay.clock.now += 0.1
        assert await harness.end() == 1008


# A store that has lost something.


async def test_node_takes_urls_that_another_one_has_signed_with_a_newer_key(
    tmp_path: Path, redis: RedisServer
) -> None:
    async with open_relay(tmp_path, redis.url, sweep_interval=1000) as relay:
        await relay.executor()  # the first node knows a key now, the other one none
        redis.flush()
        relay.clock.now += 1
        relay.ports.reverse()
        token = await new_token(relay.store, "executor")
        url = (await relay.request("register", token)).json["url"]
        relay.ports.reverse()
        assert not (await relay.open(url.replace(f":{relay.ports[1]}/", f":{relay.port}/"))).ended.is_set()
        assert (await relay.metrics())['sockets{role="executor"}'] == 1


async def test_executor_whose_registration_is_lost_is_to_register_again(tmp_path: Path) -> None:
    async with open_relay(tmp_path, sweep_interval=0.05) as relay:
        executor, other = await relay.executor(), await relay.executor(environment_id="other")
        with closing(sqlite3.connect(tmp_path / "relay.sqlite3")) as database:
            database.execute("DELETE FROM registrations WHERE environment_id = ?", (BOX,))
            database.commit()
        assert await executor.end() == 1012
        assert not other.ended.is_set()


async def test_end_of_the_relay_is_a_service_restart_for_all(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    relay.stop.cancel()
    assert (await executor.end(), await harness.end()) == (1012, 1012)
    await relay.stopped.wait()


# Who does not read.


async def open_mute(relay: Relay, url: str, stream_id: str) -> trio.SocketStream:
    """A harness that has sent a frame, and reads nothing of what it gets."""
    sock = trio.socket.socket()
    sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", relay.port))
    stream = trio.SocketStream(sock)
    frame = frames.encode(Frame(stream_id, Resume()))
    await stream.send_all(head("GET", target(url), UPGRADE))
    await stream.send_all(bytes([0x82, 0x80 | len(frame), 0, 0, 0, 0]) + frame)
    return stream


@pytest.mark.parametrize("alone", [True, False])
async def test_harness_that_does_not_read_is_cut_and_holds_up_the_others_for_a_while_only(
    tmp_path: Path, alone: bool
) -> None:
    async with open_relay(tmp_path, harness_queue=1 << 20, patience=0.3) as relay:
        executor = await relay.executor()
        url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
        async with await open_mute(relay, url, "mute"):
            assert await executor.receive() == Frame("mute", Resume())
            other: Client | None = None
            if not alone:
                other = await relay.harness()
                other.send("other", Resume())
                await executor.receive()
            for frame in data_frames("mute", 60 * 1024, 200):
                executor.channel.send_nowait(frame)
            if other is not None:
                executor.send("other", Data(0, b"at last"))
                assert await other.receive() == Frame("other", Data(0, b"at last"))
            assert await executor.receive() == Frame("mute", Reset(DISCONNECTED))
            metrics = await relay.metrics()
            assert metrics["slow_harnesses_total"] == 1
            assert metrics["links"] == (0 if alone else 1)


async def test_slow_harness_within_its_queue_holds_up_nobody(tmp_path: Path) -> None:
    async with open_relay(tmp_path, harness_queue=1 << 20, patience=3600) as relay:
        executor, other = await relay.executor(), await relay.harness()
        other.send("other", Resume())
        await executor.receive()
        url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
        async with await open_mute(relay, url, "mute"):
            assert await executor.receive() == Frame("mute", Resume())
            for frame in data_frames("mute", 60 * 1024, 16):
                executor.channel.send_nowait(frame)
            executor.send("other", Data(0, b"at once"))
            assert await other.receive() == Frame("other", Data(0, b"at once"))


async def test_harness_that_is_slow_but_reads_gets_every_frame(tmp_path: Path) -> None:
    async with open_relay(tmp_path, harness_queue=1 << 19, patience=5) as relay:
        executor, harness = await relay.executor(), await relay.harness()
        harness.send("s", Resume())
        await executor.receive()
        gate = trio.Event()
        harness.channel.hold_reading = gate.wait
        sent = list(data_frames("s", 60 * 1024, 200))
        for frame in sent:
            executor.channel.send_nowait(frame)
        await relay.wait_metric('frames_total{direction="to_executor"}', 1)
        gate.set()
        assert [await harness.arrived.receive() for _ in sent] == sent


async def test_executor_that_does_not_read_holds_its_harnesses_and_memory_stays_bounded(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    executor.channel.hold_reading = trio.sleep_forever
    harness.send("s", Resume())
    await executor.receive()
    for frame in data_frames("s", 60 * 1024, 1000):
        harness.channel.send_nowait(frame)
    before = -1
    while (queued := (await relay.metrics())["queue_bytes"]) != before:
        before = queued
        await trio.sleep(0.2)
    assert 0 < queued < 2 * 1024 * 1024
    assert harness.channel.queued > 10 * 1024 * 1024


async def test_who_causes_answers_and_reads_none_costs_no_memory(relay: Relay) -> None:
    executor, owner = await relay.executor(), await relay.harness()
    owner.send("s", Resume())
    await executor.receive()
    url = (await relay.bundle(await new_token(relay.store, "harness")))["url"]
    foreign = frames.encode(Frame("s", Data(0, b"x")))
    async with await open_mute(relay, url, "mute") as stream:
        assert await executor.receive() == Frame("mute", Resume())
        message = bytes([0x82, 0x80 | len(foreign), 0, 0, 0, 0]) + foreign
        for _ in range(100):
            await stream.send_all(message * 1000)
        await relay.wait_metric('frames_dropped_total{reason="foreign"}', 100_000)
    executor.channel.hold_reading = trio.sleep_forever
    unknown = frames.encode(Frame("u" * 128, Data(0, b"x")))
    for _ in range(50_000):
        executor.channel.send_nowait(unknown)
    await executor.channel.wait_room()
    assert (await relay.metrics())["queue_bytes"] < 2 * 1024 * 1024


# What is told.


async def test_audit_log_has_a_line_for_each_connect_refusal_and_disconnect(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "execenv.relay.audit")
    executor = await relay.executor()
    token = await new_token(relay.store, "harness")
    url = (await relay.bundle(token))["url"]
    harness = await relay.open(url, [(b"x-request-id", b"req_1")])
    sent = harness.send("s", Resume())
    await executor.receive()
    relay.clock.now += 5
    harness.channel.close_nowait()
    await executor.receive()
    await relay.wait_metric('sockets{role="harness"}', 0)
    await refusal(relay, url)
    lines = [json.loads(record.message) for record in caplog.records if record.name == "execenv.relay.audit"]
    assert [(line["event"], line["role"]) for line in lines] == [
        ("request", "executor"),
        ("connect", "executor"),
        ("request", "harness"),
        ("connect", "harness"),
        ("disconnect", "harness"),
        ("refusal", "harness"),
    ]
    connect, disconnect, refused = lines[3:]
    assert connect["environment"] == BOX
    assert connect["token_id"] == token.split("_")[1]
    assert connect["request_id"] == "req_1"
    assert connect["address"].startswith("127.0.0.1:")
    assert disconnect["seconds"] == 5
    assert (disconnect["bytes_in"], disconnect["bytes_out"], disconnect["code"]) == (len(sent), 0, 1000)
    assert (refused["status"], refused["reason"]) == (401, "url_used")


async def test_metrics_count_what_passes(relay: Relay) -> None:
    executor, harness = await relay.executor(), await relay.harness()
    sent = harness.send("s", Resume())
    await executor.receive()
    back = executor.send("s", Data(0, b"x" * 1000))
    await harness.receive()
    metrics = await relay.metrics()
    assert metrics['sockets{role="executor"}'] == metrics['sockets{role="harness"}'] == metrics["links"] == 1
    assert metrics['frames_total{direction="to_executor"}'] == 1
    assert metrics['bytes_total{direction="to_executor"}'] == len(sent)
    assert metrics['frames_total{direction="to_harness"}'] == 1
    assert metrics['bytes_total{direction="to_harness"}'] == len(back)
    assert metrics['requests_total{operation="register",status="200"}'] == 1
    harness.channel.close_nowait()
    await executor.receive()
    metrics = await relay.metrics()
    assert (metrics["links"], metrics['resets_total{direction="to_executor"}']) == (0, 1)


async def test_no_secret_is_in_any_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_relay(tmp_path) as relay:
        token, executor_token = (
            await new_token(relay.store, "harness"),
            await new_token(relay.store, "executor"),
        )
        key = new_key()
        url = (await relay.request("register", executor_token, noise_body(new_key()))).json["url"]
        executor = await relay.open(url)
        bundle = await relay.bundle(token, key)
        harness = await relay.open(bundle["url"])
        harness.send("s", Handshake(b"a-payload"))
        await executor.receive()
        authorization = bundle["harness_key_authorization"]
        await relay.request(
            "validate",
            executor_token,
            {
                "executor_registration_id": bundle["executor_registration_id"],
                "harness_public_key": key.to_json(),
                "harness_key_authorization": authorization,
            },
        )
        await refusal(relay, bundle["url"])
        await refusal(relay, url.replace("nonce=", "nonce=0"))
        await relay.request("connect", token + "0", {})
        await relay.request("register", token, {})
        harness.channel.close_nowait()
        await executor.receive()
        relay.stop.cancel()
        await relay.stopped.wait()
    secrets = [token.split("_", 2)[2], executor_token.split("_", 2)[2], authorization, "a-payload"]
    for address in (url, bundle["url"]):
        query = dict(parse_qsl(urlsplit(address).query))
        secrets += [query["signature"], query["nonce"]]
    text = "\n".join(f"{record.getMessage()} {record.args}" for record in caplog.records)
    assert '"event":"disconnect"' in text
    for secret in secrets:
        assert secret not in text


async def test_frames_that_never_end_do_not_fill_the_memory(tmp_path: Path) -> None:
    """In clear text a frame may have 64 MiB, of which all that has arrived is kept."""
    mib = 1024 * 1024
    async with open_relay(tmp_path, node_unfinished=4 * mib) as relay:
        executor = await relay.executor()
        greedy = [await relay.harness() for _ in range(3)]
        modest = await relay.harness()
        async with trio.open_nursery() as nursery:

            async def begin_and_never_end(client: Client) -> None:
                with suppress(ConnectionLost):
                    async with client.channel.open_message() as send:
                        for _ in range(3):
                            await send(bytes(mib))
                        await trio.sleep_forever()

            for client in greedy:
                nursery.start_soon(begin_and_never_end, client)
            ends = trio.Event()

            async def wait_for_an_end(client: Client) -> None:
                assert await client.end() == 1013
                ends.set()

            for client in greedy:
                nursery.start_soon(wait_for_an_end, client)
            await ends.wait()
            modest.send("s", Data(0, b"still here"))
            assert await executor.receive() == Frame("s", Data(0, b"still here"))
            nursery.cancel_scope.cancel()
