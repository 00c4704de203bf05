"""Contract of `upload`, `download` and `copy_to`: whole files and trees, to and from every environment."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable

import trio
from attrs import evolve

from execenv import Environment, PathUri, open_environment
from execenv.transfer import Progress, TransferReport, copy
from tests.contract.test_files import check_error, folder, kind, make_kinds, pattern, read, relative, write

PAST = 1_234_567_891_234_000_000
"""A time long ago, in whole milliseconds as the protocol has them."""

Send = Callable[..., Awaitable[TransferReport]]


def both_ways(environment: Environment) -> tuple[Send, ...]:
    """There and back: each copies from one path of this machine to another."""
    return environment.files.upload, environment.files.download


def date(path: str | bytes, mode: int | None = None, when: int = PAST) -> None:
    if mode is not None:
        os.chmod(path, mode)
    os.utime(path, ns=(when, when))


def contents(top: str) -> dict[bytes, bytes | None]:
    """All files below a directory with their content, and `None` for its directories."""
    root = os.fsencode(top)
    found: dict[bytes, bytes | None] = {}
    for where, directories, files in os.walk(root):
        for name in directories:
            found[os.path.relpath(os.path.join(where, name), root)] = None
        for name in files:
            path = os.path.join(where, name)
            found[os.path.relpath(path, root)] = read(path)
    return found


def dated(top: str) -> dict[str, tuple[int, int]]:
    """Permissions and time of a directory and of all that is in it."""
    found = {}
    for where, directories, files in os.walk(top):
        for path in (where, *(f"{where}/{name}" for name in (*directories, *files))):
            status = os.stat(path)
            found[relative(path, top)] = (stat.S_IMODE(status.st_mode), status.st_mtime_ns)
    return found


async def test_file_arrives_as_it_is(environment: Environment) -> None:
    for send in both_ways(environment):
        for size in (0, 1, 2**20, 3_500_001):
            with folder() as top:
                write(f"{top}/from", pattern(size))
                report = await send(f"{top}/from", f"{top}/to")
                assert read(f"{top}/to") == pattern(size)
                assert evolve(report, metadata_kept=True) == TransferReport(files=1, bytes=size)
                assert sorted(os.listdir(top)) == ["from", "to"]


async def test_file_keeps_its_permissions_and_time(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            for mode in (0o600, 0o751, 0o444):
                write(f"{top}/from", b"x")
                date(f"{top}/from", mode)
                report = await send(f"{top}/from", f"{top}/to{mode}")
                status = os.stat(f"{top}/to{mode}")
                assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (mode, PAST)
                assert report.metadata_kept


async def test_file_replaces_what_has_its_name(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/from", b"new")
            write(f"{top}/to", b"old and longer")
            assert (await send(f"{top}/from", f"{top}/to")).files == 1
            assert read(f"{top}/to") == b"new"


async def test_tree_arrives_as_it_is(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/from/a/b/c")
            os.mkdir(f"{top}/from/empty")
            for number in range(40):
                write(f"{top}/from/a/{number}", pattern(number * 100))
            write(f"{top}/from/a/b/large", pattern(1_300_000))
            for name in ("line\nbreak", "100% é#?", "back\\slash"):
                write(f"{top}/from/a/b/c/{name}", name.encode())
            report = await send(f"{top}/from", f"{top}/new/to")
            expected = contents(f"{top}/from")
            assert contents(f"{top}/new/to") == expected
            files = [data for data in expected.values() if data is not None]
            assert (report.files, report.bytes) == (len(files), sum(map(len, files)))
            assert (report.unchanged, report.skipped) == (0, [])


async def test_tree_has_names_that_are_not_utf8(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(os.fsencode(top) + b"/from/\xfe/\xff\xff")
            write(os.fsencode(top) + b"/from/\xfe/caf\xe9", b"latin")
            write(f"{top}/from/\ufffd", b"looks like one")
            report = await send(f"{top}/from", f"{top}/to")
            assert contents(f"{top}/to") == contents(f"{top}/from")
            assert (report.files, report.skipped) == (2, [])


async def test_name_that_leaves_no_room_for_another(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/from", b"content")
            for name in ("n" * 255, "é" * 127, "日" * 85):
                await send(f"{top}/from", f"{top}/{name}")
                assert read(f"{top}/{name}") == b"content"


async def test_tree_keeps_permissions_and_times(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/from/a/closed")
            write(f"{top}/from/a/script")
            write(f"{top}/from/a/closed/1", b"1")
            date(f"{top}/from/a/script", 0o755, PAST + 10**9)
            date(f"{top}/from/a/closed/1", 0o400, PAST + 2 * 10**9)
            date(f"{top}/from/a/closed", 0o555, PAST + 3 * 10**9)
            date(f"{top}/from/a", 0o700, PAST + 4 * 10**9)
            date(f"{top}/from", 0o750)
            report = await send(f"{top}/from", f"{top}/to")
            assert dated(f"{top}/to") == dated(f"{top}/from")
            assert report.metadata_kept


async def test_links_are_followed_and_circles_told(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.mkdir(f"{top}/from")
            make_kinds(f"{top}/from")
            os.symlink("..", f"{top}/from/full/up")
            os.mkfifo(f"{top}/from/fifo")
            report = await send(f"{top}/from", f"{top}/to")
            assert contents(f"{top}/to") == {
                b"file": b"content",
                b"link": b"content",
                b"empty": None,
                b"full": None,
                b"full/inner": b"inner",
                b"dirlink": None,
                b"dirlink/inner": b"inner",
            }
            assert kind(f"{top}/to/link") == "file"
            assert kind(f"{top}/to/dirlink") == "directory"
            skipped = {relative(path.text, f"{top}/from") for path in report.skipped}
            assert skipped == {"fifo", "full/up", "dirlink/up"}
            assert len(report.skipped) == 3


async def test_tree_is_merged_into_an_existing_one(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            for name in ("from", "to"):
                os.makedirs(f"{top}/{name}/inner")
                write(f"{top}/{name}/inner/both", name.encode())
                write(f"{top}/{name}/inner/{name}", name.encode())
            await send(f"{top}/from", f"{top}/to")
            assert contents(f"{top}/to") == {
                b"inner": None,
                b"inner/both": b"from",
                b"inner/from": b"from",
                b"inner/to": b"to",
            }


async def test_tree_into_itself_comes_to_an_end(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/file", b"content")
            for _ in range(2):
                await send(top, f"{top}/inner")
                assert read(f"{top}/inner/file") == b"content"


async def test_tree_far_below_itself_is_copied_as_it_was(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/a/b")
            write(f"{top}/a/file", b"content")
            report = await send(top, f"{top}/a/b/copy")
            assert report.files == 1
            found = sorted(path.removeprefix(top) for path, _, _ in os.walk(top))
            assert found == ["", "/a", "/a/b", "/a/b/copy", "/a/b/copy/a", "/a/b/copy/a/b"]


async def test_what_is_there_is_left_alone(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/from/inner")
            write(f"{top}/from/1", b"one")
            write(f"{top}/from/inner/2", b"two")
            await send(f"{top}/from", f"{top}/to")
            before = os.stat(f"{top}/to/1").st_ino
            report = await send(f"{top}/from", f"{top}/to")
            assert (report.files, report.bytes, report.unchanged) == (0, 0, 2)
            assert os.stat(f"{top}/to/1").st_ino == before
            write(f"{top}/from/1", b"eins")
            os.chmod(f"{top}/from/inner/2", 0o700)
            report = await send(f"{top}/from", f"{top}/to")
            assert (report.files, report.bytes, report.unchanged) == (1, 4, 1)
            assert contents(f"{top}/to") == contents(f"{top}/from")
            assert dated(f"{top}/to")["inner/2"][0] == 0o700


async def cut_off(send: Send, source: str, destination: str, after: int) -> None:
    """Cancel a transfer when so many bytes are under way."""
    with trio.CancelScope() as scope:

        def stop(progress: Progress) -> None:
            if progress.done_bytes >= after:
                scope.cancel()

        await send(source, destination, progress=stop)
    assert scope.cancelled_caught


async def test_file_goes_on_where_it_was_cut(environment: Environment) -> None:
    data = pattern(7_000_001)
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/from", data)
            await cut_off(send, f"{top}/from", f"{top}/to", 2 * 2**20)
            assert kind(f"{top}/to") == "nothing"
            report = await send(f"{top}/from", f"{top}/to")
            assert report.resumed_bytes >= 2**20
            assert (report.files, report.resumed_bytes + report.bytes) == (1, len(data))
            assert read(f"{top}/to") == data
            assert sorted(os.listdir(top)) == ["from", "to"]


async def test_tree_goes_on_where_it_was_cut(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/from/inner")
            for number in range(4):
                write(f"{top}/from/inner/{number}", pattern(number * 1_000_000 + 5))
            await cut_off(send, f"{top}/from", f"{top}/to", 4_000_000)
            report = await send(f"{top}/from", f"{top}/to")
            assert report.bytes < 6_000_020
            assert contents(f"{top}/to") == contents(f"{top}/from")


async def test_changed_file_begins_anew(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/from", pattern(4_000_000))
            date(f"{top}/from")
            await cut_off(send, f"{top}/from", f"{top}/to", 2 * 2**20)
            data = pattern(4_000_000)[::-1]
            write(f"{top}/from", data)
            report = await send(f"{top}/from", f"{top}/to")
            assert (report.resumed_bytes, report.bytes) == (0, len(data))
            assert read(f"{top}/to") == data


async def progress_of(send: Send, source: str, destination: str) -> list[Progress]:
    """All that is told, as it was at its time."""
    seen: list[Progress] = []
    await send(source, destination, progress=lambda progress: seen.append(evolve(progress)))
    return seen


async def test_progress_is_told(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/from/inner")
            sizes = {f"{top}/from/inner/{number}": number * 1_000_000 for number in range(4)}
            for path, size in sizes.items():
                write(path, pattern(size))
            seen = await progress_of(send, f"{top}/from", f"{top}/to")
            assert [one.done_bytes for one in seen] == sorted(one.done_bytes for one in seen)
            assert [one.done_files for one in seen] == sorted(one.done_files for one in seen)
            assert all(
                one.done_bytes <= one.total_bytes and one.done_files <= one.total_files for one in seen
            )
            assert len(seen) > 6
            last = seen[-1]
            assert (last.done_bytes, last.total_bytes) == (6_000_000, 6_000_000)
            assert (last.done_files, last.total_files, last.complete) == (4, 4, True)
            assert last.path.text in sizes
            again = await progress_of(send, f"{top}/from", f"{top}/to")
            assert (again[-1].done_bytes, again[-1].done_files) == (6_000_000, 4)


async def test_file_where_a_directory_is_fails(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            make_kinds(top)
            for name in ("empty", "dirlink"):
                await check_error(errno.EISDIR, f"{top}/{name}", send, f"{top}/file", f"{top}/{name}")
            await check_error(errno.EEXIST, f"{top}/file", send, f"{top}/full", f"{top}/file")
            assert (read(f"{top}/file"), os.listdir(f"{top}/empty")) == (b"content", [])


async def test_errors_name_the_file(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            make_kinds(top)
            os.mkfifo(f"{top}/fifo")
            await check_error(errno.ENOENT, f"{top}/none", send, f"{top}/none", f"{top}/to")
            await check_error(errno.ENOENT, f"{top}/none/to", send, f"{top}/file", f"{top}/none/to")
            await check_error(errno.ENOTDIR, f"{top}/file/to", send, f"{top}/file", f"{top}/file/to")
            await check_error(errno.EINVAL, f"{top}/fifo", send, f"{top}/fifo", f"{top}/to")
            assert kind(f"{top}/to") == "nothing"


async def test_first_error_of_a_tree_ends_it(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            os.makedirs(f"{top}/from")
            write(f"{top}/from/a")
            os.makedirs(f"{top}/to/a")
            await check_error(errno.EISDIR, f"{top}/to/a", send, f"{top}/from", f"{top}/to")


async def test_errors_of_a_tree_are_told_one_by_one(environment: Environment) -> None:
    async with open_environment("local") as here:
        for source, destination in ((here, environment), (environment, here)):
            with folder() as top:
                os.makedirs(f"{top}/from/closed")
                os.makedirs(f"{top}/to/2")
                write(f"{top}/to/closed")
                for name in ("1", "2", "3", "closed/4"):
                    write(f"{top}/from/{name}", name.encode())
                errors: list[OSError] = []
                report = await copy(
                    source.files._backend,
                    PathUri.from_native(f"{top}/from"),
                    destination.files._backend,
                    PathUri.from_native(f"{top}/to"),
                    on_error=errors.append,
                )
                assert {(error.errno, error.filename) for error in errors} == {
                    (errno.EISDIR, f"{top}/to/2"),
                    (errno.EEXIST, f"{top}/to/closed"),
                }
                assert report.files == 2
                assert (read(f"{top}/to/1"), read(f"{top}/to/3")) == (b"1", b"3")


async def test_from_one_environment_to_another(environment: Environment) -> None:
    async with open_environment("local") as other:
        with folder() as top:
            os.makedirs(f"{top}/1/inner")
            write(f"{top}/1/inner/large", pattern(2_000_000))
            write(f"{top}/1/small", b"small")
            await environment.path(f"{top}/1").copy_to(other.path(f"{top}/2"))
            await other.path(f"{top}/2").copy_to(environment.path(f"{top}/3"))
            report = await environment.path(f"{top}/3").copy_to(environment.path(f"{top}/4"))
            assert contents(f"{top}/4") == contents(f"{top}/1")
            assert (report.files, report.bytes) == (2, 2_000_005)


async def test_atomic_transfer(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/from", pattern(1_200_000))
            write(f"{top}/to", b"old")
            os.link(f"{top}/to", f"{top}/old")
            report = await send(f"{top}/from", f"{top}/to", atomic=True)
            assert (report.files, read(f"{top}/to"), read(f"{top}/old")) == (1, pattern(1_200_000), b"old")


async def test_what_is_private_is_so_while_it_arrives(environment: Environment) -> None:
    for send in both_ways(environment):
        with folder() as top:
            write(f"{top}/from", pattern(3_000_000))
            os.chmod(f"{top}/from", 0o600)
            os.mkdir(f"{top}/to")
            seen: set[int] = set()

            def look(progress: Progress, top: str = top, seen: set[int] = seen) -> None:
                seen.update(stat.S_IMODE(os.stat(entry).st_mode) for entry in os.scandir(f"{top}/to"))

            await send(f"{top}/from", f"{top}/to/file", progress=look)
            assert seen == {0o600}


async def test_transfers_side_by_side(environment: Environment) -> None:
    with folder() as top:
        for number in range(10):
            write(f"{top}/{number}", pattern(300_000 + number))
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(environment.files.upload, f"{top}/{number}", f"{top}/up{number}")
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(environment.files.download, f"{top}/up{number}", f"{top}/down{number}")
        for number in range(10):
            assert read(f"{top}/down{number}") == pattern(300_000 + number)
