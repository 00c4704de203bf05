"""HTTP beyond the contract: the wire, slow readers, secrets, proxies and certificates."""

from __future__ import annotations

import logging
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import trio
import trustme
from attrs import define, evolve
from trio.testing import wait_all_tasks_blocked

from execenv import (
    ConnectionLost,
    Environment,
    FromVariable,
    HttpFailed,
    NotSupported,
    codec,
    open_environment,
)
from execenv.errors import InternalError, InvalidParams
from execenv.http import Http
from execenv.local.proxies import ProxyError, ProxyRules
from execenv.local.urls import HttpUrl, UnsupportedScheme, UrlError, parse_http_url
from execenv.protocol import (
    HTTP_BODY_DELTA,
    HTTP_BODY_TAKEN,
    HTTP_REQUEST,
    INITIALIZE,
    INITIALIZED,
    U64,
    Base64,
    EnvironmentInfo,
    HttpBodyDeltaParams,
    HttpBodyTakenParams,
    HttpHeader,
    HttpRequestParams,
    HttpRequestResult,
    InitializeParams,
    InitializeResult,
    Nothing,
    Shell,
)
from execenv.remote import http as remote_http
from execenv.remote.connection import open_remote
from execenv.rpc import Peer, Route, open_peer
from execenv.server import http as server_http
from execenv.server import open_local_sessions
from execenv.server.listen import serve_channel
from execenv.server.sessions import Sessions
from execenv.transports.memory import MemoryChannel, memory_pair
from tests.conftest import WebsocketServer, open_kind, open_memory
from tests.fakes import only
from tests.http_origin import PIECE, open_origin

SECRET = "s3cret"
TIME_LIMIT = 20.0


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# On the wire: a client of the bare protocol at a server of ours.


@define(eq=False)
class Client:
    peer: Peer
    channel: MemoryChannel
    deltas: trio.MemoryReceiveChannel[HttpBodyDeltaParams]

    async def request(self, url: str, **members: Any) -> HttpRequestResult:
        return await self.peer.call(HTTP_REQUEST, _params(url, **members))

    async def body(self) -> bytes:
        """One stream to its end; nothing else may arrive meanwhile."""
        body = b""
        for seq in range(1, 1_000_000):
            delta = await self.deltas.receive()
            assert delta.seq == seq
            if delta.done:
                assert (delta.delta_base64, delta.error) == (b"", None)
                break
            assert delta.delta_base64
            body += delta.delta_base64
        return body


def _params(url: str, **members: Any) -> HttpRequestParams:
    return evolve(HttpRequestParams(method="GET", url=url, request_id="r"), **members)


@asynccontextmanager
async def open_client(sessions: Sessions) -> AsyncIterator[Client]:
    """A connection to a server, which may be cut."""
    send, deltas = trio.open_memory_channel[HttpBodyDeltaParams](1_000_000)

    def on_delta(params: Any) -> None:
        send.send_nowait(codec.structure(params, HttpBodyDeltaParams))

    async with trio.open_nursery() as nursery:
        ours, theirs = memory_pair()
        nursery.start_soon(serve_channel, theirs, sessions)
        async with open_peer(Peer(ours, notifications={HTTP_BODY_DELTA.name: on_delta})) as peer:
            await peer.call(INITIALIZE, InitializeParams("test"))
            peer.notify(INITIALIZED, Nothing())
            yield Client(peer, ours, deltas)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with open_local_sessions() as sessions, open_client(sessions) as client:
        with trio.fail_after(TIME_LIMIT):
            yield client


async def test_body_follows_the_answer_and_ends_with_an_empty_piece(client: Client) -> None:
    async with open_origin() as origin:
        result = await client.request(origin.url("/bytes/200000"), stream_response=True)
        assert (result.status, result.body_base64) == (200, b"")
        assert await client.body() == (PIECE * 4)[:200_000]
        result = await client.request(origin.url("/status/204"), stream_response=True)
        assert (result.status, await client.body()) == (204, b"")


