"""Ends a process together with everything that it started, and says what happened.

A process may leave its group, its session and its parent (fork twice, setsid), so none of these tells where
it came from. Two things do. Resource limits are inherited over fork, exec and setsid and anyone may read
them in /proc/PID/limits: each process we start gets a limit of its own that limits nothing (`Marks`,
`set_mark`). And a child subreaper (`subreaper`; prctl(2)) becomes the parent of its orphaned descendants,
so that they are found in one small file. A tree is what descends from its first process, plus the orphans
with its mark or session.

Out of reach is what was not started by the tree but on its behalf (by systemd-run, at or a container
daemon), and a process that removes its mark, leaves its session and is orphaned. Without /proc (macOS) only
the group is killed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import trio
from attrs import define, evolve, field, frozen

from execenv.abc import KillReceipt, Survivor
from execenv.local.watchdog import (
    SERIAL_BITS,
    is_gone,
    open_pidfd,
    read_file,
    read_mark,
    read_stat,
    send_signal,
    wait_gone,
)

__all__ = [
    "Marks",
    "Members",
    "Root",
    "birthmark",
    "children_of",
    "find_leftovers",
    "kill_tree",
    "mark_myself",
    "read_mark",
    "reap",
    "reap_adopted",
    "set_mark",
    "signal_tree",
    "subreaper",
]

Send = Callable[[int, int | None, int], None]  # see `send_signal`
Children = Callable[[int], list[int]]

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37  # linux/prctl.h
_FREEZING_WALKS = 20
_FREEZING_SECONDS = 0.5
_STANDSTILL = "TtZXD"  # D: also the parent in vfork(2), which goes on only after its child


@define(eq=False)
class Marks:
    """Hands out one mark for each process that this program starts.

    A mark is a limit of over 30,000 years of uninterrupted real-time CPU use, in microseconds (RLIMIT_RTTIME,
    getrlimit(2)). Its upper bits are random for each program, see `execenv.local.watchdog`.
    """

    prefix: int = field(factory=lambda: 1 << 28 | secrets.randbits(28), init=False)
    _last: int = field(default=0, init=False)

    def new(self) -> int:
        self._last += 1
        return self.prefix << SERIAL_BITS | self._last


def mark_myself(prefix: int) -> bool:
    """Mark this whole program, so that whatever it starts carries the prefix from its first moment.

    Only for a program that is ours alone, such as a server: of one that is killed while it starts a process,
    the watchdog then finds that process too. False if it is not possible.
    """
    return _mark_one(os.getpid(), prefix << SERIAL_BITS)


@contextmanager
def birthmark() -> Iterator[bool]:
    """Start a child and call `set_mark` within; without a checkpoint. Pass on what this yields.

    A child runs before it can be marked, for long if other threads keep this one from running. So this
    thread, hence what it forks, has another scheduling policy for the time: SCHED_BATCH, which hardly
    differs (sched(7)). That tells the child's early descendants from what other threads start. False if it
    is not possible, or this thread has another policy than the usual one.
    """
    if sys.platform != "linux":
        yield False
        return
    try:
        usual = os.sched_getscheduler(0) == os.SCHED_OTHER
        if usual:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        usual = False
    try:
        yield usual
    finally:
        if usual:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def set_mark(pid: int, mark: int, *, born: bool = False) -> bool:
    """Mark a child, and what it has forked by then; in the thread that started it, at once.

    `born` is what `birthmark` gave. Without it, what the child forked, orphaned and moved to another session
    before this call is never found again.

    False if marking is not possible: another system than Linux, a lower hard limit, another user (a
    set-user-ID program), or the process has been reaped. Such a tree is found by descent and session only.
    """
    marked = _mark_one(pid, mark)
    done = {pid} if marked else set()
    again = True
    while again:
        again = _mark_down([pid], mark, done, born)
        # after that, since whatever lost its parent meanwhile has come to us
        again |= _mark_down(_early_orphans(pid, mark, born), mark, done, born)
    return marked


def _mark_one(pid: int, mark: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_RTTIME)
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (mark, hard))
    except (AttributeError, OSError, ValueError):  # ValueError: above the hard limit
        return False
    return True


def _mark_down(pids: list[int], mark: int, done: set[int], born: bool) -> bool:
    """Mark these and their descendants; False if there is none that was not yet `done`."""
    found = False
    children = _children if _has_children_files() else _scan_children()
    for pid in pids:
        if pid not in done and read_mark(pid) != mark and _mark_one(pid, mark):
            done.add(pid)
            found = True
        if born:
            _end_birthmark(pid)
        # This waits while the process is in fork(2), for the lock of its memory. What it forks got its limits
        # before that, perhaps without the mark, and is listed as its child just after that.
        read_file(f"/proc/{pid}/cmdline")
        pids += children(pid)
    return found


def _end_birthmark(pid: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # ended, or of another user
            for task in map(int, os.listdir(f"/proc/{pid}/task")):
                if os.sched_getscheduler(task) == os.SCHED_BATCH:
                    os.sched_setscheduler(task, os.SCHED_OTHER, os.sched_param(0))


def _early_orphans(pid: int, mark: int, born: bool) -> list[int]:
    """What the child forked before it was marked and has become our child already."""
    pids = _adopted(())
    if pid in pids and _has_children_files():  # then they are in the order of their arrival
        pids = pids[pids.index(pid) + 1 :]
    root = read_stat(pid) if pids else None
    if root is None:
        return []
    return [
        orphan
        for orphan in pids
        if not _is_sibling(read_mark(orphan), mark)
        and (stat := read_stat(orphan)) is not None
        and (stat.session == pid or (born and _has_birthmark(orphan) and stat.starttime >= root.starttime))
    ]


def _has_birthmark(pid: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        return os.sched_getscheduler(pid) == os.SCHED_BATCH
    except ProcessLookupError:
        return False


class _Subreaping(NamedTuple):
    users: int
    before: bool


_subreaping = trio.lowlevel.RunVar("_subreaping", _Subreaping(0, False))


@contextmanager
def subreaper() -> Iterator[bool]:
    """While in use, orphans of this process' descendants become its own children; False if they do not.

    That holds for the whole program. The last of several users in one `trio.run` restores what was before.
    Orphans of processes that others in this program started come here too; those we never touch, so they
    stay zombies.
    """
    users, before = _subreaping.get()
    if users == 0:
        before = _get_subreaper()
    enabled = before or _set_subreaper(True)
    _subreaping.set(_Subreaping(users + 1, before))
    try:
        yield enabled
    finally:
        users = _subreaping.get().users - 1
        _subreaping.set(_Subreaping(users, before))
        if users == 0 and not before:
            _set_subreaper(False)


def _set_subreaper(on: bool) -> bool:
    if sys.platform != "linux":
        return False
    return bool(
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(on), *[ctypes.c_ulong()] * 3) == 0
    )


def _get_subreaper() -> bool:
    if sys.platform != "linux":
        return False
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), *[ctypes.c_ulong()] * 3)
    return bool(value)


@frozen
class Root:
    """The first process of a tree, started by us with start_new_session=True.

    `pid` is None once the process has been reaped: the number may belong to another process by then. `mark`
    is None if the process could not be marked. `sids` are the sessions that are known to belong to the
    tree.
    """

    pid: int | None
    mark: int | None = None
    sids: frozenset[int] = frozenset()
    starttime: int = 0

    @classmethod
    def of(cls, pid: int, mark: int | None = None) -> Root:
        """Describe a child that has not been reaped.

        Raises:
            ValueError: it does not lead a session, so its group is not its own.
        """
        stat = read_stat(pid)
        if stat is not None and stat.session != pid:
            raise ValueError(f"process {pid} was not started with start_new_session=True")
        return cls(pid, mark, frozenset({pid}), stat.starttime if stat else 0)

    def reaped(self) -> Root:
        """The same tree, without its first process."""
        return evolve(self, pid=None)


@define(eq=False)
class _Member:
    pid: int
    starttime: int
    pidfd: int | None
    refused: bool = False
    stopped: bool = False

    def gone(self) -> bool:
        return is_gone(self.pid, self.starttime, self.pidfd)

    def stands_still(self) -> bool:
        stat = read_stat(self.pid)
        return stat is None or stat.state in _STANDSTILL

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


@define(eq=False)
class Members:
    """A tree that has been sent SIGKILL (by `signal_tree`). Call `finish`, or else `close`."""

    _root: Root
    _known: Collection[int]
    _send: Send
    _sids: set[int] = field(init=False)
    _found: dict[int, _Member] = field(factory=dict, init=False)
    _signalled: dict[int, None] = field(factory=dict, init=False)
    _reaped: int = field(default=0, init=False)
    _started: float = field(factory=time.perf_counter, init=False)

    def __attrs_post_init__(self) -> None:
        self._sids = set(self._root.sids)

    def kill(self) -> bool:
        """Find processes that are new since the last call and kill them; False if there are none.

        One that is dead when found is news too: it may have forked another just before.
        """
        reaped = self._reaped
        fresh = self._walk()
        if not fresh:
            return self._reaped != reaped
        if any(member.pid != self._root.pid and not member.gone() for member in fresh):
            self._freeze(fresh)
        for member in self._found.values():
            if self._signal(member, signal.SIGKILL):
                self._signalled[member.pid] = None
        return True

    def kill_group(self) -> None:
        """Kill the root's group. Only before the first checkpoint: then nobody can have reaped the root."""
        pid = self._root.pid
        if pid is None:
            return
        with suppress(OSError):  # no descriptors left to look with; then rely on the caller
            if not _is_same(pid, self._root.starttime):
                return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
            if not self._found:  # no /proc, or no descriptors
                self._signalled[pid] = None

    async def finish(self, patience: float = 5.0) -> KillReceipt:
        """Wait until all are gone, at most `patience` seconds; kill those found late, reap the adopted ones.

        Run it shielded. When cancelled all the same, SIGKILL has been sent, but zombies may be left for
        `reap_adopted`.

        Raises:
            OSError: there were no file descriptors left to see whether all are gone.
        """
        try:
            with trio.move_on_after(patience) as scope:
                while True:
                    await trio.lowlevel.checkpoint()
                    try:
                        await self._wait_gone()
                        self._reap()  # so that no zombies are looked at again
                        # Only now have the orphans of those that are gone come to us. Twice, since the
                        # list of our children may lack one while another thread reaps a child (proc(5)).
                        if not await self._kill_again() and not await self._kill_again():
                            break
                    except OSError:  # no descriptors left, perhaps just now
                        await trio.sleep(0.01)
            if scope.cancelled_caught:  # one that does not end must not spare those found after it
                self.kill()
            self._reap()
            survivors = [
                self._survivor(member, patience) for member in self._found.values() if not member.gone()
            ]
            seconds = time.perf_counter() - self._started
            return KillReceipt(tuple(self._signalled), seconds, tuple(survivors))
        finally:
            self.close()

    def close(self) -> None:
        for member in self._found.values():
            member.close()
        self._found.clear()

    async def _wait_gone(self) -> None:
        for member in list(self._found.values()):
            if not member.refused and not member.gone():
                await wait_gone(member.pid, member.starttime, member.pidfd)

    async def _kill_again(self) -> bool:
        if _has_children_files():
            return self.kill()
        return await trio.to_thread.run_sync(self.kill)

    def _walk(self) -> list[_Member]:
        """All processes of the tree that are not yet in `_found`, where they are put. Some may be dead."""
        children = _children if _has_children_files() else _scan_children()
        me, root = os.getpid(), self._root
        fresh: list[_Member] = []
        if root.pid is not None and not self._found and _is_same(root.pid, root.starttime):
            fresh += self._add(root.pid, me)
        # The youngest first, and each is stopped as it is found: a process that forks and ends at once is
        # there only for a moment.
        for pid in reversed(children(me)):
            if pid not in self._known and pid != root.pid and _belongs(pid, root.mark, self._sids):
                added = self._add(pid, me)
                fresh += added
                for member in added:
                    self._stop(member)
        queue = list(self._found.values())
        for member in queue:
            pids = [] if member.gone() else children(member.pid)
            if pids and not member.gone():  # asked in this order: they were its children, not its successor's
                for pid in pids:
                    added = self._add(pid, member.pid)
                    queue += added
                    fresh += added
        return fresh

    def _add(self, pid: int, parent: int) -> list[_Member]:
        old = self._found.get(pid)
        if old is not None and not old.gone():
            return []
        try:
            pidfd = open_pidfd(pid)
        except ProcessLookupError:
            return []
        member = self._identify(pid, pidfd, parent)
        if member is None or (old is not None and old.starttime == member.starttime):
            if pidfd is not None:
                os.close(pidfd)
            return []
        if old is not None:
            old.close()
        self._found[pid] = member
        return [member]

    def _identify(self, pid: int, pidfd: int | None, parent: int) -> _Member | None:
        """None if the process behind `pidfd` is not, or no longer, the one that was found."""
        stat = read_stat(pid)
        if stat is None:
            return None
        me = os.getpid()
        if stat.dead and pid != self._root.pid:
            if stat.ppid == me:  # at once: looking at thousands of zombies again would be slower than a fork
                _reap_nowait(pid, stat.starttime)
                self._reaped += 1
            return None  # else its parent's business
        if stat.ppid != parent and not (stat.ppid == me and _belongs(pid, self._root.mark, self._sids)):
            return None
        if stat.session:  # 0: outside of our pid namespace
            self._sids.add(stat.session)
        return _Member(pid, stat.starttime, pidfd)

    def _freeze(self, fresh: list[_Member]) -> None:
        """Stop all members before any is killed, so that none forks or is orphaned while we look."""
        deadline = time.perf_counter() + _FREEZING_SECONDS
        for _ in range(_FREEZING_WALKS):
            for member in fresh:
                self._stop(member)
            reaped = self._reaped
            fresh = self._walk()
            if time.perf_counter() > deadline:
                return
            if fresh or self._reaped != reaped:
                continue
            if all(member.refused or member.stands_still() for member in self._found.values()):
                return

    def _stop(self, member: _Member) -> None:
        if not member.stopped:
            member.stopped = self._signal(member, signal.SIGSTOP)

    def _signal(self, member: _Member, signum: int) -> bool:
        if member.refused or member.gone():
            return False
        try:
            self._send(member.pid, member.pidfd, signum)
        except ProcessLookupError:
            return False
        except PermissionError:
            member.refused = True
            return False
        return True

    def _reap(self) -> None:
        for member in self._found.values():
            if member.pid != self._root.pid:
                _reap_nowait(member.pid, member.starttime)

    def _survivor(self, member: _Member, patience: float) -> Survivor:
        if member.refused:
            return Survivor(member.pid, "operation not permitted")
        stat = read_stat(member.pid)
        state = stat.state if stat else "?"
        return Survivor(member.pid, f"still running after {patience:g} s (state {state})")


