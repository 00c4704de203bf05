"""From a target to an environment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from execenv.environment import Environment
from execenv.errors import ConnectFailed, UsageError

if TYPE_CHECKING:
    from execenv.transports.channel import Channel

CONNECT_TIMEOUT = 10.0  # environments.md §1.1


@asynccontextmanager
async def open_environment(
    target: str | Sequence[str] = "local",
    *,
    bearer_token: str | None = None,
    resume_session_id: str | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    initialize_timeout: float = CONNECT_TIMEOUT,
) -> AsyncIterator[Environment]:
    """Open the place where work is to run. Leaving the block ends what was started there.

    Args:
        target: `"local"`, this machine; a `ws://` or `wss://` URL; or a command that speaks the protocol
            over its stdin and stdout, as a list: `["ssh", "devbox", "execenv serve --listen stdio"]`.
        bearer_token: for a websocket server that wants one. Never put it into the URL.
        resume_session_id: a session (`Environment.session_id`) of this server to go on with; what was
            started there detached is found again by `Environment.attach`.
        connect_timeout, initialize_timeout: seconds for the transport and for the handshake.

    Raises:
        ConnectFailed: naming the target and what went wrong. There is no fall-back to another environment.
        UsageError: if the target is none of these.
    """
    if isinstance(target, str):
        if target == "local":
            _refuse_for_local(bearer_token, resume_session_id)
            from execenv.local import open_local

            async with open_local() as local:
                yield Environment(local)
            return
        if target.startswith(("ws://", "wss://")):
            from execenv.remote.connection import open_remote

            channel = await _connect(target, bearer_token, connect_timeout)
            async with open_remote(
                channel, resume_session_id=resume_session_id, initialize_timeout=initialize_timeout
            ) as remote:
                yield Environment(remote)
            return
        raise UsageError(
            f"{target!r} is no environment: use 'local', a ws:// or wss:// URL, "
            "or a command as a list of strings"
        )
    from execenv._command import open_command
    from execenv.remote.connection import open_remote

    argv = list(target)
    if not argv:
        raise UsageError("the command of an environment must name a program")
    async with (
        open_command(argv) as pipe,
        open_remote(
            pipe, resume_session_id=resume_session_id, initialize_timeout=initialize_timeout
        ) as remote,
    ):
        yield Environment(remote)


def _refuse_for_local(bearer_token: str | None, resume_session_id: str | None) -> None:
    if bearer_token is not None or resume_session_id is not None:
        raise UsageError("the local environment has no token and no session to resume")


async def _connect(url: str, bearer_token: str | None, timeout: float) -> Channel:
    from execenv.transports import websocket

    headers = [(b"Authorization", b"Bearer " + bearer_token.encode())] if bearer_token else []
    try:
        with trio.fail_after(timeout):
            return await websocket.connect(url, headers=headers)
    except trio.TooSlowError as error:
        raise ConnectFailed(f"no websocket connection to {_shown(url)} within {timeout:g} s") from error


def _shown(url: str) -> str:
    return url.partition("?")[0].rpartition("@")[2]
