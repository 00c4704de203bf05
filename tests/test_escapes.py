"""Nothing gets out of a sandbox: each attempt of `tests/escapes.py` is made, and looked at from outside.

Each is made without a sandbox too where that can be borne: there it does the harm that is looked for.
EXECENV_ESCAPE_SERVER=codex makes them on a released codex's exec-server instead of ours.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import tty
import uuid
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from textwrap import dedent

import pytest
import trio
from attrs import define, frozen

from execenv.sandbox.plan import PROTECTED
from tests.escapes import ESCAPES, OTHERS, Codex, Escape, table
from tests.interop.codex import ProcessMark, require_codex
from tests.sandbox_rows import read, write
from tests.sandboxed import (
    PATIENCE,
    SYSTEM_PYTHON,
    Json,
    Ran,
    RawClient,
    Server,
    Tree,
    context,
    entry,
    glob,
    open_client,
    require_sandbox_tools,
    restricted,
    run_server,
    special,
    users,
)

SERVER = os.environ.get("EXECENV_ESCAPE_SERVER", "execenv")
DOCS = Path(__file__).parents[1] / "docs" / "escapes.md"
ENVIRONMENT_KEY = "EXECENV_TEST_SECRET"

_LAUNCHER = dedent("""\
    import ctypes, os, sys
    terminal, secret, said = sys.argv[1:4]
    libc = ctypes.CDLL(None)
    numbers = {"x86_64": (248, 250), "aarch64": (217, 219)}.get(os.uname().machine)
    serial = 0
    if numbers is not None:
        libc.syscall(numbers[1], 1, None)  # a session keyring of its own, which ends with it
        serial = libc.syscall(numbers[0], b"user", b"execenv-test", secret.encode(), len(secret), -3)
    with open(said, "w") as file: file.write(str(serial))
    os.setsid()
    os.close(os.open(terminal, os.O_RDWR))
    os.execvp(sys.argv[4], sys.argv[4:])
""")
"""Executes a server that has a key in its session keyring, and a controlling terminal."""

_VICTIM = dedent("""\
    import ctypes, sys, time
    file = open(sys.argv[1], "r+")
    buffer = ctypes.create_string_buffer(file.read().encode())
    print(ctypes.addressof(buffer), file.fileno(), flush=True)
    while True: time.sleep(1000)
