"""Files under a sandbox: what a server answers (sandbox.md §3), and its helpers (§4, §11)."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from execenv.abc import FileSystem
from execenv.errors import InternalError, NotSupported
from execenv.local import Guard, LocalEnvironment, file_helper, helpers, open_guard, open_local
from execenv.local import confined as confined_module
from execenv.local.confined import ConfinedFileSystem
from execenv.local.facts import MANY, DiskFacts, Plans, _FactsNow
from execenv.local.file_helper import path_to_text
from execenv.local.helpers import helper_environment
from execenv.local.mounts import Mounts
from execenv.local.spawn import interpreter
from execenv.paths import PathUri
from execenv.protocol import LARGEST_WALK
from execenv.sandbox.policy import Sandbox, decode_sandbox
from tests.conftest import run_websocket_server, time_limit
from tests.fakes import requires_bubblewrap
from tests.test_robustness import Client

pytestmark = requires_bubblewrap

Json = Any
Call = Callable[..., Any]

READ_ONLY = (30, "Read-only file system (os error 30)")
MISSING = {"code": -32004, "message": "No such file or directory (os error 2)"}
DENIED = {"code": -32600, "message": "Permission denied (os error 13)"}
FROZEN = {"code": -32603, "message": "Read-only file system (os error 30)"}
EXISTS = {"code": -32603, "message": "File exists (os error 17)"}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """`w`, a workspace, and `out` beside it."""
    w, out = tmp_path / "w", tmp_path / "out"
    (w / "sub" / "deep").mkdir(parents=True)
    out.mkdir()
    (out / "s.txt").write_text("secret")
    (w / "a.txt").write_text("hi\n")
    (w / "sub" / "b.txt").write_text("inner")
    (w / "sub" / ".env").write_text("token")
    (w / "inlink").symlink_to("a.txt")
    (w / "link").symlink_to("../out/s.txt")
    (w / "dlink").symlink_to("../out")
    os.link(out / "s.txt", w / "hard")
    os.mkfifo(w / "fifo")
    return tmp_path


def uri(path: Path | str) -> str:
    return PathUri.from_native(str(path)).uri


def profile(top: Path, *entries: tuple[str, str], **members: Json) -> Json:
    """A sandbox. Places are `/`, names below `top`, or patterns below it (with a `*`)."""

    def place(name: str) -> Json:
        if name == "/":
            return {"type": "special", "value": {"kind": "root"}}
        if "*" in name:
            return {"type": "glob_pattern", "pattern": f"{top}/{name}"}
        return {"type": "path", "path": uri(top / name)}

    listed = [{"path": place(name), "access": access} for name, access in entries]
    return {
        "permissions": {
            "type": "managed",
            "network": "restricted",
            "file_system": {"type": "restricted", "entries": listed},
        },
        "cwd": uri(top / "w"),
        "windowsSandboxLevel": "disabled",
        **members,
    }


RR = (("w", "read"),)
RO = (("/", "read"),)
WS = (("/", "read"), ("w", "write"))


# What the server says.


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with run_websocket_server() as server:
        with closing(Client(int(server.url.rpartition(":")[2]))) as client:
            client.shake_hands()
            yield client
        server.process.terminate()
        status = server.process.wait(10)
        server.log.seek(0)
        assert (status, server.log.read().decode()) == (0, "")


@pytest.fixture
def ask(client: Client, top: Path) -> Call:
    """A request under a sandbox: the result, or the error."""

    def ask(entries: tuple[tuple[str, str], ...], method: str, path: str, **members: Json) -> Json:
        params = {**members, "sandbox": profile(top, *entries)}
        for name, value in list(members.items()):
            if name in ("destinationPath",):
                params[name] = uri(top / value)
        params["sourcePath" if method == "copy" else "path"] = uri(top / path)
        reply = client.request(f"fs/{method}", params)
        return reply.get("error", reply.get("result"))

    return ask


def data(text: str) -> dict[str, str]:
    return {"dataBase64": b64encode(text.encode()).decode()}


def text_of(result: Json) -> str:
    assert "dataBase64" in result, result
    return b64decode(result["dataBase64"]).decode()


@pytest.mark.parametrize("path", ["out/s.txt", "w/link", "w/dlink/../out/s.txt", "w/dlink/s.txt"])
def test_restricted_read_does_not_see_what_is_outside(ask: Call, path: str) -> None:
    assert ask(RR, "readFile", path) == MISSING
    assert ask(RR, "getMetadata", path) == MISSING
    assert ask(RR, "canonicalize", path) == MISSING


def test_restricted_read_sees_what_it_names(ask: Call, top: Path) -> None:
    assert text_of(ask(RR, "readFile", "w/a.txt")) == "hi\n"
    assert text_of(ask(RR, "readFile", "w/inlink")) == "hi\n"
    assert text_of(ask(RR, "readFile", "w/hard")) == "secret"
    found = ask(RR, "getMetadata", "w/a.txt")
    modified = (top / "w" / "a.txt").stat().st_mtime_ns // 1_000_000
    assert {**found, "createdAtMs": 0, "mode": 0} == {
        "isDirectory": False,
        "isFile": True,
        "isSymlink": False,
        "size": 3,
        "createdAtMs": 0,
        "modifiedAtMs": modified,
        "mode": 0,
    }
    assert ask(RR, "getMetadata", "w/inlink")["isSymlink"]
    assert ask(RR, "canonicalize", "w/inlink") == {"path": uri(top / "w" / "a.txt")}
    names = {entry["fileName"] for entry in ask(RR, "readDirectory", "w")["entries"]}
    assert names == {"a.txt", "sub", "inlink", "hard", "fifo"}
    assert [entry["fileName"] for entry in ask(RR, "readDirectory", "")["entries"]] == ["w"]


def test_restricted_read_walks(ask: Call, top: Path) -> None:
    options = {"maxDepth": 9, "maxDirectories": 9, "maxEntries": 99, "followDirectorySymlinks": True}
    found = ask(RR, "walk", "", options=options)
    assert [(entry["path"].removeprefix(uri(top)), entry["kind"]) for entry in found["entries"]] == [
        ("/w", "directory"),
        ("/w/a.txt", "file"),
        ("/w/hard", "file"),
        ("/w/sub", "directory"),
        ("/w/sub/.env", "file"),
        ("/w/sub/b.txt", "file"),
        ("/w/sub/deep", "directory"),
    ]
    assert (found["truncated"], found["errors"]) == (False, [])
    assert ask(RR, "walk", "", options={**options, "maxEntries": 1})["truncated"]
    denied = (*RO, ("w/sub", "deny"))
    errors = ask(denied, "walk", "w", options=options)["errors"]
    assert errors == [{"path": uri(top / "w" / "sub"), "message": "Permission denied (os error 13)"}]


def test_restricted_read_writes_nothing(ask: Call, top: Path) -> None:
    for path in ("w/n.txt", "w/a.txt", "w/inlink", "w/hard"):
        assert ask(RR, "writeFile", path, **data("x")) == FROZEN
    assert ask(RR, "copy", "w/a.txt", destinationPath="w/c.txt", recursive=False) == FROZEN
    assert ask(RR, "writeFile", "out/x", **data("x")) == MISSING
    assert (top / "w" / "a.txt").read_text() == "hi\n"
    assert sorted(os.listdir(top / "out")) == ["s.txt"]


def test_read_only_refuses_every_change(ask: Call, top: Path) -> None:
    before = sorted(str(path) for path in top.rglob("*"))
    assert ask(RO, "writeFile", "w/a.txt", **data("x")) == FROZEN
    assert ask(RO, "createDirectory", "w/new") == FROZEN
    assert ask(RO, "createDirectory", "w/new", recursive=False) == FROZEN
    assert ask(RO, "remove", "w/a.txt") == FROZEN
    assert ask(RO, "open", "w/a.txt", handleId="h", mode="replace") == FROZEN
    assert ask(RO, "setMetadata", "w/a.txt", mode=0o600) == FROZEN
    assert text_of(ask(RO, "readFile", "out/s.txt")) == "secret"
    assert sorted(str(path) for path in top.rglob("*")) == before


def test_rename_is_confined_at_both_ends(client: Client, top: Path) -> None:
    def rename(source: str, destination: str) -> Json:
        params = {"sourcePath": uri(top / source), "destinationPath": uri(top / destination)}
        reply = client.request("fs/rename", {**params, "sandbox": profile(top, *WS)})
        return reply.get("error", reply.get("result"))

    assert rename("w/a.txt", "w/sub/a.txt") == {}
    assert rename("w/sub/a.txt", "w/.git") == FROZEN
    assert rename("w/sub", "w/.git") == FROZEN
    assert rename("w/sub/b.txt", "out/b.txt")["code"] == -32603
    assert rename("out/s.txt", "w/s.txt")["code"] == -32603
    assert (top / "out" / "s.txt").exists()
    assert (top / "w" / "sub" / "a.txt").exists()
    assert not (top / "w" / ".git").exists()


def test_workspace_write(ask: Call, top: Path) -> None:
    w = top / "w"
    assert ask(WS, "writeFile", "w/n.txt", **data("new")) == {}
    assert (w / "n.txt").read_text() == "new"
    for path in ("out/n", "w/link", "w/dlink/new", "out/s.txt"):
        assert ask(WS, "writeFile", path, **data("x")) == FROZEN
    assert ask(WS, "writeFile", "w/inlink", **data("through")) == {}
    assert ((w / "a.txt").read_text(), (w / "inlink").is_symlink()) == ("through", True)
    assert ask(WS, "copy", "out/s.txt", destinationPath="w/c.txt", recursive=False) == {}
    assert (w / "c.txt").read_text() == "secret"
    assert ask(WS, "remove", "w/dlink") == {}
    assert (not (w / "dlink").is_symlink(), (top / "out" / "s.txt").read_text()) == (True, "secret")
    assert ask(WS, "writeFile", "w/hard", **data("shared")) == {}
    assert ((top / "out" / "s.txt").read_text(), (w / "hard").stat().st_nlink) == ("shared", 2)
    assert ask(WS, "setMetadata", "w/n.txt", mode=0o600, modifiedAtMs=1000) == {}
    assert (w / "n.txt").stat().st_mode & 0o777 == 0o600
    assert ask(WS, "createDirectory", "w/x/y/z") == {}
    assert (w / "x" / "y" / "z").is_dir()
    assert ask(WS, "createDirectory", "w/sub/.git", recursive=False) == {}
    assert ask(WS, "copy", "w/sub", destinationPath="w/x/copied", recursive=True) == {}
    assert (w / "x" / "copied" / ".env").read_text() == "token"


@pytest.mark.parametrize("name", [".git", ".agents", ".codex", ".aws"])
def test_protected_name_that_is_missing_does_not_come_into_being(ask: Call, top: Path, name: str) -> None:
    w = top / "w"
    (w / "to").symlink_to(name)
    (w / "far").symlink_to(f"sub/deep/../../../w/{name}")
    before = sorted(os.listdir(w))
    for path in (name, f"{name}/config", f"{name}/a/b", "to", "far", "to/config"):
        reply = ask(WS, "writeFile", f"w/{path}", **data("x"))
        assert reply == (MISSING if path == "to/config" else FROZEN), path
    assert ask(WS, "createDirectory", f"w/{name}", recursive=False) == EXISTS
    assert ask(WS, "createDirectory", f"w/{name}") == FROZEN
    assert ask(WS, "createDirectory", f"w/{name}/hooks") == FROZEN
    assert ask(WS, "open", f"w/{name}", handleId="h", mode="replace") == FROZEN
    assert ask(WS, "copy", "w/a.txt", destinationPath=f"w/{name}", recursive=False) == FROZEN
    assert ask(WS, "copy", "w/link", destinationPath=f"w/{name}", recursive=False) == FROZEN
    assert ask(WS, "copy", "w/sub", destinationPath=f"w/{name}", recursive=True) == FROZEN
    assert ask(WS, "writeFile", f"w/{name}", followSymlinks=False, **data("x")) == FROZEN
    assert ask(WS, "createDirectory", f"w/{name}", followSymlinks=False) == FROZEN
    assert sorted(os.listdir(w)) == before


def test_protected_name_that_is_there(ask: Call, top: Path) -> None:
    git = top / "w" / ".git"
    git.mkdir()
    (git / "config").write_text("mine")
    assert text_of(ask(WS, "readFile", "w/.git/config")) == "mine"
    for path in ("w/.git/config", "w/.git/new"):
        assert ask(WS, "writeFile", path, **data("x")) == FROZEN
    assert ask(WS, "createDirectory", "w/.git", recursive=False) == EXISTS
    assert ask(WS, "remove", "w/.git") == FROZEN
    assert (git / "config").read_text() == "mine"
    assert ask((*WS, ("w/.git", "write")), "writeFile", "w/.git/config", **data("theirs")) == {}
    assert (git / "config").read_text() == "theirs"


def test_protected_name_that_is_a_link_refuses_the_call(ask: Call, top: Path) -> None:
    codex = top / "w" / ".codex"
    codex.symlink_to("sub")
    words = f"cannot enforce sandbox read-only path {codex} because it crosses writable symlink {codex}"
    expected = {"code": -32603, "message": f"failed to prepare fs sandbox: {words}"}
    assert ask(WS, "writeFile", "w/n", **data("x")) == expected
    assert not (top / "w" / "n").exists()


def test_denied_places(ask: Call, top: Path) -> None:
    directory = (*RO, ("w/sub", "deny"))
    assert ask(directory, "readFile", "w/sub/b.txt") == DENIED
    assert ask(directory, "readDirectory", "w/sub") == DENIED
    assert ask(directory, "open", "w/sub/b.txt", handleId="h") == DENIED
    file = (*RO, ("w/sub/b.txt", "none"))
    assert ask(file, "getMetadata", "w/sub/b.txt")["size"] == 0
    assert ask(file, "readFile", "w/sub/b.txt") == DENIED
    pattern = (*RO, ("w/**/*.env", "deny"))
    assert ask(pattern, "readFile", "w/sub/.env") == DENIED
    assert text_of(ask(pattern, "readFile", "w/sub/b.txt")) == "inner"
    missing = (*WS, ("w/later", "deny"))
    assert ask(missing, "writeFile", "w/later", **data("x")) == DENIED
    assert ask(missing, "createDirectory", "w/later/x") == DENIED
    assert not (top / "w" / "later").exists()


def test_directory_with_something_denied_inside_cannot_be_moved_away_from_it(
    client: Client, top: Path
) -> None:
    sandbox = profile(top, *WS, ("w/sub/deep", "deny"))
    params = {"sourcePath": uri(top / "w" / "sub"), "destinationPath": uri(top / "w" / "other")}
    reply = client.request("fs/rename", {**params, "sandbox": sandbox})
    assert reply["error"] == {"code": -32603, "message": "Device or resource busy (os error 16)"}
    assert (top / "w" / "sub").is_dir()


@pytest.mark.parametrize("entries", [RR, RO, WS])
def test_what_is_no_file_cannot_be_read(ask: Call, top: Path, entries: tuple[tuple[str, str], ...]) -> None:
    for path in ("w/fifo", "w/sub"):
        expected = {"code": -32600, "message": f"path `{top / path}` is not a file"}
        assert ask(entries, "readFile", path) == expected
        assert ask(entries, "open", path, handleId="h") == expected
    expected = {"code": -32600, "message": "path `/dev/null` is not a file"}
    assert ask(entries, "readFile", "/dev/null") == expected


@pytest.mark.parametrize("permissions", ["disabled", "external", "unrestricted"])
def test_profile_that_restricts_no_files_is_as_none(client: Client, top: Path, permissions: str) -> None:
    given = {
        "disabled": {"type": "disabled"},
        "external": {"type": "external", "network": "restricted"},
        "unrestricted": {
            "type": "managed",
            "network": "restricted",
            "file_system": {"type": "unrestricted"},
        },
    }[permissions]
    sandbox = {"permissions": given, "windowsSandboxLevel": "disabled"}
    path = uri(top / "w" / ".git")
    assert client.request("fs/createDirectory", {"path": path, "sandbox": sandbox})["result"] == {}
    assert (top / "w" / ".git").is_dir()
    link = {"path": uri(top / "w" / "link"), "sandbox": sandbox}
    assert text_of(client.request("fs/readFile", link)["result"]) == "secret"


def test_links_are_refused_where_none_may_be_followed(ask: Call) -> None:
    words = {"code": -32600, "message": "path contains a symbolic link"}
    assert ask(RR, "readFile", "w/inlink", followSymlinks=False) == words
    assert ask(RR, "getMetadata", "w/inlink", followSymlinks=False) == words
    assert ask(WS, "writeFile", "w/inlink", followSymlinks=False, **data("x")) == words


def test_handles_are_opened_inside_and_used_outside(client: Client, top: Path) -> None:
    def call(method: str, **members: Json) -> Json:
        reply = client.request(f"fs/{method}", {"handleId": "h", **members})
        return reply.get("error", reply.get("result"))

    path = uri(top / "w" / "big")
    (top / "w" / "big").write_bytes(b"x" * 3_000_000)
    assert call("open", path=path, sandbox=profile(top, *RR)) == {"handleId": "h"}
    block = call("readBlock", offset=2_999_999, len=10)
    assert block == {"chunk": "eA==", "eof": True}
    assert call("close") == {}
    whole = client.request("fs/readFile", {"path": path, "sandbox": profile(top, *RR)})
    assert len(text_of(whole["result"])) == 3_000_000
    assert call("open", path=path, mode="replace", sandbox=profile(top, *WS)) == {"handleId": "h"}
    assert call("writeBlock", offset=0, chunk="aGk=") == {}
    assert call("close") == {}
    assert (top / "w" / "big").read_bytes() == b"hi"


def test_no_handle_gives_the_memory_of_a_helper(ask: Call) -> None:
    everything = (("/", "write"), ("w/sub", "deny"))
    for path in ("/proc/self/mem", "/proc/1/task/1/mem", "/proc/thread-self/mem"):
        for entries in (everything, (("w", "read"),)):
            assert ask(entries, "open", path, handleId="h") == DENIED
            assert ask(entries, "open", path, handleId="h", mode="replace", keep=True) == DENIED
            assert ask(entries, "writeFile", path, **data("x")) == DENIED
    assert text_of(ask(RR, "readFile", "/proc/self/status")).startswith("Name:")
    assert ask(RR, "readFile", "/proc/1/root/etc/passwd") == MISSING
    status = dict(
        line.split(":\t", 1) for line in text_of(ask(RR, "readFile", "/proc/self/status")).splitlines()
    )
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_helper_holds_nothing_but_its_channel_and_a_few_variables(ask: Call, top: Path) -> None:
    environment = text_of(ask(RR, "readFile", "/proc/self/environ"))
    names = {entry.partition("=")[0] for entry in environment.split("\0") if entry}
    assert names <= {"PATH", "TMPDIR", "TMP", "TEMP", "PWD", "LC_CTYPE"}
    listed = ask(RR, "readDirectory", "/proc/self/fd")["entries"]
    assert len(listed) <= 5
    assert ask(RR, "readFile", sys.executable) == MISSING
    assert ask(RR, "canonicalize", "/proc/self/cwd") == {"path": "file:///"}


def test_policy_that_needs_a_cwd_and_has_none(client: Client, top: Path) -> None:
    sandbox = profile(top, *RO)
    del sandbox["cwd"]
    sandbox["permissions"]["file_system"]["entries"].append(
        {"path": {"type": "glob_pattern", "pattern": "**/*.env"}, "access": "deny"}
    )
    reply = client.request("fs/readFile", {"path": uri(top / "w" / "a.txt"), "sandbox": sandbox})
    words = "file system sandbox context with dynamic permissions requires cwd"
    assert reply["error"] == {"code": -32602, "message": words}


def test_cwd_of_another_operating_system(client: Client, top: Path) -> None:
    sandbox = profile(top, ("**/*.x", "deny"), ("w", "write"), cwd="file:///C:/x")
    sandbox["permissions"]["file_system"]["entries"][0]["path"]["pattern"] = "*.x"
    reply = client.request("fs/readFile", {"path": uri(top / "w" / "a.txt"), "sandbox": sandbox})
    assert reply["error"] == {"code": -32600, "message": "'file:///C:/x' is invalid on 'linux'"}


# Changes between calls.


def test_what_changes_between_two_calls_counts_for_the_second(ask: Call, top: Path) -> None:
    w = top / "w"
    pattern = (*WS, ("w/**/*.env", "deny"))
    assert text_of(ask(pattern, "readFile", "w/a.txt")) == "hi\n"
    (w / "new.env").write_text("token")
    assert ask(pattern, "readFile", "w/new.env") == DENIED
    assert ask(WS, "writeFile", "w/n", **data("1")) == {}
    (w / ".git").mkdir()
    assert ask(WS, "writeFile", "w/.git/config", **data("x")) == FROZEN
    (w / ".git").rmdir()
    assert ask(WS, "createDirectory", "w/.git", recursive=False) == EXISTS
    w.rename(top / "w2")
    w.mkdir()
    assert ask(WS, "writeFile", "w/n", **data("2")) == {}
    assert ((w / "n").read_text(), (top / "w2" / "n").read_text()) == ("2", "1")


@contextmanager
def swapping(place: Path, targets: tuple[str, str]) -> Iterator[None]:
    """A link that leads somewhere else all the time."""
    done = threading.Event()

    def swap() -> None:
        for target in itertools.cycle(targets):
            if done.is_set():
                return
            fresh = place.with_name("fresh")
            fresh.symlink_to(target)
            fresh.replace(place)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("name", "targets"),
    [("swapped", (".git", "ok")), ("swapped", ("../out/new", "ok")), ("swapped/x", ("../out", "sub"))],
)
def test_link_that_is_swapped_all_the_time_leads_nowhere_it_may_not(
    ask: Call, top: Path, name: str, targets: tuple[str, str]
) -> None:
    seen = set()
    with swapping(top / "w" / "swapped", targets):
        for _ in range(300):
            reply = ask(WS, "writeFile", f"w/{name}", **data("x"))
            seen.add(json.dumps(reply))
    assert json.dumps({}) in seen
    assert seen <= {json.dumps(reply) for reply in ({}, FROZEN, MISSING)}
    assert not (top / "w" / ".git").exists()
    assert os.listdir(top / "out") == ["s.txt"]


# The helpers.


@pytest.fixture
async def guard() -> AsyncIterator[Guard]:
    async with time_limit(), open_guard() as guard:
        yield guard


@pytest.fixture
async def local(guard: Guard) -> AsyncIterator[LocalEnvironment]:
    async with open_local(guard) as local:
        yield local


def confined(local: LocalEnvironment, top: Path, *entries: tuple[str, str]) -> ConfinedFileSystem:
    files = local.files.confined(decode_sandbox(profile(top, *entries)))
    return cast("ConfinedFileSystem", files)


def at(path: Path) -> PathUri:
    return PathUri.from_native(str(path))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def ended(pids: tuple[int, ...]) -> None:
    while any(map(is_alive, pids)):  # noqa: ASYNC110 - the kernel tells of it nowhere
        await trio.sleep(0.005)


def descendants() -> list[str]:
    """All processes below this one, zombies of others' probes left out."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True, check=True).stdout
    parents = {}
    for line in lines.splitlines()[1:]:
        pid, parent, state = line.split()
        if not state.startswith("Z"):
            parents[pid] = parent
    found = [str(os.getpid())]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


