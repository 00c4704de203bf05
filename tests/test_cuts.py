"""A real server behind a proxy that loses connections: what a program does there goes on.

tests/interop/test_reference_server.py runs the bodies in `CUTS` with a released codex's own server.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from execenv import ConnectionLost, Environment, ProcessNotStarted, open_environment
from execenv.testing import FaultPlan, FaultProxy, Frame, open_fault_proxy
from tests.conftest import ANY_PORT, SERVE, WebsocketServer, run_websocket_server, time_limit
from tests.contract.test_tty import read_until

Body = Callable[[Environment, FaultProxy, str], Awaitable[None]]


def is_reply(method: str) -> Callable[[Frame], bool]:
    return lambda frame: frame.kind == "reply" and frame.method == method


async def cut_in_the_middle_of_a_command(env: Environment, proxy: FaultProxy, folder: str) -> None:
    script = "seq -f 'line %.0f' 2000; read -r go; seq -f 'more %.0f' 2000"
    expected = b"".join(b"line %d\n" % i for i in range(1, 2001)) + b"".join(
        b"more %d\n" % i for i in range(1, 2001)
    )
    async with env.open_process(["sh", "-c", script], stdin=True) as process:
        assert process.stdin is not None
        read = await process.stdout.receive_some(100)
        proxy.cut()
        await process.stdin.send_all(b"go\n")
        proxy.cut()
        async for piece in process.stdout:
            read += piece
        assert read == expected
        assert await process.wait() == 0
    assert proxy.connections >= 2


async def cut_of_the_answer_to_a_write(env: Environment, proxy: FaultProxy, folder: str) -> None:
    async with env.open_process(["sh", "-c", f"head -n 3 > {folder}/written"], stdin=True) as process:
        assert process.stdin is not None
        for line in (b"one\n", b"two\n", b"three\n"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.stdin.send_all, line)
                async with proxy.hold_frame(is_reply("process/write")):
                    proxy.cut()
        assert await process.wait() == 0
    assert await env.files.read_file(f"{folder}/written") == b"one\ntwo\nthree\n"
    assert proxy.connections >= 4


async def cut_of_the_answer_to_a_start(env: Environment, proxy: FaultProxy, folder: str) -> None:
    async with trio.open_nursery() as nursery:
        done = []

        async def run() -> None:
            done.append(await env.run(["sh", "-c", f"echo started >> {folder}/starts; echo output"]))

        nursery.start_soon(run)
        async with proxy.hold_frame(is_reply("process/start")):
            proxy.cut()
    assert done[0].stdout == b"output\n"
    assert await env.files.read_file(f"{folder}/starts") == b"started\n"


async def cut_of_the_answer_to_a_start_that_failed(env: Environment, proxy: FaultProxy, folder: str) -> None:
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with pytest.raises(ProcessNotStarted) as caught:
                await env.run(["/no/such/program"])
            assert caught.value.outcome == "not done"

        nursery.start_soon(run)
        async with proxy.hold_frame(is_reply("process/start")):
            proxy.cut()


async def cut_of_a_session_on_a_terminal(env: Environment, proxy: FaultProxy, folder: str) -> None:
    argv = ["sh", "-c", "stty -echo; echo ready; while read -r line; do echo got $line; done"]
    async with env.open_process(argv, tty=True) as process:
        assert process.stdin is not None
        await read_until(process, b"ready\r\n")
        for word in (b"one", b"two", b"three"):
            proxy.cut()
            await process.stdin.send_all(word + b"\n")
            assert await read_until(process, b"\r\n") == b"got " + word + b"\r\n"
        proxy.cut()
        assert await env.probe() == "ready"
        await process.interrupt()
        assert await process.wait() in (1, 130)


async def cut_of_the_answer_to_a_change(env: Environment, proxy: FaultProxy, folder: str) -> None:
    async with trio.open_nursery() as nursery:

        async def change() -> None:
            with pytest.raises(ConnectionLost) as caught:
                await env.files.create_directory(f"{folder}/new", recursive=False)
            assert caught.value.outcome == "unknown"

        nursery.start_soon(change)
        async with proxy.hold_frame(is_reply("fs/createDirectory")):
            proxy.cut()
    assert (await env.files.get_metadata(f"{folder}/new")).is_directory


async def cuts_of_reads(env: Environment, proxy: FaultProxy, folder: str) -> None:
    data = os.urandom(3_000_000)
    await env.files.write_file(f"{folder}/data", data)
    for method in ("fs/open", "fs/readBlock"):
        async with trio.open_nursery() as nursery:
            read: list[bytes] = []

            async def fetch(read: list[bytes] = read) -> None:
                read.append(await env.files.read_file(f"{folder}/data"))

            nursery.start_soon(fetch)
            async with proxy.hold_frame(is_reply(method)):
                proxy.cut()
        assert read == [data]


async def leaving_a_block_that_is_cut(env: Environment, proxy: FaultProxy, folder: str) -> None:
    async with env.open_process(["sh", "-c", "echo $$; exec sleep 1000"]) as process:
        pid = int(await process.stdout.receive_some())
        proxy.cut()
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        await trio.lowlevel.wait_readable(pidfd)
    except ProcessLookupError:
        return
    finally:
        if pidfd >= 0:
            os.close(pidfd)


async def cuts_by_chance(env: Environment, proxy: FaultProxy, folder: str) -> None:
    proxy.plan = FaultPlan(11, cut=0.03, delay=0, refuse=0.2)
    script = 'while read -r line; do echo "$line"; echo "$line" >&2; done'
    for number in range(6):
        lines = b"".join(b"%d-%d\n" % (number, line) for line in range(200))
        stdout, stderr = b"", b""
        async with env.open_process(["sh", "-c", script], stdin=True) as process:
            assert process.stdin is not None
            async with trio.open_nursery() as nursery:

                async def feed(stdin: trio.abc.SendStream = process.stdin, lines: bytes = lines) -> None:
                    for start in range(0, len(lines), 50):
                        await stdin.send_all(lines[start : start + 50])

                nursery.start_soon(feed)
                while len(stdout) < len(lines) or len(stderr) < len(lines):
                    chunk = await anext(process)
                    if chunk.stream == "stdout":
                        stdout += chunk.data
                    else:
                        stderr += chunk.data
        assert (stdout, stderr) == (lines, lines)
    proxy.plan.active = False
    assert proxy.plan.counts["cut before"] + proxy.plan.counts["cut after"] > 5


CUTS: tuple[Body, ...] = (
    cut_in_the_middle_of_a_command,
    cut_of_the_answer_to_a_write,
    cut_of_the_answer_to_a_start,
    cut_of_the_answer_to_a_start_that_failed,
    cut_of_a_session_on_a_terminal,
    cut_of_the_answer_to_a_change,
    cuts_of_reads,
    leaving_a_block_that_is_cut,
    cuts_by_chance,
)


CUTS_LIMIT = 60.0
"""Seconds for one of these tests. A reference that is cut by chance takes its time to answer again."""


@asynccontextmanager
async def open_cuttable(url: str) -> AsyncIterator[tuple[Environment, FaultProxy]]:
    async with time_limit(CUTS_LIMIT), open_fault_proxy(url) as proxy, open_environment(proxy.url) as env:
        yield env, proxy


async def check_restart(first_url: str, second_url: str) -> None:
    """What a client does whose server is gone, and another one in its place."""
    async with open_cuttable(first_url) as (env, proxy):
        before = env.session_id
        with pytest.raises(ConnectionLost):
            async with env.open_process(["sleep", "1000"], stdin=True) as process:
                proxy.target = ("127.0.0.1", int(second_url.rpartition(":")[2].strip("/")))
                proxy.cut()
                assert process.stdin is not None
                for call in (process.wait, lambda: process.stdin.send_all(b"x"), process.interrupt):
                    with pytest.raises(ConnectionLost, match=r"failed to resume .* unknown session id"):
                        await call()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(env.run, ["true"])
        assert env.session_id != before
        assert proxy.connections >= 3


@pytest.mark.parametrize("body", CUTS, ids=lambda body: body.__name__)
async def test_cuts(
    body: Body, websocket_server: WebsocketServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("folder"))
    async with open_cuttable(websocket_server.url) as (env, proxy):
        await body(env, proxy, folder)


async def test_server_that_was_restarted(websocket_server: WebsocketServer) -> None:
    with run_websocket_server([*SERVE, ANY_PORT]) as other:
        await check_restart(other.url, websocket_server.url)


async def test_half_open_connection_does_not_lock_its_session(websocket_server: WebsocketServer) -> None:
    async with (
        open_cuttable(websocket_server.url) as (env, proxy),
        env.open_process(["cat"], stdin=True) as cat,
    ):
        assert cat.stdin is not None
        proxy.cut("client")  # the server hears nothing of it
        await cat.stdin.send_all(b"still here")
        assert await cat.stdout.receive_some() == b"still here"


async def test_output_under_way_is_not_lost_with_the_connection(websocket_server: WebsocketServer) -> None:
    """More than a server retains, at full speed, cut again and again."""
    size = 60_000_000
    async with open_cuttable(websocket_server.url) as (env, proxy):
        seen = 0
        async with env.open_process(["head", "-c", str(size), "/dev/zero"]) as process:
            async for chunk in process:
                before, seen = seen, seen + len(chunk.data)
                if before // 10_000_000 != seen // 10_000_000:
                    proxy.cut()
        assert seen == size
        assert proxy.connections >= 5
