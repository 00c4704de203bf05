"""Conversations between a client and a server: written down, and played again to a client.

A recording is a file of JSON lines, one for each message in the order in which they arrived:

    {"dir": "client", "conn": 0, "msg": {"id": 1, "method": "initialize", "params": {"clientName": "me"}}}

`dir` says who sent it, `conn` counts connections from 0, and `{"closed": true}` in the place of a message is
the end of the connection.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import trio
from attrs import define, field, frozen

from execenv.errors import ConnectFailed, UsageError
from execenv.testing.faults import FaultPlan, Frame
from execenv.transports.channel import Channel

if TYPE_CHECKING:
    from execenv.testing.memory import MemoryListener

Json = Any

BASE64_MEMBERS = ("chunk", "bodyBase64", "deltaBase64", "dataBase64")
"""Members whose text is base64, in which there may be something to replace too."""


def decode(data: bytes) -> Json:
    """The JSON of a message; `None` if it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return None


@frozen
class Line:
    """One message of a recording.

    Attributes:
        number: its line in the file, from 1.
        sent: whether the client sent it.
        conn: which connection, from 0.
        msg: the message.
    """

    number: int
    sent: bool
    conn: int
    msg: Json

    @property
    def is_reply(self) -> bool:
        return isinstance(self.msg, dict) and not self.sent and ("result" in self.msg or "error" in self.msg)

    @property
    def is_notification(self) -> bool:
        return isinstance(self.msg, dict) and not self.sent and "method" in self.msg

    @property
    def is_end(self) -> bool:
        return isinstance(self.msg, dict) and "closed" in self.msg

    @property
    def subject(self) -> str | None:
        """What a request or notification is about."""
        return subject_of(self.msg) if isinstance(self.msg, dict) else None


def subject_of(msg: Json) -> str | None:
    """The id of a process, of a streamed body or of a watch."""
    params = msg.get("params")
    if not isinstance(params, dict):
        return None
    subject = params.get("processId", params.get("requestId", params.get("watchId")))
    return None if subject is None else str(subject)


