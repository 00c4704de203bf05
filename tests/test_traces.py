"""Our server answers the recorded conversations as the reference did, but for the differences listed here."""

from __future__ import annotations

import json
import os
import subprocess
from base64 import b64decode
from functools import partial
from operator import itemgetter
from pathlib import Path

import pytest
import trio
from attrs import frozen
from trio_websocket import ConnectionClosed

from tests.conftest import SERVE, WebsocketServer
from tests.traces import (
    TRACES,
    Happening,
    Json,
    Line,
    Player,
    as_text,
    open_trio_websocket,
    open_websocket_wire,
    read_trace,
)

pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason=f"the recorded traces are not in {TRACES}")

TIME_LIMIT = 60.0

# The differences. Every entry must be needed: one that is not any more fails its test.

NOT_YET = ("fs/", "http/", "environmentConfig/", "capabilities/")
"""Families of methods that this version does not have. The reference has them, and we answer -32601."""

NOT_SAID = {
    "providerId": "the identity of a registered executor: there is no registry",
    "prependPathDirs": "we put nothing in front of PATH",
    "temporaryDirectories": "only said when there are some",
}
"""Later members of `environment/info` that we leave out; to clients they are all optional (§8.1, §12)."""

OUR_CAPABILITIES = {"processCloseStdin", "processOutputWindow", "processResize", "processReceipt"}
"""Named beside nothing of the reference's: a server says only what it has (§8.1)."""


@frozen
class Difference:
    """Another answer on purpose: a result, or the code and message of an error."""

    answer: Json
    reason: str

    def matches(self, reply: Json) -> bool:
        return self.answer in (reply.get("result"), reply.get("error"))


def _started(process_id: str) -> Json:
    return {"processId": process_id, "sandboxType": "none"}


def _unsupported(member: str) -> Json:
    return {
        "code": -32603,
        "message": f"this exec-server does not support {member}, so the process was not started",
    }


ANSWERS = {
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
    return _equal(recorded, reply)


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
    return _equal(recorded, result)


def _info_fits(recorded: Json, info: Json) -> bool:
    return bool(
        {"shell", "cwd"} <= set(info)
        and set(recorded) - set(info) <= set(NOT_SAID)
        and all(type(recorded[name]) is type(info[name]) for name in info)
        and set(info["shell"]) == set(recorded["shell"])
        and set(info["capabilities"]) == OUR_CAPABILITIES
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
)

RECORDED_TOO_EARLY = {("resume", 7)}
"""The client's end of a connection that a later line finds still attached."""

ENDS_BEFORE = {"resume": {16: 0, 23: 2, 40: 4}}
"""Where the client ended a connection without the trace saying so: line → connection."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the traces need to find in their directory."""
    program = tmp_path / "bin" / "myprog"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "myprog ran $0"\n')
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("name", TRACES_OVER_WEBSOCKET)
async def test_server_answers_as_recorded(name: str, root: Path, websocket_server: WebsocketServer) -> None:
    player = Player(
        [line for line in read_trace(name, root) if (name, line.number) not in RECORDED_TOO_EARLY],
        partial(open_websocket_wire, websocket_server.url),
        is_as_good,
        implied_handshake=name not in HANDSHAKES,
        ends_before=ENDS_BEFORE.get(name, {}),
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
