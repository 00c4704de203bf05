"""`execenv cp`, `ls`, `cat`, `info` and `http` as a user meets them."""

from __future__ import annotations

import base64
import filecmp
import json
import os
import re
import shlex
import signal
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from execenv import _data_commands
from execenv.paths import PathUri
from execenv.transfer import Progress
from tests.conftest import SERVE, SERVER_VARIABLES, WebsocketServer, run_websocket_server
from tests.http_origin import PIECE, Origin, open_origin
from tests.test_cli import EXECENV, TIME_LIMIT, check_one_line, execenv, on_terminal, started

MIB = 1024 * 1024
LARGE = 128 * MIB
"""Bytes that no machine copies between two looks at them."""

UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
"""Root has its rights from capabilities; without them permissions hold for it too."""


@frozen
class Place:
    """An environment, as the command line names it: for `--env`, and before a path."""

    target: str
    options: tuple[str, ...] = ()
    prefix: str = ""

    def at(self, path: Path | str) -> str:
        return f"{self.prefix}{path}"


HERE = Place("local")


def _stdio(*wrapper: str) -> Place:
    command = shlex.join([*wrapper, *SERVE, "stdio"])
    return Place(command, ("--alias", f"box={command}"), "box:")


@pytest.fixture(params=["local", "stdio", "websocket"])
def place(request: pytest.FixtureRequest, websocket_server: WebsocketServer) -> Place:
    url = websocket_server.url
    return {"local": HERE, "stdio": _stdio(), "websocket": Place(url, (), f"{url}:")}[request.param]


@pytest.fixture
def there(websocket_server: WebsocketServer) -> Place:
    return Place(websocket_server.url, (), f"{websocket_server.url}:")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with files, of which one has permissions and a time of its own."""
    root = tmp_path / "tree"
    (root / "one" / "two").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a").write_bytes(b"content of a")
    (root / "one" / "two" / "b").write_bytes(bytes(range(256)) * 20)
    (root / "one" / "run").write_bytes(b"#!/bin/sh\n")
    (root / "one" / "run").chmod(0o750)
    os.utime(root / "one" / "run", (1_000_000_000, 1_000_000_000))
    return root


def contents(root: Path) -> dict[str, bytes | None]:
    """All that is in a directory; `None` for what is no file."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
        if not path.is_fifo()
    }


async def copied(*args: str) -> dict[str, Any]:
    """What `execenv cp --json` says; it must have gone well and quietly."""
    stdout, stderr, status = await execenv("cp", "--json", "-q", *args)
    assert (stderr, status) == (b"", 0)
    report: dict[str, Any] = json.loads(stdout)
    return report


# cp.


async def test_file_is_copied_there_and_back(place: Place, tmp_path: Path) -> None:
    source, middle, back = (tmp_path / name for name in ("a source é", "middle", "back"))
    source.write_bytes(bytes(range(256)) * 10_000)
    source.chmod(0o640)
    os.utime(source, (1_000_000_000, 1_000_000_000))
    for one, other in ((str(source), place.at(middle)), (place.at(middle), str(back))):
        stdout, stderr, status = await execenv("cp", *place.options, one, other)
        assert (stdout, status) == (b"", 0)
        assert re.fullmatch(rf"{re.escape(one)}: 1 file, 2\.4 MiB in \d+\.\d s\n", stderr.decode())
    assert back.read_bytes() == source.read_bytes()
    assert (stat.S_IMODE(back.stat().st_mode), back.stat().st_mtime) == (0o640, 1_000_000_000)


async def test_tree_is_copied_there_and_back(there: Place, tree: Path, tmp_path: Path) -> None:
    middle, back = tmp_path / "middle", tmp_path / "back"
    report = await copied("-r", str(tree), there.at(middle))
    assert (report["files"], report["bytes"]) == (3, 12 + 256 * 20 + 10)
    assert (report["skipped"], report["errors"], report["metadataKept"]) == ([], [], True)
    await copied("-r", there.at(middle), str(back))
    assert contents(back) == contents(tree)
    assert stat.S_IMODE((back / "one" / "run").stat().st_mode) == 0o750
    assert (back / "one" / "run").stat().st_mtime == 1_000_000_000


