"""One session on a server, over as many connections as it takes (environments.md §1.7).

A session is one task, `Session.run`: it dials, shakes hands, and holds the connection until that ends; then
it dials again and resumes, within the time that the server is expected to wait for it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import trio
from attrs import frozen

from execenv._service import open_nursery
from execenv.codec import Json
from execenv.errors import (
    ConnectFailed,
    ConnectionLost,
    ExecenvError,
    Outcome,
    RpcError,
    SessionAttached,
)
from execenv.protocol import INITIALIZE, INITIALIZED, EnvironmentInfo, InitializeParams, Method, Nothing
from execenv.rpc import Peer
from execenv.status import refuse_to_wait
from execenv.targets import INITIALIZE_TIMEOUT, RECOVERY
from execenv.transports.channel import Channel

CLIENT_NAME = "execenv"

P = TypeVar("P")
R = TypeVar("R")

Dial = Callable[[], AbstractAsyncContextManager[Channel]]
"""Opens a channel that nobody has used yet, and lets go of it. Raises `ConnectFailed`."""


@frozen
class Recovery:
    """How a lost connection is made again.

    Attributes:
        deadline: seconds after the loss until the session is given up; may be infinite, and 0 for never.
        first_delay: seconds between the first attempt, which comes at once, and the second one.
        max_delay: each delay is twice the one before, up to this.
    """

    deadline: float = RECOVERY
    first_delay: float = 0.1
    max_delay: float = 2.0

    def after(self, delay: float) -> float:
        """The delay that follows that one."""
        return min(max(delay * 2, self.first_delay), self.max_delay)


MOST_TRIES = 30
"""Connections that one call may lose, and the time to recover besides (`RECOVERY`, where that is more): one
that itself ends the connection must not be repeated for ever."""

STEADY = 1.0
"""Seconds that a connection has to last for the next one to be made at once."""


class Tries:
    """What is known of a call that is made over one connection after the other.

    Attributes:
        sent: whether the server may have heard of it.
    """

    sent = False

    def __init__(self, recovery: Recovery | None) -> None:
        self._deadline = RECOVERY if recovery is None else min(recovery.deadline, RECOVERY)
        self._lost = 0
        self._since = 0.0

    @property
    def outcome(self) -> Outcome:
        return "unknown" if self.sent else "not sent"

    def note(self, error: ConnectionLost) -> None:
        """The connection was lost with it.

        Raises:
            ConnectionLost: if that has happened too often.
        """
        self.sent = self.sent or error.outcome != "not sent"
        self._lost += 1
        if self._lost == 1:
            self._since = trio.current_time()
        if self._lost >= MOST_TRIES and trio.current_time() >= self._since + self._deadline:
            text = f"{error}; given up after {self._lost} connections that were lost with this call"
            raise ConnectionLost(text, self.outcome) from error


class Owner(Protocol):
    """What a session tells of its connection. None of these may wait."""

    def connected(self, session: Session) -> None: ...

    def disconnected(self, session: Session, error: ConnectionLost) -> None: ...

    def still_disconnected(self, session: Session, error: ConnectionLost) -> None: ...

    def undisturbed(self, session: Session) -> None: ...

    def failed(self, session: Session, error: ConnectionLost) -> None: ...


class Session:
    """The client's half of a session.

    Attributes:
        session_id: what the server calls it; a secret. Empty before the first handshake.
        info: what the server said of itself in the handshake, if it did.
        peer: who to call; `None` while there is no connection.
        lost: why the session is over, once it is.
        nursery: for what belongs to the session; cancelled when it is over.
    """

    session_id = ""
    info: EnvironmentInfo | None = None
    peer: Peer | None = None
    lost: ConnectionLost | None = None
    nursery: trio.Nursery

    def __init__(
        self,
        dial: Dial,
        owner: Owner,
        notifications: Mapping[str, Callable[[Json], None]],
        *,
        name: str,
        resume_session_id: str | None = None,
        initialize_timeout: float = INITIALIZE_TIMEOUT,
        recovery: Recovery | None = None,
    ) -> None:
        self._dial = dial
        self._owner = owner
        self._notifications = notifications
        self._name = name
        self._resume_session_id = resume_session_id
        self._initialize_timeout = initialize_timeout
        self._recovery = recovery
        self._closing = False
        self._attempt = trio.CancelScope()
        self._connected_at = -math.inf
        self._lost_at = 0.0
        self._server: bytes | None = None  # who the server has proved to be, if it can
        self._used = False
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        """Connect, and stay connected, until `close` or until the session is lost.

        Raises:
            ConnectFailed: if the first connection cannot be made.
        """
        async with open_nursery() as self.nursery:
            try:
                with self._attempt:
                    await self._keep(await self._hold(self._resume_session_id))
            finally:
                self._lose(ConnectionLost(f"{self._name} was closed", "not sent"))
                self.nursery.cancel_scope.cancel()

    async def _keep(self, loss: ConnectionLost) -> None:
        """Recover from the loss of the first connection, and from all that follow."""
        delay = 0.0
        while not self._closing and self.lost is None:
            if self._recovery is None:
                self._lose(loss)
                return
            loss = await self._recover(loss, self._recovery, delay)
            steady = trio.current_time() - self._connected_at > STEADY
            if steady:
                delay = 0.0
            else:  # one that was of use, if not for long, is worth another one soon
                delay = self._recovery.first_delay if self._used else self._recovery.after(delay)

    def close(self) -> None:
        """End the connection, behind what was sent; or what makes one."""
        self._closing = True
        if self.peer is not None:
            self.peer.channel.close_nowait()
        else:
            self._attempt.cancel()

    async def wait_peer(self, outcome: Outcome = "not sent") -> Peer:
        """The connection, when there is one again.

        Args:
            outcome: what is known of the call that this is for, if there will be none.

        Raises:
            ConnectionLost: if the session is lost.
        """
        while self.peer is None:
            if self.lost is not None:
                raise again(self.lost, outcome)
            refuse_to_wait(outcome)
            await self._changed.park()
        if self.peer.channel.interrupted:
            refuse_to_wait(outcome)
        return self.peer

    async def call(self, method: Method[P, R], params: P, *, repeat: bool = True) -> R:
        """A call about something that the session holds.

        Args:
            repeat: the same again if the connection is lost meanwhile. Otherwise only what was not sent is.

        Raises:
            ConnectionLost: if the session is lost, or it must not be repeated.
        """
        tries = self.tries()
        while True:
            peer = await self.wait_peer(tries.outcome)
            try:
                return await peer.call(method, params)
            except ConnectionLost as error:
                tries.note(error)
                if tries.sent and not repeat:
                    raise
                await self.wait_lost(peer, tries.outcome)

    def tries(self) -> Tries:
        """For a call that is about to be made."""
        return Tries(self._recovery)

    async def wait_lost(self, peer: Peer, outcome: Outcome) -> None:
        """Return when the session knows that this connection has ended, which a call over it knew first.

        It may know that from the other side (`TRANSPORT_CLOSED`), and then this side ends it.

        Args:
            outcome: what is known of the call.
        """
        peer.channel.close_nowait()
        while self.peer is peer:
            refuse_to_wait(outcome)
            await self._changed.park()

    async def wait_settled(self) -> None:
        """Return when there is a connection, or will be none."""
        while self.peer is None and self.lost is None:
            refuse_to_wait()
            await self._changed.park()

    # Connections.

    async def _hold(self, resume: str | None) -> ConnectionLost:
        """One connection from its beginning to its end, and why it ended.

        Raises:
            ConnectFailed: if it could not be made.
        """
        async with self._dial() as channel:
            if resume is not None and self._server is not None and channel.identity != self._server:
                raise ConnectFailed(
                    "executor key changed during session recovery", retryable=False
                )  # and no session id is told to somebody else (environments.md §1.7)
            self._server = channel.identity
            peer = Peer(channel, notifications=self._notifications)
            peer.on_end = lambda: self._disconnected(peer)
            channel.on_interrupted = lambda: self._interrupted(peer)
            async with open_nursery() as nursery:
                nursery.start_soon(self._shake_hands, peer, resume)
                await peer.run()
        return peer.channel.lost("unknown")

    async def _shake_hands(self, peer: Peer, resume: str | None) -> None:
        name = self._name
        try:
            with trio.fail_after(self._initialize_timeout):
                result = await peer.call(INITIALIZE, InitializeParams(CLIENT_NAME, resume))
                peer.notify(INITIALIZED, Nothing())
        except trio.TooSlowError as error:
            raise ConnectFailed(
                f"{name} did not answer initialize within {self._initialize_timeout:g} s"
            ) from error
        except RpcError as error:
            shown = _without(error, resume)
            raise ConnectFailed(
                f"{name} rejected initialize: {shown.message} (code {shown.code})",
                retryable=isinstance(error, SessionAttached),
            ) from shown
        except ConnectionLost as error:
            raise ConnectFailed(f"{name} ended the connection before it was initialized: {error}") from error
        except ExecenvError as error:
            raise ConnectFailed(f"{name}: {error}", retryable=False) from error
        if resume is not None and result.session_id != resume:
            raise ConnectFailed(f"{name} resumed another session than the one asked for", retryable=False)
        self.session_id = result.session_id
        self.info = result.environment_info or self.info
        self._attempt.deadline = math.inf
        self._connected_at = trio.current_time()
        self.peer = peer
        self._owner.connected(self)
        self._changed.unpark_all()

    def _interrupted(self, peer: Peer) -> None:
        if self.peer is peer:
            if peer.channel.interrupted:
                self._owner.still_disconnected(self, peer.channel.interruption())
            else:
                self._owner.undisturbed(self)

    def _disconnected(self, peer: Peer) -> None:
        if self.peer is peer:
            channel = peer.channel
            # The time that a channel has tried by itself is part of the time there is.
            self._lost_at = channel.interrupted_at if channel.interrupted else trio.current_time()
            self.peer = None
            self._used = peer.answered > 1  # the handshake is one
            self._owner.disconnected(self, peer.channel.lost("unknown"))
            self._changed.unpark_all()

    async def _recover(self, loss: ConnectionLost, recovery: Recovery, delay: float) -> ConnectionLost:
        """Make the connection again and hold it until it is lost too; or give the session up."""
        give_up = self._lost_at + recovery.deadline
        last: Exception | None = None
        while True:
            with trio.CancelScope(deadline=give_up) as self._attempt:
                try:
                    await trio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - so that not all come at once
                    return await self._hold(self.session_id)
                except ConnectFailed as error:
                    if not error.retryable:
                        self._lose(_not_resumed(loss, error))
                        return loss
                    if str(error) != str(last):
                        self._owner.still_disconnected(self, _not_resumed(loss, error))
                    last = error
            if self._closing:
                return loss
            if self._attempt.cancelled_caught:
                text = f"recovery timed out after {recovery.deadline:g} s"
                self._lose(_not_resumed(loss, f"{text}: {last}" if last else text))
                return loss
            delay = recovery.after(delay)

    def _lose(self, error: ConnectionLost) -> None:
        if self.lost is None:
            self.lost = error
            self._owner.failed(self, error)
            self._changed.unpark_all()


def again(error: ConnectionLost, outcome: Outcome) -> ConnectionLost:
    """The same error for another call: what became of it is its own matter, and so is the traceback."""
    copy = ConnectionLost(str(error), outcome)
    copy.__cause__ = error.__cause__
    return copy


def _without(error: RpcError, session_id: str | None) -> RpcError:
    """The same error without the id, which servers put into their words."""
    return type(error)(error.message.replace(session_id, "***"), error.code) if session_id else error


def _not_resumed(loss: ConnectionLost, why: object) -> ConnectionLost:
    error = ConnectionLost(f"{loss}; failed to resume exec-server session: {why}", "unknown")
    if isinstance(why, Exception):
        error.__cause__ = why
    return error
