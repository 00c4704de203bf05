"""Starting a program: argv in, descriptors out. Pipes by `Popen`, terminals by `posix_spawn`.

Both start the child by vfork in the Trio thread, never with a `preexec_fn`: that would turn vfork into
fork, which takes 3.5 ms instead of 0.8 and grows with our memory (performance.md, "Pieces"). A terminal
needs a controlling tty, which `Popen` cannot give: `posix_spawn` can, since a session leader that opens a
terminal gets it. Python's `os.posix_spawn` cannot change the directory, so libc's is called directly.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache

from attrs import define

from execenv.errors import InternalError, NotSupported, os_error_text

TTY_ROWS, TTY_COLUMNS = 24, 80  # protocol.md §11
_WORDS = 4096


@define(eq=False)
class Spawned:
    """A running child. Whoever holds this closes the descriptors and reaps the child.

    Attributes:
        outputs: name and descriptor of each stream that is read until its end.
        stdin_fd: where stdin is written to; `None` when the child's stdin is /dev/null. For a terminal
            it is a second descriptor of the output.
        poll: reaps the child if it has ended; its exit code (128 + n for signal n), else `None`.
        pidfd: readable when the child has ended; `None` where there is no such thing, or no descriptor left.
        confined: a sandbox restricts it.
        signal: sends a signal to the process group of the program, and is false while there is none yet;
            `None`: that is the group of the child itself.
        ended: called when the child has been reaped and its output has ended.
    """

    pid: int
    outputs: tuple[tuple[str, int], ...]
    stdin_fd: int | None
    tty: bool
    poll: Callable[[], int | None]
    pidfd: int | None
    confined: bool = False
    signal: Callable[[int], bool] | None = None
    ended: Callable[[], None] = lambda: None

    @classmethod
    def of(
        cls,
        child: subprocess.Popen[bytes],
        streams: Streams,
        pidfd: int | None = None,
        *,
        tty: bool = False,
        confined: bool = False,
    ) -> Spawned:
        """A child that `Popen` has started on these streams."""

        def poll() -> int | None:
            returncode = child.poll()
            return None if returncode is None else exit_code_of(returncode)

        return cls(child.pid, streams.outputs, streams.stdin_fd, tty, poll, pidfd, confined)


def spawn(
    argv: Sequence[str], cwd: bytes, env: Mapping[str, str], *, arg0: str | None, tty: bool, pipe_stdin: bool
) -> Spawned:
    """Start `argv` in `cwd` with exactly `env`, in a session of its own.

    Raises:
        InternalError: with the words of protocol.md §4.1; nothing was started and nothing is left open.
    """
    check_words(argv, env, arg0, tty=tty)
    try:
        spawned = _spawn_tty(argv, cwd, env, arg0) if tty else _spawn_pipes(argv, cwd, env, arg0, pipe_stdin)
    except OSError as error:
        raise InternalError(os_error_text(error)) from error
    except ValueError as error:
        raise InternalError(str(error)) from error
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):
            spawned.pidfd = os.pidfd_open(spawned.pid)
    return spawned


def check_words(argv: Sequence[str], env: Mapping[str, str], arg0: str | None, *, tty: bool) -> None:
    """Whether a program can be started with these at all.

    Raises:
        InternalError: with the words of protocol.md §4.1.
    """
    if not argv[0]:
        raise InternalError(f"missing program for {'PTY' if tty else 'pipe'} spawn")
    for word in (*argv, arg0 or "", *env, *env.values()):
        if "\0" in word:
            raise InternalError("nul byte found in provided data")


def exit_code_of(returncode: int) -> int:
    """`Popen`'s return code as the protocol has it: death by signal n is 128 + n."""
    return returncode if returncode >= 0 else 128 - returncode


def abandon(spawned: Spawned) -> None:
    """Kill a child that was just started and cannot be looked after, and let go of everything."""
    with suppress(OSError):
        os.killpg(spawned.pid, signal.SIGKILL)
    os.waitpid(spawned.pid, 0)
    spawned.ended()
    fds = [fd for _, fd in spawned.outputs]
    close_all([*fds, *(fd for fd in (spawned.stdin_fd, spawned.pidfd) if fd is not None)])


