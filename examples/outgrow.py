"""Counts primes on one machine, or on several at once when that one got too small.

    python examples/outgrow.py [TARGET ...]

TARGET is `local` (the default), a ws:// URL, or in quotes a command that leads to another machine:
"ssh devbox", "docker exec -i box", "kubectl exec -i pod --". All that it needs there is a shell and a Python
>= 3.11. Each machine takes the next range when it has done one; if one of them fails, all end.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import AsyncExitStack

import trio

import execenv

LIMIT, STEP = 200_000, 20_000

COUNT = """
import sys
first, end = map(int, sys.argv[1:])
print(sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(first, 2), end)))
"""


def target(text: str) -> str | execenv.CommandTarget:
    """What the word on the command line stands for."""
    if text == "local" or text.startswith(("ws://", "wss://")):
        return text
    return execenv.CommandTarget(tuple(shlex.split(text)), bootstrap=True)


async def work(env: execenv.Environment, ranges: trio.MemoryReceiveChannel[int], found: list[int]) -> None:
    """Take ranges until there are none left."""
    async with ranges:
        async for first in ranges:
            done = await env.run(["python3", "-c", COUNT, str(first), str(first + STEP)])
            found.append(int(done.stdout or b""))


async def main(words: list[str]) -> None:
    found: list[int] = []
    async with AsyncExitStack() as stack:
        places = [await stack.enter_async_context(execenv.open_environment(target(word))) for word in words]
        send, receive = trio.open_memory_channel[int](LIMIT // STEP)
        with send:
            for first in range(0, LIMIT, STEP):
                send.send_nowait(first)
        async with receive, trio.open_nursery() as nursery:
            for env in places:
                nursery.start_soon(work, env, receive.clone(), found)
    print(f"{sum(found)} primes below {LIMIT}, found in {len(found)} ranges on {len(words)} machines")


if __name__ == "__main__":
    trio.run(main, sys.argv[1:] or ["local"])
