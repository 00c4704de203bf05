"""A relay of many nodes: what they remember and how they reach each other, in one Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from logging import getLogger
from typing import TYPE_CHECKING

import trio

from execenv._service import open_nursery, service
from execenv.errors import UsageError
from execenv.relay_service.exchange import Exchange
from execenv.relay_service.redis_exchange import DEFAULT_TIMING, RedisExchange, Timing
from execenv.relay_service.redis_store import RedisStore
from execenv.relay_service.store import Store, StoreUnavailable

if TYPE_CHECKING:
    from execenv.relay_service.redis_wire import Wire

logger = getLogger(__name__)

PREFIX = "execenv:"
"""What the names of all our keys in Redis begin with."""


@asynccontextmanager
async def open_redis(
    url: str, *, node_id: str, timing: Timing = DEFAULT_TIMING
) -> AsyncIterator[tuple[Store, Exchange]]:
    """What a node of a relay shares with the others. From then on it waits for a Redis that is away.

    Args:
        url: see `open_redis_store`.
        node_id: what this node is called, for people.

    Raises:
        UsageError: if the URL is wrong, or the extra is missing.
        StoreUnavailable: if Redis cannot be reached now, or refuses us.
    """
    make = _wires(url, timing)
    commands, reads = make(), make()
    started = trio.Event()
    nursery: trio.Nursery

    async def run() -> None:
        nonlocal nursery
        async with open_nursery() as nursery:
            nursery.start_soon(commands.run)
            nursery.start_soon(reads.run)
            started.set()
            await trio.sleep_forever()

    async with service(run):
        await started.wait()
        await commands.wait_tried()
        await _look_at_settings(commands)
        exchange = RedisExchange(node_id, commands, reads, PREFIX, timing, nursery)
        await exchange.begin()
        for task in (exchange.read, exchange.trim, exchange.remain, exchange.watch):
            nursery.start_soon(task)
        try:
            yield RedisStore(commands, PREFIX), exchange
        finally:
            with trio.CancelScope(shield=True):
                await exchange.leave()


@asynccontextmanager
async def open_redis_store(url: str) -> AsyncIterator[Store]:
    """What the nodes of a relay remember, without being a node.

    Args:
        url: `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://` for TLS, with
            `?ssl_ca_certs=FILE` for an authority of one's own.

    Raises:
        UsageError: if the URL is wrong, or the extra is missing.
        StoreUnavailable: if Redis cannot be reached now, or refuses us.
    """
    wire = _wires(url, DEFAULT_TIMING)()
    async with service(wire.run):
        await wire.wait_tried()
        yield RedisStore(wire, PREFIX)


def _wires(url: str, timing: Timing) -> Callable[[], Wire]:
    try:
        from execenv.relay_service.redis_wire import Wire, parse_url
    except ImportError:
        raise UsageError("Redis needs an extra: pip install 'execenv[redis]'") from None
    dial = parse_url(url)
    return lambda: Wire(dial, timing.reply)


async def _look_at_settings(wire: Wire) -> None:
    with suppress(StoreUnavailable):  # it may be forbidden to ask
        policy = (await wire.call(b"INFO", b"memory")).partition(b"maxmemory_policy:")[2].split()[0].decode()
        if policy != "noeviction":
            logger.warning("Redis may drop keys of ours: its maxmemory-policy is %s, not noeviction", policy)