def signal_tree(root: Root, known: Collection[int] = (), *, send: Send = send_signal) -> Members:
    """Send SIGKILL to the whole tree, without a checkpoint.

    `known` are the pids of other roots, best as a set or dict: it only saves looking at them. The caller
    awaits `Members.finish` for what happened. Between starting the process and this call the caller must be
    the only one to reap the root, and must not do so in another thread.
    """
    members = Members(root, known, send)
    with suppress(OSError):  # no descriptors left to look with; `finish` tries again
        members.kill()
    members.kill_group()
    return members


async def kill_tree(
    root: Root, known: Collection[int] = (), *, patience: float = 5.0, send: Send = send_signal
) -> KillReceipt:
    """`signal_tree`, before any checkpoint, then `Members.finish`. The root itself is left to be reaped."""
    return await signal_tree(root, known, send=send).finish(patience)


def find_leftovers(root: Root, children_known: Collection[int]) -> list[int]:
    """Orphans of the tree that run on after the root has ended. What they have started is not listed.

    `children_known` are the pids of the other roots, best as a set or dict. Orphans that have ended are
    reaped in passing.
    """
    while True:
        orphans = [pid for pid in _adopted(children_known) if pid != root.pid]
        orphans = [pid for pid in orphans if _belongs(pid, root.mark, root.sids)]
        alive = [pid for pid in orphans if not _reap_dead(pid)]
        if alive or not orphans:
            return alive  # else once more: a dead one may have forked another just before


