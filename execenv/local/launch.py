"""Starting a program under bubblewrap, and seeing that it mounted what the plan says (sandbox.md §11).

bubblewrap is started by the Trio thread, since `--die-with-parent` means the thread that forked it. It sets
up the view, passes a gate, and waits for the filter of system calls. Only when its mounts were compared with
the plan, by inode, does it get that filter, and the program begins. So nothing is won by exchanging a
directory for a link under bubblewrap's hands: it mounts by path, and what came of it is looked at.

Its options and the environment of the program go through a descriptor. The environment of bubblewrap itself
is empty: LD_PRELOAD and the like are for the program, inside, and secrets are in nobody's command line.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import trio
from attrs import define, field

from execenv.errors import InternalError, os_error_text
from execenv.local.bubblewrap import Bubblewrap
from execenv.local.mount_points import open_without_links
from execenv.local.mounts import openat2
from execenv.local.spawn import close_all, exit_code_of
from execenv.local.stat import is_mount_root, stat_path
from execenv.local.tree import (
    Marks,
    Root,
    birthmark,
    children_of,
    set_mark,
    signal_tree,
)
from execenv.sandbox.plan import Bind, Mask, MountPlan, arguments, count_data_fds

MAX_WORDS = 8_900
"""Options and arguments together: bubblewrap takes 9,000."""

CLOCK_TICK = 0.05
"""Seconds that the time of a file may be behind the clock: the kernel's coarse one goes in steps."""

STRAY_LOOKS = 30
SETUP_PATIENCE = 20.0
"""Seconds that bubblewrap may take until everything is mounted."""
END_PATIENCE = 5.0
NOT_EXECUTED = 127
"""The status of a program that could not be executed inside, as shells have it."""

_ROOTS_OF_PROC = (
    b"acpi asound bus driver dynamic_debug fs irq latency_stats mtrr scsi sys sysrq-trigger".split()
)
_RESOLVE_NO_SYMLINKS = 0x04  # linux/openat2.h
_RESOLVE_IN_ROOT = 0x10


@define(eq=False)
class Launched:
    """A program under bubblewrap. Whoever holds this reaps `pid`, then calls `close`.

    Attributes:
        pid: of the outer bubblewrap, a child of ours that leads a session of its own. SIGKILL to it ends
            everything inside.
        child_pid: of the first process inside, as we see it.
        root: for `tree.signal_tree`.
    """

    pid: int
    child_pid: int
    root: Root
    pidfd: int
    _child: subprocess.Popen[bytes]
    _status_fd: int
    _status: bytes
    _as_pid_1: bool
    _program: int | None = field(default=None, init=False)

    def poll(self) -> int | None:
        """Reaps `pid` if it has ended; its exit code (128 + n for signal n), else `None`."""
        returncode = self._child.poll()
        if returncode is None:
            return None
        return NOT_EXECUTED if returncode == 1 and not self._executed() else exit_code_of(returncode)

    def _executed(self) -> bool:
        with suppress(OSError):
            while part := os.read(self._status_fd, 4096):
                self._status += part
        return b'"exit-code"' in self._status

    def signal(self, signum: int) -> bool:
        """Signal the process group of the program; false while there is none yet."""
        program = self._find_program()
        if program is None:
            return False
        with suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(program)
            if group != self.pid:
                os.killpg(group, signum)
        return True

    def _find_program(self) -> int | None:
        if self._program is None:
            try:
                inside = [self.child_pid] if self._as_pid_1 else children_of(self.child_pid)[:1]
                # Until it is executed it is bubblewrap, which a signal would end before it says anything.
                if inside and os.readlink(f"/proc/{inside[0]}/exe") != os.readlink(f"/proc/{self.pid}/exe"):
                    self._program = inside[0]
            except OSError:  # it has ended
                return None
        return self._program

    def close(self) -> None:
        self.close_status()
        os.close(self.pidfd)

    def close_status(self) -> None:
        """`close` for who closes `pidfd` itself."""
        os.close(self._status_fd)


