"""Files and whole trees from one environment to another, this machine included, with bounded memory.

A file is written under a name of its own beside its destination, and given its name when it is whole. The
other name tells which version of which file it is the beginning of: a later transfer of the same goes on
where this one was cut. Files that are there already, with the same size and time, are left alone. All that
needs a server of ours (capability `fileTransfer`); elsewhere files are written in place, from the beginning.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from hashlib import sha256
from typing import Literal, TypeVar

import trio
from attrs import Factory, define, frozen

from execenv._service import open_nursery
from execenv.abc import FileHandle, FileSystem
from execenv.errors import ConnectFailed, ConnectionLost, NotSupported, file_error
from execenv.paths import PathUri
from execenv.protocol import ONE_DIRECTORY, DirectoryEntry, FileMetadata

R = TypeVar("R")

FILES_AT_ONCE = 32
"""Small files spend their time waiting for answers; so many wait together."""

LARGE_AT_ONCE = 4
"""Large ones spend it moving, and each has some MiB under way."""

SMALL = 256 * 1024
"""Bytes up to which a file is read and written in one call each."""

TRIES = 5
"""Connections that may be lost one after the other without a byte having arrived in between."""

PLANNED = 256
"""Files that are found before they are copied."""


@define
class Progress:
    """How far a transfer is. One object, changed as it goes on.

    Attributes:
        path: the file that was worked on last, at its source.
        done_bytes, done_files: what has arrived, with what was there already.
        total_bytes, total_files: what is to arrive, as far as it is known.
        complete: whether that is all of it: in a tree, files are copied while others are still being found.
    """

    path: PathUri
    done_bytes: int = 0
    total_bytes: int = 0
    done_files: int = 0
    total_files: int = 0
    complete: bool = False


@define
class TransferReport:
    """What a transfer did.

    Attributes:
        files, bytes: what was copied.
        resumed_bytes: what was left from an earlier transfer and went on from there.
        unchanged: files that were there already.
        skipped: what is neither a file nor a directory, links that lead back to where they are, and
            directories with names that their environment cannot tell.
        metadata_kept: whether permissions and times are those of the source. A server that is not ours may
            not say them, or take them.
    """

    files: int = 0
    bytes: int = 0
    resumed_bytes: int = 0
    unchanged: int = 0
    skipped: list[PathUri] = Factory(list)
    metadata_kept: bool = True


async def persist(call: Callable[[], Awaitable[R]]) -> R:
    """Do what can be done twice again after a lost connection. The next call waits for another one.

    Raises:
        ConnectionLost: if there is none, or each is lost in turn.
    """
    sent = False
    for left in reversed(range(TRIES)):
        try:
            return await call()
        except ConnectFailed as error:
            if not sent:
                raise
            raise ConnectionLost(str(error), "unknown") from error
        except ConnectionLost as error:
            sent = sent or error.outcome != "not sent"
            if not left:
                raise ConnectionLost(str(error), "unknown" if sent else "not sent") from error
    raise AssertionError("unreachable")


@asynccontextmanager
async def open_this_machine() -> AsyncIterator[FileSystem]:
    """The files of this machine."""
    from execenv.local.filesystem import LocalFileSystem
    from execenv.local.mounts import Mounts

    mounts = Mounts()
    try:
        yield LocalFileSystem(mounts)
    finally:
        mounts.close()


async def copy(
    source_files: FileSystem,
    source: PathUri,
    destination_files: FileSystem,
    destination: PathUri,
    *,
    atomic: bool = False,
    progress: Callable[[Progress], None] | None = None,
    on_error: Callable[[OSError], None] | None = None,
) -> TransferReport:
    """Copy a file or a directory with all that is in it, to exactly `destination`.

    Links are followed; links that lead nowhere are left out. Permissions and the time of the last change are
    kept. An existing directory is merged into, an existing file replaced. What fails midway leaves what was
    copied, and goes on from there when it is called again. After a lost connection it does so by itself, if
    there is another one.

    Args:
        atomic: each file is on the disk before it gets its name.
        progress: called now and then.
        on_error: called with what is wrong with one file of a tree; the others are copied. Without it, the
            first error ends the transfer.

    Raises:
        OSError: why a file cannot be read or written; its `filename` says which.
        NotSupported: `atomic`, where the destination cannot do that.
        ConnectionLost: if one of the environments is gone.
    """
    run = _Transfer(source_files, destination_files, atomic, progress, on_error, Progress(source))
    found = await source_files.get_metadata(source)
    if found.is_directory:
        await run.tree(source, found, destination)
    elif found.is_file:
        run.count(found)
        run.progress.complete = True
        await run.file(source, found, destination)
    else:
        raise file_error(errno.EINVAL, source, "neither a file nor a directory")
    run.tell()
    return run.report


async def write_atomically(
    files: FileSystem, path: PathUri, blocks: AsyncGenerator[bytes, None], *, mode: int | None = None
) -> None:
    """Write another file, bring it to the disk, give it the name, and the mode of what had it before."""
    if mode is None:
        with suppress(FileNotFoundError):
            mode = (await files.get_metadata(path)).mode
    part = _sibling(path, os.urandom(6).hex())
    handle = None
    try:
        with _named(part, path):
            handle = await files.open(part, "update")
            if _is_private(mode):
                await files.set_metadata(part, mode=0o600)
            async with aclosing(blocks):
                await handle.write_blocks(blocks)
            if mode is not None:
                await files.set_metadata(part, mode=mode)
            await handle.close(sync=True)
            await files.rename(part, path, sync=True)
    except BaseException:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            with suppress(Exception):
                if handle is not None:
                    await handle.close()
            with suppress(Exception):
                await files.remove(part, recursive=False)
        raise


@contextmanager
def _named(part: PathUri, path: PathUri) -> Iterator[None]:
    """Errors about the other name are about the file: nobody else knows that there is another."""
    try:
        yield
    except OSError as error:
        if error.filename != part.text:
            raise
        raise file_error(error.errno or errno.EIO, path, error.strerror) from None


def _is_private(mode: int | None) -> bool:
    return mode is not None and mode & 0o044 != 0o044


@asynccontextmanager
async def _closing(handle: FileHandle) -> AsyncIterator[None]:
    """Close it when the block is left, whatever happens; not to hear what is wrong with that."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5), suppress(Exception):
            await handle.close()


