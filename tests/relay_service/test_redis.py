"""What may happen to a relay of several nodes: slow sockets, a Redis that stops or dies, dead nodes."""

from __future__ import annotations

import itertools
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from attrs import define, evolve, field

from execenv.errors import UsageError
from execenv.relay_service.crossing import WINDOW, pack_entry
from execenv.relay_service.exchange import Exchange, Link, LinkEnd, Offline
from execenv.relay_service.redis import open_redis, open_redis_store
from execenv.relay_service.redis_exchange import RedisExchange, Timing
from execenv.relay_service.store import Store, StoreUnavailable
from tests.relay_service.ends import PlayedEnd, PlayedExecutor
from tests.relay_service.redis_server import RedisServer, run_redis
from tests.relay_service.test_store import AUTHORIZATION, REGISTRATION, TOKEN

QUICK = Timing(reply=1.0, refresh=0.2, alive=2.5, outage=6.0, presence=6.0, opening=4.0, goodbye=1.0)
"""Less than usual, and still seconds on a busy machine."""

LIMIT = 40.0


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, which may do to it what it wants."""
    with run_redis(tmp_path) as server:
        yield server


@asynccontextmanager
async def open_node(
    server: RedisServer, node_id: str, timing: Timing = QUICK
) -> AsyncIterator[tuple[Store, RedisExchange]]:
    async with open_redis(server.url, node_id=node_id, timing=timing) as (store, exchange):
        assert isinstance(exchange, RedisExchange)
        yield store, exchange


@define(eq=False)
class Pair:
    """Two nodes, an executor on the first, a harness on the other, and the link between."""

    stores: list[Store]
    nodes: list[RedisExchange]
    executor: PlayedExecutor
    there: PlayedEnd
    back: PlayedEnd
    link: Link


@asynccontextmanager
async def open_pair(server: RedisServer, timing: Timing = QUICK) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        first_store, first = await stack.enter_async_context(open_node(server, "a", timing))
        other_store, other = await stack.enter_async_context(open_node(server, "b", timing))
        executor, back = PlayedExecutor(), PlayedEnd()
        await stack.enter_async_context(first.executor("box", "r1", executor.accept, executor.replaced))
        link = await stack.enter_async_context(other.harness("box", back))
        yield Pair([first_store, other_store], [first, other], executor, executor.ends[0], back, link)


def number_of(frame: bytes) -> int:
    return int.from_bytes(frame[:8], "big")


def frame_of(number: int, size: int) -> bytes:
    return number.to_bytes(8, "big").ljust(size, b"\xa5")


@define(eq=False)
class SlowEnd(LinkEnd):
    """A socket that takes little at a time, and looks whether each frame is the next."""

    size: int
    count: int = 0
    waiting: int = 0
    most: int = 0
    reasons: list[str] = field(factory=list)
    changed: trio.Event = field(factory=trio.Event)

    def received(self, frame: bytes) -> None:
        assert number_of(frame) == self.count, "a gap"
        assert len(frame) == self.size
        self.count += 1
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self._change()

    @property
    def congested(self) -> bool:
        return self.waiting * self.size > 100_000 and not self.reasons

    async def wait_room(self) -> None:
        while self.congested:
            await self.changed.wait()

    def closed(self, reason: str) -> None:
        self.reasons.append(reason)
        self._change()

    async def drain(self, total: int) -> None:
        """Take all, in small portions."""
        taken = 0
        while taken < total:
            while not self.waiting:
                await self.changed.wait()
            portion = min(self.waiting, 50_000 // self.size + 1)
            self.waiting -= portion
            taken += portion
            self._change()
            await trio.sleep(0.0005)

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


async def send_all(link: Link, count: int, size: int) -> None:
    for number in range(count):
        if link.congested:
            await link.wait_room()
        link.send(frame_of(number, size))
        if number % 100 == 0:
            await trio.lowlevel.checkpoint()


# Order, completeness, room.


async def test_many_frames_arrive_in_order_and_redis_holds_no_more_than_the_windows(
    redis: RedisServer,
) -> None:
    small, large = (100_000, 8), (2_000, 60 * 1024)
    most: dict[str, int] = {}
    links: list[Link] = []
    there, back = SlowEnd(small[1]), SlowEnd(large[1])

    def accept(link: Link) -> LinkEnd:
        links.append(link)
        return there

    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            _, first = await stack.enter_async_context(open_node(redis, "a"))
            _, other = await stack.enter_async_context(open_node(redis, "b"))
            await stack.enter_async_context(first.executor("box", "r1", accept, lambda: None))
            link = await stack.enter_async_context(other.harness("box", back))
            done = trio.Event()

            async def look() -> None:
                while not done.is_set():
                    for node in (first, other):
                        inbox = f"execenv:node:{node.address}:inbox"
                        size = int(redis.ask("MEMORY", "USAGE", inbox, "SAMPLES", "0")[1:])
                        most[inbox] = max(size, most.get(inbox, 0))
                    with trio.move_on_after(0.05):
                        await done.wait()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                async with trio.open_nursery() as transfer:
                    transfer.start_soon(there.drain, small[0])
                    transfer.start_soon(back.drain, large[0])
                    transfer.start_soon(send_all, link, *small)
                    transfer.start_soon(send_all, links[0], *large)
                done.set()
    assert (there.count, back.count) == (small[0], large[0])
    assert (there.reasons, back.reasons) == ([], [])
    assert max(most.values()) < WINDOW + 512 * 1024
    assert max(most.values()) > 60 * 1024, "nothing was looked at"
    assert back.most * back.size <= WINDOW + back.size
    assert there.most * (there.size + 64) <= WINDOW + 72


async def test_slow_link_holds_up_no_other(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            pair.there.set_full(True)
            while not pair.link.congested:
                pair.link.send(bytes(60_000))
            async with pair.nodes[1].harness("box", PlayedEnd()) as second:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send_all, second, 200, 60_000)
                    frames = await pair.executor.ends[1].wait_frames(200)
                assert [number_of(frame) for frame in frames] == list(range(200))
            assert pair.link.congested
            pair.there.set_full(False)
            await pair.link.wait_room()


async def test_links_of_one_node_never_touch_redis(own_redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_node(own_redis, "a", Timing()) as (_, node), AsyncExitStack() as stack:
            executor, back = PlayedExecutor(), PlayedEnd()
            await stack.enter_async_context(node.executor("box", "r", executor.accept, executor.replaced))
            own_redis.pause()
            presence = await node.presence("box")
            assert presence is not None
            link = await stack.enter_async_context(node.harness("box", back))
            link.send(b"there")
            executor.links[0].send(b"back")
            assert (executor.ends[0].frames, back.frames) == ([b"there"], [b"back"])
            own_redis.go_on()


# Redis dies, stops, forgets.


async def ended(*ends: PlayedEnd) -> None:
    for end in ends:
        await end.wait_closed()


def assert_no_gap(end: PlayedEnd) -> None:
    assert [number_of(frame) for frame in end.frames] == list(range(len(end.frames)))


@pytest.mark.parametrize("after", [1, 37, 300])
async def test_redis_killed_in_mid_transfer_ends_both_sides_without_a_gap(
    own_redis: RedisServer, after: int
) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(own_redis) as pair, trio.open_nursery() as nursery:
            nursery.start_soon(send_all, pair.link, 100_000, 20_000)
            nursery.start_soon(send_all, pair.executor.links[0], 100_000, 20_000)
            await pair.there.wait_frames(after)
            own_redis.end()
            own_redis.start()  # empty: what was on the way is lost
            await ended(pair.there, pair.back)
            nursery.cancel_scope.cancel()
            assert_no_gap(pair.there)
            assert_no_gap(pair.back)


async def test_everything_comes_back_after_an_outage(own_redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(own_redis) as pair, AsyncExitStack() as stack:
            near = PlayedEnd()
            local = await stack.enter_async_context(pair.nodes[0].harness("box", near))
            own_redis.end()
            for end in (pair.there, pair.back):
                reason = await end.wait_closed()
                assert reason == "what is between the nodes of this relay cannot be reached"
            with pytest.raises(StoreUnavailable):
                await pair.nodes[1].presence("box")
            with pytest.raises(StoreUnavailable):
                async with pair.nodes[1].harness("box", PlayedEnd()):
                    raise AssertionError("linked")
            with pytest.raises(StoreUnavailable):
                async with pair.nodes[1].executor("box", "r2", PlayedExecutor().accept, lambda: None):
                    raise AssertionError("seated")
            for store in pair.stores:
                with pytest.raises(StoreUnavailable):
                    await store.ping()
            local.send(b"still here")
            assert pair.executor.ends[1].frames == [b"still here"]
            own_redis.start()
            again = PlayedEnd()
            link = await stack.enter_async_context(linked(pair.nodes[1], again))
            await assert_passes(pair, link, again, older=2)
            assert near.reasons == []
            assert not pair.executor.lost.is_set()
            await pair.stores[0].ping()


@asynccontextmanager
async def linked(exchange: Exchange, end: LinkEnd) -> AsyncIterator[Link]:
    """A link, as soon as the executor is known again."""
    async with AsyncExitStack() as stack:
        while True:
            try:
                link = await stack.enter_async_context(exchange.harness("box", end))
                break
            except (Offline, StoreUnavailable):
                await trio.sleep(0.05)  # as a harness that tries again
        yield link


async def assert_passes(pair: Pair, link: Link, back: PlayedEnd, older: int = 1) -> None:
    """A frame there and one back. The executor may have seen links before whose harness had given up."""
    link.send(b"there")
    for number in itertools.count(older + 1):
        await pair.executor.wait_links(number)
        end = pair.executor.ends[number - 1]
        await end.wait(lambda end=end: b"there" in end.frames or bool(end.reasons))  # type: ignore[misc]
        if b"there" in end.frames:
            pair.executor.links[number - 1].send(b"back")
            assert await back.wait_frames(1) == [b"back"]
            return


@pytest.mark.parametrize("pause", [0.3, 3.5], ids=["shorter than a reply", "longer than a node lives"])
async def test_pause_of_redis_costs_no_link(own_redis: RedisServer, pause: float) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(own_redis) as pair, trio.open_nursery() as nursery:
            nursery.start_soon(send_all, pair.link, 1_000, 20_000)
            nursery.start_soon(send_all, pair.executor.links[0], 1_000, 20_000)
            await pair.there.wait_frames(100)
            own_redis.pause()
            await trio.sleep(pause)
            own_redis.go_on()
            await pair.there.wait_frames(1_000)
            await pair.back.wait_frames(1_000)
            assert_no_gap(pair.there)
            assert_no_gap(pair.back)
            assert (pair.there.reasons, pair.back.reasons) == ([], [])


async def test_long_pause_of_redis_ends_links_and_then_they_can_be_made_again(own_redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(own_redis) as pair, trio.open_nursery() as nursery:
            nursery.start_soon(send_all, pair.link, 100_000, 20_000)
            await pair.there.wait_frames(10)
            own_redis.pause()
            await ended(pair.there, pair.back)
            own_redis.go_on()
            async with linked(pair.nodes[1], again := PlayedEnd()) as link:
                await assert_passes(pair, link, again)
            nursery.cancel_scope.cancel()
            assert_no_gap(pair.there)


@pytest.mark.parametrize("side", [0, 1], ids=["executor's node", "harness's node"])
async def test_lost_inbox_ends_both_sides(redis: RedisServer, side: int) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            assert redis.ask("DEL", f"execenv:node:{pair.nodes[side].address}:inbox") == b":1\r\n"
            await ended(pair.there, pair.back)
            async with linked(pair.nodes[1], again := PlayedEnd()) as link:
                await assert_passes(pair, link, again)


@pytest.mark.parametrize("side", [0, 1], ids=["executor's node", "harness's node"])
async def test_lost_entry_ends_both_sides_even_if_it_was_the_last(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            node = pair.nodes[side]
            add = node._add
            lost: list[bytes] = []

            async def lossy(address: str, data: bytes) -> bool:
                if not lost and b"lost" in data:
                    lost.append(data)
                    return True
                return await add(address, data)

            monkeypatch.setattr(node, "_add", lossy)
            (pair.executor.links[0] if side == 0 else pair.link).send(b"lost")
            for end in (pair.there, pair.back):
                assert (await end.wait_closed()).endswith(" is lost"), "not seen by the number"
            assert lost
            assert (pair.there.frames, pair.back.frames) == ([], [])
            async with linked(pair.nodes[1], again := PlayedEnd()) as link:
                await assert_passes(pair, link, again)


async def test_entry_that_was_sent_twice_is_taken_once(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            add = pair.nodes[1]._add
            failed: list[bytes] = []

            async def unknown(address: str, data: bytes) -> bool:
                done = await add(address, data)
                if len(failed) < 3 and b"once" in data:
                    failed.append(data)
                    raise StoreUnavailable("no reply")
                return done

            monkeypatch.setattr(pair.nodes[1], "_add", unknown)
            pair.link.send(b"once")
            pair.link.send(b"then")
            assert await pair.there.wait_frames(2) == [b"once", b"then"]
            pair.link.send(b"last")
            assert await pair.there.wait_frames(3) == [b"once", b"then", b"last"]
            assert len(failed) == 3


async def test_late_answer_to_a_session_that_was_given_up_ends_nothing(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            late = pack_entry(pair.nodes[1].address, 12345, 67890, 0, b"")
            redis.ask("XADD", f"execenv:node:{pair.nodes[0].address}:inbox", "*", "d", late)
            pair.link.send(b"frame")
            assert await pair.there.wait_frames(1) == [b"frame"]
            begun = pack_entry(pair.nodes[1].address, 12345, 0, 0, b"")
            redis.ask("XADD", f"execenv:node:{pair.nodes[0].address}:inbox", "*", "d", begun)
            reason = await pair.there.wait_closed()
            assert reason == "the node at the other end has lost track of its links"
            await pair.back.wait_closed()


async def test_entry_that_is_none_is_passed_over(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            redis.ask("XADD", f"execenv:node:{pair.nodes[0].address}:inbox", "*", "d", "garbage")
            pair.link.send(b"frame")
            assert await pair.there.wait_frames(1) == [b"frame"]


# Nodes.


NODE = """
import sys, trio
from execenv.relay_service.redis import open_redis
from tests.relay_service.ends import PlayedEnd
from tests.relay_service.test_redis import QUICK