async def test_broken_body_ends_with_an_error(client: Client) -> None:
    async with open_origin() as origin:
        await client.request(origin.url("/cut"), stream_response=True, request_id="")
        assert await client.deltas.receive() == HttpBodyDeltaParams("", 1, Base64(b"12345"))
        end = HttpBodyDeltaParams("", 2, Base64(b""), done=True, error="error decoding response body")
        assert await client.deltas.receive() == end


async def test_stream_id_is_taken_until_its_last_piece(client: Client) -> None:
    async with open_origin() as origin:
        held = origin.url("/held")
        await client.request(held, stream_response=True)
        with pytest.raises(InvalidParams, match="streamResponse requestId `r` is already active"):
            await client.request("nope", stream_response=True)
        assert (await client.request(origin.url("/echo"))).status == 200  # the whole body: another matter
        origin.send_held(b"")
        assert await client.body() == b""
        assert (await client.request(held, stream_response=True)).status == 200


async def test_stream_id_is_free_after_a_failure(client: Client) -> None:
    for _ in range(2):
        with pytest.raises(InternalError, match=r"error sending request for url \(http://127.0.0.1:1/\)"):
            await client.request("http://127.0.0.1:1/", stream_response=True)


async def test_closing_the_connection_aborts_its_requests() -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_origin() as origin, open_local_sessions() as sessions:
            for number, path, streamed in ((1, "/silent", False), (2, "/silent", True), (3, "/held", True)):
                async with open_client(sessions) as client, trio.open_nursery() as nursery:

                    async def ask(client: Client, path: str, streamed: bool) -> None:
                        with suppress(ConnectionLost):
                            await client.request(origin.url(path), stream_response=streamed)

                    nursery.start_soon(ask, client, path, streamed)
                    await origin.wait_until(lambda: len(origin.received) == number)  # noqa: B023
                    await wait_all_tasks_blocked()
                    client.channel.close_nowait()
                await origin.wait_until(lambda: origin.left == number)  # noqa: B023


async def test_client_may_stop_a_request_of_either_kind(client: Client) -> None:
    async with open_origin() as origin:
        for number, streamed in ((1, False), (2, True)):

            async def ask(streamed: bool) -> None:
                with pytest.raises(InternalError, match="stopped by the client"):
                    await client.request(origin.url("/silent"), stream_response=streamed)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, streamed)
                await origin.wait_until(lambda: len(origin.received) == number)  # noqa: B023
                client.peer.notify(HTTP_BODY_TAKEN, HttpBodyTakenParams("nobody", U64(1), stop=True))
                client.peer.notify(HTTP_BODY_TAKEN, HttpBodyTakenParams("r", U64(0), stop=True))
            await origin.wait_until(lambda: origin.left == number)  # noqa: B023
        assert (await client.request(origin.url("/echo"), stream_response=True)).status == 200


async def test_server_sends_no_more_than_the_window_before_some_was_taken(client: Client) -> None:
    async with open_origin() as origin:
        await client.request(origin.url("/bytes/3000000"), stream_response=True, body_window=U64(300_000))
        taken = 0
        while taken < 3_000_000:
            await wait_all_tasks_blocked(0.01)
            under_way = client.deltas.statistics().current_buffer_used
            pieces = [client.deltas.receive_nowait() for _ in range(under_way)]
            size = sum(len(piece.delta_base64) for piece in pieces)
            assert 300_000 <= size < 300_000 + len(PIECE) or taken + size == 3_000_000
            taken += size
            client.peer.notify(HTTP_BODY_TAKEN, HttpBodyTakenParams("r", U64(taken)))


async def test_one_connection_may_not_stream_without_bound(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_http, "MAX_STREAMS", 2)
    async with open_origin() as origin:
        for request_id in ("a", "b"):
            await client.request(origin.url("/held"), stream_response=True, request_id=request_id)
        with pytest.raises(InternalError, match="2 bodies are being streamed"):
            await client.request(origin.url("/held"), stream_response=True)
        assert (await client.request(origin.url("/echo"))).status == 200


