"""Contract of files under a sandbox: every call carries it, whatever the environment."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from execenv import Environment, NotSupported, PathUri, SandboxProfile
from execenv.abc import FileSystem
from execenv.protocol import LARGEST_WALK
from tests.fakes import requires_bubblewrap

pytestmark = requires_bubblewrap

Work = Callable[[FileSystem, PathUri, PathUri], Awaitable[object]]

EVERY_CALL: dict[str, Work] = {
    "canonicalize": lambda files, inside, outside: files.canonicalize(outside),
    "copy from": lambda files, inside, outside: files.copy(outside, inside, recursive=False),
    "copy to": lambda files, inside, outside: files.copy(inside, outside, recursive=False),
    "create_directory": lambda files, inside, outside: files.create_directory(outside, recursive=False),
    "get_metadata": lambda files, inside, outside: files.get_metadata(outside),
    "get_metadata of no link": lambda files, inside, outside: files.get_metadata(
        outside, follow_symlinks=False
    ),
    "open to read": lambda files, inside, outside: files.open(outside),
    "open to replace": lambda files, inside, outside: files.open(outside, "replace"),
    "open to update": lambda files, inside, outside: files.open(outside, "update"),
    "read_directory": lambda files, inside, outside: files.read_directory(outside),
    "read_file": lambda files, inside, outside: files.read_file(outside),
    "read_file of no link": lambda files, inside, outside: files.read_file(outside, follow_symlinks=False),
    "remove": lambda files, inside, outside: files.remove(outside, force=False),
    "rename from": lambda files, inside, outside: files.rename(outside, inside),
    "rename to": lambda files, inside, outside: files.rename(inside, outside),
    "set_metadata": lambda files, inside, outside: files.set_metadata(outside, mode=0o600),
    "walk": lambda files, inside, outside: files.walk(outside, LARGEST_WALK),
    "write_file": lambda files, inside, outside: files.write_file(outside, b"x"),
    "write_file of much": lambda files, inside, outside: files.write_file(outside, bytes(2_000_000)),
}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "inside").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "outside").write_text("secret")
    return tmp_path


async def test_no_call_reaches_what_the_sandbox_does_not_name(environment: Environment, top: Path) -> None:
    profile = SandboxProfile.managed([(str(top / "w"), "write")])
    files = (await environment.sandboxed(profile, cwd=str(top / "w")))._backend.files
    inside, outside = (PathUri.from_native(str(top / name)) for name in ("w/inside", "out/outside"))
    assert await files.read_file(inside) == b"mine"
    for name, work in EVERY_CALL.items():
        with pytest.raises(OSError) as caught:
            await work(files, inside, outside)
        assert caught.value.errno == errno.ENOENT, name
        assert caught.value.filename in (outside.text, inside.text), name
    assert (top / "out" / "outside").read_text() == "secret"
    assert (top / "w" / "inside").read_text() == "mine"
    assert sorted(os.listdir(top / "w")) == ["inside"]
    with pytest.raises(NotSupported):
        async with files.watch_missing((outside,)):
            raise AssertionError


async def test_every_call_there_is_is_tried() -> None:
    calls = {name for name, value in vars(FileSystem).items() if not name.startswith("_") and callable(value)}
    others = {"can_transfer", "confined", "read_small", "watch_missing"}
    tried = {name.partition(" ")[0] for name in EVERY_CALL}
    assert tried | others == {name for name in calls if not name.endswith("_nowait")}


async def test_all_is_done_inside(environment: Environment, top: Path) -> None:
    profile = SandboxProfile.managed([(str(top / "w"), "write")])
    files = (await environment.sandboxed(profile, cwd=str(top / "w"))).files
    w = top / "w"
    big = os.urandom(3_000_000)
    await files.write_file("big", big)
    assert (w / "big").read_bytes() == big
    assert await files.read_file("big") == big
    await files.create_directory("a/b/c")
    await files.copy("inside", "a/b/c/copied")
    await files.rename("a/b/c/copied", "a/moved")
    assert await files.read_file("a/moved") == b"mine"
    found = await files.get_metadata("a/moved")
    assert (found.is_file, found.size) == (True, 4)
    assert {entry.file_name for entry in await files.read_directory("a")} == {"b", "moved"}
    await files.remove("a")
    assert sorted(os.listdir(w)) == ["big", "inside"]
