"""Bringing the server to where only a shell and a Python are; the other side is a command on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import zlib
from collections.abc import Sequence
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import trio
from packaging.requirements import Requirement

from execenv import CommandTarget, ConnectFailed, open_environment
from execenv import _bootstrap as bootstrap
from execenv import _first_stage as first_stage
from execenv.protocol import EnvironmentConfigReadParams
from tests.conftest import WebsocketServer
from tests.other_side import REAL_PYTHON, Box, make_box

TIME_LIMIT = 30.0


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path)


def inside(box: Box, *words: str) -> tuple[str, ...]:
    """The command that reaches the box, with assignments or programs in front of what runs there."""
    return ("env", "-i", f"PATH={box.bin}", f"HOME={box.home}", *words)


async def run_there(
    argv: Sequence[str], command: str = "echo $HOME", initialize_timeout: float = 10.0
) -> bytes:
    with trio.fail_after(TIME_LIMIT):
        target = CommandTarget(tuple(argv), bootstrap=True, initialize_timeout=initialize_timeout)
        async with open_environment(target) as environment:
            done = await environment.run(["sh", "-c", command])
    assert done.stdout is not None
    return done.stdout


async def refusal(argv: Sequence[str], initialize_timeout: float = 10.0) -> str:
    with pytest.raises(ConnectFailed) as caught:
        await run_there(argv, initialize_timeout=initialize_timeout)
    return str(caught.value)


def sent(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the server was sent since the last look."""
    found = "sending the server" in caplog.text
    caplog.clear()
    return found


def cached(box: Box) -> Path:
    return box.home / ".cache" / "execenv" / bootstrap.archive().digest


# What is sent.


def test_archive_holds_python_files_of_what_the_server_imports_and_nothing_else() -> None:
    shipped = bootstrap.archive()
    files = first_stage.unpack(shipped.compressed(), shipped.digest)
    assert list(files) == sorted(files)
    code = [name for name in files if not name.endswith(".dist-info/METADATA")]
    assert all(name.endswith(".py") for name in code)
    assert {name.partition("/")[0].removesuffix(".py") for name in code} == set(bootstrap.MODULES)
    assert not [name for name in code if "test" in name]
    assert files["execenv/_first_stage.py"] == Path(first_stage.__file__).read_bytes()
    bootstrap.archive.cache_clear()
    assert bootstrap.archive() == shipped


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_archive_has_what_its_libraries_require_under_every_python(version: str) -> None:
    names = {
        distribution_name.lower()
        for module in bootstrap.MODULES
        for distribution_name in packages_distributions().get(module, [module])
    }
    there = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "extra": "",
    }
    for name in names - {"execenv"}:
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate(there):
                assert requirement.name.lower().replace("-", "_") in {
                    name.replace("-", "_") for name in names
                }


def test_nothing_that_a_shell_would_change_is_appended_to_a_command() -> None:
    assert bootstrap.SHELL == "sh"
    script = bootstrap.script("0" * 64)
    assert script.isascii()  # whatever the locale is there
    assert subprocess.run(["sh", "-n"], input=script.encode(), timeout=10, check=False).returncode == 0


# Connecting.


async def test_server_is_sent_once_and_kept_in_a_private_cache(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "execenv"):
        assert await run_there(inside(box)) == f"{box.home}\n".encode()
        assert re.search(r"stdio of env: sending the server, \d+ bytes", caplog.text)
        assert sent(caplog)
        assert await run_there(inside(box)) == f"{box.home}\n".encode()
        assert not sent(caplog)
    assert os.listdir(cached(box).parent) == [cached(box).name]
    assert stat.S_IMODE(cached(box).parent.stat().st_mode) == 0o700


async def test_server_is_the_process_that_was_the_shell(box: Box) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(CommandTarget(inside(box), bootstrap=True)) as environment:
            done = await environment.run(["sh", "-c", "echo $PPID; cat /proc/$PPID/stat"])
    assert done.stdout is not None
    server, line = done.stdout.decode().split("\n", 1)
    assert line.startswith(f"{server} (python")
    assert int(line.rpartition(") ")[2].split()[1]) == os.getpid()


async def test_server_there_has_nothing_compiled_and_nothing_of_what_is_installed_there(box: Box) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(CommandTarget(inside(box), bootstrap=True)) as environment:
            done = await environment.run(["sh", "-c", "cat /proc/$PPID/maps"])
    assert done.stdout is not None
    assert b"site-packages" not in done.stdout


