"""HTTP requests that an environment makes: from its network, with its proxies, certificates and secrets.

response = await env.http.request("GET", "http://localhost:8000/status")
print(response.status, response.body)
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import trio
from attrs import field, frozen

from execenv.abc import EnvironmentBackend, HttpStream
from execenv.errors import HttpFailed, HttpFailure, InvalidParams, ProtocolViolation, RpcError, UsageError
from execenv.protocol import U64, Base64, HttpHeader, HttpRequestParams

_CREDENTIALS = re.compile(r"^(\s*[^:/\\?#]*:[/\\]*)[^/\\?#]*@")


@frozen
class FromVariable:
    """A header value that ends with the content of a variable of the environment, which never leaves it.

    Attributes:
        name: the variable; a request fails if it is not set.
        prefix: what comes before it, such as `"Bearer "`.
    """

    name: str
    prefix: str = ""


HeaderValue = str | FromVariable
RequestHeaders = Mapping[str, HeaderValue] | Sequence[tuple[str, HeaderValue]]
ResponseHeaders = tuple[tuple[str, str], ...]


@frozen
class HttpResponse:
    """What `Http.request` gives back.

    Attributes:
        status: any; 404 and 500 are no errors here.
        headers: name and value, names in lower case, repeats kept in order.
        body: as it was sent: `content-encoding` is not undone.
    """

    status: int
    headers: ResponseHeaders
    body: bytes = field(repr=False)

    def header(self, name: str) -> str | None:
        """The first header of that name, in any case."""
        return _header(self.headers, name)


class StreamedResponse:
    """A response whose body is read while it arrives. Got from `Http.stream`.

    `async for piece in response` gives its pieces as they come; who reads slowly holds back the sender.

    Attributes:
        status, headers: as those of `HttpResponse`.
    """

    def __init__(self, stream: HttpStream, about: _About) -> None:
        self.status = stream.status
        self.headers: ResponseHeaders = tuple((one.name, one.value) for one in stream.headers)
        self._stream = stream
        self._about = about
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<execenv.StreamedResponse {self.status} of {self._about}>"

    def header(self, name: str) -> str | None:
        """The first header of that name, in any case."""
        return _header(self.headers, name)

    async def receive(self) -> bytes:
        """The next piece of the body, at least one byte; `b""` at its end.

        Raises:
            HttpFailed: if the rest will not come.
            ConnectionLost: if the environment was lost.
            trio.ClosedResourceError: if the block of this response was left.
            UsageError: if another task is reading.
        """
        if self._closed:
            raise trio.ClosedResourceError("the block of this response was left")
        if self._busy:
            raise UsageError("another task is reading this response; use one response for each")
        self._busy = True
        try:
            with self._about.failures(in_body=True):
                return await self._stream.receive()
        finally:
            self._busy = False

    async def read(self) -> bytes:
        """All that is left of the body. Raises as `receive`."""
        return b"".join([piece async for piece in self])

    # Not a generator: those must be closed by whoever leaves a loop early.

    def __aiter__(self) -> StreamedResponse:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.receive()
        if not piece:
            raise StopAsyncIteration
        return piece


class Http:
    """The HTTP client of an environment: `Environment.http`."""

    def __init__(self, backend: EnvironmentBackend) -> None:
        self._backend = backend

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: RequestHeaders = (),
        body: bytes | None = None,
        timeout: float | None = None,
        follow_redirects: bool = True,
    ) -> HttpResponse:
        """Send a request and wait for the whole response.

        **Proxies and certificates** are those that the environment's own variables name (`HTTPS_PROXY`,
        `NO_PROXY`, `SSL_CERT_FILE`, …), names are looked up there, and `localhost` is the environment itself.
        **Cancellation** gives up the request. A server of another make goes on with it for itself.

        Args:
            method: sent as it is: `"GET"`, not `"get"`.
            url: absolute, http or https. `user:password@` becomes basic authentication.
            headers: a mapping, or pairs where a name is repeated. Nothing is added but `accept`, `host` and
                `content-length`.
            timeout: seconds for all of it, kept by the environment; no limit if `None`.
            follow_redirects: up to 10, as browsers do it.

        Raises:
            HttpFailed: if there is no response, or not all of it. Whatever its status, a response is none.
            NotSupported: if the environment cannot fill in a `FromVariable`.
            ConnectionLost: if the environment was lost.
        """
        params = _params(method, url, headers, body, timeout, follow_redirects)
        with _About(self._backend.name, method, url, timeout).failures():
            result = await self._backend.http.request(params)
        found = tuple((one.name, one.value) for one in result.headers)
        return HttpResponse(result.status, found, result.body_base64)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        url: str,
        *,
        headers: RequestHeaders = (),
        body: bytes | None = None,
        timeout: float | None = None,
        follow_redirects: bool = True,
    ) -> AsyncIterator[StreamedResponse]:
        """Send a request and read the body of its response while it arrives.

        The arguments are those of `request`. Leaving the block gives up what was not read.

        Raises:
            HttpFailed, NotSupported, ConnectionLost: as `request`. `HttpFailed` also comes from reading.
        """
        about = _About(self._backend.name, method, url, timeout)
        params = _params(method, url, headers, body, timeout, follow_redirects)
        with about.failures():
            stream = await self._backend.http.open_stream(params)
        response = StreamedResponse(stream, about)
        try:
            yield response
        finally:
            response._closed = True
            await stream.aclose()


class _About:
    """A request, for messages: where, what, and since when."""

    def __init__(self, environment: str, method: str, url: str, timeout: float | None) -> None:
        self._environment = environment
        self._method = method
        self._url = _shown(url)
        self._timeout = timeout
        self._began = trio.current_time()

    def __str__(self) -> str:
        return f"{self._method} {self._url} in {self._environment}"

    @contextmanager
    def failures(self, *, in_body: bool = False) -> Iterator[None]:
        """Whatever the environment says went wrong, as `HttpFailed`."""
        try:
            yield
        except (RpcError, ProtocolViolation) as error:
            raise self._failed(error, in_body) from _without_queries(error)

    def _failed(self, error: RpcError | ProtocolViolation, in_body: bool) -> HttpFailed:
        text = str(error)
        kind: HttpFailure = "request"
        reason = "no response came"
        if isinstance(error, InvalidParams):
            kind, reason = "invalid", text.removeprefix("http/request ")
        elif self._timeout is not None and trio.current_time() - self._began >= self._timeout:
            kind, reason = "timeout", f"not finished within {self._timeout:g} s"
        elif in_body or text.startswith("failed to read http/request response body"):
            kind, reason = "body", f"the body broke off: {text.rpartition('body: ')[2]}"
        elif "redirect" in text:
            kind, reason = "redirect", text.removeprefix("http/request failed: ")
        return HttpFailed(self._method, self._url, self._environment, kind, reason)


def _without_queries(error: RpcError | ProtocolViolation) -> Exception:
    """Some servers repeat the whole URL, and whoever logs the cause of an error would log its secrets."""
    clean = re.sub(r"\?[^\s)]*", "", str(error))
    error.args = (clean,)
    if isinstance(error, RpcError):
        error.message = clean
    return error


def _shown(url: str) -> str:
    return re.split(r"[?#]", _CREDENTIALS.sub(r"\1", url), maxsplit=1)[0]


def _header(headers: ResponseHeaders, name: str) -> str | None:
    return next((value for key, value in headers if key == name.lower()), None)


def _params(
    method: str,
    url: str,
    headers: RequestHeaders,
    body: bytes | None,
    timeout: float | None,
    follow_redirects: bool,
) -> HttpRequestParams:
    if body is not None and not isinstance(body, bytes):
        raise UsageError(f"the body of a request is bytes, not {type(body).__name__}: encode it first")
    if timeout is not None and not timeout >= 0:
        raise UsageError("timeout is a number of seconds from 0 on")
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return HttpRequestParams(
        method=method,
        url=url,
        headers=tuple(_wire_header(name, value) for name, value in pairs),
        body_base64=None if body is None else Base64(body),
        timeout_ms=None if timeout is None or timeout == math.inf else U64(math.ceil(timeout * 1000)),
        redirect_policy="follow" if follow_redirects else "stop",
        request_id="",
    )


def _wire_header(name: str, value: HeaderValue) -> HttpHeader:
    if isinstance(value, FromVariable):
        return HttpHeader(name, value.prefix, value.name)
    return HttpHeader(name, value)
