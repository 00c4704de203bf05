"""Stores and exchanges of every kind, for the contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import frozen

from execenv.relay_service.exchange import Exchange
from execenv.relay_service.exchange_local import LocalExchange
from execenv.relay_service.sqlite import open_sqlite
from execenv.relay_service.store import Store


@frozen
class Nodes:
    """Where an executor connects, and where a harness does."""

    executors: Exchange
    harnesses: Exchange


@pytest.fixture(params=["sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(str(tmp_path / "state" / "relay.db")) as opened:
        yield opened


@asynccontextmanager
async def _open_nodes(kind: str) -> AsyncIterator[Nodes]:
    exchange = LocalExchange()
    yield Nodes(exchange, exchange)


@pytest.fixture(params=["local"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    async with _open_nodes(request.param) as opened:
        with trio.fail_after(20):
            yield opened
