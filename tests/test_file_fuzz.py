"""What the files of a server must bear (§5, §10): nonsense in every member, crowds, clients that die, files
that change. The server is a process of its own, looked at from outside (Linux)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import attrs
import pybase64
import pytest
from attrs import frozen

from execenv import codec
from execenv.server import filesystem
from tests.test_robustness import Client, Server

TIME_LIMIT = 20.0
MIB = 1024 * 1024
Json = Any

CODES = {-32600, -32601, -32602, -32603, -32004}
"""Those of §10 that may be said of files."""

SERVE_WITH_SHORT_LIVED_THREADS = """
import trio._core._thread_cache as cache
cache.IDLE_TIMEOUT = 0.05  # instead of 10 s, for tests that wait until no thread is left
from execenv.cli import main
main()
"""

SERVE_AS_IF_NO_FILE_WERE_LOCAL = """
import execenv.local.mounts
execenv.local.mounts.LOCAL_TYPES = frozenset()  # so that all is done in threads
"""

EMPTY = {"dataBase64": ""}


@frozen
class FileServer(Server):
    """`idle` descriptors are open while there is no client."""

    log: Path
    idle: int

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def is_idle(self) -> bool:
        return len(self.descriptors()) == self.idle and self.threads() == 1


@contextmanager
def run_server(log: Path, script: str) -> Iterator[FileServer]:
    """A server that forgets clients when they go, and ends well."""
    argv = [sys.executable, "-c", script]
    argv += ["serve", "--listen", "ws://127.0.0.1:0", "--detached-ttl", "0"]
    with log.open("wb") as stderr, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().decode().strip()
            server = Server(process.pid, int(url.rpartition(":")[2]), url)
            with closing(Client(server.port)) as client:  # what it opens for good is open then
                client.shake_hands()
                assert "result" in client.request("environment/info")
                assert "result" in client.request("fs/canonicalize", {"path": "file:///"})
                idle = len(server.descriptors()) - 1
            yield FileServer(server.pid, server.port, server.url, log, idle)
            process.terminate()
            assert process.wait(TIME_LIMIT) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    with run_server(tmp_path_factory.mktemp("server") / "log", SERVE_WITH_SHORT_LIVED_THREADS) as server:
        yield server


@pytest.fixture(scope="module", params=["at once", "in threads"])
def server_either_way(
    request: pytest.FixtureRequest, shared_server: FileServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FileServer]:
    """Servers that read and write at once, and in threads, which end in any order."""
    if request.param == "at once":
        yield shared_server
        return
    script = SERVE_AS_IF_NO_FILE_WERE_LOCAL + SERVE_WITH_SHORT_LIVED_THREADS
    with run_server(tmp_path_factory.mktemp("threads") / "log", script) as server:
        yield server
        assert server.log.read_text() == ""


@pytest.fixture
def client_either_way(server_either_way: FileServer) -> Iterator[Client]:
    with closing(Client(server_either_way.port)) as client:
        client.shake_hands()
        yield client


@pytest.fixture
def server(shared_server: FileServer) -> Iterator[FileServer]:
    """A server without clients. It may log nothing, and nothing may be left when the last client is gone."""
    until(shared_server.is_idle)
    yield shared_server
    assert shared_server.log.read_text() == ""
    until(shared_server.is_idle)


@pytest.fixture
def client(server: FileServer) -> Iterator[Client]:
    with closing(Client(server.port)) as client:
        client.shake_hands()
        yield client


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with one of everything."""
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "directory" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def until(condition: Callable[[], bool]) -> None:
    """What the server does behind its answers; the time limit is the judge."""
    end = monotonic() + TIME_LIMIT
    while not condition():
        assert monotonic() < end
        sleep(0.01)


def request(id_: int, method: str, params: Json) -> bytes:
    return json.dumps({"id": id_, "method": method, "params": params}).encode()


def exchange(client: Client, requests: Sequence[tuple[str, Json]]) -> list[Json]:
    """Sends all at once; the replies, in the order of the requests."""
    client.send(*(request(number, *one) for number, one in enumerate(requests)))
    replies: dict[int, Json] = {}
    while len(replies) < len(requests):
        messages = client.take()
        assert messages, "the connection ended"
        for message in messages:
            reply = json.loads(message)
            if "id" in reply:
                assert reply["id"] not in replies
                replies[reply["id"]] = reply
    return [replies[number] for number in range(len(requests))]


