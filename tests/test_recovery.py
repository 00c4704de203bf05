"""A client that loses its connection: what goes on, what fails, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from execenv import (
    ConnectFailed,
    ConnectionLost,
    Environment,
    OutputGap,
    Process,
    ProcessNotStarted,
    fail_fast,
)
from execenv._standard_streams import tell_of_losses
from execenv.errors import InternalError
from execenv.remote.connection import open_remote
from execenv.remote.session import Recovery
from execenv.server.connection import ServerConnection
from execenv.server.sessions import Sessions, open_sessions
from execenv.transports.channel import Channel
from execenv.transports.memory import MemoryChannel, memory_pair
from tests.fakes import FakeEnvironment, FakeHost, FakeProcess

RECOVERY = Recovery()
FILES = ("fileTransfer", "fileWriteStreaming")
BEFORE, AFTER = "before", "after"


class Network:
    """Ways to a server of fake environments, and what goes wrong on them.

    Attributes:
        host: the environments, one for each session.
        links: the client's ends of all connections so far.
        reachable: whether a connection can be made.
        attempts: when one was tried, by the clock.
        drop: called with each message and whether the server sent it; what it says is done: lose the
            connection before or after the message has passed, or nothing.
    """

    def __init__(self, sessions: Sessions, host: FakeHost, nursery: trio.Nursery) -> None:
        self.sessions = sessions
        self.host = host
        self.links: list[MemoryChannel] = []
        self.reachable = True
        self.attempts: list[float] = []
        self.drop: Callable[[bytes, bool], str | None] = lambda data, from_server: None
        self._nursery = nursery

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Channel]:
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        if not self.reachable:
            raise ConnectFailed("nobody listens")
        ours, theirs = memory_pair()
        self.links.append(ours)
        for end, from_server in ((ours, False), (theirs, True)):
            self._spoil(end, from_server)
        self._nursery.start_soon(ServerConnection(theirs, self.sessions, detachable=True).run)
        yield ours

    def _spoil(self, end: MemoryChannel, from_server: bool) -> None:
        send = end.send_nowait

        def spoiled(*parts: bytes) -> None:
            where = self.drop(b"".join(parts), from_server)
            if where != BEFORE:
                send(*parts)
            if where is not None:
                self.cut()

        end.send_nowait = spoiled  # type: ignore[method-assign]

    def cut(self) -> None:
        """Lose the newest connection."""
        self.links[-1].close_nowait()

    def drop_once(self, word: bytes, where: str, *, from_server: bool = False) -> None:
        """Lose the connection at the next message with that word in it."""

        def drop(data: bytes, server: bool) -> str | None:
            if server is from_server and word in data:
                self.drop = lambda data, from_server: None
                return where
            return None

        self.drop = drop

    @property
    def environment(self) -> FakeEnvironment:
        return self.host.opened[-1]

    def process(self) -> FakeProcess:
        """The newest process of the newest session."""
        return list(self.environment.fakes.started.values())[-1][-1]

    async def restart(self) -> None:
        """Forget all sessions, as a server does that was started again."""
        for session in list(self.sessions._by_id.values()):
            session.close()
        self.cut()
        await wait_all_tasks_blocked()


def state(env: Environment) -> str:
    return env.status.state


@asynccontextmanager
async def open_network(
    *,
    recovery: Recovery | None = RECOVERY,
    connect: bool = True,
    ttl: float = 80.0,
    capabilities: Sequence[str] = (),
) -> AsyncIterator[tuple[Network, Environment]]:
    host = FakeHost()
    host.capabilities = dict.fromkeys(capabilities, True)
    async with open_sessions(host.open, detached_ttl=ttl) as sessions, trio.open_nursery() as nursery:
        network = Network(sessions, host, nursery)
        async with open_remote(
            network.dial, "memory", redial=True, recovery=recovery, connect=connect
        ) as remote:
            yield network, Environment(remote)
        nursery.cancel_scope.cancel()


def end(child: FakeProcess, code: int) -> None:
    child.exit(code)
    child.close()


@asynccontextmanager
async def open_lost(env: Environment) -> AsyncIterator[Process]:
    """A process that is lost in the block, so that its end cannot be confirmed."""
    with pytest.raises(ConnectionLost):
        async with env.open_process(["x"], stdin=True) as process:
            yield process


async def read_all(process: Process) -> bytes:
    return b"".join([chunk.data async for chunk in process])


# Processes.


async def test_output_arrives_once_over_a_cut(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        child = network.process()
        child.emit(b"one ")
        await wait_all_tasks_blocked()
        network.cut()
        child.emit(b"two ")
        await wait_all_tasks_blocked()
        child.emit(b"three")
        end(child, 7)
        assert await read_all(process) == b"one two three"
        assert await process.wait() == 7
        assert len(network.links) == 2
        assert len(network.host.opened) == 1


async def test_output_while_nobody_can_connect_is_kept(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        child = network.process()
        network.reachable = False
        network.cut()
        await wait_all_tasks_blocked()
        for number in range(1000):
            child.emit(b"%d " % number)
        end(child, 0)
        await trio.sleep(30)
        assert state(env) == "recovering"
        network.reachable = True
        assert await read_all(process) == b"".join(b"%d " % number for number in range(1000))
        assert await process.wait() == 0
        assert state(env) == "connected"


async def test_what_was_evicted_is_reported_and_the_rest_follows(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        child = network.process()
        child.emit(b"first")
        assert await process.stdout.receive_some() == b"first"
        network.reachable = False
        network.cut()
        await wait_all_tasks_blocked()
        for _ in range(3):
            child.emit(bytes(1024 * 1024))
        child.emit(b"last")
        end(child, 0)
        network.reachable = True
        with pytest.raises(OutputGap) as caught:
            await process.stdout.receive_some()
        assert (caught.value.from_seq, caught.value.to_seq) == (2, 4)
        assert caught.value.bytes == 3 * 1024 * 1024
        assert caught.value.outcome == "done"
        assert await process.stdout.receive_some() == b"last"
        assert await process.stdout.receive_some() == b""


@pytest.mark.parametrize("where", [BEFORE, AFTER])
@pytest.mark.parametrize("from_server", [False, True])
async def test_write_is_applied_once_whatever_is_lost(
    autojump_clock: MockClock, where: str, from_server: bool
) -> None:
    async with open_network() as (network, env), env.open_process(["x"], stdin=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"one")
        network.drop_once(b"accepted" if from_server else b"process/write", where, from_server=from_server)
        await process.stdin.send_all(b"two")
        await process.stdin.send_all(b"three")
        assert network.process().written == [b"one", b"two", b"three"]
        assert len(network.links) == 2


@pytest.mark.parametrize("where", [BEFORE, AFTER])
@pytest.mark.parametrize("from_server", [False, True])
async def test_process_is_started_once_whatever_is_lost(
    autojump_clock: MockClock, where: str, from_server: bool
) -> None:
    async with open_network() as (network, env):
        word = b'"sandboxType"' if from_server else b"process/start"
        network.drop_once(word, where, from_server=from_server)
        async with env.open_process(["x"]) as process:
            assert len(network.links) == 2
            [started] = network.environment.fakes.started.values()
            assert len(started) == 1
            started[0].emit(b"output")
            end(started[0], 3)
            assert await read_all(process) == b"output"
            assert await process.wait() == 3


async def test_start_that_failed_and_whose_answer_was_lost_has_failed(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        network.environment.fakes.failure = InternalError("No such file or directory (os error 2)")
        network.drop_once(b"os error 2", BEFORE, from_server=True)
        with pytest.raises(ProcessNotStarted, match="os error 2") as caught:
            await env.run(["x"])
        assert caught.value.outcome == "not done"


async def test_start_whose_server_was_restarted_says_that_it_does_not_know(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        network.environment.fakes.may_start = trio.Event()
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(ConnectionLost, match="unknown session id") as caught:
                    await env.run(["x"])
                assert caught.value.outcome == "unknown"

            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            await network.restart()


async def test_leaving_the_block_of_a_process_ends_it_over_a_cut(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        async with env.open_process(["x"]):
            child = network.process()
            network.cut()
        assert child.signals == ["terminate"]


async def test_process_that_could_not_be_ended_in_time_is_ended_by_the_next_connection(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        with pytest.raises(ConnectionLost, match="did not confirm the end"):
            async with env.open_process(["x"]):
                child = network.process()
                network.reachable = False
                network.cut()
        assert child.signals == []
        network.reachable = True
        await trio.sleep(5)
        assert child.signals == ["terminate"]


async def test_interrupt_is_not_repeated(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        network.drop_once(b"process/signal", AFTER)
        with pytest.raises(ConnectionLost) as caught:
            await process.interrupt()
        assert caught.value.outcome == "unknown"
        await process.interrupt()
        assert network.process().signals in (["interrupt"], ["interrupt", "interrupt"])


async def test_interrupt_that_was_not_sent_waits_for_the_connection(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), env.open_process(["x"]) as process:
        network.cut()
        await process.interrupt()
        assert network.process().signals == ["interrupt"]


async def test_attached_process_goes_on_too(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await env.start_detached("dev", ["x"])
        child = network.process()
        child.emit(b"one ")
        network.cut()
        async with env.attach("dev") as process:
            network.cut()
            child.emit(b"two")
            end(child, 0)
            assert await read_all(process) == b"one two"


# Calls.


async def test_calls_that_read_are_repeated(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        for where in (BEFORE, AFTER):
            network.drop_once(b"environment/status", where)
            assert await env.probe() == "ready"
        assert len(network.links) == 3


async def test_call_that_ends_every_connection_is_given_up(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        network.drop = lambda data, from_server: BEFORE if b"environment/status" in data else None
        with pytest.raises(ConnectionLost, match=r"given up after \d+ connections"):
            await env.probe()
        network.drop = lambda data, from_server: None
        assert await env.probe() == "ready"


async def test_call_that_changes_something_is_not_repeated(
    autojump_clock: MockClock, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    async with open_network() as (network, env):
        for number, where in enumerate((BEFORE, AFTER)):
            network.drop_once(b"fs/createDirectory", where)
            with pytest.raises(ConnectionLost) as caught:
                await env.files.create_directory(str(folder / str(number)))
            assert caught.value.outcome == "unknown"
        network.cut()
        await env.files.create_directory(str(folder / "2"))  # not sent before, hence sent now
        assert (folder / "2").is_dir()


async def test_files_are_read_and_written_over_cuts(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("folder") / "file")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=Recovery(30, 0.001, 0.01)) as (network, env):
            for data in (b"small", bytes(range(256)) * 16 * 1024):
                for word in (b"fs/writeFile", b"fs/open", b"fs/writeBlock", b"fs/close"):
                    network.drop_once(word, AFTER)
                    await env.files.write_file(path, data)
                for word in (b"fs/open", b"fs/readBlock", b"fs/close"):
                    network.drop_once(word, AFTER)
                    assert await env.files.read_file(path) == data
            assert len(network.links) > 8


async def test_file_handle_ends_with_its_connection(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("folder") / "file")
    with trio.fail_after(30):
        async with open_network(capabilities=FILES, recovery=Recovery(30, 0.001, 0.01)) as (network, env):
            file = await env.files.open(path, "wb")
            await file.write(b"x")
            network.cut()
            for use in (partial(file.write, bytes(2_000_000)), file.aclose):
                with pytest.raises(ConnectionLost):
                    await use()
            assert await env.probe() == "ready"


async def test_watch_ends_with_its_connection(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("folder") / "file")
    with trio.fail_after(30):
        async with open_network() as (network, env):
            async with env.files.watch_missing([path]) as watch:
                assert watch is not None
                network.cut()
                with pytest.raises(ConnectionLost):
                    await watch.wait()
            assert await env.probe() == "ready"


# Recovering.


async def test_reconnects_at_once_and_then_with_growing_delays(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        await trio.sleep(10)
        network.reachable = False
        lost_at = trio.current_time()
        network.cut()
        await trio.sleep(20)
        network.reachable = True
        assert await env.probe() == "ready"
        delays = [later - earlier for earlier, later in pairwise([lost_at, *network.attempts[1:]])]
        assert delays[0] == 0
        for delay, longest in zip(delays[1:], (0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2), strict=False):
            assert longest / 2 <= delay <= longest + 1e-6


async def test_gives_up_at_its_deadline_and_opens_another_session_at_the_next_use(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env), open_lost(env) as process:
        changes = []

        async def watch() -> None:
            async for change in env.status:
                changes.append((change.state, change.error is not None))  # noqa: PERF401 - while it goes on

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await wait_all_tasks_blocked()
            network.reachable = False
            network.cut()
            lost_at = trio.current_time()
            with pytest.raises(ConnectionLost, match="recovery timed out after 45 s: nobody listens"):
                await process.wait()
            assert trio.current_time() - lost_at == pytest.approx(45)
            for call in (process.interrupt, process.kill, partial(process.stdout.receive_some)):
                with pytest.raises(ConnectionLost, match="recovery timed out"):
                    await call()
            with pytest.raises(ConnectFailed, match="nobody listens") as caught:
                await env.probe()
            assert caught.value.outcome == "not sent"
            network.reachable = True
            before = env.session_id
            assert await env.probe() == "ready"
            assert env.session_id not in (before, None)
            assert len(network.host.opened) == 2
            nursery.cancel_scope.cancel()
        states = [state for state, _ in changes]
        assert states == [
            *("connected", "recovering", "recovering", "failed"),
            *("connecting", "failed"),
            *("connecting", "connected"),
        ]
        assert [has_error for _, has_error in changes] == [False, True, True, True, False, True, False, False]


async def test_recovery_may_have_no_deadline(autojump_clock: MockClock) -> None:
    async with (
        open_network(recovery=Recovery(math.inf), ttl=math.inf) as (network, env),
        env.open_process(["x"]) as process,
    ):
        child = network.process()
        network.reachable = False
        network.cut()
        child.emit(b"after a day")
        await trio.sleep(86400)
        end(child, 0)
        network.reachable = True
        assert await read_all(process) == b"after a day"


async def test_restarted_server_fails_what_ran_and_serves_what_comes(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env), open_lost(env) as process:
        await network.restart()
        for call in (process.wait, process.stdout.receive_some, process.interrupt):
            with pytest.raises(ConnectionLost, match=r"failed to resume .* unknown session"):
                await call()
        assert process.stdin is not None
        with pytest.raises(ConnectionLost) as caught:
            await process.stdin.send_all(b"x")
        assert caught.value.outcome == "not sent"
        assert await env.probe() == "ready"
        assert state(env) == "connected"


async def test_calls_that_wait_go_to_the_next_session_if_the_first_is_lost(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        network.reachable = False
        network.cut()
        for session in list(network.sessions._by_id.values()):
            session.close()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(env.probe)
            await wait_all_tasks_blocked()
            network.reachable = True
        assert len(network.host.opened) == 2


async def test_users_of_a_fresh_session_share_one_connect(autojump_clock: MockClock) -> None:
    async with open_network(connect=False) as (network, env):
        assert state(env) == "idle"
        assert env.session_id is None
        assert network.links == []
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(env.probe)
        assert len(network.links) == 1
        await network.restart()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(env.probe)
        assert len(network.links) == 3  # one that could not be resumed


async def test_failed_first_connect_is_told_to_all_and_tried_again(autojump_clock: MockClock) -> None:
    async with open_network(connect=False) as (network, env):
        network.reachable = False
        async with trio.open_nursery() as nursery:

            async def fail() -> None:
                with pytest.raises(ConnectFailed, match="nobody listens"):
                    await env.probe()

            for _ in range(3):
                nursery.start_soon(fail)
        assert len(network.attempts) == 1
        assert state(env) == "failed"
        network.reachable = True
        assert await env.probe() == "ready"


async def test_cancelled_user_leaves_the_connect_to_the_others(autojump_clock: MockClock) -> None:
    async with open_network(connect=False) as (network, env):
        network.host.may_open = trio.Event()
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                await env.probe()
            nursery.start_soon(env.probe)
            await wait_all_tasks_blocked()
            network.host.may_open.set()
        assert len(network.links) == 1


async def test_calls_fail_fast_where_that_was_asked_for(autojump_clock: MockClock) -> None:
    async with open_network(connect=False) as (network, env):
        calls: list[Callable[[], Awaitable[object]]] = [env.probe, partial(env.run, ["x"])]
        with fail_fast():
            for call in calls:
                with pytest.raises(ConnectionLost, match="environment is not ready") as caught:
                    await call()
                assert caught.value.outcome == "not sent"
        assert network.links == []
        async with env.open_process(["x"], stdin=True) as process:
            assert process.stdin is not None
            calls += [partial(process.stdin.send_all, b"x"), partial(env.files.read_file, "/etc/hostname")]
            network.reachable = False
            network.cut()
            with fail_fast():
                for call in calls:
                    with pytest.raises(ConnectionLost, match="environment is recovering") as caught:
                        await call()
                    assert caught.value.outcome == "not sent"
            network.reachable = True
            await process.stdin.send_all(b"y")
            assert network.process().written == [b"y"]


async def test_session_that_is_still_attached_is_asked_for_again(autojump_clock: MockClock) -> None:
    async with open_network() as (network, env):
        held = network.sessions._by_id[env.session_id or ""]
        connection = held._attached
        network.links[-1]._ended()  # half open: only this end knows
        network.links[-1]._wakeup.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(env.probe)
            await trio.sleep(5)
            assert state(env) == "recovering"
            assert connection is not None
            held.detach(connection)
        assert len(network.host.opened) == 1


async def test_leaving_while_recovering_does_not_wait(autojump_clock: MockClock) -> None:
    async with open_network() as (network, _):
        network.reachable = False
        network.cut()
        await wait_all_tasks_blocked()
        left_at = trio.current_time()
    assert trio.current_time() == left_at


async def test_command_line_tells_of_losses_that_last(
    autojump_clock: MockClock, capfd: pytest.CaptureFixture[str]
) -> None:
    async with open_network() as (network, env), trio.open_nursery() as nursery:
        nursery.start_soon(tell_of_losses, env)
        await wait_all_tasks_blocked()
        network.cut()
        await trio.sleep(10)
        assert capfd.readouterr().err == ""
        network.reachable = False
        network.cut()
        await trio.sleep(10)
        network.reachable = True
        await trio.sleep(10)
        lost, again = capfd.readouterr().err.splitlines()
        assert "connection lost" in lost
        assert "connected again" in again
        nursery.cancel_scope.cancel()


async def test_cancelling_while_recovering_is_quick_and_the_process_is_ended_later(
    autojump_clock: MockClock,
) -> None:
    async with open_network() as (network, env):
        began = trio.current_time()
        with trio.move_on_after(1):
            async with env.open_process(["x"]) as process:
                child = network.process()
                network.reachable = False
                network.cut()
                await process.wait()
        assert trio.current_time() - began < 5
        network.reachable = True
        await trio.sleep(5)
        assert child.signals == ["terminate"]


async def test_status_ends_with_its_environment(autojump_clock: MockClock) -> None:
    async with open_network() as (_, env):
        status = env.status
    assert [change.state async for change in status] == ["connected"]
    with pytest.raises(ConnectionLost, match="closed"):
        await env.probe()
