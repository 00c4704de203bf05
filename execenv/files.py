"""Files of an environment, as programs use them: `env.files` by call, `env.path` as path objects.

async with execenv.open_environment("ws://127.0.0.1:8765") as env:
    await env.files.upload("build/app.tar", "/srv/app.tar")
    for log in await env.path("/var/log").glob("*.log"):
        print(log, (await log.stat()).size)
"""

from __future__ import annotations

import codecs
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

from execenv.abc import FileSystem, Watch
from execenv.errors import UsageError
from execenv.file import BinaryFile, TextFile
from execenv.paths import PathUri
from execenv.protocol import LARGEST_WALK, U64, DirectoryEntry, FileMetadata, WalkOptions, WalkResult

if TYPE_CHECKING:
    from execenv.environment_path import EnvironmentPath
    from execenv.transfer import Progress, TransferReport

AnyPath: TypeAlias = "str | PathUri | EnvironmentPath"
Mode = Literal["r", "rb", "w", "wb"]
Locate = Callable[[AnyPath], Awaitable[PathUri]]

_PIECE = 1024 * 1024


class Files:
    """The files of an environment. Got as `Environment.files`.

    A path is text as the environment's own system has it, from its working directory if it is relative; or a
    `PathUri`; or an `EnvironmentPath`. Whatever fails raises the `OSError` that the same call would raise
    here (`FileNotFoundError`, `PermissionError`, ...), with `errno` and `filename`.
    """

    def __init__(self, backend: FileSystem, locate: Locate) -> None:
        self._backend = backend
        self._locate = locate

    async def read_file(self, path: AnyPath, *, follow_symlinks: bool = True) -> bytes:
        """The content of a regular file, however large. Something that changes meanwhile may come mixed.

        Args:
            follow_symlinks: without it, a link anywhere in the path is an error.
        """
        return await self._backend.read_file(await self._locate(path), follow_symlinks=follow_symlinks)

    async def write_file(
        self, path: AnyPath, data: bytes, *, atomic: bool = False, follow_symlinks: bool = True
    ) -> None:
        """Make `data` the content of a file, which is created if need be.

        Args:
            atomic: write another file, bring it to the disk, and give it this name: whoever opens the file
                gets the old content or the new one, also after a crash. The permissions stay, the owner
                and links to the old file do not.
            follow_symlinks: without it, a link anywhere in the path is an error.

        Raises:
            NotSupported: `atomic` where the environment has no call for it.
        """
        where = await self._locate(path)
        if not atomic:
            await self._backend.write_file(where, data, follow_symlinks=follow_symlinks)
            return
        if not follow_symlinks:
            raise UsageError("an atomic write replaces a link itself: follow_symlinks has no meaning there")
        from execenv.transfer import persist, write_atomically

        await persist(lambda: write_atomically(self._backend, where, _one(data)))

    async def create_directory(
        self, path: AnyPath, *, recursive: bool = True, follow_symlinks: bool = True
    ) -> None:
        """Make a directory; with `recursive` its parents too, and it may be there already."""
        await self._backend.create_directory(
            await self._locate(path), recursive=recursive, follow_symlinks=follow_symlinks
        )

    async def get_metadata(self, path: AnyPath, *, follow_symlinks: bool = True) -> FileMetadata:
        """What kind of file it is, its size and its times; of a link, what it leads to."""
        return await self._backend.get_metadata(await self._locate(path), follow_symlinks=follow_symlinks)

    async def canonicalize(self, path: AnyPath) -> PathUri:
        """The path with all links resolved. It must exist."""
        return await self._backend.canonicalize(await self._locate(path))

    async def read_directory(self, path: AnyPath) -> tuple[DirectoryEntry, ...]:
        """What is in a directory, in no order; links that lead nowhere are left out."""
        return await self._backend.read_directory(await self._locate(path))

    async def remove(
        self, path: AnyPath, *, recursive: bool = True, force: bool = True, follow_symlinks: bool = True
    ) -> None:
        """Remove a file, a link (never what it leads to), or a directory.

        Args:
            recursive: with all that is in it; otherwise it must be empty.
            force: it is no error if there is none.
        """
        await self._backend.remove(
            await self._locate(path), recursive=recursive, force=force, follow_symlinks=follow_symlinks
        )

    async def copy(self, source: AnyPath, destination: AnyPath, *, recursive: bool = False) -> None:
        """Copy within the environment, to exactly that path: a file, a link as a link, or a directory.

        A file onto itself stays what it is. Into an existing directory a directory is merged.
        """
        await self._backend.copy(
            await self._locate(source), await self._locate(destination), recursive=recursive
        )

    async def walk(
        self,
        path: AnyPath,
        *,
        max_depth: int | None = None,
        max_directories: int | None = None,
        max_entries: int | None = None,
        follow_directory_symlinks: bool = False,
        prune_hidden_directories: bool = False,
    ) -> WalkResult:
        """Directories and files below a directory, in one call (`WalkOptions` says what each argument does).

        `None` is as far as every environment goes: 64 levels, 10,000 directories, 50,000 entries. `truncated`
        in the result tells if that was not all; `EnvironmentPath.walk` has no such limits.
        """
        options = WalkOptions(
            LARGEST_WALK.max_depth if max_depth is None else U64(max_depth),
            LARGEST_WALK.max_directories if max_directories is None else U64(max_directories),
            LARGEST_WALK.max_entries if max_entries is None else U64(max_entries),
            follow_directory_symlinks,
            prune_hidden_directories,
        )
        return await self._backend.walk(await self._locate(path), options)

    async def rename(self, source: AnyPath, destination: AnyPath) -> None:
        """Give a file another name on the same file system, replacing what has that name.

        Raises:
            NotSupported: if the environment has no such call.
        """
        await self._backend.rename(await self._locate(source), await self._locate(destination))

    async def set_metadata(
        self, path: AnyPath, *, mode: int | None = None, modified_at_ms: int | None = None
    ) -> None:
        """Set the permission bits, or the time of the last change in milliseconds since 1970.

        Raises:
            NotSupported: if the environment has no such call.
        """
        await self._backend.set_metadata(await self._locate(path), mode=mode, modified_at_ms=modified_at_ms)

    @overload
    async def open(self, path: AnyPath, mode: Literal["rb", "wb"]) -> BinaryFile: ...

    @overload
    async def open(
        self, path: AnyPath, mode: Literal["r", "w"] = "r", *, encoding: str = "utf-8", errors: str = "strict"
    ) -> TextFile: ...

    async def open(
        self, path: AnyPath, mode: Mode = "r", *, encoding: str = "utf-8", errors: str = "strict"
    ) -> BinaryFile | TextFile:
        """Open a regular file; close it by `async with await env.files.open(path) as file:`.

        `"w"` creates it or makes it empty at once. Other modes, and locking, there are none.
        """
        if mode not in ("r", "rb", "w", "wb"):
            raise UsageError(f"mode must be 'r', 'rb', 'w' or 'wb', not {mode!r}")
        if "b" not in mode:  # an unknown one is told before anything is opened
            codecs.getincrementaldecoder(encoding)
            codecs.getincrementalencoder(encoding)
        where = await self._locate(path)
        writing = mode.startswith("w")
        handle = await self._backend.open(where, "replace" if writing else "read")
        file = BinaryFile(handle, where, writing=writing)
        return file if "b" in mode else TextFile(file, encoding, errors)

    @asynccontextmanager
    async def watch_missing(
        self, missing: Iterable[AnyPath], present: AnyPath | None = None
    ) -> AsyncIterator[Watch | None]:
        """Wait for files to come into being, or for something to happen to the one at `present`.

        async with env.files.watch_missing(["/run/ready"]) as watch:
            if watch is not None:
                await watch.wait()

        The block gets `None` if there is nothing to wait for any more. That something changed is all that is
        told, and once; a change on the way, such as a new parent, counts too.
        """
        wanted = tuple([await self._locate(path) for path in missing])
        there = None if present is None else await self._locate(present)
        async with self._backend.watch_missing(wanted, there) as watch:
            yield watch

    async def upload(
        self,
        source: str | os.PathLike[str],
        destination: AnyPath,
        *,
        atomic: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> TransferReport:
        """Copy a file or a whole tree from this machine, to exactly that path. See `transfer.copy`."""
        from execenv.transfer import copy, open_this_machine

        async with open_this_machine() as here:
            local = _here(source)
            where = await self._locate(destination)
            return await copy(here, local, self._backend, where, atomic=atomic, progress=progress)

    async def download(
        self,
        source: AnyPath,
        destination: str | os.PathLike[str],
        *,
        atomic: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> TransferReport:
        """Copy a file or a whole tree to this machine, to exactly that path. See `transfer.copy`."""
        from execenv.transfer import copy, open_this_machine

        async with open_this_machine() as here:
            local = _here(destination)
            where = await self._locate(source)
            return await copy(self._backend, where, here, local, atomic=atomic, progress=progress)


def _here(path: str | os.PathLike[str]) -> PathUri:
    return PathUri.from_native(os.path.abspath(path))


async def _one(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]
