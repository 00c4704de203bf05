"""An environment behind a relay whose sockets are cut: what goes on, what is told, and what begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from execenv import ConnectionLost, fail_fast
from execenv.relay.noise import Identity
from tests.conftest import open_relayed, time_limit
from tests.http_origin import open_origin
from tests.relay_pair import Pair

MIB = 1024 * 1024


def cut(pair: Pair, number: int) -> None:
    (pair.rendezvous.cut_executor if number % 2 else pair.rendezvous.cut_harnesses)()


async def test_output_at_full_speed_survives_cuts_of_both_legs() -> None:
    async with time_limit(), open_relayed() as (env, pair):
        cuts = 0
        received = 0
        script = f"head -c {24 * MIB} /dev/zero; echo end >&2"
        async with env.open_process(["sh", "-c", script]) as process:
            async for piece in process.stdout:
                assert not piece.strip(b"\0")
                received += len(piece)
                if received > (cuts + 1) * 3 * MIB:
                    cuts += 1
                    cut(pair, cuts)
            assert await process.wait() == 0
        assert received == 24 * MIB
        assert cuts >= 5


async def test_call_in_flight_is_answered_over_the_next_socket(tmp_path: Path) -> None:
    """What is not repeated over a plain websocket, as it may have been done, is simply answered here."""
    async with time_limit(), open_relayed() as (env, pair):
        data = bytes(range(256)) * 4096 * 8
        for number in range(4):
            file = tmp_path / f"file {number}"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(env.files.write_file, str(file), data)
                await trio.testing.wait_all_tasks_blocked()
                cut(pair, number)
            assert file.read_bytes() == data
            async with trio.open_nursery() as nursery:
                results: list[bytes] = []

                async def read(file: Path = file, results: list[bytes] = results) -> None:
                    results.append(await env.files.read_file(str(file)))

                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                cut(pair, number + 1)
            assert results == [data]


async def test_body_of_a_response_survives_a_cut() -> None:
    async with (
        time_limit(),
        open_relayed() as (env, pair),
        open_origin() as origin,
        env.http.stream("GET", origin.url("/held")) as response,
    ):
        origin.send_held(b"before")
        assert await anext(response) == b"before"
        cut(pair, 0)
        origin.send_held(b"after")
        assert await anext(response) == b"after"
        cut(pair, 1)
        origin.send_held(b"")
        assert [piece async for piece in response] == []


async def test_status_tells_of_an_interruption_and_of_its_end() -> None:
    async with time_limit(), open_relayed() as (env, pair):
        states: list[str] = []
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for change in env.status:
                    states.append(change.state)
                    if states[-2:] == ["recovering", "connected"]:
                        nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked()
            pair.rendezvous.cut_harnesses()
        assert states == ["connected", "recovering", "connected"]


async def test_calls_that_fail_fast_do_so_while_a_stream_is_interrupted() -> None:
    async with time_limit(), open_relayed() as (env, pair):
        pair.reconnect = False
        pair.rendezvous.cut_executor()
        await trio.testing.wait_all_tasks_blocked()
        with fail_fast():
            with pytest.raises(ConnectionLost, match="recovering") as caught:
                await env.files.read_file("/etc/hostname")
            assert caught.value.outcome == "not sent"
            with pytest.raises(ConnectionLost, match="recovering"):
                await env.run(["true"])


async def test_session_is_resumed_over_another_stream_where_this_one_is_forgotten(tmp_path: Path) -> None:
    async with time_limit(), open_relayed() as (env, pair):
        async with env.open_process(["sh", "-c", "read -r word; echo got $word"], stdin=True) as process:
            assert process.stdin is not None
            session_id = env.session_id
            stream = pair.streams.get("stream-1")
            assert stream is not None
            pair.rendezvous.watch = lambda way, frame: False  # its farewell gets lost
            stream.end("forgotten")
            await trio.testing.wait_all_tasks_blocked()
            pair.rendezvous.watch = lambda way, frame: True
            pair.rendezvous.cut_harnesses()
            await process.stdin.send_all(b"it\n")
            assert await process.stdout.receive_some() == b"got it\n"
            assert await process.wait() == 0
        assert env.session_id == session_id
        assert pair.ids == 2


async def test_session_is_not_resumed_with_another_executor() -> None:
    async with time_limit(), open_relayed() as (env, pair):
        await env.run(["true"])
        session_id = env.session_id
        pair.identity = pair.streams.identity = Identity.generate()
        stream = pair.streams.get("stream-1")
        assert stream is not None
        with pytest.raises(ConnectionLost, match="executor key changed during session recovery"):
            async with env.open_process(["sleep", "1000"]) as process:
                stream._break("it was restarted")
                await process.wait()
        assert (await env.run(["echo", "anew"])).stdout == b"anew\n"
        assert env.session_id != session_id
