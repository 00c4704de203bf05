"""A released codex as the client, with a sandbox: what its commands and patches may do on an exec-server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from tests.interop.codex import CodexRun, ExecResult
from tests.interop.conftest import Target, exec_command
from tests.interop.responses_api import Turn
from tests.interop.test_codex_client import SOON, after_file, write_stdin
from tests.interop.test_codex_files import apply_patch

pytestmark = [pytest.mark.interop]

READ_ONLY = ("--sandbox", "read-only")
WORKSPACE_WRITE = ("--sandbox", "workspace-write")
NARROW = "[sandbox_workspace_write]\nexclude_slash_tmp = true\nexclude_tmpdir_env_var = true\n"
"""The tests' own folders are below /tmp, which would be writable."""

SOCKET = "/usr/bin/python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 9))'"


async def run(target: Target, permissions: Sequence[str], *turns: Turn, config: str = NARROW) -> CodexRun:
    with trio.fail_after(60):
        return await target.run(turns, config, permissions=permissions)


async def results(target: Target, permissions: Sequence[str], *turns: Turn) -> list[ExecResult]:
    done = await run(target, permissions, *turns)
    return [ExecResult.parse(text) for text in done.tool_outputs]


async def test_read_only_denies_a_write(target: Target) -> None:
    (target.cwd / "old").write_text("old\n")
    [result] = await results(target, READ_ONLY, exec_command("cat old; echo new > old"))
    assert "old\n" in result.output
    assert "Read-only file system" in result.output
    assert result.exit_code != 0
    assert (target.cwd / "old").read_text() == "old\n"


async def test_workspace_write_permits_the_workspace_and_nothing_outside(target: Target) -> None:
    outside = target.cwd.parent / "outside"
    outside.mkdir()
    inner, outer = await results(
        target,
        WORKSPACE_WRITE,
        exec_command("mkdir -p sub && echo new > sub/file"),
        exec_command(f"echo new > '{outside}/file'"),
    )
    assert (inner.output, inner.exit_code) == ("", 0)
    assert (target.cwd / "sub" / "file").read_text() == "new\n"
    assert "Read-only file system" in outer.output
    assert outer.exit_code != 0
    assert list(outside.iterdir()) == []


async def test_repository_data_is_protected(target: Target) -> None:
    (target.cwd / ".git").mkdir()
    (target.cwd / ".git" / "config").write_text("config\n")
    [result] = await results(
        target, WORKSPACE_WRITE, exec_command("cat .git/config; echo x >> .git/config; mkdir .codex/x")
    )
    assert "config\n" in result.output
    assert result.output.count("Read-only file system") == 2
    assert (target.cwd / ".git" / "config").read_text() == "config\n"
    assert not (target.cwd / ".codex" / "x").exists()


async def test_there_is_no_network(target: Target) -> None:
    [result] = await results(target, WORKSPACE_WRITE, exec_command(SOCKET))
    assert "Operation not permitted" in result.output
    assert result.exit_code == 1


async def test_network_may_be_granted(target: Target) -> None:
    done = await run(target, WORKSPACE_WRITE, exec_command(SOCKET), config=f"{NARROW}network_access = true\n")
    assert "Connection refused" in ExecResult.parse(done.tool_outputs[0]).output


async def test_terminal_works_inside(target: Target) -> None:
    cmd = 'test -t 0 && stty size; touch ready; read -r line; echo "got $line"; echo x > /etc/x; exit 4'

    answer = after_file(target.cwd / "ready", lambda request: write_stdin(request, "hello\n"))
    command = exec_command(cmd, tty=True, **SOON)
    first, last = await results(target, WORKSPACE_WRITE, command, answer)
    assert first.exit_code is None
    output = first.output + last.output
    assert output.startswith("24 80\r\nhello\r\ngot hello\r\n")
    assert "Read-only file system" in output
    assert last.exit_code == 4


async def test_denied_directory_is_closed(target: Target) -> None:
    private = target.cwd / "private"
    private.mkdir()
    (private / "key").write_text("a secret\n")
    config = (
        "[permissions.mine.filesystem]\n"
        '":root" = "read"\n'
        f'{json.dumps(str(target.cwd))} = "write"\n'
        f'{json.dumps(str(private))} = "deny"\n'
    )
    done = await run(
        target,
        ("-c", 'default_permissions="mine"'),
        exec_command("cat private/key"),
        exec_command("ls private; echo new > file"),
        config=config,
    )
    first, second = map(ExecResult.parse, done.tool_outputs)
    assert "Permission denied" in first.output
    assert "a secret" not in first.output
    assert "Permission denied" in second.output
    assert (target.cwd / "file").read_text() == "new\n"


def _linked(target: Target) -> Path:
    """A file outside, to which `link.txt` and the directory `linked` lead."""
    outside = target.cwd.parent / "outside"
    outside.mkdir()
    (outside / "file.txt").write_text("one\n")
    (target.cwd / "link.txt").symlink_to("../outside/file.txt")
    (target.cwd / "linked").symlink_to("../outside")
    return outside


@pytest.mark.parametrize("path", ["link.txt", "linked/file.txt"])
async def test_patch_through_a_link_that_leads_outside_is_refused(target: Target, path: str) -> None:
    outside = _linked(target)
    patch = apply_patch(f"*** Update File: {path}\n@@\n-one\n+two\n")
    done = await run(target, WORKSPACE_WRITE, patch)
    assert "Failed to write file" in done.tool_outputs[0]
    assert (outside / "file.txt").read_text() == "one\n"


async def test_patch_adds_a_file_through_no_link(target: Target) -> None:
    outside = _linked(target)
    done = await run(target, WORKSPACE_WRITE, apply_patch("*** Add File: linked/new.txt\n+new\n"))
    assert "Failed to write file" in done.tool_outputs[0]
    assert sorted(path.name for path in outside.iterdir()) == ["file.txt"]


async def test_patch_in_the_workspace_is_done(target: Target) -> None:
    (target.cwd / "changed").write_text("one\n")
    patch = apply_patch("*** Update File: changed\n@@\n-one\n+two\n*** Add File: new/dir/added\n+added\n")
    done = await run(target, WORKSPACE_WRITE, patch)
    assert "Success. Updated the following files" in done.tool_outputs[0]
    assert (target.cwd / "changed").read_text() == "two\n"
    assert (target.cwd / "new" / "dir" / "added").read_text() == "added\n"
