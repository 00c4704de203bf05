"""RFC 6455 frames after the handshake, for both roles: bytes in, events out, and back. No I/O.

No extension is ever negotiated, so the reserved bits must be zero. What the peer did wrong is an event and
not an exception: it has a place behind the complete messages that came before it.
"""

from __future__ import annotations

import os
from codecs import utf_8_decode
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import TypeAlias

from attrs import define, field, frozen


@frozen
class Ping:
    """The peer asks for a pong with the same payload."""

    payload: bytes


@frozen
class Pong:
    """The peer's answer to a ping, or an unasked sign of life."""

    payload: bytes


@frozen
class Close:
    """The peer's close frame; `code` is None when it carried none. The codec accepts nothing after it."""

    code: int | None
    reason: str


@frozen
class Violation:
    """The peer broke the protocol: close with this code (1002, 1007 or 1009).

    The codec accepts nothing after it. The reason never quotes payload.
    """

    code: int
    reason: str


@frozen
class Text:
    """A text message where only binary ones have a meaning."""


Event: TypeAlias = bytes | Text | Ping | Pong | Close | Violation
"""`bytes`: one complete message, text or binary."""
Buffer: TypeAlias = bytes | memoryview
Masker: TypeAlias = Callable[[Buffer, bytes], bytes]


def mask_in_python(data: Buffer, key: bytes) -> bytes:
    """XOR `data` with the four bytes of `key`, repeated (RFC 6455 section 5.3). Undoes itself."""
    if len(data) < 4096:  # measured: below this one large int beats four translated slices
        return _xor(data, key)
    masked = bytearray(data)
    for i in range(4):
        masked[i::4] = masked[i::4].translate(_xor(_EVERY_BYTE, key[i : i + 1] * 4))
    return bytes(masked)


def _xor(data: Buffer, key: bytes) -> bytes:
    size = len(data)
    keys = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(keys, "little")).to_bytes(size, "little")


def fastest_masker() -> Masker:
    """The websockets package's masker in C where that is installed and compiled, else `mask_in_python`."""
    try:
        from websockets.speedups import apply_mask
    except ImportError:
        return mask_in_python
    return apply_mask


_EVERY_BYTE = bytes(range(256))
_MASK = fastest_masker()
_FIN, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x80, 0x1, 0x2, 0x8, 0x9, 0xA
_CONTROLS = frozenset((_FIN | _CLOSE, _FIN | _PING, _FIN | _PONG))
# First bytes a frame may have. Reserved bits, unknown opcodes, fragmented control frames are in neither set.
_BETWEEN_MESSAGES = _CONTROLS | {0x01, 0x02, 0x81, 0x82}
_INSIDE_MESSAGE = _CONTROLS | {0x00, 0x80}
_MAX_CONTROL = 125
_SMALL_PIECE = 4096
_UTF8_STEP = 64 * 1024
_UINT16, _UINT64 = Struct("!H"), Struct("!Q")
_HEADER16, _HEADER64 = Struct("!BBH"), Struct("!BBQ")


class _ViolationError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.violation = Violation(code, reason)


