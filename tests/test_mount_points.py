"""Mount points that bubblewrap makes are gone afterwards, whoever is killed, and nothing else is."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from execenv.local import mount_points
from execenv.local.mount_points import MountPoints, registry_directory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is of Linux")

needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root")


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def points(registry: Path) -> MountPoints:
    return MountPoints(str(registry))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def directories(*paths: Path) -> list[tuple[bytes, bool]]:
    return [(os.fsencode(path), True) for path in paths]


def records(registry: Path) -> list[str]:
    return [name for name in os.listdir(registry) if name != "lock"] if registry.exists() else []


# One claim.


def test_what_was_made_is_removed(points: MountPoints, registry: Path, work: Path) -> None:
    git, env, deep = work / ".git", work / ".env", work / "a" / "b" / "c"
    claim = points.claim([*directories(git, deep), (os.fsencode(env), False)])
    assert len(records(registry)) == 1
    git.mkdir(mode=0o555)
    env.touch(mode=0o444)
    deep.mkdir(parents=True)
    claim.created()
    claim.release()
    assert os.listdir(work) == records(registry) == []
    claim.release()


def test_what_was_not_made_is_no_trouble(points: MountPoints, registry: Path, work: Path) -> None:
    claim = points.claim(directories(work / ".git"))
    claim.created()
    claim.release()
    points.claim(directories(work / ".git")).release()
    assert os.listdir(work) == records(registry) == []


def test_what_was_there_before_stays(points: MountPoints, registry: Path, work: Path) -> None:
    (work / ".git").mkdir()
    (work / ".env").touch()
    claim = points.claim([*directories(work / ".git"), (os.fsencode(work / ".env"), False)])
    assert records(registry) == []
    claim.created()
    claim.release()
    assert sorted(os.listdir(work)) == [".env", ".git"]


def test_claim_of_nothing_touches_nothing(points: MountPoints, registry: Path) -> None:
    claim = points.claim([])
    claim.created()
    claim.release()
    assert not registry.exists()
    points.sweep()
    assert not registry.exists()


def _fill(path: Path) -> None:
    (path / "config").touch()


def _replace(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")


def _file(path: Path) -> None:
    path.rmdir()
    path.touch()


@pytest.mark.parametrize("change", [_fill, _replace, _link, _file])
@pytest.mark.parametrize("noted", [True, False])
def test_what_became_something_else_stays(
    change: object, noted: bool, points: MountPoints, registry: Path, work: Path
) -> None:
    assert callable(change)
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    if noted:
        claim.created()
    change(work / ".git")
    before = sorted(map(str, work.rglob("*")))
    claim.release()
    if change is _replace and not noted:
        before.remove(str(work / ".git"))  # nobody knows that it is another one
    assert sorted(map(str, work.rglob("*"))) == before
    assert records(registry) == []


@pytest.mark.parametrize("spoil", ["text", "link"])
def test_file_with_something_in_it_or_another_name_stays(spoil: str, points: MountPoints, work: Path) -> None:
    path = work / ".env"
    claim = points.claim([(os.fsencode(path), False)])
    path.touch()
    claim.created()
    if spoil == "text":
        path.write_text("SECRET=1")
    else:
        (work / "other").hardlink_to(path)
    claim.release()
    assert path.exists()


def test_directory_above_that_was_exchanged_for_a_link_is_not_followed(
    points: MountPoints, work: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".git").mkdir(parents=True)
    (work / "sub").mkdir()
    for exchange in ("link", "move"):
        claim = points.claim(directories(work / "sub" / ".git"))  # nothing made, nothing noted
        (work / "sub").rename(work / exchange)
        if exchange == "link":
            (work / "sub").symlink_to(elsewhere)
        else:
            elsewhere.rename(work / "sub")
        claim.release()
        (work / "sub").rename(elsewhere) if exchange == "move" else (work / "sub").unlink()
        (work / exchange).rename(work / "sub")
        assert (elsewhere / ".git").exists()


@needs_root
def test_what_belongs_to_another_user_stays(points: MountPoints, work: Path) -> None:
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    os.chown(work / ".git", 65534, 65534)
    claim.created()
    claim.release()
    assert (work / ".git").exists()


def test_path_behind_a_file_is_left_alone(points: MountPoints, registry: Path, work: Path) -> None:
    (work / "file").touch()
    points.claim(directories(work / "file" / ".git")).release()
    assert (work / "file").exists()
    assert records(registry) == []


# Several claims.


def test_last_one_removes_what_several_name(points: MountPoints, registry: Path, work: Path) -> None:
    git = work / ".git"
    first, second = points.claim(directories(git)), MountPoints(str(registry)).claim(directories(git))
    git.mkdir()
    first.created()
    second.created()
    first.release()
    assert git.exists()
    third = points.claim(directories(git))  # it is there, but by a claim
    second.release()
    assert git.exists()
    third.release()
    assert os.listdir(work) == records(registry) == []


def test_claims_below_one_made_directory_share_it(points: MountPoints, work: Path) -> None:
    first = points.claim(directories(work / "a" / "b"))
    (work / "a" / "b").mkdir(parents=True)
    first.created()
    second = points.claim(directories(work / "a" / "c"))
    (work / "a" / "c").mkdir()
    second.created()
    first.release()
    assert os.listdir(work / "a") == ["c"]
    second.release()
    assert os.listdir(work) == []


def test_directory_that_the_user_made_meanwhile_is_not_taken_for_a_mount_point(
    points: MountPoints, work: Path
) -> None:
    first = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    first.created()
    (work / ".git").rename(work / "kept")
    (work / ".git").mkdir()
    second = points.claim(directories(work / ".git"))
    first.release()
    second.release()
    assert (work / ".git").exists()


MASK = """
mount -t tmpfs -o mode=0755 mask "$1" && touch "$1/mask" && echo ready && read line && ls "$1"
"""


@pytest.fixture
def masked(work: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has something mounted over .git, where nobody else sees it."""
    (work / ".git").mkdir()
    with subprocess.Popen(
        ["unshare", "-m", "/bin/sh", "-c", MASK, "sh", str(work / ".git")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@needs_root
def test_removing_a_mount_point_would_take_the_mask_from_others(
    work: Path, masked: subprocess.Popen[str]
) -> None:
    (work / ".git").rmdir()
    assert masked.communicate("\n", timeout=30)[0] == ""


@needs_root
def test_mask_stays_while_a_claim_for_it_lives(
    points: MountPoints, work: Path, masked: subprocess.Popen[str]
) -> None:
    git = work / ".git"
    git.rename(work / "aside")
    first, second = points.claim(directories(git)), points.claim(directories(git))
    (work / "aside").rename(git)
    first.created()
    second.created()
    first.release()
    points.sweep()
    assert masked.communicate("\n", timeout=30)[0] == "mask\n"
    second.release()
    assert not git.exists()


# Programs that are killed.

VICTIM = """
import os, signal, sys
from execenv.local import mount_points
step, registry, git, file = sys.argv[1:]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
points = mount_points.MountPoints(registry)
real_write, real_unlink = os.write, os.unlink
if step == "claiming":
    mount_points.os.write = die
elif step == "half claimed":
    mount_points.os.write = lambda fd, data: die(real_write(fd, bytes(data)[:20]))
claim = points.claim([(os.fsencode(git), True), (os.fsencode(file), False)])
if step == "claimed":
    die()
os.mkdir(git)
if step == "half made":
    die()
open(file, "x").close()
if step == "made":
    die()
if step == "half noted":
    mount_points.os.write = lambda fd, data: die(real_write(fd, bytes(data)[:20]))
claim.created()
if step == "noted":
    die()
if step == "removing":
    mount_points.os.rmdir = die
elif step == "half removed":
    mount_points.os.unlink = die
elif step == "removed":
    mount_points.os.unlink = lambda name, **where: (
        die() if str(name).endswith(".claim") else real_unlink(name, **where)
    )
claim.release()
"""
STEPS = (
    *("claiming", "half claimed", "claimed", "half made", "made", "half noted", "noted"),
    *("removing", "half removed", "removed"),
)


@pytest.mark.parametrize("step", STEPS)
def test_what_a_killed_program_left_is_removed(
    step: str, points: MountPoints, registry: Path, work: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, step, str(registry), str(work / ".git"), str(work / ".env")],
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(records(registry)) == 1
    assert bool(os.listdir(work)) == (step not in ("claiming", "half claimed", "claimed", "removed"))
    points.sweep()
    assert os.listdir(work) == records(registry) == []


def test_next_claim_takes_over_what_a_killed_program_left(
    points: MountPoints, registry: Path, work: Path
) -> None:
    git = work / ".git"
    args = [sys.executable, "-c", VICTIM, "noted", str(registry), str(git), str(work / ".env")]
    assert subprocess.run(args, timeout=60, check=False).returncode == -signal.SIGKILL
    claim = points.claim(directories(git))
    points.sweep()
    assert os.listdir(work) == [".git"]
    claim.created()
    claim.release()
    assert os.listdir(work) == records(registry) == []


def test_sweep_leaves_what_is_claimed(points: MountPoints, registry: Path, work: Path) -> None:
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    claim.created()
    MountPoints(str(registry)).sweep()
    assert (work / ".git").exists()
    assert len(records(registry)) == 1
    claim.release()
    assert not (work / ".git").exists()


def test_sandbox_that_outlives_its_killed_owner_keeps_its_masks(
    points: MountPoints, registry: Path, work: Path
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as sandbox:
        code = (
            "import os, signal, sys; from execenv.local.mount_points import MountPoints\n"
            "claim = MountPoints(sys.argv[1]).claim([(os.fsencode(sys.argv[2]), True)])\n"
            "os.mkdir(sys.argv[2]); claim.created(int(sys.argv[3]))\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        args = [sys.executable, "-c", code, str(registry), str(work / ".git"), str(sandbox.pid)]
        subprocess.run(args, timeout=60, check=False)
        points.sweep()
        kept = (work / ".git").exists()
        sandbox.kill()
        os.waitid(os.P_PID, sandbox.pid, os.WEXITED | os.WNOWAIT)
        points.sweep()
        assert kept
        assert os.listdir(work) == records(registry) == []


PROGRAM = """
import os, signal, sys, trio
from execenv.local import open_guard
from execenv.local.mount_points import MountPoints
async def main():
    async with open_guard(whole_program=True) as guard:
        guard.watchdog.start()
        MountPoints().claim([(os.fsencode(sys.argv[1]), True)]).created()
        os.mkdir(sys.argv[1])
        print(guard.watchdog.pid, flush=True)
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_watchdog_sweeps_after_a_kill(end: str, work: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(work / ".git"), end], stdout=subprocess.PIPE, env=env, text=True
    ) as program:
        assert program.stdout is not None
        watchdog = int(program.stdout.readline())
        try:
            pidfd = os.pidfd_open(watchdog)
        except ProcessLookupError:
            pass
        else:
            assert select.select([pidfd], [], [], 30)[0]
            os.close(pidfd)
    assert os.listdir(work) == ([] if end == "kill" else [".git"])


def test_script_runs_without_the_package(points: MountPoints, registry: Path, work: Path) -> None:
    args = [sys.executable, "-c", VICTIM, "noted", str(registry), str(work / ".git"), str(work / ".env")]
    subprocess.run(args, timeout=60, check=False)
    assert mount_points.__file__ is not None
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", mount_points.__file__, str(registry)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, os.listdir(work), records(registry)) == (0, [], [])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"execenv", "typing", "ctypes", "subprocess", "tempfile"}


# The directory.


def test_directory_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert registry_directory() == f"{tmp_path}/execenv"
    for other in ("relative", f"{tmp_path}/gone", ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", other)
        assert registry_directory() in (
            f"/run/user/{os.geteuid()}/execenv",
            f"/dev/shm/execenv-{os.geteuid()}",
            f"/tmp/execenv-{os.geteuid()}",
        )


@needs_root
def test_runtime_directory_of_another_user_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    os.chown(tmp_path, 65534, 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert not registry_directory().startswith(str(tmp_path))


def test_directory_is_made_for_its_user_alone(points: MountPoints, registry: Path, work: Path) -> None:
    points.claim(directories(work / ".git")).release()
    assert registry.stat().st_mode & 0o777 == 0o700


def test_directory_that_others_can_write_is_refused(points: MountPoints, registry: Path, work: Path) -> None:
    registry.mkdir()
    registry.chmod(0o777)
    for call in (lambda: points.claim(directories(work / ".git")), points.sweep):
        with pytest.raises(PermissionError, match="is not this user's alone"):
            call()


def test_link_in_place_of_the_directory_is_refused(
    points: MountPoints, registry: Path, work: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    registry.symlink_to("mine")
    with pytest.raises(OSError):
        points.claim(directories(work / ".git"))
    assert os.listdir(tmp_path / "mine") == []


@needs_root
def test_directory_of_another_user_is_refused(points: MountPoints, registry: Path, work: Path) -> None:
    registry.mkdir(mode=0o700)
    os.chown(registry, 65534, 65534)
    with pytest.raises(PermissionError, match="is not this user's alone"):
        points.claim(directories(work / ".git"))


def test_where_the_directory_was_emptied_nothing_is_removed(
    points: MountPoints, registry: Path, work: Path
) -> None:
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    claim.created()
    shutil.rmtree(registry)
    claim.release()
    assert (work / ".git").exists()


def test_claims_leave_no_descriptors(points: MountPoints, work: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        claim = points.claim(directories(work / ".git"))
        (work / ".git").mkdir()
        claim.created()
        claim.release()
    assert os.listdir("/proc/self/fd") == before


@contextmanager
def held(registry: Path) -> Iterator[None]:
    """The lock is another program's."""
    with open(registry / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_program_that_holds_the_lock_stops_nobody(points: MountPoints, registry: Path, work: Path) -> None:
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    claim.created()
    with held(registry):
        points.prepare()
        with pytest.raises(BlockingIOError):
            points.claim(directories(work / ".codex"))
        with pytest.raises(BlockingIOError):
            points.sweep()
        claim.release()
        assert os.listdir(work) == [".git"]
    points.settle()
    assert os.listdir(work) == []
    assert records(registry) == []


def test_what_is_unsettled_at_the_end_is_swept(points: MountPoints, registry: Path, work: Path) -> None:
    before = os.listdir("/proc/self/fd")
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    claim.created()
    with held(registry):
        claim.release()
        points.close()
    assert os.listdir("/proc/self/fd") == before
    MountPoints(str(registry)).sweep()
    assert os.listdir(work) == []
    assert records(registry) == []


def test_without_descriptors_to_release_it_a_claim_waits_for_some(
    points: MountPoints, registry: Path, work: Path
) -> None:
    claim = points.claim(directories(work / ".git"))
    (work / ".git").mkdir()
    claim.created()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        claim.release()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir(work) == [".git"]
    points.settle()
    assert os.listdir(work) == []
    assert records(registry) == []


# The real one.

MASKED = """
exec 3</dev/null
exec bwrap --ro-bind / / --dev /dev --bind "$1" "$1" \\
    --perms 555 --tmpfs "$1/.git" --remount-ro "$1/.git" --perms 000 --ro-bind-data 3 "$1/.env" \\
    --perms 000 --tmpfs "$1/a/b" --remount-ro "$1/a/b" \\
    --unshare-user --unshare-pid --die-with-parent \\
    -- /bin/sh -c 'echo ready; read line; ! touch "$0/.git/x"' "$1"
"""


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_what_bubblewrap_makes_is_removed(end: str, points: MountPoints, registry: Path, work: Path) -> None:
    claim = points.claim([*directories(work / ".git", work / "a" / "b"), (os.fsencode(work / ".env"), False)])
    with subprocess.Popen(
        ["/bin/sh", "-c", MASKED, "sh", str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        claim.created(process.pid)
        assert sorted(os.listdir(work)) == [".env", ".git", "a"]
        points.sweep()
        assert sorted(os.listdir(work)) == [".env", ".git", "a"]
        if end == "kill":
            process.kill()
        process.communicate("\n" if end == "exit" else None, timeout=30)
    assert process.returncode == (0 if end == "exit" else -signal.SIGKILL)
    claim.release()
    assert os.listdir(work) == records(registry) == []
