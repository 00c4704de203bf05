"""Ends every marked process when this program is killed before it could do so itself.

A program that is SIGKILLed runs no clean-up. So a small second process, started with the first spawn, waits
for the end of the first one; then it kills whatever carries the program's mark (see
`execenv.local.tree.Marks`) and all descendants of that, and removes the mount points that sandboxes left
(`execenv.local.mount_points`). A program that ends orderly says so, and the watchdog just exits.

This file is both: the module, and the script that the second process runs, without the package and without
site-packages. Hence only cheap modules of the standard library are imported at the top, plain classes are
used, and the readers of /proc which the script needs are here (`execenv.local.tree` uses them too).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # as in typing, whose import would cost the script a third of its start
if TYPE_CHECKING:
    import subprocess
    from types import TracebackType

SERIAL_BITS = 32
"""A mark is a program's prefix followed by this many bits which count its processes."""

_ORDERLY = b"."
_FREEZING_SCANS = 10
_QUIET_SCANS = 5  # a process that forks and ends, and so on, may be missed by one: /proc is not read at once


class Stat:
    """What the rest of the package needs of /proc/PID/stat. `starttime` is in clock ticks since the boot."""

    __slots__ = ("dead", "ppid", "session", "starttime", "state")

    def __init__(self, state: str, ppid: int, session: int, starttime: int, dead: bool) -> None:
        self.state = state
        self.ppid = ppid
        self.session = session
        self.starttime = starttime
        self.dead = dead


def read_file(path: str) -> bytes | None:
    """The contents of a file below /proc; None if it is not there (any more), or hidden.

    Raises:
        OSError: there are no file descriptors left.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        data = b""
        while part := os.read(fd, 65536):
            data += part
        return data
    except OSError:  # ESRCH: the process ended between open and read
        return None
    finally:
        os.close(fd)


def read_stat(pid: int) -> Stat | None:
    """The process' line in /proc (proc_pid_stat(5)); None if there is no such process or no /proc."""
    data = read_file(f"/proc/{pid}/stat")
    if not data:
        return None
    # the second field is the program's name, which may hold spaces and parentheses
    fields = data[data.rindex(b")") + 2 :].split()
    state = fields[0].decode()
    # a first thread that ended before the others is shown as a zombie too, while the process lives on
    dead = state in "ZX" and int(fields[17]) <= 1
    return Stat(state, int(fields[1]), int(fields[3]), int(fields[19]), dead)


def read_mark(pid: int) -> int | None:
    """The mark that the process carries; None if it carries none or has ended."""
    data = read_file(f"/proc/{pid}/limits")
    if not data:
        return None
    _, _, line = data.partition(b"Max realtime timeout")
    words = line.split(None, 1)
    if not words or not words[0].isdigit():
        return None
    mark = int(words[0])
    return mark if mark >> 60 == 1 else None


def open_pidfd(pid: int) -> int | None:
    """A descriptor that stands for the process; None where kernel, Python or descriptor limit forbid it.

    Raises:
        ProcessLookupError: there is no such process.
    """
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):  # many portable builds of Python lack the function
        return None


def send_signal(pid: int, pidfd: int | None, signum: int) -> None:
    """Signal the process behind `pidfd`; without one, whatever has that pid now.

    Raises:
        ProcessLookupError: it has ended.
        PermissionError: it runs as another user.
    """
    if sys.platform == "linux" and pidfd is not None:
        signal.pidfd_send_signal(pidfd, signum)
    else:
        os.kill(pid, signum)


def is_gone(pid: int, starttime: int, pidfd: int | None) -> bool:
    """Whether the process has ended; a zombie has."""
    if pidfd is None:
        stat = read_stat(pid)
        return stat is None or stat.starttime != starttime or stat.dead
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


async def wait_gone(pid: int, starttime: int, pidfd: int | None) -> None:
    """Wait until the process has ended; a zombie has."""
    import trio

    if pidfd is not None:
        await trio.lowlevel.wait_readable(pidfd)
        return
    # no event tells the end of a process that is not a child
    while not is_gone(pid, starttime, None):  # noqa: ASYNC110
        await trio.sleep(0.01)


def find_marked(prefix: int) -> set[tuple[int, int]]:
    """(pid, starttime) of all live processes that carry a mark with this prefix, and of their descendants.

    The descendants count because one of them may mark processes itself: it may be a program like this one.
    """
    stats: dict[int, Stat] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := read_stat(int(name))) is not None and not stat.dead:
            stats[int(name)] = stat
    del stats[os.getpid()]
    found = {pid for pid in stats if (read_mark(pid) or 0) >> SERIAL_BITS == prefix}
    while True:
        # a parent that is younger than its child has got the pid of one that ended while we were reading
        more = {
            pid
            for pid, stat in stats.items()
            if pid not in found and stat.ppid in found and stats[stat.ppid].starttime <= stat.starttime
        }
        if not more:
            return {(pid, stats[pid].starttime) for pid in found}
        found |= more


