"""Recorded conversations with the reference server, and playing them to ours (protocol.md §16).

A trace says what the client sent, and in which order it saw what came back. Playing keeps the client's
order and waits, before each message, for what the trace shows to have happened by then; so nothing depends
on how fast either server is.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio
from attrs import Factory, define, field
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from execenv.testing.recordings import Line, Recording, subject_of

TRACES = Path(__file__).parents[2] / "shared" / "spec" / "traces"
PATIENCE = 15.0
"""Seconds for any one thing that a trace shows to happen."""

SESSION_ATTACHED = -32010

Json = Any
OpenWire = Callable[[], AbstractAsyncContextManager["Wire"]]


def read_trace(name: str, root: Path, moved: Mapping[str, str] | None = None) -> list[Line]:
    """The lines of a trace, with `root` in the place of the directory that it was recorded in.

    Args:
        moved: other texts that stand for something of the recording, and what to put in their place.
    """
    moves = {"/tmp/trace": str(root), **(moved or {})}
    return list(Recording.load(TRACES / f"{name}.jsonl", moves).lines)


class Wire:
    """One connection to the server that a trace is played to."""

    label = ""

    async def send(self, msg: Json) -> None:
        raise NotImplementedError

    async def receive(self) -> Json:
        """The next message; `None` at the end."""
        raise NotImplementedError


def as_text(msg: Json) -> str | bytes:
    """What goes over the wire for `msg`; bytes where the trace has something that is no UTF-8."""
    if isinstance(msg, dict) and set(msg) == {"raw"}:
        raw: str = msg["raw"]
        return raw if raw.isascii() else raw.encode("latin-1")
    return json.dumps(msg)


class WebsocketWire(Wire):
    """The stock client of trio-websocket, which shares no frame code with the server."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket = websocket

    async def send(self, msg: Json) -> None:
        try:
            await self._websocket.send_message(as_text(msg))
        except ConnectionClosed:
            await trio.lowlevel.checkpoint()  # the trace goes on to show the end

    async def receive(self) -> Json:
        try:
            return json.loads(await self._websocket.get_message())
        except ConnectionClosed:
            return None


@asynccontextmanager
async def open_trio_websocket(url: str) -> AsyncIterator[WebSocketConnection]:
    """A stock client. `open_websocket_url` leaves its socket open when the server closes first."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    async with (
        await trio.open_tcp_stream(parts.hostname, parts.port) as stream,
        trio.open_nursery() as nursery,
    ):
        websocket = await wrap_client_stream(nursery, stream, parts.netloc, "/", max_message_size=1 << 30)
        try:
            yield websocket
        finally:
            with trio.move_on_after(PATIENCE, shield=True):
                await websocket.aclose()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_websocket_wire(url: str) -> AsyncIterator[Wire]:
    async with open_trio_websocket(url) as websocket:
        yield WebsocketWire(websocket)


# The origin of the HTTP requests, as far as the trace shows it.

RECORDED_ORIGIN = "127.0.0.1:37845"
_SERVER = b"Server: BaseHTTP/0.6 Python/3.11.7\r\nDate: Fri, 20 Nov 2026 14:13:47 GMT\r\n"
_ZIPPED = b64decode("H4sIAJxVAGsC/8tIzcnJV0ivAgC/ljJdCAAAAA==")
_ANSWERS = {
    "/hdr": b"200 OK\r\n%bX-A: 1\r\nX-A: 2\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n",
    "/redir": b"302 Found\r\n%bLocation: /final\r\nContent-Length: 0\r\n\r\n",
    "/redirloop": b"302 Found\r\n%bLocation: /redirloop\r\nContent-Length: 0\r\n\r\n",
    "/slowbody": b"200 OK\r\n%bContent-Length: 10\r\n\r\n12345",
    "/cut": b"200 OK\r\n%bContent-Length: 10\r\n\r\n12345",
    "/gzip": b"200 OK\r\n%bContent-Encoding: gzip\r\nContent-Length: 28\r\n\r\n" + _ZIPPED,
    "/204": b"204 No Content\r\n%b\r\n",
    "/chunks": b"200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nchnk0\r\n5\r\nchnk1\r\n5\r\nchnk2\r\n0\r\n\r\n",
}
_UNFINISHED = ("/slow", "/slowbody")


@asynccontextmanager
async def open_recorded_origin() -> AsyncIterator[str]:
    """A server that answers as that of the trace `http`; its host and port."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, _serve_origin, [listener])
        yield f"127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def _serve_origin(stream: trio.SocketStream) -> None:
    received = b""
    while True:
        while b"\r\n\r\n" not in received:
            data = await stream.receive_some()
            if not data:
                return
            received += data
        head, _, received = received.partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        if method.islower():  # that server knew methods by their exact names
            return
        headers = sorted([name.lower(), value] for name, value in (line.split(": ", 1) for line in rest))
        length = int(dict(headers).get("content-length", 0))
        while len(received) < length:
            received += await stream.receive_some()
        body, received = received[:length], received[length:]
        if path in _ANSWERS:
            await stream.send_all(b"HTTP/1.1 " + _ANSWERS[path] % _SERVER)
        if path in _UNFINISHED:
            await trio.sleep_forever()
        if path == "/cut":
            return
        if path.partition("?")[0] in ("/echo", "/final"):
            echo = {"method": method, "path": path, "headers": headers, "body": body.decode()}
            answer = json.dumps(echo).encode()
            more = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\n" + _SERVER + more + (b"" if method == "HEAD" else answer)
            )


