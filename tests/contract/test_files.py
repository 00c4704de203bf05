"""Contract of `Environment.files` and `Environment.path`: the same files, the same errors, whoever serves.

The server runs on this machine, so each test looks at the files themselves too.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from hashlib import shake_128
from typing import Any, ParamSpec

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import Environment, PathUri, UsageError, open_environment
from execenv.environment_path import EnvironmentPath
from execenv.errors import os_error_text
from execenv.paths import ForeignPathError, PathUriError
from execenv.protocol import DirectoryEntry

ODD_NAMES = (
    "line\nbreak",
    "tab\there",
    "100%",
    "%41",
    "%2F",
    "with space",
    " edges ",
    "back\\slash",
    "..\\up",
    "a#b",
    "a?b=c",
    "a:b",
    "c|",
    "C:",
    "...",
    "~",
    "*",
    "[x]",
    "{y}",
    "é",
    "日本",
    "e\u0301",
    "\ufffd",
    "\x7f\x1b",
    "-rf",
    "n" * 255,
)
NOT_UTF8 = (b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"a\xffb\xfe\n")

P = ParamSpec("P")
Call = Callable[[], Awaitable[object]]

pytestmark = pytest.mark.parametrize("environment", ["local", "memory", "websocket"], indirect=True)
"""Without stdio, where a server has to be started for each test: what test_transfer moves is enough there."""


@contextmanager
def folder() -> Iterator[str]:
    """A new directory, without links in its path."""
    with tempfile.TemporaryDirectory() as path:
        yield os.path.realpath(path)


def write(path: str | bytes, data: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(data)


def read(path: str | bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def kind(path: str) -> str:
    """What is at the path itself."""
    if os.path.islink(path):
        return "link"
    if os.path.isdir(path):
        return "directory"
    return "file" if os.path.lexists(path) else "nothing"


def relative(path: str, start: str) -> str:
    return os.path.relpath(path, start)


def resolved(path: str) -> str:
    return os.path.realpath(path)


def pattern(size: int) -> bytes:
    """Bytes of which no two blocks are alike, so that a piece in the wrong place is seen."""
    return shake_128().digest(size)


async def check_error(
    number: int, path: str, call: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs
) -> None:
    """The call fails with that errno, and with the subclass and the file name that go with it."""
    with pytest.raises(OSError) as caught:
        await call(*args, **kwargs)
    error = caught.value
    assert (errno.errorcode.get(error.errno or 0), error.filename) == (errno.errorcode[number], path)
    assert type(error) is type(OSError(number, ""))
    assert error.strerror


def make_kinds(top: str) -> None:
    """One of each kind: a file, directories, and links of all sorts."""
    write(f"{top}/file", b"content")
    os.mkdir(f"{top}/empty")
    os.mkdir(f"{top}/full")
    write(f"{top}/full/inner", b"inner")
    os.symlink("file", f"{top}/link")
    os.symlink("full", f"{top}/dirlink")
    os.symlink("nowhere", f"{top}/dangling")
    os.symlink("loop", f"{top}/loop")


# Content.


async def test_content_comes_back(environment: Environment) -> None:
    with folder() as top:
        for data in (b"", b"x", b"\0\xff\r\n", pattern(100_000)):
            await environment.files.write_file(f"{top}/a", data)
            assert read(f"{top}/a") == data
            assert await environment.files.read_file(f"{top}/a") == data


async def test_sizes_around_a_block(environment: Environment) -> None:
    with folder() as top:
        for size in (2**20 - 1, 2**20, 2**20 + 1, 2 * 2**20):
            data = pattern(size)
            await environment.files.write_file(f"{top}/a", data)
            assert read(f"{top}/a") == data
            assert await environment.files.read_file(f"{top}/a") == data


async def test_large_file(environment: Environment) -> None:
    data = pattern(9_000_001)
    with folder() as top:
        await environment.files.write_file(f"{top}/large", data)
        assert read(f"{top}/large") == data
        assert await environment.files.read_file(f"{top}/large") == data


async def test_writing_keeps_the_file_and_its_mode(environment: Environment) -> None:
    with folder() as top:
        for size in (10, 2_000_000):
            write(f"{top}/a", b"old content, longer than ten")
            os.chmod(f"{top}/a", 0o640)
            os.link(f"{top}/a", f"{top}/b{size}")
            await environment.files.write_file(f"{top}/a", pattern(size))
            assert read(f"{top}/b{size}") == pattern(size)
            assert stat.S_IMODE(os.stat(f"{top}/a").st_mode) == 0o640


async def test_new_file_has_the_permissions_that_the_umask_leaves(environment: Environment) -> None:
    with folder() as top:
        await environment.run(["touch", f"{top}/theirs"])
        await environment.files.write_file(f"{top}/ours", b"x")
        assert os.stat(f"{top}/ours").st_mode == os.stat(f"{top}/theirs").st_mode


async def test_writing_through_links(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        await environment.files.write_file(f"{top}/link", b"through")
        await environment.files.write_file(f"{top}/dangling", b"created")
        assert (read(f"{top}/file"), read(f"{top}/nowhere")) == (b"through", b"created")
        assert kind(f"{top}/link") == "link"


async def test_file_that_says_it_is_empty_and_is_not(environment: Environment) -> None:
    assert (await environment.files.read_file("/proc/self/status")).startswith(b"Name:")


# Errors.


async def test_not_found(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files = environment.files
        for path in (f"{top}/none", f"{top}/none/inner", f"{top}/dangling"):
            await check_error(errno.ENOENT, path, files.read_file, path)
            await check_error(errno.ENOENT, path, files.get_metadata, path)
            await check_error(errno.ENOENT, path, files.canonicalize, path)
            await check_error(errno.ENOENT, path, files.read_directory, path)
            await check_error(errno.ENOENT, path, files.open, path)
        for path in (f"{top}/none", f"{top}/none/inner"):
            await check_error(errno.ENOENT, path, files.remove, path, force=False)
            await check_error(errno.ENOENT, path, files.copy, path, f"{top}/new")
            await check_error(errno.ENOENT, path, files.walk, path)
        inner = f"{top}/none/inner"
        await check_error(errno.ENOENT, inner, files.write_file, inner, b"")
        await check_error(errno.ENOENT, inner, files.write_file, inner, bytes(2**21))
        await check_error(errno.ENOENT, inner, files.create_directory, inner, recursive=False)


async def test_not_a_directory(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files, below = environment.files, f"{top}/file/x"
        await check_error(errno.ENOTDIR, below, files.read_file, below)
        await check_error(errno.ENOTDIR, below, files.write_file, below, b"")
        await check_error(errno.ENOTDIR, below, files.get_metadata, below)
        await check_error(errno.ENOTDIR, below, files.canonicalize, below)
        await check_error(errno.ENOTDIR, below, files.remove, below)
        await check_error(errno.ENOTDIR, below, files.create_directory, below)
        await check_error(errno.ENOTDIR, below, files.create_directory, below, recursive=False)
        await check_error(errno.ENOTDIR, f"{top}/file", files.read_directory, f"{top}/file")
        await check_error(errno.ENOTDIR, f"{top}/link", files.read_directory, f"{top}/link")


async def test_is_a_directory(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files = environment.files
        for path in (f"{top}/empty", f"{top}/dirlink"):
            await check_error(errno.EISDIR, path, files.read_file, path)
            await check_error(errno.EISDIR, path, files.open, path, "rb")
            await check_error(errno.EISDIR, path, files.write_file, path, b"x")
            await check_error(errno.EISDIR, f"{top}/file", files.copy, f"{top}/file", path)
        await check_error(errno.EISDIR, f"{top}/full", files.copy, f"{top}/full", f"{top}/new")
        large = bytes(2**21)
        await check_error(errno.EISDIR, f"{top}/empty", files.write_file, f"{top}/empty", large)


async def test_exists(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files = environment.files
        for name, recursive in (("file", True), ("file", False), ("empty", False), ("dangling", False)):
            path = f"{top}/{name}"
            await check_error(errno.EEXIST, path, files.create_directory, path, recursive=recursive)
        await check_error(errno.EEXIST, f"{top}/link", files.copy, f"{top}/link", f"{top}/file")
        await check_error(
            errno.EEXIST, f"{top}/full", files.copy, f"{top}/full", f"{top}/file", recursive=True
        )
        assert read(f"{top}/file") == b"content"


async def test_not_empty(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        path = f"{top}/full"
        await check_error(errno.ENOTEMPTY, path, environment.files.remove, path, recursive=False)
        assert os.listdir(path) == ["inner"]


async def test_loop(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files = environment.files
        for path in (f"{top}/loop", f"{top}/loop/inner"):
            await check_error(errno.ELOOP, path, files.read_file, path)
            await check_error(errno.ELOOP, path, files.write_file, path, b"")
            await check_error(errno.ELOOP, path, files.get_metadata, path)
            await check_error(errno.ELOOP, path, files.canonicalize, path)


async def test_name_too_long(environment: Environment) -> None:
    with folder() as top:
        path = f"{top}/{'n' * 256}"
        await check_error(errno.ENAMETOOLONG, path, environment.files.read_file, path)
        await check_error(errno.ENAMETOOLONG, path, environment.files.write_file, path, b"")


async def test_special_file_is_no_file(environment: Environment) -> None:
    with folder() as top:
        os.mkfifo(f"{top}/fifo")
        os.symlink("/dev/zero", f"{top}/zero")
        for path in (f"{top}/fifo", "/dev/zero", f"{top}/zero"):
            for call in (environment.files.read_file, environment.files.open):
                await check_error(errno.EINVAL, path, call, path)
            found = await environment.files.get_metadata(path)
            assert (found.is_file, found.is_directory) == (False, False)


async def test_error_reads_as_that_of_this_machine(environment: Environment) -> None:
    with folder() as top:
        with pytest.raises(FileNotFoundError) as ours:
            os.stat(f"{top}/none")
        with pytest.raises(FileNotFoundError) as theirs:
            await environment.files.get_metadata(f"{top}/none")
        assert os_error_text(theirs.value) == os_error_text(ours.value)
        assert theirs.value.filename == ours.value.filename


# Which file is meant.


async def test_relative_paths_begin_at_the_working_directory(environment: Environment) -> None:
    cwd = (await environment.info()).cwd
    assert cwd is not None
    with folder() as top:
        write(f"{top}/a", b"found")
        path = relative(f"{top}/a", cwd.text)
        assert await environment.files.read_file(path) == b"found"
        assert await environment.files.canonicalize(path) == PathUri.from_native(f"{top}/a")
        missing = relative(f"{top}/none", cwd.text)
        await check_error(errno.ENOENT, f"{top}/none", environment.files.read_file, missing)


async def test_uris_and_path_objects_are_paths_too(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a b", b"found")
        for path in (
            PathUri.from_native(f"{top}/a b"),
            f"file://{top}/a%20b",
            environment.path(f"{top}/a b"),
            environment.path(PathUri.from_native(f"{top}/a b")),
        ):
            assert await environment.files.read_file(path) == b"found"


async def test_path_of_another_environment_is_refused(environment: Environment) -> None:
    async with open_environment("local") as other:
        path = other.path("/etc/passwd")
        with pytest.raises(UsageError, match="another environment"):
            await environment.files.read_file(path)
        with pytest.raises(UsageError, match="another environment"):
            await environment.files.copy("/etc/passwd", path)
        with pytest.raises(UsageError, match="another environment"):
            await environment.path("/tmp").rename(path)


async def test_path_of_windows_is_refused(environment: Environment) -> None:
    for text in ("C:\\x\\y", "C:/x", "\\\\host\\share\\f", "file:///C:/x", "file://host/x"):
        for call in (
            environment.files.read_file,
            environment.files.get_metadata,
            environment.files.canonicalize,
            environment.files.read_directory,
            environment.files.remove,
            environment.files.open,
        ):
            with pytest.raises(ForeignPathError, match="is invalid on"):
                await call(text)
        with pytest.raises(ForeignPathError, match="is invalid on"):
            await environment.path(text).iterdir()
    with pytest.raises(ForeignPathError):
        await environment.files.write_file("C:\\x", b"x")
    with pytest.raises(ForeignPathError):
        await environment.files.write_file("C:\\x", bytes(2**21))


async def test_what_is_no_path_is_refused(environment: Environment) -> None:
    with pytest.raises(PathUriError):
        await environment.files.read_file("file:///a?b")
    with pytest.raises(PathUriError):
        await environment.files.read_file("")
    with pytest.raises(PathUriError):
        environment.path("relative")


async def test_odd_names(environment: Environment) -> None:
    with folder() as top:
        for name in ODD_NAMES:
            await environment.files.write_file(f"{top}/{name}", name.encode())
        assert sorted(os.listdir(top)) == sorted(ODD_NAMES)
        for name in ODD_NAMES:
            assert read(f"{top}/{name}") == name.encode()
            assert await environment.files.read_file(f"{top}/{name}") == name.encode()
        assert {entry.file_name for entry in await environment.files.read_directory(top)} == set(ODD_NAMES)
        top_path = environment.path(top)
        assert [path.name for path in await top_path.iterdir()] == sorted(ODD_NAMES)
        for name in ODD_NAMES:
            path = top_path / name
            assert (path.name, str(path), path.parent) == (name, f"{top}/{name}", top_path)
            assert await path.read_bytes() == name.encode()
            await path.unlink()
        assert os.listdir(top) == []


async def test_names_that_are_not_utf8(environment: Environment) -> None:
    with folder() as top:
        root, path = os.fsencode(top), environment.path(top)
        for name in NOT_UTF8:
            await environment.files.write_file(path.uri.join(name), name)
            assert read(root + b"/" + name) == name
        os.mkdir(root + b"/\xfe")
        names = {entry.file_name for entry in await environment.files.read_directory(top)}
        assert names == {name.decode(errors="replace") for name in (*NOT_UTF8, b"\xfe")}
        for name in NOT_UTF8:
            text = os.fsdecode(name)
            assert await (path / text).read_bytes() == name
            assert await environment.files.read_file(f"{top}/{text}") == name
            await environment.files.copy(f"{top}/{text}", path.uri.join(b"\xfe", name))
        assert sorted(os.listdir(root + b"/\xfe")) == sorted(NOT_UTF8)
        await environment.files.remove(path / os.fsdecode(b"\xfe"))
        assert sorted(os.listdir(root)) == sorted(NOT_UTF8)


async def test_names_that_are_not_utf8_are_found(environment: Environment) -> None:
    with folder() as top:
        root = os.fsencode(top)
        os.mkdir(root + b"/\xfe")
        for name in NOT_UTF8:
            write(root + b"/\xfe/" + name, name)
        os.symlink(b"\xfe", f"{top}/link")
        path = environment.path(top)
        for directory in (path / "link", path / os.fsdecode(b"\xfe")):
            found = await directory.iterdir()
            assert sorted(os.fsencode(inner.name) for inner in found) == sorted(NOT_UTF8)
            assert {await inner.read_bytes() for inner in found} == set(NOT_UTF8)
        assert [os.fsencode(inner.name) for inner in await path.glob("*/caf*")] == [b"caf\xe9"] * 2
        walked = [(os.fsencode(str(where)), len(names)) async for where, _, names in path.walk()]
        assert walked == [(root, 1), (root + b"/\xfe", len(NOT_UTF8))]


# Looking.


async def test_metadata(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        os.utime(f"{top}/file", ns=(1, 1_234_567_891_234_567_890))
        os.chmod(f"{top}/file", 0o640)
        found = await environment.files.get_metadata(f"{top}/file")
        assert (found.is_file, found.is_directory, found.is_symlink, found.size) == (True, False, False, 7)
        assert found.modified_at_ms == 1_234_567_891_234
        linked = await environment.files.get_metadata(f"{top}/link")
        assert (linked.is_file, linked.is_directory, linked.is_symlink, linked.size) == (True, False, True, 7)
        assert linked.modified_at_ms == found.modified_at_ms
        directory = await environment.files.get_metadata(f"{top}/full")
        assert (directory.is_file, directory.is_directory, directory.is_symlink) == (False, True, False)
        directory = await environment.files.get_metadata(f"{top}/dirlink")
        assert (directory.is_file, directory.is_directory, directory.is_symlink) == (False, True, True)


async def test_metadata_says_the_permissions(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/file")
        for mode in (0o640, 0o4755, 0o000):
            os.chmod(f"{top}/file", mode)
            assert (await environment.files.get_metadata(f"{top}/file")).mode == mode


async def test_metadata_of_a_time_before_1970(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/file")
        os.utime(f"{top}/file", ns=(0, -1_500_000_000))
        assert (await environment.files.get_metadata(f"{top}/file")).modified_at_ms == -1500


async def test_canonicalize_resolves_all_links(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        os.symlink(f"{top}/dirlink/../link", f"{top}/chain")
        for path, real in (
            ("chain", "file"),
            ("dirlink/inner", "full/inner"),
            ("dirlink", "full"),
            ("file", "file"),
        ):
            expected = PathUri.from_native(f"{top}/{real}")
            assert await environment.files.canonicalize(f"{top}/{path}") == expected
        assert str(await environment.path(f"{top}/chain").resolve()) == f"{top}/file"
    assert await environment.files.canonicalize("/") == PathUri.parse("/")


async def test_read_directory_follows_links_and_leaves_out_dangling_ones(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        os.mkfifo(f"{top}/.fifo")
        found = await environment.files.read_directory(top)
        assert set(found) == {
            DirectoryEntry("file", False, True),
            DirectoryEntry("link", False, True),
            DirectoryEntry("empty", True, False),
            DirectoryEntry("full", True, False),
            DirectoryEntry("dirlink", True, False),
            DirectoryEntry(".fifo", False, False),
        }
        assert len(found) == 6
        assert [entry.file_name for entry in await environment.files.read_directory(f"{top}/dirlink")] == [
            "inner"
        ]
        assert await environment.files.read_directory(f"{top}/empty") == ()


async def test_directory_with_many_entries(environment: Environment) -> None:
    with folder() as top:
        names = {f"{number:03}" for number in range(500)}
        for name in names:
            write(f"{top}/{name}")
        assert {entry.file_name for entry in await environment.files.read_directory(top)} == names


def make_tree(top: str) -> None:
    for directory in ("b/c/d", "a", ".hidden/x"):
        os.makedirs(f"{top}/{directory}")
    for file in ("b/1", "b/c/2", "b/c/d/3", "a/4", ".hidden/5", "0"):
        write(f"{top}/{file}")
    os.symlink("b", f"{top}/to-b")
    os.symlink("0", f"{top}/to-0")
    os.mkfifo(f"{top}/a/fifo")


async def walked(environment: Environment, top: str, **options: Any) -> tuple[list[str], bool]:
    found = await environment.files.walk(top, **options)
    assert found.errors == ()
    for entry in found.entries:
        assert entry.kind == kind(resolved(entry.path.text))
    return [relative(entry.path.text, top) for entry in found.entries], found.truncated


async def test_walk_is_breadth_first_by_name_without_links(environment: Environment) -> None:
    with folder() as top:
        make_tree(top)
        names = [".hidden", "0", "a", "b", ".hidden/5", ".hidden/x", "a/4", "b/1", "b/c", "b/c/2", "b/c/d"]
        assert await walked(environment, top) == ([*names, "b/c/d/3"], False)


async def test_walk_within_limits(environment: Environment) -> None:
    with folder() as top:
        make_tree(top)
        assert await walked(environment, top, max_depth=0) == ([".hidden", "0", "a", "b"], False)
        assert await walked(environment, top, max_entries=3) == ([".hidden", "0", "a"], True)
        assert await walked(environment, top, max_directories=1) == ([".hidden", "0", "a", "b"], True)
        pruned, truncated = await walked(environment, top, prune_hidden_directories=True)
        assert (".hidden" in pruned, ".hidden/x" in pruned, truncated) == (True, False, False)
        for limit in ("max_entries", "max_directories"):
            with pytest.raises(OSError, match="filesystem walk limits must be greater than zero"):
                await walked(environment, top, **{limit: 0})


async def test_walk_through_links_goes_into_a_directory_once(environment: Environment) -> None:
    with folder() as top:
        os.makedirs(f"{top}/a/b")
        write(f"{top}/a/b/1")
        os.symlink("..", f"{top}/a/up")
        os.symlink("a/b", f"{top}/z")
        names, truncated = await walked(environment, top, follow_directory_symlinks=True)
        assert not truncated
        assert names[:4] == ["a", "z", "a/b", "a/up"]
        assert len([name for name in names if name.endswith("/1")]) == 1


async def test_walk_of_a_file_finds_nothing(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/file")
        assert await walked(environment, f"{top}/file") == ([], False)


# Changing.


async def test_create_directory(environment: Environment) -> None:
    with folder() as top:
        await environment.files.create_directory(f"{top}/a/b/c")
        await environment.files.create_directory(f"{top}/a/b/c")
        await environment.files.create_directory(f"{top}/a/d", recursive=False)
        os.symlink("a", f"{top}/link")
        await environment.files.create_directory(f"{top}/link")
        await environment.files.create_directory(f"{top}/link/e/f")
        assert sorted(os.listdir(f"{top}/a")) == ["b", "d", "e"]
        assert kind(f"{top}/a/b/c") == "directory"
        assert kind(f"{top}/a/e/f") == "directory"


async def test_remove(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        for name in ("loop", "dangling", "link", "dirlink/", "empty", "full", "none", "none/inner"):
            await environment.files.remove(f"{top}/{name}")
        assert os.listdir(top) == ["file"]
        await environment.files.remove(f"{top}/file", recursive=False, force=False)
        assert os.listdir(top) == []


async def test_remove_never_follows_links(environment: Environment) -> None:
    with folder() as top:
        os.makedirs(f"{top}/kept/inner")
        write(f"{top}/kept/file", b"kept")
        os.makedirs(f"{top}/tree/deep")
        for name in ("tree/to-dir", "tree/deep/to-dir"):
            os.symlink(f"{top}/kept", f"{top}/{name}")
        os.symlink(f"{top}/kept/file", f"{top}/tree/to-file")
        await environment.files.remove(f"{top}/tree")
        assert os.listdir(top) == ["kept"]
        assert sorted(os.listdir(f"{top}/kept")) == ["file", "inner"]


async def test_remove_many(environment: Environment) -> None:
    with folder() as top:
        for number in range(60):
            os.makedirs(f"{top}/tree/{number}/inner")
            write(f"{top}/tree/{number}/inner/file")
        await environment.files.remove(f"{top}/tree")
        assert os.listdir(top) == []


async def test_copy_of_a_file(environment: Environment) -> None:
    with folder() as top:
        data = pattern(3_000_000)
        write(f"{top}/a", data)
        os.chmod(f"{top}/a", 0o757)
        write(f"{top}/old", b"old")
        os.chmod(f"{top}/old", 0o600)
        for name in ("new", "old"):
            await environment.files.copy(f"{top}/a", f"{top}/{name}")
            assert read(f"{top}/{name}") == data
            assert stat.S_IMODE(os.stat(f"{top}/{name}").st_mode) == 0o757
        write(f"{top}/short", b"short")
        os.symlink("new", f"{top}/link")
        await environment.files.copy(f"{top}/short", f"{top}/link")
        assert (read(f"{top}/new"), kind(f"{top}/link")) == (b"short", "link")
        missing = f"{top}/none/a"
        await check_error(errno.ENOENT, f"{top}/a", environment.files.copy, f"{top}/a", missing)


async def test_copy_of_a_link_is_a_link(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        for name, target in (("link", "file"), ("dirlink", "full"), ("dangling", "nowhere")):
            for recursive in (False, True):
                copied = f"{top}/{name}-{recursive}"
                await environment.files.copy(f"{top}/{name}", copied, recursive=recursive)
                assert os.readlink(copied) == target


async def test_copy_of_a_tree(environment: Environment) -> None:
    with folder() as top:
        make_tree(f"{top}/from")
        os.chmod(f"{top}/from/b/c/2", 0o600)
        os.makedirs(f"{top}/to/b")
        write(f"{top}/to/b/1", b"old")
        write(f"{top}/to/b/other", b"other")
        await environment.files.copy(f"{top}/from", f"{top}/to", recursive=True)
        copied = sorted(
            relative(f"{where}/{name}", f"{top}/to")
            for where, _, names in os.walk(f"{top}/to")
            for name in names
        )
        assert copied == [".hidden/5", "0", "a/4", "b/1", "b/c/2", "b/c/d/3", "b/other", "to-0"]
        assert (read(f"{top}/to/b/1"), read(f"{top}/to/b/other")) == (b"", b"other")
        assert (os.readlink(f"{top}/to/to-b"), os.readlink(f"{top}/to/to-0")) == ("b", "0")
        assert stat.S_IMODE(os.stat(f"{top}/to/b/c/2").st_mode) == 0o600
        assert kind(f"{top}/to/.hidden/x") == "directory"


async def test_copy_of_a_tree_creates_parents_and_goes_through_a_link(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        await environment.files.copy(f"{top}/full", f"{top}/new/parent/full", recursive=True)
        assert read(f"{top}/new/parent/full/inner") == b"inner"
        os.symlink("empty", f"{top}/to-empty")
        await environment.files.copy(f"{top}/full", f"{top}/to-empty", recursive=True)
        assert read(f"{top}/empty/inner") == b"inner"


async def test_copy_into_itself_is_refused(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        for destination in ("full", "full/new", "full/new/deep", "dirlink/new", "dirlink"):
            with pytest.raises(OSError, match="to itself or one of its descendants"):
                await environment.files.copy(f"{top}/full", f"{top}/{destination}", recursive=True)
        assert os.listdir(f"{top}/full") == ["inner"]
        await environment.files.copy(f"{top}/full", f"{top}/full-too", recursive=True)  # only sounds like it
        assert os.listdir(f"{top}/full-too") == ["inner"]


async def test_copy_of_a_file_onto_itself_loses_nothing(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        os.link(f"{top}/file", f"{top}/hard")
        for destination in ("file", "link", "hard"):
            await environment.files.copy(f"{top}/file", f"{top}/{destination}")
            assert read(f"{top}/file") == b"content"


async def test_copy_of_a_special_file_is_refused(environment: Environment) -> None:
    with folder() as top:
        os.mkfifo(f"{top}/fifo")
        with pytest.raises(OSError, match="only supports regular files, directories, and symlinks"):
            await environment.files.copy(f"{top}/fifo", f"{top}/new")
        assert os.listdir(top) == ["fifo"]


async def test_rename(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        await environment.files.rename(f"{top}/link", f"{top}/renamed")
        assert os.readlink(f"{top}/renamed") == "file"
        await environment.files.rename(f"{top}/file", f"{top}/full/inner")
        assert read(f"{top}/full/inner") == b"content"
        renamed = await environment.path(f"{top}/full").rename("moved")
        assert (str(renamed), os.listdir(f"{top}/moved")) == (f"{top}/moved", ["inner"])
        replaced = await (renamed / "inner").replace(environment.path(top) / "dangling")
        assert read(str(replaced)) == b"content"
        assert kind(f"{top}/dangling") == "file"
        await check_error(errno.ENOENT, f"{top}/none", environment.files.rename, f"{top}/none", f"{top}/x")


async def test_set_metadata(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/file")
        await environment.files.set_metadata(f"{top}/file", mode=0o751, modified_at_ms=1_234_567_891_234)
        found = os.stat(f"{top}/file")
        assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o751, 1_234_567_891_234_000_000)
        await environment.path(f"{top}/file").chmod(0o600)
        await environment.files.set_metadata(f"{top}/file", modified_at_ms=-1500)
        found = os.stat(f"{top}/file")
        assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o600, -1_500_000_000)
        missing = f"{top}/none"
        await check_error(errno.ENOENT, missing, environment.files.set_metadata, missing, mode=0o600)


# Without following links.


async def test_links_are_refused_where_they_are_not_to_be_followed(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files, link, inside = environment.files, f"{top}/link", f"{top}/dirlink/inner"
        await check_error(errno.ELOOP, link, files.read_file, link, follow_symlinks=False)
        await check_error(errno.ELOOP, link, files.write_file, link, b"x", follow_symlinks=False)
        await check_error(errno.ELOOP, link, files.get_metadata, link, follow_symlinks=False)
        for call in (
            lambda: files.read_file(inside, follow_symlinks=False),
            lambda: files.write_file(inside, b"x", follow_symlinks=False),
            lambda: files.get_metadata(inside, follow_symlinks=False),
            lambda: files.remove(inside, recursive=False, follow_symlinks=False),
        ):
            await check_error(errno.ENOTDIR, inside, call)
        new = f"{top}/dirlink/new"
        await check_error(errno.ENOTDIR, new, files.create_directory, new, follow_symlinks=False)
        assert (read(f"{top}/file"), os.listdir(f"{top}/full")) == (b"content", ["inner"])


async def test_without_links_it_is_the_same(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        files = environment.files
        assert await files.read_file(f"{top}/file", follow_symlinks=False) == b"content"
        await files.write_file(f"{top}/file", b"new", follow_symlinks=False)
        assert read(f"{top}/file") == b"new"
        found = await files.get_metadata(f"{top}/file", follow_symlinks=False)
        assert (found.is_file, found.is_symlink, found.size) == (True, False, 3)
        await files.create_directory(f"{top}/a/b", follow_symlinks=False)
        assert kind(f"{top}/a/b") == "directory"
        await files.remove(f"{top}/a/b", recursive=False, follow_symlinks=False)
        assert kind(f"{top}/a/b") == "nothing"


async def test_link_itself_is_removed_where_links_are_not_followed(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        await environment.files.remove(f"{top}/link", recursive=False, follow_symlinks=False)
        assert (kind(f"{top}/link"), read(f"{top}/file")) == ("nothing", b"content")


async def test_large_file_without_following_links(environment: Environment) -> None:
    data = pattern(3_000_000)
    with folder() as top:
        await environment.files.write_file(f"{top}/file", data, follow_symlinks=False)
        assert await environment.files.read_file(f"{top}/file", follow_symlinks=False) == data


# Open files.


async def test_open_file_reads_at_its_position(environment: Environment) -> None:
    data = pattern(2_500_000)
    with folder() as top:
        write(f"{top}/a", data)
        async with await environment.files.open(f"{top}/a", "rb") as file:
            assert file.path == PathUri.from_native(f"{top}/a")
            assert (await file.read(3), file.tell()) == (data[:3], 3)
            assert (await file.read(0), file.tell()) == (b"", 3)
            assert await file.read(2_000_000) == data[3:2_000_003]
            assert await file.seek(1_048_570) == 1_048_570
            assert (await file.read(10), file.tell()) == (data[1_048_570:1_048_580], 1_048_580)
            assert await file.read() == data[1_048_580:]
            assert (await file.read(), await file.read(5), file.tell()) == (b"", b"", len(data))
            await file.seek(5_000_000)
            assert (await file.read(1), file.tell()) == (b"", 5_000_000)
            with pytest.raises(UsageError, match="before its beginning"):
                await file.seek(-1)


async def test_open_file_reads_lines(environment: Environment) -> None:
    lines = [b"one\n", b"\n", b"x" * 1_500_000 + b"\n", b"caf\xe9\r\n", b"last"]
    with folder() as top:
        write(f"{top}/a", b"".join(lines))
        async with await environment.files.open(f"{top}/a", "rb") as file:
            assert (await file.readline(), file.tell()) == (b"one\n", 4)
            assert [line async for line in file] == lines[1:]
            assert await file.readline() == b""


async def test_open_file_stays_what_it_was_when_it_is_removed(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"still there")
        async with await environment.files.open(f"{top}/a", "rb") as file:
            os.unlink(f"{top}/a")
            assert await file.read() == b"still there"


async def test_open_file_sees_what_was_added(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"one")
        async with await environment.files.open(f"{top}/a", "rb") as file:
            assert await file.read() == b"one"
            write(f"{top}/a", b"onetwo")
            assert await file.read() == b"two"


async def test_open_file_buffers_what_is_written(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"old")
        async with await environment.files.open(f"{top}/a", "wb") as file:
            assert read(f"{top}/a") == b""  # emptied at once
            assert await file.write(b"abc") == 3
            assert (read(f"{top}/a"), file.tell()) == (b"", 3)
            await file.flush()
            assert read(f"{top}/a") == b"abc"
            await file.write(b"defg")
            assert await file.seek(5) == 5
            assert read(f"{top}/a") == b"abcdefg"
            await file.write(b"X")
            await file.seek(10)
            await file.write(b"end")
            assert file.tell() == 13
        assert read(f"{top}/a") == b"abcdeXg\0\0\0end"


async def test_open_file_writes_much(environment: Environment) -> None:
    data = pattern(3_333_333)
    with folder() as top:
        async with await environment.path(f"{top}/a").open("wb") as file:
            for start in range(0, len(data), 100_000):
                await file.write(data[start : start + 100_000])
            await file.write(data)
        assert read(f"{top}/a") == data * 2


async def test_file_left_by_an_error_is_not_flushed(environment: Environment) -> None:
    with folder() as top:
        with pytest.raises(ZeroDivisionError):
            async with await environment.files.open(f"{top}/a", "wb") as file:
                await file.write(b"half of it")
                raise ZeroDivisionError
        assert read(f"{top}/a") == b""


async def test_file_is_open_for_one_thing_only(environment: Environment) -> None:
    with folder() as top:
        async with await environment.files.open(f"{top}/a", "wb") as file:
            for call in (file.read, file.readline):
                with pytest.raises(UsageError, match="for writing only"):
                    await call()
        async with await environment.files.open(f"{top}/a", "rb") as file:
            with pytest.raises(UsageError, match="for reading only"):
                await file.write(b"x")
        with pytest.raises(UsageError, match="mode must be"):
            await environment.files.open(f"{top}/a", "r+")  # type: ignore[call-overload]


async def test_closed_file_is_closed(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"one\ntwo")
        file = await environment.files.open(f"{top}/a", "rb")
        assert await file.readline() == b"one\n"
        await file.aclose()
        await file.aclose()
        for call in (file.read, file.readline):
            await check_error(errno.EBADF, f"{top}/a", call)
        file = await environment.files.open(f"{top}/a", "wb")
        await file.aclose()
        await check_error(errno.EBADF, f"{top}/a", file.write, b"x")
        await file.aclose()


async def test_unknown_encoding_is_refused_before_the_file_is_emptied(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"kept")
        with pytest.raises(LookupError):
            await environment.files.open(f"{top}/a", "w", encoding="no such encoding")
        assert read(f"{top}/a") == b"kept"


async def test_text(environment: Environment) -> None:
    text = "één\nzwei\r\n\n日本語 " + "ü" * 100_000 + "\n𝄞 end"
    lines = text.split("\n")
    expected = [line + "\n" for line in lines[:-1]] + lines[-1:]
    with folder() as top:
        for encoding in ("utf-8", "utf-16", "utf-8-sig", "utf-32-le"):
            async with await environment.files.open(f"{top}/a", "w", encoding=encoding) as file:
                for line in expected:
                    assert await file.write(line) == len(line)
            assert read(f"{top}/a") == text.encode(encoding)
            async with await environment.files.open(f"{top}/a", encoding=encoding) as reader:
                assert [line async for line in reader] == expected
                assert await reader.readline() == ""
            async with await environment.path(f"{top}/a").open(encoding=encoding) as reader:
                assert [await reader.read(2), await reader.readline(), await reader.read()] == [
                    "éé",
                    "n\n",
                    text[4:],
                ]


async def test_text_that_does_not_decode(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"caf\xe9\n\xe2\x82")
        async with await environment.files.open(f"{top}/a") as file:
            with pytest.raises(UnicodeDecodeError):
                await file.read()
        async with await environment.files.open(f"{top}/a", errors="replace") as file:
            assert await file.read() == "caf\ufffd\n\ufffd"
        async with await environment.files.open(f"{top}/a", encoding="latin-1") as file:
            assert await file.readline() == "café\n"


async def test_path_reads_and_writes_whole_files(environment: Environment) -> None:
    with folder() as top:
        path = environment.path(top) / "a"
        assert await path.write_bytes(b"bytes") == 5
        assert await path.read_bytes() == b"bytes"
        assert await path.write_text("één\n") == 4
        assert (await path.read_text(), read(str(path))) == ("één\n", "één\n".encode())
        await path.write_text("é", encoding="latin-1")
        assert await path.read_text("utf-8", "replace") == "\ufffd"


# Paths as objects.


async def test_path_is_text(environment: Environment) -> None:
    path = environment.path("/srv/app/archive.tar.gz")
    assert (str(path), repr(path)) == (
        "/srv/app/archive.tar.gz",
        "EnvironmentPath('/srv/app/archive.tar.gz')",
    )
    assert (path.name, path.suffix, path.stem) == ("archive.tar.gz", ".gz", "archive.tar")
    assert [str(parent) for parent in path.parents] == ["/srv/app", "/srv", "/"]
    root = environment.path("/")
    assert (str(root), root.name, root.parent, root.parents) == ("/", "", root, ())
    for name, suffix in ((".bashrc", ""), ("a.", ""), ("..a", ""), ("a.b", ".b"), (".a.b", ".b"), ("a", "")):
        assert ((root / name).suffix, (root / name).stem) == (suffix, name.removesuffix(suffix))
    assert str(root / "a" / "b/c" / "../d") == "/a/b/d"
    assert str(path / "/etc") == "/etc"
    assert str(path.joinpath("..", "other", "/x", "y")) == "/x/y"
    assert str(path.with_name("b")) == "/srv/app/b"
    assert str(path.with_suffix(".xz")) == "/srv/app/archive.tar.xz"
    assert path == environment.path("/srv/app") / "archive.tar.gz"
    assert path != "/srv/app/archive.tar.gz"
    assert len({path, environment.path("/srv/app/archive.tar.gz"), root}) == 2
    assert root < path
    for name in ("", "a/b", ".", ".."):
        with pytest.raises(ValueError, match="cannot be given the name"):
            path.with_name(name)
    with pytest.raises(ValueError, match="cannot be given the name"):
        root.with_name("x")


async def test_path_with_a_slash_behind_it_is_the_same(environment: Environment) -> None:
    assert environment.path("/tmp/") == environment.path("/tmp")
    assert environment.path("/a/b").relative_to("/a/") == "b"
    assert environment.path("/a") / "/b//c/" == environment.path("/b/c")


async def test_relative_to(environment: Environment) -> None:
    path = environment.path("/a/b/c d")
    assert path.relative_to("/a") == "b/c d"
    assert path.relative_to(environment.path("/a/b")) == "c d"
    assert path.relative_to(path) == "."
    assert path.relative_to("/") == "a/b/c d"
    assert path.is_relative_to("/a/b")
    for other in ("/a/b/c", "/a/bb", "/b"):
        assert not path.is_relative_to(other)
        with pytest.raises(ValueError, match="is not below"):
            path.relative_to(other)


async def test_path_belongs_to_its_environment(environment: Environment) -> None:
    async with open_environment("local") as other:
        assert environment.path("/a") != other.path("/a")
    assert not isinstance(environment.path("/a"), os.PathLike)


async def test_path_says_what_is_there(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        os.mkfifo(f"{top}/fifo")
        path = environment.path(top)

        async def seen(name: str) -> str:
            here = path / name
            questions = (("exists", here.exists), ("file", here.is_file), ("dir", here.is_dir))
            answers = [word for word, ask in (*questions, ("link", here.is_symlink)) if await ask()]
            return " ".join(answers)

        assert {name: await seen(name) for name in os.listdir(top)} == {
            "file": "exists file",
            "empty": "exists dir",
            "full": "exists dir",
            "link": "exists file link",
            "dirlink": "exists dir link",
            "dangling": "",
            "loop": "",
            "fifo": "exists",
        }
        assert (await seen("none"), await seen("file/x")) == ("", "")
        assert (await (path / "file").stat()).size == 7


async def test_iterdir(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        path = environment.path(top)
        assert await path.iterdir() == [path / name for name in ("dirlink", "empty", "file", "full", "link")]
        await check_error(errno.ENOTDIR, f"{top}/file", (path / "file").iterdir)


async def test_path_walk(environment: Environment) -> None:
    with folder() as top:
        make_tree(top)
        path = environment.path(top)
        found = []
        async for where, directories, files in path.walk():
            found.append((where.relative_to(path), list(directories), files))
            if "c" in directories:
                directories.remove("c")
        assert found == [
            (".", [".hidden", "a", "b"], ["0", "to-0", "to-b"]),
            (".hidden", ["x"], ["5"]),
            (".hidden/x", [], []),
            ("a", [], ["4", "fifo"]),
            ("b", ["c"], ["1"]),
        ]
        followed = [where.relative_to(path) async for where, _, _ in path.walk(follow_symlinks=True)]
        assert followed[-3:] == ["to-b", "to-b/c", "to-b/c/d"]


async def test_glob(environment: Environment) -> None:
    with folder() as top:
        make_tree(top)
        write(f"{top}/b/x1.py")
        write(f"{top}/b/c/x2.py")
        write(f"{top}/b/c/x[3].py")
        path = environment.path(top)

        async def found(pattern: str) -> list[str]:
            paths: list[EnvironmentPath] = await path.glob(pattern)
            return [inner.relative_to(path) for inner in paths]

        assert await found("*") == [".hidden", "0", "a", "b", "to-0", "to-b"]
        assert await found("b/x?.py") == ["b/x1.py"]
        assert await found("b/./*/x*.py") == ["b/c/x2.py", "b/c/x[3].py"]
        assert await found("b/c/x[[]3].py") == ["b/c/x[3].py"]
        assert await found("**/*.py") == ["b/x1.py", "b/c/x2.py", "b/c/x[3].py"]
        assert await found("**") == [".", ".hidden", ".hidden/x", "a", "b", "b/c", "b/c/d"]
        assert await found("**/**/d/*") == ["b/c/d/3"]
        assert await found("to-*/x1.py") == ["to-b/x1.py"]
        assert await found("[!b]/4") == ["a/4"]
        assert await found("none/*") == []
        for wrong in ("", "/", "/etc/*"):
            with pytest.raises(ValueError, match="is no relative pattern"):
                await path.glob(wrong)


async def test_mkdir(environment: Environment) -> None:
    with folder() as top:
        path = environment.path(top)
        await (path / "a").mkdir()
        await check_error(errno.EEXIST, f"{top}/a", (path / "a").mkdir)
        await (path / "a").mkdir(exist_ok=True)
        await check_error(errno.ENOENT, f"{top}/b/c", (path / "b/c").mkdir)
        await (path / "b/c").mkdir(parents=True)
        assert kind(f"{top}/b/c") == "directory"
        write(f"{top}/file")
        await check_error(errno.EEXIST, f"{top}/file", (path / "file").mkdir, exist_ok=True)


async def test_unlink(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        path = environment.path(top)
        for name in ("loop", "dangling", "link", "dirlink", "file"):
            await (path / name).unlink()
        assert sorted(os.listdir(top)) == ["empty", "full"]
        await check_error(errno.EISDIR, f"{top}/empty", (path / "empty").unlink)
        await check_error(errno.ENOENT, f"{top}/none", (path / "none").unlink)
        await (path / "none").unlink(missing_ok=True)


async def test_rmdir(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        path = environment.path(top)
        await (path / "empty").rmdir()
        assert kind(f"{top}/empty") == "nothing"
        await check_error(errno.ENOTEMPTY, f"{top}/full", (path / "full").rmdir)
        await check_error(errno.ENOENT, f"{top}/none", (path / "none").rmdir)
        for name in ("file", "dirlink"):
            await check_error(errno.ENOTDIR, f"{top}/{name}", (path / name).rmdir)


async def test_program_is_given_paths(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a b", b"content")
        path = environment.path(top)
        assert (await environment.run(["cat", path / "a b"])).stdout == b"content"
        assert (await environment.run(["pwd"], cwd=path)).stdout == f"{top}\n".encode()


# Atomic writes.


async def test_atomic_write_replaces_the_file(environment: Environment) -> None:
    with folder() as top:
        for data in (b"new", b"", pattern(2_500_000)):
            write(f"{top}/a", b"old")
            os.chmod(f"{top}/a", 0o640)
            os.link(f"{top}/a", f"{top}/before")
            await environment.files.write_file(f"{top}/a", data, atomic=True)
            assert read(f"{top}/before") == b"old"
            os.unlink(f"{top}/before")
            assert read(f"{top}/a") == data
            assert stat.S_IMODE(os.stat(f"{top}/a").st_mode) == 0o640
            assert os.listdir(top) == ["a"]
        await environment.path(f"{top}/created").write_text("x", atomic=True)
        await environment.files.write_file(f"{top}/plain", b"x")
        assert os.stat(f"{top}/created").st_mode == os.stat(f"{top}/plain").st_mode


async def test_atomic_write_that_fails_changes_nothing(environment: Environment) -> None:
    with folder() as top:
        os.mkdir(f"{top}/a")
        path = f"{top}/a"
        await check_error(errno.EISDIR, path, environment.files.write_file, path, b"x", atomic=True)
        assert os.listdir(top) == ["a"]
        missing = f"{top}/none/a"
        await check_error(errno.ENOENT, missing, environment.files.write_file, missing, b"x", atomic=True)


async def test_atomic_write_that_is_cancelled_changes_nothing(environment: Environment) -> None:
    with folder() as top:
        data = pattern(4_000_000)
        await environment.files.write_file(f"{top}/a", data, atomic=True)
        for steps in range(8):
            write(f"{top}/a", b"old")
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_after, scope, steps)
                    await environment.files.write_file(f"{top}/a", data, atomic=True)
                    nursery.cancel_scope.cancel()
            content = read(f"{top}/a")
            assert content == (b"old" if scope.cancelled_caught else data)
            assert os.listdir(top) == ["a"]


async def _cancel_after(scope: trio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_atomic_write_follows_no_links(environment: Environment) -> None:
    with folder() as top:
        make_kinds(top)
        await environment.files.write_file(f"{top}/link", b"new", atomic=True)
        assert kind(f"{top}/link") == "file"
        assert (read(f"{top}/link"), read(f"{top}/file")) == (b"new", b"content")
        with pytest.raises(UsageError, match="follow_symlinks has no meaning"):
            await environment.files.write_file(f"{top}/a", b"", atomic=True, follow_symlinks=False)


# Waiting.


async def _changes(environment: Environment, change: Call, missing: list[str], present: str | None) -> None:
    """That the watch ends with the change, and not before."""
    async with environment.files.watch_missing(missing, present) as watch, trio.open_nursery() as nursery:
        assert watch is not None
        seen = trio.Event()

        async def wait() -> None:
            await watch.wait()
            seen.set()

        nursery.start_soon(wait)
        await environment.probe()
        await wait_all_tasks_blocked()
        assert not seen.is_set()
        await change()
        await seen.wait()
        await watch.wait()  # at once


async def test_watch_ends_when_a_file_comes_into_being(environment: Environment) -> None:
    with folder() as top:

        async def create() -> None:
            write(f"{top}/ready")

        async def rename() -> None:
            os.rename(f"{top}/ready", f"{top}/renamed")

        missing = [f"{top}/ready"]
        await _changes(environment, create, missing, None)
        async with environment.files.watch_missing(missing) as watch:
            assert watch is None
        await _changes(environment, rename, [f"{top}/other", f"{top}/renamed"], top)


async def test_watch_tells_of_a_parent(environment: Environment) -> None:
    with folder() as top:

        async def create() -> None:
            os.mkdir(f"{top}/a")

        await _changes(environment, create, [f"{top}/a/b/ready"], None)


async def test_watch_tells_when_what_is_present_changes(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/present")

        async def remove() -> None:
            os.unlink(f"{top}/present")

        async def grow() -> None:
            write(f"{top}/present", b"more")

        missing = [f"{top}/ready"]
        await _changes(environment, grow, missing, f"{top}/present")
        await _changes(environment, remove, missing, f"{top}/present")
        async with environment.files.watch_missing(missing, f"{top}/present") as watch:
            assert watch is None
        async with environment.files.watch_missing([]) as watch:
            assert watch is None


async def test_watches_side_by_side(environment: Environment) -> None:
    with folder() as top:
        names = [f"{top}/{number}" for number in range(20)]
        seen = []

        async def wait(name: str, ready: trio.Event) -> None:
            async with environment.files.watch_missing([name]) as watch:
                assert watch is not None
                ready.set()
                await watch.wait()
                seen.append(name)

        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 5
            for name in names:
                ready = trio.Event()
                nursery.start_soon(wait, name, ready)
                await ready.wait()
            for name in names[10:]:
                write(name)
            while len(seen) < 10:  # noqa: ASYNC110 - what is waited for is what they write down
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        assert sorted(seen) == sorted(names[10:])
        await _changes(environment, lambda: environment.files.write_file(names[0], b""), names[:1], None)


# Many at once, and cancellation.


async def test_many_calls_at_once(environment: Environment) -> None:
    with folder() as top:

        async def work(number: int) -> None:
            path, data = f"{top}/{number}/a", pattern(number * 1000 + 1)
            await environment.files.create_directory(f"{top}/{number}")
            await environment.files.write_file(path, data)
            assert await environment.files.read_file(path) == data
            assert (await environment.files.get_metadata(path)).size == len(data)
            assert len(await environment.files.read_directory(f"{top}/{number}")) == 1
            await environment.files.remove(f"{top}/{number}")

        async with trio.open_nursery() as nursery:
            for number in range(150):
                nursery.start_soon(work, number)
        assert os.listdir(top) == []


async def test_many_files_open_at_once(environment: Environment) -> None:
    with folder() as top:
        opened = []
        for number in range(100):
            write(f"{top}/{number}", str(number).encode())
            opened.append(await environment.files.open(f"{top}/{number}", "rb"))
        for number, file in enumerate(opened):
            assert await file.read() == str(number).encode()
            await file.aclose()


async def test_closed_files_make_room(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"x")
        for _ in range(200):
            async with await environment.files.open(f"{top}/a", "rb") as file:
                assert await file.read() == b"x"
            await check_error(errno.ENOENT, f"{top}/none", environment.files.read_file, f"{top}/none")


async def test_cancelled_open_leaves_no_file_open(environment: Environment) -> None:
    with folder() as top:
        write(f"{top}/a", b"x")

        async def open_and_close() -> None:
            async with await environment.files.open(f"{top}/a", "rb"):
                pass

        for number in range(400):  # a server has room for 128
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(open_and_close)
                    await _cancel_after(scope, number % 4)
        await open_and_close()


async def test_cancelled_calls_leave_all_usable(environment: Environment) -> None:
    data = pattern(3_000_000)
    with folder() as top:
        make_tree(f"{top}/tree")
        write(f"{top}/large", data)
        files = environment.files

        async def opened() -> None:
            async with await files.open(f"{top}/large", "rb") as file:
                await file.read()

        calls: tuple[Call, ...] = (
            lambda: files.read_file(f"{top}/large"),
            lambda: files.write_file(f"{top}/new", data),
            lambda: files.create_directory(f"{top}/a/b/c"),
            lambda: files.walk(f"{top}/tree"),
            lambda: files.get_metadata(f"{top}/large"),
            opened,
        )
        for round_ in range(40):  # more than a server has room for, were one handle lost in each
            for call in calls:
                with trio.CancelScope() as scope:
                    if not round_ % 4:
                        scope.cancel()
                        await call()
                    else:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(call)
                            await _cancel_after(scope, round_ % 4)
        assert await files.read_file(f"{top}/large") == data
        await files.write_file(f"{top}/new", data)
        assert read(f"{top}/new") == data
