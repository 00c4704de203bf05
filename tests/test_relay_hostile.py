"""What somebody between the ends of a relay can do with frames of his own, which nothing authenticates."""

from __future__ import annotations

import json

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from execenv.relay import frames
from execenv.relay.frames import ANSWER, OFFER, Frame, Resume
from tests.relay_pair import open_pair
from tests.test_relay_streams import NOISE, Client, echo, message, open_client

SECRET = b"nobody-between-reads-this"


async def test_forged_resumes_before_the_handshake_make_nothing_leave_in_clear_text(
    autojump_clock: MockClock,
) -> None:
    async with open_pair(echo, noise=True) as pair:
        pair.rendezvous.watch = lambda way, data: way == "up"  # the executor's words don't arrive
        stream = await pair.harness()
        stream.send_nowait(json.dumps({"id": SECRET.decode()}).encode())
        client = Client(stream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await wait_all_tasks_blocked()
            for _ in range(3):
                pair.rendezvous.harnesses[0].send_nowait(
                    frames.encode(Frame(stream.stream_id, Resume(0, OFFER)))
                )
                await wait_all_tasks_blocked()
            sent = [data for way, data in pair.rendezvous.frames if way == "up"]
            stream.close_nowait()
            await trio.sleep(5)
            nursery.cancel_scope.cancel()
        assert not any(SECRET in data for data in sent)


@NOISE
@pytest.mark.parametrize("to", ["harness", "executor"])
async def test_forged_resume_is_answered_once_and_not_for_ever(
    autojump_clock: MockClock, noise: bool, to: str
) -> None:
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        await trio.sleep(1)
        resumes = 0

        def watch(way: str, data: bytes) -> bool:
            nonlocal resumes
            resumes += type(frames.decode(data).body) is Resume
            return resumes < 100  # so that it ends

        pair.rendezvous.watch = watch
        theirs = pair.streams.get(client.stream.stream_id)
        victim, channel = (
            (client.stream, pair.rendezvous.harnesses[0])
            if to == "harness"
            else (theirs, pair.rendezvous.executor)
        )
        assert victim is not None
        assert victim._reliable is not None
        assert channel is not None
        for reliability in (OFFER, ANSWER):
            forged = Resume(victim._reliable.next_seq, reliability)
            channel.send_nowait(frames.encode(Frame(client.stream.stream_id, forged)))
        await trio.sleep(5)
        assert resumes == 1
        client.stream.send_nowait(message(2))
        await client.wait_for(2)


@NOISE
async def test_resume_that_is_asked_for_twice_is_not_answered_for_ever(
    autojump_clock: MockClock, noise: bool
) -> None:
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        before = len(pair.rendezvous.frames)
        pair.rendezvous.watch = lambda way, data: (
            len(pair.rendezvous.frames) < before + 100
        )  # so that it ends
        client.stream._ask()  # as one that stalls does, and one that is probed at the same time
        client.stream._ask()
        await trio.sleep(5)
        kinds = [type(frames.decode(data).body) for _, data in pair.rendezvous.frames[before:]]
        assert kinds.count(Resume) == 4


@pytest.mark.parametrize("stream_id", ["a\nb", "a\x1b[2Jb", "a\u202eb"])
def test_stream_id_that_would_forge_a_line_of_a_log_is_none(stream_id: str) -> None:
    with pytest.raises(frames.InvalidFrame, match="cannot be printed"):
        frames.decode(frames.encode(Frame(stream_id, Resume(0, OFFER))))
