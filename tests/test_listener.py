"""The front door of a server: HTTP by hand, bearer tokens, start and end of the process (protocol.md §1)."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from itertools import count
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from attrs import frozen

from execenv import Process, open_environment
from execenv.errors import ConnectFailed, UsageError
from execenv.server import listen, open_local_sessions
from execenv.server.auth import CapabilityToken, SignedToken, Unauthorized, authenticator
from execenv.server.listen import Listener
from tests.conftest import SERVE, WebsocketServer, run_websocket_server
from tests.fakes import Watched, python

TIME_LIMIT = 30.0
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The example of RFC 6455 section 1.3."""

UPGRADE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


@frozen
class Answer:
    """An HTTP response, and whether the server closed the connection behind it."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool


def head(line: str, headers: dict[str, str]) -> bytes:
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def ask(url: str, data: bytes, *, end: bool = False) -> Answer:
    """What is answered to these bytes; with `end`, nothing more is sent behind them."""
    host, _, port = url.removeprefix("ws://").rpartition(":")
    with closing(socket.create_connection((host, int(port)), TIME_LIMIT)) as sock:
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        while b"\r\n\r\n" not in received:
            piece = sock.recv(65536)
            assert piece, f"the connection was closed behind {received!r}"
            received += piece
        top, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = top.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        code = int(status.split()[1])
        closed = False
        while code != 101 and not closed:
            piece = sock.recv(65536)
            rest, closed = rest + piece, not piece
        return Answer(code, headers, rest, closed)


def without(headers: dict[str, str], *names: str, **others: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names} | others


@pytest.fixture(scope="module")
def url(websocket_server: WebsocketServer) -> str:
    return websocket_server.url


# The rows of §1.1.


@pytest.mark.parametrize(
    ("line", "headers", "status", "body", "allow"),
    [
        ("GET /readyz HTTP/1.1", {"Host": "x"}, 200, b"", None),
        ("HEAD /readyz HTTP/1.1", {"Host": "x"}, 200, b"", None),
        ("GET /readyz?now HTTP/1.1", {"Host": "x"}, 200, b"", None),
        ("GET /readyz HTTP/1.0", {}, 200, b"", None),
        ("POST /readyz HTTP/1.1", {"Host": "x", "Content-Length": "0"}, 405, b"", "GET,HEAD"),
        ("GET /healthz HTTP/1.1", {"Host": "x"}, 404, b"", None),
        ("GET /other HTTP/1.1", UPGRADE, 404, b"", None),
        ("GET //  HTTP/1.1".replace("  ", " "), UPGRADE, 404, b"", None),
        ("POST / HTTP/1.1", {"Host": "x", "Content-Length": "0"}, 405, b"Request method must be `GET`", None),
        ("POST / HTTP/1.1", UPGRADE, 405, b"Request method must be `GET`", None),
        ("HEAD / HTTP/1.1", {"Host": "x"}, 405, b"", None),
        ("GET / HTTP/1.1", {"Host": "x"}, 400, b"Connection header did not include 'upgrade'", None),
        (
            "GET / HTTP/1.1",
            without(UPGRADE, **{"Sec-WebSocket-Version": "8"}),
            400,
            b"`Sec-WebSocket-Version` header did not include '13'",
            None,
        ),
        (
            "GET / HTTP/1.1",
            without(UPGRADE, "Sec-WebSocket-Version"),
            400,
            b"`Sec-WebSocket-Version` header did not include '13'",
            None,
        ),
        (
            "GET / HTTP/1.1",
            without(UPGRADE, "Sec-WebSocket-Key"),
            400,
            b"`Sec-WebSocket-Key` header missing",
            None,
        ),
        (
            "GET / HTTP/1.1",
            without(UPGRADE, "Upgrade"),
            400,
            b"`Upgrade` header did not include 'websocket'",
            None,
        ),
        ("GET / HTTP/1.1", {**UPGRADE, "Origin": "http://localhost"}, 403, b"", None),
        ("GET / HTTP/1.1", {**UPGRADE, "Origin": ""}, 403, b"", None),
        ("GET / HTTP/1.1", {**UPGRADE, "oRiGiN": "null"}, 403, b"", None),
        ("GET /readyz HTTP/1.1", {"Host": "x", "Origin": "http://localhost"}, 403, b"", None),
        ("GET /readyz HTTP/1.1", {"Host": "x", "Origin": ""}, 403, b"", None),
        ("POST /other HTTP/1.1", {"Host": "x", "Content-Length": "0", "Origin": "x"}, 403, b"", None),
    ],
)
def test_request_that_is_no_upgrade_is_answered(
    url: str, line: str, headers: dict[str, str], status: int, body: bytes, allow: str | None
) -> None:
    answer = ask(url, head(line, headers))
    assert (answer.status, answer.body, answer.headers.get("allow")) == (status, body, allow)
    if not line.startswith("HEAD"):
        assert answer.headers["content-length"] == str(len(body))
    assert ("content-type" in answer.headers) == bool(body or line == "HEAD / HTTP/1.1")
    if body:
        assert answer.headers["content-type"].startswith("text/plain")
    assert answer.closed


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\x16\x03\x01 no http at all\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nbroken header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"x" * 100_000,
    ],
    ids=["bytes", "words", "header", "two-hosts", "no-host", "endless"],
)
def test_what_is_no_http_is_a_bad_request(url: str, data: bytes) -> None:
    answer = ask(url, data)
    assert (answer.status, answer.body) == (400, b"")
    assert answer.closed


def test_head_that_is_cut_off_is_a_bad_request(url: str) -> None:
    assert ask(url, b"GET / HTTP/1.1\r\nHost:", end=True).status == 400


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"},
        {"Sec-WebSocket-Protocol": "chat, superchat"},
        {"Authorization": "Bearer whatever"},
        {"Host": "evil.example"},
        {"Connection": "keep-alive, Upgrade"},
        {"Upgrade": "WebSocket"},
    ],
    ids=["plain", "deflate", "protocol", "authorization", "host", "keep-alive", "case"],
)
def test_upgrade_takes_no_extension_and_no_protocol(url: str, more: dict[str, str]) -> None:
    answer = ask(url, head("GET / HTTP/1.1", {**UPGRADE, **more}))
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == ACCEPT
    assert answer.headers["upgrade"].lower() == "websocket"
    assert answer.headers["connection"].lower() == "upgrade"
    assert not {"sec-websocket-extensions", "sec-websocket-protocol", "origin"} & set(answer.headers)


def test_upgrade_with_a_query_is_an_upgrade(url: str) -> None:
    assert ask(url, head("GET /?a=b HTTP/1.1", UPGRADE)).status == 101


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        ("GET / HTTP/1.0", UPGRADE),
        ("GET / HTTP/1.1", {**UPGRADE, "Sec-WebSocket-Key": "short"}),
        ("GET / HTTP/1.1", {**UPGRADE, "Sec-WebSocket-Key": ""}),
    ],
    ids=["http-1.0", "short-key", "empty-key"],
)
def test_odd_upgrade_is_answered_and_not_dropped(url: str, line: str, headers: dict[str, str]) -> None:
    answer = ask(url, head(line, headers))
    assert answer.status in (101, 400)


def test_message_may_come_with_the_upgrade(url: str) -> None:
    frame = b"\x81\x82\x00\x00\x00\x00[]"
    with closing(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), TIME_LIMIT)) as sock:
        sock.sendall(head("GET / HTTP/1.1", UPGRADE) + frame)
        received = b""
        while b"expected a JSON-RPC object" not in received:
            piece = sock.recv(65536)
            assert piece
            received += piece


def test_head_may_come_in_pieces(url: str) -> None:
    with closing(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), TIME_LIMIT)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head("GET / HTTP/1.1", UPGRADE):
            sock.sendall(bytes([byte]))
        assert sock.recv(12) == b"HTTP/1.1 101"


# In this process, to reach the deadlines.


@asynccontextmanager
async def listening(**options: Any) -> AsyncIterator[str]:
    with trio.fail_after(TIME_LIMIT):
        async with open_local_sessions() as sessions, trio.open_nursery() as nursery:
            sockets = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(Listener(sessions, **options).serve, sockets)
            yield f"ws://127.0.0.1:{sockets[0].socket.getsockname()[1]}"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"], ids=["silent", "half-a-head"])
async def test_client_that_does_not_say_what_it_wants_is_dropped(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "HEAD_DEADLINE", 0.1)
    async with listening() as url:
        stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
        async with stream:
            if data:
                await stream.send_all(data)
            assert await stream.receive_some() == b""
        async with open_environment(url) as environment:  # others are served
            assert await environment.info()


async def test_client_that_resets_in_its_head_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as url:
        for data in (b"", b"GET /", head("GET / HTTP/1.1", UPGRADE)):
            stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
            if data:
                await stream.send_all(data)
            await stream.aclose()
        async with open_environment(url) as environment:
            assert await environment.info()
    assert caplog.records == []


# Bearer tokens (§1.2).

TOKEN = "a token that nobody guesses"
SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "secret").write_bytes(SECRET + b"\n")
    (folder / "short").write_bytes(SECRET[:-1])
    (folder / "empty").write_bytes(b"\n")
    return folder


@pytest.fixture(scope="module")
def guarded(secrets: Path) -> Iterator[str]:
    """A server that wants the token."""
    options = ["--ws-auth", "capability-token", "--ws-token-file", str(secrets / "token")]
    with subprocess.Popen([*SERVE, "ws://127.0.0.1:0", *options], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (None, b"missing websocket bearer token"),
        ("Basic abc", b"invalid authorization header"),
        ("Bearer", b"invalid authorization header"),
        ("Bearer  ", b"invalid authorization header"),
        (TOKEN, b"invalid authorization header"),
        ("Bearer wrong", b"invalid websocket bearer token"),
        (f"Bearer {TOKEN}x", b"invalid websocket bearer token"),
    ],
)
def test_wrong_token_is_refused_before_the_upgrade(guarded: str, header: str | None, body: bytes) -> None:
    headers = UPGRADE if header is None else {**UPGRADE, "Authorization": header}
    answer = ask(guarded, head("GET / HTTP/1.1", headers))
    assert (answer.status, answer.body) == (401, body)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.closed


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER    {TOKEN}"])
def test_right_token_is_let_in(guarded: str, header: str) -> None:
    assert ask(guarded, head("GET / HTTP/1.1", {**UPGRADE, "Authorization": header})).status == 101


def test_readyz_needs_no_token(guarded: str) -> None:
    assert ask(guarded, head("GET /readyz HTTP/1.1", {"Host": "x"})).status == 200


def test_origin_is_refused_whatever_the_token(guarded: str) -> None:
    headers = {**UPGRADE, "Authorization": f"Bearer {TOKEN}", "Origin": "http://x"}
    assert ask(guarded, head("GET / HTTP/1.1", headers)).status == 403


async def test_client_passes_its_token_and_reports_a_refusal_without_it(guarded: str) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(guarded, bearer_token=TOKEN) as environment:
            assert await environment.info()
        with pytest.raises(ConnectFailed, match="401: invalid websocket bearer token") as failed:
            async with open_environment(guarded, bearer_token="a wrong one"):
                raise AssertionError
    assert "a wrong one" not in str(failed.value)


async def test_token_may_be_known_by_its_hash_only() -> None:
    auth = authenticator("capability-token", token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest().upper())
    async with listening(auth=auth) as url:
        async with open_environment(url, bearer_token=TOKEN) as environment:
            assert await environment.info()
        with pytest.raises(ConnectFailed, match="401: missing websocket bearer token"):
            async with open_environment(url):
                raise AssertionError


def token(secret: bytes = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    return jwt.encode({"exp": time.time() + 3600, **claims}, secret, algorithm)


def without_exp() -> str:
    return jwt.encode({"sub": "x"}, SECRET, "HS256")


SIGNED = SignedToken(SECRET)
OF_ISSUER = SignedToken(SECRET, issuer="us", audience="them")
NOW = time.time()


@pytest.mark.parametrize(
    ("auth", "given", "body"),
    [
        (SIGNED, "not.a.jwt", "invalid websocket jwt"),
        (SIGNED, "x", "invalid websocket jwt"),
        (SIGNED, token(b"another secret that is 32 bytes!"), "invalid websocket jwt"),
        (SIGNED, token(SECRET * 2, "HS512"), "invalid websocket jwt"),
        (SIGNED, jwt.encode({"exp": NOW + 3600}, "", "none"), "invalid websocket jwt"),
        (SIGNED, without_exp(), "invalid websocket jwt"),
        (SIGNED, token(exp="soon"), "invalid websocket jwt"),
        (SIGNED, token(exp=NOW - 3600), "expired websocket jwt"),
        (SIGNED, token(nbf=NOW + 3600), "websocket jwt is not valid yet"),
        (OF_ISSUER, token(iss="others", aud="them"), "websocket jwt issuer mismatch"),
        (OF_ISSUER, token(aud="them"), "websocket jwt issuer mismatch"),
        (OF_ISSUER, token(iss="us", aud="others"), "websocket jwt audience mismatch"),
        (OF_ISSUER, token(iss="us", aud=["others", "more"]), "websocket jwt audience mismatch"),
        (OF_ISSUER, token(iss="us"), "websocket jwt audience mismatch"),
    ],
    ids=count(),  # the tokens tell the time
)
def test_wrong_jwt_is_refused_with_the_reason(auth: SignedToken, given: str, body: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        auth.check_header(f"Bearer {given}".encode())
    assert str(refused.value) == body


@pytest.mark.parametrize(
    ("auth", "given"),
    [
        (SIGNED, token()),
        (SIGNED, token(iss="anybody", aud="anybody", iat=NOW + 9999, sub=5, jti=7)),
        (OF_ISSUER, token(iss="us", aud="them")),
        (OF_ISSUER, token(iss="us", aud=["others", "them"])),
    ],
)
def test_right_jwt_is_let_in(auth: SignedToken, given: str) -> None:
    auth.check_header(f"bearer   {given}".encode())


@pytest.mark.parametrize("skew", [30.0, 300.0])
def test_clocks_may_be_apart_by_the_skew(skew: float) -> None:
    auth = SignedToken(SECRET, clock_skew=skew)
    auth.check(token(exp=time.time() - skew + 10))
    auth.check(token(nbf=time.time() + skew - 10))
    with pytest.raises(Unauthorized, match="expired"):
        auth.check(token(exp=time.time() - skew - 10))
    with pytest.raises(Unauthorized, match="not valid yet"):
        auth.check(token(nbf=time.time() + skew + 10))


async def test_signed_token_opens_the_websocket(secrets: Path) -> None:
    auth = authenticator("signed-bearer-token", shared_secret_file=str(secrets / "secret"), issuer="us")
    async with listening(auth=auth) as url:
        async with open_environment(url, bearer_token=token(iss="us")) as environment:
            assert await environment.info()
        with pytest.raises(ConnectFailed, match="401: expired websocket jwt"):
            async with open_environment(url, bearer_token=token(iss="us", exp=NOW - 3600)):
                raise AssertionError


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        (None, {"token_file": "token"}, "--ws-token-file needs --ws-auth capability-token"),
        (
            None,
            {"shared_secret_file": "secret"},
            "--ws-shared-secret-file needs --ws-auth signed-bearer-token",
        ),
        (None, {"clock_skew": 0.0}, "--ws-max-clock-skew-seconds needs --ws-auth"),
        ("capability-token", {}, "exactly one of"),
        ("capability-token", {"token_file": "token", "token_sha256": "0" * 64}, "exactly one of"),
        ("capability-token", {"token_file": "token", "issuer": "x"}, "--ws-issuer needs"),
        ("capability-token", {"token_file": "empty"}, "is empty"),
        ("capability-token", {"token_file": "nowhere"}, "nowhere: No such file"),
        ("capability-token", {"token_sha256": "abc"}, "64 hexadecimal digits"),
        ("capability-token", {"token_sha256": "z" * 64}, "64 hexadecimal digits"),
        ("signed-bearer-token", {}, "--ws-shared-secret-file"),
        ("signed-bearer-token", {"shared_secret_file": "short"}, "at least 32 bytes"),
        ("signed-bearer-token", {"shared_secret_file": "nowhere"}, "nowhere: No such file"),
        (
            "signed-bearer-token",
            {"shared_secret_file": "secret", "token_file": "token"},
            "--ws-token-file needs",
        ),
    ],
)
def test_auth_options_that_do_not_fit_are_refused(
    secrets: Path, mode: str | None, options: dict[str, Any], words: str
) -> None:
    for name in ("token_file", "shared_secret_file"):
        if name in options:
            options = {**options, name: str(secrets / options[name])}
    with pytest.raises(UsageError) as refused:
        authenticator(mode, **options)
    assert words in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_token_is_read_without_its_line_end_and_with_all_else(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b" spaced token \r\n")
    CapabilityToken.from_file(str(tmp_path / "token")).check(" spaced token ")


# Starting (§1.2).


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--listen", "ws://127.0.0.1:0", "--ws-token-file", "x"], ["--ws-token-file", "--ws-auth"]),
        (["--listen", "ws://127.0.0.1:0", "--ws-issuer", "x"], ["--ws-issuer", "--ws-auth"]),
        (["--listen", "ws://127.0.0.1:0", "--ws-auth", "capability-token"], ["exactly one of"]),
        (["--listen", "ws://127.0.0.1:0", "--ws-auth", "signed-bearer-token"], ["--ws-shared-secret-file"]),
        (["--listen", "stdio", "--ws-token-sha256", "0" * 64], ["stdio"]),
        (["--listen", "ws://0.0.0.0:0"], ["--ws-auth", "127.0.0.1"]),
        (["--listen", "ws://[::]:0"], ["--ws-auth", "127.0.0.1"]),
    ],
)
def test_server_that_may_not_start_says_why_in_one_line(args: list[str], words: list[str]) -> None:
    done = subprocess.run([*SERVE[:-1], *args], capture_output=True, timeout=TIME_LIMIT, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert len(done.stderr.decode().splitlines()) == 1
    for word in words:
        assert word in done.stderr.decode()


def test_port_in_use_is_said_in_one_line(url: str) -> None:
    done = subprocess.run([*SERVE, url], capture_output=True, timeout=TIME_LIMIT, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert len(done.stderr.decode().splitlines()) == 1
    assert "in use" in done.stderr.decode()


def test_server_listens_elsewhere_with_a_token(secrets: Path) -> None:
    options = ["--ws-auth", "capability-token", "--ws-token-file", str(secrets / "token")]
    argv = [*SERVE, "ws://0.0.0.0:0", *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline().decode().strip()
            assert line.startswith("ws://0.0.0.0:")
            assert (
                ask(f"ws://127.0.0.1:{line.rpartition(':')[2]}", head("GET / HTTP/1.1", UPGRADE)).status
                == 401
            )
        finally:
            process.terminate()
        assert process.wait(TIME_LIMIT) == 0


# Ending.

FAMILY = """
    import os, signal, subprocess, sys
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"])
    escaped = subprocess.Popen(["sh", "-c", "trap '' HUP TERM INT; setsid sleep 1000 & echo $!; wait"],
        stdout=subprocess.PIPE, start_new_session=True)
    print(os.getpid(), child.pid, escaped.pid, int(escaped.stdout.readline()), flush=True)
    signal.pause()
