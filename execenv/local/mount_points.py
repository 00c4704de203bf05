"""Removes what bubblewrap leaves on the host: an empty mount point for each mask over a missing path.

Who starts a sandboxed process claims these paths before, and releases them after its end (sandbox.md §11.4).
A claim is a file in a directory of the user's, locked for as long as its owner lives; so whoever comes later
can tell what a program left that was killed, and removes it (`MountPoints.sweep`). A mount point is only
removed when no other live claim, of any program, names it: removing a directory that is a mount point
elsewhere succeeds, and takes the mask away there (rmdir(2), since Linux 3.18).

This file is both: the module, and a script that sweeps, which the watchdog runs without the package and
without site-packages. Hence only cheap modules of the standard library are imported.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import sys
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # as in typing, which is not needed to run
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

SWEEP_LIMIT = 10
"""Seconds after which the script gives up."""

PATIENCE = 0.002
"""Seconds to wait for another program that works with the claims, which takes it some 0.1 ms."""

_SUFFIX = ".claim"
_FOR_NOW = frozenset((errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM))
_LOCK = "lock"
_Inode = tuple[int, int]


def registry_directory() -> str:
    """Where the claims of this user are, whether it is there or not.

    It must not be seen in a sandbox: what is claimed there is removed, if it is empty, and its lock can be
    held by who may read it.
    """
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.geteuid()}"):
        with suppress(OSError):
            # Root that came by sudo has the variable of somebody else.
            if os.path.isabs(base) and os.stat(base).st_uid == os.geteuid():
                return os.path.join(base, "execenv")
    # Not TMPDIR: all programs of the user must find the same. Rather /dev/shm than /tmp, which sandboxes are
    # often given to write, while they have a /dev of their own.
    base = next((base for base in ("/dev/shm", "/tmp") if os.access(base, os.W_OK)), "/tmp")  # noqa: S108
    return f"{base}/execenv-{os.geteuid()}"


class _Entry:
    """A path where nothing was when it was claimed, or what an earlier claim had made there.

    `inode` is of what was made there, once it is known; `parent` that of its directory, if there was one.
    """

    __slots__ = ("directory", "inode", "parent", "path")

    def __init__(self, path: bytes, directory: bool, parent: _Inode | None, inode: _Inode | None) -> None:
        self.path = path
        self.directory = directory
        self.parent = parent
        self.inode = inode

    def stands_for(self, path: bytes, inode: _Inode) -> bool:
        return self.path == path and self.inode in (None, inode)


class _Record:
    """A claim's file, as others read it."""

    __slots__ = ("entries", "live", "name")

    def __init__(self, name: str, data: bytes, locked: bool) -> None:
        self.name = name
        self.entries: list[_Entry] = []
        self.live = locked
        # A program that was killed may have left half a line: what it then would have done it has not.
        for line in data.split(b"\n")[:-1]:
            with suppress(ValueError, KeyError, TypeError):
                self._read(json.loads(line))

    def _read(self, line: dict[str, Any]) -> None:
        if "claimed" in line:
            for path, directory, parent, inode in line["claimed"]:
                self.entries.append(
                    _Entry(os.fsencode(path), bool(directory), _inode_of(parent), _inode_of(inode))
                )
        if "created" in line:
            for entry, inode in zip(self.entries, line["created"], strict=True):
                entry.inode = _inode_of(inode)
            if line["pid"] is not None and _started(line["pid"]) == line["started"]:
                self.live = True  # its owner has just been killed, and it is not gone yet


def _inode_of(value: Any) -> _Inode | None:
    return None if value is None else (int(value[0]), int(value[1]))


