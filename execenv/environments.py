"""Environments by name: which there are, which is the default, and each connected when it is first asked for.

async with execenv.open_manager() as manager:
    env = await manager.require()  # the default
    done = await env.run(["make", "test"])

There is no fall-back: an environment that is unknown, disabled or broken is an error, and never this machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import trio
from attrs import Factory, define, frozen

from execenv._service import service
from execenv.config import (
    DISABLED,
    LOCAL,
    Snapshot,
    check_new_id,
    check_snapshot,
    close_to,
    shown,
)
from execenv.environment import Environment
from execenv.errors import (
    ConnectFailed,
    EnvironmentUnavailable,
    ExecenvError,
    UsageError,
)
from execenv.open import open_environment
from execenv.providers import load_snapshot
from execenv.status import fail_fast
from execenv.targets import (
    CommandTarget,
    LocalTarget,
    RelayTarget,
    Target,
    WebsocketTarget,
    check_target,
    is_relay_url,
    parse_relay_url,
)

STATUS_TIMEOUT = 10.0  # environments.md §1.1

State = Literal["pending", "ready", "disconnected"]


@frozen
class EnvironmentStatus:
    """How an environment is.

    Attributes:
        state: `"pending"`: no attempt to connect has ended; `"ready"`: it has just answered;
            `"disconnected"`: the last attempt failed, or the connection is gone.
        error: why it is disconnected.
    """

    state: State
    error: str | None = None


@frozen
class Capabilities:
    """What can be asked of an environment, for a program that offers tools: without these, hide them."""

    can_exec: bool = False
    can_read_files: bool = False
    can_write_files: bool = False
    can_request_http: bool = False


ENABLED = Capabilities(True, True, True, True)
NOTHING = Capabilities()


@asynccontextmanager
async def open_manager(
    snapshot: Snapshot | None = None, *, connect_early: bool = True
) -> AsyncIterator[EnvironmentManager]:
    """Have environments by name. Leaving the block ends all of them, and what was started there.

    Args:
        snapshot: which there are; `None` for what the files and variables of `execenv.providers` say.
        connect_early: begin to connect to websockets and relays as soon as they are known. Commands are never
            started before they are asked for.

    Raises:
        ConfigError: if what they say cannot be used.
        UsageError: if the snapshot contradicts itself.
    """
    source = "the snapshot"
    if snapshot is None:
        loaded = await trio.to_thread.run_sync(load_snapshot)
        snapshot, source = loaded.snapshot, loaded.source
    check_snapshot(snapshot)
    manager = EnvironmentManager(snapshot, source, connect_early)
    async with service(manager._run):
        await manager._running.wait()
        yield manager


class EnvironmentManager:
    """Environments by name. Got from `open_manager`.

    Ids are those of the snapshot, and `local` for this machine if it is included.
    """

    def __init__(self, snapshot: Snapshot, source: str, connect_early: bool) -> None:
        self._default = snapshot.default
        self._source = source
        self._connect_early = connect_early
        self._running = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._entries: dict[str, _Entry] = {}
        if snapshot.include_local:
            self._entries[LOCAL] = _Entry(LOCAL, LocalTarget(), self)
        for id_, target in snapshot.environments:
            self._entries[id_] = _Entry(id_, target, self)

    async def _run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            try:
                for entry in self._entries.values():
                    self._registered(entry)
                self._running.set()
                await trio.sleep_forever()
            finally:
                self._nursery = None  # what ends now may take a while, and nothing begins any more

    def _registered(self, entry: _Entry) -> None:
        if self._connect_early and isinstance(entry.target, WebsocketTarget | RelayTarget):
            entry.begin()

    # Which there are.

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all that are known, in order."""
        return tuple(self._entries)

    def default_environment_id(self) -> str | None:
        """`None` if there is none by default."""
        return self._default

    def default_environment_ids(self) -> tuple[str, ...]:
        """The environments that work begins with: the default, then the others in order.

        None at all where there is no default.
        """
        if self._default is None:
            return ()
        return self._default, *(id_ for id_ in self._entries if id_ != self._default)

    def target(self, id_: str) -> Target | None:
        """How an environment is reached; `None` if it is not known."""
        entry = self._entries.get(id_)
        return None if entry is None else entry.target

    def capabilities(self, id_: str | None = None) -> Capabilities:
        """What can be asked of an environment, or of the default one.

        Nothing, if it is not known or there is no default. Never connects.
        """
        id_ = self._default if id_ is None else id_
        return ENABLED if id_ in self._entries else NOTHING

    async def status(self, id_: str) -> EnvironmentStatus:
        """How an environment is. Asks it where it is connected, but never connects or starts anything.

        Raises:
            EnvironmentUnavailable: if it is not known.
        """
        return await self._entry(id_).status()

    # Using them.

    async def get(self, id_: str) -> Environment | None:
        """An environment; `None` if it is not known.

        The first call connects, and all that come meanwhile wait for that one attempt. Later calls give the
        same environment, which makes a lost connection again when it is used; see `open_environment`. A
        command that has ended stays ended.

        Raises:
            ConnectFailed: if that does not work. The next call tries again, unless the server has refused.
        """
        entry = self._entries.get(id_)
        return None if entry is None else await entry.get()

    async def require(self, id_: str | None = None) -> Environment:
        """An environment, or the default one, as `get` gives it.

        Raises:
            EnvironmentUnavailable: if it is not known, or there is no default.
            ConnectFailed: if it cannot be reached.
        """
        return await self._entry(id_).get()

    async def default_environment(self) -> Environment | None:
        """The default one, as `get` gives it; `None` if there is none.

        Raises:
            ConnectFailed: if it cannot be reached.
        """
        return None if self._default is None else await self.require()

    async def require_local(self) -> Environment:
        """This machine.

        Raises:
            EnvironmentUnavailable: if it is not included.
        """
        return await self.require(LOCAL)

    async def try_local(self) -> Environment | None:
        """This machine; `None` if it is not included."""
        return await self.get(LOCAL)

    def _entry(self, id_: str | None) -> _Entry:
        wanted = self._default if id_ is None else id_
        if wanted is None:
            raise EnvironmentUnavailable(f"there is no default environment, says {self._source}: name one")
        if wanted in self._entries:
            return self._entries[wanted]
        if wanted == LOCAL:
            raise EnvironmentUnavailable(f"this machine is no environment, says {self._source}", LOCAL)
        known = ", ".join(map(shown, self._entries)) or "none"
        raise EnvironmentUnavailable(
            f"unknown environment id {shown(wanted)}, known are {known}{close_to(wanted, self._entries)}",
            wanted,
        )

    # Changing them.

    async def add(self, id_: str, target: str | Sequence[str] | Target) -> None:
        """Register one more. The default stays what it is.

        Args:
            target: a URL, a command, or one of the classes of `execenv.targets`. The URL of a websocket is
                looked at when it is connected to.

        Raises:
            UsageError: if the id is empty, reserved or taken, or the target is this machine or none.
        """
        checked = _checked(id_, target)
        if id_ in self._entries:
            raise UsageError(f"environment {shown(id_)} is there already: replace it, or use another id")
        self._register(id_, checked)
        await trio.lowlevel.checkpoint()

    async def replace(self, id_: str, target: str | Sequence[str] | Target) -> None:
        """Register an environment under an id, whether it is taken or not. The default stays what it is.

        What had the id before is closed, and what runs there has ended when this returns.

        Raises:
            UsageError: if the id is empty or reserved, or the target is this machine or none.
        """
        checked = _checked(id_, target)
        before = self._register(id_, checked)
        if before is None:
            await trio.lowlevel.checkpoint()
        else:
            await before.close()

    async def remove(self, id_: str) -> None:
        """Forget an environment and close it: what runs there ends.

        Raises:
            EnvironmentUnavailable: if it is not known.
            UsageError: if it is `local` or the default.
        """
        entry = self._entry(id_)
        if id_ == LOCAL:
            raise UsageError("this machine cannot be removed")
        if id_ == self._default:
            raise UsageError(f"environment {shown(id_)} is the default and cannot be removed")
        del self._entries[id_]
        await entry.close()

    def _register(self, id_: str, target: Target) -> _Entry | None:
        before = self._entries.get(id_)
        entry = self._entries[id_] = _Entry(id_, target, self)
        if before is not None:
            before.retire()
        self._registered(entry)
        return before


