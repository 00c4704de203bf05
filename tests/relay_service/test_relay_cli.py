"""`execenv relay` as programs of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from attrs import define

from execenv.relay import frames
from execenv.relay.frames import Frame, Resume
from execenv.transports import websocket
from tests.relay_service.redis_server import RedisServer
from tests.relay_service.relays import ask, head

COMMAND = (sys.executable, "-m", "execenv", "relay")
TOKEN = re.compile(r"exr_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n")


def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=None if env is None else {**os.environ, **env},
    )


def new_token(store: Path, role: str, *more: str) -> str:
    done = run("token", "create", "--environment", "box", "--role", role, "--store", str(store), *more)
    assert (done.returncode, done.stderr) == (0, "")
    assert TOKEN.fullmatch(done.stdout)
    return done.stdout.strip()


@define
class Server:
    """A relay that runs."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def ask(self, operation: str, token: str, body: object = None) -> dict[str, str]:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {token}", "content-length": str(len(data))}
        reply = await ask(self.port, head("POST", f"/cloud/environment/box/{operation}", headers) + data)
        assert reply.status == 200, reply
        answer: dict[str, str] = reply.json
        return answer

    def end(self) -> tuple[int, str]:
        """Its status and what it wrote to stderr, after a SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@contextmanager
def serving(*words: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    process = subprocess.Popen(
        [*COMMAND, "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=None if env is None else {**os.environ, **env},
    )
    assert process.stdout is not None
    try:
        yield Server(process, process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


async def test_relay_serves_executors_and_harnesses_until_sigterm(tmp_path: Path) -> None:
    store, audit = tmp_path / "state" / "relay.sqlite3", tmp_path / "audit.jsonl"
    executor_token, harness_token = new_token(store, "executor"), new_token(store, "harness")
    codes = []

    async def run_channel(channel: websocket.WebsocketChannel, send: trio.MemorySendChannel[bytes]) -> None:
        await channel.run(send.send_nowait)
        codes.append(channel.close_code)

    words = ("--store", str(store), "--audit-log", str(audit), "--debug")
    with trio.fail_after(60), serving(*words) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.url)
        executor_url = (await server.ask("register", executor_token))["url"]
        assert executor_url.startswith(f"ws://127.0.0.1:{server.port}/rendezvous/box?")
        async with trio.open_nursery() as nursery:
            send, arrived = trio.open_memory_channel[bytes](10)
            executor = await websocket.connect(executor_url, binary=True)
            nursery.start_soon(run_channel, executor, send)
            harness_url = (await server.ask("connect", harness_token, {}))["url"]
            harness = await websocket.connect(harness_url, binary=True)
            nursery.start_soon(run_channel, harness, send)
            frame = frames.encode(Frame("s", Resume()))
            harness.send_nowait(frame)
            assert await arrived.receive() == frame
            status, errors = await trio.to_thread.run_sync(server.end)
        assert status == 0
        assert codes == [1012, 1012]
    events = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["event"] for line in events] == [
        "request",
        "connect",
        "request",
        "connect",
        "disconnect",
        "disconnect",
    ]
    assert stat.S_IMODE(audit.stat().st_mode) == stat.S_IMODE(store.stat().st_mode) == 0o600
    written = errors + audit.read_text()
    for secret in (
        executor_token,
        harness_token,
        executor_url.partition("?")[2],
        harness_url.partition("?")[2],
    ):
        assert secret not in written
        assert secret.rpartition("=")[2].rpartition("_")[2] not in written


async def test_audit_log_is_on_stderr_without_a_file(tmp_path: Path) -> None:
    with trio.fail_after(60), serving("--store", str(tmp_path / "relay.sqlite3")) as server:
        await ask(server.port, head("POST", "/cloud/environment/box/register", {"content-length": "0"}))
        status, errors = server.end()
    assert status == 0
    (line,) = errors.splitlines()
    event = json.loads(line)
    assert (event["event"], event["reason"], event["environment"]) == ("refusal", "not_authenticated", "box")
    assert abs(event["time"] - time.time()) < 60


async def test_token_that_is_revoked_by_another_program_ends_its_socket_within_5_seconds(
    tmp_path: Path,
) -> None:
    store = tmp_path / "relay.sqlite3"
    token = new_token(store, "executor")
    with trio.fail_after(60), serving("--store", str(store)) as server:
        channel = await websocket.connect((await server.ask("register", token))["url"], binary=True)
        done = await trio.to_thread.run_sync(
            run, "token", "revoke", token.split("_")[1], "--store", str(store)
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        began = trio.current_time()
        await channel.run(lambda message: None)
        assert channel.close_code == 1008
        assert trio.current_time() - began < 5


async def test_options_of_serve_are_obeyed(tmp_path: Path) -> None:
    store = tmp_path / "relay.sqlite3"
    token = new_token(store, "executor")
    words = (
        "--store",
        str(store),
        "--require-noise",
        "--public-url",
        "https://relay.example.com",
        "--public-metrics",
    )
    with trio.fail_after(60), serving("--listen", "http://[::1]:0", *words) as server:
        assert server.url.startswith("http://[::1]:")
        async with await trio.open_tcp_stream("::1", server.port) as stream:
            headers = {"authorization": f"Bearer {token}", "content-length": "0"}
            await stream.send_all(head("POST", "/cloud/environment/box/register", headers))
            assert b"clear_text_refused" in await stream.receive_some()


async def test_two_nodes_share_a_redis_whose_url_is_in_no_argument(
    redis: RedisServer, tmp_path: Path
) -> None:
    env = {"EXECENV_REDIS_URL": redis.url}
    file = tmp_path / "url"
    file.write_text(f"{redis.url}\n")
    tokens = [
        run("token", "create", "--environment", "box", "--role", role, env=env).stdout.strip()
        for role in ("executor", "harness")
    ]
    listed = json.loads(run("token", "list", "--json", "--redis-url-file", str(file)).stdout)
    assert [row["id"] for row in listed] == [token.split("_")[1] for token in tokens]
    with trio.fail_after(60), serving(env=env) as one, serving("--redis-url-file", str(file)) as other:
        async with trio.open_nursery() as nursery:
            send, arrived = trio.open_memory_channel[bytes](10)
            executor = await websocket.connect((await one.ask("register", tokens[0]))["url"], binary=True)
            nursery.start_soon(executor.run, send.send_nowait)
            url = (await other.ask("connect", tokens[1], {}))["url"]
            assert f":{other.port}/" in url
            harness = await websocket.connect(url, binary=True)
            nursery.start_soon(harness.run, send.send_nowait)
            frame = frames.encode(Frame("s", Resume()))
            harness.send_nowait(frame)
            assert await arrived.receive() == frame
            ends = [await trio.to_thread.run_sync(server.end) for server in (other, one)]
    assert [status for status, _ in ends] == [0, 0]


def test_tokens_are_listed_without_secrets_and_revoked(tmp_path: Path) -> None:
    store = tmp_path / "relay.sqlite3"
    before = time.time()
    token = new_token(store, "executor", "--name", "mine", "--expires", "30d")
    other = new_token(store, "harness")
    done = run("token", "list", "--json", "--store", str(store))
    first, second = json.loads(done.stdout)
    assert (first["id"], first["environment"], first["role"], first["name"]) == (
        token.split("_")[1],
        "box",
        "executor",
        "mine",
    )
    assert first["expires"] == pytest.approx(first["created"] + 30 * 86400)
    assert before <= first["created"] <= time.time()
    assert second["expires"] is None
    table = run("token", "list", "--store", str(store)).stdout
    assert re.search(rf"{first['id']} +box +executor +mine +20\S+Z +20\S+Z\n", table)
    assert re.search(r" +never\n", table)
    for text in (done.stdout, table):
        assert token.split("_", 2)[2] not in text
    assert run("token", "revoke", token.split("_")[1], "--store", str(store)).returncode == 0
    left = json.loads(run("token", "list", "--json", "--store", str(store)).stdout)
    assert [row["id"] for row in left] == [other.split("_")[1]]
    again = run("token", "revoke", token.split("_")[1], "--store", str(store))
    assert again.returncode == 1
    assert again.stderr == "execenv: there is no token of that id: see execenv relay token list\n"


def test_store_is_in_the_folder_of_the_users_state_by_default(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    assert run("token", "create", "--environment", "*", "--role", "harness", env=env).returncode == 0
    assert stat.S_IMODE((tmp_path / "execenv" / "relay.sqlite3").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--listen", "http://0.0.0.0:0"], "add --public-url"),
        (["serve", "--listen", "http://0.0.0.0:0", "--public-url", "http://relay"], "should be https"),
        (["serve", "--public-url", "http://relay.example.com"], "should be https"),
        (["serve", "--public-url", "https://user@relay"], "takes https://HOST"),
        (["serve", "--public-url", "https://relay?x=1"], "takes https://HOST"),
        (["serve", "--public-url", "https://relay:port"], "takes https://HOST"),
        (["serve", "--public-url", "relay"], "takes https://HOST"),
        (["serve", "--listen", "ws://127.0.0.1:0"], "give http://IP:PORT"),
        (["serve", "--listen", "http://127.0.0.1:99999"], "give http://IP:PORT"),
        (
            ["serve", "--listen", "http://192.0.2.1:0", "--public-url", "https://r"],
            "cannot listen on http://",
        ),
        (["serve", "--audit-log", "/nonexistent/log"], "cannot write --audit-log"),
        (["serve", "--store", "/proc/none/relay.sqlite3"], "cannot be used"),
        (["serve", "--store", "a", "--redis-url-file", "b"], "exclude each other"),
        (["serve", "--redis-url-file", "/nonexistent"], "cannot read --redis-url-file"),
        (["token", "create", "--environment", "a/b", "--role", "harness"], "letters, digits"),
        (["token", "create", "--environment", "a", "--role", "harness", "--expires", "soon"], "30d"),
        (["token", "create", "--environment", "a", "--role", "harness", "--expires", "0d"], "30d"),
        (["token", "create", "--environment", "a", "--role", "root"], "root"),
        (["token", "create", "--environment", "a"], "--role"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(*words, env={"XDG_STATE_HOME": str(tmp_path)})
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("execenv: ")
    assert "internal error" not in done.stderr


def test_redis_that_is_not_there_is_said_and_is_no_internal_error(tmp_path: Path) -> None:
    pytest.importorskip("coredis")
    url_file = tmp_path / "redis-url"
    url_file.write_text("redis://127.0.0.1:1\n")
    for words in (["serve"], ["token", "list"]):
        done = run(*words, "--redis-url-file", str(url_file))
        assert (done.returncode, done.stdout) == (1, "")
        last = done.stderr.splitlines()[-1]
        assert last == "execenv: the store of the relay cannot be used: Redis: it cannot be reached"


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["token", "create", "--environment", "box", "--role", "harness"],
        ["token", "list"],
        ["token", "revoke", "0123456789abcdef"],
    ],
    ids=" ".join,
)
def test_every_command_without_protobuf_names_the_extra(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['google.protobuf.runtime_version'] = None; sys.modules['google'] = None;"
        "from execenv.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "relay", *words, "--store", str(tmp_path / "relay.sqlite3")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("protobuf is not installed, or too old: pip install 'execenv[relay]'\n")
    assert "internal error" not in done.stderr


def test_help_says_what_there_is() -> None:
    assert {"serve", "token"} <= set(run("--help").stdout.split()) | set(
        run("relay", "--help").stdout.split()
    )
    for command in (["serve"], ["token", "create"], ["token", "list"], ["token", "revoke"]):
        assert run(*command, "--help").returncode == 0