""")
"""A process outside: its working directory, a descriptor and its memory are worth having."""


@frozen
class Place:
    """A server, and what belongs to its process."""

    server: Server
    token: str
    terminal: int
    terminal_name: str
    key_serial: int


@contextmanager
def open_place(user: int, *wrapper: str) -> Iterator[Place]:
    require_sandbox_tools()
    codex = require_codex() if SERVER == "codex" else None
    token = uuid.uuid4().hex
    with ExitStack() as stack:
        master, slave = pty.openpty()
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        tty.setraw(slave)
        os.chown(os.ttyname(slave), user, -1)
        said = Path(stack.enter_context(_folder()), "serial")
        launcher = [sys.executable, "-c", _LAUNCHER, os.ttyname(slave), f"key-{token}", str(said)]
        secret = {ENVIRONMENT_KEY: f"environment-{token}"}
        server = stack.enter_context(
            run_server(SERVER, codex, user=user, wrapper=[*wrapper, *launcher], **secret)
        )
        yield Place(server, token, slave, os.ttyname(slave), int(said.read_text()))


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="module", params=users(), ids="as {}".format)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with open_place(request.param) as place:
        yield place


@define(eq=False)
class Outside:
    """What is around a workspace, and must be as it was when an attempt is over."""

    place: Place
    tree: Tree
    victim: subprocess.Popen[bytes]
    victim_fd: int
    address: int
    streams: list[socket.socket]
    datagrams: list[socket.socket]
    shm_key: int
    _was: dict[str, tuple[int, int, int]]

    def put(self, files: Mapping[str, str]) -> None:
        """More files, see `Tree.put`: they are as they should be."""
        self.tree.put(files)
        self._was = _state(self.out)

    @property
    def workspace(self) -> Path:
        return self.tree.top / "w"

    @property
    def out(self) -> Path:
        return self.tree.top / "out"

    def sandbox(self, policy: str) -> Json:
        """No network; `out/secret` and `w/private/key` are denied or not there."""
        grants = (special("root"),) if policy == "workspace" else (special("minimal"),)
        denied = [entry(str(self.workspace / "private" / "key"), "deny")]
        if policy == "workspace":
            denied.append(entry(str(self.out / "secret"), "deny"))
        return context(restricted(*grants, entry(str(self.workspace), "write"), *denied))

    def facts(self, *, sandboxed: bool) -> Json:
        return {
            "sandboxed": sandboxed,
            "workspace": str(self.workspace),
            "out": str(self.out),
            "canary": str(self.out / "canary"),
            "secret": str(self.out / "secret"),
            "root_secret": str(self.tree.top / "root-secret"),
            "victim": self.victim.pid,
            "victim_fd": self.victim_fd,
            "address": self.address,
            "server": self.place.server.pid,
            "environment_key": ENVIRONMENT_KEY,
            "tcp": self.streams[0].getsockname()[1],
            "udp": self.datagrams[0].getsockname()[1],
            "unix_paths": [str(self.out / "stream"), str(self.workspace / "stream")],
            "unix_datagrams": [str(self.out / "datagram"), str(self.workspace / "datagram")],
            "abstract": f"stream-{self.tree.top}",
            "abstract_datagram": f"datagram-{self.tree.top}",
            "shm_key": self.shm_key,
            "terminal": self.place.terminal_name,
            "key_name": "execenv-test",
            "key_serial": self.place.key_serial,
        }

    async def run(self, client: RawClient, escape: Escape, *, sandboxed: bool) -> Ran:
        assert SYSTEM_PYTHON is not None
        facts = json.dumps(self.facts(sandboxed=sandboxed))
        argv = [SYSTEM_PYTHON, "-I", "-S", "-c", escape.program, facts]
        sandbox = self.sandbox(escape.policy) if sandboxed else None
        return await client.run(argv, sandbox, cwd=str(self.workspace))

    def harm(self, output: str = "") -> list[str]:
        """What is not as it was, and what was learnt."""
        found = [line for line in output.splitlines() if line.startswith("ESCAPED")]
        if self.place.token in output:
            start = output.index(self.place.token)
            found.append(f"a secret was read: {output[max(start - 20, 0) : start]}…")
        now = _state(self.out)
        found += [
            f"changed: {name}"
            for name in now.keys() | self._was.keys()
            if now.get(name) != self._was.get(name)
        ]
        if self.victim.poll() is not None:
            found.append("a process outside was ended")
        if not _is_alive(self.place.server.pid):
            found.append("the server was ended")
        for one in self.streams:
            with suppress(BlockingIOError):
                one.accept()[0].close()
                found.append(f"a connection to {one.getsockname()!r}")
        for one in self.datagrams:
            with suppress(BlockingIOError):
                one.recv(1000)
                found.append(f"a datagram to {one.getsockname()!r}")
        waiting = fcntl.ioctl(self.place.terminal, termios.FIONREAD, b"\0\0\0\0")
        if waiting != b"\0\0\0\0":
            termios.tcflush(self.place.terminal, termios.TCIFLUSH)
            found.append("input for the terminal of the server")
        found += [
            f"a device: {path}"
            for path in self.workspace.rglob("*")
            if _is_device(path) and path.name != "device"
        ]
        return found + self._protected_names()

    def _protected_names(self) -> list[str]:
        found = []
        for name in (".git", ".codex", ".agents", ".aws"):
            path = self.workspace / name
            if os.path.lexists(f"{path}.old") or path.is_symlink() or path.is_file():
                found.append(f"protected: {name}")
            elif path.is_dir() and (has := sorted(os.listdir(path))) != (
                ["config"] if name == ".git" else []
            ):
                found.append(f"protected: {name} has {has}")
        if self.tree.text("w/.git/config") != "config\n":
            found.append("protected: .git/config")
        return found


def _state(top: Path) -> dict[str, tuple[int, int, int]]:
    """Of all that is there: which file it is, when anything about it changed, and its size."""
    found = {}
    for path in (top, *top.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(top))] = (status.st_ino, status.st_ctime_ns, status.st_size)
    return found


def _is_device(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _listening(kind: int, address: str | tuple[str, int]) -> socket.socket:
    one = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX, kind)
    one.bind(address)
    if kind == socket.SOCK_STREAM:
        one.listen()
    one.setblocking(False)
    return one


@contextmanager
def _shared_memory(text: str) -> Iterator[int]:
    """The key of a segment that everybody may read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    libc.shmdt.argtypes = [ctypes.c_void_p]
    key = uuid.uuid4().int & 0x7FFFFFFF
    segment = libc.shmget(key, 4096, 0o1000 | 0o666)
    assert segment >= 0, os.strerror(ctypes.get_errno())
    where = libc.shmat(segment, None, 0)
    ctypes.memmove(where, text.encode(), len(text))
    try:
        yield key
    finally:
        libc.shmdt(where)
        libc.shmctl(segment, 0, None)


