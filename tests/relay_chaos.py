"""A relay whose parts are killed while a command prints, checked to the byte. `nox -s soak` runs many rounds.

    python -m tests.relay_chaos [--rounds N] [--seed SEED] [--mib MIB] [--kind KIND ...]

Everything is a process of its own on loopback: an executor, one node with a file or two with a Redis, and
before them a small load balancer, which both ends take for the relay. In each round a command prints a
pattern that no place of which looks like another, and at places that the seed names something is killed,
stopped or cut. Afterwards every byte has arrived once, the exit status is right, `env.run` works, and no
process is left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import trio
from attrs import Factory, define, frozen

from execenv import RelayTarget, open_environment
from execenv.relay_service import tokens
from execenv.relay_service.store import ANY_ENVIRONMENT, Store
from tests.fakes import unmeasured

MIB = 1 << 20
BLOCK = 1 << 16
PATIENCE = 90.0
"""Seconds for a round. Far more than the 45 s in which a session is to be back."""
START = 20.0
"""Seconds for a process to say that it is there."""
MARK = "EXECENV_CHAOS"
"""The variable by which what an executor has started is known again."""

PRINT = """
import hashlib, sys
seed, size, status = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for start in range(0, size, 65536):
    block = hashlib.shake_128(f"{seed} {start}".encode()).digest(65536)
    sys.stdout.buffer.write(block[: size - start])
sys.stdout.buffer.flush()
sys.exit(status)
"""


class Wrong(AssertionError):
    """What has arrived is not what was sent, or something is left over."""


@define
class Pattern:
    """What `PRINT` prints, to be compared piece by piece."""

    seed: int
    position: int = 0
    _rest: memoryview = Factory(lambda: memoryview(b""))

    def check(self, piece: bytes | bytearray) -> None:
        """Compare a piece with what is to stand next.

        Raises:
            Wrong: if it differs.
        """
        given = memoryview(piece)
        while given:
            if not self._rest:
                block = hashlib.shake_128(f"{self.seed} {self.position}".encode())
                self._rest = memoryview(block.digest(BLOCK))
            length = min(len(given), len(self._rest))
            if given[:length] != self._rest[:length]:
                raise Wrong(f"what came at byte {self.position} is not what was printed there")
            given, self._rest = given[length:], self._rest[length:]
            self.position += length


# Processes.


def _popen(argv: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as stderr:
        return subprocess.Popen(
            argv,
            env=unmeasured() | dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )


def _text(log: Path) -> str:
    return log.read_text()[-2000:]


async def start(
    argv: list[str], env: Mapping[str, str], log: Path, word: bytes
) -> tuple[subprocess.Popen[bytes], str]:
    """A program of ours, and the line with `word` that it prints when it is there."""
    process = _popen([sys.executable, "-m", "execenv", *argv], log, env)
    assert process.stdout is not None
    descriptor = os.dup(process.stdout.fileno())
    process.stdout.close()
    printed = b""
    try:
        async with trio.lowlevel.FdStream(descriptor) as stdout:
            with trio.fail_after(START):
                while not (word in printed and printed.endswith(b"\n")):
                    data = await stdout.receive_some()
                    if not data:
                        raise Wrong(f"execenv {argv[0]} has not started: {_text(log)}")
                    printed += data
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process, printed.decode().strip()


def marked(mark: str) -> Iterator[str]:
    """What processes are there that have inherited a mark."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    yield f"{entry.name} {b' '.join(words)[:80].decode(errors='replace')}"


