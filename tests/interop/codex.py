"""Running a released `codex` against an exec-server: finding it, its configuration, its processes.

The client is the npm package @openai/codex at the version this project was measured against. Nothing of the
user's own set-up is read or written: every run has a home folder of its own, and no run needs the network.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from attrs import field, frozen

import execenv
from tests.interop.responses_api import ModelRequest, Turn, serve_responses

CODEX_VERSION = "0.169.0"
EXECENV_SERVER = (sys.executable, "-m", "execenv", "serve", "--listen")
"""The command line of this project's server; the listen address is to follow."""


class CodexUnavailableError(Exception):
    """There is no codex here and none could be installed; the message says why."""


def find_codex() -> Path | None:
    """The codex to test with, or None if there is none yet.

    The environment variable EXECENV_CODEX names it; else it is the one of PATH if that has the right version,
    else the one of the cache folder (see `install_codex`).

    Raises:
        FileNotFoundError: If EXECENV_CODEX is not the path of a file.
    """
    if named := os.environ.get("EXECENV_CODEX"):
        if not os.path.isfile(named):
            raise FileNotFoundError(f"EXECENV_CODEX is not a file: {named}")
        return Path(named).absolute()
    on_path = shutil.which("codex")
    if on_path and _version(on_path) == f"codex-cli {CODEX_VERSION}":
        return Path(on_path)
    cached = _cached_codex()
    return cached if cached.exists() else None


def install_codex() -> Path:
    """Install codex into the cache folder with npm, unless it is there already; returns its path.

    Test runs at the same time install it once: a lock file makes the others wait.

    Raises:
        CodexUnavailableError: If there is no npm, or its install failed.
    """
    if not shutil.which("npm"):
        raise CodexUnavailableError("neither codex nor npm, which could install it, is on PATH")
    codex = _cached_codex()
    folder = codex.parents[2]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not codex.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _npm_install(folder)
    return codex


def require_codex() -> Path:
    """The path of codex, installed now if need be; skips the test if that cannot be had.

    With the environment variable EXECENV_REQUIRE_TOOLS=1 the test fails instead of being skipped.
    """
    try:
        return find_codex() or install_codex()
    except CodexUnavailableError as error:
        if os.environ.get("EXECENV_REQUIRE_TOOLS") == "1":
            pytest.fail(f"EXECENV_REQUIRE_TOOLS=1, but {error}")
        pytest.skip(str(error))


def _cached_codex() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "execenv", f"codex-{CODEX_VERSION}", "node_modules", ".bin", "codex")


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _npm_install(folder: Path) -> None:
    """Install beside `folder` and move it there at the end: a broken-off install leaves no half of one."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        package = f"@openai/codex@{CODEX_VERSION}"
        argv = ["npm", "install", "--prefix", new, "--no-audit", "--no-fund", "--fetch-retries=1", package]
        try:
            subprocess.run(argv, check=True, capture_output=True, text=True, timeout=600)
        except subprocess.CalledProcessError as error:
            raise CodexUnavailableError(f"npm could not install {package}: {error.stderr[-500:]}") from error
        except subprocess.TimeoutExpired as error:
            raise CodexUnavailableError(f"npm took over 600 s to install {package}") from error
        os.rename(os.path.join(new, "node_modules"), _made(folder) / "node_modules")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@frozen
class ProcessMark:
    """An environment variable by which a process and its descendants are found again (Linux).

    Unlike a process group or a parent, a mark stays with what has left the group or lost its parent.
    """

    value: str = field(factory=lambda: uuid.uuid4().hex)

    @property
    def env(self) -> dict[str, str]:
        """What to add to the environment of the first process."""
        return {"EXECENV_TEST_MARK": self.value}

    def pids(self) -> Set[int]:
        """The living processes that carry the mark, and their children (a zombie carries nothing)."""
        entry = b"EXECENV_TEST_MARK=" + self.value.encode()
        everyone = [pid for pid in os.listdir("/proc") if pid.isdigit()]
        marked = {pid for pid in everyone if entry in _proc(pid, "environ").split(b"\0")}
        # after the name in parentheses, which may hold anything, come the state and the parent
        parents = {pid: _proc(pid, "stat").rpartition(b")")[2].split()[1:2] for pid in everyone}
        children = {pid for pid, parent in parents.items() if parent and parent[0].decode() in marked}
        return {int(pid) for pid in marked | children}

    def commands(self, *, but: Set[int] = frozenset()) -> list[str]:
        """The command lines of the marked processes except those of `but`, for a message."""
        lines = [_proc(str(pid), "cmdline") for pid in sorted(self.pids() - but)]
        return [line.replace(b"\0", b" ").decode(errors="replace") for line in lines]

    def kill(self) -> None:
        """Kill every marked process, also one that is started meanwhile; the oldest first, so that none tells
        of the end of another."""
        while pids := self.pids():
            for pid in sorted(pids, key=_started):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    async def wait_gone(self, *, but: Set[int] = frozenset()) -> None:
        """Wait until no process but those of `but` carries the mark."""
        while self.pids() - but:  # noqa: ASYNC110 - the end of somebody else's child has no event
            await trio.sleep(0.01)


def _started(pid: int) -> int:
    """When a process was started, in ticks since the boot; 0 if there is none."""
    fields = _proc(str(pid), "stat").rpartition(b")")[2].split()
    return int(fields[19]) if fields else 0


def _proc(pid: str, file: str) -> bytes:
    try:
        return Path("/proc", pid, file).read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""  # ended meanwhile, or another user's


@frozen
class CodexRun:
    """What came of one `codex exec`; `tool_outputs` is what the model got, in the order of its calls."""

    returncode: int
    stdout: str
    stderr: str
    tool_outputs: Sequence[str]
    requests: Sequence[ModelRequest]


@frozen
class ExecResult:
    """The output of `exec_command` or `write_stdin` as the model reads it.

    `exit_code` is None while the command runs, and `session_id` is None when it has ended.
    """

    output: str
    exit_code: int | None
    session_id: int | None
    tokens: int
    """codex's size of the whole output, before truncation: its bytes / 4, rounded up."""

    @classmethod
    def parse(cls, text: str) -> ExecResult:
        """Take the text apart.

        Raises:
            ValueError: If it is something else, such as the message of a failed call.
        """
        form = (
            r"Chunk ID: \w+\nWall time: [\d.]+ seconds\n"
            r"(?:Process exited with code (-?\d+)|Process running with session ID (\d+))\n"
            r"Original token count: (\d+)\nOutput:\n(.*)"
        )
        if not (match := re.fullmatch(form, text, re.DOTALL)):
            raise ValueError(f"not the result of a command: {text!r}")
        code, session, tokens, output = match.groups()
        return cls(output, int(code) if code else None, int(session) if session else None, int(tokens))