@contextmanager
def open_outside(place: Place) -> Iterator[Outside]:
    """A new workspace and its surroundings."""
    server = place.server
    tree = Tree.make(server)
    out, workspace = tree.top / "out", tree.top / "w"
    text = f"secret-{place.token}"
    tree.put({"out/canary": "untouched\n", "out/secret": text, "w/private/key": text, "root-secret": text})
    with ExitStack() as stack:
        streams = [
            _listening(socket.SOCK_STREAM, address)
            for address in (
                ("127.0.0.1", 0),
                str(out / "stream"),
                str(workspace / "stream"),
                f"\0stream-{tree.top}",
            )
        ]
        datagrams = [
            _listening(socket.SOCK_DGRAM, address)
            for address in (
                ("127.0.0.1", 0),
                str(out / "datagram"),
                str(workspace / "datagram"),
                f"\0datagram-{tree.top}",
            )
        ]
        for one in (*streams, *datagrams):
            stack.enter_context(one)
        tree.give()
        if os.getuid() == 0:
            _things_of_root(tree)
        as_user = {"user": server.user, "group": server.user, "extra_groups": []} if os.getuid() == 0 else {}
        assert SYSTEM_PYTHON is not None
        victim = subprocess.Popen(
            [SYSTEM_PYTHON, "-I", "-S", "-c", _VICTIM, str(out / "secret")],
            cwd=out,
            stdout=subprocess.PIPE,
            env={},
            start_new_session=True,
            **as_user,  # type: ignore[call-overload]
        )
        try:
            address, victim_fd = map(int, victim.stdout.readline().split())
            key = stack.enter_context(_shared_memory(text))
            outside = Outside(place, tree, victim, victim_fd, address, streams, datagrams, key, _state(out))
            yield outside
        finally:
            victim.kill()
            victim.wait()
            victim.stdout.close()


