"""The environment that is this machine."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from execenv._service import open_nursery
from execenv.abc import EnvironmentBackend
from execenv.local.info import local_info
from execenv.local.output_log import RETAINED_BYTES
from execenv.local.processes import LocalProcesses
from execenv.local.tree import Marks, mark_myself, subreaper
from execenv.local.watchdog import Watchdog, open_watchdog
from execenv.protocol import EnvironmentInfo

__all__ = ["Guard", "LocalEnvironment", "open_guard", "open_local"]


class Guard:
    """What all local environments of one program share: marks for its children, and the watchdog."""

    def __init__(self, marks: Marks, watchdog: Watchdog) -> None:
        self.marks = marks
        self.watchdog = watchdog


@asynccontextmanager
async def open_guard(*, whole_program: bool = False) -> AsyncIterator[Guard]:
    """Adopt orphans of our children, and have them killed if this program is SIGKILLed.

    Args:
        whole_program: nothing else runs in this program, so all that it ever starts is ours.
    """
    marks = Marks()
    if whole_program:
        mark_myself(marks.prefix)
    with subreaper():
        async with open_watchdog(marks.prefix, sys.executable) as watchdog:
            yield Guard(marks, watchdog)


class LocalEnvironment(EnvironmentBackend):
    def __init__(self, processes: LocalProcesses) -> None:
        self.name = "local"
        self.processes = processes
        self._info: EnvironmentInfo | None = None

    async def info(self) -> EnvironmentInfo:
        if self._info is None:
            self._info = local_info()
        return self._info

    async def status(self) -> str:
        return "ready"


@asynccontextmanager
async def open_local(
    guard: Guard | None = None, *, retained_bytes: int = RETAINED_BYTES
) -> AsyncIterator[LocalEnvironment]:
    """This machine. Leaving the block ends every process started in it, with all descendants.

    Args:
        guard: shared by the environments of a server; one of its own if `None`.
        retained_bytes: how much output of each process is kept for reading again.
    """
    if guard is None:
        async with open_guard() as own, open_local(own, retained_bytes=retained_bytes) as environment:
            yield environment
        return
    processes = None
    try:
        async with open_nursery() as nursery:
            processes = LocalProcesses(nursery, guard.marks, guard.watchdog, retained_bytes=retained_bytes)
            try:
                yield LocalEnvironment(processes)
            finally:
                nursery.cancel_scope.cancel()
    finally:
        if processes is not None:
            processes.closed = True
            with trio.CancelScope(shield=True):
                await processes.end_leftovers()
