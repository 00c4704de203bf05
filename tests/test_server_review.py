"""What a hostile reader of the server and of the testing tools has found, each mended since."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import trio
from attrs import evolve
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from execenv import ConnectionLost, Environment
from execenv.abc import Event, Output, Sink
from execenv.paths import PathUri
from execenv.remote.connection import open_remote
from execenv.remote.processes import RemoteProcess
from execenv.remote.session import Recovery, Tries
from execenv.server import processes
from execenv.testing import MemoryFileSystem, ScriptedProcess, open_fake_backend, open_memory_server
from execenv.testing.faults import FrameLog
from execenv.testing.proxy import FrameSplitter
from execenv.transports._frames import FrameCodec, Ping
from execenv.transports._pump import StreamIO
from execenv.transports.websocket import WebsocketChannel
from tests.soak import Result, Wrong, run_one
from tests.test_sessions import open_server, seqs, start

KIB = 1024
MIB = 1024 * KIB

# Slow readers. Kernels take what is sent, here the memory stream does; that says nothing of who reads it.


async def ends_at(*, size: int, reads: int) -> float:
    """When a server ends a connection over which it has sent `size` bytes, to a client that reads so many in
    a second, and answers the pings among them. 1000 if it did not."""
    ours, theirs = memory_stream_pair()
    channel = WebsocketChannel("test", StreamIO(theirs), client=False, leftover=b"")
    codec = FrameCodec(client=True, max_message=1 << 30)

    async def read() -> None:
        while data := await ours.receive_some(reads):
            for event in codec.receive(data):
                if isinstance(event, Ping):
                    await ours.send_all(codec.encode_pong(event.payload))
            await trio.sleep(1)

    with trio.move_on_after(1000):
        async with trio.open_nursery() as nursery:
            if reads:
                nursery.start_soon(read)
            channel.send_nowait(bytes(size))
            await channel.run(lambda _: None)
            nursery.cancel_scope.cancel()
    return trio.current_time()


@pytest.mark.parametrize("size", [40 * KIB, 100 * KIB, 300 * KIB])
async def test_client_that_reads_a_kibibyte_in_a_second_is_not_dropped(
    size: int, autojump_clock: MockClock
) -> None:
    assert await ends_at(size=size, reads=1100) == pytest.approx(1000)


@pytest.mark.parametrize(("size", "ends"), [(100, 90), (128 * KIB, 150), (1 << 26, 630)])
async def test_client_that_has_stopped_is_dropped_later_if_there_was_much_to_read(
    size: int, ends: float, autojump_clock: MockClock
) -> None:
    assert await ends_at(size=size, reads=0) == pytest.approx(ends, abs=1)


async def test_client_that_has_read_all_and_falls_silent_is_dropped_after_one_timeout(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = memory_stream_pair()
    channel = WebsocketChannel("test", StreamIO(theirs), client=False, leftover=b"")
    codec = FrameCodec(client=True, max_message=1 << 30)

    async def answer_one() -> None:
        while data := await ours.receive_some():
            for event in codec.receive(data):
                if isinstance(event, Ping):
                    await ours.send_all(codec.encode_pong(event.payload))
                    return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_one)
        channel.send_nowait(bytes(1 << 20))
        await channel.run(lambda _: None)
    assert trio.current_time() == pytest.approx(30 + 30 + 60)
    assert channel.loss == "no answer to a ping within 60 s"


# Windows.


async def test_windows_of_one_session_are_bounded_together(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_WINDOWS", 20 * MIB)

    async def retained_by_a_writer(name: str) -> int:
        await client.call("process/start", **start(name, outputWindow=1 << 40))
        nursery.start_soon(server.process(name).emit_all, bytes(16 * KIB), 2000)
        await wait_all_tasks_blocked()
        return server.process(name).retained // MIB

    async with open_server() as server, trio.open_nursery() as nursery:
        client, session_id = await server.open()
        assert [await retained_by_a_writer(name) for name in "abcd"] == [15, 3, 2, 2]
        await client.lose()
        client, _ = await server.open(session_id)
        for name in "abcd":  # who has had a larger one keeps it
            window = {"processId": name, "seq": 0, "window": 1 << 40}
            client.notify("process/outputTaken", params=window)
        assert await retained_by_a_writer("e") == 2
        for name in "ab":
            server.process(name).exit()
            server.process(name).close()
        client.notify("process/outputTaken", params={"processId": "a", "seq": 0, "window": 1 << 40})
        assert await retained_by_a_writer("f") == 13
        assert server.process("a").retained >= 15 * MIB
        nursery.cancel_scope.cancel()


async def test_process_that_keeps_more_than_all_may_together_is_still_read(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_RETAINED", 512 * KIB)
    async with open_server() as server:
        client, _ = await server.open()
        for name in "ab":
            await client.call("process/start", **start(name))
            server.process(name).emit(bytes(MIB))
            server.process(name).exit()
            server.process(name).close()
            assert seqs(await client.call("process/read", processId=name)) == [1]
        assert seqs(await client.call("process/read", processId="a")) == []


# Sessions that end with an error.


async def test_client_whose_session_ended_with_an_error_gets_another_one(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    runs = 0

    async def program(process: ScriptedProcess) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ZeroDivisionError

    open_backend = partial(open_fake_backend, {"x": program})
    async with (
        open_memory_server(open_backend) as server,
        open_remote(server.dial, "memory", redial=True, recovery=Recovery()) as remote,
    ):
        env = Environment(remote)
        with trio.fail_after(1000):
            for _ in range(2):
                with suppress(ConnectionLost):  # it is told so once, sooner or later
                    await env.run(["x"], check=False)
            assert (await env.run(["x"])).returncode == 0
        assert server.connections > 1
    assert "a session ended with an error" in caplog.text


# The proxy of faults.


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\n\r\n\x81\x04no", ["http", "other"]),
        (b"HTTP/1.1 200 OK\r\n\r\nUpgrade: websocket\r\n", ["http", "other"]),
    ],
)
def test_proxy_tells_an_upgrade_from_a_refusal_that_names_it(answer: bytes, kinds: list[str]) -> None:
    frames = FrameSplitter(FrameLog(1), "to_client").feed(answer)
    assert [frame.kind for frame, _ in frames] == kinds
    assert b"".join(data for _, data in frames) == answer


def test_proxy_knows_an_upgrade_however_it_is_written() -> None:
    for upgrade in (b"Upgrade:WebSocket", b"upgrade: \twebsocket "):
        head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n" + upgrade + b"\r\n\r\n"
        frames = FrameSplitter(FrameLog(1), "to_client").feed(head + b"\x89\x00\x89")
        assert [frame.kind for frame, _ in frames] == ["http", "ping"]


# The soak: a check that cannot fail is none.


def every(count: int) -> Callable[[], bool]:
    """Whether it is the turn of the call that is to be spoilt, the last of so many."""
    numbers = itertools.count(1)
    return lambda: next(numbers) % count == 0


def damage_output(patch: pytest.MonkeyPatch, damaged: Callable[[Output], list[Output]]) -> None:
    """Have the client hand out something else, once in 40 times, than it has received."""
    passes_on, is_due = RemoteProcess._pass_on, every(40)

    class Damaged:
        def __init__(self, sink: Sink) -> None:
            self._sink = sink

        @property
        def full(self) -> bool:
            return self._sink.full

        async def wait_room(self) -> None:
            await self._sink.wait_room()

        def put(self, event: Event) -> None:
            if isinstance(event, Output) and len(event.data) > 10 and is_due():
                for each in damaged(event):
                    self._sink.put(each)
            else:
                self._sink.put(event)

    def pass_on(self: RemoteProcess, event: Event, seq: int) -> None:
        sinks = self._sinks
        self._sinks = [Damaged(sink) for sink in sinks]
        passes_on(self, event, seq)
        self._sinks = sinks

    patch.setattr(RemoteProcess, "_pass_on", pass_on)


def drop_output(patch: pytest.MonkeyPatch) -> None:
    damage_output(patch, lambda event: [])


def double_output(patch: pytest.MonkeyPatch) -> None:
    damage_output(patch, lambda event: [event, event])


def swap_two_bytes(patch: pytest.MonkeyPatch) -> None:
    damage_output(patch, lambda event: [evolve(event, data=event.data[:-2] + event.data[:-3:-1])])


def lose_a_write(patch: pytest.MonkeyPatch) -> None:
    write, is_due = RemoteProcess.write, every(40)

    async def lose(self: RemoteProcess, data: bytes, write_id: str) -> str:
        return "accepted" if is_due() else await write(self, data, write_id)

    patch.setattr(RemoteProcess, "write", lose)


def forget_write_ids(patch: pytest.MonkeyPatch) -> None:
    write = ScriptedProcess.write_nowait

    def forget(self: ScriptedProcess, data: bytes, write_id: str) -> str | None:
        self._write_ids.clear()
        return write(self, data, write_id)

    patch.setattr(ScriptedProcess, "write_nowait", forget)


def deny_what_was_sent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tries, "outcome", "not sent")


def make_no_directory(patch: pytest.MonkeyPatch) -> None:
    async def nothing(self: MemoryFileSystem, path: PathUri, **options: object) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(MemoryFileSystem, "create_directory", nothing)


@pytest.mark.parametrize(
    "damage",
    [
        drop_output,
        double_output,
        swap_two_bytes,
        lose_a_write,
        forget_write_ids,
        deny_what_was_sent,
        make_no_directory,
    ],
)
def test_soak_notices(damage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    result = Result()
    with pytest.raises((Wrong, BaseExceptionGroup)):
        for seed in range(1000, 1030):
            run_one(seed, result)
    assert result.lost + result.duplicated + result.wrong > 0
