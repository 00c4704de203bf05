"""Sessions as a client sees them on the wire: memory channels, a fake environment, virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pybase64
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from execenv.server.connection import ServerConnection
from execenv.server.sessions import Sessions, open_sessions
from execenv.transports.memory import memory_pair
from tests.fakes import FakeEnvironment, FakeHost, FakeProcess

Message = dict[str, Any]

HANDSHAKE = "client must {} before using exec methods"


class WireClient:
    """The client's end of a connection, one JSON message at a time.

    Attributes:
        notifications: all that arrived, in order.
        closed: set when the connection has ended.
    """

    def __init__(self, sessions: Sessions, nursery: trio.Nursery, *, detachable: bool = True) -> None:
        self._channel, theirs = memory_pair()
        self._answers: dict[int, Message] = {}
        self._arrived = trio.Condition()
        self._lot = trio.lowlevel.ParkingLot()
        self._last_id = 0
        self.notifications: list[Message] = []
        self.closed = trio.Event()
        nursery.start_soon(ServerConnection(theirs, sessions, detachable=detachable).run)
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        await self._channel.run(self._receive)
        self.closed.set()

    def _receive(self, data: bytes) -> None:
        message = orjson.loads(data)
        if "id" in message:
            assert message["id"] not in self._answers
            self._answers[message["id"]] = message
            self._lot.unpark_all()
        else:
            self.notifications.append(message)

    def send(self, method: str, **params: Any) -> int:
        """Send a request; the id to get its answer with."""
        self._last_id += 1
        self.notify(method, id=self._last_id, params=params)
        return self._last_id

    def notify(self, method: str, **members: Any) -> None:
        self._channel.send_nowait(orjson.dumps({"method": method, **members}))

    async def answer(self, id_: int) -> Message:
        while id_ not in self._answers:
            await self._lot.park()
        return self._answers.pop(id_)

    async def call(self, method: str, **params: Any) -> Any:
        """The result of a request; what comes back must be one."""
        answer = await self.answer(self.send(method, **params))
        assert "error" not in answer, answer
        return answer["result"]

    async def fail(self, method: str, **params: Any) -> tuple[int, str]:
        """Code and message of the error that a request gets."""
        answer = await self.answer(self.send(method, **params))
        return answer["error"]["code"], answer["error"]["message"]

    async def initialize(self, resume: str | None = None) -> str:
        """Shake hands; the session's id."""
        result = await self.call("initialize", clientName="test", resumeSessionId=resume)
        self.notify("initialized", params={})
        session_id = result["sessionId"]
        assert isinstance(session_id, str)
        return session_id

    async def lose(self) -> None:
        """End the connection, and let the server notice."""
        self._channel.close_nowait()
        await wait_all_tasks_blocked()


class Server:
    """A server of fake environments, and connections to it."""

    def __init__(self, sessions: Sessions, host: FakeHost, nursery: trio.Nursery) -> None:
        self._sessions = sessions
        self._nursery = nursery
        self.host = host

    def connect(self, *, detachable: bool = True) -> WireClient:
        return WireClient(self._sessions, self._nursery, detachable=detachable)

    async def open(self, resume: str | None = None) -> tuple[WireClient, str]:
        """A connection after its handshake, and the session's id."""
        client = self.connect()
        return client, await client.initialize(resume)

    @property
    def environment(self) -> FakeEnvironment:
        """That of the newest session."""
        return self.host.opened[-1]

    def process(self, process_id: str = "p") -> FakeProcess:
        """The newest of that id in the newest session."""
        return self.environment.fakes.started[process_id][-1]


