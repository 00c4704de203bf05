"""Conversations over connections that are lost all the time, checked to the byte. `nox -s soak` runs many.

    python -m tests.soak [--cuts N] [--seed SEED]

One conversation is a client and a server in this program, under a mock clock, with a plan of faults between
them: several tasks run programs, write to them, change files and send requests, each of them in a way that
tells afterwards how often it was done. What the client was told is compared with what has happened: every
byte of output once and in order, every byte of input too, and no error that claims something wrong about its
call. The seed decides everything, so a conversation that fails is repeated by its seed.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from random import Random

import trio
from attrs import Factory, define
from trio.testing import MockClock

from execenv import ConnectFailed, Environment, ExecenvError, OutputGap, PathUri, Process
from execenv.protocol import HttpRequestParams
from execenv.remote.connection import open_remote
from execenv.remote.session import Recovery
from execenv.testing import (
    FakeEnvironment,
    FakeResponse,
    FaultPlan,
    MemoryFileSystem,
    MemoryServer,
    ScriptedProcess,
    open_fake_backend,
    open_memory_server,
)
from execenv.transfer import copy

WAYS = ("program", "program", "program", "post", "mkdir", "write", "copy", "kill")

FAR = 100_000.0
"""Seconds by the mock clock after which a conversation hangs."""


class Wrong(AssertionError):
    """What the client was told is not what has happened."""


class Unread(Exception):
    """A change was made, and could not be looked at."""


@define
class Result:
    """What conversations came to. `lost`, `duplicated` and `wrong` must stay 0."""

    conversations: int = 0
    cuts: int = 0
    restarts: int = 0
    output_bytes: int = 0
    input_bytes: int = 0
    calls: int = 0
    failed: Counter[str] = Factory(Counter)
    gaps: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    faults: Counter[str] = Factory(Counter)

    def add(self, other: Result) -> None:
        for name in ("conversations", "cuts", "restarts", "output_bytes", "input_bytes", "calls", "gaps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("lost", "duplicated", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed.update(other.failed)
        self.faults.update(other.faults)


@define(eq=False)
class Child:
    """What one program has done, as it knows itself."""

    stdout: bytearray = Factory(bytearray)
    stderr: bytearray = Factory(bytearray)
    stdin: bytearray = Factory(bytearray)
    starts: int = 0


@define(eq=False)
class World:
    """The side of the environment: what has really happened, over all of its sessions."""

    random: Random
    children: dict[str, Child] = Factory(dict)
    done: Counter[str] = Factory(Counter)
    sitting: set[str] = Factory(set)
    disk: MemoryFileSystem = Factory(lambda: MemoryFileSystem({}, directories=("/work",)))

    @asynccontextmanager
    async def open_environment(self) -> AsyncIterator[FakeEnvironment]:
        """What each session of the server has: programs of its own, and the files of all."""
        programs = {"talk": self.talk, "sit": self.sit}
        async with open_fake_backend(programs, http=self.answer) as backend:
            backend.files = self.disk
            yield backend

    def is_directory(self, name: str) -> bool:
        """Whether it is there, on the disk of all sessions."""
        try:
            return self.disk.is_directory(PathUri.from_native(f"/work/{name}"))
        except FileNotFoundError:
            return False

    def has_file(self, name: str, data: bytes) -> bool:
        """Whether it is there, with this in it."""
        try:
            return self.disk.content(f"/work/{name}") == data
        except FileNotFoundError:
            return False

    async def talk(self, process: ScriptedProcess) -> int:
        """Prints in pieces of all sizes, with pauses, and then as many lines as it reads."""
        name, amount = process.argv[1], int(process.argv[2])
        child = self.children.setdefault(name, Child())
        child.starts += 1
        random = Random(name)
        for number in range(amount):
            piece = b"%s:%d:" % (name.encode(), number) + random.randbytes(random.choice((0, 5, 300, 20_000)))
            if random.random() < 0.3:
                child.stderr += piece
                process.write_stderr(piece)
            else:
                child.stdout += piece
                process.write_stdout(piece)
            await trio.sleep(random.choice((0, 0, 0.01, 0.3)))
        while data := await process.read_stdin():
            child.stdin += data
            child.stdout += b"<" + data
            process.write_stdout(b"<" + data)
        await trio.sleep(random.choice((0, 0.5)))
        return 3

    async def sit(self, process: ScriptedProcess) -> int:
        """Runs until it is killed."""
        name = process.argv[1]
        self.sitting.add(name)
        try:
            await trio.sleep_forever()
        finally:
            self.sitting.discard(name)

    def answer(self, params: HttpRequestParams) -> FakeResponse:
        """A request that must not be made twice."""
        self.done[params.url.rpartition("/")[2]] += 1
        return FakeResponse(201, b"made")


@asynccontextmanager
async def open_world(
    plan: FaultPlan | None, random: Random
) -> AsyncIterator[tuple[World, MemoryServer, Environment]]:
    world = World(random)
    async with open_memory_server(world.open_environment, plan) as server:
        recovery = Recovery(deadline=60, first_delay=0.01, max_delay=0.5)
        async with open_remote(
            server.dial, "memory", redial=True, recovery=recovery, connect=False
        ) as remote:
            yield world, server, Environment(remote)


class Conversation:
    """One client's work, and the comparison afterwards."""

    def __init__(self, world: World, env: Environment, random: Random, result: Result) -> None:
        self._world = world
        self._env = env
        self._random = random
        self._result = result
        self.restarted = False

    # Programs.

    async def run_program(self, name: str) -> None:
        """Start a program, talk to it, read it to its end, and compare."""
        lines = [
            b"%s-%d\n" % (name.encode(), number) * self._random.choice((1, 1, 400)) for number in range(6)
        ]
        read: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        gaps: list[OutputGap] = []
        sent = bytearray()
        code: int | None = None
        started = False
        error: ExecenvError | None = None
        self._result.calls += 1
        try:
            async with self._env.open_process(["talk", name, "12"], stdin=True) as process:
                started = True
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, process, lines, sent)
                    await self._read(process, read, gaps)
                code = await process.wait()
        except* ExecenvError as group:
            error = _first(group)
        child = self._world.children.get(name, Child())
        if error is not None and not started:
            self._expect(name, "start", error.outcome, child.starts)
        self._compare(name, child, read, gaps, sent, code, error)

    async def _write(self, process: Process, lines: list[bytes], sent: bytearray) -> None:
        assert process.stdin is not None
        for line in lines:
            sent += line
            try:
                await process.stdin.send_all(line)
            except trio.BrokenResourceError:
                return
            await trio.sleep(self._random.choice((0, 0, 0.05)))
        await process.stdin.aclose()

    async def _read(self, process: Process, read: dict[str, bytearray], gaps: list[OutputGap]) -> None:
        while True:
            try:
                async for chunk in process:
                    read[chunk.stream] += chunk.data
                return
            except OutputGap as gap:
                gaps.append(gap)

    def _compare(
        self,
        name: str,
        child: Child,
        read: dict[str, bytearray],
        gaps: list[OutputGap],
        sent: bytearray,
        code: int | None,
        error: ExecenvError | None,
    ) -> None:
        result = self._result
        result.output_bytes += sum(map(len, read.values()))
        result.input_bytes += len(child.stdin)
        result.gaps += len(gaps)
        if gaps:
            raise self._wrong("lost", f"{name}: {gaps[0]}")
        if child.starts > 1:
            raise self._wrong("duplicated", f"{name} was started {child.starts} times")
        if not bytes(sent).startswith(bytes(child.stdin)):
            raise self._wrong("duplicated", f"{name} read something else than was written")
        for stream, written in (("stdout", child.stdout), ("stderr", child.stderr)):
            if not bytes(written).startswith(bytes(read[stream])):
                raise self._wrong("duplicated", f"{stream} of {name} is not what it wrote")
        if error is None:
            complete = (
                child.starts == 1
                and read == {"stdout": child.stdout, "stderr": child.stderr}
                and child.stdin == sent
                and code == 3
            )
            if not complete:
                raise self._wrong("lost", f"{name} ended with {code}, and something is missing")
            return
        result.failed[error.outcome] += 1
        if not self.restarted:
            raise self._wrong("lost", f"{name} was lost without a reason: {error!r}")

    # Calls that must not be done twice, and tell whether they were.

    async def change(self, name: str, how: str) -> None:
        """One change, whose traces are looked for at the end."""
        self._result.calls += 1
        outcome = "done"
        try:
            await self._changes()[how](name)
        except Unread:
            pass
        except ExecenvError as error:
            outcome = error.outcome
            self._result.failed[outcome] += 1
            if isinstance(error, ConnectFailed) and not self.restarted:
                raise self._wrong("wrong", f"{how} {name}: {error!r}") from error
        self._expect(name, how, outcome, self._count(name, how))

    def _count(self, name: str, how: str) -> int:
        """How often it was done, as the other side knows it."""
        if how == "mkdir":
            return int(self._world.is_directory(name))
        return self._world.done[name]

    def _changes(self) -> dict[str, Callable[[str], Awaitable[object]]]:
        return {
            "post": self._post,
            "mkdir": self._mkdir,
            "write": self._write_file,
            "copy": self._copy,
            "kill": self._kill,
        }

    async def _post(self, name: str) -> None:
        await self._env.http.request("POST", f"http://h/{name}")

    async def _mkdir(self, name: str) -> None:
        await self._env.files.create_directory(f"/work/{name}", recursive=False)

    async def _write_file(self, name: str) -> None:
        data = name.encode() * self._random.choice((1, 1000, 300_000))
        try:
            await self._env.files.write_file(f"/work/{name}", data)
        finally:
            self._world.done[name] += self._world.has_file(name, data)
        if await self._read_back(name) != data:
            raise self._wrong("lost", f"{name} is not what was written")

    async def _copy(self, name: str) -> None:
        source = PathUri.from_native("/work/source")
        target = PathUri.from_native(f"/work/{name}")
        data = self._random.randbytes(self._random.choice((1000, 300_000, 2_500_000)))
        here = MemoryFileSystem({"/work/source": data}, directories=("/work",))
        report = await copy(here, source, self._env.files._backend, target)
        self._world.done[name] += self._world.has_file(name, data)
        if (report.files, report.bytes, report.resumed_bytes) != (1, len(data), 0):
            raise self._wrong("wrong", f"the report of {name} is {report}")
        if await self._read_back(name) != data:
            raise self._wrong("lost", f"{name} is not what was copied")

    async def _read_back(self, name: str) -> bytes:
        """What is in a file now.

        Raises:
            Unread: if that failed, whose outcome is none of the change's.
        """
        try:
            return await self._env.files.read_file(f"/work/{name}")
        except ExecenvError as error:
            self._result.failed[error.outcome] += 1
            if not self.restarted:
                raise self._wrong("wrong", f"{name} could not be read again: {error!r}") from error
            raise Unread from error

    async def _kill(self, name: str) -> None:
        """Leave the block of a program that would run for ever."""
        async with self._env.open_process(["sit", name]):
            await trio.sleep(self._random.choice((0, 0.1)))
        if name in self._world.sitting:
            raise self._wrong("wrong", f"{name} is still there, and its block was left")
        self._world.done[name] += 1

    def _expect(self, name: str, how: str, outcome: str, count: int) -> None:
        if outcome == "done" and count != 1:
            raise self._wrong("wrong", f"{how} {name} was done {count} times, and {outcome!r} was said")
        if outcome in ("not sent", "not done") and count:
            raise self._wrong("wrong", f"{how} {name} was done {count} times, and {outcome!r} was said")
        if count > 1:
            raise self._wrong("duplicated", f"{how} {name} was done {count} times")

    def _wrong(self, kind: str, text: str) -> Wrong:
        setattr(self._result, kind, getattr(self._result, kind) + 1)
        return Wrong(text)

    # All of it.

    async def work(self, number: int, ways: Sequence[str]) -> None:
        for step, how in enumerate(ways):
            name = f"{number}-{step}"
            if how == "program":
                await self.run_program(name)
            else:
                await self.change(name, how)


