"""System calls that are refused in a sandbox: a filter for bubblewrap and prctl (sandbox.md §7). No I/O.

Refused are the calls through which a sandboxed program could act on what the mounts and namespaces around
it do not cover. Everything else is left alone, so that compilers, git, node, Go, and Python's event loops
work. The answer is EPERM, which programs expect and which says what happened; a call by another
architecture's numbers, which the filter cannot read, ends the process with SIGSYS (exit code 159).
"""

from __future__ import annotations

import os
import struct
from functools import cache

from execenv.errors import NotSupported

# linux/audit.h
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_X32 = 0x4000_0000  # asm/unistd.h, __X32_SYSCALL_BIT: x86_64 by other numbers
_NO_CALL = 0xFFFF_FFFF  # syscall(-1), for which the kernel has an answer: ENOSYS

# asm/unistd_64.h and asm-generic/unistd.h
NUMBERS: dict[str, tuple[int, int]] = {
    "accept": (43, 202),
    "accept4": (288, 242),
    "add_key": (248, 217),
    "bind": (49, 200),
    "bpf": (321, 280),
    "connect": (42, 203),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "listen": (50, 201),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "recvmmsg": (299, 243),
    "request_key": (249, 218),
    "sendmmsg": (307, 269),
    "sendto": (44, 206),
    "setsockopt": (54, 208),
    "socket": (41, 198),
    "socketpair": (53, 199),
}
"""Of each call: its number on x86_64, and on aarch64."""

ALWAYS = (
    # another process' memory and descriptors
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "kcmp",
    # does what other calls do, past this filter
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    # the session's keyring is in no namespace: who is in the sandbox would read and replace the user's keys
    "add_key",
    "request_key",
    "keyctl",
    # With usual settings the kernel answers EPERM to the unprivileged. Elsewhere they look at all that the
    # machine does, or open a file that no path in the sandbox leads to.
    "perf_event_open",
    "bpf",
    "open_by_handle_at",
)
"""Refused whatever the arguments.

Left alone: process_madvise, userfaultfd, setns, and all that makes namespaces and mounts. The first needs a
process that can be named, so one inside; allocators use it on themselves. The second is about the caller's
own memory. For the others a program must first be privileged, at most in a user namespace of its own
making, and there the kernel keeps every mount as it was (mount_namespaces(7), "locked").
"""

WITHOUT_NETWORK = ("connect", "accept", "accept4", "bind", "listen", "sendmmsg", "recvmmsg")
"""Refused besides, whatever the arguments, where there is no network."""

_AF_UNIX, _SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPE_MASK = 1, 1, 5, 0xF
_SOL_SOCKET, _SO_SNDBUF, _SO_RCVBUF = 1, 7, 8
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_LOAD, _AND, _JUMP_EQUAL, _JUMP_NOT_LESS, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # linux/bpf_common.h
_ALLOW, _REFUSE, _KILL = 0x7FFF_0000, 0x0005_0000 | 1, 0x8000_0000  # linux/seccomp.h; EPERM
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # struct seccomp_data


