"""How an environment is reached: the union behind every name, URL and command (environments.md §1.2)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

from attrs import field, frozen

from execenv.errors import ConnectFailed, UsageError

CONNECT_TIMEOUT = 10.0  # environments.md §1.1
INITIALIZE_TIMEOUT = 10.0
RECOVERY = 45.0
"""Seconds that a client tries to get its session back (real-client.md, "Cuts")."""
MAX_TOKEN = 64 * 1024


def is_token(text: str) -> bool:
    """Whether it can stand in a header as a bearer token."""
    return bool(text.strip()) and text.isascii() and text.isprintable()


def shown_url(text: str) -> str:
    """A URL for a message: credentials and query, which may be secrets, left out."""
    head, _, query = text.partition("?")
    before, at, after = head.rpartition("@")
    if at:
        return before.partition("://")[0] + "://***@" + after if "://" in before else at + after
    if "@" in query and not _HOST_AND_PATH.fullmatch(head):  # it may be a password with a "?" in it
        return head.partition("://")[0] + "://***"
    return head


_HOST_AND_PATH = re.compile(r"[A-Za-z]+://(?:\[[^\]]*\]|[^:/\[]+)(?::[0-9]+)?/.*", re.DOTALL)


class HasToken(Protocol):
    """A target with a bearer token, which may be kept elsewhere."""

    @property
    def bearer_token(self) -> str | None: ...
    @property
    def bearer_token_file(self) -> str | None: ...
    @property
    def bearer_token_env(self) -> str | None: ...


def read_token(target: HasToken) -> str | None:
    """The token to show now, wherever it is kept; `None` without one. Reads a small file.

    Raises:
        ConnectFailed: if the file or the variable has none; names it, and says nothing of what it holds.
    """
    if target.bearer_token_file is not None:
        source = f"the token file {target.bearer_token_file}"
        try:
            # Whoever has a fifo there is not waited for: nothing could interrupt that.
            with open(
                target.bearer_token_file,
                "rb",
                opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK),
            ) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ConnectFailed(f"cannot read {source}: it is no regular file")
                token = file.read(MAX_TOKEN + 1).decode(errors="replace").strip()
        except (OSError, ValueError) as error:  # ValueError: no file has a NUL in its name
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConnectFailed(f"cannot read {source}: {reason}") from error
    elif target.bearer_token_env is not None:
        source = f"the variable {target.bearer_token_env}"
        if target.bearer_token_env not in os.environ:
            raise ConnectFailed(f"{source}, which is to hold the bearer token, is not set")
        token = os.environ[target.bearer_token_env].strip()
    else:
        return target.bearer_token
    if not is_token(token) or len(token) > MAX_TOKEN:
        raise ConnectFailed(f"{source} holds no bearer token: it should be one line of ASCII")
    return token


@frozen
class LocalTarget:
    """This machine."""


@frozen
class WebsocketTarget:
    """A websocket server.

    Attributes:
        url: `ws://` or `wss://`.
        bearer_token: for a server that wants one.
        connect_timeout, initialize_timeout: seconds for the websocket and for the handshake behind it.
        bearer_token_file, bearer_token_env: the file or the variable that holds the token instead. Looked at
            whenever a connection is opened.
    """

    url: str = field(repr=lambda url: repr(shown_url(url)))
    bearer_token: str | None = field(default=None, repr=False)
    connect_timeout: float = CONNECT_TIMEOUT
    initialize_timeout: float = INITIALIZE_TIMEOUT
    bearer_token_file: str | None = None
    bearer_token_env: str | None = None

    def read_token(self) -> str | None:
        """The token to show now, wherever it is kept; `None` without one. Reads a small file.

        Raises:
            ConnectFailed: if the file or the variable has none; names it, and says nothing of what it holds.
        """
        return read_token(self)


@frozen
class CommandTarget:
    """A command that speaks the protocol over its stdin and stdout.

    Attributes:
        argv: the program, found on PATH, and its arguments. No shell.
        env: laid over this process's environment.
        cwd: where it runs; this process's own directory if `None`.
        initialize_timeout: seconds for it to start and shake hands.
        bootstrap: the command runs what is appended to it at some other side, and no execenv is needed there:
            `("ssh", "devbox")`, `("docker", "exec", "-i", "box")`. A `sh` and a Python >= 3.11 are; the
            server is sent to a cache there at the first connect, for which there is no time limit as long as
            it gets on. The other side has to know of its stdin and stdout only: no terminal.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(factory=dict, repr=False)
    cwd: str | None = None
    initialize_timeout: float = INITIALIZE_TIMEOUT
    bootstrap: bool = False


Security: TypeAlias = Literal["noise", "clear"]


@frozen
class RelayTarget:
    """An environment behind a relay, by its registry.

    Attributes:
        registry: the base URL, `https://`, or `http://` of this machine.
        environment_id: ASCII letters, digits, `-` and `_`, 256 at most.
        bearer_token: for the registry.
        connect_timeout, initialize_timeout: seconds for a look-up and for the websocket, each; and for the
            handshakes behind it.
        bearer_token_file, bearer_token_env: the file or the variable that holds the token instead. Looked at
            whenever the registry is asked.
        security: `"noise"`: encrypted from end to end, and refused if it cannot be; `"clear"`: whoever has
            the relay can read and change everything.
        account_id: sent to the registry with the token, for one that wants it.
    """

    registry: str = field(repr=lambda url: repr(shown_url(url)))
    environment_id: str
    bearer_token: str | None = field(default=None, repr=False)
    connect_timeout: float = CONNECT_TIMEOUT
    initialize_timeout: float = INITIALIZE_TIMEOUT
    bearer_token_file: str | None = None
    bearer_token_env: str | None = None
    security: Security = "noise"
    account_id: str | None = None

    def read_token(self) -> str | None:
        """See `WebsocketTarget.read_token`."""
        return read_token(self)


Target: TypeAlias = LocalTarget | WebsocketTarget | CommandTarget


def check_target(target: Target) -> None:
    """See that a target can be used at all, whatever answers there.

    Raises:
        UsageError: if it cannot.
    """
    if isinstance(target, LocalTarget):
        return
    seconds = {"initialize_timeout": target.initialize_timeout}
    if isinstance(target, WebsocketTarget):
        seconds["connect_timeout"] = target.connect_timeout
        if target.bearer_token is not None and not is_token(target.bearer_token):
            raise UsageError(
                "bearer_token cannot stand in a header: it should be one line of printable ASCII"
            )
    elif not target.argv:
        raise UsageError("the command of an environment must name a program")
    for name, value in seconds.items():
        if not value >= 0:  # nor nan
            raise UsageError(f"{name} cannot be {value!r}: seconds are 0 or more")
