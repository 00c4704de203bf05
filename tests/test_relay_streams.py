"""Streams over a relay, both ends, in memory: what arrives, what a cut costs, and every limit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from execenv.errors import ConnectionLost
from execenv.relay import executor, frames
from execenv.relay.executor import HARNESS_DISCONNECTED, PROTOCOL_ERROR, ExecutorStream
from execenv.relay.frames import Ack, Data, Frame, Handshake, Reset, Resume
from execenv.relay.harness import BURST, BURST_PAUSE, HarnessStream
from execenv.relay.keys import PublicKey
from execenv.relay.noise import Identity, NoiseFailed
from execenv.relay.reliable import STALL
from execenv.transports.channel import DEFAULT_MAX_MESSAGE, Channel, MessageTooLong
from tests.relay_pair import Pair, open_pair

NOISE = pytest.mark.parametrize("noise", [False, True], ids=["clear", "noise"])
SIZES = (20, 61_000, 61_440, 61_441, 300_000)


async def echo(channel: Channel) -> None:
    """Send everything back."""
    await channel.run(channel.send_nowait)


def message(number: int, size: int = 0) -> bytes:
    return json.dumps({"n": number, "pad": "x" * size}).encode()


class Client:
    """What a harness has got so far."""

    def __init__(self, stream: HarnessStream) -> None:
        self.stream = stream
        self.got: list[bytes] = []
        self.changed = trio.Event()

    async def run(self) -> None:
        await self.stream.run(self.receive)
        self.changed.set()

    def receive(self, data: bytes) -> None:
        self.got.append(data)
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, count: int) -> None:
        while len(self.got) < count:
            if self.stream.closed:
                raise self.stream.lost()
            with trio.move_on_after(100):
                await self.changed.wait()
                continue
            raise AssertionError(f"{len(self.got)} of {count} messages")


@asynccontextmanager
async def open_client(pair: Pair, **options: object) -> AsyncIterator[Client]:
    stream = await pair.harness(**options)  # type: ignore[arg-type]
    client = Client(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield client
        stream.close_nowait()


@NOISE
async def test_messages_of_every_size_come_back_in_order(autojump_clock: MockClock, noise: bool) -> None:
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
        sent = [message(i, size) for i, size in enumerate(SIZES * 3)]
        for one in sent:
            client.stream.send_nowait(one[:5], one[5:])
        await client.wait_for(len(sent))
        assert client.got == sent


@NOISE
async def test_both_ends_agree_to_acknowledge_and_forget_what_was_taken(
    autojump_clock: MockClock, noise: bool
) -> None:
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        client.stream.send_nowait(message(2, 200_000))
        await client.wait_for(2)
        await trio.sleep(1)
        theirs = pair.streams.get(client.stream.stream_id)
        assert theirs is not None
        for end in (client.stream, theirs):
            assert end._reliable is not None
            assert end._reliable.next_seq > 3
            assert end._reliable.unacknowledged == 0


@NOISE
async def test_two_streams_on_one_socket_are_independent(autojump_clock: MockClock, noise: bool) -> None:
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as one, open_client(pair) as other:
        one.stream.send_nowait(message(1))
        other.stream.send_nowait(message(2))
        await one.wait_for(1)
        await other.wait_for(1)
        one.stream.close_nowait()
        await wait_all_tasks_blocked()
        assert pair.streams.get(one.stream.stream_id) is None
        other.stream.send_nowait(message(3))
        await other.wait_for(2)
        assert (one.got, other.got) == ([message(1)], [message(2), message(3)])


def ended(stream: Channel) -> bool:
    return stream.closed


def cutter(pair: Pair, at: int, leg: str, *, losing: bool) -> Callable[[str, bytes], bool]:
    """Cuts a leg when the frame with number `at` passes, and loses that frame or not."""
    passed = 0

    def watch(way: str, data: bytes) -> bool:
        nonlocal passed
        passed += 1
        if passed == at:
            if leg == "executor":
                pair.rendezvous.cut_executor()
            else:
                pair.rendezvous.cut_harnesses()
            return not losing
        return True

    return watch


@pytest.mark.parametrize("losing", [False, True], ids=["passed on", "lost"])
@pytest.mark.parametrize("leg", ["harness", "executor"])
@NOISE
async def test_cut_at_every_frame_loses_nothing_and_repeats_nothing(
    autojump_clock: MockClock, noise: bool, leg: str, losing: bool
) -> None:
    sent = [message(i, size) for i, size in enumerate((10, 130_000, 10, 10, 70_000, 10))]
    cuts = Counter[str]()
    for at in range(1, 60):
        async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
            client.stream.send_nowait(message(99))
            await client.wait_for(1)  # so that there is something to resume
            told: list[str] = []
            client.stream.on_interrupted = partial(told.append, "changed")
            pair.rendezvous.watch = cutter(pair, at, leg, losing=losing)
            for one in sent:
                client.stream.send_nowait(one)
            await client.wait_for(1 + len(sent))
            assert client.got[1:] == sent
            cuts["interrupted" if told else "untouched"] += 1
            pair.rendezvous.watch = lambda way, frame: True
            await wait_all_tasks_blocked()
            client.stream.send_nowait(message(100))
            await client.wait_for(2 + len(sent))
            client.stream.close_nowait()
            await wait_all_tasks_blocked()
            assert pair.streams.get(client.stream.stream_id) is None
    assert cuts["interrupted"] >= 10, cuts
    assert cuts["untouched"] >= 1, "the messages have more frames than were cut at"


@NOISE
async def test_many_cuts_one_after_the_other_lose_nothing(autojump_clock: MockClock, noise: bool) -> None:
    async with open_pair(echo, noise=noise) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(0))
        await client.wait_for(1)
        for i in range(1, 60):
            client.stream.send_nowait(message(i, 1000 * (i % 70)))
            (pair.rendezvous.cut_executor if i % 3 else pair.rendezvous.cut_harnesses)()
            client.stream.send_nowait(message(1000 + i))
            if i % 5 == 0:
                await client.wait_for(1 + 2 * i)
        await client.wait_for(1 + 2 * 59)
        expected = [message(0)]
        for i in range(1, 60):
            expected += [message(i, 1000 * (i % 70)), message(1000 + i)]
        assert client.got == expected


async def test_interruption_is_told_and_so_is_its_end(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        told: list[str] = []
        client.stream.on_interrupted = lambda: told.append(client.stream.interrupted)
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        pair.rendezvous.cut_harnesses()
        await wait_all_tasks_blocked()
        client.stream.send_nowait(message(2))
        await client.wait_for(2)
        assert told == ["the relay closed the connection", ""]


async def test_stream_that_cannot_be_resumed_in_time_ends_with_the_reason(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        pair.reconnect = False
        began = trio.current_time()
        pair.rendezvous.cut_executor()
        with pytest.raises(ConnectionLost, match="could not be resumed: the environment is offline"):
            await client.wait_for(2)
        assert 25 <= trio.current_time() - began <= 125
        assert client.stream.interrupted_at == began


async def test_executor_forgets_a_stream_whose_harness_does_not_come_back(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair, deadline=0) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        pair.rendezvous.cut_harnesses()
        await wait_all_tasks_blocked()
        assert client.stream.closed
        stream = pair.streams.get(client.stream.stream_id)
        assert stream is not None
        assert stream.interrupted == "the harness is disconnected from the relay"
        assert stream.congested
        await trio.sleep(executor.STREAM_TTL - 0.01)
        assert not ended(stream)
        await trio.sleep(0.02)
        assert stream.closed
        assert "did not resume within 30 s" in stream.loss


async def test_probe_of_an_interrupted_stream_ends_it_at_once(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair, deadline=0) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        stream = pair.streams.get(client.stream.stream_id)
        assert stream is not None
        stream.probe_nowait()
        await trio.sleep(10)
        assert not ended(stream), "a harness that answers stays"
        pair.rendezvous.cut_harnesses()
        await wait_all_tasks_blocked()
        stream.probe_nowait()
        assert ended(stream)


async def test_probe_that_nobody_answers_ends_the_stream(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        stream = pair.streams.get(client.stream.stream_id)
        assert stream is not None
        pair.rendezvous.watch = lambda way, frame: False
        stream.probe_nowait()
        await trio.sleep(4.9)
        assert not ended(stream)
        await trio.sleep(0.2)
        assert ended(stream)
        assert "no sign of life within 5 s" in stream.loss


async def test_resume_of_what_the_executor_has_forgotten_ends_the_stream(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        stream = pair.streams.get(client.stream.stream_id)
        assert stream is not None
        pair.rendezvous.watch = lambda way, frame: False  # its farewell is lost
        stream.end("forgotten")
        await wait_all_tasks_blocked()
        pair.rendezvous.watch = lambda way, frame: True
        pair.rendezvous.cut_harnesses()
        with pytest.raises(ConnectionLost, match="Noise relay stream reset"):
            await client.wait_for(2)


@NOISE
async def test_end_of_the_service_ends_the_stream_behind_what_was_sent(
    autojump_clock: MockClock, noise: bool
) -> None:
    async def say_and_go(channel: Channel) -> None:
        def receive(data: bytes) -> None:
            for i in range(5):
                channel.send_nowait(message(i, 100_000))
            channel.close_nowait()

        await channel.run(receive)

    async with open_pair(say_and_go, noise=noise) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(5)
        with pytest.raises(ConnectionLost, match="reset"):
            await client.wait_for(6)
        assert client.got == [message(i, 100_000) for i in range(5)]


async def test_nothing_is_sent_in_clear_before_or_after_a_noise_handshake(autojump_clock: MockClock) -> None:
    marker = "PLAINTEXT-MARKER"
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        for i in range(20):
            client.stream.send_nowait(json.dumps({"n": i, "secret": marker * 5000}).encode())
        pair.rendezvous.cut_harnesses()
        client.stream.send_nowait(json.dumps({"secret": marker}).encode())
        with pytest.raises(ConnectionLost):
            await client.wait_for(1)  # cut before there was anything to resume
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        for i in range(20):
            client.stream.send_nowait(json.dumps({"n": i, "secret": marker * 5000}).encode())
        await client.wait_for(2)
        pair.rendezvous.cut_executor()
        await client.wait_for(20)
        seen = b"".join(frame for _, frame in pair.rendezvous.frames)
        assert len(seen) > 2 * 20 * 5000 * len(marker)
        for needle in (marker.encode(), b"secret", b'{"n"', b"let-me-in"):
            assert needle not in seen


async def test_wrong_executor_gets_no_application_data(autojump_clock: MockClock) -> None:
    got: list[bytes] = []

    async def note(channel: Channel) -> None:
        await channel.run(got.append)

    async with open_pair(note, noise=True) as pair:
        async with open_client(pair, executor=Identity.generate()) as client:
            client.stream.send_nowait(message(1))
            with pytest.raises(ConnectionLost, match="Noise relay stream reset"):
                await client.wait_for(1)
        assert got == []


async def test_unauthorized_harness_is_reset(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair, authorization="guessed") as client:
        client.stream.send_nowait(message(1))
        with pytest.raises(ConnectionLost, match="Noise relay stream reset"):
            await client.wait_for(1)


@NOISE
async def test_message_over_64_mib_goes_in_segments_or_not_at_all(
    autojump_clock: MockClock, noise: bool
) -> None:
    long = DEFAULT_MAX_MESSAGE + 1
    got: list[int] = []

    async def measure(channel: Channel) -> None:
        def receive(data: bytes) -> None:
            got.append(len(data))
            channel.send_nowait(b"{}")

        await channel.run(receive)

    async with open_pair(measure, noise=noise) as pair, open_client(pair) as client:
        with pytest.raises(MessageTooLong):
            client.stream.send_nowait(b"{" + bytes(long) + b"}")  # nobody has agreed on anything yet
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        if noise:
            with pytest.raises(MessageTooLong):
                client.stream.send_nowait(bytes(long))
        else:
            client.stream.send_nowait(bytes(long))
        client.stream.send_nowait(message(2))
        if noise:
            await client.wait_for(2)
        else:  # the executor has a limit of its own, which ends the stream
            with pytest.raises(ConnectionLost, match="reset"):
                await client.wait_for(3)
        assert long not in got


async def test_way_that_loses_everything_without_an_end_is_left(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        told: list[float] = []
        client.stream.on_interrupted = lambda: told.append(trio.current_time())
        pair.rendezvous.watch = lambda way, frame: bool(told)
        began = trio.current_time()
        client.stream.send_nowait(message(2))
        await client.wait_for(2)
        assert told
        assert 2 * STALL <= told[0] - began < 2 * STALL + 5


# A released program at the other end: no acknowledgements.


@NOISE
async def test_end_that_does_not_acknowledge_is_served_without(
    autojump_clock: MockClock, noise: bool
) -> None:
    """The offer is taken out of the harness's first frame, and of whatever the executor says of it."""
    async with open_pair(echo, noise=noise) as pair:

        def watch(way: str, data: bytes) -> bool:
            return type(frames.decode(data).body) is not Resume

        pair.rendezvous.watch = watch
        async with open_client(pair) as client:
            sent = [message(i, size) for i, size in enumerate(SIZES * 3)]
            for one in sent:
                client.stream.send_nowait(one)
            await client.wait_for(len(sent))
            assert client.got == sent
            stream = pair.streams.get(client.stream.stream_id)
            assert stream is not None
            assert stream._reliable is None
            assert client.stream._reliable is None
            for _, data in pair.rendezvous.frames[1:]:
                frame = frames.decode(data)
                assert (frame.ack, frame.ack_bits) == (0, 0)
                assert not isinstance(frame.body, Data) or frame.body.segment_count == 1
            pair.rendezvous.cut_harnesses()
            with pytest.raises(ConnectionLost, match="the relay closed the connection"):
                await client.wait_for(len(sent) + 1)
            await wait_all_tasks_blocked()
            assert stream.closed