async def test_one_connection_may_not_collect_bodies_without_bound(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_http, "MAX_BUFFERED", 100_000)
    async with open_origin() as origin:
        for _ in range(2):  # what was given up does not count any more
            with pytest.raises(InternalError, match="more than 100000 bytes; use streamResponse"):
                await client.request(origin.url("/bytes/200000"))
            assert len((await client.request(origin.url("/bytes/90000"))).body_base64) == 90_000


async def test_sessions_share_the_connections_of_the_server() -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_origin() as origin, open_local_sessions() as sessions:
            for _ in range(3):
                async with open_client(sessions) as client:
                    await client.request(origin.url("/echo"))
                    await client.request(origin.url("/chunked"), stream_response=True)
                    assert await client.body() == b"chunk0chunk1chunk2"
            assert (origin.connections, len(origin.received)) == (1, 6)


@pytest.mark.parametrize("request_id", ["r1", "", 'quote " and \n', "é"])
def test_pieces_are_encoded_as_their_class_would_be(request_id: str) -> None:
    template = codec.HttpDeltaTemplate(request_id)

    def encoded(*members: Any) -> bytes:
        params = codec.unstructure(HttpBodyDeltaParams(request_id, *members))
        return codec.encode_notification(HTTP_BODY_DELTA.name, params)

    assert b"".join(template.encode(7, b"data")) == encoded(7, b"data")
    assert template.encode_end(8, None) == encoded(8, b"", True)
    assert template.encode_end(9, 'so "it" is') == encoded(9, b"", True, 'so "it" is')


@pytest.mark.parametrize(
    "size", [0, 1, 2, 3, server_http.BLOCK, server_http.BLOCK + 1, 2 * server_http.BLOCK]
)
async def test_long_answers_are_the_same_in_pieces(size: int) -> None:
    headers = [{"name": "a", "value": "1"}]
    body = random.Random(size).randbytes(size)
    parts = b"".join(
        [part async for part in server_http._result_parts(200, headers, bytearray(body), lambda: None)]
    )
    expected = HttpRequestResult(200, (HttpHeader("a", "1"),), Base64(body))
    assert codec.structure(orjson.loads(parts), HttpRequestResult) == expected
    whole = orjson.loads(codec.encode_result(1, codec.http_result(200, headers, body)))
    assert codec.structure(whole["result"], HttpRequestResult) == expected


# Giving up.


@pytest.mark.parametrize("kind", ["local", "memory", "websocket"])
async def test_what_is_not_wanted_any_more_is_given_up(kind: str, websocket_server: WebsocketServer) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_origin() as origin, open_kind(kind, websocket_server.url) as environment:
            async with environment.http.stream("GET", origin.url("/held")) as response:
                origin.send_held(b"one")
                assert await response.receive() == b"one"
            await origin.wait_until(lambda: origin.left == 1)
            for number, streamed in ((2, False), (3, True)):
                async with trio.open_nursery() as nursery:
                    http = environment.http

                    async def ask(http: Http, streamed: bool) -> None:
                        if not streamed:
                            await http.request("GET", origin.url("/silent"))
                        async with http.stream("GET", origin.url("/silent")):
                            raise AssertionError("it never answers")

                    nursery.start_soon(ask, http, streamed)
                    await origin.wait_until(lambda: len(origin.received) == number)  # noqa: B023
                    nursery.cancel_scope.cancel()
                await origin.wait_until(lambda: origin.left == number)  # noqa: B023


# Slow readers.


