"""What only the files of this machine have: fifos, mounts that hang, permissions, and the calls of Linux."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from inspect import iscoroutinefunction

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from execenv import ConnectionLost, Environment, PathUri, open_environment
from execenv.abc import Watch
from execenv.files import AnyPath, Files
from execenv.local import disk, mounts, threads
from execenv.local import stat as local_stat
from execenv.local.filesystem import LocalFileSystem
from execenv.local.mounts import Mounts
from execenv.local.stat import stat_now
from execenv.local.threads import run_in_thread
from execenv.local.turn import Turn
from execenv.transfer import Progress
from tests.conftest import open_kind, open_memory, time_limit
from tests.contract import test_files, test_transfer
from tests.contract.test_files import check_error, folder, kind, make_kinds, pattern, read, write

Contract = Callable[[Environment], Awaitable[None]]

NOBODY = 65534


@pytest.fixture
def files() -> Iterator[Files]:
    with closing(Mounts()) as here:
        yield local_files(here)


@pytest.fixture
async def local() -> AsyncIterator[Environment]:
    async with time_limit(120), open_environment("local") as environment:
        yield environment


def local_files(here: Mounts) -> Files:
    async def locate(path: AnyPath) -> PathUri:
        assert isinstance(path, str | PathUri)
        return PathUri.parse(path) if isinstance(path, str) else path

    return Files(LocalFileSystem(here), locate)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Fifos and devices.


async def read_all(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            data += os.read(fd, size)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)
    return data


async def test_write_to_a_fifo_waits_for_who_reads_it(files: Files) -> None:
    data = pattern(200_000)  # more than it holds
    with folder() as top, trio.fail_after(10):
        os.mkfifo(f"{top}/fifo")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.write_file, f"{top}/fifo", data)
            await wait_all_tasks_blocked()
            await files.write_file(f"{top}/other", b"not held up")
            assert await files.read_file(f"{top}/other") == b"not held up"
            reader = os.open(f"{top}/fifo", os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(reader, "rb"):
                while True:  # until it is opened for writing, it reads as if at its end
                    await trio.sleep(0.01)
                    if stat.S_ISFIFO(os.fstat(reader).st_mode) and (first := _some(reader)):
                        break
                assert first + await read_all(reader, len(data) - len(first)) == data


def _some(fd: int) -> bytes:
    try:
        return os.read(fd, 1000)
    except BlockingIOError:
        return b""


async def test_write_to_a_fifo_is_cancelled(files: Files) -> None:
    with folder() as top, trio.fail_after(10):
        os.mkfifo(f"{top}/fifo")
        before = open_descriptors()
        for reads in (False, True):
            reader = os.open(f"{top}/fifo", os.O_RDONLY | os.O_NONBLOCK) if reads else None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(files.write_file, f"{top}/fifo", bytes(1_000_000))
                await wait_all_tasks_blocked()
                if reader is not None:
                    await trio.lowlevel.wait_readable(reader)
                nursery.cancel_scope.cancel()
            if reader is not None:
                os.close(reader)
        assert open_descriptors() == before


async def test_write_to_a_fifo_whose_reader_goes_fails(files: Files) -> None:
    with folder() as top, trio.fail_after(10):
        path = f"{top}/fifo"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(check_error, errno.EPIPE, path, files.write_file, path, bytes(1_000_000))
            await trio.lowlevel.wait_readable(reader)
            await wait_all_tasks_blocked()
            os.close(reader)


async def test_fifo_holds_up_no_other_call_of_a_connection() -> None:
    with folder() as top, trio.fail_after(10):
        os.mkfifo(f"{top}/fifo")
        async with open_memory() as (environment, _), trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(environment.files.write_file, f"{top}/fifo", b"x")
            await wait_all_tasks_blocked()
            await environment.files.write_file(f"{top}/other", b"data")
            assert await environment.files.read_file(f"{top}/other") == b"data"
            assert await environment.path(top).iterdir() == [
                environment.path(top) / "fifo",
                environment.path(top) / "other",
            ]
            nursery.cancel_scope.cancel()


async def test_devices_are_written_to(files: Files) -> None:
    for size in (3, 2**21):
        await files.write_file("/dev/null", bytes(size))
        await check_error(errno.ENOSPC, "/dev/full", files.write_file, "/dev/full", bytes(size))
    with folder() as top:
        write(f"{top}/file", b"content")
        await files.copy(f"{top}/file", "/dev/null")
        await check_error(errno.ENOSPC, f"{top}/file", files.copy, f"{top}/file", "/dev/full")
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def without_libc(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mounts, local_stat):
        monkeypatch.setattr(module, "libc", lambda: None)


async def test_special_file_is_not_opened_to_see_what_it_is(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_libc(monkeypatch)  # so that all that is opened is opened by `os`
    opened: list[object] = []
    real = os.open

    def recorded(path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(path)
        return real(path, flags, mode, dir_fd=dir_fd)

    with folder() as top:
        path = f"{top}/fifo"
        os.mkfifo(path)
        write(f"{top}/file", b"x")
        monkeypatch.setattr(os, "open", recorded)
        assert await files.read_file(f"{top}/file") == b"x"
        for call in (files.read_file, files.open, partial(files.open, mode="wb")):
            await check_error(errno.EINVAL, path, call, path)
        assert opened == [f"{top}/file".encode()]


# Threads.


class Stuck:
    """Work that hangs until it is let go, as on a mount whose server is gone."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.begun = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)

    def hang(self) -> None:
        self.begun.release()
        self.release.wait(20)

    async def wait(self, semaphore: threading.Semaphore, count: int) -> None:
        for _ in range(count):
            assert await trio.to_thread.run_sync(semaphore.acquire, True, 10)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setattr(threads, "PATIENCE", 0.01)
    stuck = Stuck()
    yield stuck
    stuck.release.set()


