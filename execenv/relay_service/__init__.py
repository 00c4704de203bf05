"""The middle of a relay, for who hosts one: a registry and a rendezvous on one port.

`front.py` takes connections, `api.py` answers what is asked of the registry, `rendezvous.py` decides who may
open a websocket, `sockets.py` passes frames on. What is remembered is behind `store.py`, and where the other
end of a link is, behind `exchange.py`.
"""

from __future__ import annotations

import socket
import time
from functools import partial

import trio

from execenv._service import service
from execenv.relay_service.api import Clock
from execenv.relay_service.exchange import Exchange
from execenv.relay_service.front import Node
from execenv.relay_service.settings import Settings
from execenv.relay_service.store import Store

__all__ = ["Settings", "serve_relay"]

LAST_WORDS = 3.0
"""Seconds for the websockets to end, once the relay is to end."""


async def serve_relay(
    sock: socket.socket,
    *,
    store: Store,
    exchange: Exchange,
    settings: Settings,
    clock: Clock = time.time,
) -> None:
    """Be a relay on a socket that is bound and listens. Runs until cancelled; websockets get code 1012 then.

    Args:
        clock: seconds since the epoch.
    """
    sock.setblocking(False)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    node = Node(store, exchange, settings, clock)
    async with service(partial(node.run, listener), node.stop, LAST_WORDS):
        await trio.sleep_forever()
