"""Kill means gone: whole process trees, with their escapees and without their neighbours."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, suppress

import attrs
import pytest
import trio
import trio.testing

from execenv.abc import KillReceipt, Survivor
from execenv.local import tree
from execenv.local.tree import (
    Marks,
    Root,
    birthmark,
    find_leftovers,
    kill_tree,
    read_mark,
    reap,
    reap_adopted,
    set_mark,
    signal_tree,
    subreaper,
)
from execenv.local.watchdog import read_file, send_signal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trees are known on Linux only")

# A process reports its pid on stdout when it has become what the test is about.
PRELUDE = """
import os, signal
def report():
    os.write(1, b"%d\\n" % os.getpid())
def stay():
    report()
    while True:
        signal.pause()
def child(run):
    pid = os.fork()
    if pid == 0:
        run()
        os._exit(0)
    return pid
def daemon():
    reported, reports = os.pipe()
    def last():
        report()
        os.close(reports)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in 0, 1, 2:
            os.dup2(null, fd)
        while True:
            signal.pause()
    os.waitpid(child(lambda: (os.setsid(), child(last))), 0)
    os.close(reports)
    os.read(reported, 1)
    os.close(reported)
"""


TIME_LIMIT = 30.0
"""Seconds for one test. Far more than any needs, also on a busy machine."""


@attrs.frozen
class Started:
    process: subprocess.Popen[bytes]
    root: Root
    pids: list[int]
    """The reported pids, in order; the root need not be among them."""
    pidfds: dict[int, int]

    async def wait_ended(self, *pids: int) -> None:
        for pid in pids:
            await trio.lowlevel.wait_readable(self.pidfds[pid])

    async def wait_root(self) -> Root:
        """Wait for the natural end of the root and reap it."""
        await self.wait_ended(self.process.pid)
        assert self.process.wait() == 0
        return self.root.reaped()

    def alive(self) -> set[int]:
        return {pid for pid, pidfd in self.pidfds.items() if not select.select([pidfd], [], [], 0)[0]}


@attrs.define(eq=False)
class Starter:
    """Starts a process which runs Python code or an argv, and waits until it and its tree have reported."""

    marks: Marks = attrs.field(factory=Marks)
    _started: list[Started] = attrs.field(factory=list)

    async def __call__(
        self, code: str | list[str], reports: int, *, mark: bool = True, in_thread: bool = False
    ) -> Started:
        argv = [sys.executable, "-I", "-S", "-c", PRELUDE + code] if isinstance(code, str) else code

        number = self.marks.new() if mark else None

        def spawn() -> subprocess.Popen[bytes]:
            with birthmark() if mark else nullcontext(False) as born:
                process = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE)
                assert number is None or set_mark(process.pid, number, born=born)
            return process

        process = await trio.to_thread.run_sync(spawn) if in_thread else spawn()
        started = Started(
            process, Root.of(process.pid, number), [], {process.pid: os.pidfd_open(process.pid)}
        )
        self._started.append(started)
        await self._read_reports(started, reports)
        return started

    async def _read_reports(self, started: Started, reports: int) -> None:
        assert started.process.stdout is not None
        data = b""
        async with trio.lowlevel.FdStream(os.dup(started.process.stdout.fileno())) as stream:
            while data.count(b"\n") < reports:
                part = await stream.receive_some()
                assert part, f"it ended after it had reported {data!r}"
                data += part
        for pid in map(int, data.split()):
            started.pids.append(pid)
            if pid not in started.pidfds:
                started.pidfds[pid] = os.pidfd_open(pid)

    def clean_up(self) -> None:
        for started in self._started:
            for pidfd in started.pidfds.values():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            started.process.wait()
            assert started.process.stdout is not None
            started.process.stdout.close()
            for pid, pidfd in started.pidfds.items():
                select.select([pidfd], [], [])
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                os.close(pidfd)
        self._started.clear()


@pytest.fixture
async def start() -> AsyncIterator[Starter]:
    """A starter in a process that is a subreaper; in the end, nothing but a free thread may be left of it."""
    before = children_of_this_process(), descriptors()
    starter = Starter()
    with trio.fail_after(TIME_LIMIT), subreaper() as enabled:
        assert enabled
        try:
            yield starter
        finally:
            starter.clean_up()
    assert (children_of_this_process(), descriptors()) == before


# Oracles which share no code with what is tested.


def file(path: str) -> bytes:
    try:
        with open(path, "rb") as opened:
            return opened.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def pids_of_all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children_of_this_process() -> set[int]:
    """Zombies included."""
    lists = [file(f"/proc/self/task/{task}/children") for task in os.listdir("/proc/self/task")]
    return {int(pid) for pids in lists for pid in pids.split()}


def alive_with_mark(mark: int | None) -> set[int]:
    text = str(mark).encode()
    marked = {pid for pid in pids_of_all_processes() if text in file(f"/proc/{pid}/limits")}
    return {pid for pid in marked if b"\nState:\tZ" not in file(f"/proc/{pid}/status")}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_subreaper() -> bool:
    value = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(37, ctypes.byref(value), 0, 0, 0) == 0
    return bool(value.value)


def sending_to_all_but(pid: int, error: Exception | None) -> Callable[[int, int | None, int], None]:
    """A kernel that refuses to signal one process, or, without an error, one whose signals have no effect."""

    def send(target: int, pidfd: int | None, signum: int) -> None:
        if target != pid:
            assert pidfd is not None
            signal.pidfd_send_signal(pidfd, signum)
        elif error is not None:
            raise error

    return send


def assert_all_gone(started: Started, receipt: KillReceipt) -> None:
    assert receipt.survivors == ()
    assert started.alive() == set()
    assert alive_with_mark(started.root.mark) == set()


# Marks


async def test_marks_of_one_program_differ_and_share_its_prefix() -> None:
    marks = Marks()
    first, second = marks.new(), marks.new()
    assert first != second
    assert first >> 32 == second >> 32 == marks.prefix
    assert first >> 60 == 1
    assert Marks().prefix != marks.prefix


async def test_a_daemon_inherits_the_mark(start: Starter) -> None:
    started = await start("daemon(); stay()", 2)
    assert {read_mark(pid) for pid in started.pids} == {started.root.mark}


async def test_children_that_are_forked_before_the_mark_is_set_get_it_too(start: Starter) -> None:
    started = await start("child(lambda: (child(stay), stay())); stay()", 3, mark=False)
    assert {read_mark(pid) for pid in started.pids} == {None}
    mark = start.marks.new()
    assert set_mark(started.process.pid, mark)
    assert {read_mark(pid) for pid in started.pids} == {mark}


async def test_a_process_with_a_finite_hard_limit_is_not_marked(start: Starter) -> None:
    started = await start("stay()", 1, mark=False)
    resource.prlimit(started.process.pid, resource.RLIMIT_RTTIME, (1000, 1000))
    assert not set_mark(started.process.pid, start.marks.new())
    assert read_mark(started.process.pid) is None


async def test_a_process_that_was_reaped_is_not_marked(start: Starter) -> None:
    started = await start("report()", 1)
    await started.wait_root()
    assert not set_mark(started.process.pid, start.marks.new())
    assert read_mark(started.process.pid) is None


async def test_a_daemon_that_left_before_the_mark_was_set_is_marked_by_its_birth(start: Starter) -> None:
    with birthmark() as born:
        assert born
        started = await start("daemon(); stay()", 2, mark=False)
        assert {os.sched_getscheduler(pid) for pid in started.pids} == {os.SCHED_BATCH}
        mark = start.marks.new()
        assert set_mark(started.process.pid, mark, born=born)
    assert {read_mark(pid) for pid in started.pids} == {mark}
    assert {os.sched_getscheduler(pid) for pid in [0, *started.pids]} == {os.SCHED_OTHER}


async def test_an_orphan_in_the_session_is_marked_without_its_birth(start: Starter) -> None:
    started = await start("os.waitpid(child(lambda: child(stay)), 0); stay()", 2, mark=False)
    mark = start.marks.new()
    assert set_mark(started.process.pid, mark)
    assert {read_mark(pid) for pid in started.pids} == {mark}


async def test_what_others_started_is_not_marked_with_a_child(start: Starter) -> None:
    strangers = [await start(f"daemon(); {end}()", 2, mark=False) for end in ("stay", "report")]
    await trio.to_thread.run_sync(bool)  # so that no new thread inherits this one's policy
    with birthmark() as born:
        started = await start("stay()", 1, mark=False)
        strangers.append(await start("daemon(); stay()", 2, mark=False, in_thread=True))
        assert set_mark(started.process.pid, start.marks.new(), born=born)
    assert {read_mark(pid) for stranger in strangers for pid in stranger.alive()} == {None}


async def test_a_thread_with_another_policy_keeps_it() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with birthmark() as born:
            assert not born
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


# Killing

TREES = {
    "a single process": ("stay()", 1),
    "children and a grandchild": ("child(lambda: (child(stay), stay())); child(stay); stay()", 4),
    "a grandchild in its own session": (
        "child(lambda: (child(lambda: (os.setsid(), stay())), stay())); stay()",
        3,
    ),
    "a daemon": ("daemon(); stay()", 2),
    "a daemon of a daemon and its child": (
        "os.waitpid(child(lambda: (os.setsid(), child(lambda: (daemon(), child(stay), stay())))), 0); stay()",
        4,
    ),
    "a stopped child": ("child(lambda: (report(), os.kill(os.getpid(), signal.SIGSTOP))); stay()", 2),
    "a child that ignores signals": (
        "child(lambda: ([signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15)], stay())); stay()",
        2,
    ),
}


@pytest.fixture(params=["this kernel", "no lists of children", "no pidfds"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no pidfds":
        monkeypatch.setattr(tree, "open_pidfd", lambda pid: None)
    elif request.param == "no lists of children":
        monkeypatch.setattr(tree, "_has_children_files", lambda: False)
        monkeypatch.setattr(
            tree, "read_file", lambda path: None if path.endswith("/children") else read_file(path)
        )


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("code", "reports"), TREES.values(), ids=TREES.keys())
async def test_a_killed_tree_is_gone(start: Starter, code: str, reports: int) -> None:
    started = await start(code, reports)
    receipt = await kill_tree(started.root)
    assert set(receipt.signalled) == set(started.pidfds)
    assert_all_gone(started, receipt)
    assert started.process.wait() == -signal.SIGKILL, "the root was not left for its owner to reap"


async def test_the_receipt_of_a_single_process_names_it_and_the_time(start: Starter) -> None:
    started = await start("stay()", 1)
    before = trio.current_time()
    receipt = await kill_tree(started.root)
    assert 0 < receipt.seconds <= trio.current_time() - before
    assert receipt == KillReceipt((started.process.pid,), receipt.seconds, ())


async def test_nohup_in_the_background_is_killed(start: Starter) -> None:
    started = await start(["sh", "-c", "nohup sleep 1000 >/dev/null 2>&1 & echo $!; wait"], 1)
    receipt = await kill_tree(started.root)
    assert set(receipt.signalled) == {started.process.pid, *started.pids}
    assert_all_gone(started, receipt)


@pytest.mark.usefixtures("kernel")
async def test_what_outlived_a_reaped_root_is_killed(start: Starter) -> None:
    started = await start("daemon(); daemon(); child(stay)", 3)
    root = await started.wait_root()
    receipt = await kill_tree(root)
    assert set(receipt.signalled) == set(started.pids)
    assert_all_gone(started, receipt)


async def test_what_outlived_a_root_that_waits_to_be_reaped_is_killed(start: Starter) -> None:
    started = await start("daemon(); child(stay)", 2)
    await started.wait_ended(started.process.pid)
    receipt = await kill_tree(started.root)
    assert set(receipt.signalled) == set(started.pids)
    assert_all_gone(started, receipt)


async def test_an_unmarked_tree_is_known_by_descent_and_session(start: Starter) -> None:
    started = await start(
        "os.waitpid(child(lambda: child(stay)), 0); child(lambda: (os.setsid(), stay())); stay()",
        3,
        mark=False,
    )
    receipt = await kill_tree(started.root)
    assert set(receipt.signalled) == set(started.pids)
    assert_all_gone(started, receipt)
    outlived = await start("child(stay)", 1, mark=False)
    receipt = await kill_tree(await outlived.wait_root())
    assert receipt.signalled == tuple(outlived.pids)
    assert_all_gone(outlived, receipt)


async def test_killing_one_tree_leaves_the_daemon_of_another(start: Starter) -> None:
    one, other, orphaned = [await start(f"daemon(); {end}()", 2) for end in ("stay", "stay", "report")]
    root = await orphaned.wait_root()
    assert_all_gone(one, await kill_tree(one.root))
    assert other.alive() == set(other.pids)
    assert orphaned.alive() == {orphaned.pids[0]}
    assert_all_gone(orphaned, await kill_tree(root))
    assert other.alive() == set(other.pids)


async def test_processes_of_others_and_their_orphans_are_not_touched(start: Starter) -> None:
    strangers = [await start(f"daemon(); child(stay); {end}()", 3, mark=False) for end in ("stay", "report")]
    await strangers[1].wait_root()
    ours = await start("daemon(); stay()", 2)
    alive = [stranger.alive() for stranger in strangers]
    assert [len(pids) for pids in alive] == [3, 2]
    assert find_leftovers(ours.root, ()) == [ours.pids[0]]
    assert_all_gone(ours, await kill_tree(ours.root))
    assert find_leftovers(ours.root, ()) == []
    reap_adopted(start.marks.prefix, ())
    assert [stranger.alive() for stranger in strangers] == alive


# `{late}` is true in one process of the storm: the 300th, when hundreds of zombies are waiting to be reaped.
STORMS = {
    "one after the other": "while count and not os.fork(): count -= 1; {late}",
    "in sessions of their own": "while count and not os.fork(): count -= 1; os.setsid(); {late}",
    "beside each other": "while count and os.fork(): count -= 1; {late}",
}


@pytest.mark.parametrize("head_start", [False, True], ids=["from the start", "after 300 forks"])
@pytest.mark.parametrize("storm", STORMS.values(), ids=STORMS.keys())
async def test_a_tree_that_forks_while_it_is_killed_is_gone(
    start: Starter, storm: str, head_start: bool
) -> None:
    storm = storm.format(late="count == 19700 and report()" if head_start else "")
    code = f"""
