"""Processes under a sandbox (sandbox.md §8, §11.3): which way a policy is enforced, and with what command.

* nothing to enforce: as without a sandbox;
* only the network: a filter of system calls, set by a small program that then becomes the wanted one;
* files: bubblewrap, see `launch`.

There is no other way, and none without: what cannot be enforced is refused.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from logging import getLogger

import trio

from execenv.errors import InternalError, os_error_text
from execenv.local import spawn as spawning
from execenv.local.bubblewrap import Bubblewrap, Bubblewraps
from execenv.local.facts import Plans
from execenv.local.helpers import Helpers
from execenv.local.launch import Launched, Launcher
from execenv.local.mount_points import Claim, MountPoints, registry_directory
from execenv.local.mounts import Mounts
from execenv.local.restrict import restricted
from execenv.local.tree import Marks, Root
from execenv.sandbox.plan import Bind, Mask, MountPlan, with_parents
from execenv.sandbox.policy import Sandbox
from execenv.sandbox.seccomp import compile_filter

logger = getLogger(__name__)

CLAIM_TRIES = 20
CLAIM_PATIENCE = 10.0
"""Seconds that a start waits for another program that works with the claims."""
PROBE_PATIENCE = 1.0
"""Seconds that a question what can be enforced waits for a bubblewrap that takes its time."""

_STUB = """
import os, sys
name, keep, tty = sys.argv[1:4]
if not keep:
    os.environ.pop("LC_CTYPE", None)
if tty:
    import fcntl, termios
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
try:
    os.execvp(sys.argv[4], [name or sys.argv[4], *sys.argv[5:]])
except OSError as error:
    print(f"{sys.argv[4]}: {error.strerror}", file=sys.stderr)
    sys.exit(127)
