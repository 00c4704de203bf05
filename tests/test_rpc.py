"""A peer over a pair of memory channels: calls, routes, and how a connection ends (protocol.md §2)."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trio
from attrs import Factory, define

from execenv import rpc
from execenv.errors import (
    ConnectionLost,
    InternalError,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    NotFound,
    NotSupported,
    ProtocolViolation,
    RpcError,
    SessionAttached,
)
from execenv.protocol import (
    ENVIRONMENT_INFO,
    ENVIRONMENT_STATUS,
    INITIALIZE,
    INITIALIZED,
    PROCESS_CLOSED,
    PROCESS_READ,
    PROCESS_SIGNAL,
    EnvironmentStatusResult,
    InitializeParams,
    InitializeResult,
    Nothing,
    ProcessClosedParams,
    ProcessReadParams,
    ProcessReadResult,
    ProcessSignalParams,
    Unit,
)
from execenv.rpc import Answer, Call, Peer, Route, Streamed, open_peer
from execenv.transports.channel import HIGH_WATER
from execenv.transports.memory import MemoryChannel, memory_pair

TIME_LIMIT = 30.0

Json = Any


@define(eq=False)
class Raw:
    """The other end of a peer's channel, for what no peer would say."""

    channel: MemoryChannel
    received: list[Json] = Factory(list)
    _arrived: trio.lowlevel.ParkingLot = Factory(trio.lowlevel.ParkingLot)

    async def run(self) -> None:
        await self.channel.run(self._receive)
        self._arrived.unpark_all()

    def _receive(self, data: bytes) -> None:
        self.received.append(json.loads(data))
        self._arrived.unpark_all()

    def send(self, message: Json) -> None:
        self.channel.send_nowait(message if isinstance(message, bytes) else json.dumps(message).encode())

    async def next(self) -> Json:
        while not self.received:
            assert not self.channel.closed
            await self._arrived.park()
        return self.received.pop(0)

    async def answer(self, id_: int | str, result: Json) -> None:
        self.send({"id": id_, "result": result})
        await trio.testing.wait_all_tasks_blocked()

    async def ended(self) -> None:
        while not self.channel.closed:
            await self._arrived.park()


@asynccontextmanager
async def one_peer(
    routes: Iterable[Route[Any, Any]] = (),
    notifications: Mapping[str, Callable[[Json], None]] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Peer, Raw]]:
    """A peer that runs, and the raw other end."""
    ours, theirs = memory_pair("websocket 127.0.0.1:41060")
    raw = Raw(theirs)
    with trio.fail_after(TIME_LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.run)
            async with open_peer(Peer(ours, routes, notifications, **options)) as peer:
                yield peer, raw
            nursery.cancel_scope.cancel()


async def read(peer: Peer, process_id: str = "p") -> ProcessReadResult:
    return await peer.call(PROCESS_READ, ProcessReadParams(process_id))


READ_RESULT = {"chunks": [], "nextSeq": 7, "exited": False}
STATUS = {"id": 1, "method": "environment/status"}


async def status(params: Unit) -> EnvironmentStatusResult:
    await trio.lowlevel.checkpoint()
    return EnvironmentStatusResult("ready")


STATUS_ROUTE = Route(ENVIRONMENT_STATUS, status)


# Calling.


async def test_call_returns_the_structured_answer() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:

        async def answer() -> None:
            request = await raw.next()
            assert request == {
                "id": request["id"],
                "method": "process/read",
                "params": {"processId": "p", "afterSeq": None, "maxBytes": None, "waitMs": None},
            }
            raw.send({"id": request["id"], "result": READ_RESULT})

        nursery.start_soon(answer)
        assert (await read(peer)).next_seq == 7


async def test_answers_may_come_in_any_order() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:
        seqs: dict[str, int] = {}

        async def call(process_id: str) -> None:
            seqs[process_id] = (await read(peer, process_id)).next_seq

        for name in ("a", "b", "c"):
            nursery.start_soon(call, name)
        requests = [await raw.next() for _ in range(3)]
        assert len({request["id"] for request in requests}) == 3
        for number, request in enumerate(reversed(requests)):
            raw.send({"id": request["id"], "result": {**READ_RESULT, "nextSeq": number}})
        await trio.testing.wait_all_tasks_blocked()
        assert seqs == {
            request["params"]["processId"]: number for number, request in enumerate(reversed(requests))
        }


