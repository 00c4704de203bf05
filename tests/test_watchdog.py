"""No marked process outlives a program that is killed, and nothing else is killed."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio
import trio.testing

import execenv
from execenv.local import watchdog as watchdog_module
from execenv.local.tree import Marks, set_mark
from execenv.local.watchdog import find_marked, kill_marked, open_watchdog, read_stat, send_signal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a watchdog on Linux only")

TIME_LIMIT = 30.0
"""Seconds for one test. Far more than any needs, also on a busy machine."""

# Reports "name pid" for itself and, as "name-daemon", for a process that left its session, parent and stdio.
DAEMON = """
import os, signal, sys
def stay():
    while True:
        signal.pause()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b"%s-daemon %d\\n" % (sys.argv[1].encode(), os.getpid()))
        for fd in 0, 1, 2:
            os.dup2(os.open("/dev/null", os.O_RDWR), fd)
        stay()
    os._exit(0)
os.wait()
os.write(1, b"%s %d\\n" % (sys.argv[1].encode(), os.getpid()))
stay()
"""

PROGRAM = """
import os, signal, subprocess, sys
import trio
from execenv.local.tree import Marks, birthmark, set_mark, subreaper
from execenv.local.watchdog import open_watchdog

def say(name, pid):
    os.write(1, f"{name} {pid}\\n".encode())

def start(name, mark=None):
    with birthmark() as born:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", sys.argv[1], name], start_new_session=True
        )
        assert mark is None or set_mark(process.pid, mark, born=born)

def fork():
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    say("fork", pid)

async def main():
    marks = Marks()
    with subreaper():
        async with open_watchdog(marks.prefix) as watchdog:
            watchdog.start()
            say("watchdog", watchdog.pid)
            start("marked", marks.new())
            start("unmarked")
            exec(sys.argv[2])

trio.run(main)
"""


class Program:
    """A program with a watchdog, with pidfds of the processes that it has reported."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pids = {"program": process.pid}
        self.pidfds = {"program": os.pidfd_open(process.pid)}

    async def read(self, reports: int) -> None:
        assert self.process.stdout is not None
        data = b""
        async with trio.lowlevel.FdStream(os.dup(self.process.stdout.fileno())) as stream:
            while data.count(b"\n") < reports:
                part = await stream.receive_some()
                assert part, f"it ended after it had reported {data!r}"
                data += part
        for line in data.decode().splitlines():
            name, pid = line.split()
            self.pids[name] = int(pid)
            with suppress(ProcessLookupError):  # a watchdog may have ended by now
                self.pidfds[name] = os.pidfd_open(int(pid))

    def send(self, name: str, signum: int) -> None:
        signal.pidfd_send_signal(self.pidfds[name], signum)

    async def wait_ended(self, *names: str) -> None:
        for name in names:
            if name in self.pidfds:
                await trio.lowlevel.wait_readable(self.pidfds[name])

    def alive(self) -> set[str]:
        return {name for name, pidfd in self.pidfds.items() if not select.select([pidfd], [], [], 0)[0]}

    def close(self) -> None:
        for pidfd in self.pidfds.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def program(body: str) -> Iterator[Program]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, DAEMON, body],
        cwd=os.path.dirname(os.path.dirname(execenv.__file__)),
        stdout=subprocess.PIPE,
    )
    started = Program(process)
    try:
        with trio.fail_after(TIME_LIMIT):
            yield started
    finally:
        started.close()


