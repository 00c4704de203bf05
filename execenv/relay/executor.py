"""The executor's end of a relay: many streams on one websocket, each with a session of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from execenv.relay.keys import PublicKey
from execenv.transports.channel import Channel

ServeStream: TypeAlias = Callable[[Channel], Awaitable[None]]
"""Serves the protocol on a channel until that ends, as on an accepted websocket."""

Validate: TypeAlias = Callable[[str, PublicKey, str], Awaitable[bool]]
"""Asks the registry about a harness: stream id, its key, its authorisation. Raises nothing but Cancelled."""