def code_of(reply: Json) -> int | None:
    """`None` for a result."""
    assert set(reply) in ({"id", "result"}, {"id", "error"}), reply
    if "result" in reply:
        return None
    assert type(reply["error"]["message"]) is str
    code: int = reply["error"]["code"]
    return code


def content(reply: Json) -> bytes:
    assert "result" in reply, reply["error"]
    result = reply["result"]
    return b64decode(result["dataBase64"] if "dataBase64" in result else result["chunk"])


def uri(path: Path | str) -> str:
    return f"file://{path}"


# Nonsense. All paths lead into the directory of the test, or nowhere.


def valid_params(root: Path) -> dict[str, dict[str, Json]]:
    """Of every method, a request that can be answered; the names of members are in order."""
    file, links = uri(root / "file"), {"sandbox": None, "followSymlinks": None}
    walk = {"maxDepth": 3, "maxDirectories": 9, "maxEntries": 9, "followDirectorySymlinks": True}
    return {
        "fs/readFile": {"path": file, **links},
        "fs/writeFile": {"path": file, "dataBase64": "YWJj", **links},
        "fs/createDirectory": {"path": uri(root / "directory"), "recursive": True, **links},
        "fs/getMetadata": {"path": file, **links},
        "fs/canonicalize": {"path": file, **links},
        "fs/readDirectory": {"path": uri(root), **links},
        "fs/remove": {"path": uri(root / "gone"), "recursive": False, "force": True, **links},
        "fs/copy": {
            "sourcePath": file,
            "destinationPath": uri(root / "copied"),
            "recursive": False,
            "sandbox": None,
        },
        "fs/walk": {"path": uri(root), "options": walk, "sandbox": None},
        "fs/open": {"handleId": "new", "path": file, "sandbox": None, "mode": "read", "keep": False},
        "fs/readBlock": {"handleId": "h", "offset": 0, "len": 5},
        "fs/writeBlock": {"handleId": "w", "offset": 0, "chunk": "YWJj"},
        "fs/close": {"handleId": "none", "sync": False},
        "fs/watchMissing": {"watchId": 1, "missing": [uri(root / "missing")], "present": uri(root)},
        "fs/rename": {
            "sourcePath": uri(root / "copied"),
            "destinationPath": uri(root / "renamed"),
            "sandbox": None,
            "sync": False,
        },
        "fs/setMetadata": {"path": file, "mode": 0o644, "modifiedAtMs": 0, "sandbox": None},
    }


METHODS = sorted(method.name for method, _ in filesystem.ROUTES)
PATHS = ("path", "sourcePath", "destinationPath", "present", "missing")

ODD: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    -0.0,
    1e308,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63),
    10**40,
    "",
    "h",
    "x" * 33,
    "\u00e9" * 17,
    "x" * 100_000,
    "\x00",
    "\U0001f600",
    "replace",
    "!",
    "AB==",
    "AAAA" * 20_000 + "=",
    "A" * 1_398_104,
    [],
    [[]],
    [None],
    ["h", 0, 1],
    ["x"] * 2000,
    {},
    {"": None},
    {"permissions": {"type": "disabled"}},
    {"permissions": {"type": "readOnly"}},
    {"maxDepth": 2**64 - 1, "maxDirectories": 1, "maxEntries": 1, "followDirectorySymlinks": False},
)


def odd_paths(root: Path) -> list[str]:
    wrapped = [b"/a\0b", b"/tmp", b"relative", b"/C:/x", b"\xff" * 10, b"/" + b"\xff\0" * 1000]
    tokens = [urlsafe_b64encode(path).rstrip(b"=").decode() for path in wrapped]
    return [
        *(f"file:///%00/bad/path/{token}" for token in (*tokens, "L3RtcA==", "!!", "", "A" * 100_001)),
        *(
            uri(root / name)
            for name in ("link", "loop", "loop/x", "dangling", "fifo/x", "directory", "file/x")
        ),
        *(
            uri(root / name)
            for name in ("a%00b", "%FF%FE", "%2F", "x%0Ay", "directory/", "none/none", "~", "*")
        ),
        uri(root) + "/" + "long" * 250_000,
        uri(root) + "/d" * 100_000,
        uri(root / "directory") + "/./%2e/inner" * 10_000,
        uri(root) + "/%F0%9F%98%80" * 1000,
        uri(root) + "/x?query",
        uri(root) + "/x#fragment",
        "file:///C:/x",
        "file:///c%3A/x",
        "file://host/share",
        "file://127.0.0.1/x",
        "file://user@localhost:80/x",
        "http://x/",
        "codex:///x",
        "C:\\x",
        "\\\\host\\share",
        "no path",
        "~",
        "%",
        ":",
    ]


