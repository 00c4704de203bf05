"""What the planner asks of the file system, and the plans that were made of it (sandbox.md §11.1, §11.2).

A plan is made anew for every call, in effect: what it was made of is looked at again, and as long as that is
the same, so is the plan. What local disks can answer at once is asked on the Trio thread; if anything else
has to be asked, or a directory to be searched, all of it is done in a thread, since a dead mount may never
answer.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import trio
from attrs import define, field

from execenv.errors import InternalError, os_error_text
from execenv.local.mounts import Mounts
from execenv.local.stat import stat_now
from execenv.local.threads import run_in_thread
from execenv.local.turn import Turn
from execenv.sandbox.plan import Fact, FactKind, Facts, MountPlan, make_plan
from execenv.sandbox.policy import GlobRule, Sandbox

REMEMBERED = 64
"""Sandboxes whose plans are kept."""

MANY = 200
"""More questions than this are asked in a thread, however quickly each is answered."""

_LOOK = os.O_PATH | os.O_NOFOLLOW if hasattr(os, "O_PATH") else 0


class DiskFacts:
    """Asks the disk. May wait for ever: for threads.

    Args:
        turn: asked in long searches whether anybody still waits.
    """

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def look(self, path: bytes) -> Fact | None:
        self._turn.check()
        try:
            found = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
        except (OSError, ValueError):
            return None
        sealed = _is_sealed(found, path)
        return Fact(_kind(found.st_mode), found.st_dev, found.st_ino, target, sealed)

    def names(self, directory: bytes) -> tuple[tuple[bytes, FactKind], ...]:
        self._turn.check()
        found: list[tuple[bytes, FactKind]] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    self._turn.check()
                    found.append((entry.name, _entry_kind(entry)))
        except (OSError, ValueError):
            return ()
        found.sort()
        return tuple(found)


class _Undecided(Exception):
    """It cannot be known at once what is at a path."""

    def __init__(self, path: bytes, *, deep: bool) -> None:
        super().__init__(path)
        self.path = path
        self.deep = deep


class _FactsNow:
    """Answers only what can be known at once."""

    def __init__(self, mounts: Mounts) -> None:
        self._mounts = mounts

    def look(self, path: bytes) -> Fact | None:
        try:
            fd = self._mounts.open_now(path, _LOOK)
        except (OSError, ValueError):
            return None
        if fd is None:
            raise _Undecided(path, deep=False)
        try:
            found = stat_now(fd)
            if found is None or not self._mounts.is_local(found.mount_id):
                raise _Undecided(path, deep=False)
            target = os.readlink(b"", dir_fd=fd) if found.is_symlink else None
            sealed = os.geteuid() != 0 and _is_sealed(os.fstat(fd), b"/proc/self/fd/%d" % fd)
        except OSError:
            raise _Undecided(path, deep=False) from None
        finally:
            os.close(fd)
        return Fact(_kind(found.mode), found.device, found.inode, target, sealed)

    def names(self, directory: bytes) -> tuple[tuple[bytes, FactKind], ...]:
        raise _Undecided(directory, deep=True)


@define(eq=False)
class _Recorder:
    """Passes questions on, and remembers the answers."""

    _facts: Facts
    looked: dict[bytes, Fact | None] = field(factory=dict, init=False)
    named: dict[bytes, tuple[tuple[bytes, FactKind], ...]] = field(factory=dict, init=False)

    def look(self, path: bytes) -> Fact | None:
        if path not in self.looked:
            self.looked[path] = self._facts.look(path)
        return self.looked[path]

    def names(self, directory: bytes) -> tuple[tuple[bytes, FactKind], ...]:
        if directory not in self.named:
            self.named[directory] = tuple(self._facts.names(directory))
        return self.named[directory]

    def holds(self, facts: Facts) -> bool:
        """Whether `facts` would answer the same."""
        return all(facts.names(path) == found for path, found in self.named.items()) and all(
            facts.look(path) == found for path, found in self.looked.items()
        )


_Known = tuple[_Recorder, MountPlan]


class Plans:
    """Plans for sandboxes, each made of what the file system is at the moment of the call.

    Args:
        ours: the environment whose TMPDIR is what `tmpdir` stands for.
        hide: gives the directories that no sandbox may see, after it has made them; asked once.
    """

    def __init__(
        self, mounts: Mounts, ours: Mapping[str, str], hide: Callable[[], Sequence[bytes]] = lambda: ()
    ) -> None:
        self._hide = hide
        self._hidden: Sequence[bytes] | None = None
        self._mounts = mounts
        self._ours = ours
        self._known: OrderedDict[object, _Known] = OrderedDict()

    async def plan(self, sandbox: Sandbox, cwd: bytes | None = None) -> MountPlan:
        """The plan as of now; the same object as before, if nothing has changed that it depends on.

        Args:
            cwd: what stands for a missing `cwd` of the sandbox.

        Raises:
            InvalidParams, InternalError, ForeignPathError: as `make_plan`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._hidden is None:
            try:
                self._hidden = self._hide()
            except OSError as error:
                raise InternalError(f"{error.filename}: {os_error_text(error)}") from error
        tmpdir = os.fsencode(self._ours.get("TMPDIR", "")) or None
        key = (sandbox, tmpdir, cwd)
        known = self._known.get(key)
        try:
            if _is_much(sandbox) if known is None else len(known[0].looked) > MANY:
                raise _Undecided(b"/", deep=True)
            known = self._make(_FactsNow(self._mounts), sandbox, tmpdir, cwd, known)
        except _Undecided as undecided:
            limiter = self._mounts.limiter(undecided.path, deep=undecided.deep)
            before = known
            known = await run_in_thread(
                limiter, lambda turn: self._make(DiskFacts(turn), sandbox, tmpdir, cwd, before)
            )
        self._known[key] = known
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known[1]

    def _make(
        self, facts: Facts, sandbox: Sandbox, tmpdir: bytes | None, cwd: bytes | None, known: _Known | None
    ) -> _Known:
        if known is not None and known[0].holds(facts):
            return known
        recorder = _Recorder(facts)
        plan = make_plan(sandbox, recorder, tmpdir=tmpdir, cwd=cwd, hidden=self._hidden or ())
        return recorder, plan


def _is_much(sandbox: Sandbox) -> bool:
    """Whether a plan takes long to make: by the number of paths, or by patterns, which are slow to read."""
    entries = sandbox.profile.entries or ()
    count = len(entries) * max(1, len(sandbox.workspace_roots))
    return count > MANY or any(isinstance(entry.rule, GlobRule) for entry in entries)


def _is_sealed(found: os.stat_result, path: bytes) -> bool:
    """See `Fact.sealed`."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid != os.geteuid() and not os.access(path, os.W_OK)


def _kind(mode: int) -> FactKind:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISLNK(mode):
        return "symlink"
    return "file" if stat.S_ISREG(mode) else "other"


def _entry_kind(entry: os.DirEntry[bytes]) -> FactKind:
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return "directory"
    return "file" if entry.is_file(follow_symlinks=False) else "other"
