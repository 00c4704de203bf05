"""What every transport promises, by one contract for all of them, and what is special to websockets."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trustme
from attrs import Factory, define
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, wrap_server_stream
from websockets.sync.client import connect as connect_sync

from execenv import open_environment
from execenv.errors import ConnectFailed, ConnectionLost
from execenv.transports import _pump
from execenv.transports._frames import Close, Event, FrameCodec, Ping, Pong
from execenv.transports._pump import StreamIO
from execenv.transports.channel import HIGH_WATER, Channel
from execenv.transports.http import read_head
from execenv.transports.memory import memory_pair
from execenv.transports.stdio import own_stdio
from execenv.transports.websocket import WebsocketChannel, accept, connect
from tests.conftest import WebsocketServer
from tests.traces import open_trio_websocket

TIME_LIMIT = 60.0
BIG = 20 * 1024 * 1024


@define(eq=False)
class End:
    """One end of a pair: its channel, and what it received.

    Attributes:
        after: called when `run` has returned, as the exit of a process would close its descriptors.
    """

    channel: Channel
    after: Callable[[], None] = lambda: None
    received: list[bytes] = Factory(list)
    ended: trio.Event = Factory(trio.Event)
    _arrived: trio.lowlevel.ParkingLot = Factory(trio.lowlevel.ParkingLot)

    async def run(self) -> None:
        await self.channel.run(self._receive)
        self.after()
        self.ended.set()
        self._arrived.unpark_all()

    def _receive(self, message: bytes) -> None:
        self.received.append(message)
        self._arrived.unpark_all()

    async def wait_received(self, count: int) -> list[bytes]:
        while len(self.received) < count:
            assert not self.ended.is_set(), self.channel.loss
            await self._arrived.park()
        return self.received


Pair = tuple[End, End]


# Pairs of every kind.


@asynccontextmanager
async def open_memory_pair() -> AsyncIterator[Pair]:
    one, other = memory_pair()
    yield End(one), End(other)


@asynccontextmanager
async def open_stdio_pair() -> AsyncIterator[Pair]:
    """Two ends whose stdin and stdout are each other's."""
    left_in, right_out = os.pipe()
    right_in, left_out = os.pipe()
    open_fds = {left_in, left_out, right_in, right_out}

    def close(*fds: int) -> None:
        for fd in open_fds.intersection(fds):
            os.close(fd)
            open_fds.discard(fd)

    left = own_stdio(read_fd=left_in, write_fd=left_out)
    right = own_stdio(read_fd=right_in, write_fd=right_out)
    try:
        yield End(left, partial(close, left_in, left_out)), End(right, partial(close, right_in, right_out))
    finally:
        close(*open_fds)


async def accept_websocket(stream: trio.abc.Stream, max_message: int = BIG * 2) -> WebsocketChannel:
    head = await read_head(stream)
    assert head is not None
    return await accept(stream, head.raw, head.leftover, "websocket test", max_message=max_message)


async def listen() -> trio.SocketListener:
    return (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]


def port_of(listener: trio.SocketListener) -> int:
    port: int = listener.socket.getsockname()[1]
    return port


