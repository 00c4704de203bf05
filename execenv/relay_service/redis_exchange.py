"""The exchange of many nodes, which meet in Redis.

Each node has an inbox there, a stream, under an address that is new whenever the node begins or has lost its
inbox. To another node it sends numbered entries (see crossing.py), one at a time, each as full as the load
makes it; an entry whose outcome is unknown is sent again under its number. Nodes that know each other send
empty entries when there is nothing else, so that a loss or a dead node shows soon. Nobody repairs a gap: the
links concerned end, on both sides.

Who is the executor of an environment is a key with a generation, by Redis' own clock: the newest wins, and a
node that was away can't take it back. A presence counts only while its node is alive.
"""

from __future__ import annotations

import secrets
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from logging import getLogger
from typing import TYPE_CHECKING

import trio
from attrs import define, field, frozen

from execenv._service import Wakeup
from execenv.relay_service.crossing import (
    UNCOUNTED,
    Crossing,
    Entry,
    Kind,
    Message,
    NearExecutor,
    NearHarness,
    pack_count,
    pack_entry,
    pack_message,
    unpack_count,
)
from execenv.relay_service.exchange import Accept, Exchange, ExecutorPresence, Link, LinkEnd, Offline
from execenv.relay_service.exchange_local import EXECUTOR_GONE, HARNESS_GONE, REPLACED, LocalExchange, Seat
from execenv.relay_service.store import StoreUnavailable

if TYPE_CHECKING:
    from execenv.relay_service.redis_wire import Wire

logger = getLogger(__name__)

MAX_ENTRY = 128 * 1024
"""Bytes that an entry is filled to. A frame that is longer goes alone."""

MAX_INBOX = 100_000
"""Entries that Redis keeps for a node; windows are far smaller. What is dropped shows as a gap."""

_READ_AT_ONCE = 4
_ANNOUNCE_AT_ONCE = 256
_LOOKS = 4
_LOOK_AGAIN = 0.05

_CLAIM = """
local old = redis.call('HMGET', KEYS[1], 'generation', 'address')
local now = redis.call('TIME')
local generation = now[1] * 1000000 + now[2]
if old[1] and tonumber(old[1]) >= generation then
    generation = tonumber(old[1]) + 1
end
generation = string.format('%.0f', generation)
redis.call('HSET', KEYS[1], 'generation', generation, 'claim', ARGV[1], 'address', ARGV[2],
    'registration', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {generation, old[2] or ''}
"""

_ANNOUNCE = """
local lost = {}
for i, key in ipairs(KEYS) do
    local generation, claim, registration = ARGV[3 * i], ARGV[3 * i + 1], ARGV[3 * i + 2]
    local old = tonumber(redis.call('HGET', key, 'generation') or '0')
    if old > tonumber(generation) then
        lost[#lost + 1] = i
    else
        redis.call('HSET', key, 'generation', generation, 'claim', claim, 'address', ARGV[1],
            'registration', registration)
        redis.call('PEXPIRE', key, ARGV[2])
    end
end
return lost
"""

_RELEASE = "if redis.call('HGET', KEYS[1], 'claim') == ARGV[1] then redis.call('DEL', KEYS[1]) end"

_LOOK = """
local found = redis.call('HMGET', KEYS[1], 'registration', 'address')
if found[1] and redis.call('EXISTS', ARGV[1] .. found[2] .. ':alive') == 1 then
    return found
end
return false
"""

_BEGIN = """
redis.call('XADD', KEYS[1], '0-1', 'd', '')
redis.call('XDEL', KEYS[1], '0-1')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], '', 'PX', ARGV[2])
"""

