"""From a policy to mounts: a pure decision over what is known of the file system (sandbox.md §2, §5, §11.1).

The plan is what is enforced, what goldens test, and what a warm helper is kept under: two requests with
equal plans see the same. It names the inode of whatever it binds, so a directory that was replaced makes
another plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from attrs import frozen

from execenv.sandbox.policy import Sandbox

FactKind = Literal["file", "directory", "symlink", "other"]
Execution = Literal["direct", "direct reads", "sandboxed"]


@frozen
class Fact:
    """What is at a path, not following a link there. `target`: of a symlink, as it is written."""

    kind: FactKind
    device: int
    inode: int
    target: bytes | None = None


class Facts(Protocol):
    """What the planner asks of the file system."""

    def look(self, path: bytes) -> Fact | None:
        """What is at an absolute path; `None` if nothing, or it cannot be reached."""

    def names(self, directory: bytes) -> Iterable[tuple[bytes, FactKind]]:
        """What is in a directory; nothing if it cannot be read."""


@frozen
class Bind:
    """`path` of the host at the same place in the view, with everything mounted below it.

    `device` and `inode` are the host's: who enforces the plan checks that it is this one that was bound.
    """

    path: bytes
    writable: bool
    device: int
    inode: int


@frozen
class Mask:
    """Something in place of `path`, so that what is there is not seen.

    Attributes:
        kind: `"empty directory"`: mode 0555, for a protected name that is missing. `"denied directory"`: mode
            0000, or 0111 with `reopened` children, which are bound behind it. `"denied file"`: mode 0000.
        missing: nothing is there on the host: bubblewrap would make a mount point, and a helper for files
            refuses by name instead.
        device, inode: of what is there; 0 if it is missing.
    """

    path: bytes
    kind: Literal["empty directory", "denied directory", "denied file"]
    missing: bool
    reopened: tuple[bytes, ...] = ()
    device: int = 0
    inode: int = 0


@frozen
class Link:
    """A symlink of the view: the way that leads to a root by another name."""

    path: bytes
    target: bytes


Operation = Bind | Mask | Link


@frozen
class Forbidden:
    """A name that must not come into being: `name` in the directory with that inode.

    `denied`: a rule denies it (EACCES); otherwise it is protected (EROFS, or EEXIST for mkdir).
    """

    device: int
    inode: int
    name: bytes
    denied: bool


@frozen
class MountPlan:
    """What a sandboxed process or file call sees.

    Attributes:
        whole: the view begins with the whole host, read-only (`--ro-bind / /`), or writable if the first
            operation binds `/` writable; otherwise with nothing.
        operations: in this order.
        forbidden: the missing masks, as a helper for files enforces them.
        network: whether there is any.
    """

    whole: bool
    operations: tuple[Operation, ...]
    forbidden: tuple[Forbidden, ...]
    network: bool

    @property
    def writable_roots(self) -> tuple[bytes, ...]:
        """Every path that is bound writable."""
        return tuple(op.path for op in self.operations if isinstance(op, Bind) and op.writable)

    def access_of(self, path: bytes) -> Literal["none", "read", "write"]:
        """What the view lets be done at an absolute path without links, whatever the permission bits say."""
        raise NotImplementedError(path)


def execution(sandbox: Sandbox) -> Execution:
    """How calls about files are done (sandbox.md §4.1): as without a sandbox, or reads so, or none."""
    raise NotImplementedError(sandbox)


def make_plan(
    sandbox: Sandbox, facts: Facts, *, tmpdir: bytes | None = None, cwd: bytes | None = None
) -> MountPlan:
    """The mounts for a sandbox that restricts files.

    Args:
        tmpdir: what `tmpdir` stands for; `None` for nothing.
        cwd: what stands for a missing `cwd` of the sandbox (a process has one of its own).

    Raises:
        InvalidParams: a pattern is wrong, or the policy needs a `cwd` and has none.
        InternalError: it cannot be enforced, as where a protected path leads through a symlink that the
            sandboxed could exchange (sandbox.md §2.4).
        ForeignPathError: a path is of another operating system.
    """
    raise NotImplementedError(sandbox, facts, tmpdir, cwd)


def arguments(plan: MountPlan, data_fds: Iterable[int], *, prefix: bytes = b"") -> list[bytes]:
    """The mount options of bubblewrap (sandbox.md §5, MOUNTS), without namespaces, `--proc` and the command.

    Args:
        data_fds: descriptors of empty files, one for each mask that needs one (`count_data_fds`).
        prefix: where in the new root the view is to be; nothing for the root itself.
    """
    raise NotImplementedError(plan, data_fds, prefix)


def count_data_fds(plan: MountPlan) -> int:
    """How many descriptors `arguments` takes."""
    raise NotImplementedError(plan)
