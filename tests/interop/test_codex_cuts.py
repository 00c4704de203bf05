"""A released codex whose connection to an exec-server is cut, through a proxy that cuts where it is told to.

Each runs against codex's own exec-server too: what it does not survive there is not ours to mend.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import define

from execenv.testing import Cut, FaultPlan, FaultProxy, Recorder, Recording, Rule, open_fault_proxy
from execenv.testing.proxy import host_and_port
from execenv.testing.recordings import Line
from tests.interop.codex import (
    EXECENV_SERVER,
    ExecResult,
    ExecServer,
    ProcessMark,
    real_exec_server,
    run_codex,
    websocket_server,
)
from tests.interop.conftest import exec_command
from tests.interop.responses_api import FunctionCall, ModelRequest, Turn
from tests.interop.test_codex_client import SOON, after_file

pytestmark = pytest.mark.interop

TIME_LIMIT = 120.0


@define(eq=False)
class Place:
    """A server behind a proxy, and where codex runs."""

    name: str
    codex: Path
    server: ExecServer
    proxy: FaultProxy
    recorder: Recorder
    cwd: Path
    home: Path
    mark: ProcessMark

    async def run(self, *turns: Turn) -> list[str]:
        """What the model was given back by each of its calls."""
        run = await run_codex(self.codex, self.proxy.url, turns, cwd=self.cwd, home=self.home, mark=self.mark)
        assert run.returncode == 0, run.stderr
        return list(run.tool_outputs)

    def after(
        self, name: str, act: Callable[[], object], turn: Callable[[ModelRequest], FunctionCall]
    ) -> Turn:
        """When a command has made that file: do something, and take the turn."""

        def act_and_take(request: ModelRequest) -> FunctionCall:
            act()
            return turn(request)

        return after_file(self.cwd / name, act_and_take)

    def cut(self, side: str = "both") -> None:
        assert self.proxy.open_connections
        self.proxy.cut(side)  # type: ignore[arg-type]

    def touch(self, name: str) -> None:
        (self.cwd / name).touch()

    @property
    def recording(self) -> Recording:
        return self.recorder.recording

    def requests(self, method: str, conn: int | None = None) -> list[Line]:
        """What codex sent, as far as it arrived."""
        return [
            line
            for line in self.recording.lines
            if line.sent and line.msg.get("method") == method and conn in (None, line.conn)
        ]

    def reply(self, request: Line) -> dict[str, object]:
        """What was answered to it."""
        (reply,) = [
            line.msg
            for line in self.recording.of(request.conn)
            if line.is_reply and line.msg["id"] == request.msg["id"]
        ]
        return dict(reply)

    def assert_resumed(self, conn: int) -> None:
        """The connection took up the session of the first one, and asked what it had missed."""
        (first,), (last,) = self.requests("initialize", 0), self.requests("initialize", conn)
        assert last.msg["params"]["resumeSessionId"] == self.reply(first)["result"]["sessionId"]  # type: ignore[index]
        assert self.reply(last)["result"]["sessionId"] == last.msg["params"]["resumeSessionId"]  # type: ignore[index]
        assert self.requests("process/read", conn)


@asynccontextmanager
async def open_server(kind: str, codex: Path, home: Path) -> AsyncIterator[ExecServer]:
    if kind == "reference":
        async with real_exec_server(codex, home, {}) as server:
            yield server
    else:
        async with websocket_server([*EXECENV_SERVER, "ws://127.0.0.1:0"], home, {}) as server:
            yield server


@pytest.fixture(params=["reference", "execenv"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rules() -> tuple[Rule, ...]:
    """What the proxy does by itself; tests have it in other words by `parametrize`."""
    return ()


@pytest.fixture
async def place(kind: str, rules: tuple[Rule, ...], codex: Path, tmp_path: Path) -> AsyncIterator[Place]:
    cwd = tmp_path / "work"
    cwd.mkdir()
    recorder, mark = Recorder(), ProcessMark()
    async with (
        open_server(kind, codex, tmp_path / "server") as server,
        open_fault_proxy(server.url, FaultPlan(rules=rules), recorder=recorder) as proxy,
    ):
        try:
            yield Place(kind, codex, server, proxy, recorder, cwd, tmp_path / "client", mark)
        finally:
            mark.kill()
            if folder := os.environ.get("EXECENV_KEEP_RECORDINGS"):
                recorder.recording.save(os.path.join(folder, f"{tmp_path.name}.jsonl"))


NUMBERED = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i; done"


def poll(chars: str = "", *, ends: bool = True) -> Callable[[ModelRequest], FunctionCall]:
    """Write to the session that the first call has left running, and wait for its end, or a moment."""

    def make(request: ModelRequest) -> FunctionCall:
        session = ExecResult.parse(request.tool_outputs[0]).session_id
        moment = {"yield_time_ms": 60_000} if ends else SOON
        return FunctionCall("write_stdin", {"session_id": session, "chars": chars, **moment})

    return make


async def test_command_cut_in_the_middle_gives_all_its_output(place: Place) -> None:
    """Output before, during and after the cut; the child goes on while nobody is connected."""
    cmd = (
        f"{NUMBERED}; touch begun; while [ ! -e cut ]; do sleep 0.01; done; {NUMBERED}; touch missed;"
        " while [ ! -e go ]; do sleep 0.01; done; echo the end; exit 4"
    )

    def cut() -> None:
        place.proxy.refuse(3)
        place.cut()
        place.touch("cut")

    with trio.fail_after(TIME_LIMIT):
        outputs = await place.run(
            exec_command(cmd, **SOON),
            place.after("begun", cut, lambda _: exec_command("while [ ! -e missed ]; do sleep 0.01; done")),
            place.after("missed", lambda: place.touch("go"), poll()),
        )
    first, second, last = map(ExecResult.parse, outputs)
    lines = "".join(f"line {number}\n" for number in range(1, 301))
    assert first.output + last.output == lines + lines + "the end\n"
    assert (second.exit_code, last.exit_code) == (0, 4)
    assert (place.proxy.connections, place.proxy.plan.counts["refused"]) == (2, 3)
    place.assert_resumed(1)


ECHO = 'touch ready; while read -r line; do echo "got $line"; [ "$line" = end ] && exit 7; done'


@pytest.mark.parametrize("rules", [(Rule(Cut("before"), kind="reply", method="process/write"),)])
async def test_write_whose_answer_was_cut_reaches_the_child_once(place: Place) -> None:
    with trio.fail_after(TIME_LIMIT):
        outputs = await place.run(
            exec_command(ECHO, tty=True, **SOON),
            after_file(place.cwd / "ready", poll("hello\n", ends=False)),
            poll("end\n"),
        )
    output = "".join(ExecResult.parse(text).output for text in outputs)
    assert output == "hello\r\ngot hello\r\nend\r\ngot end\r\n"
    assert ExecResult.parse(outputs[-1]).exit_code == 7
    assert place.proxy.plan.counts["cut before"] == 1
    place.assert_resumed(1)
    first, again, last = place.requests("process/write")
    assert (first.conn, again.conn, last.conn) == (0, 1, 1)
    assert first.msg["params"] == again.msg["params"]  # the writeId too
    assert again.msg["params"]["writeId"] != last.msg["params"]["writeId"]


@pytest.mark.parametrize("rules", [(Rule(Cut("middle"), kind="request", method="process/write"),)])
async def test_write_that_was_cut_on_its_way_reaches_the_child_once(place: Place) -> None:
    with trio.fail_after(TIME_LIMIT):
        outputs = await place.run(
            exec_command(ECHO, tty=True, **SOON),
            after_file(place.cwd / "ready", poll("end\n")),
        )
    assert "".join(ExecResult.parse(text).output for text in outputs) == "end\r\ngot end\r\n"


async def test_terminal_session_goes_on_behind_cuts(place: Place) -> None:
    with trio.fail_after(TIME_LIMIT):
        outputs = await place.run(
            exec_command(ECHO, tty=True, **SOON),
            place.after("ready", place.cut, poll("one\n", ends=False)),
            place.after("ready", place.cut, poll("end\n")),
        )
    results = [ExecResult.parse(text) for text in outputs]
    assert "".join(result.output for result in results) == "one\r\ngot one\r\nend\r\ngot end\r\n"
    assert [result.exit_code for result in results] == [None, None, 7]
    assert place.proxy.connections == 3
    place.assert_resumed(1)
    place.assert_resumed(2)


async def test_restarted_server_fails_the_running_command_and_not_the_next(
    place: Place, codex: Path, tmp_path: Path
) -> None:
    async with open_server(place.name, codex, tmp_path / "second") as second:

        def restart() -> None:
            place.server.mark.kill()
            place.proxy.target = host_and_port(second.url)

        with trio.fail_after(TIME_LIMIT):
            failed, well = (
                await place.run(
                    exec_command("echo begun; touch ready; sleep 1000", **SOON),
                    place.after("ready", restart, poll()),
                    exec_command("echo well"),
                )
            )[1:]
        assert "unknown session id" in failed
        assert (ExecResult.parse(well).output, ExecResult.parse(well).exit_code) == ("well\n", 0)
        initialized = place.requests("initialize")
        assert [line.msg["params"]["resumeSessionId"] is None for line in initialized][:2] == [True, False]
        assert initialized[-1].msg["params"]["resumeSessionId"] is None


@pytest.mark.parametrize("kind", ["execenv"])
async def test_half_open_connection_does_not_lock_out_its_client(place: Place) -> None:
    """Codex learns that its connection is gone, the server does not: it has to find out before 45 s are over.

    The reference does not, and after 45 s codex gives up, which is too long to be shown each time.
    """
    with trio.fail_after(TIME_LIMIT):
        outputs = await place.run(
            exec_command(ECHO, tty=True, **SOON),
            place.after("ready", lambda: place.cut("client"), poll("end\n")),
        )
    errors = [place.reply(line).get("error") for line in place.requests("initialize")[1:]]
    locked_out = {"code": -32010, "message": "session session-1 is already attached to another connection"}
    assert errors[0] == locked_out
    assert ExecResult.parse(outputs[-1]).output.endswith("got end\r\n")
    assert errors[-1] is None
    assert all(error == locked_out for error in errors[:-1])
