"""File operations that block: plain functions over native paths, run in threads (§5 of protocol.md).

Each takes the `Turn` of its call, which it asks between steps whether anybody still waits. Errors are those
of the system; where the protocol has words of its own for one, they are its `strerror`.

The helper of a sandbox runs the same functions. So they import little, and give plain tuples; and what makes
a name come into being goes through `names`, which the helper exchanges.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from collections import deque
from contextlib import contextmanager, suppress

from execenv.local.stat import Stat, is_on_proc, stat_path
from execenv.local.turn import Turn

TYPE_CHECKING = False  # typing would take as long to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_WALK_ENTRIES = 80_000
"""Entries of one walk, whatever its options say: what fits into a message that a peer will parse (§2.1)."""

STEP = 1024 * 1024
CHECK_INTERVAL = 0.1
"""Seconds between two looks whether anybody still waits, while a device takes nothing."""

_LOOKED = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_WRITTEN = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Names:
    """The calls by which a name comes into being."""

    def open(self, path: bytes, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        """Open a file, created if need be."""
        return os.open(path, flags, mode, dir_fd=dir_fd)

    def mkdir(self, path: bytes, *, dir_fd: int | None = None, recursive: bool = False) -> None:
        """Make a directory. `recursive`: one that is there already will do."""
        os.mkdir(path, dir_fd=dir_fd)

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, path)

    def replace(self, source: bytes, destination: bytes) -> None:
        os.replace(source, destination)


names = Names()


def use_names(other: Names) -> None:
    """Make names in another way from now on."""
    global names
    names = other


def refused(path: bytes, number: int, words: str) -> OSError:
    """An error that has words of the protocol's own."""
    return OSError(number, words, path)


def not_a_file(path: bytes, *, directory: bool) -> OSError:
    shown = os.fsdecode(path).encode(errors="replace").decode()
    return refused(path, errno.EISDIR if directory else errno.EINVAL, f"path `{shown}` is not a file")


def has_link(path: bytes) -> OSError:
    return refused(path, errno.ELOOP, "path contains a symbolic link")


# Without following links. Each directory is opened from the one before it, so nothing can be put in between.


@contextmanager
def parent_without_links(path: bytes) -> Iterator[tuple[int, bytes]]:
    """The directory that a path is in, opened without following any link, and its last name.

    Raises:
        NotADirectoryError: if a link is on the way.
    """
    parts = [part for part in path.split(b"/") if part]
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(b"/", flags)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd, parts[-1] if parts else b"."
    finally:
        os.close(fd)


def _open(path: bytes, flags: int, *, follow: bool, mode: int = 0o666) -> int:
    if follow:
        return names.open(path, flags, mode)
    with parent_without_links(path) as (parent, name):
        try:
            return names.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=parent)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise has_link(path) from None
            raise


# Reading and writing.


def open_to_read(turn: Turn, path: bytes, *, follow: bool = True) -> int:
    """A regular file. What it is is seen before it is opened: opening a device may do something."""
    if follow:
        found = stat_path(path)
        if not found.is_file:
            raise not_a_file(path, directory=found.is_directory)
    fd = _open(path, _LOOKED, follow=follow)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise not_a_file(path, directory=stat.S_ISDIR(mode))
    return turn.hand_over(fd)


def open_unless_proc(turn: Turn, path: bytes, *, follow: bool) -> int | None:
    """As `open_to_read`; `None` for the kernel's files about processes, which here are about this one."""
    fd = open_to_read(Turn(), path, follow=follow)
    try:
        about_us = is_on_proc(fd)
    except BaseException:
        os.close(fd)
        raise
    if about_us:
        os.close(fd)
        return None
    return turn.hand_over(fd)


def open_to_write(turn: Turn, path: bytes, *, keep: bool) -> int:
    """A regular file, created if need be, and emptied unless `keep`."""
    with suppress(FileNotFoundError):
        found = stat_path(path)
        if not found.is_file:
            raise not_a_file(path, directory=found.is_directory)
    fd = names.open(path, _WRITTEN | os.O_CREAT)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise not_a_file(path, directory=False)
    if not keep:
        empty(fd)
    return turn.hand_over(fd)


def empty(fd: int) -> None:
    """Cut a file that was just opened to nothing; it is closed if that cannot be done (a sealed memfd)."""
    try:
        os.ftruncate(fd, 0)
    except OSError:
        os.close(fd)
        raise


