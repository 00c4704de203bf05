"""Which bubblewrap is taken, when it is tried, and what is said where none can be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio

from execenv.errors import InternalError
from execenv.local import bubblewrap
from execenv.local.bubblewrap import NEEDED, Bubblewraps, Finding, Propagation
from tests.conftest import time_limit

REAL = os.path.realpath(shutil.which("bwrap") or "/nonexistent")

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not os.access(REAL, os.X_OK), reason="needs Linux and bubblewrap"
    ),
]

HELP = " ".join(sorted(NEEDED))
FAKE = f"""#!/bin/sh
(echo "$*" >> {{log}}) 2>/dev/null
case "$1" in
  --version) echo bubblewrap 0.9.9; exit;;
  --help) echo "usage: {HELP} {{more}}"; exit;;
esac
{{body}}
"""


class Fakes:
    """A directory for PATH, where programs called bwrap are written by the test."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.log = base / "log"
        self.path = base / "bin" / "bwrap"
        self.path.parent.mkdir()

    def write(self, body: str = f'exec {REAL} "$@"', *, more: str = "", mode: int = 0o755) -> None:
        self.put(FAKE.format(log=self.log, body=body, more=more), mode=mode)

    def put(self, text: str, *, mode: int = 0o755) -> None:
        self.path.unlink(missing_ok=True)
        self.path.write_text(text)
        self.path.chmod(mode)

    @property
    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


@pytest.fixture
def bubblewraps(fakes: Fakes) -> Iterator[Bubblewraps]:
    with closing(Bubblewraps({"PATH": f"/nowhere:relative:{fakes.path.parent}"}, set())) as found:
        yield found


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "RETRY_AFTER", 0.0)


async def refusal(bubblewraps: Bubblewraps, *roots: bytes) -> str:
    async with time_limit():
        with pytest.raises(InternalError) as caught:
            await bubblewraps.find(roots)
    text = str(caught.value)
    assert text.startswith("cannot enforce the sandbox: ")
    assert "\n" not in text
    return text


async def test_one_that_works_is_found_and_tried_once(bubblewraps: Bubblewraps, fakes: Fakes) -> None:
    fakes.write(more="--argv0")
    async with time_limit():
        found = await bubblewraps.find()
        assert (found.path, found.executable) == (os.fsencode(fakes.path), os.fsencode(fakes.path))
        assert (found.version, found.argv0, found.fd) == ("0.9.9", True, None)
        runs = fakes.runs
        assert [run for run in runs if "--new-session" in run] == [runs[2]]
        assert "--unshare-user --unshare-pid --unshare-ipc" in runs[2]
        assert await bubblewraps.find() == found
        assert fakes.runs == runs


async def test_finds_at_the_same_time_try_once(bubblewraps: Bubblewraps, fakes: Fakes) -> None:
    fakes.write()
    async with time_limit(), trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(bubblewraps.find)
    assert len(fakes.runs) == 3


async def test_real_one_works(fakes: Fakes) -> None:
    with closing(Bubblewraps({"PATH": os.path.dirname(REAL)}, set())) as bubblewraps:
        async with time_limit():
            found = await bubblewraps.find()
            assert re.fullmatch(r"\d+\.\d+\.\d+", found.version)
            assert await bubblewraps.examine() == (Finding(found.path, found.version, found.argv0),)


async def test_without_any_it_says_how_to_get_it(bubblewraps: Bubblewraps) -> None:
    text = await refusal(bubblewraps)
    assert text == (
        "cannot enforce the sandbox: there is no bubblewrap (bwrap) on PATH: install it "
        "(apt install bubblewrap, dnf install bubblewrap, apk add bubblewrap)"
    )
    with closing(Bubblewraps({}, set())) as without_path:
        assert await refusal(without_path) == text


async def test_one_that_appears_is_found(bubblewraps: Bubblewraps, fakes: Fakes) -> None:
    await refusal(bubblewraps)
    fakes.write()
    async with time_limit():
        assert (await bubblewraps.find()).version == "0.9.9"


