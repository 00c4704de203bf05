"""URLs of HTTP requests, read as browsers and the reference read them (WHATWG URL). No `await` here."""

from __future__ import annotations

import re
import socket
from ipaddress import AddressValueError, IPv6Address
from urllib.parse import quote, unquote_to_bytes, urljoin

from attrs import evolve, frozen

DEFAULT_PORTS = {"http": 80, "https": 443}

_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
_PATH_SAFE = "".join(sorted(set(_VISIBLE) - set('"#<>?`{}')))
_QUERY_SAFE = "".join(sorted(set(_VISIBLE) - set("\"#<>'")))
_IN_NO_HOST = re.compile(r"[\x00-\x20#/:<>?@\[\\\]^|%\x7f]")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")


class UrlError(ValueError):
    """Not a URL; the text is that of the reference."""


class UnsupportedScheme(ValueError):
    """A URL, but not of HTTP.

    Attributes:
        scheme: its scheme in lower case.
    """

    def __init__(self, scheme: str) -> None:
        super().__init__(f"unsupported scheme {scheme}")
        self.scheme = scheme


@frozen
class HttpUrl:
    """What a request needs to know of its URL.

    Attributes:
        host: in ASCII; an IPv6 address without brackets.
        port: always a number.
        target: path and query, percent-encoded, without fragment.
        credentials: user and password, decoded, if the URL has any.
    """

    scheme: str
    host: str
    port: int
    target: str
    credentials: tuple[bytes, bytes] | None = None

    @property
    def authority(self) -> str:
        """Host and port as a `Host` header has them: without the port if it is that of the scheme."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def text(self) -> str:
        """The whole URL, but for credentials."""
        return f"{self.scheme}://{self.authority}{self.target}"

    @property
    def shown(self) -> str:
        """The URL for messages, which may end up anywhere: also without the query."""
        return self.text.partition("?")[0]

    def join(self, location: str) -> HttpUrl:
        """Where a `Location` header leads.

        Raises:
            UrlError, UnsupportedScheme: as `parse_http_url`.
        """
        try:
            joined = urljoin(self.text, location)
        except ValueError as error:
            raise UrlError(str(error)) from None
        return evolve(parse_http_url(joined), credentials=None)


def parse_http_url(text: str) -> HttpUrl:
    """An absolute http or https URL.

    Raises:
        UrlError: if it is none.
        UnsupportedScheme: if it is one of something else.
    """
    text = re.sub(r"[\t\n\r]", "", text.strip("".join(map(chr, range(0x21)))))
    scheme, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise UrlError("relative URL without a base")
    scheme = scheme.lower()
    if scheme not in DEFAULT_PORTS:
        raise UnsupportedScheme(scheme)
    rest = rest.partition("#")[0]
    path, question, query = rest.partition("?")
    authority, slash, path = path.replace("\\", "/").lstrip("/").partition("/")
    user, at, host_and_port = authority.rpartition("@")
    host, port = _split_port(host_and_port, scheme)
    target = _path(slash + path)
    if question:
        target += "?" + quote(query, safe=_QUERY_SAFE, errors="replace")
    return HttpUrl(scheme, host, port, target, _credentials(user) if at and user else None)


def _credentials(user: str) -> tuple[bytes, bytes]:
    name, _, password = user.partition(":")
    return unquote_to_bytes(name), unquote_to_bytes(password)


def _split_port(text: str, scheme: str) -> tuple[str, int]:
    if text.startswith("["):
        address, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise UrlError("invalid IPv6 address")
        try:
            host = IPv6Address(address).compressed
        except AddressValueError:
            raise UrlError("invalid IPv6 address") from None
        if "%" in address:
            raise UrlError("invalid IPv6 address")
        port = port[1:]
    else:
        host, _, port = text.partition(":")
        if not host:
            raise UrlError("empty host")
        host = _host(host)
    if port and not re.fullmatch(r"0*[0-9]{1,5}", port):
        raise UrlError("invalid port number")
    number = int(port) if port else DEFAULT_PORTS[scheme]
    if number > 65_535:
        raise UrlError("invalid port number")
    return host, number


def _host(text: str) -> str:
    try:
        host = unquote_to_bytes(text).decode()
    except UnicodeError:
        raise UrlError("invalid international domain name") from None
    host = host.lower()
    if not host.isascii() or "xn--" in host:
        import idna

        try:
            host = idna.encode(host, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            raise UrlError("invalid international domain name") from None
    if not host or _IN_NO_HOST.search(host):
        raise UrlError("invalid international domain name")
    if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        try:
            return socket.inet_ntoa(socket.inet_aton(host.removesuffix(".")))
        except OSError:
            raise UrlError("invalid IPv4 address") from None
    return host


def _path(text: str) -> str:
    parts: list[str] = []
    segments = text.split("/")[1:] or [""]
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        plain = segment.lower().replace("%2e", ".")
        if plain == "..":
            if parts:
                parts.pop()
        elif plain != ".":
            parts.append(segment)
            continue
        if last:
            parts.append("")
    return "/" + quote("/".join(parts), safe=_PATH_SAFE, errors="replace")
