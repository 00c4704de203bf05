"""A minimal harness loop: runs the tool calls of a model in an environment, one after another.

    python examples/harness.py [TARGET]

TARGET is `local` (the default), a ws:// URL, or in quotes a command that speaks the protocol on stdio. The
model is a script here; what it would read is printed. Every call has a deadline. A call that passes it is
ended with everything that it started, and what it had printed by then is part of the result.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

import execenv


@dataclass(frozen=True)
class ToolCall:
    command: str
    seconds: float = 30.0


SCRIPT = (
    ToolCall("echo 'echo $((6 * 7))' > answer.sh && ls"),
    ToolCall("sh answer.sh"),
    ToolCall("sh question.sh"),
    ToolCall("echo thinking; sleep 1000 & wait", seconds=2),
    ToolCall("cat answer.sh"),
)


async def run_tool(env: execenv.Environment, call: ToolCall, cwd: str) -> str:
    """Run one call; the text for the model."""
    output = execenv.CapturedOutput()
    status = f"stopped after {call.seconds:g} s"
    try:
        with trio.move_on_after(call.seconds):
            done = await env.run(["sh", "-c", call.command], cwd=cwd, capture=output, check=False)
            status = f"exit status {done.returncode}"
    except execenv.ProcessNotStarted as error:
        status = str(error)
    text = (output.stdout + output.stderr).decode(errors="replace")
    return f"[{status}]\n{text}"


@asynccontextmanager
async def open_workspace(env: execenv.Environment) -> AsyncIterator[str]:
    """A directory over there, which is gone afterwards."""
    folder = (await env.run(["mktemp", "-d"])).stdout or b""
    try:
        yield folder.decode().strip()
    finally:
        with trio.move_on_after(10, shield=True):  # also when we are cancelled
            await env.run(["rm", "-r", folder.strip().decode()])


async def main(target: str) -> None:
    where = target if target == "local" or "://" in target else shlex.split(target)
    async with execenv.open_environment(where) as env, open_workspace(env) as folder:
        for call in SCRIPT:
            print(f"> {call.command}\n{await run_tool(env, call, folder)}", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "local")