async def test_copy_between_two_servers(there: Place, tree: Path, tmp_path: Path) -> None:
    with run_websocket_server() as other:
        report = await copied("-r", there.at(tree), f"{other.url}:{tmp_path / 'copy'}")
    assert report["files"] == 3
    assert contents(tmp_path / "copy") == contents(tree)


async def test_what_is_there_already_is_left_alone(there: Place, tree: Path, tmp_path: Path) -> None:
    await copied("-r", str(tree), there.at(tmp_path / "copy"))
    (tree / "a").write_bytes(b"changed")
    report = await copied("-r", f"{tree}/.", there.at(tmp_path / "copy"))
    assert (report["files"], report["unchanged"], report["bytes"]) == (1, 2, 7)
    _, stderr, status = await execenv("cp", str(tree / "a"), there.at(tmp_path / "copy"))
    assert (status, stderr.decode().partition(": ")[2].endswith(" s, 1 unchanged\n")) == (0, True)
    assert contents(tmp_path / "copy") == contents(tree)


async def test_several_go_into_a_directory_under_their_names(
    there: Place, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "into").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    await copied("-r", str(tmp_path / "file"), there.at(tree / "one"), there.at(f"{tmp_path}/into/"))
    assert (tmp_path / "into" / "file").read_bytes() == b"content"
    assert contents(tmp_path / "into" / "one") == contents(tree / "one")


@pytest.mark.parametrize("sources", [1, 2])
async def test_destination_that_must_be_a_directory_is_none(
    there: Place, tmp_path: Path, sources: int
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    destination = there.at(f"{tmp_path}/{'none/' if sources == 1 else 'none'}")
    stdout, stderr, status = await execenv("cp", *[str(tmp_path / "file")] * sources, destination)
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, destination, "is no directory")
    assert os.listdir(tmp_path) == ["file"]


async def test_what_cannot_be_copied_is_named_and_the_others_are_copied(there: Place, tree: Path) -> None:
    into = tree / "empty"
    sources = [there.at(tree / name) for name in ("none", "one", "a")]
    stdout, stderr, status = await execenv("cp", "-q", *sources, str(into))
    assert (stdout, status) == (b"", 1)
    missing, directory = stderr.decode().splitlines()
    assert missing == f"execenv: {tree / 'none'}: No such file or directory"
    assert directory == f"execenv: {there.at(tree / 'one')} is a directory: copy it with -r"
    assert contents(into) == {"a": b"content of a"}


async def test_missing_destination_is_named_as_it_was_given(there: Place, tree: Path) -> None:
    _, stderr, status = await execenv("cp", str(tree / "a"), there.at(tree / "none" / "a"))
    assert status == 1
    check_one_line(stderr, f"{tree}/none/a: No such file or directory")


async def test_file_in_a_tree_that_may_not_be_read_is_named_and_the_others_are_copied(
    tree: Path, tmp_path: Path
) -> None:
    (tree / "one" / "run").chmod(0)
    (tree / "empty").chmod(0)
    unprivileged = _stdio(*UNPRIVILEGED)
    stdout, stderr, status = await execenv(
        "cp", "-q", "--json", "-r", *unprivileged.options, unprivileged.at(tree), str(tmp_path / "copy")
    )
    (tree / "empty").chmod(0o700)
    expected = [f"{tree}/{name}: Permission denied" for name in ("empty", "one/run")]
    assert sorted(stderr.decode().splitlines()) == [f"execenv: {line}" for line in expected]
    assert (status, sorted(json.loads(stdout)["errors"])) == (1, expected)
    assert (tmp_path / "copy" / "a").read_bytes() == b"content of a"
    assert (tmp_path / "copy" / "one" / "two" / "b").exists()
    assert not (tmp_path / "copy" / "one" / "run").exists()


