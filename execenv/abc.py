"""The interfaces that a local environment, a remote one and a fake all have.

A capability is one interface here, one implementation under `local/`, one proxy under `remote/` and one
set of routes under `server/`; a contract test runs over all of them. Programs that use execenv rarely
call these: `Environment.run` and `Environment.open_process` in `execenv.environment` stand on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio
from attrs import frozen

from execenv.errors import InternalError, NotSupported
from execenv.paths import PathUri
from execenv.protocol import (
    Base64,
    DirectoryEntry,
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentInfo,
    FileMetadata,
    HttpHeader,
    HttpRequestParams,
    HttpRequestResult,
    OpenMode,
    ProcessReadResult,
    ProcessStartParams,
    WalkOptions,
    WalkResult,
)
from execenv.sandbox.policy import Sandbox
from execenv.status import Status


@frozen
class Output:
    """A piece of output as it was read. `seq` counts all events of a process, from 1, without gaps."""

    seq: int
    stream: str
    """`"stdout"`, `"stderr"`, or `"pty"` where a terminal merges both."""
    data: bytes


@frozen
class Exited:
    """The program itself ended. Output of its descendants may still follow."""

    seq: int
    exit_code: int
    sandbox_denied: bool | None = False


@frozen
class Closed:
    """The last event: the program ended and all its output was seen."""

    seq: int


@frozen
class Lost:
    """Events with these seqs are gone for good. What follows is still delivered.

    `size` is how many bytes of output they had, where that is known.
    """

    from_seq: int
    to_seq: int
    size: int | None = None


@frozen
class Failed:
    """No event will follow, and what happened to the process is not known. Has no seq."""

    error: Exception


Event = Output | Exited | Closed | Lost | Failed


@frozen
class Survivor:
    """A process that could not be ended, and why."""

    pid: int
    reason: str


@frozen
class KillReceipt:
    """What ending a process took.

    Attributes:
        signalled: the pids that were told to end, in order; empty if nothing was left to end.
        seconds: how long it took until they were gone (or given up).
        survivors: who is still there, and why. Empty is the promise kept.
    """

    signalled: tuple[int, ...] = ()
    seconds: float = 0.0
    survivors: tuple[Survivor, ...] = ()


@frozen
class Termination:
    """Whether the process was still running, and the receipt if one was asked for."""

    running: bool
    receipt: KillReceipt | None = None


class Sink(Protocol):
    """Where the events of a process go. `put` must not block; it may make the sink full."""

    @property
    def full(self) -> bool:
        """Whether the producer should hold back until `wait_room` returns."""

    def put(self, event: Event) -> None: ...

    async def wait_room(self) -> None:
        """Return when the sink is not full, or is not there any more. Never raises but for cancellation."""


class Process(ABC):
    """A process that was started, in some environment. Many may use it at once; none owns it."""

    process_id: str

    @abstractmethod
    def subscribe(self, sink: Sink, *, history: bool = False) -> None:
        """Give `sink` every event from now on, in order; with `history`, first what is retained.

        A full sink holds the child back. Where that cannot be done (a remote process), it misses nothing
        that the other side still retains: it gets that when it has room again, and `Lost` for the rest.
        """

    @abstractmethod
    def unsubscribe(self, sink: Sink) -> None: ...

    @abstractmethod
    async def read(
        self, after_seq: int = 0, max_bytes: int | None = None, wait: float = 0.0
    ) -> ProcessReadResult:
        """Retained output behind `after_seq`, waiting up to `wait` seconds for some (protocol.md §4.5)."""

    def write_nowait(self, data: bytes, write_id: str) -> str | None:
        """`write` if it can be done at once, else `None` and nothing was done."""
        return None

    @abstractmethod
    async def write(self, data: bytes, write_id: str) -> str:
        """Queue bytes for stdin; waits while the queue is full. The statuses are those of §4.6.

        A `write_id` that was accepted before is accepted again without writing.

        Raises:
            InternalError: if the process has ended.
        """

    @abstractmethod
    async def close_stdin(self) -> None:
        """End of file on stdin, behind all writes.

        Raises:
            NotSupported: on a terminal, where a character says it (Ctrl-D); or if the environment has no
                such call.
        """

    @abstractmethod
    async def interrupt(self) -> None:
        """SIGINT to the process group. Nothing happens if the process has ended."""

    @abstractmethod
    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the terminal.

        Raises:
            NotSupported: without a terminal, or if the environment has no such call.
        """

    @abstractmethod
    async def terminate(self, *, receipt: bool = True, grace: float = 0.0) -> Termination:
        """End the process and everything it started.

        Args:
            receipt: wait until all are gone, and say what it took; also end what a process that has
                already exited left behind. Otherwise only tell a running process to end, and return.
            grace: seconds between SIGTERM and SIGKILL; SIGKILL at once if 0.
        """

    @property
    def retained(self) -> int:
        """Bytes of output that are kept here to be read again."""
        return 0

    def retain_behind(self, seq: int | None, max_bytes: int = 0) -> None:  # noqa: B027
        """Keep up to `max_bytes` of the output behind `seq`, even where that is more than usual.

        Every chunk counts `CHUNK_OVERHEAD` bytes more than it has. `None`: as usual.
        """

    def forget_output(self) -> None:  # noqa: B027 - nothing to do where nothing is kept
        """Give up what is retained. Who reads later sees the hole in the seqs."""

    def release(self) -> None:  # noqa: B027
        """Whoever started it has no more use for it: free its id, let go of its output."""


