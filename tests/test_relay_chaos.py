"""Parts of a relay killed, stopped and cut while a command prints; many more rounds are in `nox -s soak`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import trio

from tests.relay_chaos import ONE_NODE, TWO_NODES, Pattern, Wrong, open_world, run_round
from tests.relay_service.redis_server import require_redis

pytestmark = pytest.mark.no_cover  # what these run is measured elsewhere, and they take their time

MIB = 8
SEED = 20
REDIS = [kind for kind in TWO_NODES if kind.startswith("Redis")]
CUTS = [kind for kind in TWO_NODES if "cut" in kind or kind.startswith("harness")]
EXECUTORS_NODE = ["executor's node killed"]


async def run_rounds(folder: Path, kinds: Sequence[str], nodes: int) -> None:
    """One round of each, one after the other."""
    await trio.Path(folder).mkdir()
    faults = {**ONE_NODE, **TWO_NODES}
    async with open_world(folder, Random(SEED), nodes=nodes) as world:
        for kind in kinds:
            await run_round(world, kind, faults[kind], seed=SEED, mib=MIB, faults=1)


async def test_every_byte_arrives_once_whatever_is_killed_at_a_relay_of_one_node(tmp_path: Path) -> None:
    await run_rounds(tmp_path / "one", list(ONE_NODE), 1)


async def test_every_byte_arrives_once_whatever_is_killed_at_a_relay_of_two_nodes(tmp_path: Path) -> None:
    require_redis()
    assert {*REDIS, *CUTS, *EXECUTORS_NODE} == {*TWO_NODES}
    async with trio.open_nursery() as nursery:  # side by side: most of the time goes to waiting
        for name, kinds in (("redis", REDIS), ("cuts", CUTS), ("node", EXECUTORS_NODE)):
            nursery.start_soon(run_rounds, tmp_path / name, kinds, 2)


@pytest.mark.parametrize("printed", ["twice", "not at all", "otherwise"])
def test_comparison_sees_what_is_wrong(printed: str) -> None:
    """Else the rounds would show nothing."""
    import hashlib

    blocks = [hashlib.shake_128(f"7 {start}".encode()).digest(65536) for start in range(0, 5 * 65536, 65536)]
    text = bytearray(b"".join(blocks))
    Pattern(7).check(bytes(text))
    place = 100_000
    if printed == "twice":
        text[place:place] = text[place - 1000 : place]
    elif printed == "not at all":
        del text[place : place + 1]
    else:
        text[place] ^= 1
    pattern = Pattern(7)
    with pytest.raises(Wrong):
        for start in range(0, len(text), 5000):
            pattern.check(bytes(text[start : start + 5000]))