_REMAIN = """
redis.call('SET', KEYS[2], '', 'PX', ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""


@frozen
class Timing:
    """How long a node takes things to be as they were. All in seconds.

    Attributes:
        reply: for Redis to answer.
        refresh: between signs of life.
        alive: without a sign of life, a node counts as dead.
        outage: that links over nodes wait for Redis.
        presence: that Redis remembers an executor without being told again.
        opening: for another node to take a link.
        goodbye: for what is left to send at the end.
    """

    reply: float = 3.0
    refresh: float = 3.0
    alive: float = 10.0
    outage: float = 15.0
    presence: float = 60.0
    opening: float = 5.0
    goodbye: float = 1.0


DEFAULT_TIMING = Timing()


@define(eq=False)
class _Claim:
    """An executor of this node, as the others know it."""

    generation: int
    claim_id: str
    seat: Seat


@define(eq=False)
class _Claiming:
    """One that is about to be.

    Attributes:
        lost_to: the newest generation elsewhere that was heard of in the meantime.
    """

    environment_id: str
    lost_to: int = 0


class RedisExchange(Exchange):
    """The sockets of this node, and through Redis those of all others.

    Args:
        node_id: what this node is called. Two that are called the same do no harm.
        commands, reads: two connections: reading waits.
        prefix: what every key begins with.
        nursery: for its tasks.
    """

    def __init__(
        self, node_id: str, commands: Wire, reads: Wire, prefix: str, timing: Timing, nursery: trio.Nursery
    ) -> None:
        self._node_id = node_id
        self._commands = commands
        self._reads = reads
        self._prefix = prefix
        self._timing = timing
        self._nursery = nursery
        self._local = LocalExchange(node_id)
        self._claims: dict[str, _Claim] = {}
        self._claiming: set[_Claiming] = set()
        self._peers: dict[str, _Peer] = {}
        self._outward: defaultdict[str, set[Crossing]] = defaultdict(set)  # of harnesses here, by environment
        self._links = 0
        self._trimmed = Wakeup()
        self._begin()
        self._read_until = "0-0"
        self._read_at = trio.current_time()
        self._reading_since = trio.current_time()

    def _begin(self) -> None:
        self.address = f"{self._node_id}.{secrets.token_hex(8)}"
        self._read_until = "0-0"

    # What sockets ask.

    async def presence(self, environment_id: str) -> ExecutorPresence | None:
        here = await self._local.presence(environment_id)
        if here is not None:
            await trio.lowlevel.checkpoint()
            return here
        found = await self._look(environment_id)
        if found is None or found[1] == self.address:
            return None
        return ExecutorPresence(found[0], found[1].rpartition(".")[0])

    def _check_hearing(self) -> None:
        if self._deaf():
            raise StoreUnavailable("Redis: this node does not hear the others yet")

    def _deaf(self) -> bool:
        return trio.current_time() - self._read_at > self._timing.outage

    async def _look(self, environment_id: str) -> tuple[str, str] | None:
        """The registration of the executor, and its node's address."""
        found = await self._commands.call(
            b"EVAL", _LOOK, 1, self._presence_key(environment_id), f"{self._prefix}node:"
        )
        return (found[0].decode(), found[1].decode()) if found else None

    @asynccontextmanager
    async def executor(
        self,
        environment_id: str,
        registration_id: str,
        accept: Accept,
        replaced: Callable[[], None],
    ) -> AsyncIterator[None]:
        self._check_hearing()
        claim_id = secrets.token_hex(16)
        claiming = _Claiming(environment_id)
        self._claiming.add(claiming)
        seat = Seat(environment_id, registration_id, accept, replaced)
        try:
            generation, older = await self._commands.call(
                b"EVAL",
                _CLAIM,
                1,
                self._presence_key(environment_id),
                claim_id,
                self.address,
                registration_id,
                _milliseconds(self._timing.presence),
            )
        except BaseException:
            self._release(environment_id, claim_id)  # it may have been done
            raise
        finally:
            self._claiming.discard(claiming)
        claim = _Claim(int(generation), claim_id, seat)
        if older not in (b"", self.address.encode()):
            payload = pack_count(claim.generation) + environment_id.encode()
            self._peer(older.decode()).put(pack_message(Kind.REPLACED, False, 0, payload))
        self._sit(environment_id, claim, claiming.lost_to)
        try:
            yield
        finally:
            self._local.leave_seat(seat, EXECUTOR_GONE)
            if self._claims.get(environment_id) is claim:
                del self._claims[environment_id]
                self._release(environment_id, claim_id)

    def _sit(self, environment_id: str, claim: _Claim, newest: int) -> None:
        other = self._claims.get(environment_id)
        if max(newest, 0 if other is None else other.generation) > claim.generation:
            claim.seat.lose()  # what is newer was known here first: nothing orders two replies, or two nodes
            return
        self._claims[environment_id] = claim
        self._local.take_seat(claim.seat)
        # The one elsewhere that harnesses here were tied to is not it any more. Its node would say so; but it
        # may be here because that one has died, which is noticed only by its silence.
        for crossing in tuple(self._outward.get(environment_id, ())):
            crossing.cut_and_tell(REPLACED)

    def _release(self, environment_id: str, claim_id: str) -> None:
        async def release() -> None:
            with suppress(StoreUnavailable):  # then it runs out by itself
                await self._commands.call(b"EVAL", _RELEASE, 1, self._presence_key(environment_id), claim_id)

        self._nursery.start_soon(release)

    def _lose(self, environment_id: str, generation: int) -> None:
        for claiming in self._claiming:
            if claiming.environment_id == environment_id:
                claiming.lost_to = max(claiming.lost_to, generation)
        claim = self._claims.get(environment_id)
        if claim is not None and claim.generation < generation:
            del self._claims[environment_id]
            self._local.lose_seat(claim.seat)

    @asynccontextmanager
    async def harness(self, environment_id: str, end: LinkEnd) -> AsyncIterator[Link]:
        await trio.lowlevel.checkpoint()
        if self._local.seat(environment_id) is not None:
            async with self._local.harness(environment_id, end) as link:
                yield link
            return
        crossing = await self._cross(environment_id, end)
        self._outward[environment_id].add(crossing)
        try:
            yield crossing
        finally:
            self._outward[environment_id].discard(crossing)
            if not self._outward[environment_id]:
                del self._outward[environment_id]
            crossing.close(HARNESS_GONE)

    async def _cross(self, environment_id: str, end: LinkEnd) -> Crossing:
        self._check_hearing()
        for look in range(_LOOKS):
            if look:
                # It was refused there, as an executor that comes or goes is not known everywhere at once.
                await trio.sleep(_LOOK_AGAIN)
            found = await self._look(environment_id)
            if found is None:
                raise Offline(environment_id)
            if found[1] != self.address:
                crossing = await self._open(self._peer(found[1]), environment_id, end)
                if crossing is not None:
                    return crossing
        raise Offline(environment_id)

    async def _open(self, peer: _Peer, environment_id: str, end: LinkEnd) -> Crossing | None:
        self._links += 1
        crossing = self._crossing(peer, self._links, NearHarness(end))
        crossing.tell(Kind.OPEN, environment_id.encode())
        try:
            with trio.move_on_after(self._timing.opening) as limit:
                await crossing.answered.wait()
        except BaseException:
            crossing.close(HARNESS_GONE)
            raise
        if limit.cancelled_caught and not crossing.answered.is_set():
            crossing.close(HARNESS_GONE)
            raise StoreUnavailable(f"the node of environment {environment_id} does not answer")
        return crossing if crossing.accepted else None

    def _crossing(self, peer: _Peer, number: int, harness: NearHarness | None) -> Crossing:
        links = peer.executors if harness is None else peer.harnesses

        def forget(crossing: Crossing) -> None:
            if links.get(number) is crossing:
                del links[number]

        crossing = Crossing(number, harness is not None, peer.put, self._spawn, forget, harness)
        links[number] = crossing
        return crossing

    def _spawn(self, run: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(run)

    # Other nodes.

    def _peer(self, address: str, answers: int = 0) -> _Peer:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address, trio.current_time(), answers)
            self._nursery.start_soon(self._write, peer)
        return peer

    def _drop(self, peer: _Peer, reason: str) -> None:
        """Its links end, and what is known of it is forgotten."""
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
        peer.scope.cancel()
        if peer.links():
            logger.info("%d links to node %s end: %s", len(peer.links()), peer.address, reason)
        for crossing in peer.links():
            crossing.cut(reason)

    async def _write(self, peer: _Peer) -> None:
        """All that goes to a node."""
        with peer.scope:
            while True:
                await peer.filled.wait()
                while peer.queue or peer.beat:
                    peer.beat = False
                    body = peer.take(MAX_ENTRY)
                    data = pack_entry(self.address, peer.session, peer.answers, peer.next_number, body)
                    there = await self._send(peer, data)
                    peer.next_number += 1
                    if not there:
                        self._drop(peer, "the node at the other end is gone")
                    if not peer.queue:
                        peer.emptied.set()

    async def _send(self, peer: _Peer, data: bytes) -> bool:
        """Send an entry, again and again if need be; whether there is such a node."""
        while True:
            try:
                done = await self._add(peer.address, data)
            except StoreUnavailable as error:
                if peer.stuck_since is None:
                    logger.info("node %s waits to send to %s: %s", self.address, peer.address, error)
                    peer.stuck_since = trio.current_time()
                await trio.sleep(_LOOK_AGAIN)
                with trio.move_on_after(self._timing.refresh):
                    await self._commands.wait_up()
            else:
                peer.stuck_since = None
                return done

    async def _add(self, address: str, data: bytes) -> bool:
        inbox = self._inbox_key(address)
        done = await self._commands.call(
            b"XADD", inbox, b"NOMKSTREAM", b"MAXLEN", b"~", MAX_INBOX, b"*", b"d", data, urgent=True
        )
        return done is not None

    async def read(self) -> None:
        """Take what others send, for as long as it is not cancelled."""
        waits = max(self._timing.refresh / 3, 0.01)
        while True:
            address = self.address
            try:
                found = await self._reads.call(
                    b"XREAD",
                    b"COUNT",
                    _READ_AT_ONCE,
                    b"BLOCK",
                    _milliseconds(waits),
                    b"STREAMS",
                    self._inbox_key(address),
                    self._read_until,
                    patience=waits,
                )
            except StoreUnavailable:
                await trio.sleep(_LOOK_AGAIN)
                await self._reads.wait_up()
                self._reading_since = trio.current_time()  # silence until now was nobody's fault
                continue
            self._read_at = trio.current_time()
            for entries in (found or {}).values():
                for entry_id, fields in entries:
                    if self.address != address:
                        break
                    self._read_until = entry_id.decode()
                    self._trimmed.set()
                    try:
                        entry = Entry.unpack(fields[1])
                    except ValueError as error:  # if it was one of ours, it is missed by its number
                        logger.warning("an entry for node %s cannot be read: %s", address, error)
                    else:
                        self._receive(entry)
                    await trio.lowlevel.checkpoint()  # others have their turn between two entries

    async def trim(self) -> None:
        """Remove from the inbox what was taken, for as long as it is not cancelled."""
        while True:
            await self._trimmed.wait()
            inbox = self._inbox_key(self.address)
            milliseconds, _, count = self._read_until.partition("-")
            with suppress(StoreUnavailable):  # the next one does it
                await self._commands.call(
                    b"XTRIM", inbox, b"MINID", f"{milliseconds}-{int(count) + 1}", urgent=True
                )

    def _receive(self, entry: Entry) -> None:
        peer = self._peers.get(entry.sender)
        if entry.number == UNCOUNTED:
            for message in entry.messages:
                if peer is not None and message.number == peer.session:
                    self._drop(peer, "something that was sent to the other end is lost")
            return
        if (
            peer is not None
            and entry.session != peer.their_session
            and entry.answers not in (0, peer.session)
        ):
            return  # it answers what we have given up since; what we sent last will tell them
        if entry.number == 0 and (peer is None or peer.their_session not in (None, entry.session)):
            if peer is not None:
                self._drop(peer, "the node at the other end has lost track of its links")
            peer = self._peer(entry.sender, entry.session)
        if peer is not None and peer.their_session is None and entry.number == 0:
            peer.their_session = entry.session
        if peer is None or entry.session != peer.their_session:
            self._nursery.start_soon(self._disown, entry)  # what was dropped, or begins with a gap
            return
        if entry.number > peer.expected:
            self._drop(peer, "something that the other end has sent is lost")
            self._nursery.start_soon(self._disown, entry)
            return
        peer.heard_at = trio.current_time()
        if entry.number == peer.expected:  # less: it was sent twice
            peer.expected += 1
            for message in entry.messages:
                self._handle(peer, message)

    async def _disown(self, entry: Entry) -> None:
        """Tell a node that what it sends is of no use any more."""
        body = pack_message(Kind.FORGOTTEN, False, entry.session)
        with suppress(StoreUnavailable):  # its next entry brings us here again
            await self._add(entry.sender, pack_entry(self.address, 0, 0, UNCOUNTED, body))

    def _handle(self, peer: _Peer, message: Message) -> None:
        if message.kind is Kind.OPEN:
            self._accept(peer, message.number, message.payload.decode())
            return
        if message.kind is Kind.REPLACED:
            self._lose(message.payload[8:].decode(), unpack_count(message.payload))
            return
        if message.kind is Kind.LEAVING:
            self._drop(peer, "the node at the other end is shutting down")
            return
        # A message from a harness is for an executor's end, and the other way round.
        crossing = (peer.executors if message.from_harness else peer.harnesses).get(message.number)
        if crossing is None:
            return
        match message.kind:
            case Kind.FRAME:
                crossing.take(message.payload)
            case Kind.CREDIT:
                crossing.credit(unpack_count(message.payload))
            case Kind.OPENED:
                crossing.accept()
            case Kind.REFUSED:
                crossing.cut("refused")
            case Kind.CLOSE:
                crossing.cut(message.payload.decode())

    def _accept(self, peer: _Peer, number: int, environment_id: str) -> None:
        crossing = self._crossing(peer, number, None)
        try:
            crossing.near = NearExecutor(self._local.connect(environment_id, crossing))
        except Offline:
            crossing.tell(Kind.REFUSED)
            crossing.cut("refused")
        else:
            crossing.accept()
            crossing.tell(Kind.OPENED)

    # Signs of life.

    async def begin(self) -> None:
        """Be known to the others.

        Raises:
            StoreUnavailable: if that is not possible now.
        """
        await self._commands.call(b"EVAL", _BEGIN, 2, *self._node_keys(), *self._lives())

    async def remain(self) -> None:
        """Give signs of life and look for those of others, for as long as it is not cancelled."""
        announced = trio.current_time()
        while True:
            with trio.move_on_after(self._timing.refresh):
                await self._commands.wait_down()
                await self._commands.wait_up()
            try:
                remains = await self._commands.call(
                    b"EVAL", _REMAIN, 2, *self._node_keys(), *self._lives(), urgent=True
                )
                if not remains:
                    self._begin_again()
                    await self.begin()
                if not remains or trio.current_time() - announced >= self._timing.presence / 3:
                    await self._announce()
                    announced = trio.current_time()
            except StoreUnavailable:
                continue
            for peer in self._peers.values():
                peer.beat = True
                peer.filled.set()

    def _begin_again(self) -> None:
        """Our inbox is gone, so nobody knows what it held: all links to others end."""
        logger.warning("Redis has lost the inbox of node %s: its links to other nodes end", self.address)
        for peer in tuple(self._peers.values()):
            self._drop(peer, "Redis has lost what was on the way")
        self._begin()

    async def _announce(self) -> None:
        """Tell all our executors again; those that have lost in the meantime are told."""
        claims = list(self._claims.items())
        for start in range(0, len(claims), _ANNOUNCE_AT_ONCE):
            some = claims[start : start + _ANNOUNCE_AT_ONCE]
            told: list[str | int] = []
            for _, claim in some:
                told += (str(claim.generation), claim.claim_id, claim.seat.registration_id)
            lost = await self._commands.call(
                b"EVAL",
                _ANNOUNCE,
                len(some),
                *(self._presence_key(environment_id) for environment_id, _ in some),
                self.address,
                _milliseconds(self._timing.presence),
                *told,
            )
            for place in lost:
                environment_id, claim = some[place - 1]
                self._lose(environment_id, claim.generation + 1)

    async def watch(self) -> None:
        """End links that nothing comes through any more, for as long as it is not cancelled."""
        timing = self._timing
        while True:
            await trio.sleep(min(timing.alive, timing.outage) / 20)
            now = trio.current_time()
            deaf = self._deaf()
            for peer in tuple(self._peers.values()):
                stuck = peer.stuck_since is not None and now - peer.stuck_since > timing.outage
                if deaf or stuck:
                    self._drop(peer, "what is between the nodes of this relay cannot be reached")
                elif self._read_at - max(peer.heard_at, self._reading_since) > timing.alive:
                    for crossing in peer.links():
                        crossing.cut_and_tell("the node at the other end gives no sign of life")

    async def leave(self) -> None:
        """Tell the others, and send what is left; within `goodbye`."""
        with trio.move_on_after(self._timing.goodbye), suppress(StoreUnavailable):
            for peer in tuple(self._peers.values()):
                peer.put(pack_message(Kind.LEAVING, False, 0))
                peer.emptied = trio.Event()
            for peer in tuple(self._peers.values()):
                await peer.emptied.wait()
            await self._commands.call(b"DEL", *self._node_keys())

    # Keys.

    def _presence_key(self, environment_id: str) -> str:
        return f"{self._prefix}env:{environment_id}:executor"

    def _inbox_key(self, address: str) -> str:
        return f"{self._prefix}node:{address}:inbox"

    def _node_keys(self) -> tuple[str, str]:
        return self._inbox_key(self.address), f"{self._prefix}node:{self.address}:alive"

    def _lives(self) -> tuple[int, int]:
        # The inbox outlives an outage, as links do; and a node that comes back in time has lost nothing.
        return _milliseconds(2 * max(self._timing.outage, self._timing.alive)), _milliseconds(
            self._timing.alive
        )


