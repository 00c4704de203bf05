"""What goes between two nodes: messages about links, in numbered entries; and one end of a link.

No rule of this module waits for anything. An entry is numbered by who sends it; who gets it knows by that
whether one is missing, and which it has seen.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from enum import IntEnum

import trio
from attrs import define, field, frozen

from execenv.relay_service.exchange import Link, LinkEnd

WINDOW = 1 << 20
"""Bytes of a link, in one direction, that are on the way: sent, and not taken by the other end's socket."""

FRAME_COST = 64
"""Bytes that a frame counts beyond its own: so many small ones are no way around the window."""

VERSION = 1
"""Of what follows here. Nodes of different versions are nodes that don't answer."""

_ENTRY = struct.Struct(">BQQQB")
_MESSAGE = struct.Struct(">BQI")
_COUNT = struct.Struct(">Q")


class Kind(IntEnum):
    """What a message says. But for the last three it is about a link."""

    OPEN = 1
    """A harness is here; the payload is the environment id."""
    OPENED = 2
    REFUSED = 3
    FRAME = 4
    CREDIT = 5
    """How much of the link was taken, since its beginning."""
    CLOSE = 6
    """The payload is the reason."""
    REPLACED = 7
    """A newer executor; the payload is its generation and the environment id."""
    LEAVING = 8
    """The sender ends, and all its links."""
    FORGOTTEN = 9
    """What was sent in the session of that number has a gap, or isn't remembered: its links are over."""


FROM_HARNESS = 0x80
"""Added to the kind of a message that comes from the harness's end of a link."""


@frozen
class Message:
    kind: Kind
    from_harness: bool
    number: int
    """Of the link: given by the harness's node, which is the sender or the receiver."""
    payload: bytes


def pack_message(kind: Kind, from_harness: bool, number: int, payload: bytes = b"") -> bytes:
    return _MESSAGE.pack(kind | (FROM_HARNESS if from_harness else 0), number, len(payload)) + payload


def pack_count(count: int) -> bytes:
    return _COUNT.pack(count)


def unpack_count(data: bytes) -> int:
    (count,) = _COUNT.unpack_from(data)
    return int(count)


@frozen
class Entry:
    """What one node sends to another at a time.

    Attributes:
        sender: its address.
        session: chosen by the sender when it first sends to that receiver, and anew when it has lost track.
        answers: the receiver's own session that the sender knew first, or 0 if the sender began.
        number: from 0 within a session. What isn't counted has `UNCOUNTED`.
    """

    sender: str
    session: int
    answers: int
    number: int
    messages: list[Message]

    @staticmethod
    def unpack(data: bytes) -> Entry:
        """
        Raises:
            ValueError: if that is no entry, or one of another version.
        """
        try:
            version, session, answers, number, length = _ENTRY.unpack_from(data)
            if version != VERSION:
                raise ValueError(f"its format is {version}, ours is {VERSION}")
            offset = _ENTRY.size + length
            sender = data[_ENTRY.size : offset].decode()
            messages: list[Message] = []
            while offset < len(data):
                kind, link, length = _MESSAGE.unpack_from(data, offset)
                offset += _MESSAGE.size + length
                payload = data[offset - length : offset]
                if len(payload) != length:
                    raise ValueError("it is cut short")
                messages.append(Message(Kind(kind & ~FROM_HARNESS), bool(kind & FROM_HARNESS), link, payload))
        except struct.error as error:
            raise ValueError(str(error)) from None
        return Entry(sender, session, answers, number, messages)


def pack_entry(sender: str, session: int, answers: int, number: int, body: bytes) -> bytes:
    """An entry; `body` is messages, packed."""
    name = sender.encode()
    return _ENTRY.pack(VERSION, session, answers, number, len(name)) + name + body


UNCOUNTED = (1 << 64) - 1


class Near(ABC):
    """The socket of this node that a crossing belongs to."""

    @abstractmethod
    def deliver(self, frame: bytes) -> None: ...

    @property
    @abstractmethod
    def congested(self) -> bool: ...

    @abstractmethod
    async def wait_room(self) -> None: ...

    @abstractmethod
    def end(self, reason: str) -> None: ...


@frozen(eq=False)
class NearHarness(Near):
    """A harness's socket."""

    socket: LinkEnd

    def deliver(self, frame: bytes) -> None:
        self.socket.received(frame)

    @property
    def congested(self) -> bool:
        return self.socket.congested

    async def wait_room(self) -> None:
        await self.socket.wait_room()

    def end(self, reason: str) -> None:
        self.socket.closed(reason)