async def test_slow_reader_holds_back_its_own_stream_and_loses_nothing() -> None:
    size = 64 * 1024 * 1024
    with trio.fail_after(TIME_LIMIT):
        async with (
            open_origin() as origin,
            open_memory() as (environment, _),
            environment.http.stream("GET", origin.url(f"/bytes/{size}")) as slow,
        ):
            assert await slow.receive()
            for _ in range(3):
                async with environment.http.stream("GET", origin.url("/bytes/8000000")) as fast:
                    assert len(await fast.read()) == 8_000_000
            await wait_all_tasks_blocked(0.05)
            sent = origin.sent - 3 * 8_000_000
            assert sent < remote_http.MAX_QUEUED  # and what the sockets take, far less than all
            assert len(PIECE) < sent
            rest = await slow.read()
            assert rest.endswith(PIECE[-1000:])
            assert size - len(PIECE) <= len(rest) < size


class PushingServer:
    """A server of another make: no capabilities, and `push` sends pieces that nobody asked for."""

    def __init__(self) -> None:
        self.ours, theirs = memory_pair()
        self.capabilities: dict[str, bool] = {}
        self.asked: list[HttpRequestParams] = []
        self.peer = Peer(
            theirs,
            [Route(INITIALIZE, self._initialize), Route(HTTP_REQUEST, self._request)],
            {INITIALIZED.name: lambda _: None},
        )

    def _initialize(self, params: InitializeParams) -> InitializeResult:
        return InitializeResult(
            "session", EnvironmentInfo(Shell("sh", "/bin/sh"), capabilities=self.capabilities)
        )

    def _request(self, params: HttpRequestParams) -> Any:
        self.asked.append(params)
        if params.url.endswith("/silent"):
            return self._never_answer()
        return HttpRequestResult(200, (), Base64(b""))

    async def _never_answer(self) -> None:
        await trio.sleep_forever()

    def push(self, request_id: str, seq: int, data: bytes = b"", *, done: bool = False) -> None:
        self.peer.notify(HTTP_BODY_DELTA, HttpBodyDeltaParams(request_id, seq, Base64(data), done))


@asynccontextmanager
async def open_pushing() -> AsyncIterator[tuple[PushingServer, Environment]]:
    server = PushingServer()
    with trio.fail_after(TIME_LIMIT):
        async with open_peer(server.peer), open_remote(only(server.ours), "memory") as remote:
            yield server, Environment(remote)


async def test_reader_that_is_too_slow_for_a_pushing_server_fails_alone() -> None:
    async with open_pushing() as (server, environment):
        get = environment.http.stream
        async with get("GET", "http://h/slow") as slow, get("GET", "http://h/fast") as fast:
            assert [one.request_id for one in server.asked] == ["http-1", "http-2"]
            assert server.asked[0].body_window is None
            piece = bytes(1024 * 1024)
            for seq in range(1, 16):
                server.push("http-1", seq, piece)
            server.push("http-2", 1, b"first")
            server.push("http-1", 16, piece)  # 16 MiB, and some bytes of the other
            server.push("http-2", 2, b"second", done=True)
            assert await fast.read() == b"firstsecond"
            with pytest.raises(HttpFailed, match="its reader was too slow: 16777216 bytes") as caught:
                await slow.receive()
            assert caught.value.kind == "body"
            server.push("http-1", 17, piece)  # of nobody any more
        async with get("GET", "http://h/again") as again:
            for seq in range(1, 16):
                server.push("http-3", seq, piece)
            server.push("http-3", 16, done=True)
            assert len(await again.read()) == 15 * len(piece)


@pytest.mark.parametrize("seq", [1, 3])
async def test_hole_or_repeat_in_a_body_fails_its_stream(seq: int) -> None:
    async with open_pushing() as (server, environment):
        get = environment.http.stream
        async with get("GET", "http://h/") as broken, get("GET", "http://h/") as whole:
            server.push("http-1", 1, b"one")
            server.push("http-1", seq, b"other")
            server.push("http-2", 1, b"whole", done=True)
            assert await whole.read() == b"whole"
            with pytest.raises(HttpFailed, match=f"has piece {seq} where 2 was expected"):
                await broken.read()