def kill_marked(prefix: int, seconds: float = 5.0) -> None:
    """Kill what `find_marked` finds until several scans in a row find nothing, or `seconds` have passed."""
    deadline = time.monotonic() + seconds
    frozen: set[tuple[int, int]] = set()
    scans = quiet = 0
    while quiet < _QUIET_SCANS and time.monotonic() < deadline:
        found = find_marked(prefix)
        scans += 1
        quiet = 0 if found else quiet + 1
        if (new := found - frozen) and scans <= _FREEZING_SCANS:
            # nobody is killed until all stand still: a dead parent's children can no longer be told as such
            _signal_all(new, signal.SIGSTOP)
            frozen |= new
        elif found:
            _signal_all(found, signal.SIGKILL)
            time.sleep(0.01)


def _signal_all(processes: set[tuple[int, int]], signum: int) -> None:
    for pid, starttime in processes:
        pidfd = None
        try:
            pidfd = open_pidfd(pid)
            stat = read_stat(pid)
            if stat is not None and stat.starttime == starttime:
                send_signal(pid, pidfd, signum)
        except (ProcessLookupError, PermissionError):
            pass
        finally:
            if pidfd is not None:
                os.close(pidfd)


def _wait_for_the_end_of(parent: int) -> bool:
    """Wait until our pipe or the parent has ended; True if the parent said that all is in order."""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    try:
        # without it, a process that the parent forked and did not exec would keep the pipe, hence us, waiting
        pidfd = open_pidfd(parent)
    except ProcessLookupError:
        pidfd = None
    if pidfd is not None:
        poller.register(pidfd, select.POLLIN)
    ready = poller.poll(None if os.getppid() == parent else 0)
    return any(fd == 0 for fd, _ in ready) and os.read(0, 1) == _ORDERLY


def _watch(prefix: int, parent: int) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if not _wait_for_the_end_of(parent):
        kill_marked(prefix)
        _sweep_mount_points()


def _sweep_mount_points() -> None:
    """Become the script that does it: here its imports would delay every start."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "mount_points.py")
    if os.path.isfile(script):
        os.execv(sys.executable, [sys.executable, "-I", "-S", script])  # noqa: S606


class Watchdog:
    """The parent's end of a watchdog: an async context manager, whose end tells that all is in order.

    Leaving it waits for the watchdog's end, at most 2 s even when cancelled. Leave it after the last
    process of this program has been killed, since an orderly end kills nothing.
    """

    def __init__(self, prefix: int, executable: str | None) -> None:
        self._argv = [executable or "", "-I", "-S", os.path.abspath(__file__), str(prefix)]
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._tried = False

    @property
    def pid(self) -> int | None:
        """The watchdog's pid, a direct child of this process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the watchdog, unless that was tried before. Call it before the first spawn.

        Where it cannot be started, that is logged as a warning, and there is none.
        """
        if self._tried or sys.platform != "linux":
            return
        self._tried = True
        # in a frozen program `sys.executable` is not an interpreter but the program itself
        if not self._argv[0] or getattr(sys, "frozen", False) or not os.path.isfile(__file__):
            self._warn("no Python interpreter to run it")
            return
        try:
            self._spawn()
        except OSError as error:
            self._warn(str(error))

    def _spawn(self) -> None:
        import subprocess

        read_end, write_end = os.pipe()  # neither is inheritable (PEP 446)
        try:
            self._process = subprocess.Popen(
                [*self._argv, str(os.getpid())],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        self._pipe = write_end

    def _warn(self, reason: str) -> None:
        import logging

        message = "no watchdog (%s): if this program is killed, its processes stay"
        logging.getLogger(__name__).warning(message, reason)

    async def __aenter__(self) -> Watchdog:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        import trio

        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        self._tried = True  # closed: a late start() must not leave one behind
        if process is None or pipe is None:
            return
        try:
            os.write(pipe, _ORDERLY)
        except BrokenPipeError:
            pass  # somebody killed the watchdog
        finally:
            os.close(pipe)
        with trio.move_on_after(2, shield=True):
            await _wait_child(process.pid)
        process.kill()
        process.wait()


async def _wait_child(pid: int) -> None:
    """Wait until an unreaped child, whose pid therefore is not reused, has ended."""
    stat = read_stat(pid)
    pidfd = open_pidfd(pid)
    try:
        await wait_gone(pid, stat.starttime if stat else 0, pidfd)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def open_watchdog(prefix: int, executable: str | None = sys.executable) -> Watchdog:
    """A watchdog over all processes that carry a mark with this prefix: `async with open_watchdog(...)`.

    It runs from `Watchdog.start` on. `executable` is a Python interpreter; None or "" means to do without.
    """
    return Watchdog(prefix, executable)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]))
