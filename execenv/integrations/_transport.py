"""What the transports for httpx and httpx2 have in common: the two libraries differ in their names only."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import trio
from attrs import frozen

from execenv.environment import Environment
from execenv.errors import ConnectionLost, HttpFailed, NotSupported
from execenv.http import StreamedResponse

Headers = list[tuple[bytes, bytes]]

_OF_ONE_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade")
)
"""What is said to the next peer only, which is not the server."""


@frozen
class Failures:
    """The exceptions of a library, each made from a message.

    Attributes:
        refused: there can be no such request.
        connect: no response came.
        read: the response broke off.
        timeout: one of the two took too long.
    """

    refused: Callable[[str], Exception]
    connect: Callable[[str], Exception]
    read: Callable[[str], Exception]
    timeout: Callable[[str], Exception]


class Exchange:
    """A response: status and headers at once, the body as it comes."""

    def __init__(
        self, response: StreamedResponse, stack: AsyncExitStack, failures: Failures, timeout: float | None
    ) -> None:
        self.status = response.status
        self.headers: Headers = [(name.encode(), value.encode()) for name, value in response.headers]
        self._response = response
        self._stack = stack
        self._failures = failures
        self._timeout = timeout

    async def receive(self) -> bytes:
        """The next piece of the body; raises `StopAsyncIteration` at its end."""
        with _translated(self._failures, self._failures.read, self._timeout):
            piece = await self._response.receive()
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        await self._stack.aclose()


async def send(
    environment: Environment,
    failures: Failures,
    method: str,
    url: str,
    headers: Headers,
    body: AsyncIterator[bytes],
    extensions: Mapping[str, Any],
) -> Exchange:
    """Have the environment make a request. Redirects, cookies and decompression are left to the library.

    The protocol has the body of a request in one message, so all of it is collected first.

    The timeouts of these libraries are for one wait each. Until the response begins there is one wait here,
    for as long as theirs together, and without end if one of them is `None`.
    """
    timeouts: Mapping[str, float | None] = extensions.get("timeout", {})
    waits = [timeouts.get(name) for name in ("connect", "write", "read")]
    seconds = sum(math.inf if wait is None else wait for wait in waits)
    content = b"".join([piece async for piece in body])
    stack = AsyncExitStack()
    with _translated(failures, failures.connect, seconds):
        response = await stack.enter_async_context(
            environment.http.stream(
                method,
                url,
                headers=[
                    (name.decode("ascii"), value.decode())
                    for name, value in headers
                    if name.lower() not in _OF_ONE_HOP
                ],
                body=content or None,
                follow_redirects=False,
            )
        )
    return Exchange(response, stack, failures, timeouts.get("read"))


@contextmanager
def _translated(
    failures: Failures, failed: Callable[[str], Exception], seconds: float | None
) -> Iterator[None]:
    """Raise the library's exceptions; `failed` if the server or the environment is to blame."""
    scope = trio.CancelScope()
    if seconds is not None:
        scope.deadline = trio.current_time() + seconds
    try:
        with scope:
            yield
    except HttpFailed as error:
        raise (failures.refused if error.kind == "invalid" else failed)(str(error)) from error
    except ConnectionLost as error:
        raise failed(str(error)) from error
    except (NotSupported, UnicodeDecodeError) as error:
        raise failures.refused(str(error)) from error
    if scope.cancelled_caught:
        raise failures.timeout(f"nothing came within {seconds:g} s")