@define(eq=False)
class Streams:
    """The streams of a child that is about to be started: our ends, and the child's.

    Attributes:
        outputs, stdin_fd: as `Spawned` has them.
        theirs: stdin, stdout and stderr of the child; stdin may be `subprocess.DEVNULL`.
    """

    outputs: tuple[tuple[str, int], ...]
    stdin_fd: int | None
    theirs: tuple[int, int, int]

    def read_words(self) -> bytes:
        """What somebody said on stderr just now, before the program was there."""
        with suppress(OSError):
            return os.read(self.outputs[-1][1], _WORDS)
        return b""

    def close_ours(self) -> None:
        close_all([*(fd for _, fd in self.outputs), *(() if self.stdin_fd is None else (self.stdin_fd,))])

    def close_theirs(self) -> None:
        close_all([fd for fd in set(self.theirs) if fd >= 0])


def open_pipes(*, pipe_stdin: bool) -> Streams:
    """Pipes. Without `pipe_stdin` the child's stdin is /dev/null."""
    fds: list[int] = []
    try:
        for _ in range(3 if pipe_stdin else 2):
            fds += os.pipe()
        outputs = (("stdout", fds[0]), ("stderr", fds[2]))
        stdin, stdin_fd = (fds[4], fds[5]) if pipe_stdin else (subprocess.DEVNULL, None)
        for fd in (fds[0], fds[2], *(() if stdin_fd is None else (stdin_fd,))):
            os.set_blocking(fd, False)
        return Streams(outputs, stdin_fd, (stdin, fds[1], fds[3]))
    except BaseException:
        close_all(fds)
        raise


def open_terminal() -> Streams:
    """A terminal of the usual size; its other side is stdin, stdout and stderr of the child."""
    master, slave = os.openpty()
    writer = -1
    try:
        writer = os.dup(master)
        resize(master, TTY_ROWS, TTY_COLUMNS)
        os.set_blocking(master, False)
        return Streams((("pty", master),), writer, (slave, slave, slave))
    except BaseException:
        close_all([master, slave, writer])
        raise


def terminal_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What a program on a terminal gets: SHELL too, as the reference adds it."""
    shell = None if "SHELL" in env else login_shell()
    return {**env, "SHELL": shell} if shell else dict(env)


def _spawn_pipes(
    argv: Sequence[str], cwd: bytes, env: Mapping[str, str], arg0: str | None, pipe_stdin: bool
) -> Spawned:
    streams = open_pipes(pipe_stdin=pipe_stdin)
    try:
        child = subprocess.Popen(
            [argv[0] if arg0 is None else arg0, *argv[1:]],
            executable=argv[0],
            stdin=streams.theirs[0],
            stdout=streams.theirs[1],
            stderr=streams.theirs[2],
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    except BaseException:
        streams.close_ours()
        raise
    finally:
        streams.close_theirs()
    return Spawned.of(child, streams)


def _spawn_tty(argv: Sequence[str], cwd: bytes, env: Mapping[str, str], arg0: str | None) -> Spawned:
    env = terminal_environment(env)
    program = find_program(argv[0], env, cwd)
    streams = open_terminal()
    try:
        pid = _posix_spawn(
            program,
            [argv[0] if arg0 is None else arg0, *argv[1:]],
            env,
            cwd,
            os.ttyname(streams.theirs[0]),
        )
    except BaseException:
        streams.close_ours()
        raise
    finally:
        streams.close_theirs()
    status: list[int] = []

    def poll() -> int | None:
        if not status:
            try:
                reaped, raw = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # somebody else took it: the status is lost (§4.4)
                status.append(-1)
            else:
                if not reaped:
                    return None
                status.append(exit_code_of(os.waitstatus_to_exitcode(raw)))
        return status[0]

    return Spawned(pid, streams.outputs, streams.stdin_fd, True, poll, None)


def resize(fd: int, rows: int, columns: int) -> None:
    """Set the size of a terminal, by its master side."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))


