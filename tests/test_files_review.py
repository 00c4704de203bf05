"""What once went wrong with files, each as it was found: floods, hanging threads, races."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
import trio.testing

from execenv import transfer
from execenv.abc import FileHandle
from execenv.errors import InternalError, InvalidRequest
from execenv.file import BinaryFile, TextFile
from execenv.local import codex_config, disk, mounts
from execenv.local.filesystem import LocalFileHandle, LocalFileSystem
from execenv.local.mounts import Mounts
from execenv.local.turn import Turn
from execenv.paths import PathUri
from execenv.protocol import (
    FS_READ_FILE,
    U64,
    EnvironmentConfigReadParams,
    FsCloseParams,
    FsOpenParams,
    FsOpenResult,
    FsReadFileParams,
    FsWatchMissingParams,
    FsWatchMissingResult,
    OpenMode,
)
from execenv.rpc import Answer, Peer, Route, open_peer
from execenv.server.filesystem import MAX_UNSENT, FileTable, Handling
from execenv.transports._pump import FdIO, Pump
from execenv.transports.channel import ANSWER_LIMIT
from execenv.transports.memory import memory_pair
from execenv.transports.stdio import LineFraming
from tests.conftest import open_memory, time_limit


@pytest.fixture
def top() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def files() -> Iterator[LocalFileSystem]:
    with closing(Mounts()) as here:
        yield LocalFileSystem(here)


def uri(path: Path) -> PathUri:
    return PathUri.from_native(bytes(path))


async def test_requests_that_came_together_stop_at_the_limit_of_answers() -> None:
    # 64 KiB hold a thousand requests for a MiB each.
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs, ours:
        pump = Pump("test", FdIO(ours.fileno(), ours.fileno(), ours.close))
        pump.framing = LineFraming(pump, 1 << 20)
        received = 0
        enough = trio.Event()

        def receive(data: bytes) -> None:
            nonlocal received
            received += 1
            pump.send_nowait(bytes(1 << 20))
            if pump.queued > ANSWER_LIMIT:
                enough.set()

        theirs.sendall(b"{}\n" * 1000)
        async with time_limit(10), trio.open_nursery() as nursery:
            nursery.start_soon(pump.run, receive)
            await enough.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert received <= ANSWER_LIMIT // (1 << 20) + 2
            nursery.cancel_scope.cancel()


async def test_copy_to_a_fifo_that_is_not_emptied_takes_no_thread(files: LocalFileSystem, top: Path) -> None:
    os.mkfifo(top / "fifo")
    (top / "file").write_bytes(bytes(1 << 20))
    reader = os.open(top / "fifo", os.O_RDWR)
    before = len(os.listdir("/proc/self/fd"))
    async with time_limit(20), trio.open_nursery() as nursery:
        for _ in range(60):  # more than there are threads

            async def copy() -> None:
                await files.copy(uri(top / "file"), uri(top / "fifo"), recursive=False)

            nursery.start_soon(copy)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert await files.canonicalize(uri(top)) == uri(top)
        nursery.cancel_scope.cancel()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(reader)


async def test_copy_of_a_tree_onto_a_fifo_can_be_cancelled(files: LocalFileSystem, top: Path) -> None:
    for name in ("tree", "copy"):
        (top / name).mkdir()
    os.mkfifo(top / "copy/file")
    (top / "tree/file").write_bytes(bytes(1 << 20))
    reader = os.open(top / "copy/file", os.O_RDWR)
    before = len(os.listdir("/proc/self/fd"))
    async with time_limit(20):
        with trio.move_on_after(0.3):
            await files.copy(uri(top / "tree"), uri(top / "copy"), recursive=True)
        assert len(os.listdir("/proc/self/fd")) == before
    os.close(reader)


async def test_what_nobody_will_ever_read_is_no_fifo(files: LocalFileSystem, top: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bytes(top / "socket"))
        async with time_limit(10):
            with pytest.raises(OSError) as caught:
                await files.write_file(uri(top / "socket"), b"x")
    assert caught.value.errno == errno.ENXIO


async def test_fifo_gets_all_from_one_writer_when_its_reader_comes(
    files: LocalFileSystem, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(top / "fifo")
    look, failed = files._open_fifo, trio.Event()

    def looking(path: PathUri) -> int | None:
        found = look(path)
        if found is None:
            failed.set()
        return found

    monkeypatch.setattr(files, "_open_fifo", looking)
    async with time_limit(10), trio.open_nursery() as nursery:
        nursery.start_soon(files.write_file, uri(top / "fifo"), b"content")
        await failed.wait()
        assert await trio.to_thread.run_sync((top / "fifo").read_bytes) == b"content"


async def test_file_of_proc_is_written_without_a_position(files: LocalFileSystem) -> None:
    with open("/proc/self/comm", "rb") as comm:  # noqa: ASYNC230
        name = comm.read()
    async with time_limit(10):
        await files.write_file(PathUri.from_native(f"/proc/{os.getpid()}/comm"), name)


async def test_remove_goes_on_when_somebody_else_removes_too(
    files: LocalFileSystem, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "tree/a/b").mkdir(parents=True)
    for path in ("one", "two", "a/three", "a/b/four"):
        (top / "tree" / path).write_bytes(b"")
    real = os.unlink

    def unlink(path: bytes, *, dir_fd: int | None = None) -> None:
        real(path, dir_fd=dir_fd)
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(disk.os, "unlink", unlink)  # type: ignore[attr-defined]
    async with time_limit(10):
        await files.remove(uri(top / "tree"), force=False)
    assert not (top / "tree").exists()


def test_file_that_cannot_be_emptied_leaks_no_descriptor(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    def ftruncate(fd: int, size: int) -> None:
        raise PermissionError(errno.EPERM, "sealed")

    monkeypatch.setattr(disk.os, "ftruncate", ftruncate)  # type: ignore[attr-defined]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(PermissionError):
            disk.open_to_write(Turn(), bytes(top / "file"), keep=False)
    assert len(os.listdir("/proc/self/fd")) == before


def test_mount_point_with_a_carriage_return(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    (top / "mountinfo").write_bytes(b"1 0 0:1 / / rw - ext4 d rw\n2 1 0:2 / /a\rb rw - nfs gone:/ rw\n")
    monkeypatch.setattr(mounts, "_MOUNTINFO", str(top / "mountinfo"))
    with closing(Mounts()) as here:
        assert here.limiter(b"/a\rb/c") is not here.limiter(b"/", deep=True)


async def test_closing_waits_for_no_other_call_on_a_dead_mount(top: Path) -> None:
    (top / "file").write_bytes(b"content")
    limiter = trio.CapacityLimiter(1)
    hanging = threading.Event()
    handle = LocalFileHandle(os.open(top / "file", os.O_RDONLY), uri(top / "file"), limiter, quick=False)
    before = len(os.listdir("/proc/self/fd"))
    closed_in: list[str] = []
    async with time_limit(10), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: trio.to_thread.run_sync(hanging.wait, limiter=limiter))
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.move_on_after(0.1):  # waits for the limiter; nothing is to be closed by the loop then
            await handle.read(0, 1)
        real = os.close
        with pytest.MonkeyPatch.context() as patch:

            def close(fd: int) -> None:
                closed_in.append(threading.current_thread().name)
                real(fd)

            patch.setattr("execenv.local.filesystem.os.close", close)
            await handle.close()
        hanging.set()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert closed_in
    assert threading.main_thread().name not in closed_in


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_configuration_that_is_no_file(
    make: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, top: Path
) -> None:
    make(f"{top}/config.toml")
    monkeypatch.setenv("CODEX_HOME", str(top))
    with pytest.raises(InternalError, match=r"config\.toml: "):
        codex_config.read_config(
            EnvironmentConfigReadParams(uri(top), (("model",),), ()), system=str(top / "none")
        )


class SlowHandle(FileHandle):
    """A file in memory whose calls fail where they are told to."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.blocked: set[int] = set()
        self.calls = 0

    async def _turn(self) -> None:
        self.calls += 1
        if self.calls in self.blocked:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    async def read(self, offset: int, size: int) -> bytes:
        await self._turn()
        return bytes(self.content[offset : offset + min(size, 100)])

    async def write(self, offset: int, data: bytes) -> None:
        await self._turn()
        self.content[offset : offset + len(data)] = data

    async def close(self, *, sync: bool = False) -> None:
        await trio.lowlevel.checkpoint()


