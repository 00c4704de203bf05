"""A stream over a relay whose legs are cut, swallow frames and come back late, in random orders."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from execenv.relay.frames import Resume, decode
from execenv.transports.channel import Channel
from tests.relay_pair import Pair, open_pair
from tests.test_relay_streams import Client, echo, message, open_client

MESSAGES = 60


async def disturb(pair: Pair, client: Client, chance: random.Random) -> None:
    real = pair.rendezvous.connect_harness

    async def connect() -> Channel:
        if chance.random() < 0.3:
            await trio.sleep(chance.choice([0.05, 1, 4, 9]))
        return await real()

    client.stream._again = connect
    while True:
        await trio.sleep(chance.choice([0, 0, 0.01, 0.1, 0.5, 3, 21]))
        what = chance.randrange(7)
        if what == 0:
            pair.rendezvous.cut_executor()
        elif what in (1, 2):
            pair.rendezvous.cut_harnesses()
        elif what == 3:  # both ends, one frame apart
            pair.rendezvous.cut_harnesses()
            for _ in range(chance.randrange(8)):
                await trio.lowlevel.checkpoint()
            pair.rendezvous.cut_executor()
        elif what == 4:  # a way that swallows all, until it is cut
            way = chance.choice(["up", "down", ""])
            pair.rendezvous.watch = _swallow(way)
            await trio.sleep(chance.choice([0, 0.2, 2]))
            pair.rendezvous.watch = lambda way, frame: True
            pair.rendezvous.cut_harnesses()
        elif what == 5:  # no resume gets through
            pair.rendezvous.watch = lambda way, frame: not isinstance(decode(frame).body, Resume)
            pair.rendezvous.cut_harnesses()
            await trio.sleep(chance.choice([0.1, 2, 11]))
            pair.rendezvous.watch = lambda way, frame: True
        else:
            stream = pair.streams.get(client.stream.stream_id)
            if stream is not None and not stream.interrupted:
                stream.probe_nowait()


def _swallow(lost: str) -> Callable[[str, bytes], bool]:
    return lambda way, frame: bool(lost) and way != lost


@pytest.mark.parametrize("noise", [False, True], ids=["clear", "noise"])
@pytest.mark.parametrize("seed", range(10))
async def test_whatever_happens_all_arrives_once_or_the_stream_ends(
    autojump_clock: MockClock, seed: int, noise: bool
) -> None:
    chance = random.Random(seed)
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(-1))
        await client.wait_for(1)
        sent = [message(-1)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disturb, pair, client, chance)
            for i in range(MESSAGES):
                if client.stream.closed:
                    break
                sent.append(message(i, chance.choice([0, 10, 70_000, 400_000])))
                client.stream.send_nowait(sent[-1])
                await trio.sleep(chance.choice([0, 0, 0.01, 0.3, 2]))
            with trio.move_on_after(600):
                while len(client.got) < len(sent) and not client.stream.closed:  # noqa: ASYNC110
                    await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert client.got == sent[: len(client.got)], "lost, repeated, or out of order"
        assert client.stream.closed or len(client.got) == len(sent), "stuck"
        if not client.stream.closed:
            client.stream.close_nowait()
        pair.rendezvous.watch = lambda way, frame: True
        await trio.sleep(40)
        assert client.stream.closed
        assert not pair.streams._streams, "left behind"