@asynccontextmanager
async def open_websocket_pair(*, secure: bool = False) -> AsyncIterator[Pair]:
    """The client's end, and the server's."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    accepted: list[Channel] = []

    async def serve(listener: trio.SocketListener) -> None:
        stream: trio.abc.Stream = await listener.accept()
        if secure:
            stream = trio.SSLStream(stream, server_context, server_side=True)
        accepted.append(await accept_websocket(stream))

    async with await listen() as listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve, listener)
        scheme = "wss" if secure else "ws"
        client = await connect(f"{scheme}://127.0.0.1:{port_of(listener)}", ssl_context=context)
    left, right = End(client), End(accepted[0])
    try:
        yield left, right
    finally:
        for end in (left, right):
            if not end.ended.is_set():  # `run` never ran, so nobody closed it
                await end.channel._io.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def reversed_pair(
    open_pair: Callable[[], AbstractAsyncContextManager[Pair]],
) -> AsyncIterator[Pair]:
    async with open_pair() as (left, right):
        yield right, left


OpenPair = Callable[[], AbstractAsyncContextManager[Pair]]
PAIRS: dict[str, OpenPair] = {
    "memory": open_memory_pair,
    "stdio": open_stdio_pair,
    "websocket": open_websocket_pair,
    "websocket-server": partial(reversed_pair, open_websocket_pair),
    "tls": partial(open_websocket_pair, secure=True),
    "tls-server": partial(reversed_pair, partial(open_websocket_pair, secure=True)),
}


@pytest.fixture(params=PAIRS)
def open_pair(request: pytest.FixtureRequest) -> OpenPair:
    return PAIRS[request.param]


@pytest.fixture(params=[name for name in PAIRS if name != "memory"])
def open_wire_pair(request: pytest.FixtureRequest) -> OpenPair:
    """In memory nothing is held back: the parts of a message are there until it is whole."""
    return PAIRS[request.param]


@asynccontextmanager
async def running(open_pair: OpenPair) -> AsyncIterator[tuple[End, End, trio.Nursery]]:
    """Both ends run beside the block; it ends them."""
    with trio.fail_after(TIME_LIMIT):
        async with open_pair() as (left, right), trio.open_nursery() as nursery:
            nursery.start_soon(left.run)
            nursery.start_soon(right.run)
            yield left, right, nursery
            nursery.cancel_scope.cancel()


def numbered(count: int, name: str) -> list[bytes]:
    return [b'{"%b":%d,"text":"\xc3\xa9"}' % (name.encode(), number) for number in range(count)]


# The contract.


async def test_messages_arrive_whole_and_in_order_both_ways(open_pair: OpenPair) -> None:
    async with running(open_pair) as (left, right, _):
        for one, other in zip(numbered(100, "a"), numbered(100, "b"), strict=True):
            left.channel.send_nowait(one)
            right.channel.send_nowait(other)
        assert await right.wait_received(100) == numbered(100, "a")
        assert await left.wait_received(100) == numbered(100, "b")


async def test_ten_thousand_messages_each_way_at_once(open_pair: OpenPair) -> None:
    count = 10_000
    async with running(open_pair) as (left, right, _):
        for one, other in zip(numbered(count, "a"), numbered(count, "b"), strict=True):
            left.channel.send_nowait(one)
            right.channel.send_nowait(other)
        assert await right.wait_received(count) == numbered(count, "a")
        assert await left.wait_received(count) == numbered(count, "b")
        await trio.testing.wait_all_tasks_blocked()
        assert (left.channel.queued, right.channel.queued) == (0, 0)


async def test_big_messages_cross(open_pair: OpenPair) -> None:
    one, other = b"1" * BIG, b"2" * BIG
    async with running(open_pair) as (left, right, _):
        for message in (one, b"after"):
            left.channel.send_nowait(message)
        for message in (other, b"after"):
            right.channel.send_nowait(message)
        assert await right.wait_received(2) == [one, b"after"]
        assert await left.wait_received(2) == [other, b"after"]


async def test_parts_are_one_message(open_pair: OpenPair) -> None:
    async with running(open_pair) as (left, right, _):
        left.channel.send_nowait(b'{"a":', b"", b"1", b"}")
        left.channel.send_nowait(b"[", b"x" * 300_000, b"]")
        assert await right.wait_received(2) == [b'{"a":1}', b"[" + b"x" * 300_000 + b"]"]


async def test_what_receiving_causes_to_be_sent_is_sent(open_pair: OpenPair) -> None:
    async with running(open_pair) as (left, right, nursery):

        async def echo() -> None:
            for number in range(100):
                await right.wait_received(number + 1)
                right.channel.send_nowait(right.received[number])

        nursery.start_soon(echo)
        for message in numbered(100, "a"):
            left.channel.send_nowait(message)
        assert await left.wait_received(100) == numbered(100, "a")


async def test_closing_one_end_ends_the_other_behind_what_was_sent(open_pair: OpenPair) -> None:
    async with running(open_pair) as (left, right, _):
        for message in numbered(1000, "a"):
            left.channel.send_nowait(message)
        left.channel.close_nowait()
        await right.ended.wait()
        await left.ended.wait()
        assert right.received == numbered(1000, "a")
        assert left.channel.closed
        assert right.channel.closed


async def test_closing_twice_and_from_both_sides_is_harmless(open_pair: OpenPair) -> None:
    async with running(open_pair) as (left, right, _):
        left.channel.close_nowait()
        left.channel.close_nowait()
        right.channel.close_nowait()
        await left.ended.wait()
        await right.ended.wait()
        right.channel.close_nowait()


async def test_nothing_can_be_sent_after_the_end(open_pair: OpenPair) -> None:
    async with running(open_pair) as (left, right, _):
        left.channel.close_nowait()
        with pytest.raises(ConnectionLost):
            left.channel.send_nowait(b"{}")
        await right.ended.wait()
        await left.ended.wait()
        for end in (left, right):
            with pytest.raises(ConnectionLost):
                end.channel.send_nowait(b"{}")
            with pytest.raises(ConnectionLost):
                await end.channel.wait_room()
            assert not end.channel.congested


async def test_closing_in_the_middle_of_receiving_stops_it(open_pair: OpenPair) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_pair() as (left, right), trio.open_nursery() as nursery:
            seen: list[bytes] = []

            def receive(message: bytes) -> None:
                seen.append(message)
                right.channel.close_nowait()

            async def run_right() -> None:
                await right.channel.run(receive)
                right.after()
                right.ended.set()

            for message in numbered(100, "a"):
                left.channel.send_nowait(message)
            nursery.start_soon(left.run)
            nursery.start_soon(run_right)
            await right.ended.wait()
            await left.ended.wait()
            assert seen == numbered(1, "a")


async def test_producer_that_waits_for_room_is_held_back_by_a_peer_that_does_not_read(
    open_pair: OpenPair,
) -> None:
    piece = b"x" * 65536
    total = 1000
    with trio.fail_after(TIME_LIMIT):
        async with open_pair() as (left, right), trio.open_nursery() as nursery:
            sent = highest = 0

            async def produce() -> None:
                nonlocal sent, highest
                for _ in range(total):
                    left.channel.send_nowait(piece)
                    sent += 1
                    highest = max(highest, left.channel.queued)
                    await left.channel.wait_room()

            nursery.start_soon(left.run)
            nursery.start_soon(produce)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert sent < total
            nursery.start_soon(right.run)
            await right.wait_received(total)
            assert sent == total
            assert highest <= HIGH_WATER + 2 * len(piece)
            assert set(right.received) == {piece}
            nursery.cancel_scope.cancel()


async def test_end_of_the_channel_wakes_who_waits_for_room(
    open_pair: OpenPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pump, "CLOSE_GRACE", 0.05)
    with trio.fail_after(TIME_LIMIT):
        async with open_pair() as (left, _), trio.open_nursery() as nursery:

            async def produce() -> None:
                with pytest.raises(ConnectionLost):
                    while True:
                        left.channel.send_nowait(b"x" * 65536)
                        await left.channel.wait_room()

            nursery.start_soon(left.run)
            nursery.start_soon(produce)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert left.channel.congested
            left.channel.close_nowait()  # the peer takes nothing, so the grace runs out
            await left.ended.wait()


async def test_two_ends_that_only_write_do_not_block_each_other(open_pair: OpenPair) -> None:
    piece = b"x" * 1_000_000
    async with running(open_pair) as (left, right, _):
        for _ in range(30):
            left.channel.send_nowait(piece)
            right.channel.send_nowait(piece)
        await left.wait_received(30)
        await right.wait_received(30)


async def test_cancelled_run_closes_the_channel(open_pair: OpenPair) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_pair() as (left, right), trio.open_nursery() as nursery:
            nursery.start_soon(right.run)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(left.run)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            left.after()
            left.ended.set()
            assert left.channel.closed
            await right.ended.wait()


# Messages in parts.


async def test_message_in_parts_arrives_as_one_and_what_is_sent_meanwhile_behind_it(
    open_pair: OpenPair,
) -> None:
    before, meanwhile, after = (numbered(5, name) for name in ("before", "meanwhile", "after"))
    parts = [b"[", *numbered(20, "part"), b"x" * 300_000, b"", b"]"]
    async with running(open_pair) as (sender, receiver, _):
        for message in before:
            sender.channel.send_nowait(message)
        async with sender.channel.open_message() as send:
            await send(parts[0])
            for message in meanwhile:
                sender.channel.send_nowait(message)
                receiver.channel.send_nowait(message)  # the other way goes on
            await sender.wait_received(len(meanwhile))
            for part in parts[1:]:
                await send(part)
        for message in after:
            sender.channel.send_nowait(message)
        await receiver.wait_received(16)
        assert receiver.received == [*before, b"".join(parts), *meanwhile, *after]
        assert sender.received == meanwhile


async def test_messages_in_parts_one_after_the_other(open_pair: OpenPair) -> None:
    async with running(open_pair) as (sender, receiver, _):
        for number in range(20):
            async with sender.channel.open_message() as send:
                for _ in range(number + 1):
                    await send(b"%d," % number)
        assert await receiver.wait_received(20) == [b"%d," % n * (n + 1) for n in range(20)]
        while sender.channel.queued:  # all of it is counted out again
            await trio.lowlevel.checkpoint()


async def test_message_in_parts_is_held_back_by_a_peer_that_does_not_read(open_wire_pair: OpenPair) -> None:
    part, total = b"x" * 65536, 300
    with trio.fail_after(TIME_LIMIT):
        async with open_wire_pair() as (sender, receiver), trio.open_nursery() as nursery:
            sent = highest = 0

            async def produce() -> None:
                nonlocal sent, highest
                async with sender.channel.open_message() as send:
                    for _ in range(total):
                        await send(part)
                        sent += 1
                        highest = max(highest, sender.channel.queued)
                sender.channel.send_nowait(b"behind")

            nursery.start_soon(sender.run)
            nursery.start_soon(produce)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert sent < total
            nursery.start_soon(receiver.run)
            await receiver.wait_received(2)
            assert [len(message) for message in receiver.received] == [total * len(part), len(b"behind")]
            assert highest <= HIGH_WATER + 2 * len(part)
            nursery.cancel_scope.cancel()


async def test_what_waits_behind_a_message_in_parts_does_not_hold_it_up(open_pair: OpenPair) -> None:
    async with running(open_pair) as (sender, receiver, _):
        async with sender.channel.open_message() as send:
            await send(b"one ")
            sender.channel.send_nowait(b"y" * 2 * HIGH_WATER)
            assert sender.channel.congested
            for _ in range(10):
                await send(b"x" * 65536)
        await receiver.wait_received(2)
        assert [message[:1] for message in receiver.received] == [b"o", b"y"]


async def test_message_in_parts_that_fails_ends_the_channel(open_pair: OpenPair) -> None:
    async with running(open_pair) as (sender, receiver, _):
        sender.channel.send_nowait(b"before")
        with pytest.raises(ValueError, match="half way"):
            async with sender.channel.open_message() as send:
                await send(b"x" * 1000)
                sender.channel.send_nowait(b"meanwhile")
                raise ValueError("half way")
        with pytest.raises(ConnectionLost):
            sender.channel.send_nowait(b"late")
        await receiver.ended.wait()
        await sender.ended.wait()
        assert (
            receiver.received == [b"before"] or open_pair is open_stdio_pair
        )  # there a last line may end so
        assert b"meanwhile" not in receiver.received


async def test_cancelled_message_in_parts_ends_the_channel(open_pair: OpenPair) -> None:
    async with running(open_pair) as (sender, receiver, _):
        with trio.CancelScope() as scope:
            async with sender.channel.open_message() as send:
                await send(b"x")
                scope.cancel()
                await trio.sleep_forever()
        await receiver.ended.wait()
        await sender.ended.wait()


async def test_no_message_in_parts_after_the_end(open_pair: OpenPair) -> None:
    async with running(open_pair) as (sender, receiver, _):
        receiver.channel.close_nowait()
        await sender.ended.wait()
        with pytest.raises(ConnectionLost):
            async with sender.channel.open_message():
                pytest.fail("was opened")


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_end_in_the_middle_of_a_message_in_parts_is_told(open_pair: OpenPair, who: str) -> None:
    async with running(open_pair) as (sender, receiver, _):
        with pytest.raises(ConnectionLost):
            async with sender.channel.open_message() as send:
                await send(b"x")
                (sender if who == "sender" else receiver).channel.close_nowait()
                while True:
                    await send(b"x" * 10_000)
        await sender.ended.wait()
        await receiver.ended.wait()


async def test_end_wakes_who_waits_with_a_part(
    open_wire_pair: OpenPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pump, "CLOSE_GRACE", 0.05)
    with trio.fail_after(TIME_LIMIT):
        async with open_wire_pair() as (sender, _), trio.open_nursery() as nursery:

            async def produce() -> None:
                with pytest.raises(ConnectionLost):
                    async with sender.channel.open_message() as send:
                        while True:
                            await send(b"x" * 65536)

            nursery.start_soon(sender.run)
            nursery.start_soon(produce)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert sender.channel.congested
            sender.channel.close_nowait()  # the peer takes nothing, so the grace runs out
            await sender.ended.wait()


# Lines, against a peer that writes them by hand.


@asynccontextmanager
async def line_peer(*, max_message: int = 1000) -> AsyncIterator[tuple[End, int]]:
    """A channel over stdin and stdout, and the descriptor that its stdin is fed by."""
    left_in, feed = os.pipe()
    drain, left_out = os.pipe()
    end = End(own_stdio(read_fd=left_in, write_fd=left_out, max_message=max_message))
    try:
        with trio.fail_after(TIME_LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end.run)
                yield end, feed
                nursery.cancel_scope.cancel()
    finally:
        for fd in (left_in, feed, drain, left_out):
            os.close(fd)


async def test_lines_end_in_either_way_and_blank_ones_are_skipped() -> None:
    async with line_peer() as (end, feed):
        os.write(feed, b"\n \t\n{1}\r\n\r\n {2} \n{3")
        await end.wait_received(2)
        os.write(feed, b"}\n")
        assert await end.wait_received(3) == [b"{1}", b"{2}", b"{3}"]


async def test_last_line_needs_no_end() -> None:
    left_in, feed = os.pipe()
    drain, left_out = os.pipe()
    end = End(own_stdio(read_fd=left_in, write_fd=left_out))
    os.write(feed, b"{1}\n{2}")
    os.close(feed)
    with trio.fail_after(TIME_LIMIT):
        await end.run()
    for fd in (left_in, left_out, drain):
        os.close(fd)
    assert end.received == [b"{1}", b"{2}"]


async def test_nothing_behind_a_line_that_is_not_utf8_is_received() -> None:
    # It is a read error (protocol.md §1.3): the connection ends there.
    async with line_peer() as (end, feed):
        os.write(feed, b"{1}\n\xff\xfe\n{2}\n")
        await end.ended.wait()
        assert end.received == [b"{1}"]
        assert end.channel.loss == "a line is not UTF-8"


async def test_line_over_the_limit_ends_the_channel_before_its_end_comes() -> None:
    async with line_peer(max_message=1000) as (end, feed):
        os.write(feed, b"x" * 1000 + b"\n")
        await end.wait_received(1)
        os.write(feed, b"x" * 1001)
        await end.ended.wait()
        assert end.channel.loss == "a line is longer than 1000 bytes"


# Websocket frames, against a peer that speaks them by hand. The clock is a mock where time matters.


@define(eq=False)
class FramePeer:
    """The other end of a websocket: it sends what it is told and shows every event."""

    stream: trio.abc.Stream
    codec: FrameCodec
    events: list[Event] = Factory(list)

    async def send(self, *frames: bytes) -> None:
        await self.stream.send_all(b"".join(frames))

    def frames(self, *parts: bytes) -> bytes:
        return b"".join(bytes(b) for frame in self.codec.encode_message(*parts) for b in frame)

    async def next(self) -> Event:
        while not self.events:
            data = await self.stream.receive_some()
            if not data:
                raise trio.EndOfChannel
            self.events.extend(self.codec.receive(data))
        return self.events.pop(0)

    async def is_over(self) -> bool:
        try:
            return not await self.stream.receive_some()
        except trio.BrokenResourceError:
            return True


@asynccontextmanager
async def frame_peer(
    *,
    client: bool = False,
    leftover: bytes = b"",
    max_message: int = 1000,
    ping_interval: float = 30.0,
    pong_timeout: float = float("inf"),
) -> AsyncIterator[tuple[End, FramePeer]]:
    """Our channel in the role of a `client` or a server, and its peer, over streams in memory."""
    ours, theirs = trio.testing.memory_stream_pair()
    channel = WebsocketChannel(
        "websocket test",
        StreamIO(ours),
        client=client,
        leftover=leftover,
        max_message=max_message,
        ping_interval=ping_interval,
        pong_timeout=pong_timeout,
    )
    end = End(channel)
    with trio.fail_after(10_000 if isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock) else 30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.run)
            yield end, FramePeer(theirs, FrameCodec(client=not client, max_message=1 << 30))
            nursery.cancel_scope.cancel()


def masked(first: int, payload: bytes) -> bytes:
    """A frame of a client, with a mask that changes nothing."""
    assert len(payload) < 126
    return bytes((first, 0x80 | len(payload), 0, 0, 0, 0)) + payload


async def test_fragments_with_control_frames_between_them_are_one_message() -> None:
    async with frame_peer() as (end, peer):
        await peer.send(
            masked(0x01, b'{"a"'),
            masked(0x89, b"one"),
            masked(0x00, b":"),
            masked(0x8A, b""),
            masked(0x80, b"1}"),
        )
        assert await end.wait_received(1) == [b'{"a":1}']
        assert await peer.next() == Pong(b"one")


async def test_message_may_arrive_byte_by_byte() -> None:
    async with frame_peer() as (end, peer):
        for byte in peer.frames(b'{"a":1}') + peer.frames(b"[]"):
            await peer.send(bytes([byte]))
        assert await end.wait_received(2) == [b'{"a":1}', b"[]"]


async def test_binary_message_is_as_good_as_text() -> None:
    async with frame_peer() as (end, peer):
        await peer.send(masked(0x82, b'{"a":1}'))
        assert await end.wait_received(1) == [b'{"a":1}']


async def test_what_came_behind_the_handshake_is_read_first() -> None:
    async with frame_peer(leftover=masked(0x81, b"first") + masked(0x81, b"sec")[:3]) as (end, peer):
        await peer.send(masked(0x81, b"sec")[3:], masked(0x81, b"third"))
        assert await end.wait_received(3) == [b"first", b"sec", b"third"]


async def test_ping_is_answered_with_its_payload() -> None:
    async with frame_peer() as (_, peer):
        await peer.send(masked(0x89, b""), masked(0x89, b"x" * 125))
        assert [await peer.next(), await peer.next()] == [Pong(b""), Pong(b"x" * 125)]


@pytest.mark.parametrize("client", [False, True])
async def test_pings_are_answered_between_the_parts_of_a_message(client: bool) -> None:
    async with frame_peer(client=client) as (end, peer):
        async with end.channel.open_message() as send:
            for number in range(3):
                await send(b"part %d " % number)
                end.channel.send_nowait(b"behind %d" % number)
                await peer.send(peer.codec.encode_ping(b"%d" % number))
                assert await peer.next() == Pong(b"%d" % number)
        assert await peer.next() == b"part 0 part 1 part 2 "
        assert [await peer.next() for _ in range(3)] == [b"behind 0", b"behind 1", b"behind 2"]


async def test_our_pings_go_out_between_the_parts_of_a_message(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with frame_peer(client=True, ping_interval=30.0, pong_timeout=60.0) as (end, peer):
        async with end.channel.open_message() as send:
            for _ in range(5):
                await send(b"x")
                assert await peer.next() == Ping(b"")
                await peer.send(peer.codec.encode_pong(b""))
        assert await peer.next() == b"xxxxx"


async def test_message_in_parts_that_fails_ends_with_a_close_frame() -> None:
    async with frame_peer() as (end, peer):
        with pytest.raises(ValueError, match="half way"):
            async with end.channel.open_message() as send:
                await send(b"half a message")
                raise ValueError("half way")
        assert await peer.next() == Close(1011, "a message could not be finished")
        assert await peer.is_over()


async def test_peer_that_closes_amid_a_message_in_parts_is_answered() -> None:
    async with frame_peer() as (end, peer):
        with pytest.raises(ConnectionLost):
            async with end.channel.open_message() as send:
                await send(b"half a message")
                await peer.send(peer.codec.encode_close(1000, ""))
                await end.ended.wait()
                await send(b"the rest")
        assert await peer.next() == Close(1000, "")


@pytest.mark.parametrize("code", [1000, 1001, 4000])
async def test_close_frame_is_answered_and_ends_the_channel(code: int) -> None:
    async with frame_peer() as (end, peer):
        await peer.send(peer.codec.encode_close(code, "bye"))
        assert await peer.next() == Close(code, "")
        assert await peer.is_over()
        await end.ended.wait()
        assert end.channel.loss == ("" if code in (1000, 1001) else f"websocket closed with code {code}")


async def test_end_of_ours_says_why_in_its_close_frame_behind_all_messages() -> None:
    async with frame_peer(client=True) as (end, peer):
        end.channel.send_nowait(b"last")
        end.channel.close_nowait(1001, "going away")
        assert await peer.next() == b"last"
        assert await peer.next() == Close(1001, "going away")
        assert await peer.is_over()
        await end.ended.wait()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (masked(0x81, b"\xff"), 1007),
        (masked(0x83, b""), 1002),
        (masked(0xC1, b""), 1002),
        (masked(0x80, b""), 1002),
        (b"\x81\x01x", 1002),
        (b"\x81\xfe\x03\xe9", 1009),
        (masked(0x01, b"x" * 100) + b"\x00\xfe\x03\x85", 1009),
        (b"\x81\xff\x00\x00\x00\x01\x00\x00\x00\x00", 1009),
    ],
)
async def test_broken_frame_ends_the_channel_with_its_code(bad: bytes, code: int) -> None:
    async with frame_peer() as (end, peer):
        await peer.send(masked(0x81, b"good"), bad)
        closed = await peer.next()
        assert isinstance(closed, Close)
        assert closed.code == code
        await end.ended.wait()
        assert end.received == [b"good"]
        assert "websocket protocol error" in end.channel.loss


async def test_message_of_the_largest_size_is_taken() -> None:
    async with frame_peer(max_message=1000) as (end, peer):
        await peer.send(peer.frames(b"x" * 1000))
        assert await end.wait_received(1) == [b"x" * 1000]


async def test_peer_that_vanishes_ends_the_channel() -> None:
    async with frame_peer() as (end, peer):
        await peer.stream.aclose()
        await end.ended.wait()


@pytest.mark.parametrize("client", [False, True])
async def test_ping_goes_out_every_interval(client: bool, autojump_clock: trio.testing.MockClock) -> None:
    timeout = 60.0 if client else float("inf")
    async with frame_peer(client=client, ping_interval=30.0, pong_timeout=timeout) as (end, peer):
        start = trio.current_time()
        for turn in range(1, 8):
            assert await peer.next() == Ping(b"")
            assert trio.current_time() - start == pytest.approx(30.0 * turn)
            await peer.send(peer.codec.encode_pong(b""))
        assert not end.channel.closed


async def test_silent_peer_is_dropped_by_who_wants_an_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with frame_peer(client=True, ping_interval=30.0, pong_timeout=60.0) as (end, _):
        start = trio.current_time()
        await end.ended.wait()
        assert trio.current_time() - start == pytest.approx(90.0)
        assert end.channel.loss == "no answer to a ping within 60 s"


async def test_any_sign_of_life_is_an_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with frame_peer(client=True, ping_interval=30.0, pong_timeout=60.0) as (end, peer):
        for _ in range(20):
            await trio.sleep(50)
            await peer.send(peer.frames(b"{}"))
        await end.wait_received(20)
        assert not end.channel.closed


async def test_silent_client_stays_connected_to_a_server(autojump_clock: trio.testing.MockClock) -> None:
    async with frame_peer() as (end, _):
        await trio.sleep(5000)
        assert not end.channel.closed


async def test_reader_goes_on_while_its_own_writer_is_stuck() -> None:
    with trio.fail_after(TIME_LIMIT):
        async with await listen() as listener:
            client = await trio.open_tcp_stream("127.0.0.1", port_of(listener))
            stream = await listener.accept()
        async with client, stream, trio.open_nursery() as nursery:
            io = _pump.FdIO(stream.socket.fileno(), stream.socket.fileno(), stream.socket.close)
            end = End(WebsocketChannel("websocket test", io, client=False, leftover=b""))
            peer = FramePeer(client, FrameCodec(client=True, max_message=1 << 30))
            nursery.start_soon(end.run)
            messages = 300
            for _ in range(messages):
                end.channel.send_nowait(b"x" * 100_000)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert end.channel.congested
            await peer.send(peer.codec.encode_ping(b"alive?"), *(peer.frames(b"{}") for _ in range(100)))
            await end.wait_received(100)
            events = [await peer.next() for _ in range(messages + 1)]
            assert events.count(b"x" * 100_000) == messages
            assert events.index(Pong(b"alive?")) < messages  # it did not queue behind all of them
            nursery.cancel_scope.cancel()


# Other implementations.

STATUS = '{"id":1,"method":"environment/status"}'
NOT_INITIALIZED = "client must call initialize before using environment status methods"


async def test_stock_trio_websocket_client_talks_to_our_server(websocket_server: WebsocketServer) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_trio_websocket(websocket_server.url) as websocket:
            await websocket.send_message(STATUS)
            assert NOT_INITIALIZED in await websocket.get_message()
            await websocket.ping(b"x")
            await websocket.aclose(1000, "done")
            assert websocket.closed is not None
            assert websocket.closed.code == 1000


async def test_stock_websockets_client_talks_to_our_server(websocket_server: WebsocketServer) -> None:
    def talk() -> None:
        with connect_sync(websocket_server.url, max_size=None) as websocket:
            assert websocket.protocol.extensions == []  # it offers permessage-deflate
            assert websocket.subprotocol is None
            websocket.send(STATUS)
            assert NOT_INITIALIZED in str(websocket.recv(TIME_LIMIT))
            websocket.send([STATUS[:10], STATUS[10:30], STATUS[30:]])
            assert NOT_INITIALIZED in str(websocket.recv(TIME_LIMIT))
            websocket.send(STATUS.encode())
            assert NOT_INITIALIZED in str(websocket.recv(TIME_LIMIT))
            assert websocket.ping().wait(TIME_LIMIT)
        assert websocket.close_code == 1000

    with trio.fail_after(TIME_LIMIT):
        await trio.to_thread.run_sync(talk)


@asynccontextmanager
async def serve_once(
    handle: Callable[[trio.SocketStream], Awaitable[None]],
) -> AsyncIterator[str]:
    """Give the first connection to `handle`; the URL of the place."""

    async def serve() -> None:
        stream = await listener.accept()
        async with stream:
            await handle(stream)

    with trio.fail_after(TIME_LIMIT):
        async with await listen() as listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield f"ws://127.0.0.1:{port_of(listener)}"
            nursery.cancel_scope.cancel()


async def test_our_client_talks_to_a_stock_trio_websocket_server() -> None:
    requests: list[WebSocketRequest] = []

    async def handle(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, stream, max_message_size=BIG * 2)
            requests.append(request)
            websocket: WebSocketConnection = await request.accept()
            try:
                while True:
                    await websocket.send_message(await websocket.get_message())
            except ConnectionClosed:
                nursery.cancel_scope.cancel()

    async with serve_once(handle) as url, trio.open_nursery() as nursery:
        end = End(await connect(f"{url}/some/path?a=b", headers=[(b"Authorization", b"Bearer t")]))
        nursery.start_soon(end.run)
        for message in (b"{}", b"\xc3\xa9" * 100_000, b"x" * BIG):
            end.channel.send_nowait(message)
        assert await end.wait_received(3) == [b"{}", b"\xc3\xa9" * 100_000, b"x" * BIG]
        assert requests[0].path == "/some/path?a=b"
        headers = {name.lower(): value for name, value in requests[0].headers}
        assert headers[b"authorization"] == b"Bearer t"
        assert b"sec-websocket-extensions" not in headers
        assert b"origin" not in headers
        end.channel.close_nowait()
        await end.ended.wait()


# Failing to connect.


async def connecting_fails(url: str) -> str:
    """What is said when it fails, which must be at once and not when somebody's patience ends."""
    with trio.fail_after(5), pytest.raises(ConnectFailed) as failed:
        await connect(url)
    return str(failed.value)