def _first(group: BaseExceptionGroup[ExecenvError]) -> ExecenvError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ExecenvError)
    return error


async def converse(
    plan: FaultPlan | None,
    seed: int,
    result: Result,
    *,
    ways: Sequence[Sequence[str]] | None = None,
    restarts: int = 0,
    restart_at: int | None = None,
) -> int:
    """One conversation; how many frames it took.

    Args:
        ways: what each task does, one thing after the other; otherwise the seed decides.
        restarts: how often the server is started anew, at random.
        restart_at: the number of the frame at which it is, from 0.

    Raises:
        Wrong: what was found, which `result` counts too.
    """
    random = Random(seed)
    async with open_world(plan, random) as (world, server, env):
        server.plan.active = False
        await env.probe()  # a first connection that cannot be made is nothing to recover from
        server.plan.active = True
        first = server.frames
        conversation = Conversation(world, env, random, result)
        with trio.fail_after(FAR):
            async with trio.open_nursery() as everything:
                if restarts:
                    conversation.restarted = True
                    everything.start_soon(_restart, server, random, restarts, result)
                if restart_at is not None:
                    conversation.restarted = True
                    everything.start_soon(_restart_at, server, restart_at, result)
                async with trio.open_nursery() as nursery:
                    for number, each in enumerate(ways or [random.choices(WAYS, k=4) for _ in range(3)]):
                        nursery.start_soon(conversation.work, number, each)
                everything.cancel_scope.cancel()
        counts = server.plan.counts
        result.conversations += 1
        result.cuts += sum(counts[f"cut {where}"] for where in ("before", "middle", "after"))
        result.faults.update(counts)
        return server.frames - first


