"""Warm processes inside bubblewrap that do the file calls of sandboxes (sandbox.md §4, §11.2).

One is kept for each plan that was used lately, and some more while many calls want the same. Each does one
call after the other. It runs none of its clients' code, so calls with the same plan may share it; calls with
different plans never do. Whatever is not as it should be (a cancelled call, an answer cut short) ends it, and
nothing is ever done outside instead.
"""

from __future__ import annotations

import array
import importlib.util
import json
import marshal
import os
import signal
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from logging import getLogger
from typing import Any

import trio
from attrs import define, evolve, field

from execenv.errors import InternalError, os_error_text
from execenv.local.bubblewrap import Bubblewraps
from execenv.local.file_helper import FRAME, path_to_text
from execenv.local.launch import Launched, Launcher
from execenv.local.spawn import close_all, interpreter
from execenv.local.tree import signal_tree
from execenv.sandbox.plan import Link, Mask, MountPlan, with_parents
from execenv.sandbox.seccomp import compile_filter

logger = getLogger(__name__)

HELPERS_PER_PLAN = 4
PLANS = 8
"""So many plans have helpers at a time; more while all of them are in use."""

AT_WORK = 64
"""So many are at work at a time, whatever the plans; other calls wait."""

IDLE_SECONDS = 60.0
MAX_REQUESTS = 10_000
ATTEMPTS = HELPERS_PER_PLAN + 2
"""Helpers that may turn out to be dead before one hears of a request."""

START_PATIENCE = 20.0
KILL_PATIENCE = 5.0
MAX_HEADER = 64 * 1024
MAX_BODY = 1024 * 1024 * 1024
STDERR_TAIL = 4096
PIECE = 1024 * 1024
READ_SIZE = 64 * 1024

VIEW = b"/.view"
"""Where the plan's view is, in a root that has nothing else but what runs the helper."""

HELPER_MODULES = (
    "execenv.local.stat",
    "execenv.local.turn",
    "execenv.local.disk",
    "execenv.sandbox.landlock",
    "execenv.local.file_helper",
)
"""What the helper consists of, each behind those that it imports."""

SYSTEM_LIBRARIES = (
    b"/lib",
    b"/lib32",
    b"/lib64",
    b"/usr/lib",
    b"/usr/lib32",
    b"/usr/lib64",
    b"/etc/ld.so.cache",
    b"/nix/store",
    b"/gnu/store",
)
KEPT_VARIABLES = frozenset({"PATH", "TMPDIR", "TMP", "TEMP"})
KEPT_BY_SYSTEM = {"darwin": frozenset({"__CF_USER_TEXT_ENCODING"})}

_BOOT = """
import marshal, os, sys
kind = type(sys)
def module(name):
    if name not in sys.modules:
        sys.modules[name] = kind(name)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(module(parent), leaf, sys.modules[name])
    return sys.modules[name]
bundle = os.pread({bundle}, {size}, 0)
os.close({bundle})
for name, code in marshal.loads(bundle):
    exec(code, module(name).__dict__)
del bundle
sys.modules[name].main({channel})
"""


def helper_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The variables of a helper: nothing that may be a secret (sandbox.md §4.4)."""
    kept = KEPT_VARIABLES | KEPT_BY_SYSTEM.get(sys.platform, frozenset())
    return {name: value for name, value in ours.items() if name in kept}


@cache
def runtime_mounts() -> tuple[bytes, ...]:
    """Options of bubblewrap for what a Python needs to start."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    wanted = [os.fsencode(os.path.join(prefix, name)) for prefix in prefixes for name in ("lib", "lib64")]
    wanted += SYSTEM_LIBRARIES
    # Some have their library built for them elsewhere, which the directory of the executable leads to.
    wanted.append(os.fsencode(interpreter()))
    options: list[bytes] = []
    for path in dict.fromkeys(wanted):
        if os.path.exists(path):
            options += [b"--ro-bind", path, path]
    return tuple(options)


@cache
def compiled_helper() -> bytes:
    """The code of the helper, for an interpreter of this very version."""
    return marshal.dumps([(name, _code_of(name)) for name in HELPER_MODULES])


