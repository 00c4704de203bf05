"""Servers for tests of the sandbox, ours and a codex's, as root or as nobody; a client that says anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, frozen
from trio_websocket import ConnectionClosed, WebSocketConnection

import execenv
from tests.conftest import ANY_PORT, run_websocket_server
from tests.traces import open_trio_websocket

NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin:/bin")
"""A Python that a sandbox sees wherever it sees `/usr`."""

PATIENCE = 30.0

Json = Any


@frozen
class Ran:
    """A process from its start to its end, or what the start was refused with.

    Attributes:
        output: both streams in the order in which the server had them.
    """

    exit_code: int | None = None
    output: bytes = b""
    denied: bool | None = None
    sandbox_type: str | None = None
    error: Json = None

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


class RawClient:
    """Sends requests as they are, and gives what is answered as it is: `{"result": …}` or `{"error": …}`.

    Attributes:
        moved: texts of the requests that stand for others, in answers the other way round.
    """

    def __init__(self, websocket: WebSocketConnection, moved: Mapping[str, str]) -> None:
        self._websocket = websocket
        self.moved = moved
        self._answers: dict[int, Json] = {}
        self._answered = trio.lowlevel.ParkingLot()
        self._last_id = 0

    async def ask(self, method: str, params: Json) -> Json:
        self._last_id = number = self._last_id + 1
        await self._send({"id": number, "method": method, "params": params})
        while number not in self._answers:
            await self._answered.park()
        answer = self._answers.pop(number)
        if answer is None:
            raise trio.BrokenResourceError
        return {key: answer[key] for key in ("result", "error") if key in answer}

    async def result(self, method: str, params: Json) -> Json:
        """What is answered, if that is no error."""
        answer = await self.ask(method, params)
        assert "result" in answer, answer
        return answer["result"]

    async def initialize(self) -> None:
        await self.result("initialize", {"clientName": "tests", "resumeSessionId": None})
        await self._send({"method": "initialized", "params": {}})

    async def start(
        self,
        argv: Sequence[str],
        sandbox: Json = None,
        *,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        tty: bool = False,
        pipe_stdin: bool = False,
        **more: Json,
    ) -> tuple[str, Json]:
        """Its id, and the answer."""
        process_id = uuid.uuid4().hex
        params = {
            "processId": process_id,
            "argv": list(argv),
            "cwd": file_uri(cwd),
            "env": {"PATH": SYSTEM_PATH, **(env or {})},
            "tty": tty,
            "pipeStdin": pipe_stdin,
            "arg0": None,
            "sandbox": sandbox,
            **more,
        }
        return process_id, await self.ask("process/start", params)

    async def output(
        self, process_id: str, *, until: Callable[[bytes], bool] = lambda output: False
    ) -> tuple[bytes, Json]:
        """All output up to the end, or until it is enough; and the last answer to `process/read`."""
        output, after = b"", 0
        while True:
            read = await self.result(
                "process/read",
                {"processId": process_id, "afterSeq": after, "maxBytes": None, "waitMs": 10_000},
            )
            output += b"".join(b64decode(chunk["chunk"]) for chunk in read["chunks"])
            after = read["nextSeq"] - 1
            if read["closed"] or until(output):
                return output, read

    async def run(
        self,
        argv: Sequence[str],
        sandbox: Json = None,
        *,
        feed: bytes | None = None,
        **how: Any,
    ) -> Ran:
        """Run it to its end. `feed` is written when the first output has come."""
        process_id, started = await self.start(argv, sandbox, pipe_stdin=feed is not None, **how)
        if "error" in started:
            return Ran(error=started["error"])
        if feed is not None:
            await self.output(process_id, until=bool)
            await self.write(process_id, feed)
        output, end = await self.output(process_id)
        return Ran(end["exitCode"], output, end["sandboxDenied"], started["result"].get("sandboxType"))

    async def write(self, process_id: str, data: bytes) -> None:
        chunk = b64encode(data).decode()
        write_id = uuid.uuid4().hex
        await self.result("process/write", {"processId": process_id, "chunk": chunk, "writeId": write_id})

    async def receive(self) -> None:
        """Hand answers to who waits for them, until the connection ends."""
        try:
            while True:
                text = str(await self._websocket.get_message())
                for here, there in self.moved.items():
                    text = text.replace(there, here)
                message = json.loads(text)
                if "id" in message:
                    self._answers[message["id"]] = message
                    self._answered.unpark_all()
        except ConnectionClosed:
            for number in range(1, self._last_id + 1):
                self._answers.setdefault(number, None)
            self._answered.unpark_all()

    async def _send(self, message: Json) -> None:
        text = json.dumps(message)
        for here, there in self.moved.items():
            text = text.replace(here, there)
        await self._websocket.send_message(text)


@asynccontextmanager
async def open_client(url: str, moved: Mapping[str, str] | None = None) -> AsyncIterator[RawClient]:
    """A client after its handshake."""
    async with open_trio_websocket(url) as websocket, trio.open_nursery() as nursery:
        client = RawClient(websocket, moved or {})
        nursery.start_soon(client.receive)
        await client.initialize()
        yield client
        nursery.cancel_scope.cancel()


def file_uri(path: str | Path) -> str:
    return Path(path).as_uri()


# Sandboxes as the wire has them.


def entry(path: str, access: str) -> Json:
    return {"path": {"type": "path", "path": f"file://{path}"}, "access": access}


def glob(pattern: str, access: str = "deny") -> Json:
    return {"path": {"type": "glob_pattern", "pattern": pattern}, "access": access}


def special(kind: str, access: str = "read", **more: str) -> Json:
    return {"path": {"type": "special", "value": {"kind": kind, **more}}, "access": access}


def restricted(*entries: Json, network: str = "restricted", **more: Json) -> Json:
    """`permissions` with these entries."""
    files = {"type": "restricted", "entries": list(entries), **more}
    return {"type": "managed", "network": network, "file_system": files}


def context(permissions: Json, **more: Json) -> Json:
    """`sandbox` with these permissions and nothing that they do not need."""
    return {"permissions": permissions, "windowsSandboxLevel": "disabled", **more}


# Servers.


@frozen
class Server:
    """A running server.

    Attributes:
        name: "execenv" or "codex".
        user: its uid.
        top: a directory that its user may write, and others may see; its HOME and TMPDIR are below.
        environ: of its process.
    """

    name: str
    url: str
    pid: int
    user: int
    top: Path
    environ: Mapping[str, str]

    @property
    def ours(self) -> bool:
        return self.name == "execenv"


@contextmanager
def run_server(
    name: str,
    codex: Path | None = None,
    *,
    user: int | None = None,
    wrapper: Sequence[str] = (),
    **environ: str,
) -> Iterator[Server]:
    """Run a server of a kind until the block is left.

    Args:
        codex: the program, for a "codex".
        user: who it runs as; whoever we are if `None`.
        wrapper: a command that executes it.
        environ: added to its environment, which is a small one.
    """
    user = os.getuid() if user is None else user
    top = Path(os.path.realpath(tempfile.mkdtemp(prefix="server-")))
    try:
        top.chmod(0o755)
        for folder in ("home", "tmp"):
            (top / folder).mkdir(mode=0o700)
        env = {
            "PATH": SYSTEM_PATH,
            "LANG": "C.UTF-8",
            "HOME": str(top / "home"),
            "CODEX_HOME": str(top / "home"),
            "TMPDIR": str(top / "tmp"),
            **environ,
        }
        as_user: tuple[str, ...] = ()
        if user != os.getuid():
            assert user == NOBODY
            as_user = AS_NOBODY
            for path in (top, top / "home", top / "tmp"):
                os.chown(path, user, user)
        argv = _ours(as_user, env) if name == "execenv" else _codex(codex, as_user, top)
        with run_websocket_server([*wrapper, *as_user, *argv], env) as server:
            if not server.url.startswith("ws://"):
                server.log.seek(0)
                pytest.fail(f"{argv} gave no URL: {server.log.read().decode(errors='replace')}")
            yield Server(name, server.url, server.process.pid, user, top, env)
    finally:
        # what a test made unreadable, or has not ended yet, is no failure of it
        shutil.rmtree(top, ignore_errors=True)


def _ours(as_user: Sequence[str], env: dict[str, str]) -> list[str]:
    """The command line of our server, and what it needs in its environment."""
    package = str(Path(execenv.__file__).parents[1])
    env["PYTHONPATH"] = package
    tried = [sys.executable]
    if as_user:
        # A Python below the home of root is not for others (setpriv may execute it all the same, and it
        # cannot find itself then), and the system's can use the same packages.
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        tried = [f"/usr/bin/python{version}", f"/usr/local/bin/python{version}", *tried]
    for python in tried:
        if python != sys.executable:
            env["PYTHONPATH"] = f"{package}:{sysconfig.get_path('purelib')}:{sysconfig.get_path('platlib')}"
        argv = [python, "-m", "execenv", "serve", "--listen", ANY_PORT]
        if not as_user or _starts([*as_user, python, "-m", "execenv", "--version"], env):
            return argv
    pytest.skip(f"uid {NOBODY} can run neither of {tried} with this package and what it needs")


def _codex(codex: Path | None, as_user: Sequence[str], top: Path) -> list[str]:
    """The command line of codex's server, without the script of npm around it."""
    assert codex is not None
    native = next(codex.resolve().parents[2].glob("**/vendor/*/bin/codex"), codex)
    if as_user:  # it executes itself again, and may lie below the home of root
        try:
            os.link(native, top / "codex")
        except OSError:
            shutil.copy2(native, top / "codex")
        native = top / "codex"
    argv = [str(native), "exec-server", "--listen", ANY_PORT]
    if as_user and not _starts([*as_user, str(native), "--version"], {"PATH": SYSTEM_PATH}):
        pytest.skip(f"uid {NOBODY} cannot run {native}")
    return argv


