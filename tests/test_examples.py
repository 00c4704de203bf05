"""The examples, and every program and command of README.md, run as a reader would run them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest
import trio

from tests.conftest import SERVE, WebsocketServer
from tests.fakes import Watched, lacks_bubblewrap
from tests.test_cli import started

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = ROOT / "examples"
TIME_LIMIT = 30.0

STUBS = {
    "execenv": f'exec {shlex.quote(sys.executable)} -m execenv "$@"',
    "ssh": 'shift; exec sh -c "$*"',  # ssh HOST COMMAND, where every host is this one
    "codex": 'echo "$CODEX_EXEC_SERVER_URL"',
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


PROGRAMS = _blocks("python")
LINES = [line for block in _blocks("sh") for line in block.splitlines() if "venv" not in line]
RELAY = "127.0.0.1:8700"
OF_THE_RELAY = [line for line in LINES if "relay" in line or RELAY in line or line.endswith(" box")]
COMMANDS = [line for line in LINES if line not in OF_THE_RELAY]


@pytest.fixture(params=["local", "stdio", "websocket"])
def target(request: pytest.FixtureRequest, websocket_server: WebsocketServer) -> str:
    return {"local": "local", "stdio": shlex.join([*SERVE, "stdio"]), "websocket": websocket_server.url}[
        request.param
    ]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what README.md takes for granted, and its programs on PATH."""
    (tmp_path / "bin").mkdir()
    for name, script in STUBS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "token").write_text("a token\n")
    (tmp_path / "secret").write_text("0123456789abcdef" * 2)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def run_example(name: str, *args: str) -> tuple[str, int]:
    """Run an example to its end; stdout and status. Nothing may be on stderr."""
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process(
            [sys.executable, str(EXAMPLES / name), *args],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert done.stderr.decode() == ""
    return done.stdout.decode(), done.returncode


# examples/


async def test_harness_gives_the_model_each_result_and_what_was_said_before_a_deadline(target: str) -> None:
    stdout, status = await run_example("harness.py", target)
    assert status == 0
    results = re.findall(
        r"^\[(.*)\]\n(.*)$", stdout, re.MULTILINE
    )  # the status, and the first line behind it
    missing_status, missing_text = results.pop(2)
    assert re.fullmatch(r"exit status [1-9]\d*", missing_status)
    assert "question.sh" in missing_text
    assert results == [
        ("exit status 0", "answer.sh"),
        ("exit status 0", "42"),
        ("stopped after 2 s", "thinking"),
        ("exit status 0", "echo $((6 * 7))"),
    ]


async def test_repository_is_repaired(target: str) -> None:
    stdout, status = await run_example("edit_repository.py", target)
    assert status == 0
    assert "Run the tests with `python3 -m unittest`." in stdout
    assert "files: temperature.py test_temperature.py" in stdout
    outcome = [line for line in stdout.splitlines() if line.startswith(("tests", "report"))]
    assert outcome == ["tests pass: False", "report: AssertionError: 23.0 != 32", "tests pass: True"]


async def test_build_prefixes_every_line_and_succeeds_when_all_do(target: str) -> None:
    stdout, status = await run_example("build.py", target, "a=echo one; echo two >&2", "b=printf three")
    assert status == 0
    assert sorted(stdout.splitlines()) == ["[a] one", "[a] two", "[b] three", "build: all good"]


async def test_first_failure_of_a_build_ends_the_others_and_all_they_started(
    target: str, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    steps = ["long=setsid sleep 1000 & echo $$ $!; wait", f"bad=cat {shlex.quote(str(fifo))}; exit 4"]
    argv = [sys.executable, str(EXAMPLES / "build.py"), target, *steps]
    with closing(Watched()) as watched:
        async with started(argv) as build:
            line = await build.expect(b"\n")
            assert line.startswith(b"[long] ")
            for pid in line.split()[1:]:
                watched.add(int(pid))
            await trio.to_thread.run_sync(
                fifo.write_bytes, b"", abandon_on_cancel=True
            )  # waits for its reader
            assert await build.rest() == (b"build: bad failed with status 4\n", b"", 1)
            await watched.wait_gone()


async def test_build_without_words_shows_a_failure(target: str) -> None:
    stdout, status = await run_example("build.py", target)
    assert (stdout.splitlines()[-1], status) == ("build: test failed with status 1", 1)
    assert "never said" not in stdout


async def test_terminal_session_reads_what_each_line_shows(target: str) -> None:
    assert await run_example("pty_session.py", target) == (
        "'tty | cut -c1-5' shows '/dev/\\n'\n"
        "'answer=$((6 * 7))' shows ''\n"
        "'echo the answer is $answer' shows 'the answer is 42\\n'\n"
        "the shell ended with status 3\n",
        3,
    )


async def test_program_that_outgrows_its_machine_uses_others(
    tmp_path: Path, websocket_server: WebsocketServer
) -> None:
    assert await run_example("outgrow.py") == (
        "17984 primes below 200000, found in 10 ranges on 1 machines\n",
        0,
    )
    other = f"env XDG_CACHE_HOME={shlex.quote(str(tmp_path))}"
    stdout, status = await run_example("outgrow.py", "local", websocket_server.url, other)
    assert (stdout, status) == ("17984 primes below 200000, found in 10 ranges on 3 machines\n", 0)
    assert os.listdir(tmp_path) == ["execenv"]


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_says_how_to_run_it(example: Path) -> None:
    text = example.read_text()
    assert len(text.splitlines()) < 80
    assert f"python examples/{example.name} [TARGET" in text


# README.md


def test_readme_has_programs_and_commands() -> None:
    assert len(PROGRAMS) >= 4
    assert any(command.startswith("execenv serve") for command in COMMANDS)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
async def test_program_of_the_readme_prints_what_it_says(
    program: str, websocket_server: WebsocketServer, at_home: Path
) -> None:
    if lacks_bubblewrap and "sandboxed" in program:
        pytest.skip("bubblewrap is not installed")
    program = program.replace("ws://127.0.0.1:8765", websocket_server.url)
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process(
            [sys.executable, "-c", program], capture_stdout=True, capture_stderr=True, check=False
        )
    assert (done.stderr.decode(), done.returncode) == ("", 0)
    expected = re.findall(r"# prints: (.*)", program)
    assert expected
    for line in expected:
        assert line in done.stdout.decode()


@pytest.mark.parametrize("command", COMMANDS)
async def test_command_of_the_readme_works(
    command: str, websocket_server: WebsocketServer, at_home: Path
) -> None:
    if lacks_bubblewrap and re.search("--sandbox|doctor", command):
        pytest.skip("bubblewrap is not installed")
    if command.startswith("execenv serve"):
        argv = shlex.split(command.replace("127.0.0.1:8765", "127.0.0.1:0"))
        async with started(argv) as server:
            assert (await server.expect(b"\n")).startswith(b"ws://127.0.0.1:")
            server.process.send_signal(signal.SIGTERM)
            assert await server.rest() == (b"", b"", 0)
        return
    command = command.replace("127.0.0.1:8765", websocket_server.url.removeprefix("ws://"))
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    told = done.stderr.decode()
    if command.startswith("execenv cp"):
        assert re.fullmatch(r".*: \d+ files?, [\d.]+ \w+ in [\d.]+ s\n", told)
        told = ""
    elif command.startswith("execenv env add"):
        assert (at_home / "config/execenv/environments.toml").exists()
    elif "readyz" not in command:
        assert done.stdout.strip()
    assert (told, done.returncode) == ("", 0)


async def test_commands_of_the_readme_about_a_relay_work_one_after_the_other(
    at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(at_home / "state"))
    words = [command.split()[1] for command in OF_THE_RELAY]
    assert words == ["relay", "relay", "relay", "serve", "run", "env", "env"]
    async with AsyncExitStack() as stack:
        here = RELAY
        background = []
        for command in OF_THE_RELAY:
            if " serve " not in command:
                with trio.fail_after(TIME_LIMIT):
                    done = await trio.run_process(
                        ["sh", "-c", command.replace(RELAY, here)],
                        stdin=subprocess.DEVNULL,
                        capture_stdout=True,
                        capture_stderr=True,
                        check=False,
                    )
                assert (done.stderr.decode(), done.returncode) == ("", 0), command
                if command.startswith("execenv run"):
                    assert done.stdout.strip()
                continue
            address = here if "--remote" in command else "127.0.0.1:0"
            program = await stack.enter_async_context(started(shlex.split(command.replace(RELAY, address))))
            background.append(program)
            line = (await program.expect(b"\n")).decode()
            if "--remote" in command:
                assert line.startswith("registered box at ws://")
            else:
                here = line.strip().removeprefix("http://")
        for program in reversed(background):
            program.process.send_signal(signal.SIGTERM)
            stdout, _, status = await program.rest()
            assert (stdout, status) == (b"", 0)
