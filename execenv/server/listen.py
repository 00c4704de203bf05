"""Connections in: the HTTP front door of a websocket listener, and stdio (protocol.md §1).

Every request is answered by these rules, in this order: no `Origin` (a browser is asking), `/readyz`,
nothing but `/`, GET only, the bearer token if one is wanted, a websocket upgrade.
"""

from __future__ import annotations

from logging import getLogger

import trio

from execenv.errors import ConnectFailed
from execenv.server.auth import Authenticator, Unauthorized
from execenv.server.connection import ServerConnection
from execenv.server.sessions import Sessions
from execenv.transports.channel import DEFAULT_MAX_MESSAGE, Channel
from execenv.transports.http import (
    HEAD_DEADLINE,
    Head,
    Refusal,
    not_an_upgrade,
    peer_address,
    read_head,
    send_refusal,
)

logger = getLogger(__name__)


def route(head: Head, auth: Authenticator | None) -> Refusal | None:
    """What to answer instead of an upgrade; `None` if the upgrade may go ahead. Pure."""
    if "origin" in head.headers:
        return Refusal(403)
    if head.path == "/readyz":
        if head.method in ("GET", "HEAD"):
            return Refusal(200)
        return Refusal(405, headers={"allow": "GET,HEAD"})
    if head.path != "/":
        return Refusal(404)
    if head.method != "GET":
        return Refusal(405, "Request method must be `GET`")
    if auth is not None:
        try:
            auth.check_header(head.headers.get("authorization"))
        except Unauthorized as refused:
            return Refusal(401, str(refused))
    return not_an_upgrade(head)


class Listener:
    """Serves websockets on sockets that listen already.

    Args:
        auth: what a client has to show; `None` lets everybody in who can reach the socket.
        max_message: the largest message taken, in bytes.
        ping_interval, pong_timeout: see `WebsocketChannel`.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        auth: Authenticator | None = None,
        max_message: int = DEFAULT_MAX_MESSAGE,
        ping_interval: float = 30.0,
        pong_timeout: float = 60.0,
    ) -> None:
        self._sessions = sessions
        self._auth = auth
        self._max_message = max_message
        self._ping_interval = ping_interval
        self._pong_timeout = pong_timeout

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Accept connections until cancelled."""
        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(self._serve_one, listeners, handler_nursery=nursery)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                channel = await self._open(stream)
                if channel is not None:
                    await ServerConnection(channel, self._sessions, detachable=True).run()
            except (ConnectFailed, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                logger.debug("a connection ended early: %s", error)
            except Exception:
                logger.exception("a connection ended with an error")

    async def _open(self, stream: trio.SocketStream) -> Channel | None:
        from execenv.transports import websocket

        with trio.move_on_after(HEAD_DEADLINE):
            head = await read_head(stream)
            if head is None:
                await send_refusal(stream, Refusal(400))
                return None
            refusal = route(head, self._auth)
            if refusal is not None:
                await send_refusal(stream, refusal, head.method)
                return None
            return await websocket.accept(
                stream,
                head.raw,
                head.leftover,
                f"websocket {peer_address(stream)}",
                max_message=self._max_message,
                ping_interval=self._ping_interval,
                pong_timeout=self._pong_timeout,
            )
        return None


async def serve_channel(channel: Channel, sessions: Sessions) -> None:
    """Serve one connection whose session ends with it: stdio, or memory."""
    await ServerConnection(channel, sessions, detachable=False).run()
