"""Blocking work in threads, so that a thread ends with its call.

A call that is cancelled tells its thread to stop, which long work looks at between its steps, and waits for
it a moment. Only a thread that hangs inside the kernel, on a mount that answers no more, is left behind:
nothing can end it. What it would have opened is closed when it comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

from execenv.local.turn import Turn

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that a cancelled call waits for its thread to notice."""


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
