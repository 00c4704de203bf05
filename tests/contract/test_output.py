"""Contract of output: unchanged, complete, in order, to one reader at a time."""

from __future__ import annotations

import os
import struct
import tempfile

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import Environment, Output, OutputGap, Process, UsageError
from tests.fakes import python

BINARY = bytes(range(256)) * 100
SEQ_5_MB = ["seq", "1", "800000"]


def expected_of_seq() -> bytes:
    return b"".join(b"%d\n" % number for number in range(1, 800_001))


async def test_binary_output_is_unchanged(environment: Environment) -> None:
    code = "import os\nfor fd in 1, 2: os.write(fd, bytes(range(256)) * 100)"
    done = await environment.run(python(code))
    assert (done.stdout, done.stderr) == (BINARY, BINARY)


async def test_large_output_is_complete_and_in_order(environment: Environment) -> None:
    assert (await environment.run(SEQ_5_MB)).stdout == expected_of_seq()


async def test_large_output_on_both_streams_is_complete(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "seq 1 300000 >&2 & seq 1 300000; wait"])
    assert done.stdout is not None
    assert done.stdout == done.stderr
    assert done.stdout.endswith(b"\n300000\n")


async def test_streams_are_receive_streams(environment: Environment) -> None:
    received: dict[str, bytes] = {}
    async with environment.open_process(["sh", "-c", "seq 1 20000; seq 1 30000 >&2"]) as process:

        async def read(name: str, stream: trio.abc.ReceiveStream) -> None:
            assert isinstance(stream, trio.abc.ReceiveStream)
            received[name] = b"".join([piece async for piece in stream])
            assert await stream.receive_some() == b""

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "stdout", process.stdout)
            nursery.start_soon(read, "stderr", process.stderr)
        assert await process.wait() == 0
    assert received["stdout"].endswith(b"\n20000\n")
    assert received["stderr"].endswith(b"\n30000\n")


async def test_stream_gives_no_more_than_is_asked_for(environment: Environment) -> None:
    async with environment.open_process(["printf", "0123456789"]) as process:
        pieces = []
        while piece := await process.stdout.receive_some(3):
            assert len(piece) <= 3
            pieces.append(piece)
        assert b"".join(pieces) == b"0123456789"


async def test_closed_stream_gives_nothing(environment: Environment) -> None:
    async with environment.open_process(["echo", "hi"]) as process:
        await process.stdout.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await process.stdout.receive_some()


async def test_chunks_have_seqs_without_holes(environment: Environment) -> None:
    script = "for i in 1 2 3 4 5; do read x; echo out $x; read x; echo err $x >&2; done; read x"
    seqs, text = [], []
    async with environment.open_process(["sh", "-c", script], stdin=True) as process:
        assert process.stdin is not None
        for number in range(10):
            await process.stdin.send_all(b"%d\n" % number)
            chunk = await anext(aiter(process))
            seqs.append(chunk.seq)
            text.append((chunk.stream, chunk.data))
        await process.stdin.send_all(b"\n")
        with pytest.raises(StopAsyncIteration):
            await anext(aiter(process))
    assert seqs == list(range(1, 11))
    assert text == [
        ("stderr", b"err %d\n" % number) if number % 2 else ("stdout", b"out %d\n" % number)
        for number in range(10)
    ]


async def test_two_readers_of_one_stream_are_a_usage_error(environment: Environment) -> None:
    async with environment.open_process(["cat"], stdin=True) as process:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anext, aiter(process))
            await wait_all_tasks_blocked()
            with pytest.raises(UsageError, match="two tasks"):
                await anext(aiter(process))
            with pytest.raises(UsageError, match="two tasks"):
                await process.stdout.receive_some()
            nursery.cancel_scope.cancel()
        assert process.stdin is not None
        await process.stdin.send_all(b"still working")
        assert await process.stdout.receive_some() == b"still working"


async def test_cancelled_reader_loses_nothing(environment: Environment) -> None:
    async with environment.open_process(["cat"], stdin=True) as process:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await process.stdout.receive_some()
            assert scope.cancelled_caught
        assert process.stdin is not None
        await process.stdin.send_all(b"all of it")
        received = b""
        while len(received) < len(b"all of it"):
            received += await process.stdout.receive_some(2)
            with trio.CancelScope() as scope:
                scope.cancel()
                received += await process.stdout.receive_some()
        assert received == b"all of it"


async def test_exit_is_not_delayed_by_a_descendant_that_holds_the_output(environment: Environment) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gate = os.path.join(folder, "gate")
        os.mkfifo(gate)
        script = '(read x < "$1"; echo late) & echo early; exit 6'
        async with environment.open_process(["sh", "-c", script, "sh", gate]) as process:
            assert await process.wait() == 6
            assert (await anext(aiter(process))).data == b"early\n"
            gate_fd = os.open(gate, os.O_RDWR)  # both ends, so that it waits for nobody
            try:
                os.write(gate_fd, b"go\n")
                assert [chunk.data async for chunk in process] == [b"late\n"]
            finally:
                os.close(gate_fd)
            assert process.returncode == 6


async def test_run_waits_for_the_output_of_descendants(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "(sleep 0.05; echo late) & echo early"])
    assert done.stdout == b"early\nlate\n"


# Writes 50 MB of numbered blocks and tells in a file how many it has written.
WRITER = """
import os, sys, struct
progress = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for number in range(50_000):
    block = struct.pack(">Q", number) * 125
    while block:
        block = block[os.write(1, block):]
    os.pwrite(progress, struct.pack(">Q", number + 1), 0)
"""


async def test_output_that_nobody_reads_does_not_pile_up(environment: Environment) -> None:
    """A local child is held back. A remote one goes on, and what is lost then is reported."""
    with tempfile.TemporaryDirectory() as folder:
        progress = os.path.join(folder, "progress")
        async with environment.open_process(python(WRITER, progress)) as process:
            first = await anext(aiter(process))
            await wait_all_tasks_blocked(0.05)  # as long as output arrives, some task is not blocked
            (written,) = struct.unpack(">Q", await trio.Path(progress).read_bytes())
            if environment.name == "local":
                assert written < 3_000
                assert process.returncode is None
            chunks, gaps = await read_all(process)
            assert await process.wait() == 0
            seqs = {first.seq, *(chunk.seq for chunk in chunks)}
            for gap in gaps:
                seqs.update(range(gap.from_seq, gap.to_seq + 1))
            assert len(set(range(1, max(seqs))) - seqs) <= 1  # the exit, when output follows it
            assert [chunk.seq for chunk in chunks] == sorted(chunk.seq for chunk in chunks)
            size = len(first.data) + sum(len(chunk.data) for chunk in chunks)
            assert size == 50_000_000 if not gaps else size < 50_000_000
            assert chunks[-1].data.endswith(struct.pack(">Q", 49_999))
            if environment.name == "local":
                assert gaps == []


async def read_all(process: Process) -> tuple[list[Output], list[OutputGap]]:
    """All that a process still has to say, and where some is missing."""
    chunks: list[Output] = []
    gaps: list[OutputGap] = []
    while True:
        try:
            chunks += [await anext(aiter(process))]
        except OutputGap as gap:
            gaps.append(gap)
        except StopAsyncIteration:
            return chunks, gaps


async def test_slow_reader_does_not_hold_back_others(environment: Environment) -> None:
    async with environment.open_process(["cat", "/dev/zero"]) as process:
        await anext(aiter(process))
        for _ in range(20):
            assert (await environment.run(["echo", "quick"])).stdout == b"quick\n"
        assert process.returncode is None