async def test_refused_port_is_named() -> None:
    async with await listen() as listener:
        url = f"ws://127.0.0.1:{port_of(listener)}"
    text = await connecting_fails(f"{url}/x?token=secret")
    assert url in text
    assert "refused" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 7\r\n\r\nno pass",
            "refused the websocket with status 401: no pass",
        ),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "refused the websocket with status 404"),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", "with status 302"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", "with status 200: hi"),
        (b"HTTP/1.1 503 Busy\r\nconnection: close\r\n\r\nuntil closed", "with status 503"),
        (b"", "closed the connection before the websocket handshake was done"),
        (b"HTTP/1.1 101 Switch", "closed the connection before the websocket handshake was done"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "cannot connect"),
        (b"\x00\xff" * 50, "cannot connect"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 100_000, "cannot connect"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "cannot connect"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-accept: d3Jvbmc=\r\n\r\n",
            "cannot connect",
        ),
    ],
    ids=[
        "unauthorized",
        "not-found",
        "redirect",
        "ok",
        "busy-until-closed",
        "closed-at-once",
        "closed-in-the-head",
        "ssh",
        "bytes",
        "endless-head",
        "upgrade-without-headers",
        "wrong-accept",
    ],
)
async def test_answer_that_is_no_websocket_is_told(answer: bytes, words: str) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some()
        await stream.send_all(answer)

    async with serve_once(handle) as url:
        text = await connecting_fails(url)
    assert url in text
    assert words in text
    assert "\n" not in text