async def test_cancelled_call_leaves_the_next_one_working(autojump_clock: trio.testing.MockClock) -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await read(peer, "first")
        assert scope.cancelled_caught
        first = await raw.next()

        async def answer() -> None:
            second = await raw.next()
            raw.send({"id": first["id"], "result": {**READ_RESULT, "nextSeq": 1}})
            raw.send({"id": second["id"], "result": {**READ_RESULT, "nextSeq": 2}})

        nursery.start_soon(answer)
        assert (await read(peer, "second")).next_seq == 2


async def test_late_answer_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    async with one_peer() as (peer, raw):
        with trio.move_on_after(1):
            await read(peer)
        request = await raw.next()
        await raw.answer(request["id"], READ_RESULT)
        await raw.answer(request["id"], READ_RESULT)
        raw.send({"id": request["id"], "error": {"code": 1, "message": "x"}})
        await trio.testing.wait_all_tasks_blocked()
        assert not peer.channel.closed


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (-32600, InvalidRequest),
        (-32601, MethodNotFound),
        (-32602, InvalidParams),
        (-32603, InternalError),
        (-32004, NotFound),
        (-32010, SessionAttached),
        (-1, RpcError),
    ],
)
async def test_error_comes_back_as_the_class_of_its_code(code: int, cls: type[RpcError]) -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:

        async def answer() -> None:
            request = await raw.next()
            raw.send({"id": request["id"], "error": {"code": code, "message": "their words"}})

        nursery.start_soon(answer)
        with pytest.raises(RpcError) as raised:
            await read(peer)
        assert type(raised.value) is cls
        assert (raised.value.code, raised.value.message) == (code, "their words")


async def test_answer_that_does_not_decode_fails_its_call_only() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:

        async def answer() -> None:
            raw.send({"id": (await raw.next())["id"], "result": {"chunks": 5}})
            raw.send({"id": (await raw.next())["id"], "result": READ_RESULT})

        nursery.start_soon(answer)
        with pytest.raises(ProtocolViolation, match="process/read"):
            await read(peer)
        assert (await read(peer)).next_seq == 7


async def test_answer_without_members_may_have_any() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:

        async def answer() -> None:
            raw.send({"id": (await raw.next())["id"], "result": {"later": 1}})
            raw.send({"id": (await raw.next())["id"], "result": None})

        nursery.start_soon(answer)
        for _ in range(2):
            assert await peer.call(PROCESS_SIGNAL, ProcessSignalParams("p", "interrupt")) == Nothing()


async def test_lost_connection_wakes_every_waiting_call() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:
        lost: list[str] = []

        async def call() -> None:
            with pytest.raises(ConnectionLost, match="exec-server transport disconnected") as raised:
                await read(peer)
            lost.append(str(raised.value))

        for _ in range(20):
            nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        raw.channel.close_nowait()
        await trio.testing.wait_all_tasks_blocked()
        assert len(lost) == 20


async def test_call_on_a_lost_connection_fails_at_once() -> None:
    async with one_peer() as (peer, raw):
        raw.channel.close_nowait()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionLost):
            await read(peer)
        with pytest.raises(ConnectionLost):
            peer.notify(INITIALIZED, Nothing())


async def test_reason_of_the_loss_is_said() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(ConnectionLost, match="could not be parsed"):
                await read(peer)

        nursery.start_soon(call)
        await raw.next()
        raw.send(b"{nope")


async def test_cancelled_peer_wakes_its_waiting_calls() -> None:
    ours, _ = memory_pair()
    peer = Peer(ours)
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(ConnectionLost):
                await read(peer)

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(peer.run)
                nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()


async def test_call_waits_while_the_connection_is_congested() -> None:
    ours, theirs = memory_pair()
    raw = Raw(theirs)
    async with open_peer(Peer(ours)) as peer, trio.open_nursery() as nursery:
        peer.channel.send_nowait(b" " * (HIGH_WATER + 1))

        async def call() -> None:
            with pytest.raises(ConnectionLost):
                await read(peer)

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        assert peer.channel.queued == HIGH_WATER + 1
        raw.channel.close_nowait()


