"""Contract of programs on a terminal."""

from __future__ import annotations

import pytest

from execenv import Environment, NotSupported, Process, ProcessNotStarted
from tests.fakes import python


async def read_until(process: Process, text: bytes) -> bytes:
    """Read chunks until `text` was seen; all that was read."""
    received = b""
    while text not in received:
        received += (await anext(aiter(process))).data
    return received


async def test_terminal_is_one_and_is_the_controlling_one(environment: Environment) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && echo controlling > /dev/tty"
    done = await environment.run(["sh", "-c", script], tty=True)
    assert done.stdout == b"controlling\r\n"


async def test_terminal_merges_both_streams(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "echo out; echo err >&2"], tty=True)
    assert (done.stdout, done.stderr) == (b"out\r\nerr\r\n", b"")
    async with environment.open_process(["sh", "-c", "echo out; echo err >&2"], tty=True) as process:
        assert {chunk.stream async for chunk in process} == {"pty"}


async def test_terminal_echoes_and_delivers_lines(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", 'read x; echo "got $x"'], tty=True, input=b"hello\n")
    assert done.stdout == b"hello\r\ngot hello\r\n"


async def test_terminal_without_input_is_at_end_of_file(environment: Environment) -> None:
    assert (await environment.run(["cat"], tty=True)).returncode == 0


async def test_input_on_a_terminal_ends_also_within_a_line(environment: Environment) -> None:
    done = await environment.run(["cat"], tty=True, input=b"no newline")
    assert done.stdout is not None
    assert done.stdout.count(b"no newline") == 2


async def test_control_c_through_stdin_interrupts(environment: Environment) -> None:
    # Not one long sleep: a signal in the moment before its exec is lost to it, and the trap waits for it.
    script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.02; done"
    async with environment.open_process(["sh", "-c", script], tty=True) as process:
        await read_until(process, b"ready")
        assert process.stdin is not None
        await process.stdin.send_all(b"\x03")
        await read_until(process, b"caught")
        assert await process.wait() == 5


async def test_closing_the_stdin_of_a_terminal_is_control_d(environment: Environment) -> None:
    async with environment.open_process(["cat"], tty=True) as process:
        assert process.stdin is not None
        await process.stdin.send_all(b"abc\n")
        await process.stdin.aclose()
        assert b"".join([chunk.data async for chunk in process]) == b"abc\r\nabc\r\n"
        assert await process.wait() == 0


async def test_terminal_has_24_rows_of_80(environment: Environment) -> None:
    assert (await environment.run(["stty", "size"], tty=True)).stdout == b"24 80\r\n"


async def test_terminal_takes_another_size_and_tells_the_program(environment: Environment) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done"
    async with environment.open_process(["sh", "-c", script], tty=True) as process:
        await read_until(process, b"ready")
        await process.resize(40, 100)
        await read_until(process, b"40 100")


async def test_process_without_terminal_cannot_be_resized(environment: Environment) -> None:
    async with environment.open_process(["cat"], stdin=True) as process:
        with pytest.raises(NotSupported):
            await process.resize(40, 100)


async def test_arg0_is_what_a_program_on_a_terminal_sees(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "echo $0"], arg0="another name", tty=True)
    assert done.stdout == b"another name\r\n"


async def test_unknown_program_is_not_started_on_a_terminal(environment: Environment) -> None:
    with pytest.raises(ProcessNotStarted, match="no-such-program") as caught:
        await environment.run(["no-such-program-anywhere"], tty=True)
    assert caught.value.program == "no-such-program-anywhere"
    assert caught.value.__cause__ is not None


async def test_missing_working_directory_is_not_started_on_a_terminal(environment: Environment) -> None:
    with pytest.raises(ProcessNotStarted, match="No such file"):
        await environment.run(["true"], cwd="/no/such/directory", tty=True)


async def test_death_by_signal_on_a_terminal_is_128_and_its_number(environment: Environment) -> None:
    for name, number in (("TERM", 15), ("KILL", 9), ("INT", 2)):
        done = await environment.run(["sh", "-c", f"kill -{name} $$"], tty=True, check=False)
        assert done.returncode == 128 + number


async def test_large_output_of_a_terminal_is_complete(environment: Environment) -> None:
    code = "import os\nfor n in range(20_000): os.write(1, b'%d\\n' % n)"
    done = await environment.run(python(code), tty=True)
    assert done.stdout == b"".join(b"%d\r\n" % number for number in range(20_000))