async def _restart(server: MemoryServer, random: Random, times: int, result: Result) -> None:
    for _ in range(times):
        await trio.sleep(random.uniform(0.1, 3))
        await server.restart()
        result.restarts += 1


async def _restart_at(server: MemoryServer, number: int, result: Result) -> None:
    begun = server.frames
    await server.wait_frame(lambda frame: server.frames - begun > number)
    await server.restart()
    result.restarts += 1


def run_one(seed: int, result: Result) -> None:
    """A conversation as its seed has it."""
    random = Random(seed)
    plan = FaultPlan(
        seed,
        cut=random.choice((0.01, 0.05, 0.15)),
        duplicate=0.1,
        reorder=0.1,
        delay=random.choice((0.0, 0.05)),
        longest_delay=random.choice((0.01, 1.0)),
        throttle=random.choice((0.0, 0.01)),
        slowest=100_000,
    )
    restarts = random.choice((0, 0, 0, 2))
    clock = MockClock(autojump_threshold=0)
    trio.run(partial(converse, plan, seed, result, restarts=restarts), clock=clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=10_000, help="go on until there were so many (10,000)")
    parser.add_argument("--seed", type=int, help="of the first conversation; each has one more")
    parser.add_argument("--one", action="store_true", help="only the conversation of that seed")
    arguments = parser.parse_args()
    first = secrets.randbelow(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {first}", flush=True)
    result, began, failures = Result(), time.monotonic(), []
    for seed in range(first, sys.maxsize):
        try:
            run_one(seed, result)
        except BaseExceptionGroup as group:
            failures.append(seed)
            print(f"seed {seed}: {group!r}", flush=True)
        except (Wrong, trio.TooSlowError) as error:
            failures.append(seed)
            print(f"seed {seed}: {error!r}", flush=True)
        if result.cuts >= arguments.cuts or arguments.one or len(failures) > 20:
            break
    print(
        f"{result.conversations} conversations in {time.monotonic() - began:.0f} s: {result.cuts} cuts, "
        f"{result.restarts} restarts; {result.calls} calls, {result.output_bytes} bytes of output, "
        f"{result.input_bytes} of input; failed as they may: {dict(result.failed)}; "
        f"lost {result.lost}, duplicated {result.duplicated}, wrong outcomes {result.wrong}"
    )
    print(f"faults: {dict(result.faults)}")
    if failures:
        sys.exit(f"failed: --one --seed {' '.join(map(str, failures))}")


if __name__ == "__main__":
    main()
