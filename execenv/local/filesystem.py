"""The files of this machine.

What waits for nothing but a local disk is done at once, on the Trio thread (`x_nowait`, see `mounts`): a
thread costs five times what the call itself does. Everything else, and whatever may take long, runs in a
thread.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypedDict, TypeVar

import trio

from execenv.abc import FileHandle, FileSystem, Watch
from execenv.errors import NotSupported, file_error, os_error_text
from execenv.local import disk
from execenv.local.mounts import Mounts
from execenv.local.stat import Stat, stat_now
from execenv.local.threads import run_in_thread
from execenv.local.turn import Turn
from execenv.local.watch import open_watch
from execenv.paths import PathUri
from execenv.protocol import (
    DirectoryEntry,
    FileMetadata,
    OpenMode,
    WalkEntry,
    WalkError,
    WalkOptions,
    WalkResult,
)
from execenv.sandbox.policy import Sandbox

if TYPE_CHECKING:
    from execenv.local.confinement import Confinement

P = ParamSpec("P")
T = TypeVar("T")

QUICK_BYTES = 1024 * 1024
"""Files up to this size are read and written without a thread."""

FIFO_RETRY = 0.05
"""Seconds between two looks for somebody who reads a fifo: the kernel tells of it nowhere."""

FIFO_LONGEST_RETRY = 0.5
"""The same when nobody has come for a while."""

CLOSE_PATIENCE = 5.0
"""Seconds for closing a file on another mount, also when the caller is cancelled."""

PATH_MAX = 4096  # with the NUL at its end; linux/limits.h

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_WRITE = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY


class LocalFileSystem(FileSystem):
    """Files without limits, and the way to those under a sandbox.

    Args:
        confinement: what enforces sandboxes; `None` where there can be none.
    """

    def __init__(self, mounts: Mounts, confinement: Callable[[], Confinement] | None = None) -> None:
        self._mounts = mounts
        self._confinement = confinement

    def confined(self, sandbox: Sandbox) -> FileSystem:
        from execenv.local.confined import ConfinedFileSystem
        from execenv.sandbox.plan import execution

        if execution(sandbox) == "direct":
            return self
        if self._confinement is None:
            return super().confined(sandbox)
        made = self._confinement()
        return ConfinedFileSystem(self, sandbox, self._mounts, made.plans, made.helpers)

    async def read_file(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes:
        data = self.read_file_nowait(path) if follow_symlinks else None
        if data is None:
            return await self._run(disk.read_file, path, follow=follow_symlinks)
        await trio.lowlevel.checkpoint()
        return data

    async def read_small(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return self.read_file_nowait(path) if follow_symlinks else None

    async def write_file(self, path: PathUri, data: bytes, *, follow_symlinks: bool = True) -> None:
        if follow_symlinks and self.write_file_nowait(path, data):
            await trio.lowlevel.checkpoint()
            return
        pause = FIFO_RETRY
        while True:
            try:
                special = await self._run(disk.write_file, path, data, follow=follow_symlinks)
                break
            except OSError as error:
                if error.errno != errno.ENXIO or not await self._run(disk.is_fifo, path):
                    raise
            await trio.sleep(pause)
            pause = min(2 * pause, FIFO_LONGEST_RETRY)
            while (special := self._open_fifo(path)) is None:  # without a thread: thousands may wait
                await trio.sleep(pause)
                pause = min(2 * pause, FIFO_LONGEST_RETRY)
            if special >= 0:
                break
        if special is not None:
            try:
                await self._write_special(path, special, data)
            finally:
                os.close(special)

    def _open_fifo(self, path: PathUri) -> int | None:
        """What nobody read a moment ago; `None` if that is still so, -1 if it must be looked at anew."""
        try:
            fd = self._mounts.open_now(native_path(path), _WRITE)
        except OSError as error:
            return None if error.errno == errno.ENXIO else -1
        if fd is not None and stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return -1
        return -1 if fd is None else fd

    async def _write_special(self, path: PathUri, fd: int, data: bytes) -> None:
        """Write to a fifo or a device, as fast as it takes it."""
        left = memoryview(data)
        try:
            while left:
                try:
                    left = left[os.write(fd, left[:QUICK_BYTES]) :]
                    await trio.lowlevel.checkpoint()
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(fd)
        except OSError as error:
            raise named_error(error, path) from None

    async def create_directory(
        self, path: PathUri, *, recursive: bool = True, follow_symlinks: bool = True
    ) -> None:
        await self._run(disk.create_directory, path, recursive=recursive, follow=follow_symlinks)

    async def get_metadata(self, path: PathUri, *, follow_symlinks: bool = True) -> FileMetadata:
        found = self.get_metadata_nowait(path) if follow_symlinks else None
        if found is None:
            return await self._run(_get_metadata, path, follow=follow_symlinks)
        await trio.lowlevel.checkpoint()
        return found

    async def canonicalize(self, path: PathUri) -> PathUri:
        return PathUri.from_native(await self._run(disk.canonicalize, path))

    async def read_directory(self, path: PathUri) -> tuple[DirectoryEntry, ...]:
        limiter = self._mounts.limiter(native_path(path), deep=True)
        return await self._run_in(limiter, _read_directory, path)

    async def remove(
        self, path: PathUri, *, recursive: bool = True, force: bool = True, follow_symlinks: bool = True
    ) -> None:
        limiter = self._mounts.limiter(native_path(path), deep=recursive)
        await self._run_in(
            limiter, disk.remove, path, recursive=recursive, force=force, follow=follow_symlinks
        )

    async def copy(self, source: PathUri, destination: PathUri, *, recursive: bool) -> None:
        native = native_path(destination)
        limiter = self._mounts.limiter(native_path(source), native, deep=recursive)
        special = await self._run_in(limiter, disk.copy, source, native, recursive=recursive)
        if special is None:
            return
        try:
            reader = await self.open(source)
            try:
                async with aclosing(reader.read_blocks()) as blocks:
                    async for block in blocks:
                        await self._write_special(source, special, block)
            finally:
                await reader.close()
        finally:
            os.close(special)

    async def walk(self, path: PathUri, options: WalkOptions) -> WalkResult:
        limiter = self._mounts.limiter(native_path(path), deep=True)
        return await self._run_in(limiter, _walk, path, options)

    async def open(
        self, path: PathUri, mode: OpenMode = "read", *, follow_symlinks: bool = True
    ) -> FileHandle:
        if not follow_symlinks and mode != "read":
            raise NotSupported("links are always followed where a file is written in blocks")
        await trio.lowlevel.checkpoint_if_cancelled()  # not behind it: the handle would be lost
        handle = self.open_nowait(path, mode) if follow_symlinks else None
        if handle is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return handle
        if mode == "read":
            fd = await self._run(disk.open_to_read, path, follow=follow_symlinks)
        else:
            fd = await self._run(disk.open_to_write, path, keep=mode == "update")
        return LocalFileHandle(fd, path, self._mounts.limiter(native_path(path)), quick=False)

    @asynccontextmanager
    async def watch_missing(
        self, missing: tuple[PathUri, ...], present: PathUri | None = None
    ) -> AsyncIterator[Watch | None]:
        natives = [native_path(path) for path in missing]
        there = None if present is None else native_path(present)
        async with open_watch(natives, there, self._mounts) as watch:
            yield watch

    async def rename(self, source: PathUri, destination: PathUri, *, sync: bool = False) -> None:
        native = native_path(destination)
        limiter = self._mounts.limiter(native_path(source), native)
        await self._run_in(limiter, disk.rename, source, native, sync=sync)

    async def can_transfer(self) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def set_metadata(
        self, path: PathUri, *, mode: int | None = None, modified_at_ms: int | None = None
    ) -> None:
        bits = None if mode is None else stat.S_IMODE(mode)
        await self._run(disk.set_metadata, path, bits, modified_at_ms)

    async def _run(
        self, work: Callable[Concatenate[Turn, bytes, P], T], path: PathUri, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        limiter = self._mounts.limiter(native_path(path))
        return await self._run_in(limiter, work, path, *args, **kwargs)

    async def _run_in(
        self,
        limiter: trio.CapacityLimiter,
        work: Callable[Concatenate[Turn, bytes, P], T],
        path: PathUri,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        native = native_path(path)
        try:
            return await run_in_thread(limiter, lambda turn: work(turn, native, *args, **kwargs))
        except OSError as error:
            raise named_error(error, path) from None

    # For sandboxes that leave reading alone.

    async def read_unless_proc(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes | None:
        """As `read_file`; `None` for the kernel's files about processes, which here are about us."""
        data = self.read_file_nowait(path) if follow_symlinks else None
        if data is None:
            return await self._run(disk.read_unless_proc, path, follow=follow_symlinks)
        await trio.lowlevel.checkpoint()
        return data

    async def open_unless_proc(
        self, path: PathUri, *, follow_symlinks: bool = True
    ) -> LocalFileHandle | None:
        """As `open`, for reading; `None` as in `read_unless_proc`."""
        await trio.lowlevel.checkpoint_if_cancelled()  # not behind it: the handle would be lost
        handle = self.open_nowait(path, "read") if follow_symlinks else None
        if handle is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return handle
        fd = await self._run(disk.open_unless_proc, path, follow=follow_symlinks)
        if fd is None:
            return None
        return LocalFileHandle(fd, path, self._mounts.limiter(native_path(path)), quick=False)

    # At once.

    def get_metadata_nowait(self, path: PathUri) -> FileMetadata | None:
        native = native_path(path)
        try:
            found = self._look(native, os.O_NOFOLLOW)
            is_symlink = found is not None and found.is_symlink
            if is_symlink:
                found = self._look(native, 0)
            return None if found is None else metadata_of(found, is_symlink=is_symlink)
        except OSError as error:
            raise named_error(error, path) from None

    def read_file_nowait(self, path: PathUri) -> bytes | None:
        native = native_path(path)
        try:
            found = self._look(native, 0)
            if found is None:
                return None
            if not found.is_file:
                raise disk.not_a_file(native, directory=found.is_directory)
            if found.size > QUICK_BYTES:
                return None
            fd = self._open_same(native, _READ, found)
            if fd is None:
                return None
            try:
                data = os.pread(fd, found.size + 1, 0)
            finally:
                os.close(fd)
            return data if len(data) <= found.size else None  # it is growing
        except OSError as error:
            raise named_error(error, path) from None

    def write_file_nowait(self, path: PathUri, data: bytes) -> bool:
        if len(data) > QUICK_BYTES:
            return False
        native = native_path(path)
        try:
            fd = self._open_to_write(native)
            if fd is None:
                return False
            try:
                disk.overwrite(Turn(), fd, data)
            finally:
                os.close(fd)
            return True
        except OSError as error:
            raise named_error(error, path) from None

    def open_nowait(self, path: PathUri, mode: OpenMode) -> LocalFileHandle | None:
        native = native_path(path)
        try:
            if mode == "read":
                found = self._look(native, 0)
                if found is not None and not found.is_file:
                    raise disk.not_a_file(native, directory=found.is_directory)
                fd = None if found is None else self._open_same(native, _READ, found)
            else:
                fd = self._open_to_write(native, refuse_directory=True)
                if fd is not None and mode == "replace":
                    disk.empty(fd)
        except OSError as error:
            raise named_error(error, path) from None
        if fd is None:
            return None
        return LocalFileHandle(fd, path, self._mounts.limiter(native), quick=True)

    def _look(self, native: bytes, flags: int) -> Stat | None:
        """What is there; `None` if it cannot be known at once, or is on no file system of this machine."""
        fd = self._mounts.open_now(native, os.O_PATH | flags)
        if fd is None:
            return None
        try:
            found = stat_now(fd)
        finally:
            os.close(fd)
        return found if found is not None and self._mounts.is_local(found.mount_id) else None

    def _open_same(self, native: bytes, flags: int, found: Stat) -> int | None:
        """Open the regular file that was found there; `None` if it is another by now."""
        fd = self._mounts.open_now(native, flags)
        if fd is not None:
            same = os.fstat(fd)
            if (same.st_dev, same.st_ino) != (found.device, found.inode):
                os.close(fd)
                return None
        return fd

    def _open_to_write(self, native: bytes, *, refuse_directory: bool = False) -> int | None:
        """A regular file, created if need be; `None` if it is something that may have to be waited for."""
        try:
            found = self._look(native, 0)
        except FileNotFoundError:
            fd = self._mounts.open_now(native, _WRITE | os.O_CREAT, 0o666)
            if fd is not None and not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                return None
            return fd
        if found is None:
            return None
        if refuse_directory and not found.is_file:
            raise disk.not_a_file(native, directory=found.is_directory)
        if not found.is_file and not found.is_directory:
            return None
        return self._open_same(native, _WRITE, found)