def replaced(value: Json, texts: Mapping[str, str]) -> Json:
    """`value` with every text of `texts` replaced in all strings, also within base64."""
    if isinstance(value, dict):
        return {
            name: _replaced_base64(item, texts) if name in BASE64_MEMBERS else replaced(item, texts)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [replaced(item, texts) for item in value]
    if isinstance(value, str):
        for old, new in texts.items():
            value = value.replace(old, new)
    return value


def _replaced_base64(text: Json, texts: Mapping[str, str]) -> Json:
    try:
        data = b64decode(text, validate=True)
    except (TypeError, ValueError):  # a test of just that
        return text
    changed = data
    for old, new in texts.items():
        changed = changed.replace(old.encode(), new.encode())
    # What has nothing of the kind stays as it is spelled: the spelling may be what is tested.
    return text if changed == data else b64encode(changed).decode()


@frozen
class Recording:
    """A conversation, over one connection or several.

    Attributes:
        lines: its messages, in the order in which they arrived.
    """

    lines: tuple[Line, ...]

    @classmethod
    def load(cls, source: str | os.PathLike[str], texts: Mapping[str, str] | None = None) -> Recording:
        """Read one from a file, or one that comes with this package, by its name: `"run"` or `"resume"`.

        Args:
            texts: what stands in the recording for something of another place, and what to put there.

        Raises:
            FileNotFoundError: if there is none.
        """
        name = os.fspath(source)
        if os.sep not in name and not name.endswith(".jsonl"):
            text = files("execenv.testing").joinpath("data", f"{name}.jsonl").read_text(encoding="utf-8")
        else:
            with open(name, encoding="utf-8") as file:
                text = file.read()
        return cls.parse(text, texts)

    @classmethod
    def parse(cls, text: str, texts: Mapping[str, str] | None = None) -> Recording:
        """Read one from its text."""
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            row = json.loads(line)
            lines.append(Line(number, row["dir"] == "client", row["conn"], replaced(row["msg"], texts or {})))
        return cls(tuple(lines))

    @property
    def connections(self) -> list[int]:
        """Numbers of the connections, in the order in which they begin."""
        return list(dict.fromkeys(line.conn for line in self.lines))

    def of(self, conn: int) -> list[Line]:
        """The lines of one connection."""
        return [line for line in self.lines if line.conn == conn]

    @property
    def text(self) -> str:
        """As it is in a file."""
        rows = (
            {"dir": "client" if line.sent else "server", "conn": line.conn, "msg": line.msg}
            for line in self.lines
        )
        return "".join(json.dumps(row) + "\n" for row in rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.text)


_SECRET_HEADER = re.compile(r"authorization|cookie|key|token|secret", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"key|secret|token|password", re.IGNORECASE)


class Recorder:
    """Writes down what a carrier carries. Give it to `open_fault_proxy` or `open_memory_server`.

    Secrets are replaced, wherever they occur, by what says no more than which is which: session ids, by
    `session-1` and so on; the values of variables and headers whose name speaks of a key, a token, a secret,
    a password or a cookie; and `secrets`. What else a program prints is written down as it is, and a secret
    that it prints in two pieces is not found.

    Args:
        secrets: texts that must not be in the recording.
        texts: other texts to replace, such as the path of a temporary folder, and by what.
    """

    def __init__(self, secrets: Iterable[str] = (), texts: Mapping[str, str] | None = None) -> None:
        self._texts = dict(texts or {})
        self._rows: list[tuple[bool, int, Json]] = []
        self._sessions = 0
        self._secrets = 0
        for secret in secrets:
            self._hide(secret)

    def add(self, frame: Frame) -> None:
        """Write down the message of a frame, if there is one."""
        if frame.message is not None:
            self._learn(frame)
            self._rows.append((frame.direction == "to_server", frame.connection - 1, frame.message))

    def end(self, connection: int) -> None:
        """Write down that a connection has ended."""
        self._rows.append((True, connection - 1, {"closed": True}))

    @property
    def recording(self) -> Recording:
        """What was written down so far."""
        # The longest first: a secret may be a part of another one.
        texts = dict(sorted(self._texts.items(), key=lambda item: len(item[0]), reverse=True))
        return Recording(
            tuple(
                Line(number, sent, conn, replaced(message, texts))
                for number, (sent, conn, message) in enumerate(self._rows, 1)
            )
        )

    def _hide(self, secret: str) -> None:
        if secret and secret not in self._texts:
            self._secrets += 1
            self._texts[secret] = f"secret-{self._secrets}"

    def _hide_session(self, session: Json) -> None:
        if isinstance(session, str) and session and session not in self._texts:
            self._sessions += 1
            self._texts[session] = f"session-{self._sessions}"

    def _learn(self, frame: Frame) -> None:
        """Note what in a message is secret."""
        if not isinstance(frame.message, dict):
            return
        params, result = frame.message.get("params"), frame.message.get("result")
        if frame.method == "initialize":
            for members, name in ((params, "resumeSessionId"), (result, "sessionId")):
                if isinstance(members, dict):
                    self._hide_session(members.get(name))
        if isinstance(params, dict):
            policy = params.get("envPolicy")
            for variables in (params.get("env"), policy.get("set") if isinstance(policy, dict) else None):
                if isinstance(variables, dict):
                    for name, value in variables.items():
                        if _SECRET_VARIABLE.search(name) and isinstance(value, str):
                            self._hide(value)
        for members in (params, result):
            headers = members.get("headers") if isinstance(members, dict) else None
            for header in headers if isinstance(headers, list) else ():
                if isinstance(header, dict) and _SECRET_HEADER.search(str(header.get("name"))):
                    self._hide(str(header.get("value")))


# Playing the server.

_ID_OF_MALFORMED = -1  # protocol.md §2.4
_CLIENT_CHOSEN = ("processId", "writeId", "handleId", "requestId", "watchId")
SameRequest = Callable[[Json, Json], bool]


def same_request(recorded: Json, came: Json) -> bool:
    """Whether a message of a client asks for what a recorded one asks for.

    The names that a client gives to things, and members that the recorded message does not have, may be any.
    """
    if recorded.get("method") != came.get("method") or ("id" in recorded) != ("id" in came):
        return False
    theirs, ours = recorded.get("params") or {}, came.get("params") or {}
    if recorded["method"] == "initialize":
        return bool(theirs.get("resumeSessionId")) == bool(ours.get("resumeSessionId"))
    return all(ours.get(name) == value for name, value in theirs.items() if name not in _CLIENT_CHOSEN)


@define(eq=False)
class _Part:
    """One connection of a recording as it is played: what the client has said, and what it was told."""

    lines: list[Line]
    same: SameRequest
    names: dict[str, str]
    """What the recording calls things, and what this client calls them."""
    ids: dict[Any, Any] = field(factory=dict)
    """The recording's ids of requests that have come, and this client's."""
    done: set[int] = field(factory=set)
    """Places of the lines that have come, or were sent."""

    def receive(self, message: Json) -> bool:
        """Take a message of the client; whether the recording has it."""
        for place, line in enumerate(self.lines):
            if line.sent and not line.is_end and place not in self.done and self.same(line.msg, message):
                self.done.add(place)
                if "id" in message:
                    self.ids[line.msg["id"]] = message["id"]
                theirs, ours = line.msg.get("params"), message.get("params")
                if isinstance(theirs, dict) and isinstance(ours, dict):
                    for name in _CLIENT_CHOSEN:
                        if isinstance(theirs.get(name), str) and isinstance(ours.get(name), str):
                            self.names[theirs[name]] = ours[name]
                return True
        return False

    def answers(self) -> Iterable[Json]:
        """What the server sends now, `None` for the end."""
        for place, line in enumerate(self.lines):
            if place not in self.done and (line.is_end or not line.sent) and self._is_due(place):
                self.done.add(place)
                yield None if line.is_end else self._renamed(line.msg)

    def _is_due(self, place: int) -> bool:
        """Whether all has happened that the server's line at `place` must come behind."""
        line = self.lines[place]
        if line.is_reply and line.msg["id"] not in self.ids and line.msg["id"] != _ID_OF_MALFORMED:
            return False
        subject = self._subject(line)
        for earlier in range(place):
            if earlier in self.done:
                continue
            other = self.lines[earlier]
            if line.is_end or (subject is not None and self._subject(other) == subject):
                if line.is_reply and other.sent:
                    continue  # an answer waits for its own request only
                return False
        return True

    def _subject(self, line: Line) -> str | None:
        if line.is_reply:
            asked = (other for other in self.lines if other.sent and "id" in other.msg)
            return next((other.subject for other in asked if other.msg["id"] == line.msg["id"]), None)
        return line.subject

    def _renamed(self, message: Json) -> Json:
        renamed = _with_names(message, self.names)
        if "id" in message:
            renamed["id"] = self.ids.get(message["id"], message["id"])
        return renamed

    @property
    def missing(self) -> list[str]:
        return [
            str(line.msg.get("method"))
            for place, line in enumerate(self.lines)
            if line.sent and not line.is_end and place not in self.done
        ]


def _with_names(message: Json, names: Mapping[str, str]) -> Json:
    message = dict(message)
    for part in ("params", "result"):
        if isinstance(message.get(part), dict):
            members = message[part] = dict(message[part])
            for name in _CLIENT_CHOSEN:
                if isinstance(members.get(name), str):
                    members[name] = names.get(members[name], members[name])
    return message


class ReplayServer:
    """A server that says what a recording says. Got from `open_replay_server`.

    Attributes:
        mismatches: requests that the recording does not have where they came, and what it has instead.
    """

    def __init__(self, recording: Recording, same: SameRequest) -> None:
        self.mismatches: list[str] = []
        self._listener: MemoryListener
        self._names: dict[str, str] = {}
        self._parts = [_Part(recording.of(conn), same, self._names) for conn in recording.connections]
        self._next = 0

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Channel]:
        """The client's end of the next connection of the recording.

        Raises:
            ConnectFailed: if the recording has no more.
        """
        if self._next >= len(self._parts):
            await trio.lowlevel.checkpoint()
            raise ConnectFailed(f"the recording has {len(self._parts)} connections and no more")
        async with self._listener.dial() as channel:
            yield channel

    @property
    def missing(self) -> Sequence[str]:
        """Methods of the recording's client that have not come, in order."""
        return [method for part in self._parts for method in part.missing]

    async def _serve(self, channel: Channel) -> None:
        part = self._parts[self._next]
        self._next += 1

        def answer() -> None:
            for message in part.answers():
                if message is None:
                    channel.close_nowait()
                    return
                channel.send_nowait(json.dumps(message).encode())

        def receive(data: bytes) -> None:
            message = decode(data)
            if not isinstance(message, dict) or "method" not in message:
                self.mismatches.append("something that is no request")
            elif part.receive(message):
                answer()
            elif "id" in message:
                wanted = " or ".join(part.missing[:1]) or "nothing more"
                said = f"{message['method']} came, and the recording has {wanted}"
                self.mismatches.append(said)
                error = {"code": -32600, "message": f"not as recorded: {said}"}
                channel.send_nowait(json.dumps({"id": message["id"], "error": error}).encode())

        await channel.run(receive)


@asynccontextmanager
async def open_replay_server(
    recording: Recording, *, plan: FaultPlan | None = None, same: SameRequest = same_request
) -> AsyncIterator[ReplayServer]:
    """A server that answers as recorded, for a client that asks as recorded.

    Each connection of the client is the next one of the recording. An answer is sent when its request has
    come, a notification when all has come that the client had said of its process before it, and the end
    behind everything. The client's own names for things are put in.

    Args:
        plan: what happens to the frames.
        same: told a recorded message and one that came, says whether one stands for the other.

    Raises:
        UsageError: at the end of a block that did not fail itself, if a request came that was not as
            recorded. A notification that was not recorded is ignored.
    """
    from execenv.testing.memory import open_memory_listener

    server = ReplayServer(recording, same)
    async with open_memory_listener(server._serve, plan, label="recording") as server._listener:
        yield server
    if server.mismatches:
        raise UsageError("not as recorded: " + "; ".join(server.mismatches))