def rage():
    report()
    count = 20000
    {storm}
    if count == 0:
        report()
child(rage); stay()
"""
    started = await start(code, 3 if head_start else 2)
    receipt = await kill_tree(started.root)
    assert_all_gone(started, receipt)
    assert started.process.stdout is not None
    assert started.process.stdout.read() == b"", "the storm was over before it was killed"


async def test_all_stand_still_before_the_first_is_killed(start: Starter) -> None:
    started = await start("daemon(); child(stay); stay()", 3)
    sent = []

    def send(pid: int, pidfd: int | None, signum: int) -> None:
        sent.append(signum)
        send_signal(pid, pidfd, signum)

    assert_all_gone(started, await kill_tree(started.root, send=send))
    assert sent == [signal.SIGSTOP] * 3 + [signal.SIGKILL] * 3


async def test_a_process_that_may_not_be_signalled_is_reported_and_the_others_are_killed(
    start: Starter,
) -> None:
    started = await start("daemon(); child(stay); stay()", 3)
    immune = started.pids[0]
    receipt = await kill_tree(started.root, send=sending_to_all_but(immune, PermissionError()))
    assert receipt.survivors == (Survivor(immune, "operation not permitted"),)
    assert set(receipt.signalled) == set(started.pids) - {immune}
    assert started.alive() == {immune}


async def test_a_process_that_does_not_end_is_reported_after_the_patience(start: Starter) -> None:
    started = await start("daemon(); child(stay); stay()", 3)
    immune = started.pids[0]
    receipt = await kill_tree(started.root, patience=0.05, send=sending_to_all_but(immune, None))
    (survivor,) = receipt.survivors
    assert survivor.pid == immune
    assert survivor.reason in {f"still running after 0.05 s (state {state})" for state in "RSD"}
    assert set(receipt.signalled) == set(started.pids)
    assert receipt.seconds >= 0.05
    assert started.alive() == {immune}


async def test_a_process_that_ended_before_its_signal_is_not_in_the_receipt(start: Starter) -> None:
    started = await start("daemon(); stay()", 2)
    ended = started.pids[0]
    send = sending_to_all_but(ended, ProcessLookupError())
    receipt = await kill_tree(started.root, patience=0.05, send=send)
    assert receipt.signalled == (started.process.pid,)


async def test_a_cancelled_caller_has_sent_the_kill(start: Starter) -> None:
    started = await start("daemon(); child(stay); stay()", 3)
    with trio.CancelScope() as scope:
        scope.cancel()
        await kill_tree(started.root)
    assert scope.cancelled_caught
    await started.wait_ended(*started.pids)


async def test_signalling_without_finishing_leaves_zombies_for_reap_adopted(start: Starter) -> None:
    started = await start("daemon(); stay()", 2)
    signal_tree(started.root).close()
    await started.wait_ended(*started.pids)
    assert started.pids[0] in children_of_this_process()
    reap_adopted(start.marks.prefix, {started.process.pid})
    assert children_of_this_process() >= {started.process.pid}
    assert started.pids[0] not in children_of_this_process()


async def test_a_pid_that_belongs_to_another_process_by_now_is_not_touched(start: Starter) -> None:
    started = await start("child(stay); stay()", 2)
    earlier = Root(started.process.pid, start.marks.new(), frozenset({1}), started.root.starttime - 1)
    receipt = await kill_tree(earlier)
    assert receipt.signalled == ()
    assert started.alive() == set(started.pids)


async def test_a_root_must_lead_its_session(start: Starter) -> None:
    started = await start("child(stay); stay()", 2)
    (child,) = {*started.pids} - {started.process.pid}
    with pytest.raises(ValueError, match="start_new_session=True"):
        Root.of(child)


async def test_without_proc_the_group_is_killed(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    started = await start("child(stay); stay()", 2)
    monkeypatch.setattr(tree, "read_stat", lambda pid: None)
    monkeypatch.setattr(tree, "read_file", lambda path: None)
    monkeypatch.setattr(tree, "_has_children_files", lambda: False)
    receipt = await kill_tree(Root.of(started.process.pid))
    assert receipt.signalled == (started.process.pid,)
    await started.wait_ended(*started.pids)


async def test_a_kill_without_free_descriptors_reaches_the_group_and_later_the_rest(start: Starter) -> None:
    started = await start("daemon(); child(stay); stay()", 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        members = signal_tree(started.root)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await started.wait_ended(*started.pids[1:])
    assert started.alive() == {started.pids[0]}
    receipt = await members.finish()
    assert receipt.signalled == (started.process.pid, started.pids[0])
    assert_all_gone(started, receipt)


async def test_a_kill_that_could_not_look_does_not_say_that_all_are_gone(start: Starter) -> None:
    started = await start("daemon(); stay()", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await signal_tree(started.root).finish(patience=0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_fifty_killed_trees_leave_no_process_and_no_descriptor(start: Starter) -> None:
    code = "(setsid sleep 1000 >/dev/null 2>&1 & echo $!); sleep 1000 & echo $!; wait"
    before = children_of_this_process(), descriptors()
    for _ in range(50):
        started = await start(["sh", "-c", code], 2)
        receipt = await kill_tree(started.root)
        assert set(receipt.signalled) == {started.process.pid, *started.pids}
        assert children_of_this_process() == before[0] | {started.process.pid}
        start.clean_up()
        assert (children_of_this_process(), descriptors()) == before


# Leftovers


async def test_a_tree_without_daemons_has_no_leftovers(start: Starter) -> None:
    started = await start("report()", 1)
    assert find_leftovers(await started.wait_root(), ()) == []


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_daemon_is_left_over_until_it_ends(start: Starter, in_thread: bool) -> None:
    started = await start("daemon(); report()", 2, in_thread=in_thread)
    root = await started.wait_root()
    daemon = started.pids[0]
    assert find_leftovers(root, ()) == [daemon]
    os.kill(daemon, signal.SIGKILL)
    await started.wait_ended(daemon)
    assert daemon in children_of_this_process()
    assert find_leftovers(root, ()) == []
    assert daemon not in children_of_this_process(), "it was not reaped"


async def test_known_children_are_not_examined(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    started = await start("report()", 1)
    others = {(await start("stay()", 1)).process.pid for _ in range(3)}
    root = await started.wait_root()
    others |= set(children_of_this_process()) - {root.pid}  # a server that other tests share
    monkeypatch.setattr(tree, "_belongs", lambda pid, *_: pytest.fail(f"{pid} was examined"))
    assert find_leftovers(root, others) == []
    assert (await kill_tree(root, others)).signalled == ()


@pytest.mark.usefixtures("kernel")
async def test_an_adopted_process_is_reaped_when_it_ends(start: Starter) -> None:
    started = await start("daemon(); report()", 2)
    await started.wait_root()
    daemon = started.pids[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reap, daemon)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(daemon, signal.SIGKILL)
    assert daemon not in children_of_this_process()


async def test_a_process_that_is_not_our_child_is_not_waited_for(start: Starter) -> None:
    started = await start("child(stay)", 1, mark=False)
    await reap(os.getppid())
    await started.wait_root()
    await kill_tree(started.root.reaped())
    await reap(started.pids[0])


# The subreaper


async def test_the_last_of_several_users_restores_the_subreaper_state() -> None:
    assert not is_subreaper()
    first, second = subreaper(), subreaper()
    with first as enabled:
        assert enabled
        second.__enter__()
        assert is_subreaper()
    assert is_subreaper(), "the second one still uses it"
    second.__exit__(None, None, None)
    assert not is_subreaper()


async def test_a_program_that_was_a_subreaper_before_stays_one() -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    try:
        with subreaper() as enabled:
            assert enabled
        assert is_subreaper()
    finally:
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