# What happened to a process, without what may differ from run to run.

Happening = tuple[Any, ...]


def happenings(notifications: Iterable[Json]) -> list[Happening]:
    """The events of one process: output merged and by stream, between the events that are not output."""
    events: list[Happening] = []
    for message in notifications:
        kind, params = message["method"], message["params"]
        if kind == "process/output":
            if not events or events[-1][0] != kind:
                events.append((kind, defaultdict(bytes)))
            events[-1][1][params["stream"]] += b64decode(params["chunk"])
        elif kind == "http/request/bodyDelta":
            if not events:
                events.append((kind, {"body": b""}))
            events[0][1]["body"] += b64decode(params["deltaBase64"])
            if params["done"]:
                events.append((kind, params["error"]))
        elif kind == "process/exited":
            events.append((kind, params["exitCode"], params["sandboxDenied"]))
        else:
            events.append((kind,))
    return [
        (event[0], {stream: settled(data) for stream, data in event[1].items()})
        if event[0] == "process/output"
        else event
        for event in events
    ]


def settled(data: bytes) -> bytes:
    """Output with the numbers that the kernel chose taken out."""
    if re.fullmatch(rb"\d+\n", data):
        return b"<pid>\n"
    return re.sub(rb"/dev/pts/\d+", b"/dev/pts/<n>", data)