class Claim:
    """The mount points of one sandboxed process. Made by `MountPoints.claim`."""

    def __init__(self, owner: MountPoints, name: str, fd: int, entries: list[_Entry]) -> None:
        self._owner = owner
        self._name = name
        self._fd = fd
        self._entries = entries

    def created(self, pid: int | None = None) -> None:
        """Note what bubblewrap has made. Call it when the view is set up.

        Args:
            pid: of the outer bubblewrap. While it lives the paths stay claimed, even if this program is
                killed.
        """
        if self._fd < 0:
            return
        for entry in self._entries:
            if entry.inode is None:
                with suppress(OSError):
                    found = os.lstat(entry.path)
                    if _is_empty_one(found, entry):
                        entry.inode = (found.st_dev, found.st_ino)
        started = None if pid is None else _started(pid)
        line = {"created": [entry.inode for entry in self._entries], "pid": pid, "started": started}
        with suppress(OSError):  # no room: then a path is taken for ours by its name and its parent
            _append(self._fd, line)

    def release(self) -> None:
        """Remove what came into being by this claim, is empty, and is in no other live claim.

        Call it when no process is left in the sandbox. May be called again. Never raises for what cannot be
        removed: that stays. What cannot be removed now, as another program works with the claims, is left to
        `MountPoints.settle`.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._owner._unsettled.append((self._name, fd, self._entries))
            self._owner.settle()


class MountPoints:
    """The claims of this user's programs.

    All methods work with files, and wait for other programs that do the same, but not longer than `PATIENCE`
    each: one of them may have been stopped.

    Args:
        directory: of the claims; `registry_directory()` if `None`. Made when it is needed.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._unsettled: list[tuple[str, int, list[_Entry]]] = []

    def close(self) -> None:
        """Let go of what is still unsettled; whoever sweeps next removes it."""
        self.settle()
        while self._unsettled:
            os.close(self._unsettled.pop()[1])

    def settle(self) -> None:
        """Remove what could not be removed when its claim was released."""
        while self._unsettled:
            name, fd, entries = self._unsettled[0]
            try:
                self._release(name, fd, entries)
            except OSError as error:
                if error.errno in _FOR_NOW:
                    return
            del self._unsettled[0]
            os.close(fd)

    def prepare(self) -> tuple[bytes, ...]:
        """Make the directory, before anything in a sandbox could, and remove what killed programs left.

        Where it is: no sandbox may see it.

        Raises:
            OSError: there is none that is this user's alone.
        """
        os.close(self._open(create=True))
        with suppress(BlockingIOError):  # then others do it, or we do when we are started again
            self.sweep()
        return (os.fsencode(registry_directory() if self._directory is None else self._directory),)

    def claim(self, paths: Iterable[tuple[bytes, bool]]) -> Claim:
        """Say that mount points will be made at these paths. Call it before the process is started.

        Name every path that something is mounted over in the sandbox and that may be missing, those too at
        which there is something empty: it may be there only for another sandbox. What was there before, and
        by no claim, is left alone.

        Args:
            paths: absolute ones without symlinks, and whether each is to be a directory; otherwise it is a
                file. Missing directories above them are claimed too.

        Raises:
            BlockingIOError: another program works with the claims.
            OSError: there is no directory for claims that is this user's alone, or no room in it.
        """
        self.settle()
        wanted = list(paths)
        if not wanted:
            return Claim(self, "", -1, [])
        with self._locked(create=True) as dir_fd:
            others = list(self._records(dir_fd))
            entries: dict[bytes, _Entry] = {}
            for path, directory in wanted:
                _add_entries(entries, path, directory, others)
            if not entries:
                return Claim(self, "", -1, [])
            name = f"{os.getpid()}-{os.urandom(8).hex()}{_SUFFIX}"
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                claimed = [(os.fsdecode(e.path), e.directory, e.parent, e.inode) for e in entries.values()]
                _append(fd, {"claimed": claimed})
            except BaseException:
                os.unlink(name, dir_fd=dir_fd)
                os.close(fd)
                raise
            return Claim(self, name, fd, list(entries.values()))

    def sweep(self, patience: float = PATIENCE) -> None:
        """Remove what programs left that were killed.

        Raises:
            BlockingIOError: another program works with the claims for longer than `patience`.
            OSError: the directory of the claims is not this user's alone.
        """
        try:
            with self._locked(create=False, patience=patience) as dir_fd:
                records = list(self._records(dir_fd))
                live = {entry.path for record in records if record.live for entry in record.entries}
                for record in records:
                    if not record.live:
                        _remove(record.entries, live)
                        os.unlink(record.name, dir_fd=dir_fd)
        except FileNotFoundError:
            pass

    def _release(self, name: str, fd: int, entries: list[_Entry]) -> None:
        with self._locked(create=False) as dir_fd:
            ours, found = os.fstat(fd), os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino):
                others = [record for record in self._records(dir_fd) if record.name != name]
                _remove(entries, {entry.path for record in others if record.live for entry in record.entries})
                os.unlink(name, dir_fd=dir_fd)
            # Else somebody has emptied the directory, and who else claims these paths is not known.

    @contextmanager
    def _locked(self, *, create: bool, patience: float = PATIENCE) -> Iterator[int]:
        dir_fd = self._open(create=create)
        lock = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(_LOCK, flags, 0o600, dir_fd=dir_fd)
            _lock(lock, patience)
            yield dir_fd
        finally:
            if lock >= 0:
                os.close(lock)
            os.close(dir_fd)

    def _open(self, *, create: bool) -> int:
        path = registry_directory() if self._directory is None else self._directory
        if create:
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
        dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(dir_fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            os.close(dir_fd)
            raise PermissionError(
                errno.EPERM, "is not this user's alone: remove it, or chmod go= if it is", path
            )
        return dir_fd

    def _records(self, dir_fd: int) -> Iterator[_Record]:
        for name in os.listdir(dir_fd):
            if name.endswith(_SUFFIX):
                with suppress(FileNotFoundError):
                    yield _read_record(dir_fd, name)


def _lock(fd: int, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.0001)


def _read_record(dir_fd: int, name: str) -> _Record:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        try:
            # Another one than the owner's even in the same program: locks are of the open file (flock(2)).
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = False
        except BlockingIOError:
            locked = True
        data = b""
        while part := os.read(fd, 64 * 1024):
            data += part
        return _Record(name, data, locked)
    finally:
        os.close(fd)


def _append(fd: int, line: dict[str, Any]) -> None:
    view = memoryview(json.dumps(line).encode() + b"\n")
    while view:
        view = view[os.write(fd, view) :]


def _add_entries(entries: dict[bytes, _Entry], path: bytes, directory: bool, others: list[_Record]) -> None:
    """The path, and the directories above it, unless they were there by no claim."""
    while path not in entries:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            inode = None
        except OSError:
            return  # behind a file, or out of reach: bubblewrap makes nothing there
        else:
            inode = (found.st_dev, found.st_ino)
            if not any(entry.stands_for(path, inode) for other in others for entry in other.entries):
                return
        above = os.path.dirname(path)
        entries[path] = _Entry(path, directory, _identify(above), inode)
        path, directory = above, True


def _identify(path: bytes) -> _Inode | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_empty_one(found: os.stat_result, entry: _Entry) -> bool:
    if found.st_uid != os.geteuid():
        return False
    if entry.directory:
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISREG(found.st_mode) and found.st_size == 0 and found.st_nlink == 1


def _remove(entries: Iterable[_Entry], live: set[bytes]) -> None:
    for entry in sorted(entries, key=lambda entry: -len(entry.path)):  # what is below comes first
        if entry.path not in live:
            with suppress(OSError):  # not empty, not there any more, read-only
                _remove_one(entry)


def _remove_one(entry: _Entry) -> None:
    above, name = os.path.split(entry.path)
    parent = open_without_links(above)
    try:
        directory = os.fstat(parent)
        if entry.parent not in (None, (directory.st_dev, directory.st_ino)):
            return
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not _is_empty_one(found, entry) or entry.inode not in (None, (found.st_dev, found.st_ino)):
            return
        if entry.directory:
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(parent)


def open_without_links(path: bytes) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(b"/", flags)
    for name in path.split(b"/"):
        if name:
            try:
                below = os.open(name, flags, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
    return fd


def _started(pid: int) -> int | None:
    """When the process was started, in ticks since the boot; `None` if there is none, or only a zombie."""
    try:
        with open(f"/proc/{int(pid)}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


if __name__ == "__main__":
    signal.alarm(SWEEP_LIMIT)
    MountPoints(sys.argv[1] if len(sys.argv) > 1 else None).sweep(SWEEP_LIMIT)