def reap_adopted(prefix: int, children_known: Collection[int]) -> None:
    """Reap all orphans with this prefix in their mark that have ended.

    A tree that runs for long may leave many short-lived orphans, for which nobody else waits: call it now and
    then.
    """
    for pid in _adopted(children_known):
        if _is_sibling(read_mark(pid), prefix << SERIAL_BITS):
            _reap_dead(pid)


async def reap(pid: int) -> None:
    """Wait until an adopted orphan has ended, and reap it; return at once if it is not our child."""
    stat = read_stat(pid)
    if stat is None or stat.ppid != os.getpid():
        return
    pidfd = open_pidfd(pid)
    try:
        await wait_gone(pid, stat.starttime, pidfd)
        _reap_nowait(pid, stat.starttime)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _reap_dead(pid: int) -> bool:
    """Reap an orphan if it has ended; False if it runs."""
    stat = read_stat(pid)
    if stat is not None and stat.dead:
        _reap_nowait(pid, stat.starttime)
    return stat is None or stat.dead


def _reap_nowait(pid: int, starttime: int) -> None:
    """Reap this very process if it is a child of ours that has ended."""
    stat = read_stat(pid)
    if stat is not None and stat.starttime == starttime and stat.ppid == os.getpid():
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _belongs(pid: int, mark: int | None, sids: Collection[int]) -> bool:
    """Whether a direct child of ours is of the tree. A mark of ours decides; else the session does.

    Groups need no look: a group is always within one session.
    """
    found = read_mark(pid)
    if mark is not None and _is_sibling(found, mark):
        return found == mark
    stat = read_stat(pid)
    return stat is not None and stat.session in sids