@cache
def compile_filter(*, network: bool, machine: str | None = None) -> bytes:
    """The BPF program, 8 bytes for each instruction.

    With `network` refused are: the calls in `ALWAYS`, and ioctl with TIOCSTI or TIOCLINUX, which type into
    the terminal.

    Without, also all sockets but pairs of connected Unix ones, with what can be done to these. Such a socket
    may be made but not connected, since whoever listens at a path of the host is outside. A Unix datagram
    socket may not even be made: sendmsg(2) on it takes the path of any receiver (the system's log, the
    service manager), in memory where no filter sees it. SOCK_RAW is another name for it. On a stream or
    seqpacket socket an address is an error or ignored (net/unix/af_unix.c). For the same reason sendto is
    allowed as send(2), that is, without address.

    The reference refuses shutdown, getsockname, getpeername, getsockopt, setsockopt, and sendto in any form
    too. None of them reaches anybody; without them node cannot close a child's stdin, and Trio and asyncio
    cannot wake up. Of setsockopt what is left is the sizes of buffers.

    Args:
        network: whether sockets stay usable.
        machine: as `os.uname().machine` has it; this one if `None`.

    Raises:
        NotSupported: the numbers of this machine's system calls are not known here.
    """
    machine = os.uname().machine if machine is None else machine
    if machine not in _AUDIT_ARCH:
        raise NotSupported(
            f"the system calls of {machine} are not known here, so none can be refused: "
            f"sandboxes work on {' and '.join(_AUDIT_ARCH)}"
        )
    column = list(_AUDIT_ARCH).index(machine)
    number = {name: numbers[column] for name, numbers in NUMBERS.items()}
    program = _Program()
    program.load(_ARCHITECTURE)
    program.go_on_if_equal(_AUDIT_ARCH[machine], otherwise="kill")
    program.load(_NUMBER)
    if machine == "x86_64":
        program.jump_if_equal(_NO_CALL, "allow")
        program.jump_unless_less(_X32, "kill")
    for name in (*ALWAYS, *(() if network else WITHOUT_NETWORK)):
        program.jump_if_equal(number[name], "refuse")
    looked_at = ("ioctl",) if network else ("ioctl", "socket", "socketpair", "sendto", "setsockopt")
    for name in looked_at:
        program.jump_if_equal(number[name], "socket" if name == "socketpair" else name)
    program.label("allow")
    program.give(_ALLOW)

    # The kernel takes the lower half of these arguments, as does a load: both machines are little-endian.
    program.label("ioctl")
    program.load_argument(1)
    program.jump_if_equal(_TIOCSTI, "refuse")
    program.jump_if_equal(_TIOCLINUX, "refuse")
    program.give(_ALLOW)
    if not network:
        program.label("socket")
        program.load_argument(0)
        program.go_on_if_equal(_AF_UNIX, otherwise="refuse")
        program.load_argument(1)
        program.mask(_SOCK_TYPE_MASK)
        program.jump_if_equal(_SOCK_STREAM, "allowed socket")
        program.go_on_if_equal(_SOCK_SEQPACKET, otherwise="refuse")
        program.label("allowed socket")
        program.give(_ALLOW)

        program.label("sendto")
        program.load_argument(4)
        program.go_on_if_equal(0, otherwise="refuse")
        program.load_argument(4, upper=True)
        program.go_on_if_equal(0, otherwise="refuse")
        program.give(_ALLOW)

        program.label("setsockopt")
        program.load_argument(1)
        program.go_on_if_equal(_SOL_SOCKET, otherwise="refuse")
        program.load_argument(2)
        program.jump_if_equal(_SO_SNDBUF, "allowed option")
        program.go_on_if_equal(_SO_RCVBUF, otherwise="refuse")
        program.label("allowed option")
        program.give(_ALLOW)
    program.label("refuse")
    program.give(_REFUSE)
    program.label("kill")
    program.give(_KILL)
    return program.assemble()


class _Program:
    """Instructions with labels to jump to, which are all further down."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, str | None, str | None, int]] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        self._labels[name] = len(self._instructions)

    def load(self, offset: int) -> None:
        self._instructions.append((_LOAD, None, None, offset))

    def load_argument(self, index: int, *, upper: bool = False) -> None:
        self.load(_ARGUMENTS + 8 * index + (4 if upper else 0))

    def mask(self, bits: int) -> None:
        self._instructions.append((_AND, None, None, bits))

    def jump_if_equal(self, value: int, label: str) -> None:
        self._instructions.append((_JUMP_EQUAL, label, None, value))

    def jump_unless_less(self, value: int, label: str) -> None:
        self._instructions.append((_JUMP_NOT_LESS, label, None, value))

    def go_on_if_equal(self, value: int, *, otherwise: str) -> None:
        self._instructions.append((_JUMP_EQUAL, None, otherwise, value))

    def give(self, verdict: int) -> None:
        self._instructions.append((_RETURN, None, None, verdict))

    def assemble(self) -> bytes:
        return b"".join(
            struct.pack("<HBBI", code, self._distance(here, true), self._distance(here, false), value)
            for here, (code, true, false, value) in enumerate(self._instructions)
        )

    def _distance(self, here: int, label: str | None) -> int:
        return 0 if label is None else self._labels[label] - here - 1
