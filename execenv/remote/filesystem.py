"""Files of a server, by its protocol: the proxy of `abc.FileSystem`.

Whatever does not fit into a small message goes in blocks of 1 MiB, some of them under way at once: no file is
too large, and other calls pass between the blocks.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import trio

from execenv.abc import FileHandle, FileSystem, Watch
from execenv.codec import Json, encode_base64, structure
from execenv.errors import (
    ConnectionLost,
    ExecenvError,
    InvalidRequest,
    NotSupported,
    RpcError,
    file_error,
    os_from_error,
)
from execenv.paths import ForeignPathError, PathUri
from execenv.protocol import (
    FS_CANONICALIZE,
    FS_CLOSE,
    FS_COPY,
    FS_CREATE_DIRECTORY,
    FS_GET_METADATA,
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
    U64,
    Base64,
    DirectoryEntry,
    FileMetadata,
    FsCloseParams,
    FsCopyParams,
    FsCreateDirectoryParams,
    FsMissingChangedParams,
    FsOpenParams,
    FsPathParams,
    FsReadBlockParams,
    FsReadBlockResult,
    FsReadFileParams,
    FsRemoveParams,
    FsRenameParams,
    FsSetMetadataParams,
    FsWalkParams,
    FsWatchMissingParams,
    FsWriteBlockParams,
    FsWriteFileParams,
    Method,
    Nothing,
    OpenMode,
    WalkOptions,
    WalkResult,
    WireOpenMode,
)
from execenv.remote.session import again
from execenv.rpc import Call, Peer
from execenv.sandbox.policy import Sandbox

if TYPE_CHECKING:
    from execenv.remote.connection import RemoteEnvironment

P = TypeVar("P")
R = TypeVar("R")

BLOCK = 1024 * 1024
"""The largest block there is (§5.2)."""

BLOCKS_UNDER_WAY = 4
SMALL_FILE = 1024 * 1024
LARGEST_MESSAGE = 44 * 1024 * 1024
"""What `fs/writeFile` carries to a server that takes no blocks: 64 MiB of message, less what base64 adds."""

OPEN_PATIENCE = 1.0
"""Seconds that a cancelled call waits for a file that it may have made, as one here waits for its thread."""

OWN_HANDLES = 64
"""Handles that whole-file calls hold at once; a server has 128 for a connection (§5.2)."""

_FOREIGN_PATH = re.compile(r"^'.*' is invalid on '\w+'$|unexpected NUL byte$", re.DOTALL)
"""How a server says that a path cannot be one of its own (§6)."""


class RemoteFileSystem(FileSystem):
    """Files of a server; with `sandbox`, every call asks for it."""

    def __init__(self, environment: RemoteEnvironment, sandbox: Sandbox | None = None) -> None:
        self._environment = environment
        self._sandbox = sandbox
        self._own_handles = trio.CapacityLimiter(OWN_HANDLES)
        self._watches: dict[int, trio.Event] = {}
        self._watch_ids = 0

    def confined(self, sandbox: Sandbox) -> FileSystem:
        if self._sandbox is not None:
            raise NotSupported("these files are under a sandbox already")
        confined = RemoteFileSystem(self._environment, sandbox)
        confined._own_handles = self._own_handles
        return confined

    async def read_file(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes:
        if not follow_symlinks:
            params = FsReadFileParams(path, self._sandbox, follow_symlinks=False)
            return (await self._call(FS_READ_FILE, params, path, repeat=True)).data_base64

        async def read(peer: Peer) -> bytes:
            async with aclosing(self._blocks(peer, path)) as blocks:
                return b"".join([block async for block in blocks])

        async with self._own_handles:
            return await self._environment.with_peer(read, repeat=True)

    async def _blocks(self, peer: Peer, path: PathUri) -> AsyncGenerator[bytes, None]:
        """Opened, read and closed without waiting in between: a small file costs one round trip."""
        handle = RemoteFileHandle(self, peer, path)
        opening = peer.call_nowait(FS_OPEN, FsOpenParams(handle.handle_id, path, self._sandbox))
        try:
            first = handle.ask(0)
            await self._settled(opening, path)
            async with aclosing(handle.read_blocks(first=first)) as blocks:
                async for block in blocks:
                    yield block
        finally:
            handle.let_go()

    async def write_file(self, path: PathUri, data: bytes, *, follow_symlinks: bool = True) -> None:
        if len(data) > SMALL_FILE and follow_symlinks and await self.can("fileWriteStreaming"):

            async def write(peer: Peer) -> None:
                handle = await self._open(peer, path, "replace")
                try:
                    async with aclosing(_pieces(data)) as pieces:
                        await handle.write_blocks(pieces)
                except ConnectionLost as error:  # whatever was not sent: the file has been emptied
                    raise again(error, "unknown") from error.__cause__
                finally:
                    handle.let_go()

            async with self._own_handles:
                await self._environment.with_peer(write, repeat=True)
            return
        if len(data) > LARGEST_MESSAGE:
            words = f"{len(data)} bytes are too much for one message, and the server takes no file in blocks"
            raise file_error(errno.EFBIG, path, words)
        params = FsWriteFileParams(
            path, encode_base64(data).decode(), self._sandbox, follow_symlinks=_follow(follow_symlinks)
        )
        # The whole content: twice is the same as once.
        await self._call(FS_WRITE_FILE, params, path, repeat=True)

    async def create_directory(
        self, path: PathUri, *, recursive: bool = True, follow_symlinks: bool = True
    ) -> None:
        params = FsCreateDirectoryParams(
            path, recursive, self._sandbox, follow_symlinks=_follow(follow_symlinks)
        )
        await self._call(FS_CREATE_DIRECTORY, params, path)

    async def get_metadata(self, path: PathUri, *, follow_symlinks: bool = True) -> FileMetadata:
        params = FsPathParams(path, self._sandbox, follow_symlinks=_follow(follow_symlinks))
        return await self._call(FS_GET_METADATA, params, path, repeat=True)

    async def canonicalize(self, path: PathUri) -> PathUri:
        return (await self._call(FS_CANONICALIZE, FsPathParams(path, self._sandbox), path, repeat=True)).path

    async def read_directory(self, path: PathUri) -> tuple[DirectoryEntry, ...]:
        return (
            await self._call(FS_READ_DIRECTORY, FsPathParams(path, self._sandbox), path, repeat=True)
        ).entries

    async def remove(
        self, path: PathUri, *, recursive: bool = True, force: bool = True, follow_symlinks: bool = True
    ) -> None:
        params = FsRemoveParams(
            path, recursive, force, self._sandbox, follow_symlinks=_follow(follow_symlinks)
        )
        await self._call(FS_REMOVE, params, path)

    async def copy(self, source: PathUri, destination: PathUri, *, recursive: bool) -> None:
        await self._call(FS_COPY, FsCopyParams(source, destination, recursive, self._sandbox), source)

    async def walk(self, path: PathUri, options: WalkOptions) -> WalkResult:
        return await self._call(FS_WALK, FsWalkParams(path, options, self._sandbox), path, repeat=True)

    async def open(
        self, path: PathUri, mode: OpenMode = "read", *, follow_symlinks: bool = True
    ) -> RemoteFileHandle:
        if not follow_symlinks:  # `fs/open` ignores it (§5.12)
            raise NotSupported(f"{self._environment.name} cannot open a file and follow no links; read it")
        needed = {"read": None, "replace": "fileWriteStreaming", "update": "fileTransfer"}[mode]
        if needed is not None and not await self.can(needed):
            raise NotSupported(f"{self._environment.name} cannot {mode} a file in blocks; write it whole")
        return await self._environment.with_peer(lambda peer: self._open(peer, path, mode), repeat=True)

    async def _open(self, peer: Peer, path: PathUri, mode: OpenMode) -> RemoteFileHandle:
        handle = RemoteFileHandle(self, peer, path)
        try:
            wire_mode: WireOpenMode = "read" if mode == "read" else "replace"
            params = FsOpenParams(handle.handle_id, path, self._sandbox, wire_mode, keep=mode == "update")
            await self._settled(peer.call_nowait(FS_OPEN, params), path)
        except trio.Cancelled:
            # It may be open there all the same, or about to be. The close is answered behind that: whoever
            # made the file can remove it then, and it does not come into being afterwards.
            deadline = trio.current_time() + (0 if mode == "read" else OPEN_PATIENCE)
            with trio.CancelScope(shield=True, deadline=deadline), suppress(OSError, ExecenvError):
                await handle.close()
            raise
        except BaseException:
            handle.let_go()
            raise
        return handle

    @asynccontextmanager
    async def watch_missing(
        self, missing: tuple[PathUri, ...], present: PathUri | None = None
    ) -> AsyncIterator[Watch | None]:
        if self._sandbox is not None:  # the call has no such member
            raise NotSupported("nothing can be watched under a sandbox")
        ours = await self.can("fileTransfer")
        if self._watches and not ours:  # another make forgets one watch for the next, and would never tell
            raise NotSupported(f"{self._environment.name} can only watch once at a time")
        self._watch_ids += 1
        id_ = U64(self._watch_ids)
        try:
            params = FsWatchMissingParams(id_, missing, present)

            async def watch(peer: Peer) -> RemoteWatch | None:
                changed = self._watches[id_] = trio.Event()
                watching = (
                    await self._settled(peer.call_nowait(FS_WATCH_MISSING, params), missing[0])
                ).watching
                return RemoteWatch(changed, peer) if watching else None

            found = await self._environment.with_peer(watch, repeat=True) if missing else None
            try:
                yield found
            finally:
                if found is not None:
                    found.end(id_)
        finally:
            self._watches.pop(id_, None)

    async def rename(self, source: PathUri, destination: PathUri, *, sync: bool = False) -> None:
        await self._call(FS_RENAME, FsRenameParams(source, destination, self._sandbox, sync), source)

    async def can_transfer(self) -> bool:
        return await self.can("fileTransfer")

    async def set_metadata(
        self, path: PathUri, *, mode: int | None = None, modified_at_ms: int | None = None
    ) -> None:
        params = FsSetMetadataParams(path, None if mode is None else U64(mode), modified_at_ms, self._sandbox)
        await self._call(FS_SET_METADATA, params, path)

    async def can(self, capability: str) -> bool:
        return (await self._environment.info()).capabilities.get(capability, False)

    def on_missing_changed(self, params: Json) -> None:
        changed = self._watches.get(structure(params, FsMissingChangedParams).watch_id)
        if changed is not None:
            changed.set()

    def disconnected(self) -> None:
        for changed in self._watches.values():
            changed.set()

    async def _call(self, method: Method[P, R], params: P, path: PathUri, *, repeat: bool = False) -> R:
        try:
            return await self._environment.call(method, params, repeat=repeat)
        except RpcError as error:
            raise await self._told(error, path) from None

    async def _settled(self, call: Call[R], path: PathUri) -> R:
        try:
            return await call.wait()
        except RpcError as error:
            raise await self._told(error, path) from None

    async def _told(self, error: RpcError, path: PathUri) -> Exception:
        if isinstance(error, InvalidRequest) and error.message.endswith("is not a file"):
            with suppress(RpcError):  # which of the two, the answer doesn't say
                found = await self._environment.call(
                    FS_GET_METADATA, FsPathParams(path, self._sandbox), repeat=True
                )
                if found.is_directory:
                    return file_error(errno.EISDIR, path, error.message)
        if _FOREIGN_PATH.search(error.message):
            return ForeignPathError(error.message)
        return os_from_error(error, path)


class RemoteWatch(Watch):
    """A watch of one connection."""

    def __init__(self, changed: trio.Event, peer: Peer) -> None:
        self._changed = changed
        self._peer = peer

    async def wait(self) -> None:
        await self._changed.wait()
        if self._peer.channel.closed:
            raise self._peer.channel.lost("unknown")

    def end(self, watch_id: U64) -> None:
        with suppress(ConnectionLost):  # there is no call to end it, but one that replaces it
            self._peer.call_nowait(FS_WATCH_MISSING, FsWatchMissingParams(watch_id, ())).drop()


class RemoteFileHandle(FileHandle):
    """A handle id at the server, and ends with the connection.

    Its calls are done there in the order they are made here.
    """

    def __init__(self, files: RemoteFileSystem, peer: Peer, path: PathUri) -> None:
        self.handle_id = os.urandom(16).hex()
        self._files = files
        self._peer = peer
        self._path = path
        self._closed = False

    def ask(self, offset: int, size: int = BLOCK) -> Call[FsReadBlockResult]:
        """Ask for a block, and wait for it later."""
        params = FsReadBlockParams(self.handle_id, U64(offset), U64(size))
        return self._peer.call_nowait(FS_READ_BLOCK, params)

    async def read(self, offset: int, size: int) -> bytes:
        self._check()
        async with aclosing(self.read_blocks(offset, end=offset + size)) as blocks:
            parts = [block async for block in blocks]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_blocks(
        self, offset: int = 0, *, end: int | None = None, first: Call[FsReadBlockResult] | None = None
    ) -> AsyncGenerator[bytes, None]:
        under_way: deque[tuple[int, Call[FsReadBlockResult]]] = deque()
        if first is not None:
            under_way.append((BLOCK, first))
            offset += BLOCK
        window = 1  # most files end in their first block
        try:
            while True:
                while len(under_way) < window and (end is None or offset < end):
                    size = BLOCK if end is None else min(BLOCK, end - offset)
                    under_way.append((size, self.ask(offset, size)))
                    offset += size
                if not under_way:
                    return
                size, call = under_way.popleft()
                result = await self._files._settled(call, self._path)
                if result.chunk:
                    yield result.chunk
                if result.eof or len(result.chunk) < size:
                    return
                window = BLOCKS_UNDER_WAY
        finally:
            for _, call in under_way:
                call.drop()

    async def write(self, offset: int, data: bytes) -> None:
        async with aclosing(_pieces(data)) as pieces:
            await self.write_blocks(pieces, offset)

    async def write_blocks(self, blocks: AsyncIterable[bytes], offset: int = 0) -> int:
        self._check()
        under_way: deque[Call[Nothing]] = deque()
        begin = offset
        try:
            async for block in blocks:
                for start in range(0, len(block), BLOCK):
                    piece = Base64(block[start : start + BLOCK])
                    params = FsWriteBlockParams(self.handle_id, U64(offset), piece)
                    under_way.append(self._peer.call_nowait(FS_WRITE_BLOCK, params))
                    offset += len(piece)
                    await self._peer.channel.wait_room()
                    if len(under_way) > BLOCKS_UNDER_WAY:
                        await self._files._settled(under_way.popleft(), self._path)
            while under_way:
                await self._files._settled(under_way.popleft(), self._path)
        except ConnectionLost as error:
            if offset == begin:
                raise
            raise again(error, "unknown") from error.__cause__
        finally:
            for call in under_way:
                call.drop()
        return offset

    async def close(self, *, sync: bool = False) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        if sync and not await self._files.can("fileTransfer"):
            await self.close()
            raise NotSupported(f"{self._files._environment.name} cannot say when a file is on the disk")
        self._closed = True
        params = FsCloseParams(self.handle_id, sync)
        await self._files._settled(self._peer.call_nowait(FS_CLOSE, params), self._path)

    def let_go(self) -> None:
        """Close it without waiting for that."""
        if not self._closed:
            self._closed = True
            with suppress(ConnectionLost):
                self._peer.call_nowait(FS_CLOSE, FsCloseParams(self.handle_id)).drop()

    def _check(self) -> None:
        if self._closed:
            raise file_error(errno.EBADF, self._path)


def _follow(follow_symlinks: bool) -> bool | None:
    return None if follow_symlinks else False


async def _pieces(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), BLOCK):
        yield data[start : start + BLOCK]
