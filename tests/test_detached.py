"""Sessions whose connection is gone, or seems to be there and is not: how long they wait, what they keep."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
from attrs import define
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from execenv.abc import Closed, Event, Output
from execenv.paths import PathUri
from execenv.protocol import (
    CHUNK_OVERHEAD,
    SERVER_CAPABILITIES,
    EnvironmentInfo,
    ProcessStartParams,
    Shell,
)
from execenv.remote.connection import open_remote
from execenv.server import DetachedTtl, processes
from execenv.server.connection import ServerConnection
from execenv.server.listen import serve_channel
from execenv.server.sessions import open_sessions
from execenv.transports._frames import FrameCodec, Ping
from execenv.transports._pump import StreamIO
from execenv.transports.memory import memory_pair
from execenv.transports.websocket import WebsocketChannel
from tests.fakes import FakeEnvironment, FakeHost, FakeProcess, only
from tests.test_sessions import Message, Server, WireClient, open_server, seqs, start

MIB = 1024 * 1024
ATTACHED = "session {} is already attached to another connection"


async def lives(server: Server, session_id: str) -> WireClient | None:
    """The client of a resume, if that succeeds."""
    client = server.connect()
    answer = await client.answer(client.send("initialize", clientName="", resumeSessionId=session_id))
    if "error" in answer:
        assert answer["error"] == {"code": -32600, "message": f"unknown session id {session_id}"}
        return None
    client.notify("initialized", params={})
    return client


# How long: separate times for running and exited processes.


@pytest.mark.parametrize(
    ("exits", "expires"),
    [
        ([], 100),  # nothing runs
        ([5], 105),
        ([5, 7], 107),
        ([-50], 100),
        ([-50, 7], 107),
        ([math.inf], 10),
        ([5, math.inf], 10),
        ([5, 12], 10),  # the second exit comes too late
        ([10], 10),
        ([0], 100),
    ],
)
async def test_session_waits_from_the_last_exit_if_nothing_runs(
    exits: list[float], expires: float, autojump_clock: MockClock
) -> None:
    async def exit_at(moment: float, process: FakeProcess) -> None:
        await trio.sleep_until(moment)
        process.exit()

    async with open_server(detached_ttl=DetachedTtl(running=10, exited=100)) as server:
        client, session_id = await server.open()
        lost_at = trio.current_time() + 60
        async with trio.open_nursery() as nursery:
            for number, moment in enumerate(exits):
                await client.call("process/start", **start(f"p{number}"))
                if moment < math.inf:
                    nursery.start_soon(exit_at, lost_at + moment, server.process(f"p{number}"))
            await trio.sleep_until(lost_at)
            await client.lose()
            await trio.sleep_until(lost_at + expires - 0.001)
            before = server.environment.closed
            await trio.sleep_until(lost_at + expires + 0.001)
            assert (before, server.environment.closed) == (False, True)
            assert await lives(server, session_id) is None


async def test_session_may_wait_for_ever_while_something_runs(autojump_clock: MockClock) -> None:
    async with open_server(detached_ttl=DetachedTtl(running=math.inf, exited=3600)) as server:
        client, session_id = await server.open()
        await client.call("process/start", **start())
        await client.lose()
        await trio.sleep(80_000)
        server.process().emit(b"at last")
        server.process().exit()
        server.process().close()
        await trio.sleep(3599)
        resumed = await lives(server, session_id)
        assert resumed is not None
        assert seqs(await resumed.call("process/read", processId="p")) == [1]
        await resumed.lose()
        await trio.sleep(3599)  # counted anew
        assert not server.environment.closed
        await trio.sleep(2)
        assert server.environment.closed


async def test_exit_while_attached_sets_no_deadline(autojump_clock: MockClock) -> None:
    async with open_server(detached_ttl=DetachedTtl(running=10, exited=10)) as server:
        client, _ = await server.open()
        await client.call("process/start", **start())
        server.process().exit()
        await trio.sleep(1000)
        assert await client.call("environment/status") == {"status": "ready"}


async def test_start_that_failed_does_not_run(autojump_clock: MockClock) -> None:
    async with open_server(detached_ttl=DetachedTtl(running=10, exited=100)) as server:
        client, session_id = await server.open()
        server.environment.fakes.failure = RuntimeError("no")
        await client.fail("process/start", **start())
        await client.lose()
        await trio.sleep(50)
        assert await lives(server, session_id) is not None


# What is kept: closed processes.


async def test_closed_process_stays_while_nobody_is_there_and_80_seconds_from_the_resume(
    autojump_clock: MockClock,
) -> None:
    async with open_server(detached_ttl=DetachedTtl(running=80, exited=3600)) as server:
        client, session_id = await server.open()
        for number in range(3):
            await client.call("process/start", **start(f"p{number}"))
        for number in range(3):
            process = server.process(f"p{number}")
            process.emit(b"output")
            process.exit()
            process.close()
            await trio.sleep(30)
            if number == 1:
                await client.lose()
        await trio.sleep(3000)
        client, _ = await server.open(session_id)
        for number in range(3):
            assert seqs(await client.call("process/read", processId=f"p{number}")) == [1]
        await trio.sleep(79.9)
        for number in range(3):
            assert seqs(await client.call("process/read", processId=f"p{number}")) == [1]
        await trio.sleep(0.2)
        for number in range(3):
            assert (await client.fail("process/read", processId=f"p{number}"))[0] == -32600
            assert server.process(f"p{number}").released


async def test_only_so_many_closed_processes_stay_beyond_their_time(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_CLOSED", 3)
    async with open_server(detached_ttl=math.inf) as server:
        client, session_id = await server.open()
        for number in range(5):
            await client.call("process/start", **start(f"p{number}"))
        await client.lose()
        for number in range(5):
            server.process(f"p{number}").exit()
            server.process(f"p{number}").close()
        await trio.sleep(79)
        assert not server.process("p0").released
        await trio.sleep(1000)
        assert [server.process(f"p{number}").released for number in range(5)] == [True, True] + [False] * 3
        client, _ = await server.open(session_id)
        assert seqs(await client.call("process/read", processId="p4")) == []


# The handshake of a resume.


async def test_no_notification_precedes_the_answer_to_a_resume(autojump_clock: MockClock) -> None:
    async with open_server() as server:
        client, session_id = await server.open()
        await client.call("process/start", **start())
        await client.lose()
        server.environment.may_inform = trio.Event()
        client = server.connect()
        resuming = client.send("initialize", clientName="", resumeSessionId=session_id)
        await wait_all_tasks_blocked()
        server.process().emit(b"early")
        await wait_all_tasks_blocked()
        assert client.notifications == []
        server.environment.may_inform.set()
        assert (await client.answer(resuming))["result"]["sessionId"] == session_id
        client.notify("initialized", params={})
        server.process().emit(b"live")
        await wait_all_tasks_blocked()
        assert [note["params"]["seq"] for note in client.notifications] == [2]
        assert seqs(await client.call("process/read", processId="p")) == [1, 2]


async def test_of_two_resumes_at_once_one_wins(autojump_clock: MockClock) -> None:
    async with open_server() as server:
        client, session_id = await server.open()
        await client.lose()
        clients = [server.connect() for _ in range(2)]
        ids = [client.send("initialize", clientName="", resumeSessionId=session_id) for client in clients]
        answers = [await client.answer(id_) for client, id_ in zip(clients, ids, strict=True)]
        assert sorted("error" in answer for answer in answers) == [False, True]
        (refused,) = (answer["error"] for answer in answers if "error" in answer)
        assert refused == {"code": -32010, "message": ATTACHED.format(session_id)}


async def test_session_whose_environment_never_answers_is_held_only_by_a_living_connection(
    autojump_clock: MockClock,
) -> None:
    async with open_server() as server:
        client, session_id = await server.open()
        for _ in range(3):
            await client.lose()
            server.environment.may_inform = trio.Event()
            client = server.connect()
            client.send("initialize", clientName="", resumeSessionId=session_id)
            await wait_all_tasks_blocked()
            other = server.connect()
            assert (await other.fail("initialize", clientName="", resumeSessionId=session_id))[0] == -32010
        await client.lose()
        await trio.sleep(80.1)
        assert server.environment.closed


async def test_request_that_is_slow_to_end_does_not_keep_the_client_out(autojump_clock: MockClock) -> None:
    async with open_server() as server:
        client, session_id = await server.open()
        await client.call("process/start", **start())
        server.process().ending = trio.Event()
        client.send("process/terminate", processId="p")
        await wait_all_tasks_blocked()
        await client.lose()
        before = trio.current_time()
        client, _ = await server.open(session_id)
        assert trio.current_time() == before
        assert await client.call("environment/status") == {"status": "ready"}
        server.process().ending.set()
        await wait_all_tasks_blocked()
        assert server.process().signals == ["terminate"]
        assert [note["method"] for note in client.notifications] == ["process/exited", "process/closed"]


# Connections that are half open.


@define
class Wire:
    """What the client's end of a websocket has seen."""

    session_id: str = ""
    pings: int = 0


