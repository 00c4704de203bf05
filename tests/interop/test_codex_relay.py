"""Our relay with a released codex at one end or at both: what works, and what is left of it behind cuts.

`tests/test_relay_end_to_end.py` has what is the same with ours at both ends.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import define

from execenv import Environment, open_environment
from tests.interop.codex import (
    BearerEnvironment,
    ExecResult,
    NoiseEnvironment,
    ProcessMark,
    real_executor,
    run_codex,
)
from tests.interop.conftest import exec_command
from tests.interop.responses_api import FunctionCall, ModelRequest, Reply, Turn
from tests.interop.test_codex_client import SOON, after_file
from tests.interop.test_codex_cuts import ECHO, NUMBERED, poll
from tests.interop.test_codex_files import apply_patch
from tests.relay_processes import BOX, Relay, RelayServer, open_executor, open_proxied, run_relay
from tests.relay_proxy import Leg, Way
from tests.relay_scenarios import MARKERS, check_everything, cuts, leave_marks, seen, until, work

pytestmark = pytest.mark.interop

WHERE = {"WHERE": "at the executor"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayServer]:
    with run_relay(tmp_path_factory.mktemp("relay")) as server:
        yield server


@pytest.fixture
async def relay(server: RelayServer) -> AsyncIterator[Relay]:
    async with open_proxied(server) as relay:
        yield relay


@asynccontextmanager
async def open_real_executor(codex: Path, relay: Relay, folder: Path) -> AsyncIterator[None]:
    """Codex's own, connected."""
    home = folder / "executor"
    await trio.Path(home).mkdir()
    before = relay.proxy.sockets["executor"]
    token = relay.server.executor_token
    async with real_executor(codex, home, relay.url, BOX, token, WHERE):
        with trio.fail_after(20):
            await relay.proxy.wait_sockets("executor", before + 1)
        yield


# A released executor, and our client.


@pytest.fixture
async def environment(codex: Path, relay: Relay, tmp_path: Path) -> AsyncIterator[Environment]:
    async with (
        open_real_executor(codex, relay, tmp_path),
        open_environment(relay.target()) as environment,
    ):
        yield environment


