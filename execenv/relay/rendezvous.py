"""An executor's main loop: register, connect to the rendezvous, serve, and all that again (relay.md §1.4)."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeAlias

import trio

from execenv.errors import ConnectFailed, ExecenvError
from execenv.relay.keys import PublicKey
from execenv.relay.registry import Registration, Registry, RegistryFailed, registry_pause
from execenv.targets import shown_url
from execenv.transports import websocket
from execenv.transports.channel import DEFAULT_MAX_MESSAGE
from execenv.transports.websocket import PING_INTERVAL, PONG_TIMEOUT, HandshakeRefused, WebsocketChannel

if TYPE_CHECKING:
    from execenv.relay.executor import Validate

logger = getLogger(__name__)

CONNECT_TIMEOUT = 10.0
LONGEST_PAUSE = 30.0
LASTING_SESSION = 30.0
"""Seconds after which a socket has worked, so that the next waits begin small again."""
REJECTS_REGISTRATION = (401, 403, 404, 409, 410, 429)
"""Statuses of a refused handshake that no second try with the same registration will change."""
REPLACED = 4409
"""The close code for an executor whose place a newer one has taken."""
FRAME_OVERHEAD = 1024
"""Bytes of a frame besides its payload, at most."""

_TO_BE_WAITED_FOR = {(503, "registration_conflict"), (502, "authentication_service_unavailable")}

Uniform: TypeAlias = Callable[[float, float], float]
"""`random.uniform`, for tests to replace."""
OpenSocket: TypeAlias = Callable[[str], Awaitable[WebsocketChannel]]
"""Opens the websocket of a URL, as `open_socket` does; raises what `websocket.connect` raises."""


class Replaced(ExecenvError):
    """A newer executor has registered for the same environment, and this one has no place any more."""


class SocketRunner(Protocol):
    """What serves the streams of a socket: `execenv.relay.executor.ExecutorStreams`."""

    async def run_socket(
        self,
        channel: WebsocketChannel,
        environment_id: str,
        registration_id: str | None,
        validate: Validate | None,
    ) -> None:
        """Serve what comes on a socket until it has ended. One after the other. Raises nothing but
        Cancelled."""


def socket_pause(failures: int, uniform: Uniform = random.uniform) -> float:
    """Seconds to wait before the rendezvous is tried again, after so many sockets that did not last."""
    longest = min(LONGEST_PAUSE, 2.0 ** min(failures, 5))
    return uniform(longest / 2, longest)


async def open_socket(
    url: str,
    *,
    max_message: int = DEFAULT_MAX_MESSAGE,
    ping_interval: float = PING_INTERVAL,
    pong_timeout: float = PONG_TIMEOUT,
) -> WebsocketChannel:
    """Open an executor's websocket to a rendezvous (§2).

    Args:
        max_message: the largest message of a stream that is taken whole, in bytes.

    Raises:
        ConnectFailed: see `websocket.connect`.
    """
    return await websocket.connect(
        url,
        headers=[(b"X-Request-ID", b"req_" + os.urandom(16).hex().encode())],
        max_message=max_message + FRAME_OVERHEAD,
        ping_interval=ping_interval,
        pong_timeout=pong_timeout,
        binary=True,
    )


async def serve_rendezvous(
    registry: Registry,
    environment_id: str,
    streams: SocketRunner,
    *,
    key: PublicKey | None,
    connected: Callable[[str], None] = lambda url: None,
    open_socket: OpenSocket = open_socket,
    uniform: Uniform = random.uniform,
) -> NoReturn:
    """Be the executor of an environment, until cancelled or until that has no point any more.

    A socket that is lost or refused is opened again, after a pause, with the same registration; with a new
    one if the status of the refusal says that the old one is not taken.

    The first registration fails for whatever reason but two that the registry names as passing. Later ones
    are different, and here this differs from the reference: processes may be running, and are not ended
    because a registry is restarted at the wrong moment. Whatever can pass (no connection, no answer in time,
    5xx, 408, 429) is tried again with the pauses of the registry; 401, 403, every other refusal, and an
    answer that cannot be used, end this as they would have at first.

    Args:
        streams: serves the sockets.
        key: the public key to register with; `None` for clear text.
        connected: called at every connect, with the URL for people.
        open_socket: how a URL is opened.
        uniform: how a pause is chosen in its range.

    Raises:
        RegistryFailed: if the registration fails.
        Replaced: if a newer executor has taken over.
        UsageError: if the id is none.
    """
    register = partial(_register, registry, environment_id, key, uniform)
    registration = await register(lasting=False)
    failures = 0
    while True:
        shown = shown_url(registration.url)
        problem = f"cannot connect to {shown}: no answer within {CONNECT_TIMEOUT:g} s"
        rejected = False
        channel: WebsocketChannel | None = None
        with trio.move_on_after(CONNECT_TIMEOUT):
            try:
                channel = await open_socket(registration.url)
            except HandshakeRefused as error:
                # Without what its body says, which may repeat the whole URL.
                problem = f"{shown} refused the websocket with status {error.status}"
                rejected = error.status in REJECTS_REGISTRATION
            except ConnectFailed as error:
                problem = f"{error} (where the registry says that the rendezvous is)"
        if channel is not None:
            logger.info("%s: connected to %s", environment_id, shown)
            connected(shown)
            opened = trio.current_time()
            await streams.run_socket(
                channel, environment_id, registration.registration_id, _validate(registry, registration)
            )
            if channel.close_code == REPLACED:
                raise Replaced(f"a newer executor has taken the place of this one for {environment_id}")
            if trio.current_time() - opened >= LASTING_SESSION:
                failures = 0
            problem = f"the connection to {shown} ended: {channel.loss or 'the other side closed it'}"
        if rejected:
            logger.warning("%s: %s; registering again", environment_id, problem)
            registration = await register(lasting=True)
        pause = socket_pause(failures, uniform)
        failures += 1
        logger.warning("%s: %s; retry in %.1f s", environment_id, problem, pause)
        await trio.sleep(pause)


def _validate(registry: Registry, registration: Registration) -> Validate | None:
    registration_id = registration.registration_id
    if registration_id is None:
        return None

    async def validate(stream_id: str, key: PublicKey, authorization: str) -> bool:
        return await registry.validate(
            stream_id, registration.environment_id, registration_id, key, authorization
        )

    return validate


async def _register(
    registry: Registry, environment_id: str, key: PublicKey | None, uniform: Uniform, *, lasting: bool
) -> Registration:
    """Register, however long it takes the registry to come back. `lasting`: not for the first time."""
    tries = 0
    while True:
        try:
            registration = await registry.register(environment_id, key)
        except RegistryFailed as error:
            to_be_waited_for = (error.status, error.code) in _TO_BE_WAITED_FOR
            if not to_be_waited_for and not (lasting and error.retryable and error.status != 409):
                raise
            pause = registry_pause(tries, uniform)
            tries += 1
            logger.warning("%s: %s; retry in %.1f s", environment_id, error, pause)
            await trio.sleep(pause)
        else:
            logger.info("%s: registered at %s", environment_id, registry.shown)
            return registration
