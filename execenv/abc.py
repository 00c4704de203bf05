"""The interfaces that a local environment, a remote one and a fake all have.

A capability is one interface here, one implementation under `local/`, one proxy under `remote/` and one
set of routes under `server/`; a contract test runs over all of them. Programs that use execenv rarely
call these: `Environment.run` and `Environment.open_process` in `execenv.environment` stand on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from attrs import frozen

from execenv.protocol import EnvironmentInfo, ProcessReadResult, ProcessStartParams


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
    """Events with these seqs are gone for good. What follows is still delivered."""

    from_seq: int
    to_seq: int


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


class EnvironmentBackend(ABC):
    """An environment that is open: its capabilities as attributes."""

    name: str
    """For messages to people: `local`, `websocket ws://127.0.0.1:8765/`."""

    processes: Processes

    @abstractmethod
    async def info(self) -> EnvironmentInfo: ...

    @abstractmethod
    async def status(self) -> str:
        """`"ready"`, or another word while the environment is still starting."""
