"""Runs commands side by side, each line of output behind the name of its command, like `make -j`.

    python examples/build.py [TARGET [NAME=COMMAND ...]]

TARGET is `local` (the default), a ws:// URL, or in quotes a command that speaks the protocol on stdio. The
first command that fails cancels the others: they end there, with everything that they started.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

import trio

import execenv

STEPS = {
    "compile": "for file in main parser printer; do echo compiling $file; sleep 0.2; done",
    "test": "echo 1 of 3 ok; sleep 0.5; echo 2 of 3 failed >&2; exit 1",
    "docs": "echo writing pages; sleep 1000 & wait; echo never said",
}


class StepFailed(Exception):
    """A command that ended with another status than 0."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} failed with status {status}")


async def run_step(env: execenv.Environment, name: str, command: str) -> None:
    """Run one command to its end, printing what it says as it comes."""
    rest = {"stdout": b"", "stderr": b""}
    async with env.open_process(["sh", "-c", command]) as process:
        async for chunk in process:
            *lines, rest[chunk.stream] = (rest[chunk.stream] + chunk.data).split(b"\n")
            for line in lines:
                print(f"[{name}] {line.decode(errors='replace')}", flush=True)
        for line in filter(None, rest.values()):
            print(f"[{name}] {line.decode(errors='replace')}", flush=True)
        status = await process.wait()
    if status != 0:
        raise StepFailed(name, status)


async def build(target: str, steps: Mapping[str, str]) -> int:
    """Run all steps at once; the exit status for this program."""
    where = target if target == "local" or "://" in target else shlex.split(target)
    try:
        async with execenv.open_environment(where) as env, trio.open_nursery() as nursery:
            for name, command in steps.items():
                nursery.start_soon(run_step, env, name, command)
    except* StepFailed as failed:
        for error in failed.exceptions:
            print(f"build: {error}", flush=True)
        return_code = 1
    else:
        print("build: all good", flush=True)
        return_code = 0
    return return_code


if __name__ == "__main__":
    words = sys.argv[1:] or ["local"]
    chosen = dict(word.split("=", 1) for word in words[1:])
    sys.exit(trio.run(build, words[0], chosen or STEPS))
