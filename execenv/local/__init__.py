"""The environment that is this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import cached_property
from typing import TYPE_CHECKING

import trio
from attrs import evolve

from execenv._service import open_nursery, service
from execenv.abc import EnvironmentBackend
from execenv.local.filesystem import LocalFileSystem
from execenv.local.http import LocalHttpClient, open_http
from execenv.local.info import local_info
from execenv.local.mounts import Mounts
from execenv.local.output_log import RETAINED_BYTES
from execenv.local.processes import LocalProcesses
from execenv.local.spawn import interpreter
from execenv.local.threads import run_in_thread
from execenv.local.tree import Marks, mark_myself, reap_adopted, subreaper
from execenv.local.watchdog import Watchdog, open_watchdog
from execenv.protocol import EnvironmentConfig, EnvironmentConfigReadParams, EnvironmentInfo
from execenv.status import Status

if TYPE_CHECKING:
    from execenv.local.confinement import Confinement

__all__ = ["Guard", "LocalEnvironment", "open_guard", "open_local"]

REAP_INTERVAL = 10.0


class Guard:
    """What all local environments of one program share.

    Marks for its children, the watchdog, the mounts, what enforces sandboxes, and connections to HTTP
    servers.

    Attributes:
        nursery: for what runs in the background until all are closed.
        known: the children that somebody waits for.
    """

    def __init__(
        self, nursery: trio.Nursery, marks: Marks, watchdog: Watchdog, mounts: Mounts, http: LocalHttpClient
    ) -> None:
        self.http = http
        self.marks = marks
        self.mounts = mounts
        self.nursery = nursery
        self.watchdog = watchdog
        self.known: set[int] = set()

    @cached_property
    def confinement(self) -> Confinement:
        """What enforces sandboxes. Made, and imported, at its first use: few programs have any."""
        from execenv.local.confinement import make_confinement

        return make_confinement(self.nursery, self.marks, self.mounts, self.known, os.environ)

    @property
    def confines(self) -> bool:
        """Whether `confinement` was used yet."""
        return "confinement" in self.__dict__

    async def aclose(self) -> None:
        """End what runs in the background."""
        self.nursery.cancel_scope.cancel()
        if self.confines:
            await self.confinement.aclose()

    async def reap_for_ever(self) -> None:
        """Reap short-lived orphans, as init would: else they were zombies until their tree ends.

        And remove the mount points that could not be removed before.
        """
        while True:
            await trio.sleep(REAP_INTERVAL)
            reap_adopted(self.marks.prefix, self.known)
            if self.confines:
                self.confinement.mount_points.settle()


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
        async with open_watchdog(marks.prefix, interpreter() if sys.executable else None) as watchdog:
            with closing(Mounts()) as mounts:
                async with open_http() as http, open_nursery() as nursery:
                    guard = Guard(nursery, marks, watchdog, mounts, http)
                    try:
                        async with service(guard.reap_for_ever):
                            yield guard
                    finally:
                        await guard.aclose()


class LocalEnvironment(EnvironmentBackend):
    def __init__(
        self,
        processes: LocalProcesses,
        files: LocalFileSystem,
        guard: Guard,
    ) -> None:
        self.name = "local"
        self._guard = guard
        self.http = guard.http
        self.processes = processes
        self.files = files
        self.status = Status("connected")
        self._info: EnvironmentInfo | None = None
        self._config_limiter = trio.CapacityLimiter(1)

    async def info(self) -> EnvironmentInfo:
        if self._info is None:
            info = local_info()
            works = await self._guard.confinement.works() if self._guard.confines else None
            if works is None and self._guard.confines:
                return info  # it takes its time: who asks again hears of it
            if works is not None:
                confines = {"sandbox": works, "sandboxedFileStreaming": works}
                info = evolve(info, capabilities={**info.capabilities, **confines})
            self._info = info
        return self._info

    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        from execenv.local.codex_config import read_config

        return await run_in_thread(self._config_limiter, lambda turn: read_config(params))

    async def probe(self) -> str:
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
            processes = LocalProcesses(
                nursery,
                guard.marks,
                guard.watchdog,
                guard.known,
                lambda: guard.confinement,
                retained_bytes=retained_bytes,
            )
            files = LocalFileSystem(guard.mounts, lambda: guard.confinement)
            environment = LocalEnvironment(processes, files, guard)
            try:
                yield environment
            finally:
                environment.status.end()
                processes.closed = True
                nursery.cancel_scope.cancel()
    finally:
        if processes is not None:
            processes.closed = True
            with trio.CancelScope(shield=True):
                await processes.end_leftovers()
