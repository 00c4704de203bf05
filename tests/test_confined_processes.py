"""Processes under a sandbox, where the contract of all environments says nothing: how they begin and end."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from execenv import PathUri, ProcessNotStarted, SandboxProfile, open_environment
from execenv.errors import InternalError, NotSupported
from execenv.local import confinement, launch, open_guard
from execenv.local.mount_points import MountPoints, registry_directory
from execenv.local.output_log import OutputLog
from execenv.local.spawn import open_pipes
from execenv.protocol import ProcessStartParams
from execenv.sandbox.denied import looks_denied
from execenv.sandbox.plan import Bind, MountPlan
from execenv.sandbox.policy import Sandbox
from execenv.sandbox.seccomp import compile_filter
from tests.conftest import SERVE, run_websocket_server
from tests.contract.test_sandbox import WRITE, workspace
from tests.contract.test_tty import read_until
from tests.fakes import Watched, requires_bubblewrap

__all__ = ["workspace"]  # a fixture

LIMIT = 60.0


@pytest.fixture(autouse=True)
async def within_the_limit() -> AsyncIterator[None]:
    with trio.fail_after(LIMIT):
        yield


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def claims() -> list[str]:
    """What is kept beside the processes themselves."""
    return [name for name in os.listdir(registry_directory()) if name.startswith(f"{os.getpid()}-")]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Beginnings.


@requires_bubblewrap
async def test_a_program_lives_on_when_nothing_else_happens(workspace: Path) -> None:
    # bubblewrap ends with the thread that started it, so a worker thread would take it along after 10 s
    async with open_environment("local") as environment:
        script = "sleep 15; echo still"
        done = await environment.run(["sh", "-c", script], sandbox=WRITE, cwd=workspace)
    assert done.stdout == b"still\n"


@requires_bubblewrap
async def test_a_program_cannot_lock_what_starts_wait_for(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of a user with a session: below /run/user, which a policy that reads everything shows
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    async with open_environment("local") as environment:
        await environment.run(["true"], sandbox=WRITE, cwd=workspace)
        lock = Path(registry_directory(), "lock")
        assert os.listdir(tmp_path / "execenv") == [lock.name]
        script = f"exec 9<{lock}; ls -A {lock.parent}"
        done = await environment.run(["sh", "-c", script], sandbox=WRITE, cwd=workspace, check=False)
        assert done.returncode
        assert (b"Permission denied" in (done.stderr or b""), done.stdout) == (True, b"")


@requires_bubblewrap
async def test_a_start_that_is_cancelled_leaves_nothing(workspace: Path) -> None:
    async with open_environment("local") as environment:
        await environment.run(["true"], sandbox=WRITE, cwd=workspace)
        before = children(), descriptors()
        for milliseconds in range(20):
            with trio.move_on_after(milliseconds / 2000):
                await environment.run(["sleep", "1000"], sandbox=WRITE, cwd=workspace)
        while (children(), descriptors()) != before:  # noqa: ASYNC110 - what was just ended is being reaped
            await trio.sleep(0.01)
    assert os.listdir(workspace) == ["file"]


@requires_bubblewrap
async def test_two_starts_under_one_id_make_one_process(workspace: Path) -> None:
    async with open_environment("local") as environment:
        starts: list[BaseException | None] = []

        async def start() -> None:
            try:
                await environment.start_detached("one", ["sleep", "1000"], sandbox=WRITE, cwd=workspace)
                starts.append(None)
            except ProcessNotStarted as error:
                starts.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(start)
        assert starts.count(None) == 1
        assert all("already exists" in str(error) for error in starts if error is not None)


@requires_bubblewrap
async def test_a_program_that_holds_the_lock_of_claims_stops_nothing_else(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_environment("local") as environment:
        await environment.run(["true"], sandbox=WRITE, cwd=workspace)
        with Path(registry_directory(), "lock").open() as file:  # noqa: ASYNC230
            fcntl.flock(file, fcntl.LOCK_EX)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(environment.run, ["true"], sandbox=WRITE, cwd=workspace))
                await environment.run(["true"])
                fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.flock(file, fcntl.LOCK_EX)
            monkeypatch.setattr(confinement, "CLAIM_PATIENCE", 0.05)
            with pytest.raises(ProcessNotStarted, match=r"another program has held .*/lock"):
                await environment.run(["true"], sandbox=WRITE, cwd=workspace)


@requires_bubblewrap
async def test_without_room_for_claims_it_says_where(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(points: MountPoints, paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MountPoints, "claim", refuse)
    words = f"{registry_directory()}: No space left on device"
    async with open_environment("local") as environment:
        with pytest.raises(ProcessNotStarted, match=re.escape(words)):
            await environment.run(["true"], sandbox=WRITE, cwd=workspace)


def plan_of(path: Path, *, wrong: bool = False) -> MountPlan:
    found = path.stat()
    return MountPlan(True, (Bind(os.fsencode(path), True, found.st_dev, found.st_ino + wrong),), (), False)


async def try_to_launch(plan: MountPlan, command: list[str], **more: Any) -> bytes:
    """What a program says that is launched with this plan."""
    async with open_guard() as guard:
        bubblewrap = await guard.confinement.bubblewraps.find()
        streams = open_pipes(pipe_stdin=False)
        try:
            launched = await guard.confinement.launcher.launch(
                bubblewrap,
                plan,
                command,
                env=more.pop("env", {}),
                cwd=b"/",
                stdin=subprocess.DEVNULL,
                stdout=streams.theirs[1],
                stderr=streams.theirs[2],
                seccomp=compile_filter(network=False),
                said=streams.read_words,
                **more,
            )
            await trio.lowlevel.wait_readable(launched.pidfd)
            launched.poll()
            launched.close()
            guard.known.discard(launched.pid)
            return os.read(streams.outputs[0][1], 4096)
        finally:
            assert guard.known <= {guard.watchdog.pid}
            streams.close_theirs()
            streams.close_ours()


@requires_bubblewrap
async def test_what_was_exchanged_while_it_was_set_up_is_noticed_before_the_program_runs(
    workspace: Path,
) -> None:
    assert await try_to_launch(plan_of(workspace), ["cat", f"{workspace}/file"]) == b"content\n"
    with pytest.raises(InternalError, match="was exchanged while it was set up"):
        await try_to_launch(plan_of(workspace, wrong=True), ["touch", f"{workspace}/made"])
    assert os.listdir(workspace) == ["file"]


@requires_bubblewrap
async def test_a_directory_that_becomes_a_link_under_bubblewraps_hands_is_noticed(workspace: Path) -> None:
    # to another place that can be reached relatively, as bubblewrap looks for it below its old root
    real, outside = workspace / "sub", workspace.parent / "other"
    real.mkdir()
    outside.mkdir()
    plan = plan_of(real)
    real.rename(workspace / "moved")
    real.symlink_to("../other")
    with pytest.raises(InternalError, match="cannot enforce the sandbox: "):
        await try_to_launch(plan, ["touch", f"{real}/made"])
    assert os.listdir(outside) == []


@requires_bubblewrap
async def test_a_bubblewrap_that_hangs_while_it_sets_up_is_given_up(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "bwrap"
    fake.parent.mkdir()
    hangs = 'case "$1" in --args) sleep 1000;; esac'
    fake.write_text(f'#!/bin/sh\n{hangs}\nexec {shutil.which("bwrap")} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(launch, "SETUP_PATIENCE", 0.2)
    async with open_environment("local") as environment:
        confined = await environment.sandboxed(SandboxProfile.read_only())
        counts = []
        for _ in range(2):  # what is kept from the first time on is no leak
            with pytest.raises(ProcessNotStarted, match=r"it took more than 0\.2 s to set up"):
                await environment.run(["true"], sandbox=WRITE, cwd=workspace)
            with pytest.raises(InternalError, match=r"it took more than 0\.2 s to set up"):
                await confined.path(str(workspace / "new")).write_bytes(b"")
            counts.append((len(children()), descriptors()))
        assert counts[0] == counts[1]


@requires_bubblewrap
async def test_bubblewraps_own_words_are_told(workspace: Path) -> None:
    plan = plan_of(workspace)
    missing = evolve(plan, operations=(evolve(plan.operations[0], path=b"/no/such/place"),))
    before = descriptors()
    with pytest.raises(InternalError, match=r"cannot enforce the sandbox: bwrap: .*/no/such/place"):
        await try_to_launch(missing, ["true"])
    assert descriptors() == before


@requires_bubblewrap
async def test_more_words_than_bubblewrap_takes_are_refused(workspace: Path) -> None:
    async with open_environment("local") as environment:
        done = await environment.run(["echo", *["x"] * 8000], sandbox=WRITE, cwd=workspace)
        assert done.stdout == b"x " * 7999 + b"x\n"
        with pytest.raises(
            ProcessNotStarted, match=r"9000 arguments, .* more than bubblewrap takes at once: pass"
        ):
            await environment.run(["echo", *["x"] * 8999], sandbox=WRITE, cwd=workspace)


# Ends.


@requires_bubblewrap
async def test_a_server_that_is_killed_leaves_neither_programs_nor_mount_points(workspace: Path) -> None:
    with run_websocket_server() as server:
        async with open_environment(server.url, recovery=0) as environment:
            argv = ["sh", "-c", "echo ready; setsid sleep 1000 & exec sleep 1000"]
            await environment.start_detached("one", argv, sandbox=WRITE, cwd=workspace)
            async with environment.attach("one") as process:
                await read_until(process, b"ready")
            assert ".git" in os.listdir(workspace)
            watched = _descendants(server.process.pid)
            server.process.send_signal(signal.SIGKILL)
            await watched.wait_gone()
            watched.close()
            while os.listdir(workspace) != ["file"]:  # noqa: ASYNC110 - the watchdog does it
                await trio.sleep(0.01)


def _descendants(pid: int) -> Watched:
    watched, queue = Watched(), [pid]
    for parent in queue:
        for task in os.listdir(f"/proc/{parent}/task"):
            for child in Path(f"/proc/{parent}/task/{task}/children").read_text().split():
                watched.add(int(child))
                queue.append(int(child))
    return watched


@requires_bubblewrap
async def test_two_programs_in_one_workspace_keep_its_names_until_the_second_has_ended(
    workspace: Path,
) -> None:
    async with open_environment("local") as environment:
        argv = ["sh", "-c", "echo ready; read x; mkdir .git && echo escaped"]
        async with environment.open_process(argv, sandbox=WRITE, cwd=workspace, stdin=True) as second:
            await read_until(second, b"ready")
            await environment.run(["true"], sandbox=WRITE, cwd=workspace)
            assert ".git" in os.listdir(workspace)
            assert second.stdin is not None
            await second.stdin.send_all(b"\n")
            assert await second.wait() == 1
        assert os.listdir(workspace) == ["file"]


@requires_bubblewrap
async def test_many_starts_leave_everything_as_it_was(workspace: Path) -> None:
    async with open_environment("local") as environment:
        limiter = trio.CapacityLimiter(8)

        async def run() -> None:
            async with limiter:
                await environment.run(["/bin/true"], sandbox=WRITE, cwd=workspace)

        await run()
        before = children(), descriptors(), claims()
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(run)
        while (children(), descriptors(), claims()) != before:  # noqa: ASYNC110 - the same
            await trio.sleep(0.01)
    assert os.listdir(workspace) == ["file"]


# What is refused.


@pytest.mark.parametrize(
    "more",
    [{"enforce_managed_network": True}, {"managed_network": {}}, {"network_proxy": {"proxy": {}}}],
    ids=lambda more: next(iter(more)),
)
async def test_a_network_that_is_to_be_managed_is_refused(more: dict[str, Any]) -> None:
    async with open_environment("local") as environment:
        params = ProcessStartParams("p", ("true",), PathUri.parse("file:///"), {}, tty=False, **more)
        with pytest.raises(NotSupported, match="does not support"):
            await environment._backend.processes.start(params)


async def test_landlock_alone_is_refused(workspace: Path) -> None:
    async with open_environment("local") as environment:
        sandbox = Sandbox(SandboxProfile.read_only(), use_legacy_landlock=True)
        params = ProcessStartParams(
            "p", ("true",), PathUri.from_native(bytes(workspace)), {}, tty=False, sandbox=sandbox
        )
        with pytest.raises(InternalError, match="requires bubblewrap"):
            await environment._backend.processes.start(params)


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
async def test_without_bubblewrap_files_are_not_confined_and_nothing_runs(
    workspace: Path, tmp_path: Path, tty: bool
) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    environ = {**os.environ, "PATH": str(path)}
    with run_websocket_server(env=environ) as server:
        async with open_environment(server.url) as environment:
            assert (await environment.info()).capabilities["sandbox"] is False
            with pytest.raises(
                ProcessNotStarted, match=r"cannot enforce the sandbox: .*apt install bubblewrap"
            ):
                await environment.run(["/bin/touch", "made"], sandbox=WRITE, cwd=workspace, tty=tty, env={})
            confined = await environment.sandboxed(WRITE, cwd=workspace)
            with pytest.raises(InternalError, match="apt install bubblewrap"):
                await confined.files.write_file("made", b"x")
            assert os.listdir(workspace) == ["file"]
            # what needs none goes on
            online = SandboxProfile.unrestricted("restricted")
            done = await environment.run(["/bin/echo", "x"], sandbox=online, cwd=workspace, env={}, tty=tty)
            assert done.stdout in (b"x\n", b"x\r\n")
            assert await confined.files.read_file("file") == b"content\n"


@requires_bubblewrap
async def test_a_server_says_whether_it_can_confine() -> None:
    async with open_environment([*SERVE, "stdio"]) as environment:
        assert (await environment.info()).capabilities["sandbox"] is True


# sandboxDenied.


async def test_what_is_usually_retained_is_looked_at() -> None:
    log = OutputLog(10)
    for chunk in (b"old", b"Permission ", b"De", b"nied"):
        log.append("stdout", chunk)
    assert log.newest() == b"Denied"
    log = OutputLog(100)
    log.append("stdout", b"PERMISSION d")
    log.append("stderr", b"enied\n")
    assert looks_denied(1, log.newest())
    assert not looks_denied(0, log.newest())
    log.retain_behind(0, 10_000)
    log.append("stdout", b"x" * 95)
    assert not looks_denied(1, log.newest())
    assert looks_denied(159, b"")
    assert not looks_denied(158, b"")
