"""Waiting for files that are not there yet, by inotify (protocol.md §5.11)."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache

import trio

from execenv.abc import Watch
from execenv.errors import NotSupported
from execenv.local.mounts import Mounts
from execenv.local.threads import run_in_thread
from execenv.local.turn import Turn

MAX_PATHS = 1024

_MODIFY, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_UNMOUNT, _OVERFLOW = 0x2000, 0x4000
_MASK = _MODIFY | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_OF_DIRECTORY = _DELETE_SELF | _MOVE_SELF | _UNMOUNT | _OVERFLOW
_EVENT = struct.Struct("iIII")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class LocalWatch(Watch):
    """Names that are waited for, by the number of the inotify watch on the directory they are in."""

    def __init__(self, fd: int, names: dict[int, set[bytes]]) -> None:
        self._fd = fd
        self._names = names
        self._changed = False

    async def wait(self) -> None:
        while not self._changed:
            try:
                data = os.read(self._fd, 64 * 1024)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
            else:
                self._changed = self._concerns_us(data)
        await trio.lowlevel.checkpoint()

    def _concerns_us(self, data: bytes) -> bool:
        offset = 0
        while offset < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = data[offset : offset + length].rstrip(b"\0")
            offset += length
            if mask & _OF_DIRECTORY or name in self._names.get(number, ()):
                return True
        return False


@asynccontextmanager
async def open_watch(
    missing: Sequence[bytes], present: bytes | None, mounts: Mounts
) -> AsyncIterator[LocalWatch | None]:
    """See `abc.FileSystem.watch_missing`.

    Of a missing path the deepest directory that exists is watched: when the next name on the way appears,
    that is a change, and whoever waits looks anew.

    Raises:
        NotSupported: where there is no inotify.
        OSError: if there are no inotify instances or watches left, or a directory cannot be read.
    """
    if sys.platform != "linux":
        raise NotSupported("this system has no inotify: look again now and then instead")
    if not missing or len(missing) > MAX_PATHS:
        await trio.lowlevel.checkpoint()
        yield None
        return
    fd = _libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise _error()
    try:
        own = os.dup(fd)  # for the thread, which may hang and outlive us
        watch = await run_in_thread(
            mounts.limiter(*missing, *(() if present is None else (present,))),
            lambda turn: _prepare(turn, own, fd, missing, present),
            unused=lambda: os.close(own),
        )
        yield watch
    finally:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)


def _prepare(
    turn: Turn, own: int, fd: int, missing: Sequence[bytes], present: bytes | None
) -> LocalWatch | None:
    names: dict[int, set[bytes]] = {}
    try:
        for path in missing:
            turn.check()
            if not _add(own, path, names):
                return None
        if present is not None:
            present = present.rstrip(b"/") or b"/"
            directory, _, name = present.rpartition(b"/")
            names.setdefault(_watch(own, directory or b"/"), set()).add(name)
        # Looked at last: what came or went before there was a watch is seen here, the rest by the watch.
        if any(map(os.path.lexists, missing)) or (present is not None and not os.path.exists(present)):
            return None
        return LocalWatch(fd, names)
    except (FileNotFoundError, NotADirectoryError):
        return None
    finally:
        os.close(own)


def _add(fd: int, path: bytes, names: dict[int, set[bytes]]) -> bool:
    """Watch for the next name on the way to `path`; false if it is a directory that exists."""
    while True:
        directory, name = _deepest(path)
        if not name:
            return False
        names.setdefault(_watch(fd, directory), set()).add(name)
        if _deepest(path) == (directory, name):  # else the name came just before the watch
            return True


def _deepest(path: bytes) -> tuple[bytes, bytes]:
    """The deepest directory there is on the way to `path`, and the name that follows; empty at the end."""
    directory, name = path.rstrip(b"/") or b"/", b""
    while not os.path.isdir(directory):
        directory, _, name = directory.rpartition(b"/")
        directory = directory or b"/"
    return directory, name


def _watch(fd: int, directory: bytes) -> int:
    number: int = _libc().inotify_add_watch(fd, directory, _MASK)
    if number < 0:
        raise _error(directory)
    return number


def _error(path: bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), None if path is None else os.fsdecode(path))
