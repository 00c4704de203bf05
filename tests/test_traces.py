"""Our server answers the recorded conversations as the reference did, but for the differences listed here."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from attrs import frozen
from trio_websocket import ConnectionClosed

from execenv.testing.recordings import Line
from tests.conftest import ANY_PORT, SERVE, WebsocketServer, run_websocket_server
from tests.fakes import lacks_bubblewrap
from tests.traces import (
    RECORDED_ORIGIN,
    TRACES,
    Happening,
    Json,
    Player,
    as_text,
    open_recorded_origin,
    open_trio_websocket,
    open_websocket_wire,
    read_trace,
)

pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the recorded traces are not in {TRACES}")

TIME_LIMIT = 60.0

# The differences. Every entry must be needed: one that is not any more fails its test.

NOT_YET = ("capabilities/", "capabilityRoots/")
"""Families of methods that this version does not have. The reference has them, and we answer -32601."""

OTHER_WORDS = {
    "Symbolic link loop": os.strerror(errno.ELOOP),
    "I/O error": os.strerror(errno.EIO),
}
"""What musl says, to which the reference is linked, and what the system that we run on says (§5)."""

NOT_SAID = {
    "providerId": "the identity of a registered executor: there is no registry",
    "prependPathDirs": "we put nothing in front of PATH",
    "temporaryDirectories": "only said when there are some",
}
"""Later members of `environment/info` that we leave out; to clients they are all optional (§8.1, §12)."""

NOT_HAD = {
    "networkProxyLaunch",
    "networkProxyReviewDomains",
    "credentialMasking",
    "credentialMaskingCustomProviders",
    "capabilityDiscoverySandbox",
    "capabilityDiscoveryV2",
    "shellSnapshotV2",
    "windowsMxc",
    "linuxRootWritePreservesDevices",
    "linuxApprovedRootWritePreservesRestrictions",
}
"""Capabilities of the reference that this version does not have: a server says only what it has (§8.1)."""

NOT_EVERYWHERE = {"sandbox", "sandboxedFileStreaming"} if lacks_bubblewrap else set()
"""Capabilities of ours that take what is not installed here."""


@frozen
class Difference:
    """Another answer on purpose: a result, or the code and message of an error, or what tells a result."""

    answer: Json | Callable[[Json], bool]
    reason: str

    def matches(self, reply: Json) -> bool:
        if callable(self.answer):
            return "result" in reply and bool(self.answer(reply["result"]))
        return self.answer in (reply.get("result"), reply.get("error"))


def _started(process_id: str) -> Json:
    return {"processId": process_id, "sandboxType": "none"}


def _unsupported(member: str) -> Json:
    return {
        "code": -32603,
        "message": f"this exec-server does not support {member}, so the process was not started",
    }


def _finds_all_names(result: Json) -> bool:
    names = [entry["path"].rpartition("/pp/")[2] for entry in result["entries"]]
    return {"bad%FF", "nl%0Ax"} <= set(names) and result["errors"] == [] and len(names) == 17


_NOT_FOUND = {"code": -32004, "message": "No such file or directory (os error 2)"}
_NATIVE = "a native absolute path is taken, as earlier clients send it (§12)"
_WINDOWS = "a native path of another system is refused as its URI is"

ANSWERS = {
    ("path_uri", 4): Difference(
        _finds_all_names, "names that are not UTF-8 or have a line end are found, and can be asked for"
    ),
    ("path_uri", 44): Difference(
        _NOT_FOUND, "behind an escaped slash the system says what '..' means, which knows links and gaps"
    ),
    ("path_uri", 64): Difference({"path": "file:///tmp"}, _NATIVE),
    ("path_uri", 66): Difference({"path": "file:///etc"}, _NATIVE),
    ("path_uri", 100): Difference(
        {"code": -32600, "message": "'file:///C:/x' is invalid on 'linux'"}, _WINDOWS
    ),
    ("path_uri", 102): Difference(
        {"code": -32600, "message": "'file://h/s/' is invalid on 'linux'"}, _WINDOWS
    ),
    ("path_uri", 138): Difference(lambda result: result["isDirectory"], _NATIVE),
    ("path_uri", 140): Difference({"code": -32600, "message": "path `/tmp` is not a file"}, _NATIVE),
    ("path_uri", 142): Difference(lambda result: result["isFile"], _NATIVE),
    ("path_uri", 144): Difference({"dataBase64": ""}, _NATIVE),
    ("path_uri", 146): Difference(_NOT_FOUND, _NATIVE),
    ("path_uri", 148): Difference(_NOT_FOUND, _NATIVE),
    ("process_start_errors", 6): Difference(
        _started("a1"), "a native absolute path is taken as cwd, as earlier clients send it (§12)"
    ),
    ("process_start_errors", 32): Difference(
        {"code": -32603, "message": "illegal environment variable name"},
        "a name with '=' cannot arrive at the child as it was given",
    ),
    ("process_start_errors", 122): Difference(
        _unsupported("managedNetwork"), "what would confine the process is refused, never ignored"
    ),
    ("process_start_errors", 134): Difference(_unsupported("enforceManagedNetwork"), "the same"),
    ("process_start_errors", 130): Difference(
        _unsupported("credentialProviders"), "what is asked for and cannot be given is refused, never ignored"
    ),
}
"""By trace and line of the recorded reply."""

_BY_SIGNAL = "death by signal is 128 + n on a terminal too; the reference says 1 for all of them (§4.4)"

EVENTS: dict[tuple[str, int, str], tuple[list[Happening], str]] = {
    ("process_tty", 2, "ti"): (
        [("process/output", {"pty": b"^C"}), ("process/exited", 130, False), ("process/closed",)],
        _BY_SIGNAL,
    ),
    ("process_tty", 2, "ti2"): ([("process/exited", 130, False), ("process/closed",)], _BY_SIGNAL),
    ("process_tty", 2, "ti3"): ([("process/exited", 137, False), ("process/closed",)], _BY_SIGNAL),
}
"""By trace, connection and process: what happens to it here."""

OUTPUT_BEFORE_EXIT = {("process_tty", 0, "tty1")}
"""Here what a process wrote before its end precedes its exit. The reference lets the two race (§4.4)."""


# Comparing.


def is_as_good(sent: Json, recorded: Json, reply: Json) -> bool:
    """Whether our reply says what the recorded one says."""
    method = sent.get("method") if isinstance(sent, dict) else None
    if isinstance(method, str) and method.startswith(NOT_YET):
        text = f"exec-server stub does not implement `{method}` yet"
        return _equal({"id": sent["id"], "error": {"code": -32601, "message": text}}, reply)
    if "result" in recorded and "result" in reply:
        return reply["id"] == recorded["id"] and _result_fits(
            method, sent, recorded["result"], reply["result"]
        )
    if recorded["id"] == -1 and "error" in reply:
        return _equal(_without_detail(recorded), _without_detail(reply))
    return _equal(_in_our_words(recorded), reply)


def _in_our_words(recorded: Json) -> Json:
    words, found, number = recorded.get("error", {}).get("message", "").partition(" (os error ")
    if words not in OTHER_WORDS:
        return recorded
    return {**recorded, "error": {**recorded["error"], "message": OTHER_WORDS[words] + found + number}}


def _equal(recorded: Json, reply: Json) -> bool:
    return json.dumps(recorded, sort_keys=True) == json.dumps(reply, sort_keys=True)  # 1 is not 1.0 or true


def _without_detail(reply: Json) -> Json:
    """A reply about a malformed message, without the parser's words and the client's port."""
    error = reply["error"]
    place, _, detail = error["message"].partition(": ")
    assert detail
    return [reply["id"], error["code"], place.rstrip("0123456789"), *sorted(reply), *sorted(error)]


def _result_fits(method: str | None, sent: Json, recorded: Json, result: Json) -> bool:
    if method == "environment/info":
        return _info_fits(recorded, result)
    if method == "initialize":
        return set(result) == set(recorded) and _info_fits(
            recorded["environmentInfo"], result["environmentInfo"]
        )
    if method == "process/read":
        return _read_fits(sent["params"], recorded, result)
    if method == "fs/getMetadata":
        return _metadata_fits(recorded, result)
    if method == "fs/readDirectory":  # in the order of the file system
        in_order = [sorted(one["entries"], key=itemgetter("fileName")) for one in (recorded, result)]
        return _equal(*in_order)
    if method == "environmentConfig/read":
        return _config_fits(recorded, result)
    if method == "http/request":
        return _equal(_http_without_chance(recorded), _http_without_chance(result))
    return _equal(recorded, result)


def _metadata_fits(recorded: Json, result: Json) -> bool:
    """The same but for times, and sizes of directories. Ours says the permissions too, and does not leave
    out when the file was made, which the reference has no way to know."""
    kinds = ("isDirectory", "isFile", "isSymlink")
    return (
        set(result) - set(recorded) == {"mode"}
        and [result[kind] for kind in kinds] == [recorded[kind] for kind in kinds]
        and (result["isDirectory"] or result["size"] == recorded["size"])
        and all(type(result[name]) is int for name in recorded if name not in kinds)
        and result["modifiedAtMs"] > 0
    )


def _http_without_chance(result: Json) -> Json:
    """Without the time, and the order in which the headers of the request came, which has no meaning."""
    body = b64decode(result["bodyBase64"])
    headers = [[header["name"], header["value"]] for header in result["headers"] if header["name"] != "date"]
    if not body.startswith(b"{"):
        return [result["status"], headers, body.decode("latin-1")]
    echo = json.loads(body)
    echo["headers"].sort()
    return [result["status"], [header for header in headers if header[0] != "content-length"], echo]


def _config_fits(recorded: Json, result: Json) -> bool:
    """The same members: what is configured on the machine is not known here."""
    return (
        set(result) == set(recorded)
        and all(set(result[part]) == set(recorded[part]) for part in ("config", "requirements"))
        and all(type(result[name]) is type(recorded[name]) for name in recorded)
        and result["userHomeDir"].startswith("file:///")
    )


def _info_fits(recorded: Json, info: Json) -> bool:
    return bool(
        {"shell", "cwd"} <= set(info)
        and set(recorded) - set(info) <= set(NOT_SAID)
        and all(type(recorded[name]) is type(info[name]) for name in info)
        and set(info["shell"]) == set(recorded["shell"])
        and not NOT_HAD & set(info["capabilities"])
        and set(recorded["capabilities"]) - NOT_HAD <= set(info["capabilities"])
        and {name for name, has in info["capabilities"].items() if not has} <= NOT_EVERYWHERE
        and info["platformOs"] == recorded["platformOs"]
        and info["cwd"].startswith("file:///")
    )


def _read_fits(params: Json, recorded: Json, result: Json) -> bool:
    recorded, result = dict(recorded), dict(result)
    if params["processId"] == "p1":
        # It writes to both pipes at once; which comes first is for the kernel to say.
        for one in (recorded, result):
            one["chunks"] = [chunk["seq"] for chunk in one["chunks"]]
    if params.get("waitMs") and recorded["closed"] and not result["closed"]:
        # A long poll ends at the first thing that happens, and `closed` may be the next (§4.5).
        recorded["closed"] = False
        recorded["nextSeq"] -= 1
    return _equal(recorded, result)


def _output_first(happened: list[Happening]) -> list[Happening]:
    """The same events, all output before the exit."""
    output: dict[str, bytes] = {}
    for event in happened:
        if event[0] == "process/output":
            for stream, data in event[1].items():
                output[stream] = output.get(stream, b"") + data
    return [("process/output", output), *(event for event in happened if event[0] != "process/output")]


def unexplained(name: str, player: Player) -> tuple[Json, Json]:
    """The differences that the tables do not have, and the entries of the tables that were not needed."""
    answers = dict(player.mismatches)
    events = dict(player.other_events)
    unneeded: list[Json] = []
    for (trace, number), difference in ANSWERS.items():
        if trace == name:
            _, reply = answers.get(number, (None, {}))
            if difference.matches(reply):
                del answers[number]
            else:
                unneeded.append((number, difference.answer))
    for (trace, conn, process_id), (happened, _) in EVENTS.items():
        if trace == name:
            if events.get((conn, process_id), (None, None))[1] == happened:
                del events[conn, process_id]
            else:
                unneeded.append((conn, process_id))
    for trace, conn, process_id in OUTPUT_BEFORE_EXIT:
        recorded, came = events.get((conn, process_id), ([], []))
        if trace == name and recorded and _output_first(recorded) == came:
            del events[conn, process_id]
    return {**answers, **events}, unneeded


# Playing.

HANDSHAKES = ("handshake", "bad_input", "resume")
"""Traces that have theirs in them."""

TRACES_OVER_WEBSOCKET = (
    *HANDSHAKES,
    "process_pipe",
    "process_start_errors",
    "process_tty",
    "stdin",
    "signal",
    "long_poll",
    "fs",
    "path_uri",
    "later_additions",
)

ROOT_ONLY = (63, 64)
"""Lines of `fs_errors` where the user who runs the reference may do what others may not."""

RECORDED_TOO_EARLY = {("resume", 7)}
"""The client's end of a connection that a later line finds still attached."""

