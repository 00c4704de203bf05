"""httpx2 clients whose requests an environment makes. Needs `pip install execenv[httpx2]`.

async with execenv.open_environment(target) as env:
    transport = execenv.integrations.httpx2.EnvironmentTransport(env)
    async with httpx2.AsyncClient(transport=transport) as client:
        response = await client.get("http://localhost:8000/")  # of the environment, not of this machine
"""

from __future__ import annotations

from collections.abc import AsyncIterator

try:
    import httpx2
except ImportError as error:
    raise ImportError("execenv.integrations.httpx2 needs httpx2: pip install execenv[httpx2]") from error

from execenv.environment import Environment
from execenv.integrations._transport import Exchange, Failures, send

__all__ = ["EnvironmentTransport"]

_FAILURES = Failures(
    refused=httpx2.UnsupportedProtocol,
    connect=httpx2.ConnectError,
    read=httpx2.ReadError,
    timeout=httpx2.ReadTimeout,
)


class EnvironmentTransport(httpx2.AsyncBaseTransport):
    """A transport for `httpx2.AsyncClient`, in Trio programs.

    Proxies and certificates are those of the environment: `proxy=`, `verify=` and `cert=` of the client have
    no effect. Nor have timeouts for its connection pool; the others are for one wait until the response
    begins, of as many seconds as they have together, and `read` for each piece of its body.

    Args:
        environment: makes the requests. It must be open as long as the client.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        exchange = await send(
            self._environment,
            _FAILURES,
            request.method,
            str(request.url),
            request.headers.raw,
            aiter(request.stream),
            request.extensions,
        )
        return httpx2.Response(exchange.status, headers=exchange.headers, stream=_Body(exchange))


class _Body(httpx2.AsyncByteStream):
    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await self._exchange.receive()

    async def aclose(self) -> None:
        await self._exchange.aclose()