@cache
def interpreter() -> str:
    """The Python that runs this, itself: not a link, not what a version manager puts in front of it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def login_shell() -> str | None:
    """The shell that the password database has for us."""
    import pwd

    with suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_shell or None
    return None


def find_program(name: str, env: Mapping[str, str], cwd: bytes) -> bytes:
    """The file that a bare name stands for, by the child's PATH; other names as they are, from `cwd`.

    Raises:
        InternalError: if no directory of PATH has it, in the reference's words for a terminal.
    """
    encoded = os.fsencode(name)
    if b"/" in encoded:
        return encoded
    path = env.get("PATH")
    if path is None:
        raise InternalError(f"Unable to spawn {name} because:\nUnable to resolve the PATH")
    for directory in os.fsencode(path).split(b":"):
        candidate = os.path.join(cwd, directory, encoded)
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    raise InternalError(f'Unable to spawn {name} because:\nNo viable candidates found in PATH "{path}"')


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, whatever state they are in."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


# posix_spawn of libc, with the two actions Python does not offer.

_OPAQUE = 1024  # posix_spawnattr_t and posix_spawn_file_actions_t: at most 336 bytes in glibc and musl
_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_SIGSET = 128


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    try:
        chdir = libc.posix_spawn_file_actions_addchdir_np
        closefrom = getattr(libc, "posix_spawn_file_actions_addclosefrom_np", None)
    except AttributeError:
        raise NotSupported("terminals need a C library with posix_spawn_file_actions_addchdir_np") from None
    chdir.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    if closefrom is not None:
        closefrom.argtypes = [ctypes.c_void_p, ctypes.c_int]
    libc.posix_spawn_file_actions_addopen.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    libc.posix_spawn_file_actions_adddup2.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return libc


def _posix_spawn(program: bytes, argv: Sequence[str], env: Mapping[str, str], cwd: bytes, tty: str) -> int:
    """Start a session leader whose controlling terminal, stdin, stdout and stderr are `tty`."""
    libc = _libc()
    attributes = ctypes.create_string_buffer(_OPAQUE)
    actions = ctypes.create_string_buffer(_OPAQUE)
    every = ctypes.create_string_buffer(_SIGSET)
    none = ctypes.create_string_buffer(_SIGSET)
    libc.posix_spawnattr_init(attributes)
    libc.posix_spawn_file_actions_init(actions)
    try:
        libc.sigfillset(every)
        libc.sigemptyset(none)
        _check(libc.posix_spawnattr_setsigdefault(attributes, every))
        _check(libc.posix_spawnattr_setsigmask(attributes, none))
        _check(libc.posix_spawnattr_setflags(attributes, ctypes.c_short(_SETSID | _SETSIGDEF | _SETSIGMASK)))
        # After setsid, so that opening the terminal makes it the controlling one.
        _check(libc.posix_spawn_file_actions_addopen(actions, 0, os.fsencode(tty), os.O_RDWR, 0))
        _check(libc.posix_spawn_file_actions_adddup2(actions, 0, 1))
        _check(libc.posix_spawn_file_actions_adddup2(actions, 0, 2))
        closefrom = getattr(libc, "posix_spawn_file_actions_addclosefrom_np", None)
        if closefrom is not None:
            _check(closefrom(actions, 3))
        _check(libc.posix_spawn_file_actions_addchdir_np(actions, cwd))
        pid = ctypes.c_int()
        _check(
            libc.posix_spawn(
                ctypes.byref(pid),
                ctypes.c_char_p(program),
                actions,
                attributes,
                _string_array([os.fsencode(word) for word in argv]),
                _string_array([os.fsencode(f"{name}={value}") for name, value in env.items()]),
            )
        )
        return pid.value
    finally:
        libc.posix_spawn_file_actions_destroy(actions)
        libc.posix_spawnattr_destroy(attributes)


def _string_array(values: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(values) + 1))(*values, None)


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
