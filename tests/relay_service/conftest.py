"""Stores and exchanges of every kind, for the contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import frozen

from execenv.relay_service.exchange import Exchange
from execenv.relay_service.exchange_local import LocalExchange
from execenv.relay_service.redis import open_redis, open_redis_store
from execenv.relay_service.sqlite import open_sqlite
from execenv.relay_service.store import Store
from tests.relay_service.redis_server import RedisServer, run_redis


@frozen
class Nodes:
    """Where an executor connects, and where a harness does."""

    executors: Exchange
    harnesses: Exchange


@pytest.fixture(scope="package")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for tests that leave it alone; each flushes it first."""
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    shared_redis.flush()
    return shared_redis


@pytest.fixture(params=["sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    with trio.fail_after(20):
        if request.param == "sqlite":
            async with open_sqlite(str(tmp_path / "state" / "relay.db")) as opened:
                yield opened
        else:
            async with open_redis_store(request.getfixturevalue("redis").url) as opened:
                yield opened


@asynccontextmanager
async def _open_nodes(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    if kind == "local":
        exchange = LocalExchange()
        yield Nodes(exchange, exchange)
        return
    redis: RedisServer = request.getfixturevalue("redis")
    async with (
        open_redis(redis.url, node_id="a") as (_, first),
        open_redis(redis.url, node_id="b") as (_, other),
    ):
        yield Nodes(first, other if kind == "two nodes" else first)


@pytest.fixture(params=["local", "one node", "two nodes"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    with trio.fail_after(20):
        async with _open_nodes(request.param, request) as opened:
            yield opened