def _starts(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    return subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False).returncode == 0


def require_sandbox_tools() -> None:
    """Skip the test where no sandbox can be had; with EXECENV_REQUIRE_TOOLS=1 it fails."""
    missing = [tool for tool in ("bwrap", "setpriv") if not shutil.which(tool, path=SYSTEM_PATH)]
    if SYSTEM_PYTHON is None:
        missing.append("python3 in /usr/bin")
    if missing:
        reason = f"not installed here: {', '.join(missing)}"
        if os.environ.get("EXECENV_REQUIRE_TOOLS") == "1":
            pytest.fail(f"EXECENV_REQUIRE_TOOLS=1, but {reason}")
        pytest.skip(reason)


def users() -> list[int]:
    """Who the servers of tests can run as."""
    return [0, NOBODY] if os.getuid() == 0 else [os.getuid()]


@define(eq=False)
class Tree:
    """Files for a test: a workspace `w`, a bare one `v`, and `out` beside them."""

    top: Path
    owner: int

    @classmethod
    def make(cls, server: Server) -> Tree:
        tree = cls(Path(tempfile.mkdtemp(dir=server.top, prefix="srv-")), server.user)
        tree.top.chmod(0o755)
        tree.fill()
        tree.give()
        return tree

    def put(self, files: Mapping[str, str]) -> None:
        """More files; a text `-> target` makes a link."""
        for name, text in files.items():
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("-> "):
                path.symlink_to(text.removeprefix("-> "))
            else:
                path.write_text(text)
        self.give()

    def give(self) -> None:
        """Let the server's user own all of it."""
        if self.owner != os.getuid():
            for path in (self.top, *self.top.rglob("*")):
                os.chown(path, self.owner, self.owner, follow_symlinks=False)

    def fill(self) -> None:
        for folder in ("w/sub/deep", "w/.git", "out/sub", "v"):
            (self.top / folder).mkdir(parents=True)
        for name, text in {
            "w/a.txt": "hi!\n",
            "w/.env": "key\n",
            "w/.git/config": "config\n",
            "w/sub/b.txt": "b\n",
            "w/sub/.env": "sub key\n",
            "w/sub/deep/c.txt": "c\n",
            "v/a.txt": "hi!\n",
            "out/s.txt": "secret\n",
            "out/sub/t.txt": "t\n",
        }.items():
            (self.top / name).write_text(text)
        for name, target in {
            "w/link": "../out/s.txt",
            "w/dlink": "../out",
            "w/inlink": "a.txt",
            "w/gone": "nothing",
            "link-to-w": "w",
        }.items():
            (self.top / name).symlink_to(target)
        os.link(self.top / "out/s.txt", self.top / "w/hard")
        os.mkfifo(self.top / "w/fifo")
        (self.top / "w/run.sh").write_text("#!/bin/sh\necho ran\n")
        (self.top / "w/run.sh").chmod(0o755)

    def text(self, name: str) -> str | None:
        """What is in a file; `None` if there is none."""
        try:
            return (self.top / name).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