async def look_at(
    files: FileSystem, paths: Sequence[PathUri], at_once: int = 64
) -> list[FileMetadata | OSError]:
    """The metadata of many paths, or why there is none, with some of the calls under way at a time."""
    found: dict[PathUri, FileMetadata | OSError] = {}

    async def look(waiting: Iterator[PathUri]) -> None:
        for path in waiting:
            try:
                found[path] = await files.get_metadata(path)
            except OSError as error:
                found[path] = error

    waiting = iter(paths)
    async with open_nursery() as nursery:
        for _ in range(min(at_once, len(paths))):
            nursery.start_soon(look, waiting)
    return [found[path] for path in paths]


def _sibling(path: PathUri, token: str) -> PathUri:
    parent = path.parent()
    if parent is None:
        raise file_error(errno.EISDIR, path)
    name = path.name.encode("utf-8", "surrogateescape")[:200]
    return parent.join(b"." + name + b"." + token.encode() + b".part")


EntryKind = Literal["directory", "file", "other"]


def _kind(entry: DirectoryEntry) -> EntryKind:
    return "directory" if entry.is_directory else "file" if entry.is_file else "other"


@frozen
class _Directory:
    """One to copy: its path as it was reached and without links, and where it goes."""

    path: PathUri
    real: PathUri
    found: FileMetadata
    copied: PathUri


@define
class _Share:
    """What of the report and the progress is due to one file."""

    begun: bool = False
    resumed: int = 0
    copied: int = 0


