"""What a relay costs: environments behind one beside a direct websocket, and what a node carries; in one run.

    python bench/relay.py [--rounds N] [--executors N] [ends] [frames] [idle]

`ends`: everyday things over a direct websocket, and through a relay of one node in clear text and with Noise;
also with codex's own exec-server behind the relay, if there is one. They take turns, and the table shows
medians; the last columns say how many times as good as the direct websocket each is.
`frames`: frames a second that pass a relay of one node, and one of two nodes and a Redis, if there is one;
and how many a node takes in a second of processor time, which says more where the machine is busy.
`idle`: memory and processor time for executors that are only connected. They are simulated, but for their
sockets. Without words: all three.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

import trio
from attrs import frozen
from compare import MIB, find_codex

from execenv import RelayTarget, open_environment
from execenv.relay import frames
from execenv.relay.frames import Data, Frame, Resume
from execenv.relay.registry import Registry, open_registry
from execenv.relay_service import tokens
from execenv.relay_service.store import ANY_ENVIRONMENT, Store
from execenv.targets import Target, WebsocketTarget

DIRECT = "direct"
AT_ONCE = 100
"""Simulated executors that connect at a time."""

Measure = Callable[[Target], Awaitable[tuple[float, ...]]]


# The ends.


def _percentiles(times: list[float]) -> tuple[float, float]:
    ordered = sorted(times)
    return statistics.median(ordered) * 1e3, ordered[len(ordered) * 99 // 100] * 1e3


async def output(target: Target) -> tuple[float, ...]:
    size = 100 * MIB
    async with open_environment(target) as env:
        began = perf_counter()
        async with env.open_process(["head", "-c", str(size), "/dev/zero"]) as process:
            received = 0
            async for chunk in process:
                received += len(chunk.data)
        if received != size:
            raise RuntimeError(f"{size - received} bytes of output are missing")
        return (100 / (perf_counter() - began),)


async def write_file(target: Target) -> tuple[float, ...]:
    data = os.urandom(20 * MIB)
    async with open_environment(target) as env:
        with tempfile.TemporaryDirectory() as folder:
            began = perf_counter()
            await env.files.write_file(f"{folder}/file", data)
            return (20 / (perf_counter() - began),)


async def echo(target: Target) -> tuple[float, ...]:
    times: list[float] = []
    async with open_environment(target) as env, env.open_process(["cat"], stdin=True) as process:
        assert process.stdin is not None
        for _ in range(500):
            began = perf_counter()
            await process.stdin.send_all(b"a line\n")
            await process.stdout.receive_some()
            times.append(perf_counter() - began)
    return _percentiles(times)


async def call(target: Target) -> tuple[float, ...]:
    times: list[float] = []
    async with open_environment(target) as env:
        for _ in range(500):
            began = perf_counter()
            await env.probe()
            times.append(perf_counter() - began)
    return _percentiles(times)


async def calls(target: Target) -> tuple[float, ...]:
    async with open_environment(target) as env:

        async def some() -> None:
            for _ in range(30):
                await env.probe()

        began = perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(some)
        return (64 * 30 / (perf_counter() - began),)


async def connect(target: Target) -> tuple[float, ...]:
    began = perf_counter()
    for _ in range(10):
        async with open_environment(target):
            pass
    return ((perf_counter() - began) / 10 * 1e3,)


MEASURES: tuple[tuple[Measure, tuple[tuple[str, str], ...]], ...] = (
    (output, (("output, 100 MiB", "MiB/s"),)),
    (write_file, (("write_file, 20 MiB", "MiB/s"),)),
    (echo, (("a line to cat and back, p50", "ms"), ("... p99", "ms"))),
    (call, (("environment/status, p50", "ms"), ("... p99 ", "ms"))),
    (calls, (("environment/status, 64 at once", "op/s"),)),
    (connect, (("connect and leave", "ms"),)),
)


@contextmanager
def program(argv: list[str], env: Mapping[str, str], folder: Path) -> Iterator[tuple[int, str]]:
    """A program that runs for the block: its process id, and the line that it prints when it is there."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline().decode().strip()
            if not line:
                raise RuntimeError(f"{argv}: {(folder / 'log').read_text()[-2000:]}")
            yield process.pid, line
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def execenv(*words: str) -> list[str]:
    return [sys.executable, "-m", "execenv", *words]


