"""The tools of `execenv.testing`: each fault happens at just the frame that it is for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import Factory, define, evolve

import execenv
from execenv import ConnectFailed, ConnectionLost, Environment, UsageError, open_environment, testing
from execenv.abc import FileSystem
from execenv.local.filesystem import LocalFileSystem
from execenv.paths import PathUri
from execenv.protocol import U64, OpenMode, WalkOptions
from execenv.remote.connection import open_remote
from execenv.testing import (
    Carrier,
    Cut,
    Delay,
    Duplicate,
    FaultPlan,
    Frame,
    Recorder,
    Recording,
    Reorder,
    Rule,
    ScriptedProcess,
    Stall,
    Throttle,
    open_fake_backend,
    open_fault_proxy,
    open_memory_server,
    open_replay_server,
)
from execenv.testing.faults import Direction, FrameLog
from execenv.testing.memory import open_memory_listener
from execenv.testing.proxy import FrameSplitter
from execenv.transports import websocket
from execenv.transports._frames import FrameCodec
from execenv.transports.channel import Channel
from execenv.transports.http import read_head
from tests.conftest import WebsocketServer
from tests.contract import test_input, test_output, test_run
from tests.fakes import MOUNTS
from tests.traces import TRACES

Json = Any
Dial = Callable[[], AbstractAsyncContextManager[Channel]]
TIME_LIMIT = 20.0
READ = "process/read"


@define(eq=False)
class Ear:
    """What has arrived at one end of a channel."""

    channel: Channel
    messages: list[Json] = Factory(list)
    ended: trio.Event = Factory(trio.Event)
    _changed: trio.lowlevel.ParkingLot = Factory(trio.lowlevel.ParkingLot)

    async def listen(self) -> None:
        await self.channel.run(self.receive)
        self.ended.set()
        self._changed.unpark_all()

    def receive(self, data: bytes) -> None:
        self.messages.append(json.loads(data))
        self._changed.unpark_all()

    async def wait(self, count: int) -> list[Json]:
        """The first messages, when there are so many or the channel has ended."""
        while len(self.messages) < count and not self.ended.is_set():
            await self._changed.park()
        return self.messages[:count]

    def send(self, message: Json) -> None:
        self.channel.send_nowait(json.dumps(message).encode())

    def ask(self, number: int, events: int = 0, size: int = 0) -> None:
        self.send({"id": number, "method": READ, "params": {"events": events, "fill": "x" * size}})


class Answering(Ear):
    """Sends as many events as a request asks for, and then answers it."""

    def receive(self, data: bytes) -> None:
        super().receive(data)
        message = self.messages[-1]
        if "method" in message:
            with suppress(ConnectionLost):  # who asked may be gone
                self._answer(message)

    def _answer(self, message: Json) -> None:
        for seq in range(1, message["params"]["events"] + 1):
            fill = message["params"]["fill"]
            self.send({"method": "process/output", "params": {"seq": seq, "fill": fill}})
        self.send({"id": message["id"], "result": {}})


class Host:
    """A server, and its ends of the connections to it."""

    def __init__(self) -> None:
        self.ears: list[Ear] = []

    async def serve(self, channel: Channel) -> None:
        ear = Answering(channel)
        self.ears.append(ear)
        await ear.listen()

    async def serve_socket(self, stream: trio.SocketStream) -> None:
        async with stream:
            head = await read_head(stream)
            assert head is not None
            await self.serve(await websocket.accept(stream, head.raw, head.leftover, "test"))


@define(eq=False)
class Setting:
    """A carrier of either kind, how to get through it, and what is behind it."""

    carrier: Carrier
    dial: Dial
    host: Host

    @asynccontextmanager
    async def open_ear(self) -> AsyncIterator[Ear]:
        async with self.dial() as channel, trio.open_nursery() as nursery:
            ear = Ear(channel)
            nursery.start_soon(ear.listen)
            yield ear
            nursery.cancel_scope.cancel()


OpenSetting = Callable[..., AbstractAsyncContextManager[Setting]]


@pytest.fixture(params=["memory", "proxy"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_setting(kind: str) -> OpenSetting:
    @asynccontextmanager
    async def open_one(*rules: Rule, recorder: Recorder | None = None) -> AsyncIterator[Setting]:
        plan, host = FaultPlan(rules=rules), Host()
        with trio.fail_after(TIME_LIMIT):
            if kind == "memory":
                async with open_memory_listener(host.serve, plan, recorder=recorder) as listener:
                    yield Setting(listener, listener.dial, host)
                return
            async with trio.open_nursery() as nursery:
                (sock,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, host.serve_socket, [sock])
                target = ("127.0.0.1", sock.socket.getsockname()[1])
                async with open_fault_proxy(target, plan, recorder=recorder) as proxy:
                    yield Setting(proxy, partial(dial_websocket, proxy.url), host)
                nursery.cancel_scope.cancel()

    return open_one


@asynccontextmanager
async def dial_websocket(url: str) -> AsyncIterator[Channel]:
    channel = await websocket.connect(url)
    try:
        yield channel
    finally:
        channel.close_nowait()


def seqs(messages: list[Json]) -> list[int | str]:
    """Events by seq, answers by `r` and their id."""
    return [m["params"]["seq"] if "method" in m else f"r{m['id']}" for m in messages]


# Faults, in both kinds of carrier.


async def test_without_faults_everything_arrives(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, setting.open_ear() as ear:
        for number, size in enumerate((0, 200, 70_000, 400_000)):
            ear.ask(number, 2, size)
            assert seqs(await ear.wait(3 * number + 3))[-3:] == [1, 2, f"r{number}"]
            assert ear.messages[-2]["params"]["fill"] == "x" * size
        assert setting.carrier.connections == setting.carrier.open_connections == 1


@pytest.mark.parametrize(
    ("where", "arrived"), [("before", [1]), ("middle", [1]), ("after", [1, 2])], ids=lambda x: str(x)
)
@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_cut_happens_at_the_frame(
    open_setting: OpenSetting, where: Any, arrived: list[int], size: int
) -> None:
    second = partial(_is_event, 2)
    async with open_setting(Rule(Cut(where), when=second)) as setting:
        async with setting.open_ear() as ear:
            ear.ask(1, 3, size)
            await ear.ended.wait()
            assert seqs(ear.messages) == arrived
            assert "reset" in str(ear.channel.loss)
            with pytest.raises(ConnectionLost):
                ear.ask(2)
            await setting.host.ears[0].ended.wait()
        async with setting.open_ear() as ear:
            ear.ask(1, 3)
            assert seqs(await ear.wait(4)) == [1, 2, 3, "r1"]
        assert setting.carrier.plan.counts[f"cut {where}"] == 1


def _is_event(seq: int, frame: Frame) -> bool:
    return frame.method == "process/output" and frame.message["params"]["seq"] == seq


async def test_cut_before_a_request_keeps_it_from_the_server(open_setting: OpenSetting) -> None:
    async with (
        open_setting(Rule(Cut("before"), kind="request", skip=1)) as setting,
        setting.open_ear() as ear,
    ):
        ear.ask(1)
        await ear.wait(1)
        ear.ask(2)
        await ear.ended.wait()
        await setting.host.ears[0].ended.wait()
        assert [m["id"] for m in setting.host.ears[0].messages] == [1]


async def test_cut_after_a_request_leaves_it_done(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Cut("after"), kind="request")) as setting, setting.open_ear() as ear:
        ear.ask(1)
        await ear.ended.wait()
        await setting.host.ears[0].ended.wait()
        assert [m["id"] for m in setting.host.ears[0].messages] == [1]


async def test_refused_connections_are_counted_and_then_they_are_let_in(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Cut(refuse=2), kind="request")) as setting:
        async with setting.open_ear() as ear:
            ear.ask(1)
            await ear.ended.wait()
        for _ in range(2):
            with pytest.raises(ConnectFailed):
                async with setting.dial():
                    pass
        async with setting.open_ear() as ear:
            ear.ask(1)
            assert seqs(await ear.wait(1)) == ["r1"]
        assert (setting.carrier.connections, setting.carrier.plan.counts["refused"]) == (2, 2)


async def test_delayed_frame_and_those_behind_it_come_later_in_their_order(open_setting: OpenSetting) -> None:
    async with (
        open_setting(Rule(Delay(0.1), when=partial(_is_event, 2))) as setting,
        setting.open_ear() as ear,
    ):
        began = trio.current_time()
        ear.ask(1, 3)
        assert seqs(await ear.wait(4)) == [1, 2, 3, "r1"]
        assert trio.current_time() - began >= 0.1


async def test_doubled_event_comes_twice(open_setting: OpenSetting) -> None:
    async with (
        open_setting(Rule(Duplicate(), method="process/output", skip=1)) as setting,
        setting.open_ear() as ear,
    ):
        ear.ask(1, 3)
        assert seqs(await ear.wait(5)) == [1, 2, 2, 3, "r1"]
        assert ear.channel.queued == setting.host.ears[0].channel.queued == 0


async def test_overtaken_event_comes_behind_the_next_one(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Reorder(TIME_LIMIT), method="process/output", skip=1)) as setting:
        async with setting.open_ear() as ear:
            ear.ask(1, 3)
            assert seqs(await ear.wait(4)) == [1, 3, 2, "r1"]
        assert setting.carrier.plan.counts["reorder"] == 1


async def test_what_nothing_overtakes_goes_on_after_a_while(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Reorder(0.01), kind="reply")) as setting, setting.open_ear() as ear:
        ear.ask(1)
        assert seqs(await ear.wait(1)) == ["r1"]
        assert setting.carrier.plan.counts["reorder"] == 0


async def test_what_waits_to_be_overtaken_still_comes_before_the_end(open_setting: OpenSetting) -> None:
    async with (
        open_setting(Rule(Reorder(TIME_LIMIT), kind="reply")) as setting,
        setting.open_ear() as ear,
        trio.open_nursery() as nursery,
    ):

        async def end() -> None:
            await setting.carrier.wait_connection(1)
            while not setting.host.ears or not setting.host.ears[0].messages:
                await trio.lowlevel.checkpoint()
            setting.host.ears[0].channel.close_nowait()

        nursery.start_soon(end)
        ear.ask(1)
        assert seqs(await ear.wait(1)) == ["r1"]


async def test_stalled_direction_is_silent_and_the_other_goes_on(open_setting: OpenSetting) -> None:
    async with (
        open_setting(Rule(Stall(), method="process/output", skip=1)) as setting,
        setting.open_ear() as ear,
    ):
        ear.ask(1, 3)
        ear.ask(2)
        assert seqs(await ear.wait(1)) == [1]
        assert len(await setting.host.ears[0].wait(2)) == 2
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert seqs(ear.messages) == [1]
        assert not ear.ended.is_set()
        setting.carrier.resume()
        assert seqs(await ear.wait(5)) == [1, 2, 3, "r1", "r2"]


async def test_end_does_not_pass_a_stalled_direction(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Stall(), kind="request", skip=1)) as setting:
        async with setting.open_ear() as ear:
            ear.ask(1)
            await ear.wait(1)
            ear.ask(2)
        await trio.testing.wait_all_tasks_blocked(0.02)
        server = setting.host.ears[0]
        assert not server.ended.is_set()
        assert setting.carrier.open_connections == 1
        setting.carrier.resume()
        await server.ended.wait()


async def test_throttled_direction_takes_its_time(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Throttle(100_000), kind="reply")) as setting, setting.open_ear() as ear:
        ear.ask(1)
        await ear.wait(1)
        began = trio.current_time()
        ear.ask(2, 2, 10_000)
        assert seqs(await ear.wait(4))[1:] == [1, 2, "r2"]
        assert 0.2 <= trio.current_time() - began < 5


async def test_what_a_client_said_last_arrives_although_it_takes_no_answer(open_setting: OpenSetting) -> None:
    async with open_setting(Rule(Delay(0.05), kind="request", skip=1)) as setting:
        async with setting.open_ear() as ear:
            ear.ask(1, 50, 100_000)
            await ear.wait(1)
            ear.ask(2)
        server = setting.host.ears[0]
        await server.ended.wait()
        assert [message["id"] for message in server.messages] == [1, 2]


# By hand.


@pytest.mark.parametrize(("side", "told"), [("client", "to_client"), ("server", "to_server")])
async def test_cut_of_one_side_leaves_the_other_half_open(
    open_setting: OpenSetting, side: Any, told: Direction
) -> None:
    async with open_setting() as setting, setting.open_ear() as ear:
        ear.ask(1)
        await ear.wait(1)
        ends = {"to_client": ear, "to_server": setting.host.ears[0]}
        setting.carrier.cut(side)
        cut = ends.pop(told)
        (open_end,) = ends.values()
        await cut.ended.wait()
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not open_end.ended.is_set()
        open_end.send({"id": 9, "result": {}})  # is swallowed
        async with setting.open_ear() as second:
            second.ask(2)
            assert seqs(await second.wait(1)) == ["r2"]
        assert setting.carrier.open_connections >= 1
        open_end.channel.close_nowait()
        await setting.carrier.wait_no_connection()


async def test_close_is_an_end_in_good_order(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, setting.open_ear() as ear:
        ear.ask(1, 1)
        await ear.wait(2)
        setting.carrier.close()
        await ear.ended.wait()
        await setting.host.ears[0].ended.wait()
        assert "reset" not in ear.channel.loss


async def test_stall_by_hand_is_for_the_connections_of_the_moment(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, setting.open_ear() as first:
        first.ask(1)
        await first.wait(1)
        setting.carrier.stall()
        first.ask(2)
        async with setting.open_ear() as second:
            second.ask(1)
            assert seqs(await second.wait(1)) == ["r1"]
        assert seqs(first.messages) == ["r1"]
        setting.carrier.resume()
        assert seqs(await first.wait(2)) == ["r1", "r2"]


async def test_held_frame_waits_and_can_be_cut(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, setting.open_ear() as ear:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ask_when_blocked, ear)
            async with setting.carrier.hold_frame(partial(_is_event, 2)) as frame:
                assert (frame.kind, frame.connection) == ("notification", 1)
                assert seqs(await ear.wait(1)) == [1]
                setting.carrier.cut()
        await ear.ended.wait()
        assert seqs(ear.messages) == [1]


async def test_held_frame_goes_on_when_the_block_is_left(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, setting.open_ear() as ear:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ask_when_blocked, ear)
            async with setting.carrier.hold_frame(partial(_is_event, 2)):
                assert seqs(await ear.wait(1)) == [1]
        assert seqs(await ear.wait(4)) == [1, 2, 3, "r1"]


async def _ask_when_blocked(ear: Ear) -> None:
    await trio.testing.wait_all_tasks_blocked()
    ear.ask(1, 3)


async def test_frame_is_waited_for(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, setting.open_ear() as ear:
        seen: list[Frame] = []

        async def wait() -> None:
            seen.append(await setting.carrier.wait_frame(lambda frame: frame.kind == "reply"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await _ask_when_blocked(ear)
        assert [(frame.method, frame.message["id"]) for frame in seen] == [(READ, 1)]


async def test_connections_are_waited_for(open_setting: OpenSetting) -> None:
    async with open_setting() as setting, trio.open_nursery() as nursery:

        async def connect() -> None:
            await trio.testing.wait_all_tasks_blocked()
            async with setting.open_ear() as ear:
                ear.ask(1)
                await ear.wait(1)

        nursery.start_soon(connect)
        assert await setting.carrier.wait_connection() == 1
        assert await setting.carrier.wait_connection(1) == 1


async def test_error_in_a_test_of_frames_comes_out(open_setting: OpenSetting) -> None:
    def fail(frame: Frame) -> bool:
        if frame.kind == "request":
            raise KeyError("of the test")
        return False

    with pytest.RaisesGroup(KeyError, allow_unwrapped=True, flatten_subgroups=True):
        async with open_setting(Rule(Cut(), when=fail)) as setting, setting.open_ear() as ear:
            ear.ask(1)
            await trio.sleep_forever()


async def test_everything_has_gone_when_the_block_is_left(open_setting: OpenSetting) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with open_setting() as setting:
        for side in ("both", "client", "server"):
            async with setting.open_ear() as ear:
                ear.ask(1)
                await ear.wait(1)
                setting.carrier.cut(side)
        carrier = setting.carrier
    assert carrier.open_connections == 0
    assert set(os.listdir("/proc/self/fd")) <= before


# Frames.


async def test_frames_are_found_however_the_bytes_arrive() -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n"
    codec = FrameCodec(client=True, max_message=1 << 20, max_fragment=1000)
    parts = [upgrade]
    for size in (0, 100, 300, 3500):
        message = json.dumps({"method": "m", "params": "y" * size}).encode()
        parts += [b"".join(bytes(b) for b in frame) for frame in codec.encode_message(message)]
    parts.append(codec.encode_ping())
    stream = b"".join(parts)
    kinds = ["http", *["notification"] * 3, *["part"] * 3, "notification", "ping"]
    for step in (1, 7, 1000, len(stream)):
        splitter = FrameSplitter(FrameLog(1), "to_server")
        found = [
            item
            for start in range(0, len(stream), step)
            for item in splitter.feed(stream[start : start + step])
        ]
        assert b"".join(raw for _, raw in found) == stream
        assert [frame.kind for frame, _ in found] == kinds
        assert [frame.size for frame, _ in found] == [len(raw) for _, raw in found]
        assert [frame.whole for frame, _ in found][-2:] == [False, True]
        assert [len(f.message["params"]) for f, _ in found if f.message] == [0, 100, 300, 3500]


# The proxy before a real server.


async def test_proxy_before_a_real_server_changes_nothing(websocket_server: WebsocketServer) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with (
            open_fault_proxy(websocket_server.url) as proxy,
            open_environment(proxy.url) as env,
        ):
            done = await env.run(["sh", "-c", "cat; seq 1 100000"], input=b"x" * 1_000_000)
            assert done.stdout is not None
            assert len(done.stdout) == 1_000_000 + 588_895
    assert proxy.connections == 1
    assert proxy.plan.counts["frames"] == proxy.frames


async def test_proxy_passes_on_what_is_no_websocket(websocket_server: WebsocketServer) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_fault_proxy(websocket_server.url) as proxy:
            async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as stream:
                await stream.send_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
            assert proxy.connections == 1


async def test_connection_cut_in_the_upgrade_is_a_failed_connect(websocket_server: WebsocketServer) -> None:
    for rule in (Rule(Cut("middle"), kind="http"), Rule(Cut("before"), kind="http", direction="to_client")):
        with trio.fail_after(TIME_LIMIT):
            async with open_fault_proxy(websocket_server.url, FaultPlan(rules=[rule])) as proxy:
                with pytest.raises(ConnectFailed):
                    async with open_environment(proxy.url):
                        pass


async def test_session_goes_on_behind_a_cut(websocket_server: WebsocketServer) -> None:
    script = "echo one; read -r line; echo got $line"
    with trio.fail_after(TIME_LIMIT):
        async with (
            open_fault_proxy(websocket_server.url) as proxy,
            open_environment(proxy.url) as env,
            env.open_process(["sh", "-c", script], stdin=True) as process,
        ):
            assert process.stdin is not None
            assert await process.stdout.receive_some() == b"one\n"
            proxy.cut()
            await process.stdin.send_all(b"it\n")
            assert [chunk.data async for chunk in process] == [b"got it\n"]
            assert await process.wait() == 0
        assert proxy.connections == 2


async def test_target_that_is_down_resets_the_client_and_may_be_changed(
    websocket_server: WebsocketServer,
) -> None:
    with trio.fail_after(TIME_LIMIT):
        (gone,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = gone.socket.getsockname()[1]
        await gone.aclose()
        async with open_fault_proxy(("127.0.0.1", port)) as proxy:
            with pytest.raises(ConnectFailed):
                async with open_environment(proxy.url):
                    pass
            proxy.target = ("127.0.0.1", int(websocket_server.url.rpartition(":")[2].strip("/")))
            async with open_environment(proxy.url) as env:
                assert await env.probe() == "ready"


@pytest.mark.parametrize("url", ["wss://host/", "http://host/", "local"])
async def test_proxy_refuses_what_it_cannot_look_into(url: str) -> None:
    with pytest.raises(UsageError, match="ws://"):
        async with open_fault_proxy(url):
            pass


# The server in memory.


async def say(process: ScriptedProcess) -> int:
    """Says its arguments, then what it reads, and ends with how many lines that were."""
    for word in process.argv[1:]:
        process.write_stdout(word.encode() + b"\n")
        await trio.sleep(1)
    count = 0
    while line := await process.read_line():
        count += 1
        process.write_stderr(b"read " + line)
    return count


@asynccontextmanager
async def open_dialled(dial: Dial, session_id: str | None = None) -> AsyncIterator[Environment]:
    async with open_remote(dial, "memory", resume_session_id=session_id) as remote:
        yield Environment(remote)


async def test_memory_server_keeps_its_sessions(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_server(partial(open_fake_backend, {"say": say})) as server:
        session_id = None
        with pytest.raises(ConnectionLost):
            async with open_dialled(server.dial) as env:
                session_id = env.session_id
                await env.start_detached("p", ["say", "one", "two", "three"], stdin=True)
                async with env.attach("p") as process:
                    assert (await anext(aiter(process))).data == b"one\n"
                    server.cut()
                    await process.wait()
        await trio.sleep(70)
        async with open_dialled(server.dial, session_id) as env, env.attach("p", stdin=True) as process:
            assert process.stdin is not None
            await process.stdin.send_all(b"a\nb")
            await process.stdin.aclose()
            chunks = [(chunk.stream, chunk.data) async for chunk in process]
            assert chunks == [
                *[("stdout", word) for word in (b"one\n", b"two\n", b"three\n")],
                *[("stderr", line) for line in (b"read a\n", b"read b")],
            ]
            assert await process.wait() == 2
        await trio.sleep(81)
        with pytest.raises(ConnectFailed, match="unknown session"):
            async with open_dialled(server.dial, session_id):
                pass


async def test_restarted_memory_server_knows_no_session(autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_server(partial(open_fake_backend, {"say": say})) as server:
        session_id = None
        with pytest.raises(ConnectionLost):
            async with open_dialled(server.dial) as env:
                session_id = env.session_id
                async with env.open_process(["say"], stdin=True) as process:
                    await server.restart()
                    await process.wait()
        with pytest.raises(ConnectFailed, match="unknown session"):
            async with open_dialled(server.dial, session_id):
                pass
        async with open_dialled(server.dial) as env:
            assert (await env.run(["say", "again"])).stdout == b"again\n"


async def test_every_frame_of_a_conversation_can_be_cut(autojump_clock: trio.testing.MockClock) -> None:
    """The loop that the tests of recovery are made of: without recovery, each cut is a clear error."""

    async def converse(plan: FaultPlan) -> bytes:
        async with (
            open_memory_server(partial(open_fake_backend, {"say": say}), plan) as server,
            open_dialled(server.dial) as env,
            env.open_process(["say", "a", "b"], stdin=True) as process,
        ):
            assert process.stdin is not None
            await process.stdin.send_all(b"c\n")
            await process.stdin.aclose()
            return b"".join([chunk.data async for chunk in process])

    plan = FaultPlan()
    assert await converse(plan) == b"a\nb\nread c\n"
    count = plan.counts["frames"]
    assert count > 10
    ends = {"done": 0, "lost": 0}
    for direction in ("to_server", "to_client"):
        for where in ("before", "after"):
            for index in range(1, count + 1):
                cut = Cut(where)
                plan = FaultPlan(rules=[Rule(cut, direction=direction, index=index)])
                try:
                    assert await converse(plan) == b"a\nb\nread c\n"
                    ends["done"] += 1
                except (ConnectionLost, ConnectFailed):
                    assert plan.counts[f"cut {where}"] == 1
                    ends["lost"] += 1
    assert ends["lost"] >= count
    assert sum(ends.values()) == 4 * count


async def test_output_of_a_process_waits_while_its_client_is_stalled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    printed = 0

    async def chatter(process: ScriptedProcess) -> None:
        nonlocal printed
        while True:
            await process.send_stdout(b"x" * 100_000)
            printed += 1

    async with (
        open_memory_server(partial(open_fake_backend, {"chatter": chatter})) as server,
        open_dialled(server.dial) as env,
        env.open_process(["chatter"]) as process,
    ):
        await anext(aiter(process))
        server.stall("to_client")
        await trio.testing.wait_all_tasks_blocked()
        before = printed
        await trio.sleep(3)
        assert printed == before < 1000
        server.resume()


# The fake environment.


async def test_programs_are_functions(autojump_clock: trio.testing.MockClock) -> None:
    async def compile_slowly(process: ScriptedProcess) -> int:
        process.write_stdout(b"compiling\n")
        await trio.sleep(3600)
        process.write_stderr(b"no\n")
        return 2

    async with testing.open_fake_environment({"make": compile_slowly}) as env:
        began = trio.current_time()
        done = await env.run(["make", "all"], check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"compiling\n", b"no\n")
        assert trio.current_time() - began == 3600


async def test_program_is_found_by_path_by_name_or_by_the_star() -> None:
    def named(name: str) -> Callable[[ScriptedProcess], Awaitable[None]]:
        async def program(process: ScriptedProcess) -> None:
            process.write_stdout(f"{name} {process.argv[0]}".encode())

        return program

    programs = {name: named(name) for name in ("/bin/a", "a", "*")}
    async with testing.open_fake_environment(programs) as env:
        for argv0, name in (("/bin/a", "/bin/a"), ("/usr/bin/a", "a"), ("a", "a"), ("b", "*")):
            assert (await env.run([argv0])).stdout == f"{name} {argv0}".encode()


async def test_error_in_a_program_comes_out_of_the_environment() -> None:
    async def broken(process: ScriptedProcess) -> None:
        raise KeyError("of the test")

    with pytest.raises(KeyError, match="of the test"):
        async with testing.open_fake_environment({"broken": broken}) as env:
            await env.run(["broken"])
            await trio.sleep_forever()


async def wait_for_ever(process: ScriptedProcess) -> None:
    process.write_stdout(b"ready")
    await trio.sleep_forever()


async def test_signals_end_a_program_that_has_no_trap(autojump_clock: trio.testing.MockClock) -> None:
    async with testing.open_fake_backend({"wait": wait_for_ever}) as backend:
        env = Environment(backend)
        for act, status, signals in (
            ("interrupt", 130, ["interrupt"]),
            ("terminate", 143, ["terminate"]),
            ("kill", 137, ["kill"]),
        ):
            async with env.open_process(["wait"]) as process:
                await getattr(process, act)()
                assert await process.wait() == status
            assert backend.processes.started[-1].signals == signals
            assert backend.processes.started[-1].returncode == status


async def test_trapped_signals_are_told_and_a_kill_comes_after_the_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def stubborn(process: ScriptedProcess) -> None:
        ended, interrupted = process.trap("terminate"), process.trap("interrupt")
        await interrupted.wait()
        process.write_stdout(b"interrupted")
        await ended.wait()
        process.write_stdout(b"told to end")
        await trio.sleep_forever()

    async with (
        testing.open_fake_environment({"stubborn": stubborn}) as env,
        env.open_process(["stubborn"]) as process,
    ):
        await trio.testing.wait_all_tasks_blocked()
        await process.interrupt()
        assert await process.stdout.receive_some() == b"interrupted"
        began = trio.current_time()
        receipt = await process.terminate(grace=5)
        assert trio.current_time() - began == 5
        assert await process.stdout.receive_some() == b"told to end"
        assert await process.wait() == 137
        assert len(receipt.signalled) == 1


async def test_what_a_program_leaves_behind_goes_on_printing(autojump_clock: trio.testing.MockClock) -> None:
    async def daemon(process: ScriptedProcess) -> None:
        process.write_stdout(b"early")
        process.exit(3)
        await trio.sleep(10)
        process.write_stdout(b"late")

    async with (
        testing.open_fake_environment({"daemon": daemon}) as env,
        env.open_process(["daemon"]) as process,
    ):
        assert await process.wait() == 3
        assert trio.current_time() < 10
        assert [chunk.data async for chunk in process] == [b"early", b"late"]


async def test_terminal_has_one_stream_a_size_and_keys(autojump_clock: trio.testing.MockClock) -> None:
    async def shell(process: ScriptedProcess) -> int:
        interrupted = process.trap("interrupt")
        process.write_stderr(b"$ ")
        while line := await process.read_line():
            process.write_stdout(b"%d %s" % (process.size[1], line))
        return 7 if interrupted.is_set() else 0

    async with (
        testing.open_fake_environment({"sh": shell}) as env,
        env.open_process(["sh"], tty=True) as process,
    ):
        assert process.stdin is not None
        await process.resize(40, 132)
        await process.stdin.send_all(b"ls\x03\n")
        await process.stdin.aclose()
        text = b"".join([chunk.data async for chunk in process])
        assert text == b"$ 132 ls\n"
        assert await process.wait() == 7


async def test_writer_waits_for_a_program_that_reads_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        testing.open_fake_environment({"wait": wait_for_ever}) as env,
        env.open_process(["wait"], stdin=True) as process,
    ):
        assert process.stdin is not None
        with trio.move_on_after(1) as scope:
            for _ in range(1000):
                await process.stdin.send_all(b"x")
        assert scope.cancelled_caught


async def test_program_that_gives_up_reading_a_line_gets_it_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def impatient(process: ScriptedProcess) -> None:
        with trio.move_on_after(1):
            await process.read_line()
        process.write_stdout(b"waiting\n")
        process.write_stdout(await process.read_line() + await process.read_line())

    async with (
        testing.open_fake_environment({"impatient": impatient}) as env,
        env.open_process(["impatient"], stdin=True) as process,
    ):
        assert process.stdin is not None
        await process.stdin.send_all(b"one li")
        assert await process.stdout.receive_some() == b"waiting\n"
        await process.stdin.send_all(b"ne\nand")
        await process.stdin.aclose()
        assert await process.stdout.receive_some() == b"one line\nand"


async def test_files_of_a_fake_environment_fail_as_files_do() -> None:
    async with testing.open_fake_backend(files={"/work/a": "text", "/work/deep/b": b"bytes"}) as backend:
        env = Environment(backend)
        await env.path("/work/deep/c").write_bytes(b"new")
        assert backend.files.content("/work/deep/c") == b"new"
        assert sorted(path.name for path in await env.path("/work/deep").iterdir()) == ["b", "c"]
        backend.files.errors["/work/locked"] = errno.EACCES
        for path, error in (
            ("/work/missing", FileNotFoundError),
            ("/work/a/b", NotADirectoryError),
            ("/work/deep", IsADirectoryError),
            ("/work/locked", PermissionError),
        ):
            with pytest.raises(error) as caught:
                await env.files.read_file(path)
            assert caught.value.filename == path
        with pytest.raises(OSError, match="not empty"):
            await env.path("/work/deep").rmdir()
        with pytest.raises(FileExistsError):
            await env.path("/work/deep").mkdir()


Step = Callable[[FileSystem, PathUri], Awaitable[object]]
WALK = WalkOptions(U64(8), U64(8), U64(8), follow_directory_symlinks=True, prune_hidden_directories=True)
STEPS: tuple[Step, ...] = (
    lambda f, p: f.write_file(p.join("a"), b"one"),
    lambda f, p: f.write_file(p.join("a"), b"other"),
    lambda f, p: f.read_file(p.join("a")),
    lambda f, p: f.read_file(p.join("missing")),
    lambda f, p: f.read_file(p.join("a/b")),
    lambda f, p: f.read_file(p),
    lambda f, p: f.write_file(p.join("missing/a"), b""),
    lambda f, p: f.write_file(p.join("a/b"), b""),
    lambda f, p: f.create_directory(p.join("d/e/f")),
    lambda f, p: f.create_directory(p.join("d/e/f")),
    lambda f, p: f.create_directory(p.join("d/e"), recursive=False),
    lambda f, p: f.create_directory(p.join("x/y"), recursive=False),
    lambda f, p: f.create_directory(p.join("a")),
    lambda f, p: f.create_directory(p.join("a/b")),
    lambda f, p: f.create_directory(p.join("a/b"), recursive=False),
    lambda f, p: f.write_file(p.join("d/e/g"), b"g"),
    lambda f, p: f.write_file(p.join("d/.hidden"), b""),
    lambda f, p: f.create_directory(p.join(".h/inner")),
    lambda f, p: f.walk(p, WALK),
    lambda f, p: f.walk(p.join("a"), WALK),
    lambda f, p: f.walk(p.join("missing"), WALK),
    lambda f, p: f.walk(p, evolve(WALK, max_entries=U64(2))),
    lambda f, p: f.walk(p, evolve(WALK, max_directories=U64(2))),
    lambda f, p: f.walk(p, evolve(WALK, max_depth=U64(0))),
    lambda f, p: f.walk(p, evolve(WALK, max_depth=U64(0), max_directories=U64(0))),
    lambda f, p: f.copy(p.join("d"), p.join("copy"), recursive=True),
    lambda f, p: f.copy(p.join("d"), p.join("other"), recursive=False),
    lambda f, p: f.copy(p.join("d"), p.join("d/e/inside"), recursive=True),
    lambda f, p: f.copy(p.join("missing"), p.join("other"), recursive=True),
    lambda f, p: f.copy(p.join("a"), p.join("copied"), recursive=False),
    lambda f, p: f.read_file(p.join("copy/e/g")),
    lambda f, p: f.remove(p.join("copy"), recursive=False),
    lambda f, p: f.remove(p.join("copy")),
    lambda f, p: f.remove(p.join("copy"), force=False),
    lambda f, p: f.remove(p.join("copy")),
    lambda f, p: f.remove(p.join("a/b"), force=True),
    lambda f, p: f.rename(p.join("a"), p.join("moved")),
    lambda f, p: f.rename(p.join("a"), p.join("moved")),
    lambda f, p: f.rename(p.join("moved"), p.join("d")),
    lambda f, p: f.rename(p.join("d"), p.join("moved")),
    lambda f, p: f.rename(p.join("d"), p.join("d/e/inside")),
    lambda f, p: f.rename(p.join(".h"), p.join("d")),
    lambda f, p: f.rename(p.join("moved"), p.join("missing/a")),
    lambda f, p: f.set_metadata(p.join("moved"), mode=0o640, modified_at_ms=1_000),
    lambda f, p: f.set_metadata(p.join("missing"), mode=0o640),
    lambda f, p: _facts(f, p.join("moved")),
    lambda f, p: _facts(f, p.join("d")),
    lambda f, p: _facts(f, p.join("missing")),
    lambda f, p: _in_blocks(f, p.join("blocks"), "replace"),
    lambda f, p: _in_blocks(f, p.join("blocks"), "update"),
    lambda f, p: _in_blocks(f, p.join("d"), "replace"),
    lambda f, p: f.open(p.join("missing")),
    lambda f, p: f.open(p),
    lambda f, p: f.canonicalize(p.join("d")),
    lambda f, p: f.canonicalize(p.join("missing")),
    lambda f, p: f.read_directory(p.join("moved")),
    lambda f, p: _names(f, p),
)


async def _facts(files: FileSystem, path: PathUri) -> object:
    found = await files.get_metadata(path)
    size = found.size if found.is_file else 0
    return found.is_file, found.is_directory, size, found.is_file and (found.mode, found.modified_at_ms)


async def _in_blocks(files: FileSystem, path: PathUri, mode: OpenMode) -> object:
    handle = await files.open(path, mode)
    await handle.write(3, b"abc")
    await handle.close()
    await handle.close()
    reader = await files.open(path)
    try:
        return [await reader.read(offset, 4) for offset in (0, 4, 100)]
    finally:
        await reader.close()


async def _names(files: FileSystem, path: PathUri) -> object:
    return sorted((e.file_name, e.is_directory, e.is_file) for e in await files.read_directory(path))


async def test_files_in_memory_do_as_files_on_disk_do(tmp_path: Path) -> None:
    real, fake = LocalFileSystem(MOUNTS), testing.MemoryFileSystem({}, [str(tmp_path)])
    top = PathUri.from_native(str(tmp_path))
    for number, step in enumerate(STEPS):
        outcomes = []
        for disk in (real, fake):
            try:
                outcomes.append(await step(disk, top))
            except OSError as error:
                outcomes.append((type(error), error.errno, os.fsdecode(error.filename)))
        assert outcomes[0] == outcomes[1], f"step {number}"


async def test_watch_of_files_in_memory_tells_what_comes_and_what_changes() -> None:
    files = testing.MemoryFileSystem({"/work/a": "x"})
    here, there = PathUri.from_native("/work/a"), PathUri.from_native("/work/b")
    async with files.watch_missing((here,)) as watch:
        assert watch is None
    async with files.watch_missing((), there) as watch:
        assert watch is None
    for changed in (here, there):
        async with files.watch_missing((there,), here) as watch, trio.open_nursery() as nursery:
            assert watch is not None
            nursery.start_soon(watch.wait)
            await trio.testing.wait_all_tasks_blocked()
            assert nursery.child_tasks
            await files.write_file(changed, b"y")


async def test_program_and_its_user_see_the_same_files() -> None:
    async def copy(process: ScriptedProcess) -> None:
        data = process.files.content(process.argv[1])
        await process.files.write_file(execenv.PathUri.parse(process.argv[2]), data)

    async with testing.open_fake_environment({"cp": copy}, files={"/work/a": "text"}) as env:
        await env.run(["cp", "/work/a", "/work/b"])
        assert await env.path("/work/b").read_text() == "text"


async def test_environment_of_a_program_is_made_by_the_policy() -> None:
    async def show(process: ScriptedProcess) -> None:
        process.write_stdout(json.dumps([process.cwd, process.env]).encode())

    async with testing.open_fake_environment({"env": show}, variables={"A": "1", "B": "2"}) as env:
        done = await env.run(["env"], extra_env={"B": "3"}, cwd="/tmp")
        assert json.loads(done.stdout or b"") == ["/tmp", {"A": "1", "B": "3"}]


async def test_http_is_a_function(autojump_clock: trio.testing.MockClock) -> None:
    async def answer(params: Any) -> testing.FakeResponse:
        if params.url.endswith("/slow"):
            await trio.sleep_forever()
        return testing.FakeResponse(201, (b"a", b"b"), {"x-method": params.method})

    async with testing.open_fake_environment(http=answer) as env:
        response = await env.http.request("PUT", "http://host/")
        assert (response.status, response.body, response.header("X-Method")) == (201, b"ab", "PUT")
        with pytest.raises(execenv.HttpFailed) as caught:
            await env.http.request("GET", "http://host/slow", timeout=5)
        assert caught.value.kind == "timeout"


# Recordings.


async def test_what_is_carried_is_recorded_without_its_secrets(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder(secrets=["hush"], texts={"/work": "/somewhere"})
    async with open_memory_server(partial(open_fake_backend, {"say": say}), recorder=recorder) as server:
        async with open_dialled(server.dial) as env:
            session_id = env.session_id
            assert session_id is not None
            await env.run(["say", "hush", session_id], extra_env={"API_KEY": "open sesame"})
        with pytest.raises(ConnectFailed):
            async with open_dialled(server.dial, session_id[1:]):
                pass
    recording = recorder.recording
    assert recording.connections == [0, 1]
    methods = [line.msg.get("method") for line in recording.lines if line.sent]
    assert methods[:3] == ["initialize", "initialized", "process/start"]
    assert [line.conn for line in recording.lines if line.is_end] == [0, 1]
    printed = [
        b64decode(line.msg["params"]["chunk"])
        for line in recording.lines
        if line.is_notification and line.msg["method"] == "process/output"
    ]
    assert printed == [b"secret-1\n", b"session-1\n"]
    for secret in ("hush", session_id, session_id[1:], "open sesame", "/work"):
        assert secret not in recording.text


async def test_recording_is_read_back(tmp_path: Path) -> None:
    recording = Recording.load("run")
    recording.save(tmp_path / "copy.jsonl")
    assert Recording.load(tmp_path / "copy.jsonl") == recording
    assert Recording.parse(recording.text) == recording
    moved = Recording.load("run", {"recorded": "moved"})
    assert "recorded" in recording.text
    assert moved.text == recording.text.replace("recorded", "moved").replace("cmVjb3JkZWQK", "bW92ZWQK")
    with pytest.raises(FileNotFoundError):
        Recording.load("no-such-recording")


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not here")
def test_recordings_of_the_reference_are_read_and_written_as_they_are() -> None:
    names = sorted(TRACES.glob("*.jsonl"))
    assert names
    for name in names:
        recording = Recording.load(name)
        assert [json.loads(line) for line in recording.text.splitlines()] == [
            json.loads(line) for line in name.read_text().splitlines()
        ]


async def test_client_is_answered_as_recorded(autojump_clock: trio.testing.MockClock) -> None:
    async with open_replay_server(Recording.load("run")) as server:
        async with open_dialled(server.dial) as env:
            done = await env.run(["say", "recorded"], check=False)
        assert (done.stdout, done.stderr, done.returncode) == (b"recorded\n", b"a warning\n", 1)
        assert server.missing == []
        with pytest.raises(ConnectFailed, match="no more"):
            async with open_dialled(server.dial):
                pass


async def test_recorded_conversation_over_two_connections_is_played_with_other_names(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_replay_server(Recording.load("resume")) as server, trio.open_nursery() as nursery:
        async with server.dial() as channel:
            ear = Ear(channel)
            nursery.start_soon(ear.listen)
            ear.send({"id": 10, "method": "initialize", "params": {"clientName": "another"}})
            ear.send({"method": "initialized", "params": {}})
            params = {"argv": ["say", "one", "two"], "cwd": "file:///work", "env": {}, "tty": False}
            params |= {"processId": "mine", "pipeStdin": True}
            ear.send({"id": 11, "method": "process/start", "params": params})
            await ear.ended.wait()
            assert [m.get("id", m.get("method")) for m in ear.messages] == [10, 11, "process/output"]
            assert [m["params"]["processId"] for m in ear.messages[2:]] == ["mine"]
            session_id = ear.messages[0]["result"]["sessionId"]
        async with server.dial() as channel:
            ear = Ear(channel)
            nursery.start_soon(ear.listen)
            params = {"clientName": "another", "resumeSessionId": session_id}
            ear.send({"id": 1, "method": "initialize", "params": params})
            ear.send({"method": "initialized", "params": {}})
            ear.send({"id": 12, "method": "process/read", "params": {"processId": "mine", "afterSeq": 1}})
            assert [m["id"] for m in await ear.wait(2)] == [1, 12]
            params = {"processId": "mine", "chunk": "bGluZQo=", "writeId": "w"}
            ear.send({"id": 13, "method": "process/write", "params": params})
            *_, reply, event = await ear.wait(4)
            assert reply == {"id": 13, "result": {"status": "accepted"}}
            assert (event["method"], event["params"]["seq"]) == ("process/output", 3)
            assert event["params"]["processId"] == "mine"
            assert server.missing == []


async def test_request_that_was_not_recorded_is_told_to_client_and_test(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(UsageError, match="environment/status came, and the recording has process/start"):
        async with open_replay_server(Recording.load("run")) as server, open_dialled(server.dial) as env:
            with pytest.raises(execenv.RpcError, match="not as recorded: environment/status came"):
                await env.probe()


@pytest.mark.parametrize("name", ["run", "resume"])
def test_recordings_of_the_package_have_nothing_of_a_machine(name: str) -> None:
    text = Recording.load(name).text
    assert '"session-1"' in text
    assert "/tmp/" not in text.replace("file:///tmp", "")


# The package.


def test_importing_the_tools_imports_nothing_heavy() -> None:
    code = "import sys, execenv.testing; print([n for n in ('trio', 'attrs', 'h11') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", testing.__all__)
def test_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(testing, name)
    assert value.__doc__ or name == "Fault"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        testing.Nothing  # noqa: B018
    assert dir(testing) == sorted(testing.__all__)


# The contract, as far as it needs no shell.


async def cat(process: ScriptedProcess) -> None:
    while data := await process.read_stdin():
        await process.send_stdout(data)


async def echo(process: ScriptedProcess) -> None:
    process.write_stdout(" ".join(process.argv[1:]).encode() + b"\n")


async def printf(process: ScriptedProcess) -> None:
    process.write_stdout(process.argv[1].encode())


async def head(process: ScriptedProcess) -> None:
    data = b""
    while len(data) < int(process.argv[2]):
        data += await process.read_stdin()
    process.write_stdout(data[: int(process.argv[2])])


async def sleep(process: ScriptedProcess) -> None:
    await trio.sleep(float(process.argv[1]))


async def true(process: ScriptedProcess) -> None:
    await trio.lowlevel.checkpoint()


PROGRAMS = {script.__name__: script for script in (cat, echo, printf, head, sleep, true)}
CONTRACT = (
    test_run.test_run_without_capture_gives_no_output,
    test_run.test_unknown_program_is_not_started,
    test_run.test_missing_working_directory_is_not_started,
    test_run.test_argv_as_one_string_is_a_usage_error,
    test_run.test_complete_environment_with_a_policy_is_a_usage_error,
    test_run.test_error_of_the_block_comes_out_as_itself,
    test_input.test_input_is_delivered_with_an_end_of_file,
    test_input.test_large_input_is_delivered_whole,
    test_input.test_program_may_read_only_the_start_of_its_input,
    test_input.test_without_input_stdin_is_at_end_of_file,
    test_input.test_process_opened_without_stdin_has_none,
    test_input.test_closing_stdin_ends_it_behind_all_that_was_sent,
    test_input.test_input_and_output_alternate,
    test_input.test_many_small_writes_arrive_in_order,
    test_input.test_sending_to_an_ended_process_says_broken,
    test_input.test_sender_held_back_by_the_process_is_released_by_its_end,
    test_output.test_stream_gives_no_more_than_is_asked_for,
    test_output.test_closed_stream_gives_nothing,
    test_output.test_two_readers_of_one_stream_are_a_usage_error,
    test_output.test_cancelled_reader_loses_nothing,
)


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("test_"))
async def test_fake_environment_keeps_the_contract(
    check: Callable[[Environment], Awaitable[None]], served: bool
) -> None:
    with trio.fail_after(TIME_LIMIT):
        if not served:
            async with testing.open_fake_environment(PROGRAMS) as env:
                await check(env)
            return
        async with (
            open_memory_server(partial(open_fake_backend, PROGRAMS)) as server,
            open_dialled(server.dial) as env,
        ):
            await check(env)


async def test_half_open_connection_is_given_up_when_its_client_comes_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with (
        open_memory_server(partial(open_fake_backend, {"wait": wait_for_ever})) as server,
        server.dial() as channel,
        trio.open_nursery() as nursery,
    ):
        first = Ear(channel)
        nursery.start_soon(first.listen)
        first.send({"id": 1, "method": "initialize", "params": {"clientName": "x"}})
        (reply,) = await first.wait(1)
        server.cut("client")
        params = {"clientName": "x", "resumeSessionId": reply["result"]["sessionId"]}
        async with server.dial() as channel:
            second = Ear(channel)
            nursery.start_soon(second.listen)
            second.send({"id": 1, "method": "initialize", "params": params})
            assert (await second.wait(1))[0]["error"]["code"] == -32010
            await trio.sleep(6)
            second.send({"id": 2, "method": "initialize", "params": params})
            assert (await second.wait(2))[1]["result"] == reply["result"]
