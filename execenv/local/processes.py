"""Processes on this machine: start, supervise, end.

Each process is supervised by one task in the environment's nursery: it reads the outputs, waits for the
exit by pidfd, and does not end before the process has. When it is cancelled, because the environment
closes, it ends the whole tree first. *Exited* never waits for *closed*: a grandchild may hold a pipe for as
long as it likes.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from logging import getLogger
from time import perf_counter
from typing import TYPE_CHECKING

import trio

from execenv.abc import Event, KillReceipt, Process, Processes, Sink, Termination
from execenv.errors import InternalError, InvalidParams, InvalidRequest, NotSupported, os_error_text
from execenv.local import spawn as spawning
from execenv.local.environment import child_environment
from execenv.local.output_log import RETAINED_BYTES, OutputLog
from execenv.local.tree import (
    Marks,
    Root,
    birthmark,
    find_leftovers,
    reap,
    set_mark,
    signal_tree,
)
from execenv.local.watchdog import Watchdog
from execenv.paths import ForeignPathError
from execenv.protocol import ProcessReadResult, ProcessStartParams
from execenv.sandbox.denied import looks_denied
from execenv.sandbox.policy import Sandbox

if TYPE_CHECKING:
    from execenv.local.confinement import Confinement

logger = getLogger(__name__)

READ_SIZE = 64 * 1024
WORK_SLICE = 0.0005  # seconds of reading before other tasks get a turn
STDIN_CHUNKS = 128  # protocol.md §4.6
STDIN_BYTES = 1024 * 1024
WRITE_IDS = 4096
KILL_PATIENCE = 5.0
START_PATIENCE = 5.0
"""Seconds that a signal waits for a program that is still being confined."""


class LocalProcess(Process):
    """One process. Made by `LocalProcesses.start`; `supervise` runs in the environment's nursery."""

    def __init__(self, owner: LocalProcesses, process_id: str, spawned: spawning.Spawned, root: Root) -> None:
        self.process_id = process_id
        self._owner = owner
        self._spawned = spawned
        self._root = root
        self._log = OutputLog(owner.retained_bytes)
        self._sinks: list[Sink] = []
        self._changed = trio.lowlevel.ParkingLot()
        self._reading = trio.CancelScope()
        self._open = dict(spawned.outputs)
        self._exited = trio.Event()
        self._closed = trio.Event()
        self._stdin = _Stdin(spawned.stdin_fd, owner.nursery)

    @property
    def pid(self) -> int:
        return self._spawned.pid

    # Output.

    def subscribe(self, sink: Sink, *, history: bool = False) -> None:
        if history:
            for event in self._log.history():
                sink.put(event)
        self._sinks.append(sink)

    def unsubscribe(self, sink: Sink) -> None:
        with suppress(ValueError):
            self._sinks.remove(sink)

    async def read(
        self, after_seq: int = 0, max_bytes: int | None = None, wait: float = 0.0
    ) -> ProcessReadResult:
        log = self._log
        if wait > 0 and not log.answers(after_seq):
            with trio.move_on_after(wait):
                while not log.answers(after_seq):
                    await self._changed.park()
        return log.read(after_seq, max_bytes)

    @property
    def retained(self) -> int:
        return self._log.size

    def retain_behind(self, seq: int | None, max_bytes: int = 0) -> None:
        self._log.retain_behind(seq, max_bytes)

    def forget_output(self) -> None:
        self._log.forget()

    def release(self) -> None:
        self._owner.forget(self)

    # Input and signals.

    def write_nowait(self, data: bytes, write_id: str) -> str | None:
        return self._stdin.write_nowait(data, write_id, ended=self._log.exited)

    async def write(self, data: bytes, write_id: str) -> str:
        while (status := self.write_nowait(data, write_id)) is None:
            await self._stdin.room.park()
        return status

    async def close_stdin(self) -> None:
        if self._spawned.tty:
            raise NotSupported("a terminal has no end of file: write the character for it, 0x04")
        self._stdin.close_when_written()

    async def interrupt(self) -> None:
        self._signal_group(signal.SIGINT)

    async def resize(self, rows: int, columns: int) -> None:
        if not self._spawned.tty:
            raise NotSupported("the process has no terminal: start it with tty")
        if "pty" in self._open:
            spawning.resize(self._open["pty"], rows, columns)

    def _signal_group(self, signum: signal.Signals) -> None:
        if self._log.exited:
            return
        send = self._spawned.signal
        if send is None:
            with suppress(ProcessLookupError, PermissionError):  # not reaped, so its group's id is its own
                os.killpg(self.pid, signum)
        elif not send(signum):
            self._owner.nursery.start_soon(self._signal_when_begun, send, signum)

    async def _signal_when_begun(self, send: Callable[[int], bool], signum: int) -> None:
        with trio.move_on_after(START_PATIENCE):
            while not self._log.exited and not send(signum):  # noqa: ASYNC110
                await trio.sleep(0.001)  # nothing tells when a program was executed

    async def terminate(self, *, receipt: bool = True, grace: float = 0.0) -> Termination:
        running = not self._log.exited
        if running and grace > 0:
            self._signal_group(signal.SIGTERM)
            with trio.move_on_after(grace):
                await self._exited.wait()
        elif not running and not receipt:
            return Termination(False)
        if self._log.exited and self._closed.is_set() and not self._leftovers():
            return Termination(running, KillReceipt() if receipt else None)
        members = signal_tree(self._root, self._owner.known)
        if self._log.exited:
            self._reading.cancel()
        else:
            self._terminated = True
        if not receipt:
            self._owner.nursery.start_soon(_quietly, members.finish, KILL_PATIENCE)
            return Termination(running)
        with trio.CancelScope(shield=True):
            done = await members.finish(KILL_PATIENCE)
            self._owner.left_behind.discard(self)
            if not done.survivors:
                with trio.move_on_after(KILL_PATIENCE):
                    await self._closed.wait()
        return Termination(running, done)

    _terminated = False

    def _leftovers(self) -> list[int]:
        return find_leftovers(self._root, self._owner.known)

    # Supervision.

    async def supervise(self) -> None:
        """Run from the start of the process until it is closed, or killed because this is cancelled."""
        try:
            with self._reading:  # cancelled only when the exit was noted
                async with trio.open_nursery() as nursery:
                    for name, fd in self._spawned.outputs:
                        nursery.start_soon(self._read_stream, name, fd)
                    await self._wait_exit()
                    self._drain()
                    self._note_exit()
            self._note_closed()
        finally:
            if not self._closed.is_set():
                await self._end()
            self._release()

    async def _end(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                receipt = await signal_tree(self._root, self._owner.known).finish(KILL_PATIENCE)
                for survivor in receipt.survivors:
                    logger.warning("pid %d could not be ended: %s", survivor.pid, survivor.reason)
            except OSError as error:
                logger.warning("the tree of pid %d could not be looked at: %s", self.pid, error)
                self._owner.left_behind.add(self)
            if not self._log.exited:
                with trio.move_on_after(KILL_PATIENCE):
                    await self._wait_exit()
                self._note_exit()
            self._note_closed()

    async def _wait_exit(self) -> None:
        if self._spawned.pidfd is not None:
            await trio.lowlevel.wait_readable(self._spawned.pidfd)
        while self._spawned.poll() is None:  # noqa: ASYNC110 - no pidfd, or the kernel is a moment behind it
            await trio.sleep(0.01)

    def _note_exit(self) -> None:
        polled = self._spawned.poll()
        code = -1 if polled is None else polled
        self._root = self._root.reaped()
        self._owner.known.discard(self.pid)
        self._stdin.process_ended()
        denied = self._spawned.confined and code != 0 and looks_denied(code, self._log.newest())
        self._emit(self._log.exit(code, denied))
        self._exited.set()
        try:
            left = self._leftovers()
        except OSError:  # no descriptors left to look with: whoever ends the tree looks again
            left = []
            self._owner.left_behind.add(self)
        for pid in left:
            self._owner.nursery.start_soon(_quietly, reap, pid)
            self._owner.left_behind.add(self)
        if self._terminated:
            self._reading.cancel()

    def _note_closed(self) -> None:
        self._emit(self._log.close())
        self._closed.set()

    def _release(self) -> None:
        self._stdin.release()
        if self._spawned.pidfd is not None:
            os.close(self._spawned.pidfd)
        for fd in self._open.values():
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        self._open.clear()
        self._sinks.clear()
        self._spawned.ended()

    async def _read_stream(self, name: str, fd: int) -> None:
        await trio.lowlevel.wait_readable(fd)
        began = perf_counter()
        while name in self._open:
            try:
                data = os.read(fd, READ_SIZE)
            except BlockingIOError:
                data = None
            except OSError:  # EIO: nobody has the terminal open any more
                return
            if data == b"":
                return
            if data is not None:
                self._emit_output(name, data)
                await self._wait_sinks()
            if data is None or len(data) < READ_SIZE:
                # A short read took all there was.
                await trio.lowlevel.wait_readable(fd)
                began = perf_counter()
            elif perf_counter() - began > WORK_SLICE:
                await trio.lowlevel.checkpoint()
                began = perf_counter()

    def _drain(self) -> None:
        """At the exit, take what the pipes hold already, so that it precedes the exit event.

        One read each: if somebody still writes, the readers go on with the rest.
        """
        for name, fd in self._spawned.outputs:
            if any(sink.full for sink in self._sinks):
                return
            with suppress(OSError):
                data = os.read(fd, READ_SIZE)
                if data:
                    self._emit_output(name, data)

    def _emit_output(self, name: str, data: bytes) -> None:
        self._emit(self._log.append(name, data))

    def _emit(self, event: Event) -> None:
        for sink in self._sinks:
            sink.put(event)
        if self._changed:
            self._changed.unpark_all()

    async def _wait_sinks(self) -> None:
        """Backpressure: while a reader of the output is full, read no more, and the child blocks in write."""
        while True:
            for sink in self._sinks:
                if sink.full:
                    await sink.wait_room()
                    break
            else:
                return


async def _quietly(function: Callable[..., Awaitable[object]], *args: object) -> None:
    """Run a look after a tree beside everything else: that it fails must not end the environment."""
    try:
        await function(*args)
    except OSError as error:
        logger.warning("a process tree could not be looked at: %s", error)


class _Stdin:
    """The stdin of one process: a bounded queue before the pipe, and the memory of write ids."""

    def __init__(self, fd: int | None, nursery: trio.Nursery) -> None:
        self._fd = fd
        self._nursery = nursery
        self._chunks: deque[bytes | memoryview] = deque()
        self._bytes = 0
        self._ids: dict[str, None] = {}
        self._writing = False
        self._closing = False
        self._accepts = fd is not None
        self._ended = False
        self.room = trio.lowlevel.ParkingLot()

    def write_nowait(self, data: bytes, write_id: str, *, ended: bool) -> str | None:
        if not write_id:
            raise InvalidParams("writeId must not be empty")
        # A long id is remembered by its digest, so that 4096 of them are bounded in bytes too.
        key = write_id if len(write_id) <= 64 else hashlib.sha256(write_id.encode()).hexdigest()
        if key in self._ids:
            return "accepted"
        if not self._accepts or self._closing:
            return "stdinClosed"
        if ended or self._ended:
            raise InternalError("failed to write to process stdin")
        if len(self._chunks) >= STDIN_CHUNKS or (self._chunks and self._bytes + len(data) > STDIN_BYTES):
            return None
        self._ids[key] = None
        if len(self._ids) > WRITE_IDS:
            del self._ids[next(iter(self._ids))]
        if data and self._fd is not None:
            self._queue(data)
        return "accepted"

    def close_when_written(self) -> None:
        self._closing = True
        if not self._writing:
            self._close()

    def _queue(self, data: bytes) -> None:
        rest: bytes | memoryview = data
        if not self._writing:
            rest = self._write_now(data)
            if not rest:
                return
            self._writing = True
            self._nursery.start_soon(self._write_queued)
        self._chunks.append(rest)
        self._bytes += len(rest)

    def _write_now(self, data: bytes | memoryview) -> bytes | memoryview:
        """What is left of `data` when the pipe is full. A child that closed its stdin takes nothing."""
        if self._fd is None:
            return b""
        try:
            count = os.write(self._fd, data)
        except BlockingIOError:
            return data
        except OSError:
            return b""
        return memoryview(data)[count:] if count < len(data) else b""

    async def _write_queued(self) -> None:
        try:
            while self._chunks and self._fd is not None:
                try:
                    await trio.lowlevel.wait_writable(self._fd)
                except (OSError, trio.ClosedResourceError):
                    break
                if not self._chunks:  # the process ended while we waited
                    break
                chunk = self._chunks[0]
                rest = self._write_now(chunk)
                self._bytes -= len(chunk) - len(rest)
                if rest:
                    self._chunks[0] = rest
                else:
                    self._chunks.popleft()
                    self.room.unpark_all()
        finally:
            self._writing = False
            self._drop()
        if self._closing:
            self._close()

    def _drop(self) -> None:
        self._chunks.clear()
        self._bytes = 0
        self.room.unpark_all()

    def process_ended(self) -> None:
        self._ended = True
        self._close()
        self._drop()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)

    release = process_ended


