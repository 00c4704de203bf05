"""Which files can be worked with without waiting for anybody but a disk of this machine (Linux).

Looking up a path may wait for a network or a FUSE server for ever, and no flag of `open` prevents it. Two
things of Linux together do: `openat2` with `RESOLVE_CACHED` follows a path only as far as the kernel has it
in its cache, and fails with EAGAIN where it would have to ask; and `statx` says, without asking, on which
mount the file is. What is in the cache and on a file system of this machine is handled at once, everything
else in a thread.

Nothing else is assumed. Where these calls are missing (another system, an older kernel, a strict seccomp
filter), everything goes to threads: slower, and the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import sys
from functools import cache

import trio

from execenv.local.stat import libc, stat_now

LOCAL_TYPES = frozenset(
    b"""bcachefs btrfs devtmpfs erofs exfat ext2 ext3 ext4 f2fs hfsplus iso9660 jfs ntfs3 overlay ramfs
    reiserfs squashfs tmpfs udf vfat xfs zfs""".split()
)
"""File systems that wait for nothing but a disk of this machine."""

_MOUNTINFO = "/proc/self/mountinfo"
_THREADS_LOCAL = 40
_THREADS_UNCERTAIN = 40
_THREADS_DEEP = 16
_THREADS_ELSEWHERE = 8

_SYS_OPENAT2 = 437
_AT_FDCWD = -100
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_CACHED = 0x20
_UNDECIDED = frozenset(
    (errno.EAGAIN, errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG, errno.EXDEV, errno.EINTR)
)


@cache
def _how(flags: int, mode: int, resolve: int) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, resolve)


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int | None:
    """A descriptor; `None` if it cannot be had under the rules of `resolve`, or there is no such call."""
    library = libc()
    if library is None:
        return None
    fd: int = library.syscall(_SYS_OPENAT2, dir_fd, path, _how(flags, mode, resolve), 24)
    if fd >= 0:
        return fd
    number = ctypes.get_errno()
    if number in _UNDECIDED:
        return None
    raise OSError(number, os.strerror(number), path)


class Mounts:
    """The mounts of this machine: which are its own, and how many threads may wait for each.

    A dead mount takes the threads of its own limiter and no others.
    """

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self._fd = -1
        self._local_ids: frozenset[int] = frozenset()
        self._local_devices: frozenset[int] = frozenset()
        self._points: list[tuple[bytes, bool]] = []
        self._limiters: dict[bytes, trio.CapacityLimiter] = {}
        self._local_limiter = trio.CapacityLimiter(_THREADS_LOCAL)
        self._uncertain_limiter = trio.CapacityLimiter(_THREADS_UNCERTAIN)
        self._deep_limiter = trio.CapacityLimiter(_THREADS_DEEP)
        if sys.platform == "linux":
            try:
                self._fd = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLPRI | select.POLLERR)
            self._read()

    def close(self) -> None:
        self._poll = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def is_local(self, mount_id: int | None) -> bool:
        """Whether files of this mount wait for nothing but this machine."""
        self._refresh()
        return mount_id in self._local_ids

    def is_local_device(self, device: int) -> bool:
        """The same for a file that was opened in another mount namespace, by its `st_dev`.

        Some file systems give their files other numbers than they are mounted under: those don't count.
        """
        self._refresh()
        return device in self._local_devices

    def open_now(self, path: bytes, flags: int, mode: int = 0) -> int | None:
        """`os.open` of what is on a file system of this machine; `None` if that is not certain.

        With O_CREAT, or where the kernel does not have the name in its cache yet, a symlink at the end of
        the path is not certain either, unless `flags` have O_PATH and O_NOFOLLOW.

        Raises:
            OSError: why it cannot be opened.
        """
        if not flags & os.O_CREAT:
            fd = openat2(_AT_FDCWD, path, flags, _RESOLVE_CACHED)
            if fd is not None:
                return fd
        directory, _, name = path.rpartition(b"/")
        if not name:
            return None
        parent = openat2(_AT_FDCWD, directory or b"/", os.O_PATH | os.O_DIRECTORY, _RESOLVE_CACHED)
        if parent is None:
            return None
        try:
            found = stat_now(parent)
            if found is None or not self.is_local(found.mount_id):
                return None
            # Only the disk is asked now: the name is in this directory, and of this mount or refused.
            fd = openat2(parent, name, flags | os.O_NOFOLLOW, _RESOLVE_NO_XDEV, mode)
            if fd is not None and flags & (os.O_PATH | os.O_NOFOLLOW) == os.O_PATH:
                found = stat_now(fd)  # with O_PATH a link itself is opened, and not refused
                if found is None or found.is_symlink:
                    os.close(fd)
                    return None
            return fd
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
        finally:
            os.close(parent)

    def limiter(self, *paths: bytes, deep: bool = False) -> trio.CapacityLimiter:
        """For a thread that works with `paths`.

        Args:
            deep: it looks at what is below them too, where anything may be mounted.
        """
        self._refresh()
        for path in paths:
            for point, local in self._points:
                if path == point or path.startswith(point + b"/") or point == b"/":
                    if not local:
                        return self._limiters.setdefault(point, trio.CapacityLimiter(_THREADS_ELSEWHERE))
                    break
        if deep:
            return self._deep_limiter
        # A link may lead to another mount than the text says.
        return self._local_limiter if all(map(self._leads_to_local, paths)) else self._uncertain_limiter

    def _leads_to_local(self, path: bytes) -> bool:
        try:
            fd = self.open_now(path, os.O_PATH)
            if fd is None:
                return False
            try:
                found = stat_now(fd)
            finally:
                os.close(fd)
        except OSError:
            return True  # nothing had to be asked to know that it fails
        return found is not None and self.is_local(found.mount_id)

    def _refresh(self) -> None:
        # The kernel marks the file when a mount comes or goes (proc(5)).
        if self._poll is not None and self._poll.poll(0):
            self._read()

    def _read(self) -> None:
        data = b""
        while part := os.pread(self._fd, 64 * 1024, len(data)):
            data += part
        points: dict[bytes, bool] = {}
        local_ids = set()
        devices: dict[int, bool] = {}
        for line in data.split(b"\n")[:-1]:  # not at a carriage return, which a name may hold
            fields, _, rest = line.partition(b" - ")
            words = fields.split(b" ")
            local = rest.split(b" ", 1)[0] in LOCAL_TYPES
            points[_unescaped(words[4])] = local  # the last one covers those before it
            major, _, minor = words[2].partition(b":")
            devices[os.makedev(int(major), int(minor))] = local
            if local:
                local_ids.add(int(words[0]))
        self._local_ids = frozenset(local_ids)
        self._local_devices = frozenset(device for device, local in devices.items() if local)
        self._points = sorted(points.items(), key=lambda item: -len(item[0]))
        self._limiters = {
            point: limiter for point, limiter in self._limiters.items() if points.get(point) is False
        }


def _unescaped(text: bytes) -> bytes:
    """A path of mountinfo, where blanks and backslashes are octal."""
    head, *rest = text.split(b"\\")
    return head + b"".join(bytes((int(part[:3], 8),)) + part[3:] for part in rest)