@frozen(eq=False)
class NearExecutor(Near):
    """A link to an executor of this node, as if the harness were here."""

    link: Link

    def deliver(self, frame: bytes) -> None:
        self.link.send(frame)

    @property
    def congested(self) -> bool:
        return self.link.congested

    async def wait_room(self) -> None:
        await self.link.wait_room()

    def end(self, reason: str) -> None:
        self.link.close(reason)


@define(eq=False)
class Crossing(Link, LinkEnd):
    """A link whose other end is on another node. For a harness of this node it is its link; for an executor
    of this node it is the harness's end.

    Attributes:
        put: passes a message on.
        spawn: runs what waits for the near socket's room.
        forget: called once, when it is over.
        near: the near socket; `None` until it is known.
        accepted: whether the executor has taken the link; before that, the near socket isn't told of its end.
        answered: set when the other node has answered, or never will.
    """

    number: int
    from_harness: bool
    _put: Callable[[bytes], None]
    _spawn: Callable[[Callable[[], Awaitable[None]]], None]
    _forget: Callable[[Crossing], None]
    near: Near | None = None
    over: bool = False
    accepted: bool = False
    answered: trio.Event = field(factory=trio.Event)
    _sent: int = 0
    _credited: int = 0
    _held: deque[bytes] = field(factory=deque)
    _room: trio.Event = field(factory=trio.Event)
    _taken: int = 0
    _reported: int = 0
    _draining: trio.CancelScope | None = None

    def tell(self, kind: Kind, payload: bytes = b"") -> None:
        self._put(pack_message(kind, self.from_harness, self.number, payload))

    # What the near socket does.

    def send(self, frame: bytes) -> None:
        if self.over:
            return
        if self._held or self._sent - self._credited >= WINDOW:
            self._held.append(frame)
        else:
            self._pass(frame)

    def received(self, frame: bytes) -> None:
        self.send(frame)

    @property
    def congested(self) -> bool:
        return not self.over and (bool(self._held) or self._sent - self._credited >= WINDOW)

    async def wait_room(self) -> None:
        while self.congested:
            await self._room.wait()
        await trio.lowlevel.checkpoint()

    def close(self, reason: str) -> None:
        if not self.over:
            self.tell(Kind.CLOSE, reason.encode())
            self._finish()

    def closed(self, reason: str) -> None:
        self.close(reason)

    # What the other node says.

    def accept(self) -> None:
        """The executor has taken the link."""
        self.accepted = True
        self.answered.set()

    def take(self, frame: bytes) -> None:
        """A frame has come."""
        if self.over or self.near is None:
            return
        self._taken += len(frame) + FRAME_COST
        self.near.deliver(frame)
        if self.near.congested:
            if self._draining is None:
                self._draining = trio.CancelScope()
                self._spawn(self._drain)
        elif self._draining is None:
            self._report()

    def credit(self, total: int) -> None:
        """The other end has taken so much."""
        self._credited = max(self._credited, total)
        while self._held and self._sent - self._credited < WINDOW:
            self._pass(self._held.popleft())
        if not self.congested:
            self._wake()

    def cut(self, reason: str) -> None:
        """It is over, and the other node knows that or cannot be told."""
        if not self.over:
            self._finish()
            if self.near is not None and self.accepted:
                self.near.end(reason)

    def cut_and_tell(self, reason: str) -> None:
        """It is over, by what this node thinks."""
        if not self.over:
            self.tell(Kind.CLOSE, reason.encode())
            self.cut(reason)

    def _pass(self, frame: bytes) -> None:
        self._sent += len(frame) + FRAME_COST
        self.tell(Kind.FRAME, frame)

    def _report(self) -> None:
        # A quarter: the sender never waits for less, and one report does for many small frames.
        if not self.over and self._taken - self._reported >= WINDOW // 4:
            self._reported = self._taken
            self.tell(Kind.CREDIT, pack_count(self._taken))

    async def _drain(self) -> None:
        assert self._draining is not None
        assert self.near is not None
        with self._draining:
            while not self.over and self.near.congested:
                await self.near.wait_room()
        self._draining = None
        self._report()

    def _finish(self) -> None:
        self.over = True
        self._held.clear()
        if self._draining is not None:
            self._draining.cancel()
        self.answered.set()
        self._wake()
        self._forget(self)

    def _wake(self) -> None:
        self._room.set()
        self._room = trio.Event()