def use_mounts(monkeypatch: pytest.MonkeyPatch, top: str, *lines: str) -> None:
    write(f"{top}/mountinfo", "".join(f"{line}\n" for line in lines).encode())
    monkeypatch.setattr(mounts, "_MOUNTINFO", f"{top}/mountinfo")


async def test_dead_mount_holds_up_nobody_else(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk.canonicalize

    def canonicalize(turn: Turn, path: bytes) -> bytes:
        if b"/dead/" in path:
            stuck.hang()
        return real(turn, path)

    monkeypatch.setattr(disk, "canonicalize", canonicalize)
    with folder() as top, trio.fail_after(10):
        for name in ("dead", "other"):
            os.mkdir(f"{top}/{name}")
            write(f"{top}/{name}/file", b"content")
        use_mounts(
            monkeypatch,
            top,
            "1 0 0:1 / / rw - ext4 disk rw",
            f"2 1 0:2 / {top}/dead rw - nfs gone:/ rw",
            f"3 1 0:3 / {top}/other rw - nfs there:/ rw",
        )
        with closing(Mounts()) as here:
            files = local_files(here)
            async with trio.open_nursery() as nursery:
                for _ in range(60):  # more than there are threads for all of this machine
                    nursery.start_soon(files.canonicalize, f"{top}/dead/file")
                await stuck.wait(stuck.begun, 8)
                for path in (f"{top}/other/file", top):
                    assert (await files.canonicalize(path)).text == path
                assert here.limiter(f"{top}/dead/x".encode()).borrowed_tokens == 8
                nursery.cancel_scope.cancel()
            assert not stuck.begun.acquire(blocking=False)  # those that waited have never begun
            for path in (f"{top}/other/file", top):
                assert (await files.canonicalize(path)).text == path
            stuck.release.set()
            assert (await files.canonicalize(f"{top}/dead/file")).text == f"{top}/dead/file"


async def test_what_a_hanging_thread_opens_is_closed_when_it_comes_back(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.open_to_read

    def open_to_read(turn: Turn, path: bytes, *, follow: bool) -> int:
        stuck.hang()
        try:
            return real(turn, path, follow=follow)
        finally:
            stuck.ended.release()

    monkeypatch.setattr(disk, "open_to_read", open_to_read)
    monkeypatch.setattr(LocalFileSystem, "open_nowait", lambda *args: None)
    with folder() as top, trio.fail_after(10), closing(Mounts()) as here:
        write(f"{top}/file", b"content")
        files = local_files(here)
        before = open_descriptors()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.open, f"{top}/file", "rb")
            await stuck.wait(stuck.begun, 1)
            nursery.cancel_scope.cancel()
        stuck.release.set()
        await stuck.wait(stuck.ended, 1)
        assert open_descriptors() == before


async def test_descriptor_that_nobody_takes_is_closed(stuck: Stuck) -> None:
    handed_over: list[int] = []

    def work(turn: Turn) -> int:
        stuck.hang()
        handed_over.append(turn.hand_over(os.open("/dev/null", os.O_RDONLY)))
        stuck.ended.release()
        return handed_over[0]

    before = open_descriptors()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_in_thread, trio.CapacityLimiter(1), work)
            await stuck.wait(stuck.begun, 1)
            stuck.release.set()
            assert stuck.ended.acquire(timeout=10)  # holds up the loop: the result has not arrived
            nursery.cancel_scope.cancel()
    assert len(handed_over) == 1
    assert open_descriptors() == before


