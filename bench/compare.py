"""A yardstick: how fast a server does the everyday things, side by side with others, in one run.

    python bench/compare.py [--rounds N] [--sandbox] [NAME=COMMAND ...]

Without words it takes this machine without a server (`local`), `execenv serve`, and `codex exec-server` if
there is one: where EXECENV_CODEX says, on PATH, or where the interop tests put it. A COMMAND prints its
ws:// URL on a line of its own. They take turns, and the table shows medians. The last columns say how many
times better `execenv` is than the other servers: above 1 is ahead, whatever the unit. Below 1.3 it may be
noise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import trio

from execenv import Environment, EnvironmentPath, SandboxProfile, open_environment

MIB = 1 << 20
LOCAL, OURS = "local", "execenv"

Measure = Callable[[str], Awaitable[float]]
Measures = Sequence[tuple[str, Measure, str]]
MakeProfile = Callable[[EnvironmentPath], SandboxProfile]
FileWork = Callable[[EnvironmentPath], Awaitable[None]]


async def _seconds_each(action: Callable[[], Awaitable[object]], count: int) -> float:
    began = perf_counter()
    for _ in range(count):
        await action()
    return (perf_counter() - began) / count


async def connect(target: str) -> float:
    """Milliseconds to open an environment, handshake included, and to leave it."""

    async def once() -> None:
        async with open_environment(target):
            pass

    return await _seconds_each(once, 20) * 1e3


async def spawn(target: str) -> float:
    """Milliseconds of `/bin/true` from its start to its end, one after another."""
    async with open_environment(target) as env:
        return await _seconds_each(partial(env.run, ["/bin/true"]), 100) * 1e3


async def spawn_at_once(target: str) -> float:
    """Runs of `/bin/true` per second, 16 at a time."""
    async with open_environment(target) as env:

        async def some() -> None:
            for _ in range(12):
                await env.run(["/bin/true"])

        began = perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(some)
        return 16 * 12 / (perf_counter() - began)


async def echo(target: str) -> float:
    """Milliseconds for a line to a running `cat` and back."""
    async with open_environment(target) as env, env.open_process(["cat"], stdin=True) as process:

        async def there_and_back() -> None:
            assert process.stdin is not None
            await process.stdin.send_all(b"a line\n")
            await process.stdout.receive_some()

        await there_and_back()
        return await _seconds_each(there_and_back, 300) * 1e3


async def output(target: str) -> float:
    """MiB per second of output that a program writes as fast as it can."""
    size = 64 * MIB
    async with open_environment(target) as env:
        began = perf_counter()
        async with env.open_process(["head", "-c", str(size), "/dev/zero"]) as process:
            received = 0
            async for chunk in process:
                received += len(chunk.data)
        if received != size:
            raise RuntimeError(f"{size - received} bytes of output are missing")
        return size / MIB / (perf_counter() - began)


async def rpc(target: str) -> float:
    """Calls per second, one after another."""
    async with open_environment(target) as env:
        return 1 / await _seconds_each(env.probe, 500)


async def rpc_pipelined(target: str) -> float:
    """Calls per second, 64 under way at a time."""
    async with open_environment(target) as env:

        async def some() -> None:
            for _ in range(40):
                await env.probe()

        began = perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(some)
        return 64 * 40 / (perf_counter() - began)


@asynccontextmanager
async def _folder(target: str) -> AsyncIterator[tuple[Environment, EnvironmentPath]]:
    """A directory in the environment. All of them are on this machine."""
    async with open_environment(target) as env:
        with tempfile.TemporaryDirectory() as folder:
            yield env, env.path(folder)


async def stat(target: str) -> float:
    """Calls per second, one after another."""
    async with _folder(target) as (_, folder):
        return 1 / await _seconds_each(folder.stat, 500)


async def read_small(target: str) -> float:
    """Files of 1 KiB per second, one after another."""
    async with _folder(target) as (_, folder):
        await (folder / "small").write_bytes(bytes(1024))
        return 1 / await _seconds_each((folder / "small").read_bytes, 300)


async def write_small(target: str) -> float:
    async with _folder(target) as (_, folder):
        return 1 / await _seconds_each(partial((folder / "small").write_bytes, bytes(1024)), 300)


async def download(target: str) -> float:
    """MiB per second of a file of 64 MiB, to a file here."""
    async with _folder(target) as (env, folder):
        await env.run(["sh", "-c", f"head -c {64 * MIB} /dev/zero > {folder / 'large'}"])
        began = perf_counter()
        await env.files.download(folder / "large", str(folder / "copy"))
        return 64 / (perf_counter() - began)


async def upload(target: str) -> float:
    """MiB per second of a file of 64 MiB, from a file here."""
    async with _folder(target) as (env, folder):
        await env.run(["sh", "-c", f"head -c {64 * MIB} /dev/zero > {folder / 'large'}"])
        began = perf_counter()
        await env.files.upload(str(folder / "large"), folder / "copy")
        return 64 / (perf_counter() - began)


async def upload_tree(target: str) -> float:
    """Files of 1 KiB per second, 400 in 20 directories."""
    async with _folder(target) as (env, folder):
        files = "for f in $(seq 20); do head -c 1024 /dev/zero > t/$d/$f; done"
        make = f"for d in $(seq 20); do mkdir -p t/$d; {files}; done"
        await env.run(["sh", "-c", make], cwd=folder)
        began = perf_counter()
        await env.files.upload(str(folder / "t"), folder / "copy")
        return 400 / (perf_counter() - began)


async def _median_ms(action: Callable[[], Awaitable[object]], count: int) -> float:
    """The first calls, which start whatever they need, weigh no more than others."""
    return statistics.median([await _seconds_each(action, 1) for _ in range(count)]) * 1e3


def _only(folder: EnvironmentPath) -> SandboxProfile:
    """What programs need, and one directory to read."""
    return SandboxProfile.managed({":minimal": "read", str(folder): "read"})


def _writing(folder: EnvironmentPath) -> SandboxProfile:
    """Everything to read, one directory to write; no network."""
    return SandboxProfile.workspace_write([str(folder)], temporary=False)


async def _sandboxed_files(
    target: str, profile: MakeProfile, work: FileWork, *, folders: int, calls: int
) -> float:
    """The median of a call about a file of 1 KiB: of the first in each directory, or of the later ones."""
    times: list[float] = []
    for _ in range(folders):
        async with _folder(target) as (env, folder):
            await (folder / "small").write_bytes(bytes(1024))
            confined = (await env.sandboxed(profile(folder), cwd=str(folder))).path(str(folder / "small"))
            first = await _seconds_each(partial(work, confined), 1) * 1e3
            times.append(first if calls == 1 else await _median_ms(partial(work, confined), calls))
    return statistics.median(times)


async def _read(path: EnvironmentPath) -> None:
    await path.read_bytes()


async def _write(path: EnvironmentPath) -> None:
    await path.write_bytes(bytes(1024))


async def sandboxed_spawn(target: str) -> float:
    """Milliseconds of `/bin/true` from its start to its end, in a workspace that may be written."""
    async with _folder(target) as (env, folder):
        confined = await env.sandboxed(_writing(folder), cwd=str(folder))
        return await _median_ms(partial(confined.run, ["/bin/true"]), 20)


async def sandboxed_spawn_first(target: str) -> float:
    """The first one of a connection."""
    async with _folder(target) as (env, folder):
        confined = await env.sandboxed(_writing(folder), cwd=str(folder))
        return await _median_ms(partial(confined.run, ["/bin/true"]), 1)


MEASURES: tuple[tuple[str, Measure, str], ...] = (
    ("connect and leave", connect, "ms"),
    ("run /bin/true", spawn, "ms"),
    ("run /bin/true, 16 at once", spawn_at_once, "op/s"),
    ("a line to cat and back", echo, "ms"),
    ("output", output, "MiB/s"),
    ("call", rpc, "op/s"),
    ("call, 64 at once", rpc_pipelined, "op/s"),
    ("stat", stat, "op/s"),
    ("read 1 KiB", read_small, "op/s"),
    ("write 1 KiB", write_small, "op/s"),
    ("download 64 MiB", download, "MiB/s"),
    ("upload 64 MiB", upload, "MiB/s"),
    ("upload a tree", upload_tree, "op/s"),
)
SANDBOX_MEASURES: tuple[tuple[str, Measure, str], ...] = (
    (
        "sandboxed read 1 KiB",
        partial(_sandboxed_files, profile=_only, work=_read, folders=1, calls=40),
        "ms",
    ),
    ("... the first", partial(_sandboxed_files, profile=_only, work=_read, folders=5, calls=1), "ms"),
    (
        "sandboxed write 1 KiB",
        partial(_sandboxed_files, profile=_writing, work=_write, folders=1, calls=40),
        "ms",
    ),
    ("... the first ", partial(_sandboxed_files, profile=_writing, work=_write, folders=5, calls=1), "ms"),
    ("sandboxed /bin/true", sandboxed_spawn, "ms"),
    ("... the first  ", sandboxed_spawn_first, "ms"),
)
"""Median milliseconds, for servers with bubblewrap. A first call has a policy that was not seen before."""


def find_codex() -> str | None:
    """A released codex: the one that is named, that of PATH, or the newest that the tests installed."""
    named = os.environ.get("EXECENV_CODEX") or shutil.which("codex")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    installed = sorted(cache.glob("execenv/codex-*/node_modules/.bin/codex"))
    return named or (str(installed[-1]) if installed else None)


def default_commands() -> dict[str, str]:
    """The servers to compare if none are named."""
    commands = {OURS: shlex.join([sys.executable, "-m", "execenv", "serve"])}
    codex = find_codex()
    if codex is not None:
        commands["codex"] = shlex.join([codex, "exec-server", "--listen", "ws://127.0.0.1:0"])
    return commands


@asynccontextmanager
async def open_server(env: Environment, command: str, home: str) -> AsyncIterator[str]:
    """Run a server; its URL."""
    # codex cannot confine anything with a CODEX_HOME below the directory for temporary files
    temporary = tempfile.mkdtemp(dir=home)
    variables = {"CODEX_HOME": home, "TMPDIR": temporary}
    async with env.open_process(shlex.split(command), extra_env=variables) as process:
        printed = b""
        while not (b"ws://" in printed and printed.endswith(b"\n")):
            data = await process.stdout.receive_some()
            if not data:
                raise RuntimeError(f"no ws:// URL on the output of: {command}")
            printed += data
        yield "ws://" + printed.decode().partition("ws://")[2].split()[0]


async def measure_all(
    targets: Mapping[str, str], measures: Measures, rounds: int
) -> dict[tuple[str, str], float]:
    """The median of each measure for each target."""
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for title, measure, _unit in measures:
            for name, target in targets.items():
                samples.setdefault((title, name), []).append(await measure(target))
    return {key: statistics.median(values) for key, values in samples.items()}


def ratio(ours: float, other: float, unit: str) -> float:
    """How many times better ours is."""
    return other / ours if unit == "ms" else ours / other


def print_table(names: list[str], measures: Measures, medians: Mapping[tuple[str, str], float]) -> None:
    others = [name for name in names if name not in (LOCAL, OURS)] if OURS in names else []
    heads = ["", "", *names, *(f"x {name}" for name in others)]
    rows = [heads]
    for title, _, unit in measures:
        values = [medians[title, name] for name in names]
        ratios = [ratio(medians[title, OURS], medians[title, name], unit) for name in others]
        rows.append([title, unit, *map(_shown, values), *(f"{value:.2f}" for value in ratios)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right).rstrip())


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


async def main(commands: Mapping[str, str], measures: Measures, rounds: int) -> None:
    targets = {LOCAL: "local"}
    with tempfile.TemporaryDirectory() as home:
        async with open_environment("local") as env, AsyncExitStack() as stack:
            for name, command in commands.items():
                targets[name] = await stack.enter_async_context(open_server(env, command, home))
            print_table(list(targets), measures, await measure_all(targets, measures, rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns for each server (3)")
    parser.add_argument("--sandbox", action="store_true", help="only what is done under a sandbox")
    parser.add_argument("servers", nargs="*", metavar="NAME=COMMAND")
    options = parser.parse_args()
    named = dict(word.split("=", 1) for word in options.servers)
    measures = SANDBOX_MEASURES if options.sandbox else MEASURES
    trio.run(main, named or default_commands(), measures, options.rounds)
