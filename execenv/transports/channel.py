"""What every transport offers: whole messages, both ways, moved by one `run()`.

`trio.abc.Channel` has the same words, but one `await` and one hop between tasks for each message. That
hop is most of what a message costs (performance.md, "What is left in b"), so here messages that arrived
together are handed over together, by plain calls, and what they cause to be sent leaves in one write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from execenv.errors import ConnectionLost, NotSupported, Outcome

DEFAULT_MAX_MESSAGE = 64 * 1024 * 1024
"""What a server takes as one message, in bytes (protocol.md §11). There is no limit on what it sends."""

HIGH_WATER = 256 * 1024
"""Producers (output of processes, bodies) wait while more bytes than this are queued for the peer."""

ANSWER_LIMIT = 64 * 1024 * 1024
"""Above this many queued bytes nothing more is read: the peer asks and asks and takes no answer."""


class MessageTooLong(NotSupported):
    """The channel takes no message of that size. Nothing of it was sent, and the channel goes on."""


SendPart = Callable[[bytes], Awaitable[None]]


class Channel(ABC):
    """One connection's messages. Opened by its transport, moved by `run`, closed by its scope."""

    label: str
    """What the channel is, for messages to people: `websocket 127.0.0.1:41060`, `stdio`."""

    loss: str
    """Why the channel ended, for messages to people; empty where there is nothing to say."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.loss = ""
        self.identity: bytes | None = None
        """Who the peer has proved to be; `None` where it proves nothing."""
        self.interrupted = ""
        """Why nothing is sent or received for the time being, on a channel that may come back by itself."""
        self.interrupted_at = 0.0
        """When it was interrupted last."""
        self.on_interrupted: Callable[[], object] = lambda: None
        """Called when `interrupted` has changed."""
        self.settle: Callable[[], Awaitable[None]] | None = None
        """Called when the peer will send no more, before the channel ends: a moment for the last answers."""
        self.queued = 0
        self._closed = False
        self._room = trio.lowlevel.ParkingLot()

    @abstractmethod
    async def run(self, receive: Callable[[bytes], None]) -> None:
        """Move messages until the channel ends, calling `receive` for each that arrives, in order.

        `receive` must not block; it may call `send_nowait` and `close_nowait`. Returns when either side
        ended the channel, for whatever reason: `loss` says which. Never runs twice.
        """

    @abstractmethod
    def send_nowait(self, *parts: bytes) -> None:
        """Queue one message, whose bytes are all `parts` in a row. Never blocks.

        Raises:
            MessageTooLong: if the channel has a limit.
            ConnectionLost: if the channel has ended.
        """

    @abstractmethod
    def close_nowait(self, code: int = 1000, reason: str = "") -> None:
        """End the channel: what is queued is still sent if the peer takes it soon, nothing more is read.

        `code` and `reason` go into a websocket's close frame and nowhere else.
        """

    def probe_nowait(self) -> None:  # noqa: B027 - where one end cannot vanish without a word to the other
        """Ask the peer for a sign of life, and end the channel if none arrives soon."""

    @asynccontextmanager
    async def open_message(self) -> AsyncIterator[SendPart]:
        """One message in parts, for what is too large to be held at once; leaving the block ends it.

        The block gets a function that sends a part and waits while too much is queued. What others send
        meanwhile is queued behind the message. A block that fails ends the channel: half a message can't be
        taken back. One such message at a time.

        Raises:
            ConnectionLost: if the channel ends meanwhile, or has ended.
        """
        if self._closed:
            raise self.lost()
        send, end = self._begin_message()
        try:
            yield send
            end()
        except MessageTooLong:
            raise
        except BaseException:
            self.close_nowait(1011, "a message could not be finished")
            raise

    @abstractmethod
    def _begin_message(self) -> tuple[SendPart, Callable[[], None]]:
        """What sends a part, and what ends the message."""

    async def wait_room(self) -> None:
        """Wait until no more than `HIGH_WATER` bytes are queued. Producers call this after sending.

        Raises:
            ConnectionLost: if the channel ends meanwhile, or has ended.
        """
        while self.congested:
            await self._room.park()
        if self._closed:
            raise self.lost()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def congested(self) -> bool:
        """Whether producers should wait for room. Never true of a channel that has ended."""
        return self.queued > HIGH_WATER and not self._closed

    def lost(self, outcome: Outcome = "not sent") -> ConnectionLost:
        """The error for whoever still wants something of this channel, or wanted it."""
        reason = f": {self.loss}" if self.loss else ""
        return ConnectionLost(f"exec-server transport disconnected{reason}", outcome)

    def interruption(self) -> ConnectionLost:
        """The error of a channel that is interrupted: what was sent may have been done."""
        return ConnectionLost(f"exec-server transport disconnected: {self.interrupted}", "unknown")

    def _sent(self, count: int) -> None:
        self.queued -= count
        if self.queued <= HIGH_WATER:
            self._room.unpark_all()

    def _ended(self) -> None:
        self._closed = True
        self._room.unpark_all()