"""
"""A program that ignores what it can, with a child, a child in another session, and its orphan in a third."""


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.close()


async def start_families(url: str, watched: Watched, task_status: trio.TaskStatus[None]) -> None:
    """One family on pipes and one on a terminal; then wait for the end of the connection."""
    async with (
        open_environment(url, recovery=0) as environment,
        environment.open_process(python(FAMILY)) as piped,
        environment.open_process(python(FAMILY), tty=True) as on_terminal,
    ):
        for process in (piped, on_terminal):
            for pid in (await first_line(process)).split():
                watched.add(int(pid))
        task_status.started()
        await trio.sleep_forever()


async def first_line(process: Process) -> bytes:
    line = b""
    async for piece in process:
        line += piece.data
        if b"\n" in line:
            break
    return line


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_end_of_the_server_is_the_end_of_all_it_started(
    signum: signal.Signals, watched: Watched
) -> None:
    with trio.fail_after(TIME_LIMIT), run_websocket_server() as server:
        async with trio.open_nursery() as nursery:
            await nursery.start(start_families, server.url, watched)
            assert len(watched.alive()) == 8
            server.process.send_signal(signum)
            if signum == signal.SIGKILL:
                assert await trio.to_thread.run_sync(server.process.wait) == -signal.SIGKILL
                await watched.wait_gone()
            else:
                assert await trio.to_thread.run_sync(server.process.wait) == 0
                assert watched.alive() == set()
            nursery.cancel_scope.cancel()
        server.log.seek(0)
        assert server.log.read() == b""


async def test_sessions_that_are_detached_end_with_the_server(watched: Watched) -> None:
    with trio.fail_after(TIME_LIMIT), run_websocket_server() as server:
        async with open_environment(server.url) as environment:
            await environment.start_detached("left", python(FAMILY))
            async with environment.attach("left") as process:
                for pid in (await first_line(process)).split():
                    watched.add(int(pid))
        assert len(watched.alive()) == 4
        server.process.terminate()
        assert await trio.to_thread.run_sync(server.process.wait) == 0
        assert watched.alive() == set()


def test_server_ends_with_connections_open() -> None:
    with run_websocket_server() as server:
        port = int(server.url.rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port), TIME_LIMIT)) as sock:
            sock.sendall(head("GET / HTTP/1.1", UPGRADE))
            assert sock.recv(12) == b"HTTP/1.1 101"
            with closing(socket.create_connection(("127.0.0.1", port), TIME_LIMIT)):
                os.kill(server.process.pid, signal.SIGTERM)
                assert server.process.wait(TIME_LIMIT) == 0
