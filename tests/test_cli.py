"""The command line as a user meets it: a real process, its streams, its status, its signals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from attrs import define, field

from tests.conftest import SERVE, WebsocketServer
from tests.fakes import Watched, python

EXECENV = (sys.executable, "-m", "execenv")
TIME_LIMIT = 30.0

STUBBORN = """
    import os, signal, subprocess
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print(os.getpid(), child.pid, flush=True)
    while True:
        signal.sigwait({signal.SIGINT})
        print("no", flush=True)
"""
"""Ignores what can be ignored, and has a child that left its process group and session."""

INTERRUPTIBLE = """
    import signal, sys
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    print("ready", flush=True)
    signal.sigwait({signal.SIGINT})
    print("caught", flush=True)
    sys.exit(7)
"""

TELLS_SIZE = """
    import os, signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    while True:
        size = os.get_terminal_size()
        print(f"{size.lines} rows, {size.columns} columns", flush=True)
        signal.sigwait({signal.SIGWINCH})
"""


@define(eq=False)
class Running:
    """A command line that runs: what it printed so far, and its process."""

    process: trio.Process
    _printed: bytearray = field(factory=bytearray)

    async def expect(self, marker: bytes) -> bytes:
        """What is printed on stdout up to and with `marker`."""
        assert self.process.stdout is not None
        while marker not in self._printed:
            data = await self.process.stdout.receive_some()
            assert data, f"stdout ended after {bytes(self._printed)!r}, without {marker!r}"
            self._printed += data
        end = self._printed.index(marker) + len(marker)
        expected = bytes(self._printed[:end])
        del self._printed[:end]
        return expected

    async def rest(self) -> tuple[bytes, bytes, int]:
        """What else comes on stdout, what comes on stderr, and the status."""
        errors = bytearray()

        async def read_errors() -> None:
            assert self.process.stderr is not None
            async for data in self.process.stderr:
                errors.extend(data)

        assert self.process.stdout is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_errors)
            async for data in self.process.stdout:
                self._printed += data
        return bytes(self._printed), bytes(errors), await self.process.wait()


@asynccontextmanager
async def started(argv: Sequence[str]) -> AsyncIterator[Running]:
    """Start a program with a pipe at each of its streams; it is gone when the block is left."""
    process = await trio.lowlevel.open_process(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        with trio.fail_after(TIME_LIMIT):
            yield Running(process)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream is not None
                await trio.aclose_forcefully(stream)


async def execenv(
    *args: str, stdin: bytes | int = b"", env: dict[str, str] | None = None
) -> tuple[bytes, bytes, int]:
    """Run the command line to its end: stdout, stderr and status."""
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process(
            [*EXECENV, *args],
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, **(env or {})},
        )
    return done.stdout, done.stderr, done.returncode


def check_one_line(stderr: bytes, *parts: str) -> None:
    """One line for people, without a traceback, and with these words."""
    lines = stderr.decode().splitlines()
    assert len(lines) == 1, stderr.decode()
    for part in parts:
        assert part in lines[0]


@pytest.fixture(params=["local", "stdio", "websocket"])
def at(request: pytest.FixtureRequest, websocket_server: WebsocketServer) -> list[str]:
    """The words that choose an environment."""
    targets = {"local": "local", "stdio": shlex.join([*SERVE, "stdio"]), "websocket": websocket_server.url}
    return ["--env", targets[request.param]]


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.close()


# Streams.


async def test_each_output_goes_to_its_own_stream(at: list[str]) -> None:
    assert await execenv("run", *at, "--", "sh", "-c", "echo out; echo err >&2") == (b"out\n", b"err\n", 0)


async def test_local_is_where_a_command_runs_if_nothing_is_said() -> None:
    assert await execenv("run", "--", "echo", "here") == (b"here\n", b"", 0)
    assert await execenv("run", "echo", "--", "-e") == (b"-- -e\n", b"", 0)


async def test_large_output_comes_whole(at: list[str]) -> None:
    stdout, stderr, status = await execenv("run", *at, "--", "seq", "1", "600000")
    assert (stderr, status) == (b"", 0)
    assert stdout == b"".join(b"%d\n" % number for number in range(1, 600_001))


async def test_output_comes_while_the_program_runs_and_reads_its_input(at: list[str]) -> None:
    async with started([*EXECENV, "run", *at, "--", "cat"]) as run:
        assert run.process.stdin is not None
        for line in (b"one\n", b"two\n"):
            await run.process.stdin.send_all(line)
            assert await run.expect(b"\n") == line
        await run.process.stdin.aclose()
        assert await run.rest() == (b"", b"", 0)


async def test_piped_input_reaches_the_program_to_its_end(at: list[str]) -> None:
    data = bytes(range(256)) * 8192
    assert await execenv("run", *at, "--", "cat", stdin=data) == (data, b"", 0)


async def test_file_can_be_the_input(at: list[str], tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "input").write_bytes(data)
    with (tmp_path / "input").open("rb") as file:
        assert await execenv("run", *at, "--", "cat", stdin=file.fileno()) == (data, b"", 0)


async def test_input_from_dev_null_is_at_its_end(at: list[str]) -> None:
    assert await execenv("run", *at, "--", "cat", stdin=subprocess.DEVNULL) == (b"", b"", 0)


async def test_file_can_be_the_output(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as file, trio.fail_after(TIME_LIMIT):
        await trio.run_process([*EXECENV, "run", "--", "seq", "100000"], stdout=file)
    assert (tmp_path / "output").read_bytes().count(b"\n") == 100_000


async def test_command_ends_though_its_input_is_still_open(at: list[str]) -> None:
    async with started([*EXECENV, "run", *at, "--", "sh", "-c", "exit 6"]) as run:
        assert await run.rest() == (b"", b"", 6)


async def test_input_that_nobody_reads_does_no_harm(at: list[str]) -> None:
    assert await execenv("run", *at, "--", "sh", "-c", "exit 6", stdin=b"x" * 3_000_000) == (b"", b"", 6)


async def test_closed_output_ends_the_command_without_a_traceback(at: list[str], watched: Watched) -> None:
    endless = "echo $$; while :; do echo more; done"
    async with started([*EXECENV, "run", *at, "--", "sh", "-c", endless]) as run:
        watched.add(int(await run.expect(b"\n")))
        assert run.process.stdout is not None
        await run.process.stdout.aclose()
        status = await run.process.wait()
        assert run.process.stderr is not None
        stderr = b"".join([data async for data in run.process.stderr])
        await watched.wait_gone()
    assert (stderr, status) == (b"", 128 + signal.SIGPIPE)


# Status.


async def test_status_is_that_of_the_program(at: list[str]) -> None:
    assert await execenv("run", *at, "--", "sh", "-c", "exit 7") == (b"", b"", 7)


async def test_death_by_signal_is_128_plus_its_number(at: list[str]) -> None:
    assert await execenv("run", *at, "--", "sh", "-c", "kill -9 $$") == (b"", b"", 137)


async def test_unknown_program_is_127(at: list[str]) -> None:
    stdout, stderr, status = await execenv("run", *at, "--", "no-such-program-anywhere")
    assert (stdout, status) == (b"", 127)
    check_one_line(stderr, "no-such-program-anywhere", "No such file or directory")


async def test_unknown_program_on_a_terminal_is_127(at: list[str]) -> None:
    stdout, stderr, status = await execenv("run", *at, "--tty", "--", "no-such-program-anywhere")
    assert (stdout, status) == (b"", 127)
    check_one_line(stderr, "no-such-program-anywhere")


async def test_file_that_is_no_program_is_126(at: list[str], tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no program\n")
    stdout, stderr, status = await execenv("run", *at, "--", str(tmp_path / "data"))
    assert (stdout, status) == (b"", 126)
    check_one_line(stderr, str(tmp_path / "data"), "Permission denied")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "--env", "ws://127.0.0.1:1", "--", "true"], ["ws://127.0.0.1:1", "refused"]),
        (["run", "--env", "http://127.0.0.1:1", "--", "true"], ["http://127.0.0.1:1", "ws://"]),
        (["run", "--env", "", "--", "true"], ["--env", "local"]),
        (["run", "--env", "no-such-server --here", "--", "true"], ["no-such-server", "No such file"]),
        (["run", "--env", "true", "--", "true"], ["true", "ended the connection"]),
        (["run"], ["ARGV", "execenv run --help"]),
        (["run", "--no-such-option", "--", "true"], ["--no-such-option", "execenv run --help"]),
        (["run", "-e", "novalue", "--", "true"], ["NAME=VALUE", "'novalue'"]),
        (["run", "--token-file", "/no/such/file", "--", "true"], ["--token-file", "/no/such/file"]),
    ],
)
async def test_own_failure_is_125_and_one_line_that_says_what_to_mend(
    args: list[str], words: list[str]
) -> None:
    stdout, stderr, status = await execenv(*args)
    assert (stdout, status) == (b"", 125)
    check_one_line(stderr, *words)


# Options.


async def test_variables_are_added_to_those_of_the_environment(at: list[str]) -> None:
    script = 'echo "$ONE,$TWO,$CONTRACT_PLAIN"'
    assert await execenv("run", *at, "-e", "ONE=1", "-e", "TWO=a=b c", "--", "sh", "-c", script) == (
        b"1,a=b c,plain\n",
        b"",
        0,
    )


async def test_working_directory_is_chosen(at: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "a folder é"
    folder.mkdir()
    assert await execenv("run", *at, "--cwd", str(folder), "--", "pwd") == (f"{folder}\n".encode(), b"", 0)


async def test_token_is_taken_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("not a guess\n")
    auth = ["--ws-auth", "capability-token", "--ws-token-file", str(tmp_path / "token")]
    async with started([*SERVE, "ws://127.0.0.1:0", *auth]) as server:
        url = (await server.expect(b"\n")).decode().strip()
        echo = ["--env", url, "--", "echo", "in"]
        assert await execenv("run", "--token-file", str(tmp_path / "token"), *echo) == (b"in\n", b"", 0)
        assert await execenv("run", *echo, env={"EXECENV_TOKEN": "not a guess"}) == (b"in\n", b"", 0)
        stdout, stderr, status = await execenv("run", *echo, env={"EXECENV_TOKEN": "a guess"})
        assert (stdout, status) == (b"", 125)
        check_one_line(stderr, url, "401")
        assert b"a guess" not in stderr


async def test_debug_shows_where_an_error_came_from() -> None:
    _, stderr, status = await execenv("run", "--debug", "--env", "ws://127.0.0.1:1", "--", "true")
    assert status != 0
    assert stderr.startswith(b"Traceback") or b"\nTraceback" in stderr
    assert b"ConnectFailed" in stderr


async def test_debug_behind_the_dashes_is_the_programs() -> None:
    _, stderr, status = await execenv("run", "--env", "ws://127.0.0.1:1", "--", "echo", "--debug")
    assert status == 125
    check_one_line(stderr)


# Signals.


async def test_interrupt_goes_to_the_program(at: list[str]) -> None:
    async with started([*EXECENV, "run", *at, "--", *python(INTERRUPTIBLE)]) as run:
        await run.expect(b"ready\n")
        run.process.send_signal(signal.SIGINT)
        assert await run.rest() == (b"caught\n", b"", 7)


async def test_second_interrupt_ends_the_program_and_all_it_started(at: list[str], watched: Watched) -> None:
    async with started([*EXECENV, "run", *at, "--", *python(STUBBORN)]) as run:
        for pid in (await run.expect(b"\n")).split():
            watched.add(int(pid))
        run.process.send_signal(signal.SIGINT)
        await run.expect(b"no\n")
        assert len(watched.alive()) == 2
        run.process.send_signal(signal.SIGINT)
        assert await run.rest() == (b"", b"", 137)
        await watched.wait_gone()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
async def test_end_of_the_command_line_ends_the_program_and_all_it_started(
    at: list[str], watched: Watched, signum: signal.Signals
) -> None:
    async with started([*EXECENV, "run", *at, "--", *python(STUBBORN)]) as run:
        for pid in (await run.expect(b"\n")).split():
            watched.add(int(pid))
        run.process.send_signal(signum)
        stdout, stderr, status = await run.rest()
        assert (stdout, stderr) == (b"", b"")
        assert status > 128
        await watched.wait_gone()


async def test_killed_command_line_leaves_no_local_process(watched: Watched) -> None:
    async with started([*EXECENV, "run", "--", *python(STUBBORN)]) as run:
        for pid in (await run.expect(b"\n")).split():
            watched.add(int(pid))
        run.process.kill()
        await watched.wait_gone()


# Terminals.


@define(eq=False)
class Terminal:
    """A terminal with a command line on it that leads its session, as under a terminal emulator."""

    process: trio.Process
    fd: int
    slave: int
    _shown: bytearray = field(factory=bytearray)

    async def expect(self, marker: bytes) -> bytes:
        """What is shown up to and with `marker`."""
        while marker not in self._shown:
            await trio.lowlevel.wait_readable(self.fd)
            self._shown += os.read(self.fd, 65536)
        end = self._shown.index(marker) + len(marker)
        shown = bytes(self._shown[:end])
        del self._shown[:end]
        return shown

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def resize(self, rows: int, columns: int) -> None:
        _set_size(self.fd, rows, columns)

    def settings(self) -> list[object]:
        return termios.tcgetattr(self.slave)


def _set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextmanager
def _open_pty() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


@asynccontextmanager
async def on_terminal(*args: str) -> AsyncIterator[Terminal]:
    """`execenv` with these words on a terminal of 33 rows and 101 columns."""
    with _open_pty() as (master, slave):
        _set_size(master, 33, 101)
        process = await trio.lowlevel.open_process(
            ["setsid", "--ctty", *EXECENV, *args], stdin=slave, stdout=slave, stderr=slave
        )
        try:
            with trio.fail_after(TIME_LIMIT):
                yield Terminal(process, master, slave)
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()


async def test_interactive_shell_works_and_leaves_the_terminal_as_it_was(at: list[str]) -> None:
    async with on_terminal("run", *at, "--tty", "-e", "PS1=ready> ", "--", "sh") as terminal:
        before = terminal.settings()
        await terminal.expect(b"ready> ")
        assert terminal.settings() != before
        terminal.type(b"echo $((6 * 7))\n")
        await terminal.expect(b"\r\n42\r\n")
        await terminal.expect(b"ready> ")
        terminal.type(b"exit 3\n")
        assert await terminal.process.wait() == 3
        assert terminal.settings() == before


async def test_program_on_a_terminal_gets_the_size_of_ours_and_its_changes(at: list[str]) -> None:
    async with on_terminal("run", *at, "--tty", "--", *python(TELLS_SIZE)) as terminal:
        await terminal.expect(b"33 rows, 101 columns\r\n")
        terminal.resize(44, 132)
        await terminal.expect(b"44 rows, 132 columns\r\n")


async def test_control_c_on_a_terminal_goes_to_the_program_only(at: list[str]) -> None:
    async with on_terminal("run", *at, "--tty", "--", *python(INTERRUPTIBLE)) as terminal:
        await terminal.expect(b"ready\r\n")
        terminal.type(b"\x03")
        await terminal.expect(b"caught\r\n")
        assert await terminal.process.wait() == 7


async def test_control_c_without_a_terminal_there_interrupts_the_program(at: list[str]) -> None:
    async with on_terminal("run", *at, "--", *python(INTERRUPTIBLE)) as terminal:
        await terminal.expect(b"ready\r\n")
        terminal.type(b"\x03")
        await terminal.expect(b"caught\r\n")
        assert await terminal.process.wait() == 7


async def test_killed_shell_leaves_the_terminal_as_it_was() -> None:
    async with on_terminal("run", "--tty", "-e", "PS1=ready> ", "--", "sh") as terminal:
        before = terminal.settings()
        await terminal.expect(b"ready> ")
        terminal.process.terminate()
        assert await terminal.process.wait() > 128
        assert terminal.settings() == before


# Serving.


async def test_server_says_its_url_first_and_ends_well_on_sigterm_and_sigint() -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        async with started([*SERVE, "ws://127.0.0.1:0"]) as server:
            line = await server.expect(b"\n")
            assert re.fullmatch(rb"ws://127\.0\.0\.1:[1-9]\d*\n", line)
            server.process.send_signal(signum)
            assert await server.rest() == (b"", b"", 0)


async def test_terminated_server_leaves_no_process(watched: Watched) -> None:
    async with started([*SERVE, "ws://127.0.0.1:0"]) as server:
        url = (await server.expect(b"\n")).decode().strip()
        async with started([*EXECENV, "run", "--env", url, "--", *python(STUBBORN)]) as run:
            for pid in (await run.expect(b"\n")).split():
                watched.add(int(pid))
            server.process.terminate()
            assert await server.rest() == (b"", b"", 0)
            assert watched.alive() == set()
            stdout, stderr, status = await run.rest()
            assert (stdout, status) == (b"", 125)
            check_one_line(stderr, "disconnected")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--listen", "ws://0.0.0.0:0"], ["0.0.0.0", "--ws-auth", "127.0.0.1"]),
        (["--listen", "tcp://127.0.0.1:0"], ["tcp://127.0.0.1:0", "ws://IP:PORT"]),
        (["--listen", "ws://127.0.0.1:99999"], ["ws://127.0.0.1:99999"]),
        (["--listen", "stdio", "--ws-auth", "capability-token"], ["--ws-", "stdio"]),
        (["--ws-auth", "capability-token"], ["--ws-token-file"]),
        (["--ws-auth", "capability-token", "--ws-token-file", "/no/such/file"], ["/no/such/file"]),
        (["--ws-auth", "signed-bearer-token"], ["--ws-shared-secret-file"]),
        (["--ws-token-file", "token"], ["--ws-auth"]),
        (["--retain", "-1"], ["--retain", "execenv serve --help"]),
        (["--detached-ttl", "soon"], ["--detached-ttl", "'soon'", "never"]),
        (["--detached-ttl", "running=soon"], ["--detached-ttl", "'running=soon'", "running=never"]),
        (["--detached-ttl", "running=1,idle=2"], ["--detached-ttl", "'running=1,idle=2'", "exited="]),
        (["--detached-ttl", "exited=1,exited=2"], ["--detached-ttl", "'exited=1,exited=2'", "exited="]),
        (["--detached-ttl", "80,exited=1"], ["--detached-ttl", "'80,exited=1'", "exited="]),
    ],
)
async def test_server_that_cannot_start_says_why_in_one_line(args: list[str], words: list[str]) -> None:
    stdout, stderr, status = await execenv("serve", *args)
    assert stdout == b""
    assert status in (1, 2)
    check_one_line(stderr, *words)


async def test_address_in_use_is_said_in_one_line() -> None:
    async with started([*SERVE, "ws://127.0.0.1:0"]) as server:
        url = (await server.expect(b"\n")).decode().strip()
        stdout, stderr, status = await execenv("serve", "--listen", url)
        assert (stdout, status) == (b"", 1)
        check_one_line(stderr, url, "in use")


# Help.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--help"], ["run", "serve", "--version", "Run programs in the places where work runs"]),
        (
            ["run", "--help"],
            ["--env TARGET", "ws://", "127", "126", "125", "Ctrl-C", "execenv run -- make test"],
        ),
        (["serve", "--help"], ["--listen", "stdio", "--ws-auth", "SIGTERM", "URL"]),
    ],
)
async def test_help_says_what_one_needs(args: list[str], words: list[str]) -> None:
    stdout, stderr, status = await execenv(*args)
    assert (stderr, status) == (b"", 0)
    for word in words:
        assert word in stdout.decode()


async def test_command_line_without_words_shows_its_help() -> None:
    stdout, stderr, _ = await execenv()
    assert b"Commands:" in stdout + stderr


async def test_version_is_that_of_the_package() -> None:
    import execenv as package

    stdout, _, status = await execenv("--version")
    assert (stdout.decode().split()[-1], status) == (package.__version__, 0)