@frozen
class Relay:
    """A relay that runs."""

    urls: list[str]
    pids: list[int]
    executor_token: str
    harness_token: str
    folder: Path

    @asynccontextmanager
    async def registry(self, role: str, node: int = 0) -> AsyncIterator[Registry]:
        token = self.executor_token if role == "executor" else self.harness_token
        async with open_registry(
            self.urls[node], headers=lambda: {"Authorization": f"Bearer {token}"}
        ) as opened:
            yield opened


async def _add_tokens(store: Store) -> list[str]:
    made = []
    for role in ("executor", "harness"):
        token, record = tokens.make_token(ANY_ENVIRONMENT, role, "", now=time.time(), expires=None)
        await store.add_token(record)
        made.append(token)
    return made


@asynccontextmanager
async def open_relay(folder: Path, *, nodes: int) -> AsyncIterator[Relay]:
    """One node with a file, or more with a Redis."""
    with ExitStack() as stack:
        words, env = ["relay", "serve", "--audit-log", str(folder / "audit")], {}
        if nodes == 1:
            from execenv.relay_service.sqlite import open_sqlite

            words += ["--store", str(folder / "relay.sqlite3")]
            async with open_sqlite(str(folder / "relay.sqlite3")) as store:
                made = await _add_tokens(store)
        else:
            from execenv.relay_service.redis import open_redis_store

            env = {"EXECENV_REDIS_URL": stack.enter_context(_redis(folder))}
            async with open_redis_store(env["EXECENV_REDIS_URL"]) as store:
                made = await _add_tokens(store)
        started = [stack.enter_context(program(execenv(*words), env, folder)) for _ in range(nodes)]
        (folder / "token").write_text(made[0])
        yield Relay([url for _, url in started], [pid for pid, _ in started], made[0], made[1], folder)


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if b"Ready to accept" in line:
                    break
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()


