"""Offering an environment to others: `serve_websocket`, `serve_remote` and `serve_stdio`, which run until
cancelled."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from logging import getLogger

import trio

from execenv._service import open_nursery, service
from execenv.local import open_guard, open_local
from execenv.local.output_log import RETAINED_BYTES
from execenv.server.auth import Authenticator
from execenv.server.connection import ServerConnection
from execenv.server.listen import Listener, serve_channel
from execenv.server.sessions import DETACHED_TTL, DetachedTtl, Sessions, open_sessions
from execenv.targets import Security, shown_url
from execenv.transports.channel import DEFAULT_MAX_MESSAGE, Channel

logger = getLogger(__name__)

__all__ = [
    "DetachedTtl",
    "open_local_sessions",
    "run_until_signalled",
    "serve_remote",
    "serve_stdio",
    "serve_websocket",
]


@asynccontextmanager
async def open_local_sessions(
    *,
    detached_ttl: DetachedTtl | float = DETACHED_TTL,
    retained_bytes: int = RETAINED_BYTES,
    whole_program: bool = False,
) -> AsyncIterator[Sessions]:
    """Sessions that each have this machine for their environment. `whole_program`: see `open_guard`."""
    async with open_guard(whole_program=whole_program) as guard, service(guard.confinement.probe):
        open_environment = partial(open_local, guard, retained_bytes=retained_bytes)
        async with open_sessions(open_environment, detached_ttl=detached_ttl) as sessions:
            yield sessions


async def serve_websocket(
    sock: socket.socket,
    *,
    auth: Authenticator | None = None,
    max_message: int = DEFAULT_MAX_MESSAGE,
    detached_ttl: DetachedTtl | float = DETACHED_TTL,
    retained_bytes: int = RETAINED_BYTES,
    whole_program: bool = False,
) -> None:
    """Serve this machine on a socket that is bound and listens. Runs until cancelled.

    Args:
        auth: see `execenv.server.auth`; without it, the socket must be one that only friends can reach.
        max_message: the largest message taken from a client, in bytes.
        detached_ttl: seconds that a session outlives its connection; a `DetachedTtl` where it matters
            whether its processes still run.
        retained_bytes: how much output of each process is kept.
        whole_program: nothing else runs in this program; see `execenv.local.open_guard`.
    """
    sock.setblocking(False)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    async with open_local_sessions(
        detached_ttl=detached_ttl, retained_bytes=retained_bytes, whole_program=whole_program
    ) as sessions:
        await Listener(sessions, auth=auth, max_message=max_message).serve([listener])


async def serve_remote(
    registry_url: str,
    environment_id: str,
    *,
    headers: Callable[[], Mapping[str, str]],
    security: Security = "noise",
    name: str = "execenv",
    connected: Callable[[str], None] = lambda url: None,
    max_message: int = DEFAULT_MAX_MESSAGE,
    detached_ttl: DetachedTtl | float = DETACHED_TTL,
    retained_bytes: int = RETAINED_BYTES,
    whole_program: bool = False,
) -> None:
    """Serve this machine by a relay, where it cannot be connected to. Runs until cancelled.

    Keys are made once for each call, and each stream of the relay has a session of its own.

    Args:
        registry_url: the base URL of the registry.
        environment_id: what the registry is to call this machine.
        headers: what the registry is shown at every request, such as
            `execenv.relay.credentials.api_key_headers` gives: that decides whether it may be.
        security: `"noise"`: encrypted from end to end; `"clear"`: the relay can read and change everything.
        name: for logs.
        connected: called at every connect to the relay, with its URL for people.
        max_message: the largest message taken from a client, in bytes.
        detached_ttl, retained_bytes, whole_program: see `serve_websocket`.

    Raises:
        ExecenvError: if the registration fails for good, or a newer executor takes over; see
            `execenv.relay.rendezvous.serve_rendezvous`.
        UsageError: if an argument cannot be, or what the relay needs is not installed.
    """
    from execenv.relay.extras import require_extra

    require_extra(security)
    from execenv.relay.executor import open_streams
    from execenv.relay.noise import Identity
    from execenv.relay.registry import check_environment_id, open_registry
    from execenv.relay.rendezvous import open_socket, serve_rendezvous

    check_environment_id(environment_id)
    identity = Identity.generate() if security == "noise" else None
    async with (
        open_registry(registry_url, headers=headers) as registry,
        open_local_sessions(
            detached_ttl=detached_ttl, retained_bytes=retained_bytes, whole_program=whole_program
        ) as sessions,
    ):

        async def serve(channel: Channel) -> None:
            await ServerConnection(channel, sessions, detachable=True).run()

        async with open_streams(serve, identity=identity, max_message=max_message) as streams:
            logger.info("%s is to be %s at %s", name, environment_id, shown_url(registry_url))
            await serve_rendezvous(
                registry,
                environment_id,
                streams,
                key=None if identity is None else identity.public,
                connected=connected,
                open_socket=partial(open_socket, max_message=max_message),
            )


async def serve_stdio(
    *,
    max_message: int = DEFAULT_MAX_MESSAGE,
    retained_bytes: int = RETAINED_BYTES,
    whole_program: bool = False,
) -> None:
    """Serve this machine to whoever started us, on stdin and stdout. Returns when stdin ends."""
    from execenv.transports.stdio import own_stdio

    async with open_local_sessions(retained_bytes=retained_bytes, whole_program=whole_program) as sessions:
        await serve_channel(own_stdio(max_message=max_message), sessions)


async def run_until_signalled(serve: Callable[[], Awaitable[None]]) -> None:
    """Run `serve` until it returns, or SIGTERM or SIGINT asks for the end, which is a success."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_nursery() as nursery:

            async def watch() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await serve()
            nursery.cancel_scope.cancel()