@define(eq=False)
class _Attempt:
    """One attempt to open an environment, and if that worked the time that it is open."""

    done: trio.Event = Factory(trio.Event)
    ended: trio.Event = Factory(trio.Event)
    scope: trio.CancelScope = Factory(trio.CancelScope)
    environment: Environment | None = None
    error: ExecenvError | None = None


class _Entry:
    def __init__(self, id_: str, target: Target, manager: EnvironmentManager) -> None:
        self.target = target
        self._id = id_
        self._manager = manager
        self._attempt: _Attempt | None = None
        self._failed: ExecenvError | None = None  # what the last attempt that ended says
        self._retired = False

    async def get(self) -> Environment:
        if self._manager._nursery is None:
            raise self._gone()
        attempt = self._attempt
        if attempt is None or self._is_over(attempt):
            attempt = self.begin()
        await attempt.done.wait()
        if attempt.environment is not None:
            return attempt.environment
        if attempt.error is None:
            raise self._gone()
        retryable = _may_pass(attempt.error)
        sticky = "" if retryable else "exec-server connection attempt failed: "
        text = f"environment {shown(self._id)}: {sticky}{attempt.error}"
        raise ConnectFailed(text, retryable=retryable) from attempt.error

    def begin(self) -> _Attempt:
        nursery = self._manager._nursery
        if self._retired or nursery is None:
            raise self._gone()
        if self._attempt is not None:
            self._attempt.scope.cancel()
        attempt = self._attempt = _Attempt()
        nursery.start_soon(self._hold, attempt)
        return attempt

    async def status(self) -> EnvironmentStatus:
        await trio.lowlevel.checkpoint()
        environment = None if self._attempt is None else self._attempt.environment
        if environment is not None:
            return await _probe(environment)
        if isinstance(self.target, LocalTarget):
            return EnvironmentStatus("ready")
        if self._failed is None:
            return EnvironmentStatus("pending")
        return EnvironmentStatus("disconnected", str(self._failed))

    def retire(self) -> None:
        """End it, and refuse whoever still comes."""
        self._retired = True
        if self._attempt is not None:
            self._attempt.scope.cancel()

    async def close(self) -> None:
        self.retire()
        if self._attempt is not None:
            await self._attempt.ended.wait()

    def _is_over(self, attempt: _Attempt) -> bool:
        """Whether there is to be another attempt (environments.md §1.10)."""
        if not attempt.done.is_set():
            return False
        # One that was connected makes its connection again by itself, at its next use.
        return attempt.environment is None and (attempt.error is None or _may_pass(attempt.error))

    async def _hold(self, attempt: _Attempt) -> None:
        try:
            with attempt.scope:
                async with _open(self.target) as environment:
                    attempt.environment = environment
                    self._failed = None
                    attempt.done.set()
                    await trio.sleep_forever()
        except ExecenvError as error:
            attempt.error = self._failed = error
        finally:
            attempt.done.set()
            attempt.ended.set()

    def _gone(self) -> EnvironmentUnavailable:
        return EnvironmentUnavailable(
            f"environment {shown(self._id)} was removed or replaced, or its manager is closed", self._id
        )