def read_at(turn: Turn, fd: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end. Some files give less at a time than they have (/proc)."""
    parts: list[bytes] = []
    while size:
        turn.check()
        part = os.pread(fd, min(size, STEP), offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_unless_proc(turn: Turn, path: bytes, *, follow: bool) -> bytes | None:
    """As `read_file`; `None` as in `open_unless_proc`."""
    fd = open_unless_proc(Turn(), path, follow=follow)
    if fd is None:
        return None
    try:
        return read_at(turn, fd, 0, sys.maxsize)
    finally:
        os.close(fd)


def write_at(turn: Turn, fd: int, offset: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        turn.check()
        count = os.pwrite(fd, left[:STEP], offset)
        offset += count
        left = left[count:]


def read_file(turn: Turn, path: bytes, *, follow: bool) -> bytes:
    fd = open_to_read(Turn(), path, follow=follow)
    try:
        return read_at(turn, fd, 0, sys.maxsize)
    finally:
        os.close(fd)


def write_file(turn: Turn, path: bytes, data: bytes, *, follow: bool) -> int | None:
    """`None` when it is done; a descriptor of what is no regular file, which must be waited for.

    Raises:
        OSError: ENXIO for a fifo that nobody reads, as for a socket or a device that isn't there.
    """
    fd = _open(path, _WRITTEN | os.O_CREAT, follow=follow)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return turn.hand_over(os.dup(fd))
        overwrite(turn, fd, data)
    finally:
        os.close(fd)
    return None


def write_file_waiting(turn: Turn, path: bytes, data: bytes, *, follow: bool) -> None:
    """The same with nobody else to wait: for a fifo's reader, and until a device has taken it all."""
    try:
        fd = write_file(turn, path, data, follow=follow)
    except OSError as error:
        if error.errno != errno.ENXIO or not is_fifo(turn, path):
            raise
        fd = _open(path, _WRITTEN & ~os.O_NONBLOCK, follow=follow)
    if fd is None:
        return
    try:
        os.set_blocking(fd, True)
        overwrite(turn, fd, data)
    finally:
        os.close(fd)


def is_fifo(turn: Turn, path: bytes) -> bool:
    return stat.S_ISFIFO(stat_path(path).mode)


def overwrite(turn: Turn, fd: int, data: bytes) -> None:
    """Make `data` the content. Cut at the end and not at the beginning: what ext4 sees emptied and written
    anew it brings to the disk at once, which takes longer than all the rest."""
    left = memoryview(data)
    while left:  # not by position, which files of /proc cannot do
        turn.check()
        left = left[os.write(fd, left[:STEP]) :]
    if os.fstat(fd).st_size > len(data):
        os.ftruncate(fd, len(data))


def sync(turn: Turn, fd: int) -> None:
    os.fsync(fd)


# Looking.


def get_metadata(turn: Turn, path: bytes, *, follow: bool) -> tuple[Stat, bool]:
    """What a path leads to, and whether it is a link itself."""
    if not follow:
        with parent_without_links(path) as (parent, name):
            found = stat_path(name, follow=False, dir_fd=parent)
        if found.is_symlink:
            raise has_link(path)
        return found, False
    found = stat_path(path, follow=False)
    if found.is_symlink:
        return stat_path(path), True
    return found, False


def canonicalize(turn: Turn, path: bytes) -> bytes:
    return os.path.realpath(path, strict=True)


def read_directory(turn: Turn, path: bytes) -> list[tuple[bytes, bool, bool]]:
    """Name, whether it is a directory and whether it is a file, of each that leads somewhere."""
    entries = []
    with os.scandir(path) as found:
        for entry in found:
            turn.check()
            try:
                is_directory = entry.is_dir()
                is_file = not is_directory and entry.is_file()
                if not is_directory and not is_file and entry.is_symlink():
                    entry.stat()
            except OSError:  # a link that leads nowhere, or in a circle
                continue
            entries.append((entry.name, is_directory, is_file))
    return entries


class Walk:
    """What a walk found: paths with whether it is a directory; paths with the errno that kept it out."""

    __slots__ = ("entries", "errors", "truncated")

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, bool]] = []
        self.errors: list[tuple[bytes, int]] = []
        self.truncated = False


