"""Whether anybody still waits for a call that blocks. Imports little: a sandbox's helper has this too."""

from __future__ import annotations

import _thread
import os


class Stopped(Exception):
    """The call was cancelled; nobody hears of this."""


class Turn:
    """What the blocking side of one call is given."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
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
