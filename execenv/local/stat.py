"""What is at a path, as `statx` says it. Imports little: the helper of a sandbox has this too."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from functools import cache

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF
_STATX_BTIME = 0x800
_STATX_MNT_ID = 0x1000
_ATTR_MOUNT_ROOT = 0x2000
_STATX_SIZE = 256
_PROC_MAGIC = 0x9FA0  # linux/magic.h
_STATX = struct.Struct("=I24xHxxQQ32xqI20xqI12xIIQ")
"""Mask, mode, inode, size, time of creation, time of the last change, device, mount (struct statx of
statx(2))."""


class Stat:
    """What `statx` said.

    Attributes:
        mount_id: `None` where the kernel doesn't say.
        created_ms: `None` where the file system does not know.
    """

    __slots__ = ("created_ms", "device", "inode", "mode", "modified_ms", "mount_id", "size")

    def __init__(
        self,
        mode: int,
        size: int,
        inode: int,
        device: int,
        mount_id: int | None,
        created_ms: int | None,
        modified_ms: int,
    ) -> None:
        self.mode = mode
        self.size = size
        self.inode = inode
        self.device = device
        self.mount_id = mount_id
        self.created_ms = created_ms
        self.modified_ms = modified_ms

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)


@cache
def libc() -> ctypes.CDLL | None:
    """The C library, for calls that Python has not; `None` where they are others anyway."""
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@cache
def _has_statx() -> bool:
    return hasattr(libc(), "statx")


def stat_now(fd: int) -> Stat | None:
    """What the kernel knows of an open file without asking anybody; `None` if there is no such call."""
    return _statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC)


def stat_path(path: bytes, *, follow: bool = True, dir_fd: int | None = None) -> Stat:
    """`os.stat` with the time of creation, where the kernel has it. May wait."""
    flags = 0 if follow else _AT_SYMLINK_NOFOLLOW
    found = _statx(_AT_FDCWD if dir_fd is None else dir_fd, path, flags)
    if found is not None:
        return found
    plain = os.stat(path, dir_fd=dir_fd, follow_symlinks=follow)
    born = getattr(plain, "st_birthtime", None)  # macOS
    return Stat(
        plain.st_mode,
        plain.st_size,
        plain.st_ino,
        plain.st_dev,
        None,
        None if born is None else int(born * 1000),
        plain.st_mtime_ns // 1_000_000,
    )


def is_mount_root(fd: int) -> bool | None:
    """Whether something is mounted where an open file is; `None` if the kernel does not say (before 5.8)."""
    library = libc()
    if library is None or not _has_statx():
        return None
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if library.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, buffer):
        return None
    attributes, _, known = struct.unpack_from("=8xQ40sQ", buffer)
    return bool(attributes & _ATTR_MOUNT_ROOT) if known & _ATTR_MOUNT_ROOT else None


def is_on_proc(fd: int) -> bool:
    """Whether an open file is one of the kernel's about processes.

    Raises:
        OSError: the kernel does not say.
    """
    return sys.platform == "linux" and magic_of(fd) == _PROC_MAGIC


def magic_of(fd: int) -> int:
    """The kind of file system that an open file is on, as statfs(2) has it.

    Raises:
        OSError: the kernel does not say.
    """
    library = libc()
    buffer = (ctypes.c_long * 32)()
    if library is None or library.fstatfs(fd, buffer):
        number = ctypes.get_errno() or errno.ENOSYS
        raise OSError(number, os.strerror(number))
    return buffer[0]


def _statx(fd: int, path: bytes, flags: int) -> Stat | None:
    library = libc()
    if library is None or not _has_statx():
        return None
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if library.statx(fd, path, flags, _STATX_BASIC_STATS | _STATX_BTIME | _STATX_MNT_ID, buffer):
        number = ctypes.get_errno()
        if number in (errno.ENOSYS, errno.EPERM) and flags & _AT_EMPTY_PATH:
            return None
        raise OSError(number, os.strerror(number), path)
    mask, mode, inode, size, born, born_ns, modified, modified_ns, major, minor, mount_id = (
        _STATX.unpack_from(buffer)
    )
    return Stat(
        mode,
        size,
        inode,
        os.makedev(major, minor),
        mount_id if mask & _STATX_MNT_ID else None,
        born * 1000 + born_ns // 1_000_000 if mask & _STATX_BTIME else None,
        modified * 1000 + modified_ns // 1_000_000,
    )
