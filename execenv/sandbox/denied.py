"""Whether a program most likely failed because of its sandbox (sandbox.md §8.1). No I/O."""

from __future__ import annotations

import re

SIGSYS_STATUS = 128 + 31
"""Of a program that a filter of system calls ended."""

_COMPLAINTS = re.compile(
    rb"operation not permitted|permission denied|read-only file system|seccomp|sandbox|landlock"
    rb"|failed to write file"
)


def looks_denied(exit_code: int, output: bytes) -> bool:
    """A guess from what it said. `output`: of all streams together, in their order."""
    if exit_code == 0:
        return False
    return exit_code == SIGSYS_STATUS or _COMPLAINTS.search(output.lower()) is not None