def _things_of_root(tree: Tree) -> None:
    secret = tree.top / "root-secret"
    os.chown(secret, 0, 0)
    secret.chmod(0o600)
    program = tree.top / "w" / "setuid-cat"
    shutil.copy("/bin/cat", program)
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    os.mknod(tree.top / "w" / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    (tree.top / "w" / "device").chmod(0o666)


@pytest.fixture
def outside(place: Place) -> Iterator[Outside]:
    with open_outside(place) as outside:
        yield outside


@pytest.fixture(autouse=True)
def _what_codex_does_not_stop(request: pytest.FixtureRequest) -> None:
    """Where codex is the server, what the table says of it is so."""
    if SERVER != "codex" or "place" not in request.fixturenames:
        return
    test, escape = request.function.__name__, request.node.callspec.params.get("escape")
    others = {name: codex for _, _, name, codex in OTHERS}
    stops: Codex = escape.codex if test == "test_escape_is_stopped" else others.get(test, "yes")
    user = request.getfixturevalue("place").server.user
    if stops == "no" or (stops == "not as root" and user == 0):
        request.applymarker(pytest.mark.xfail(reason="codex does not stop it", strict=True))


@asynccontextmanager
async def client_of(place: Place) -> AsyncIterator[RawClient]:
    with trio.fail_after(PATIENCE):
        async with open_client(place.server.url) as client:
            yield client


def _skip_if_for_others(escape: Escape, user: int) -> None:
    if escape.only is not None and escape.only != ("root" if user == 0 else "nobody"):
        pytest.skip(f"an attempt for a server of {escape.only}")
    if escape.only is not None and os.getuid() != 0:
        pytest.skip("needs root to prepare it")


@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.name)
async def test_escape_is_stopped(escape: Escape, place: Place, outside: Outside) -> None:
    _skip_if_for_others(escape, place.server.user)
    async with client_of(place) as client:
        ran = await outside.run(client, escape, sandboxed=True)
    harm = outside.harm(ran.text)
    assert harm == [], ran.text
    assert "tried\n" in ran.text, ran  # what goes to stderr may come behind it, and in front in the same line


@pytest.mark.parametrize("escape", [one for one in ESCAPES if one.control], ids=lambda escape: escape.name)
async def test_attempt_does_harm_without_a_sandbox(escape: Escape, place: Place, outside: Outside) -> None:
    _skip_if_for_others(escape, place.server.user)
    if escape.control == "root" and place.server.user != 0:
        pytest.skip("only root can do it")
    async with client_of(place) as client:
        ran = await outside.run(client, escape, sandboxed=False)
    assert outside.harm(ran.text) != [], ran


def _python(source: str, *args: str) -> list[str]:
    assert SYSTEM_PYTHON is not None
    return [SYSTEM_PYTHON, "-I", "-S", "-c", dedent(source), *args]


_SWAP = """\
    import ctypes, os, sys
    libc, names = ctypes.CDLL(None), [os.fsencode(name) for name in sys.argv[1:]]
    print("swapping", flush=True)
    while True:
        libc.renameat2(-100, names[0], -100, names[1], 2)
"""
"""Exchanges two names without end, both being there all the time."""


@asynccontextmanager
async def swapping(client: RawClient, sandbox: Json, one: Path, other: Path) -> AsyncIterator[None]:
    """While the block runs, a confined process exchanges two names."""
    process_id, started = await client.start(_python(_SWAP, str(one), str(other)), sandbox)
    assert "result" in started, started
    await client.output(process_id, until=bool)
    try:
        yield
    finally:
        await client.result("process/terminate", {"processId": process_id})
        await client.output(process_id)


async def test_file_calls_do_not_follow_a_link_that_is_swapped_under_them(
    place: Place, outside: Outside
) -> None:
    workspace = outside.workspace
    outside.put({"w/real/secret": "mine\n", "w/swapped": f"-> {outside.out}"})
    read_answers, write_answers = set(), set()
    async with client_of(place) as client:
        sandbox, view = outside.sandbox("workspace"), outside.sandbox("view")
        async with swapping(client, sandbox, workspace / "real", workspace / "swapped"):
            for number in range(40):
                for method, params in (
                    write(f"{workspace}/real/new-{number}"),
                    write(f"{workspace}/real/canary"),
                ):
                    answer = await client.ask(method, {**params, "sandbox": sandbox})
                    write_answers.add(json.dumps(answer.get("error", "written")))
                method, params = read(f"{workspace}/real/secret")
                answer = await client.ask(method, {**params, "sandbox": view})
                read_answers.add(b64decode(answer["result"]["dataBase64"]) if "result" in answer else b"")
    assert read_answers <= {b"mine\n", b""}
    assert outside.harm() == []
    # both sides of the exchange were met, or nothing was shown
    assert len(write_answers) > 1


