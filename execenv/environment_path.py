"""Paths of an environment as objects, in the manner of `trio.Path`."""

from __future__ import annotations

import errno
import re
from collections.abc import AsyncGenerator, Callable
from fnmatch import translate
from typing import TYPE_CHECKING, Literal, overload

from execenv.paths import PathUri, PathUriError
from execenv.protocol import ONE_DIRECTORY, FileMetadata

if TYPE_CHECKING:
    from execenv.file import BinaryFile, TextFile
    from execenv.files import Files
    from execenv.transfer import Progress, TransferReport

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF)


class EnvironmentPath:
    """An absolute path in an environment. Got from `Environment.path`.

    What only looks at the text (`/`, `parent`, `name`, ...) is done at once; what asks the environment is
    awaited, and raises the `OSError` that `trio.Path` would raise.

    It is no `os.PathLike`: `open(path)` here would open another file. `str(path)` is the text.

    Attributes:
        uri: the path as the protocol has it.
    """

    __slots__ = ("_files", "uri")

    def __init__(self, files: Files, uri: PathUri) -> None:
        self._files = files
        self.uri = uri if uri.is_fallback else uri.join()  # without a slash at the end

    # Text.

    def __str__(self) -> str:
        return self.uri.text

    def __repr__(self) -> str:
        return f"EnvironmentPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EnvironmentPath):
            return NotImplemented
        return self.uri == other.uri and self._files is other._files

    def __hash__(self) -> int:
        return hash(self.uri)

    def __lt__(self, other: EnvironmentPath) -> bool:
        return self.uri.uri < other.uri.uri

    def __truediv__(self, other: str) -> EnvironmentPath:
        return self.joinpath(other)

    def joinpath(self, *others: str) -> EnvironmentPath:
        """Each from where the one before it leads; an absolute one begins anew. `..` takes a name away."""
        uri = self.uri
        for other in others:
            try:
                uri = uri.join(other)
            except PathUriError:
                uri = PathUri.parse(other)
        return EnvironmentPath(self._files, uri)

    @property
    def parent(self) -> EnvironmentPath:
        """The directory it is in; a root is its own parent."""
        return EnvironmentPath(self._files, self.uri.parent() or self.uri)

    @property
    def parents(self) -> tuple[EnvironmentPath, ...]:
        """Its parent, and so on up to the root."""
        found: list[EnvironmentPath] = []
        current = self.uri.parent()
        while current is not None:
            found.append(EnvironmentPath(self._files, current))
            current = current.parent()
        return tuple(found)

    @property
    def name(self) -> str:
        """The last name; empty at a root."""
        return self.uri.name

    @property
    def suffix(self) -> str:
        """`.gz` of `a.tar.gz`; empty if there is none."""
        stem, dot, suffix = self.name.rpartition(".")
        return dot + suffix if stem.strip(".") and suffix else ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.removesuffix(self.suffix) if self.suffix else self.name

    def with_name(self, name: str) -> EnvironmentPath:
        """Another name in the same directory.

        Raises:
            ValueError: if it is no name, or this is a root.
        """
        if not self.name or not name or "/" in name or name in (".", ".."):
            raise ValueError(f"{self} cannot be given the name {name!r}")
        return self.parent / name

    def with_suffix(self, suffix: str) -> EnvironmentPath:
        return self.with_name(self.stem + suffix)

    def relative_to(self, other: EnvironmentPath | str) -> str:
        """The text that leads here from `other`.

        Raises:
            ValueError: if this is not below `other`.
        """
        base = other if isinstance(other, EnvironmentPath) else self.joinpath(other)
        names: list[str] = []
        current: PathUri | None = self.uri
        while current is not None:
            if current == base.uri:
                return "/".join(reversed(names)) or "."
            names.append(current.name)
            current = current.parent()
        raise ValueError(f"{self} is not below {base}")

    def is_relative_to(self, other: EnvironmentPath | str) -> bool:
        try:
            self.relative_to(other)
        except ValueError:
            return False
        return True

    # Content.

    async def read_bytes(self) -> bytes:
        return await self._files.read_file(self)

    async def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return (await self.read_bytes()).decode(encoding, errors)

    async def write_bytes(self, data: bytes, *, atomic: bool = False) -> int:
        """Make `data` the content; `atomic` as for `Files.write_file`."""
        await self._files.write_file(self, data, atomic=atomic)
        return len(data)

    async def write_text(
        self, text: str, encoding: str = "utf-8", errors: str = "strict", *, atomic: bool = False
    ) -> int:
        await self.write_bytes(text.encode(encoding, errors), atomic=atomic)
        return len(text)

    @overload
    async def open(self, mode: Literal["rb", "wb"]) -> BinaryFile: ...

    @overload
    async def open(
        self, mode: Literal["r", "w"] = "r", *, encoding: str = "utf-8", errors: str = "strict"
    ) -> TextFile: ...

    async def open(
        self, mode: Literal["r", "w", "rb", "wb"] = "r", *, encoding: str = "utf-8", errors: str = "strict"
    ) -> BinaryFile | TextFile:
        """See `Files.open`: `async with await path.open() as file: ...`."""
        if mode == "rb" or mode == "wb":
            return await self._files.open(self, mode)
        return await self._files.open(self, mode, encoding=encoding, errors=errors)

    async def copy_to(
        self,
        destination: EnvironmentPath,
        *,
        atomic: bool = False,
        progress: Callable[[Progress], None] | None = None,
        on_error: Callable[[OSError], None] | None = None,
    ) -> TransferReport:
        """Copy a file or a tree to exactly `destination`, here or elsewhere. See `transfer.copy`."""
        from execenv.transfer import copy

        return await copy(
            self._files._backend,
            self.uri,
            destination._files._backend,
            destination.uri,
            atomic=atomic,
            progress=progress,
            on_error=on_error,
        )

    # What it is.

    async def stat(self) -> FileMetadata:
        """Of what a link leads to."""
        return await self._files.get_metadata(self)

    async def exists(self) -> bool:
        return await self._stat_or_none() is not None

    async def is_file(self) -> bool:
        found = await self._stat_or_none()
        return found is not None and found.is_file

    async def is_dir(self) -> bool:
        found = await self._stat_or_none()
        return found is not None and found.is_directory

    async def is_symlink(self) -> bool:
        """Whether it is a link that leads somewhere; of one that leads nowhere the protocol doesn't tell."""
        found = await self._stat_or_none()
        return found is not None and found.is_symlink

    async def _stat_or_none(self) -> FileMetadata | None:
        try:
            return await self.stat()
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    async def resolve(self) -> EnvironmentPath:
        """The path without links. It must exist."""
        return EnvironmentPath(self._files, await self._files.canonicalize(self))

    # Directories.

    async def iterdir(self) -> list[EnvironmentPath]:
        """What is in the directory, by name. Links that lead nowhere are left out."""
        return [path for path, _ in await self._entries()]

    async def _entries(self) -> list[tuple[EnvironmentPath, bool]]:
        """The paths in the directory, and which are directories."""
        entries = await self._files.read_directory(self)
        found = [
            (EnvironmentPath(self._files, self.uri.join(entry.file_name)), entry.is_directory)
            for entry in entries
            if "\ufffd" not in entry.file_name
        ]
        if len(found) < len(entries):
            # Names that are not UTF-8 cannot be told from others by their text; a walk has them as they are.
            # It begins at no link.
            walked = await self._files._backend.walk(await self._files.canonicalize(self), ONE_DIRECTORY)
            found += {  # each once: a server may have U+FFFD there too
                (self / entry.path.name, entry.kind == "directory")
                for entry in walked.entries
                if "\ufffd" in _shown(entry.path.name)
            }
        return sorted(found, key=lambda item: item[0].name)

    async def walk(
        self, *, follow_symlinks: bool = False
    ) -> AsyncGenerator[tuple[EnvironmentPath, list[str], list[str]], None]:
        """As `os.walk`, from the top: each directory, the names of directories in it, and the other names.

        What is taken out of the list of directories is not visited. A link to a directory is among the
        files, unless links are followed; then beware of circles.
        """
        waiting = [self]
        while waiting:
            directory = waiting.pop()
            directories: list[str] = []
            files: list[str] = []
            for path, is_directory in await directory._entries():
                if is_directory and not follow_symlinks:
                    is_directory = not await path.is_symlink()
                (directories if is_directory else files).append(path.name)
            yield directory, directories, files
            waiting += [directory / name for name in reversed(directories)]

    async def glob(self, pattern: str) -> list[EnvironmentPath]:
        """What is below the directory and matches, by name: `*.py`, `src/*/test_?.py`, `**/*.md`.

        Names that begin with a dot match as any others. `**` does not follow links.
        """
        segments = [segment for segment in pattern.split("/") if segment not in ("", ".")]
        if not segments or pattern.startswith("/"):
            raise ValueError(f"{pattern!r} is no relative pattern")
        found: dict[EnvironmentPath, None] = {}
        await self._glob(segments, found)
        return list(found)

    async def _glob(self, segments: list[str], found: dict[EnvironmentPath, None]) -> None:
        first, rest = segments[0], segments[1:]
        try:
            entries = await self._entries()
        except (PermissionError, FileNotFoundError):
            return
        if first == "**":
            if rest:
                await self._glob(rest, found)
            else:
                found[self] = None
            for path, is_directory in entries:
                if is_directory and not await path.is_symlink():
                    await path._glob(segments, found)
            return
        matches = re.compile(translate(first)).match
        for path, is_directory in entries:
            if not matches(path.name):
                continue
            if not rest:
                found[path] = None
            elif is_directory:
                await path._glob(rest, found)

    async def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """As `trio.Path.mkdir`."""
        try:
            await self._files.create_directory(self, recursive=False)
        except FileNotFoundError:
            if not parents:
                raise
            await self._files.create_directory(self)
        except FileExistsError:
            if not exist_ok or not await self.is_dir():
                raise

    # Changes.

    async def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove a file or a link.

        Raises:
            IsADirectoryError: if it is a directory.
        """
        found = await self._stat_or_none()
        if found is not None and found.is_directory and not found.is_symlink:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(self))
        await self._files.remove(self, recursive=False, force=missing_ok)

    async def rmdir(self) -> None:
        """Remove an empty directory."""
        found = await self.stat()
        if not found.is_directory or found.is_symlink:
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(self))
        await self._files.remove(self, recursive=False, force=False)

    async def rename(self, target: EnvironmentPath | str) -> EnvironmentPath:
        """Give it another name, replacing what has that name; the path that it has then."""
        other = target if isinstance(target, EnvironmentPath) else self.parent.joinpath(target)
        await self._files.rename(self, other)
        return other

    replace = rename

    async def chmod(self, mode: int) -> None:
        await self._files.set_metadata(self, mode=mode)


def _shown(name: str) -> str:
    """A name as `read_directory` has it."""
    return name.encode("utf-8", "surrogateescape").decode(errors="replace")