async def test_server_there_does_all_that_needs_a_library(
    box: Box, websocket_server: WebsocketServer
) -> None:
    (box.home / ".codex").mkdir()
    (box.home / ".codex" / "config.toml").write_text('model = "m"\n')
    url = websocket_server.url.replace("ws://", "http://")
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(CommandTarget(inside(box), bootstrap=True)) as environment:
            assert (await environment.http.request("GET", f"{url}/readyz")).status == 200
            cwd = environment.path(str(box.home)).uri
            asked = EnvironmentConfigReadParams(cwd, (("model",),), ())
            assert "'m'" in str(await environment._backend.read_config(asked)).replace('"', "'")
            path = environment.path(str(box.home / "data"))
            await path.write_bytes(bytes(range(256)) * 1000)
            assert await path.read_bytes() == bytes(range(256)) * 1000
            assert [entry.name for entry in await path.parent.iterdir() if entry.name == "data"] == ["data"]


@pytest.fixture(params=["3.12", "3.13", "3.14"])
def other_python(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The name and the path of another Python of this machine."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{request.param}.*/bin/python3"))
    found = str(installed[-1]) if installed else shutil.which(f"python{request.param}")
    if found is None:
        pytest.skip(f"there is no Python {request.param}")
    return f"python{request.param}", found


async def test_other_pythons_than_ours_do(box: Box, other_python: tuple[str, str]) -> None:
    box.put("python3", "echo 3.9.2; exit 1")
    (box.bin / other_python[0]).symlink_to(other_python[1])
    assert await run_there(inside(box)) == f"{box.home}\n".encode()


async def test_what_login_prints_is_skipped(box: Box) -> None:
    noisy = 'echo "Welcome to box!"; printf "\\033]0;box\\007> "; exec "$0" "$@"'
    assert await run_there(inside(box, "sh", "-c", noisy)) == f"{box.home}\n".encode()


async def test_cache_that_is_not_what_was_sent_is_replaced(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    await run_there(inside(box))
    (cached(box) / "json.py").write_text("raise SystemExit('not ours')")
    with caplog.at_level(logging.INFO, "execenv"):
        assert await run_there(inside(box)) == f"{box.home}\n".encode()
        assert sent(caplog)
        await run_there(inside(box))
        assert not sent(caplog)
    assert os.listdir(cached(box).parent) == [cached(box).name]


async def test_connects_at_the_same_time_fill_one_cache(box: Box) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(run_there, inside(box))
    assert os.listdir(cached(box).parent) == [cached(box).name]


async def test_cache_that_others_can_write_to_is_not_used(box: Box, tmp_path: Path) -> None:
    shared = box.home / ".cache" / "execenv"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    assert await run_there(inside(box, f"TMPDIR={tmp_path}")) == f"{box.home}\n".encode()
    assert list(shared.iterdir()) == []
    assert (tmp_path / f"execenv-{os.geteuid()}" / bootstrap.archive().digest).is_dir()


async def test_full_disk_is_told_and_leaves_nothing_behind(box: Box, tmp_path: Path) -> None:
    small = ("sh", "-c", 'ulimit -f 8; exec "$0" "$@"')
    text = await refusal(inside(box, f"TMPDIR={tmp_path}", *small))
    assert (
        "no place there to keep the server (XDG_CACHE_HOME may name one): [Errno 27] File too large" in text
    )
    assert os.listdir(box.home / ".cache" / "execenv") == []
    assert os.listdir(tmp_path / f"execenv-{os.geteuid()}") == []


async def test_user_without_a_home_is_served_too(box: Box, tmp_path: Path) -> None:
    argv = inside(box, "HOME=/nonexistent", f"TMPDIR={tmp_path}")
    if os.geteuid() == 0:
        argv = inside(box, "HOME=/proc", f"TMPDIR={tmp_path}")  # where not even root makes a directory
    await run_there(argv)
    assert (tmp_path / f"execenv-{os.geteuid()}").is_dir()


async def test_silent_other_side_is_given_up_and_ended(box: Box, tmp_path: Path) -> None:
    script = f"echo $$ >{tmp_path}/pid; sleep 1000"
    text = await refusal(inside(box, "sh", "-c", script), initialize_timeout=0.5)
    assert text == "stdio of env: neither a shell nor a Python answered there within 0.5 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_transfer_without_progress_is_given_up(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "PROGRESS_TIMEOUT", 0.2)
    script = "for word in hello need 'got 32768'; do echo execenv-bootstrap $word; done; sleep 1000"
    text = await refusal(inside(box, "sh", "-c", script))
    assert text == "stdio of env: silent for 0.2 s while the server was brought to its other side"


async def test_other_side_that_prints_for_ever_is_given_up(box: Box) -> None:
    text = await refusal(inside(box, "sh", "-c", "while :; do echo y; done"))
    assert "too much was printed before a server was started" in text
    assert len(text) < 1000


async def test_what_the_other_side_says_cannot_command_a_terminal(box: Box) -> None:
    script = r"printf '\033[31mexecenv\n' >&2; printf 'a\033]0;b\n'; printf last >&2; exit 3"
    text = await refusal(inside(box, "sh", "-c", script))
    assert text.endswith("env ended with status 3 and said: a\\x1b]0;b / \\x1b[31mexecenv / last")


async def test_answer_that_makes_no_sense_is_refused(box: Box) -> None:
    text = await refusal(inside(box, "sh", "-c", "echo execenv-bootstrap what; sleep 1000"))
    assert "a confused answer to the bootstrap: 'what'" in text


# The first stage, by itself.


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"not compressed", "damaged"),
        (zlib.compress(b"5 a.py\nhello"), "another hash"),
        (zlib.compress(b"5 a.py\nhello")[:-3], "damaged"),
    ],
)
def test_what_was_damaged_on_its_way_is_refused(archive: bytes, reason: str) -> None:
    with pytest.raises(first_stage._Refused, match=reason):
        first_stage.unpack(archive, "0" * 64)


