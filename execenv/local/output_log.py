"""What is kept of the output of one process, by sequence number. No I/O, no `await`.

Newest 1 MiB by default, more where somebody still has to take it; whole chunks are dropped from the front
(protocol.md §4.9). The bytes are the very objects that were read from the pipe.
"""

from __future__ import annotations

from collections import deque

from execenv.abc import Closed, Event, Exited, Lost, Output
from execenv.protocol import CHUNK_OVERHEAD, Base64, OutputChunk, ProcessReadResult

RETAINED_BYTES = 1024 * 1024
RETAINED_CHUNKS = 50_000


class OutputLog:
    """Assigns seqs, keeps the newest chunks, and answers `process/read`.

    Args:
        retained_bytes: how much output is kept.
    """

    def __init__(self, retained_bytes: int = RETAINED_BYTES) -> None:
        self._retained_bytes = retained_bytes
        self._chunks: deque[Output] = deque()
        self._bytes = 0
        self._kept_behind: int | None = None
        self._most_kept = 0
        self._evicted = 0
        self._evicted_after_exit = 0
        self._exit_seq: int | None = None
        self.next_seq = 1
        self.exit_code: int | None = None
        self.exited = False
        self.closed = False
        self.sandbox_denied: bool | None = False
        self._terminal: list[Exited | Closed] = []

    def append(self, stream: str, data: bytes) -> Output:
        event = Output(self._take_seq(), stream, data)
        self._chunks.append(event)
        self._bytes += len(data)
        if self._bytes > self._retained_bytes or len(self._chunks) > RETAINED_CHUNKS:
            self._evict()
        return event

    def retain_behind(self, seq: int | None, max_bytes: int = 0) -> None:
        """See `abc.Process.retain_behind`."""
        self._kept_behind = seq
        self._most_kept = max_bytes
        self._evict()

    def _evict(self) -> None:
        chunks, behind = self._chunks, self._kept_behind
        while self._bytes > self._retained_bytes or len(chunks) > RETAINED_CHUNKS:
            if (
                behind is not None
                and chunks[0].seq > behind
                and self._bytes + CHUNK_OVERHEAD * len(chunks) <= self._most_kept
            ):
                return
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        event = self._chunks.popleft()
        size = len(event.data)
        self._bytes -= size
        self._evicted += size
        if self._exit_seq is not None and event.seq > self._exit_seq:
            self._evicted_after_exit += size

    def exit(self, exit_code: int, sandbox_denied: bool | None = False) -> Exited:
        self.exited, self.exit_code, self.sandbox_denied = True, exit_code, sandbox_denied
        event = Exited(self._take_seq(), exit_code, sandbox_denied)
        self._exit_seq = event.seq
        self._terminal.append(event)
        return event

    def close(self) -> Closed:
        self.closed = True
        event = Closed(self._take_seq())
        self._terminal.append(event)
        return event

    def history(self) -> list[Event]:
        """Every event so far, in order; `Lost` for those that are not retained any more."""
        events: list[Event] = []
        kept: list[Output | Exited | Closed] = sorted([*self._chunks, *self._terminal], key=lambda e: e.seq)
        expected = 1
        for event in kept:
            if event.seq > expected:
                events.append(self._lost(expected, event.seq - 1))
            events.append(event)
            expected = event.seq + 1
        if expected < self.next_seq:
            events.append(self._lost(expected, self.next_seq - 1))
        return events

    def _lost(self, from_seq: int, to_seq: int) -> Lost:
        # What is lost is all in front, but for the exit, which is never lost and may be in the middle of it.
        after_exit = self._exit_seq is not None and from_seq > self._exit_seq
        size = self._evicted_after_exit if after_exit else self._evicted - self._evicted_after_exit
        return Lost(from_seq, to_seq, size)

    def forget(self) -> None:
        """Drop all retained output."""
        while self._chunks:
            self._drop_oldest()

    def newest(self) -> bytes:
        """What is usually retained, of all streams, in its order."""
        left = self._retained_bytes
        chunks: list[bytes] = []
        for event in reversed(self._chunks):
            left -= len(event.data)
            if left < 0 and chunks:
                break
            chunks.append(event.data)
        return b"".join(reversed(chunks))

    @property
    def size(self) -> int:
        """Bytes of output that are kept now."""
        return self._bytes

    def _take_seq(self) -> int:
        seq = self.next_seq
        self.next_seq += 1
        return seq

    def answers(self, after_seq: int) -> bool:
        """Whether a long poll returns at once: for a chunk, or a terminal event not passed yet (§4.5)."""
        if self._chunks and self._chunks[-1].seq > after_seq:
            return True
        return self.closed or (self.exited and after_seq < self.next_seq - 1)

    def read(self, after_seq: int = 0, max_bytes: int | None = None) -> ProcessReadResult:
        """Whole chunks behind `after_seq`; the first always, more while they fit into `max_bytes`."""
        chunks: list[OutputChunk] = []
        total = 0
        for event in self._from(after_seq):
            total += len(event.data)
            if chunks and max_bytes is not None and total > max_bytes:
                break
            chunks.append(OutputChunk(event.seq, event.stream, Base64(event.data)))  # type: ignore[arg-type]
        skip_to = self.next_seq if max_bytes is None or not chunks else chunks[-1].seq + 1
        return ProcessReadResult(
            tuple(chunks),
            skip_to,
            self.exited,
            self.exit_code,
            self.closed,
            None,
            bool(self.sandbox_denied),
            self._evicted,
        )

    def _from(self, after_seq: int) -> list[Output]:
        if not self._chunks or self._chunks[-1].seq <= after_seq:
            return []
        if self._chunks[0].seq > after_seq:
            return list(self._chunks)
        return [event for event in self._chunks if event.seq > after_seq]
