"""The files of this machine, as far as a sandbox lets them be touched (sandbox.md §3, §4).

What the sandbox allows without exception is done as without one; everything else in a helper inside
bubblewrap, under the plan as it is at the moment of the call. If there is no helper, the call fails.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import Any, TypeVar

from execenv.abc import FileHandle, FileSystem, Watch
from execenv.errors import InternalError, NotSupported, file_error
from execenv.local.facts import Plans
from execenv.local.file_helper import path_to_text
from execenv.local.filesystem import (
    LocalFileHandle,
    LocalFileSystem,
    directory_entries,
    metadata_of,
    native_path,
    walk_limits,
    walk_result,
)
from execenv.local.helpers import HelperNotStarted, Helpers, Reply, undecodable
from execenv.local.mounts import Mounts
from execenv.local.stat import Stat, stat_now
from execenv.local.threads import run_in_thread
from execenv.paths import PathUri
from execenv.protocol import DirectoryEntry, FileMetadata, OpenMode, WalkOptions, WalkResult
from execenv.sandbox.plan import MountPlan, execution, is_within
from execenv.sandbox.policy import Sandbox

START_TRIES = 20
QUICK = 32 * 1024
"""Longer listings are taken apart in a thread."""

T = TypeVar("T")


class ConfinedFileSystem(FileSystem):
    """Made by `LocalFileSystem.confined`.

    Args:
        files: the same without a sandbox.
    """

    def __init__(
        self, files: LocalFileSystem, sandbox: Sandbox, mounts: Mounts, plans: Plans, helpers: Helpers
    ) -> None:
        self._files = files
        self._sandbox = sandbox
        self._mounts = mounts
        self._plans = plans
        self._helpers = helpers
        self._reads_directly = execution(sandbox) == "direct reads"

    async def read_file(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes:
        if self._is_direct(path):
            data = await self._files.read_unless_proc(path, follow_symlinks=follow_symlinks)
            if data is not None:
                return data
        reply = await self._call("read", path, follow=follow_symlinks)
        if reply.fd is None:
            return reply.body
        handle = self._handle(reply, path)
        try:
            async with aclosing(handle.read_blocks()) as blocks:
                return b"".join([block async for block in blocks])
        finally:
            await handle.close()

    async def read_small(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes | None:
        if self._is_direct(path):
            return await self._files.read_small(path, follow_symlinks=follow_symlinks)
        reply = await self._call("read", path, follow=follow_symlinks)
        if reply.fd is None:
            return reply.body
        await self._handle(reply, path).close()
        return None

    async def write_file(self, path: PathUri, data: bytes, *, follow_symlinks: bool = True) -> None:
        await self._call("write_file", path, data, follow=follow_symlinks)

    async def create_directory(
        self, path: PathUri, *, recursive: bool = True, follow_symlinks: bool = True
    ) -> None:
        await self._call("create_directory", path, recursive=recursive, follow=follow_symlinks)

    async def get_metadata(self, path: PathUri, *, follow_symlinks: bool = True) -> FileMetadata:
        if self._is_direct(path):
            return await self._files.get_metadata(path, follow_symlinks=follow_symlinks)
        header = (await self._call("get_metadata", path, follow=follow_symlinks)).header
        with _decoding():
            mode, size, created, modified = header["stat"]
            created = None if created is None else int(created)
            found = Stat(int(mode), int(size), 0, 0, None, created, int(modified))
            return metadata_of(found, is_symlink=bool(header["symlink"]))

    async def canonicalize(self, path: PathUri) -> PathUri:
        if self._is_direct(path):
            return await self._files.canonicalize(path)
        reply = await self._call("canonicalize", path)
        with _decoding():
            return PathUri.from_native(reply.body)

    async def read_directory(self, path: PathUri) -> tuple[DirectoryEntry, ...]:
        if self._is_direct(path):
            return await self._files.read_directory(path)
        reply = await self._call("read_directory", path)
        return await self._decode(_decode_directory, reply)

    async def remove(
        self, path: PathUri, *, recursive: bool = True, force: bool = True, follow_symlinks: bool = True
    ) -> None:
        await self._call("remove", path, recursive=recursive, force=force, follow=follow_symlinks)

    async def copy(self, source: PathUri, destination: PathUri, *, recursive: bool) -> None:
        await self._call("copy", source, to=_text(destination), recursive=recursive)

    async def walk(self, path: PathUri, options: WalkOptions) -> WalkResult:
        if self._is_direct(path):
            return await self._files.walk(path, options)
        reply = await self._call("walk", path, **walk_limits(options))
        return await self._decode(_decode_walk, reply)

    async def open(
        self, path: PathUri, mode: OpenMode = "read", *, follow_symlinks: bool = True
    ) -> FileHandle:
        if mode == "read" and self._is_direct(path):
            handle = await self._files.open_unless_proc(path, follow_symlinks=follow_symlinks)
            if handle is not None:
                return handle
        if not follow_symlinks and mode != "read":
            raise NotSupported("links are always followed where a file is written in blocks")
        reply = await self._call("open", path, mode=mode, follow=follow_symlinks)
        if reply.fd is None:
            raise undecodable("there is no descriptor")
        return self._handle(reply, path)

    def watch_missing(
        self, missing: tuple[PathUri, ...], present: PathUri | None = None
    ) -> AbstractAsyncContextManager[Watch | None]:
        raise NotSupported("nothing can be watched under a sandbox")

    async def rename(self, source: PathUri, destination: PathUri, *, sync: bool = False) -> None:
        await self._call("rename", source, to=_text(destination), sync=sync)

    async def set_metadata(
        self, path: PathUri, *, mode: int | None = None, modified_at_ms: int | None = None
    ) -> None:
        bits = None if mode is None else stat.S_IMODE(mode)
        await self._call("set_metadata", path, mode=bits, modified_at_ms=modified_at_ms)

    async def can_transfer(self) -> bool:
        return await self._files.can_transfer()

    def confined(self, sandbox: Sandbox) -> FileSystem:
        raise NotSupported("these files are under a sandbox already")

    # At once: only what is done without a helper.

    def read_file_nowait(self, path: PathUri) -> bytes | None:
        return self._files.read_file_nowait(path) if self._is_direct(path) else None

    def get_metadata_nowait(self, path: PathUri) -> FileMetadata | None:
        return self._files.get_metadata_nowait(path) if self._is_direct(path) else None

    def open_nowait(self, path: PathUri, mode: OpenMode) -> FileHandle | None:
        return self._files.open_nowait(path, mode) if self._is_direct(path) and mode == "read" else None

    def _is_direct(self, path: PathUri) -> bool:
        """Whether to read there as without a sandbox: not what is about processes, so about us."""
        if not self._reads_directly:
            return False
        return not is_within(os.path.normpath(native_path(path)), b"/proc")

    # Through a helper.

    async def _call(self, operation: str, path: PathUri, data: bytes = b"", **arguments: Any) -> Reply:
        header = {"op": operation, "path": _text(path), "with": arguments}
        reply = await self._ask(header, data)
        error = reply.header.get("error")
        if error is None:
            return reply
        if reply.fd is not None:
            os.close(reply.fd)
        with _decoding():
            number, words = error
            raise file_error(int(number), path, str(words))

    async def _ask(self, header: dict[str, Any], data: bytes) -> Reply:
        plan = await self._plan()
        for _ in range(START_TRIES):
            try:
                return await self._helpers.call(plan, header, data)
            except HelperNotStarted:
                again = await self._plan()
                if again == plan:
                    raise
                plan = again
        raise InternalError("cannot enforce the sandbox: what its policy is about changes all the time")

    async def _plan(self) -> MountPlan:
        try:
            return await self._plans.plan(self._sandbox)
        except InternalError as error:
            raise InternalError(f"failed to prepare fs sandbox: {error.message}") from error

    async def _decode(self, decode: Callable[[Reply], T], reply: Reply) -> T:
        if len(reply.body) <= QUICK:
            return decode(reply)
        return await run_in_thread(self._mounts.limiter(b"/"), lambda turn: decode(reply))

    def _handle(self, reply: Reply, path: PathUri) -> LocalFileHandle:
        """Of a descriptor that a helper opened, which is looked at before it is used."""
        fd = reply.fd
        assert fd is not None
        found = stat_now(fd)
        if found is None or not found.is_file:
            os.close(fd)
            raise file_error(errno.EINVAL, path, f"path `{path.text}` is not a file")
        quick = self._mounts.is_local_device(found.device)
        return LocalFileHandle(fd, path, self._mounts.limiter(native_path(path)), quick=quick)


def _decode_directory(reply: Reply) -> tuple[DirectoryEntry, ...]:
    return directory_entries(
        (entry[1:], entry.startswith(b"d"), entry.startswith(b"f")) for entry in _parts(reply.body)
    )


def _decode_walk(reply: Reply) -> WalkResult:
    with _decoding():
        parts = _parts(reply.body)
        count = int(reply.header["entries"])
        errors = (part.partition(b":") for part in parts[count:])
        return walk_result(
            ((part[1:], part.startswith(b"d")) for part in parts[:count]),
            ((name, int(number)) for number, _, name in errors),
            bool(reply.header["truncated"]),
        )


def _text(path: PathUri) -> str:
    return path_to_text(native_path(path))


def _parts(body: bytes) -> list[bytes]:
    return body.split(b"\0") if body else []


@contextmanager
def _decoding() -> Iterator[None]:
    """What a helper said is not believed to be well-formed."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise undecodable(repr(error)) from None
