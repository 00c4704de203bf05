"""Contract of sandboxes: what a profile lets be touched, whoever enforces it."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from execenv import (
    CompletedProcess,
    Environment,
    NotSupported,
    PathUri,
    ProcessFailed,
    ProcessNotStarted,
    SandboxProfile,
    UsageError,
)
from execenv.sandbox.policy import GlobRule, SpecialRule
from tests.contract.test_tty import read_until
from tests.fakes import Watched, python, requires_bubblewrap

pytestmark = requires_bubblewrap

READ = SandboxProfile.read_only()
WRITE = SandboxProfile.workspace_write(temporary=False)
ONLINE = SandboxProfile.workspace_write(network="enabled", temporary=False)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "file").write_text("content\n")
    (tmp_path / "outside").write_text("secret\n")
    return tmp_path / "w"


async def sh(environment: Environment, script: str, profile: SandboxProfile, cwd: Path) -> CompletedProcess:
    return await environment.run(["sh", "-c", script], sandbox=profile, cwd=cwd, check=False)


# What may be written.


async def test_read_only_denies_every_write_and_says_so(environment: Environment, workspace: Path) -> None:
    done = await sh(environment, "cat file; echo x > file", SandboxProfile.read_only(), workspace)
    assert done.stdout == b"content\n"
    assert done.returncode != 0
    assert done.sandbox_denied
    assert done.stderr is not None
    assert b"Read-only file system" in done.stderr
    assert (workspace / "file").read_text() == "content\n"


async def test_workspace_write_permits_the_workspace_and_nothing_else(
    environment: Environment, workspace: Path
) -> None:
    script = "echo new > made && echo changed > file && cat ../outside && echo x > ../outside"
    done = await sh(environment, script, WRITE, workspace)
    assert done.stdout == b"secret\n"
    assert (done.returncode != 0, done.sandbox_denied) == (True, True)
    assert (workspace / "made").read_text() == "new\n"
    assert (workspace / "file").read_text() == "changed\n"
    assert (workspace.parent / "outside").read_text() == "secret\n"


async def test_success_and_failures_of_its_own_are_not_denials(
    environment: Environment, workspace: Path
) -> None:
    done = await sh(environment, "echo permission denied", WRITE, workspace)
    assert (done.returncode, done.sandbox_denied) == (0, False)
    done = await sh(environment, "echo no; exit 3", WRITE, workspace)
    assert (done.returncode, done.sandbox_denied) == (3, False)
    done = await environment.run(["sh", "-c", "echo permission denied; exit 3"], check=False)
    assert (done.returncode, done.sandbox_denied) == (3, False)


async def test_failure_that_is_an_error_says_what_its_reason_may_be(
    environment: Environment, workspace: Path
) -> None:
    with pytest.raises(ProcessFailed, match=r"status \d+ \(its sandbox may be why\): .*Read-only") as caught:
        await environment.run(
            ["sh", "-c", "echo x > file"], sandbox=SandboxProfile.read_only(), cwd=workspace
        )
    assert caught.value.sandbox_denied
    with pytest.raises(ProcessFailed, match=r"status 3$") as caught:
        await environment.run(["sh", "-c", "exit 3"], sandbox=WRITE, cwd=workspace)
    assert caught.value.sandbox_denied is False


@pytest.mark.parametrize("name", [".git", ".agents", ".codex", ".aws"])
async def test_metadata_of_a_workspace_is_protected_and_nothing_is_left_of_that(
    environment: Environment, workspace: Path, name: str
) -> None:
    done = await sh(environment, f"ls -A; mkdir {name}; echo x > {name}/config", WRITE, workspace)
    assert (done.returncode != 0, done.sandbox_denied) == (True, True)
    assert sorted(os.listdir(workspace)) == ["file"]
    (workspace / name).mkdir()
    (workspace / name / "config").write_text("mine")
    done = await sh(environment, f"cat {name}/config; rm -r {name}; mv {name} other", WRITE, workspace)
    assert done.stdout == b"mine"
    assert (workspace / name / "config").read_text() == "mine"


async def test_denied_files_cannot_be_read(environment: Environment, workspace: Path) -> None:
    (workspace / ".env").write_text("token")
    (workspace / "sub").mkdir()
    (workspace / "sub" / "x.env").write_text("token")
    profile = SandboxProfile.managed(
        [
            (SpecialRule("root"), "read"),
            (SpecialRule("project_roots"), "write"),
            (GlobRule("**/*.env"), "deny"),
        ]
    )
    done = await sh(environment, "cat file; cat .env sub/x.env", profile, workspace)
    assert done.stdout == b"content\n"
    assert (done.returncode, done.sandbox_denied) == (1, True)


async def test_a_restricted_view_has_only_what_it_names(environment: Environment, workspace: Path) -> None:
    profile = SandboxProfile.managed(
        [(SpecialRule("minimal"), "read"), (SpecialRule("project_roots"), "read")]
    )
    done = await sh(environment, "cat file; ls ..; cat ../outside", profile, workspace)
    assert done.stdout == b"content\nw\n"
    assert done.stderr is not None
    assert b"No such file" in done.stderr
    assert not done.sandbox_denied


async def test_a_directory_that_cannot_be_seen_is_exchanged_for_the_root(
    environment: Environment, workspace: Path
) -> None:
    profile = SandboxProfile.managed([(SpecialRule("minimal"), "read")])
    done = await sh(environment, "pwd", profile, workspace)
    assert done.stdout == b"/\n"


async def test_what_enforces_nothing_is_as_without(environment: Environment, workspace: Path) -> None:
    for profile in (SandboxProfile.disabled(), SandboxProfile.external("enabled")):
        script = "echo x > ../outside; echo permission denied; exit 1"
        done = await sh(environment, script, profile, workspace)
        assert (done.returncode, done.sandbox_denied) == (1, False)
        assert (workspace.parent / "outside").read_text() == "x\n"


# The network.

CONNECT = "import socket; socket.create_connection(('127.0.0.1', {port}), 5).sendall(b'x')"


@pytest.mark.parametrize(
    "profile",
    [WRITE, SandboxProfile.read_only(), SandboxProfile.unrestricted("restricted")],
    ids=["workspace-write", "read-only", "unrestricted"],
)
@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
async def test_without_network_not_even_this_machine_is_reached(
    environment: Environment, workspace: Path, profile: SandboxProfile, tty: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        argv = python(CONNECT.format(port=listener.getsockname()[1]))
        done = await environment.run(argv, sandbox=profile, cwd=workspace, tty=tty, check=False)
        assert done.returncode == 1
        assert done.sandbox_denied
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert (await environment.run(argv, sandbox=ONLINE, cwd=workspace, tty=tty)).returncode == 0
        listener.accept()[0].close()


# What programs see otherwise is as without a sandbox.


async def test_variables_are_exactly_those_given(environment: Environment, workspace: Path) -> None:
    done = await environment.run(
        ["/usr/bin/env"], env={"A": "1", "LD_PRELOAD": ""}, sandbox=WRITE, cwd=workspace
    )
    assert done.stdout is not None
    assert sorted(done.stdout.split()) == sorted([b"A=1", b"LD_PRELOAD=", b"PWD=%s" % bytes(workspace)])
    done = await environment.run(
        ["/usr/bin/env"], env={"A": "1"}, sandbox=SandboxProfile.unrestricted("restricted"), cwd=workspace
    )
    assert done.stdout == b"A=1\n"


async def test_no_descriptor_but_the_streams(environment: Environment, workspace: Path) -> None:
    done = await environment.run(
        ["python3", "-c", "import os; print(os.listdir('/proc/self/fd'))"], sandbox=WRITE, cwd=workspace
    )
    assert done.stdout == b"['0', '1', '2', '3']\n"  # the last one is of listdir


async def test_input_and_both_outputs(environment: Environment, workspace: Path) -> None:
    done = await environment.run(
        ["sh", "-c", "cat; echo err >&2; exit 9"], input=b"in", sandbox=WRITE, cwd=workspace, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"in", b"err\n", 9)


async def test_death_by_signal_is_told(environment: Environment, workspace: Path) -> None:
    done = await sh(environment, "kill -9 $$", WRITE, workspace)
    assert done.returncode == 128 + signal.SIGKILL


async def test_a_missing_program_is_127(environment: Environment, workspace: Path) -> None:
    done = await environment.run(["no-such-program"], sandbox=WRITE, cwd=workspace, check=False)
    assert done.returncode == 127
    assert done.stderr is not None
    assert b"No such file or directory" in done.stderr
    assert not done.sandbox_denied


async def test_a_missing_directory_is_an_error(environment: Environment, workspace: Path) -> None:
    with pytest.raises(ProcessNotStarted, match="No such file or directory"):
        await environment.run(["true"], sandbox=WRITE, cwd=workspace / "missing")


async def test_arg0(environment: Environment, workspace: Path) -> None:
    done = await environment.run(
        ["sh", "-c", "cat /proc/$$/cmdline"], arg0="another", sandbox=WRITE, cwd=workspace
    )
    assert done.stdout is not None
    assert done.stdout.startswith(b"another\0-c\0")


# Terminals and signals.

TRAP = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.02; done"


async def test_control_c_is_for_the_program(environment: Environment, workspace: Path) -> None:
    async with environment.open_process(
        ["sh", "-c", TRAP], tty=True, sandbox=WRITE, cwd=workspace
    ) as process:
        await read_until(process, b"ready")
        assert process.stdin is not None
        await process.stdin.send_all(b"\x03")
        await read_until(process, b"caught")
        assert await process.wait() == 5


async def test_terminal_is_the_controlling_one(environment: Environment, workspace: Path) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && echo controlling > /dev/tty; stty size"
    done = await environment.run(["sh", "-c", script], tty=True, sandbox=WRITE, cwd=workspace)
    assert done.stdout == b"controlling\r\n24 80\r\n"


async def test_interrupt_reaches_the_program(environment: Environment, workspace: Path) -> None:
    async with environment.open_process(["sh", "-c", TRAP], sandbox=WRITE, cwd=workspace) as process:
        await read_until(process, b"ready")
        await process.interrupt()
        await read_until(process, b"caught")
        assert await process.wait() == 5


async def test_interrupt_right_after_the_start_is_not_lost(environment: Environment, workspace: Path) -> None:
    for _ in range(5):
        async with environment.open_process(["sleep", "1000"], sandbox=WRITE, cwd=workspace) as process:
            await process.interrupt()
            assert await process.wait() == 128 + signal.SIGINT


async def test_terminate_gives_the_program_time(environment: Environment, workspace: Path) -> None:
    script = "trap 'echo ending; exit 4' TERM; echo ready; while :; do sleep 0.02; done"
    async with environment.open_process(["sh", "-c", script], sandbox=WRITE, cwd=workspace) as process:
        await read_until(process, b"ready")
        await process.terminate(grace=10)
        assert await process.wait() == 4


# Ends.

TREE = """
import os, subprocess, time
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
subprocess.Popen(["sleep", "98765.{token}"], start_new_session=True, **quiet)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        subprocess.Popen(["sleep", "98766.{token}"], start_new_session=True, **quiet)
    os._exit(0)