async def test_piece_that_is_too_large_ends_the_connection() -> None:
    async with (
        open_pushing() as (server, environment),
        environment.http.stream("GET", "http://h/") as response,
    ):
        server.push("http-1", 1, bytes(1024 * 1024 + 3))
        with pytest.raises(ConnectionLost, match="larger than 1048576 bytes"):
            await response.read()


async def test_lost_connection_ends_streams_and_requests_at_once() -> None:
    async with open_pushing() as (server, environment):

        async def ask() -> None:
            with pytest.raises(ConnectionLost):
                await environment.http.request("GET", "http://h/silent")

        get = environment.http.stream
        async with get("GET", "http://h/") as open_still, get("GET", "http://h/") as complete:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await wait_all_tasks_blocked()
                server.push("http-1", 1, b"queued")
                server.push("http-2", 1, b"all of it", done=True)
                await wait_all_tasks_blocked()
                server.ours.close_nowait()
            with pytest.raises(ConnectionLost):
                await open_still.receive()
            assert await complete.read() == b"all of it"
        with pytest.raises(ConnectionLost):
            async with get("GET", "http://h/"):
                pass


async def test_variable_is_not_asked_of_a_server_that_would_leave_it_out() -> None:
    async with open_pushing() as (server, environment):
        with pytest.raises(NotSupported, match="httpHeaderEnvVars"):
            await environment.http.request("GET", "http://h/", headers={"a": FromVariable("TOKEN")})
        assert server.asked == []


def test_windows_together_are_no_more_than_may_be_queued() -> None:
    client = remote_http.RemoteHttp(cast("Any", None))
    windows = [client._grant() for _ in range(20)]
    assert windows[0] == remote_http.MAX_QUEUED // 4
    assert windows == sorted(windows, reverse=True)
    assert (
        sum(windows) + 20 * remote_http.OVERSHOOT < remote_http.MAX_QUEUED + 10 * 2 * remote_http.LEAST_WINDOW
    )


# Secrets.


async def test_failures_are_logged_without_any_secret(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    secret: dict[str, Any] = {
        "headers": (HttpHeader("Authorization", SECRET),),
        "body_base64": Base64(SECRET.encode()),
        "method": "POST",
    }
    async with open_origin() as origin:
        for path in ("/hang-up", "/garbage", "/cut", "/redirects/11", "/echo"):
            url = origin.url(f"{path}?token={SECRET}#{SECRET}", host=f"u:{SECRET}@127.0.0.1")
            with suppress(InternalError):
                await client.request(url, request_id="id-1", **secret)
        with pytest.raises(InternalError):
            await client.request(origin.url("/silent"), request_id="id-2", timeout_ms=U64(50), **secret)
        await client.request(origin.url("/cut"), request_id="id-3", stream_response=True, **secret)
        assert not (await client.deltas.receive()).done
        assert (await client.deltas.receive()).error
    assert [record.getMessage() for record in caplog.records if record.name.startswith("execenv")] == [
        "http/request 'id-1' 'POST' failed: RemoteProtocolError",
        "http/request 'id-1' 'POST' failed: RemoteProtocolError",
        "http/request 'id-1' 'POST' failed: RemoteProtocolError",
        "http/request 'id-1' 'POST' failed: InternalError",
        "http/request 'id-2' 'POST' failed: TooSlowError",
        "http/request 'id-3' 'POST' failed: RemoteProtocolError",
    ]
    assert SECRET not in caplog.text


# Proxies.


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({}, "http://h/", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://h/", "http://p:1/"),
        ({"HTTP_PROXY": "http://p:1"}, "https://h/", None),
        ({"http_proxy": "p:1"}, "http://h/", "http://p:1/"),
        ({"HTTPS_PROXY": "https://p"}, "https://h/", "https://p/"),
        ({"https_proxy": "http://p", "ALL_PROXY": "http://q"}, "https://h/", "http://p/"),
        ({"HTTPS_PROXY": "http://p", "all_proxy": "http://q"}, "http://h/", "http://q/"),
        ({"HTTP_PROXY": "http://p", "REQUEST_METHOD": "GET"}, "http://h/", None),
        ({"http_proxy": "http://p", "REQUEST_METHOD": "GET"}, "http://h/", "http://p/"),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "x, h"}, "http://h/", None),
        ({"HTTP_PROXY": "http://p", "no_proxy": ".h"}, "http://a.H:81/", None),
        ({"HTTP_PROXY": "http://p", "no_proxy": "h"}, "http://ah/", "http://p/"),
        ({"HTTP_PROXY": "http://p", "no_proxy": "*"}, "http://h/", None),
        ({"HTTP_PROXY": "http://p", "no_proxy": "127.0.0.0/8"}, "http://127.1.2.3/", None),
        ({"HTTP_PROXY": "http://p", "no_proxy": "127.0.0.0/8"}, "http://128.1.2.3/", "http://p/"),
        ({"HTTP_PROXY": "http://p", "no_proxy": "[::1],1.2.3.4"}, "http://[::1]/", None),
        ({"HTTP_PROXY": " ", "NO_PROXY": ""}, "http://h/", None),
    ],
)
def test_proxy_is_that_of_the_variables(variables: dict[str, str], url: str, proxy: str | None) -> None:
    found = ProxyRules.from_environment(variables).proxy_for(parse_http_url(url))
    assert (None if found is None else found.text) == proxy