# Routes.


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InvalidRequest("not now"), -32600, "not now"),
        (NotFound("no such file"), -32004, "no such file"),
        (RpcError("odd", 17), 17, "odd"),
        (NotSupported("cannot do that"), -32603, "cannot do that"),
        (ConnectionLost("behind us"), -32603, "behind us"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_error_of_a_handler_is_answered(
    error: Exception, code: int, message: str, at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def later() -> EnvironmentStatusResult:
        await trio.lowlevel.checkpoint()
        raise error

    def handle(params: Unit) -> Coroutine[Any, Any, EnvironmentStatusResult]:
        if at_once:
            raise error
        return later()

    async with one_peer([Route(ENVIRONMENT_STATUS, handle)], strict=True) as (_, raw):
        raw.send(STATUS)
        assert await raw.next() == {"id": 1, "error": {"code": code, "message": message}}
    assert caplog.records == []


@pytest.mark.parametrize("at_once", [True, False])
async def test_bug_in_a_handler_is_logged_and_answered_and_nothing_more(
    at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def later() -> EnvironmentStatusResult:
        await trio.lowlevel.checkpoint()
        raise KeyError("a secret")

    def handle(params: Unit) -> Coroutine[Any, Any, EnvironmentStatusResult]:
        if at_once:
            raise KeyError("a secret")
        return later()

    def process_read(params: ProcessReadParams) -> ProcessReadResult:
        return ProcessReadResult((), 3, False)

    routes: list[Route[Any, Any]] = [Route(ENVIRONMENT_STATUS, handle), Route(PROCESS_READ, process_read)]
    async with one_peer(routes, strict=True) as (_, raw):
        raw.send(STATUS)
        assert await raw.next() == {"id": 1, "error": {"code": -32603, "message": "internal error"}}
        raw.send({"id": 2, "method": "process/read", "params": {"processId": "p"}})
        assert (await raw.next())["result"]["nextSeq"] == 3
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "handling environment/status failed")
    ]
    assert caplog.records[0].exc_info is not None


async def test_result_that_cannot_be_encoded_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(params: Unit) -> EnvironmentStatusResult:
        await trio.lowlevel.checkpoint()
        return EnvironmentStatusResult("\ud800")

    async with one_peer([Route(ENVIRONMENT_STATUS, handle)], strict=True) as (_, raw):
        raw.send(STATUS)
        assert (await raw.next())["error"]["message"] == "internal error"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_waiting_handler_delays_nothing_else() -> None:
    may_end = trio.Event()

    async def wait(params: ProcessReadParams) -> ProcessReadResult:
        await may_end.wait()
        return ProcessReadResult((), 1, False)

    async with one_peer([Route(PROCESS_READ, wait), STATUS_ROUTE], strict=True) as (_, raw):
        raw.send({"id": "slow", "method": "process/read", "params": {"processId": "p"}})
        raw.send(STATUS)
        assert (await raw.next())["id"] == 1
        may_end.set()
        assert (await raw.next())["id"] == "slow"


async def test_handlers_begin_in_the_order_of_arrival() -> None:
    begun: list[str] = []

    def begin(params: ProcessReadParams) -> Coroutine[Any, Any, ProcessReadResult]:
        begun.append(params.process_id)
        return finish()

    async def finish() -> ProcessReadResult:
        await trio.lowlevel.checkpoint()
        return ProcessReadResult((), 1, False)

    async with one_peer([Route(PROCESS_READ, begin)], strict=True) as (_, raw):
        names = [str(number) for number in range(50)]
        for name in names:
            raw.send({"id": name, "method": "process/read", "params": {"processId": name}})
        assert {(await raw.next())["id"] for _ in names} == set(names)
        assert begun == names


async def test_request_that_is_answered_alone_holds_back_what_follows_in_order() -> None:
    may_end = trio.Event()
    seen: list[str] = []

    async def initialize(params: InitializeParams) -> InitializeResult:
        seen.append(f"begin {params.client_name}")
        await may_end.wait()
        seen.append(f"end {params.client_name}")
        return InitializeResult("session")

    def process_read(params: ProcessReadParams) -> ProcessReadResult:
        seen.append(f"read {params.process_id}")
        return ProcessReadResult((), 1, False)

    routes: list[Route[Any, Any]] = [
        Route(INITIALIZE, initialize, alone=True),
        Route(PROCESS_READ, process_read),
    ]
    notifications = {INITIALIZED.name: lambda params: seen.append("initialized")}
    async with one_peer(routes, notifications, strict=True) as (_, raw):
        for name in ("one", "two"):
            raw.send({"id": name, "method": "initialize", "params": {"clientName": name}})
            raw.send({"method": "initialized"})
            raw.send({"id": f"read {name}", "method": "process/read", "params": {"processId": name}})
        raw.send(b"{nope")
        await trio.testing.wait_all_tasks_blocked()
        assert (seen, raw.received) == (["begin one"], [])
        may_end.set()
        assert [(await raw.next())["id"] for _ in range(5)] == ["one", "read one", "two", "read two", -1]
    assert seen == [
        "begin one",
        "end one",
        "initialized",
        "read one",
        "begin two",
        "end two",
        "initialized",
        "read two",
    ]


async def test_too_much_behind_a_request_that_is_answered_alone_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "MAX_REQUEST_BYTES", 10_000)

    async def initialize(params: InitializeParams) -> InitializeResult:
        await trio.sleep_forever()
        raise AssertionError

    async with one_peer([Route(INITIALIZE, initialize, alone=True)], strict=True) as (peer, raw):
        raw.send({"id": 1, "method": "initialize", "params": {"clientName": ""}})
        for _ in range(300):
            raw.send(STATUS)
        await raw.ended()
        assert "too much" in peer.channel.loss