async def test_cancelled_flush_keeps_what_was_written(
    top: Path, autojump_clock: trio.testing.MockClock
) -> None:
    handle = SlowHandle()
    handle.blocked = {1}
    file = BinaryFile(handle, uri(top), writing=True)
    await file.write(b"one ")
    with trio.move_on_after(1):
        await file.flush()
    await file.write(b"two")
    await file.aclose()
    assert handle.content == b"one two"


async def test_cancelled_read_of_text_loses_nothing(
    top: Path, autojump_clock: trio.testing.MockClock
) -> None:
    text = "x" * 100_000 + "\nend"
    for name in ("readline", "read"):
        handle = SlowHandle(text.encode())
        handle.blocked = {900}
        file = TextFile(BinaryFile(handle, uri(top), writing=False), "utf-8", "strict")
        with trio.move_on_after(1) as scope:
            await getattr(file, name)()
        assert scope.cancelled_caught
        assert await file.read() == text


async def test_watches_count_from_when_they_are_asked_for(files: LocalFileSystem, top: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watching: dict[int, bool] = {}
    async with time_limit(20), trio.open_nursery() as nursery:
        table = FileTable(files, nursery, lambda *args: None)

        async def ask(number: int, handling: Handling[Answer[FsWatchMissingResult]]) -> None:
            answer = await handling
            watching[number] = answer.result.watching
            answer.then()

        for number in range(100):
            params = FsWatchMissingParams(U64(7), (uri(top / "missing"),))
            nursery.start_soon(ask, number, table.watch_missing(params))
        while len(watching) < 100:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert [number for number, there in watching.items() if there] == [99]
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        nursery.cancel_scope.cancel()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_listings_that_nobody_takes_are_not_kept(files: LocalFileSystem) -> None:
    answers: list[Answer[object]] = []

    async def make() -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(MAX_UNSENT // 3)

    async with time_limit(10), trio.open_nursery() as nursery:
        table = FileTable(files, nursery, lambda *args: None)

        async def ask() -> None:
            answers.append(await table._listed(make))

        for _ in range(20):
            nursery.start_soon(ask)
        taken = 0
        while taken < 20:
            await trio.testing.wait_all_tasks_blocked()
            assert 1 <= len(answers) <= 3
            taken += len(answers)
            for answer in answers:
                answer.then()
            answers.clear()


async def test_file_that_hangs_holds_up_no_other_long_answer(files: LocalFileSystem, top: Path) -> None:
    (top / "file").write_bytes(bytes(2 << 20))

    class Hanging(LocalFileSystem):
        async def open(
            self, path: PathUri, mode: OpenMode = "read", *, follow_symlinks: bool = True
        ) -> FileHandle:
            if path.name == "dead":
                await trio.sleep_forever()
            return await super().open(path, mode, follow_symlinks=follow_symlinks)

    files.__class__ = Hanging
    async with time_limit(10), trio.open_nursery() as nursery:
        table = FileTable(files, nursery, lambda *args: None)
        ours, theirs = memory_pair()
        handler = table.read_file
        server = Peer(theirs, [Route(FS_READ_FILE, handler)], strict=True)
        nursery.start_soon(server.run)
        async with open_peer(Peer(ours)) as peer:
            peer.call_nowait(FS_READ_FILE, FsReadFileParams(uri(top / "dead")))
            for follow in (True, False):
                params = FsReadFileParams(uri(top / "file"), follow_symlinks=follow)
                assert len((await peer.call(FS_READ_FILE, params)).data_base64) == 2 << 20
        nursery.cancel_scope.cancel()


async def test_failed_close_is_forgotten(files: LocalFileSystem) -> None:
    async with time_limit(10), trio.open_nursery() as nursery:
        table = FileTable(files, nursery, lambda *args: None)
        params = FsOpenParams("h", PathUri.from_native("/proc/self/maps"))
        opening = table.open(params)
        assert not isinstance(opening, FsOpenResult)
        await opening
        closing_ = table.close(FsCloseParams("h", sync=True))
        with pytest.raises(OSError, match="Invalid argument"):  # there is nothing to sync
            await closing_  # type: ignore[misc]
        assert not table._closing


@pytest.mark.parametrize("name", ["file", "link"])
async def test_transfer_of_a_file_onto_itself_in_place(files: LocalFileSystem, top: Path, name: str) -> None:
    (top / "file").write_bytes(b"content")
    (top / "link").symlink_to("file")
    os.utime(top / "file", (0, 0))  # without a time nothing tells that it is there already

    class Plain(LocalFileSystem):
        async def can_transfer(self) -> bool:
            await trio.lowlevel.checkpoint()
            return False

    files.__class__ = Plain
    async with time_limit(10):
        await transfer.copy(files, uri(top / "file"), files, uri(top / name))
    with open(top / "file", "rb") as file:  # noqa: ASYNC230
        assert file.read() == b"content"


async def test_file_over_the_limit_is_refused_whole_and_read_in_blocks(top: Path) -> None:
    size = 536_870_912 + 1
    with (top / "huge").open("wb") as file:
        file.truncate(size)  # no block of it is on the disk
    path = uri(top / "huge")
    async with time_limit(10), open_memory() as (environment, _):
        peer = (await environment._backend.session()).peer  # type: ignore[attr-defined]
        with pytest.raises(InvalidRequest, match="file is too large to read: limit is 536870912 bytes"):
            await peer.call(FS_READ_FILE, FsReadFileParams(path))
        handle = await environment._backend.files.open(path)
        assert await handle.read(size - 3, 10) == bytes(3)
        await handle.close()


async def test_cancelled_atomic_write_leaves_no_part_that_comes_later(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, begun, may_go_on = trio.lowlevel.current_trio_token(), trio.Event(), threading.Event()
    open_to_write = disk.open_to_write

    def open_late(turn: Turn, path: bytes, *, keep: bool) -> int:
        token.run_sync_soon(begun.set)
        may_go_on.wait(10)
        return open_to_write(turn, path, keep=keep)

    monkeypatch.setattr(disk, "open_to_write", open_late)
    monkeypatch.setattr(LocalFileSystem, "open_nowait", lambda *_: None)
    async with time_limit(20), open_memory() as (environment, _), trio.open_nursery() as nursery:

        async def write() -> None:
            await environment.files.write_file(uri(top / "file"), b"content", atomic=True)

        nursery.start_soon(write)
        await begun.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked(0.05)
            may_go_on.set()
    assert os.listdir(top) == []
