"""One connection to Redis that comes back by itself, and commands on it.

It is coredis' connection without its client and pool. Those repeat a command whose reply was lost, which
would use up what may be used once; and their pool loses a place for each caller that is cancelled while it
connects.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from logging import getLogger
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import anyio
import trio
from anyio.abc import ByteStream
from attrs import frozen
from coredis.connection import BaseConnection, TCPConnection, TCPLocation
from coredis.exceptions import AuthenticationError, RedisError, ResponseError

from execenv.errors import UsageError
from execenv.relay_service.store import StoreUnavailable

logger = getLogger(__name__)

Argument = bytes | str | int

FIRST_BACKOFF = 0.05
LAST_BACKOFF = 2.0

AT_ONCE = 64
"""Commands that are on the way. More would wait for their replies behind each other, and run out of patience:
thousands of executors may come at once."""


Dial = Callable[[float], Awaitable[BaseConnection]]
"""Makes a connection, which is to be run, within some seconds; so long it waits for a reply later, too."""


class _Dialled(TCPConnection):
    """A connection whose socket is there: without one, in the end, coredis doesn't close what it has made."""

    socket: ByteStream

    async def _connect(self) -> ByteStream:
        return self.socket


def parse_url(url: str) -> Dial:
    """How to get connections to a Redis.

    Args:
        url: `redis://[[user]:password@]host[:port][/database]`, or `rediss://` for TLS, with
            `?ssl_ca_certs=FILE` for an authority of one's own. The server's name is checked.

    Raises:
        UsageError: if the URL is not of that form. The text doesn't repeat it, as it may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
        database = int(parts.path.strip("/") or "0")
    except ValueError:
        raise _bad_url() from None
    options = parse_qs(parts.query, keep_blank_values=True)
    authority = options.pop("ssl_ca_certs", [None])[0] if parts.scheme == "rediss" else None
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or options or parts.fragment:
        raise _bad_url()
    context = None
    if parts.scheme == "rediss":
        try:
            context = ssl.create_default_context(cafile=authority)
        except OSError as error:
            raise UsageError(f"the certificates in {authority} cannot be used: {error.strerror}") from None
    location = TCPLocation(parts.hostname, port)
    username = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None

    async def dial(patience: float) -> BaseConnection:
        with trio.fail_after(patience):
            if context is None:
                socket: ByteStream = await anyio.connect_tcp(location.host, location.port)
            else:
                socket = await anyio.connect_tcp(location.host, location.port, ssl_context=context)
        connection = _Dialled(
            location, stream_timeout=patience, username=username, password=password, db=database
        )
        connection.socket = socket
        return connection

    return dial


def _bad_url() -> UsageError:
    return UsageError(
        "the URL of Redis is to be redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], "
        "or rediss:// and the same, with ?ssl_ca_certs=FILE if need be"
    )


@frozen
class _Up:
    """What coredis tells that the connection has been made."""

    tell: Callable[[], None]

    def started(self, value: Any = None) -> None:
        self.tell()


class Wire:
    """Commands on one connection, which `run` makes and makes again.

    Args:
        dial: see `parse_url`.
        patience: seconds for a reply, after which the connection is given up.
    """

    def __init__(self, dial: Dial, patience: float) -> None:
        self._dial = dial
        self._patience = patience
        self._connection: BaseConnection | None = None
        self._up = trio.Event()
        self._down = trio.Event()
        self._tried = trio.Event()
        self._reason = "it was not asked yet"
        self._turns = trio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            try:
                connection = await self._dial(self._patience)
                # coredis asks for a TaskStatus of anyio, and calls nothing but `started`
                await connection.run(task_status=_Up(partial(self._begin, connection)))
                reason = "the connection was lost"
            except AuthenticationError:
                reason = "the user or the password was refused"
            except ssl.SSLCertVerificationError as error:
                reason = f"its certificate is refused: {error.verify_message}"
            except (RedisError, OSError, trio.TooSlowError):
                reason = "it cannot be reached"
            finally:
                was_up = self._connection is not None
                if was_up:
                    self._connection = None
                    self._up = trio.Event()
                    self._down.set()
            if was_up or reason != self._reason:
                logger.warning("Redis: %s", reason)
            self._reason = reason
            self._tried.set()
            backoff = FIRST_BACKOFF if was_up else min(backoff * 2, LAST_BACKOFF)
            await trio.sleep(backoff * random.uniform(0.5, 1))  # noqa: S311 - no secret

    def _begin(self, connection: BaseConnection) -> None:
        self._connection = connection
        self._down = trio.Event()
        self._up.set()
        self._tried.set()

    async def wait_up(self) -> None:
        """Wait until there is a connection."""
        await self._up.wait()

    async def wait_down(self) -> None:
        """Wait until the connection is lost."""
        await self._down.wait()

    async def wait_tried(self) -> None:
        """Wait until there was a connection, or none could be made.

        Raises:
            StoreUnavailable: if there is none.
        """
        await self._tried.wait()
        if self._connection is None:
            raise StoreUnavailable(f"Redis: {self._reason}")

    async def call(
        self, command: bytes, *arguments: Argument, patience: float = 0.0, urgent: bool = False
    ) -> Any:
        """The reply to a command.

        Args:
            patience: seconds that the command itself may wait, beyond those for a reply.
            urgent: go before those that wait for their turn.

        Raises:
            StoreUnavailable: without a connection, without a reply, or if Redis refuses. The command may have
                been done.
        """
        if urgent:
            return await self._call(command, arguments, patience)
        async with self._turns:
            return await self._call(command, arguments, patience)

    async def _call(self, command: bytes, arguments: tuple[Argument, ...], patience: float) -> Any:
        connection = self._connection
        if connection is None:
            raise StoreUnavailable(f"Redis: {self._reason}")
        try:
            return await connection.create_request(
                command, *arguments, decode=False, timeout=self._patience + patience
            )
        except TimeoutError:
            connection.invalidate()
            raise StoreUnavailable("Redis: no reply") from None
        except ResponseError as error:
            text = str(error).partition(", with args")[0]  # those may be secret
            raise StoreUnavailable(f"Redis refuses {command.decode()}: {text}") from None
        except Exception as error:  # whatever ended the connection, coredis hands it to all who wait
            raise StoreUnavailable(f"Redis: the connection was lost ({type(error).__name__})") from None