async def measure_ends(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        async with open_relay(folder, nodes=1) as relay:
            url = relay.urls[0]
            pid, direct = stack.enter_context(program(execenv("serve"), {}, folder))
            targets: dict[str, Target] = {DIRECT: WebsocketTarget(direct)}
            servers = {DIRECT: [pid]}
            for security in ("clear", "noise"):
                words = ["serve", "--remote", url, "--environment-id", security]
                words += ["--remote-transport", security, "--api-key-file", str(folder / "token")]
                pid, _ = stack.enter_context(program(execenv(*words), {}, folder))
                servers[f"relay {security}"] = [pid, *relay.pids]
                targets[f"relay {security}"] = RelayTarget(
                    url,
                    security,
                    relay.harness_token,
                    security="clear" if security == "clear" else "noise",
                )
            codex = find_codex()
            if codex is not None:
                await _start_codex(stack, codex, relay)  # a script that starts it: its own time tells nothing
                targets["relay codex"] = RelayTarget(url, "codex", relay.harness_token)
            samples: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for measure, titles in MEASURES:
                    for target_name, target in targets.items():
                        for (title, _), value in zip(titles, await measure(target), strict=True):
                            samples.setdefault((title, target_name), []).append(value)
            rows = [["seconds of processor time for 100 MiB of output", "server", "relay", "client"]]
            rows += [[name, *await _processor_time(targets[name], pids)] for name, pids in servers.items()]
    _print_ends(list(targets), {key: statistics.median(values) for key, values in samples.items()})
    print_rows(rows)


async def _processor_time(target: Target, pids: list[int]) -> list[str]:
    """Of a server, of a relay, and of this process."""
    before, own = [cpu_seconds(pid) for pid in pids], time.process_time()
    await output(target)
    own = time.process_time() - own
    spent = [cpu_seconds(pid) - began for pid, began in zip(pids, before, strict=True)]
    return [*(f"{seconds:.2f}" for seconds in spent), *[""] * (2 - len(pids)), f"{own:.2f}"]


async def _start_codex(stack: ExitStack, codex: str, relay: Relay) -> None:
    home = relay.folder / "codex"
    home.mkdir()
    argv = [codex, "exec-server", "--remote", relay.urls[0], "--environment-id", "codex"]
    env = {**os.environ, "CODEX_HOME": str(home), "CODEX_API_KEY": relay.executor_token}
    nothing = subprocess.DEVNULL
    popen = partial(subprocess.Popen, argv, env=env, stdin=nothing, stdout=nothing, stderr=nothing)
    process = await trio.to_thread.run_sync(popen)
    stack.callback(process.wait)
    stack.callback(process.kill)
    target = RelayTarget(relay.urls[0], "codex", relay.harness_token)
    with trio.fail_after(30):
        async with open_environment(target):
            pass


def _print_ends(names: list[str], medians: Mapping[tuple[str, str], float]) -> None:
    rows = [["", "", *names, *(f"{name} / {DIRECT}" for name in names[1:])]]
    for _, titles in MEASURES:
        for title, unit in titles:
            values = [medians[title, name] for name in names]
            ratios = [values[0] / value if unit == "ms" else value / values[0] for value in values[1:]]
            rows.append([title, unit, *map(_shown, values), *(f"{value:.2f}" for value in ratios)])
    print_rows(rows)


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def print_rows(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip(), flush=True)


# A node by itself: raw sockets, so that both ends cost next to nothing.


def websocket_frame(payload: bytes) -> bytes:
    """As a client sends it; masked with zeros, which leave it as it is."""
    length = len(payload)
    head = bytes([0x82, 0x80 | length]) if length < 126 else b"\x82\xfe" + length.to_bytes(2, "big")
    return head + bytes(4) + payload


async def open_socket(url: str) -> trio.SocketStream:
    """The websocket of a URL, behind its handshake."""
    parts = urlsplit(url)
    stream = await trio.open_tcp_stream(parts.hostname or "", parts.port or 80)
    await stream.send_all(
        f"GET {parts.path}?{parts.query} HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: Upgrade\r\n"
        "upgrade: websocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += await stream.receive_some(1)
    if not reply.startswith(b"HTTP/1.1 101"):
        raise RuntimeError(f"no websocket: {reply.decode()}")
    return stream


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _frames(relay: Relay, size: int, seconds: float) -> tuple[float, float]:
    """Frames a second from an executor at the first node to a harness at the last one; the share of one core
    that each node took."""
    environment_id = f"frames-{size}"
    async with relay.registry("executor") as registry:
        executor = await open_socket((await registry.register(environment_id, None)).url)
    async with relay.registry("harness", -1) as registry:
        harness = await open_socket((await registry.connect(environment_id, None)).url)
    stream_id = "01234567-89ab-cdef-0123-456789abcdef"
    await harness.send_all(websocket_frame(frames.encode(Frame(stream_id, Resume(0)))))
    await executor.receive_some()  # it has the stream
    frame = frames.encode(Frame(stream_id, Data(0, bytes(size - 50))))
    frame = frames.encode(Frame(stream_id, Data(0, bytes(size - 50 + size - len(frame)))))
    sent = websocket_frame(frame) * max(1, 256 * 1024 // size)
    arrives = len(websocket_frame(frame)) - 4  # without a mask
    received = 0

    async def send() -> None:
        while True:
            await executor.send_all(sent)

    async def receive() -> None:
        nonlocal received
        while True:
            received += len(await harness.receive_some(1 << 20))

    async with executor, harness, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
        await trio.sleep(1)
        before, began, cpu = received, perf_counter(), sum(map(cpu_seconds, relay.pids))
        await trio.sleep(seconds)
        took = perf_counter() - began
        rate = (received - before) / arrives / took
        share = (sum(map(cpu_seconds, relay.pids)) - cpu) / took / len(relay.pids)
        nursery.cancel_scope.cancel()
    return rate, share


async def measure_frames(rounds: int) -> None:
    rows = [["frames", "", "per second", "MiB/s", "core of a node", "per second of its core"]]
    for nodes in (1, 2):
        if nodes == 2 and shutil.which("redis-server") is None:
            continue
        for size in (64, 4096, 60 * 1024):
            some = []
            for _ in range(rounds):
                with tempfile.TemporaryDirectory() as folder:
                    async with open_relay(Path(folder), nodes=nodes) as relay:
                        some.append(await _frames(relay, size, 3))
            rate = statistics.median(rate for rate, _ in some)
            share = statistics.median(share for _, share in some)
            title = "one node" if nodes == 1 else "two nodes, by Redis"
            cells = [f"{rate:,.0f}", f"{rate * size / MIB:,.1f}", f"{100 * share:.0f} %"]
            whole = statistics.median(rate / share for rate, share in some)
            rows.append([title, f"{size} B", *cells, f"{whole:,.0f}"])
    print_rows(rows)


async def _stay(stream: trio.SocketStream) -> None:
    """Answer pings, and nothing else."""
    async with stream:
        while data := await stream.receive_some():
            while data[:1] == b"\x89":
                length = data[1]
                await stream.send_all(bytes([0x8A, 0x80 | length]) + bytes(4) + data[2 : 2 + length])
                data = data[2 + length :]


async def measure_idle(count: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_relay(Path(folder), nodes=1) as relay,
            relay.registry("executor") as registry,
            trio.open_nursery() as nursery,
        ):
            (pid,) = relay.pids
            limiter = trio.CapacityLimiter(AT_ONCE)
            streams: list[trio.SocketStream] = []

            async def join(number: int) -> None:
                async with limiter:
                    stream = await open_socket((await registry.register(f"idle-{number}", None)).url)
                streams.append(stream)
                nursery.start_soon(_stay, stream)

            await join(0)
            memory, cpu, began = resident(pid), cpu_seconds(pid), perf_counter()
            async with trio.open_nursery() as joining:
                for number in range(1, count):
                    joining.start_soon(join, number)
            joined = perf_counter() - began
            joining_cpu = cpu_seconds(pid) - cpu
            await trio.sleep(3)
            each = (resident(pid) - memory) / (count - 1)
            cpu = cpu_seconds(pid)
            await trio.sleep(seconds)
            idle = (cpu_seconds(pid) - cpu) / seconds
            print(
                f"{count:,} idle executors: {each / 1024:.1f} KiB each, {resident(pid) / MIB:.0f} MiB "
                f"in all; connected within {joined:.1f} s ({joining_cpu:.1f} s of processor time); then "
                f"{100 * idle:.1f} % of a core over {seconds:g} s",
                flush=True,
            )
            nursery.cancel_scope.cancel()


async def main(parts: list[str], rounds: int, executors: int) -> None:
    if "ends" in parts:
        await measure_ends(rounds)
    if "frames" in parts:
        await measure_frames(rounds)
    if "idle" in parts:
        await measure_idle(1000, 10)
        await measure_idle(executors, 60)


if __name__ == "__main__":
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns for each (3)")
    parser.add_argument("--executors", type=int, default=10_000, help="idle ones, at the end (10,000)")
    parser.add_argument("parts", nargs="*", metavar="PART", help="ends, frames, idle")
    options = parser.parse_args()
    trio.run(partial(main, options.parts or ["ends", "frames", "idle"], options.rounds, options.executors))