@contextmanager
def marked_process(mark: int, code: str = "") -> Iterator[int]:
    """A process that carries the mark, runs the code and stays."""
    argv = [sys.executable, "-I", "-S", "-c", f"{code}\nprint(flush=True)\nimport signal; signal.pause()"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            assert set_mark(process.pid, mark)
            assert process.stdout is not None
            process.stdout.readline()
            with trio.fail_after(TIME_LIMIT):
                yield process.pid
        finally:
            process.kill()


async def wait_zombie(pid: int) -> None:
    """Wait for the end of a child without reaping it."""
    pidfd = os.pidfd_open(pid)
    with trio.fail_after(TIME_LIMIT):
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# The end of a program

STAY = "signal.pause()"


async def test_when_a_program_is_killed_its_marked_processes_end_and_no_others() -> None:
    with program(STAY) as started:
        await started.read(5)
        started.send("program", signal.SIGKILL)
        await started.wait_ended("program", "marked", "marked-daemon", "watchdog")
        assert started.alive() == {"unmarked", "unmarked-daemon"}


async def test_a_fork_that_holds_the_pipe_does_not_keep_the_watchdog_waiting() -> None:
    with program(f"fork(); {STAY}") as started:
        await started.read(6)
        started.send("program", signal.SIGKILL)
        await started.wait_ended("program", "marked", "marked-daemon", "watchdog")
        assert started.alive() == {"unmarked", "unmarked-daemon", "fork"}


@pytest.mark.parametrize(("body", "forks"), [("pass", 0), ("fork()", 1)])
async def test_when_a_program_ends_orderly_the_watchdog_ends_and_kills_nothing(body: str, forks: int) -> None:
    with program(body) as started:
        await started.read(5 + forks)
        await started.wait_ended("program", "watchdog")
        assert started.process.wait() == 0
        assert started.alive() >= {"marked", "marked-daemon", "unmarked", "unmarked-daemon"}


async def test_signals_for_the_whole_group_or_terminal_do_not_end_the_watchdog() -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with program(STAY) as started:
        await started.read(5)
        while not all(ignored(started.pids["watchdog"]) >> (signum - 1) & 1 for signum in signals):
            await trio.lowlevel.checkpoint()  # its interpreter has not come to that yet
        for signum in signals:
            started.send("watchdog", signum)
        started.send("program", signal.SIGKILL)
        await started.wait_ended("marked", "marked-daemon", "watchdog")


def ignored(pid: int) -> int:
    """The signals which the process ignores, as a set of bits."""
    with open(f"/proc/{pid}/status") as opened:
        (mask,) = [line.split()[1] for line in opened if line.startswith("SigIgn:")]
    return int(mask, 16)


# Finding and killing


async def test_only_live_processes_with_the_prefix_are_found() -> None:
    marks, others = Marks(), Marks()
    with marked_process(marks.new()) as ours, marked_process(others.new()) as other:
        stat = read_stat(ours)
        assert stat is not None
        assert find_marked(marks.prefix) == {(ours, stat.starttime)}
        os.kill(ours, signal.SIGKILL)
        await wait_zombie(ours)
        assert find_marked(marks.prefix) == set()
        assert {pid for pid, _ in find_marked(others.prefix)} == {other}


async def test_descendants_that_carry_the_marks_of_another_program_are_found_and_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []

    def send(pid: int, pidfd: int | None, signum: int) -> None:
        sent.append(signum)
        send_signal(pid, pidfd, signum)

    monkeypatch.setattr(watchdog_module, "send_signal", send)
    marks, others = Marks(), Marks()
    mark = others.new()
    code = f"""
import os, resource, signal
ready, remarked = os.pipe()
if os.fork() == 0:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_RTTIME, ({mark}, -1))
    os.close(remarked)
    signal.pause()
os.close(remarked)
os.read(ready, 1)
"""
    with marked_process(marks.new(), code) as ours:
        ((inner, _),) = find_marked(others.prefix)
        assert {pid for pid, _ in find_marked(marks.prefix)} == {ours, inner}
        pidfd = os.pidfd_open(inner)
        try:
            kill_marked(marks.prefix)
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        assert find_marked(others.prefix) == set()
    assert sent[:4] == [signal.SIGSTOP] * 2 + [signal.SIGKILL] * 2, (
        "not all stood still before the first kill"
    )


async def test_a_process_that_forks_and_ends_and_so_on_is_killed() -> None:
    marks = Marks()
    code = """
import os
if os.fork() == 0:
    for _ in range(5000):
        if os.fork():
            os._exit(0)
    os._exit(0)
"""
    mark = marks.new()
    with marked_process(mark, code) as ours:
        kill_marked(marks.prefix)
        await wait_zombie(ours)
        assert not any(str(mark) in limits for limits in limits_of_live_processes())


def limits_of_live_processes() -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with (
            suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/{pid}/limits") as limits,
            open(f"/proc/{pid}/status") as status,
        ):
            if "\nState:\tZ" not in status.read():
                yield limits.read()


# The parent's side


async def test_the_watchdog_runs_from_its_start_to_the_end_of_the_block() -> None:
    before = descriptors()
    async with open_watchdog(Marks().prefix) as watchdog:
        pids = [watchdog.pid]
        watchdog.start()
        pid = watchdog.pid
        watchdog.start()
        pids += [pid, watchdog.pid]
        assert pid is not None
        assert os.getsid(pid) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    watchdog.start()
    assert [*pids, watchdog.pid] == [None, pid, pid, None]
    assert descriptors() == before


async def test_the_watchdog_ends_although_the_block_is_cancelled() -> None:
    with trio.CancelScope() as scope:
        async with open_watchdog(Marks().prefix) as watchdog:
            watchdog.start()
            pid = watchdog.pid
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_watchdog_holds_no_descriptor_of_the_parent_and_carries_no_mark_of_it() -> None:
    marks = Marks()
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    try:
        async with open_watchdog(marks.prefix) as watchdog:
            watchdog.start()
            fds = f"/proc/{watchdog.pid}/fd"
            links = set()
            for fd in os.listdir(fds):
                with suppress(FileNotFoundError):  # a file that the interpreter reads while it starts
                    links.add(os.readlink(f"{fds}/{fd}"))
            assert os.readlink(f"/proc/self/fd/{read_end}") not in links
            assert "/dev/null" in links
            assert find_marked(marks.prefix) == set()
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_a_watchdog_that_somebody_killed_is_no_error() -> None:
    async with open_watchdog(Marks().prefix) as watchdog:
        watchdog.start()
        assert watchdog.pid is not None
        os.kill(watchdog.pid, signal.SIGKILL)
        await wait_zombie(watchdog.pid)


async def test_a_watchdog_that_does_not_end_is_killed(autojump_clock: trio.testing.MockClock) -> None:
    async with open_watchdog(Marks().prefix) as watchdog:
        watchdog.start()
        pid = watchdog.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        started = trio.current_time()
    assert trio.current_time() - started == pytest.approx(2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("executable", [None, "", "/nonexistent/python"])
async def test_without_an_interpreter_there_is_a_warning_and_no_watchdog(
    executable: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = descriptors()
    with caplog.at_level(logging.WARNING):
        async with open_watchdog(Marks().prefix, executable) as watchdog:
            watchdog.start()
            watchdog.start()
            assert watchdog.pid is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("no watchdog (")
    assert descriptors() == before


async def test_a_frozen_program_does_not_start_itself_as_a_watchdog(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    async with open_watchdog(Marks().prefix) as watchdog:
        watchdog.start()
        assert watchdog.pid is None
    assert len(caplog.messages) == 1