async def test_nested_entries_hold_while_a_confined_process_swaps_their_directories(
    place: Place, outside: Outside
) -> None:
    workspace, out = outside.workspace, outside.out
    outside.put(
        {
            "w/a/build/mine": "mine\n",
            "w/b": f"-> {out}",
            "out/build/theirs": "theirs\n",
            "w/secrets/key": f"secret-{place.token}",
            "w/decoy/key": "decoy\n",
        }
    )
    nested = context(
        restricted(
            special("root"),
            entry(str(workspace), "write"),
            entry(str(workspace / "a"), "read"),
            entry(str(workspace / "a" / "build"), "write"),
            entry(str(out / "secret"), "deny"),
        )
    )
    denied = context(
        restricted(
            special("root"),
            entry(str(workspace), "write"),
            entry(str(workspace / "secrets" / "key"), "deny"),
            entry(str(out / "secret"), "deny"),
        )
    )
    free = context(
        restricted(special("root"), entry(str(workspace), "write"), entry(str(out / "secret"), "deny"))
    )
    texts: list[str] = []
    build = f"{workspace}/a/build"
    async with client_of(place) as client:
        async with swapping(client, free, workspace / "a", workspace / "b"):
            for number in range(15):
                ran = await client.run(["/bin/sh", "-c", f"echo escaped > {build}/process-{number}"], nested)
                texts.append(ran.text)
                method, params = write(f"{build}/call-{number}")
                await client.ask(method, {**params, "sandbox": nested})
        async with swapping(client, denied, workspace / "secrets", workspace / "decoy"):
            for _ in range(15):
                ran = await client.run(["/bin/cat", f"{workspace}/secrets/key"], denied)
                texts.append(ran.text)
                method, params = read(f"{workspace}/secrets/key")
                answer = await client.ask(method, {**params, "sandbox": denied})
                if "result" in answer:
                    texts.append(b64decode(answer["result"]["dataBase64"]).decode())
    # bubblewrap mounts by path, and makes the mount points of its masks before anybody can look at them
    for name in PROTECTED:
        with suppress(FileNotFoundError):
            (out / "build" / os.fsdecode(name)).rmdir()  # fails if anything came into one
    harm = [one for one in outside.harm("".join(texts)) if one != "changed: build"]
    assert os.listdir(out / "build") == ["theirs"]
    assert harm == [], "\n".join(harm)


async def test_root_that_is_renamed_between_calls_is_not_written_to(place: Place, outside: Outside) -> None:
    workspace, old = outside.workspace, outside.tree.top / "old"
    sandbox = context(restricted(special("root"), entry(str(workspace), "write")))
    async with client_of(place) as client:
        for number in range(3):
            method, params = write(f"{workspace}/before-{number}")
            assert await client.ask(method, {**params, "sandbox": sandbox}) == {"result": {}}
        workspace.rename(old)
        workspace.mkdir()
        outside.tree.give()
        was = _state(old)
        method, params = write(f"{workspace}/after")
        assert await client.ask(method, {**params, "sandbox": sandbox}) == {"result": {}}
        method, params = write(f"{old}/after")
        assert "error" in await client.ask(method, {**params, "sandbox": sandbox})
        ran = await client.run(["/bin/sh", "-c", f"echo x > {old}/process"], sandbox)
        assert ran.exit_code != 0
    assert (workspace / "after").exists()
    assert _state(old) == was


async def test_file_that_a_pattern_denies_is_denied_though_it_came_later(
    place: Place, outside: Outside
) -> None:
    pattern = f"{outside.workspace}/**/*.env"
    sandbox = context(restricted(special("root"), entry(str(outside.workspace), "write"), glob(pattern)))
    texts = []
    async with client_of(place) as client:
        for number in range(3):
            outside.put({f"w/sub/new/{number}.env": f"secret-{place.token}"})
            path = f"{outside.workspace}/sub/new/{number}.env"
            ran = await client.run(["/bin/cat", path], sandbox)
            method, params = read(path)
            answer = await client.ask(method, {**params, "sandbox": sandbox})
            assert answer["error"]["message"] == "Permission denied (os error 13)"
            texts.append(ran.text)
            assert "Permission denied" in ran.text
    assert outside.harm("".join(texts)) == []