@frozen
class StdioServer:
    """An exec-server that codex starts itself and talks to over stdio."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(factory=dict)


@frozen
class NoiseEnvironment:
    """An environment of a registry, which codex reaches over a relay, encrypted."""

    registry_url: str
    environment_id: str
    token: str


@frozen
class BearerEnvironment:
    """A websocket URL, and the token that codex sends there; only its environments.toml can name one."""

    url: str
    token: str


async def run_codex(
    codex: Path,
    exec_server: str | StdioServer | NoiseEnvironment | BearerEnvironment,
    turns: Iterable[Turn],
    *,
    cwd: Path,
    home: Path,
    mark: ProcessMark,
    extra_config: str = "",
    permissions: Sequence[str] = ("--dangerously-bypass-approvals-and-sandbox",),
) -> CodexRun:
    """Run `codex exec` in `cwd` with a model that follows `turns` and the tools on `exec_server`.

    **Output** is captured. **Error checking**: none, a codex that fails has a `returncode` and a `stderr`.
    **Cancellation** kills codex and everything it has started. `exec_server` is a websocket URL, with or
    without a token, a program, or an environment of a registry; `home` gets codex's home and temporary
    folders, new ones; `mark` is put on codex and on what it starts; `extra_config` is added to the end of
    config.toml, and `permissions` to the command line.
    """
    async with serve_responses(turns) as model:
        env = _environment(home) | mark.env
        _write_config(Path(env["CODEX_HOME"]), model.url, extra_config)
        if isinstance(exec_server, str):
            env["CODEX_EXEC_SERVER_URL"] = exec_server
        elif isinstance(exec_server, NoiseEnvironment):
            env["CODEX_EXEC_SERVER_NOISE_REGISTRY_URL"] = exec_server.registry_url
            env["CODEX_EXEC_SERVER_NOISE_ENVIRONMENT_ID"] = exec_server.environment_id
            env["CODEX_EXEC_SERVER_NOISE_AUTH_TOKEN"] = exec_server.token
        elif isinstance(exec_server, BearerEnvironment):
            url, token = _toml(exec_server.url), _toml(exec_server.token)
            # without the flag, codex works here when it cannot reach the box
            _write_environments(
                Path(env["CODEX_HOME"]), f"url = {url}", f"auth_bearer_token = {token}", include_local=False
            )
        else:
            _write_environments(Path(env["CODEX_HOME"]), *_program(exec_server))
        argv = [str(codex), "exec", "--skip-git-repo-check", *permissions]
        argv += ["--strict-config", "--ephemeral", "--color", "never", "Do what the script says."]
        done = await trio.run_process(
            argv,
            cwd=cwd,
            env=env,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            start_new_session=True,
            deliver_cancel=partial(_kill_marked, mark),
        )
        output, errors = done.stdout.decode(), done.stderr.decode()
        return CodexRun(done.returncode, output, errors, model.tool_outputs, model.requests)


@frozen
class ExecServer:
    """A running exec-server: its websocket URL, and the mark of its processes."""

    url: str
    mark: ProcessMark


@asynccontextmanager
async def real_exec_server(codex: Path, home: Path, env: Mapping[str, str]) -> AsyncIterator[ExecServer]:
    """Run codex's own exec-server on a free loopback port; `env` is added to its environment."""
    argv = [str(codex), "exec-server", "--listen", "ws://127.0.0.1:0"]
    async with websocket_server(argv, home, env) as server:
        yield server