async def test_too_many_unanswered_requests_are_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 50
    monkeypatch.setattr(rpc, "MAX_REQUESTS", limit)
    may_end = trio.Event()

    async def wait(params: Unit) -> EnvironmentStatusResult:
        await may_end.wait()
        return EnvironmentStatusResult("ready")

    async with one_peer([Route(ENVIRONMENT_STATUS, wait)], strict=True) as (_, raw):
        for number in range(limit + 2):
            raw.send({"id": number, "method": "environment/status"})
        for number in (limit, limit + 1):
            answer = await raw.next()
            assert (answer["id"], answer["error"]["code"]) == (number, -32603)
            assert "too many unanswered requests" in answer["error"]["message"]
            assert "nothing was done" in answer["error"]["message"]
        may_end.set()
        assert {(await raw.next())["id"] for _ in range(limit)} == set(range(limit))
        raw.send({"id": "again", "method": "environment/status"})
        assert "result" in await raw.next()


class StepCounter(trio.abc.Instrument):
    """Counts how often any task runs."""

    def __init__(self) -> None:
        self.steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1


async def test_work_for_answers_that_wait_for_room_grows_with_their_number_and_not_faster() -> None:
    count = 1000
    may_end = trio.Event()

    async def wait(params: ProcessReadParams) -> ProcessReadResult:
        await may_end.wait()
        return ProcessReadResult((), 1, False, failure="x" * 1024)

    async with one_peer([Route(PROCESS_READ, wait)], strict=True) as (peer, raw):
        for number in range(count):
            raw.send({"id": number, "method": "process/read", "params": {"processId": "p"}})
        await trio.testing.wait_all_tasks_blocked()
        counter = StepCounter()
        trio.lowlevel.add_instrument(counter)
        may_end.set()
        assert {(await raw.next())["id"] for _ in range(count)} == set(range(count))
        trio.lowlevel.remove_instrument(counter)
        assert peer.channel.queued == 0
    assert counter.steps < 20 * count


async def test_unanswered_requests_may_not_hold_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_REQUEST_BYTES", 1000)
    may_end = trio.Event()

    async def wait(params: ProcessReadParams) -> ProcessReadResult:
        await may_end.wait()
        return ProcessReadResult((), 1, False)

    async with one_peer([Route(PROCESS_READ, wait)], strict=True) as (_, raw):
        for number in range(2):
            raw.send({"id": number, "method": "process/read", "params": {"processId": "x" * 600}})
        assert (await raw.next())["error"]["message"].startswith("too many unanswered requests")
        may_end.set()
        assert (await raw.next())["id"] == 0
        raw.send({"id": 2, "method": "process/read", "params": {"processId": "x" * 600}})
        assert "result" in await raw.next()


async def test_handlers_that_wait_are_cancelled_with_the_connection() -> None:
    cancelled = False

    async def wait(params: Unit) -> EnvironmentStatusResult:
        nonlocal cancelled
        try:
            await trio.sleep_forever()
        finally:
            cancelled = True
        raise AssertionError

    async with one_peer([Route(ENVIRONMENT_STATUS, wait)], strict=True) as (peer, raw):
        raw.send(STATUS)
        await trio.testing.wait_all_tasks_blocked()
        raw.channel.close_nowait()
        await trio.testing.wait_all_tasks_blocked()
        assert peer.channel.closed
        assert cancelled


