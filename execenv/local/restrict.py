"""Starting a program with fewer system calls, and otherwise as it would be: no mounts, no namespaces.

For a profile that leaves files alone and takes the network (sandbox.md §5). Our own interpreter is started
in place of the program, takes the calls from itself, and becomes the program: bubblewrap is not needed.
"""

from __future__ import annotations

import marshal
import os
import sys
from collections.abc import Mapping, Sequence

from execenv.errors import InternalError
from execenv.local.spawn import interpreter

_PYTHON = interpreter() if sys.executable else ""
"""Itself, and no link to it: that of a virtual environment may lie where a sandbox can write."""
_STUB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_restrict_stub.py")


def restricted(
    argv: Sequence[str], *, env: Mapping[str, str], arg0: str | None, seccomp: bytes, tty: bool = False
) -> tuple[list[str], int]:
    """The command line to start in place of `argv`, and a descriptor that it inherits under its number.

    Start it with an empty environment: `env` is what the program gets, exactly. A program that is not there
    or cannot be executed is a line on stderr and exit code 127 or 126. The caller closes the descriptor once
    the command was started.

    Args:
        seccomp: see `seccomp.compile_filter`.
        tty: its stdin is a terminal, and becomes the controlling one of the session that it must lead.

    Raises:
        InternalError: this program is no Python interpreter, so it cannot be started again.
    """
    if not sys.executable or getattr(sys, "frozen", False) or not os.path.isfile(_STUB):
        raise InternalError(
            "cannot enforce the sandbox: there is no Python interpreter to take system calls with; install "
            "execenv as a package"
        )
    variables = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    words = [os.fsencode(word) for word in argv]
    data = marshal.dumps((words, None if arg0 is None else os.fsencode(arg0), variables, seccomp, tty))
    fd = os.memfd_create("restrict", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return [_PYTHON, "-I", "-S", _STUB, str(fd)], fd