@define(eq=False)
class Conversation:
    """One connection as it is played: what has arrived so far."""

    wire: Wire
    ended: bool = False
    leave: trio.Event = Factory(trio.Event)
    left: trio.Event = Factory(trio.Event)
    refused: set[str] = Factory(set)
    replies: dict[Json, deque[Json]] = Factory(lambda: defaultdict(deque))
    events: dict[str, list[Json]] = Factory(lambda: defaultdict(list))
    expected: dict[str, list[Json]] = Factory(lambda: defaultdict(list))
    _changed: trio.lowlevel.ParkingLot = Factory(trio.lowlevel.ParkingLot)

    @classmethod
    async def hold(
        cls, open_wire: OpenWire, task_status: trio.TaskStatus[Conversation] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep a connection open until `leave` is set. Each has a task of its own, so any may end first."""
        async with open_wire() as wire, trio.open_nursery() as nursery:
            conversation = cls(wire)
            nursery.start_soon(conversation.listen)
            task_status.started(conversation)
            await conversation.leave.wait()
            nursery.cancel_scope.cancel()
        conversation.left.set()

    async def listen(self) -> None:
        while (message := await self.wire.receive()) is not None:
            if "method" in message:
                self.events[subject_of(message) or ""].append(message)
            else:
                self.replies[message["id"]].append(message)
            self._changed.unpark_all()
        self.ended = True
        self._changed.unpark_all()

    async def wait(self, is_true: Callable[[], bool], what: str) -> None:
        with trio.move_on_after(PATIENCE):
            while not is_true():
                if self.ended:
                    raise AssertionError(f"the connection ended before: {what}")
                await self._changed.park()
            return
        raise AssertionError(f"did not happen: {what}")

    async def wait_end(self) -> None:
        with trio.fail_after(PATIENCE):
            while not self.ended:
                await self._changed.park()

    async def reply(self, id_: Json) -> Json:
        await self.wait(lambda: bool(self.replies[id_]), f"a reply to {id_!r}")
        return self.replies[id_].popleft()

    async def wait_events(self, process_id: str) -> None:
        """Wait until as much has happened to a process as is expected by now."""
        if process_id in self.refused:
            return
        wanted = _amount(self.expected[process_id])
        await self.wait(
            lambda: all(_amount(self.events[process_id])[kind] >= count for kind, count in wanted.items()),
            f"{dict(wanted)} of process {process_id!r}",
        )


def _amount(notifications: Iterable[Json]) -> dict[str, int]:
    """How many bytes on each stream, and how many events of each other kind."""
    amount: dict[str, int] = defaultdict(int)
    for message in notifications:
        params = message["params"]
        if message["method"] == "process/output":
            amount[params["stream"]] += len(settled(b64decode(params["chunk"])))
        elif message["method"] == "http/request/bodyDelta":
            amount["body"] += len(b64decode(params["deltaBase64"]))
            amount["done"] += params["done"]
        else:
            amount[message["method"]] += 1
    return amount


@define(eq=False)
class Player:
    """Plays a trace and notes every line whose reply is another than the recorded one.

    Args:
        compare: whether, of a request, its recorded reply and a reply, the last is as good as the recorded.
        implied_handshake: whether connections were initialized before the trace begins.
        ends_before: connections that the client ends without the trace saying so, by the line that follows.
        before: what the recording client did to the disk, by the line that follows.
        other_wires: connections that go to another server, by their number.

    Attributes:
        mismatches: line number → what was recorded, and what came.
        other_events: the same for the events of a process, by connection and id.
        sessions: recorded session ids → ours.
    """

    lines: list[Line]
    open_wire: OpenWire
    compare: Callable[[Json, Json, Json], bool]
    implied_handshake: bool
    ends_before: dict[int, int] = Factory(dict)
    before: Mapping[int, Callable[[], None]] = Factory(dict)
    other_wires: Mapping[int, OpenWire] = Factory(dict)
    mismatches: dict[int, tuple[Json, Json]] = Factory(dict)
    other_events: dict[tuple[int, str], tuple[list[Happening], list[Happening]]] = Factory(dict)
    sessions: dict[str, str] = Factory(dict)
    _open: dict[int, Conversation] = Factory(dict)
    _last_sent: Json = None
    _nursery: trio.Nursery = field(init=False)

    async def play(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for position, line in enumerate(self.lines):
                if line.number in self.ends_before:
                    await self._end(self.ends_before[line.number])
                if line.number in self.before:
                    self.before[line.number]()
                conversation = await self._conversation(line)
                if line.is_end:
                    await self._play_end(line, conversation)
                elif line.sent:
                    await self._play_sent(line, conversation, self._until_reply(position))
                elif line.is_reply:
                    await self._play_reply(line, conversation)
                else:
                    assert line.subject is not None
                    conversation.expected[line.subject].append(line.msg)
            for conn in list(self._open):
                await self._end(conn)
            nursery.cancel_scope.cancel()

    def _until_reply(self, position: int) -> list[Line]:
        """The notifications that the trace shows between a request and its reply."""
        sent = self.lines[position]
        between = []
        for line in self.lines[position + 1 :]:
            if line.conn == sent.conn:
                if not line.is_notification:
                    break
                between.append(line)
        return between

    async def _conversation(self, line: Line) -> Conversation:
        if line.conn not in self._open:
            conversation = await self._nursery.start(
                Conversation.hold, self.other_wires.get(line.conn, self.open_wire)
            )
            self._open[line.conn] = conversation
            if self.implied_handshake:
                await conversation.wire.send(
                    {"id": "handshake", "method": "initialize", "params": {"clientName": "trace"}}
                )
                await conversation.wire.send({"method": "initialized"})
                await conversation.reply("handshake")
        return self._open[line.conn]

    async def _play_end(self, line: Line, conversation: Conversation) -> None:
        if line.sent:
            await self._end(line.conn)
        else:
            await conversation.wait_end()

    async def _end(self, conn: int) -> None:
        conversation = self._open.pop(conn)
        for process_id in conversation.expected.keys() - conversation.refused:
            if not conversation.ended:
                await conversation.wait_events(process_id)
            # Of what a resumed connection saw, the trace may show the end only.
            first = conversation.expected[process_id][0]["params"].get("seq", 0)
            events = [m for m in conversation.events[process_id] if m["params"].get("seq", 0) >= first]
            recorded = happenings(conversation.expected[process_id])
            came = happenings(events)
            if recorded[-1][0] != "process/closed":
                came = came[: len(recorded)]  # the trace does not say how it went on
            if recorded != came:
                self.other_events[conn, process_id] = recorded, came
            if first:
                seqs = [message["params"]["seq"] for message in events]
                assert seqs == list(range(first, first + len(events)))
        conversation.leave.set()
        await conversation.left.wait()

    async def _play_sent(self, line: Line, conversation: Conversation, between: list[Line]) -> None:
        for process_id in list(conversation.expected):
            await conversation.wait_events(process_id)
        msg = self._with_our_sessions(line.msg)
        method = msg.get("method") if isinstance(msg, dict) else None
        early = _happened_before(method)
        for event in between:
            if event.msg["method"] in early and event.subject == line.subject:
                conversation.expected[event.subject or ""].append(event.msg)
                await conversation.wait_events(event.subject or "")
                conversation.expected[event.subject or ""].pop()
        if method == "process/read" and line.subject is not None and not msg["params"].get("waitMs"):
            await self._wait_readable(line, conversation)
        self._last_sent = msg
        await conversation.wire.send(msg)

    async def _wait_readable(self, line: Line, conversation: Conversation) -> None:
        """Before a read that does not wait, wait for the output that it found."""
        recorded = next(
            later.msg
            for later in self.lines
            if later.number > line.number and later.conn == line.conn and later.is_reply
        )
        chunks = recorded.get("result", {}).get("chunks")
        if chunks:
            await conversation.wire.send(
                {
                    "id": "wait",
                    "method": "process/read",
                    "params": {
                        "processId": line.subject,
                        "afterSeq": chunks[-1]["seq"] - 1,
                        "waitMs": int(PATIENCE * 1000),
                    },
                }
            )
            await conversation.reply("wait")

    async def _play_reply(self, line: Line, conversation: Conversation) -> None:
        reply = await conversation.reply(line.msg["id"])
        recorded = line.msg
        while "result" in recorded and reply.get("error", {}).get("code") == SESSION_ATTACHED:
            await conversation.wire.send(self._last_sent)  # the other connection's end is still on its way
            reply = await conversation.reply(line.msg["id"])
        if "sessionId" in recorded.get("result", {}) and "result" in reply:
            self.sessions[recorded["result"]["sessionId"]] = reply["result"]["sessionId"]
        if "error" in reply and "processId" in recorded.get("result", {}):
            conversation.refused.add(recorded["result"]["processId"])
        if not self.compare(self._last_sent, self._with_our_sessions(recorded), reply):
            self.mismatches[line.number] = recorded, reply

    def _with_our_sessions(self, msg: Json) -> Json:
        text = json.dumps(msg)
        for theirs, ours in self.sessions.items():
            text = text.replace(theirs, ours)
        return json.loads(text)


def _happened_before(method: str | None) -> tuple[str, ...]:
    """Events that, when a trace shows them before the reply to `method`, were not its effect.

    The recording client looked at what had come only when it waited for a reply.
    """
    if method in ("process/signal", "process/terminate"):
        return ("process/output",)
    return ("process/exited", "process/closed") if method == "process/write" else ()