async def test_a_thousand_calls_leave_everything_as_it_was(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    reading, writing = confined(local, top, *RR), confined(local, top, *WS)

    async def calls() -> None:
        for number in range(125):
            assert await reading.read_file(at(top / "w" / "a.txt")) == b"hi\n"
            await writing.write_file(at(top / "w" / "n"), b"x" * number)
            handle = await reading.open(at(top / "w" / "a.txt"))
            await handle.close()
            with pytest.raises(FileNotFoundError):
                await reading.get_metadata(at(top / "out"))

    await calls()
    counts = len(os.listdir("/proc/self/fd")), len(descendants()), len(os.listdir(top.parent))
    pids = sorted(guard.confinement.helpers.pids)
    await calls()
    assert (len(os.listdir("/proc/self/fd")), len(descendants()), len(os.listdir(top.parent))) == counts
    assert sorted(guard.confinement.helpers.pids) == pids
    assert len(pids) == 2
    assert guard.known >= set(pids)


async def test_nothing_is_left_when_a_server_ends(top: Path) -> None:
    async with open_guard() as guard, open_local(guard) as local:
        await confined(local, top, *RR).read_file(at(top / "w" / "a.txt"))
        pids = guard.confinement.helpers.pids
        assert len(pids) == 1
    assert not any(map(is_alive, pids))


async def test_same_plan_shares_a_helper_and_another_does_not(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    for _ in range(3):
        await confined(local, top, *RR).read_file(at(top / "w" / "a.txt"))
    assert len(guard.confinement.helpers.pids) == 1
    await confined(local, top, *RR, ("out", "read")).read_file(at(top / "w" / "a.txt"))
    assert len(guard.confinement.helpers.pids) == 2


async def test_calls_at_the_same_time_have_up_to_four_helpers(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    files = confined(local, top, *RR)
    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(files.read_file, at(top / "w" / "a.txt"))
    assert len(guard.confinement.helpers.pids) == 4


async def test_plans_used_least_lately_lose_their_helpers(
    guard: Guard, local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "PLANS", 2)
    used: list[int] = []
    for entries in (RR, (*RR, ("out", "read")), (*RR, ("out", "write"))):
        await confined(local, top, *entries).get_metadata(at(top / "w"))
        used += [pid for pid in guard.confinement.helpers.pids if pid not in used]
    await ended((used[0],))
    assert sorted(guard.confinement.helpers.pids) == sorted(used[1:])


async def test_idle_helper_ends(
    guard: Guard, local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "IDLE_SECONDS", 0.05)
    files = confined(local, top, *RR)
    for _ in range(2):
        await files.read_file(at(top / "w" / "a.txt"))
        pids = guard.confinement.helpers.pids
        await ended(pids)
        assert guard.confinement.helpers.pids == ()
        assert not guard.known & set(pids)


async def test_helper_is_retired_after_many_requests(
    guard: Guard, local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "MAX_REQUESTS", 2)
    files = confined(local, top, *RR)
    await files.read_file(at(top / "w" / "a.txt"))
    (pid,) = guard.confinement.helpers.pids
    await files.read_file(at(top / "w" / "a.txt"))
    await ended((pid,))
    await files.read_file(at(top / "w" / "a.txt"))
    assert pid not in guard.confinement.helpers.pids


async def test_helper_that_died_while_idle_is_replaced(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    files = confined(local, top, *RR)
    await files.read_file(at(top / "w" / "a.txt"))
    (pid,) = guard.confinement.helpers.pids
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - it is being killed
    assert await files.read_file(at(top / "w" / "a.txt")) == b"hi\n"
    assert pid not in guard.confinement.helpers.pids


async def test_cancelled_call_ends_its_helper_and_leaves_the_others(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    files = confined(local, top, *WS)
    await files.write_file(at(top / "w" / "n"), b"x")
    before = len(os.listdir("/proc/self/fd")), len(descendants())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.write_file, at(top / "w" / "fifo"), b"nobody reads this")
        await trio.sleep(0.05)
        await files.write_file(at(top / "w" / "n"), b"meanwhile")
        nursery.cancel_scope.cancel()
    assert (top / "w" / "n").read_bytes() == b"meanwhile"
    assert (len(os.listdir("/proc/self/fd")), len(descendants())) == before
    await files.write_file(at(top / "w" / "n"), b"again")


async def test_start_that_is_cancelled_leaves_no_process(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    await confined(local, top, *RR).read_file(at(top / "w" / "a.txt"))
    before = len(os.listdir("/proc/self/fd")), descendants()
    cancelled = 0
    for delay in range(40):
        entries = (*RR, ("out", "read" if delay % 2 else "write"))
        with trio.move_on_after(delay / 2000) as scope:
            await confined(local, top, *entries).read_file(at(top / "w" / "a.txt"))
        if not scope.cancelled_caught:
            pids = guard.confinement.helpers.pids
            guard.confinement.helpers.end_idle()
            await ended(pids)
            await confined(local, top, *RR).read_file(at(top / "w" / "a.txt"))
        cancelled += scope.cancelled_caught
    assert cancelled
    assert len(descendants()) == len(before[1])
    assert len(os.listdir("/proc/self/fd")) == before[0]


async def test_fifo_is_written_when_somebody_reads_it(local: LocalEnvironment, top: Path) -> None:
    files = confined(local, top, *WS)
    big = b"0123456789" * 50_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.write_file, at(top / "w" / "fifo"), big)
        assert await trio.to_thread.run_sync((top / "w" / "fifo").read_bytes) == big


async def test_helper_that_is_killed_at_work_fails_the_call(
    guard: Guard, local: LocalEnvironment, top: Path
) -> None:
    files = confined(local, top, *WS)
    await files.write_file(at(top / "w" / "n"), b"x")
    (pid,) = guard.confinement.helpers.pids

    async def kill() -> None:
        while guard.confinement.helpers.pids:  # noqa: ASYNC110 - until it is at work
            await trio.sleep(0.005)
        os.kill(pid, signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(InternalError, match=r"^fs sandbox helper failed with status exit status: 137$"):
            await files.write_file(at(top / "w" / "fifo"), b"nobody reads this")
    assert not is_alive(pid)


async def test_call_at_work_is_ended_with_the_environment(top: Path) -> None:
    before = set(os.listdir("/proc/self/fd")), len(descendants())
    errors: list[InternalError] = []

    async def write(files: FileSystem) -> None:
        with pytest.raises(InternalError, match=r"^the environment is closed$") as caught:
            await files.write_file(at(top / "w" / "fifo"), b"nobody reads this")
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        async with open_guard() as guard, open_local(guard) as local:
            files = confined(local, top, *WS)
            await files.write_file(at(top / "w" / "n"), b"x")
            nursery.start_soon(write, files)
            while guard.confinement.helpers.pids:  # noqa: ASYNC110 - until it is at work
                await trio.sleep(0.005)
        assert (set(os.listdir("/proc/self/fd")), len(descendants())) == before
        nursery.start_soon(write, files)
    assert len(errors) == 2


async def test_helpers_at_work_are_bounded_over_all_plans(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "AT_WORK", 2)
    done: list[int] = []

    async def call(files: FileSystem) -> None:
        await files.write_file(at(top / "w" / "n"), b"x")
        done.append(len(done))

    async with open_guard() as guard, open_local(guard) as local, trio.open_nursery() as nursery:
        plans = [confined(local, top, *WS, (f"out/{number}", "deny")) for number in range(3)]
        for number, files in enumerate(plans):
            (top / "out" / f"{number}").mkdir()
            await files.write_file(at(top / "w" / "n"), b"x")
        async with trio.open_nursery() as stuck:
            for files in plans[:2]:
                stuck.start_soon(files.write_file, at(top / "w" / "fifo"), b"nobody reads this")
            while len(guard.confinement.helpers.pids) > 1:  # noqa: ASYNC110 - until they are at work
                await trio.sleep(0.005)
            nursery.start_soon(call, plans[2])
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not done
            stuck.cancel_scope.cancel()
        while not done:  # noqa: ASYNC110
            await trio.sleep(0.005)


async def test_helper_that_fails_says_why(
    guard: Guard, local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = confined(local, top, *RR)
    with pytest.raises(
        InternalError, match=r"(?s)^fs sandbox helper failed with status exit status: 1: .*KeyError"
    ):
        await files._call("no such operation", at(top / "w"))
    assert guard.confinement.helpers.pids == ()
    boot = "import sys; sys.exit('no good')"
    monkeypatch.setattr(helpers, "_BOOT", boot)
    with pytest.raises(InternalError, match=r"exit status: 1: no good$"):
        await files.read_file(at(top / "w" / "a.txt"))


@pytest.mark.parametrize(
    "answer",
    [
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0{x",
        b"\xff\xff\xff\xff\0\0\0\0",
        b"\x08\0\0\0\0\0\0\0" + b'{"id":1}' + b"more",
        b"\x11\0\0\0\0\0\0\0" + b'{"id":1,"stat":1}',
    ],
)
async def test_answer_that_is_none_fails_the_call_and_ends_the_helper(
    guard: Guard, local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    boot = f"""
import os, time
def message():
    sizes = os.read(CHANNEL, 8)
    os.read(CHANNEL, int.from_bytes(sizes[:4], "little") + int.from_bytes(sizes[4:], "little"))
message()
os.write(CHANNEL, b"\\x02\\0\\0\\0\\0\\0\\0\\0{{}}")
message()
os.write(CHANNEL, {answer!r})
time.sleep(100)
"""
    escaped = boot.replace("{", "{{").replace("}", "}}").replace("CHANNEL", "{channel}")
    monkeypatch.setattr(helpers, "_BOOT", escaped)
    files = confined(local, top, *RR)
    with pytest.raises(InternalError, match=r"^failed to encode or decode fs sandbox helper message: "):
        await files.get_metadata(at(top / "w" / "a.txt"))
    assert guard.confinement.helpers.pids == () or answer.endswith(
        b'"stat":1}'
    )  # that was well-formed, at least


async def test_without_bubblewrap_nothing_is_done(top: Path) -> None:
    class Missing:
        async def find(self, writable_roots: object = ()) -> None:
            raise InternalError("bubblewrap is not installed")

    async with open_guard() as guard, open_local(guard) as local:
        guard.confinement.helpers._bubblewraps = cast("Any", Missing())
        for entries in (WS, RO):
            files = confined(local, top, *entries)
            with pytest.raises(InternalError, match=r"^bubblewrap is not installed$"):
                await files.write_file(at(top / "w" / "a.txt"), b"x")
        assert await files.read_file(at(top / "w" / "a.txt")) == b"hi\n"
        with pytest.raises(InternalError, match=r"^bubblewrap is not installed$"):
            await confined(local, top, *RR).read_file(at(top / "w" / "a.txt"))
        assert guard.confinement.helpers.pids == ()


async def test_sandbox_within_a_sandbox_and_watches_are_refused(local: LocalEnvironment, top: Path) -> None:
    files = confined(local, top, *RR)
    with pytest.raises(NotSupported):
        files.confined(decode_sandbox(profile(top, *RO)))
    with pytest.raises(NotSupported):
        files.watch_missing((at(top / "new"),))


async def test_listings_come_through_with_every_name(local: LocalEnvironment, top: Path) -> None:
    odd = os.fsencode(top / "w") + b"/\xff\n"
    os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    files = confined(local, top, *RR)
    names = {entry.file_name for entry in await files.read_directory(at(top / "w"))}
    assert "�\n" in names
    found = await files.walk(at(top / "w"), LARGEST_WALK)
    assert odd in {entry.path.to_native() for entry in found.entries}
    assert await files.read_file(PathUri.from_native(odd)) == b""
    assert await files.read_directory(at(top / "w" / "sub" / "deep")) == ()
    assert (await files.walk(at(top / "w" / "sub" / "deep"), LARGEST_WALK)).entries == ()


async def test_long_listing_is_taken_apart_in_a_thread(
    local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def note(function: Callable[..., Json]) -> Callable[..., Json]:
        def call(*args: Json) -> Json:
            threads.append(threading.get_ident())
            return function(*args)

        return call

    for name in ("walk_result", "directory_entries"):
        monkeypatch.setattr(confined_module, name, note(getattr(confined_module, name)))
    monkeypatch.setattr(confined_module, "QUICK", 100)
    files = confined(local, top, *RR)
    for number in range(100):
        (top / "w" / "sub" / f"{number}").write_text("")
    assert len(await files.read_directory(at(top / "w" / "sub"))) == 103
    assert len((await files.walk(at(top / "w" / "sub"), LARGEST_WALK)).entries) > 100
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_others_go_on_while_much_is_sent(
    guard: Guard, local: LocalEnvironment, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = confined(local, top, *WS)
    await files.write_file(at(top / "w" / "n"), b"x")
    monkeypatch.setattr(helpers, "PIECE", 1)
    (pid,) = guard.confinement.helpers.pids
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await files.write_file(at(top / "w" / "n"), bytes(1000))
        nursery.cancel_scope.cancel()
    assert turns > 1000
    assert guard.confinement.helpers.pids == (pid,)


async def test_large_files_go_both_ways(local: LocalEnvironment, top: Path) -> None:
    files = confined(local, top, *WS, ("w/sub", "deny"))
    content = os.urandom(5_000_000)
    await files.write_file(at(top / "w" / "big"), content)
    assert (top / "w" / "big").read_bytes() == content
    assert await files.read_file(at(top / "w" / "big")) == content
    assert await files.read_small(at(top / "w" / "big")) is None
    assert await files.read_small(at(top / "w" / "a.txt")) == b"hi\n"


@pytest.mark.parametrize(("system", "more"), [("linux", set()), ("darwin", {"__CF_USER_TEXT_ENCODING"})])
def test_helper_gets_only_these_variables(
    monkeypatch: pytest.MonkeyPatch, system: str, more: set[str]
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    ours = {
        "__CF_USER_TEXT_ENCODING": "0x1F5",
        "HOME": "/h",
        "PATH": "/bin",
        "TMPDIR": "/t",
        "TMP": "/u",
        "TEMP": "/v",
        "TOKEN": "x",
        "LD_PRELOAD": "y",
        "path": "",
    }
    assert helper_environment(ours).keys() == {"PATH", "TMPDIR", "TMP", "TEMP"} | more
    assert helper_environment(ours)["PATH"] == "/bin"
    assert helper_environment({}) == {}


def test_helper_imports_nothing_that_takes_long() -> None:
    fd = helpers.open_bundle()
    try:
        boot = helpers._BOOT.format(bundle=fd, size=len(helpers.compiled_helper()), channel=0)
        boot = boot.replace("sys.modules[name].main(0)", "print(*sorted(sys.modules))")
        argv = [interpreter(), "-I", "-S", "-c", boot]
        done = subprocess.run(argv, pass_fds=(fd,), capture_output=True, text=True, check=True)
    finally:
        os.close(fd)
    loaded = set(done.stdout.split())
    assert "execenv.local.file_helper" in loaded
    assert not loaded & {"typing", "json", "re", "socket", "attr", "trio", "enum", "threading"}
    assert {name for name in loaded if name.startswith("execenv.")} == {
        "execenv.local",
        "execenv.sandbox",
        *helpers.HELPER_MODULES,
    }


def test_name_in_another_case_is_the_same_where_case_does_not_count(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = top.stat()
    names = file_helper.GuardedNames({(found.st_dev, found.st_ino, b".git"): False}, frozenset())
    names.mkdir(bytes(top / ".GIT"))
    monkeypatch.setattr(file_helper, "folds_case", lambda directory: True)
    with pytest.raises(PermissionError):
        names.mkdir(bytes(top / ".Git"))
    names.mkdir(bytes(top / "other"))


@pytest.mark.parametrize(
    "path", ["/proc/self/stat", f"/proc/{os.getpid()}/stat", "link"], ids=["self", "number", "link"]
)
@pytest.mark.parametrize("how", ["read", "open", "at once"])
async def test_files_about_processes_are_those_inside(
    local: LocalEnvironment, top: Path, path: str, how: str
) -> None:
    (top / "link").symlink_to("/proc/self/stat")
    files = confined(local, top, *WS)  # reads all, so without a helper
    found = b""
    with suppress(OSError):
        if how == "read":
            found = await files.read_file(at(top / path))
        elif how == "at once":
            found = files.read_file_nowait(at(top / path)) or b""
        else:
            handle = await files.open(at(top / path))
            found = await handle.read(0, 100)
            await handle.close()
    assert not found.startswith(b"%d " % os.getpid())


async def test_protected_name_whose_mount_is_taken_away_meanwhile_stays_refused(
    guard: Guard, top: Path
) -> None:
    # of a process in a sandbox: with its end the mount point goes, and takes the helper's mount along
    made = [top / "w" / name for name in (".codex", ".aws")]
    for path in made:
        path.mkdir()
    for path in (top / "w" / "prepared", top / "w" / "sub"):
        path.mkdir(exist_ok=True)
    (top / "w" / "denied").write_text("")
    sandbox = decode_sandbox(profile(top, *WS, ("w/denied", "deny")))
    plan = await guard.confinement.plans.plan(sandbox)
    where = {"path": path_to_text(bytes(top / "w/a.txt")), "with": {"follow": True}}
    assert (await guard.confinement.helpers.call(plan, {"op": "read", **where})).body == b"hi\n"
    for path in made:
        path.rmdir()
    (top / "w" / "denied").unlink()

    async def errno_of(operation: str, path: str, **arguments: Json) -> int:
        text = path_to_text(bytes(top / "w" / path))
        header = (
            await guard.confinement.helpers.call(plan, {"op": operation, "path": text, "with": arguments})
        ).header
        return int(header["error"][0])

    to = path_to_text(bytes(made[0]))
    assert await errno_of("create_directory", ".codex", recursive=True, follow=True) == errno.EEXIST
    assert await errno_of("create_directory", ".codex/x", recursive=True, follow=True) == errno.EROFS
    assert await errno_of("write_file", ".aws", follow=True) == errno.EROFS
    assert await errno_of("copy", "sub", to=to, recursive=True) in (errno.EEXIST, errno.EROFS)
    assert await errno_of("rename", "prepared", to=to, sync=False) == errno.EROFS
    assert await errno_of("write_file", "denied", follow=True) == errno.EACCES
    assert not [path for path in (*made, top / "w" / "denied") if path.exists()]


@pytest.mark.parametrize(
    "value", [None, True, False, 0, -5, 2**63, "", 'a"\\\n\xff\u2028', [], [1, [2]], {"a": {"b": (1, None)}}]
)
def test_headers_are_json(value: Json) -> None:
    assert json.loads(file_helper.encode_json(value)) == json.loads(json.dumps(value))


# Plans.


@pytest.fixture
def plans() -> Iterator[Plans]:
    with closing(Mounts()) as mounts:
        yield Plans(mounts, {})


def sandbox_of(top: Path, *entries: tuple[str, str]) -> Sandbox:
    return decode_sandbox(profile(top, *entries))


async def test_plan_is_the_same_object_until_something_changes(plans: Plans, top: Path) -> None:
    for entries in (WS, (*WS, ("w/**/*.env", "deny"))):
        first = await plans.plan(sandbox_of(top, *entries))
        (top / "w" / "unrelated").write_text("")
        if entries == WS:
            assert await plans.plan(sandbox_of(top, *entries)) is first
        else:
            assert await plans.plan(sandbox_of(top, *entries)) == first
        (top / "w" / ".git").mkdir()
        assert await plans.plan(sandbox_of(top, *entries)) != first
        (top / "w" / ".git").rmdir()
        assert await plans.plan(sandbox_of(top, *entries)) == first


async def test_plan_is_the_same_when_nothing_is_known_at_once(
    plans: Plans, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = await plans.plan(sandbox_of(top, *WS))
    with closing(Mounts()) as mounts:
        monkeypatch.setattr(mounts, "open_now", lambda *args: None)
        assert await Plans(mounts, {}).plan(sandbox_of(top, *WS)) == at_once


async def test_plans_that_are_remembered_are_bounded(plans: Plans, top: Path) -> None:
    for number in range(100):
        await plans.plan(sandbox_of(top, ("w", "read"), (f"{number}", "read")))
    assert len(plans._known) == 64


async def test_much_is_asked_in_a_thread(plans: Plans, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()
    look = DiskFacts.look

    def note(facts: DiskFacts, path: bytes) -> Any:
        asked.add(threading.get_ident())
        return look(facts, path)

    monkeypatch.setattr(DiskFacts, "look", note)
    monkeypatch.setattr(_FactsNow, "look", note)
    for entries in (
        [(f"{number}", "read") for number in range(MANY + 1)],
        [("w", "read"), ("w/*{a,b}", "deny")],
    ):
        for _ in range(2):  # it is made, and looked at again
            await plans.plan(sandbox_of(top, *entries))
    assert asked
    assert threading.get_ident() not in asked
