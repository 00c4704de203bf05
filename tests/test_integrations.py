"""Ordinary clients of httpx and httpx2 whose requests an environment makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
import trio

import execenv.integrations.httpx
import execenv.integrations.httpx2
from execenv import Environment, HttpFailed
from tests.conftest import open_memory
from tests.http_origin import PIECE, Origin, open_origin

TRANSPORTS: dict[ModuleType, Any] = {
    httpx: execenv.integrations.httpx.EnvironmentTransport,
    httpx2: execenv.integrations.httpx2.EnvironmentTransport,
}


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with open_origin() as origin:
        yield origin


@pytest.fixture(params=TRANSPORTS, ids=lambda library: library.__name__)
def library(request: pytest.FixtureRequest) -> Any:
    """httpx or httpx2, which have the same names."""
    return request.param


def open_client(library: Any, environment: Environment, **options: Any) -> Any:
    return library.AsyncClient(transport=TRANSPORTS[library](environment), **options)


async def test_client_works_in_every_environment(
    library: Any, environment: Environment, origin: Origin
) -> None:
    async with open_client(library, environment) as client:
        response = await client.post(origin.url("/echo"), json={"a": 1}, headers={"X-One": "1"})
        response.raise_for_status()
        echoed = response.json()
        async with client.stream("GET", origin.url(f"/bytes/{len(PIECE) * 20}")) as streamed:
            assert b"".join([piece async for piece in streamed.aiter_bytes()]) == PIECE * 20
    assert (echoed["method"], json.loads(echoed["body"])) == ("POST", {"a": 1})
    received = origin.received[0]
    assert received.values("x-one") == ["1"]
    assert received.values("host") == [f"127.0.0.1:{origin.port}"]
    assert received.values("content-length") == [str(len(received.body))]
    assert received.values("connection") == []  # what is said to the environment, not through it


async def test_redirects_cookies_and_compression_are_the_business_of_the_client(
    library: Any, origin: Origin
) -> None:
    async with open_memory() as (environment, _), open_client(library, environment) as client:
        response = await client.get(origin.url("/redirect/302?to=/echo"))
        assert (response.status_code, len(origin.received)) == (302, 1)
        response = await client.get(origin.url("/redirect/302?to=/echo"), follow_redirects=True)
        assert (response.status_code, len(response.history)) == (200, 1)
        assert (await client.get(origin.url("/gzip"))).text == "zipped text"
        response = await client.get(origin.url("/headers"))
        assert response.headers.get_list("x-a") == ["1", "2"]
        await client.get(origin.url("/echo"), auth=("user", "password"))
        assert origin.received[-1].values("authorization") == ["Basic dXNlcjpwYXNzd29yZA=="]


async def test_body_in_pieces_arrives_whole(library: Any, origin: Origin) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        await trio.lowlevel.checkpoint()
        yield b"two"

    async with open_memory() as (environment, _), open_client(library, environment) as client:
        await client.post(origin.url("/echo"), content=pieces())
    (received,) = origin.received
    assert (received.body, received.values("content-length")) == (b"onetwo", ["6"])
    assert received.values("transfer-encoding") == []


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # httpx leaves its generators open
async def test_response_arrives_in_pieces_and_may_be_given_up(library: Any, origin: Origin) -> None:
    async with open_memory() as (environment, _), open_client(library, environment) as client:
        async with client.stream("GET", origin.url("/held")) as response:
            pieces = response.aiter_bytes()
            for piece in (b"one", b"two"):
                origin.send_held(piece)
                assert await anext(pieces) == piece
            await pieces.aclose()
        await origin.wait_until(lambda: origin.left == 1)


async def test_failures_are_those_of_the_library(library: Any, origin: Origin) -> None:
    async with open_memory() as (environment, _), open_client(library, environment) as client:
        with pytest.raises(library.ConnectError, match="no response came") as caught:
            await client.get("http://127.0.0.1:1/")
        assert isinstance(caught.value.__cause__, HttpFailed)
        assert caught.value.request.url == "http://127.0.0.1:1/"
        with pytest.raises(library.ReadError, match="broke off"):
            await client.get(origin.url("/cut"))
        with pytest.raises(library.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")
        for path in ("/silent", "/half"):
            with pytest.raises(library.ReadTimeout):
                await client.get(origin.url(path), timeout=0.1)
        await origin.wait_until(lambda: origin.left >= 3)  # the environment has given them up


async def test_lost_environment_is_a_failure_of_the_library(library: Any, origin: Origin) -> None:
    async with open_memory() as (environment, channel), open_client(library, environment) as client:
        async with client.stream("GET", origin.url("/held")) as response:
            channel.close_nowait()
            with pytest.raises(library.ReadError, match="disconnected"):
                await response.aread()
        with pytest.raises(library.ConnectError, match="disconnected"):
            await client.get(origin.url("/echo"))


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_library_that_is_missing_is_named(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import execenv.integrations.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        f"ImportError: execenv.integrations.{name} needs {name}: pip install execenv[{name}]" in done.stderr
    )