async def test_thread_that_reads_keeps_its_descriptor_when_the_file_is_closed(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_from = []
    real = disk.read_at

    def read_at(turn: Turn, fd: int, offset: int, size: int) -> bytes:
        stuck.hang()
        read_from.append(real(Turn(), fd, offset, size))
        stuck.ended.release()
        return b""

    monkeypatch.setattr(disk, "read_at", read_at)
    with folder() as top, trio.fail_after(10), closing(Mounts()) as here:
        write(f"{top}/file", pattern(2_000_000))
        file = await local_files(here).open(f"{top}/file", "rb")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.read, 2_000_000)
            await stuck.wait(stuck.begun, 1)
            nursery.cancel_scope.cancel()
        await file.aclose()
        stuck.release.set()
        await stuck.wait(stuck.ended, 1)
        assert read_from == [pattern(2_000_000)]


async def test_cancelled_thread_stops_between_its_steps() -> None:
    steps = []
    began = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def work(turn: Turn) -> None:
        token.run_sync_soon(began.set)
        try:
            while True:
                turn.check()
        finally:
            steps.append("ended")

    limiter = trio.CapacityLimiter(1)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_in_thread, limiter, work)
            await began.wait()
            nursery.cancel_scope.cancel()
        assert steps == ["ended"]
        assert await run_in_thread(limiter, lambda turn: "free again") == "free again"


async def test_work_that_never_began_is_told(stuck: Stuck) -> None:
    limiter = trio.CapacityLimiter(1)
    unused: list[str] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_in_thread, limiter, lambda turn: stuck.hang())
            await stuck.wait(stuck.begun, 1)
            with trio.CancelScope() as scope:
                scope.cancel()
                await run_in_thread(limiter, lambda turn: None, unused=lambda: unused.append("unused"))
            assert unused == ["unused"]
            stuck.release.set()


# Descriptors.


async def cancelled_at_each_step(call: Callable[[], Awaitable[object]]) -> int:
    """Cancel a call after one step, two, and so on, until it ends by itself; how often it was cancelled."""
    steps = 0
    while True:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def run(nursery: trio.Nursery = nursery) -> None:
                    await call()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(run)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
                await trio.sleep_forever()
        if not scope.cancelled_caught or steps > 200:
            return steps
        steps += 1


async def test_no_call_leaves_a_descriptor_open(files: Files) -> None:
    with folder() as top, trio.fail_after(20):
        make_kinds(top)
        write(f"{top}/large", pattern(2_500_000))

        async def open_and_read() -> None:
            async with await files.open(f"{top}/large", "rb") as file:
                await file.read()

        async def open_and_write() -> None:
            async with await files.open(f"{top}/new", "wb") as file:
                await file.write(pattern(2_500_000))

        async def watch() -> None:
            async with files.watch_missing([f"{top}/none"]) as watch:
                assert watch is not None

        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            open_and_read,
            open_and_write,
            watch,
            lambda: files.read_file(f"{top}/large"),
            lambda: files.read_file(f"{top}/file"),
            lambda: files.write_file(f"{top}/new", pattern(2_500_000)),
            lambda: files.write_file(f"{top}/new", b"x", atomic=True),
            lambda: files.copy(f"{top}/large", f"{top}/copy"),
            lambda: files.read_file(f"{top}/file", follow_symlinks=False),
            lambda: files.upload(f"{top}/large", f"{top}/uploaded"),
        )
        before = open_descriptors()
        for call in calls:
            assert await cancelled_at_each_step(call) > 0
        assert open_descriptors() == before