@NOISE
async def test_end_that_does_not_acknowledge_gets_no_more_at_once_than_it_keeps(
    autojump_clock: MockClock, noise: bool
) -> None:
    """It resets a stream of which it has more than 128 messages that it has not come to."""
    got: list[bytes] = []
    channels: list[Channel] = []

    async def serve(channel: Channel) -> None:
        channels.append(channel)
        await channel.run(got.append)

    async with open_pair(serve, noise=noise) as pair:
        pair.rendezvous.watch = lambda way, data: type(frames.decode(data).body) is not Resume
        async with open_client(pair) as client:
            client.stream.send_nowait(message(0))
            await wait_all_tasks_blocked()
            channels[0].send_nowait(b'{"id":0,"result":{}}')  # the harness knows now that it is one of those
            await client.wait_for(1)
            sent = [message(number) for number in range(1, 301)]
            for one in sent:
                client.stream.send_nowait(one)
            await wait_all_tasks_blocked()
            assert len(got) == 1 + BURST
            for number in range(10):
                channels[0].send_nowait(b'{"id":%d,"result":{}}' % number)
                channels[0].send_nowait(b'{"method":"process/output","params":{}}')
            await wait_all_tasks_blocked()
            assert len(got) == 1 + BURST + 10
            await trio.sleep(BURST_PAUSE * 3.5)
            assert len(got) == 1 + BURST + 10 + 3 * BURST
            await trio.sleep(BURST_PAUSE)
            assert got[1:] == sent