@asynccontextmanager
async def real_executor(
    codex: Path,
    home: Path,
    registry_url: str,
    environment_id: str,
    api_key: str = "sk-test",
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[ProcessMark]:
    """Run codex's own exec-server as the executor of an environment; `env` is added to its environment.

    It is killed with all that it has started when the block is left. Its standard error is in
    `home`/executor.log.
    """
    mark = ProcessMark()
    argv = [str(codex), "exec-server", "--remote", registry_url, "--environment-id", environment_id]
    own = {**_environment(home), **mark.env, **(env or {}), "CODEX_API_KEY": api_key}
    with (home / "executor.log").open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            argv, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        yield mark
    finally:
        with trio.CancelScope(shield=True):
            mark.kill()
            await process.wait()


@asynccontextmanager
async def websocket_server(
    argv: Sequence[str], home: Path, env: Mapping[str, str]
) -> AsyncIterator[ExecServer]:
    """Run the server `argv`, whose first line of output is its URL, until the block is left.

    It is ended by SIGTERM, and after 5 s killed with all that it has started. Its standard error is in
    `home`/server.log.

    Raises:
        RuntimeError: If the server ends without a URL; the message has its standard error.
    """
    mark = ProcessMark()
    log = _made(home) / "server.log"
    with log.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            argv, env={**_environment(home), **mark.env, **env}, stdout=subprocess.PIPE, stderr=stderr
        )
    assert process.stdout is not None
    try:
        url = await _first_line(process.stdout)
        if not url.startswith("ws://"):
            raise RuntimeError(f"{argv} gave no URL but {url!r}: {log.read_text(errors='replace')}")
        yield ExecServer(url, mark)
    finally:
        with trio.CancelScope(shield=True):
            with trio.move_on_after(5):
                process.terminate()
                await process.wait()
            mark.kill()
            await process.wait()
            await process.stdout.aclose()


async def _first_line(stream: trio.abc.ReceiveStream) -> str:
    received = b""
    while b"\n" not in received and (data := await stream.receive_some()):
        received += data
    return received.decode().partition("\n")[0]


async def _kill_marked(mark: ProcessMark, process: trio.Process) -> None:
    mark.kill()


def _environment(home: Path) -> dict[str, str]:
    """A small environment with new folders under `home`.

    TMPDIR, because codex warns of a CODEX_HOME below the temporary folder. PYTHONPATH makes `-m execenv` the
    package that these tests import, in whatever folder it is started.
    """
    codex_home, temporary = _made(home / "codex"), _made(home / "tmp")
    return {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "CODEX_HOME": str(codex_home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(Path(execenv.__file__).parents[1]),
    }


_CONFIG = """\
model = "scripted"
model_provider = "scripted"
check_for_update_on_startup = false
web_search = "disabled"

[features]  # these look for the network, or offer the model tools that the scripts do not use
apps = false
goals = false
plugins = false
remote_plugin = false

[agents]
enabled = false

[analytics]
enabled = false

[feedback]
enabled = false

[otel]
exporter = "none"
metrics_exporter = "none"
trace_exporter = "none"

[model_providers.scripted]
name = "scripted"
base_url = "{url}"
wire_api = "responses"
requires_openai_auth = false
supports_websockets = false
request_max_retries = 0
stream_max_retries = 0
"""


def _write_config(codex_home: Path, model_url: str, extra: str) -> None:
    (codex_home / "config.toml").write_text(_CONFIG.format(url=model_url) + "\n" + extra)


def _write_environments(codex_home: Path, *box: str, include_local: bool = True) -> None:
    top = ['default = "box"', f"include_local = {_toml(include_local)}"]
    lines = [*top, "[[environments]]", 'id = "box"', *box]
    (codex_home / "environments.toml").write_text("\n".join(lines))


def _program(server: StdioServer) -> list[str]:
    program, *args = server.argv
    env = ", ".join(f"{_toml(name)} = {_toml(value)}" for name, value in server.env.items())
    return [
        f"program = {_toml(program)}",
        f"args = [{', '.join(map(_toml, args))}]",
        f"env = {{ {env} }}",
    ]


def _toml(value: str | bool) -> str:
    """A TOML boolean or basic string: JSON's are such too, as long as no surrogate pairs are needed."""
    return json.dumps(value, ensure_ascii=False)
