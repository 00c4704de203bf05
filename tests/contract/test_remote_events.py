"""What a client makes of the events of a process when they do not come one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import Environment
from execenv.remote.connection import open_remote
from execenv.server.listen import serve_channel
from execenv.server.sessions import open_sessions
from execenv.transports.memory import memory_pair
from tests.conftest import time_limit
from tests.contract.test_output import read_all
from tests.fakes import FakeHost, FakeProcess, only


@pytest.fixture
async def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
async def remote(host: FakeHost) -> AsyncIterator[Environment]:
    """A client of a server whose processes do what the test says."""
    async with time_limit(), open_sessions(host.open) as sessions, trio.open_nursery() as nursery:
        ours, theirs = memory_pair()
        nursery.start_soon(serve_channel, theirs, sessions)
        async with open_remote(only(ours), "memory") as environment:
            yield Environment(environment)


async def start(host: FakeHost, environment: Environment) -> FakeProcess:
    await environment.start_detached("dev", ["x"])
    return host.opened[-1].fakes.started["dev"][-1]


async def check(environment: Environment, expected: list[bytes]) -> None:
    await wait_all_tasks_blocked()  # what was pushed has gone to nobody
    async with environment.attach("dev") as process:
        chunks, gaps = await read_all(process)
        assert ([chunk.data for chunk in chunks], gaps) == (expected, [])
        assert await process.wait() == 6


async def test_history_with_output_behind_the_exit(host: FakeHost, remote: Environment) -> None:
    fake = await start(host, remote)
    fake.emit(b"early")
    fake.exit(6)
    fake.emit(b"late")
    fake.close()
    await check(remote, [b"early", b"late"])


async def test_history_that_begins_with_the_exit(host: FakeHost, remote: Environment) -> None:
    fake = await start(host, remote)
    fake.exit(6)
    fake.emit(b"late")
    fake.emit(b"later")
    fake.close()
    await check(remote, [b"late", b"later"])


async def test_history_without_output(host: FakeHost, remote: Environment) -> None:
    fake = await start(host, remote)
    fake.exit(6)
    fake.close()
    await check(remote, [])


async def test_events_before_the_history_has_arrived(host: FakeHost, remote: Environment) -> None:
    fake = await start(host, remote)
    fake.emit(b"early")
    await wait_all_tasks_blocked()
    fake.reads = 1  # the one by which `attach` finds it; that for the history is to wait
    async with remote.attach("dev") as process:
        await wait_all_tasks_blocked()
        fake.emit(b"more")
        fake.exit(6)
        fake.emit(b"late")
        fake.emit(b"later")
        fake.close()
        await wait_all_tasks_blocked()
        assert process.returncode is None
        fake.answer_reads()
        chunks, gaps = await read_all(process)
        assert [chunk.data for chunk in chunks] == [b"early", b"more", b"late", b"later"]
        assert gaps == []
        assert await process.wait() == 6


async def test_events_behind_the_history(host: FakeHost, remote: Environment) -> None:
    fake = await start(host, remote)
    fake.emit(b"early")
    await wait_all_tasks_blocked()
    async with remote.attach("dev") as process:
        await wait_all_tasks_blocked()
        for data in (b"more", b"most"):
            fake.emit(data)
        fake.exit(6)
        fake.emit(b"late")
        fake.close()
        chunks, gaps = await read_all(process)
        assert [chunk.data for chunk in chunks] == [b"early", b"more", b"most", b"late"]
        assert gaps == []
        assert await process.wait() == 6


async def test_exit_within_what_is_lost_is_told_all_the_same(host: FakeHost, remote: Environment) -> None:
    fake = await start(host, remote)
    fake.emit(b"lost")
    fake.exit(6)
    for _ in range(2):
        fake.emit(bytes(600_000))
    fake.close()
    await wait_all_tasks_blocked()
    async with remote.attach("dev") as process:
        chunks, gaps = await read_all(process)
        assert [chunk.seq for chunk in chunks] == [4]
        assert [(gap.from_seq, gap.to_seq) for gap in gaps] == [(1, 3)]
        assert await process.wait() == 6
