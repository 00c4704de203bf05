"""How often, and how many: token buckets, and the table of open sockets. Machine, and bounded."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import TypeAlias

from attrs import frozen

from execenv.relay_service.settings import Settings
from execenv.relay_service.store import Role


class Buckets:
    """For each key so much at once, and so much per second from then on.

    Args:
        most: keys that are remembered; the one that was not seen for longest is forgotten, hence full again.
    """

    def __init__(self, rate: float, burst: float, most: int) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, key: str, now: float) -> float:
        """Take one if there is one; the seconds to wait for it if there is none, else 0."""
        level, when = self._levels.pop(key, (self._burst, now))
        level = min(self._burst, level + max(now - when, 0.0) * self._rate)
        allowed = level >= 1
        self._levels[key] = (level - 1 if allowed else level, now)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)
        return 0.0 if allowed else (1 - level) / self._rate


class TooMany(Exception):
    """There are as many sockets as there may be. `code` says of which kind."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


CloseSocket: TypeAlias = Callable[[int, str], None]
"""Ends a websocket with that code and reason."""


@frozen(eq=False)
class Entry:
    """An open socket.

    Attributes:
        principal: who a harness is.
        probe: asks it for a sign of life, and ends it if none comes.
    """

    role: Role
    environment_id: str
    token_id: str
    close: CloseSocket
    queued: Callable[[], int]
    principal: bytes
    probe: Callable[[], None]


class Table:
    """The open sockets of a node."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._entries: dict[Entry, None] = {}
        self._by_environment: Counter[str] = Counter()
        self._by_token: Counter[str] = Counter()
        self._by_principal: defaultdict[tuple[str, bytes], set[Entry]] = defaultdict(set)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Count a socket. A harness that comes again may have lost the sockets that it has: these are probed,
        so that its session is not held by one that is gone.

        Raises:
            TooMany: if it is one more than there may be.
        """
        settings = self._settings
        if len(self._entries) >= settings.max_sockets:
            raise TooMany("too_many_sockets")
        if entry.role == "harness":
            if self._by_environment[entry.environment_id] >= settings.max_environment_harnesses:
                raise TooMany("too_many_harnesses")
            if self._by_token[entry.token_id] >= settings.max_token_harnesses:
                raise TooMany("too_many_harnesses_of_token")
            self._by_environment[entry.environment_id] += 1
            self._by_token[entry.token_id] += 1
            same = self._by_principal[entry.environment_id, entry.principal]
            for other in same:
                other.probe()
            same.add(entry)
        self._entries[entry] = None

    def remove(self, entry: Entry) -> None:
        del self._entries[entry]
        if entry.role == "harness":
            who = entry.environment_id, entry.principal
            self._by_principal[who].discard(entry)
            if not self._by_principal[who]:
                del self._by_principal[who]
            for counter, key in (
                (self._by_environment, entry.environment_id),
                (self._by_token, entry.token_id),
            ):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
