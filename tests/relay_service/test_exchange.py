"""What every exchange does, whether the two ends of a link are on one node or on two."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from execenv.relay_service.exchange import Exchange, Link, LinkEnd, Offline
from tests.relay_service.conftest import Nodes
from tests.relay_service.ends import PlayedEnd, PlayedExecutor


async def wait_absent(exchange: Exchange) -> None:
    while await exchange.presence("box") is not None:  # noqa: ASYNC110 - nobody is told of that
        await trio.sleep(0.01)


async def fill(link: Link) -> int:
    """Send until the link is congested; how many frames that took."""
    for sent in range(1000):
        if link.congested:
            return sent
        link.send(bytes(60_000))
        await trio.lowlevel.checkpoint()
    raise AssertionError("never congested")


async def seated(stack: AsyncExitStack, exchange: Exchange, registration: str = "r1") -> PlayedExecutor:
    executor = PlayedExecutor()
    await stack.enter_async_context(
        exchange.executor("box", registration, executor.accept, executor.replaced)
    )
    return executor


async def test_nobody_is_there_at_first(nodes: Nodes) -> None:
    assert await nodes.harnesses.presence("box") is None
    with pytest.raises(Offline):
        async with nodes.harnesses.harness("box", PlayedEnd()):
            raise AssertionError("linked")


async def test_executor_is_present_while_its_block_lasts(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        await seated(stack, nodes.executors)
        for exchange in (nodes.executors, nodes.harnesses):
            presence = await exchange.presence("box")
            assert presence is not None
            assert presence.registration_id == "r1"
            assert await exchange.presence("another") is None
    await wait_absent(nodes.harnesses)
    with pytest.raises(Offline):
        async with nodes.harnesses.harness("box", PlayedEnd()):
            raise AssertionError("linked")


async def test_frames_pass_both_ways_in_order(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        executor = await seated(stack, nodes.executors)
        end = PlayedEnd()
        async with nodes.harnesses.harness("box", end) as link:
            there = [b"%d" % number for number in range(300)]
            back = [bytes([number % 256]) * number for number in range(300)]
            for frame in there:
                link.send(frame)
            await executor.wait_links(1)
            for frame in back:
                executor.links[0].send(frame)
            assert await executor.ends[0].wait_frames(300) == there
            assert await end.wait_frames(300) == back
            assert executor.ends[0].reasons == end.reasons == []


async def test_links_are_apart(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        executor = await seated(stack, nodes.executors)
        ends = [PlayedEnd(), PlayedEnd()]
        first = await stack.enter_async_context(nodes.harnesses.harness("box", ends[0]))
        second = await stack.enter_async_context(nodes.harnesses.harness("box", ends[1]))
        await executor.wait_links(2)
        first.send(b"1")
        second.send(b"2")
        for end, link in zip(executor.ends, executor.links, strict=True):
            (frame,) = await end.wait_frames(1)
            link.send(frame * 2)
        assert (await ends[0].wait_frames(1), await ends[1].wait_frames(1)) == ([b"11"], [b"22"])
        first.close("done")
        assert await executor.ends[0].wait_closed() == "done"
        second.send(b"3")
        assert await executor.ends[1].wait_frames(2) == [b"2", b"3"]
        assert (ends[0].reasons, ends[1].reasons) == ([], [])


async def test_harness_that_leaves_ends_its_link(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        executor = await seated(stack, nodes.executors)
        end = PlayedEnd()
        async with nodes.harnesses.harness("box", end) as link:
            link.send(b"last")
        await executor.wait_links(1)
        assert await executor.ends[0].wait_closed() == "the harness has disconnected"
        assert executor.ends[0].frames == [b"last"]
        link.send(b"too late")
        link.close("again")
        executor.links[0].send(b"too late")
        executor.links[0].close("again")
        await link.wait_room()
        await executor.links[0].wait_room()
        assert not link.congested
        assert not executor.links[0].congested
        assert end.reasons == []


async def test_executor_that_leaves_ends_its_links(nodes: Nodes) -> None:
    end = PlayedEnd()
    async with AsyncExitStack() as stack:
        inner = await stack.enter_async_context(AsyncExitStack())
        executor = await seated(inner, nodes.executors)
        link = await stack.enter_async_context(nodes.harnesses.harness("box", end))
        await executor.wait_links(1)
        executor.links[0].send(b"last")
        await inner.aclose()
        assert await end.wait_closed() == "the executor has disconnected"
        assert end.frames == [b"last"]
        link.send(b"too late")
        await link.wait_room()
    assert executor.ends[0].reasons == []
    assert not executor.lost.is_set()


async def test_executor_closes_one_link(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        executor = await seated(stack, nodes.executors)
        end = PlayedEnd()
        async with nodes.harnesses.harness("box", end):
            await executor.wait_links(1)
            executor.links[0].close("no more")
            assert await end.wait_closed() == "no more"
        assert executor.ends[0].reasons == []


async def test_newest_executor_wins(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        older = await seated(stack, nodes.executors)
        ends = [PlayedEnd(), PlayedEnd()]
        await stack.enter_async_context(nodes.harnesses.harness("box", ends[0]))
        await older.wait_links(1)
        newer = await seated(stack, nodes.harnesses, "r2")
        await older.lost.wait()
        assert await ends[0].wait_closed() == "a newer executor has taken its place"
        assert await older.ends[0].wait_closed() == "a newer executor has taken its place"
        link = await stack.enter_async_context(nodes.executors.harness("box", ends[1]))
        link.send(b"for the newer one")
        await newer.wait_links(1)
        assert await newer.ends[0].wait_frames(1) == [b"for the newer one"]
        assert not newer.lost.is_set()


async def test_executor_that_lost_leaves_the_newer_one_in_place(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        inner = await stack.enter_async_context(AsyncExitStack())
        await seated(inner, nodes.executors)
        await seated(stack, nodes.harnesses, "r2")
        await inner.aclose()
        for exchange in (nodes.executors, nodes.harnesses):
            presence = await exchange.presence("box")
            assert presence is not None
            assert presence.registration_id == "r2"


async def test_of_many_that_come_at_once_one_is_left(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        losses = trio.Semaphore(0)
        executors = [PlayedExecutor(losses=losses) for _ in range(10)]
        done = trio.Event()

        async def sit(number: int) -> None:
            exchange = (nodes.executors, nodes.harnesses)[number % 2]
            executor = executors[number]
            async with exchange.executor("box", f"r{number}", executor.accept, executor.replaced):
                await done.wait()

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(sit, number)
            for _ in range(9):
                await losses.acquire()
            (left,) = [number for number in range(10) if not executors[number].lost.is_set()]
            presence = await nodes.harnesses.presence("box")
            assert presence is not None
            assert presence.registration_id == f"r{left}"
            await stack.enter_async_context(nodes.executors.harness("box", PlayedEnd()))
            await executors[left].wait_links(1)
            done.set()


async def test_link_is_congested_while_the_other_end_takes_no_more(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        executor = await seated(stack, nodes.executors)
        link = await stack.enter_async_context(nodes.harnesses.harness("box", PlayedEnd()))
        await executor.wait_links(1)
        assert not link.congested
        executor.ends[0].set_full(True)
        sent = await fill(link)
        with trio.move_on_after(0.1) as waited:
            await link.wait_room()
        assert waited.cancelled_caught
        executor.ends[0].set_full(False)
        await link.wait_room()
        assert not link.congested
        await executor.ends[0].wait_frames(sent)


async def test_waiting_for_room_ends_with_the_link(nodes: Nodes) -> None:
    async with AsyncExitStack() as stack:
        executor = await seated(stack, nodes.executors)
        end = PlayedEnd()
        link = await stack.enter_async_context(nodes.harnesses.harness("box", end))
        await executor.wait_links(1)
        executor.ends[0].set_full(True)
        await fill(link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            executor.links[0].close("enough")
        assert await end.wait_closed() == "enough"


async def test_executor_that_takes_no_link_is_offline(nodes: Nodes) -> None:
    def refuse(link: Link) -> LinkEnd:
        raise Offline("box")

    async with nodes.executors.executor("box", "r1", refuse, lambda: None):
        end = PlayedEnd()
        with pytest.raises(Offline):
            async with nodes.harnesses.harness("box", end):
                raise AssertionError("linked")
        assert end.reasons == []