print("ready", flush=True)
{end}
"""


def _sleepers(token: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[:1] == [b"sleep"] and words[1].endswith(token.encode()):
                found.append(int(name))
    return found


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
async def test_killing_takes_all_that_it_started(
    environment: Environment, workspace: Path, tty: bool
) -> None:
    token = str(os.getpid()) + os.urandom(3).hex().translate(str.maketrans("abcdef", "123456"))
    code = TREE.format(token=token, end="time.sleep(1000)")
    async with environment.open_process(python(code), sandbox=WRITE, cwd=workspace, tty=tty) as process:
        await read_until(process, b"ready")
        while len(_sleepers(token)) < 2:  # noqa: ASYNC110 - a file that appears, in somebody else's /proc
            await trio.sleep(0.01)
        watched = Watched()
        for pid in _sleepers(token):
            watched.add(pid)
        receipt = await process.kill()
        assert receipt.survivors == ()
        assert watched.alive() == set()
        watched.close()
    assert sorted(os.listdir(workspace)) == ["file"]


async def test_nothing_outlives_the_program(environment: Environment, workspace: Path) -> None:
    token = str(os.getpid()) + os.urandom(3).hex().translate(str.maketrans("abcdef", "123456"))
    done = await environment.run(
        python(TREE.format(token=token, end="time.sleep(0.2)")), sandbox=WRITE, cwd=workspace
    )
    assert (done.returncode, done.stdout) == (0, b"ready\n")
    assert _sleepers(token) == []


async def test_output_of_a_sandboxed_flood_is_all_there(environment: Environment, workspace: Path) -> None:
    done = await sh(environment, "head -c 5000000 /dev/zero", WRITE, workspace)
    assert done.stdout == bytes(5_000_000)


# Files.


async def test_files_under_a_sandbox(environment: Environment, workspace: Path) -> None:
    confined = await environment.sandboxed(WRITE, cwd=workspace)
    assert await confined.files.read_file("file") == b"content\n"
    assert await confined.files.read_file("../outside") == b"secret\n"
    await confined.files.write_file("made", b"x")
    assert (workspace / "made").read_bytes() == b"x"
    changes: list[Callable[[], Awaitable[None]]] = [
        lambda: confined.files.write_file("../outside", b"x"),
        lambda: confined.files.write_file(".git/config", b"x"),
        lambda: confined.files.create_directory(".git/hooks"),
        lambda: confined.files.remove("../outside"),
        lambda: confined.files.copy("made", "../copied"),
    ]
    for change in changes:
        with pytest.raises(OSError) as caught:
            await change()
        assert caught.value.errno in (errno.EROFS, errno.EXDEV)
    assert (workspace.parent / "outside").read_text() == "secret\n"
    assert sorted(os.listdir(workspace)) == ["file", "made"]


async def test_renaming_under_a_sandbox(environment: Environment, workspace: Path) -> None:
    confined = await environment.sandboxed(WRITE, cwd=workspace)
    for name in (".git", "../file"):
        with pytest.raises(OSError) as caught:
            await confined.files.rename("file", name)
        assert caught.value.errno in (errno.EROFS, errno.EXDEV)
    await confined.files.rename("file", "other")
    assert os.listdir(workspace) == ["other"]
    assert sorted(os.listdir(workspace.parent)) == ["outside", "w"]


async def test_a_link_out_of_the_workspace_is_not_written_through(
    environment: Environment, workspace: Path
) -> None:
    (workspace / "link").symlink_to("../outside")
    confined = await environment.sandboxed(WRITE, cwd=workspace)
    with pytest.raises(OSError, match="Read-only file system"):
        await confined.files.write_file("link", b"x")
    os.link(workspace / "file", workspace / "hard")
    await confined.files.write_file("hard", b"x")
    assert (workspace / "file").read_bytes() == b"x"
    assert (workspace / "hard").stat().st_nlink == 2


async def test_everything_of_an_environment_under_a_sandbox_is(
    environment: Environment, workspace: Path
) -> None:
    confined = await environment.sandboxed(WRITE, workspace_roots=[workspace], cwd=workspace)
    done = await confined.run(["sh", "-c", "pwd; echo x > ../outside"], check=False)
    assert done.stdout == bytes(workspace) + b"\n"
    assert done.sandbox_denied
    with pytest.raises(NotSupported, match="no network"):
        await confined.http.request("GET", "http://127.0.0.1:9/")
    with pytest.raises(NotSupported, match="outside of this sandbox"):
        async with confined.attach("x"):
            pass


async def test_a_large_file_is_read_and_written_under_a_sandbox(
    environment: Environment, workspace: Path
) -> None:
    profile = SandboxProfile.managed([(SpecialRule("project_roots"), "write")])
    confined = await environment.sandboxed(profile, cwd=workspace)
    data = os.urandom(5_000_000)
    await confined.files.write_file("large", data)
    assert await confined.files.read_file("large") == data
    assert (workspace / "large").read_bytes() == data


# What has no meaning is refused.


async def test_a_workspace_is_never_guessed(environment: Environment) -> None:
    with pytest.raises(UsageError, match="workspace"):
        await environment.sandboxed(WRITE)
    with pytest.raises(UsageError, match="workspace"):
        await environment.run(["true"], sandbox=WRITE)
    with pytest.raises(UsageError, match="relative"):
        profile = SandboxProfile.managed([(GlobRule("*.env"), "deny")])
        await environment.sandboxed(profile)


async def test_one_path_is_no_list_of_workspace_roots(environment: Environment, workspace: Path) -> None:
    for root in (str(workspace), workspace, environment.path(str(workspace)), PathUri.parse(str(workspace))):
        with pytest.raises(UsageError, match="a list of them is wanted"):
            await environment.sandboxed(WRITE, workspace_roots=root)  # type: ignore[arg-type]


async def test_what_is_no_profile_is_refused(environment: Environment, workspace: Path) -> None:
    odd: Any = "read-only"
    with pytest.raises(UsageError, match=r"SandboxProfile\.read_only\(\), not 'read-only'"):
        await environment.sandboxed(odd, cwd=workspace)
    with pytest.raises(UsageError, match="a sandbox is a profile"):
        await environment.run(["true"], sandbox=odd)


async def test_relative_workspace_roots_are_from_the_working_directory_of_the_sandbox(
    environment: Environment, workspace: Path
) -> None:
    (workspace / "sub").mkdir()
    confined = await environment.sandboxed(WRITE, cwd=workspace, workspace_roots=["sub"])
    done = await confined.run(["sh", "-c", "echo x > sub/made && echo x > made"], check=False)
    assert (done.returncode, done.sandbox_denied) == (2, True)
    assert os.listdir(workspace / "sub") == ["made"]


@pytest.mark.parametrize(
    "outer",
    [WRITE, SandboxProfile.unrestricted(), SandboxProfile.disabled()],
    ids=["write", "unrestricted", "disabled"],
)
async def test_a_sandbox_in_a_sandbox_is_refused_and_not_ignored(
    environment: Environment, workspace: Path, outer: SandboxProfile
) -> None:
    confined = await environment.sandboxed(outer, cwd=workspace)
    with pytest.raises(NotSupported, match="under a sandbox already"):
        await confined.sandboxed(SandboxProfile.read_only(), cwd=workspace)
    for inner in (SandboxProfile.read_only(), SandboxProfile.disabled()):
        with pytest.raises(ProcessNotStarted, match="under a sandbox already"):
            await sh(confined, "echo x > made", inner, workspace)
        with pytest.raises(ProcessNotStarted, match="under a sandbox already"):
            await confined.start_detached("x", ["sh", "-c", "echo x > made"], sandbox=inner, cwd=workspace)
    assert sorted(os.listdir(workspace)) == ["file"]


async def test_a_policy_that_cannot_be_enforced_is_refused(environment: Environment, workspace: Path) -> None:
    (workspace / ".codex").symlink_to("elsewhere")
    with pytest.raises(ProcessNotStarted, match="crosses writable symlink"):
        await sh(environment, "true", WRITE, workspace)
    confined = await environment.sandboxed(WRITE, cwd=workspace)
    with pytest.raises(Exception, match="crosses writable symlink"):
        await confined.files.write_file("file", b"x")


async def test_a_foreign_path_is_refused(environment: Environment, workspace: Path) -> None:
    profile = SandboxProfile.workspace_write()
    with pytest.raises(Exception, match="invalid on"):
        confined = await environment.sandboxed(
            profile, cwd=workspace, workspace_roots=[PathUri.parse("file:///C:/w")]
        )
        await confined.run(["true"])