@asynccontextmanager
async def open_server(**options: Any) -> AsyncIterator[Server]:
    host = FakeHost()
    async with open_sessions(host.open, **options) as sessions, trio.open_nursery() as nursery:
        yield Server(sessions, host, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server. A test that takes time asks for `autojump_clock` itself: pytest-trio looks nowhere else."""
    async with open_server() as server:
        yield server


def start(process_id: str = "p", **changes: Any) -> dict[str, Any]:
    """The parameters of `process/start`."""
    params = {"processId": process_id, "argv": ["x"], "cwd": "file:///", "env": {}, "tty": False}
    return params | {"pipeStdin": True} | changes


def write(data: bytes, write_id: str, process_id: str = "p") -> dict[str, Any]:
    """The parameters of `process/write`."""
    return {"processId": process_id, "chunk": pybase64.b64encode(data).decode(), "writeId": write_id}


def seqs(result: Message) -> list[int]:
    return [chunk["seq"] for chunk in result["chunks"]]


# The handshake.


async def test_methods_are_refused_until_the_handshake_is_done(
    autojump_clock: MockClock, server: Server
) -> None:
    client = server.connect()
    assert await client.fail("process/start", **start()) == (-32600, HANDSHAKE.format("call initialize"))
    await client.call("initialize", clientName="")
    assert await client.fail("process/start", **start()) == (-32600, HANDSHAKE.format("send initialized"))
    client.notify("initialized", params={})
    assert await client.call("process/start", **start()) == {"processId": "p", "sandboxType": "none"}


async def test_handshake_may_be_pipelined_with_what_follows(
    autojump_clock: MockClock, server: Server
) -> None:
    client = server.connect()
    client.send("initialize", clientName="")
    client.notify("initialized", params={})
    assert (await client.call("process/start", **start()))["processId"] == "p"


async def test_second_initialize_is_refused_and_harms_nothing(
    autojump_clock: MockClock, server: Server
) -> None:
    client, _ = await server.open()
    message = "initialize may only be sent once per connection"
    assert await client.fail("initialize", clientName="") == (-32600, message)
    assert await client.call("environment/status") == {"status": "ready"}


async def test_failed_initialize_may_be_tried_again(autojump_clock: MockClock, server: Server) -> None:
    client = server.connect()
    for session_id in ("nobody", ""):
        refusal = await client.fail("initialize", clientName="", resumeSessionId=session_id)
        assert refusal == (-32600, f"unknown session id {session_id}")
    server.host.failure = RuntimeError("no environment today")
    assert (await client.fail("initialize", clientName=""))[0] == -32603
    server.host.failure = None
    await client.initialize()
    await client.call("process/start", **start())


async def test_initialized_before_initialize_ends_the_connection(
    autojump_clock: MockClock, server: Server
) -> None:
    client = server.connect()
    client.notify("initialized", params={})
    await client.closed.wait()


async def test_connection_lost_during_initialize_leaves_no_session_behind(
    autojump_clock: MockClock, server: Server
) -> None:
    server.host.may_inform = False
    client = server.connect()
    client.send("initialize", clientName="")
    await wait_all_tasks_blocked()
    await client.lose()
    await trio.sleep(81)
    assert server.environment.closed


@pytest.mark.parametrize("opened_first", [False, True])
async def test_connection_lost_just_as_the_environment_opens_leaves_no_session_behind(
    opened_first: bool, autojump_clock: MockClock, server: Server
) -> None:
    server.host.may_open = trio.Event()
    client = server.connect()
    client.send("initialize", clientName="")
    await wait_all_tasks_blocked()
    if opened_first:
        server.host.may_open.set()
        await trio.lowlevel.checkpoint()
    await client.lose()
    server.host.may_open.set()
    await trio.sleep(81)
    assert all(environment.closed for environment in server.host.opened)


async def test_connection_lost_during_a_resume_leaves_the_session_to_be_resumed(
    autojump_clock: MockClock, server: Server
) -> None:
    client, session_id = await server.open()
    await client.lose()
    server.environment.may_inform = trio.Event()
    client = server.connect()
    client.send("initialize", clientName="", resumeSessionId=session_id)
    await wait_all_tasks_blocked()
    await client.lose()
    server.environment.may_inform.set()
    _, resumed = await server.open(session_id)
    assert resumed == session_id


# Detaching and resuming.


async def test_detached_session_is_resumed_within_80_seconds(
    autojump_clock: MockClock, server: Server
) -> None:
    client, session_id = await server.open()
    await client.call("process/start", **start())
    for _ in range(2):  # a resume stops the clock, the next loss starts it anew
        await client.lose()
        await trio.sleep(79.9)
        client, resumed = await server.open(session_id)
        assert resumed == session_id
    await trio.sleep(1000)
    assert await client.call("process/terminate", processId="p") == {"running": True}
    assert len(server.host.opened) == 1


async def test_session_expires_after_80_seconds_even_if_resumed_at_that_instant(
    autojump_clock: MockClock, server: Server
) -> None:
    client, session_id = await server.open()
    await client.lose()
    client = server.connect()
    await trio.sleep(80)
    refusal = await client.fail("initialize", clientName="", resumeSessionId=session_id)
    assert refusal == (-32600, f"unknown session id {session_id}")
    await wait_all_tasks_blocked()
    assert server.environment.closed


async def test_time_to_live_may_be_infinite(autojump_clock: MockClock) -> None:
    async with open_server(detached_ttl=float("inf")) as server:
        client, session_id = await server.open()
        await client.lose()
        await trio.sleep(80_000)
        await server.open(session_id)
    assert server.environment.closed


async def test_session_without_resumption_ends_with_its_connection(
    autojump_clock: MockClock, server: Server
) -> None:
    client = server.connect(detachable=False)
    session_id = await client.initialize()
    await client.lose()
    assert server.environment.closed
    assert (await server.connect().fail("initialize", clientName="", resumeSessionId=session_id))[0] == -32600


async def test_attached_session_is_never_taken_over(autojump_clock: MockClock, server: Server) -> None:
    client, session_id = await server.open()
    message = f"session {session_id} is already attached to another connection"
    other = server.connect()
    assert await other.fail("initialize", clientName="", resumeSessionId=session_id) == (-32010, message)
    assert await client.call("environment/status") == {"status": "ready"}
    await client.lose()
    assert await other.initialize(session_id) == session_id


async def test_long_poll_of_a_lost_connection_is_dropped(autojump_clock: MockClock, server: Server) -> None:
    client, session_id = await server.open()
    await client.call("process/start", **start())
    client.send("process/read", processId="p", waitMs=3_600_000)
    await wait_all_tasks_blocked()
    assert server.process().readers == 1
    before = trio.current_time()
    await client.lose()
    assert server.process().readers == 0
    await server.open(session_id)
    assert trio.current_time() == before


async def test_output_while_detached_is_read_after_the_resume_and_not_replayed(
    autojump_clock: MockClock, server: Server
) -> None:
    client, session_id = await server.open()
    await client.call("process/start", **start())
    process = server.process()
    process.emit(b"seen")
    await wait_all_tasks_blocked()
    assert [note["params"]["seq"] for note in client.notifications] == [1]
    await client.lose()
    process.emit(b"missed")
    process.emit(b"missed too", "stderr")
    process.exit(3)
    client, _ = await server.open(session_id)
    await wait_all_tasks_blocked()
    assert client.notifications == []
    process.emit(b"live")
    process.close()
    await wait_all_tasks_blocked()
    assert [(note["method"], note["params"]["seq"]) for note in client.notifications] == [
        ("process/output", 5),
        ("process/closed", 6),
    ]
    result = await client.call("process/read", processId="p", afterSeq=1)
    assert seqs(result) == [2, 3, 5]
    assert (result["nextSeq"], result["exited"], result["exitCode"], result["closed"]) == (7, True, 3, True)


async def test_sessions_do_not_see_each_others_processes(autojump_clock: MockClock, server: Server) -> None:
    one, _ = await server.open()
    other, _ = await server.open()
    await one.call("process/start", **start())
    assert await other.fail("process/read", processId="p") == (-32600, "unknown process id p")
    assert await other.call("process/terminate", processId="p") == {"running": False}
    await other.call("process/start", **start())
    server.process().emit(b"of the other")
    await wait_all_tasks_blocked()
    assert (len(one.notifications), len(other.notifications)) == (0, 1)


# Retention of ids.


async def test_id_stays_taken_for_80_seconds_after_closed(autojump_clock: MockClock, server: Server) -> None:
    client, _ = await server.open()
    await client.call("process/start", **start())
    process = server.process()
    process.emit(b"output")
    process.exit()
    await trio.sleep(500)  # exited and not closed: no limit
    process.close()
    await trio.sleep(79.9)
    assert await client.fail("process/start", **start()) == (-32600, "process p already exists")
    assert seqs(await client.call("process/read", processId="p")) == [1]
    await trio.sleep(0.2)
    assert await client.fail("process/read", processId="p") == (-32600, "unknown process id p")
    assert await client.call("process/write", **write(b"x", "1")) == {"status": "unknownProcess"}
    assert process.released
    await client.call("process/start", **start())


async def test_ids_are_freed_each_at_its_own_time(autojump_clock: MockClock, server: Server) -> None:
    client, _ = await server.open()
    for number in range(3):
        await client.call("process/start", **start(f"p{number}"))
    for number in range(3):
        await trio.sleep(30)
        server.process(f"p{number}").exit()
        server.process(f"p{number}").close()
    closed = [30, 60, 90]
    for now in (109, 111, 139, 141, 169, 171):
        await trio.sleep(now - trio.current_time())
        for number, moment in enumerate(closed):
            answer = await client.answer(client.send("process/read", processId=f"p{number}"))
            assert ("result" in answer) == (now < moment + 80)


async def test_failed_start_leaves_its_id_free(autojump_clock: MockClock, server: Server) -> None:
    from execenv.errors import InternalError

    client, _ = await server.open()
    server.environment.fakes.failure = InternalError("No such file or directory (os error 2)")
    message = "No such file or directory (os error 2)"
    assert await client.fail("process/start", **start()) == (-32603, message)
    server.environment.fakes.failure = None
    await client.call("process/start", **start())
    assert await client.fail("process/start", **start()) == (-32600, "process p already exists")


# Order, and many at once.


async def test_writes_stay_in_order_while_the_process_is_slow(
    autojump_clock: MockClock, server: Server
) -> None:
    client, _ = await server.open()
    server.environment.fakes.room = 3
    await client.call("process/start", **start())
    process = server.process()
    ids = [client.send("process/write", **write(b"%d" % number, str(number))) for number in range(1000)]
    ending = client.send("process/closeStdin", processId="p")
    await wait_all_tasks_blocked()
    assert len(process.written) == 3
    while len(process.written) < 1000:
        process.take(7)
        await wait_all_tasks_blocked()
    for id_ in ids:
        assert (await client.answer(id_))["result"] == {"status": "accepted"}
    await client.answer(ending)
    assert process.written == [b"%d" % number for number in range(1000)] + [None]


async def test_write_that_waits_delays_nothing_else(autojump_clock: MockClock, server: Server) -> None:
    client, _ = await server.open()
    server.environment.fakes.room = 0
    await client.call("process/start", **start())
    waiting = client.send("process/write", **write(b"x", "1"))
    assert await client.call("process/signal", processId="p", signal="interrupt") == {}
    await client.call("process/start", **start("other"))
    server.process().take()
    assert (await client.answer(waiting))["result"] == {"status": "accepted"}


async def test_writes_that_wait_fail_when_the_process_ends(autojump_clock: MockClock, server: Server) -> None:
    client, _ = await server.open()
    server.environment.fakes.room = 0
    await client.call("process/start", **start())
    waiting = [client.send("process/write", **write(b"x", str(number))) for number in range(10)]
    await wait_all_tasks_blocked()
    assert await client.call("process/terminate", processId="p") == {"running": True}
    server.process().take(0)
    for id_ in waiting:
        assert (await client.answer(id_))["error"]["message"] == "failed to write to process stdin"


async def test_what_directly_follows_a_start_waits_for_it(autojump_clock: MockClock, server: Server) -> None:
    client, _ = await server.open()
    fakes = server.environment.fakes
    fakes.may_start = trio.Event()
    started = client.send("process/start", **start())
    writes = [client.send("process/write", **write(b"%d" % number, str(number))) for number in range(3)]
    reading = client.send("process/read", processId="p", waitMs=1000)
    signalling = client.send("process/signal", processId="p", signal="interrupt")
    assert await client.fail("process/start", **start()) == (-32600, "process p already exists")
    fakes.may_start.set()
    assert (await client.answer(started))["result"]["processId"] == "p"
    for id_ in writes:
        assert (await client.answer(id_))["result"] == {"status": "accepted"}
    assert (await client.answer(reading))["result"]["chunks"] == []
    assert (await client.answer(signalling))["result"] == {}
    assert server.process().written == [b"0", b"1", b"2"]
    assert server.process().signals == ["interrupt"]


async def test_terminate_cancels_a_start(autojump_clock: MockClock, server: Server) -> None:
    client, _ = await server.open()
    fakes = server.environment.fakes
    fakes.may_start = trio.Event()
    starting = client.send("process/start", **start())
    writing = client.send("process/write", **write(b"x", "1"))
    assert await client.call("process/terminate", processId="p") == {"running": True}
    error = (await client.answer(starting))["error"]
    assert error == {"code": -32600, "message": "process p start was cancelled"}
    assert (await client.answer(writing))["result"] == {"status": "unknownProcess"}
    fakes.may_start.set()
    await wait_all_tasks_blocked()
    assert fakes.started == {}
    await client.call("process/start", **start())


async def test_thousand_requests_beside_a_flood_of_output_are_all_answered(
    autojump_clock: MockClock, server: Server
) -> None:
    client, _ = await server.open()
    await client.call("process/start", **start())
    process = server.process()
    count = 1500
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.emit_all, bytes(4096), count)
        ids = []
        for number in range(250):
            ids.append(client.send("environment/status"))
            ids.append(client.send("process/write", **write(b"%d" % number, str(number))))
            ids.append(client.send("process/read", processId="p", afterSeq=10**9, waitMs=5))
            ids.append(client.send("process/start", **start(f"p{number}")))
        for id_ in ids:
            assert "result" in await client.answer(id_)
    await wait_all_tasks_blocked()
    assert [note["params"]["seq"] for note in client.notifications] == list(range(1, count + 1))
    assert process.written == [b"%d" % number for number in range(250)]


async def test_output_flood_ends_with_its_connection(autojump_clock: MockClock, server: Server) -> None:
    client, session_id = await server.open()
    await client.call("process/start", **start())
    process = server.process()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.emit_all, bytes(4096), 5000)
        while len(client.notifications) < 100:
            await trio.lowlevel.checkpoint()
        await client.lose()
    client, _ = await server.open(session_id)
    result = await client.call("process/read", processId="p", afterSeq=4999)
    assert seqs(result) == [5000]
