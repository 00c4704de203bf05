"""What a review of the bootstrap tried: what was found and mended, and what must stay as it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from execenv import CommandTarget, ConnectFailed, open_environment
from execenv import _bootstrap as bootstrap
from tests.fakes import Watched
from tests.other_side import Box, make_box
from tests.test_bootstrap import TIME_LIMIT, inside, refusal, run_there


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path)


async def test_missing_python_is_not_told_as_a_missing_shell(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "_ELSEWHERE", "")  # not those of this machine
    (box.bin / "python3").unlink()
    text = await refusal(inside(box))
    assert "no Python >= 3.11 at the other side (found none)" in text
    assert "(sh)" not in text


@pytest.mark.parametrize(
    "variables",
    [("LC_ALL=C",), ("LC_ALL=POSIX", "PYTHONUTF8=0", "PYTHONPATH=/nonexistent", "PYTHONWARNINGS=error")],
)
async def test_locale_and_variables_of_python_do_not_matter(box: Box, variables: tuple[str, ...]) -> None:
    home = box.home / "hö m$e *"
    home.mkdir()
    assert await run_there(inside(box, f"HOME={home}", *variables), 'echo "$HOME"') == f"{home}\n".encode()
    assert (home / ".cache" / "execenv" / bootstrap.archive().digest).is_dir()


@pytest.mark.parametrize(
    "start_file",
    [
        pytest.param("for i in 1 2 3 4 5 6 7 8 9; do echo noise; echo noise >&2; done", id="noise"),
        pytest.param("printf 'no end of the line'", id="no end"),
        pytest.param("umask 000", id="umask 000"),
        pytest.param("umask 077", id="umask 077"),
        pytest.param("unset HOME", id="no home"),
        pytest.param("exec 2>&-", id="no stderr"),
    ],
)
async def test_what_start_files_of_a_shell_do_breaks_nothing(
    box: Box, tmp_path: Path, start_file: str
) -> None:
    argv = inside(box, f"XDG_CACHE_HOME={tmp_path}/c", "sh", "-c", f'{start_file}\nexec "$@"', "sh")
    assert await run_there(argv, command="echo works") == b"works\n"
    assert (tmp_path / "c" / "execenv").stat().st_mode & 0o777 == 0o700


async def test_start_file_that_reads_all_of_stdin_is_given_up(box: Box) -> None:
    text = await refusal(inside(box, "sh", "-c", "cat >/dev/null; sleep 1000"), initialize_timeout=0.5)
    assert "neither a shell nor a Python answered there within 0.5 s" in text


async def test_python_that_says_something_of_its_own_is_taken(box: Box) -> None:
    python = os.readlink(box.bin / "python3")
    box.put("python3", f'echo activated; echo deprecated >&2; exec {python} -W always "$@"')
    assert await run_there(inside(box)) == f"{box.home}\n".encode()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that takes one megabyte."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)]
    try:
        mounted = not subprocess.run(command, capture_output=True, timeout=10, check=False).returncode
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount")
    yield directory
    subprocess.run(["umount", str(directory)], timeout=10, check=True)


async def test_disk_that_fills_up_is_left_for_the_next_place(
    box: Box, tmp_path: Path, small_disk: Path
) -> None:
    argv = inside(box, f"XDG_CACHE_HOME={small_disk}", f"TMPDIR={tmp_path}")
    assert await run_there(argv) == f"{box.home}\n".encode()
    assert os.listdir(small_disk / "execenv") == []
    assert os.listdir(tmp_path / f"execenv-{os.geteuid()}") == [bootstrap.archive().digest]


async def test_command_that_is_killed_in_the_middle_of_the_transfer_is_told_and_leaves_nothing(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    next_kind = bootstrap._Talk.next_kind

    async def killing(talk: bootstrap._Talk) -> str:
        kind = await next_kind(talk)
        seen.append(kind)
        if seen.count("got") == 2:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        return kind

    monkeypatch.setattr(bootstrap._Talk, "next_kind", killing)
    text = await refusal(inside(box, "sh", "-c", f'echo $$ >{tmp_path}/pid; exec "$@"', "sh"))
    assert "it ended before a server was started at the other side; env ended with signal 9" in text
    assert "got" in seen
    assert not (box.home / ".cache").exists()


CLIENT = """\
import sys, trio
from execenv import CommandTarget, open_environment
async def main():
    async with open_environment(CommandTarget(tuple(sys.argv[1:]), bootstrap=True)) as environment:
        script = "setsid sleep 1000 & echo $PPID $$ $!; wait"
        async with environment.open_process(["sh", "-c", script]) as process:
            async for event in process:
                print(event.data.decode(), flush=True)
trio.run(main)
"""


async def test_all_of_the_other_side_ends_when_this_side_is_killed(box: Box) -> None:
    argv = [sys.executable, "-c", CLIENT, *inside(box)]
    with closing(Watched()) as watched, trio.fail_after(TIME_LIMIT):
        client = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
        try:
            assert client.stdout is not None
            for pid in (await client.stdout.receive_some()).split():
                watched.add(int(pid))
            assert len(watched.alive()) == 3
        finally:
            client.kill()
            await client.wait()
            assert client.stdout is not None
            await client.stdout.aclose()
        await watched.wait_gone()


async def test_nothing_of_ours_but_code_and_a_hash_is_in_the_arguments_there(box: Box) -> None:
    target = CommandTarget(inside(box), env={"TOKEN": "hush"}, bootstrap=True)
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(target) as environment:
            done = await environment.run(["sh", "-c", "cat /proc/$PPID/cmdline /proc/$PPID/environ"])
            assert environment.session_id is not None
            assert done.stdout is not None
            assert environment.session_id.encode() not in done.stdout
    assert b"hush" not in done.stdout
    words = done.stdout.split(b"\0")
    assert words[1:4] == [b"-I", b"-S", b"-c"]
    assert words[5] == bootstrap.archive().digest.encode()


async def test_no_shell_at_the_other_side_is_told(box: Box) -> None:
    (box.bin / "sh").unlink()
    with pytest.raises(ConnectFailed, match="env ended with status 127"):
        await run_there(inside(box))