class Echo(PlayedEnd):
    def received(self, frame):
        self.link.send(frame)
    def closed(self, reason):
        print("closed:", reason, flush=True)

def accept(link):
    end = Echo()
    end.link = link
    return end

async def main(url):
    async with open_redis(url, node_id="child", timing=QUICK) as (_, exchange):
        async with exchange.executor("box", "child", accept, lambda: print("replaced", flush=True)):
            print("here", flush=True)
            await trio.sleep_forever()

trio.run(main, sys.argv[1])
"""


@asynccontextmanager
async def child_node(server: RedisServer) -> AsyncIterator[trio.Process]:
    async with trio.open_nursery() as nursery:
        run = partial(
            trio.run_process,
            [sys.executable, "-c", NODE, server.url],
            stdout=subprocess.PIPE,
            check=False,
        )
        process: trio.Process = await nursery.start(run)
        try:
            assert await line_of(process) == b"here\n"
            yield process
        finally:
            process.kill()


async def line_of(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        some = await process.stdout.receive_some(1)
        if not some:
            break
        line += some
    return line


async def test_node_that_dies_is_noticed_and_overtaken(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_node(redis, "b") as (_, node), child_node(redis) as child:
            end = PlayedEnd()
            async with node.harness("box", end) as link:
                link.send(b"echo")
                await end.wait_frames(1)
                child.kill()
                died = trio.current_time()
                await end.wait_closed()
                assert trio.current_time() - died < QUICK.alive + 2
            while await node.presence("box") is not None:  # noqa: ASYNC110 - nobody is told of that
                await trio.sleep(0.05)
            assert trio.current_time() - died < QUICK.alive + 3
            executor = PlayedExecutor()
            async with node.executor("box", "r2", executor.accept, executor.replaced):
                presence = await node.presence("box")
                assert presence is not None
                assert (presence.registration_id, presence.node) == ("r2", "b")


async def test_executor_that_comes_from_a_dead_node_ends_the_links_to_that_at_once(
    redis: RedisServer,
) -> None:
    with trio.fail_after(LIMIT):
        patient = evolve(QUICK, alive=1000)
        async with open_node(redis, "b", patient) as (_, node), child_node(redis) as child:
            end, other = PlayedEnd(), PlayedEnd()
            async with node.harness("box", end) as link:
                link.send(b"echo")
                await end.wait_frames(1)
                child.kill()
                executor = PlayedExecutor()
                async with node.executor("box", "r2", executor.accept, executor.replaced):
                    assert await end.wait_closed() == "a newer executor has taken its place"
                    async with node.harness("box", other) as again:
                        again.send(b"here")
                        assert await executor.ends[0].wait_frames(1) == [b"here"]
                    assert not executor.lost.is_set()


async def test_node_that_hangs_ends_its_links_when_it_wakes(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_node(redis, "b") as (_, node), child_node(redis) as child:
            end = PlayedEnd()
            async with node.harness("box", end) as link:
                link.send(b"echo")
                await end.wait_frames(1)
                child.send_signal(signal.SIGSTOP)
                assert await end.wait_closed() == "the node at the other end gives no sign of life"
                child.send_signal(signal.SIGCONT)
                assert (await line_of(child)).startswith(b"closed: ")
            again = PlayedEnd()
            async with linked(node, again) as link:
                link.send(b"again")
                assert await again.wait_frames(1) == [b"again"]


async def test_node_that_leaves_says_so(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_node(redis, "b") as (_, node), AsyncExitStack() as stack:
            end, executor = PlayedEnd(), PlayedExecutor()
            async with open_node(redis, "a") as (_, leaving):
                await stack.enter_async_context(
                    node.executor("box", "r1", executor.accept, executor.replaced)
                )
                inner = await stack.enter_async_context(AsyncExitStack())
                await inner.enter_async_context(leaving.harness("box", end))
            assert await executor.ends[0].wait_closed() == "the node at the other end is shutting down"
            keys = redis.ask("KEYS", "execenv:node:*")
            assert keys.startswith(b"*2\r\n"), keys
            assert b"node:b." in keys
            assert b"node:a." not in keys


async def test_thousands_of_executors_may_come_at_once(redis: RedisServer) -> None:
    come = trio.Semaphore(0)

    async def sit(node: RedisExchange, number: int) -> None:
        executor = PlayedExecutor()
        async with node.executor(f"box{number}", "r", executor.accept, executor.replaced):
            come.release()
            await trio.sleep_forever()

    with trio.fail_after(LIMIT):
        # So little patience that a reply in time needs few before it.
        async with (
            open_node(redis, "a", evolve(QUICK, reply=0.5)) as (_, node),
            trio.open_nursery() as nursery,
        ):
            for number in range(3000):
                nursery.start_soon(sit, node, number)
            for _ in range(3000):
                await come.acquire()
            nursery.cancel_scope.cancel()


async def test_executor_that_lost_while_nobody_could_tell_it_learns_so_later(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            key = "execenv:env:box:executor"
            redis.ask("HSET", key, "generation", "8000000000000000", "address", "elsewhere.1", "claim", "x")
            await pair.executor.lost.wait()
            await ended(pair.there, pair.back)
            assert b"elsewhere.1" in redis.ask("HGET", key, "address"), "a late one has won"


async def test_presence_that_redis_forgot_is_told_again(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            redis.ask("DEL", "execenv:env:box:executor")
            while await pair.nodes[1].presence("box") is None:  # noqa: ASYNC110 - nobody is told of that
                await trio.sleep(0.05)
            assert pair.back.reasons == []


async def test_claim_overtaken_before_its_reply_came_is_lost(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = evolve(QUICK, presence=300.0)  # what is told again comes too late to help
    with trio.fail_after(LIMIT):
        async with open_node(redis, "a", timing) as (_, first), open_node(redis, "b", timing) as (_, other):
            call = first._commands.call
            claimed, go_on = trio.Event(), trio.Event()

            async def slow(command: bytes, *arguments: object, **options: float) -> object:
                reply = await call(command, *arguments, **options)  # type: ignore[arg-type]
                if "registration-of-the-slow" in arguments:
                    claimed.set()
                    await go_on.wait()
                return reply

            monkeypatch.setattr(first._commands, "call", slow)
            older, newer = PlayedExecutor(), PlayedExecutor()

            async def sit() -> None:
                name = "registration-of-the-slow"
                async with first.executor("box", name, older.accept, older.replaced):
                    await older.lost.wait()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(sit)
                await claimed.wait()
                async with other.executor("box", "r2", newer.accept, newer.replaced):
                    while not any(claiming.lost_to for claiming in first._claiming):  # noqa: ASYNC110
                        await trio.sleep(0.01)
                    go_on.set()
                    await older.lost.wait()
                    async with first.harness("box", PlayedEnd()):
                        await newer.wait_links(1)
            assert older.links == []


# Keys, settings, secrets.


async def test_what_is_not_to_stay_has_a_time_to_live(redis: RedisServer) -> None:
    now = time.time()
    with trio.fail_after(LIMIT):
        async with open_pair(redis) as pair:
            store = pair.stores[0]
            await store.signing_key()
            await store.add_token(TOKEN)
            await store.add_token(evolve(TOKEN, token_id="t2", expires=now + 60))
            await store.register(REGISTRATION)
            await store.register(evolve(REGISTRATION, executor_key="another"))
            await store.add_authorization(AUTHORIZATION)
            await store.use_once("nonce", now + 60, now)
            found = re.findall(rb"execenv:[^\r]*", redis.ask("KEYS", "*"))
            stay = {key for key in found if redis.ask("TTL", key.decode()) == b":-1\r\n"}
    assert stay == {b"execenv:signing-key", b"execenv:token:t1", b"execenv:registration:box"}
    assert len(found) == 3 + 2 * 2 + 1 + 4


async def test_cancelled_calls_leave_the_next_one_working(redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_redis_store(redis.url) as store:
            for _ in range(200):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await store.add_token(TOKEN)
            assert list(await store.tokens()) in ([], [TOKEN])
            await store.ping()


async def test_full_redis_is_unavailable_and_says_why(own_redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_redis_store(own_redis.url) as store:
            own_redis.ask("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(StoreUnavailable, match=r"Redis refuses SET: .*maxmemory"):
                await store.add_token(TOKEN)
            own_redis.ask("CONFIG", "SET", "maxmemory", "0")
            await store.add_token(TOKEN)


async def test_policy_that_drops_keys_is_warned_of(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with trio.fail_after(LIMIT):
        async with open_node(own_redis, "a"):
            pass
    assert "its maxmemory-policy is allkeys-lru, not noeviction" in caplog.text


async def test_password_is_used_and_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    password = "p@ss/wo:rd%"
    with trio.fail_after(LIMIT), run_redis(tmp_path, "--requirepass", password) as server:
        quoted = "p%40ss%2Fwo%3Ard%25"
        async with open_redis_store(f"redis://:{quoted}@127.0.0.1:{server.port}/3") as store:
            await store.ping()
        for wrong in ("secret-but-wrong", ""):
            url = f"redis://:{wrong}@127.0.0.1:{server.port}"
            with pytest.raises(StoreUnavailable) as raised:
                async with open_redis_store(url):
                    raise AssertionError("opened")
            assert "secret-but-wrong" not in str(raised.value)
    shown = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert "secret-but-wrong" not in shown
    assert quoted not in shown
    assert password not in shown


async def test_redis_that_is_not_there_is_unavailable() -> None:
    with trio.fail_after(LIMIT), pytest.raises(StoreUnavailable, match=r"^Redis: it cannot be reached$"):
        async with open_redis_store("redis://:secret@127.0.0.1:1"):
            raise AssertionError("opened")


async def test_connection_may_be_encrypted(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    with run_redis(tmp_path) as port_finder:
        free = port_finder.port
    options = ("--tls-port", str(free), "--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem")
    with (
        trio.fail_after(LIMIT),
        run_redis(tmp_path, *options, "--tls-ca-cert-file", "ca.pem", "--tls-auth-clients", "no"),
    ):
        url = f"rediss://127.0.0.1:{free}?ssl_ca_certs={tmp_path}"
        async with open_redis_store(f"{url}/ca.pem") as store:
            await store.add_token(TOKEN)
            assert await store.token(TOKEN.token_id) == TOKEN
        with pytest.raises(StoreUnavailable, match="Redis: its certificate is refused"):
            async with open_redis_store(f"{url}/other.pem"):
                raise AssertionError("opened")


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@host",
        "redis://:secret@host:port",
        "redis://:secret@host:99999",
        "redis:///secret",
        "redis://:secret@host/name",
        "redis://:secret@host?ssl_cert_reqs=none",
        "rediss://:secret@host?ssl_cert_reqs=none",
        "redis://[:secret@host",
    ],
)
async def test_wrong_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(UsageError, match=r"^the URL of Redis is to be redis://") as raised:
        async with open_redis_store(url):
            raise AssertionError("opened")
    assert "secret" not in str(raised.value)
    assert raised.value.__context__ is None or raised.value.__suppress_context__


async def test_missing_authority_is_named() -> None:
    with pytest.raises(UsageError, match=r"the certificates in /no/such\.pem cannot be used: No such file"):
        async with open_redis_store("rediss://host?ssl_ca_certs=/no/such.pem"):
            raise AssertionError("opened")


async def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "execenv.relay_service.redis_wire", None)
    with pytest.raises(UsageError, match=r"pip install 'execenv\[redis\]'"):
        async with open_redis_store("redis://localhost"):
            raise AssertionError("opened")


@pytest.mark.parametrize("data", ["x", "x" * 17, "x" * 100])
async def test_entry_that_makes_no_sense_ends_no_node(own_redis: RedisServer, data: str) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(own_redis) as pair:
            for node in pair.nodes:
                own_redis.ask("XADD", f"execenv:node:{node.address}:inbox", "*", "d", data)
            pair.link.send(b"to the executor")
            assert await pair.there.wait_frames(1) == [b"to the executor"]
            pair.executor.links[0].send(b"and back")
            assert await pair.back.wait_frames(1) == [b"and back"]


async def test_link_ends_if_what_its_node_sends_makes_no_sense(own_redis: RedisServer) -> None:
    with trio.fail_after(LIMIT):
        async with open_pair(own_redis) as pair:
            first, other = pair.nodes
            peer = other._peers[first.address]
            peer.put(b"\x7f" * 13)  # of a kind that does not exist
            assert await pair.there.wait_closed()
            assert await pair.back.wait_closed()