async def test_links_are_followed_and_what_is_no_file_is_named(
    there: Place, tree: Path, tmp_path: Path
) -> None:
    os.mkfifo(tree / "fifo")
    (tree / "link").symlink_to("a")
    (tree / "circle").symlink_to("../tree")
    stdout, stderr, status = await execenv("cp", "-q", "-r", there.at(tree), str(tmp_path / "copy"))
    assert (stdout, status) == (b"", 0)
    skipped = [f"execenv: not copied: {tree / name}" for name in ("circle", "fifo")]
    assert sorted(stderr.decode().splitlines()) == skipped
    assert not (tmp_path / "copy" / "link").is_symlink()
    assert (tmp_path / "copy" / "link").read_bytes() == b"content of a"


async def test_fifo_cannot_be_copied(there: Place, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    _, stderr, status = await execenv("cp", there.at(tmp_path / "fifo"), str(tmp_path / "x"))
    assert status == 1
    check_one_line(stderr, f"{tmp_path / 'fifo'}: neither a file nor a directory")


async def test_atomic_copy_replaces_the_file(there: Place, tree: Path) -> None:
    report = await copied("--atomic", str(tree / "a"), there.at(tree / "one" / "run"))
    assert report["files"] == 1
    assert contents(tree / "one") == {"run": b"content of a", "two": None, "two/b": bytes(range(256)) * 20}


async def test_file_onto_itself_stays_what_it_is(there: Place, tmp_path: Path) -> None:
    file, link, other_name = (tmp_path / name for name in ("file", "link", "other name"))
    file.write_bytes(b"content")
    link.symlink_to("file")
    other_name.hardlink_to(file)
    assert (await copied(str(file), str(link), there.at(file), str(tmp_path)))["unchanged"] == 3
    assert (await copied(str(file), str(other_name)))["unchanged"] == 1
    assert contents(tmp_path) == dict.fromkeys(("file", "link", "other name"), b"content")


async def test_tree_into_itself_ends(there: Place, tree: Path) -> None:
    before = contents(tree)
    await copied("-r", there.at(tree), str(tree))
    after = contents(tree)
    assert {name: data for name, data in after.items() if not name.startswith("tree")} == before
    assert {
        name.removeprefix("tree/"): data for name, data in after.items() if name.startswith("tree/")
    } == before


async def test_names_of_any_bytes_are_copied(there: Place, tmp_path: Path) -> None:
    source, into = tmp_path / "\udcff \n\x1b", tmp_path / "into"
    source.mkdir()
    into.mkdir()
    (source / "\udcfe").write_bytes(b"content")
    stdout, stderr, status = await execenv("cp", "-r", there.at(source), there.at(into))
    assert (stdout, status) == (b"", 0)
    check_one_line(stderr, r"\udcff \n\x1b: 1 file, 7 B")
    assert contents(into) == {source.name: None, f"{source.name}/\udcfe": b"content"}


# cp that is interrupted.


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A file with something else in each MiB."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        for number in range(LARGE // MIB):
            file.seek(number * MIB)
            file.write(f"MiB {number}".encode())
        file.truncate(LARGE)
    yield path
    for left in tmp_path.rglob("*"):  # pytest keeps the directories of its last runs
        if left.is_file():
            left.unlink()


async def begun(directory: Path) -> Path:
    """What has begun to arrive in a directory, as soon as it has."""
    while True:
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                part = directory / name
                if name.endswith(".part") and os.stat(part).st_size >= MIB:
                    return part
        await trio.sleep(0.001)


async def check_resumed(source: str, destination: str, part: Path, original: Path) -> None:
    """That the same copy goes on behind what is in `part`, and leaves nothing but the whole file."""
    had = os.stat(part).st_size  # or more: a server may still be writing what it got
    assert os.listdir(part.parent) == [part.name]
    report = await copied(source, destination)
    assert had <= report["resumedBytes"] < LARGE
    assert (report["files"], report["bytes"]) == (1, LARGE - report["resumedBytes"])
    assert os.listdir(part.parent) == [original.name]
    assert filecmp.cmp(original, part.parent / original.name, shallow=False)


@pytest.mark.parametrize("direction", ["up", "down", "here"])
async def test_interrupted_copy_goes_on_where_it_was(
    there: Place, large: Path, tmp_path: Path, direction: str
) -> None:
    into = tmp_path / "into"
    into.mkdir()
    source = there.at(large) if direction == "down" else str(large)
    destination = there.at(into) if direction == "up" else str(into)
    async with started([*EXECENV, "cp", "-q", source, destination]) as run:
        part = await begun(into)
        run.process.send_signal(signal.SIGINT)
        assert await run.rest() == (b"", b"", 130)
    await check_resumed(source, destination, part, large)


async def test_copy_goes_on_with_another_server_when_the_first_was_killed(
    large: Path, tmp_path: Path
) -> None:
    into = tmp_path / "into"
    into.mkdir()
    with run_websocket_server() as server:
        url = server.url
        argv = [*EXECENV, "cp", "-q", "--recovery", "0", str(large), f"{url}:{into}"]
        async with started(argv) as run:
            part = await begun(into)
            server.process.kill()
            stdout, stderr, status = await run.rest()
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, "connect")
    with run_websocket_server([*SERVE, url]):
        await check_resumed(str(large), f"{url}:{into}", part, large)


