"""From a target to an environment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from execenv.environment import Environment
from execenv.errors import ConnectFailed, UsageError
from execenv.targets import (
    CONNECT_TIMEOUT,
    INITIALIZE_TIMEOUT,
    RECOVERY,
    CommandTarget,
    LocalTarget,
    RelayTarget,
    Target,
    WebsocketTarget,
    check_target,
    is_harness_url,
    is_relay_url,
    parse_relay_url,
    shown_url,
)

if TYPE_CHECKING:
    from execenv.remote.session import Dial
    from execenv.transports.channel import Channel


@asynccontextmanager
async def open_environment(
    target: str | Sequence[str] | Target = "local",
    *,
    bearer_token: str | None = None,
    resume_session_id: str | None = None,
    connect: bool = True,
    recovery: float = RECOVERY,
    connect_timeout: float = CONNECT_TIMEOUT,
    initialize_timeout: float = INITIALIZE_TIMEOUT,
) -> AsyncIterator[Environment]:
    """Open the place where work is to run. Leaving the block ends what was started there.

    Args:
        target: `"local"`, this machine; a `ws://` or `wss://` URL; `relay+https://REGISTRY/ID`, an
            environment behind a relay, encrypted from end to end; a command that speaks the protocol
            over its stdin and stdout, as a list: `["ssh", "devbox", "execenv serve --listen stdio"]`; or one
            of the classes of `execenv.targets`, which hold their own token and timeouts:
            `CommandTarget(("ssh", "devbox"), bootstrap=True)` needs no execenv there. A `ws://` or `wss://`
            URL with `role=harness` in its query is an environment behind a relay too, in clear text.
        bearer_token: for a websocket server, or a registry, that wants one. Never put it into the URL.
        resume_session_id: a session (`Environment.session_id`) of this server to go on with; what was
            started there detached is found again by `Environment.attach`.
        connect: now. Without it the environment is opened, without waiting, at its first use.
        recovery: seconds that a lost connection to a websocket server or a relay is made again, at once and
            then with growing delays, to go on with the same session; `math.inf` for ever, 0 not at all. Calls
            wait meanwhile, unless they are made in a block of `execenv.fail_fast()`. Output arrives once and
            whole, or `OutputGap` says what is missing. If the session is lost, its processes are, with
            `ConnectionLost`; the next call opens another session. A command is not started again.
        connect_timeout, initialize_timeout: seconds for the transport and for the handshake.

    Raises:
        ConnectFailed: naming the target and what went wrong. There is no fall-back to another environment.
        UsageError: if the target is none of these, no environment can be reached by it, or a package is
            missing that it takes: the text says which.
    """
    where = _target(target, bearer_token, connect_timeout, initialize_timeout)
    check_target(where)
    if isinstance(where, LocalTarget):
        if bearer_token is not None or resume_session_id is not None:
            raise UsageError("the local environment has no token and no session to resume")
        from execenv.local import open_local

        async with open_local() as local:
            yield Environment(local)
        return
    from execenv.remote.connection import open_remote
    from execenv.remote.session import Recovery

    dial, name = _dialler(where, recovery)
    redial = not isinstance(where, CommandTarget)  # what ran there has ended with it (environments.md §2)
    async with open_remote(
        dial,
        name,
        resume_session_id=resume_session_id,
        initialize_timeout=where.initialize_timeout,
        redial=redial,
        recovery=Recovery(recovery) if redial and recovery > 0 else None,
        connect=connect,
    ) as remote:
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
    if is_relay_url(given):
        return parse_relay_url(
            given,
            bearer_token=bearer_token,
            connect_timeout=connect_timeout,
            initialize_timeout=initialize_timeout,
        )
    raise UsageError(
        f"{shown_url(given)!r} is no environment: use 'local', a ws:// or wss:// URL, "
        "relay+https://REGISTRY/ENVIRONMENT_ID, or a command as a list of strings"
    )


def _dialler(target: WebsocketTarget | CommandTarget | RelayTarget, recovery: float) -> tuple[Dial, str]:
    """How a connection is made, as often as there is to be one, and the name of what it leads to."""
    if isinstance(target, CommandTarget):
        return partial(_start, target), f"stdio of {target.argv[0]}"
    if isinstance(target, WebsocketTarget) and not is_harness_url(target.url):
        return partial(_dial, target), f"websocket {shown_url(target.url)}"
    from execenv.relay.extras import require_extra

    require_extra(target.security if isinstance(target, RelayTarget) else "clear")
    from execenv.relay import harness

    if isinstance(target, WebsocketTarget):
        return partial(harness.dial_clear, target, recovery), f"relay {shown_url(target.url)}"
    dialer = harness.RelayDialer(target, recovery)
    return dialer.dial, dialer.name


@asynccontextmanager
async def _dial(target: WebsocketTarget) -> AsyncIterator[Channel]:
    from execenv.transports import websocket

    token = target.read_token()
    headers = [(b"Authorization", b"Bearer " + token.encode())] if token else []
    try:
        with trio.fail_after(target.connect_timeout):
            channel = await websocket.connect(target.url, headers=headers)
    except trio.TooSlowError as error:
        raise ConnectFailed(
            f"no websocket connection to {shown_url(target.url)} within {target.connect_timeout:g} s"
        ) from error
    yield channel


@asynccontextmanager
async def _start(target: CommandTarget) -> AsyncIterator[Channel]:
    from execenv._command import open_command

    bootstrap_timeout = target.initialize_timeout if target.bootstrap else None
    async with open_command(
        target.argv, env=target.env, cwd=target.cwd, bootstrap_timeout=bootstrap_timeout
    ) as channel:
        try:
            yield channel
        except ConnectFailed as error:  # in the handshake
            raise await channel.explained(error) from error
