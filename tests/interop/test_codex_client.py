"""A released codex as the client: what its model reads back when commands run on an exec-server."""

from __future__ import annotations

import os
from collections.abc import Callable, Set
from pathlib import Path

import pytest
import trio

from tests.interop.codex import (
    ExecResult,
    ExecServer,
    ProcessMark,
)
from tests.interop.conftest import Target, exec_command
from tests.interop.responses_api import FunctionCall, ModelRequest, Turn

pytestmark = pytest.mark.interop


def write_stdin(request: ModelRequest, chars: str = "") -> FunctionCall:
    """A call that writes to (or polls) the session of the last result, for 30 s or until its end."""
    session = ExecResult.parse(request.tool_outputs[-1]).session_id
    return FunctionCall("write_stdin", {"session_id": session, "chars": chars, "yield_time_ms": 30_000})


def after_file(path: Path, turn: Callable[[ModelRequest], FunctionCall]) -> Turn:
    """A turn that is taken when a command has made `path`."""

    async def wait_and_take(request: ModelRequest) -> FunctionCall:
        while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240 - what a command does has no event here
            await trio.sleep(0.01)
        return turn(request)

    return wait_and_take


async def assert_gone(mark: ProcessMark, *, within: float = 20, but: Set[int] = frozenset()) -> None:
    """Fail with the command lines of the marked processes that are not gone within so many seconds."""
    with trio.move_on_after(within):
        await mark.wait_gone(but=but)
    assert mark.commands(but=but) == []


SOON = {"yield_time_ms": 250}
"""The model gets a session after the shortest time there is (what is printed by then is not certain)."""


async def test_output_and_exit_code_reach_the_model(target: Target) -> None:
    with trio.fail_after(60):
        [result] = await target.results(exec_command("echo hello"))
    assert (result.output, result.exit_code) == ("hello\n", 0)


async def test_stderr_reaches_the_model(target: Target) -> None:
    with trio.fail_after(60):
        [result] = await target.results(exec_command("echo oops >&2"))
    assert (result.output, result.exit_code) == ("oops\n", 0)


async def test_exit_code_of_a_failing_command_reaches_the_model(target: Target) -> None:
    with trio.fail_after(60):
        [result] = await target.results(exec_command("echo before; exit 3"))
    assert (result.output, result.exit_code) == ("before\n", 3)


async def test_death_by_signal_is_128_plus_its_number(target: Target) -> None:
    with trio.fail_after(60):
        [result] = await target.results(exec_command("kill -KILL $$"))
    assert (result.output, result.exit_code) == ("", 137)


async def test_unknown_command_is_reported_by_the_shell(target: Target) -> None:
    with trio.fail_after(60):
        [result] = await target.results(exec_command("no-such-command-here"))
    assert result.exit_code == 127
    assert "no-such-command-here: command not found" in result.output