@define(eq=False)
class Node:
    """One `execenv relay serve`, on one port for all its lives."""

    argv: list[str]
    env: Mapping[str, str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        listen = ["--listen", f"http://127.0.0.1:{self.port}"]
        self.process, url = await start(["relay", "serve", *listen, *self.argv], self.env, self.log, b"http")
        self.port = int(url.rpartition(":")[2])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


# The load balancer.


@define(eq=False)
class Connection:
    """One TCP connection through the load balancer: of an executor, a harness, or to the registry."""

    role: str
    node: Node
    scope: trio.CancelScope


@define(eq=False)
class Balancer:
    """Gives every connection to any node that is alive; a harness not to the one that has the executor, if
    there is another, so that frames cross."""

    random: Random
    nodes: list[Node] = Factory(list)
    connections: set[Connection] = Factory(set)
    port: int = 0

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=128)
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve_one, listeners)

    async def wait_for(self, role: str) -> Connection:
        """The websocket of a role, as soon as there is one: it may be away for an earlier fault."""
        while True:
            for connection in self.connections:
                if connection.role == role and not connection.scope.cancel_called:
                    return connection
            await trio.sleep(0.01)

    async def cut(self, role: str) -> None:
        (await self.wait_for(role)).scope.cancel()

    async def _serve_one(self, client: trio.SocketStream) -> None:
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            async with client:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = await client.receive_some()
                    if not data:
                        return
                    head += data
                await self._pass(client, head)

    async def _pass(self, client: trio.SocketStream, head: bytes) -> None:
        found = re.match(rb"GET /rendezvous/[^ ]*role=([a-z]+)", head)
        role = "registry" if found is None else found[1].decode()
        for node in self._choice(role):
            try:
                server = await trio.open_tcp_stream("127.0.0.1", node.port)
            except OSError:
                continue
            break
        else:
            return
        connection = Connection(role, node, trio.CancelScope())
        self.connections.add(connection)
        try:
            async with server:
                with connection.scope:
                    await server.send_all(head)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_pump, client, server, nursery.cancel_scope)
                        nursery.start_soon(_pump, server, client, nursery.cancel_scope)
                if connection.scope.cancelled_caught and self.random.random() < 0.5:
                    for stream in (client, server):  # a reset, and what was on the way is lost
                        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            self.connections.discard(connection)

    def _choice(self, role: str) -> list[Node]:
        nodes = [node for node in self.nodes if node.process is not None]
        self.random.shuffle(nodes)
        taken = {connection.node.port for connection in self.connections if connection.role == "executor"}
        if role == "harness":
            nodes.sort(key=lambda node: node.port in taken)
        return nodes


async def _pump(source: trio.SocketStream, to: trio.SocketStream, scope: trio.CancelScope) -> None:
    with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await source.receive_some(BLOCK):
            await to.send_all(data)
    scope.cancel()


# Redis.


