"""A harness that repairs a repository in an environment: read, patch, run the tests, read the report.

    python examples/edit_repository.py [TARGET]

TARGET is `local` (the default), a ws:// URL, or in quotes a command that speaks the protocol on stdio. The
repository is made here and uploaded, as a checkout would be; what a model would decide is a script.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import execenv

SOURCES = {
    "AGENTS.md": "Run the tests with `python3 -m unittest`.",
    "temperature.py": "def to_fahrenheit(celsius):\n    return celsius * 9 / 5 + 23\n",
    "test_temperature.py": """
import unittest
from temperature import to_fahrenheit

class Freezing(unittest.TestCase):
    def test_water_freezes_at_32(self):
        self.assertEqual(to_fahrenheit(0), 32)
""",
}


@asynccontextmanager
async def open_checkout(env: execenv.Environment) -> AsyncIterator[execenv.EnvironmentPath]:
    """The repository over there, which is gone afterwards."""
    made = await env.run(["mktemp", "-d"])
    folder = env.path((made.stdout or b"").decode().strip())
    try:
        with tempfile.TemporaryDirectory() as here:
            for name, text in SOURCES.items():
                await trio.Path(here, name).write_text(text)
            await env.files.upload(here, folder / "checkout")
        yield folder / "checkout"
    finally:
        with trio.move_on_after(10, shield=True):  # also when we are cancelled
            await env.files.remove(folder)


async def run_tests(env: execenv.Environment, folder: execenv.EnvironmentPath) -> bool:
    """Run the tests, at most a minute; their output is in `report.txt` there."""
    with trio.fail_after(60):
        command = "python3 -m unittest > report.txt 2>&1"
        return (await env.run(["sh", "-c", command], cwd=folder, check=False)).returncode == 0


async def main(target: str) -> None:
    where = target if target == "local" or "://" in target else shlex.split(target)
    async with execenv.open_environment(where) as env, open_checkout(env) as folder:
        print("instructions:", await (folder / "AGENTS.md").read_text())
        print("files:", *[file.name for file in await folder.glob("*.py")])
        print("tests pass:", await run_tests(env, folder))
        async with await (folder / "report.txt").open() as report:
            print("report:", *[line.strip() async for line in report if "Error" in line])
        source = folder / "temperature.py"
        await source.write_text((await source.read_text()).replace("+ 23", "+ 32"))
        print("tests pass:", await run_tests(env, folder))


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "local")
