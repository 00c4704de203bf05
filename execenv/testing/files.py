"""Files in memory, with the errors that files have."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import trio
from attrs import Factory, define

from execenv.abc import FileHandle, FileSystem, Watch
from execenv.errors import NotSupported, file_error
from execenv.paths import PathUri
from execenv.protocol import (
    DirectoryEntry,
    FileMetadata,
    OpenMode,
    WalkEntry,
    WalkOptions,
    WalkResult,
)
from execenv.sandbox.plan import execution
from execenv.sandbox.policy import Sandbox

_BEGINNING = 946_684_800_000  # the year 2000, in milliseconds


@define(eq=False)
class _File:
    mode: int
    modified: int
    data: bytearray = Factory(bytearray)


@define(eq=False)
class _Directory:
    mode: int
    modified: int
    children: dict[bytes, _File | _Directory] = Factory(dict)


class MemoryFileSystem(FileSystem):
    """A tree of directories and files. There are no links, and permission bits are kept but not asked.

    The clock of its files goes on by a millisecond with each change, so that tests see the same times.

    Attributes:
        errors: by absolute path, the errno with which every call about that path fails, such as
            `errno.EACCES`. For tests; change it at any time.

    Args:
        content: by absolute path; text is UTF-8. Directories are made as needed.
        directories: that are there too.
    """

    def __init__(self, content: Mapping[str, bytes | str], directories: Iterable[str] = ()) -> None:
        self.errors: dict[str, int] = {}
        self._now = _BEGINNING
        self._root = _Directory(0o755, self._now)
        self._changed = trio.lowlevel.ParkingLot()
        for name in directories:
            self._make_directories(PathUri.from_native(name))
        for name, data in content.items():
            path = PathUri.from_native(name)
            self._make_directories(_parent(path))
            self._replace(path, data.encode() if isinstance(data, str) else data)

    def confined(self, sandbox: Sandbox) -> FileSystem:
        return self if execution(sandbox) == "direct" else super().confined(sandbox)

    # For the test.

    def content(self, path: str) -> bytes:
        """What is in a file now.

        Raises:
            OSError: as reading it would.
        """
        return bytes(self._file(PathUri.from_native(path)).data)

    def is_directory(self, path: PathUri) -> bool:
        """Whether it is one, or else a file.

        Raises:
            FileNotFoundError, NotADirectoryError: if there is nothing of that name.
        """
        return isinstance(self._find(path), _Directory)

    # Finding.

    def _names(self, path: PathUri) -> list[bytes]:
        native = path.to_native()
        number = self.errors.get(os.fsdecode(native))
        if number is not None:
            raise file_error(number, path)
        return [name for name in native.split(b"/") if name]

    def _find(self, path: PathUri) -> _File | _Directory:
        found: _File | _Directory = self._root
        for name in self._names(path):
            if isinstance(found, _File):
                raise file_error(errno.ENOTDIR, path)
            inner = found.children.get(name)
            if inner is None:
                raise file_error(errno.ENOENT, path)
            found = inner
        if isinstance(found, _File) and path.uri.endswith("/"):
            raise file_error(errno.ENOTDIR, path)
        return found

    def _file(self, path: PathUri) -> _File:
        found = self._find(path)
        if isinstance(found, _Directory):
            raise file_error(errno.EISDIR, path, f"path `{path.text}` is not a file")
        return found

    def _directory(self, path: PathUri) -> _Directory:
        found = self._find(path)
        if isinstance(found, _File):
            raise file_error(errno.ENOTDIR, path)
        return found

    def _place(self, path: PathUri) -> tuple[_Directory, bytes]:
        """The directory that a path is in, and its name there."""
        names = self._names(path)
        if not names:
            raise file_error(errno.EBUSY, path)
        parent: _File | _Directory = self._root
        for name in names[:-1]:
            if isinstance(parent, _File):
                raise file_error(errno.ENOTDIR, path)
            inner = parent.children.get(name)
            if inner is None:
                raise file_error(errno.ENOENT, path)
            parent = inner
        if isinstance(parent, _File):
            raise file_error(errno.ENOTDIR, path)
        return parent, names[-1]

    def _touch(self, *changed: _File | _Directory) -> None:
        self._now += 1
        for node in changed:
            node.modified = self._now
        self._changed.unpark_all()

    def _opened(self, path: PathUri) -> _File:
        """A file to write to, made if need be."""
        parent, name = self._place(path)
        if name not in parent.children:
            parent.children[name] = _File(0o644, self._now)
            self._touch(parent, parent.children[name])
        return self._file(path)

    def _replace(self, path: PathUri, data: bytes) -> None:
        file = self._opened(path)
        file.data[:] = data
        self._touch(file)

    def _make_directories(self, path: PathUri) -> None:
        current = self._root
        for name in self._names(path):
            inner = current.children.get(name)
            if inner is None:
                inner = current.children[name] = _Directory(0o755, self._now)
                self._touch(current, inner)
            if isinstance(inner, _File):
                raise file_error(errno.ENOTDIR, path)
            current = inner

    # What an environment does.

    async def read_file(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(self._file(path).data)

    async def write_file(self, path: PathUri, data: bytes, *, follow_symlinks: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        self._replace(path, data)

    async def create_directory(
        self, path: PathUri, *, recursive: bool = True, follow_symlinks: bool = True
    ) -> None:
        await trio.lowlevel.checkpoint()
        if recursive:
            try:
                if isinstance(self._find(path), _File):
                    raise file_error(errno.EEXIST, path)
            except FileNotFoundError:
                self._make_directories(path)
            return
        try:
            parent, name = self._place(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise file_error(errno.EEXIST, path) from None
            raise
        if name in parent.children:
            raise file_error(errno.EEXIST, path)
        parent.children[name] = _Directory(0o755, self._now)
        self._touch(parent, parent.children[name])

    async def get_metadata(self, path: PathUri, *, follow_symlinks: bool = True) -> FileMetadata:
        await trio.lowlevel.checkpoint()
        found = self._find(path)
        is_file = isinstance(found, _File)
        size = len(found.data) if isinstance(found, _File) else 0
        return FileMetadata(not is_file, is_file, False, size, 0, found.modified, found.mode)

    async def canonicalize(self, path: PathUri) -> PathUri:
        await trio.lowlevel.checkpoint()
        self._find(path)
        return PathUri.from_native(b"/" + b"/".join(self._names(path)))

    async def read_directory(self, path: PathUri) -> tuple[DirectoryEntry, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(
            DirectoryEntry(
                name.decode(errors="replace"), isinstance(node, _Directory), isinstance(node, _File)
            )
            for name, node in self._directory(path).children.items()
        )

    async def remove(
        self, path: PathUri, *, recursive: bool = True, force: bool = True, follow_symlinks: bool = True
    ) -> None:
        await trio.lowlevel.checkpoint()
        try:
            parent, name = self._place(path)
            found = parent.children.get(name)
            if found is None:
                raise file_error(errno.ENOENT, path)
        except FileNotFoundError:
            if force:
                return
            raise
        if isinstance(found, _Directory) and found.children and not recursive:
            raise file_error(errno.ENOTEMPTY, path)
        del parent.children[name]
        self._touch(parent)

    async def copy(self, source: PathUri, destination: PathUri, *, recursive: bool) -> None:
        await trio.lowlevel.checkpoint()
        found = self._find(source)
        if isinstance(found, _File):
            self._replace(destination, bytes(found.data))
            self._file(destination).mode = found.mode
            return
        if not recursive:
            words = "fs/copy requires recursive: true when sourcePath is a directory"
            raise file_error(errno.EISDIR, source, words)
        ours, theirs = self._names(source), self._names(destination)
        if theirs[: len(ours)] == ours:
            words = "fs/copy cannot copy a directory to itself or one of its descendants"
            raise file_error(errno.EINVAL, source, words)
        self._copy_tree(found, destination)

    def _copy_tree(self, source: _Directory, destination: PathUri) -> None:
        self._make_directories(destination)
        for name, node in list(source.children.items()):
            inner = destination.join(name)
            if isinstance(node, _Directory):
                self._copy_tree(node, inner)
            else:
                self._replace(inner, bytes(node.data))
                self._file(inner).mode = node.mode

    async def walk(self, path: PathUri, options: WalkOptions) -> WalkResult:
        await trio.lowlevel.checkpoint()
        if not options.max_directories or not options.max_entries:
            raise file_error(errno.EINVAL, path, "filesystem walk limits must be greater than zero")
        found = self._find(path)
        entries: list[WalkEntry] = []
        waiting = deque([(path, found, 0)])
        opened = 0
        while waiting:
            where, node, depth = waiting.popleft()
            if isinstance(node, _File):
                break
            if opened == options.max_directories:
                return WalkResult(tuple(entries), (), True)
            opened += 1
            for name, child in sorted(node.children.items()):
                if len(entries) == options.max_entries:
                    return WalkResult(tuple(entries), (), True)
                inner = where.join(name)
                is_directory = isinstance(child, _Directory)
                entries.append(WalkEntry(inner, "directory" if is_directory else "file"))
                hidden = options.prune_hidden_directories and name.startswith(b".")
                if is_directory and depth < options.max_depth and not hidden:
                    waiting.append((inner, child, depth + 1))
        return WalkResult(tuple(entries), (), False)

    async def open(
        self, path: PathUri, mode: OpenMode = "read", *, follow_symlinks: bool = True
    ) -> FileHandle:
        if not follow_symlinks and mode != "read":
            raise NotSupported("links are always followed where a file is written in blocks")
        await trio.lowlevel.checkpoint()
        if mode == "read":
            return _MemoryHandle(self, self._file(path), path, writes=False)
        file = self._opened(path)
        if mode == "replace":
            file.data.clear()
            self._touch(file)
        return _MemoryHandle(self, file, path, writes=True)

    @asynccontextmanager
    async def watch_missing(
        self, missing: tuple[PathUri, ...], present: PathUri | None = None
    ) -> AsyncIterator[Watch | None]:
        await trio.lowlevel.checkpoint()
        before = self._state(present)
        if any(self._state(path) is not None for path in missing) or (present and before is None):
            yield None
        else:
            yield _MemoryWatch(self, missing, present, before)

    def _state(self, path: PathUri | None) -> tuple[int, int] | None:
        """What tells a change of what is there; `None` for nothing."""
        if path is None:
            return None
        try:
            found = self._find(path)
        except OSError:
            return None
        return id(found), found.modified

    async def rename(self, source: PathUri, destination: PathUri, *, sync: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        found = self._find(source)
        old, old_name = self._place(source)
        try:
            new, new_name = self._place(destination)
        except OSError as error:  # the system's error has the first of the two names
            raise file_error(error.errno or errno.EIO, source) from None
        there = new.children.get(new_name)
        if there is found:
            return
        if isinstance(there, _Directory) and isinstance(found, _File):
            raise file_error(errno.EISDIR, source)
        if isinstance(there, _File) and isinstance(found, _Directory):
            raise file_error(errno.ENOTDIR, source)
        if isinstance(there, _Directory) and there.children:
            raise file_error(errno.ENOTEMPTY, source)
        ours = self._names(source)
        if self._names(destination)[: len(ours)] == ours:
            raise file_error(errno.EINVAL, source)
        del old.children[old_name]
        new.children[new_name] = found
        self._touch(old, new)

    async def set_metadata(
        self, path: PathUri, *, mode: int | None = None, modified_at_ms: int | None = None
    ) -> None:
        await trio.lowlevel.checkpoint()
        found = self._find(path)
        if mode is not None:
            found.mode = stat.S_IMODE(mode)
        if modified_at_ms is not None:
            found.modified = modified_at_ms
        self._changed.unpark_all()

    async def can_transfer(self) -> bool:
        await trio.lowlevel.checkpoint()
        return True


class _MemoryHandle(FileHandle):
    def __init__(self, disk: MemoryFileSystem, file: _File, path: PathUri, *, writes: bool) -> None:
        self._disk = disk
        self._file = file
        self._path = path
        self._writes = writes
        self._open = True

    def _check(self, *, writing: bool) -> None:
        if not self._open or writing != self._writes:
            raise file_error(errno.EBADF, self._path)

    async def read(self, offset: int, size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self._check(writing=False)
        return bytes(self._file.data[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._check(writing=True)
        held = self._file.data
        if offset > len(held):
            held.extend(bytes(offset - len(held)))
        held[offset : offset + len(data)] = data
        self._disk._touch(self._file)

    async def close(self, *, sync: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._open = False


class _MemoryWatch(Watch):
    def __init__(
        self,
        disk: MemoryFileSystem,
        missing: tuple[PathUri, ...],
        present: PathUri | None,
        before: tuple[int, int] | None,
    ) -> None:
        self._disk = disk
        self._missing = missing
        self._present = present
        self._before = before

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        state = self._disk._state
        while state(self._present) == self._before and all(state(path) is None for path in self._missing):
            await self._disk._changed.park()


def _parent(path: PathUri) -> PathUri:
    return path.parent() or path
