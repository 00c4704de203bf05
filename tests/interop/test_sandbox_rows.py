"""What requests with a sandbox are answered by a released codex's exec-server, and by ours.

The rows are in `tests/sandbox_rows.py`, with the list of deliberate differences. A row of that list is
checked on both sides too: it fails when codex comes to answer as we do, or we as codex does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.sandbox_rows import ROWS, ProcessRow, Row, ask, expectation
from tests.sandboxed import PATIENCE, Server, require_sandbox_tools, run_server, users

pytestmark = pytest.mark.interop


SERVERS = [(name, user) for user in users() for name in ("codex", "execenv")]


@pytest.fixture(scope="module", params=SERVERS, ids="{0[0]} as {0[1]}".format)
def server(request: pytest.FixtureRequest, codex: Path) -> Iterator[Server]:
    require_sandbox_tools()
    name, user = request.param
    with run_server(name, codex, user=user) as server:
        yield server


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_answer(row: Row | ProcessRow, server: Server) -> None:
    with trio.fail_after(PATIENCE):
        answer = await ask(row, server)
    assert answer == expectation(row, ours=server.ours)
