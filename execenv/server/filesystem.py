"""The routes of `fs/*`, over `abc.FileSystem` (protocol.md §5).

Handles and watches belong to a connection: they end with it, and no resumed session finds them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import trio

from execenv import codec
from execenv._service import Turns
from execenv.abc import FileHandle, FileSystem
from execenv.errors import ConnectionLost, InvalidParams, InvalidRequest, NotFound
from execenv.paths import PathUri
from execenv.protocol import (
    FS_CANONICALIZE,
    FS_CLOSE,
    FS_COPY,
    FS_CREATE_DIRECTORY,
    FS_GET_METADATA,
    FS_MISSING_CHANGED,
    FS_OPEN,
    FS_READ_BLOCK,
    FS_READ_DIRECTORY,
    FS_READ_FILE,
    FS_REMOVE,
    FS_RENAME,
    FS_SET_METADATA,
    FS_WALK,
    FS_WATCH_MISSING,
    FS_WRITE_BLOCK,
    FS_WRITE_FILE,
    FileMetadata,
    FsCanonicalizeResult,
    FsCloseParams,
    FsCopyParams,
    FsCreateDirectoryParams,
    FsMissingChangedParams,
    FsOpenParams,
    FsOpenResult,
    FsPathParams,
    FsReadBlockParams,
    FsReadFileParams,
    FsRemoveParams,
    FsRenameParams,
    FsSetMetadataParams,
    FsWalkParams,
    FsWatchMissingParams,
    FsWatchMissingResult,
    FsWriteBlockParams,
    FsWriteFileParams,
    Nothing,
    Notification,
    OpenMode,
)
from execenv.rpc import Answer, Streamed
from execenv.sandbox.policy import Sandbox

R = TypeVar("R")

MAX_FILE = 536_870_912  # of `fs/readFile` (§11); in blocks there is no limit
MAX_BLOCK = 1024 * 1024
MAX_HANDLES = 128
MAX_CLOSING = 512
MAX_HANDLE_ID = 32
MAX_WATCHES = 128
MAX_TIME_MS = 2**43  # what every file system can hold, and the year 2248
MAX_UNSENT = 16 * 1024 * 1024
"""Bytes of listings that may wait for the client to take them."""

CLOSE_GRACE = 5.0
"""Seconds for closing files on mounts that take their time."""

STREAMED_BLOCK = 72 * 1024
"""Bytes of a file in one piece of a long answer. A multiple of 3: no piece but the last needs padding."""

Handling = Coroutine[Any, Any, R]
Notify = Callable[[Notification[Any], Any], None]


class _Handle:
    """A handle id that is taken. Its requests are done in the order they came."""

    def __init__(self) -> None:
        self.file: FileHandle | None = None
        self.dropped = False
        self.turns = Turns()


class FileTable:
    """The handles and watches of one connection, and the handlers of `fs/*`.

    Args:
        nursery: where the watches run.
        notify: sends a notification to the client.
    """

    def __init__(self, files: FileSystem, nursery: trio.Nursery, notify: Notify) -> None:
        self._files = files
        self._nursery = nursery
        self._notify = notify
        self._handles: dict[str, _Handle] = {}
        self._closing: set[_Handle] = set()
        self._watches: dict[int, trio.CancelScope] = {}
        self._unsent = 0
        self._all_sent = trio.lowlevel.ParkingLot()
        self._listing = trio.StrictFIFOLock()

    async def aclose(self) -> None:
        """Close all handles."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_GRACE):
            async with trio.open_nursery() as nursery:  # one on a dead mount must not keep the others open
                for handle in (*self._handles.values(), *self._closing):
                    if handle.file is not None:
                        nursery.start_soon(self._close_at_end, handle.file)
        self._handles.clear()
        self._closing.clear()

    async def _close_at_end(self, file: FileHandle) -> None:
        with suppress(OSError):  # nobody is left to hear of it
            if not file.close_nowait():
                await file.close()

    # By path.

    def _files_for(self, sandbox: Sandbox | None) -> FileSystem:
        return self._files if sandbox is None else self._files.confined(sandbox)

    def read_file(self, params: FsReadFileParams) -> Any:
        files = self._files_for(params.sandbox)
        if params.follow_symlinks is not False:
            data = files.read_file_nowait(params.path)
            if data is not None:
                return codec.base64_member("dataBase64", data)
        return self._read_file(files, params)

    async def _read_file(self, files: FileSystem, params: FsReadFileParams) -> Any:
        if files is not self._files:
            data = await files.read_small(params.path, follow_symlinks=params.follow_symlinks is not False)
            if data is not None:
                return codec.base64_member("dataBase64", data)
        # Tried before its turn: one that hangs must not keep others from theirs. Nor is it kept open so long.
        follow = params.follow_symlinks is not False
        file = await files.open(params.path, follow_symlinks=follow)
        try:
            if (await files.get_metadata(params.path, follow_symlinks=follow)).size > MAX_FILE:
                raise InvalidRequest(f"file is too large to read: limit is {MAX_FILE} bytes")
        finally:
            with trio.CancelScope(shield=True):
                await file.close()
        return Streamed(self._file_parts(files, params.path, follow))

    async def _file_parts(
        self, files: FileSystem, path: PathUri, follow: bool
    ) -> AsyncGenerator[bytes, None]:
        file = await files.open(path, follow_symlinks=follow)
        try:
            head, offset = b'{"dataBase64":"', 0
            while True:
                data = await file.read(offset, STREAMED_BLOCK)
                offset += len(data)
                yield head + codec.encode_base64(data)
                head = b""
                if len(data) < STREAMED_BLOCK:
                    break
                if offset > MAX_FILE:
                    raise InvalidRequest(f"the file grew beyond {MAX_FILE} bytes while it was read")
            yield b'"}'
        finally:
            with trio.CancelScope(shield=True):
                await file.close()

    def write_file(self, params: FsWriteFileParams) -> Nothing | Handling[Nothing]:
        try:
            data = codec.decode_base64(params.data_base64)
        except InvalidParams as error:
            raise InvalidRequest(f"fs/writeFile requires valid base64 dataBase64: {error}") from None
        files = self._files_for(params.sandbox)
        follow = params.follow_symlinks is not False
        if follow and files.write_file_nowait(params.path, data):
            return Nothing()
        return self._nothing(files.write_file(params.path, data, follow_symlinks=follow))

    async def create_directory(self, params: FsCreateDirectoryParams) -> Nothing:
        await self._files_for(params.sandbox).create_directory(
            params.path,
            recursive=params.recursive is not False,
            follow_symlinks=params.follow_symlinks is not False,
        )
        return Nothing()

    def get_metadata(self, params: FsPathParams) -> FileMetadata | Handling[FileMetadata]:
        files = self._files_for(params.sandbox)
        follow = params.follow_symlinks is not False
        found = files.get_metadata_nowait(params.path) if follow else None
        return found or files.get_metadata(params.path, follow_symlinks=follow)

    async def canonicalize(self, params: FsPathParams) -> FsCanonicalizeResult:
        files = self._files_for(params.sandbox)
        return FsCanonicalizeResult(await files.canonicalize(params.path))

    async def read_directory(self, params: FsPathParams) -> Any:
        files = self._files_for(params.sandbox)

        async def listing() -> bytes:
            entries = await files.read_directory(params.path)
            return codec.encode_json(  # by hand: a directory may have a hundred thousand
                {
                    "entries": [
                        {
                            "fileName": entry.file_name,
                            "isDirectory": entry.is_directory,
                            "isFile": entry.is_file,
                        }
                        for entry in entries
                    ]
                }
            )

        return await self._listed(listing)

    async def _listed(self, make: Callable[[], Awaitable[bytes]]) -> Answer[Any]:
        """A listing, which may be large. If a client asks for many and does not take them, only some are
        kept; the others are made anew when their turn has come."""
        data = await make()
        if self._unsent and self._unsent + len(data) > MAX_UNSENT:
            del data
            async with self._listing:
                while self._unsent:
                    await self._all_sent.park()
                data = await make()
        size = len(data)
        self._unsent += size

        def sent() -> None:
            self._unsent -= size
            if not self._unsent:
                self._all_sent.unpark_all()

        return Answer(codec.fragment(data), sent)

    async def remove(self, params: FsRemoveParams) -> Nothing:
        await self._files_for(params.sandbox).remove(
            params.path,
            recursive=params.recursive is not False,
            force=params.force is not False,
            follow_symlinks=params.follow_symlinks is not False,
        )
        return Nothing()

    async def copy(self, params: FsCopyParams) -> Nothing:
        files = self._files_for(params.sandbox)
        await files.copy(params.source_path, params.destination_path, recursive=params.recursive)
        return Nothing()

    async def walk(self, params: FsWalkParams) -> Any:
        files = self._files_for(params.sandbox)

        async def listing() -> bytes:
            return codec.encode_json(codec.unstructure(await files.walk(params.path, params.options)))

        return await self._listed(listing)

    async def rename(self, params: FsRenameParams) -> Nothing:
        files = self._files_for(params.sandbox)
        await files.rename(params.source_path, params.destination_path, sync=params.sync)
        return Nothing()

    async def set_metadata(self, params: FsSetMetadataParams) -> Nothing:
        if params.mode is not None and params.mode > 0o7777:
            raise InvalidRequest("mode must be permission bits, at most 0o7777")
        if params.modified_at_ms is not None and abs(params.modified_at_ms) > MAX_TIME_MS:
            raise InvalidRequest("modifiedAtMs is out of range")
        files = self._files_for(params.sandbox)
        await files.set_metadata(params.path, mode=params.mode, modified_at_ms=params.modified_at_ms)
        return Nothing()

    async def _nothing(self, work: Coroutine[Any, Any, None]) -> Nothing:
        await work
        return Nothing()

    # By handle (§5.2).

    def open(self, params: FsOpenParams) -> FsOpenResult | Handling[FsOpenResult]:
        _check_handle_id(params.handle_id)
        if params.handle_id in self._handles:
            raise InvalidRequest(f"file handle `{params.handle_id}` already exists")
        if len(self._handles) >= MAX_HANDLES or len(self._closing) >= MAX_CLOSING:
            raise InvalidRequest(f"at most {MAX_HANDLES} file handles may be open per connection")
        files = self._files_for(params.sandbox)
        handle = _Handle()
        handle.file = files.open_nowait(params.path, _mode(params))
        self._handles[params.handle_id] = handle
        if handle.file is not None:
            return FsOpenResult(params.handle_id)
        return self._open(files, handle, params, handle.turns.take()[1])

    async def _open(
        self, files: FileSystem, handle: _Handle, params: FsOpenParams, done: trio.Event
    ) -> FsOpenResult:
        try:
            handle.file = await files.open(params.path, _mode(params))
            return FsOpenResult(params.handle_id)
        finally:
            if handle.file is None:
                self._forget(params.handle_id, handle)
            done.set()

    def read_block(self, params: FsReadBlockParams) -> Any:
        _check_handle_id(params.handle_id)
        if not 1 <= params.len <= MAX_BLOCK:
            raise InvalidRequest(f"file read block length must be between 1 and {MAX_BLOCK}")
        handle = self._handle(params.handle_id)
        if handle.turns.idle and handle.file is not None:
            try:
                data = handle.file.read_nowait(params.offset, params.len)
            except OSError:
                self._forget(params.handle_id, handle)
                handle.file.close_nowait()
                raise
            if data is not None:
                return _block(data, params.len)
        return self._read_block(handle, params, *handle.turns.take())

    async def _read_block(
        self, handle: _Handle, params: FsReadBlockParams, before: trio.Event | None, done: trio.Event
    ) -> Any:
        try:
            file = await self._in_turn(handle, params.handle_id, before)
            try:
                return _block(await file.read(params.offset, params.len), params.len)
            except OSError:
                self._forget(params.handle_id, handle)
                await file.close()
                raise
        finally:
            done.set()

    def write_block(self, params: FsWriteBlockParams) -> Nothing | Handling[Nothing]:
        _check_handle_id(params.handle_id)
        if not 1 <= len(params.chunk) <= MAX_BLOCK:
            raise InvalidRequest(f"file write block length must be between 1 and {MAX_BLOCK}")
        if params.offset + len(params.chunk) >= 2**63:
            raise InvalidRequest("file write range exceeds the signed 64-bit file offset limit")
        handle = self._handle(params.handle_id)
        if (
            handle.turns.idle
            and handle.file is not None
            and handle.file.write_nowait(params.offset, params.chunk)
        ):
            return Nothing()
        return self._write_block(handle, params, *handle.turns.take())

    async def _write_block(
        self, handle: _Handle, params: FsWriteBlockParams, before: trio.Event | None, done: trio.Event
    ) -> Nothing:
        try:
            file = await self._in_turn(handle, params.handle_id, before)
            await file.write(params.offset, params.chunk)
            return Nothing()
        finally:
            done.set()

    def close(self, params: FsCloseParams) -> Nothing | Handling[Nothing]:
        _check_handle_id(params.handle_id)
        handle = self._handles.pop(params.handle_id, None)  # its id is free for what comes next
        if handle is None:
            return Nothing()
        if handle.turns.idle and handle.file is not None and not params.sync and handle.file.close_nowait():
            return Nothing()
        return self._close(handle, params.sync, *handle.turns.take())

    async def _close(
        self, handle: _Handle, sync: bool, before: trio.Event | None, done: trio.Event
    ) -> Nothing:
        self._closing.add(handle)
        try:
            if before is not None:
                await before.wait()
            if handle.file is not None:
                await handle.file.close(sync=sync)
            self._closing.discard(handle)
            return Nothing()
        except OSError:
            self._closing.discard(handle)  # closed all the same
            raise
        finally:
            done.set()

    def _handle(self, handle_id: str) -> _Handle:
        try:
            return self._handles[handle_id]
        except KeyError:
            raise NotFound(f"unknown file handle `{handle_id}`") from None

    async def _in_turn(self, handle: _Handle, handle_id: str, before: trio.Event | None) -> FileHandle:
        if before is not None:
            await before.wait()
        if handle.file is None or handle.dropped:
            raise NotFound(f"unknown file handle `{handle_id}`")
        return handle.file

    def _forget(self, handle_id: str, handle: _Handle) -> None:
        handle.dropped = True
        if self._handles.get(handle_id) is handle:
            del self._handles[handle_id]

    # Watches (§5.11).

    def watch_missing(self, params: FsWatchMissingParams) -> Handling[Answer[FsWatchMissingResult]]:
        old = self._watches.pop(params.watch_id, None)
        if old is not None:
            old.cancel()
        scope = None
        if len(self._watches) < MAX_WATCHES:
            # From now on, not from when it has begun: so the limit counts it, and the next of its id ends it.
            scope = self._watches[params.watch_id] = trio.CancelScope()
        return self._begin_watch(params, scope)

    async def _begin_watch(
        self, params: FsWatchMissingParams, scope: trio.CancelScope | None
    ) -> Answer[FsWatchMissingResult]:
        answered = trio.Event()
        watching = False
        if scope is not None:
            watching = await self._nursery.start(self._watch, params, scope, answered)
        return Answer(FsWatchMissingResult(watching), answered.set)

    async def _watch(
        self,
        params: FsWatchMissingParams,
        scope: trio.CancelScope,
        answered: trio.Event,
        task_status: trio.TaskStatus[bool] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        watching = False
        try:
            with scope:
                async with self._files.watch_missing(params.missing, params.present) as watch:
                    if watch is not None:
                        watching = True
                        task_status.started(True)
                        await answered.wait()
                        await watch.wait()
                if watching:
                    with suppress(ConnectionLost):
                        self._notify(FS_MISSING_CHANGED, FsMissingChangedParams(params.watch_id))
            if not watching:  # there is nothing to wait for, or another took its id before it had begun
                task_status.started(False)
        finally:
            if self._watches.get(params.watch_id) is scope:
                del self._watches[params.watch_id]


def _check_handle_id(handle_id: str) -> None:
    if len(handle_id.encode(errors="surrogatepass")) > MAX_HANDLE_ID:
        raise InvalidRequest(f"file handle ID must not exceed {MAX_HANDLE_ID} bytes")


def _mode(params: FsOpenParams) -> OpenMode:
    return "update" if params.keep and params.mode == "replace" else params.mode


def _block(data: bytes, wanted: int) -> Any:
    return codec.base64_member("chunk", data, ',"eof":true' if len(data) < wanted else ',"eof":false')


ROUTES = (
    (FS_READ_FILE, FileTable.read_file),
    (FS_WRITE_FILE, FileTable.write_file),
    (FS_CREATE_DIRECTORY, FileTable.create_directory),
    (FS_GET_METADATA, FileTable.get_metadata),
    (FS_CANONICALIZE, FileTable.canonicalize),
    (FS_READ_DIRECTORY, FileTable.read_directory),
    (FS_REMOVE, FileTable.remove),
    (FS_COPY, FileTable.copy),
    (FS_WALK, FileTable.walk),
    (FS_OPEN, FileTable.open),
    (FS_READ_BLOCK, FileTable.read_block),
    (FS_WRITE_BLOCK, FileTable.write_block),
    (FS_CLOSE, FileTable.close),
    (FS_WATCH_MISSING, FileTable.watch_missing),
    (FS_RENAME, FileTable.rename),
    (FS_SET_METADATA, FileTable.set_metadata),
)
