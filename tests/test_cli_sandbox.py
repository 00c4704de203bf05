"""`execenv run --sandbox` and `--no-network`, here and on a server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WebsocketServer
from tests.fakes import python, requires_bubblewrap
from tests.test_cli import TELLS_SIZE, execenv, on_terminal

NO_SOCKET = python("import socket; socket.socket()")


@pytest.fixture(params=["local", "websocket"])
def at(request: pytest.FixtureRequest, websocket_server: WebsocketServer) -> list[str]:
    """The words that choose an environment."""
    return ["--env", {"local": "local", "websocket": websocket_server.url}[request.param]]


BOOTSTRAPPED = ["--env", "sh -c", "--bootstrap"]
"""There the server is a copy without what is compiled, in a cache."""


@pytest.fixture
def workspace() -> Iterator[Path]:
    """A directory in one that holds nothing else. Not below `/tmp`, which workspaces are never without."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    (path / "w" / "sub").mkdir(parents=True)
    yield path / "w"
    shutil.rmtree(path)


@requires_bubblewrap
async def test_read_only_lets_nothing_be_written(at: list[str], workspace: Path) -> None:
    stdout, stderr, status = await execenv(
        "run", *at, "--sandbox", "read-only", "--cwd", str(workspace), "--", "sh", "-c", "pwd; echo x > made"
    )
    assert (stdout, status) == (bytes(workspace) + b"\n", 2)
    assert b"Read-only file system" in stderr
    assert os.listdir(workspace) == ["sub"]


@requires_bubblewrap
async def test_workspace_is_where_the_program_runs(at: list[str], workspace: Path) -> None:
    stdout, stderr, status = await execenv(
        *("run", *at, "--sandbox", "workspace-write", "--cwd", str(workspace)),
        *("--", "sh", "-c", "cat > made; cat made; echo x > ../outside"),
        stdin=b"input",
    )
    assert (stdout, status) == (b"input", 2)
    assert b"Read-only file system" in stderr
    assert sorted(os.listdir(workspace)) == ["made", "sub"]
    assert os.listdir(workspace.parent) == ["w"]


@requires_bubblewrap
async def test_workspaces_are_those_that_are_named(at: list[str], workspace: Path) -> None:
    (workspace.parent / "other").mkdir()
    roots = f"workspace-write:sub:{workspace.parent / 'other'}"
    _, stderr, status = await execenv(
        *("run", *at, "--sandbox", roots, "--cwd", str(workspace)),
        *("--", "sh", "-c", "echo x > sub/made; echo x > ../other/made; echo x > made"),
    )
    assert (status, stderr.count(b"Read-only file system")) == (2, 1)
    assert os.listdir(workspace) == ["sub"]
    assert os.listdir(workspace / "sub") == os.listdir(workspace.parent / "other") == ["made"]


