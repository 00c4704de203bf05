"""Contract of ends: signals, statuses, and that nothing of a process is left when its block is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from execenv import Environment, Process
from tests.contract.test_tty import read_until
from tests.fakes import Watched, python

# Starts what is hard to find: a daemon (two forks, setsid), nohup in the background, a setsid child; and
# prints the pids of all, itself included. Exits when it is sent a byte.
TREE = """
import os, signal, subprocess, sys, time
def say(pid):
    os.write(1, b"%d " % pid)
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
say(os.getpid())
say(subprocess.Popen(["nohup", "sleep", "1000"], **quiet).pid)
say(subprocess.Popen(["sleep", "1000"], start_new_session=True, **quiet).pid)
middle = os.fork()
if middle == 0:
    os.setsid()
    if os.fork() == 0:
        say(os.getpid())
        null = os.open(os.devnull, os.O_RDWR)
        for fd in 0, 1, 2:
            os.dup2(null, fd)
        time.sleep(1000)
    os._exit(0)
os.waitpid(middle, 0)
if os.read(0, 1):
    sys.exit(0)
time.sleep(1000)
"""
TREE_SIZE = 4


@asynccontextmanager
async def open_tree(environment: Environment) -> AsyncIterator[tuple[Process, Watched]]:
    """The tree, with all its processes running and watched until the caller is done with them."""
    watched = Watched()
    async with environment.open_process(python(TREE), stdin=True) as process:
        text = b""
        while text.count(b" ") < TREE_SIZE:
            text += (await anext(aiter(process))).data
        for word in text.split():
            watched.add(int(word))
        yield process, watched


async def test_leaving_the_block_ends_the_whole_tree(environment: Environment) -> None:
    async with open_tree(environment) as (process, watched):
        assert watched.alive() == watched.pids
    assert watched.alive() == set()
    watched.close()
    assert process.receipt is not None
    assert set(process.receipt.signalled) >= watched.pids
    assert process.receipt.survivors == ()
    assert 0 < process.receipt.seconds < 5


async def test_leaving_the_block_by_an_error_ends_the_whole_tree(environment: Environment) -> None:
    with pytest.raises(KeyError):
        async with open_tree(environment) as (_, watched):
            raise KeyError
    assert watched.alive() == set()
    watched.close()


async def test_leaving_the_block_by_cancellation_ends_the_whole_tree(environment: Environment) -> None:
    with trio.CancelScope() as scope:
        async with open_tree(environment) as (process, watched):
            scope.cancel()
            await process.wait()
    assert scope.cancelled_caught
    assert watched.alive() == set()
    watched.close()
    assert process.receipt is not None


async def test_leaving_the_block_ends_what_an_exited_process_left_behind(environment: Environment) -> None:
    async with open_tree(environment) as (process, watched):
        assert process.stdin is not None
        await process.stdin.send_all(b"x")
        assert await process.wait() == 0
        assert len(watched.alive()) == TREE_SIZE - 1
    assert watched.alive() == set()
    watched.close()
    assert process.receipt is not None
    assert len(process.receipt.signalled) == TREE_SIZE - 1


async def test_kill_ends_the_whole_tree(environment: Environment) -> None:
    async with open_tree(environment) as (process, watched):
        receipt = await process.kill()
        assert watched.alive() == set()
        assert set(receipt.signalled) >= watched.pids
        assert receipt.survivors == ()
        assert await process.wait() == 137
        assert (await process.kill()).signalled == ()
    watched.close()


async def test_block_ends_a_descendant_that_holds_the_output(environment: Environment) -> None:
    script = "sleep 1000 & echo $!; exit 0"
    watched = Watched()
    async with environment.open_process(["sh", "-c", script]) as process:
        watched.add(int((await anext(aiter(process))).data))
        assert await process.wait() == 0
    assert watched.alive() == set()
    watched.close()


async def test_run_ends_what_the_program_left_behind(environment: Environment) -> None:
    # Many times: the program ends so soon that finding its orphan is a race that must not be lost.
    for _ in range(40):
        done = await environment.run(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"])
        assert done.stdout is not None
        assert done.receipt is not None
        assert done.receipt.signalled == (int(done.stdout),)


async def test_run_that_leaves_nothing_behind_signals_nobody(environment: Environment) -> None:
    done = await environment.run(["true"])
    assert done.receipt is not None
    assert (done.receipt.signalled, done.receipt.survivors) == ((), ())


async def test_ending_one_process_spares_the_others(environment: Environment) -> None:
    async with environment.open_process(["cat"], stdin=True) as other:
        async with open_tree(environment) as (process, watched):
            await process.kill()
        watched.close()
        assert other.stdin is not None
        await other.stdin.send_all(b"alive")
        assert await other.stdout.receive_some() == b"alive"


# One long sleep would not do in these scripts: a signal in the moment before its exec is lost to it, and the
# trap would wait for its end.
FOR_EVER = "echo ready; while :; do sleep 0.02; done"


async def test_interrupt_lets_a_trap_run(environment: Environment) -> None:
    script = f"trap 'echo bye; exit 9' INT; {FOR_EVER}"
    async with environment.open_process(["sh", "-c", script]) as process:
        await read_until(process, b"ready")
        await process.interrupt()
        await read_until(process, b"bye")
        assert await process.wait() == 9


async def test_interrupt_reaches_the_whole_group(environment: Environment) -> None:
    code = """
    import os, signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    child = os.fork()
    os.write(1, b"x")
    signal.sigwait([signal.SIGINT])
    if child:
        os._exit(3 + os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(4)
    """
    async with environment.open_process(python(code)) as process:
        await read_until(process, b"x")
        await process.interrupt()
        assert await process.wait() == 7


async def test_interrupt_without_a_trap_ends_with_130(environment: Environment) -> None:
    for tty in (False, True):
        async with environment.open_process(["sh", "-c", "echo ready; exec sleep 1000"], tty=tty) as process:
            await read_until(process, b"ready")
            await process.interrupt()
            assert await process.wait() == 130


async def test_interrupt_of_an_ended_process_does_nothing(environment: Environment) -> None:
    async with environment.open_process(["true"]) as process:
        await process.wait()
        await process.interrupt()
        assert process.returncode == 0


async def test_death_by_signal_is_128_and_its_number(environment: Environment) -> None:
    for name, number in (("TERM", 15), ("KILL", 9), ("INT", 2), ("SEGV", 11)):
        done = await environment.run(["sh", "-c", f"ulimit -c 0; kill -{name} $$"], check=False)
        assert done.returncode == 128 + number


async def test_terminate_lets_a_trap_run(environment: Environment) -> None:
    script = f"trap 'echo bye; exit 4' TERM; {FOR_EVER}"
    async with environment.open_process(["sh", "-c", script]) as process:
        await read_until(process, b"ready")
        receipt = await process.terminate(grace=9)
        assert receipt.survivors == ()
        assert await process.wait() == 4
        await read_until(process, b"bye")


async def test_terminate_ends_a_process_that_ignores_it_after_the_grace(environment: Environment) -> None:
    async with environment.open_process(["sh", "-c", f"trap '' TERM; {FOR_EVER}"]) as process:
        await read_until(process, b"ready")
        await process.terminate(grace=0.05)
        assert await process.wait() == 137


async def test_kill_lets_no_trap_run(environment: Environment) -> None:
    async with environment.open_process(
        ["sh", "-c", f"trap 'echo bye' TERM INT HUP EXIT; {FOR_EVER}"]
    ) as process:
        await read_until(process, b"ready")
        await process.kill()
        assert await process.wait() == 137
        assert b"bye" not in b"".join([chunk.data async for chunk in process])


async def test_output_from_before_the_end_is_still_read_after_it(environment: Environment) -> None:
    async with environment.open_process(["sh", "-c", "echo last words; kill -9 $$"]) as process:
        assert await process.wait() == 137
        assert await process.stdout.receive_some() == b"last words\n"
        assert await process.stdout.receive_some() == b""


async def test_program_on_a_terminal_leaves_nothing_behind(environment: Environment) -> None:
    watched = Watched()
    script = "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; echo all; wait"
    async with environment.open_process(["sh", "-c", script], tty=True) as process:
        text = await read_until(process, b"all")
        for word in text.split()[:2]:
            watched.add(int(word))
    assert watched.alive() == set()
    watched.close()