class Launcher:
    """Starts programs under bubblewrap.

    Args:
        marks, known: see `Guard`.
    """

    def __init__(self, marks: Marks, known: set[int]) -> None:
        self._marks = marks
        self._known = known

    async def launch(
        self,
        bubblewrap: Bubblewrap,
        plan: MountPlan,
        command: Sequence[str | bytes],
        *,
        env: Mapping[str, str],
        cwd: bytes,
        stdin: int,
        stdout: int,
        stderr: int,
        seccomp: bytes,
        pass_fds: Sequence[int] = (),
        frame: Sequence[bytes] = (),
        prefix: bytes = b"",
        as_pid_1: bool = False,
        options: Sequence[str] = (),
        said: Callable[[], bytes] = lambda: b"",
        on_ready: Callable[[int], None] = lambda pid: None,
    ) -> Launched:
        """Start `command` in the view of `plan`; returns when the view was checked and the program may run.

        Cancelling it ends what was started. `launched.pid` is in `known` from the start on; whoever reaps
        it takes it out.

        Args:
            env: exactly what the program gets, beside PWD.
            cwd: inside.
            stdin, stdout, stderr: descriptors of the program, or `subprocess.DEVNULL`.
            seccomp: see `seccomp.compile_filter`.
            pass_fds: descriptors that the program inherits, under the same numbers.
            frame: mount options in front of those of the plan.
            prefix: where the plan's view is to be in the new root.
            as_pid_1: the program is process 1 inside (which ignores most signals), without one of
                bubblewrap's.
            options: further options of bubblewrap.
            said: what bubblewrap wrote to its stderr, for the message when it fails.
            on_ready: called with `pid` when everything is mounted, before the program runs.

        Raises:
            InternalError: it could not be set up, with the words of bubblewrap; or it did not become what the
                plan says. Nothing runs.
        """
        fds: list[int] = []
        ours: list[int] = []
        began = time.time()
        try:
            count = count_data_fds(plan)
            for _ in range(count):
                fds.append(os.memfd_create("empty"))  # noqa: PERF401 - if one fails, those before it are known
            filter_end, filter_fd = os.pipe()
            fds.append(filter_end)
            ours.append(filter_fd)
            status_fd, status_end = os.pipe()
            fds.append(status_end)
            ours.append(status_fd)
            os.set_blocking(status_fd, False)
            gate, gate_end = (end.detach() for end in socket.socketpair())
            fds.append(gate_end)
            ours.append(gate)
            os.write(gate, b"x")  # what bubblewrap reads at the gate; then it closes its end
            words = [
                *(b"--new-session", b"--die-with-parent", *((b"--as-pid-1",) if as_pid_1 else ())),
                *frame,
                *arguments(plan, fds[:count], prefix=prefix),
                *(b"--unshare-user", b"--unshare-pid", b"--unshare-ipc"),
                *(() if plan.network else (b"--unshare-net",)),
                *(b"--proc", prefix + b"/proc", *_shut_proc(prefix, as_pid_1), b"--cap-drop", b"ALL"),
                *(os.fsencode(option) for option in options),
                *(b"--chdir", cwd, b"--block-fd", b"%d" % gate_end),
                *(b"--json-status-fd", b"%d" % status_end, b"--seccomp", b"%d" % filter_end),
                *(word for item in env.items() for word in (b"--setenv", *map(os.fsencode, item))),
            ]
            if len(words) + len(command) > MAX_WORDS:
                raise InternalError(
                    f"cannot enforce the sandbox: {len(command)} arguments, {len(env)} variables and "
                    f"{len(plan.operations)} mounts are more than bubblewrap takes at once: pass less to the "
                    "program, or deny directories instead of many files in them"
                )
            options_fd = os.memfd_create("options")
            fds.append(options_fd)
            os.write(options_fd, b"".join(word + b"\0" for word in words))
            os.lseek(options_fd, 0, os.SEEK_SET)
            child, root = self.spawn(
                [*bubblewrap.unshare, bubblewrap.executable, b"--args", b"%d" % options_fd, b"--", *command],
                (stdin, stdout, stderr),
                (*fds, *pass_fds, *bubblewrap.pass_fds),
            )
        except OSError as error:
            close_all(ours)
            raise InternalError(f"cannot enforce the sandbox: {os_error_text(error)}") from error
        except BaseException:
            close_all(ours)
            raise
        finally:
            close_all(fds)
        pidfd = None
        try:
            pidfd = os.pidfd_open(child.pid)
            with trio.move_on_after(SETUP_PATIENCE) as patience:
                await trio.lowlevel.wait_readable(gate)
            if patience.cancelled_caught:
                raise _failed(f"it took more than {SETUP_PATIENCE:g} s to set up")
            status = _read_status(status_fd)
            child_pid = _child_pid(status)
            if not _passed(gate) or child_pid is None:
                raise _failed(await _words_of(child, pidfd, said))
            if root.mark is not None:
                # It may have got its limits before the mark was set, and been listed as a child after that:
                # in between, the kernel makes its namespaces.
                set_mark(child_pid, root.mark)
            exchanged = _look_at_view(child_pid, plan, prefix)
            if exchanged is not None:
                shown = os.fsdecode(exchanged)
                raise InternalError(f"cannot enforce the sandbox: {shown} was exchanged while it was set up")
            on_ready(child.pid)
            os.write(filter_fd, seccomp)  # less than a pipe holds
            return Launched(child.pid, child_pid, root, pidfd, child, status_fd, status, as_pid_1)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await _end(child, pidfd, root, self._known)
            self._known.discard(child.pid)
            ours.remove(status_fd)
            close_all([status_fd, *(() if pidfd is None else (pidfd,))])
            _remove_strays(plan, began)
            if isinstance(error, OSError):
                raise _failed(os_error_text(error)) from error
            raise
        finally:
            trio.lowlevel.notify_closing(gate)
            close_all([fd for fd in ours if fd != status_fd])

    def spawn(
        self,
        argv: Sequence[str | bytes],
        streams: tuple[int, int, int],
        pass_fds: Sequence[int],
        *,
        cwd: bytes = b"/",
    ) -> tuple[subprocess.Popen[bytes], Root]:
        """Start a child with an empty environment that leads a session, marked as ours and `known`.

        Raises:
            OSError: it could not be started, or not be marked.
        """
        with birthmark() as born:
            child = subprocess.Popen(
                argv,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                cwd=cwd,
                env={},
                pass_fds=pass_fds,
                start_new_session=True,
            )
            self._known.add(child.pid)
            try:
                mark = self._marks.new()
                marked = set_mark(child.pid, mark, born=born)
                return child, Root.of(child.pid, mark if marked else None)
            except OSError:  # no descriptors left to look at it with
                child.kill()
                child.wait()
                self._known.discard(child.pid)
                raise