@define(eq=False, kw_only=True)
class FrameCodec:
    """One connection's frames, both directions. `client` is our own role: a client masks, a server does not.

    `max_message` bounds what the peer may send, in bytes per message. An unfinished message costs about what
    has arrived of it, twice that while it is put together. `max_fragment` is the largest payload
    that goes out as a single frame. `binary`: messages go out as binary ones, and of a text message only
    that there was one is told.
    """

    _client: bool
    _max_message: int
    _max_fragment: int = 128 * 1024
    _binary: bool = False
    _mask: Masker = _MASK
    _ended: bool = field(init=False, default=False)
    _unread: bytes = field(init=False, default=b"")  # an incomplete header or control frame
    _allowed: frozenset[int] = field(init=False, default=_BETWEEN_MESSAGES)
    _is_text: bool = field(init=False, default=False)
    _is_last: bool = field(init=False, default=False)  # of the data frame being read: its FIN bit
    _left: int = field(init=False, default=0)  # its payload bytes still to come
    _key: bytes = field(init=False, default=b"")  # its mask for the next of them; empty: not masked
    _pieces: list[bytes | bytearray] = field(init=False, factory=list)  # of the unfinished message
    _size: int = field(init=False, default=0)  # declared by its frames so far
    _keys: bytes = field(init=False, default=b"")  # mask keys for frames to send

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """The events that `data` completes, in order. However the stream is cut, their sequence is the same.

        A `Close` or `Violation` is the last event; whatever arrives after it is ignored.
        """
        events: list[Event] = []
        if not self._ended:
            try:
                self._read(self._unread + data if self._unread else bytes(data), events)
            except _ViolationError as error:
                events.append(error.violation)
                self._ended = True
        return events

    def _read(self, data: bytes, events: list[Event]) -> None:
        view = memoryview(data)
        start = self._read_payload(view, 0, events) if self._left else 0
        while (header := self._read_header(data, start)) is not None:
            first, length, key, body = header
            stop = body + length
            if first & _CLOSE:
                if stop > len(data):
                    break
                payload = data[body:stop]
                events.append(_control_event(first, self._mask(payload, key) if key else payload))
                start = stop
                if first == _FIN | _CLOSE:
                    self._ended = True
                    return
            elif first > _FIN and stop <= len(data):  # a message in one frame, all here: the usual case
                message = self._mask(view[body:stop], key) if key else data[body:stop]
                if first == _FIN | _TEXT:
                    if not message.isascii():
                        _check_utf8(message)
                    if self._binary:
                        events.append(Text())
                        start = stop
                        continue
                events.append(message)
                start = stop
            else:
                self._begin_frame(first, length, key)
                start = self._read_payload(view, body, events)
        self._unread = data[start:]

    def _read_header(self, data: bytes, start: int) -> tuple[int, int, bytes, int] | None:
        """First byte, payload length, mask key and start of the payload; None if not all of it is here.

        Every rule is checked as soon as its bytes are here, so a length over the limit needs no payload.
        """
        if len(data) - start < 2:
            return None
        first = data[start]
        length = data[start + 1] if self._client else data[start + 1] ^ 0x80
        body = start + 2
        if first not in self._allowed:
            where = "between messages" if self._allowed is _BETWEEN_MESSAGES else "inside a message"
            raise _ViolationError(1002, f"frame with first byte 0x{first:02x} {where}")
        if length > 127:
            raise _ViolationError(1002, "masked frame" if self._client else "unmasked frame")
        if length > _MAX_CONTROL:
            if first & _CLOSE:
                raise _ViolationError(1002, f"control frame longer than {_MAX_CONTROL} bytes")
            body += 2 if length == 126 else 8
            if body > len(data):
                return None
            length = _long_length(data, start + 2, length)
        if length > self._max_message - self._size and not first & _CLOSE:
            raise _ViolationError(1009, f"message longer than {self._max_message} bytes")
        if self._client:
            return first, length, b"", body
        if body + 4 > len(data):
            return None
        return first, length, data[body : body + 4], body + 4

    def _begin_frame(self, first: int, length: int, key: bytes) -> None:
        if self._allowed is _BETWEEN_MESSAGES:
            self._is_text = first & 0x0F == _TEXT
            self._allowed = _INSIDE_MESSAGE
        self._is_last = first >= _FIN
        self._left = length
        self._key = key
        self._size += length

    def _read_payload(self, view: memoryview, start: int, events: list[Event]) -> int:
        """Take what `view` has of the data frame that was begun. Returns where that ends."""
        piece: Buffer = view[start : start + self._left]
        size = len(piece)
        self._left -= size
        if self._key:
            piece = self._mask(piece, self._key)
            self._key = _turned(self._key, size)
        self._keep(piece)
        if self._is_last and not self._left:
            self._end_message(events)
        return start + size

    def _keep(self, piece: Buffer) -> None:
        # Small ones are gathered: kept one by one, a peer that sends few bytes at a time would make them
        # cost many times max_message.
        if len(piece) >= _SMALL_PIECE:
            self._pieces.append(bytes(piece))
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += piece
        else:
            self._pieces.append(bytearray(piece))

    def _end_message(self, events: list[Event]) -> None:
        message = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        self._allowed = _BETWEEN_MESSAGES
        if self._is_text and not message.isascii():
            _check_utf8(message)
        events.append(Text() if self._binary and self._is_text else message)

    @property
    def unfinished(self) -> int:
        """Bytes that are kept of a message whose end has not arrived."""
        return self._size - self._left

    @property
    def _opcode(self) -> int:
        return _BINARY if self._binary else _TEXT

    def encode_message(self, *parts: bytes) -> list[list[Buffer]]:
        """One message, the concatenation of `parts`, as frames: each a list of buffers to send in order.

        Control frames may go between the frames. A server's buffers are `parts` or views of them, never
        copies. That the whole is UTF-8, if it goes out as text, is the caller's promise.
        """
        if sum(map(len, parts)) <= self._max_fragment:
            return [self._frame(_FIN | self._opcode, parts)]
        groups = list(_fragments(parts, self._max_fragment))
        last = len(groups) - 1
        return [
            self._frame((_FIN if i == last else 0) | (0 if i else self._opcode), pieces)
            for i, pieces in enumerate(groups)
        ]

    def encode_part(self, data: bytes, *, first: bool, last: bool) -> list[Buffer]:
        """A piece of one message as a frame of its own, for a message that is not there as a whole."""
        return self._frame((_FIN if last else 0) | (self._opcode if first else 0), (data,))

    def _frame(self, first: int, pieces: Sequence[Buffer]) -> list[Buffer]:
        size = sum(map(len, pieces))
        if not self._client:
            return [_header(first, 0, size), *pieces]
        key = self._next_key()
        frame: list[Buffer] = [_header(first, 0x80, size) + key]
        for piece in pieces:
            frame.append(self._mask(piece, key))
            key = _turned(key, len(piece))
        return frame

    def _next_key(self) -> bytes:
        if not self._keys:
            self._keys = os.urandom(256)  # a system call for every 64 frames
        key, self._keys = self._keys[:4], self._keys[4:]
        return key

    def encode_ping(self, payload: bytes = b"") -> bytes:
        """A ping frame. Raises: ValueError, if the payload is longer than 125 bytes."""
        return self._control(_PING, payload)

    def encode_pong(self, payload: bytes) -> bytes:
        """A pong frame. Raises: ValueError, if the payload is longer than 125 bytes."""
        return self._control(_PONG, payload)

    def encode_close(self, code: int, reason: str = "") -> bytes:
        """A close frame; a reason that does not fit is cut at a character.

        Raises: ValueError, if `code` may not be sent (RFC 6455 section 7.4).
        """
        if not _is_close_code(code):
            raise ValueError(f"{code} is not a close code that may be sent")
        text = reason.encode()[: _MAX_CONTROL - 2].decode(errors="ignore").encode()
        return self._control(_CLOSE, _UINT16.pack(code) + text)

    def _control(self, opcode: int, payload: bytes) -> bytes:
        if len(payload) > _MAX_CONTROL:
            raise ValueError("a control frame carries at most 125 bytes")
        return b"".join(self._frame(_FIN | opcode, (payload,)))


