"""Contract of programs that are started under a name, to be found by it later."""

from __future__ import annotations

import os
import tempfile

import pytest
from trio.testing import wait_all_tasks_blocked

from execenv import Environment, ProcessNotStarted, RpcError
from execenv.errors import InvalidRequest
from tests.contract.test_output import read_all
from tests.contract.test_tty import read_until
from tests.fakes import Watched, python

NAMES = ("a name", "é ☃ 𝄞 日本", 'quote " \\ / \n\t\x7f', "x" * 1000)


async def test_attached_output_begins_at_the_start(environment: Environment) -> None:
    await environment.start_detached("dev", ["sh", "-c", "echo one; read x; echo $x"], stdin=True)
    async with environment.attach("dev", stdin=True) as process:
        await read_until(process, b"one\n")
        assert process.stdin is not None
        await process.stdin.send_all(b"two\n")
        await read_until(process, b"two\n")
        assert await process.wait() == 0


async def test_ended_program_is_still_found(environment: Environment) -> None:
    await environment.start_detached("dev", ["sh", "-c", "echo words; echo more >&2; exit 3"])
    for _ in range(2):
        async with environment.attach("dev") as process:
            chunks = [chunk async for chunk in process]
            assert sorted(chunk.data for chunk in chunks) == [b"more\n", b"words\n"]
            # The exit has a seq too, and another server may see it before it reads the output.
            assert [chunk.seq for chunk in chunks] in ([1, 2], [1, 3], [2, 3])
            assert await process.wait() == 3


async def test_leaving_an_attachment_leaves_the_program_running(environment: Environment) -> None:
    await environment.start_detached("dev", ["sh", "-c", "echo one; exec sleep 1000"])
    for _ in range(3):
        async with environment.attach("dev") as process:
            await read_until(process, b"one\n")
            assert process.returncode is None
    async with environment.attach("dev") as process:
        await process.kill()
        assert await process.wait() == 137


async def test_killed_program_is_gone(environment: Environment) -> None:
    watched = Watched()
    await environment.start_detached("dev", ["sh", "-c", "echo $$; exec sleep 1000"])
    async with environment.attach("dev") as process:
        watched.add(int((await anext(aiter(process))).data))
        receipt = await process.kill()
        assert watched.alive() == set()
        assert set(receipt.signalled) == watched.pids
    watched.close()


async def test_two_attachments_each_get_everything(environment: Environment) -> None:
    await environment.start_detached("dev", ["sh", "-c", "echo one; read x; echo two"], stdin=True)
    async with environment.attach("dev") as first, environment.attach("dev", stdin=True) as second:
        await read_until(first, b"one\n")
        assert second.stdin is not None
        await second.stdin.send_all(b"\n")
        assert b"".join([chunk.data async for chunk in first]) == b"two\n"
        assert b"".join([chunk.data async for chunk in second]) == b"one\ntwo\n"


async def test_later_attachment_writes_too(environment: Environment) -> None:
    await environment.start_detached("dev", ["cat"], stdin=True)
    for line in (b"one\n", b"two\n"):
        async with environment.attach("dev", stdin=True) as process:
            assert process.stdin is not None
            await process.stdin.send_all(line)
            await read_until(process, line)


async def test_name_that_is_taken_starts_nothing(environment: Environment) -> None:
    await environment.start_detached("dev", ["sh", "-c", "echo first; exec sleep 1000"])
    with pytest.raises(ProcessNotStarted, match="already exists") as caught:
        await environment.start_detached("dev", ["sh", "-c", "echo second"])
    assert isinstance(caught.value.__cause__, RpcError)
    async with environment.attach("dev") as process:
        await read_until(process, b"first\n")


async def test_unknown_name_cannot_be_attached(environment: Environment) -> None:
    with pytest.raises(InvalidRequest, match="unknown process id nobody"):
        async with environment.attach("nobody"):
            raise AssertionError("attached to nothing")


async def test_name_of_a_program_that_did_not_start_is_free(environment: Environment) -> None:
    with pytest.raises(ProcessNotStarted):
        await environment.start_detached("dev", ["no-such-program-anywhere"])
    await environment.start_detached("dev", ["echo", "started"])
    async with environment.attach("dev") as process:
        await read_until(process, b"started")


async def test_name_may_be_any_text(environment: Environment) -> None:
    for name in NAMES:
        await environment.start_detached(name, ["printf", "%s", name[:10]])
    for name in NAMES:
        async with environment.attach(name) as process:
            assert process.process_id == name
            assert b"".join([chunk.data async for chunk in process]) == name[:10].encode()


async def test_empty_name_is_a_name(environment: Environment) -> None:
    await environment.start_detached("", ["echo", "started"])
    async with environment.attach("") as process:
        await read_until(process, b"started")


async def test_program_on_a_terminal_is_attached_to_as_well(environment: Environment) -> None:
    await environment.start_detached("dev", ["sh", "-c", "read x; echo got $x"], tty=True)
    async with environment.attach("dev", stdin=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"line\n")
        await read_until(process, b"got line\r\n")


async def test_history_of_a_program_with_much_output_says_what_is_lost(environment: Environment) -> None:
    code = "import os\nfor _ in range(300): os.write(1, b'x' * 10_000)"
    await environment.start_detached("dev", python(code))
    async with environment.attach("dev") as process:
        await read_all(process)
        assert await process.wait() == 0
    async with environment.attach("dev") as process:
        chunks, gaps = await read_all(process)
        assert [gap.from_seq for gap in gaps] == [1]
        assert gaps[0].to_seq == chunks[0].seq - 1
        assert 900_000 < sum(len(chunk.data) for chunk in chunks) <= 1024 * 1024
        assert await process.wait() == 0


async def test_much_output_that_nobody_reads_does_not_stop_a_program(environment: Environment) -> None:
    code = "import os\nfor _ in range(300): os.write(1, b'x' * 10_000)"
    await environment.start_detached("unread", python(code))
    async with environment.attach("unread") as process:
        await read_all(process)
        assert await process.wait() == 0


async def test_attachment_that_was_left_holds_back_nobody(environment: Environment) -> None:
    code = "import os; os.read(0, 1)\nfor _ in range(300): os.write(1, b'x' * 10_000)"
    await environment.start_detached("dev", python(code), stdin=True)
    async with environment.attach("dev", stdin=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"x")
        await anext(aiter(process))
        await wait_all_tasks_blocked(0.05)
    async with environment.attach("dev") as process:
        await read_all(process)
        assert await process.wait() == 0


async def test_history_with_output_behind_the_exit_has_no_gap(environment: Environment) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gate = os.path.join(folder, "gate")
        os.mkfifo(gate)
        script = '(read x < "$1"; echo late) & echo early; exit 6'
        await environment.start_detached("dev", ["sh", "-c", script, "sh", gate])
        async with environment.attach("dev") as process:
            assert await process.wait() == 6
            gate_fd = os.open(gate, os.O_RDWR)  # both ends, so that it waits for nobody
            os.write(gate_fd, b"go\n")
            await read_until(process, b"late\n")
            os.close(gate_fd)
    async with environment.attach("dev") as process:
        chunks, gaps = await read_all(process)
        assert [chunk.data for chunk in chunks] == [b"early\n", b"late\n"]
        assert [chunk.seq for chunk in chunks] in ([1, 3], [2, 3])
        assert gaps == []
        assert await process.wait() == 6