def with_one_thing_wrong(valid: dict[str, Json], paths: Sequence[str]) -> Iterator[Json]:
    for name in valid:
        yield {other: value for other, value in valid.items() if other != name}
        for odd in ODD:
            yield {**valid, name: odd}
        if name in PATHS:
            for path in paths:
                yield {**valid, name: [path] if name == "missing" else path}
    for name, inner in valid.items():
        if isinstance(inner, dict):
            for changed in with_one_thing_wrong(inner, ()):
                yield {**valid, name: changed}
    yield {**valid, "unknown": {"a": [1]}, "dataBase64 ": "x"}
    yield list(valid.values())
    yield list(valid.values())[:-1]
    yield [*valid.values(), None]
    yield from (None, 5, "x", [], {}, [valid], {"params": valid})


@pytest.mark.parametrize("method", METHODS)
def test_any_member_may_be_anything(method: str, root: Path, server: FileServer) -> None:
    valid = valid_params(root)
    with closing(Client(server.port)) as client:
        client.shake_hands()
        opened = exchange(
            client,
            [
                ("fs/open", {"handleId": "h", "path": uri(root / "file")}),
                ("fs/open", {"handleId": "w", "path": uri(root / "written"), "mode": "replace"}),
                ("fs/copy", valid["fs/copy"]),
            ],
        )
        assert [code_of(reply) for reply in opened] == [None, None, None]
        assert code_of(exchange(client, [(method, valid[method])])[0]) is None
        nonsense = list(with_one_thing_wrong(valid[method], odd_paths(root)))
        replies = exchange(client, [(method, params) for params in nonsense])
        codes = {code_of(reply) for reply in replies}
        assert codes <= {*CODES, None}
        assert -32602 in codes
        assert not [reply for reply in replies if reply.get("error", {}).get("message") == "internal error"]
        assert client.request("environment/status")["result"] == {"status": "ready"}
    until(server.is_idle)


def test_every_member_of_every_method_is_there(root: Path) -> None:
    valid = valid_params(root)
    assert sorted(valid) == METHODS
    for method, _ in filesystem.ROUTES:
        names = [codec.camel(field.name) for field in attrs.fields(method.params)]
        assert list(valid[method.name]) == names, method.name


