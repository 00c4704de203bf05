"""Other machines for tests, all on this one: sshd on loopback, and stand-ins for docker, kubectl and srun."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from attrs import frozen

REAL_PYTHON = os.path.realpath(sys.executable)

# Each checks its arguments as the real one does, and starts the rest with the variables of "its" container.
DOCKER = """\
[ "$1" = exec ] || { echo "docker: '$1' is not a docker command." >&2; exit 1; }
shift
stdin=
while :; do
    case "$1" in
    -i|--interactive) stdin=open ;;
    -t|-it|-ti) [ -t 0 ] || { echo "the input device is not a TTY" >&2; exit 1; } ;;
    -*) echo "unknown shorthand flag: $1" >&2; exit 125 ;;
    *) break ;;
    esac
    shift
done
[ "$1" = box ] || { echo "Error response from daemon: No such container: $1" >&2; exit 1; }
shift
[ $# -gt 0 ] || { echo '"docker exec" requires at least 2 arguments.' >&2; exit 1; }
[ -n "$stdin" ] || exec </dev/null
PATH=@PATH@
command -v "$1" >/dev/null || {
    echo "OCI runtime exec failed: exec failed: unable to start container process:" \\
        "exec: \\"$1\\": executable file not found in \\$PATH: unknown"
    exit 127
}
exec env -i PATH="$PATH" HOME=@HOME@ "$@"
"""

KUBECTL = """\
[ "$1" = exec ] || { echo "error: unknown command \\"$1\\" for \\"kubectl\\"" >&2; exit 1; }
shift
stdin=
while :; do
    case "$1" in
    -i|--stdin) stdin=open ;;
    -n|-c) shift ;;
    -*) break ;;
    *) [ -n "$pod" ] && break; pod=$1 ;;
    esac
    shift
done
[ "$pod" = pod ] || { echo "Error from server (NotFound): pods \\"$pod\\" not found" >&2; exit 1; }
[ "$1" = -- ] || {
    echo "error: exec [POD] [COMMAND] is not supported anymore. Use exec [POD] -- [COMMAND] instead" >&2
    exit 1
}
shift
[ $# -gt 0 ] || { echo "error: you must specify at least one command for the container" >&2; exit 1; }
[ -n "$stdin" ] || exec </dev/null
PATH=@PATH@
exec env -i PATH="$PATH" HOME=@HOME@ "$@"
"""

SRUN = """\
while :; do
    case "$1" in
    --ntasks=*|--overlap|--jobid=*) shift ;;
    -*) echo "srun: unrecognized option '$1'" >&2; exit 1 ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || { echo "srun: fatal: No command given to execute." >&2; exit 1; }
SLURM_JOB_ID=1 exec env PATH=@PATH@ HOME=@HOME@ "$@"
"""

# It joins its arguments with spaces and gives them to the login shell there, whichever that is.
SSH = """\
[ "$1" = devbox ] || { echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255; }
shift
PATH=@PATH@ HOME=@HOME@ exec "$LOGIN_SHELL" -c "$*"
"""


@frozen
class Box:
    """Programs of a container, and its home.

    Attributes:
        bin: the one directory of its PATH.
        tools: where docker, kubectl, srun and ssh are.
    """

    bin: Path
    home: Path
    tools: Path

    def tool(self, name: str) -> str:
        return str(self.tools / name)

    def put(self, name: str, text: str) -> None:
        """A program in the container."""
        write_program(self.bin / name, text)


def write_program(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def make_box(folder: Path) -> Box:
    """A container with this Python and the usual programs, and the tools that reach it."""
    box = Box(folder / "box-bin", folder / "box-home", folder / "tools")
    for directory in (box.bin, box.home, box.tools):
        directory.mkdir()
    for name in ("sh", "env", "cat", "uname", "sleep", "setsid", "echo", "printf"):
        found = shutil.which(name)
        assert found is not None
        (box.bin / name).symlink_to(found)
    (box.bin / "python3").symlink_to(REAL_PYTHON)
    for name, text in {"docker": DOCKER, "kubectl": KUBECTL, "srun": SRUN, "ssh": SSH}.items():
        text = text.replace("@PATH@", f"'{box.bin}'").replace("@HOME@", f"'{box.home}'")
        write_program(box.tools / name, text)
    return box


@frozen
class Sshd:
    """An sshd on loopback.

    Attributes:
        argv: the ssh command that gets in, without a command for the other side.
        stranger: the same with a key that nobody knows there.
    """

    argv: tuple[str, ...]
    stranger: tuple[str, ...]


def _require(reason: str) -> None:
    if os.environ.get("EXECENV_REQUIRE_TOOLS") == "1":
        pytest.fail(f"EXECENV_REQUIRE_TOOLS=1, but {reason}")
    pytest.skip(reason)


@contextmanager
def run_sshd(folder: Path) -> Iterator[Sshd]:
    """Run an sshd with its own keys. Skips the test where there is none; see `.ci/run`."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        _require("there is no sshd: install openssh-server")
    assert sshd is not None
    if os.geteuid() == 0:  # what its init script does
        os.makedirs("/run/sshd", 0o755, exist_ok=True)
    for name in ("host", "user", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=30)
    for _ in range(5):  # somebody may take the port between the two
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "sshd_config"
        config.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(config)], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            if "Server listening" in said:
                yield _clients(folder, port)
                return
        finally:
            process.terminate()
            process.wait()
            process.stderr.close()
    _require(f"sshd does not start: {said}")


def _clients(folder: Path, port: int) -> Sshd:
    known = folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")

    def client(key: str) -> tuple[str, ...]:
        options = (f"UserKnownHostsFile={known}", f"IdentityFile={folder / key}", "IdentitiesOnly=yes")
        words = [word for option in (*options, "BatchMode=yes") for word in ("-o", option)]
        return ("ssh", "-F", "/dev/null", *words, "-p", str(port), f"{getpass.getuser()}@127.0.0.1")

    return Sshd(client("user"), client("stranger"))


@contextmanager
def closed_environment() -> Iterator[None]:
    """No agent and no display, which could ask or offer other keys."""
    with pytest.MonkeyPatch.context() as patch, suppress(KeyError):
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        patch.delenv("DISPLAY", raising=False)
        yield