def walk(
    turn: Turn,
    path: bytes,
    *,
    max_depth: int,
    max_directories: int,
    max_entries: int,
    follow_directories: bool,
    prune_hidden: bool,
) -> Walk:
    """Breadth first, by name inside a directory (§5.10)."""
    if not max_directories or not max_entries:
        raise refused(path, errno.EINVAL, "filesystem walk limits must be greater than zero")
    result = Walk()
    entries, errors = result.entries, result.errors
    root = os.lstat(path)
    if not stat.S_ISDIR(root.st_mode):
        return result
    limit = min(max_entries, MAX_WALK_ENTRIES)
    seen = {(root.st_dev, root.st_ino)}
    opened = 0
    waiting = deque([(path.rstrip(b"/"), 0)])
    while waiting:
        turn.check()
        directory, depth = waiting.popleft()
        if opened == max_directories:
            result.truncated = True
            return result
        opened += 1
        try:
            with os.scandir(directory or b"/") as found:
                children = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            errors.append((directory or b"/", error.errno or 0))
            continue
        for entry in children:
            turn.check()
            try:
                is_directory = _is_directory(entry, follow_directories)
                inner = entry.stat() if is_directory and depth < max_depth else None
            except OSError as error:
                errors.append((entry.path, error.errno or 0))
                continue
            if is_directory is None:
                continue
            if len(entries) == limit or len(errors) > limit:
                result.truncated = True
                return result
            entries.append((entry.path, is_directory))
            if inner is None or (prune_hidden and entry.name.startswith(b".")):
                continue
            if (inner.st_dev, inner.st_ino) not in seen:
                seen.add((inner.st_dev, inner.st_ino))
                waiting.append((entry.path, depth + 1))
    return result


def _is_directory(entry: os.DirEntry[bytes], follow_directories: bool) -> bool | None:
    """Whether it is a directory, or else a file; `None` for what a walk leaves out."""
    if entry.is_symlink():
        return True if follow_directories and entry.is_dir() else None
    if entry.is_dir():
        return True
    return False if entry.is_file() else None


# Changing.


def create_directory(turn: Turn, path: bytes, *, recursive: bool, follow: bool) -> None:
    if follow:
        _create_directory(turn, path, recursive=recursive)
        return
    parts = [part for part in path.split(b"/") if part]
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(b"/", flags)
    try:
        for number, part in enumerate(parts, 1):
            if recursive or number == len(parts):
                try:
                    names.mkdir(part, dir_fd=fd, recursive=recursive)
                except FileExistsError:
                    if not recursive:
                        raise
            inner = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)


def _create_directory(turn: Turn, path: bytes, *, recursive: bool) -> None:
    if not recursive:
        names.mkdir(path)
        return
    missing = []
    current = path.rstrip(b"/") or b"/"
    while True:
        turn.check()
        try:
            names.mkdir(current, recursive=True)
            break
        except FileNotFoundError:
            missing.append(current)
            parent = os.path.dirname(current)
            if parent == current:
                raise
            current = parent
        except FileExistsError:
            if not os.path.isdir(current):
                raise
            break
    for directory in reversed(missing):
        with suppress(FileExistsError):  # somebody else made it meanwhile
            names.mkdir(directory, recursive=True)


def remove(turn: Turn, path: bytes, *, recursive: bool, force: bool, follow: bool) -> None:
    path = path.rstrip(b"/")  # of a link with a slash behind it, the link is meant
    if not path:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), b"/")
    try:
        if follow:
            _remove(turn, path, None, path, recursive=recursive)
            return
        with parent_without_links(path) as (parent, name):
            _remove(turn, name, parent, path, recursive=recursive)
    except FileNotFoundError:
        if not force:
            raise


def _remove(turn: Turn, name: bytes, parent: int | None, path: bytes, *, recursive: bool) -> None:
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    if recursive:
        if parent is not None:
            raise refused(path, errno.ENOTSUP, "recursive no-follow removal is unsupported")
        _empty(turn, path)
    os.rmdir(name, dir_fd=parent)


_INSIDE = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def _empty(turn: Turn, path: bytes) -> None:
    """Remove all that is in a directory, however deep, with two descriptors and without following a link."""
    fd = os.open(path, _INSIDE)
    above: list[tuple[list[bytes], os.stat_result]] = []  # of each parent: what is left in it, and who it was
    try:
        left = _remove_files(turn, fd)
        while left or above:
            turn.check()
            if left:
                try:
                    child = os.open(left[-1], _INSIDE, dir_fd=fd)
                except FileNotFoundError:  # somebody else removed it meanwhile
                    left.pop()
                    continue
                above.append((left, os.fstat(fd)))
                os.close(fd)
                fd = child
                left = _remove_files(turn, fd)
            else:
                left, expected = above.pop()
                parent = os.open(b"..", _INSIDE, dir_fd=fd)
                os.close(fd)
                fd = parent
                if not os.path.samestat(os.fstat(fd), expected):
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)  # moved away meanwhile
                with suppress(FileNotFoundError):
                    os.rmdir(left.pop(), dir_fd=fd)
    finally:
        os.close(fd)


def _remove_files(turn: Turn, fd: int) -> list[bytes]:
    """Unlink what is no directory, and empty directories; the names of the others."""
    left = []
    with os.scandir(fd) as found:
        for entry in found:
            turn.check()
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                try:
                    os.rmdir(name, dir_fd=fd)
                except FileNotFoundError:
                    continue
                except OSError:  # most likely not empty
                    left.append(name)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
    return left


