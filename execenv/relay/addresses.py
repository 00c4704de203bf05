"""URLs of registries and of rendezvous: what is taken for one, read strictly. Machine; quotes no secret.

Strict, since a credential goes there: what two parsers might read differently is refused, and connections are
made to what was read here.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

from attrs import frozen

from execenv.errors import UsageError
from execenv.targets import shown_url

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}

_URL = re.compile(
    r"([a-z]+)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(0|[1-9][0-9]{0,4}))?(/[!-~]*|\?[!-~]*)?",
    re.IGNORECASE | re.ASCII,
)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class InvalidUrl(ValueError):
    """It is no such URL. The text says why, to follow "the URL"."""


@frozen
class Address:
    """The parts of a URL that say where it leads.

    Attributes:
        scheme, host: in lower case; the host of an IPv6 address has no brackets.
        path: as it was written; may be empty.
        query: with its `?`; a secret, as it may hold a signature.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        return is_loopback(self.host)

    @property
    def authority(self) -> str:
        """Host and port as in a `Host` header: the port only if it is not that of the scheme."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        """For people: without the query."""
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_url(text: str, schemes: tuple[str, ...]) -> Address:
    """Read a URL of one of the schemes.

    Raises:
        InvalidUrl: also for user info, a fragment, a backslash, blanks, a host that is not ASCII, ends with a
            dot or is a number in disguise (`127.1`), and a port that is not written plainly.
    """
    found = _URL.fullmatch(text)
    scheme = found[1].lower() if found else ""
    if found is None or scheme not in schemes or "\\" in text or "#" in text:
        wanted = " or ".join(f"{name}://" for name in schemes)
        raise InvalidUrl(f"should be {wanted} with a plain host, and without user, fragment or blanks")
    host, port = parse_host(found[2]), int(found[3] or DEFAULT_PORTS[scheme])
    if not 0 < port < 65536:
        raise InvalidUrl("has a port that cannot be")
    path, mark, query = (found[4] or "").partition("?")
    return Address(scheme, host, port, path, mark + query)


def parse_host(text: str) -> str:
    """A host's name or address in its one spelling: lower case, an IPv6 address without its brackets.

    Raises:
        InvalidUrl: if it is neither.
    """
    host = text.lower()
    labels = host.split(".")
    try:
        if host.startswith("["):
            return IPv6Address(host[1:-1]).compressed
        if _NUMBER.fullmatch(labels[-1]):  # what getaddrinfo would take for an IPv4 address, however short
            return str(IPv4Address(host))
    except ValueError:
        raise InvalidUrl("has a host that is no address") from None
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise InvalidUrl("has a host that no name can be")
    return host


def is_loopback(host: str) -> bool:
    """Whether a host, as `parse_host` gives it, is this machine: `localhost`, 127.0.0.0/8 or ::1."""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback if address.version == 4 else host == "::1"


def parse_base_url(text: str) -> Address:
    """The base URL of a registry (relay.md §1.1): blanks around it and slashes at its end are dropped.

    Raises:
        UsageError: if it is none; also if it is `http://` of another machine, as a credential goes there.
    """
    base = text.strip().rstrip("/")
    if not base:
        raise UsageError("the URL of the registry is empty: give https://HOST")
    try:
        address = parse_url(base, ("https", "http"))
        if address.query:
            raise InvalidUrl("has a query, which no base URL has")
    except InvalidUrl as error:
        shown = shown_url(base).partition("#")[0]
        raise UsageError(f"the URL of the registry, {shown!r}, {error}") from None
    if address.scheme == "http" and not address.is_loopback:
        raise UsageError(
            f"the registry {address} would get credentials in clear: use https://, or http:// on this machine"
        )
    return address


def check_socket_url(url: str, *, here: bool) -> None:
    """See that a URL from a registry is that of a websocket which nobody else can listen in to.

    Args:
        here: whether the registry is this machine. Another one has no business with what listens here.

    Raises:
        InvalidUrl: if it is none; the text doesn't quote it.
    """
    address = parse_url(url, ("wss", "ws"))
    if address.is_loopback and not here:
        raise InvalidUrl("is of this machine, where the registry is not")
    if address.scheme == "ws" and not address.is_loopback:
        raise InvalidUrl("is ws:// of another machine, where only wss:// is safe")