@pytest.mark.parametrize("proxy", [f"socks5://u:{SECRET}@p:1", f"http://u:{SECRET}@p:99999"])
def test_proxy_that_cannot_be_used_is_said_without_its_password(proxy: str) -> None:
    with pytest.raises(ProxyError, match=r"scheme socks5|invalid port") as caught:
        ProxyRules.from_environment({"ALL_PROXY": proxy}).proxy_for(parse_http_url("http://h/"))
    assert SECRET not in str(caught.value)


async def test_request_goes_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_origin() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url(host="u:p@127.0.0.1"))
        async with open_environment("local") as environment:
            response = await environment.http.request("GET", "http://else.invalid:81/echo?a=b")
        (received,) = proxy.received
    assert response.status == 200
    assert received.target == "http://else.invalid:81/echo?a=b"
    assert received.values("host") == ["else.invalid:81"]
    assert received.values("proxy-authorization") == ["Basic dTpw"]


async def test_proxy_that_cannot_be_used_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    async with open_environment("local") as environment:
        with pytest.raises(HttpFailed, match="no response") as caught:
            await environment.http.request("GET", "http://127.0.0.1:1/")
    assert "unsupported scheme socks5" in str(caught.value.__cause__)


# TLS.


async def test_certificates_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_origin(trustme.CA()) as origin, open_environment("local") as environment:
        with pytest.raises(HttpFailed, match="no response came"):
            await environment.http.request("GET", origin.url("/echo"))
        assert origin.received == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_certificates_of_the_variables_are_trusted(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    file = tmp_path / f"{_subject_hash(authority)}.0"
    authority.cert_pem.write_to_path(str(file))
    monkeypatch.setenv(variable, str(file if variable == "SSL_CERT_FILE" else tmp_path))
    async with open_origin(authority) as origin, open_environment("local") as environment:
        for host in ("127.0.0.1", "localhost"):
            assert (await environment.http.request("GET", origin.url("/echo", host=host))).status == 200
        async with environment.http.stream("GET", origin.url("/bytes/1000000")) as response:
            assert len(await response.read()) == 1_000_000
        with pytest.raises(HttpFailed):  # the certificate is for other names
            await environment.http.request("GET", origin.url("/echo", host="127.0.0.2"))


def _subject_hash(authority: trustme.CA) -> str:
    """What OpenSSL calls the file of a certificate in a folder."""
    text = authority.cert_pem.bytes()
    done = subprocess.run(["openssl", "x509", "-hash", "-noout"], input=text, capture_output=True, check=True)
    return done.stdout.decode().strip()


async def test_tls_goes_through_a_proxy_untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with open_origin() as proxy, open_origin(authority) as origin:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url())
        async with open_environment("local") as environment:
            assert (await environment.http.request("GET", origin.url("/echo"))).status == 200
        assert [one.method for one in proxy.received] == ["CONNECT"]
        assert proxy.received[0].target == f"127.0.0.1:{origin.port}"
        assert origin.received[0].target == "/echo"


