"""Who is connected, and how the frames of a harness get to its executor and back.

One interface, for one node and for many: the sockets of a node know links, and not where the other end is.
All methods without `async` are plain calls that never block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from attrs import frozen


@frozen
class ExecutorPresence:
    """An executor that is connected now.

    Attributes:
        registration_id: the registration that its socket was opened with.
        node: the id of the node that has the socket.
    """

    registration_id: str
    node: str


class Offline(Exception):
    """No executor of that environment is connected."""


class LinkEnd(ABC):
    """What a socket gives to the exchange, to be told what comes from the other end of a link."""

    @abstractmethod
    def received(self, frame: bytes) -> None:
        """The other end has sent a frame. It is queued for the socket of this end."""

    @property
    @abstractmethod
    def congested(self) -> bool:
        """Whether the socket of this end has enough waiting; False when it has ended."""

    @abstractmethod
    async def wait_room(self) -> None:
        """Wait until this end is not congested."""

    @abstractmethod
    def closed(self, reason: str) -> None:
        """The link is over: the other end has gone, or what is between has lost something. Called once, at
        most; never after this end has closed the link itself."""


class Link(ABC):
    """A harness's socket and an executor's, tied together; seen from one of the two. Frames keep their order,
    and none is lost without the link's end. Closing is idempotent."""

    @abstractmethod
    def send(self, frame: bytes) -> None:
        """Pass a frame to the other end. Nothing happens if the link is over."""

    @property
    @abstractmethod
    def congested(self) -> bool:
        """Whether this end is to stop reading, as the other one doesn't take what was sent."""

    @abstractmethod
    async def wait_room(self) -> None:
        """Wait until the link is not congested; returns at once when it is over."""

    @abstractmethod
    def close(self, reason: str) -> None:
        """End the link; the other end is told the reason."""


Accept = Callable[[Link], LinkEnd]
"""How an executor's socket takes a new link: gets its side of it, and gives its end. `Offline` if it takes
none any more."""


class Exchange(ABC):
    """All sockets of one node or of many. Opened by `open_...` of its module, with tasks in its nursery."""

    @abstractmethod
    async def presence(self, environment_id: str) -> ExecutorPresence | None:
        """The executor that is connected, wherever.

        Raises:
            StoreUnavailable: if it cannot be known now.
        """

    @abstractmethod
    def executor(
        self,
        environment_id: str,
        registration_id: str,
        accept: Accept,
        replaced: Callable[[], None],
    ) -> AbstractAsyncContextManager[None]:
        """Be the executor of an environment, for as long as the block lasts. The newest wins: one that was
        there before is told by `replaced`, and all its links end. Leaving the block ends the links.

        Raises:
            StoreUnavailable: if the others cannot be told now.
        """

    @abstractmethod
    def harness(self, environment_id: str, end: LinkEnd) -> AbstractAsyncContextManager[Link]:
        """Be a harness of an environment: a link to its executor, for as long as the block lasts.

        Raises:
            Offline: if no executor is connected.
            StoreUnavailable: if that cannot be known now.
        """