@pytest.mark.parametrize("method", METHODS)
def test_malformed_sandbox_is_refused_and_nothing_done(method: str, root: Path, client: Client) -> None:
    valid = valid_params(root)
    if "sandbox" not in valid[method]:
        assert method in {"fs/readBlock", "fs/writeBlock", "fs/close", "fs/watchMissing"}
        return
    exchange(client, [("fs/copy", valid["fs/copy"])])

    def seen() -> list[tuple[str, bytes, int]]:
        files = [path for path in root.rglob("*") if path.is_file()]
        return sorted((str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files)

    before = seen()
    changed = (
        {**valid[method], "path": uri(root / "new")} if method == "fs/createDirectory" else valid[method]
    )
    for permissions in ({"type": "readOnly"}, {"type": "workspaceWrite"}, {"type": ""}, {}, None, "disabled"):
        reply = client.request(method, {**changed, "sandbox": {"permissions": permissions}})
        assert code_of(reply) == -32602
    malformed: Json
    for malformed in (1, "x", [], {}):
        assert code_of(client.request(method, {**changed, "sandbox": malformed})) == -32602
    assert seen() == before
    assert not (root / "new").exists()
    assert code_of(client.request("fs/readBlock", {"handleId": "new", "offset": 0, "len": 1})) == -32004
    unconfined = {
        **changed,
        "sandbox": {"permissions": {"type": "disabled"}, "windowsSandboxLevel": "disabled"},
    }
    assert code_of(client.request(method, unconfined)) is None


# Handles.


def test_only_128_files_may_be_open_at_once(root: Path, server: FileServer, client: Client) -> None:
    opens = [("fs/open", {"handleId": str(number), "path": uri(root / "file")}) for number in range(129)]
    *replies, last = exchange(client, opens)
    assert [reply["result"] for reply in replies] == [{"handleId": str(number)} for number in range(128)]
    assert last["error"] == {
        "code": -32600,
        "message": "at most 128 file handles may be open per connection",
    }
    assert len(server.descriptors()) == server.idle + 1 + 128
    closed, opened, again = exchange(
        client, [("fs/close", {"handleId": "5"}), opens[128], ("fs/open", opens[5][1])]
    )
    assert (code_of(closed), code_of(opened), code_of(again)) == (None, None, -32600)
    with closing(Client(server.port)) as other:  # the limit is that of a connection
        other.shake_hands()
        assert code_of(exchange(other, opens[:1])[0]) is None


def test_requests_of_a_handle_are_done_in_the_order_they_came(root: Path, client_either_way: Client) -> None:
    path, client = root / "file", client_either_way
    expected = path.read_bytes()
    requests: list[tuple[str, Json]] = []
    wanted: list[bytes | int | None] = []
    for turn in range(20):
        handle = {"handleId": f"h{turn % 3}"}
        requests.append(("fs/open", {**handle, "path": uri(path)}))
        wanted.append(None)
        for offset in random.Random(turn).sample(range(10), 5):
            requests.append(("fs/readBlock", {**handle, "offset": offset, "len": 4}))
            wanted.append(expected[offset : offset + 4])
        requests += [("fs/close", handle), ("fs/readBlock", {**handle, "offset": 0, "len": 1})]
        wanted += [None, -32004]
    replies = exchange(client, requests)
    came = [content(reply) if "chunk" in reply.get("result", ()) else code_of(reply) for reply in replies]
    assert came == wanted


def test_blocks_written_without_waiting_end_up_in_their_order(root: Path, client_either_way: Client) -> None:
    path, client = root / "written", client_either_way
    handle = {"handleId": "w"}

    def write(offset: int, text: bytes) -> tuple[str, Json]:
        return "fs/writeBlock", {**handle, "offset": offset, "chunk": pybase64.b64encode(text).decode()}

    first: list[tuple[str, Json]] = [
        ("fs/open", {**handle, "path": uri(path), "mode": "replace"}),
        *(write(0, b"%03d" % number * 1000) for number in range(200)),
        ("fs/close", {**handle, "sync": True}),
    ]
    assert {code_of(reply) for reply in exchange(client, first)} == {None}
    assert path.read_bytes() == b"199" * 1000
    second: list[tuple[str, Json]] = [
        ("fs/open", {**handle, "path": uri(path), "mode": "replace", "keep": True}),
        write(3, b"abc"),
        write(4, b"xyz"),
        ("fs/close", handle),
    ]
    assert {code_of(reply) for reply in exchange(client, second)} == {None}
    assert path.read_bytes() == b"199axyz" + (b"199" * 1000)[7:]


# Clients that die.


def test_client_that_is_gone_leaves_no_file_open(root: Path, server: FileServer) -> None:
    large = root / "large"
    with large.open("wb") as file:
        file.truncate(64 * MIB)
    for _ in range(3):
        with closing(Client(server.port)) as client:
            client.shake_hands()
            requests = [
                *(("fs/open", {"handleId": str(n), "path": uri(root / "file")}) for n in range(60)),
                *(("fs/open", {"handleId": f"p{n}", "path": "file:///proc/version"}) for n in range(60)),
                *(("fs/readBlock", {"handleId": f"p{n}", "offset": 0, "len": MIB}) for n in range(60)),
                *(("fs/readFile", {"path": uri(large)}) for _ in range(20)),
                *(("fs/copy", copy_of(large, root / f"copy{n}")) for n in range(4)),
                *(("fs/watchMissing", {"watchId": n, "missing": [uri(root / "no")]}) for n in range(20)),
                ("fs/writeFile", {"path": uri(root / "fifo"), **EMPTY}),  # which nobody reads
            ]
            client.send(*(request(number, *one) for number, one in enumerate(requests)))
            client.take()
            assert len(server.descriptors()) > server.idle + 1
    until(server.is_idle)


def copy_of(source: Path, destination: Path) -> Json:
    return {"sourcePath": uri(source), "destinationPath": uri(destination), "recursive": False}


# Crowds.


def test_hundreds_of_large_files_for_a_slow_client_cost_little(
    root: Path, server: FileServer, client: Client
) -> None:
    number = 500
    data = random.Random(1).randbytes(3 * MIB + 1)
    (root / "large").write_bytes(data)
    read = ("fs/readFile", {"path": uri(root / "large")})
    tail = b'{"dataBase64":"' + pybase64.b64encode(data) + b'"}}'
    client.request(*read)
    base = highest = server.rss()
    client.send(*(request(n, *read) for n in range(number)))
    with closing(Client(server.port)) as other:  # served meanwhile
        other.shake_hands()
        for _ in range(20):
            assert code_of(other.request("fs/getMetadata", {"path": uri(root / "file")})) is None
    heads: list[bytes] = []
    while len(heads) < number:
        messages = client.take(1 << 18)
        assert messages
        highest = max(highest, server.rss())
        for message in messages:
            assert message.endswith(tail)
            heads.append(message[: -len(tail)])
    assert sorted(heads) == sorted(b'{"id":%d,"result":' % n for n in range(number))
    assert highest - base < 64 * MIB


def test_watches_beyond_the_limit_are_declined_at_once_however_many_come(
    root: Path, server: FileServer, client: Client
) -> None:
    number = 600
    requests = [("fs/watchMissing", {"watchId": n, "missing": [uri(root / "new")]}) for n in range(number)]
    replies = exchange(client, requests)
    declined = [reply for reply in replies if reply.get("result") == {"watching": False}]
    # Of the others, the system may refuse some (fs.inotify.max_user_instances): others have their place then.
    refused = [reply for reply in replies if code_of(reply) is not None]
    assert {code_of(reply) for reply in refused} <= {-32603}
    most = number - filesystem.MAX_WATCHES
    assert most - len(refused) <= len(declined) <= most
    watching = [n for n, reply in enumerate(replies) if reply.get("result") == {"watching": True}]
    assert watching
    assert len(server.descriptors()) == server.idle + 1 + len(watching)
    (root / "new").touch()
    told: list[int] = []
    while len(told) < len(watching):
        told += [json.loads(message)["params"]["watchId"] for message in client.take()]
    assert sorted(told) == watching
    again = {"watchId": 0, "missing": [uri(root / "newer")]}
    assert client.request("fs/watchMissing", again)["result"] == {"watching": True}
    until(lambda: len(server.descriptors()) == server.idle + 2)


def test_watch_with_the_same_id_takes_the_place_of_the_one_before(
    root: Path, server: FileServer, client: Client
) -> None:
    names = [f"new{number}" for number in range(50)]
    requests = [("fs/watchMissing", {"watchId": 7, "missing": [uri(root / name)]}) for name in names]
    replies = exchange(client, requests)
    assert {code_of(reply) for reply in replies} == {None}
    assert replies[-1]["result"] == {"watching": True}
    for name in names:
        (root / name).touch()
    assert [json.loads(message)["params"] for message in client.take()] == [{"watchId": 7}]
    assert client.request("environment/status") is not None  # behind all that there is to tell
    assert len(server.descriptors()) == server.idle + 1
    assert client._messages == []


# Files that are not what they seem.


@pytest.mark.parametrize("size", [MIB, 24 * MIB])
def test_file_that_shrinks_while_it_is_read_ends_where_it_ends(size: int, root: Path, client: Client) -> None:
    path, data = root / "large", random.Random(1).randbytes(24 * MIB)
    path.write_bytes(data)
    client.send(request(1, "fs/readFile", {"path": uri(path)}))
    client._receive(1)  # it is on its way, and cannot have left as a whole
    os.truncate(path, size - MIB)
    (message,) = client.take()
    came = content(json.loads(message))
    assert size - MIB <= len(came) < len(data)
    assert data.startswith(came)
    assert client.request("environment/status") is not None


def test_file_that_grows_while_it_is_read_is_what_it_was_and_more(root: Path, client: Client) -> None:
    path, data = root / "large", random.Random(1).randbytes(24 * MIB)
    path.write_bytes(data)
    client.send(request(1, "fs/readFile", {"path": uri(path)}))
    client._receive(1)
    with path.open("ab") as file:
        file.write(b"more" * 100_000)
    (message,) = client.take()
    assert content(json.loads(message)) == data + b"more" * 100_000


@pytest.mark.parametrize("path", ["/proc/filesystems", "/proc/version", "/proc/devices", "/proc/misc"])
@pytest.mark.parametrize("length", [1, 100, 5000, MIB])
def test_file_that_says_it_is_empty_and_is_not(path: str, length: int, client: Client) -> None:
    expected = Path(path).read_bytes()
    assert os.stat(path).st_size == 0
    whole, opened = exchange(
        client, [("fs/readFile", {"path": uri(path)}), ("fs/open", {"handleId": "h", "path": uri(path)})]
    )
    assert content(whole) == expected
    assert code_of(opened) is None
    received, eof = b"", False
    while not eof:
        block = client.request("fs/readBlock", {"handleId": "h", "offset": len(received), "len": length})
        received += content(block)
        eof = block["result"]["eof"]
        assert eof == (len(content(block)) < length)
    assert received == expected
