"""What is done in an environment behind a relay, whoever is at its ends, and what must come of it."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import trio

from execenv import Environment
from execenv.relay.frames import Body, Data, Handshake
from tests.contract.test_tty import read_until
from tests.http_origin import open_origin
from tests.relay_proxy import Fate, Leg, Piece, RelayProxy, Watch, Way

LONG = 20_000_000


async def check_everything(env: Environment, folder: Path) -> None:
    """One of each thing that an environment is for."""
    done = await env.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert (await env.run(["head", "-c", "5"], input=b"hello, world")).stdout == b"hello"

    async with env.open_process(["sh", "-c", "read x; echo got $x; read x; exit 4"], stdin=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"one\n")
        assert await process.stdout.receive_some() == b"got one\n"
        await process.stdin.send_all(b"two\n")
        assert await process.wait() == 4

    argv = ["sh", "-c", "stty -echo; echo ready; read -r x; echo got $x; test -t 1"]
    async with env.open_process(argv, tty=True) as process:
        assert process.stdin is not None
        await read_until(process, b"ready\r\n")
        await process.stdin.send_all(b"line\n")
        assert await read_until(process, b"line\r\n") == b"got line\r\n"
        assert await process.wait() == 0

    async with env.open_process(["sleep", "1000"]) as process:
        await process.kill()
        assert await process.wait() == 137

    content = os.urandom(3_000_000)
    await env.files.write_file(str(folder / "file"), content)
    assert (folder / "file").read_bytes() == content
    assert await env.files.read_file(str(folder / "file")) == content
    assert {entry.file_name for entry in await env.files.read_directory(str(folder))} == {"file"}

    async with open_origin() as origin:
        response = await env.http.request("GET", origin.url("/echo"))
        assert response.status == 200
    assert (await env.info()).platform_os == "linux"
    received = 0
    async with env.open_process(["head", "-c", str(LONG), "/dev/zero"]) as process:
        async for piece in process.stdout:
            assert not piece.strip(b"\0")
            received += len(piece)
        assert await process.wait() == 0
    assert received == LONG


NUMBERS = b"".join(b"%d\n" % number for number in range(1, 20_001))


async def work(env: Environment, folder: Path, name: str) -> None:
    """Something of a start, of writes and of output, each of which must happen once and whole."""
    script = f"echo x >> {folder}/{name}; seq 20000; while read -r x; do echo got $x; done; exit 6"
    async with env.open_process(["sh", "-c", script], stdin=True) as process:
        assert process.stdin is not None
        for number in range(5):
            await process.stdin.send_all(b"%d\n" % number)
        output = b""
        while not output.endswith(b"got 4\n"):
            output += await process.stdout.receive_some()
        assert output == NUMBERS + b"".join(b"got %d\n" % number for number in range(5))
        await process.kill()
    assert (folder / name).read_bytes() == b"x\n"


def cuts(proxy: RelayProxy, leg: Leg, places: list[tuple[Way, int]]) -> Callable[[], int]:
    """Cut one websocket of a leg after the other, each at its own place: which way, at which piece of that
    way or at the next one; every second one in the middle of the piece. How many were cut is told by what is
    returned."""
    left = list(places)

    def watch(piece: Piece) -> Fate:
        if left and (piece.operation, piece.leg) == ("socket", leg):
            way, index = left[0]
            if piece.way == way and piece.index >= index:
                del left[0]
                return "tear" if len(left) % 2 else "cut"
        return "pass"

    proxy.watch = watch
    return lambda: len(places) - len(left)


def first(wanted: Callable[[Piece], bool], fate: Fate) -> tuple[Watch, trio.Event]:
    """That becomes of the first piece that is so, and an event that says that it has come."""
    met = trio.Event()

    def watch(piece: Piece) -> Fate:
        if met.is_set() or not wanted(piece):
            return "pass"
        met.set()
        return fate

    return watch, met


def body_is(kind: type[Body], leg: Leg, way: Way) -> Callable[[Piece], bool]:
    return lambda piece: (piece.leg, piece.way) == (leg, way) and type(piece.body) is kind


def operation_is(operation: str, leg: Leg, way: Way) -> Callable[[Piece], bool]:
    return lambda piece: (piece.operation, piece.leg, piece.way, piece.index) == (operation, leg, way, 0)


BEGINNINGS = {
    "the look-up": operation_is("connect", "harness", "in"),
    "its answer": operation_is("connect", "harness", "out"),
    "the upgrade": operation_is("socket", "harness", "in"),
    "its answer 101": operation_is("socket", "harness", "out"),
    "the first message": body_is(Handshake, "harness", "in"),
    "the second message": body_is(Handshake, "harness", "out"),
    "the validation": operation_is("validate", "executor", "in"),
    "its answer yes": operation_is("validate", "executor", "out"),
    "the first message at the executor": body_is(Handshake, "executor", "out"),
    "the second message at the executor": body_is(Handshake, "executor", "in"),
}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what other processes do has no event here
        await trio.sleep(0.01)


# What can be read on the way.

MARKERS = {
    "command": b"command-5f1e9a40c2d7",
    "argument": b"argument-91b7c3d8e6a2",
    "output": b"OUTPUT-0C4D2E8F71B9",  # which no command says in this form
    "input": b"input-7a3f5b1d9c80",
    "content": b"content-e2d4c6b8a091",
    "name": b"name-3c5e7091b2d4",
}


async def leave_marks(env: Environment, folder: Path) -> dict[str, bytes]:
    """Have all markers go over the relay, and the id of the session."""
    upper = "OUTPUT-0C4D2E8F71B9".lower()
    script = f"# {MARKERS['command'].decode()}\necho {upper} | tr a-z A-Z; cat"
    done = await env.run(["sh", "-c", script, MARKERS["argument"].decode()], input=MARKERS["input"])
    assert done.stdout == MARKERS["output"] + b"\n" + MARKERS["input"]
    path = str(folder / MARKERS["name"].decode())
    await env.files.write_file(path, b"some " + MARKERS["content"])
    assert MARKERS["content"] in await env.files.read_file(path)
    assert env.session_id is not None
    return {**MARKERS, "session": env.session_id.encode()}


def forms(marker: bytes) -> list[bytes]:
    """How it would look on the wire: as it is, and in base64 at each of the three places of a group."""
    found = [marker]
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + marker).rstrip(b"=")
        # the letters at both ends depend on what stands beside it
        found.append(text[-(-8 * shift // 6) : len(text) - (1 if (shift + len(marker)) % 3 else 0)])
    return found


def seen(pieces: Iterable[Piece], markers: Mapping[str, bytes]) -> set[tuple[Leg, str]]:
    """Which markers, in whatever form, can be read on which leg, in what was passed on."""
    ways: dict[tuple[Leg, Way], bytearray] = {}
    for piece in pieces:
        ways.setdefault((piece.leg, piece.way), bytearray()).extend(_content(piece))
    return {
        (leg, name)
        for (leg, _), data in ways.items()
        for name, marker in markers.items()
        if any(form in data for form in forms(marker))
    }


def _content(piece: Piece) -> bytes:
    """The whole piece; of a message in segments what belongs together, not their frames between."""
    body = piece.body
    return body.payload if isinstance(body, Data) else piece.payload