@asynccontextmanager
async def websocket_to(
    server: Server, nursery: trio.Nursery, *, answers_pings: bool
) -> AsyncIterator[tuple[Wire, trio.Event]]:
    """A client over a websocket that has initialized: what it sees, and the end of the connection."""
    ours, theirs = memory_stream_pair()
    channel = WebsocketChannel("websocket test", StreamIO(theirs), client=False, leftover=b"")
    ended = trio.Event()

    async def serve() -> None:
        await ServerConnection(channel, server._sessions, detachable=True).run()
        ended.set()

    nursery.start_soon(serve)
    codec = FrameCodec(client=True, max_message=1 << 30)
    wire = Wire()
    answered = trio.Event()

    async def receive() -> None:
        while data := await ours.receive_some():
            for event in codec.receive(data):
                if isinstance(event, Ping):
                    wire.pings += 1
                    if answers_pings:
                        await ours.send_all(codec.encode_pong(event.payload))
                elif isinstance(event, bytes):
                    wire.session_id = orjson.loads(event)["result"]["sessionId"]
                    answered.set()

    nursery.start_soon(receive)
    for message in (
        b'{"id":1,"method":"initialize","params":{"clientName":""}}',
        b'{"method":"initialized"}',
    ):
        for frame in codec.encode_message(message):
            await ours.send_all(b"".join(bytes(part) for part in frame))
    await answered.wait()
    yield wire, ended