# URLs.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h", "http://h/"),
        ("HTTP://H:80/A?B", "http://h/A?B"),
        ("https://h:443?x", "https://h/?x"),
        ("https://h:80/", "https://h:80/"),
        (" http://h/\n ", "http://h/"),
        ("http:\\\\h\\a\\b", "http://h/a/b"),
        ("http:/h/a", "http://h/a"),
        ("http://u:p@h/?a@b", "http://h/?a@b"),
        ("http://127.1:81/", "http://127.0.0.1:81/"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://[::0001]:81/", "http://[::1]:81/"),
        ("http://b\u00fccher.test/", "http://xn--bcher-kva.test/"),
        ("http://ex%41mple.test/", "http://example.test/"),
        ("http://h/a/../b/./c/%2E%2e/d", "http://h/b/d"),
        ("http://h/a/..", "http://h/"),
        ("http://h/a/.", "http://h/a/"),
        ("http://h/a b\u00e9%zz|", "http://h/a%20b%C3%A9%zz|"),
        ("http://h/?a b'\u00e9#f", "http://h/?a%20b%27%C3%A9"),
        ("http://h/?", "http://h/?"),
        ("http://h//a//", "http://h//a//"),
    ],
)
def test_url_is_read_as_browsers_read_it(text: str, expected: str) -> None:
    assert parse_http_url(text).text == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "relative URL without a base"),
        ("/x", "relative URL without a base"),
        ("//h/x", "relative URL without a base"),
        ("http://", "empty host"),
        ("http://:80/", "empty host"),
        ("http://u@/", "empty host"),
        ("http://h:99999/", "invalid port number"),
        ("http://h:8x/", "invalid port number"),
        ("http://[::1", "invalid IPv6 address"),
        ("http://[::1]x/", "invalid IPv6 address"),
        ("http://[fe80::1%25eth0]/", "invalid IPv6 address"),
        ("http://1.2.3.400/", "invalid IPv4 address"),
        ("http://a b/", "invalid international domain name"),
        ("http://xn--a/", "invalid international domain name"),
        ("http://%ff/", "invalid international domain name"),
    ],
)
def test_url_that_is_none_is_refused_in_the_words_of_the_reference(text: str, reason: str) -> None:
    with pytest.raises(UrlError, match=f"^{reason}$"):
        parse_http_url(text)


def test_url_of_something_else_is_another_matter() -> None:
    with pytest.raises(UnsupportedScheme) as caught:
        parse_http_url("MAILTO:somebody")
    assert caught.value.scheme == "mailto"


def test_url_is_shown_without_secrets() -> None:
    url = parse_http_url(f"https://u:{SECRET}@h:81/a?b={SECRET}#{SECRET}")
    assert url == HttpUrl("https", "h", 81, f"/a?b={SECRET}", (b"u", SECRET.encode()))
    assert url.shown == "https://h:81/a"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/x", "http://h:81/x"),
        ("x?y", "http://h:81/a/x?y"),
        ("../x", "http://h:81/x"),
        ("?y", "http://h:81/a/b?y"),
        ("#f", "http://h:81/a/b?q"),
        ("//other/x", "http://other/x"),
        ("https://u:p@h/", "https://h/"),
    ],
)
def test_location_is_taken_from_where_it_was_said(location: str, expected: str) -> None:
    joined = parse_http_url("http://u:p@h:81/a/b?q").join(location)
    assert (joined.text, joined.credentials) == (expected, None)


