"""System calls that are refused in a sandbox: a filter as bubblewrap and prctl take it (sandbox.md §7)."""

from __future__ import annotations


def compile_filter(*, network: bool, machine: str | None = None) -> bytes:
    """The BPF program, 8 bytes for each instruction.

    Args:
        network: whether sockets stay usable.
        machine: as `os.uname().machine` has it; this one if `None`.

    Raises:
        NotSupported: the numbers of this machine's system calls are not known here.
    """
    raise NotImplementedError(network, machine)
