"""HTTP requests that this machine makes (protocol.md §7), on connections that are kept and shared.

httpcore2 has the connections; what a request is and where redirects lead is decided here, as the reference
does it. Nothing is added that was not asked for: no cookies, no decompression.
"""

from __future__ import annotations

import base64
import math
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
from attrs import evolve, frozen

from execenv.abc import HttpClient, HttpStream
from execenv.errors import ConnectionLost, InternalError, InvalidParams
from execenv.local.proxies import ProxyError, ProxyRules
from execenv.local.urls import HttpUrl, UnsupportedScheme, UrlError, parse_http_url
from execenv.protocol import HttpHeader, HttpRequestParams

if TYPE_CHECKING:
    import httpcore2

    from execenv.local.connections import Body

MAX_REDIRECTS = 10
DRAINED_BYTES = 64 * 1024
DRAINED_SECONDS = 0.05
"""What the body of a redirect may cost before its connection is given up instead."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_VISIBLE = re.compile(rb"[\t\x20-\x7e]*")

_OF_THE_BODY = frozenset((b"transfer-encoding", b"content-encoding", b"content-type", b"content-length"))
_OF_THE_ORIGIN = frozenset(
    (b"authorization", b"cookie", b"cookie2", b"proxy-authorization", b"www-authenticate", b"host")
)

Headers = tuple[tuple[bytes, bytes], ...]


@frozen
class _Request:
    """One hop."""

    method: str
    url: HttpUrl
    headers: Headers
    body: bytes

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        names = {name for name, _ in self.headers}
        found = list(self.headers)
        if self.url.credentials is not None and b"authorization" not in names:
            found.insert(0, (b"authorization", b"Basic " + base64.b64encode(b":".join(self.url.credentials))))
        if b"accept" not in names:
            found.append((b"accept", b"*/*"))
        if b"host" not in names:
            found.append((b"host", self.url.authority.encode()))
        if self.body and not names & {b"content-length", b"transfer-encoding"}:
            found.append((b"content-length", b"%d" % len(self.body)))
        return found


def _checked(params: HttpRequestParams) -> _Request:
    """The first request, all of it checked in the order of the reference."""
    if not _TOKEN.fullmatch(params.method):
        raise InvalidParams("http/request method is invalid: invalid HTTP method")
    try:
        url = parse_http_url(params.url)
    except UrlError as error:
        raise InvalidParams(f"http/request url is invalid: {error}") from None
    except UnsupportedScheme as error:
        raise InvalidParams(f"http/request only supports http and https URLs, got {error.scheme}") from None
    headers = tuple(_checked_header(header) for header in params.headers)
    return _Request(params.method, url, headers, params.body_base64 or b"")


def _checked_header(header: HttpHeader) -> tuple[bytes, bytes]:
    if not _TOKEN.fullmatch(header.name):
        raise InvalidParams("http/request header name is invalid: invalid HTTP header name")
    value = header.value.encode(errors="replace")
    if header.value_env_var is not None:
        content = os.environb.get(os.fsencode(header.value_env_var))
        if content is None:
            raise InvalidParams(
                f"http/request header {header.name} requires executor environment variable "
                f"{header.value_env_var}"
            )
        value += content
    if _CONTROL.search(value):
        raise InvalidParams(
            f"http/request header value is invalid for {header.name}: failed to parse header value"
        )
    return header.name.lower().encode(), value.strip(b" \t")


def _redirected(request: _Request, status: int, headers: list[tuple[bytes, bytes]]) -> _Request | None:
    """The request that follows this response; `None` if the response is the last."""
    if status not in (301, 302, 303, 307, 308):
        return None
    location = next((value for name, value in headers if name.lower() == b"location"), None)
    if location is None or not _VISIBLE.fullmatch(location):
        return None
    try:
        url = request.url.join(location.decode())
    except UrlError:
        return None
    except UnsupportedScheme as error:
        raise _failed(f"redirect target uses unsupported URL scheme: {error.scheme}") from error
    without_body = status == 303 or (status < 303 and request.method == "POST")
    dropped = {b"referer"}
    if without_body:
        dropped |= _OF_THE_BODY
    if url.origin == request.url.origin:
        url = evolve(url, credentials=request.url.credentials)
        referer = request.url.text
    else:
        dropped |= _OF_THE_ORIGIN  # a name that belongs to the one server is not asked of another
        referer = f"{request.url.scheme}://{request.url.authority}/"
    kept = [header for header in request.headers if header[0] not in dropped]
    if (request.url.scheme, url.scheme) != ("https", "http"):
        kept.append((b"referer", referer.encode()))
    if without_body:
        return _Request("HEAD" if request.method == "HEAD" else "GET", url, tuple(kept), b"")
    return _Request(request.method, url, tuple(kept), request.body)


def _failed(text: str) -> InternalError:
    """Raised from what went wrong: a log has the name of that class, and nothing else of it."""
    return InternalError(f"http/request failed: {text}")


class LocalHttpStream(HttpStream):
    """A response of httpcore2."""

    def __init__(
        self, response: httpcore2.Response, failures: tuple[type[Exception], ...], deadline: float
    ) -> None:
        self.status = response.status
        self.headers = tuple(
            HttpHeader(name.lower().decode(), value.decode())
            for name, value in response.headers
            if _VISIBLE.fullmatch(value)
        )
        self._stream: Any = response.stream  # closing it tells the pool
        self._body: Body = response.extensions["body"]
        self._failures = failures
        self._deadline = deadline

    async def receive(self) -> bytes:
        try:
            if self._deadline == math.inf:
                return await self._body.receive()
            with trio.fail_at(self._deadline):
                return await self._body.receive()
        except self._failures as error:
            raise InternalError("error decoding response body") from error

    async def aclose(self) -> None:
        await self._stream.aclose()


class LocalHttpClient(HttpClient):
    """Got from `open_http`, which closes its connections."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, HttpUrl | None], httpcore2.AsyncConnectionPool] = {}
        self._proxies: ProxyRules | None = None
        self._failures: tuple[type[Exception], ...] = ()
        self._closed = False

    async def open_stream(self, params: HttpRequestParams) -> LocalHttpStream:
        request = _checked(params)
        deadline = math.inf
        if params.timeout_ms is not None:
            if not params.timeout_ms:
                raise _failed("route-aware request timed out") from trio.TooSlowError()
            deadline = trio.current_time() + params.timeout_ms / 1000
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send(request, deadline)
            following = None
            if params.redirect_policy == "follow":
                try:
                    following = _redirected(request, response.status, response.headers)
                except InternalError:
                    await response.aclose()
                    raise
            if following is None:
                return LocalHttpStream(response, self._failures, deadline)
            await _drain(response, self._failures)
            request = following
        raise _failed("too many redirects")

    async def _send(self, request: _Request, deadline: float) -> httpcore2.Response:
        import httpcore2

        try:
            pool = self._pool(request.url)
        except (ProxyError, OSError) as error:
            raise _failed(str(error)) from error
        url = httpcore2.URL(
            scheme=request.url.scheme,
            host=request.url.host,
            port=request.url.port,
            target=self._target(request),
        )
        outgoing = httpcore2.Request(
            request.method, url, headers=request.all_headers(), extensions={"body": request.body}
        )
        try:
            if deadline == math.inf:
                return await pool.handle_async_request(outgoing)
            with trio.fail_at(deadline):
                return await pool.handle_async_request(outgoing)
        except self._failures as error:
            raise _failed(f"error sending request for url ({request.url.shown})") from error

    def _proxy(self, url: HttpUrl) -> HttpUrl | None:
        if self._proxies is None:
            self._proxies = ProxyRules.from_environment(os.environ)
        return self._proxies.proxy_for(url)

    def _target(self, request: _Request) -> str:
        if request.method == "CONNECT":
            return request.url.authority
        if request.url.scheme == "http" and self._proxy(request.url) is not None:
            return request.url.text  # what a proxy is asked for
        return request.url.target

    def _pool(self, url: HttpUrl) -> httpcore2.AsyncConnectionPool:
        """The connections for URLs like this one. Certificates are only read when TLS is first needed."""
        if self._closed:
            raise ConnectionLost("the environment that was to send this request has been closed")
        proxy = self._proxy(url)
        pool = self._pools.get((url.scheme, proxy))
        if pool is None:
            import httpcore2

            from execenv.local.connections import Pool

            self._failures = (
                httpcore2.NetworkError,
                httpcore2.ProtocolError,
                httpcore2.ProxyError,
                trio.TooSlowError,
            )
            pool = self._pools[url.scheme, proxy] = Pool(
                proxy,
                _trust() if url.scheme == "https" else None,
                _trust() if proxy is not None and proxy.scheme == "https" else None,
            )
        return pool

    async def aclose(self) -> None:
        self._closed = True
        for pool in self._pools.values():
            await pool.aclose()


def _trust() -> ssl.SSLContext:
    """Whom to trust: the certificates that these variables name, else those of the system."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file or folder:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    import httpcore2

    return httpcore2.default_ssl_context()


async def _drain(response: httpcore2.Response, failures: tuple[type[Exception], ...]) -> None:
    """Let go of a response that nobody wants, and keep its connection if that is cheap."""
    stream = LocalHttpStream(response, failures, trio.current_time() + DRAINED_SECONDS)
    left = DRAINED_BYTES
    try:
        while left > 0 and (piece := await stream.receive()):
            left -= len(piece)
    except InternalError:
        pass
    finally:
        await stream.aclose()


@asynccontextmanager
async def open_http() -> AsyncIterator[LocalHttpClient]:
    """A client with no connections yet. Leaving the block closes all that it has by then."""
    client = LocalHttpClient()
    try:
        yield client
    finally:
        await client.aclose()