def _code_of(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    get_code = getattr(None if spec is None else spec.loader, "get_code", None)  # InspectLoader
    code = None if get_code is None else get_code(name)
    if code is None:
        raise InternalError(f"the code of {name} is not to be had, so no sandbox can be set up for files")
    return code


def open_bundle() -> int:
    """A descriptor of `compiled_helper()` that nobody can change."""
    import fcntl

    fd = os.memfd_create("helper", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(compiled_helper())
        while left:
            left = left[os.write(fd, left) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def mounted_for_files(plan: MountPlan) -> MountPlan:
    """The same without what would leave mount points behind on the host, which a helper refuses by name."""
    operations = (one for one in plan.operations if not (isinstance(one, Mask) and one.missing))
    return evolve(plan, operations=tuple(operations))


def setup_of(plan: MountPlan) -> dict[str, Any]:
    """What the helper of a plan is told at its start."""
    roots = set(plan.writable_roots)
    operations = [
        operation
        for operation in mounted_for_files(plan).operations
        if not isinstance(operation, Link) and operation.path != b"/"
    ]
    inside = {os.path.dirname(operation.path) for operation in operations}
    kept = [
        operation
        for operation in operations
        if (isinstance(operation, Mask) or not operation.writable) and _is_below_any(operation.path, roots)
    ]
    pinned = set()
    for path in inside:  # all between a mount and the root that it is in
        while path not in pinned and _is_below_any(path, roots):
            pinned.add(path)
            path = os.path.dirname(path)
    return {
        "view": path_to_text(VIEW),
        "writable": [path_to_text(path) for path in (*plan.writable_roots, b"/dev")],
        "forbidden": [(one.device, one.inode, path_to_text(one.name), one.denied) for one in plan.forbidden],
        "pinned": [path_to_text(path) for path in sorted(pinned)],
        "mounted": [(path_to_text(one.path), isinstance(one, Mask)) for one in kept],
    }


class HelperNotStarted(InternalError):
    """There is no helper, perhaps since its plan was not true any more; the request was not sent."""


def _is_below_any(path: bytes, roots: set[bytes]) -> bool:
    return path != b"/" and not roots.isdisjoint(with_parents(os.path.dirname(path)))


class _NotSent(Exception):
    """The helper had ended before it heard anything of the request."""


@define
class Reply:
    """What a helper answered. Whoever takes `fd` closes it."""

    header: dict[str, Any]
    body: bytes
    fd: int | None


@define(eq=False)
class Helper:
    """One process, for one request at a time."""

    launched: Launched
    channel: socket.socket
    stderr: int
    requests: int = field(default=0, init=False)
    idle_since: float = field(default=0.0, init=False)
    _tail: bytes = field(default=b"", init=False)

    @property
    def ended(self) -> bool:
        """Whether it is of no more use, as far as one can see."""
        if self.launched.poll() is not None:
            return True
        try:
            self.channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True  # the end, or a word that nobody asked for

    async def call(self, header: dict[str, Any], body: bytes = b"") -> Reply:
        """Ask one thing. If that fails in any way, this helper must be ended.

        Raises:
            InternalError: the answer did not come, or is none.
        """
        self.requests += 1
        await self._send({"id": self.requests, **header}, body)
        return await self._receive(self.requests)

    async def setup(self, header: dict[str, Any]) -> None:
        """Send it into its view; returns when it is there."""
        await self._send(header, b"")
        await self._receive(None)

    async def _send(self, header: dict[str, Any], body: bytes) -> None:
        encoded = marshal.dumps(header)
        message = FRAME.pack(len(encoded), len(body)) + encoded
        sent = False
        try:
            for part in (message, body):
                left = memoryview(part)
                while left:
                    try:
                        left = left[self.channel.send(left[:PIECE], socket.MSG_NOSIGNAL) :]
                        sent = True
                        if left:  # a helper that keeps up leaves no time for others
                            await trio.lowlevel.checkpoint()
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self.channel)
        except OSError:
            if not sent:
                raise _NotSent from None
            raise await self._failed() from None

    async def _receive(self, request: int | None) -> Reply:
        fds: list[int] = []
        try:
            parts: list[bytes] = []
            received, wanted = 0, FRAME.size
            head = b""
            header_size = 0
            while received < wanted:
                await trio.lowlevel.wait_readable(self.channel)
                try:
                    data = self._receive_now(fds, max(READ_SIZE, min(wanted - received, 4 * PIECE)))
                except BlockingIOError:
                    continue
                if not data:
                    raise await self._failed()
                parts.append(data)
                received += len(data)
                if wanted == FRAME.size and received >= wanted:
                    head = b"".join(parts)
                    header_size, body_size = FRAME.unpack_from(head)
                    if header_size > MAX_HEADER or body_size > MAX_BODY:
                        raise undecodable("it is too large")
                    wanted += header_size + body_size
            data = b"".join(parts)
            if received > wanted or len(fds) > 1:
                raise undecodable("there is more than was asked for")
            end = FRAME.size + header_size
            try:
                header = json.loads(data[FRAME.size : end])
            except ValueError as error:
                raise undecodable(str(error)) from None
            if not isinstance(header, dict) or header.get("id") != request:
                raise undecodable("it is the answer to something else")
            reply = Reply(header, data[end:], fds.pop() if fds else None)
        except OSError:
            raise await self._failed() from None
        finally:
            for fd in fds:
                os.close(fd)
        return reply

    def _receive_now(self, fds: list[int], size: int) -> bytes:
        data, ancillary, _, _ = self.channel.recvmsg(
            size, socket.CMSG_SPACE(4 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, rights in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(rights[: len(rights) - len(rights) % found.itemsize])
                fds += found
        return data

    async def _failed(self) -> InternalError:
        """Why it ended, as the reference words it (sandbox.md §4.3)."""
        code = None
        with trio.move_on_after(1.0):
            while (code := self.launched.poll()) is None:  # noqa: ASYNC110 - or it has only closed its socket
                await trio.sleep(0.002)
        status = "unknown" if code is None else f"exit status: {code}"
        return InternalError(f"fs sandbox helper failed with status {status}: {self.said()}".rstrip(": "))

    def said(self) -> str:
        """The end of what it wrote to its stderr."""
        self._tail = read_tail(self.stderr, self._tail)
        return self._tail.decode(errors="replace").strip()

    async def end(self, known: set[int]) -> None:
        """Kill it and all that it may have started, and wait until they are gone. Not to be cancelled."""
        with trio.CancelScope(shield=True):
            trio.lowlevel.notify_closing(self.channel)
            self.channel.close()
            os.close(self.stderr)
            try:
                root = self.launched.root
                if self.launched.poll() is not None:
                    root = root.reaped()
                receipt = await signal_tree(root, known).finish(KILL_PATIENCE)
                for survivor in receipt.survivors:
                    logger.warning("pid %d could not be ended: %s", survivor.pid, survivor.reason)
            except OSError as error:
                logger.warning("a helper for sandboxed files could not be looked after: %s", error)
                with suppress(ProcessLookupError):
                    os.kill(self.launched.pid, signal.SIGKILL)
            with trio.move_on_after(KILL_PATIENCE):
                while self.launched.poll() is None:  # noqa: ASYNC110 - the kernel is a moment behind it
                    await trio.sleep(0.002)
            known.discard(self.launched.pid)
            self.launched.close()


def read_tail(fd: int, before: bytes = b"") -> bytes:
    """What is in a pipe now, behind what was there before; only the end of it."""
    with suppress(OSError):
        while data := os.read(fd, PIECE):
            before = (before + data)[-STDERR_TAIL:]
    return before


def undecodable(reason: str) -> InternalError:
    """For an answer that is none, as the reference words it."""
    return InternalError(f"failed to encode or decode fs sandbox helper message: {reason}")


@define(eq=False)
class _Pool:
    """The helpers of one plan. The last one used is used next, so that the others become idle."""

    places: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(HELPERS_PER_PLAN))
    idle: list[Helper] = field(factory=list)

    @property
    def in_use(self) -> bool:
        return bool(self.places.borrowed_tokens)


class Helpers:
    """All helpers of a server, none at first.

    Args:
        nursery: where idle ones are ended. `aclose` ends them all, behind it.
        known: see `Guard`.
        ours: the environment of which helpers get a few variables.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        launcher: Launcher,
        bubblewraps: Bubblewraps,
        known: set[int],
        ours: Mapping[str, str],
    ) -> None:
        self._nursery = nursery
        self._launcher = launcher
        self._bubblewraps = bubblewraps
        self._known = known
        self._ours = ours
        self._pools: OrderedDict[MountPlan, _Pool] = OrderedDict()
        self._bundle: int | None = None
        self._watching = False
        self._places = trio.CapacityLimiter(AT_WORK)
        self._calls: set[trio.CancelScope] = set()
        self._call_ended = trio.lowlevel.ParkingLot()
        self.closed = False

    async def call(self, plan: MountPlan, header: dict[str, Any], body: bytes = b"") -> Reply:
        """Have a request done by a helper of this plan.

        A helper whose call is cancelled is killed; what it was at may be done, or a part of it.

        Raises:
            InternalError: there is no helper, or it failed, or all of them were ended meanwhile.
        """
        if not self.closed:
            with trio.CancelScope() as scope:
                self._calls.add(scope)
                try:
                    return await self._call(plan, header, body)
                finally:
                    self._calls.discard(scope)
                    self._call_ended.unpark_all()
        raise InternalError("the environment is closed")

    async def _call(self, plan: MountPlan, header: dict[str, Any], body: bytes) -> Reply:
        pool = self._pools.get(plan)
        if pool is None:
            pool = self._pools[plan] = _Pool()
        self._pools.move_to_end(plan)
        try:
            async with pool.places, self._places:
                for _ in range(ATTEMPTS):
                    helper = self._idle_one(pool) or await self._start(plan)
                    try:
                        reply = await helper.call(header, body)
                    except _NotSent:
                        await helper.end(self._known)
                        continue
                    except BaseException:
                        await helper.end(self._known)
                        raise
                    self._give_back(plan, pool, helper)
                    return reply
                raise InternalError("fs sandbox helpers end before they hear of their first request")
        finally:
            if not pool.idle and not pool.in_use and self._pools.get(plan) is pool:
                del self._pools[plan]
            if len(self._pools) > PLANS:
                self._forget_oldest()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the helpers that wait for work."""
        return tuple(helper.launched.pid for pool in self._pools.values() for helper in pool.idle)

    def _idle_one(self, pool: _Pool) -> Helper | None:
        while pool.idle:
            helper = pool.idle.pop()
            if not helper.ended:
                return helper
            self._end_soon(helper)
        return None

    def _give_back(self, plan: MountPlan, pool: _Pool, helper: Helper) -> None:
        if helper.requests >= MAX_REQUESTS or self.closed or self._pools.get(plan) is not pool:
            self._end_soon(helper)
            return
        helper.idle_since = trio.current_time()
        pool.idle.append(helper)
        if not self._watching:
            self._watching = True
            self._nursery.start_soon(self._end_idle)

    def _forget_oldest(self) -> None:
        for plan, pool in list(self._pools.items()):
            if len(self._pools) <= PLANS:
                return
            if not pool.in_use:
                del self._pools[plan]
                for helper in pool.idle:
                    self._end_soon(helper)

    async def _end_idle(self) -> None:
        while True:
            oldest = min(
                (helper.idle_since for pool in self._pools.values() for helper in pool.idle), default=None
            )
            if oldest is None:
                self._watching = False
                return
            await trio.sleep_until(oldest + IDLE_SECONDS)
            now = trio.current_time()
            for plan, pool in list(self._pools.items()):
                for helper in [one for one in pool.idle if one.idle_since + IDLE_SECONDS <= now]:
                    pool.idle.remove(helper)
                    self._end_soon(helper)
                if not pool.idle and not pool.in_use:
                    del self._pools[plan]

    def end_idle(self) -> None:
        """End those that have nothing to do now."""
        for pool in self._pools.values():
            while pool.idle:
                self._end_soon(pool.idle.pop())

    def _end_soon(self, helper: Helper) -> None:
        self._nursery.start_soon(helper.end, self._known)  # shielded: it is done however we end

    async def _start(self, plan: MountPlan) -> Helper:
        bubblewrap = await self._bubblewraps.find(plan.writable_roots)
        fds: list[int] = []
        theirs: list[int] = []
        try:
            if self._bundle is None:
                self._bundle = open_bundle()
            channel, inside = socket.socketpair()
            theirs.append(inside.detach())
            fds.append(channel.detach())
            stderr, stderr_end = os.pipe()
            fds.append(stderr)
            theirs.append(stderr_end)
            os.set_blocking(fds[0], False)
            os.set_blocking(stderr, False)
        except OSError as error:
            close_all([*fds, *theirs])
            raise InternalError(f"cannot enforce the sandbox: {os_error_text(error)}") from error
        boot = _BOOT.format(bundle=self._bundle, size=len(compiled_helper()), channel=theirs[0])
        try:
            launched = await self._launcher.launch(
                bubblewrap,
                mounted_for_files(plan),
                [interpreter(), "-I", "-S", "-c", boot],
                env=helper_environment(self._ours),
                cwd=b"/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=theirs[1],
                seccomp=compile_filter(network=False),
                pass_fds=(theirs[0], self._bundle),
                frame=runtime_mounts(),
                prefix=VIEW,
                as_pid_1=True,
                options=("--cap-add", "CAP_SYS_CHROOT"),
                said=lambda: read_tail(stderr),
            )
        except BaseException as error:
            close_all(fds)
            if isinstance(error, InternalError):
                raise HelperNotStarted(error.message) from error
            raise
        finally:
            close_all(theirs)
        helper = Helper(launched, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fds[0]), stderr)
        try:
            with trio.fail_after(START_PATIENCE):
                await helper.setup(setup_of(plan))
        except BaseException as error:
            words = helper.said()
            await helper.end(self._known)
            if isinstance(error, trio.TooSlowError | _NotSent):
                raise InternalError(f"fs sandbox helper did not start: {words}") from None
            raise
        return helper

    async def aclose(self) -> None:
        """End all of them, those that are at work too."""
        self.closed = True
        with trio.CancelScope(shield=True):
            for scope in self._calls:
                scope.cancel()
            while self._calls:
                await self._call_ended.park()
        helpers = [helper for pool in self._pools.values() for helper in pool.idle]
        self._pools.clear()
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for helper in helpers:
                    nursery.start_soon(helper.end, self._known)
        if self._bundle is not None:
            os.close(self._bundle)
            self._bundle = None
