"""Contract of stdin: everything is delivered, in order, and then comes the end of file."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import Environment
from tests.fakes import python

BIG = bytes(range(256)) * 12_000  # 3 MB


async def test_input_is_delivered_with_an_end_of_file(environment: Environment) -> None:
    assert (await environment.run(["cat"], input=b"hello\n")).stdout == b"hello\n"


async def test_large_input_is_delivered_whole(environment: Environment) -> None:
    assert (await environment.run(["cat"], input=BIG)).stdout == BIG


async def test_program_may_leave_its_input_unread(environment: Environment) -> None:
    for data in (b"x", BIG):
        done = await environment.run(["sh", "-c", "exit 3"], input=data, check=False)
        assert done.returncode == 3


async def test_program_may_read_only_the_start_of_its_input(environment: Environment) -> None:
    assert (await environment.run(["head", "-c", "10"], input=BIG)).stdout == BIG[:10]


async def test_program_may_close_its_stdin_and_go_on(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "exec <&-; echo done"], input=BIG)
    assert done.stdout == b"done\n"


async def test_without_input_stdin_is_at_end_of_file(environment: Environment) -> None:
    for data in (None, b""):
        assert (await environment.run(["cat"], input=data)).stdout == b""


async def test_process_opened_without_stdin_has_none(environment: Environment) -> None:
    async with environment.open_process(["cat"]) as process:
        assert process.stdin is None
        assert await process.wait() == 0


async def test_closing_stdin_ends_it_behind_all_that_was_sent(environment: Environment) -> None:
    async with environment.open_process(["cat"], stdin=True) as process:
        assert isinstance(process.stdin, trio.abc.SendStream)
        for piece in (b"one ", b"", bytearray(b"two "), memoryview(b"three")):
            await process.stdin.send_all(piece)
        await process.stdin.aclose()
        await process.stdin.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await process.stdin.send_all(b"late")
        assert b"".join([chunk.data async for chunk in process]) == b"one two three"
        assert await process.wait() == 0


async def test_input_and_output_alternate(environment: Environment) -> None:
    async with environment.open_process(["cat"], stdin=True) as process:
        assert process.stdin is not None
        for number in range(20):
            line = b"line %d" % number
            await process.stdin.send_all(line)
            received = b""
            while len(received) < len(line):
                received += await process.stdout.receive_some()
            assert received == line


async def test_many_small_writes_arrive_in_order(environment: Environment) -> None:
    sent = [b"%d\n" % number for number in range(300)]
    received = bytearray()
    async with environment.open_process(["cat"], stdin=True) as process:
        stdin = process.stdin
        assert stdin is not None

        async def send() -> None:
            for piece in sent:
                await stdin.send_all(piece)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while len(received) < sum(map(len, sent)):
                received += await process.stdout.receive_some()
    assert received == b"".join(sent)


async def test_sending_to_an_ended_process_says_broken(environment: Environment) -> None:
    async with environment.open_process(["true"], stdin=True) as process:
        await process.wait()
        assert process.stdin is not None
        with pytest.raises(trio.BrokenResourceError):
            await process.stdin.send_all(b"late")


async def test_sender_held_back_by_the_process_is_released_by_its_end(environment: Environment) -> None:
    async with environment.open_process(["sleep", "1000"], stdin=True) as process:
        stdin = process.stdin
        assert stdin is not None

        async def send() -> None:
            # No error if the pipe breaks before the exit is seen: so it does when a program closes its stdin.
            with suppress(trio.BrokenResourceError):
                await stdin.send_all(bytes(20_000_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            await process.kill()


async def test_cancelled_sender_leaves_the_environment_working(environment: Environment) -> None:
    async with environment.open_process(python("import time; time.sleep(1000)"), stdin=True) as process:
        stdin = process.stdin
        assert stdin is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stdin.send_all, bytes(20_000_000))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert (await environment.run(["cat"], input=b"next")).stdout == b"next"