BROKEN = {
    "not executable": (f'#!/bin/sh\nexec {REAL} "$@"', 0o644, "BWRAP is not executable: chmod +x "),
    "too old": (
        "#!/bin/sh\n[ $1 = --version ] && echo bubblewrap 0.4.1 || echo 'usage: --bind --dev'",
        0o755,
        "BWRAP is bubblewrap 0.4.1, which is too old: 0.5.0 is needed (--args, ",
    ),
    "something else": (
        "#!/bin/sh\necho 'bwrap is \033[1mgreat'",
        0o755,
        "BWRAP is no bubblewrap (status 0: bwrap is",
    ),
    "silent": ("#!/bin/sh\nexit 3", 0o755, "BWRAP is no bubblewrap (status 3, without a word)"),
    "no help": (
        "#!/bin/sh\n[ $1 = --version ] && echo bubblewrap 0.8.0 && exit\necho no /proc/sys >&2; exit 1",
        0o755,
        "bubblewrap 0.8.0 (BWRAP) does not start (status 1: no /proc/sys)",
    ),
    "garbage": ("\x7fELF garbage", 0o755, "BWRAP cannot be executed: Exec format error"),
    "no interpreter": ("#!/nonexistent/sh\n", 0o755, "BWRAP cannot be executed: No such file or directory"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_one_is_refused_until_it_is_repaired(
    name: str, bubblewraps: Bubblewraps, fakes: Fakes
) -> None:
    text, mode, expected = BROKEN[name]
    fakes.put(text, mode=mode)
    said = await refusal(bubblewraps)
    assert expected.replace("BWRAP", str(fakes.path)) in said
    assert said.isprintable()
    fakes.write()
    async with time_limit():
        assert (await bubblewraps.find()).version == "0.9.9"


async def test_set_user_id_one_is_refused(
    bubblewraps: Bubblewraps, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.write(mode=0o4755)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    said = await refusal(bubblewraps)
    assert f"{fakes.path} is set-user-ID, so what it does cannot be checked: chmod u-s {fakes.path}" in said
    assert not fakes.runs
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    async with time_limit():
        await bubblewraps.find()


FAILING = {
    "namespaces": (
        "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1",
        "cannot make user namespaces: ",
        "(status 1: bwrap: No permissions to create a new namespace)",
        ("user namespaces",),
    ),
    "proc": (
        'case "$*" in *--proc*) echo "bwrap: Can\'t mount proc on /newroot/proc" >&2; exit 1;; esac',
        "cannot mount /proc: ",
        "(status 1: bwrap: Can't mount proc on /newroot/proc)",
        ("/proc",),
    ),
    "network": (
        "case \"$*\" in *-net*) echo 'bwrap: loopback: Failed RTM_NEWADDR' >&2; exit 1;; esac",
        "cannot set up a network namespace: ",
        "(status 1: bwrap: loopback: Failed RTM_NEWADDR)",
        ("network namespaces",),
    ),
    "filter": (
        "case \"$*\" in *--seccomp*) echo 'bwrap: prctl(PR_SET_SECCOMP)' >&2; exit 1;; esac",
        "cannot refuse system calls: ",
        "(status 1: bwrap: prctl(PR_SET_SECCOMP))",
        ("system call filters",),
    ),
    "killed": (
        "kill -9 $$",
        "cannot make user namespaces: ",
        "(status 137, without a word)",
        ("user namespaces",),
    ),
}


@pytest.mark.parametrize("name", FAILING)
async def test_what_the_kernel_refuses_is_named_with_the_words_of_bubblewrap(
    name: str, bubblewraps: Bubblewraps, fakes: Fakes
) -> None:
    body, problem, words, lacking = FAILING[name]
    fakes.write(f'{body}\nexec {REAL} "$@"')
    said = await refusal(bubblewraps)
    assert f"bubblewrap 0.9.9 ({fakes.path}) {problem}" in said
    assert said.endswith(words)
    (finding,) = await bubblewraps.examine()
    assert finding.lacking == lacking
    fakes.write()
    async with time_limit():
        await bubblewraps.find()


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("kernel.unprivileged_userns_clone=0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("user.max_user_namespaces=0", "sysctl user.max_user_namespaces=10000"),
        ("kernel.apparmor_restrict_unprivileged_userns=1", "AppArmor restricts them"),
        ("", "docker run --security-opt"),
    ],
)
async def test_hint_is_about_the_setting_that_forbids_namespaces(
    setting: str, hint: str, bubblewraps: Bubblewraps, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setattr(bubblewrap, "read_sysctl", lambda asked: value if asked == name else None)
    fakes.write("exit 1")
    assert hint in await refusal(bubblewraps)


async def test_program_that_only_claims_to_have_run_the_command_is_refused(
    bubblewraps: Bubblewraps, fakes: Fakes
) -> None:
    fakes.write("echo done")
    assert "did not run what it was given (status 0: done)" in await refusal(bubblewraps)


async def test_one_that_hangs_is_killed_with_what_it_started(
    bubblewraps: Bubblewraps, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bubblewrap, "TIME_LIMIT", 1.5)
    pids = fakes.base / "pids"
    fakes.put(f"#!/bin/sh\nsleep 1000 & echo $! $$ > {pids}\nwait")
    assert "did not answer within 1.5 s" in await refusal(bubblewraps)
    async with time_limit():
        for pid in map(int, pids.read_text().split()):
            while _state(pid) not in "ZX":  # noqa: ASYNC110
                await trio.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


async def test_cancelled_find_leaves_nothing_and_the_next_one_works(
    bubblewraps: Bubblewraps, fakes: Fakes
) -> None:
    started = fakes.base / "started"
    fakes.put(f"#!/bin/sh\necho $$ > {started}\nexec sleep 1000")
    async with time_limit():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bubblewraps.find)
            while not (started.exists() and started.read_text()):  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert _state(int(started.read_text())) == "X"
        fakes.write()
        await bubblewraps.find()


async def test_much_output_neither_stops_it_nor_is_it_kept(bubblewraps: Bubblewraps, fakes: Fakes) -> None:
    fakes.write("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 7")
    said = await refusal(bubblewraps)
    assert len(said) < 1000
    assert said.endswith("xxx…)")
    assert "(status 7: xxx" in said


async def test_it_gets_no_environment_no_descriptors_and_no_stdin(
    bubblewraps: Bubblewraps, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "secret")
    code = (
        "import os, sys; print(sorted(os.environ), sorted(set(os.listdir('/proc/self/fd')) - {'3'}), "
        "os.getcwd(), repr(sys.stdin.read()), os.getsid(0) == os.getpid())"
    )
    fakes.put(f'#!/bin/sh\nexec {sys.executable} -I -S -c "{code}"')
    kept = os.open("/", os.O_RDONLY)
    os.set_inheritable(kept, True)
    try:
        said = await refusal(bubblewraps)
    finally:
        os.close(kept)
    found = said.partition("status 0: ")[2]
    assert "CANARY" not in found
    assert "['0', '1', '2'] / '' True" in found


async def test_failed_one_is_not_tried_again_at_once(
    bubblewraps: Bubblewraps, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bubblewrap, "RETRY_AFTER", 1000.0)
    fakes.write("exit 1")
    first = await refusal(bubblewraps)
    runs = fakes.runs
    assert await refusal(bubblewraps) == first
    assert fakes.runs == runs
    monkeypatch.setattr(bubblewrap, "RETRY_AFTER", 0.0)
    fakes.write("exit 2")  # another file
    assert "(status 2, without a word)" in await refusal(bubblewraps)


async def test_children_are_known_while_they_run(fakes: Fakes) -> None:
    known: set[int] = set()
    seen: list[int] = []

    class Watched(set[int]):
        def add(self, pid: int) -> None:
            seen.append(pid)
            known.add(pid)

        def discard(self, pid: object) -> None:
            assert isinstance(pid, int)
            known.discard(pid)

    fakes.write()
    with closing(Bubblewraps({"PATH": str(fakes.path.parent)}, Watched())) as bubblewraps:
        async with time_limit():
            await bubblewraps.find()
    assert len(seen) == 3
    assert not known


REFUSED = """
import os, sys, trio
from contextlib import closing
from execenv.errors import InternalError
from execenv.local.bubblewrap import Bubblewraps
async def main():
    with closing(Bubblewraps({"PATH": sys.argv[1]}, set())) as bubblewraps:
        try:
            print(await bubblewraps.find())
        except InternalError as error:
            print(error)
            print(*[feature for found in await bubblewraps.examine() for feature in found.lacking], sep=",")
trio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize(
    ("namespaces", "spoil", "problem", "lacking"),
    [
        ("-m", "mount -t tmpfs none /proc/irq", "cannot mount /proc: ", "/proc"),
        (
            "-Urm",
            "echo 0 > /proc/sys/user/max_user_namespaces",
            "cannot make user namespaces: allow them by `sysctl user.max_user_namespaces=10000`",
            "user namespaces",
        ),
        (
            "-Urm",
            "echo 0 > /proc/sys/user/max_net_namespaces",
            "cannot set up a network namespace: ",
            "network namespaces",
        ),
    ],
)
def test_kernel_that_refuses_is_found_out(namespaces: str, spoil: str, problem: str, lacking: str) -> None:
    script = f'{spoil} && exec "$@"'
    python = [sys.executable, "-c", REFUSED, os.path.dirname(REAL)]
    done = subprocess.run(
        ["unshare", namespaces, "/bin/sh", "-c", script, "sh", *python],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    said, found = done.stdout.splitlines()
    assert problem in said
    assert "(status 1: bwrap: " in said
    assert found == lacking


# What a sandbox could exchange.


async def test_one_in_a_writable_root_does_not_count(fakes: Fakes) -> None:
    fakes.write()
    root = os.fsencode(fakes.base)
    with closing(Bubblewraps({"PATH": f"{fakes.path.parent}:{os.path.dirname(REAL)}"}, set())) as bubblewraps:
        async with time_limit():
            assert (await bubblewraps.find([root])).path == os.fsencode(REAL)
    assert not fakes.runs


async def test_where_that_is_the_only_one_it_says_so(bubblewraps: Bubblewraps, fakes: Fakes) -> None:
    fakes.write()
    for root in (fakes.base, fakes.path.parent, fakes.path):
        said = await refusal(bubblewraps, os.fsencode(root))
        assert f"{fakes.path} does not count, as it can be written in the sandbox" in said
    async with time_limit():
        await bubblewraps.find([os.fsencode(fakes.base / "b"), os.fsencode(f"{fakes.path}2")])


async def test_link_to_a_writable_root_does_not_count_either(fakes: Fakes, tmp_path: Path) -> None:
    fakes.write()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "bwrap").symlink_to(fakes.path)
    with closing(Bubblewraps({"PATH": str(elsewhere)}, set())) as bubblewraps:
        said = await refusal(bubblewraps, os.fsencode(fakes.path.parent))
    assert "does not count" in said


async def test_what_was_found_is_preferred_to_what_appears_before_it(fakes: Fakes) -> None:
    with closing(Bubblewraps({"PATH": f"{fakes.path.parent}:{os.path.dirname(REAL)}"}, set())) as bubblewraps:
        async with time_limit():
            assert (await bubblewraps.find()).path == os.fsencode(REAL)
            fakes.write()
            assert (await bubblewraps.find()).path == os.fsencode(REAL)
    assert not fakes.runs


@pytest.mark.parametrize("root", [b"/", b"/usr", b"/usr/bin"])
async def test_of_one_of_the_system_a_sealed_copy_is_taken(root: bytes) -> None:
    if os.path.dirname(REAL) != "/usr/bin":
        pytest.skip("bubblewrap is elsewhere")
    with closing(Bubblewraps({"PATH": "/usr/bin"}, set())) as bubblewraps:
        async with time_limit():
            found = await bubblewraps.find([root])
            assert found.fd is not None
            assert found.executable == b"/proc/self/fd/%d" % found.fd
            assert (await bubblewraps.find([b"/srv"])).fd is None
            assert (await bubblewraps.find([root])).fd == found.fd
        done = await trio.run_process(
            [found.executable, "--ro-bind", "/", "/", "--", "/bin/echo", "inside"],
            pass_fds=found.pass_fds,
            capture_stdout=True,
            capture_stderr=True,
        )
        assert (done.stdout, done.stderr) == (b"inside\n", b"")
        with pytest.raises(OSError):
            os.write(os.open(f"/proc/self/fd/{found.fd}", os.O_RDWR), b"x")
        with suppress(PermissionError):  # who runs it inside has a descriptor of it, and the same uid
            os.fchmod(found.fd, 0)
        async with time_limit():
            assert (await bubblewraps.find([root])).fd == found.fd
        assert os.fstat(found.fd).st_mode & 0o777 == 0o500
    with pytest.raises(OSError):
        os.fstat(found.fd)


# Mounts that propagate.


def test_propagation_is_read_from_the_optional_fields(tmp_path: Path) -> None:
    line = "27 1 254:0 / {point} rw,relatime {tags}- ext4 /dev/vda rw\n"
    for tags, expected in (
        ("", False),
        ("shared:1 ", True),
        ("master:7 ", True),
        ("master:7 propagate_from:2 ", True),
        ("unbindable ", False),
    ):
        file = tmp_path / "mountinfo"
        file.write_text(line.format(point="/shared:1", tags="") + line.format(point="/b", tags=tags))
        with closing(Propagation(str(file))) as propagation:
            assert propagation.any is expected
    with closing(Propagation(str(tmp_path / "gone"))) as propagation:
        assert propagation.any is True


PROPAGATING = """
import os, subprocess, sys, time, trio
from contextlib import closing
from execenv.local.bubblewrap import Bubblewraps
uid, work = int(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "work", work], check=True)
os.chmod(work, 0o777)
subprocess.run(["mount", "--make-rshared", "/"], check=True)
os.mkdir(work + "/later", 0o777)
inside = "echo ready; read line; cat later/file 2>/dev/null || echo nothing"

def look(prefix, executable, fds=()):
    options = ["--ro-bind", "/", "/", "--dev", "/dev", "--bind", work, work, "--unshare-user"]
    child = subprocess.Popen([*prefix, executable, *options, "--chdir", work, "--", "/bin/sh", "-c", inside],
                             user=uid, group=uid, stdin=-1, stdout=-1, text=True, pass_fds=fds, env={})
    assert child.stdout.readline() == "ready\\n"
    subprocess.run(["mount", "-t", "tmpfs", "later", work + "/later"], check=True)
    with open(work + "/later/file", "w") as file:
        file.write("visible")
    answer = child.communicate("\\n")[0].strip()
    subprocess.run(["umount", work + "/later"], check=True)
    return answer

async def main():
    with closing(Bubblewraps({"PATH": sys.argv[3]}, set())) as bubblewraps:
        if uid:
            os.setresuid(uid, uid, 0)
        found = await bubblewraps.find()
        whole = await bubblewraps.find([b"/"])
        if uid:
            os.setresuid(0, 0, 0)
        assert bubblewraps.mounts_propagate
        print([os.path.basename(word) for word in found.unshare], whole.unshare[0] == found.unshare[0])
        print(look((), found.executable))
        print(look(found.unshare, found.executable))
        if not uid:
            print(look(whole.unshare, whole.executable, whole.pass_fds))
trio.run(main)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize("uid", [0, 65534])
def test_mount_made_later_is_not_seen_inside(uid: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        os.chmod(work, 0o755)
        done = subprocess.run(
            ["unshare", "--mount", sys.executable, "-c", PROPAGATING, str(uid), work, os.path.dirname(REAL)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    user = [b"--user", b"--map-current-user"] if uid else []
    words = [b"unshare", *user, b"--mount", b"--propagation", b"private", b"--"]
    answers = ["visible", "nothing"] + ([] if uid else ["nothing"])
    assert (done.stdout.splitlines(), done.stderr) == ([f"{words} False", *answers], "")


async def test_where_mounts_propagate_unshare_is_needed(
    fakes: Fakes, bubblewraps: Bubblewraps, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.write()
    monkeypatch.setattr(Propagation, "any", True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    said = await refusal(bubblewraps)
    assert "mounts of this machine propagate" in said
    assert "install util-linux" in said
