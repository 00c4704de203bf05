"""The manager of environments: which there are, when each is connected, and that none replaces another."""

from __future__ import annotations

import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, field
from trio.testing import wait_all_tasks_blocked

from execenv import (
    Capabilities,
    CommandTarget,
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    Environment,
    EnvironmentManager,
    EnvironmentStatus,
    EnvironmentUnavailable,
    LocalTarget,
    ProcessNotStarted,
    RelayTarget,
    RpcError,
    Snapshot,
    UsageError,
    WebsocketTarget,
    environments,
    fail_fast,
    open_manager,
)
from execenv.config import LOCAL_ONLY
from execenv.targets import Target
from tests.conftest import SERVE, WebsocketServer, run_websocket_server, time_limit
from tests.fakes import FakeEnvironment, Watched

TIME_LIMIT = 30.0
WEB = WebsocketTarget("ws://127.0.0.1:1")
OTHER = WebsocketTarget("ws://127.0.0.1:2")
COMMAND = CommandTarget(("server",))
RELAY = RelayTarget("https://registry.example/base", "env_1")
STDIO = CommandTarget((*SERVE, "stdio"))

PENDING, READY = EnvironmentStatus("pending"), EnvironmentStatus("ready")
ALL, NOTHING = Capabilities(True, True, True, True), Capabilities(False, False, False, False)


def remote_default(target: Target, *, with_local: bool = True) -> Snapshot:
    """A remote default, and this machine beside it."""
    return Snapshot((("remote", target),), "remote", with_local)


class Fake(FakeEnvironment):
    """An environment that may keep silent.

    Attributes:
        answer: what it says to `probe`; `None` for nothing at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer: str | None = "ready"

    async def probe(self) -> str:
        if self.answer is None:
            await trio.sleep_forever()
        assert self.answer is not None
        return self.answer


@define
class Opener:
    """Stands for `open_environment`.

    Attributes:
        targets: what was to be opened, in order.
        fakes: what was opened, in order.
        failures: for the next attempts, in order; `None` lets one succeed. All that follow do.
        may_open: attempts wait for it.
    """

    targets: list[Target] = field(factory=list)
    fakes: list[Fake] = field(factory=list)
    failures: list[Exception | None] = field(factory=list)
    may_open: trio.Event = field(factory=trio.Event)

    @asynccontextmanager
    async def open(self, target: Target) -> AsyncIterator[Environment]:
        self.targets.append(target)
        await self.may_open.wait()
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        fake = Fake()
        self.fakes.append(fake)
        try:
            yield Environment(fake)
        finally:
            fake.closed = True


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Environments are fakes, opened at once."""
    opener = Opener()
    opener.may_open.set()
    monkeypatch.setattr(environments, "_open", opener.open)
    return opener


def refused(*, for_good: bool = True) -> ConnectFailed:
    """What a server has refused; or what may be better the next time."""
    return ConnectFailed(
        "it rejected initialize" if for_good else "connection refused", retryable=not for_good
    )


# Which there are.


async def test_snapshot_says_which_there_are(opener: Opener) -> None:
    async with open_manager(Snapshot((("b", WEB), ("a", COMMAND)), "a", True)) as manager:
        assert manager.ids == ("local", "b", "a")
        assert manager.default_environment_id() == "a"
        assert manager.default_environment_ids() == ("a", "local", "b")
        assert (manager.target("a"), manager.target("local"), manager.target("c")) == (
            COMMAND,
            LocalTarget(),
            None,
        )


@pytest.mark.parametrize(
    "snapshot",
    [
        Snapshot((("", WEB),)),
        Snapshot((("local", WEB),)),
        Snapshot((("a", WEB), ("a", WEB))),
        Snapshot((("a", LocalTarget()),)),
        Snapshot((("a", WEB),), "b"),
        Snapshot((), "local", False),
    ],
)
async def test_snapshot_that_contradicts_itself_opens_nothing(opener: Opener, snapshot: Snapshot) -> None:
    with pytest.raises(UsageError):
        async with open_manager(snapshot):
            raise AssertionError("it was opened")
    assert opener.targets == []