async def test_no_failure_leaves_a_descriptor_open(files: Files) -> None:
    with folder() as top:
        make_kinds(top)
        os.mkfifo(f"{top}/fifo")
        before = open_descriptors()
        failures = 0
        for name in ("none", "empty", "dirlink", "dangling", "loop", "fifo", "file/x", "dirlink/inner"):
            for call in calls_that_may_fail(files, top, f"{top}/{name}"):
                try:
                    await call()
                except OSError:
                    failures += 1
                assert open_descriptors() == before
            make_again(top)
        assert failures > 80


def calls_that_may_fail(files: Files, top: str, path: str) -> Iterator[Callable[[], Awaitable[object]]]:
    for follow in (True, False):
        yield partial(files.read_file, path, follow_symlinks=follow)
        yield partial(files.get_metadata, path, follow_symlinks=follow)
        yield partial(files.create_directory, path, recursive=False, follow_symlinks=follow)
        yield partial(files.write_file, f"{path}/none/x", b"", follow_symlinks=follow)
    yield partial(files.read_directory, f"{path}/none")
    yield partial(files.write_file, f"{path}/none/x", b"", atomic=True)
    yield partial(files.open, f"{path}/none", "rb")
    yield partial(files.open, f"{path}/none/x", "wb")
    yield partial(files.copy, f"{top}/file", f"{path}/none/x")
    yield partial(files.upload, f"{top}/file", f"{path}/none/x")


def make_again(top: str) -> None:
    """As it was: some of the calls make directories."""
    for name in ("none", "nowhere"):
        if kind(f"{top}/{name}") == "directory":
            os.rmdir(f"{top}/{name}")


# Mounts.


def test_mounts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with folder() as top:
        use_mounts(
            monkeypatch,
            top,
            "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw",
            "23 22 0:21 / /srv rw - nfs server:/x rw",
            r"24 23 0:22 / /srv/with\040blank rw shared:1 master:2 - tmpfs tmpfs rw",
            r"25 22 0:23 / /back\134slash rw - fuse.sshfs x rw",
            "26 22 0:24 / /over rw - nfs a rw",
            "27 26 0:25 / /over rw - xfs b rw",
            r"28 22 0:26 / /tab\011and\012line rw - 9p x rw",
        )
        with closing(Mounts()) as here:
            local = here.limiter(b"/", deep=True)
            assert {number for number in range(40) if here.is_local(number)} == {22, 24, 27}
            assert not here.is_local(None)
            for path in (b"/x", b"/srvx", b"/srv/with blank", b"/srv/with blank/x", b"/over/x", b"/back"):
                assert here.limiter(path, deep=True) is local
            elsewhere = [
                here.limiter(path) for path in (b"/srv/x", b"/back\\slash/x/y", b"/tab\tand\nline", b"/srv")
            ]
            assert elsewhere[0] is elsewhere[3]
            assert len({id(limiter) for limiter in (local, *elsewhere)}) == 4


def test_mounts_of_this_machine() -> None:
    with closing(Mounts()) as here:
        proc = os.open("/proc", os.O_PATH)
        try:
            found = stat_now(proc)
        finally:
            os.close(proc)
        assert found is not None
        assert found.is_directory
        assert not here.is_local(found.mount_id)
        assert here.limiter(b"/proc/self") is not here.limiter(b"/")


def test_without_mountinfo_all_goes_to_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    with folder() as top:
        write(f"{top}/file", b"x")
        monkeypatch.setattr(mounts, "_MOUNTINFO", f"{top}/none")
        with closing(Mounts()) as here:
            files = LocalFileSystem(here)
            path = PathUri.from_native(f"{top}/file")
            assert files.read_file_nowait(path) is None
            assert files.get_metadata_nowait(path) is None
            assert not files.write_file_nowait(path, b"y")
            assert here.limiter(b"/x", deep=True) is here.limiter(b"/proc", deep=True)


# Without some of the calls of Linux.


