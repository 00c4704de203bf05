"""What our server answers to requests with a sandbox: `tests/sandbox_rows.py`, as root and as nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from tests.sandbox_rows import DIFFERENCES, ROWS, ProcessRow, Row, ask, expectation
from tests.sandboxed import PATIENCE, Server, require_sandbox_tools, run_server, users


@pytest.fixture(scope="module", params=users(), ids="as {}".format)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    require_sandbox_tools()
    with run_server("execenv", user=request.param) as server:
        yield server


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_answer(row: Row | ProcessRow, server: Server) -> None:
    with trio.fail_after(PATIENCE):
        answer = await ask(row, server)
    assert answer == expectation(row, ours=True)


def test_each_row_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(row.name for row in ROWS).items() if count > 1] == []


def test_differences_are_differences() -> None:
    rows = {row.name: row for row in ROWS}
    assert DIFFERENCES.keys() <= rows.keys()
    for name in DIFFERENCES:
        ours, theirs = (expectation(rows[name], ours=ours) for ours in (True, False))
        assert ours != theirs, name
