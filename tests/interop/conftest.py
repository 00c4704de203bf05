"""Exec-servers for a released codex to work on, ours and its own, over both transports.

Each scenario runs against codex's own exec-server too: that shows that the scenario asks for what the real
thing does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from attrs import field, frozen

from tests.interop.codex import (
    EXECENV_SERVER,
    CodexRun,
    ExecResult,
    ExecServer,
    ProcessMark,
    StdioServer,
    real_exec_server,
    require_codex,
    run_codex,
    websocket_server,
)
from tests.interop.responses_api import FunctionCall, Turn

SERVER_ENV = {"SERVER_ONE": "from the server", "SERVER_TWO": "from the server"}


@frozen
class Target:
    """The exec-server under test, and where the run takes place."""

    name: str
    codex: Path
    server: ExecServer | StdioServer
    cwd: Path
    home: Path
    mark: ProcessMark = field(factory=ProcessMark)
    """On codex, and on a stdio server with it; a websocket server has its own."""

    @property
    def environment_id(self) -> str:
        """What codex calls the environment."""
        return "remote" if isinstance(self.server, ExecServer) else "box"

    async def run(
        self,
        turns: Iterable[Turn],
        extra_config: str = "",
        *,
        cwd: Path | None = None,
        permissions: Sequence[str] = ("--dangerously-bypass-approvals-and-sandbox",),
    ) -> CodexRun:
        """Run codex to its end, which must be a good one."""
        where = self.server.url if isinstance(self.server, ExecServer) else self.server
        run = await run_codex(
            self.codex,
            where,
            turns,
            cwd=cwd or self.cwd,
            home=self.home,
            mark=self.mark,
            extra_config=extra_config,
            permissions=permissions,
        )
        assert run.returncode == 0, run.stderr
        return run

    async def results(self, *turns: Turn, extra_config: str = "") -> list[ExecResult]:
        """What the model read after each of its calls."""
        run = await self.run(turns, extra_config)
        return [ExecResult.parse(text) for text in run.tool_outputs]


@pytest.fixture(scope="session")
def codex() -> Path:
    return require_codex()


@pytest.fixture(params=["reference-ws", "reference-stdio", "execenv-ws", "execenv-stdio"])
async def target(request: pytest.FixtureRequest, codex: Path, tmp_path: Path) -> AsyncIterator[Target]:
    # a space and a letter outside ASCII: the working directory is a percent-encoded URI on the wire
    cwd = tmp_path / "work dir é"
    cwd.mkdir()
    async with _open_server(request.param, codex, tmp_path / "server") as server:
        target = Target(request.param, codex, server, cwd, tmp_path / "client")
        try:
            yield target
        finally:
            target.mark.kill()  # what a failed test has left


@asynccontextmanager
async def _open_server(name: str, codex: Path, home: Path) -> AsyncIterator[ExecServer | StdioServer]:
    match name:
        case "reference-ws":
            async with real_exec_server(codex, home, SERVER_ENV) as server:
                yield server
        case "execenv-ws":
            async with websocket_server([*EXECENV_SERVER, "ws://127.0.0.1:0"], home, SERVER_ENV) as server:
                yield server
        case "reference-stdio":
            yield StdioServer([str(codex), "exec-server", "--listen", "stdio"], SERVER_ENV)
        case "execenv-stdio":
            yield StdioServer([*EXECENV_SERVER, "stdio"], SERVER_ENV)


def exec_command(cmd: str, **arguments: object) -> FunctionCall:
    """A call that starts a command; without `yield_time_ms` it waits 30 s for the command's end."""
    return FunctionCall("exec_command", {"cmd": cmd, "yield_time_ms": 30_000, **arguments})