async def test_denied_file_is_denied_though_its_directory_was_renamed_inside(
    place: Place, outside: Outside
) -> None:
    workspace = outside.workspace
    sandbox = outside.sandbox("workspace")
    async with client_of(place) as client:
        await client.run(["/bin/mv", f"{workspace}/private", f"{workspace}/renamed"], sandbox)
        ran = await client.run(["/bin/cat", f"{workspace}/renamed/key", f"{workspace}/private/key"], sandbox)
        for name in ("renamed", "private"):
            method, params = read(f"{workspace}/{name}/key")
            answer = await client.ask(method, {**params, "sandbox": sandbox})
            assert "error" in answer
    assert outside.harm(ran.text) == []


async def test_mount_that_is_made_later_stays_outside(outside: Outside) -> None:
    if os.getuid() != 0 or outside.place.server.user != 0:
        pytest.skip("needs root")
    with (
        open_place(0, "unshare", "--mount", "--propagation", "shared", "--") as place,
        open_outside(place) as here,
    ):
        mounted, backing = here.out / "mounted", here.out / "backing"
        here.put({"out/mounted/empty": "", "out/backing/secret": f"secret-{place.token}"})
        script = 'echo ready; read -r line; echo x > "$1/new"; cat "$1/secret"; exit 0'
        argv = ["/bin/sh", "-c", script, "sh", str(mounted)]
        sandbox = context(
            restricted(special("root"), entry(str(here.workspace), "write"), entry(str(backing), "deny"))
        )
        async with client_of(place) as client:
            process_id, started = await client.start(argv, sandbox, pipe_stdin=True)
            assert "result" in started, started
            await client.output(process_id, until=bool)
            enter = ["nsenter", "-m", "-t", str(place.server.pid)]
            await trio.run_process([*enter, "mount", "--bind", str(backing), str(mounted)])
            await client.write(process_id, b"go\n")
            output, _ = await client.output(process_id)
        assert here.harm(output.decode()) == []


_PRELOADED = r"""
#include <stdio.h>
__attribute__((constructor)) static void begin(void) {
    FILE *file = fopen(CANARY, "a");
    if (file) { fputs("escaped\n", file); fclose(file); }
}
"""


async def test_variables_of_the_client_do_nothing_to_bubblewrap(place: Place, outside: Outside) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, program = outside.workspace / "evil.so", outside.workspace / "bin" / "bwrap"
    canary = json.dumps(str(outside.out / "canary"))
    build = [compiler, "-shared", "-fPIC", f"-DCANARY={canary}", "-x", "c", "-", "-o", str(library)]
    await trio.run_process(build, stdin=_PRELOADED.encode())
    outside.put(
        {"w/bin/bwrap": f'#!/bin/sh\necho escaped >> {outside.out}/canary\nexec /usr/bin/bwrap "$@"\n'}
    )
    program.chmod(0o755)
    program.with_name("python3").symlink_to("bwrap")
    hostile = {
        "LD_PRELOAD": str(library),
        "LD_AUDIT": str(library),
        "LD_LIBRARY_PATH": str(outside.workspace),
        "PATH": f"{program.parent}:/usr/bin:/bin",
        "PYTHONPATH": str(outside.workspace),
    }
    read_only = context(restricted(special("root")))
    async with client_of(place) as client:
        for sandbox in (outside.sandbox("workspace"), read_only):
            for variables in (hostile, *({name: value} for name, value in hostile.items())):
                ran = await client.run(["/bin/echo", "ran"], sandbox, env=variables)
                assert "ran" in ran.text
        assert outside.harm() == []
        # the library is one that does it, where nothing confines it
        await client.run(["/bin/true"], None, env={"LD_PRELOAD": str(library)})
        assert outside.harm() == ["changed: canary"]