async def test_connection_that_is_reset_in_the_handshake_is_told() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with serve_once(handle) as url:
        assert f"cannot connect to {url}" in await connecting_fails(url)


async def test_server_that_hangs_is_given_up_at_the_timeout() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with serve_once(handle) as url:
        with pytest.raises(ConnectFailed, match=f"no websocket connection to {url} within 0.05 s"):
            async with open_environment(f"{url}?token=secret", connect_timeout=0.05):
                raise AssertionError


async def test_server_that_upgrades_and_hangs_is_given_up_at_the_timeout() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await accept_websocket(stream)
        await trio.sleep_forever()

    async with serve_once(handle) as url:
        with pytest.raises(ConnectFailed, match=r"did not answer initialize within 0\.05 s"):
            async with open_environment(url, initialize_timeout=0.05):
                raise AssertionError


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ws://", "127.0.0.1:1", "ws:/x", ""])
async def test_what_is_no_websocket_url_is_refused_without_connecting(url: str) -> None:
    assert "is no websocket URL" in await connecting_fails(url)


async def test_certificate_that_is_not_trusted_is_refused() -> None:
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(server_context)

    async def handle(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await trio.SSLStream(stream, server_context, server_side=True).do_handshake()

    async with serve_once(handle) as url:
        text = await connecting_fails(url.replace("ws:", "wss:"))
    assert "CERTIFICATE_VERIFY_FAILED" in text


async def test_server_without_tls_is_refused_for_wss() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    async with serve_once(handle) as url:
        text = await connecting_fails(url.replace("ws:", "wss:"))
    assert "cannot connect" in text
    assert "SSL" in text