async def test_without_a_snapshot_files_and_variables_say_it(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXECENV_URL", "ws://127.0.0.1:5")
    async with open_manager() as manager:
        assert (manager.ids, manager.default_environment_id()) == (("remote",), "remote")
        await manager.require()
    assert opener.targets == [WebsocketTarget("ws://127.0.0.1:5")]


# No fall-back.


def _disabled_by_a_variable(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("EXECENV_URL", "none")


def _disabled_by_codex(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CODEX_EXEC_SERVER_URL", " NONE ")


def _disabled_by_a_file(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "environments.toml").write_text('default = "none"\ninclude_local = false')
    patch.setenv("CODEX_HOME", str(folder))


def _local_not_included(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "execenv").mkdir()
    (folder / "execenv" / "environments.toml").write_text("include_local = false")
    patch.setenv("XDG_CONFIG_HOME", str(folder))


@pytest.mark.parametrize(
    "disable", [_disabled_by_a_variable, _disabled_by_codex, _disabled_by_a_file, _local_not_included]
)
async def test_disabled_means_that_nothing_can_be_done_and_not_even_here(
    opener: Opener,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    disable: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    disable(monkeypatch, tmp_path)
    async with open_manager() as manager:
        assert (manager.ids, manager.default_environment_ids()) == ((), ())
        assert await manager.default_environment() is None
        assert await manager.get("local") is await manager.get("remote") is await manager.try_local() is None
        assert manager.capabilities() == manager.capabilities("local") == NOTHING
        for refuse in (manager.require, manager.require_local, lambda: manager.require("remote")):
            with pytest.raises(EnvironmentUnavailable):
                await refuse()
    assert opener.targets == []


def _file_is_wrong(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "environments.toml").write_text("defalt = 1")
    patch.setenv("CODEX_HOME", str(folder))


def _home_is_missing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CODEX_HOME", str(folder / "missing"))


def _relay_is_wanted(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("REGISTRY_URL", "ENVIRONMENT_ID", "AUTH_TOKEN"):
        patch.setenv(f"CODEX_EXEC_SERVER_NOISE_{name}", "x")


def _relay_is_half_wanted(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CODEX_EXEC_SERVER_NOISE_AUTH_TOKEN", "x")


@pytest.mark.parametrize("spoil", [_file_is_wrong, _home_is_missing, _relay_is_wanted, _relay_is_half_wanted])
async def test_broken_configuration_opens_nothing(
    opener: Opener,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spoil: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    spoil(monkeypatch, tmp_path)
    monkeypatch.setenv("CODEX_EXEC_SERVER_URL", "ws://127.0.0.1:5")
    with pytest.raises(ConfigError):
        async with open_manager():
            raise AssertionError("it was opened")
    assert opener.targets == []


@pytest.mark.parametrize("target", [WEB, COMMAND])
async def test_default_that_cannot_be_reached_is_an_error_and_not_this_machine(
    opener: Opener, target: Target
) -> None:
    opener.failures += [refused(for_good=False)] * 9
    async with open_manager(remote_default(target)) as manager:
        for use in (manager.require, manager.default_environment, lambda: manager.get("remote")):
            with pytest.raises(ConnectFailed, match="environment `remote`: connection refused"):
                await use()
    assert LocalTarget() not in opener.targets


async def test_unknown_id_is_refused_with_what_it_may_have_been(opener: Opener) -> None:
    async with open_manager(remote_default(WEB)) as manager:
        assert await manager.get("remot") is None
        assert manager.capabilities("remot") == NOTHING
        for use in (manager.require, manager.status, manager.remove):
            with pytest.raises(
                EnvironmentUnavailable, match=r"unknown environment id `remot`.*`remote`"
            ) as caught:
                await use("remot")
            assert caught.value.environment_id == "remot"


async def test_capabilities_are_those_of_what_is_known_and_connect_nothing(opener: Opener) -> None:
    async with open_manager(remote_default(COMMAND)) as manager:
        assert (
            manager.capabilities() == manager.capabilities("remote") == manager.capabilities("local") == ALL
        )
    assert opener.targets == []


@pytest.mark.parametrize("with_local", [True, False])
async def test_local_is_optional(opener: Opener, with_local: bool) -> None:
    async with open_manager(remote_default(COMMAND, with_local=with_local)) as manager:
        if with_local:
            assert await manager.require_local() is await manager.try_local() is not None
            assert await manager.status("local") == READY
        else:
            assert await manager.try_local() is None
            with pytest.raises(
                EnvironmentUnavailable, match="this machine is no environment, says the snapshot"
            ):
                await manager.require_local()
    assert opener.targets == [LocalTarget()] * with_local


# When it is connected.


async def test_websockets_are_connected_to_at_once_and_commands_started_when_used(opener: Opener) -> None:
    async with open_manager(Snapshot((("w", WEB), ("c", COMMAND), ("o", OTHER)), None, True)) as manager:
        await wait_all_tasks_blocked()
        assert sorted(map(str, opener.targets)) == sorted(map(str, [WEB, OTHER]))
        assert await manager.status("w") == READY
        for _ in range(2):
            assert await manager.status("c") == PENDING
        assert COMMAND not in opener.targets
        await manager.require("c")
        assert opener.targets.count(COMMAND) == 1
        assert await manager.status("c") == READY


async def test_relays_are_connected_to_at_once(opener: Opener) -> None:
    async with open_manager(Snapshot((("r", RELAY),), "r")) as manager:
        await wait_all_tasks_blocked()
        assert opener.targets == [RELAY]
        assert await manager.status("r") == READY
        assert await manager.get("r") is await manager.require()
    assert opener.targets == [RELAY]


async def test_noise_variables_are_the_default_and_the_only_environment(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "CODEX_EXEC_SERVER_NOISE_AUTH_TOKEN"
    monkeypatch.setenv("CODEX_EXEC_SERVER_NOISE_REGISTRY_URL", RELAY.registry)
    monkeypatch.setenv("CODEX_EXEC_SERVER_NOISE_ENVIRONMENT_ID", RELAY.environment_id)
    monkeypatch.setenv(token, "x")
    async with open_manager() as manager:
        assert (manager.ids, manager.default_environment_ids()) == (("remote",), ("remote",))
        await manager.require()
    assert opener.targets == [RelayTarget(RELAY.registry, RELAY.environment_id, bearer_token_env=token)]


async def test_nothing_is_connected_early_if_that_is_not_wanted(opener: Opener) -> None:
    async with open_manager(remote_default(WEB), connect_early=False) as manager:
        await wait_all_tasks_blocked()
        assert opener.targets == []
        assert await manager.status("remote") == PENDING
        await manager.require()
        assert opener.targets == [WEB]


@pytest.mark.parametrize("target", [WEB, COMMAND])
async def test_concurrent_first_uses_share_one_connection(
    opener: Opener, autojump_clock: trio.testing.MockClock, target: Target
) -> None:
    opener.may_open = trio.Event()
    found: list[Environment] = []

    async def use(manager: EnvironmentManager) -> None:
        found.append(await manager.require())

    async with open_manager(remote_default(target)) as manager, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(use, manager)
        with trio.move_on_after(1) as impatient:  # who leaves does not take the attempt along
            await manager.require()
        assert impatient.cancelled_caught
        assert found == []
        opener.may_open.set()
    assert len(found) == 5
    assert len(set(map(id, found))) == len(opener.targets) == 1


async def test_failed_attempt_is_remembered_and_the_next_use_tries_again(opener: Opener) -> None:
    opener.failures += [refused(for_good=False), None]
    async with open_manager(remote_default(WEB)) as manager:
        await wait_all_tasks_blocked()
        for _ in range(2):
            assert await manager.status("remote") == EnvironmentStatus("disconnected", "connection refused")
        assert len(opener.targets) == 1
        assert (await manager.require()).name == "fake"
        assert await manager.status("remote") == READY
        assert len(opener.targets) == 2


async def test_status_is_disconnected_while_another_attempt_is_on_its_way(opener: Opener) -> None:
    opener.failures += [refused(for_good=False), refused(for_good=False)]
    async with open_manager(remote_default(WEB)) as manager, trio.open_nursery() as nursery:
        await wait_all_tasks_blocked()
        opener.may_open = trio.Event()
        nursery.start_soon(_fails, manager.require)
        await wait_all_tasks_blocked()
        assert await manager.status("remote") == EnvironmentStatus("disconnected", "connection refused")
        opener.may_open.set()


async def _fails(use: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(ConnectFailed):
        await use()


async def test_refusal_for_good_is_reported_again_without_another_attempt(opener: Opener) -> None:
    opener.failures += [refused()]
    async with open_manager(remote_default(COMMAND)) as manager:
        for _ in range(3):
            with pytest.raises(ConnectFailed, match="exec-server connection attempt failed: it rejected"):
                await manager.require()
        assert len(opener.targets) == 1
        await manager.replace("remote", COMMAND)
        assert await manager.require()


@pytest.mark.parametrize("state", ["recovering", "failed", "connecting"])
async def test_lost_connection_is_told_and_left_to_the_environment(opener: Opener, state: Any) -> None:
    async with open_manager(remote_default(WEB)) as manager:
        first = await manager.require()
        loss = None if state == "connecting" else ConnectionLost("exec-server transport disconnected")
        opener.fakes[0].status.set(state, loss)
        for _ in range(2):
            gone = EnvironmentStatus("disconnected", str(loss or "it is connecting"))
            assert await manager.status("remote") == gone
        assert await manager.require() is first
        opener.fakes[0].status.set("connected")
        assert await manager.status("remote") == READY
    assert opener.targets == [WEB]


async def test_status_waits_no_longer_than_10_s_for_an_answer(
    opener: Opener, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_manager(remote_default(WEB)) as manager:
        await manager.require()
        opener.fakes[0].answer = None
        before = trio.current_time()
        assert await manager.status("remote") == EnvironmentStatus("disconnected", "no answer within 10 s")
        assert trio.current_time() - before == pytest.approx(10)
        opener.fakes[0].answer = "broken"
        assert (await manager.status("remote")).state == "disconnected"
        opener.fakes[0].answer = "ready"
        assert await manager.status("remote") == READY


# Changing them.


async def test_added_environment_is_there_and_the_default_stays(opener: Opener) -> None:
    async with open_manager(Snapshot((("a", COMMAND),), "a")) as manager:
        await manager.add("any id is good", " ws://h ")
        await manager.add("c", ["ssh", "box"])
        assert manager.ids == ("a", "any id is good", "c")
        assert manager.default_environment_ids() == ("a", "any id is good", "c")
        assert manager.target("c") == CommandTarget(("ssh", "box"))
        await wait_all_tasks_blocked()
        assert opener.targets == [WebsocketTarget("ws://h")]
        with pytest.raises(UsageError, match="is there already"):
            await manager.add("c", WEB)


async def test_relay_is_added_and_replaced_by_its_url_or_as_a_target(opener: Opener) -> None:
    clear = RelayTarget("http://127.0.0.1:1", "e", security="clear")
    async with open_manager(Snapshot((("a", COMMAND),), "a")) as manager:
        await manager.add("r", " relay+https://registry.example/base/env_1 ")
        assert manager.target("r") == RELAY
        await manager.require("r")
        await manager.replace("r", clear)
        assert manager.target("r") == clear
        assert opener.fakes[0].closed
        assert manager.default_environment_ids() == ("a", "r")
        await manager.require("r")
        assert opener.targets == [RELAY, clear]
        await manager.remove("r")
        assert manager.target("r") is None


@pytest.mark.parametrize(
    ("id_", "target", "words"),
    [
        ("", "ws://h", "environment id cannot be empty"),
        ("local", "ws://h", "`local` is reserved"),
        ("x", " ", "cannot be empty"),
        ("x", "None", "disables environments"),
        ("x", WebsocketTarget("none"), "disables environments"),
        ("x", [], "must name a program"),
        ("x", CommandTarget(()), "must name a program"),
        ("x", LocalTarget(), "cannot be this machine"),
        ("", RELAY, "environment id cannot be empty"),
        ("local", RELAY, "`local` is reserved"),
        ("x", "relay+https://h", "names no environment"),
        ("x", "relay+wss://h/e", "https:// URL"),
        ("x", RelayTarget("http://h.example", "e"), "use https://"),
        ("x", RelayTarget("https://h", "e f"), "only ASCII letters"),
        ("x", RelayTarget("https://h", "e", connect_timeout=-1), "connect_timeout cannot be -1"),
    ],
)
async def test_what_cannot_be_registered_is_refused(
    opener: Opener, id_: str, target: Target, words: str
) -> None:
    async with open_manager(LOCAL_ONLY) as manager:
        for register in (manager.add, manager.replace):
            with pytest.raises(UsageError, match=words):
                await register(id_, target)
        assert manager.ids == ("local",)
    assert opener.targets == []


async def test_word_local_as_a_url_is_a_bad_url_and_not_this_machine() -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_manager(LOCAL_ONLY) as manager:
            await manager.replace("x", "local")
            with pytest.raises(ConnectFailed, match="no websocket URL"):
                await manager.require("x")
            assert (await manager.status("x")).state == "disconnected"


async def test_replacement_closes_what_was_there_and_is_connected_to(opener: Opener) -> None:
    async with open_manager(remote_default(WEB)) as manager:
        first = await manager.require()
        for id_, target in (("remote", OTHER), ("new", COMMAND)):
            await manager.replace(id_, target)
            assert opener.fakes[0].closed
            assert manager.default_environment_ids()[:2] == ("remote", "local")
            assert manager.target(id_) == target
        assert await manager.require() is not first
    assert opener.targets == [WEB, OTHER]


async def test_removed_environment_is_closed_and_unknown(opener: Opener) -> None:
    async with open_manager(Snapshot((("a", WEB), ("b", OTHER)), "a", True)) as manager:
        await manager.require("b")
        await manager.remove("b")
        assert [fake.closed for fake in opener.fakes].count(True) == 1
        assert manager.ids == ("local", "a")
        with pytest.raises(EnvironmentUnavailable):
            await manager.require("b")
        for id_, words in (("local", "this machine cannot"), ("a", "is the default")):
            with pytest.raises(UsageError, match=words):
                await manager.remove(id_)
        assert manager.ids == ("local", "a")


@pytest.mark.parametrize("how", ["remove", "replace"])
async def test_who_waits_for_an_environment_that_goes_is_told(opener: Opener, how: str) -> None:
    opener.may_open = trio.Event()

    async def use() -> None:
        with pytest.raises(EnvironmentUnavailable, match="removed or replaced"):
            await manager.require("b")

    snapshot = Snapshot((("a", COMMAND), ("b", COMMAND)), "a")
    async with open_manager(snapshot) as manager, trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await wait_all_tasks_blocked()
        await (manager.remove("b") if how == "remove" else manager.replace("b", COMMAND))
    assert opener.fakes == []


async def test_environments_end_with_the_block_and_not_before_its_own_end(
    opener: Opener, autojump_clock: trio.testing.MockClock
) -> None:
    async def body() -> None:
        async with open_manager(remote_default(WEB)) as manager:
            await manager.require()
            try:
                await trio.sleep_forever()
            finally:
                assert not opener.fakes[0].closed

    with trio.move_on_after(1):
        await body()
    assert opener.fakes[0].closed


async def test_manager_that_is_closed_opens_nothing(opener: Opener) -> None:
    async with open_manager(remote_default(COMMAND)) as manager:
        pass
    with pytest.raises(EnvironmentUnavailable, match="manager is closed"):
        await manager.require()
    with pytest.raises(EnvironmentUnavailable, match="manager is closed"):
        await manager.replace("b", WEB)
    assert opener.targets == []


async def test_error_of_the_block_comes_out_as_itself(opener: Opener) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_manager(remote_default(WEB)):
            raise ZeroDivisionError


# With real ones.


@pytest.fixture
def watched() -> Iterator[Watched]:
    with closing(Watched()) as watched:
        yield watched


async def test_work_is_done_in_each_of_several(websocket_server: WebsocketServer) -> None:
    snapshot = Snapshot((("web", WebsocketTarget(websocket_server.url)), ("stdio", STDIO)), "stdio", True)
    async with time_limit(), open_manager(snapshot) as manager:
        for id_ in manager.default_environment_ids():
            environment = await manager.require(id_)
            assert (await environment.run(["echo", id_])).stdout == f"{id_}\n".encode()
            info = await environment.info()
            assert info.shell.name
            assert info.shell.path
            assert await manager.status(id_) == READY


async def test_working_directory_need_not_exist_here(websocket_server: WebsocketServer) -> None:
    async with time_limit(), open_manager(remote_default(WebsocketTarget(websocket_server.url))) as manager:
        environment = await manager.require()
        with pytest.raises(ProcessNotStarted) as caught:  # by the server, whose business it is
            await environment.run(["true"], cwd="/no/such/directory")
        assert isinstance(caught.value.__cause__, RpcError)


async def test_broken_ones_say_why_and_start_nothing_here() -> None:
    closed = WebsocketTarget("ws://127.0.0.1:1")
    broken: dict[str, tuple[Target, str]] = {
        "web": (closed, "refused"),
        "token": (
            WebsocketTarget("ws://127.0.0.1:1", bearer_token_env="NO_SUCH_VARIABLE"),
            "NO_SUCH_VARIABLE",
        ),
        "missing": (CommandTarget(("no-such-program",)), "no-such-program"),
        "mute": (CommandTarget(("true",)), "ended the connection"),
    }
    snapshot = Snapshot(tuple((id_, target) for id_, (target, _) in broken.items()), "web", True)
    async with time_limit(), open_manager(snapshot) as manager:
        for id_, (_, words) in broken.items():
            with pytest.raises(ConnectFailed, match=words):
                await manager.require(id_)
            status = await manager.status(id_)
            assert status.state == "disconnected"
            assert words in str(status.error)


async def test_token_reaches_the_server_and_no_other_text(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("hush-hush\n")
    auth = ["--ws-auth", "capability-token", "--ws-token-file", str(secret)]
    command = shlex.join([*SERVE, "ws://127.0.0.1:0", *auth])
    process = await trio.lowlevel.open_process(["sh", "-c", f"exec {command}"], stdout=-1)
    assert process.stdout is not None
    try:
        with trio.fail_after(TIME_LIMIT):
            url = bytes(await process.stdout.receive_some()).decode().strip()
            good = WebsocketTarget(url, bearer_token_file=str(secret))
            snapshot = Snapshot((("good", good), ("bad", WebsocketTarget(url))), "good")
            async with open_manager(snapshot) as manager:
                assert (await (await manager.require()).run(["echo", "in"])).stdout == b"in\n"
                with pytest.raises(ConnectFailed, match="401"):
                    await manager.require("bad")
                assert "hush-hush" not in repr(vars(manager)) + repr(snapshot)
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()


async def test_removal_ends_the_command_and_what_runs_there(watched: Watched) -> None:
    async with time_limit(), open_manager(Snapshot((("a", STDIO), ("b", STDIO)), "a")) as manager:
        environment = await manager.require("b")
        done = await environment.run([sys.executable, "-c", "import os; print(os.getppid())"])
        assert done.stdout is not None
        watched.add(int(done.stdout))
        await manager.remove("b")
        await watched.wait_gone()
        with pytest.raises(ConnectionLost):
            await environment.run(["true"])


async def test_server_that_is_gone_is_an_error_and_nothing_runs_here() -> None:
    with run_websocket_server() as server:
        target = WebsocketTarget(server.url)
        async with time_limit(), open_manager(remote_default(target)) as manager:
            environment = await manager.require()
            server.process.kill()
            async for change in environment.status:
                if change.state != "connected":
                    break
            assert (await manager.status("remote")).state == "disconnected"
            with fail_fast(), pytest.raises(ConnectionLost):
                await environment.run(["true"])
            assert await manager.require() is environment
