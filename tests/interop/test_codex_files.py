"""A released codex as the client: files, instructions, images and MCP servers of an exec-server."""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib

import pytest
import trio

from tests.interop.codex import ExecResult
from tests.interop.conftest import Target, exec_command
from tests.interop.mcp import STDIO_PROGRAM, serve_mcp
from tests.interop.responses_api import FunctionCall, ModelRequest

pytestmark = pytest.mark.interop


def apply_patch(text: str) -> FunctionCall:
    """codex takes this command out of the shell's hands and does it through `fs/*`."""
    return exec_command(f"apply_patch <<'EOF'\n*** Begin Patch\n{text}*** End Patch\nEOF\n")


def png() -> bytes:
    """A picture of one red pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0\xff\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def warnings(stderr: str) -> list[str]:
    """What codex warns of, but for what these tests' own model is the reason of."""
    lines = [line for line in stderr.splitlines() if re.search(r"\b(warning|warn|error)\b", line, re.I)]
    return [line for line in lines if "Model metadata for `scripted`" not in line]


async def test_patch_adds_changes_moves_and_deletes_files(target: Target) -> None:
    (target.cwd / "changed").write_text("one\ntwo\n")
    (target.cwd / "moved").write_text("here\n")
    (target.cwd / "deleted").write_text("old\n")
    patch = (
        "*** Add File: new dir/deep/é.txt\n+added\n"
        "*** Update File: changed\n@@\n-one\n+ONE\n two\n"
        "*** Update File: moved\n*** Move to: other/place\n@@\n-here\n+there\n"
        "*** Delete File: deleted\n"
    )
    with trio.fail_after(60):
        run = await target.run([apply_patch(patch), exec_command("cat changed")])
    assert "Success. Updated the following files" in run.tool_outputs[0]
    assert ExecResult.parse(run.tool_outputs[1]).output == "ONE\ntwo\n"
    found = {str(path.relative_to(target.cwd)) for path in target.cwd.rglob("*") if path.is_file()}
    assert found == {"new dir/deep/é.txt", "changed", "other/place"}
    assert (target.cwd / "other" / "place").read_text() == "there\n"


async def test_patch_of_a_missing_file_says_so(target: Target) -> None:
    with trio.fail_after(60):
        run = await target.run([apply_patch("*** Update File: missing\n@@\n-a\n+b\n")])
    assert "No such file or directory (os error 2)" in run.tool_outputs[0]


async def test_patch_writes_through_a_link_and_keeps_the_mode(target: Target) -> None:
    real = target.cwd / "real.sh"
    real.write_text("echo one\n")
    real.chmod(0o755)
    (target.cwd / "link.sh").symlink_to("real.sh")
    with trio.fail_after(60):
        await target.run([apply_patch("*** Update File: link.sh\n@@\n-echo one\n+echo two\n")])
    assert (target.cwd / "link.sh").is_symlink()
    assert real.read_text() == "echo two\n"
    assert real.stat().st_mode & 0o777 == 0o755


async def test_image_reaches_the_model(target: Target) -> None:
    (target.cwd / "red.png").write_bytes(png())
    with trio.fail_after(60):
        run = await target.run([FunctionCall("view_image", {"path": "red.png"})])
    assert "data:image/png;base64," in json.dumps(run.requests[-1].body["input"])


async def test_instructions_of_the_working_directory_and_of_the_repository_reach_the_model(
    target: Target,
) -> None:
    (target.cwd / ".git").mkdir()
    (target.cwd / "AGENTS.md").write_text("Outer instruction.")
    inner = target.cwd / "inner"
    inner.mkdir()
    (inner / "AGENTS.md").write_text("Inner instruction.")
    with trio.fail_after(60):
        run = await target.run([], cwd=inner)
    asked = json.dumps(run.requests[0].body)
    assert asked.index("Outer instruction.") < asked.index("Inner instruction.")


async def test_codex_starts_and_ends_without_a_warning(target: Target) -> None:
    skill = target.cwd / ".agents" / "skills" / "knit"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: knit\ndescription: how to knit\n---\nTwo needles.\n")
    (target.cwd / "AGENTS.md").write_text("Be brief.")
    with trio.fail_after(60):
        run = await target.run([exec_command("true")])
    assert warnings(run.stderr) == []
    assert "how to knit" in json.dumps(run.requests[0].body)


def where(request: ModelRequest) -> FunctionCall:
    assert "mcp__there" in request.tool_names
    return FunctionCall("where", {"text": "hello"}, namespace="mcp__there")


async def test_mcp_server_runs_in_the_environment(target: Target) -> None:
    program = target.cwd / "mcp_server.py"
    program.write_text(STDIO_PROGRAM)
    config = (
        f"[mcp_servers.there]\ncommand = {json.dumps(sys.executable)}\nargs = [{json.dumps(str(program))}]\n"
        f'cwd = {json.dumps(str(target.cwd))}\nenvironment_id = "{target.environment_id}"\n'
    )
    with trio.fail_after(60):
        run = await target.run([where], config)
    assert f"hello from {target.cwd}" in run.tool_outputs[0]


async def test_mcp_server_is_reached_by_http_from_the_environment(target: Target) -> None:
    async with serve_mcp() as server:
        config = f'[mcp_servers.there]\nurl = "{server.url}"\nenvironment_id = "{target.environment_id}"\n'
        with trio.fail_after(60):
            run = await target.run([where], config)
        assert server.requests
    assert "hello over HTTP" in run.tool_outputs[0]
