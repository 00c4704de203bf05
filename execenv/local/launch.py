"""Starting a program under bubblewrap, and seeing that what it mounted is what the plan says (sandbox.md §11).

bubblewrap is started by the Trio thread: `--die-with-parent` means the thread that forked it. It sets up
the view, passes its gate, and waits for the system call filter. Only when the mounts were compared with the
plan by inode is the filter given, and the program begins: whatever was exchanged under bubblewrap's hands
meanwhile does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import define

from execenv.local.bubblewrap import Bubblewrap
from execenv.sandbox.plan import MountPlan


@define(eq=False)
class Launched:
    """A program under bubblewrap. Whoever holds this reaps `pid`, and closes `pidfd` and `status_fd`.

    Attributes:
        pid: of the outer bubblewrap, a child of ours that leads a session of its own. SIGKILL to it ends
            everything inside.
        child_pid: of the first process inside, as we see it.
        poll: reaps `pid` if it has ended; its exit code (128 + n for signal n), else `None`.
        status_fd: bubblewrap says there at the end whether the program was executed.
    """

    pid: int
    child_pid: int
    pidfd: int | None
    poll: Callable[[], int | None]
    status_fd: int


async def launch(
    bubblewrap: Bubblewrap,
    plan: MountPlan,
    command: Sequence[str | bytes],
    *,
    env: Mapping[str, str],
    cwd: bytes,
    stdin: int,
    stdout: int,
    stderr: int,
    seccomp: bytes,
    pass_fds: Sequence[int] = (),
    frame: Sequence[bytes] = (),
    prefix: bytes = b"",
    as_pid_1: bool = False,
    capabilities: Sequence[str] = (),
    on_spawn: Callable[[int], None] = lambda pid: None,
) -> Launched:
    """Start `command` in the view of `plan`; returns when the view was checked and the program may run.

    Cancelling it ends what was started.

    Args:
        env: exactly what the program gets, beside PWD.
        cwd: inside.
        seccomp: see `seccomp.compile_filter`.
        pass_fds: descriptors that the program inherits, under the same numbers.
        frame: mount options in front of those of the plan.
        prefix: where the plan's view is to be in the new root.
        as_pid_1: the program is process 1 inside (which ignores most signals), without one of bubblewrap's.
        capabilities: that it keeps, in its own user namespace.
        on_spawn: called with the pid in the moment of the start, before anything is waited for.

    Raises:
        InternalError: it could not be set up, with the words of bubblewrap; or it did not become what the
            plan says. Nothing runs.
    """
    raise NotImplementedError
