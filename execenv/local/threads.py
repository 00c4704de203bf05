"""Blocking work in threads, so that a thread ends with its call.

A call that is cancelled tells its thread to stop, which long work looks at between its steps, and waits for
it a moment. Only a thread that hangs inside the kernel, on a mount that answers no more, is left behind:
nothing can end it. What it would have opened is closed when it comes back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that a cancelled call waits for its thread to notice."""


class Stopped(Exception):
    """The call was cancelled; nobody hears of this."""


class Turn:
    """What the blocking side of one call is given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        self._stopped = False
        self._kept: int | None = None

    def begin(self) -> None:
        """The thread is running now."""
        with self._lock:
            if self._stopped:
                raise Stopped
            self._begun = True

    def check(self) -> None:
        """Long work calls this between its steps.

        Raises:
            Stopped: if nobody waits for the result any more.
        """
        if self._stopped:
            raise Stopped

    def hand_over(self, fd: int) -> int:
        """A descriptor that is the result: closed if nobody takes it."""
        with self._lock:
            if not self._stopped:
                self._kept = fd
                return fd
        os.close(fd)
        raise Stopped

    def stop(self) -> bool:
        """Nobody waits any more. Whether the work had begun; if not, it never will."""
        with self._lock:
            self._stopped = True
            if self._kept is not None:
                os.close(self._kept)
                self._kept = None
            return self._begun


async def run_in_thread(
    limiter: trio.CapacityLimiter, work: Callable[[Turn], T], *, unused: Callable[[], object] | None = None
) -> T:
    """`work(turn)` in a thread.

    Args:
        unused: called instead, if the call is cancelled before the work has begun.
    """
    turn = Turn()
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()

    def call() -> T:
        turn.begin()
        try:
            return work(turn)
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(ended.set)

    try:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        if turn.stop():
            with trio.CancelScope(shield=True, deadline=trio.current_time() + PATIENCE):
                await ended.wait()
        elif unused is not None:
            unused()
        raise
