"""Which bubblewrap there is, and whether this kernel lets it work (sandbox.md §6, §11.5)."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import trio
from attrs import define, frozen

from execenv.errors import InternalError, NotSupported
from execenv.local.spawn import exit_code_of
from execenv.local.watchdog import open_pidfd, read_stat, wait_gone
from execenv.sandbox.seccomp import compile_filter

NEEDED = frozenset(
    (
        *("--args", "--as-pid-1", "--bind", "--block-fd", "--cap-add", "--cap-drop", "--chdir", "--dev"),
        *("--die-with-parent", "--dir", "--json-status-fd", "--new-session", "--perms", "--proc"),
        *("--remount-ro", "--ro-bind", "--ro-bind-data", "--seccomp", "--symlink", "--tmpfs"),
        *("--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-user"),
    )
)
"""Options that sandboxes are made with. The youngest, --perms, came with 0.5.0."""

INSTALL = "install it (apt install bubblewrap, dnf install bubblewrap, apk add bubblewrap)"
TIME_LIMIT = 10.0
"""Seconds for each thing that a binary is asked when it is probed."""
RETRY_AFTER = 1.0
"""Seconds for which a failed probe is taken to fail again."""

REREAD_AFTER = 1.0
"""Seconds for which a mount that was private is taken to be so still."""

_SYSTEM_PLACES = frozenset(
    (b"/bin", b"/sbin", b"/usr/bin", b"/usr/sbin", b"/usr/local/bin", b"/usr/local/sbin", b"/usr/libexec")
)
_STORES = (b"/nix/store/", b"/gnu/store/")
_MAX_OUTPUT = 64 * 1024
_SHOWN = 300
_SYS_ADMIN = 21  # linux/capability.h
_MFD_EXEC = 0x10  # linux/memfd.h, since 6.3
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, _SHRINK, _GROW, _WRITE
_SEAL_EXEC = 0x20  # of the permission to execute it; since 6.3
_COPY_MODE = 0o500

# What a trial asks beyond the view and its own namespaces, and what the kernel lacks where it fails.
_FEATURES = {
    "network namespaces": ("--unshare-net",),
    "/proc": ("--proc", "/proc"),
    "system call filters": ("--seccomp", "FD"),
}
NAMESPACES = "user namespaces"


@frozen
class Bubblewrap:
    """One that works.

    Attributes:
        path: where it was found, resolved.
        executable: what to execute: `path`, or a descriptor of a sealed copy (`/proc/self/fd/N`) where a
            policy makes `path` writable.
        fd: that descriptor, to be passed on; `None` without a copy.
        version: as it says itself.
        argv0: whether it has `--argv0` (since 0.9.0).
        unshare: a prefix of its command line which cuts its mounts off from those made later; empty where
            no mount of this host propagates.
        unshare_fd: as `fd`, of the program in that prefix.
    """

    path: bytes
    executable: bytes
    fd: int | None
    version: str
    argv0: bool
    unshare: tuple[bytes, ...] = ()
    unshare_fd: int | None = None

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """The descriptors that are to be passed on under the same numbers, so that it can be executed."""
        return tuple(fd for fd in (self.fd, self.unshare_fd) if fd is not None)


@frozen
class Finding:
    """What was learnt of a program called bwrap.

    Attributes:
        version: empty if it does not say so.
        problem: why it cannot be used, in words; `None` if it works.
        lacking: which of `NAMESPACES` and the other features of the kernel it did not get.
    """

    path: bytes
    version: str = ""
    argv0: bool = False
    problem: str | None = None
    lacking: tuple[str, ...] = ()


_Identity = tuple[int, ...]


@define(eq=False)
class _Known:
    finding: Finding
    expires: float


class Bubblewraps:
    """Finds it, and remembers what was learnt of each binary.

    Args:
        ours: the environment whose PATH is searched.
        known: the children that somebody waits for (`Guard.known`); those of this object are added.
    """

    def __init__(self, ours: Mapping[str, str], known: set[int] | None = None) -> None:
        self._ours = ours
        self._children = set() if known is None else known
        self._lock = trio.Lock()
        self._known: dict[tuple[_Identity, tuple[bytes, ...]], _Known] = {}
        self._copies: dict[_Identity, int] = {}
        self._propagation = Propagation()
        self._chosen: bytes | None = None

    def close(self) -> None:
        """Let go of descriptors."""
        self._propagation.close()
        while self._copies:
            os.close(self._copies.popitem()[1])

    async def find(self, writable_roots: Iterable[bytes] = ()) -> Bubblewrap:
        """The first on PATH that works and that a sandbox with these writable roots could not exchange.

        Probes a binary once, and again after it failed or was replaced. One that was found stays the one to
        use while it works: what appears before it on PATH may come from a sandbox.

        Raises:
            InternalError: there is none; the message says why and what to do.
        """
        if sys.platform != "linux":
            raise InternalError("cannot enforce the sandbox: that takes Linux, for bubblewrap")
        roots = tuple(writable_roots)
        problems: list[str] = []
        try:
            unshare, unshare_fd = self._unshare(roots)
            for path in self._candidates():
                exchangeable = _lies_below(path, roots)
                if exchangeable and not _is_system_place(path):
                    problems.append(f"{_shown(path)} does not count, as it can be written in the sandbox")
                    continue
                finding = await self._probe(path, unshare, unshare_fd)
                if finding.problem is not None:
                    problems.append(finding.problem)
                    continue
                self._chosen = path
                fd = self._copy(path) if exchangeable else None
                return Bubblewrap(
                    path,
                    path if fd is None else b"/proc/self/fd/%d" % fd,
                    fd,
                    finding.version,
                    finding.argv0,
                    unshare,
                    unshare_fd,
                )
        except OSError as error:
            problems.append(f"{error}")
        reason = "; ".join(problems) or f"there is no bubblewrap (bwrap) on PATH: {INSTALL}"
        raise InternalError(f"cannot enforce the sandbox: {reason}")

    async def examine(self) -> tuple[Finding, ...]:
        """What is to be said of each on PATH, in order, for people.

        Raises:
            InternalError: there is none that could be tried.
        """
        unshare, unshare_fd = self._unshare(())
        return tuple([await self._probe(path, unshare, unshare_fd) for path in self._candidates()])

    @property
    def mounts_propagate(self) -> bool:
        """Whether a mount of this host that is made later would appear in a view without `unshare`."""
        return self._propagation.any

    # Candidates.

    def _candidates(self) -> Iterator[bytes]:
        """Resolved, each once."""
        seen = set()
        for path in (*((self._chosen,) if self._chosen else ()), *_on_path(self._ours, b"bwrap")):
            if path not in seen and os.path.exists(path):
                seen.add(path)
                yield path

    def _unshare(self, roots: Sequence[bytes]) -> tuple[tuple[bytes, ...], int | None]:
        if not self._propagation.any:
            return (), None
        places = (b"/usr/bin/unshare", b"/bin/unshare", *_on_path(self._ours, b"unshare"))
        for candidate in places:
            path = os.path.realpath(candidate)
            if not os.access(path, os.X_OK):
                continue
            exchangeable = _lies_below(path, roots)
            if exchangeable and not _is_system_place(path):
                continue
            fd = self._copy(path) if exchangeable else None
            program = path if fd is None else b"/proc/self/fd/%d" % fd
            user = () if _has_sys_admin() else (b"--user", b"--map-current-user")
            return (program, *user, b"--mount", b"--propagation", b"private", b"--"), fd
        raise InternalError(
            "cannot enforce the sandbox: mounts of this machine propagate, and there is no `unshare` to cut "
            "them off with: install util-linux (apt install util-linux, dnf install util-linux-core)"
        )

    def _copy(self, path: bytes) -> int:
        """A descriptor of what the file was when it was first asked for, which nobody can change."""
        identity = _identity(path)
        if identity not in self._copies:
            self._copies[identity] = _sealed_copy(path)
        fd = self._copies[identity]
        if stat.S_IMODE(os.fstat(fd).st_mode) != _COPY_MODE:
            os.fchmod(fd, _COPY_MODE)  # what runs inside has it as /proc/1/exe
        return fd

    # Probing.

    async def _probe(self, path: bytes, unshare: tuple[bytes, ...], unshare_fd: int | None) -> Finding:
        fds = () if unshare_fd is None else (unshare_fd,)
        async with self._lock:
            try:
                status = os.stat(path)
                identity = _identity(path)
            except OSError as error:
                return Finding(path, problem=f"{_shown(path)}: {error.strerror}")
            # not where a copy of the prefix is executed, but which prefix it is
            key = identity, unshare[1:]
            known = self._known.get(key)
            if known is None or known.expires <= trio.current_time():
                finding = _refused(path, status) or await self._try(path, unshare, fds)
                works = finding.problem is None
                known = _Known(finding, math.inf if works else trio.current_time() + RETRY_AFTER)
                self._known[key] = known
                if works and _is_system_place(path):
                    self._copy(path)  # now, before a sandbox can have changed it
            return known.finding

    async def _try(self, path: bytes, unshare: tuple[bytes, ...], fds: tuple[int, ...]) -> Finding:
        name = _shown(path)
        try:
            said = await self._run((path, b"--version"))
            version = re.match(r"bubblewrap (\d\S*)", said.text)
            if said.status or version is None:
                return Finding(path, problem=f"{name} is no bubblewrap{said.words}")
            said = await self._run((path, b"--help"))
            if said.status:
                return Finding(
                    path, version[1], problem=f"bubblewrap {version[1]} ({name}) does not start{said.words}"
                )
            options = set(re.findall(r"--[a-z0-9-]+", said.text))
            found = Finding(path, version[1], "--argv0" in options)
            if missing := NEEDED - options:
                return Finding(
                    path,
                    found.version,
                    found.argv0,
                    f"{name} is bubblewrap {found.version}, which is too old: 0.5.0 is needed "
                    f"({', '.join(sorted(missing))} is missing): {INSTALL}",
                )
            return await self._try_features(found, unshare, fds)
        except trio.TooSlowError:
            return Finding(path, problem=f"{name} did not answer within {TIME_LIMIT:g} s")
        except OSError as error:  # exec failed: another machine's program, no interpreter
            return Finding(path, problem=f"{name} cannot be executed: {error.strerror}")

    async def _try_features(
        self, found: Finding, unshare: tuple[bytes, ...], fds: tuple[int, ...]
    ) -> Finding:
        every = await self._trial(found.path, unshare, fds, _FEATURES)
        if every.status == 0 and every.is_version:
            return found
        bare = every if every.status == 0 else await self._trial(found.path, unshare, fds, ())
        name = f"bubblewrap {found.version} ({_shown(found.path)})"
        if bare.status == 0 and not bare.is_version:
            problem = f"{name} did not run what it was given{bare.words}"
            return Finding(found.path, found.version, found.argv0, problem)
        if bare.status:
            problem = f"{name} cannot make {NAMESPACES}: {_namespace_hint()}{bare.words}"
            return Finding(found.path, found.version, found.argv0, problem, (NAMESPACES,))
        problems = []
        lacking = []
        for feature in _FEATURES:
            alone = await self._trial(found.path, unshare, fds, (feature,))
            if alone.status:
                lacking.append(feature)
                problems.append(f"{name} {_feature_hint(feature)}{alone.words}")
        problem = "; ".join(problems) or f"{name} failed{every.words}"
        return Finding(found.path, found.version, found.argv0, problem, tuple(lacking))

    async def _trial(
        self, path: bytes, unshare: tuple[bytes, ...], fds: tuple[int, ...], features: Iterable[str]
    ) -> _Said:
        """Run the one program that certainly exists, itself, in the barest sandbox."""
        # as process 1, whose parent waits for it: another one would be left to us
        options = ["--as-pid-1", "--new-session", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev"]
        options += ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--cap-drop", "ALL"]
        filter_fd = _filter_fd()
        try:
            for feature in features:
                words = _FEATURES[feature]
                if words[-1] != "FD":
                    options += words
                elif filter_fd is not None:
                    options += [words[0], str(filter_fd)]
            argv = (*unshare, path, *map(os.fsencode, options), b"--", path, b"--version")
            passed = fds if filter_fd is None else (*fds, filter_fd)
            return await self._run(argv, passed)
        finally:
            if filter_fd is not None:
                os.close(filter_fd)

    async def _run(self, argv: Sequence[bytes], fds: tuple[int, ...] = ()) -> _Said:
        """Run a program to its end, with no environment and nothing of ours but `fds`.

        Raises:
            OSError: it cannot be started.
            TooSlowError: it took too long, and was killed.
        """
        read_end, write_end = os.pipe()
        try:
            os.set_blocking(read_end, False)
            # in the Trio thread: bubblewrap dies with the thread that forked it (sandbox.md §11.2)
            child = subprocess.Popen(  # noqa: ASYNC220
                argv,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env={},
                cwd="/",
                pass_fds=fds,
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._children.add(child.pid)
        output = bytearray()
        try:
            with trio.fail_after(TIME_LIMIT):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_collect, read_end, output)
                    await _wait_exit(child.pid)
                    nursery.cancel_scope.cancel()  # something that it started may hold the pipe
            while _take(read_end, output):
                pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            self._children.discard(child.pid)
            os.close(read_end)
        return _Said(exit_code_of(child.returncode), output.decode(errors="replace"))


@frozen
class _Said:
    """How a program ended, and its stdout and stderr."""

    status: int
    text: str

    @property
    def is_version(self) -> bool:
        """Whether it is what a program that was run in a sandbox should have said."""
        return re.search(r"^bubblewrap \d", self.text, re.MULTILINE) is not None

    @property
    def words(self) -> str:
        """That, for the end of a message."""
        text = " ".join("".join(c if c.isprintable() else " " for c in self.text).split())
        if len(text) > _SHOWN:
            text = text[:_SHOWN] + "…"
        return f" (status {self.status}: {text})" if text else f" (status {self.status}, without a word)"


async def _wait_exit(pid: int) -> None:
    found = read_stat(pid)
    pidfd = open_pidfd(pid)
    try:
        await wait_gone(pid, found.starttime if found else 0, pidfd)
    finally:
        if pidfd is not None:
            os.close(pidfd)


async def _collect(fd: int, output: bytearray) -> None:
    """Keep the beginning of what is written, and read on, so that the writer ends."""
    while True:
        await trio.lowlevel.wait_readable(fd)
        if not _take(fd, output):
            return


def _take(fd: int, output: bytearray) -> bool:
    """Read once; False at the end, or if there is nothing now."""
    try:
        data = os.read(fd, _MAX_OUTPUT)
    except BlockingIOError:
        return False
    output += data[: _MAX_OUTPUT - len(output)]
    return bool(data)


class Propagation:
    """Whether mounts of this machine propagate: bubblewrap makes those of a view their slaves (bubblewrap.c).

    So a file system that is mounted later, beneath a directory that is bound, appears inside, with what it
    was mounted with.
    """

    def __init__(self, path: str = "/proc/self/mountinfo") -> None:
        self._fd = -1
        self._poll = select.poll() if sys.platform == "linux" else None
        self._any = True  # what cannot be known is taken for the worse
        self._expires = -math.inf
        with suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if self._poll is not None:
                self._poll.register(self._fd, select.POLLPRI | select.POLLERR)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def any(self) -> bool:
        # The kernel marks the file when a mount comes or goes (proc(5)), but not when one becomes shared.
        if self._fd >= 0 and self._poll is not None:
            now = time.monotonic()
            if self._poll.poll(0) or now >= self._expires:
                self._expires = now + REREAD_AFTER
                self._any = self._read()
        return self._any

    def _read(self) -> bool:
        data = b""
        while part := os.pread(self._fd, 64 * 1024, len(data)):
            data += part
        # the optional fields are between the sixth and the dash
        fields = (line.partition(b" - ")[0].split(b" ")[6:] for line in data.split(b"\n"))
        return any(tag.startswith((b"shared:", b"master:")) for tags in fields for tag in tags)


def _on_path(ours: Mapping[str, str], name: bytes) -> Iterator[bytes]:
    """Every file of that name on PATH, resolved; executable or not, since one that is not is worth a word."""
    for directory in os.fsencode(ours.get("PATH", "")).split(b":"):
        candidate = os.path.join(directory, name)
        # a relative directory is another one with every directory we are in
        if directory.startswith(b"/") and os.path.lexists(candidate):
            yield os.path.realpath(candidate)


def _lies_below(path: bytes, roots: Iterable[bytes]) -> bool:
    for root in map(os.path.realpath, roots):
        if path == root or path.startswith(root.rstrip(b"/") + b"/"):
            return True
    return False


def _is_system_place(path: bytes) -> bool:
    return os.path.dirname(path) in _SYSTEM_PLACES or path.startswith(_STORES)


def _identity(path: bytes) -> _Identity:
    found = os.stat(path)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _refused(path: bytes, status: os.stat_result) -> Finding | None:
    """What can be said without running it."""
    name = _shown(path)
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.X_OK):
        return Finding(path, problem=f"{name} is not executable: chmod +x {name}, or {INSTALL}")
    if status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid():
        # Then what it sets up belongs to root: it refuses --cap-add, and nobody else may compare its mounts
        # with what was asked for.
        return Finding(
            path,
            problem=f"{name} is set-user-ID, so what it does cannot be checked: chmod u-s {name}, and allow "
            f"{NAMESPACES} ({_namespace_hint()})",
        )
    return None


def _sealed_copy(path: bytes) -> int:
    with open(path, "rb") as file:
        data = file.read()
    name = os.path.basename(path).decode(errors="replace")
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    try:
        os.fchmod(fd, _COPY_MODE)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_EXEC)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        # A file that is open for writing cannot be executed.
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _filter_fd() -> int | None:
    """The filter of system calls as a file; `None` where there is none for this machine."""
    try:
        program = compile_filter(network=False)
    except NotSupported:
        return None
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    os.write(fd, program)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _has_sys_admin() -> bool:
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _SYS_ADMIN & 1)
    return False


def _shown(path: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in path.decode(errors="replace"))


def read_sysctl(name: str) -> str | None:
    """What a setting of the kernel is; `None` if this kernel has no such setting."""
    try:
        with open(f"/proc/sys/{name.replace('.', '/')}") as file:
            return file.read().strip()
    except OSError:
        return None


def _namespace_hint() -> str:
    if read_sysctl("kernel.unprivileged_userns_clone") == "0":
        return "allow them by `sysctl kernel.unprivileged_userns_clone=1`"
    if read_sysctl("user.max_user_namespaces") == "0":
        return "allow them by `sysctl user.max_user_namespaces=10000`"
    if read_sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor restricts them: install a profile for it that has `userns,` (bwrap-userns-restrict of "
            "apparmor-profiles), or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
        )
    return (
        "this kernel, a security policy, or the container forbids them (docker run --security-opt "
        "seccomp=unconfined --security-opt apparmor=unconfined allows them)"
    )


def _feature_hint(feature: str) -> str:
    if feature == "/proc":
        return (
            "cannot mount /proc: parts of the one here are covered, as in a container (docker run "
            "--security-opt systempaths=unconfined, podman run --security-opt unmask=ALL, Kubernetes "
            "procMount: Unmasked uncover it)"
        )
    if feature == "network namespaces":
        if read_sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1":
            return f"cannot set up a network namespace: {_namespace_hint()}"
        return "cannot set up a network namespace: this kernel, a policy, or the container forbids it"
    return "cannot refuse system calls: this kernel lacks CONFIG_SECCOMP_FILTER"