# The executor's table (relay.md §4.3, 4.5), frame by frame.


class RawHarness:
    """Frames as they come, without rules."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.got: list[Frame] = []

    def send(self, body: frames.Body, stream_id: str = "raw") -> None:
        self.channel.send_nowait(frames.encode(Frame(stream_id, body)))

    def resets(self) -> list[tuple[str, str]]:
        return [(frame.stream_id, frame.body.reason) for frame in self.got if isinstance(frame.body, Reset)]


@asynccontextmanager
async def open_raw(pair: Pair) -> AsyncIterator[RawHarness]:
    channel = await pair.rendezvous.connect_harness()
    raw = RawHarness(channel)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run, lambda data: raw.got.append(frames.decode(data)))
        yield raw
        channel.close_nowait()


async def handshake_of(pair: Pair, stream_id: str) -> bytes:
    from execenv.relay.noise import Initiator, prologue
    from tests.relay_pair import AUTHORIZATION, ENVIRONMENT, REGISTRATION

    assert pair.identity is not None
    return Initiator(
        Identity.generate(),
        pair.identity.public,
        prologue(ENVIRONMENT, REGISTRATION, stream_id),
        AUTHORIZATION.encode(),
    ).message1


async def test_stream_in_clear_begins_with_data_and_with_nothing_else(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=False) as pair, open_raw(pair) as raw:
        for body in (Resume(), frames.Ack(), frames.Heartbeat(), Handshake(b"x"), Reset("why")):
            raw.send(body)
        raw.send(Data(0, b"no json"))
        await wait_all_tasks_blocked()
        assert pair.streams.get("raw") is None
        assert raw.got == []
        raw.send(Data(7, b'{"n":1}'))  # sequence numbers of clear text are not checked (§4.2)
        raw.send(Data(3, b"no json"))
        raw.send(Data(3, b'{"n":2}'))
        await wait_all_tasks_blocked()
        assert [frame.body for frame in raw.got] == [Data(0, b'{"n":1}'), Data(1, b'{"n":2}')]


async def test_segments_that_were_not_agreed_on_reset_the_stream(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=False) as pair, open_raw(pair) as raw:
        raw.send(Data(0, b'{"n":1}'))
        raw.send(Data(1, b'{"n"', 0, 2))
        await wait_all_tasks_blocked()
        assert raw.resets() == [("raw", PROTOCOL_ERROR)]
        raw.send(Data(0, b'{"n":3}'))  # the id is free again
        await wait_all_tasks_blocked()
        assert raw.got[-1].body == Data(0, b'{"n":3}')


async def test_rest_of_a_long_message_begins_no_streams(autojump_clock: MockClock) -> None:
    served: list[Channel] = []

    async def serve(channel: Channel) -> None:
        served.append(channel)
        await channel.run(channel.send_nowait)

    async with open_pair(serve, noise=False) as pair, open_raw(pair) as raw:
        raw.send(Resume(0, reliability=1))
        raw.send(Data(0, b'{"n":1}'))
        raw.send(Data(1, b'{"n"', 0, 3000))
        raw.send(Data(2, b"does not fit", 2, 3000))
        for seq in range(3, 3000):
            raw.send(Data(seq, b"{}", seq - 1, 3000))
        raw.send(Data(0, b"{}", 0, 2))  # and nobody has agreed on segments here
        await wait_all_tasks_blocked()
        assert len(served) == 1
        assert set(raw.resets()) == {("raw", PROTOCOL_ERROR)}


async def test_flood_of_garbage_is_not_a_flood_of_warnings(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_pair(echo, noise=False) as pair:
        executor_leg = pair.rendezvous.executor
        assert executor_leg is not None
        for _ in range(1000):
            executor_leg.send_nowait(b"garbage")
        await wait_all_tasks_blocked()
    assert 0 < len(caplog.records) <= 40


async def test_garbage_ends_neither_a_stream_nor_the_socket(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=False) as pair, open_raw(pair) as raw:
        raw.send(Data(0, b'{"n":1}'))
        executor_leg = pair.rendezvous.executor
        assert executor_leg is not None
        for garbage in (
            b"",
            b"\xff\xff",
            b"text",
            frames.encode(Frame("raw", Reset("r"))).replace(b"\x08\x01", b"\x08\x02"),
        ):
            executor_leg.send_nowait(garbage)
        await wait_all_tasks_blocked()
        raw.send(Data(1, b'{"n":2}'))
        await wait_all_tasks_blocked()
        assert [frame.body for frame in raw.got] == [Data(0, b'{"n":1}'), Data(1, b'{"n":2}')]


async def test_data_of_an_unknown_noise_stream_is_reset(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_raw(pair) as raw:
        raw.send(Data(0, b"x"))
        await wait_all_tasks_blocked()
        assert raw.resets() == [("raw", PROTOCOL_ERROR)]


async def test_data_or_another_handshake_while_one_is_pending_drops_it(autojump_clock: MockClock) -> None:
    asked: list[str] = []

    async def never(stream_id: str, key: PublicKey, authorization: str) -> bool:
        asked.append(stream_id)
        await trio.sleep_forever()
        raise AssertionError

    async with open_pair(echo, noise=True, validate=never) as pair, open_raw(pair) as raw:
        for body in (Data(0, b"x"), Handshake(await handshake_of(pair, "raw"))):
            raw.send(Handshake(await handshake_of(pair, "raw")))
            await wait_all_tasks_blocked()
            raw.send(body)
            await wait_all_tasks_blocked()
        assert raw.resets() == [("raw", PROTOCOL_ERROR)] * 2
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await wait_all_tasks_blocked()
        raw.send(Reset("changed my mind"))
        await trio.sleep(20)
        assert raw.resets() == [("raw", PROTOCOL_ERROR)] * 2, "a reset is not answered"
        assert asked == ["raw"] * 3


async def test_validation_that_takes_ten_seconds_is_a_refusal(autojump_clock: MockClock) -> None:
    async def slow(stream_id: str, key: PublicKey, authorization: str) -> bool:
        await trio.sleep(10.1)
        return True

    async with open_pair(echo, noise=True, validate=slow) as pair, open_raw(pair) as raw:
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await trio.sleep(9.9)
        assert raw.got == []
        await trio.sleep(0.2)
        assert raw.resets() == [("raw", PROTOCOL_ERROR)]


async def test_validation_of_an_id_that_was_used_again_meanwhile_is_ignored(
    autojump_clock: MockClock,
) -> None:
    answers: list[trio.Event] = []

    async def when_told(stream_id: str, key: PublicKey, authorization: str) -> bool:
        answers.append(trio.Event())
        with trio.CancelScope(shield=True):
            await answers[-1].wait()
        return True

    async with open_pair(echo, noise=True, validate=when_told) as pair, open_raw(pair) as raw:
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await wait_all_tasks_blocked()
        raw.send(Reset("first"))
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await wait_all_tasks_blocked()
        answers[0].set()
        await wait_all_tasks_blocked()
        assert raw.got == []
        answers[1].set()
        await wait_all_tasks_blocked()
        assert [type(frame.body) for frame in raw.got] == [Handshake]


async def test_handshake_for_an_active_stream_resets_the_attempt_and_leaves_the_stream(
    autojump_clock: MockClock,
) -> None:
    async with open_pair(echo, noise=True) as pair, open_raw(pair) as raw:
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await wait_all_tasks_blocked()
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await wait_all_tasks_blocked()
        assert raw.resets() == [("raw", PROTOCOL_ERROR)]
        assert pair.streams.get("raw") is not None


async def test_record_that_does_not_decrypt_resets_its_stream_only(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client, open_raw(pair) as raw:
        raw.send(Handshake(await handshake_of(pair, "raw")))
        await wait_all_tasks_blocked()
        raw.send(Data(0, bytes(100)))
        await wait_all_tasks_blocked()
        assert raw.resets() == [("raw", PROTOCOL_ERROR)]
        client.stream.send_nowait(message(1))
        await client.wait_for(1)


async def test_record_65_ahead_is_a_reset_and_64_ahead_is_not(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_raw(pair) as raw:
        for stream_id, seq in (("near", 64), ("far", 65)):
            raw.send(Handshake(await handshake_of(pair, stream_id)), stream_id)
            await wait_all_tasks_blocked()
            raw.send(Data(seq, bytes(100)), stream_id)
        await wait_all_tasks_blocked()
        assert raw.resets() == [("far", PROTOCOL_ERROR)]
        await trio.sleep(59)
        assert len(raw.resets()) == 1
        await trio.sleep(2)
        assert raw.resets()[1:] == [("near", PROTOCOL_ERROR)], "the gap was not filled in 60 s"


async def test_limit_of_active_streams_is_128(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=False) as pair, open_raw(pair) as raw:
        for i in range(executor.MAX_STREAMS):
            raw.send(Data(0, b"{}"), f"s{i}")
        await wait_all_tasks_blocked()
        assert len(raw.got) == executor.MAX_STREAMS == 128
        assert raw.resets() == []
        raw.send(Data(0, b"{}"), "one more")
        await wait_all_tasks_blocked()
        assert raw.resets() == [("one more", PROTOCOL_ERROR)]
        raw.send(Reset("done"), "s0")
        await wait_all_tasks_blocked()
        raw.send(Data(0, b"{}"), "and another")
        await wait_all_tasks_blocked()
        assert len(raw.resets()) == 1


async def test_limit_of_pending_validations_is_32(autojump_clock: MockClock) -> None:
    async def never(stream_id: str, key: PublicKey, authorization: str) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    async with open_pair(echo, noise=True, validate=never) as pair, open_raw(pair) as raw:
        for i in range(executor.MAX_PENDING + 1):
            raw.send(Handshake(await handshake_of(pair, f"s{i}")), f"s{i}")
        await wait_all_tasks_blocked()
        assert raw.resets() == [("s32", PROTOCOL_ERROR)]


async def test_eight_failed_handshakes_begin_a_cool_down_of_ten_seconds(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_raw(pair) as raw:
        for _ in range(executor.MAX_FAILED - 1):
            raw.send(Handshake(bytes(3600)))
        await wait_all_tasks_blocked()
        raw.send(Handshake(await handshake_of(pair, "good")), "good")
        await wait_all_tasks_blocked()
        assert type(raw.got[-1].body) is Handshake
        raw.send(Handshake(bytes(3600)))
        raw.send(Handshake(await handshake_of(pair, "too soon")), "too soon")
        await wait_all_tasks_blocked()
        assert raw.resets()[-1] == ("too soon", PROTOCOL_ERROR)
        await trio.sleep(executor.COOL_DOWN)
        raw.send(Handshake(await handshake_of(pair, "later")), "later")
        await wait_all_tasks_blocked()
        assert (raw.got[-1].stream_id, type(raw.got[-1].body)) == ("later", Handshake)


async def test_authorization_may_have_4096_bytes(autojump_clock: MockClock) -> None:
    seen: list[str] = []

    async def note(stream_id: str, key: PublicKey, authorization: str) -> bool:
        await trio.lowlevel.checkpoint()
        seen.append(authorization)
        return True

    async with (
        open_pair(echo, noise=True, validate=note) as pair,
        open_client(pair, authorization="a" * 4096) as client,
    ):
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        assert seen == ["a" * 4096]
        with pytest.raises(NoiseFailed):
            await pair.harness(authorization="a" * 4097)


async def test_stream_that_asks_and_takes_no_answer_is_reset(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=False) as pair, open_raw(pair) as raw:
        raw.send(Resume(0, reliability=1))
        for seq in range(150):  # it never acknowledges, so nothing more than a window goes out
            raw.send(Data(seq, b'{"x":"' + bytes(1_000_000).replace(b"\0", b"x") + b'"}'))
        await wait_all_tasks_blocked()
        assert raw.resets() == [("raw", PROTOCOL_ERROR)]


async def test_harness_disconnected_detaches_a_stream_that_does_not_resume(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=False) as pair:
        async with open_raw(pair) as raw:
            raw.send(Data(0, b"{}"))
            await wait_all_tasks_blocked()
            stream = pair.streams.get("raw")
            assert isinstance(stream, ExecutorStream)
        await wait_all_tasks_blocked()
        assert stream.closed
        assert HARNESS_DISCONNECTED == "harness_disconnected"


async def test_question_waits_while_long_answers_lie_there(autojump_clock: MockClock) -> None:
    long = b'{"x":"' + b"x" * (70 * 1024 * 1024) + b'"}'

    async def answer(channel: Channel) -> None:
        await channel.run(lambda data: channel.send_nowait(long if b"long" in data else data))

    async with open_pair(answer, noise=False) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        client.stream.send_nowait(b'{"long":1}')
        client.stream.send_nowait(message(2))
        client.stream.send_nowait(message(3))
        await client.wait_for(4)
        assert client.got == [message(1), long, message(2), message(3)]


async def test_executor_that_never_resumes_is_given_up_in_time(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)
        pair.rendezvous.watch = lambda way, frame: not isinstance(frames.decode(frame).body, Resume)
        began = trio.current_time()
        pair.rendezvous.cut_harnesses()
        with pytest.raises(ConnectionLost, match="could not be resumed: the executor did not resume"):
            await client.wait_for(2)
        assert trio.current_time() - began == pytest.approx(25)


async def test_probe_says_nothing_of_a_socket_that_came_later(autojump_clock: MockClock) -> None:
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)

        async def connect_slowly() -> Channel:
            await trio.sleep(7)
            return await pair.rendezvous.connect_harness()

        client.stream._again = connect_slowly
        pair.rendezvous.watch = lambda way, frame: False
        client.stream.probe_nowait()
        await wait_all_tasks_blocked()
        pair.rendezvous.watch = lambda way, frame: True
        pair.rendezvous.cut_harnesses()
        client.stream.send_nowait(message(2))
        await client.wait_for(2)


async def test_stream_that_waits_to_be_resumed_sleeps(mock_clock: MockClock) -> None:
    """Also where its own deadlines have passed meanwhile, and something is heard before the resume."""
    async with open_pair(echo, noise=True) as pair, open_client(pair) as client:
        client.stream.send_nowait(message(1))
        await client.wait_for(1)

        async def connect_slowly() -> Channel:
            await trio.sleep(21)
            return await pair.rendezvous.connect_harness()

        client.stream._again = connect_slowly
        pair.rendezvous.watch = lambda way, frame: False
        client.stream.send_nowait(message(2))
        pair.rendezvous.cut_harnesses()
        await wait_all_tasks_blocked()
        mock_clock.jump(21)
        await wait_all_tasks_blocked()
        client.stream.receive_frame(Frame(client.stream.stream_id, Ack(), 1))
        with trio.fail_after(1):
            mock_clock.rate = 1
            await wait_all_tasks_blocked()
        assert client.stream.interrupted