class _Transfer:
    def __init__(
        self,
        source: FileSystem,
        destination: FileSystem,
        atomic: bool,
        told: Callable[[Progress], None] | None,
        on_error: Callable[[OSError], None] | None,
        progress: Progress,
    ) -> None:
        self.source = source
        self.destination = destination
        self.report = TransferReport()
        self.progress = progress
        self._atomic = atomic
        self._told = told
        self._on_error = on_error
        self._large = trio.CapacityLimiter(LARGE_AT_ONCE)

    def count(self, found: FileMetadata) -> None:
        self.progress.total_files += 1
        self.progress.total_bytes += found.size

    def tell(self) -> None:
        if self._told is not None:
            self._told(self.progress)

    # A tree: one task finds files, some copy them.

    async def tree(self, source: PathUri, found: FileMetadata, destination: PathUri) -> None:
        # All directories are known before the first is made: where the destination is below the source, by
        # whatever name, it would be found and copied for ever.
        directories = await self._directories(source, found, destination)
        send, receive = trio.open_memory_channel[tuple[PathUri, FileMetadata, PathUri]](PLANNED)
        made: list[_Directory] = []
        async with open_nursery() as nursery:
            nursery.start_soon(self._find, directories, made, send)
            async with receive:
                for _ in range(FILES_AT_ONCE):
                    nursery.start_soon(self._copy_found, receive.clone())
        for directory in reversed(made):  # last: writing into one changes it
            await persist(partial(self._keep_metadata, directory.copied, directory.found))

    async def _directories(
        self, source: PathUri, found: FileMetadata, destination: PathUri
    ) -> list[_Directory]:
        """The directory and those below it, each once on its way down, however links lead."""
        real = await self.source.canonicalize(source)
        directories: list[_Directory] = []
        waiting = [(_Directory(source, real, found, destination), frozenset((real,)))]
        while waiting:
            directory, above = waiting.pop()
            directories.append(directory)
            try:
                inner = [path for path, kind in await self._entries(directory) if kind == "directory"]
                for path, metadata in zip(inner, await look_at(self.source, inner), strict=True):
                    name = path.name.encode("utf-8", "surrogateescape")
                    if isinstance(metadata, OSError):
                        self._failed(metadata)
                        continue
                    real = directory.real.join(name)
                    if metadata.is_symlink:
                        real = await self.source.canonicalize(path)
                        if real in above:
                            self.report.skipped.append(path)
                            continue
                    child = _Directory(path, real, metadata, directory.copied.join(name))
                    waiting.append((child, above | {real}))
            except OSError as error:
                directories.pop()
                self._failed(error)
        return directories

    async def _find(
        self,
        directories: Sequence[_Directory],
        made: list[_Directory],
        send: trio.MemorySendChannel[tuple[PathUri, FileMetadata, PathUri]],
    ) -> None:
        async with send:
            for directory in directories:
                try:
                    entries = await self._entries(directory)
                    await persist(partial(self.destination.create_directory, directory.copied))
                    made.append(directory)
                    self.report.skipped += [path for path, kind in entries if kind == "other"]
                    files = [path for path, kind in entries if kind == "file"]
                    for path, metadata in zip(files, await look_at(self.source, files), strict=True):
                        if isinstance(metadata, FileNotFoundError):
                            continue  # removed meanwhile
                        if isinstance(metadata, OSError):
                            self._failed(metadata)
                            continue
                        self.count(metadata)
                        name = path.name.encode("utf-8", "surrogateescape")
                        await send.send((path, metadata, directory.copied.join(name)))
                except OSError as error:
                    self._failed(error)
            self.progress.complete = True

    async def _entries(self, directory: _Directory) -> list[tuple[PathUri, EntryKind]]:
        """What is in a directory, by name."""
        listed = await self.source.read_directory(directory.path)
        entries: dict[PathUri, EntryKind] = {
            directory.path.join(entry.file_name): _kind(entry)
            for entry in listed
            if "\ufffd" not in entry.file_name
        }
        if len(entries) < len(listed):  # names that are not UTF-8: a walk has them as they are
            walked = await self.source.walk(directory.real, ONE_DIRECTORY)  # which begins at no link
            for entry in walked.entries:
                name = entry.path.name.encode("utf-8", "surrogateescape")
                entries.setdefault(directory.path.join(name), entry.kind)
            if len(entries) < len(listed) and directory.path not in self.report.skipped:
                self.report.skipped.append(directory.path)  # which of its names, its environment can't say
        return sorted(entries.items(), key=lambda item: item[0].uri)

    async def _copy_found(
        self, receive: trio.MemoryReceiveChannel[tuple[PathUri, FileMetadata, PathUri]]
    ) -> None:
        async with receive:
            async for source, found, destination in receive:
                try:
                    await self.file(source, found, destination)
                except OSError as error:
                    self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self._on_error is None:
            raise error
        self._on_error(error)

    # One file.

    async def file(self, source: PathUri, found: FileMetadata, destination: PathUri) -> None:
        """Copy one file, or see that it is there."""
        self.progress.path = source
        share = _Share()
        lost = arrived = 0
        while True:
            try:
                await self._file(source, found, destination, share)
                break
            except (ConnectFailed, ConnectionLost) as error:
                # What follows waits until there is another connection, or fails if there will be none. It may
                # begin anew: only what no try has reached before is progress.
                if isinstance(error, ConnectFailed) and not share.begun:
                    raise
                lost = 1 if share.copied > arrived else lost + 1
                arrived = max(arrived, share.copied)
                if lost == TRIES or isinstance(error, ConnectFailed):
                    outcome = "unknown" if share.begun else error.outcome
                    raise ConnectionLost(str(error), outcome) from error
        self.progress.done_files += 1
        self.tell()

    async def _file(self, source: PathUri, found: FileMetadata, destination: PathUri, share: _Share) -> None:
        before = await self._look(destination)
        if before is not None and before.is_directory:
            raise file_error(errno.EISDIR, destination)
        if before is not None and _same(before, found):
            if None not in (before.mode, found.mode) and before.mode != found.mode:
                await self._keep_metadata(destination, found)
            if share.begun:  # by us: only the answer to the last call was lost
                self.report.files += 1
            else:
                self.report.unchanged += 1
                self.progress.done_bytes += found.size
        else:
            await self._copy(source, found, destination, share)
            self.report.files += 1

    async def _look(self, path: PathUri) -> FileMetadata | None:
        try:
            return await self.destination.get_metadata(path)
        except FileNotFoundError:
            return None

    async def _copy(self, source: PathUri, found: FileMetadata, destination: PathUri, share: _Share) -> None:
        if not await self.destination.can_transfer():
            if self._atomic:
                raise NotSupported("the destination has no call for an atomic write")
            await self._copy_in_place(source, destination, share)
            return
        part = _sibling(destination, _version(source, found))
        with _named(part, destination):
            try:
                if found.size <= SMALL and not self._atomic and not _is_private(found.mode):
                    data = await self.source.read_file(source)
                    await self.destination.write_file(part, data)
                    self._begin(share, 0)
                    self._count(share, len(data))
                else:
                    async with self._large:
                        await self._continue(source, part, found, share)
                await self._keep_metadata(part, found)
                await self.destination.rename(part, destination, sync=self._atomic)
            except OSError:
                # Not as far as it was written, but with holes perhaps: of no use for the next time.
                with suppress(OSError):
                    await self.destination.remove(part, recursive=False)
                raise

    async def _continue(self, source: PathUri, part: PathUri, found: FileMetadata, share: _Share) -> None:
        reader = await self.source.open(source)
        async with _closing(reader):
            writer = await self.destination.open(part, "update")
            async with _closing(writer):
                if _is_private(found.mode):  # what is not for everybody to read is not that while it arrives
                    await self.destination.set_metadata(part, mode=0o600)
                offset = min((await self.destination.get_metadata(part)).size, found.size)
                self._begin(share, offset)
                async with aclosing(self._counted(reader, offset, share)) as blocks:
                    await writer.write_blocks(blocks, offset)
                await writer.close(sync=self._atomic)

    async def _copy_in_place(self, source: PathUri, destination: PathUri, share: _Share) -> None:
        self.report.metadata_kept = False
        if await self._is_itself(source, destination):
            return  # opening it to write would lose it
        reader = await self.source.open(source)
        self._begin(share, 0)
        async with _closing(reader), aclosing(self._counted(reader, 0, share)) as blocks:
            try:
                writer = await self.destination.open(destination, "replace")
            except NotSupported:
                await self.destination.write_file(destination, b"".join([block async for block in blocks]))
                return
            async with _closing(writer):
                await writer.write_blocks(blocks)
                await writer.close()

    async def _is_itself(self, source: PathUri, destination: PathUri) -> bool:
        if self.source is not self.destination:
            return False
        try:
            return await self.source.canonicalize(source) == await self.source.canonicalize(destination)
        except FileNotFoundError:
            return False

    async def _counted(self, reader: FileHandle, offset: int, share: _Share) -> AsyncGenerator[bytes, None]:
        async with aclosing(reader.read_blocks(offset)) as blocks:
            async for block in blocks:
                yield block
                self._count(share, len(block))

    def _begin(self, share: _Share, offset: int) -> None:
        """So much is there already: of an earlier transfer, or of this one before a connection was lost."""
        resumed = min(share.resumed, offset) if share.begun else offset
        share.begun = True
        self._set(share, resumed, offset - resumed)

    def _count(self, share: _Share, size: int) -> None:
        self._set(share, share.resumed, share.copied + size)
        self.tell()

    def _set(self, share: _Share, resumed: int, copied: int) -> None:
        self.report.resumed_bytes += resumed - share.resumed
        self.report.bytes += copied - share.copied
        self.progress.done_bytes += resumed + copied - share.resumed - share.copied
        share.resumed, share.copied = resumed, copied

    async def _keep_metadata(self, path: PathUri, found: FileMetadata) -> None:
        if found.mode is None:
            self.report.metadata_kept = False
        try:
            await self.destination.set_metadata(
                path, mode=found.mode, modified_at_ms=found.modified_at_ms or None
            )
        except NotSupported:
            self.report.metadata_kept = False


def _same(one: FileMetadata, other: FileMetadata) -> bool:
    """Whether a file is there already. Without a time nothing is certain."""
    return (
        one.is_file
        and (one.size, one.modified_at_ms) == (other.size, other.modified_at_ms)
        and other.modified_at_ms != 0
    )


def _version(source: PathUri, found: FileMetadata) -> str:
    text = f"{source.uri}\n{found.size}\n{found.modified_at_ms}"
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