TREE = {"a/__init__.py": b"", "a/b.py": b"b = 1\n", "c.py": b"import a"}


def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A small tree in a cache, and its hash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = b"".join(b"%d %s\n%s" % (len(TREE[name]), name.encode(), TREE[name]) for name in sorted(TREE))
    digest = hashlib.sha256(data).hexdigest()
    assert first_stage.unpack(zlib.compress(data), digest) == TREE
    directory = first_stage.store(TREE, digest)
    assert first_stage.find(digest) == directory == str(tmp_path / "execenv" / digest)
    return Path(directory), digest


@pytest.mark.parametrize(
    "fault", ["longer", "shorter", "gone", "renamed", "added", "link", "link to it", "fifo"]
)
def test_every_fault_of_the_cache_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    directory, digest = stored(tmp_path, monkeypatch)
    file = directory / "a" / "b.py"
    match fault:
        case "longer":
            file.write_bytes(file.read_bytes() + b" ")
        case "shorter":
            file.write_bytes(b"")
        case "gone":
            file.unlink()
        case "renamed":
            file.rename(directory / "a" / "d.py")
        case "added":
            (directory / "json.so").write_bytes(b"")
        case "link":
            (directory / "a" / "e").symlink_to("/")
        case "link to it":
            file.rename(tmp_path / "b.py")
            file.symlink_to(tmp_path / "b.py")
        case "fifo":
            file.unlink()
            os.mkfifo(file)
    assert not first_stage.is_intact(str(directory), digest)
    assert first_stage.store(TREE, digest) == str(directory)
    assert first_stage.is_intact(str(directory), digest)
    assert os.listdir(directory.parent) == [digest]


def test_nobody_else_can_enter_the_cache_whatever_the_umask_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o002)
    try:
        directory, _ = stored(tmp_path, monkeypatch)
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    for path in (directory.parent, directory, directory / "a"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_bytecode_in_the_cache_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, digest = stored(tmp_path, monkeypatch)
    (directory / "a" / "__pycache__").mkdir()
    (directory / "a" / "__pycache__" / "b.cpython-311.pyc").write_bytes(b"")
    assert first_stage.is_intact(str(directory), digest)


def test_cache_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, digest = stored(tmp_path, monkeypatch)
    monkeypatch.setattr(first_stage, "places", lambda: iter([str(tmp_path / "link")]))
    (tmp_path / "link").symlink_to(directory.parent)
    assert first_stage.find(digest) is None
    with pytest.raises(first_stage._Refused, match="link is no directory that only this user can change"):
        first_stage.store(TREE, digest)


def run_first_stage(stdin: bytes, home: Path) -> subprocess.CompletedProcess[bytes]:
    argv = [REAL_PYTHON, "-I", "-S", first_stage.__file__, bootstrap.archive().digest]
    variables = {"XDG_CACHE_HOME": str(home)}
    return subprocess.run(argv, input=stdin, capture_output=True, env=variables, timeout=30, check=False)


def test_input_that_ends_early_stores_nothing(tmp_path: Path) -> None:
    data = bootstrap.archive().compressed()
    done = run_first_stage(b"%d\n%b" % (len(data), data[:-1]), tmp_path)
    assert done.stdout.endswith(b"\nexecenv-bootstrap failed stdin ended before the server was received\n")
    assert list(tmp_path.iterdir()) == []


def test_first_stage_reads_no_byte_that_is_for_the_server(tmp_path: Path) -> None:
    data = bootstrap.archive().compressed()
    initialize = b'{"id":1,"method":"initialize","params":{"clientName":"t","resumeSessionId":null}}\n'
    for stdin in (b"%d\n%b%b" % (len(data), data, initialize), initialize):
        done = run_first_stage(stdin, tmp_path)
        answer = json.loads(done.stdout.partition(b"execenv-bootstrap ready\n")[2])
        assert (answer["id"], done.stderr, done.returncode) == (1, b"", 0)
        assert "sessionId" in answer["result"]
