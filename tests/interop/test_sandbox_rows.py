"""What requests with a sandbox are answered by a released codex's exec-server.

The rows are in `tests/sandbox_rows.py`, with the list of deliberate differences; `tests/test_sandbox_rows.py`
asks our server the same. A row of that list is checked on both sides too: it fails when codex comes to answer
as we do, or we as codex does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.sandbox_rows import ROWS, ProcessRow, Row, ask, expectation
from tests.sandboxed import PATIENCE, Server, require_sandbox_tools, run_server, users

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module", params=users(), ids="as {}".format)
def server(request: pytest.FixtureRequest, codex: Path) -> Iterator[Server]:
    require_sandbox_tools()
    with run_server("codex", codex, user=request.param) as server:
        yield server


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_answer(row: Row | ProcessRow, server: Server) -> None:
    with trio.fail_after(PATIENCE):
        answer = await ask(row, server)
    assert answer == expectation(row, ours=False)
