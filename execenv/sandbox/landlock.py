"""Landlock: the kernel's own allow-list of files for the calling thread and what it starts (landlock(7)).

A second layer below bubblewrap's mounts, never instead of them: it cannot forbid something beneath what is
allowed, and stat(2) works everywhere.

The helper inside a sandbox runs this file without the package and without site-packages. Hence only cheap
modules of the standard library are imported.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

TYPE_CHECKING = False  # as in typing, whose import costs more than the rest of this file
if TYPE_CHECKING:
    from collections.abc import Sequence

# The same numbers on every machine.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

# linux/landlock.h
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_OF_DIRECTORIES = 0b1_1111_1111_0000  # removing and making of each kind
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_NET_BIND_TCP, _NET_CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1 << 0, 1 << 1

_READING = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


def _syscall(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def abi() -> int:
    """The version of the kernel's Landlock; 0 if there is none, or it is switched off."""
    try:
        return _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    except (AttributeError, OSError):  # ENOSYS, EOPNOTSUPP, EPERM by a filter; another system than Linux
        return 0


def restrict(readable: Sequence[bytes], writable: Sequence[bytes]) -> bool:
    """Confine this thread, and what it starts from now on, for ever.

    Beneath `readable` files can be read and executed, beneath `writable` everything can be done; elsewhere
    nothing can. TCP is off, and so are signals and abstract Unix sockets to whatever is not confined with
    it, as far as the kernel's version goes. What is open already stays usable. Paths that are not there, or
    cannot be reached, allow nothing.

    False if the kernel has no Landlock; then nothing has changed.

    Raises:
        OSError: it cannot be had, although the kernel has it. Part of nothing was applied.
    """
    version = abi()
    if not version:
        return False
    everything = _READING | _WRITE_FILE | _OF_DIRECTORIES
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        everything |= right if version >= since else 0
    handled = struct.pack("=Q", everything)
    if version >= 4:
        handled += struct.pack("=Q", _NET_BIND_TCP | _NET_CONNECT_TCP)
    if version >= 6:
        handled += struct.pack("=Q", _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL)
    ruleset = _syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
    try:
        for paths, rights in ((readable, _READING), (writable, everything)):
            for path in paths:
                _allow(ruleset, path, rights)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        _syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: bytes, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP):
            return
        raise
    try:
        if os.fstat(fd).st_mode & 0o170000 != 0o040000:
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, fd)
        _syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(fd)