class Processes(ABC):
    """Starting processes."""

    @abstractmethod
    async def start(
        self, params: ProcessStartParams, sink: Sink | None = None, *, input_size: int | None = None
    ) -> Process:
        """Start a program. The process lives until it ends, is terminated, or its environment closes.

        Args:
            sink: subscribed from the first event on.
            input_size: how many bytes will be written before the end of file, if that is known. Lets a
                proxy arrange for the end of file where the other side has no call for it.

        Raises:
            InternalError, InvalidParams, InvalidRequest: if it cannot be started; the text is that of
                protocol.md §4.1.
            NotSupported: if the environment cannot do what `params` asks, such as a sandbox.
        """

    @abstractmethod
    async def attach(self, process_id: str) -> Process:
        """A process of this environment that was started earlier, under that id.

        Raises:
            InvalidRequest: if there is none, or not any more.
        """


_BLOCK = 1024 * 1024


class FileHandle(ABC):
    """An open file, read or written by position. Not closing it leaks it until its environment closes."""

    @abstractmethod
    async def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only at the end of the file."""

    @abstractmethod
    async def write(self, offset: int, data: bytes) -> None:
        """All of `data`; a gap behind the end is filled with zeros."""

    async def read_blocks(self, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """All from `offset` to the end, in pieces, as fast as the way to the file allows."""
        while data := await self.read(offset, _BLOCK):
            yield data
            offset += len(data)
            if len(data) < _BLOCK:
                return

    async def write_blocks(self, blocks: AsyncIterable[bytes], offset: int = 0) -> int:
        """Write pieces one behind the other; the offset behind the last one.

        When it fails, any part of what was given may have been written.
        """
        async for block in blocks:
            await self.write(offset, block)
            offset += len(block)
        return offset

    @abstractmethod
    async def close(self, *, sync: bool = False) -> None:
        """Close it; once is enough, twice does no harm.

        Args:
            sync: what was written is on the disk when this returns.

        Raises:
            NotSupported: if `sync` is asked for where there is no such call. It is closed all the same.
        """

    def read_nowait(self, offset: int, size: int) -> bytes | None:
        """`read` if that needs no waiting, else `None`."""
        return None

    def write_nowait(self, offset: int, data: bytes) -> bool:
        """`write` if that needs no waiting; otherwise false, and nothing was written."""
        return False

    def close_nowait(self) -> bool:
        """`close` if that needs no waiting; otherwise false, and it is still open."""
        return False


class Watch(ABC):
    """See `FileSystem.watch_missing`."""

    @abstractmethod
    async def wait(self) -> None:
        """Return when something has changed; from then on always at once."""


class FileSystem(ABC):
    """Files by path (protocol.md §5). Whatever the environment, a failure is the `OSError` of its errno.

    Its `filename` is the path as text. Calls raise `ForeignPathError` for a path of another operating system,
    and `ConnectionLost` if the environment is gone.

    `x_nowait` is `x` for who cannot wait: `None` or false says that it cannot be done without waiting for a
    device, and that nothing was done.
    """

    @abstractmethod
    async def read_file(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes:
        """The whole content of a regular file."""

    @abstractmethod
    async def write_file(self, path: PathUri, data: bytes, *, follow_symlinks: bool = True) -> None:
        """Make `data` the whole content, in place: an existing file stays the same file with its mode."""

    @abstractmethod
    async def create_directory(
        self, path: PathUri, *, recursive: bool = True, follow_symlinks: bool = True
    ) -> None:
        """With `recursive`, parents too, and one that exists is no error."""

    @abstractmethod
    async def get_metadata(self, path: PathUri, *, follow_symlinks: bool = True) -> FileMetadata:
        """Without `follow_symlinks` a link anywhere in the path is an error."""

    @abstractmethod
    async def canonicalize(self, path: PathUri) -> PathUri:
        """The path without symlinks; it must exist."""

    @abstractmethod
    async def read_directory(self, path: PathUri) -> tuple[DirectoryEntry, ...]:
        """What is in a directory, in no order, without links that lead nowhere.

        Names that are not UTF-8 have U+FFFD in them; `walk` has the real ones.
        """

    @abstractmethod
    async def remove(
        self,
        path: PathUri,
        *,
        recursive: bool = True,
        force: bool = True,
        follow_symlinks: bool = True,
    ) -> None:
        """Remove a file, a link itself, or a directory, with `recursive` all that is in it.

        With `force` it is no error if there is none.
        """

    @abstractmethod
    async def copy(self, source: PathUri, destination: PathUri, *, recursive: bool) -> None:
        """Copy a file, link or (with `recursive`) directory within the environment (§5.9)."""

    @abstractmethod
    async def walk(self, path: PathUri, options: WalkOptions) -> WalkResult:
        """What is below a directory (§5.10)."""

    @abstractmethod
    async def open(
        self, path: PathUri, mode: OpenMode = "read", *, follow_symlinks: bool = True
    ) -> FileHandle:
        """Open a regular file.

        `"replace"` creates it or makes it empty; `"update"` creates it or leaves what is in it. Only `"read"`
        can go without following links.

        Raises:
            NotSupported: if the environment cannot do that.
        """

    @abstractmethod
    def watch_missing(
        self, missing: tuple[PathUri, ...], present: PathUri | None = None
    ) -> AbstractAsyncContextManager[Watch | None]:
        """Wait until one of `missing` comes into being or something happens to `present`.

        `None` if there is nothing to wait for: one of `missing` is there, or `present` is not.
        """

    @abstractmethod
    async def rename(self, source: PathUri, destination: PathUri, *, sync: bool = False) -> None:
        """Give a file another name, replacing in one step what has that name.

        Args:
            sync: the new name is on the disk when this returns.

        Raises:
            NotSupported: if the environment has no such call.
        """

    @abstractmethod
    async def set_metadata(
        self, path: PathUri, *, mode: int | None = None, modified_at_ms: int | None = None
    ) -> None:
        """Set the permission bits, or the time of the last change.

        Raises:
            NotSupported: if the environment has no such call.
        """

    @abstractmethod
    async def can_transfer(self) -> bool:
        """Whether there are `rename`, `set_metadata` and `open` to update."""

    async def read_small(self, path: PathUri, *, follow_symlinks: bool = True) -> bytes | None:
        """The whole content, if that is one step; `None` if it takes more, and nothing is known of it yet."""
        await trio.lowlevel.checkpoint()
        return None

    def confined(self, sandbox: Sandbox) -> FileSystem:
        """The same files, as far as a sandbox lets them be touched.

        Calls raise `InternalError` too where the sandbox cannot be enforced; nothing was done then.
        `watch_missing` raises `NotSupported`.

        Raises:
            NotSupported: there are no sandboxes here that restrict anything.
        """
        raise NotSupported("these files cannot be put under a sandbox; use them without, if that may be")

    def read_file_nowait(self, path: PathUri) -> bytes | None:
        return None

    def write_file_nowait(self, path: PathUri, data: bytes) -> bool:
        return False

    def get_metadata_nowait(self, path: PathUri) -> FileMetadata | None:
        return None

    def open_nowait(self, path: PathUri, mode: OpenMode) -> FileHandle | None:
        return None


class HttpStream(ABC):
    """A response whose body is still to be received. Not closing it keeps the request going.

    Attributes:
        headers: names in lower case, repeats and order kept.
    """

    status: int
    headers: tuple[HttpHeader, ...]

    @abstractmethod
    async def receive(self) -> bytes:
        """The next piece of the body; `b""` at its end.

        Raises:
            InternalError: if the rest will not come; the text is that of protocol.md §7.2.
            ConnectionLost: if the environment is gone.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Give up what has not been received. Twice does no harm."""


class HttpClient(ABC):
    """HTTP requests that the environment makes (protocol.md §7)."""

    @abstractmethod
    async def open_stream(self, params: HttpRequestParams) -> HttpStream:
        """Send a request and return when its response begins. Any status is a success.

        Which request of the connection it is, is not the caller's business: `request_id`, `stream_response`
        and `body_window` of `params` are ignored.

        Raises:
            InvalidParams: if there can be no such request. Nothing was sent.
            InternalError: if no response came. The texts are those of protocol.md §7.
            NotSupported: if the environment cannot do what `params` asks.
        """

    async def request(self, params: HttpRequestParams) -> HttpRequestResult:
        """The same with the whole body."""
        stream = await self.open_stream(params)
        try:
            pieces = []
            while piece := await stream.receive():
                pieces.append(piece)
        except InternalError as error:
            raise body_failed(error) from error.__cause__
        finally:
            await stream.aclose()
        return HttpRequestResult(stream.status, stream.headers, Base64(b"".join(pieces)))


def body_failed(error: InternalError) -> InternalError:
    """What a request for the whole body fails with when its stream has failed."""
    return InternalError(f"failed to read http/request response body: {error.message}")


class EnvironmentBackend(ABC):
    """An environment that is open: its capabilities as attributes."""

    name: str
    """For messages to people: `local`, `websocket ws://127.0.0.1:8765/`, `relay https://h/ID`."""

    processes: Processes
    files: FileSystem
    http: HttpClient

    status: Status
    """Whether it can be reached."""

    @abstractmethod
    async def info(self) -> EnvironmentInfo: ...

    @abstractmethod
    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        """What the files of a codex at the environment configure, of the keys in `params` (§8.3).

        Raises:
            InternalError: if a file cannot be read, with its name and line.
        """

    @abstractmethod
    async def probe(self) -> str:
        """Ask it: `"ready"`, or another word while the environment is still starting."""