"""
"""Becomes a program under another name, on a terminal of its own. Python sets LC_CTYPE where it misses it."""


def make_confinement(
    nursery: trio.Nursery, marks: Marks, mounts: Mounts, known: set[int], ours: Mapping[str, str]
) -> Confinement:
    """What enforces sandboxes for a `Guard` with these.

    Args:
        ours: our own environment variables.
    """
    mount_points = MountPoints()
    bubblewraps = Bubblewraps(ours, known)
    launcher = Launcher(marks, known)
    helpers = Helpers(nursery, launcher, bubblewraps, known, ours)
    plans = Plans(mounts, ours, mount_points.prepare)
    return Confinement(plans, bubblewraps, launcher, mount_points, helpers)


class Confinement:
    """What enforces sandboxes on this machine, for all environments of a program."""

    def __init__(
        self,
        plans: Plans,
        bubblewraps: Bubblewraps,
        launcher: Launcher,
        mount_points: MountPoints,
        helpers: Helpers,
    ) -> None:
        self.helpers = helpers
        self.plans = plans
        self.bubblewraps = bubblewraps
        self.launcher = launcher
        self.mount_points = mount_points
        self._probed: trio.Event | None = None
        self._works = False

    async def aclose(self) -> None:
        """End the helpers, and let go of descriptors."""
        await self.helpers.aclose()
        self.bubblewraps.close()
        self.mount_points.close()

    async def probe(self) -> None:
        """Find out, once and before anybody asks, whether files can be confined here; see `works`.

        And remove what programs left that were killed.
        """
        self._probed = trio.Event()
        with suppress(OSError):  # whoever needs its directory hears of it
            self.mount_points.sweep()
        try:
            await self.bubblewraps.find()
            self._works = True
        except InternalError as error:
            logger.info("%s", error)
        finally:
            self._probed.set()

    async def works(self) -> bool | None:
        """What `probe` found; `None` if that was not called, or takes long."""
        if self._probed is None:
            await trio.lowlevel.checkpoint()
            return None
        with trio.move_on_after(PROBE_PATIENCE):
            await self._probed.wait()
            return self._works
        return None

    async def spawn(
        self,
        sandbox: Sandbox,
        argv: Sequence[str],
        cwd: bytes,
        env: Mapping[str, str],
        *,
        arg0: str | None,
        tty: bool,
        pipe_stdin: bool,
    ) -> tuple[spawning.Spawned, Root]:
        """Start `argv` under a sandbox that enforces something. Cancelling it ends what was started.

        Raises:
            InternalError: it cannot be enforced, or it cannot be started. Nothing runs.
            InvalidParams, ForeignPathError: see `make_plan`.
        """
        spawning.check_words(argv, env, arg0, tty=tty)
        if not sandbox.profile.restricts_files:
            await trio.lowlevel.checkpoint()
            return self._spawn_without_network(argv, cwd, env, arg0=arg0, tty=tty, pipe_stdin=pipe_stdin)
        if sandbox.use_legacy_landlock:
            raise InternalError(
                "cannot enforce the sandbox: filesystem-restricted execution requires bubblewrap to isolate "
                "processes, and useLegacyLandlock asks for none"
            )
        if tty:
            env = spawning.terminal_environment(env)
        plan, claim = await self._claimed_plan(sandbox, cwd)
        streams = None
        try:
            bubblewrap = await self.bubblewraps.find(plan.writable_roots)
            command, options = self._command(plan, bubblewrap, argv, arg0, env, tty=tty)
            where = _directory_inside(plan, cwd)
            streams = spawning.open_terminal() if tty else spawning.open_pipes(pipe_stdin=pipe_stdin)
            launched = await self.launcher.launch(
                bubblewrap,
                plan,
                command,
                env=env,
                cwd=where,
                stdin=streams.theirs[0],
                stdout=streams.theirs[1],
                stderr=streams.theirs[2],
                seccomp=compile_filter(network=plan.network),
                options=options,
                said=streams.read_words,
                on_ready=claim.created,
            )
        except BaseException as error:
            if streams is not None:
                streams.close_ours()
            claim.release()
            if isinstance(error, OSError):
                raise InternalError(os_error_text(error)) from error
            raise
        finally:
            if streams is not None:
                streams.close_theirs()
        return _spawned(launched, streams, claim, tty=tty), launched.root

    async def _claimed_plan(self, sandbox: Sandbox, cwd: bytes) -> tuple[MountPlan, Claim]:
        """A plan, and a claim of what it mounts over.

        What was there when it was made may be the mount point of another process in a sandbox, and go with
        that before it is claimed; so it is looked at again.
        """
        plan = await self.plans.plan(sandbox, cwd)
        for _ in range(CLAIM_TRIES):
            claim = await self._claim(plan)
            try:
                again = await self.plans.plan(sandbox, cwd)
            except BaseException:
                claim.release()
                raise
            if again == plan:
                return plan, claim
            claim.release()
            plan = again
        raise InternalError("cannot enforce the sandbox: what its policy is about changes all the time")

    async def _claim(self, plan: MountPlan) -> Claim:
        covered = _covered(plan)
        deadline = trio.current_time() + CLAIM_PATIENCE
        while True:
            try:
                return self.mount_points.claim(covered)
            except BlockingIOError as error:
                if trio.current_time() >= deadline:
                    directory = registry_directory()
                    words = f"another program has held {directory}/lock for {CLAIM_PATIENCE:g} s"
                    raise InternalError(f"cannot enforce the sandbox: {words}") from error
            except OSError as error:
                words = f"{registry_directory()}: {os_error_text(error)}"
                raise InternalError(f"cannot enforce the sandbox: {words}") from error
            await trio.sleep(0.01)

    def _spawn_without_network(
        self,
        argv: Sequence[str],
        cwd: bytes,
        env: Mapping[str, str],
        *,
        arg0: str | None,
        tty: bool,
        pipe_stdin: bool,
    ) -> tuple[spawning.Spawned, Root]:
        if tty:
            env = spawning.terminal_environment(env)
        seccomp = compile_filter(network=False)
        command, fd = restricted(argv, env=env, arg0=arg0, seccomp=seccomp, tty=tty)
        streams = None
        try:
            streams = spawning.open_terminal() if tty else spawning.open_pipes(pipe_stdin=pipe_stdin)
            child, root = self.launcher.spawn(command, streams.theirs, [fd], cwd=cwd)
        except OSError as error:
            if streams is not None:
                streams.close_ours()
            raise InternalError(os_error_text(error)) from error
        finally:
            os.close(fd)
            if streams is not None:
                streams.close_theirs()
        pidfd = None
        with suppress(OSError):
            pidfd = os.pidfd_open(child.pid)
        return spawning.Spawned.of(child, streams, pidfd, tty=tty, confined=True), root

    def _command(
        self,
        plan: MountPlan,
        bubblewrap: Bubblewrap,
        argv: Sequence[str],
        arg0: str | None,
        env: Mapping[str, str],
        *,
        tty: bool,
    ) -> tuple[list[str], list[str]]:
        """What bubblewrap executes, and its options for that.

        A terminal becomes the controlling one of the session inside, so that Ctrl-C is for the program and
        not for bubblewrap. That takes a program inside; where the view has none, there is no job control,
        as with the reference.
        """
        setsid = shutil.which("setsid", path=os.defpath)
        if tty and arg0 is None and setsid is not None and _visible(plan, setsid):
            return [setsid, "-c", "--", *argv], []
        if arg0 is None:
            return list(argv), []
        if bubblewrap.argv0 and not tty:
            return list(argv), ["--argv0", arg0]
        python = spawning.interpreter()
        if _visible(plan, python) and _visible(plan, os.path.realpath(sys.base_prefix)):
            flags = ["1" if "LC_CTYPE" in env else "", "1" if tty else ""]
            return [python, "-I", "-S", "-c", _STUB, arg0, *flags, *argv], []
        if bubblewrap.argv0:
            return list(argv), ["--argv0", arg0]
        raise InternalError(
            f"cannot start {argv[0]!r} as {arg0!r} in this sandbox: that takes bubblewrap 0.9 "
            f"(this is {bubblewrap.version}), or a view in which {python} can be read"
        )


def _visible(plan: MountPlan, path: str) -> bool:
    return plan.access_of(os.fsencode(os.path.realpath(path))) != "none"


def _directory_inside(plan: MountPlan, cwd: bytes) -> bytes:
    """Where the program begins: `/` if its directory cannot be seen inside (sandbox.md §5).

    Raises:
        OSError: there is no such directory here.
    """
    fd = os.open(cwd, os.O_PATH | os.O_DIRECTORY)
    try:
        real = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)
    return real if plan.access_of(real) != "none" else b"/"


def _covered(plan: MountPlan) -> list[tuple[bytes, bool]]:
    """What is mounted over in a place that can be written, and whether it is a directory.

    Not only what is missing: something empty may be there for another process in a sandbox, and must stay
    when that ends.
    """
    roots = {path for path in plan.writable_roots if path != b"/"} or {b"/"}
    return [
        (op.path, not (isinstance(op, Mask) and op.kind == "denied file"))
        for op in plan.operations
        if (isinstance(op, Mask) or (isinstance(op, Bind) and not op.writable))
        and not roots.isdisjoint(with_parents(op.path))
    ]


def _spawned(launched: Launched, streams: spawning.Streams, claim: Claim, *, tty: bool) -> spawning.Spawned:
    def ended() -> None:
        launched.close_status()
        claim.release()

    return spawning.Spawned(
        launched.pid,
        streams.outputs,
        streams.stdin_fd,
        tty,
        launched.poll,
        launched.pidfd,
        confined=True,
        signal=launched.signal,
        ended=ended,
    )