# How an environment is opened, and what can be seen of its connection: all that depends on that is here.


@asynccontextmanager
async def _open(target: Target) -> AsyncIterator[Environment]:
    async with open_environment(target) as environment:
        yield environment


async def _probe(environment: Environment) -> EnvironmentStatus:
    seen = environment.status
    if seen.state != "connected":
        return EnvironmentStatus("disconnected", str(seen.error or f"it is {seen.state}"))
    try:
        with trio.fail_after(STATUS_TIMEOUT), fail_fast():  # or a lost connection would be made again
            answer = await environment.probe()
    except trio.TooSlowError:
        return EnvironmentStatus("disconnected", f"no answer within {STATUS_TIMEOUT:g} s")
    except ExecenvError as error:
        return EnvironmentStatus("disconnected", str(error))
    if answer != "ready":
        return EnvironmentStatus("disconnected", f"it says that it is {answer!r}")
    return EnvironmentStatus("ready")


def _may_pass(error: ExecenvError) -> bool:
    """Whether trying again may help: not if the server, or the system, has refused for good."""
    return isinstance(error, ConnectFailed) and error.retryable


def _checked(id_: str, target: str | Sequence[str] | Target) -> Target:
    check_new_id(id_)
    if isinstance(target, LocalTarget):
        raise UsageError(f"environment {shown(id_)} cannot be this machine, which is `{LOCAL}`")
    if not isinstance(target, str | WebsocketTarget | CommandTarget | RelayTarget):
        target = CommandTarget(tuple(target))
    if isinstance(target, str):
        url = target.strip()
        target = parse_relay_url(url) if is_relay_url(url) else WebsocketTarget(url)
    check_target(target)
    if not isinstance(target, WebsocketTarget):
        return target
    if not target.url.strip():
        raise UsageError(f"the url of environment {shown(id_)} cannot be empty")
    if target.url.strip().lower() == DISABLED:
        raise UsageError(
            f"environment {shown(id_)} cannot use the url {target.url!r}, which disables environments"
        )
    return target