async def test_resume_ends_a_connection_that_gives_no_sign_of_life(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        async with websocket_to(server, nursery, answers_pings=False) as (wire, ended):
            await trio.sleep(20)
            began = trio.current_time()
            client = server.connect()
            refusals = 0
            while True:
                answer = await client.answer(
                    client.send("initialize", clientName="", resumeSessionId=wire.session_id)
                )
                if "result" in answer:
                    break
                assert answer["error"]["code"] == -32010
                refusals += 1
                await trio.sleep(0.1)
            assert trio.current_time() - began == pytest.approx(5, abs=0.2)
            assert refusals >= 45
            assert ended.is_set()
            assert wire.pings == 1  # one question, however often it was asked
        nursery.cancel_scope.cancel()


async def test_resume_never_ends_a_connection_that_answers(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        async with websocket_to(server, nursery, answers_pings=True) as (wire, ended):
            for _ in range(50):
                refusal = await server.connect().fail(
                    "initialize", clientName="", resumeSessionId=wire.session_id
                )
                assert refusal == (-32010, ATTACHED.format(wire.session_id))
                await trio.sleep(1)
            assert not ended.is_set()
            assert wire.pings > 40
        nursery.cancel_scope.cancel()


async def test_silent_client_is_noticed_by_the_server_itself(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        async with websocket_to(server, nursery, answers_pings=False) as (wire, ended):
            await trio.sleep(89)
            assert not ended.is_set()
            await trio.sleep(1.1)
            assert ended.is_set()
            await trio.sleep(75)
            assert await lives(server, wire.session_id) is not None
        nursery.cancel_scope.cancel()


# What is kept: output that the client has not taken.


async def flooding(
    server: Server, nursery: trio.Nursery, *, window: int | None, chunk: int = 16 * 1024, count: int = 10_000
) -> tuple[WireClient, str, FakeProcess]:
    """A client with a process that writes as fast as it may."""
    client, session_id = await server.open()
    changes: dict[str, Any] = {} if window is None else {"outputWindow": window}
    await client.call("process/start", **start(**changes))
    process = server.process()
    nursery.start_soon(process.emit_all, bytes(chunk), count)
    return client, session_id, process


def newest_seq(client: WireClient) -> int:
    seq: int = client.notifications[-1]["params"]["seq"]
    return seq


async def read_everything(client: WireClient, after: int, max_bytes: int | None) -> tuple[list[int], Message]:
    """What is read behind `after` until nothing is left: the seqs, and the last answer."""
    found: list[int] = []
    while True:
        answer = await client.call("process/read", processId="p", afterSeq=after, maxBytes=max_bytes)
        if not answer["chunks"]:
            return found, answer
        found += seqs(answer)
        after = answer["nextSeq"] - 1


@pytest.mark.parametrize("max_bytes", [None, MIB])
@pytest.mark.parametrize("away", [0.0, 9.9])
@pytest.mark.parametrize("arrived", [0, 100, 255])
async def test_nothing_is_lost_if_the_client_comes_back_soon(
    arrived: int, away: float, max_bytes: int | None, autojump_clock: MockClock
) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id, _ = await flooding(server, nursery, window=4 * MIB, count=1000)
        await wait_all_tasks_blocked()
        held_at = newest_seq(client)
        assert 250 <= held_at <= 260
        await client.lose()
        await trio.sleep(away)
        client, _ = await server.open(session_id)
        after = arrived
        seen = list(range(1, arrived + 1))
        while len(seen) < 1000:
            found, answer = await read_everything(client, after, max_bytes)
            assert "evictedBytes" not in answer or answer["evictedBytes"] <= 16 * 1024 * len(seen)
            assert len(found) < 270
            seen += found
            after = seen[-1]
            client.notify("process/outputTaken", params={"processId": "p", "seq": after, "window": 4 * MIB})
            await wait_all_tasks_blocked()
        assert seen == list(range(1, 1001))


async def test_full_window_holds_back_for_ten_seconds_and_then_the_oldest_is_lost(
    autojump_clock: MockClock,
) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id, process = await flooding(server, nursery, window=4 * MIB, count=1000)
        await wait_all_tasks_blocked()
        held_at = newest_seq(client)
        await client.lose()
        await trio.sleep(9.9)
        assert process.retained == held_at * 16 * 1024
        await trio.sleep(0.2)
        assert 4 * MIB <= process.retained <= 5 * MIB
        process.exit()
        process.close()
        client, _ = await server.open(session_id)
        found, answer = await read_everything(client, 0, None)
        assert found == list(range(1001 - len(found), 1001))
        assert answer["evictedBytes"] == (1000 - len(found)) * 16 * 1024
        assert answer["closed"]


async def test_client_without_windows_is_not_held_back_for_long_and_keeps_its_time_to_catch_up(
    autojump_clock: MockClock,
) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id, process = await flooding(server, nursery, window=4 * MIB, count=300)
        await wait_all_tasks_blocked()
        await client.lose()
        client, _ = await server.open(session_id)
        await trio.sleep(9.9)
        assert client.notifications == []
        await trio.sleep(0.2)
        assert newest_seq(client) == 300
        assert seqs(await client.call("process/read", processId="p")) == list(range(1, 301))
        await trio.sleep(70)
        process.emit(b"late")
        await wait_all_tasks_blocked()
        assert process.retained <= MIB
        assert newest_seq(client) == 301


async def test_who_says_what_it_took_keeps_the_window_that_was(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id, process = await flooding(server, nursery, window=4 * MIB)
        await wait_all_tasks_blocked()
        await client.lose()
        client, _ = await server.open(session_id)
        client.notify("process/outputTaken", params={"processId": "p", "seq": 60})
        await trio.sleep(1000)
        assert newest_seq(client) < 320
        assert process.retained > 4 * MIB - 40 * 16 * 1024
        nursery.cancel_scope.cancel()


async def test_hold_begins_anew_for_whoever_comes_late(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id, process = await flooding(server, nursery, window=MIB, count=100)
        await wait_all_tasks_blocked()
        await client.lose()
        await trio.sleep(60)  # it has written all by now
        client, _ = await server.open(session_id)
        nursery.start_soon(process.emit_all, bytes(16 * 1024), 1000)
        await trio.sleep(9.9)
        found, _ = await read_everything(client, 0, MIB)
        assert found == list(range(1, 102))
        await trio.sleep(0.2)
        assert newest_seq(client) == 1100


async def test_tiny_chunks_are_bounded_by_what_each_costs(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, _, _ = await flooding(server, nursery, window=MIB, chunk=1, count=20_000)
        await wait_all_tasks_blocked()
        most = MIB // (CHUNK_OVERHEAD + 1)
        assert most <= newest_seq(client) <= most + 1
        client.notify("process/outputTaken", params={"processId": "p", "seq": newest_seq(client)})
        await wait_all_tasks_blocked()
        assert newest_seq(client) >= 2 * most
        nursery.cancel_scope.cancel()


class CountingSink:
    """A reader that is never full."""

    full = False

    def __init__(self) -> None:
        self.chunks = 0
        self.closed = trio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, Output):
            self.chunks += 1
        elif isinstance(event, Closed):
            self.closed.set()

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_our_client_says_in_time_what_it_took_of_tiny_chunks(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must count them as the server does, or both wait for ever."""

    async def info(self: FakeEnvironment) -> EnvironmentInfo:
        return EnvironmentInfo(Shell("sh", "/bin/sh"), capabilities=dict(SERVER_CAPABILITIES))

    monkeypatch.setattr(FakeEnvironment, "info", info)
    host = FakeHost()
    params = ProcessStartParams("p", ("x",), PathUri.parse("file:///"), {}, False)
    count = 70_000  # the window of our client has room for 65,000
    async with open_sessions(host.open) as sessions, trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1000
        ours, theirs = memory_pair()
        nursery.start_soon(serve_channel, theirs, sessions)
        async with open_remote(only(ours), "memory") as remote:
            sink = CountingSink()
            await remote.processes.start(params, sink)
            process = host.opened[0].fakes.started["p"][0]
            await process.emit_all(b"x", count)
            process.exit()
            process.close()
            await sink.closed.wait()
        nursery.cancel_scope.cancel()
    assert sink.chunks == count


async def test_more_taken_than_there_was_keeps_what_comes_later(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id = await server.open()
        await client.call("process/start", **start(outputWindow=4 * MIB))
        client.notify("process/outputTaken", params={"processId": "p", "seq": 10**15})
        await wait_all_tasks_blocked()
        nursery.start_soon(server.process().emit_all, bytes(16 * 1024), 1000)
        await wait_all_tasks_blocked()
        await client.lose()
        client, _ = await server.open(session_id)
        found, _ = await read_everything(client, 0, None)
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= 250
        nursery.cancel_scope.cancel()


async def test_window_has_an_upper_bound(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, _, process = await flooding(server, nursery, window=1 << 40, chunk=MIB, count=100)
        await wait_all_tasks_blocked()
        assert process.retained == 16 * MIB
        assert newest_seq(client) == 16
        nursery.cancel_scope.cancel()


async def test_client_without_windows_gets_the_newest_mebibyte(autojump_clock: MockClock) -> None:
    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id, _ = await flooding(server, nursery, window=None, count=1000)
        await client.lose()
        await wait_all_tasks_blocked()
        client, _ = await server.open(session_id)
        answer = await client.call("process/read", processId="p", afterSeq=3)
        assert seqs(answer) == list(range(937, 1001))
        assert answer["evictedBytes"] == 936 * 16 * 1024


async def test_output_of_closed_processes_is_bounded_together(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_RETAINED", 10 * MIB)
    async with open_server() as server:
        client, _ = await server.open()
        for number in range(5):
            await client.call("process/start", **start(f"p{number}", outputWindow=4 * MIB))
            process = server.process(f"p{number}")
            for _ in range(3):
                process.emit(bytes(MIB))
            process.exit()
            process.close()
        kept = [server.process(f"p{number}").retained for number in range(5)]
        assert kept == [0, 0, 3 * MIB, 3 * MIB, 3 * MIB]
        for number in range(2, 5):  # what was taken does not count any more
            client.notify("process/outputTaken", params={"processId": f"p{number}", "seq": 3})
        for number in range(5, 7):
            await client.call("process/start", **start(f"p{number}", outputWindow=4 * MIB))
            process = server.process(f"p{number}")
            for _ in range(3):
                process.emit(bytes(MIB))
            process.exit()
            process.close()
        kept = [server.process(f"p{number}").retained for number in range(7)]
        assert kept == [0, 0, MIB, MIB, MIB, 3 * MIB, 3 * MIB]
