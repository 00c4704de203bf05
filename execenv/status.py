"""Whether an environment can be reached, now and as it changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import trio
from attrs import frozen

from execenv.errors import ConnectionLost, Outcome

State = Literal["idle", "connecting", "connected", "recovering", "failed"]


@frozen
class StatusChange:
    """One state of an environment.

    Attributes:
        state: `"idle"`: nobody has used it yet; `"connecting"`; `"connected"`; `"recovering"`: the connection
            was lost, and is being made again for the same session; `"failed"`: it could not be, and what ran
            there is lost. An environment that can be reached anew then does so at its next use.
        error: why, when it is recovering or has failed. While it recovers, there is a change for each new
            reason why it could not be reached.
    """

    state: State
    error: Exception | None = None


class _Node:
    """A change, and the way to the next one. Who iterates holds a node, so only unread changes are kept."""

    __slots__ = ("change", "ended", "next", "passed")

    def __init__(self, change: StatusChange) -> None:
        self.change = change
        self.next: _Node | None = None
        self.ended = False
        self.passed = trio.Event()


class Status:
    """The state of an environment. Iterating gives the present one, then each change, until it is closed.

    async for change in env.status:
        print(change.state)
    """

    def __init__(self, state: State = "connected") -> None:
        self._last = _Node(StatusChange(state))

    def __repr__(self) -> str:
        return f"<execenv.Status {self.state}>"

    @property
    def state(self) -> State:
        return self._last.change.state

    @property
    def error(self) -> Exception | None:
        return self._last.change.error

    def set(self, state: State, error: Exception | None = None) -> None:
        """Note a change. For who implements an environment."""
        change = StatusChange(state, error)
        if change != self._last.change and not self._last.ended:
            node = self._last.next = _Node(change)
            self._last.passed.set()
            self._last = node

    def end(self) -> None:
        """There will be no change any more."""
        self._last.ended = True
        self._last.passed.set()

    def __aiter__(self) -> AsyncIterator[StatusChange]:
        return _Changes(self._last)


class _Changes:
    def __init__(self, node: _Node) -> None:
        self._node = node
        self._first = True

    def __aiter__(self) -> _Changes:
        return self

    async def __anext__(self) -> StatusChange:
        if self._first:
            self._first = False
            await trio.lowlevel.checkpoint()
        else:
            await self._node.passed.wait()
            if self._node.next is None:
                raise StopAsyncIteration
            self._node = self._node.next
        return self._node.change


_failing_fast = ContextVar("execenv_failing_fast", default=False)


@contextmanager
def fail_fast() -> Iterator[None]:
    """In this block, calls to an environment that cannot be reached at this moment fail at once.

    Without it they wait until the connection is there again, or is given up. The error is `ConnectionLost`,
    with the outcome `"not sent"`. An environment that nobody has used yet, or that has failed, is not
    connected either; only `open_environment` itself connects. Tasks that are started in the block behave so
    too. What ends a process, and fails in the block, is made up for as soon as there is a connection.

        with execenv.fail_fast():
            await env.run(["git", "status"])
    """
    token = _failing_fast.set(True)
    try:
        yield
    finally:
        _failing_fast.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """In this block calls wait for a connection, whatever block of `fail_fast` it is in."""
    token = _failing_fast.set(False)
    try:
        yield
    finally:
        _failing_fast.reset(token)


def refuse_to_wait(outcome: Outcome = "not sent", state: str = "recovering") -> None:
    """Called where a call is about to wait for a connection.

    Raises:
        ConnectionLost: in a block of `fail_fast`.
    """
    if _failing_fast.get():
        raise ConnectionLost(f"exec-server environment is {state}", outcome)
