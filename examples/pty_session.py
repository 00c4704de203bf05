"""Drives an interactive shell on a terminal: type a line, wait for the prompt, read what was shown.

    python examples/pty_session.py [TARGET]

TARGET is `local` (the default), a ws:// URL, or in quotes a command that speaks the protocol on stdio. The
same works for any program that asks and is answered: a debugger, a REPL, an installer.
"""

from __future__ import annotations

import shlex
import sys

import trio

import execenv

PROMPT = "ready> "


class Session:
    """A program on a terminal that shows `PROMPT` whenever it wants a line."""

    def __init__(self, process: execenv.Process) -> None:
        self._process = process
        self._shown = ""

    async def expect(self, text: str) -> str:
        """Wait until `text` is shown; what was shown before it."""
        while text not in self._shown:
            data = await self._process.stdout.receive_some()
            if not data:
                raise EOFError(f"the program ended after {self._shown!r}, without {text!r}")
            self._shown += data.decode(errors="replace")
        before, _, self._shown = self._shown.partition(text)
        return before

    async def ask(self, line: str) -> str:
        """Type a line; what the program shows until it wants the next one."""
        await self.send(line)
        answer = await self.expect(PROMPT)
        return answer.partition("\r\n")[2].replace("\r\n", "\n")  # a terminal shows what is typed, too

    async def send(self, line: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(line.encode() + b"\n")


async def main(target: str) -> int:
    where = target if target == "local" or "://" in target else shlex.split(target)
    variables = {"PS1": PROMPT, "TERM": "dumb", "ENV": ""}
    async with (
        execenv.open_environment(where) as env,
        env.open_process(["sh"], tty=True, extra_env=variables) as process,
    ):
        session = Session(process)
        with trio.fail_after(30):
            await session.expect(PROMPT)
            for line in ("tty | cut -c1-5", "answer=$((6 * 7))", "echo the answer is $answer"):
                print(f"{line!r} shows {await session.ask(line)!r}", flush=True)
            await session.send("exit 3")
            status = await process.wait()
    print(f"the shell ended with status {status}")
    return status


if __name__ == "__main__":
    sys.exit(trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "local"))