async def test_our_client_does_everything_there(environment: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with trio.fail_after(60):
        assert (await environment.info()).executor_version == "0.169.0"
        await check_everything(environment, folder)


@pytest.mark.parametrize(
    ("leg", "places"),
    [
        # A new stream each time: upgrade, its answer, resume and first message, the second, records.
        ("harness", [("out", 5), ("in", 0), ("out", 0), ("in", 2), ("out", 1), ("in", 4), ("out", 20)]),
        ("executor", [("in", 1), ("out", 1)]),
        ("executor", [("out", 1), ("in", 5)]),
    ],
)
async def test_session_there_goes_on_behind_cuts(
    environment: Environment, relay: Relay, tmp_path: Path, leg: Leg, places: list[tuple[Way, int]]
) -> None:
    with trio.fail_after(90):
        session_id = environment.session_id
        done = cuts(relay.proxy, leg, places)
        works = 0
        while done() < len(places):
            await work(environment, tmp_path, str(works))
            works += 1
        assert environment.session_id == session_id


# A released client.


@define(eq=False)
class Place:
    """Where codex works: an executor behind the relay, reached in one way or the other."""

    relay: Relay
    codex: Path
    where: NoiseEnvironment | BearerEnvironment
    cwd: Path
    home: Path
    mark: ProcessMark
    done: Callable[[], int] = lambda: 0
    wanted: int = 0

    async def run(self, *turns: Turn) -> list[str]:
        """What the model was given back by each of its calls."""
        run = await run_codex(self.codex, self.where, turns, cwd=self.cwd, home=self.home, mark=self.mark)
        assert run.returncode == 0, run.stderr
        return list(run.tool_outputs)

    async def results(self, *turns: Turn) -> list[ExecResult]:
        return [ExecResult.parse(text) for text in await self.run(*turns)]

    def after_cut(self, name: str, leg: Leg, turn: Callable[[ModelRequest], FunctionCall]) -> Turn:
        """When a command has made that file: cut a leg, and take the turn when codex has come back. (A start
        that is under way meanwhile would fail: the released client does not repeat it.)"""

        async def cut_and_take(request: ModelRequest) -> FunctionCall:
            await until((self.cwd / name).exists)
            proxy = self.relay.proxy
            before = proxy.sockets["harness"]
            proxy.cut(leg)
            await proxy.wait_sockets("harness", before + 1)
            return turn(request)

        return cut_and_take

    def armed(self, leg: Leg, places: list[tuple[Way, int]], turn: Turn) -> Turn:
        """From when the turn is taken on, cut the leg there. All that was to be cut before must have been."""

        async def arm(request: ModelRequest) -> Reply:
            self.check_cut()
            self.done, self.wanted = cuts(self.relay.proxy, leg, places), len(places)
            reply = turn(request) if callable(turn) else turn
            return await reply if inspect.isawaitable(reply) else reply

        return arm

    def check_cut(self) -> None:
        assert self.done() == self.wanted


@pytest.fixture(params=["execenv-noise", "execenv-clear", "reference-noise"])
async def place(
    request: pytest.FixtureRequest, codex: Path, relay: Relay, tmp_path: Path
) -> AsyncIterator[Place]:
    cwd = tmp_path / "work dir é"
    cwd.mkdir()
    mark = ProcessMark()
    token = relay.server.harness_token
    where: NoiseEnvironment | BearerEnvironment = NoiseEnvironment(relay.url, BOX, token)
    if request.param == "execenv-clear":
        where = BearerEnvironment(relay.harness_url, token)
    executor: AbstractAsyncContextManager[object]
    if request.param == "reference-noise":
        executor = open_real_executor(codex, relay, tmp_path)
    else:
        executor = open_executor(relay, "noise" if request.param == "execenv-noise" else "clear", WHERE)
    async with executor:
        try:
            yield Place(relay, codex, where, cwd, tmp_path / "client", mark)
        finally:
            mark.kill()


async def test_commands_and_patches(place: Place) -> None:
    (place.cwd / "changed").write_text("one\ntwo\n")
    patch = "*** Add File: new dir/é.txt\n+added\n*** Update File: changed\n@@\n-one\n+ONE\n two\n"
    with trio.fail_after(60):
        outputs = await place.run(
            exec_command('echo "$WHERE"; pwd; echo oops >&2; exit 3'),
            apply_patch(patch),
            exec_command("cat changed 'new dir/é.txt'"),
        )
    first, last = ExecResult.parse(outputs[0]), ExecResult.parse(outputs[2])
    assert (first.output.replace("oops\n", ""), first.exit_code) == (f"at the executor\n{place.cwd}\n", 3)
    assert "oops\n" in first.output
    assert "Success. Updated the following files" in outputs[1]
    assert (last.output, last.exit_code) == ("ONE\ntwo\nadded\n", 0)


async def test_every_byte_of_a_long_output_arrives(place: Place) -> None:
    whole = "".join(f"{number}\n" for number in range(1, 600_001)) + "the end\n"
    with trio.fail_after(60):
        [result] = await place.results(exec_command("seq 1 600000; echo the end"))
    assert (result.exit_code, result.tokens) == (0, -(-len(whole) // 4))
    assert result.output.endswith("\n599999\n600000\nthe end\n")


async def test_background_process_over_several_turns(place: Place) -> None:
    cmd = f"{ECHO.removeprefix('touch ready; ')}"
    with trio.fail_after(60):
        outputs = await place.results(
            exec_command(f"touch ready; {cmd}", tty=True, **SOON),
            after_file(place.cwd / "ready", poll("one\n", ends=False)),
            exec_command("echo meanwhile"),
            poll("two\n", ends=False),
            poll("end\n"),
        )
    assert outputs[2].output == "meanwhile\n"
    text = "".join(result.output for result in (*outputs[:2], *outputs[3:]))
    assert text == "one\r\ngot one\r\ntwo\r\ngot two\r\nend\r\ngot end\r\n"
    assert [result.exit_code for result in outputs] == [None, None, 0, None, 7]


@pytest.mark.parametrize("leg", ["harness", "executor"])
async def test_command_cut_in_the_middle_gives_all_its_output(place: Place, leg: Leg) -> None:
    """Output before and after the cut, and while codex comes back."""
    cmd = (
        f"{NUMBERED}; touch begun; while [ ! -e missed ]; do sleep 0.01; echo tick; done; {NUMBERED};"
        " echo the end; exit 4"
    )
    with trio.fail_after(90):
        first, second, last = await place.results(
            exec_command(cmd, **SOON),
            place.after_cut("begun", leg, lambda _: exec_command("touch missed")),
            poll(),
        )
    lines = "".join(f"line {number}\n" for number in range(1, 301))
    output = first.output + last.output
    assert output.replace("tick\n", "") == lines + lines + "the end\n"
    assert (second.exit_code, last.exit_code) == (0, 4)


@pytest.mark.parametrize(
    ("leg", "places"),
    [
        # what there is at once, and of what follows an upgrade, a handshake (in clear text: what follows the
        # upgrade), and more
        ("harness", [("out", 1), ("in", 0), ("in", 2), ("out", 1), ("out", 2)]),
        ("executor", [("in", 1), ("out", 2)]),
    ],
)
async def test_output_that_is_cut_arrives_once_and_whole(
    place: Place, leg: Leg, places: list[tuple[Way, int]]
) -> None:
    cmd = "touch ready; while [ ! -e go ]; do sleep 0.01; done; seq 1 30000; echo the end; exit 4"

    def go(request: ModelRequest) -> FunctionCall:
        (place.cwd / "go").touch()
        return poll()(request)

    with trio.fail_after(90):
        first, last = await place.results(
            exec_command(cmd, **SOON), place.armed(leg, places, after_file(place.cwd / "ready", go))
        )
    place.check_cut()
    whole = "".join(f"{number}\n" for number in range(1, 30_001)) + "the end\n"
    assert (first.output, last.exit_code, last.tokens) == ("", 4, -(-len(whole) // 4))
    assert last.output.endswith("\n30000\nthe end\n")


@pytest.mark.parametrize("leg", ["harness", "executor"])
async def test_writes_that_are_cut_arrive_once(place: Place, leg: Leg) -> None:
    """Cut instead of the next frame to the relay, and then instead of the next one from it."""
    with trio.fail_after(90):
        results = await place.results(
            exec_command(ECHO, tty=True, **SOON),
            place.armed(leg, [("in", 1)], after_file(place.cwd / "ready", poll("one\n", ends=False))),
            place.armed(leg, [("out", 1)], poll("two\n", ends=False)),
            poll("end\n"),
        )
    place.check_cut()
    text = "".join(result.output for result in results)
    assert text == "one\r\ngot one\r\ntwo\r\ngot two\r\nend\r\ngot end\r\n"
    assert [result.exit_code for result in results] == [None, None, None, 7]


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("leg", ["harness", "executor"])
async def test_start_that_is_cut_is_made_once_or_told_to_have_failed(
    place: Place, leg: Leg, way: Way
) -> None:
    """The released client does not repeat what may have been done; the command after that is well."""
    with trio.fail_after(90):
        started, cat = await place.run(
            place.armed(leg, [(way, 4)], exec_command("echo x >> starts")),
            exec_command("touch starts; cat starts"),
        )
    place.check_cut()
    lost = "exec-server transport disconnected" in started
    assert ExecResult.parse(cat).output in (("", "x\n") if lost else ("x\n",))


# What the relay can read.


async def test_relay_reads_nothing_between_us_and_a_released_executor(
    environment: Environment, relay: Relay, tmp_path: Path
) -> None:
    recorded = relay.proxy.recorded = []
    with trio.fail_after(60):
        markers = await leave_marks(environment, tmp_path)
        relay.proxy.cut("harness")
        await leave_marks(environment, tmp_path)
    assert {piece.leg for piece in recorded} == {"executor", "harness"}
    assert seen(recorded, markers) == set()


async def test_relay_reads_nothing_of_what_a_released_client_encrypts(place: Place) -> None:
    """In clear text, where all of it is there to be read, the same search finds it on both legs."""
    recorded = place.relay.proxy.recorded = []
    names = ("command", "output", "content", "name")
    script = f"# {MARKERS['command'].decode()}\necho {MARKERS['output'].decode().lower()} | tr a-z A-Z"
    patch = f"*** Add File: {MARKERS['name'].decode()}\n+{MARKERS['content'].decode()}\n"
    with trio.fail_after(60):
        outputs = await place.run(exec_command(script), apply_patch(patch))
    assert MARKERS["output"].decode() in outputs[0]
    assert "Success" in outputs[1]
    legs: tuple[Leg, ...] = ("executor", "harness")
    everything = {(leg, name) for leg in legs for name in names}
    found = seen(recorded, {name: MARKERS[name] for name in names})
    assert found == (set() if isinstance(place.where, NoiseEnvironment) else everything)