async def test_copy_goes_on_by_itself_when_the_server_is_started_again(large: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    with run_websocket_server() as server:
        url = server.url
        async with started([*EXECENV, "cp", "-q", str(large), f"{url}:{into}"]) as run:
            await begun(into)
            server.process.kill()
            server.process.wait()
            with run_websocket_server([*SERVE, url]):
                stdout, _, status = await run.rest()
    assert (stdout, status) == (b"", 0)
    assert filecmp.cmp(large, into / large.name, shallow=False)


# Progress of cp.


async def test_terminal_shows_a_bar_with_rate_and_time_left(there: Place, tmp_path: Path) -> None:
    with (tmp_path / "file\x1b").open("wb") as file:
        file.truncate(32 * MIB)
    async with on_terminal("cp", str(tmp_path / "file\x1b"), there.at(tmp_path / "copy")) as terminal:
        await terminal.expect(b"file\\x1b")
        await terminal.expect(b"/32.0 MiB")
        assert re.search(rb"\d [kMG]B/s", await terminal.expect(b"/s"))
        await terminal.expect(b"0:00:00")
        assert await terminal.process.wait() == 0
    assert (tmp_path / "copy").stat().st_size == 32 * MIB


async def test_terminal_shows_what_failed_beside_the_bar(there: Place, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "copy" / "a").mkdir(parents=True)
    async with on_terminal("cp", "-r", f"{tree}/.", there.at(tmp_path / "copy")) as terminal:
        await terminal.expect(b"execenv: ")
        await terminal.expect(b"directory")
        assert await terminal.process.wait() == 1


def test_plain_lines_tell_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(PathUri.parse("/file"), done_bytes=50 * MIB, total_bytes=100 * MIB, complete=True)
    show = _data_commands._lines("file")
    for _ in range(12):  # one MiB in each second, behind the 50 that were left from an earlier transfer
        show(progress)
        now += 1
        progress.done_bytes += MIB
    assert capsys.readouterr().err.splitlines() == [
        "file: 55.0 MiB of 100.0 MiB, 1.0 MiB/s, 45 s left",
        "file: 60.0 MiB of 100.0 MiB, 1.0 MiB/s, 40 s left",
    ]


# ls.


async def test_list_of_a_directory(place: Place, tree: Path) -> None:
    assert await execenv("ls", "--env", place.target, str(tree)) == (b"a\nempty\none\n", b"", 0)


async def test_list_of_several(there: Place, tree: Path) -> None:
    (tree / "one" / "b").touch()
    paths = [there.at(tree / name) for name in ("none", "one", "a", "empty")]
    stdout, stderr, status = await execenv("ls", *paths)
    assert stdout.decode() == f"{tree / 'a'}\n\n{paths[1]}:\nb\nrun\ntwo\n\n{paths[3]}:\n"
    assert status == 1
    check_one_line(stderr, f"{tree / 'none'}: No such file or directory")


async def test_list_of_the_working_directory(tree: Path) -> None:
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process([*EXECENV, "ls"], cwd=tree, capture_stdout=True)
    assert done.stdout == b"a\nempty\none\n"


async def test_long_list_shows_mode_size_and_time(there: Place, tree: Path) -> None:
    (tree / "one" / "link").symlink_to("run")
    (tree / "one" / "two").chmod(0o2755)
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_000_000_000))
    stdout, stderr, status = await execenv("ls", "-l", there.at(tree / "one"))
    assert (stderr, status) == (b"", 0)
    link, run, two = stdout.decode().splitlines()
    assert link == f"-rwxr-x---           10 {changed} link@"
    assert run == f"-rwxr-x---           10 {changed} run"
    assert re.fullmatch(r"drwxr-sr-x +\d+ \d{4}-\d\d-\d\d \d\d:\d\d two", two)