ENDS_BEFORE = {"resume": {16: 0, 23: 2, 40: 4}}
"""Where the client ended a connection without the trace saying so: line → connection."""


@pytest.fixture
def root() -> Iterator[Path]:
    """What the traces need to find in their directory, which any user may look into."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        path = Path(os.path.realpath(directory))
        path.chmod(0o755)
        program = path / "bin" / "myprog"
        program.parent.mkdir()
        program.write_text('#!/bin/sh\necho "myprog ran $0"\n')
        program.chmod(0o755)
        yield path


Preparation = Callable[[Path], None]


def _directories(*paths: Path) -> None:
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)


def _prepare_tree(fs: Path) -> None:
    """What is in `d`, and what leads there."""
    _directories(fs / "d" / "sub")
    (fs / "d" / "one").write_text("1")
    (fs / "d" / "lnk").symlink_to("../a.txt")
    (fs / "d" / "lsub").symlink_to("sub")
    (fs / "lf").symlink_to("a.txt")
    (fs / "ld").symlink_to("d")
    os.mkfifo(fs / "fifo")


def _prepare_files(fs: Path) -> None:
    _directories(fs / "empty", fs / "wk" / ".hid", fs / "wk" / "a" / "b" / "c")
    for name in (".hid/f", "a/f1", "a/b/c/f2"):
        (fs / "wk" / name).touch()
    (fs / "wk" / "la").symlink_to("a")
    (fs / "lb").symlink_to("not there")
    (fs / "blk").write_text("0123456789")


def _prepare_fs(root: Path) -> None:
    _directories(root / "fs")


def _prepare_fs_errors(root: Path) -> None:
    fs = root / "fs"
    _prepare_tree(fs)
    _prepare_files(fs)
    (fs / "a.txt").write_text("hi")
    (fs / "loop").symlink_to("loop")
    _directories(fs / "withfifo", root / "fh")
    os.mkfifo(fs / "withfifo" / "f")
    (root / "fh" / "r").write_text("0123456789")


def _prepare_more_directories(root: Path) -> None:
    _directories(root / "fs" / "x" / "y" / "z", root / "fs" / "d2" / "sub")


def _prepare_nobody(root: Path) -> None:
    nobody = root / "nobody"
    _directories(nobody / "home", nobody / "locked")
    for path in (nobody / "secret", nobody / "locked" / "f"):
        path.write_text("not for everybody")
        path.chmod(0)
    (nobody / "locked").chmod(0)
    nobody.chmod(0o555)


def _prepare_path_uri(root: Path) -> None:
    names = ["pct%41", "plus+", "h#h", "caret^|{}`<>", "quo'\"", "q?m", "brk[1]", "til~", "semi;colon", "a:b"]
    _directories(root / "pp" / "C:")
    (root / "pp" / "C:" / "f").touch()
    for name in (*names, "back\\slash", "nl\nx", "sp ace", "caf\u00e9", os.fsdecode(b"bad\xff")):
        (root / "pp" / name).touch()


def _prepare_link_to_bytes(root: Path) -> None:
    target = root / "pp" / os.fsdecode(b"nd\xfe")
    target.mkdir()
    (root / "pp" / "tolink").symlink_to(target)


def _prepare_wm(root: Path) -> None:
    _directories(root / "wm")


DISK: dict[str, dict[int, Preparation]] = {
    "resume": {1: lambda root: (root / "blk").touch()},
    "fs": {
        1: _prepare_fs,
        15: lambda root: _prepare_tree(root / "fs"),
        49: lambda root: _prepare_files(root / "fs"),
    },
    "fs_errors": {1: _prepare_fs_errors, 93: _prepare_more_directories, 156: _prepare_nobody},
    "path_uri": {1: _prepare_path_uri, 151: _prepare_link_to_bytes},
    "later_additions": {1: _prepare_wm, 67: lambda root: (root / "wm" / "x").touch()},
}
"""What the recording client did to the disk: by trace, before which line."""

LEFT_OUT = {
    ("fs_errors", 147): {
        "method": "fs/writeBlock",
        "params": {"handleId": "w1", "offset": 0, "chunk": "A" * 1_398_104},  # 1 MiB and 2 bytes
    },
    ("fs_errors", 220): {
        "method": "fs/writeBlock",
        "params": {"handleId": "w", "offset": 3, "chunk": "A" * 1_398_100 + "AA=="},  # 1 MiB
    },
}
"""Requests that were too long for the trace, by the line of their reply."""


def _whole(name: str, lines: Iterable[Line]) -> Iterator[Line]:
    for line in lines:
        request = LEFT_OUT.get((name, line.number))
        if request is not None:
            yield Line(line.number, True, line.conn, {"id": line.msg["id"], **request})
        yield line


def _disk(name: str, root: Path) -> dict[int, Callable[[], None]]:
    return {number: partial(prepare, root) for number, prepare in DISK.get(name, {}).items()}


@pytest.mark.parametrize("name", TRACES_OVER_WEBSOCKET)
async def test_server_answers_as_recorded(name: str, root: Path, websocket_server: WebsocketServer) -> None:
    player = Player(
        [line for line in read_trace(name, root) if (name, line.number) not in RECORDED_TOO_EARLY],
        partial(open_websocket_wire, websocket_server.url),
        is_as_good,
        implied_handshake=name not in HANDSHAKES,
        ends_before=ENDS_BEFORE.get(name, {}),
        before=_disk(name, root),
    )
    with trio.fail_after(TIME_LIMIT):
        await player.play()
    assert unexplained(name, player) == ({}, [])


WITHOUT_PRIVILEGES = (
    sys.executable,
    "-c",
    # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: without them, permissions are meant for root too.
    # Another user might not be able to run this Python.
    "import ctypes, os, sys; prctl = ctypes.CDLL(None).prctl; any(prctl(24, cap) for cap in (1, 2, 3)); "
    "os.execv(sys.argv[1], sys.argv[1:])",
)


async def test_server_answers_as_recorded_about_files_that_cannot_be_had(
    root: Path, websocket_server: WebsocketServer
) -> None:
    name, as_root = "fs_errors", os.geteuid() == 0
    lines = [line for line in _whole(name, read_trace(name, root)) if as_root or line.number not in ROOT_ONLY]
    with run_websocket_server((*(WITHOUT_PRIVILEGES if as_root else ()), *SERVE, ANY_PORT)) as unprivileged:
        player = Player(
            lines,
            partial(open_websocket_wire, websocket_server.url),
            is_as_good,
            implied_handshake=True,
            before=_disk(name, root),
            other_wires={1: partial(open_websocket_wire, unprivileged.url)},
        )
        with trio.fail_after(TIME_LIMIT):
            await player.play()
    assert unexplained(name, player) == ({}, [])


async def test_connection_that_broke_the_rules_ends_with_a_close_frame(
    websocket_server: WebsocketServer,
) -> None:
    # The reference drops the connection (`{"closed": null}` in the traces). A close frame says the same to
    # every client, and says why (§15.7).
    with trio.fail_after(TIME_LIMIT):
        async with open_trio_websocket(websocket_server.url) as websocket:
            await websocket.send_message('{"method":"nope/x"}')
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.get_message()
    assert closed.value.reason is not None
    assert closed.value.reason.code == 1002


async def test_server_answers_as_recorded_about_http(root: Path, websocket_server: WebsocketServer) -> None:
    name = "http"
    with trio.fail_after(TIME_LIMIT):
        async with open_recorded_origin() as origin:
            moved = {RECORDED_ORIGIN: origin, "/home/user": os.environ["HOME"]}
            player = Player(
                read_trace(name, root, moved),
                partial(open_websocket_wire, websocket_server.url),
                is_as_good,
                implied_handshake=True,
            )
            await player.play()
    assert unexplained(name, player) == ({}, [])


# stdio.


@frozen
class StdioRun:
    """One run of a server over stdio: what the client sent, and the replies in their order."""

    sent: list[Json]
    received: list[Json]


def stdio_runs(lines: list[Line]) -> list[StdioRun]:
    runs: list[StdioRun] = []
    for line in lines:
        starts = line.sent and (not runs or bool(runs[-1].received) or _initializes_again(line, runs[-1]))
        if starts:
            runs.append(StdioRun([], []))
        (runs[-1].sent if line.sent else runs[-1].received).append(line.msg)
    return runs


def _initializes_again(line: Line, run: StdioRun) -> bool:
    return any(_method(line.msg) == "initialize" == _method(msg) for msg in run.sent)


def _method(msg: Json) -> Json:
    return msg.get("method") if isinstance(msg, dict) else None


async def play_stdio(run: StdioRun, replies: int, *, end: bool) -> list[Json]:
    """What a server over stdio answers to `run`; after `replies` of them its stdin ends, if `end`."""
    process = await trio.lowlevel.open_process(
        [*SERVE, "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        lines = [as_text(msg) for msg in run.sent]
        await process.stdin.send_all(
            b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        )
        output = b""
        async for data in process.stdout:
            output += data
            if end and output.count(b"\n") >= replies:
                await process.stdin.aclose()
        assert await process.wait() == 0
        return [json.loads(line) for line in output.splitlines()]
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdin.aclose()
        await process.stdout.aclose()


def _fit(run: StdioRun, received: list[Json]) -> bool:
    """Whether the same requests were answered as well. Only the id says which request a reply is for."""
    requests = {msg["id"]: msg for msg in run.sent if isinstance(msg, dict) and "id" in msg}
    recorded = sorted((msg for msg in run.received if "id" in msg), key=itemgetter("id"))
    replies = sorted((msg for msg in received if "id" in msg), key=itemgetter("id"))
    return len(replies) == len(recorded) and all(
        is_as_good(requests.get(one["id"], {}), one, other)
        for one, other in zip(recorded, replies, strict=True)
    )


async def test_stdio_server_answers_as_recorded(tmp_path: Path) -> None:
    malformed, not_utf8, unexpected, cut = stdio_runs(read_trace("stdio", tmp_path))
    with trio.fail_after(TIME_LIMIT):
        # The reference may lose the answer to the last request before the end (§1.3); ours comes.
        last = {"id": 3, "result": {"status": "ready"}}
        replies = await play_stdio(malformed, 5, end=True)
        replies.remove(last)
        assert _fit(malformed, replies)

        # A line that is not UTF-8 is a read error; what was queued by then may be lost.
        assert all("result" in reply for reply in await play_stdio(not_utf8, 0, end=False))
        assert not_utf8.received == []

        assert _fit(unexpected, await play_stdio(unexpected, 0, end=False))

        replies = await play_stdio(cut, 3, end=True)
        assert _fit(cut, replies)
        pushed = next(message for message in replies if message.get("method") == "process/output")
        assert pushed["params"]["stream"] == "stdout"
        with pytest.raises(ProcessLookupError):
            os.kill(int(b64decode(pushed["params"]["chunk"])), 0)
