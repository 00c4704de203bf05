"""Takes system calls from itself and becomes another program (`execenv.local.restrict`).

A script of its own, run without the package, without site-packages, and without the environment of the
program: what that has in LD_PRELOAD must not be loaded before the filter is in force. So only what is cheap
is imported.
"""

import _signal  # type: ignore[import-not-found]  # signal itself makes enums first, which takes as long
import ctypes
import errno
import marshal
import os
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_NET = b"\0" * 8 + b"\3" + b"\0" * 7  # linux/landlock.h: no rights of files, both of TCP
_NOT_FOUND, _NOT_EXECUTED = 127, 126  # as shells and env(1) have it


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))  # struct sock_fprog


def _restrict(program: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fprog = _Program(len(program) // 8, program)
    if not libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        _leave_others_alone(libc)
    for option, argument, more in (
        (_PR_SET_NO_NEW_PRIVS, 1, None),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(fprog)),
    ):
        if libc.prctl(option, ctypes.c_ulong(argument), more or ctypes.c_ulong(0), *[ctypes.c_ulong(0)] * 2):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _leave_others_alone(libc: ctypes.CDLL) -> None:
    """Take away the memory and the descriptors of processes of the same user, where Landlock can (Linux 6.7).

    They have a network, and with /proc/PID/mem they would be made to use it. What is in a domain of Landlock
    may trace only what is in it too, whatever else the domain is about (landlock(7)).
    """
    attributes, size = ctypes.c_char_p(_LANDLOCK_NET), ctypes.c_size_t(len(_LANDLOCK_NET))
    ruleset = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), attributes, size, ctypes.c_uint32(0))
    if ruleset >= 0:
        libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint32(0))
        os.close(ruleset)


def _execute(argv: list[bytes], arg0: bytes | None, env: dict[bytes, bytes]) -> OSError:
    """Become the program. Comes back only with the reason why not, as execvpe(3) chooses it."""
    name = argv[0]
    argv = [name if arg0 is None else arg0, *argv[1:]]
    if b"/" in name:
        candidates = [name]
    else:
        path = env.get(b"PATH", os.fsencode(os.defpath))
        candidates = [os.path.join(directory or b".", name) for directory in path.split(b":")]
    reason: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for candidate in candidates:
        try:
            os.execve(candidate, argv, env)  # noqa: S606
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno != errno.EACCES:
                return error
            reason = error
    return reason


def _main(fd: int) -> int:
    with open(fd, "rb") as file:
        argv, arg0, env, program, tty = marshal.loads(file.read())  # noqa: S302 - written by who started us
    # Python ignores these for itself, and what is ignored stays so over exec.
    for signum in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(signum, _signal.SIG_DFL)
    try:
        if tty:  # we lead a session that has none yet
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        _restrict(program)
    except OSError as error:
        _complain(b"cannot enforce the sandbox", error)
        return _NOT_EXECUTED
    try:
        reason = _execute(argv, arg0, env)
    except ValueError as error:  # a NUL, or a variable's name with "="
        _complain(argv[0], error)
        return _NOT_EXECUTED
    _complain(argv[0], reason)
    return _NOT_FOUND if reason.errno in (errno.ENOENT, errno.ENOTDIR) else _NOT_EXECUTED


def _complain(about: bytes, error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) else None
    os.write(2, b"%s: %s\n" % (about, os.fsencode(reason or str(error))))


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1])))