@requires_bubblewrap
async def test_relative_directory_to_run_in_is_from_ours(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    stdout, stderr, status = await execenv("run", "--sandbox", "read-only", "--cwd", "sub", "--", "pwd")
    assert (stdout, stderr, status) == (bytes(workspace / "sub") + b"\n", b"", 0)
    script = "pwd; echo x > made"
    stdout, stderr, status = await execenv("run", "--sandbox", "workspace-write", "--", "sh", "-c", script)
    assert (stdout, stderr, status) == (bytes(workspace) + b"\n", b"", 0)


@requires_bubblewrap
@pytest.mark.parametrize("root", ["missing", "~"])
async def test_workspace_that_is_not_there_is_told(at: list[str], workspace: Path, root: str) -> None:
    options = ("--sandbox", f"workspace-write:sub:{root}", "--cwd", str(workspace))
    stdout, stderr, status = await execenv("run", *at, *options, "--", "true")
    assert (stdout, status) == (b"", 125)
    assert b"--sandbox names '%s', which is not there" % root.encode() in stderr


async def test_workspace_elsewhere_is_never_guessed(websocket_server: WebsocketServer) -> None:
    at = ["--env", websocket_server.url]
    stdout, stderr, status = await execenv("run", *at, "--sandbox", "workspace-write", "--", "true")
    assert (stdout, status) == (b"", 125)
    assert b"--sandbox workspace-write:DIR, or --cwd DIR" in stderr


async def test_network_is_there_until_it_is_taken(at: list[str]) -> None:
    assert (await execenv("run", *at, "--", *NO_SOCKET))[2] == 0
    stdout, stderr, status = await execenv("run", *at, "--no-network", "--", *NO_SOCKET)
    assert (stdout, status) == (b"", 1)
    assert b"Operation not permitted" in stderr


@requires_bubblewrap
async def test_bootstrapped_server_enforces_as_well(workspace: Path) -> None:
    words = ["run", *BOOTSTRAPPED, "--cwd", str(workspace)]
    script = "pwd; echo x > made; echo x > ../outside"
    stdout, stderr, status = await execenv(*words, "--sandbox", "workspace-write", "--", "sh", "-c", script)
    assert (stdout, status) == (bytes(workspace) + b"\n", 2)
    assert stderr.count(b"Read-only file system") == 1
    assert os.listdir(workspace.parent) == ["w"]
    _, stderr, status = await execenv(*words, "--no-network", "--", *NO_SOCKET)
    assert status == 1
    assert b"Operation not permitted" in stderr


@requires_bubblewrap
async def test_network_is_taken_together_with_files() -> None:
    assert (await execenv("run", "--sandbox", "read-only", "--", *NO_SOCKET))[2] == 0
    _, stderr, status = await execenv("run", "--sandbox", "read-only", "--no-network", "--", *NO_SOCKET)
    assert status == 1
    assert b"Operation not permitted" in stderr


@requires_bubblewrap
@pytest.mark.parametrize("options", [["--sandbox", "read-only"], ["--no-network"]], ids=" ".join)
async def test_unknown_program_is_127_under_a_sandbox_too(at: list[str], options: list[str]) -> None:
    stdout, stderr, status = await execenv("run", *at, *options, "--", "no-such-program")
    assert (stdout, status) == (b"", 127)
    assert b"no-such-program" in stderr


@requires_bubblewrap
async def test_program_has_our_terminal_under_a_sandbox(at: list[str]) -> None:
    # The size is adopted when the program runs already; it is told of that inside too.
    words = ("--sandbox", "read-only", "--no-network", "--tty", "--")
    async with on_terminal("run", *at, *words, *python(TELLS_SIZE)) as terminal:
        await terminal.expect(b"33 rows, 101 columns\r\n")
        terminal.resize(44, 132)
        await terminal.expect(b"44 rows, 132 columns\r\n")
    async with on_terminal("run", *at, *words, "sh", "-c", "echo ready; read x; exit 6") as terminal:
        await terminal.expect(b"ready")
        terminal.type(b"\n")
        assert await terminal.process.wait() == 6


@pytest.mark.parametrize(
    "value", ["", "bogus", "read-only:/srv", "workspace-write:", "workspace-write:/srv:", "Read-only"]
)
async def test_sandbox_that_means_nothing_is_refused(value: str) -> None:
    stdout, stderr, status = await execenv("run", "--sandbox", value, "--", "true")
    assert (stdout, status) == (b"", 125)
    assert b"is neither read-only nor workspace-write[:DIR...] (see execenv run --help)" in stderr


async def test_without_bubblewrap_nothing_runs_and_what_to_do_is_said(
    workspace: Path, tmp_path: Path
) -> None:
    made = workspace / "made"
    stdout, stderr, status = await execenv(
        *("run", "--sandbox", "workspace-write", "--cwd", str(workspace)),
        *("--", "/bin/sh", "-c", "echo x > made"),
        env={"PATH": str(tmp_path)},
    )
    assert (stdout, status) == (b"", 126)
    assert b"apt install bubblewrap" in stderr
    assert stderr.count(b"\n") == 1
    assert not made.exists()
