"""Contract of whole environments: opening, leaving, coming back, and losing the connection."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import (
    CapturedOutput,
    ConnectFailed,
    ConnectionLost,
    Environment,
    UsageError,
    captured_output,
    open_environment,
)
from execenv.paths import PathUri
from tests.conftest import (
    ANY_PORT,
    KINDS,
    SERVE,
    WebsocketServer,
    open_kind,
    open_memory,
    run_websocket_server,
)
from tests.contract.test_tty import read_until
from tests.fakes import Watched

Opener = Callable[[], AbstractAsyncContextManager[Environment]]


@pytest.fixture(params=KINDS)
def opener(request: pytest.FixtureRequest, websocket_server: WebsocketServer) -> Opener:
    return partial(open_kind, request.param, websocket_server.url)


async def test_environment_says_what_it_is(opener: Opener) -> None:
    with trio.fail_after(20):
        async with opener() as environment:
            info = await environment.info()
            assert isinstance(info.cwd, PathUri)
            assert info.shell.path.startswith("/")
            assert await environment.probe() == "ready"
            assert environment.name in repr(environment)


async def test_leaving_the_environment_ends_what_was_started_detached(opener: Opener) -> None:
    watched = Watched()
    with trio.fail_after(20):
        async with opener() as environment:
            script = "setsid sleep 1000 >/dev/null 2>&1 & echo $$ $!; exec sleep 1000"
            await environment.start_detached("dev", ["sh", "-c", script])
            async with environment.attach("dev") as process:
                for word in (await read_until(process, b"\n")).split():
                    watched.add(int(word))
            if "websocket" in environment.name:  # there the session stays, for a client that comes back
                async with environment.attach("dev") as process:
                    await process.kill()
        assert watched.alive() == set()
    watched.close()


async def test_error_of_the_body_comes_out_as_itself(opener: Opener) -> None:
    error = KeyError("of the body")
    with trio.fail_after(20), pytest.raises(KeyError) as caught:
        async with opener() as environment, environment.open_process(["sleep", "1000"]):
            raise error
    assert caught.value is error


async def test_error_inside_a_group_keeps_what_was_captured(opener: Opener) -> None:
    with trio.fail_after(20):
        async with opener() as environment:
            with pytest.raises(ExceptionGroup) as caught:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(environment.run, ["sh", "-c", "echo out; exit 3"])
            found = captured_output(caught.value)
    assert found is not None
    assert bytes(found.stdout) == b"out\n"


async def test_cancelled_environment_closes(opener: Opener) -> None:
    watched = Watched()
    with trio.fail_after(20):
        with trio.CancelScope() as scope:
            async with (
                opener() as environment,
                environment.open_process(["sh", "-c", "echo $$; exec sleep 1000"]) as process,
            ):
                watched.add(int(await read_until(process, b"\n")))
                scope.cancel()
                await process.wait()
        assert scope.cancelled_caught
        assert watched.alive() == set()
    watched.close()


# Coming back to a session.


async def test_resumed_session_has_its_processes_and_their_output(websocket_server: WebsocketServer) -> None:
    with trio.fail_after(20):
        async with open_environment(websocket_server.url) as environment:
            await environment.start_detached(
                "dev", ["sh", "-c", "echo one; read x; echo $x; exit 7"], stdin=True
            )
            session_id = environment.session_id
        async with open_environment(websocket_server.url, resume_session_id=session_id) as environment:
            assert environment.session_id == session_id
            async with environment.attach("dev", stdin=True) as process:
                assert process.stdin is not None
                await process.stdin.send_all(b"two\n")
                assert b"".join([chunk.data async for chunk in process]) == b"one\ntwo\n"
                assert await process.wait() == 7


async def test_session_that_is_attached_cannot_be_resumed(websocket_server: WebsocketServer) -> None:
    with trio.fail_after(20):
        async with open_environment(websocket_server.url) as environment:
            with pytest.raises(ConnectFailed, match="already attached"):
                async with open_environment(websocket_server.url, resume_session_id=environment.session_id):
                    raise AssertionError("attached twice")
            assert await environment.probe() == "ready"


async def test_unknown_session_cannot_be_resumed(websocket_server: WebsocketServer) -> None:
    with trio.fail_after(20), pytest.raises(ConnectFailed, match="unknown session id"):
        async with open_environment(websocket_server.url, resume_session_id="nobody"):
            raise AssertionError("resumed nothing")


async def test_session_without_time_to_live_ends_with_its_connection() -> None:
    watched = Watched()
    with run_websocket_server([*SERVE, ANY_PORT, "--detached-ttl", "0"]) as server, trio.fail_after(20):
        async with open_environment(server.url) as environment:
            await environment.start_detached("dev", ["sh", "-c", "echo $$; exec sleep 1000"])
            async with environment.attach("dev") as process:
                watched.add(int(await read_until(process, b"\n")))
        await watched.wait_gone()
    watched.close()


async def test_local_environment_has_no_session() -> None:
    async with open_environment() as environment:
        assert environment.session_id is None
    with pytest.raises(UsageError):
        async with open_environment(resume_session_id="x"):
            raise AssertionError("resumed nothing")


# Losing the connection.


@asynccontextmanager
async def _open_cuttable(kind: str) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    if kind == "memory":
        async with open_memory() as (environment, channel):
            yield environment, channel.close_nowait
    elif kind == "websocket":
        with run_websocket_server() as server:
            async with open_environment(server.url, recovery=0) as environment:
                yield environment, server.process.kill
    else:
        # The shell makes its server's pid known, so that the server can be killed.
        with _killable() as (argv, kill):
            async with open_environment(argv) as environment:
                yield environment, kill


@contextmanager
def _killable() -> Iterator[tuple[list[str], Callable[[], None]]]:
    with tempfile.NamedTemporaryFile("r") as file:
        yield (
            ["sh", "-c", 'echo $$ > "$0"; exec "$@"', file.name, *SERVE, "stdio"],
            lambda: os.kill(int(file.read()), signal.SIGKILL),
        )


class CuttingBuffer(bytearray):
    """Does something when output arrives."""

    def __init__(self, cut: Callable[[], None]) -> None:
        self._cut = cut

    def extend(self, data: bytes) -> None:  # type: ignore[override]
        super().extend(data)
        self._cut()


@pytest.fixture(params=KINDS[1:])
async def cuttable(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Environment, Callable[[], None]]]:
    async with _open_cuttable(request.param) as pair:
        yield pair


async def test_run_that_loses_its_connection_says_so(
    cuttable: tuple[Environment, Callable[[], None]],
) -> None:
    environment, cut = cuttable
    output = CapturedOutput(stdout=CuttingBuffer(cut))
    with trio.fail_after(20):
        with pytest.raises(ConnectionLost) as caught:
            await environment.run(["sh", "-c", "echo first; sleep 1000"], capture=output)
        assert captured_output(caught.value) is output
        assert bytes(output.stdout) == b"first\n"
        for call in (partial(environment.run, ["true"]), environment.probe):
            with pytest.raises((ConnectionLost, ConnectFailed)) as caught_again:
                await call()
            assert caught_again.value.outcome == "not sent"


async def test_everything_that_waits_hears_of_the_lost_connection(
    cuttable: tuple[Environment, Callable[[], None]],
) -> None:
    environment, cut = cuttable
    heard = []

    async def expect_loss(wait: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ConnectionLost):
            await wait()
        heard.append(wait)

    with trio.fail_after(20):
        with pytest.raises(ConnectionLost):
            async with environment.open_process(["sleep", "1000"], stdin=True) as process:
                assert process.stdin is not None
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(expect_loss, process.wait)
                    nursery.start_soon(expect_loss, process.stdout.receive_some)
                    nursery.start_soon(expect_loss, process.stderr.receive_some)
                    nursery.start_soon(expect_loss, partial(process.stdin.send_all, bytes(20_000_000)))
                    nursery.start_soon(expect_loss, partial(environment.run, ["sleep", "20"]))
                    await wait_all_tasks_blocked()
                    cut()
    assert len(heard) == 5