def _long_length(data: bytes, start: int, marker: int) -> int:
    (length,) = (_UINT16 if marker == 126 else _UINT64).unpack_from(data, start)
    if length >> 63:
        raise _ViolationError(1002, "length with the highest bit set")
    if length <= (_MAX_CONTROL if marker == 126 else 0xFFFF):
        raise _ViolationError(1002, "length in more bytes than it needs")
    return int(length)


def _control_event(first: int, payload: bytes) -> Ping | Pong | Close:
    if first == _FIN | _PING:
        return Ping(payload)
    if first == _FIN | _PONG:
        return Pong(payload)
    if not payload:
        return Close(None, "")
    if len(payload) == 1 or not _is_close_code(code := _UINT16.unpack_from(payload)[0]):
        raise _ViolationError(1002, "close frame with an invalid code")
    _check_utf8(payload[2:])
    return Close(code, payload[2:].decode())


def _is_close_code(code: int) -> bool:
    # RFC 6455 section 7.4 and the IANA registry, which adds 1012 to 1014. 1004 is reserved; 1005, 1006 and
    # 1015 say what happened without a close frame.
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _check_utf8(text: bytes) -> None:
    # In steps, because one decode of the whole would take up to four times its memory.
    view = memoryview(text)
    start = 0
    try:
        while start < len(view):
            is_end = start + _UTF8_STEP >= len(view)
            start += utf_8_decode(view[start : start + _UTF8_STEP], "strict", is_end)[1]
    except UnicodeDecodeError:
        raise _ViolationError(1007, "text that is not UTF-8") from None


def _header(first: int, mask_bit: int, size: int) -> bytes:
    if size <= _MAX_CONTROL:
        return bytes((first, mask_bit | size))
    if size <= 0xFFFF:
        return _HEADER16.pack(first, mask_bit | 126, size)
    return _HEADER64.pack(first, mask_bit | 127, size)


def _turned(key: bytes, size: int) -> bytes:
    """The mask key as it continues behind `size` bytes."""
    turn = size % 4
    return key[turn:] + key[:turn]


def _fragments(parts: Sequence[bytes], size: int) -> Iterator[list[Buffer]]:
    """Views of `parts` in groups of `size` bytes, the last group with what remains."""
    pieces: list[Buffer] = []
    room = size
    for part in parts:
        rest = memoryview(part)
        while len(rest) > 0:
            if not room:
                yield pieces
                pieces, room = [], size
            piece, rest = rest[:room], rest[room:]
            pieces.append(piece)
            room -= len(piece)
    yield pieces
