"""An environment as far as a sandbox lets it be touched: what `Environment.sandboxed` gives."""

from __future__ import annotations

from attrs import evolve

from execenv.abc import EnvironmentBackend, HttpClient, HttpStream, Process, Processes, Sink
from execenv.errors import NotSupported
from execenv.protocol import (
    EnvironmentConfig,
    EnvironmentConfigReadParams,
    EnvironmentInfo,
    HttpRequestParams,
    ProcessStartParams,
)
from execenv.sandbox.policy import Sandbox

_REFUSED = {"environmentConfigRead", "fsWatchMissing"}
"""Capabilities that nothing under a sandbox has."""

_ONE_ONLY = (
    "this environment is under a sandbox already, and one cannot be put into another: "
    "give the other profile to the environment without one"
)


class SandboxedEnvironment(EnvironmentBackend):
    """Processes and files of `inner` under `sandbox`; requests only if that has a network.

    Raises:
        NotSupported: `inner` is under a sandbox itself, or its files cannot be put under this one.
    """

    def __init__(self, inner: EnvironmentBackend, sandbox: Sandbox) -> None:
        if isinstance(inner, SandboxedEnvironment):
            raise NotSupported(_ONE_ONLY)
        self.name = inner.name
        self.processes = _SandboxedProcesses(inner, sandbox)
        self.files = inner.files.confined(sandbox)
        self.http = _NoNetwork() if sandbox.profile.restricts_network else inner.http
        self.status = inner.status
        self._inner = inner
        self._sandbox = sandbox

    @property
    def session_id(self) -> str | None:
        """That of the environment, which may have none yet, or another one later."""
        return getattr(self._inner, "session_id", None)

    async def info(self) -> EnvironmentInfo:
        info = await self._inner.info()
        refused = dict.fromkeys(info.capabilities.keys() & _REFUSED, False)
        return evolve(info, cwd=self._sandbox.cwd or info.cwd, capabilities=info.capabilities | refused)

    async def read_config(self, params: EnvironmentConfigReadParams) -> EnvironmentConfig:
        raise NotSupported("the configuration of a codex is read outside of every sandbox")

    async def probe(self) -> str:
        return await self._inner.probe()


class _SandboxedProcesses(Processes):
    def __init__(self, inner: EnvironmentBackend, sandbox: Sandbox) -> None:
        self._inner = inner
        self._sandbox = sandbox

    async def start(
        self, params: ProcessStartParams, sink: Sink | None = None, *, input_size: int | None = None
    ) -> Process:
        if params.sandbox is not None:
            raise NotSupported(_ONE_ONLY)
        confined = evolve(params, sandbox=self._sandbox)
        return await self._inner.processes.start(confined, sink, input_size=input_size)

    async def attach(self, process_id: str) -> Process:
        raise NotSupported("a process that runs may be outside of this sandbox: attach to it without one")


class _NoNetwork(HttpClient):
    async def open_stream(self, params: HttpRequestParams) -> HttpStream:
        raise NotSupported("the sandbox has no network")