@define(eq=False)
class _Peer:
    """Another node, and the links to it.

    Attributes:
        harnesses: links of our harnesses to its executors; executors: the other way round.
        heard_at: when it last sent something.
        stuck_since: when sending to it first failed, if it still does.
    """

    address: str
    heard_at: float
    answers: int
    session: int = field(factory=lambda: secrets.randbelow((1 << 64) - 1) + 1)
    next_number: int = 0
    their_session: int | None = None
    expected: int = 0
    harnesses: dict[int, Crossing] = field(factory=dict)
    executors: dict[int, Crossing] = field(factory=dict)
    queue: deque[bytes] = field(factory=deque)
    beat: bool = False
    filled: Wakeup = field(factory=Wakeup)
    emptied: trio.Event = field(factory=trio.Event)
    stuck_since: float | None = None
    scope: trio.CancelScope = field(factory=trio.CancelScope)

    def put(self, message: bytes) -> None:
        self.queue.append(message)
        self.filled.set()

    def take(self, limit: int) -> bytes:
        """What fits into an entry, or one message that is too long."""
        taken: list[bytes] = []
        size = 0
        while self.queue and (not taken or size + len(self.queue[0]) <= limit):
            taken.append(self.queue.popleft())
            size += len(taken[-1])
        return b"".join(taken)

    def links(self) -> list[Crossing]:
        return [*self.harnesses.values(), *self.executors.values()]


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))
