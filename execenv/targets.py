"""How an environment is reached: the union behind every name, URL and command (environments.md §1.2)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias, get_args
from urllib.parse import parse_qsl, urlsplit

from attrs import field, frozen

from execenv.errors import ConnectFailed, UsageError

CONNECT_TIMEOUT = 10.0  # environments.md §1.1
INITIALIZE_TIMEOUT = 10.0
RECOVERY = 45.0
"""Seconds that a client tries to get its session back (real-client.md, "Cuts")."""
MAX_TOKEN = 64 * 1024
MAX_ENVIRONMENT_ID = 256


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


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine, without asking anybody."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
SECURITIES: tuple[str, ...] = get_args(Security)


def _without_slashes(registry: str) -> str:
    url = registry.strip()
    trimmed = url.rstrip("/")
    return url if trimmed.endswith(":") else trimmed


@frozen
class RelayTarget:
    """An environment behind a relay, by its registry.

    Attributes:
        registry: the base URL, `https://`, or `http://` of this machine. Slashes at its end do not count.
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

    registry: str = field(converter=_without_slashes, repr=lambda url: repr(shown_registry(url)))
    environment_id: str
    bearer_token: str | None = field(default=None, repr=False)
    connect_timeout: float = CONNECT_TIMEOUT
    initialize_timeout: float = INITIALIZE_TIMEOUT
    bearer_token_file: str | None = None
    bearer_token_env: str | None = None
    security: Security = "noise"
    account_id: str | None = None

    @property
    def url(self) -> str:
        """The two in one, as `open_environment` takes them. It holds no token."""
        return f"{RELAY}{self.registry}/{self.environment_id}"

    def read_token(self) -> str | None:
        """See `WebsocketTarget.read_token`."""
        return read_token(self)


Target: TypeAlias = LocalTarget | WebsocketTarget | CommandTarget | RelayTarget


def check_target(target: Target) -> None:
    """See that a target can be used at all, whatever answers there.

    Raises:
        UsageError: if it cannot. No secret is in its text.
    """
    if isinstance(target, LocalTarget):
        return
    seconds = {"initialize_timeout": target.initialize_timeout}
    if isinstance(target, WebsocketTarget | RelayTarget):
        seconds["connect_timeout"] = target.connect_timeout
        if target.bearer_token is not None and not is_token(target.bearer_token):
            raise UsageError(
                "bearer_token cannot stand in a header: it should be one line of printable ASCII"
            )
    if isinstance(target, RelayTarget):
        _check_relay(target)
    elif isinstance(target, CommandTarget) and not target.argv:
        raise UsageError("the command of an environment must name a program")
    for name, value in seconds.items():
        if not value >= 0:  # nor nan
            raise UsageError(f"{name} cannot be {value!r}: seconds are 0 or more")


# Relays.

RELAY = "relay+"
"""What a URL of an environment behind a relay begins with; the URL of its registry follows, then its id."""

_RELAY_URL = re.compile(r"relay\+[a-z0-9+.-]*://", re.IGNORECASE)
_ENVIRONMENT_ID = re.compile(r"[A-Za-z0-9_-]+")
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?")


def is_relay_url(text: str) -> bool:
    """Whether it is meant as what `parse_relay_url` takes, right or wrong."""
    return _RELAY_URL.match(text) is not None


def parse_relay_url(
    url: str,
    *,
    bearer_token: str | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    initialize_timeout: float = INITIALIZE_TIMEOUT,
) -> RelayTarget:
    """The target of `relay+https://REGISTRY/ENVIRONMENT_ID`.

    The last segment of the path is the id, and what stands before it the base URL of the registry.

    Raises:
        UsageError: if it is not that. Says what is wrong with it, and shows no secret that is in it.
    """
    shown = shown_registry(url)
    form = "it should look like relay+https://REGISTRY/ENVIRONMENT_ID"
    if not url.startswith(RELAY):
        raise UsageError(f"{shown!r} is no URL of an environment behind a relay: {form}")
    problem = registry_problem(url.removeprefix(RELAY))
    if problem:
        raise UsageError(f"{shown!r} is no URL of an environment behind a relay: {problem}")
    registry, _, id_ = url.removeprefix(RELAY).rstrip("/").rpartition("/")
    if registry in ("https:/", "http:/"):  # there is only a host
        raise UsageError(f"{shown!r} names no environment behind the relay: {form}")
    problem = environment_id_problem(id_)
    if problem:
        raise UsageError(f"{shown!r} names no environment behind the relay: {problem}")
    target = RelayTarget(registry, id_, bearer_token, connect_timeout, initialize_timeout)
    check_target(target)
    return target


def shown_registry(url: str) -> str:
    """A registry's URL for a message: what is no part of one may be a secret, and is left out."""
    return shown_url(url).partition("#")[0]


def registry_problem(url: str) -> str | None:
    """Why it cannot be the base URL of a registry; `None` if it can."""
    if not url.startswith(("https://", "http://")):
        return "a registry has an https:// URL (or http:// on this machine)"
    found = re.search(r"[^!-~]", url)
    if found:
        return f"it has the character {found[0]!r}, which must be percent-encoded"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port
    except ValueError:  # its text repeats what may be a piece of a password
        return "its host or its port cannot be read; write it as https://HOST:PORT"
    if "@" in parts.netloc:
        return "it names a user, and perhaps a password; leave them out, a token is given beside the URL"
    if "?" in url or "#" in url:
        part = "query" if "?" in url.partition("#")[0] else "fragment"
        return f"it has a {part}; leave that out, a token is given beside the URL"
    if not host:
        return "it names no host, as https://HOST does"
    if not _HOST.fullmatch(host) or port == 0 or parts.netloc.endswith(":"):
        return "its host or its port cannot be read; write it as https://HOST:PORT"
    if parts.scheme == "http" and not is_loopback(host):
        return "http:// is for this machine alone, elsewhere it would send the token in clear: use https://"
    return None


def environment_id_problem(id_: str) -> str | None:
    """Why it cannot be the id of an environment behind a relay; `None` if it can."""
    if not id_:
        return "an environment id cannot be empty"
    if len(id_) > MAX_ENVIRONMENT_ID:
        return f"an environment id has {MAX_ENVIRONMENT_ID} characters at most"
    if not _ENVIRONMENT_ID.fullmatch(id_):
        return "an environment id has only ASCII letters, digits, - and _"
    return None


def is_harness_url(url: str) -> bool:
    """Whether a websocket URL leads to an environment behind a relay, in clear text (relay.md §4.2)."""
    try:
        return ("role", "harness") in parse_qsl(urlsplit(url).query)
    except ValueError:  # whoever connects to it says what is wrong
        return False


def _check_relay(target: RelayTarget) -> None:
    problem = registry_problem(target.registry)
    if problem:
        raise UsageError(f"registry {shown_registry(target.registry)!r} cannot be used: {problem}")
    problem = environment_id_problem(target.environment_id)
    if problem:
        raise UsageError(f"environment_id {target.environment_id!r} cannot be used: {problem}")
    if target.security not in SECURITIES:
        raise UsageError(f"security cannot be {target.security!r}: it is 'noise' or 'clear'")
    if target.account_id is not None and not is_token(target.account_id):
        raise UsageError("account_id cannot stand in a header: it should be one line of printable ASCII")