@define(eq=False)
class Redis:
    """A Redis that writes down what it is told before it answers."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def start(self) -> None:
        program = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin")
        assert program is not None
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        where = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder))
        keep = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
        self.process = _popen([program, *where, *keep, "--logfile", "log"], self.folder / "log", {})
        with trio.fail_after(START):
            while not await self._answers():  # noqa: ASYNC110 - there is nothing to be told by
                await trio.sleep(0.02)

    async def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise Wrong("Redis has not started")
        with suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
                await stream.send_all(b"PING\r\n")
                return await stream.receive_some() == b"+PONG\r\n"
        return False

    def kill(self) -> None:
        if self.process is not None:
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def keep_copy(self) -> None:
        """What it has now, `restore_copy` brings back."""
        shutil.copytree(self.folder / "appendonlydir", self.folder / "copy")

    def restore_copy(self) -> None:
        shutil.rmtree(self.folder / "appendonlydir")
        shutil.copytree(self.folder / "copy", self.folder / "appendonlydir")


# All of it.


@define(eq=False)
class World:
    """A relay, and what may happen to it."""

    folder: Path
    random: Random
    balancer: Balancer
    harness_token: str
    redis: Redis | None = None
    _one_at_a_time: trio.Lock = Factory(trio.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.balancer.port}"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    async def suffer(self, fault: Fault) -> None:
        async with self._one_at_a_time:
            await fault(self)

    async def restart_node(self, node: Node) -> None:
        node.kill()
        await trio.sleep(self.random.uniform(0, 1))
        await node.start()

    async def restart_relay(self) -> None:
        await self.restart_node(self.balancer.nodes[0])

    async def restart_executors_node(self) -> None:
        await self.restart_node((await self.balancer.wait_for("executor")).node)

    async def restart_harness_node(self) -> None:
        await self.restart_node((await self.balancer.wait_for("harness")).node)

    async def restart_redis(self) -> None:
        assert self.redis is not None
        self.redis.kill()
        await trio.sleep(self.random.uniform(0, 1))
        await self.redis.start()

    async def empty_redis(self) -> None:
        """It has the tokens, from a copy, and nothing else: without those nothing can go on."""
        assert self.redis is not None
        self.redis.kill()
        self.redis.restore_copy()
        await trio.sleep(self.random.uniform(0, 1))
        await self.redis.start()

    async def stop_redis(self) -> None:
        assert self.redis is not None
        assert self.redis.process is not None
        self.redis.process.send_signal(signal.SIGSTOP)
        try:
            await trio.sleep(3)
        finally:
            self.redis.process.send_signal(signal.SIGCONT)

    async def cut_executor(self) -> None:
        await self.balancer.cut("executor")

    async def cut_harness(self) -> None:
        await self.balancer.cut("harness")


Fault = Callable[[World], Awaitable[None]]

ONE_NODE: Mapping[str, Fault] = {
    "relay killed": World.restart_relay,
    "executor cut": World.cut_executor,
    "harness cut": World.cut_harness,
}
TWO_NODES: Mapping[str, Fault] = {
    "Redis killed": World.restart_redis,
    "Redis emptied": World.empty_redis,
    "Redis stopped": World.stop_redis,
    "executor's node killed": World.restart_executors_node,
    "harness's node killed": World.restart_harness_node,
    "executor cut, two nodes": World.cut_executor,
    "harness cut, two nodes": World.cut_harness,
}


async def _add_tokens(store: Store) -> tuple[str, str]:
    made = []
    for role in ("executor", "harness"):
        token, record = tokens.make_token(ANY_ENVIRONMENT, role, "", now=time.time(), expires=None)
        await store.add_token(record)
        made.append(token)
    return made[0], made[1]


@asynccontextmanager
async def open_world(folder: Path, random: Random, *, nodes: int) -> AsyncIterator[World]:
    """A relay of one node with a file, or of several with a Redis."""
    balancer = Balancer(random)
    redis = None
    async with trio.open_nursery() as nursery:
        await nursery.start(balancer.serve)
        argv = ["--public-url", f"http://127.0.0.1:{balancer.port}"]
        env: dict[str, str] = {}
        try:
            if nodes == 1:
                from execenv.relay_service.sqlite import open_sqlite

                file = str(folder / "relay.sqlite3")
                argv += ["--store", file]
                async with open_sqlite(file) as store:
                    executor_token, harness_token = await _add_tokens(store)
            else:
                from execenv.relay_service.redis import open_redis_store

                (folder / "redis").mkdir()
                redis = Redis(folder / "redis")
                await redis.start()
                env["EXECENV_REDIS_URL"] = redis.url
                async with open_redis_store(redis.url) as store:
                    executor_token, harness_token = await _add_tokens(store)
                redis.keep_copy()
            (folder / "executor-token").write_text(executor_token)
            for number in range(nodes):
                node = Node(argv, env, folder / f"node-{number}.log")
                balancer.nodes.append(node)
                await node.start()
            yield World(folder, random, balancer, harness_token, redis)
        finally:
            for node in balancer.nodes:
                node.kill()
            if redis is not None:
                redis.kill()
        nursery.cancel_scope.cancel()


@frozen
class Report:
    """One round: how long it took, and the longest time in which nothing came."""

    kind: str
    faults: int
    seconds: float
    silence: float


async def run_round(world: World, kind: str, fault: Fault, *, seed: int, mib: int, faults: int) -> Report:
    """A command prints, and that happens meanwhile.

    Raises:
        Wrong: if anything is not as it is to be.
    """
    random = Random(f"{kind} {seed}")
    size = mib * MIB + random.randrange(BLOCK)
    status = random.randrange(1, 120)
    places = sorted(random.randrange(size // 20, size * 9 // 10) for _ in range(faults))
    mark = secrets.token_hex(8)
    environment_id = f"box-{mark}"
    argv = ["serve", "--remote", world.url, "--environment-id", environment_id]
    argv += ["--api-key-file", str(world.folder / "executor-token")]
    began = time.monotonic()
    with trio.fail_after(PATIENCE):
        executor, _ = await start(argv, {MARK: mark}, world.folder / "executor.log", b"registered")
        try:
            target = RelayTarget(world.url, environment_id, world.harness_token)
            async with open_environment(target) as env, trio.open_nursery() as nursery:
                command = [sys.executable, "-c", PRINT, str(seed), str(size), str(status)]
                pattern, silence, last = Pattern(seed), 0.0, time.monotonic()
                async with env.open_process(command) as process:
                    async for piece in process.stdout:
                        now = time.monotonic()
                        silence, last = max(silence, now - last), now
                        pattern.check(piece)
                        while places and pattern.position >= places[0]:
                            del places[0]
                            nursery.start_soon(world.suffer, fault)
                    code = await process.wait()
                if (pattern.position, code) != (size, status):
                    raise Wrong(f"{pattern.position} of {size} bytes came, status {code} and not {status}")
                done = await env.run(["echo", "still here"])
                if done.stdout != b"still here\n":
                    raise Wrong(f"a command printed {done.stdout!r}")
            executor.terminate()
            while executor.poll() is None:  # noqa: ASYNC110 - there is nothing to be told by
                await trio.sleep(0.01)
        finally:
            executor.kill()
            executor.wait()
    left = list(marked(mark))
    if left:
        raise Wrong(f"left over: {left}")
    return Report(kind, faults, time.monotonic() - began, silence)


async def run(rounds: int, first: int, mib: int, kinds: list[str]) -> list[str]:
    """Rounds of all kinds in turn; what has failed."""
    reports: list[Report] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, faults, nodes in (("one", ONE_NODE, 1), ("two", TWO_NODES, 2)):
            wanted = [kind for kind in faults if not kinds or kind in kinds]
            if not wanted:
                continue
            (Path(folder) / name).mkdir()
            random = Random(f"{name} {first}")
            async with open_world(Path(folder) / name, random, nodes=nodes) as world:
                for number in range(rounds):
                    for kind in wanted:
                        seed = first + number
                        count = random.choice((1, 1, 2))
                        try:
                            report = await run_round(
                                world, kind, faults[kind], seed=seed, mib=mib, faults=count
                            )
                        except Exception as error:
                            failed.append(f"--kind {kind!r} --seed {seed} --rounds 1")
                            print(f"{kind}, seed {seed}: {error!r}", flush=True)
                            for log in sorted((Path(folder) / name).glob("*.log")):
                                print(f"{log.name}: ...{_text(log)}", flush=True)
                        else:
                            reports.append(report)
                            print(f"{kind}, seed {seed}: {report.seconds:.1f} s", flush=True)
    print(f"{'':26} rounds  faults    MiB  median s  longest silence s")
    for kind in dict.fromkeys(report.kind for report in reports):
        some = [report for report in reports if report.kind == kind]
        print(
            f"{kind:26} {len(some):6} {sum(report.faults for report in some):7} {len(some) * mib:6} "
            f"{statistics.median(report.seconds for report in some):9.1f} "
            f"{max(report.silence for report in some):18.1f}"
        )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each kind (3)")
    parser.add_argument("--seed", type=int, help="of the first round; each has one more")
    parser.add_argument("--mib", type=int, default=100, help="that the command prints (100)")
    parser.add_argument(
        "--kind", action="append", default=[], choices=[*ONE_NODE, *TWO_NODES], help="only these"
    )
    options = parser.parse_args()
    seed = secrets.randbelow(10**9) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Trio's way to end, also in the background
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    failed = trio.run(run, options.rounds, seed, options.mib, options.kind)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