# Connections.


async def test_answer_before_the_whole_request_was_read_is_the_response() -> None:
    body = bytes(8 * 1024 * 1024)

    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
            async for _ in stream:  # a reset would take the answer with it
                pass

    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, refuse, [listener])
        async with open_environment("local") as environment:
            url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
            response = await environment.http.request("POST", url, body=body)
            assert (response.status, response.body) == (413, b"big")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nnot HTTP", 101, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok and more", 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n", 200, b""),
    ],
)
async def test_unusual_answers_are_understood(answer: bytes, status: int, body: bytes) -> None:
    async with open_answering(answer) as url, open_environment("local") as environment:
        upgrade = {"Upgrade": "x"}
        for _ in range(2):  # the second time the connection of the first is gone, or about to go
            response = await environment.http.request("GET", url, headers=upgrade, timeout=TIME_LIMIT)
            assert (response.status, response.body) == (status, body)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
    ],
)
async def test_answers_that_are_none_are_failures(answer: bytes) -> None:
    async with open_answering(answer) as url, open_environment("local") as environment:
        with pytest.raises(HttpFailed, match="no response came") as caught:
            await environment.http.request("GET", url, timeout=TIME_LIMIT)
        assert caught.value.kind == "request"


@asynccontextmanager
async def open_answering(answer: bytes) -> AsyncIterator[str]:
    """The URL of a server that says this to everybody, and ends the connection."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            with suppress(trio.BrokenResourceError):  # who has seen that it is none need not read it all
                await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("url", ["http://" + "a" * 70 + "/", "http://.h/", "https://.h/", "http://[::1]:1/"])
async def test_host_that_cannot_be_reached_is_a_failure(url: str) -> None:
    async with open_environment("local") as environment:
        with pytest.raises(HttpFailed, match="no response came"):
            await environment.http.request("GET", url, timeout=TIME_LIMIT)


async def test_what_is_behind_a_connect_is_not_a_body() -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\ntunnelled"
    async with open_answering(answer) as url, open_environment("local") as environment:
        response = await environment.http.request("CONNECT", url)
    assert (response.status, response.body) == (200, b"")


async def test_connection_that_its_server_has_ended_is_not_used_again() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with open_answering(answer) as url, open_environment("local") as environment:
        for _ in range(5):
            assert (await environment.http.request("POST", url, body=b"x")).body == b"ok"
            await wait_all_tasks_blocked()


@pytest.mark.parametrize(("method", "times"), [("GET", 2), ("POST", 1)])
async def test_request_is_sent_again_only_if_twice_is_as_good_as_once(method: str, times: int) -> None:
    served = 0

    async def serve(stream: trio.SocketStream) -> None:
        """Answer once, and end the connection when the second request has come."""
        nonlocal served
        async with stream:
            for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""):
                served += bool(await stream.receive_some())  # nothing: the client is done
                if answer:
                    await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        async with open_environment("local") as environment:
            assert (await environment.http.request(method, url)).status == 200
            assert served == 1
            if method == "GET":
                assert (await environment.http.request(method, url)).status == 200
            else:
                with pytest.raises(HttpFailed, match="no response came"):
                    await environment.http.request(method, url)
        assert served == 1 + times
        nursery.cancel_scope.cancel()


async def test_closed_environment_makes_no_requests() -> None:
    async with open_environment("local") as environment:
        pass
    with pytest.raises(ConnectionLost, match="closed"):
        await environment.http.request("GET", "http://127.0.0.1:1/")


async def test_body_of_tiny_chunks_gives_others_their_turns() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n"
    async with (
        open_answering(answer) as url,
        open_environment("local") as environment,
        environment.http.stream("GET", url) as response,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(count)
        assert await response.read() == b"x" * 5000
        nursery.cancel_scope.cancel()
    assert turns > 5000 // 20
