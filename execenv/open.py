"""From a target to an environment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from execenv.environment import Environment
from execenv.errors import ConnectFailed, UsageError
from execenv.targets import (
    CONNECT_TIMEOUT,
    INITIALIZE_TIMEOUT,
    CommandTarget,
    LocalTarget,
    Target,
    WebsocketTarget,
)

if TYPE_CHECKING:
    from execenv.transports.channel import Channel


@asynccontextmanager
async def open_environment(
    target: str | Sequence[str] | Target = "local",
    *,
    bearer_token: str | None = None,
    resume_session_id: str | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    initialize_timeout: float = INITIALIZE_TIMEOUT,
) -> AsyncIterator[Environment]:
    """Open the place where work is to run. Leaving the block ends what was started there.

    Args:
        target: `"local"`, this machine; a `ws://` or `wss://` URL; a command that speaks the protocol
            over its stdin and stdout, as a list: `["ssh", "devbox", "execenv serve --listen stdio"]`; or one
            of the classes of `execenv.targets`, which hold their own token and timeouts:
            `CommandTarget(("ssh", "devbox"), bootstrap=True)` needs no execenv there.
        bearer_token: for a websocket server that wants one. Never put it into the URL.
        resume_session_id: a session (`Environment.session_id`) of this server to go on with; what was
            started there detached is found again by `Environment.attach`.
        connect_timeout, initialize_timeout: seconds for the transport and for the handshake.

    Raises:
        ConnectFailed: naming the target and what went wrong. There is no fall-back to another environment.
        UsageError: if the target is none of these.
    """
    where = _target(target, bearer_token, connect_timeout, initialize_timeout)
    if isinstance(where, LocalTarget):
        if bearer_token is not None or resume_session_id is not None:
            raise UsageError("the local environment has no token and no session to resume")
        from execenv.local import open_local

        async with open_local() as local:
            yield Environment(local)
        return
    from execenv.remote.connection import open_remote

    if isinstance(where, WebsocketTarget):
        channel = await _connect(where)
        async with open_remote(
            channel, resume_session_id=resume_session_id, initialize_timeout=where.initialize_timeout
        ) as remote:
            yield Environment(remote)
        return
    from execenv._command import open_command

    bootstrap_timeout = where.initialize_timeout if where.bootstrap else None
    async with (
        open_command(where.argv, env=where.env, cwd=where.cwd, bootstrap_timeout=bootstrap_timeout) as pipe,
        AsyncExitStack() as stack,
    ):
        remote_opening = open_remote(
            pipe, resume_session_id=resume_session_id, initialize_timeout=where.initialize_timeout
        )
        try:
            remote = await stack.enter_async_context(remote_opening)
        except ConnectFailed as error:
            raise await pipe.explained(error) from error
        yield Environment(remote)


def _target(
    given: str | Sequence[str] | Target,
    bearer_token: str | None,
    connect_timeout: float,
    initialize_timeout: float,
) -> Target:
    if isinstance(given, Target):
        return given
    if not isinstance(given, str):
        if not given:
            raise UsageError("the command of an environment must name a program")
        return CommandTarget(tuple(given), initialize_timeout=initialize_timeout)
    if given == "local":
        return LocalTarget()
    if given.startswith(("ws://", "wss://")):
        return WebsocketTarget(given, bearer_token, connect_timeout, initialize_timeout)
    raise UsageError(
        f"{given!r} is no environment: use 'local', a ws:// or wss:// URL, or a command as a list of strings"
    )


async def _connect(target: WebsocketTarget) -> Channel:
    from execenv.transports import websocket

    token = target.bearer_token
    headers = [(b"Authorization", b"Bearer " + token.encode())] if token else []
    try:
        with trio.fail_after(target.connect_timeout):
            return await websocket.connect(target.url, headers=headers)
    except trio.TooSlowError as error:
        raise ConnectFailed(
            f"no websocket connection to {_shown(target.url)} within {target.connect_timeout:g} s"
        ) from error


def _shown(url: str) -> str:
    return url.partition("?")[0].rpartition("@")[2]