def contracts() -> list[Contract]:
    """All that holds for the files of every environment."""
    found = [*vars(test_files).items(), *vars(test_transfer).items()]
    return [value for name, value in found if name.startswith("test_") and iscoroutinefunction(value)]


@pytest.mark.parametrize("kind_of_environment", ["local", "memory"])
async def test_all_is_right_without_openat2_and_statx(
    kind_of_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_libc(monkeypatch)
    with folder() as top:
        write(f"{top}/file")
        with closing(Mounts()) as here:
            assert here.open_now(f"{top}/file".encode(), os.O_RDONLY) is None
    async with time_limit(120), open_kind(kind_of_environment, "") as environment:
        for contract in contracts():
            await contract(environment)


async def test_all_is_right_when_no_name_is_in_the_cache(
    local: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = mounts.openat2, []

    def openat2(dir_fd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int | None:
        if resolve == mounts._RESOLVE_CACHED and not flags & os.O_DIRECTORY:
            refused.append(path)
            return None
        return real(dir_fd, path, flags, resolve, mode)

    monkeypatch.setattr(mounts, "openat2", openat2)
    for contract in contracts():
        await contract(local)
    assert refused


async def test_time_of_creation_is_that_of_the_kernel(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder() as top:
        write(f"{top}/file")
        os.utime(f"{top}/file", ns=(1, 1))
        done = await trio.run_process(["stat", "-c", "%.3W", f"{top}/file"], capture_stdout=True)
        expected = int(done.stdout.replace(b".", b""))  # 0 where the file system does not know
        monkeypatch.setattr(LocalFileSystem, "get_metadata_nowait", lambda *args: None)
        in_thread = await files.get_metadata(f"{top}/file")
        monkeypatch.undo()
        at_once = await files.get_metadata(f"{top}/file")
        assert in_thread == at_once
        assert at_once.created_at_ms == expected


# Deep trees.


async def test_deep_tree_is_removed_and_its_links_are_not_followed(files: Files) -> None:
    with folder() as top, trio.fail_after(20):
        os.mkdir(f"{top}/kept")
        write(f"{top}/kept/file", b"kept")
        os.mkdir(f"{top}/tree")
        make_deep(f"{top}/tree", 3000, f"{top}/kept")
        await files.remove(f"{top}/tree")
        assert os.listdir(top) == ["kept"]
        assert read(f"{top}/kept/file") == b"kept"


def make_deep(path: str, levels: int, target: str) -> None:
    """A directory in a directory and so on, far beyond the longest path there can be; links in some."""
    fd = os.open(path, os.O_RDONLY)
    for level in range(levels):
        os.mkdir("d", dir_fd=fd)
        if level % 500 == 499:
            os.symlink(target, "link", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.symlink(target, "link", dir_fd=fd)
    os.close(fd)


# Permissions.


@contextmanager
def unprivileged() -> Iterator[str]:
    """A new directory, of a user who may not do everything: another one if we are root."""
    root = not os.geteuid()
    groups = os.getgroups()
    if root:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        with tempfile.TemporaryDirectory() as top:
            try:
                yield os.path.realpath(top)
            finally:
                for where, directories, _ in os.walk(top):
                    for name in directories:
                        if kind(f"{where}/{name}") == "directory":
                            os.chmod(f"{where}/{name}", 0o700)
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)


@pytest.fixture(params=["local", "memory"])
async def here(request: pytest.FixtureRequest) -> AsyncIterator[Files]:
    if request.param == "local":
        with closing(Mounts()) as found:
            yield local_files(found)
    else:
        async with open_memory() as (environment, _):
            yield environment.files


async def test_permission_denied(here: Files) -> None:
    with unprivileged() as top:
        for name in ("unreadable", "readonly", "file"):
            write(f"{top}/{name}", b"content")
        os.chmod(f"{top}/unreadable", 0o200)
        os.chmod(f"{top}/readonly", 0o444)
        os.makedirs(f"{top}/closed/inner")
        write(f"{top}/closed/file")
        os.chmod(f"{top}/closed", 0o000)
        os.mkdir(f"{top}/fixed")
        write(f"{top}/fixed/file", b"old")
        os.chmod(f"{top}/fixed", 0o555)
        denied = errno.EACCES
        for call in (here.read_file, here.open):
            for path in (f"{top}/unreadable", f"{top}/closed/file"):
                await check_error(denied, path, call, path)
        for data in (b"x", bytes(2**21)):
            for path in (f"{top}/readonly", f"{top}/fixed/new", f"{top}/closed/file"):
                await check_error(denied, path, here.write_file, path, data)
        await check_error(denied, f"{top}/closed/file", here.get_metadata, f"{top}/closed/file")
        await check_error(denied, f"{top}/closed/file", here.canonicalize, f"{top}/closed/file")
        await check_error(denied, f"{top}/closed", here.read_directory, f"{top}/closed")
        await check_error(denied, f"{top}/fixed/new", here.create_directory, f"{top}/fixed/new")
        await check_error(denied, f"{top}/fixed/file", here.remove, f"{top}/fixed/file")
        await check_error(denied, f"{top}/closed", here.remove, f"{top}/closed")
        await check_error(denied, f"{top}/unreadable", here.copy, f"{top}/unreadable", f"{top}/new")
        await check_error(denied, f"{top}/file", here.rename, f"{top}/file", f"{top}/fixed/new")
        await check_error(errno.EPERM, "/etc/passwd", here.set_metadata, "/etc/passwd", mode=0o666)
        path = f"{top}/fixed/file"
        await check_error(denied, path, here.write_file, path, b"new", atomic=True)
        assert (read(path), os.listdir(f"{top}/fixed")) == (b"old", ["file"])
        with pytest.raises(PermissionError) as caught:
            async with here.watch_missing([f"{top}/closed/none"]):
                raise AssertionError("there is nothing to watch")
        assert isinstance(caught.value.filename, str)


async def test_walk_goes_on_where_it_may_not_look(here: Files) -> None:
    with unprivileged() as top:
        for name in ("a", "closed", "z"):
            os.mkdir(f"{top}/{name}")
            write(f"{top}/{name}/file")
        os.chmod(f"{top}/closed", 0o000)
        found = await here.walk(top)
        names = [entry.path.text.removeprefix(f"{top}/") for entry in found.entries]
        assert names == ["a", "closed", "z", "a/file", "z/file"]
        assert [(error.path.text, error.message) for error in found.errors] == [
            (f"{top}/closed", "Permission denied (os error 13)")
        ]


async def test_glob_leaves_out_where_it_may_not_look() -> None:
    async with open_memory() as (environment, _):
        with unprivileged() as top:
            for name in ("a", "closed"):
                os.mkdir(f"{top}/{name}")
                write(f"{top}/{name}/file")
            os.chmod(f"{top}/closed", 0o000)
            path = environment.path(top)
            assert await path.glob("*/file") == [path / "a/file"]
            with pytest.raises(PermissionError):
                await (path / "closed/file").exists()


async def test_file_that_may_not_be_written_is_replaced(here: Files) -> None:
    with unprivileged() as top:
        write(f"{top}/file", b"old")
        os.chmod(f"{top}/file", 0o444)
        await here.write_file(f"{top}/file", b"new", atomic=True)
        assert (read(f"{top}/file"), stat.S_IMODE(os.stat(f"{top}/file").st_mode)) == (b"new", 0o444)


async def test_readonly_tree_is_transferred(here: Files) -> None:
    with unprivileged() as top:
        os.makedirs(f"{top}/from/inner")
        for name in ("1", "inner/2"):
            write(f"{top}/from/{name}", pattern(1_500_000))
            os.chmod(f"{top}/from/{name}", 0o444)
        for name in ("from/inner", "from"):
            os.chmod(f"{top}/{name}", 0o555)
        for send, destination in ((here.upload, f"{top}/up"), (here.download, f"{top}/down")):
            report = await send(f"{top}/from", destination)
            assert (report.files, report.metadata_kept) == (2, True)
            assert test_transfer.contents(destination) == test_transfer.contents(f"{top}/from")
            modes = {name: mode for name, (mode, _) in test_transfer.dated(destination).items()}
            assert modes == {".": 0o555, "inner": 0o555, "1": 0o444, "inner/2": 0o444}
            assert (await send(f"{top}/from", destination)).unchanged == 2


async def test_error_of_a_transfer_names_the_file_that_cannot_be_read(here: Files) -> None:
    with unprivileged() as top:
        os.mkdir(f"{top}/from")
        write(f"{top}/from/file", b"x")
        os.chmod(f"{top}/from/file", 0o000)
        for send in (here.upload, here.download):
            await check_error(errno.EACCES, f"{top}/from/file", send, f"{top}/from", f"{top}/to")


# A connection that is cut.


async def test_transfer_goes_on_after_the_connection_was_cut() -> None:
    data = pattern(9_000_001)
    with folder() as top, trio.fail_after(20):
        write(f"{top}/from", data)
        for way in ("upload", "download"):
            destination = f"{top}/{way}"
            async with open_memory() as (environment, channel):

                def cut(progress: Progress) -> None:
                    if progress.done_bytes >= 3 * 2**20:
                        channel.close_nowait()

                with pytest.raises(ConnectionLost):
                    await getattr(environment.files, way)(f"{top}/from", destination, progress=cut)
            assert kind(destination) == "nothing"
            async with open_memory() as (environment, _):
                report = await getattr(environment.files, way)(f"{top}/from", destination)
            assert report.resumed_bytes >= 2**20
            assert report.resumed_bytes + report.bytes == len(data)
            assert read(destination) == data


async def test_watch_ends_with_its_connection() -> None:
    with folder() as top, trio.fail_after(10):
        async with open_memory() as (environment, channel):
            watching = environment.files.watch_missing([f"{top}/none"])
            async with watching as watch, trio.open_nursery() as nursery:
                assert watch is not None
                nursery.start_soon(_check_lost, watch)
                await wait_all_tasks_blocked()
                channel.close_nowait()


async def _check_lost(watch: Watch) -> None:
    with pytest.raises(ConnectionLost):
        await watch.wait()


async def test_open_file_ends_with_its_connection() -> None:
    with folder() as top, trio.fail_after(10):
        write(f"{top}/file", b"content")
        async with open_memory() as (environment, channel):
            reader = await environment.files.open(f"{top}/file", "rb")
            writer = await environment.files.open(f"{top}/new", "wb")
            await writer.write(b"in the buffer")
            channel.close_nowait()
            for call in (reader.read, writer.aclose, partial(environment.files.read_file, f"{top}/file")):
                with pytest.raises(ConnectionLost):
                    await call()
        assert read(f"{top}/new") == b""


# Any name.

names = (
    st.binary(min_size=1, max_size=40)
    .map(lambda data: data.replace(b"\0", b"%").replace(b"/", b"\\"))
    .filter(lambda name: name not in (b".", b".."))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(names, min_size=1, max_size=5), st.binary(max_size=50))
def test_any_path_comes_back(parts: list[bytes], data: bytes) -> None:
    async def write_and_find(files: Files, top: str) -> None:
        path = os.fsencode(top) + b"/" + b"/".join(parts)
        uri = PathUri.from_native(path)
        await files.create_directory(PathUri.from_native(os.path.dirname(path)))
        await files.write_file(uri, data)
        found = (await files.walk(top)).entries
        expected = [
            path.split(b"/")[: number + 1] for number in range(top.count("/") + 1, path.count(b"/") + 1)
        ]
        assert [entry.path.to_native() for entry in found] == [b"/".join(one) for one in expected]
        assert PathUri.parse(found[-1].path.uri) == uri
        assert await files.read_file(found[-1].path) == data
        assert await files.read_file(uri.text) == data
        assert read(path) == data

    with folder() as top, closing(Mounts()) as here:
        trio.run(write_and_find, local_files(here), top)


async def test_path_longer_than_any_is_refused_at_once() -> None:
    path = PathUri.from_native("/a" * 50_000)
    with trio.fail_after(30):
        async with open_environment("local") as environment:
            files = environment.files
            for call in (
                files.read_file(path),
                files.write_file(path, b""),
                files.get_metadata(path),
                files.create_directory(path),
                files.remove(path),
                files.copy("/", path, recursive=True),
                files.copy(path, "/tmp/copy"),
                files.walk(path),
            ):
                with pytest.raises(OSError, match="File name too long") as caught:
                    await call
                assert caught.value.errno == errno.ENAMETOOLONG
            with pytest.raises(OSError, match="File name too long"):
                async with files.watch_missing([path] * 40):
                    pass