class LocalFileHandle(FileHandle):
    """Owns a descriptor of a regular file. `quick`: it is on a disk of this machine."""

    def __init__(self, fd: int, path: PathUri, limiter: trio.CapacityLimiter, *, quick: bool) -> None:
        self._fd = fd
        self._path = path
        self._limiter = limiter
        self._quick = quick
        self._closed = False
        self._lock = threading.Lock()  # between closing it and a thread that makes a descriptor of its own

    def read_nowait(self, offset: int, size: int) -> bytes | None:
        if not self._quick or size > QUICK_BYTES:
            return None
        self._check(offset)
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise named_error(error, self._path) from None

    def write_nowait(self, offset: int, data: bytes) -> bool:
        if not self._quick or len(data) > QUICK_BYTES:
            return False
        self._check(offset)
        try:
            disk.write_at(Turn(), self._fd, offset, data)
        except OSError as error:
            raise named_error(error, self._path) from None
        return True

    async def read(self, offset: int, size: int) -> bytes:
        data = self.read_nowait(offset, size)
        if data is not None:
            await trio.lowlevel.checkpoint()
            return data
        self._check(offset)
        return await self._run(disk.read_at, offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        if self.write_nowait(offset, data):
            await trio.lowlevel.checkpoint()
            return
        self._check(offset)
        await self._run(disk.write_at, offset, data)

    def close_nowait(self) -> bool:
        if self._quick and not self._closed:
            os.close(self._taken())
        return self._closed

    def _taken(self) -> int:
        with self._lock:
            self._closed = True
            return self._fd

    async def close(self, *, sync: bool = False) -> None:
        try:
            if sync and not self._closed:
                await self._run(disk.sync)
        finally:
            if not self.close_nowait():  # on other mounts, closing may write what was not written yet
                await self._close_in_thread(self._taken())
            await trio.lowlevel.checkpoint()

    async def _close_in_thread(self, fd: int) -> None:
        # In a thread of its own, whatever else hangs on that mount: closing may hang there too, so it is
        # never done on the Trio thread, and not given up before it has begun.
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_PATIENCE):
                await trio.to_thread.run_sync(
                    os.close, fd, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
                )
        except OSError as error:
            raise named_error(error, self._path) from None

    def _check(self, offset: int) -> None:
        if self._closed:
            raise file_error(errno.EBADF, self._path)
        if offset >= 2**63:
            raise file_error(errno.EINVAL, self._path)

    async def _run(
        self, work: Callable[Concatenate[Turn, int, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """With a descriptor of its own: a thread that hangs keeps it, whoever closes ours meanwhile."""

        def with_fd(turn: Turn) -> T:
            with self._lock:
                if self._closed:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                fd = os.dup(self._fd)
            try:
                return work(turn, fd, *args, **kwargs)
            finally:
                os.close(fd)

        try:
            return await run_in_thread(self._limiter, with_fd)
        except OSError as error:
            raise named_error(error, self._path) from None


# What `disk` found, as the protocol has it. Listings may be long: in threads.


def metadata_of(found: Stat, *, is_symlink: bool) -> FileMetadata:
    return FileMetadata(
        is_directory=found.is_directory,
        is_file=found.is_file,
        is_symlink=is_symlink,
        size=found.size,
        created_at_ms=found.created_ms or 0,
        modified_at_ms=found.modified_ms,
        mode=stat.S_IMODE(found.mode),
    )


def directory_entries(found: Iterable[tuple[bytes, bool, bool]]) -> tuple[DirectoryEntry, ...]:
    entries = [
        DirectoryEntry(name.decode(errors="replace"), is_directory, is_file)
        for name, is_directory, is_file in found
    ]
    return tuple(entries)


def walk_result(
    entries: Iterable[tuple[bytes, bool]], errors: Iterable[tuple[bytes, int]], truncated: bool
) -> WalkResult:
    return WalkResult(
        tuple(
            WalkEntry(PathUri.from_native(path), "directory" if is_directory else "file")
            for path, is_directory in entries
        ),
        tuple(
            WalkError(PathUri.from_native(path), os_error_text(OSError(number, "")))
            for path, number in errors
        ),
        truncated,
    )


def _get_metadata(turn: Turn, path: bytes, *, follow: bool) -> FileMetadata:
    found, is_symlink = disk.get_metadata(turn, path, follow=follow)
    return metadata_of(found, is_symlink=is_symlink)


def _read_directory(turn: Turn, path: bytes) -> tuple[DirectoryEntry, ...]:
    return directory_entries(disk.read_directory(turn, path))


def _walk(turn: Turn, path: bytes, options: WalkOptions) -> WalkResult:
    found = disk.walk(turn, path, **walk_limits(options))
    return walk_result(found.entries, found.errors, found.truncated)


class WalkLimits(TypedDict):
    """The options of a walk, as `disk` takes them."""

    max_depth: int
    max_directories: int
    max_entries: int
    follow_directories: bool
    prune_hidden: bool


def walk_limits(options: WalkOptions) -> WalkLimits:
    return WalkLimits(
        max_depth=options.max_depth,
        max_directories=options.max_directories,
        max_entries=options.max_entries,
        follow_directories=options.follow_directory_symlinks,
        prune_hidden=options.prune_hidden_directories,
    )


def native_path(path: PathUri) -> bytes:
    """The path here. One that no call takes is refused here; some work would look at it for long."""
    native = path.to_native()
    if len(native) >= PATH_MAX:
        raise file_error(errno.ENAMETOOLONG, path)
    return native


def named_error(error: OSError, path: PathUri) -> OSError:
    """The same error with the path that the caller gave; descriptors and parents mean nothing to it."""
    return file_error(error.errno or errno.EIO, path, error.strerror)
