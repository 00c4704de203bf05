"""What a client that loses its connection must not do: cases that a review of the recovery found."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import cycle

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from execenv import (
    ConnectFailed,
    ConnectionLost,
    Environment,
    OutputGap,
    ProcessNotStarted,
    SandboxProfile,
    fail_fast,
)
from execenv.errors import SessionAttached
from execenv.process import Inbox
from execenv.remote.connection import open_remote
from execenv.remote.processes import RemoteProcess
from execenv.remote.session import Recovery
from execenv.transports import websocket
from execenv.transports.channel import Channel
from execenv.transports.memory import MemoryChannel, memory_pair
from tests.fakes import FakeProcess
from tests.test_recovery import (
    AFTER,
    BEFORE,
    FILES,
    Network,
    end,
    open_network,
    read_all,
    state,
)

QUICK = Recovery(30, 0.001, 0.01)


# Starts.


async def test_start_under_a_name_in_use_is_refused_also_if_the_first_answer_is_lost(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        await env.start_detached("dev", ["x"])
        child = network.process()
        for where in (BEFORE, AFTER):
            network.drop_once(b"already exists", where, from_server=True)
            with pytest.raises(ProcessNotStarted, match="already exists") as caught:
                await env.start_detached("dev", ["y"])
            assert caught.value.outcome == "not done"
        assert child.signals == []


async def test_two_starts_under_one_name_are_one_whatever_is_lost(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        results: list[str] = []

        async def start() -> None:
            try:
                await env.start_detached("dev", ["x"])
                results.append("started")
            except ProcessNotStarted:
                results.append("refused")

        network.environment.fakes.may_start = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            nursery.start_soon(start)
            await wait_all_tasks_blocked()
            network.cut()
            await wait_all_tasks_blocked()
            network.environment.fakes.may_start.set()
        assert sorted(results) == ["refused", "started"]
        await env.start_detached("other", ["x"])


async def test_cancelled_start_under_a_name_in_use_leaves_the_other_alone(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await env.start_detached("dev", ["x"])
        child = network.process()
        network.reachable = False
        network.drop = lambda data, from_server: BEFORE if b"dev" in data else None
        with trio.move_on_after(1):
            await env.start_detached("dev", ["y"])
        network.drop = lambda data, from_server: None
        network.reachable = True
        assert await env.probe() == "ready"
        await trio.sleep(10)
        assert child.signals == []


async def test_start_that_failed_fast_after_it_was_sent_is_ended_later(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await env.info()
        network.drop_once(b'"sandboxType"', BEFORE, from_server=True)
        with fail_fast(), pytest.raises(ConnectionLost) as caught:
            await env.run(["x"])
        assert caught.value.outcome == "unknown"
        child = network.process()
        await trio.sleep(5)
        assert child.signals == ["terminate"]


async def test_start_that_is_cancelled_while_recovering_and_fails_fast_is_ended_later(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        await env.info()
        network.environment.fakes.may_start = trio.Event()
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with fail_fast():
                    await env.run(["x"])

            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            network.links[-1].send_nowait = lambda *parts: None  # type: ignore[method-assign]
            network.environment.fakes.may_start.set()
            nursery.cancel_scope.cancel()
        network.cut()
        await trio.sleep(5)
        assert network.process().signals == ["terminate"]


async def test_start_under_a_name_that_could_not_be_asked_for_was_not_sent(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await env.info()

        def drop(data: bytes, from_server: bool) -> str | None:
            if from_server or b"process/read" not in data:
                return None
            network.reachable = False
            return AFTER

        network.drop = drop
        with pytest.raises(ConnectionLost, match="recovery timed out") as caught:
            await env.start_detached("dev", ["x"])
        assert caught.value.outcome == "not sent"
        assert network.environment.fakes.started == {}


# Ends.


async def test_leaving_a_process_under_fail_fast_while_recovering_ends_it_later(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        with fail_fast(), pytest.raises(ConnectionLost, match="recovering") as caught:
            async with env.open_process(["x"]):
                child = network.process()
                network.reachable = False
                network.cut()
                await wait_all_tasks_blocked()
        assert caught.value.outcome == "unknown"  # since it is done later
        network.reachable = True
        await trio.sleep(5)
        assert child.signals == ["terminate"]


async def test_process_left_over_a_connection_that_is_half_open_is_ended_later(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        with pytest.raises(ConnectionLost, match="did not confirm the end"):
            async with env.open_process(["x"]):
                child = network.process()
                network.links[-1].send_nowait = lambda *parts: None  # type: ignore[method-assign]
        assert child.signals == []
        network.cut()
        await trio.sleep(5)
        assert child.signals == ["terminate"]


async def test_end_that_is_caught_up_with_is_repeated_until_it_is_answered(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        with pytest.raises(ConnectionLost, match="did not confirm the end"):
            async with env.open_process(["x"]):
                child = network.process()
                network.reachable = False
                network.cut()
        network.drop_once(b"process/terminate", BEFORE)
        network.reachable = True
        await trio.sleep(5)
        assert child.signals == ["terminate"]


async def test_end_that_was_put_off_does_not_end_the_next_one_of_that_name(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await env.start_detached("dev", ["x"])
        child = network.process()
        async with env.attach("dev") as process:
            network.reachable = False
            network.cut()
            with trio.move_on_after(1):
                await process.kill()
        network.reachable = True
        await trio.sleep(5)
        assert child.signals == ["terminate"]
        await trio.sleep(100)  # the name is free
        await env.start_detached("dev", ["x"])
        assert network.process() is not child
        network.cut()
        await trio.sleep(5)
        assert network.process().signals == []


async def test_ending_what_is_lost_opens_no_other_session(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        with pytest.raises(ConnectionLost):
            async with env.open_process(["x"]):
                network.reachable = False
                await network.restart()
                await trio.sleep(50)
                with pytest.raises(ConnectFailed):
                    await env.probe()
                network.reachable = True
        assert len(network.host.opened) == 1


# Calls.


async def test_answer_that_the_transport_is_closed_counts_as_a_loss(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        _answer_closed(network)
        with trio.fail_after(100):
            assert await env.probe() == "ready"
        assert len(network.links) == 2


async def test_call_that_failed_fast_after_it_was_sent_does_not_say_not_sent(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env), env.open_process(["x"], stdin=True) as process:
        assert process.stdin is not None
        for word in (b"process/write", b"environment/status"):
            _answer_closed(network)
            with fail_fast(), pytest.raises(ConnectionLost) as caught:
                if word == b"process/write":
                    await process.stdin.send_all(b"x")
                else:
                    await env.probe()
            assert caught.value.outcome == "unknown"
            await trio.sleep(5)


def _answer_closed(network: Network) -> None:
    """Have the newest connection answer the next call as a server does that lost the one behind it."""
    link = network.links[-1]

    def send(*parts: bytes) -> None:
        id_ = b"".join(parts).partition(b'"id":')[2].partition(b",")[0]
        error = b'{"id":%s,"error":{"code":-32000,"message":"JSON-RPC transport closed"}}' % id_
        link._inbox.append(error)
        link._wakeup.set()

    link.send_nowait = send  # type: ignore[method-assign]


async def test_call_that_ends_every_connection_is_given_up_where_recovery_is_not(
    autojump_clock: MockClock,
) -> None:
    async with open_network(recovery=Recovery(math.inf)) as (network, env):
        network.drop = lambda data, from_server: BEFORE if b"environment/status" in data else None
        with trio.fail_after(1000), pytest.raises(ConnectionLost, match="given up after"):
            await env.probe()


# Files.


async def test_write_of_which_a_part_was_sent_does_not_say_not_sent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = str(tmp_path_factory.mktemp("folder") / "file")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=QUICK) as (network, env):
            for where in (BEFORE, AFTER):
                file = await env.files.open(path, "wb")
                network.drop_once(b"fs/writeBlock", where)
                with pytest.raises(ConnectionLost) as caught:
                    await file.write(bytes(3_000_000))
                assert caught.value.outcome == "unknown"
                with pytest.raises(ConnectionLost):
                    await file.aclose()


async def test_file_that_was_emptied_and_then_lost_does_not_say_not_sent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("folder") / "file"
    file.write_bytes(b"before")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=Recovery(0.2, 0.001, 0.01)) as (network, env):

            def drop(data: bytes, from_server: bool) -> str | None:
                if from_server or b"fs/writeBlock" not in data:
                    return None
                network.reachable = False
                network.drop = lambda data, from_server: None
                network.cut()
                return None

            network.drop = drop
            with pytest.raises((ConnectionLost, ConnectFailed)) as caught:
                await env.files.write_file(str(file), bytes(2_000_000))
            assert file.read_bytes() == b""
            assert caught.value.outcome == "unknown"


async def test_atomic_write_over_cuts_leaves_nothing_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("folder")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=QUICK) as (network, env):
            for word in (b"fs/open", b"fs/writeBlock", b"fs/close", b"fs/rename"):
                for where in (BEFORE, AFTER):
                    network.drop_once(word, where)
                    await env.files.write_file(str(folder / "file"), word, atomic=True)
                    assert (folder / "file").read_bytes() == word
                    assert [path.name for path in folder.iterdir()] == ["file"]


async def test_atomic_write_that_may_have_been_done_does_not_say_not_sent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("folder") / "file"
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=Recovery(0.2, 0.001, 0.01)) as (network, env):

            def drop(data: bytes, from_server: bool) -> str | None:
                if from_server or b"fs/rename" not in data:
                    return None
                network.reachable = False
                return AFTER

            network.drop = drop
            with pytest.raises((ConnectionLost, ConnectFailed)) as caught:
                await env.files.write_file(str(file), b"x", atomic=True)
            assert caught.value.outcome == "unknown"


async def test_error_of_the_block_of_a_file_comes_out_though_the_connection_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = str(tmp_path_factory.mktemp("folder") / "file")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=QUICK) as (network, env):
            with pytest.raises(ZeroDivisionError):
                async with await env.files.open(path, "wb"):
                    network.cut()
                    raise ZeroDivisionError
            with trio.CancelScope() as scope:
                async with await env.files.open(path, "wb"):
                    network.cut()
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert scope.cancelled_caught


async def test_closing_a_file_that_was_read_says_nothing_of_a_lost_connection(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("folder") / "file"
    file.write_bytes(b"content")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=QUICK) as (network, env):
            opened = await env.files.open(str(file), "rb")
            assert await opened.read() == b"content"
            network.cut()
            await opened.aclose()


# Failing fast.


async def test_output_of_a_process_that_was_attached_under_fail_fast_goes_on_over_a_cut(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        await env.start_detached("dev", ["x"])
        child = network.process()
        for _ in range(3):
            child.emit(bytes(300_000))
        with fail_fast():
            async with env.attach("dev") as process:
                network.drop_once(b"process/read", BEFORE)
                await wait_all_tasks_blocked()
                await trio.sleep(1)
                end(child, 0)
                assert await read_all(process) == bytes(900_000)


async def test_environment_opens_under_fail_fast_and_recovers_as_any(autojump_clock: MockClock) -> None:
    with fail_fast():
        async with open_network() as (network, env):
            assert await env.probe() == "ready"
            async with env.open_process(["x"]) as process:
                child = network.process()
                child.emit(b"one ")
                network.cut()
                child.emit(b"two")
                await wait_all_tasks_blocked()
                network.drop_once(b"process/read", BEFORE)
                network.cut()
                await trio.sleep(5)
                end(child, 0)
                assert await read_all(process) == b"one two"


# Connecting.


async def test_user_who_waits_for_a_connection_hears_when_the_environment_is_closed(
    autojump_clock: MockClock,
) -> None:
    with trio.fail_after(1000):
        for _ in range(20):  # in whatever order the tasks run
            async with (
                trio.open_nursery() as nursery,
                open_network(recovery=Recovery(1)) as (network, env),
            ):
                nursery.start_soon(_closed, env)
                with pytest.raises(ConnectionLost):
                    async with env.open_process(["x"]) as process:
                        network.reachable = False
                        network.cut()
                        await process.wait()


async def _closed(env: Environment) -> None:
    await trio.sleep(0.5)
    with pytest.raises((ConnectFailed, ConnectionLost)) as caught:
        await env.probe()
    assert caught.value.outcome == "not sent"


async def test_id_of_a_session_is_in_no_error(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        session_id = env.session_id
        assert session_id is not None
        async with open_remote(
            network.dial, "memory", redial=True, resume_session_id=session_id, connect=False
        ) as other:
            with pytest.raises(ConnectFailed, match="already attached") as refused:
                await other.session()
            _has_not(session_id, refused.value)
            assert isinstance(refused.value.__cause__, SessionAttached)
        lost = env.status
        with pytest.raises(ConnectionLost, match="unknown session id") as caught:
            async with env.open_process(["x"]) as process:
                for session in list(network.sessions._by_id.values()):
                    session.close()
                network.links[0].close_nowait()
                await process.wait()
        _has_not(session_id, caught.value)
        assert lost.error is not None
        _has_not(session_id, lost.error)
        assert session_id not in repr(env) + repr(env.status) + repr(process)


def _has_not(secret: str, error: BaseException | None) -> None:
    assert secret not in str(error) + repr(error)
    while error is not None:
        assert secret not in str(error)
        error = error.__cause__


async def test_server_that_drops_every_connection_is_asked_less_and_less_often(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, _):
        network.drop = lambda data, from_server: (
            AFTER if not from_server and b'"initialized"' in data else None
        )
        network.cut()
        await trio.sleep(60)
        assert 20 < len(network.attempts) < 60


async def test_user_who_waits_hears_that_it_was_closed_and_not_that_time_was_up(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery, open_network() as (network, env):

        async def probe() -> None:
            with pytest.raises(ConnectionLost, match="was closed") as caught:
                await env.probe()
            assert caught.value.outcome == "not sent"

        network.reachable = False
        network.cut()
        nursery.start_soon(probe)
        await trio.sleep(1)


async def test_connection_that_was_of_use_is_made_again_soon(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        for _ in range(50):
            assert await env.probe() == "ready"
            network.cut()
        assert trio.current_time() < 50 * 0.1


async def test_session_that_could_not_be_resumed_at_first_is_asked_for_again(
    autojump_clock: MockClock,
) -> None:
    async with open_network(recovery=None) as (network, env):
        await env.start_detached("dev", ["x"])
        session_id = env.session_id
        async with open_remote(
            network.dial, "memory", redial=True, resume_session_id=session_id, connect=False
        ) as other:
            with pytest.raises(ConnectFailed, match="already attached"):
                await other.probe()
            network.reachable = False
            network.links[0].close_nowait()
            with pytest.raises(ConnectFailed, match="nobody listens"):
                await other.probe()
            network.reachable = True
            assert await other.probe() == "ready"
            assert other.session_id == session_id


@pytest.mark.parametrize(
    ("url", "header"),
    [
        ("http://127.0.0.1:1", b""),
        ("ws://127.0.0.1:70000", b""),
        ("ws://127.0.0.1:1", b"with\nline"),
    ],
)
async def test_connection_that_can_never_be_made_is_not_tried_again(url: str, header: bytes) -> None:
    with pytest.raises(ConnectFailed) as caught:
        await websocket.connect(url, headers=[(b"Authorization", header)])
    assert not caught.value.retryable


@pytest.mark.parametrize(("status", "retryable"), [(401, False), (403, False), (404, True), (503, True)])
async def test_refusal_of_who_we_are_is_not_tried_again(status: int, retryable: bool) -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            with pytest.raises(ConnectFailed, match=str(status)) as caught:
                await websocket.connect(f"ws://127.0.0.1:{port}")
            assert caught.value.retryable is retryable
            nursery.cancel_scope.cancel()


async def test_notification_that_makes_no_sense_ends_the_connection_and_nothing_else(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        for params in (b'{"requestId":"http-1","seq":1,"deltaBase64":5}', b"[]", b"null", b'{"processId":1}'):
            for name in (
                b"http/request/bodyDelta",
                b"process/output",
                b"process/exited",
                b"fs/missingChanged",
            ):
                link = network.links[-1]
                link._inbox.append(b'{"method":"%s","params":%s}' % (name, params))
                link._wakeup.set()
                await trio.sleep(2)
                assert await env.probe() == "ready"


# What is said of what was under way.


async def test_program_whose_environment_is_closed_does_not_say_not_sent(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery, open_network() as (network, env):

        async def run() -> None:
            with pytest.raises(ConnectionLost, match="closed") as caught:
                await env.run(["x"])
            assert caught.value.outcome == "unknown"

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        assert network.process()


async def test_input_of_which_a_part_was_taken_does_not_say_not_sent(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        with pytest.raises(ConnectionLost):
            async with env.open_process(["x"], stdin=True) as process:
                assert process.stdin is not None
                child = network.process()

                def drop(data: bytes, from_server: bool) -> str | None:
                    if not from_server and b"process/write" in data and child.written:
                        network.reachable = False
                        network.cut()
                        raise ConnectionLost("lost", "not sent")
                    return None

                network.drop = drop
                with fail_fast(), pytest.raises(ConnectionLost) as caught:
                    await process.stdin.send_all(bytes(600_000))
                assert caught.value.outcome == "unknown"
                assert len(child.written) == 1


async def test_output_that_the_server_forgot_before_it_was_read_is_a_gap_and_the_exit_follows(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        child = network.process()
        for _ in range(20):
            child.emit(bytes(1024 * 1024))
            await wait_all_tasks_blocked()
        end(child, 3)
        await trio.sleep(200)
        read, gaps = 0, []
        while True:
            try:
                async for chunk in process:
                    read += len(chunk.data)
                break
            except OutputGap as gap:
                gaps.append((gap.from_seq, gap.to_seq))
        assert await process.wait() == 3
        [(first, last)] = gaps
        assert read == (first - 1) * 1024 * 1024
        assert last == 20


async def test_write_to_a_process_that_is_starting_yet_is_repeated(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another make of server has it, where the answer to a start was lost and the start goes on (§4.6)."""
    answers = ["starting", "starting"]
    accept = FakeProcess.write_nowait

    def write(process: FakeProcess, data: bytes, write_id: str) -> str | None:
        return answers.pop() if answers else accept(process, data, write_id)

    monkeypatch.setattr(FakeProcess, "write_nowait", write)
    async with open_network() as (network, env), env.open_process(["x"], stdin=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"one")
        assert network.process().written == [b"one"]
        assert answers == []


