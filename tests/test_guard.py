"""What the local environments of one program share."""

from __future__ import annotations

import os
import sys

import pytest
import trio

import execenv.local
from execenv import open_environment
from tests.fakes import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans come to us on Linux only")

LEAVES_AN_ORPHAN = """
    import os, signal
    if os.fork() == 0:
        pid = os.fork()
        if pid == 0:
            os.setsid()
        else:
            os.write(1, b"%d\\n" % pid)
        os._exit(0)
    os.wait()
    while True:
        signal.pause()
"""


async def test_short_lived_orphans_of_a_tree_that_lives_on_are_reaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execenv.local, "REAP_INTERVAL", 0.01)
    with trio.fail_after(30):
        async with (
            open_environment("local") as one,
            open_environment("local") as other,
            one.open_process(python(LEAVES_AN_ORPHAN)) as process,
        ):
            orphan = int(await process.stdout.receive_some())
            # None of those that somebody waits for loses its status to that.
            for status in range(20):
                done = await other.run(["sh", "-c", f"exit {status}"], check=False)
                assert done.returncode == status
            while os.path.exists(f"/proc/{orphan}"):  # noqa: ASYNC110, ASYNC240 - its end has no event here
                await trio.sleep(0.01)
            receipt = await process.kill()
            assert (len(receipt.signalled), receipt.survivors) == (1, ())
