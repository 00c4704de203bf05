"""One JSON message per line, over two descriptors: our own stdin and stdout, or pipes to a child.

Lines end with `\n`; `\r\n` is accepted, and lines of white space only are skipped (protocol.md §1.3).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from execenv.transports._pump import Buffer, FdIO, Framing, Pump
from execenv.transports.channel import DEFAULT_MAX_MESSAGE


class LineFraming(Framing):
    """Cuts lines out of bytes, keeping what is unfinished in pieces so that long lines cost linear time."""

    def __init__(self, pump: Pump, max_message: int) -> None:
        self._pump = pump
        self._max = max_message
        self._pieces: list[bytes] = []
        self._size = 0

    def messages(self, data: bytes) -> Iterable[bytes]:
        lines = data.split(b"\n")
        for position, line in enumerate(lines):
            if position or not self._pieces:
                whole = line
            else:
                whole = b"".join((*self._pieces, line)) if len(lines) > 1 else b""
            if position == len(lines) - 1:
                self._keep(line, fresh=position > 0)
                return
            if position == 0:
                self._pieces, self._size = [], 0
            message = self._message(whole)
            if message:
                yield message

    def _keep(self, piece: bytes, *, fresh: bool) -> None:
        if fresh:
            self._pieces, self._size = [], 0
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)
        if self._size > self._max:
            self._pump.fail(f"a line is longer than {self._max} bytes")

    def _message(self, line: bytes) -> bytes:
        line = line.strip(b" \t\r")
        if not line.isascii():
            try:
                line.decode()
            except UnicodeDecodeError:
                self._pump.fail("a line is not UTF-8")
                return b""
        return line

    def at_end(self) -> Iterable[bytes]:
        line = b"".join(self._pieces)  # the last line needs no newline
        self._pieces = []
        message = self._message(line)
        if message:
            yield message

    def frames(self, parts: tuple[bytes, ...]) -> list[list[Buffer]]:
        return [[*parts, b"\n"]]

    def part(self, data: bytes, *, first: bool, last: bool) -> list[Buffer]:
        return [data, b"\n"] if last else [data]


class _Blocking:
    """Descriptors set to non-blocking, and back to what they were."""

    def __init__(self, *fds: int) -> None:
        self._before = [(fd, os.get_blocking(fd)) for fd in fds]
        for fd in fds:
            os.set_blocking(fd, False)

    def restore(self) -> None:
        for fd, blocking in self._before:
            with suppress(OSError):
                os.set_blocking(fd, blocking)


def own_stdio(*, max_message: int = DEFAULT_MAX_MESSAGE, read_fd: int = 0, write_fd: int = 1) -> Pump:
    """The channel over this process's own stdin and stdout. Nothing else may use these two."""
    blocking = _Blocking(read_fd, write_fd)
    pump = Pump("stdio", FdIO(read_fd, write_fd, blocking.restore))
    pump.framing = LineFraming(pump, max_message)
    return pump


def pipe_channel(label: str, read_fd: int, write_fd: int, *, max_message: int = 1 << 62) -> PipeChannel:
    """The channel over two pipes to somebody, both non-blocking. It closes them."""
    return PipeChannel(label, read_fd, write_fd, max_message)


class PipeChannel(Pump):
    """A channel that owns its two descriptors. They are closed once, by `run` or by `close_fds`."""

    def __init__(self, label: str, read_fd: int, write_fd: int, max_message: int) -> None:
        super().__init__(label, FdIO(read_fd, write_fd, self.close_fds))
        self.framing = LineFraming(self, max_message)
        self._fds = [read_fd, write_fd]

    def close_fds(self) -> None:
        """Close both ends; the second call does nothing."""
        while self._fds:
            os.close(self._fds.pop())
