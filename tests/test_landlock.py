"""Landlock confines a process to the files that it is given, with whatever the kernel has of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from execenv.sandbox import landlock

SCRIPT = """
import errno, os, sys
exec(compile(open(sys.argv[1]).read(), "landlock", "exec"))
base = os.fsencode(sys.argv[2])
if sys.argv[3] != "-":
    os.setgroups([])
    os.setresgid(*[int(sys.argv[3])] * 3)
    os.setresuid(*[int(sys.argv[3])] * 3)
kept = os.open(base + b"/out/file", os.O_RDONLY)
loaded = [name for name in sys.modules if name in ("typing", "re", "subprocess", "execenv")]
assert not loaded, loaded
system = [b"/usr", b"/lib", b"/lib64", os.fsencode(sys.base_prefix), b"/proc"]
assert restrict([base + b"/read", base + b"/gone", base + b"/one", *system], [base + b"/write"]) is True
def attempt(name, function, *args):
    try:
        function(*args)
        answer = "ok"
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(f"{name}: {answer}")
def put(path):
    with open(path, "wb") as file:
        file.write(b"x")
def get(path):
    with open(path, "rb") as file:
        file.read()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A tree that everybody could read and write."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        for directory in ("read", "write", "out"):
            (path / directory).mkdir()
            (path / directory).chmod(0o777)
            (path / directory / "file").write_text("text")
            (path / directory / "file").chmod(0o666)
        (path / "one").write_text("text")
        (path / "two").write_text("text")
        yield path


def confined(base: Path, code: str, uid: str = "-") -> dict[str, str]:
    """What `attempt` says in a process that `restrict` was applied to."""
    python = [sys.executable if uid == "-" else "/usr/bin/python3", "-I", "-S"]
    assert landlock.__file__ is not None
    source = base / "landlock.py"
    source.write_bytes(Path(landlock.__file__).read_bytes())
    source.chmod(0o644)
    done = subprocess.run(
        [*python, "-c", SCRIPT + code, str(source), str(base), uid],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ") for line in done.stdout.splitlines())


needs_landlock = pytest.mark.skipif(landlock.abi() < 1, reason="needs a kernel with Landlock")

FILES = """
attempt("read inside", get, base + b"/read/file")
attempt("list inside", os.listdir, base + b"/read")
attempt("read one", get, base + b"/one")
attempt("write where one reads", put, base + b"/read/file")
attempt("make where one reads", os.mkdir, base + b"/read/new")
attempt("truncate where one reads", os.truncate, base + b"/read/file", 0)
attempt("write inside", put, base + b"/write/new")
attempt("mkdir inside", os.mkdir, base + b"/write/sub")
attempt("rename inside", os.rename, base + b"/write/new", base + b"/write/sub/new")
attempt("remove inside", os.unlink, base + b"/write/file")
attempt("link inside", os.symlink, b"../out/file", base + b"/write/link")
attempt("read through a link", get, base + b"/write/link")
attempt("read through ..", get, base + b"/read/../out/file")
attempt("read outside", get, base + b"/out/file")
attempt("read beside", get, base + b"/two")
attempt("list outside", os.listdir, base)
attempt("write outside", put, base + b"/out/new")
attempt("remove outside", os.unlink, base + b"/out/file")
attempt("rename to outside", os.rename, base + b"/write/sub/new", base + b"/out/moved")
attempt("hard link from outside", os.link, base + b"/out/file", base + b"/write/hard")
attempt("through /proc", get, b"/proc/self/root" + base + b"/out/file")
attempt("what was open", os.pread, kept, 1, 0)
print("in a child:", os.system(f"cat {os.fsdecode(base)}/out/file >{os.fsdecode(base)}/write/copy 2>&1") != 0)
"""

ALLOWED = {
    "read inside",
    "list inside",
    "read one",
    "write inside",
    "mkdir inside",
    "rename inside",
    "remove inside",
    "link inside",
    "what was open",
}


@needs_landlock
@pytest.mark.parametrize("uid", ["-", "65534"])
def test_only_what_is_given_can_be_read_and_written(base: Path, uid: str) -> None:
    if uid != "-" and (os.geteuid() != 0 or not os.access("/usr/bin/python3", os.X_OK)):
        pytest.skip("needs root, and a Python that others may run")
    found = confined(base, FILES, uid)
    assert found.pop("in a child") == "True"
    expected = {name: "ok" if name in ALLOWED else "EACCES" for name in found}
    if landlock.abi() < 3:
        expected["truncate where one reads"] = "ok"
    # Both directories are of the caller's, but linking from one to the other is another right (ABI 2).
    for name in ("rename to outside", "hard link from outside"):
        assert found.pop(name) in ("EACCES", "EXDEV")
        del expected[name]
    assert found == expected
    assert not (base / "out" / "new").exists()


NETWORK = """
import socket
port, name = PORT, NAME
attempt("TCP", socket.create_connection, ("127.0.0.1", port))
listener = socket.socket()
attempt("bind", listener.bind, ("127.0.0.1", 0))
client = socket.socket(socket.AF_UNIX)
attempt("abstract", client.connect, name)
attempt("signal", os.kill, os.getppid(), 0)
attempt("signal to itself", os.kill, os.getpid(), 0)
"""


@needs_landlock
@pytest.mark.skipif(landlock.abi() < 6, reason="needs a newer kernel")
def test_network_signals_and_abstract_sockets_lead_nowhere(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0execenv-{os.getpid()}-{base.name}"
        abstract.bind(name)
        abstract.listen()
        code = NETWORK.replace("PORT", str(server.getsockname()[1])).replace("NAME", repr(name))
        found = confined(base, code)
    assert found == {
        "TCP": "EACCES",
        "bind": "EACCES",
        "abstract": "EPERM",
        "signal": "EPERM",
        "signal to itself": "ok",
    }


def test_kernel_without_landlock_confines_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(number: int, *args: object) -> int:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(landlock, "_syscall", missing)
    assert landlock.abi() == 0
    assert landlock.restrict([b"/usr"], []) is False
    Path(os.devnull).read_bytes()


@needs_landlock
@pytest.mark.parametrize("version", range(1, 7))
def test_older_version_is_asked_for_what_it_has(base: Path, version: int) -> None:
    if landlock.abi() < version:
        pytest.skip("needs a newer kernel")
    code = f"attempt('write outside', put, base + b'/out/new')\nprint('version:', abi() >= {version})\n"
    source = SCRIPT.replace("base = ", f"abi = lambda: {version}\nbase = ", 1)
    assert landlock.__file__ is not None
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source + code, landlock.__file__, str(base), "-"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("write outside: EACCES\nversion: True\n", "")