class LocalProcesses(Processes):
    """Starts processes on this machine.

    Args:
        nursery: where they are supervised. Cancelling it ends them all.
        marks, watchdog, known, confinement: shared by all environments of a server; see `Guard`.
        retained_bytes: how much output of each process is kept for reading again.
        ours: the environment variables that policies start from.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        marks: Marks,
        watchdog: Watchdog,
        known: set[int],
        confinement: Callable[[], Confinement],
        *,
        retained_bytes: int = RETAINED_BYTES,
        ours: Mapping[str, str] | None = None,
    ) -> None:
        self.nursery = nursery
        self._confinement = confinement
        self._starting: set[str] = set()
        self.retained_bytes = retained_bytes
        self.known = known
        self.closed = False
        self._by_id: dict[str, LocalProcess] = {}
        self.left_behind: set[LocalProcess] = set()
        self._marks = marks
        self._watchdog = watchdog
        self._ours = os.environ if ours is None else ours

    async def start(
        self, params: ProcessStartParams, sink: Sink | None = None, *, input_size: int | None = None
    ) -> LocalProcess:
        if not params.argv:
            raise InvalidParams("argv must not be empty")
        refuse_unenforceable(params)
        cwd = _native_cwd(params)
        env = child_environment(params.env, params.env_policy, self._ours)
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise InternalError("the environment is closed")
        if params.process_id in self._by_id or params.process_id in self._starting:
            raise InvalidRequest(f"process {params.process_id} already exists")
        self._watchdog.start()
        if self._watchdog.pid is not None:
            self.known.add(self._watchdog.pid)
        if params.sandbox is not None and params.sandbox.profile.enforces:
            spawned, root = await self._spawn_confined(params.sandbox, params, cwd, env)
        else:
            spawned, root = self._spawn_marked(params, cwd, env)
        # From a spawn to the supervising task nothing may be cancelled or fail.
        self.known.add(spawned.pid)
        process = LocalProcess(self, params.process_id, spawned, root)
        if sink is not None:
            process.subscribe(sink)
        self._by_id[params.process_id] = process
        self.nursery.start_soon(process.supervise, name=f"process {spawned.pid}")
        return process

    async def _spawn_confined(
        self, sandbox: Sandbox, params: ProcessStartParams, cwd: bytes, env: dict[str, str]
    ) -> tuple[spawning.Spawned, Root]:
        self._starting.add(params.process_id)  # what comes now may take a moment
        try:
            spawned, root = await self._confinement().spawn(
                sandbox,
                params.argv,
                cwd,
                env,
                arg0=params.arg0,
                tty=params.tty,
                pipe_stdin=params.pipe_stdin,
            )
        finally:
            self._starting.discard(params.process_id)
        if self.closed:
            spawning.abandon(spawned)
            self.known.discard(spawned.pid)
            raise InternalError("the environment is closed")
        return spawned, root

    def _spawn_marked(
        self, params: ProcessStartParams, cwd: bytes, env: dict[str, str]
    ) -> tuple[spawning.Spawned, Root]:
        with birthmark() as born:
            spawned = spawning.spawn(
                params.argv, cwd, env, arg0=params.arg0, tty=params.tty, pipe_stdin=params.pipe_stdin
            )
            try:
                mark = self._marks.new()
                marked = set_mark(spawned.pid, mark, born=born)
                return spawned, Root.of(spawned.pid, mark if marked else None)
            except OSError as error:  # no descriptors left to look at it with: then it must not run
                spawning.abandon(spawned)
                raise InternalError(os_error_text(error)) from error

    async def attach(self, process_id: str) -> LocalProcess:
        await trio.lowlevel.checkpoint()
        try:
            return self._by_id[process_id]
        except KeyError:
            raise InvalidRequest(f"unknown process id {process_id}") from None

    def forget(self, process: LocalProcess) -> None:
        """Free the id of a process."""
        if self._by_id.get(process.process_id) is process:
            del self._by_id[process.process_id]

    async def end_leftovers(self) -> None:
        """End what processes that have exited left behind. Call it shielded, when the environment closes."""
        left, self.left_behind = self.left_behind, set()
        for process in left:
            await process.terminate()


def _native_cwd(params: ProcessStartParams) -> bytes:
    try:
        return params.cwd.to_native()
    except ForeignPathError as error:
        raise InvalidParams(
            f"cwd URI `{params.cwd.uri}` is not valid on this exec-server host: {error}"
        ) from None


_UNSUPPORTED: dict[str, str] = {
    "enforce_managed_network": "enforceManagedNetwork",
    "managed_network": "managedNetwork",
    "network_proxy": "networkProxy",
    "shell_snapshot": "shellSnapshot",
    "credential_providers": "credentialProviders",
}
_REQUIRED_MEMBER = {"network_proxy": "proxy", "shell_snapshot": "scopeId"}


def refuse_unenforceable(params: ProcessStartParams) -> None:
    """What would confine the process, and cannot be enforced here, is refused and never ignored.

    Raises:
        InvalidParams: if such an object lacks a member that it must have.
        NotSupported: otherwise.
    """
    for attribute, member in _UNSUPPORTED.items():
        value = getattr(params, attribute)
        if value is None or value is False:
            continue
        required = _REQUIRED_MEMBER.get(attribute)
        if required is not None and isinstance(value, dict) and required not in value:
            raise InvalidParams(f"missing field `{required}`")
        raise NotSupported(f"this exec-server does not support {member}, so the process was not started")