def _is_sibling(found: int | None, mark: int) -> bool:
    """Whether both are marks of this program's processes. Serial 0 is the program's own (`mark_myself`)."""
    if found is None or not found & ((1 << SERIAL_BITS) - 1):
        return False
    return found >> SERIAL_BITS == mark >> SERIAL_BITS


def _is_same(pid: int, starttime: int) -> bool:
    stat = read_stat(pid)
    return starttime == 0 if stat is None else (stat.starttime, stat.ppid) == (starttime, os.getpid())


def _adopted(children_known: Collection[int]) -> list[int]:
    """Our children apart from the known ones.

    Orphans go to the first thread that lives (find_alive_thread in Linux' kernel/exit.c), which is the main
    thread.
    """
    me = os.getpid()
    data = read_file(f"/proc/self/task/{me}/children")
    pids = _scan_children()(me) if data is None else [int(word) for word in data.split()]
    return [pid for pid in pids if pid not in children_known]


def _has_children_files() -> bool:
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def _children(pid: int) -> list[int]:
    """The process' children, those of all its threads (proc_pid_task(5)); [] if it has ended."""
    pids: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            pids += map(int, (read_file(f"/proc/{pid}/task/{task}/children") or b"").split())
    return pids


def children_of(pid: int) -> list[int]:
    """The children of a process, the oldest first where the kernel tells; [] if it has ended."""
    return (_children if _has_children_files() else _scan_children())(pid)


def _scan_children() -> Children:
    """The same from all of /proc, for kernels built without CONFIG_PROC_CHILDREN."""
    children: dict[int, list[int]] = {}
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if name.isdigit() and (stat := read_stat(int(name))) is not None:
                children.setdefault(stat.ppid, []).append(int(name))
    return lambda pid: children.get(pid, [])
