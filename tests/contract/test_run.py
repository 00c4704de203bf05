"""Contract of `Environment.run`: what comes back, and which error comes out."""

from __future__ import annotations

import pytest
import trio

from execenv import (
    CapturedOutput,
    CompletedProcess,
    Environment,
    ExecenvError,
    ProcessFailed,
    ProcessNotStarted,
    UsageError,
    captured_output,
)
from tests.fakes import program_file, python


async def test_run_gives_both_streams_and_the_status(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "echo out; echo err >&2; exit 7"], check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)
    assert done.argv == ("sh", "-c", "echo out; echo err >&2; exit 7")


async def test_run_without_capture_gives_no_output(environment: Environment) -> None:
    done = await environment.run(["echo", "ignored"], capture=False)
    assert (done.stdout, done.stderr, done.returncode) == (None, None, 0)


async def test_failed_check_raises_all_that_is_known(environment: Environment) -> None:
    with pytest.raises(ProcessFailed) as caught:
        await environment.run(["sh", "-c", "echo out; echo first >&2; echo last >&2; exit 4"])
    error = caught.value
    assert error.argv[:2] == ("sh", "-c")
    assert (error.returncode, error.environment) == (4, environment.name)
    assert (error.stdout, error.stderr) == (b"out\n", b"first\nlast\n")
    assert str(error) == f"'sh' in {environment.name} ended with status 4: last"


async def test_failed_check_without_capture_has_no_output(environment: Environment) -> None:
    with pytest.raises(ProcessFailed) as caught:
        await environment.run(["sh", "-c", "echo out; exit 4"], capture=False)
    assert (caught.value.stdout, caught.value.stderr) == (None, None)


async def test_failed_check_comes_out_as_itself_also_with_input(environment: Environment) -> None:
    with pytest.raises(ProcessFailed):
        await environment.run(["sh", "-c", "exit 4"], input=b"x" * 3_000_000)


async def test_unknown_program_is_not_started(environment: Environment) -> None:
    await _check_not_started(environment, ["no-such-program-anywhere"], None, "No such file or directory")


async def test_missing_working_directory_is_not_started(environment: Environment) -> None:
    await _check_not_started(environment, ["true"], "/no/such/directory", "No such file or directory")


async def test_file_as_working_directory_is_not_started(environment: Environment) -> None:
    await _check_not_started(environment, ["true"], "/etc/passwd", "Not a directory")


async def test_file_that_is_not_executable_is_not_started(environment: Environment) -> None:
    with program_file("#!/bin/sh\n", 0o644) as program:
        await _check_not_started(environment, [program], None, "Permission denied")


async def test_script_without_interpreter_line_is_not_started(environment: Environment) -> None:
    with program_file("echo hi\n") as program:
        await _check_not_started(environment, [program], None, "Exec format error")


async def _check_not_started(environment: Environment, argv: list[str], cwd: str | None, why: str) -> None:
    for stdin in (False, True):
        with pytest.raises(ProcessNotStarted, match=why) as caught:
            async with environment.open_process(argv, cwd=cwd, stdin=stdin):
                raise AssertionError("it was started")
        assert (caught.value.program, caught.value.environment) == (argv[0], environment.name)
        assert isinstance(caught.value.__cause__, ExecenvError)
        assert environment.name in str(caught.value)
        assert argv[0] in str(caught.value)
    done = await environment.run(["echo", "still working"])
    assert done.stdout == b"still working\n"


async def test_argv_as_one_string_is_a_usage_error(environment: Environment) -> None:
    with pytest.raises(UsageError, match=r"\['sh', '-c', 'echo hi'\]"):
        await environment.run("echo hi")
    with pytest.raises(UsageError):
        await environment.run([])


async def test_complete_environment_with_a_policy_is_a_usage_error(environment: Environment) -> None:
    from execenv.environment import INHERIT_ALL

    with pytest.raises(UsageError):
        await environment.run(["true"], env={}, env_policy=INHERIT_ALL)


async def test_error_of_the_block_comes_out_as_itself(environment: Environment) -> None:
    error = KeyError("of the block")
    with pytest.raises(KeyError) as caught:
        async with environment.open_process(["cat"], stdin=True):
            raise error
    assert caught.value is error


async def test_output_of_a_failed_check_is_found_at_the_error(environment: Environment) -> None:
    with pytest.raises(ProcessFailed) as caught:
        await environment.run(["sh", "-c", "echo out; exit 4"])
    found = captured_output(caught.value)
    assert found is not None
    assert bytes(found.stdout) == b"out\n"


async def test_captured_output_is_filled_and_given_back(environment: Environment) -> None:
    output = CapturedOutput()
    done = await environment.run(["sh", "-c", "echo out; echo err >&2"], capture=output)
    assert (bytes(output.stdout), bytes(output.stderr)) == (b"out\n", b"err\n")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


class CancellingBuffer(bytearray):
    """Cancels a scope when output arrives."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope

    def extend(self, data: bytes) -> None:  # type: ignore[override]
        super().extend(data)
        self._scope.cancel()


async def test_output_until_the_cancellation_is_found_at_the_error(environment: Environment) -> None:
    for data in (None, b"x" * 3_000_000):
        scope = trio.CancelScope()
        output = CapturedOutput(stdout=CancellingBuffer(scope))
        found = None
        with scope:
            try:
                await environment.run(["sh", "-c", "echo first; sleep 1000"], input=data, capture=output)
            except trio.Cancelled as error:
                found = captured_output(error)
                raise
        assert scope.cancelled_caught
        assert found is output
        assert bytes(output.stdout) == b"first\n"


async def test_cancelled_run_leaves_the_next_one_working(environment: Environment) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await environment.run(["sleep", "1000"])
    assert scope.cancelled_caught
    assert (await environment.run(["echo", "next"])).stdout == b"next\n"


async def test_error_of_no_run_has_no_captured_output(environment: Environment) -> None:
    assert captured_output(ValueError("of something else")) is None


async def test_hundred_processes_at_once_each_have_their_own_output(environment: Environment) -> None:
    results: dict[int, CompletedProcess] = {}

    async def run(number: int) -> None:
        script = 'read line; echo "out $1 $line"; echo "err $1" >&2; exit $1'
        argv = ["sh", "-c", script, "sh", str(number)]
        results[number] = await environment.run(argv, input=b"%d\n" % number, check=False)

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(run, number)
    for number, done in results.items():
        assert done.stdout == b"out %d %d\n" % (number, number)
        assert (done.stderr, done.returncode) == (b"err %d\n" % number, number)
    assert len(results) == 100


async def test_arguments_arrive_unchanged(environment: Environment) -> None:
    words = ["", " ", "a b", "é ☃ 𝄞", "'\"\\", "$HOME *", "line\nbreak", "-"]
    show = "import os, sys; os.write(1, '\\0'.join(sys.argv[1:]).encode())"
    done = await environment.run(python(show, *words))
    assert done.stdout == "\0".join(words).encode()