ODD_NAMES = [b" blank ", b"-l", b"a\nb", "é \u202e".encode(), b"\x1b[31m", b"\xff\xfe"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A directory with files of those names."""
    (tmp_path / "odd").mkdir()
    for name in ODD_NAMES:
        with open(os.fsencode(tmp_path / "odd") + b"/" + name, "xb"):
            pass
    return tmp_path / "odd"


async def test_program_gets_names_as_they_are(there: Place, odd: Path) -> None:
    stdout, stderr, status = await execenv("ls", there.at(odd))
    assert (stderr, status) == (b"", 0)
    assert stdout == b"".join(name + b"\n" for name in sorted(ODD_NAMES))
    stdout, stderr, status = await execenv("ls", "-l", there.at(odd))
    assert (stderr, status) == (b"", 0)
    for name in ODD_NAMES:
        assert b" " + name + b"\n" in stdout


async def test_terminal_gets_no_names_that_it_would_obey(there: Place, odd: Path) -> None:
    async with on_terminal("ls", there.at(odd)) as terminal:
        for shown in (
            rb"\x1b[31m",
            rb" blank ",
            rb"-l",
            rb"a\nb",
            "é ".encode() + rb"\u202e",
            rb"\udcff\udcfe",
        ):
            assert b"\x1b" not in await terminal.expect(shown + b"\r\n")
        assert await terminal.process.wait() == 0


async def test_list_as_json(there: Place, odd: Path, tree: Path) -> None:
    (tree / "link").symlink_to("one/run")
    paths = [there.at(path) for path in (tree, odd, odd / "none")]
    stdout, stderr, status = await execenv("ls", "--json", *paths)
    assert status == 1
    check_one_line(stderr, f"{odd / 'none'}: No such file or directory")
    entries = {entry.pop("uri"): entry for entry in json.loads(stdout)}
    assert len(entries) == 4 + len(ODD_NAMES)
    link = entries[f"{tree.as_uri()}/link"]
    assert isinstance(link.pop("createdAtMs"), int | None)
    assert link == {
        "path": str(tree / "link"),
        "isDirectory": False,
        "isFile": True,
        "isSymlink": True,
        "size": 10,
        "mode": 0o750,
        "modifiedAtMs": 1_000_000_000_000,
    }
    assert entries[f"{tree.as_uri()}/one"]["isDirectory"] is True
    assert entries[f"{odd.as_uri()}/%FF%FE"]["path"] == f"{odd}/\ufffd\ufffd"


# cat.


async def test_files_are_written_in_their_order(place: Place, tree: Path) -> None:
    paths = [str(tree / "a"), place.at(tree / "one" / "two" / "b"), str(tree / "a")]
    expected = b"content of a" + bytes(range(256)) * 20 + b"content of a"
    assert await execenv("cat", "--env", place.target, *place.options, *paths) == (expected, b"", 0)


async def test_what_cannot_be_read_is_named_and_the_others_are_written(there: Place, tree: Path) -> None:
    paths = [there.at(tree / name) for name in ("a", "none", "one", "a")]
    stdout, stderr, status = await execenv("cat", *paths)
    assert (stdout, status) == (b"content of a" * 2, 1)
    missing, directory = stderr.decode().splitlines()
    assert missing == f"execenv: {tree / 'none'}: No such file or directory"
    assert directory == f"execenv: path `{tree / 'one'}` is not a file"


@pytest.mark.skipif(not os.path.exists("/proc/kallsyms"), reason="the kernel was built without")
async def test_file_whose_size_nobody_knows_is_written_whole(there: Place) -> None:
    """The kernel gives such a file in short pieces."""
    with trio.fail_after(TIME_LIMIT):
        lines = (await trio.Path("/proc/kallsyms").read_bytes()).count(b"\n")
    stdout, stderr, status = await execenv("cat", there.at("/proc/kallsyms"))
    assert (stderr, status) == (b"", 0)
    assert stdout.count(b"\n") == lines


async def test_large_file_is_written_whole(there: Place, large: Path) -> None:
    async with started([*EXECENV, "cat", there.at(large)]) as run:
        assert run.process.stdout is not None
        with large.open("rb") as file:
            async for data in run.process.stdout:
                assert data == file.read(len(data))
            assert file.tell() == LARGE
        assert await run.rest() == (b"", b"", 0)


async def test_closed_output_ends_cat_without_a_word(there: Place, large: Path) -> None:
    async with started([*EXECENV, "cat", there.at(large)]) as run:
        await run.expect(b"MiB 0")
        assert run.process.stdout is not None
        await run.process.stdout.aclose()
        assert run.process.stderr is not None
        assert b"".join([data async for data in run.process.stderr]) == b""
        assert await run.process.wait() == 128 + signal.SIGPIPE


# info.


async def test_info_for_people_and_as_json(there: Place) -> None:
    printed, stderr, status = await execenv("info", "--env", there.target)
    assert (stderr, status) == (b"", 0)
    as_json, stderr, status = await execenv("info", "--env", there.target, "--json")
    assert (stderr, status) == (b"", 0)
    told = json.loads(as_json)
    assert (told["status"], told["os"], told["cwd"]) == ("ready", "linux", os.getcwd())
    assert "fileTransfer" in told["capabilities"]
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in printed.decode().splitlines())
    assert lines.keys() == told.keys()
    assert lines["environment"] == told["environment"]
    assert lines["shell"] == told["shell"]["path"]
    assert lines["capabilities"].split() == told["capabilities"]


# http.


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with open_origin() as origin:
        yield origin


async def http(*args: str, **options: Any) -> tuple[bytes, bytes, int]:
    """`execenv http`; whatever proxy this machine has, the origin is on loopback."""
    env = {"NO_PROXY": "*", **options.pop("env", {})}
    return await execenv("http", *args, env=env, **options)


async def test_body_of_a_response_goes_to_stdout(there: Place, origin: Origin) -> None:
    expected = (PIECE * 3)[:150_000]
    assert await http("--env", there.target, origin.url("/bytes/150000")) == (expected, b"", 0)
    assert origin.received[0].method == "GET"


@pytest.mark.parametrize(
    ("args", "method", "body"),
    [
        (["-d", "text é"], "POST", "text é".encode()),
        (["-d", "@-"], "POST", b"\0stdin\xff"),
        (["-d", "@FILE"], "POST", b"\0file\xff"),
        (["-X", "PUT", "-d", "@FILE"], "PUT", b"\0file\xff"),
    ],
)
async def test_request_has_method_and_body(
    origin: Origin, tmp_path: Path, args: list[str], method: str, body: bytes
) -> None:
    (tmp_path / "body").write_bytes(b"\0file\xff")
    args = [f"@{tmp_path / 'body'}" if arg == "@FILE" else arg for arg in args]
    _, stderr, status = await http(*args, origin.url("/echo"), stdin=b"\0stdin\xff")
    assert (stderr, status) == (b"", 0)
    assert (origin.received[0].method, origin.received[0].body) == (method, body)


async def test_headers_are_sent(there: Place, origin: Origin) -> None:
    args = ["-H", "X-One: 1:2 ", "-H", "x-one:3", "--header-from", "Authorization: Bearer $CONTRACT_SECRET"]
    _, stderr, status = await http("--env", there.target, *args, origin.url("/echo"))
    assert (stderr, status) == (b"", 0)
    assert origin.received[0].values("x-one") == ["1:2", "3"]
    assert origin.received[0].values("authorization") == [f"Bearer {SERVER_VARIABLES['CONTRACT_SECRET']}"]


async def test_variable_that_is_not_set_is_named(origin: Origin) -> None:
    stdout, stderr, status = await http("--header-from", "X: $NO_SUCH_VARIABLE", origin.url("/echo"))
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, "NO_SUCH_VARIABLE")
    assert origin.received == []


async def test_status_and_headers_are_shown_if_wanted(there: Place, origin: Origin) -> None:
    stdout, stderr, status = await http("-i", "--env", there.target, origin.url("/headers"))
    assert (stderr, status) == (b"", 0)
    head, _, body = stdout.partition(b"\n\n")
    assert (head.splitlines()[0], body) == (b"200", b"ok")
    assert [line for line in head.splitlines() if line.startswith(b"x-a")] == [b"x-a: 1", b"x-a: 2"]


async def test_status_of_the_response_is_ours_only_if_wanted(origin: Origin) -> None:
    assert await http(origin.url("/status/404")) == (b"text", b"", 0)
    assert await http("-f", origin.url("/status/404")) == (b"text", b"", 1)


async def test_redirects_are_followed_or_not(origin: Origin) -> None:
    stdout, _, status = await http(origin.url("/redirects/2"))
    assert (json.loads(stdout)["target"], status) == ("/echo", 0)
    assert await http("--no-follow", origin.url("/redirect/302?to=/echo")) == (b"moved", b"", 0)


async def test_response_as_json(there: Place, origin: Origin) -> None:
    stdout, stderr, status = await http("--json", "--env", there.target, origin.url("/status/404"))
    assert (stderr, status) == (b"", 0)
    told = json.loads(stdout)
    assert (told["status"], told["body"]) == (404, "text")
    assert ["x-status", "yes"] in told["headers"]
    stdout, stderr, status = await http("--json", "--env", there.target, origin.url("/gzip"))
    told = json.loads(stdout)
    assert (base64.b64decode(told["bodyBase64"])[:2], "body" in told) == (b"\x1f\x8b", False)


@pytest.mark.parametrize(
    ("args", "path", "words"),
    [
        (["--timeout", "0.1"], "/silent", ["not finished within 0.1 s"]),
        ([], "/cut", ["broke off"]),
        ([], "/redirects/20", ["redirect"]),
    ],
)
async def test_failed_request_is_one_line_without_the_query(
    there: Place, origin: Origin, args: list[str], path: str, words: list[str]
) -> None:
    url = origin.url(path).replace("http://", "http://user:password@")
    stdout, stderr, status = await http("--env", there.target, *args, f"{url}?key=secret")
    assert status == 1
    assert stdout in (b"", b"12345")
    check_one_line(stderr, f"GET {origin.url(path)} in ", *words)
    assert b"secret" not in stderr
    assert b"password" not in stderr


# What is common to them.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["cp"], ["SRC", "execenv cp --help"]),
        (["cp", "box:a", "b"], ["'box'", "--alias"]),
        (["cp", "--alias", "box", "box:a", "b"], ["--alias", "NAME=TARGET", "'box'"]),
        (["cp", "a", "ws://127.0.0.1:1"], ["ws://127.0.0.1:1", "names no path"]),
        (["cp", "/dev/null", "ws://127.0.0.1:1:/a"], ["ws://127.0.0.1:1", "refused"]),
        (["cp", "--no-such-option", "a", "b"], ["--no-such-option", "execenv cp --help"]),
        (["ls", "--env", "'open quote"], ["open quote", "no closing quotation"]),
        (["ls", "local:C:\\windows"], ["C:/windows", "linux"]),
        (["cat"], ["PATHS", "execenv cat --help"]),
        (["cat", "local:file:///a?b"], ["query"]),
        (["info", "word"], ["word", "execenv info --help"]),
        (["info", "--env", "true"], ["true", "ended the connection"]),
        (["http"], ["URL", "execenv http --help"]),
        (["http", "ftp://127.0.0.1/?secret"], ["ftp://127.0.0.1/ in local", "http"]),
        (["http", "-H", "Secret", "http://127.0.0.1:1"], ["-H", "'Name: value'"]),
        (["http", "--header-from", "A: Secret", "http://127.0.0.1:1"], ["--header-from", "$VARIABLE"]),
        (["http", "--header-from", "A", "http://127.0.0.1:1"], ["--header-from", "'Name: value'"]),
        (["http", "--timeout", "-1", "http://127.0.0.1:1"], ["--timeout", "execenv http --help"]),
        (["http", "-d", "@/no/such/file", "http://127.0.0.1:1"], ["cannot read /no/such/file"]),
    ],
)
async def test_wrong_usage_is_one_line_that_says_what_to_mend(args: list[str], words: list[str]) -> None:
    stdout, stderr, status = await execenv(*args)
    assert stdout == b""
    assert status in (1, 2)
    check_one_line(stderr, *words)
    assert b"ecret" not in stderr
    assert b"internal error" not in stderr


async def test_token_is_shown_to_the_server_that_wants_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("not a guess\n")
    (tmp_path / "other").write_text("a guess\n")
    (tmp_path / "no token").write_bytes(b"\xff\n")
    auth = ["--ws-auth", "capability-token", "--ws-token-file", str(tmp_path / "token")]
    with run_websocket_server([*SERVE, "ws://127.0.0.1:0", *auth]) as server:
        token, other, none = ("--token-file", str(tmp_path / "token")), "other", "no token"
        for args in (
            ["info"],
            ["http", "--fail", server.url.replace("ws:", "http:") + "/readyz"],
        ):
            _, stderr, status = await execenv(args[0], "--env", server.url, *token, *args[1:])
            assert (stderr, status) == (b"", 0)
        await copied(*token, str(tmp_path / "other"), f"{server.url}:{tmp_path / 'copy'}")
        for name, words in ((other, "401"), (none, "holds no token")):
            wrong = ("--token-file", str(tmp_path / name))
            stdout, stderr, status = await execenv("info", "--env", server.url, *wrong)
            assert (stdout, status) == (b"", 1)
            check_one_line(stderr, words)
            assert b"a guess" not in stderr


async def test_token_in_the_environment_does_no_harm_here() -> None:
    token = {"EXECENV_TOKEN": "not a guess"}
    assert await execenv("cat", "/dev/null/none", env=token) == (
        b"",
        b"execenv: /dev/null/none: Not a directory\n",
        1,
    )
    assert await execenv("run", "--", "echo", "here", env=token) == (b"here\n", b"", 0)


async def test_help_lists_all_commands() -> None:
    stdout, _, status = await execenv("--help")
    commands = stdout.decode().partition("Commands:\n")[2]
    assert re.findall(r"^  (\w+)", commands, re.MULTILINE) == [
        "cat",
        "cp",
        "doctor",
        "env",
        "http",
        "info",
        "ls",
        "relay",
        "run",
        "serve",
    ]
    assert status == 0
    stdout, stderr, status = await execenv()
    assert (stdout, status) == (b"", 2)
    assert commands in stderr.decode()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cp", ["--recursive", "--atomic", "--alias", "URL:PATH", "cp -r ws://127.0.0.1:8765:/var/log logs"]),
        ("ls", ["--long", "--env", "--json"]),
        ("cat", ["--env", "--alias"]),
        ("info", ["--env", "--json"]),
        ("http", ["--header-from", "@FILE|@-", "--timeout", "--no-follow", "Bearer $API_TOKEN"]),
    ],
)
async def test_help_of_each_command_says_what_one_needs(command: str, words: list[str]) -> None:
    stdout, stderr, status = await execenv(command, "--help")
    assert (stderr, status) == (b"", 0)
    for word in words:
        assert word in stdout.decode()