async def test_process_that_is_silent_yet_is_attached_to_without_reading_it(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        await env.start_detached("dev", ["x"])
        child = network.process()
        async with env.attach("dev") as process:
            child.reads = 0  # what was not pushed would not come
            child.emit(b"pushed")
            assert (await anext(process)).data == b"pushed"
            child.reads = math.inf


async def test_process_that_the_server_forgot_is_lost(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        network.sessions._by_id[env.session_id or ""].processes._entries.clear()
        network.cut()
        with pytest.raises(ConnectionLost, match=r"failed to recover .* unknown process id") as caught:
            await process.wait()
        assert caught.value.outcome == "unknown"
        assert state(env) == "connected"


async def test_reader_that_comes_when_the_process_is_lost_is_told(autojump_clock: MockClock) -> None:
    async with open_network() as (_, env):
        await env.start_detached("dev", ["x"])
        backend = await env._backend.processes.attach("dev")
        assert isinstance(backend, RemoteProcess)
        backend.fail(ConnectionLost("lost"))
        inbox = Inbox()
        backend.subscribe(inbox, history=True)
        with trio.fail_after(100), pytest.raises(ConnectionLost):
            await inbox.take("stdout")


async def test_copy_of_which_a_part_was_sent_does_not_say_not_sent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    (folder / "file").write_bytes(bytes(3_000_000))
    with trio.fail_after(30):
        for recovery in (Recovery(0.2, 0.001, 0.01), None):
            async with open_network(capabilities=FILES, recovery=recovery) as (network, env):

                def drop(data: bytes, from_server: bool, network: Network = network) -> str | None:
                    if from_server or b"fs/writeBlock" not in data:
                        return None
                    network.reachable = False
                    return AFTER

                network.drop = drop
                with pytest.raises(ConnectionLost) as caught:
                    await env.files.upload(str(folder / "file"), str(folder / "copy"))
                assert caught.value.outcome == "unknown"


async def test_copy_to_a_server_that_takes_files_in_place_only_is_given_up_some_time(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    (folder / "file").write_bytes(bytes(12_000_000))
    with trio.fail_after(30):
        async with open_network(capabilities=FILES[1:], recovery=QUICK) as (network, env):
            blocks = 0
            turns = cycle((6, 9))
            wanted = next(turns)

            def drop(data: bytes, from_server: bool) -> str | None:
                nonlocal blocks, wanted
                blocks += not from_server and b"fs/writeBlock" in data
                if blocks < wanted:
                    return None
                blocks, wanted = 0, next(turns)
                return BEFORE

            network.drop = drop
            with pytest.raises(ConnectionLost):
                await env.files.upload(str(folder / "file"), str(folder / "copy"))
            assert len(network.links) < 12


async def test_call_that_was_sent_once_is_never_said_not_to_be(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        with pytest.raises(ConnectionLost):
            async with env.open_process(["x"], stdin=True) as process:
                assert process.stdin is not None
                lost = 0

                def drop(data: bytes, from_server: bool) -> str | None:
                    nonlocal lost
                    if from_server or b"process/write" not in data:
                        return None
                    lost += 1
                    if lost == 1:
                        return AFTER
                    network.reachable = False
                    network.cut()
                    raise ConnectionLost("lost", "not sent")

                network.drop = drop
                with pytest.raises(ConnectionLost, match="recovery timed out") as caught:
                    await process.stdin.send_all(b"x")
                assert lost == 2
                assert caught.value.outcome == "unknown"
                assert network.process().written == [b"x"]


async def test_call_fails_fast_also_while_its_connection_is_still_being_ended(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        async with env.open_process(["x"], stdin=True) as process:
            assert process.stdin is not None
            link = network.links[-1]
            close, link.close_nowait = link.close_nowait, lambda *args: None  # type: ignore[method-assign]
            _answer_closed(network)
            for call in (partial(process.stdin.send_all, b"x"), env.probe):
                began = trio.current_time()
                with fail_fast(), trio.fail_after(10), pytest.raises(ConnectionLost):
                    await call()
                assert trio.current_time() == began
            close()
            await trio.sleep(1)
        assert network.process().signals == ["terminate"]


# A server that is not ours.


class Reference:
    """A server of one process that says no more than it must, and some of it twice or early.

    Attributes:
        events: what the process has done, by seq from 1: bytes, an exit code, or `None` for its close.
        retained: the first seq that can still be read.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.events: list[bytes | int | None] = []
        self.retained = 1
        self.calls: list[str] = []
        self._nursery = nursery
        self._link: MemoryChannel

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Channel]:
        await trio.lowlevel.checkpoint()
        ours, theirs = memory_pair()
        self._link = theirs
        self._nursery.start_soon(theirs.run, self._receive)
        yield ours

    def cut(self) -> None:
        self._link.close_nowait()

    def emit(self, *events: bytes | int | None) -> None:
        for event in events:
            self.events.append(event)
            self._push(len(self.events))

    def _push(self, seq: int) -> None:
        event = self.events[seq - 1]
        params: dict[str, object] = {"processId": self._process_id, "seq": seq}
        kind = "output" if isinstance(event, bytes) else "exited" if event is not None else "closed"
        if isinstance(event, bytes):
            params |= {"stream": "stdout", "chunk": b64encode(event).decode()}
        elif event is not None:
            params |= {"exitCode": event}
        self._send({"method": f"process/{kind}", "params": params})

    def _send(self, message: dict[str, object]) -> None:
        with suppress(ConnectionLost):
            self._link.send_nowait(json.dumps(message).encode())

    def _receive(self, data: bytes) -> None:
        message = json.loads(data)
        if "id" not in message:
            return
        method, params = message["method"], message["params"]
        self.calls.append(method)
        result: dict[str, object] = {}
        if method == "initialize":
            if params["resumeSessionId"]:  # some comes early
                for seq in range(1, len(self.events) + 1, 2):
                    self._push(seq)
            result = {"sessionId": "one"}
        elif method == "environment/info":
            result = {"shell": {"name": "sh", "path": "/bin/sh"}, "cwd": "file:///"}
        elif method == "process/start":
            self._process_id = params["processId"]
            result = {"processId": self._process_id}
        elif method == "process/read":
            result = self._read(params["afterSeq"] or 0)
        elif method == "process/terminate":
            result = {"running": None not in self.events}
        self._send({"id": message["id"], "result": result})
        if method == "process/read":
            for seq in range(1, len(self.events) + 1):  # all of it again
                self._push(seq)

    def _read(self, after: int) -> dict[str, object]:
        chunks = [
            {"seq": seq, "stream": "stdout", "chunk": b64encode(event).decode()}
            for seq, event in enumerate(self.events, 1)
            if isinstance(event, bytes) and seq > after and seq >= self.retained
        ]
        codes = [event for event in self.events if isinstance(event, int)]
        return {
            "chunks": chunks,
            "nextSeq": len(self.events) + 1,
            "exited": bool(codes),
            "exitCode": codes[0] if codes else None,
            "closed": None in self.events,
            "failure": None,
        }


@asynccontextmanager
async def open_reference() -> AsyncIterator[tuple[Reference, Environment]]:
    async with trio.open_nursery() as nursery:
        server = Reference(nursery)
        async with open_remote(server.dial, "memory", redial=True, recovery=Recovery()) as remote:
            yield server, Environment(remote)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cut_at", range(8))
@pytest.mark.parametrize("unseen", range(4))
async def test_output_of_a_server_that_says_little_and_twice_arrives_once(
    autojump_clock: MockClock, cut_at: int, unseen: int
) -> None:
    events: tuple[bytes | int | None, ...] = (b"1", b"2", b"3", 7, b"4", b"5", None)
    async with open_reference() as (server, env):
        async with env.open_process(["x"]) as process:
            for number, event in enumerate(events):
                if number == cut_at:
                    server.cut()
                elif not cut_at < number < cut_at + unseen:
                    await wait_all_tasks_blocked()
                server.emit(event)
            if cut_at == len(events):
                server.cut()
            assert await read_all(process) == b"12345"
            assert await process.wait() == 7
        assert server.calls.count("process/start") == 1


async def test_gap_at_a_server_that_says_little_is_told_once(autojump_clock: MockClock) -> None:
    async with open_reference() as (server, env), env.open_process(["x"]) as process:
        server.emit(b"1")
        assert await process.stdout.receive_some() == b"1"
        server.cut()
        server.emit(b"2", b"3", b"4", 0, None)
        server.retained = 4
        with pytest.raises(OutputGap) as caught:
            await process.stdout.receive_some()
        assert (caught.value.from_seq, caught.value.to_seq, caught.value.bytes) == (2, 3, None)
        assert await process.stdout.receive_some() == b"4"
        assert await process.stdout.receive_some() == b""
        assert await process.wait() == 0


# Sandboxes that a server may not have heard of.

READ_ONLY = SandboxProfile.read_only()


async def test_server_that_ignores_a_sandbox_is_told_to_end_what_it_started(
    autojump_clock: MockClock,
) -> None:
    async with open_reference() as (server, env):
        with trio.fail_after(60), pytest.raises(ProcessNotStarted, match="ignored the sandbox"):
            await env.run(["x"], sandbox=READ_ONLY)
        await wait_all_tasks_blocked()
        assert server.calls[-2:] == ["process/start", "process/terminate"]


async def test_server_that_ignores_a_sandbox_that_restricts_nothing_may(autojump_clock: MockClock) -> None:
    disabled = SandboxProfile.disabled()
    async with open_reference() as (server, env), env.open_process(["x"], sandbox=disabled) as process:
        server.emit(0, None)
        assert await process.wait() == 0


async def test_process_whose_sandbox_nobody_confirmed_is_ended(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        network.drop_once(b"linuxSeccomp", BEFORE, from_server=True)
        with pytest.raises(ConnectionLost, match="whether its sandbox is enforced"):
            await env.start_detached("dev", ["x"], sandbox=READ_ONLY)
        await wait_all_tasks_blocked()
        assert network.process().signals == ["terminate"]


async def test_lost_answer_of_a_server_that_has_confirmed_a_sandbox_is_not_missed(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        await env.start_detached("one", ["x"], sandbox=READ_ONLY)
        network.drop_once(b"linuxSeccomp", BEFORE, from_server=True)
        await env.start_detached("two", ["x"], sandbox=READ_ONLY)
        await wait_all_tasks_blocked()
        assert network.process().signals == []


async def test_what_one_server_has_confirmed_is_not_believed_of_the_next(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await env.start_detached("one", ["x"], sandbox=READ_ONLY)
        await network.restart()
        network.drop_once(b"linuxSeccomp", BEFORE, from_server=True)
        with pytest.raises(ConnectionLost, match="whether its sandbox is enforced"):
            await env.start_detached("two", ["x"], sandbox=READ_ONLY)