def rename(turn: Turn, source: bytes, destination: bytes, *, sync: bool) -> None:
    names.replace(source, destination)
    if not sync:
        return
    with suppress(OSError):  # a file system that cannot sync a directory
        fd = os.open(os.path.dirname(destination.rstrip(b"/")) or b"/", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def set_metadata(turn: Turn, path: bytes, mode: int | None, modified_at_ms: int | None) -> None:
    if mode is not None:
        os.chmod(path, mode)
    if modified_at_ms is not None:
        modified = modified_at_ms * 1_000_000
        os.utime(path, ns=(modified, modified))


# Copying (§5.9).


def copy(turn: Turn, source: bytes, destination: bytes, *, recursive: bool) -> int | None:
    """`None` when it is done; a descriptor of what is no regular file, which must be waited for."""
    source, destination = source.rstrip(b"/") or b"/", destination.rstrip(b"/") or b"/"
    found = os.lstat(source)
    if stat.S_ISDIR(found.st_mode):
        if not recursive:
            words = "fs/copy requires recursive: true when sourcePath is a directory"
            raise refused(source, errno.EISDIR, words)
        _copy_tree(turn, source, destination)
    elif stat.S_ISLNK(found.st_mode):
        names.symlink(os.readlink(source), destination)
    elif stat.S_ISREG(found.st_mode):
        special = _copy_file(turn, source, destination)
        return None if special is None else turn.hand_over(special)
    else:
        raise refused(source, errno.EINVAL, "fs/copy only supports regular files, directories, and symlinks")
    return None


def copy_waiting(turn: Turn, source: bytes, destination: bytes, *, recursive: bool) -> None:
    """The same with nobody else to wait for a fifo or a device."""
    special = copy(turn, source, destination, recursive=recursive)
    if special is not None:
        _copy_to_special(turn, source, special)


def _copy_tree(turn: Turn, source: bytes, destination: bytes) -> None:
    real = os.path.realpath(source)
    target = os.path.realpath(destination)  # of what exists of it; links are followed as mkdir will
    if target == real or target.startswith(real.rstrip(b"/") + b"/"):
        words = "fs/copy cannot copy a directory to itself or one of its descendants"
        raise refused(source, errno.EINVAL, words)
    waiting = deque([(source, destination)])
    while waiting:
        turn.check()
        directory, copied = waiting.popleft()
        _create_directory(turn, copied, recursive=True)
        with os.scandir(directory) as found:
            for entry in found:
                turn.check()
                inner = os.path.join(copied, entry.name)
                if entry.is_symlink():
                    names.symlink(os.readlink(entry.path), inner)
                elif entry.is_dir():
                    waiting.append((entry.path, inner))
                elif entry.is_file():
                    special = _copy_file(turn, entry.path, inner)
                    if special is not None:
                        _copy_to_special(turn, entry.path, special)


def _copy_file(turn: Turn, source: bytes, destination: bytes) -> int | None:
    """`None` when it is done; a descriptor of the destination, if that is a fifo or a device."""
    reader = names.open(source, _LOOKED)
    try:
        found = os.fstat(reader)
        mode = stat.S_IMODE(found.st_mode)
        writer = names.open(destination, _WRITTEN | os.O_CREAT, mode)
        try:
            before = os.fstat(writer)
            if os.path.samestat(found, before):
                return None  # emptying it first would lose it
            if not stat.S_ISREG(before.st_mode):
                return os.dup(writer)
            os.ftruncate(writer, 0)
            _copy_bytes(turn, reader, writer)
            os.fchmod(writer, mode)
            return None
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _copy_to_special(turn: Turn, source: bytes, writer: int) -> None:
    """Copy to a fifo or a device in a tree, as fast as it takes it, and close that."""
    try:
        reader = os.open(source, _LOOKED)
        try:
            while part := os.read(reader, STEP):
                left = memoryview(part)
                while left:
                    turn.check()
                    try:
                        left = left[os.write(writer, left) :]
                    except BlockingIOError:
                        select.select((), (writer,), (), CHECK_INTERVAL)
        finally:
            os.close(reader)
    finally:
        os.close(writer)


def _copy_bytes(turn: Turn, reader: int, writer: int) -> None:
    copied = 0
    while hasattr(os, "copy_file_range"):
        turn.check()
        try:
            count = os.copy_file_range(reader, writer, 16 * STEP)
        except OSError as error:
            if copied or error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if not count:
            break
        copied += count
    if not copied:  # not between these two, or a file that says it is empty and is not (/proc)
        _copy_by_hand(turn, reader, writer)


def _copy_by_hand(turn: Turn, reader: int, writer: int) -> None:
    while part := os.read(reader, STEP):
        left = memoryview(part)
        while left:
            turn.check()
            left = left[os.write(writer, left) :]