async def test_every_byte_of_a_long_output_arrives_at_codex(target: Target) -> None:
    whole = "".join(f"{number}\n" for number in range(1, 600_001)) + "the end\n"
    with trio.fail_after(60):
        [result] = await target.results(exec_command("seq 1 600000; echo the end"))
    assert result.exit_code == 0
    # 4 MB: the text is cut by codex, the size it states is not
    assert result.tokens == -(-len(whole) // 4)
    assert "\n1\n2\n3\n" in result.output
    assert result.output.endswith("\n599999\n600000\nthe end\n")


async def test_command_runs_until_its_last_descendant_lets_go_of_the_output(target: Target) -> None:
    cmd = "echo early; { while [ ! -e go ]; do sleep 0.02; done; echo late; } & exit 5"

    def let_go(request: ModelRequest) -> FunctionCall:
        (target.cwd / "go").touch()
        return write_stdin(request)

    with trio.fail_after(60):
        first, last = await target.results(exec_command(cmd, **SOON), let_go)
    assert first.exit_code is None
    assert first.output + last.output == "early\nlate\n"
    assert last.exit_code == 5


async def test_running_command_is_polled_to_its_end(target: Target) -> None:
    def poll(request: ModelRequest) -> FunctionCall:
        (target.cwd / "go").touch()
        return write_stdin(request)

    cmd = "echo begin; while [ ! -e go ]; do sleep 0.02; done; echo end; exit 4"
    with trio.fail_after(60):
        first, last = await target.results(exec_command(cmd, **SOON), poll)
    assert (first.exit_code, last.exit_code) == (None, 4)
    assert first.output + last.output == "begin\nend\n"


async def test_line_written_to_a_terminal_is_echoed_and_read(target: Target) -> None:
    cmd = 'stty size; touch ready; read -r line; echo "got $line"; test -t 1'
    answer = after_file(target.cwd / "ready", lambda request: write_stdin(request, "hello\n"))
    with trio.fail_after(60):
        first, last = await target.results(exec_command(cmd, tty=True, **SOON), answer)
    assert (first.exit_code, last.exit_code) == (None, 0)
    assert first.output + last.output == "24 80\r\nhello\r\ngot hello\r\n"


@pytest.mark.parametrize(("tty", "echo"), [(True, "^Ccaught\r\n"), (False, "caught\n")])
async def test_control_c_interrupts(target: Target, tty: bool, echo: str) -> None:
    # in a terminal the character does it, elsewhere codex asks for the signal
    cmd = "trap 'echo caught; exit 7' INT; touch ready; sleep 1000"
    interrupt = after_file(target.cwd / "ready", lambda request: write_stdin(request, "\x03"))
    with trio.fail_after(60):
        first, last = await target.results(exec_command(cmd, tty=tty, **SOON), interrupt)
    assert (first.output, first.exit_code) == ("", None)
    assert (last.output, last.exit_code) == (echo, 7)


@pytest.mark.parametrize("tty", [True, False])
async def test_exit_code_of_an_interrupted_command(target: Target, tty: bool) -> None:
    # The reference says 1 for any signal on a terminal (protocol.md §4.4); ours tells it, as on a pipe.
    code = 1 if tty and target.name.startswith("reference") else 130
    cmd = "touch ready; exec sleep 1000"
    interrupt = after_file(target.cwd / "ready", lambda request: write_stdin(request, "\x03"))
    with trio.fail_after(60):
        _, last = await target.results(exec_command(cmd, tty=tty, **SOON), interrupt)
    assert last.exit_code == code


async def test_commands_of_one_turn_run_side_by_side(target: Target) -> None:
    def meet(mine: str, other: str) -> FunctionCall:
        wait = f"while [ ! -e {other} ]; do sleep 0.02; done"
        return exec_command(f"touch {mine}; {wait}; echo {mine} met {other}")

    with trio.fail_after(60):
        results = await target.results([meet("a", "b"), meet("b", "a")])
    assert [(r.output, r.exit_code) for r in results] == [("a met b\n", 0), ("b met a\n", 0)]


async def test_environment_policy_applies_to_the_environment_of_the_server(target: Target) -> None:
    policy = '[shell_environment_policy]\nexclude = ["server_t*"]\nset = { ADDED = "by the policy" }\n'
    cmd = 'echo "$SERVER_ONE, ${SERVER_TWO-not set}, $ADDED"'
    with trio.fail_after(60):
        [result] = await target.results(exec_command(cmd), extra_config=policy)
    assert result.output == "from the server, not set, by the policy\n"


async def test_core_environment_has_no_other_names_of_the_server(target: Target) -> None:
    policy = '[shell_environment_policy]\ninherit = "core"\n'
    cmd = 'echo "${SERVER_ONE-not set}, ${HOME:+home}, ${PATH:+path}, $CODEX_VERSION"'
    with trio.fail_after(60):
        [result] = await target.results(exec_command(cmd), extra_config=policy)
    assert result.output == "not set, home, path, 0.169.0\n"


async def test_command_runs_in_the_working_directory(target: Target) -> None:
    inner = target.cwd / "inner #1"
    inner.mkdir()
    with trio.fail_after(60):
        outer_result, inner_result = await target.results(
            [exec_command("pwd"), exec_command("pwd", workdir=str(inner))]
        )
    assert outer_result.output == f"{target.cwd}\n"
    assert inner_result.output == f"{inner}\n"


async def test_missing_working_directory_fails_the_command_and_not_the_next(target: Target) -> None:
    missing = exec_command("pwd", workdir=str(target.cwd / "missing"))
    with trio.fail_after(60):
        run = await target.run([missing, exec_command("echo well")])
    assert "No such file or directory (os error 2)" in run.tool_outputs[0]
    assert ExecResult.parse(run.tool_outputs[1]).output == "well\n"


async def test_background_process_of_a_terminal_ends_with_its_shell(target: Target) -> None:
    with trio.fail_after(60):
        [result] = await target.results(exec_command("sleep 1000 & echo started; exit 6", tty=True))
    assert (result.output, result.exit_code) == ("started\r\n", 6)


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize("cmd", ["exec sleep 1000", "trap '' TERM HUP INT; sleep 1000 & wait"])
async def test_no_process_is_left_of_a_command_when_codex_is_gone(
    target: Target, cmd: str, tty: bool
) -> None:
    may_stay: Set[int] = set()

    def after_the_first(request: ModelRequest) -> FunctionCall:
        # only now, as a websocket server may keep a helper that it starts with its first process
        nonlocal may_stay
        may_stay = target.server.mark.pids() if isinstance(target.server, ExecServer) else set()
        return exec_command(cmd, tty=tty, **SOON)

    with trio.fail_after(60):
        _, running = await target.results(exec_command("true"), after_the_first)
    assert running.session_id is not None
    if isinstance(target.server, ExecServer):
        # It is nearly always gone at once. But a codex on a busy machine may be gone before the server took
        # its process/terminate; then the detached session's end, after 80 s, is what ends the command.
        await assert_gone(target.server.mark, within=100, but=may_stay)
    else:
        await assert_gone(target.mark)


@pytest.mark.parametrize("target", ["reference-stdio", "execenv-stdio"], indirect=True)
async def test_stdio_server_takes_background_processes_with_it(target: Target) -> None:
    with trio.fail_after(60):
        run = await target.run([exec_command("sleep 1000 & exit 0", **SOON)])
        assert ExecResult.parse(run.tool_outputs[0]).session_id is not None
        await assert_gone(target.mark)
