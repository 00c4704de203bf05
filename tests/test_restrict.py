"""A program that is only deprived of system calls is otherwise as if it had been started without that."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from execenv.errors import InternalError
from execenv.local.restrict import restricted
from execenv.sandbox import landlock
from execenv.sandbox.seccomp import compile_filter

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"), reason="needs seccomp"
)


def run(
    *argv: str, env: Mapping[str, str] | None = None, arg0: str | None = None, cwd: str = "/"
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin"} if env is None else env
    command, fd = restricted(argv, env=env, arg0=arg0, seccomp=compile_filter(network=False))
    try:
        return subprocess.run(
            command,
            env={},
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
            check=False,
            cwd=cwd,
        )
    finally:
        os.close(fd)


SOCKETS = """
import errno, socket, subprocess, sys
def attempt(family):
    try:
        socket.socket(family).close()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
socket.socketpair()
print(attempt(socket.AF_INET), attempt(socket.AF_NETLINK), attempt(socket.AF_UNIX), flush=True)
child = [sys.executable, "-I", "-S", "-c", "import socket; socket.socket()"]
subprocess.run(child, stderr=subprocess.STDOUT)
"""


def test_sockets_are_refused_in_it_and_in_what_it_starts() -> None:
    done = run(sys.executable, "-I", "-S", "-c", SOCKETS)
    assert done.stdout.startswith("EPERM EPERM ok\n")
    assert done.stdout.endswith("PermissionError: [Errno 1] Operation not permitted\n")
    assert (done.stderr, done.returncode) == ("", 0)


def test_it_cannot_gain_privileges() -> None:
    done = run("grep", "-E", "^(NoNewPrivs|Seccomp):", "/proc/self/status")
    assert done.stdout == "NoNewPrivs:\t1\nSeccomp:\t2\n"


def test_interpreter_is_no_link_that_could_be_exchanged() -> None:
    command, fd = restricted(["true"], env={}, arg0=None, seccomp=b"")
    os.close(fd)
    assert command[0] == os.path.realpath(command[0])
    assert not os.path.islink(command[0])


@pytest.mark.skipif(landlock.abi() < 4, reason="needs a kernel with Landlock of the network")
def test_memory_of_others_who_have_a_network_is_out_of_reach() -> None:
    script = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'r+b').close(); print('open')"
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other:
        assert run(sys.executable, "-I", "-S", "-c", script, "self").stdout == "open\n"
        done = run(sys.executable, "-I", "-S", "-c", script, str(other.pid))
        assert (done.stdout, done.returncode) == ("", 1)
        assert "PermissionError" in done.stderr


@pytest.mark.parametrize(
    "env",
    [{}, {"A": "1", "PATH": "/nowhere"}, {"LC_ALL": "POSIX"}, {"X": "two words = \n", "Ü": "\udcff"}],
)
def test_environment_is_exact(env: dict[str, str]) -> None:
    done = run("/usr/bin/env", "-0", env=env)
    assert done.stdout == "".join(f"{name}={value}\0" for name, value in env.items())


def test_library_to_preload_comes_after_the_filter(tmp_path: Path) -> None:
    source = tmp_path / "early.c"
    source.write_text(
        "#include <stdio.h>\n#include <sys/socket.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void early(void) {\n"
        '    dprintf(1, "%d\\n", socket(AF_INET, SOCK_STREAM, 0)); }\n'
    )
    library = tmp_path / "early.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    assert run("/bin/true", env={"LD_PRELOAD": str(library)}).stdout == "-1\n"


def test_name_is_the_one_given() -> None:
    assert run("sh", "-c", "echo $0", arg0="-custom").stdout == "-custom\n"
    assert run("sh", "-c", "echo $0").stdout == "sh\n"


def test_no_descriptor_is_left() -> None:
    assert run("ls", "/proc/self/fd").stdout.split() == ["0", "1", "2", "3"]  # the last is of ls itself


def test_signals_are_as_a_program_expects_them() -> None:
    done = run("grep", "^SigIgn:", "/proc/self/status")
    assert done.stdout == "SigIgn:\t0000000000000000\n"


def test_working_directory_and_relative_names_are_kept(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "here").chmod(0o755)
    for argv, path in ((["./here"], "/bin"), (["here"], "/nowhere::/bin"), (["here"], ".")):
        assert run(*argv, env={"PATH": path}, cwd=str(tmp_path)).stdout == f"{tmp_path}\n"


def test_without_path_the_usual_places_are_searched() -> None:
    assert run("true", env={}).returncode == 0


def test_program_that_is_missing_is_127() -> None:
    for name in ("missing-program", "/nowhere/program", "/bin/sh/program"):
        done = run(name)
        assert (done.returncode, done.stdout) == (127, "")
        assert done.stderr in (f"{name}: No such file or directory\n", f"{name}: Not a directory\n")


def test_program_that_cannot_be_executed_is_126(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("text")
    for name, env in ((str(plain), {}), ("plain", {"PATH": str(tmp_path)})):
        done = run(name, env=env)
        assert (done.returncode, done.stderr) == (126, f"{name}: Permission denied\n")
    plain.chmod(0o755)
    assert (run(str(plain)).returncode, run("/").returncode) == (126, 126)


@pytest.mark.parametrize("wrong", [["a\0b"], ["true", "a\0b"]])
def test_nul_is_no_crash(wrong: list[str]) -> None:
    done = run(*wrong)
    assert done.returncode == 126
    assert "embedded null" in done.stderr


def test_filter_that_the_kernel_refuses_starts_nothing() -> None:
    command, fd = restricted(["/bin/echo", "ran"], env={}, arg0=None, seccomp=b"\0" * 8)
    done = subprocess.run(
        command, env={}, pass_fds=[fd], capture_output=True, text=True, timeout=60, check=False
    )
    os.close(fd)
    assert (done.returncode, done.stdout) == (126, "")
    assert done.stderr == "cannot enforce the sandbox: Invalid argument\n"


def test_frozen_program_cannot_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(InternalError, match="no Python interpreter"):
        restricted(["true"], env={}, arg0=None, seccomp=b"")
    assert os.listdir("/proc/self/fd") == before