async def test_answer_waits_for_room_before_it_is_encoded() -> None:
    ours, theirs = memory_pair()
    raw = Raw(theirs)
    peer = Peer(ours, [STATUS_ROUTE], strict=True)
    async with open_peer(peer), trio.open_nursery() as nursery:
        ours.send_nowait(b'{"method":"%b"}' % (b"x" * HIGH_WATER))
        raw.send(STATUS)
        await trio.testing.wait_all_tasks_blocked()
        before = ours.queued
        await trio.testing.wait_all_tasks_blocked()
        assert ours.queued == before
        nursery.start_soon(raw.run)
        await raw.next()
        assert "result" in await raw.next()
        nursery.cancel_scope.cancel()


# Sending without waiting for the answer.


def status_call(peer: Peer) -> Call[EnvironmentStatusResult]:
    return peer.call_nowait(ENVIRONMENT_STATUS, Unit())


async def test_calls_without_waiting_go_out_in_their_order() -> None:
    async with one_peer() as (peer, raw):
        first = peer.call_nowait(PROCESS_READ, ProcessReadParams("a"))
        peer.notify(PROCESS_CLOSED, ProcessClosedParams("b", 1))
        second = peer.call_nowait(PROCESS_READ, ProcessReadParams("c"))
        sent = [await raw.next() for _ in range(3)]
        assert [message["params"]["processId"] for message in sent] == ["a", "b", "c"]
        await raw.answer(sent[2]["id"], {**READ_RESULT, "nextSeq": 2})
        await raw.answer(sent[0]["id"], {**READ_RESULT, "nextSeq": 1})  # both before anybody waits
        assert (await first.wait()).next_seq == 1
        assert (await second.wait()).next_seq == 2


async def test_call_without_waiting_is_sent_however_congested_the_connection_is() -> None:
    async with one_peer() as (peer, raw):
        peer.channel.send_nowait(json.dumps({"method": "x", "params": "x" * HIGH_WATER}).encode())
        assert peer.channel.congested
        call = status_call(peer)
        assert (await raw.next())["method"] == "x"
        await raw.answer((await raw.next())["id"], {"status": "ready"})
        assert (await call.wait()).status == "ready"


async def test_error_is_kept_until_somebody_waits_for_it() -> None:
    async with one_peer() as (peer, raw):
        call = status_call(peer)
        raw.send({"id": (await raw.next())["id"], "error": {"code": -32004, "message": "not there"}})
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NotFound, match="not there"):
            await call.wait()


async def test_answer_to_a_dropped_call_is_ignored() -> None:
    async with one_peer() as (peer, raw):
        dropped, kept = status_call(peer), status_call(peer)
        dropped.drop()
        dropped.drop()
        assert len(peer._waiting) == 1
        for _ in range(2):
            await raw.answer((await raw.next())["id"], {"status": "ready"})
        assert (await kept.wait()).status == "ready"
        assert peer._waiting == {}


async def test_cancelled_wait_drops_the_call(autojump_clock: trio.testing.MockClock) -> None:
    async with one_peer() as (peer, raw):
        call = status_call(peer)
        with trio.move_on_after(1) as patience:
            await call.wait()
        assert patience.cancelled_caught
        assert peer._waiting == {}
        await raw.answer((await raw.next())["id"], {"status": "late"})
        assert not peer.channel.closed


@pytest.mark.parametrize("waits", [False, True])
async def test_lost_connection_is_told_to_who_called_without_waiting(waits: bool) -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:
        call = status_call(peer)
        told = trio.Event()

        async def wait() -> None:
            with pytest.raises(ConnectionLost):
                await call.wait()
            told.set()

        if waits:
            nursery.start_soon(wait)
        await raw.next()
        raw.channel.close_nowait()
        while not peer.channel.closed:
            await trio.lowlevel.checkpoint()
        if not waits:
            nursery.start_soon(wait)
        await told.wait()
        with pytest.raises(ConnectionLost):
            status_call(peer)


