"""The program that `execenv._bootstrap` gives to a Python on the other side, as text: `python3 -c`.

It finds or stores the server there and becomes it. It runs alone, before there is anything else of us: it has
only the standard library of any Python >= 3.11. Its one argument is the hash of the server's files; it speaks
in lines `execenv-bootstrap KIND TEXT` on stdout. All input is read from the descriptor in exact lengths,
because what follows belongs to the server.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256

CHUNK = 32768


class _Refused(Exception):
    """What is to be told to whoever started us."""


def say(kind: str, text: str = "") -> None:
    # The first line end is for what a shell may have printed without one.
    line = f"execenv-bootstrap {kind} {' '.join(text.split())[:2000]}"
    os.write(1, b"\n%b\n" % line.rstrip().encode(errors="replace"))


# Input.


def receive() -> bytes:
    """The archive: its length, a line end, and that many bytes."""
    digits = b""
    while not digits.endswith(b"\n"):
        digits = (digits + _read(1)).lstrip()  # a shell may leave the last line end of its script
        if len(digits) > 20:
            raise _Refused("what was received has no length")
    left = int(digits)
    pieces = []
    told = got = 0
    while got < left:
        pieces.append(_read(min(CHUNK, left - got)))
        got += len(pieces[-1])
        if got - told >= CHUNK:
            told = got
            say("got", str(got))
    return b"".join(pieces)


def _read(size: int) -> bytes:
    piece = os.read(0, size)
    if not piece:
        raise _Refused("stdin ended before the server was received")
    return piece


def unpack(archive: bytes, wanted: str) -> dict[str, bytes]:
    """Names and contents, if the hash over all is the one that is wanted."""
    import zlib

    try:
        data = zlib.decompress(archive)
    except zlib.error as error:
        raise _Refused(f"what was received is damaged: {error}") from None
    if sha256(data).hexdigest() != wanted:
        raise _Refused("what was received has another hash than was announced")
    files = {}
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        size, name = data[at:end].decode().split(" ", 1)
        at = end + 1 + int(size)
        files[name] = data[end + 1 : at]
    return files


# The cache.


def places() -> Iterator[str]:
    """Directories for the cache, the best one first."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.cache")
    if os.path.isabs(home):  # some users have no home
        yield os.path.join(home, "execenv")
    for directory in (os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - checked
        if os.path.isabs(directory):
            yield os.path.join(directory, f"execenv-{os.geteuid()}")


def check_private(place: str) -> None:
    """Nobody else may write what we are about to run."""
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{place} is no directory that only this user can change")


def is_intact(directory: str, wanted: str) -> bool:
    """Whether exactly the files are there whose hash is wanted."""
    whole = sha256()
    try:
        for name in sorted(_names(directory, "")):
            # Whatever was put there in the place of a file, it is not followed and not waited for.
            fd = os.open(os.path.join(directory, name), os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                data = file.read()
            whole.update(f"{len(data)} {name}\n".encode() + data)
    except (OSError, UnicodeError):
        return False
    return whole.hexdigest() == wanted


def _names(directory: str, prefix: str) -> Iterator[str]:
    with os.scandir(os.path.join(directory, prefix)) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield prefix + entry.name
            elif entry.name != "__pycache__":  # made by Python from what is checked
                yield from _names(directory, f"{prefix}{entry.name}/")


def find(wanted: str) -> str | None:
    for place in places():
        try:
            check_private(place)
        except OSError:
            continue
        if is_intact(os.path.join(place, wanted), wanted):
            return os.path.join(place, wanted)
    return None


def store(files: dict[str, bytes], wanted: str) -> str:
    """Keep the files in the first place that takes them; where they are."""
    reasons = []
    for place in places():
        try:
            return _store_in(place, files, wanted)
        except OSError as error:
            reasons.append(str(error))
    raise _Refused("no place there to keep the server (XDG_CACHE_HOME may name one): " + "; ".join(reasons))


def _store_in(place: str, files: dict[str, bytes], wanted: str) -> str:
    os.makedirs(os.path.dirname(place), 0o700, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(place, 0o700)
    check_private(place)
    before = os.umask(0o077)
    final = os.path.join(place, wanted)
    new = os.path.join(place, f".new-{os.urandom(8).hex()}")
    try:
        for name, data in files.items():
            path = os.path.join(new, name)
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(path, "xb") as file:
                file.write(data)
        # Somebody else may do the same now. Whoever comes second takes what is there, if it is intact.
        for _ in range(3):
            try:
                os.rename(new, final)
                return final
            except OSError:
                if is_intact(final, wanted):
                    return final
                _put_aside(final, new + ".old")
        raise FileExistsError(f"{final} is damaged and cannot be replaced")
    finally:
        os.umask(before)
        _remove(new)
        _remove(new + ".old")


def _put_aside(path: str, aside: str) -> None:
    with suppress(OSError):  # gone already, or it stays and the next attempt says why
        os.rename(path, aside)


def _remove(path: str) -> None:
    import shutil

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)


def load(wanted: str) -> Callable[[], None]:
    """The server, which runs until stdin ends."""
    directory = find(wanted)
    if directory is None:
        say("need")
        directory = store(unpack(receive(), wanted), wanted)
    sys.path.insert(0, directory)
    from execenv._bootstrapped import load_server

    return load_server()


def main(wanted: str) -> None:
    say("hello")
    try:
        serve = load(wanted)
    except _Refused as refused:
        say("failed", str(refused))
        sys.exit(1)
    except Exception as error:
        say("failed", f"{type(error).__name__}: {error}")
        raise
    say("ready")
    serve()


if __name__ == "__main__":
    main(sys.argv[1])