def _shut_proc(prefix: bytes, as_pid_1: bool) -> Iterator[bytes]:
    """Options against what root may write in /proc by its number alone, without a capability (core_pattern).

    bubblewrap covers some of it only where the directory itself can be written. What is of the process itself
    stays writable: programs that make namespaces need it. What is of process 1, the bubblewrap inside, goes:
    its `exe` leads to a file of the host that is root's, to change its mode or, once its memory was made to
    run something else, its content.
    """
    if os.geteuid() == 0:
        for name in _ROOTS_OF_PROC:
            yield from (b"--ro-bind-try", b"/proc/" + name, prefix + b"/proc/" + name)
        if not as_pid_1:
            first = prefix + b"/proc/1"
            yield from (b"--perms", b"555", b"--tmpfs", first, b"--remount-ro", first)


def _failed(words: str) -> InternalError:
    return InternalError(f"cannot enforce the sandbox: {words or 'bubblewrap ended without a word'}")


def _read_status(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


def _child_pid(status: bytes) -> int | None:
    with suppress(ValueError, LookupError, TypeError):
        return int(json.loads(status.partition(b"\n")[0])["child-pid"])
    return None


def _passed(gate: int) -> bool:
    """Whether bubblewrap took the byte before its end was closed; if it died first, that was a reset."""
    try:
        return os.read(gate, 1) == b""
    except ConnectionResetError:
        return False


async def _words_of(child: subprocess.Popen[bytes], pidfd: int, said: Callable[[], bytes]) -> str:
    with trio.move_on_after(END_PATIENCE):
        await trio.lowlevel.wait_readable(pidfd)
    return " ".join(said().decode(errors="replace").split())


async def _end(child: subprocess.Popen[bytes], pidfd: int | None, root: Root, known: set[int]) -> None:
    # With all it has forked: what is inside dies with it only from some moment on, and waits until then.
    with suppress(OSError):
        await signal_tree(root, known).finish(END_PATIENCE)
    child.send_signal(signal.SIGKILL)
    if pidfd is not None:
        with trio.move_on_after(END_PATIENCE):
            await trio.lowlevel.wait_readable(pidfd)
    with trio.move_on_after(END_PATIENCE):  # what hangs in the kernel is reaped as an orphan, if ever
        while child.poll() is None:  # noqa: ASYNC110 - the kernel is a moment behind it
            await trio.sleep(0.01)


def _look_at_view(child_pid: int, plan: MountPlan, prefix: bytes) -> bytes | None:
    """The first path that is not in the view what the plan says; `None` if all are."""
    root = os.open(f"/proc/{child_pid}/root", os.O_PATH | os.O_DIRECTORY)
    try:
        for operation in plan.operations:
            if isinstance(operation, Bind | Mask) and not _is_as_planned(root, operation, prefix):
                return operation.path
        return None
    finally:
        os.close(root)


def _remove_strays(plan: MountPlan, began: float) -> None:
    """Remove the mount points that bubblewrap has made where an exchanged directory has led it to.

    Where that was is not known, and may change at any moment; so it is looked for a few times, and may not be
    found. What is removed has the name of a mask, came into being just now, and is empty.
    """
    for mask in plan.operations:
        if not isinstance(mask, Mask) or not mask.missing:
            continue
        directory, name = os.path.split(mask.path)
        for place in {os.path.realpath(directory) for _ in range(STRAY_LOOKS)} - {directory}:
            with suppress(OSError):
                parent = open_without_links(place)
                try:
                    found = stat_path(name, follow=False, dir_fd=parent)
                    if found.created_ms is None or found.created_ms < (began - CLOCK_TICK) * 1000:
                        continue
                    if found.is_directory:
                        os.rmdir(name, dir_fd=parent)
                    elif found.is_file and not found.size:
                        os.unlink(name, dir_fd=parent)
                finally:
                    os.close(parent)


def _is_as_planned(root: int, operation: Bind | Mask, prefix: bytes) -> bool:
    path = (prefix + operation.path).lstrip(b"/") or b"."
    try:
        fd = openat2(root, path, os.O_PATH | os.O_NOFOLLOW, _RESOLVE_NO_SYMLINKS | _RESOLVE_IN_ROOT)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES):
            return False
        raise
    mounted = None
    try:
        if fd is not None:
            mounted = is_mount_root(fd)
            found, flags = os.fstat(fd), os.fstatvfs(fd).f_flag
    finally:
        if fd is not None:
            os.close(fd)
    if mounted is None:
        raise _failed("it takes openat2 and what statx says of mounts, which Linux has since 5.8")
    is_it = (found.st_dev, found.st_ino) == (operation.device, operation.inode)
    if isinstance(operation, Bind):
        return mounted and is_it and (operation.writable or bool(flags & os.ST_RDONLY))
    reopens = operation.reopened or operation.reopened_files
    mode = 0o555 if operation.kind == "empty directory" else 0o111 if reopens else 0
    return mounted and not is_it and stat.S_IMODE(found.st_mode) == mode and bool(flags & os.ST_RDONLY)