async def test_call_that_cannot_be_encoded_waits_for_nothing() -> None:
    async with one_peer() as (peer, _):
        with pytest.raises(InvalidParams):
            peer.call_nowait(PROCESS_READ, ProcessReadParams("\ud800"))
        assert peer._waiting == {}


# Results in parts.


@define(eq=False)
class Stream:
    """A result in parts: `begun` when the first is asked for, `open` until it is closed, `go` to go on."""

    parts: list[bytes | Exception]
    begun: bool = False
    open: bool = False
    go: trio.Event = Factory(trio.Event)

    async def generate(self) -> AsyncGenerator[bytes, None]:
        self.begun = self.open = True
        try:
            for number, part in enumerate(self.parts):
                if number == 1:
                    await self.go.wait()
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.open = False

    async def handle(self, params: Unit) -> Streamed:
        await trio.lowlevel.checkpoint()
        return Streamed(self.generate())


HALVES: list[bytes | Exception] = [b'{"status":', b'"', b"ready", b'"}']


def reading(streams: list[Stream]) -> Route[Any, Any]:
    """Each `environment/info` is answered by the next of `streams`."""
    left = iter(streams)
    return Route(ENVIRONMENT_INFO, lambda params: next(left).handle(params))


def ask(raw: Raw, *ids: int | str) -> None:
    for id_ in ids:
        raw.send({"id": id_, "method": "environment/info"})


async def test_result_in_parts_is_one_message_and_others_queue_behind_it() -> None:
    stream = Stream(HALVES)
    async with one_peer([reading([stream]), STATUS_ROUTE], strict=True) as (peer, raw):
        ask(raw, "\u00e9")
        await trio.testing.wait_all_tasks_blocked()
        assert stream.open
        raw.send(STATUS)
        peer.notify(PROCESS_CLOSED, ProcessClosedParams("p", 1))
        await trio.testing.wait_all_tasks_blocked()
        assert raw.received == []
        stream.go.set()
        assert await raw.next() == {"id": "\u00e9", "result": {"status": "ready"}}
        behind = [await raw.next(), await raw.next()]
        assert [message.get("id", message.get("method")) for message in behind] in (
            [1, "process/closed"],
            ["process/closed", 1],
        )
        assert not stream.open


async def test_results_in_parts_are_made_one_at_a_time() -> None:
    streams = [Stream(HALVES) for _ in range(3)]
    async with one_peer([reading(streams)], strict=True) as (_, raw):
        ask(raw, 0, 1, 2)
        for number, stream in enumerate(streams):
            await trio.testing.wait_all_tasks_blocked()
            assert [one.begun for one in streams] == [True] * (number + 1) + [False] * (2 - number)
            stream.go.set()
            assert (await raw.next())["id"] == number


async def test_failure_before_the_first_part_is_an_ordinary_error() -> None:
    streams = [
        Stream([NotFound("nothing there")]),
        Stream([OSError(13, "Permission denied")]),
        Stream(HALVES),
    ]
    async with one_peer([reading(streams)], strict=True) as (_, raw):
        ask(raw, 0, 1, 2)
        streams[2].go.set()
        assert await raw.next() == {"id": 0, "error": {"code": -32004, "message": "nothing there"}}
        denied = {"code": -32600, "message": "Permission denied (os error 13)"}
        assert await raw.next() == {"id": 1, "error": denied}
        assert await raw.next() == {"id": 2, "result": {"status": "ready"}}


@pytest.mark.parametrize("error", [OSError(5, "I/O"), InvalidRequest("it grew"), ValueError("a bug")])
async def test_failure_between_the_parts_ends_the_connection(error: Exception) -> None:
    stream, waiting = Stream([b'{"status":', b'"re', error]), Stream(HALVES)
    async with one_peer([reading([stream, waiting])], strict=True) as (peer, raw):
        ask(raw, 0, 1)
        stream.go.set()
        await raw.ended()
        assert raw.received == []  # not half a message, and no error behind it
        assert "could not be finished" in peer.channel.loss
        while peer._nursery is not None:
            await trio.lowlevel.checkpoint()
        assert (stream.open, waiting.open) == (False, False)