async def test_variables_of_the_client_are_in_no_command_line(place: Place, outside: Outside) -> None:
    secret = f"variable-{uuid.uuid4().hex}"
    async with client_of(place) as client:
        process_id, started = await client.start(
            ["/bin/sh", "-c", "echo ready; read -r line"],
            outside.sandbox("workspace"),
            env={"PASSWORD": secret},
            pipe_stdin=True,
        )
        assert "result" in started, started
        await client.output(process_id, until=bool)
        lines = [line for line in _command_lines() if secret.encode() in line]
        await client.write(process_id, b"\n")
        await client.output(process_id)
    assert lines == []


def _command_lines() -> list[bytes]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                found.append(Path("/proc", name, "cmdline").read_bytes())
    return found


_DAEMON = """\
    import os, signal, sys, time
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    for _ in range(20):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 3)
                while True: time.sleep(1000)
            os._exit(0)
    noise = b"x" * 100_000
    if "noisy" in sys.argv:
        if os.fork() == 0:
            while True: os.write(2, noise)
    print("ready", flush=True)
    if "stay" in sys.argv: time.sleep(1000)
"""


@pytest.mark.parametrize("words", [("stay",), ("stay", "noisy")], ids="-".join)
@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "terminal"])
async def test_nothing_is_alive_after_terminate(
    place: Place, outside: Outside, words: tuple[str, ...], tty: bool
) -> None:
    mark = ProcessMark()
    async with client_of(place) as client:
        process_id, started = await client.start(
            _python(_DAEMON, *words), outside.sandbox("workspace"), env=mark.env, tty=tty
        )
        assert "result" in started, started
        await client.output(process_id, until=lambda output: b"ready" in output)
        assert len(mark.pids()) > 20
        await client.result("process/terminate", {"processId": process_id})
        await mark.wait_gone()


async def test_nothing_is_alive_after_the_program_has_ended(place: Place, outside: Outside) -> None:
    mark = ProcessMark()
    async with client_of(place) as client:
        ran = await client.run(_python(_DAEMON), outside.sandbox("workspace"), env=mark.env)
        assert (ran.exit_code, ran.output) == (0, b"ready\n")
        await mark.wait_gone()


async def test_nothing_is_alive_after_the_server_was_killed(outside: Outside) -> None:
    mark = ProcessMark()
    with open_place(outside.place.server.user) as place, open_outside(place) as here:
        async with client_of(place) as client:
            for tty in (False, True):
                process_id, started = await client.start(
                    _python(_DAEMON, "stay"), here.sandbox("workspace"), env=mark.env, tty=tty
                )
                assert "result" in started, started
                await client.output(process_id, until=lambda output: b"ready" in output)
            assert len(mark.pids()) > 40
            os.kill(place.server.pid, signal.SIGKILL)
            await mark.wait_gone()


async def test_calls_about_files_read_no_device_and_wait_for_no_fifo(place: Place, outside: Outside) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to make a device")
    async with client_of(place) as client:
        for name in ("device", "fifo"):
            method, params = read(f"{outside.workspace}/{name}")
            answer = await client.ask(method, {**params, "sandbox": outside.sandbox("view")})
            assert "error" in answer
    assert outside.harm() == []


async def test_calls_about_files_do_not_read_what_the_server_has(place: Place, outside: Outside) -> None:
    link = Path(outside.workspace, "environ")
    os.symlink("/proc/self/environ", link)
    folder = Path(outside.workspace, "process")
    os.symlink(f"/proc/{place.server.pid}", folder)
    sandbox = context(restricted(special("root"), entry(str(outside.workspace), "write")))
    secret = f"environment-{place.token}".encode()
    async with client_of(place) as client:
        for path in ("/proc/self/environ", f"/proc/{place.server.pid}/environ", link, folder / "environ"):
            method, params = read(str(path))
            plain = await client.result(method, params)
            assert secret in b64decode(plain["dataBase64"])
            answer = await client.ask(method, {**params, "sandbox": sandbox})
            assert secret not in b64decode(answer.get("result", {}).get("dataBase64", ""))


def test_table_of_the_documentation_is_that_of_the_tests() -> None:
    assert table() in DOCS.read_text()
    assert {test for _, _, test, _ in OTHERS} <= globals().keys()
