"""Open files, with a position and a buffer, over the handles that have neither."""

from __future__ import annotations

import codecs
import errno
from contextlib import suppress
from types import TracebackType

import trio

from execenv.abc import FileHandle
from execenv.errors import ConnectionLost, ExecenvError, UsageError, file_error
from execenv.paths import PathUri

BUFFER = 1024 * 1024


class BinaryFile:
    """An open file. Got from `Files.open` or `EnvironmentPath.open`; for one task at a time.

    Small reads and writes go through a buffer of 1 MiB: most cost no message. What was written is on its way
    after `flush` or `aclose`, which leaving the block does too.

    Attributes:
        path: what was opened.
    """

    def __init__(self, handle: FileHandle, path: PathUri, *, writing: bool) -> None:
        self.path = path
        self._handle = handle
        self._writing = writing
        self._closed = False
        self._buffer = bytearray()  # what was read and not taken yet, or taken and not written yet
        self._taken = 0  # of the buffer, while reading
        self._offset = 0  # in the file: behind the buffer while reading, before it while writing

    async def __aenter__(self) -> BinaryFile:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.aclose()
            return
        self._closed = True
        # Not flushed: an error in that, or in the end, would take the place of the one that matters.
        with (
            trio.CancelScope(shield=True, deadline=trio.current_time() + 5),
            suppress(OSError, ExecenvError),
        ):
            await self._handle.close()

    async def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end, where it is `b""`; all that is left without `size`."""
        self._check(writing=False)
        while size < 0 or len(self._buffer) - self._taken < size:
            if not await self._fill(max(BUFFER, size)):
                break
        return self._take(len(self._buffer) if size < 0 else size)

    async def readline(self) -> bytes:
        r"""One line with its `\n`, which the last one may lack; `b""` at the end of the file."""
        self._check(writing=False)
        searched = self._taken
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= 0:
                return self._take(end + 1 - self._taken)
            unread = len(self._buffer) - self._taken
            if not await self._fill(BUFFER):
                return self._take(unread)
            searched = self._taken + unread

    def __aiter__(self) -> BinaryFile:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def write(self, data: bytes) -> int:
        """Write all of `data`; its length."""
        self._check(writing=True)
        self._buffer += data
        if len(self._buffer) >= BUFFER:
            await self.flush()
        else:
            await trio.lowlevel.checkpoint()
        return len(data)

    async def flush(self) -> None:
        """Write what is in the buffer."""
        if self._writing and self._buffer:
            data = bytes(self._buffer)
            await self._handle.write(self._offset, data)  # cancelled, it is written anew by the next flush
            self._buffer.clear()
            self._offset += len(data)
        await trio.lowlevel.checkpoint()

    async def seek(self, offset: int) -> int:
        """Go on reading or writing `offset` bytes from the beginning."""
        if offset < 0:
            raise UsageError("a file has no place before its beginning")
        await self.flush()
        self._buffer.clear()
        self._taken = 0
        self._offset = offset
        return offset

    def tell(self) -> int:
        """Where the next read or write goes."""
        if self._writing:
            return self._offset + len(self._buffer)
        return self._offset - (len(self._buffer) - self._taken)

    async def aclose(self) -> None:
        """Flush and close it. Closes it also when cancelled, or when the flush fails."""
        try:
            if not self._closed:
                await self.flush()
        finally:
            self._closed = True
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                try:
                    await self._handle.close()
                except ConnectionLost:
                    if self._writing:  # or else there is nothing left that could be lost
                        raise

    async def _fill(self, size: int) -> bool:
        del self._buffer[: self._taken]
        self._taken = 0
        data = await self._handle.read(self._offset, size)
        self._buffer += data
        self._offset += len(data)
        return bool(data)

    def _take(self, size: int) -> bytes:
        data = bytes(memoryview(self._buffer)[self._taken : self._taken + size])
        self._taken += len(data)
        return data

    def _check(self, *, writing: bool) -> None:
        if self._closed:
            raise file_error(errno.EBADF, self.path)
        if writing is not self._writing:
            raise UsageError(
                f"{self.path.text} was opened for {'writing' if self._writing else 'reading'} only"
            )


class TextFile:
    """The same as text. Lines end with "\\n" and nothing else; nothing is translated."""

    def __init__(self, file: BinaryFile, encoding: str, errors: str) -> None:
        self._file = file
        self._encoding = encoding
        self._errors = errors
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        self._encoder = codecs.getincrementalencoder(encoding)(errors)
        self._text = ""
        self._at = 0  # how much of it was taken

    @property
    def path(self) -> PathUri:
        return self._file.path

    async def __aenter__(self) -> TextFile:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._file.__aexit__(kind, error, trace)

    async def read(self, size: int = -1) -> str:
        """Up to `size` characters, fewer only at the end; all of it without `size`."""
        parts: list[str] = []
        left = size
        while left and (self._at < len(self._text) or await self._fill(parts)):
            part = self._text[self._at :] if left < 0 else self._text[self._at : self._at + left]
            parts.append(part)
            self._at += len(part)
            if left > 0:
                left -= len(part)
        return "".join(parts)

    async def readline(self) -> str:
        """One line with its end, which the last one may lack; empty at the end of the file."""
        parts: list[str] = []
        while self._at < len(self._text) or await self._fill(parts):
            end = self._text.find("\n", self._at) + 1 or len(self._text)
            parts.append(self._text[self._at : end])
            self._at = end
            if parts[-1].endswith("\n"):
                break
        return "".join(parts)

    def __aiter__(self) -> TextFile:
        return self

    async def __anext__(self) -> str:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def write(self, text: str) -> int:
        await self._file.write(self._encoder.encode(text))
        return len(text)

    async def flush(self) -> None:
        await self._file.flush()

    async def aclose(self) -> None:
        await self._file.aclose()

    async def _fill(self, taken: list[str]) -> bool:
        """More text, behind what was taken; false at the end. If that fails, `taken` is there again."""
        self._text, self._at = "", 0
        while not self._text:
            try:
                data = await self._file.read(64 * 1024)
            except BaseException:
                self._text = "".join(taken)
                raise
            self._text = self._decoder.decode(data, final=not data)
            if not data:
                break
        return bool(self._text)