async def test_lost_connection_closes_what_makes_the_parts() -> None:
    stream, waiting = Stream(HALVES), Stream(HALVES)
    async with one_peer([reading([stream, waiting])], strict=True) as (peer, raw):
        ask(raw, 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert stream.open
        raw.channel.close_nowait()
        while peer._nursery is not None:
            await trio.lowlevel.checkpoint()
        assert (stream.open, waiting.begun) == (False, False)
        assert peer._requests == 0


# What follows a result.


async def test_what_follows_a_result_is_sent_right_behind_it() -> None:
    async with one_peer([], strict=True) as (peer, raw):
        released = trio.Event()

        async def handle(params: Unit) -> Answer[EnvironmentStatusResult]:
            await released.wait()

            def then() -> None:
                peer.notify(PROCESS_CLOSED, ProcessClosedParams("p", number))

            number = next(numbers)
            return Answer(EnvironmentStatusResult(str(number)), then)

        numbers = count()
        peer._routes[ENVIRONMENT_STATUS.name] = Route(ENVIRONMENT_STATUS, handle)
        for id_ in range(10):
            raw.send({**STATUS, "id": id_})
        await trio.testing.wait_all_tasks_blocked()
        released.set()
        for number in range(10):
            assert (await raw.next())["result"] == {"status": str(number)}
            assert (await raw.next())["params"] == {"processId": "p", "seq": number}


async def test_nothing_follows_a_result_that_cannot_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    followed = []

    async def handle(params: Unit) -> Answer[EnvironmentStatusResult]:
        await trio.lowlevel.checkpoint()
        return Answer(EnvironmentStatusResult("\ud800"), lambda: followed.append(1))

    async with one_peer([Route(ENVIRONMENT_STATUS, handle)], strict=True) as (_, raw):
        raw.send(STATUS)
        assert (await raw.next())["error"]["code"] == -32603
        await trio.testing.wait_all_tasks_blocked()
        assert followed == []
    assert "environment/status" in caplog.text


async def test_nothing_follows_a_result_that_nobody_takes() -> None:
    followed = []
    released = trio.Event()

    async def handle(params: Unit) -> Answer[EnvironmentStatusResult]:
        with trio.CancelScope(shield=True):
            await released.wait()
        return Answer(EnvironmentStatusResult("ready"), lambda: followed.append(1))

    async with one_peer([Route(ENVIRONMENT_STATUS, handle)], strict=True) as (peer, raw):
        raw.send(STATUS)
        await trio.testing.wait_all_tasks_blocked()
        raw.channel.close_nowait()
        await trio.testing.wait_all_tasks_blocked()
        assert peer.channel.closed
        released.set()
        await trio.testing.wait_all_tasks_blocked()
    assert followed == []


# The order of checks (§2.2).


async def test_request_is_checked_by_name_then_parameters_then_guard() -> None:
    def refuse(route: Route[Any, Any]) -> None:
        raise InvalidRequest(f"not now: {route.method.family}")

    async with one_peer([STATUS_ROUTE], guard=refuse, strict=True) as (_, raw):
        for id_, method, params, code, message in (
            (1, "nope/x", {"a": 1}, -32601, "exec-server stub does not implement `nope/x` yet"),
            (2, "environment/status", {"a": 1}, -32602, "invalid type: map, expected unit"),
            (3, "environment/status", None, -32600, "not now: environment status"),
        ):
            raw.send({"id": id_, "method": method, "params": params})
            assert await raw.next() == {"id": id_, "error": {"code": code, "message": message}}


# A server's rules (§2.4, §2.5).


async def test_server_answers_what_it_cannot_parse_and_goes_on() -> None:
    async with one_peer([STATUS_ROUTE], strict=True) as (_, raw):
        for bad in (b"{nope", b"", b"[]", b'{"id":null,"method":"m"}'):
            raw.send(bad)
            answer = await raw.next()
            assert (answer["id"], answer["error"]["code"]) == (-1, -32600)
            assert answer["error"]["message"].startswith(
                "failed to parse websocket JSON-RPC message from exec-server websocket 127.0.0.1:41060: "
            )
        raw.send(STATUS)
        assert "result" in await raw.next()


@pytest.mark.parametrize(
    "message",
    [
        {"method": "nope/x"},
        {"method": "environment/status"},
        {"id": 5, "result": {}},
        {"id": 5, "error": {"code": -1, "message": "x"}},
        {"id": -1, "error": {"code": -32600, "message": "x"}},
    ],
)
async def test_server_ends_the_connection_for_what_no_client_says(message: Json) -> None:
    async with one_peer([STATUS_ROUTE], strict=True) as (peer, raw):
        raw.send(message)
        raw.send(STATUS)
        await raw.ended()
        assert raw.received == []
        assert peer.channel.loss


@pytest.mark.parametrize("error", [ProtocolViolation("too early"), InvalidParams("missing field `seq`")])
async def test_notification_that_its_handler_refuses_ends_the_connection(error: Exception) -> None:
    def refuse(params: Json) -> None:
        raise error

    async with one_peer(notifications={"initialized": refuse}, strict=True) as (peer, raw):
        raw.send({"method": "initialized"})
        await raw.ended()
        assert str(error) in peer.channel.loss


async def test_answer_to_a_request_of_the_server_is_no_violation() -> None:
    async with one_peer(strict=True) as (peer, raw), trio.open_nursery() as nursery:

        async def answer() -> None:
            raw.send({"id": (await raw.next())["id"], "result": READ_RESULT})

        nursery.start_soon(answer)
        assert (await read(peer)).next_seq == 7


# A client's rules (§15).


async def test_client_ignores_what_it_does_not_know() -> None:
    async with one_peer() as (peer, raw), trio.open_nursery() as nursery:
        raw.send({"method": "network/policyDecision", "params": {}})
        raw.send({"id": "whose", "result": {}})
        raw.send({"id": 99, "error": {"code": 1, "message": "x"}})

        async def answer() -> None:
            raw.send({"id": (await raw.next())["id"], "result": READ_RESULT})

        nursery.start_soon(answer)
        assert (await read(peer)).next_seq == 7


async def test_client_answers_a_request_of_the_server_with_method_not_found() -> None:
    async with one_peer() as (_, raw):
        raw.send({"id": 3, "method": "network/policyRequest", "params": {"a": 1}})
        assert await raw.next() == {
            "id": 3,
            "error": {
                "code": -32601,
                "message": "exec-server stub does not implement `network/policyRequest` yet",
            },
        }


@pytest.mark.parametrize("data", [b"{nope", b"[]", b'{"id":1}', b"\xff"])
async def test_what_a_client_cannot_parse_is_fatal(data: bytes) -> None:
    async with one_peer() as (peer, raw):
        raw.send(data)
        await raw.ended()
        assert "could not be parsed" in peer.channel.loss


async def test_complaint_of_the_server_about_the_connection_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with one_peer() as (peer, raw):
        raw.send({"id": -1, "error": {"code": -32600, "message": "failed to parse"}})
        await trio.testing.wait_all_tasks_blocked()
        assert not peer.channel.closed
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "failed to parse" in caplog.text


async def test_notification_goes_to_its_handler_in_order() -> None:
    closed: list[str] = []
    notifications = {PROCESS_CLOSED.name: lambda params: closed.append(params["processId"])}
    ours, theirs = memory_pair()
    async with open_peer(Peer(ours, notifications=notifications)), open_peer(Peer(theirs)) as server:
        for number in range(100):
            server.notify(PROCESS_CLOSED, ProcessClosedParams(str(number), 1))
        await trio.testing.wait_all_tasks_blocked()
        assert closed == [str(number) for number in range(100)]


# The block.


async def test_leaving_the_block_sends_what_is_queued() -> None:
    ours, theirs = memory_pair()
    raw = Raw(theirs)
    async with trio.open_nursery() as nursery:
        async with open_peer(Peer(ours)) as peer:
            peer.notify(INITIALIZED, Nothing())
        nursery.start_soon(raw.run)
    assert raw.received == [{"method": "initialized", "params": {}}]


async def test_connection_outlives_a_cancelled_body_that_cleans_up() -> None:
    async with trio.open_nursery() as nursery:
        ours, theirs = memory_pair()
        raw = Raw(theirs)
        nursery.start_soon(raw.run)
        with trio.CancelScope() as scope:
            async with open_peer(Peer(ours)) as peer:
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):

                        async def answer() -> None:
                            raw.send({"id": (await raw.next())["id"], "result": READ_RESULT})

                        nursery.start_soon(answer)
                        assert (await read(peer)).next_seq == 7
        assert scope.cancelled_caught


async def test_error_of_the_body_comes_out_as_itself() -> None:
    ours, _ = memory_pair()
    with pytest.raises(KeyError):
        async with open_peer(Peer(ours)):
            raise KeyError
