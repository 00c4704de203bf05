"""A server for the other side of a command when none is installed there: all it takes is a Python >= 3.11.

The command runs `sh` there, which reads a short script from its stdin; the script looks for a Python and
becomes `execenv._first_stage`; that looks for the server in its cache, asks for it if need be, and becomes
the server, on the same stdin and stdout. Neither shell nor Python is sent anything before it has said that
it is there, so neither can swallow what is meant for the next. `sh` is all that is ever appended to a
command: nothing that any of the shells on the way (of ssh, or of a chain of tools) would have to have quoted.
"""

from __future__ import annotations

import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from logging import getLogger

import trio
from attrs import define, field, frozen

from execenv._service import open_nursery
from execenv._standard_streams import printable
from execenv.errors import ConnectFailed

logger = getLogger(__name__)

SHELL = "sh"
PROGRESS_TIMEOUT = 30.0
"""Seconds without a word from the other side while it receives, unpacks and imports the server."""
MAX_NOISE = 64 * 1024
"""Bytes that logging in may print (a banner of a shell's start file) before the first line that is ours."""

MODULES = (
    "attr",
    "attrs",
    "cattrs",
    "execenv",
    "h11",
    "httpcore2",
    "idna",
    "outcome",
    "sniffio",
    "sortedcontainers",
    "tomlkit",
    "trio",
    "truststore",
    "typing_extensions",
)
"""What the server imports of other people's work, and what that imports: nothing in it may be compiled."""

_LEFT_OUT = {"__pycache__", "_tests", "tests", "testing", "mypy_stubs"}

# Each is run once, for its version: what `command -v` finds may still not run, as the shims of pyenv.
_NAMES = "python3 python3.14 python3.13 python3.12 python3.11 python"
_ELSEWHERE = (  # what a shell that nobody logged in to does not have on its PATH
    '"$HOME"/.local/bin/python3.1[1-9] "$HOME"/.local/share/uv/python/cpython-3.1[1-9]*/bin/python3'
    " /usr/local/bin/python3 /opt/homebrew/bin/python3"
)
_VERSION = 'import sys; print(".".join(map(str, sys.version_info[:3]))); sys.exit(sys.version_info < (3, 11))'

# In braces: a shell reads all of a command before it runs it, and may leave in the pipe what is behind that.
_SCRIPT = """\
{{
if [ -t 0 ]; then echo; echo "execenv-bootstrap terminal"; exit 1; fi
found=
for python in {pythons}; do
command -v "$python" >/dev/null 2>&1 || continue
version=$("$python" -ESs -c {version} </dev/null 2>/dev/null) && exec "$python" -I -S -c {program} {wanted}
found="$found${{found:+, }}$python ${{version:-that does not run}}"
done
echo; echo "execenv-bootstrap no-python $found"
exit 1
}}
"""


@frozen
class Archive:
    """The server as one value.

    Attributes:
        data: all files, each behind a line `SIZE NAME`, in the order of their names.
        digest: the SHA-256 of that. It is of the contents and not of a compressed form: two versions of
            zlib make two of those.
    """

    data: bytes
    digest: str

    def compressed(self) -> bytes:
        return zlib.compress(self.data)


@cache
def archive() -> Archive:
    """The server as it is installed here: the Python files of `MODULES`, and their versions.

    Raises:
        ConnectFailed: if this installation has no files, because it is inside a zip, for example.
    """
    files = dict(pair for module in MODULES for pair in (*_files(module), *_metadata(module)))
    data = b"".join(b"%d %s\n%s" % (len(files[name]), name.encode(), files[name]) for name in sorted(files))
    return Archive(data, sha256(data).hexdigest())


def _files(module: str) -> Iterator[tuple[str, bytes]]:
    spec = find_spec(module)
    try:
        if spec is None or spec.origin is None:
            raise FileNotFoundError("it is not installed")
        if spec.submodule_search_locations is None:
            yield f"{module}.py", _content(spec.origin)
            return
        top = os.path.dirname(spec.origin)
        if not os.path.isdir(top):
            raise FileNotFoundError(f"{top} is no directory")
        for directory, subdirectories, names in os.walk(top):
            subdirectories[:] = [name for name in subdirectories if name not in _LEFT_OUT]
            inside = os.path.relpath(directory, os.path.dirname(top)).replace(os.sep, "/")
            for name in names:
                if name.endswith(".py"):
                    yield f"{inside}/{name}", _content(os.path.join(directory, name))
    except OSError as error:
        raise ConnectFailed(f"the server cannot be shipped: {module}: {error}") from error


def _metadata(module: str) -> Iterator[tuple[str, bytes]]:
    """As much as `importlib.metadata.version` wants: httpcore2 asks for its own."""
    with suppress(PackageNotFoundError):
        number = version(module)
        yield (
            f"{module}-{number}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {module}\nVersion: {number}\n".encode(),
        )


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def script(wanted: str) -> str:
    """What `sh` is given: the server whose hash is wanted, please."""
    program = _content(os.path.join(os.path.dirname(__file__), "_first_stage.py")).decode()
    return _SCRIPT.format(
        pythons=f"{_NAMES} {_ELSEWHERE}",
        version=shlex.quote(_VERSION),
        program=shlex.quote(program),
        wanted=wanted,
    )


async def start_server(label: str, read_fd: int, write_fd: int, *, timeout: float, noise: list[str]) -> None:
    """Turn the shell behind two non-blocking descriptors into a server that waits for `initialize`.

    Args:
        label: what the command is called in errors.
        timeout: seconds for the first word from a Python there. What follows, a look at its cache and sending
            the server, has no limit but `PROGRESS_TIMEOUT`.
        noise: gets the lines that came before that word and are not ours.

    Raises:
        ConnectFailed: if no server can be started there.
    """
    shipped = await trio.to_thread.run_sync(archive)
    talk = _Talk(label, read_fd, write_fd, noise)
    try:
        with trio.fail_after(timeout):
            await talk.write(script(shipped.digest).encode())
            kind = await talk.next_kind()
    except trio.TooSlowError as error:
        raise ConnectFailed(
            f"{label}: neither a shell nor a Python answered there within {timeout:g} s"
        ) from error
    if kind == "hello":
        kind = await _in_time(talk)
    if kind == "need":
        data = await trio.to_thread.run_sync(shipped.compressed)
        logger.info("%s: sending the server, %d bytes", label, len(data))
        async with open_nursery() as nursery:
            nursery.start_soon(talk.write, b"%d\n%b" % (len(data), data))
            kind = "got"
            while kind == "got":
                kind = await _in_time(talk)
            nursery.cancel_scope.cancel()
    if kind != "ready" or talk.received:
        raise ConnectFailed(f"{label}: a confused answer to the bootstrap: {printable(kind)[:80]!r}")


async def _in_time(talk: _Talk) -> str:
    try:
        with trio.fail_after(PROGRESS_TIMEOUT):
            return await talk.next_kind()
    except trio.TooSlowError as error:
        raise ConnectFailed(
            f"{talk.label}: silent for {PROGRESS_TIMEOUT:g} s while the server was brought to its other side"
        ) from error


@define(eq=False)
class _Talk:
    """Lines from the other side, and bytes to it."""

    label: str
    _read_fd: int
    _write_fd: int
    _noise: list[str]
    received: bytes = field(default=b"", init=False)
    _noise_left: int = field(default=MAX_NOISE, init=False)

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            await trio.lowlevel.wait_writable(self._write_fd)
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                continue
            except OSError:
                return  # the reader gets to know why

    async def next_kind(self) -> str:
        """The next word that is ours.

        Raises:
            ConnectFailed: if the other side gives up, says why, or says nothing that makes sense.
        """
        while True:
            line = await self._line()
            words = line.split(" ", 2)
            if words[0] != "execenv-bootstrap" or len(words) == 1:
                if line:
                    self._noise.append(line)
                del self._noise[:-20]
                continue
            kind, text = words[1], printable(words[2] if len(words) > 2 else "")[:2000]
            if kind == "no-python":
                raise ConnectFailed(
                    f"{self.label}: no Python >= 3.11 at the other side ({_found(text)}): install one there, "
                    "or execenv itself, or have it on the PATH that the command gets there"
                )
            if kind == "terminal":
                raise ConnectFailed(
                    f"{self.label}: stdin is a terminal at the other side: leave out -t, -tt and --pty"
                )
            if kind == "failed":
                raise ConnectFailed(f"{self.label}: the server could not be started there: {text}")
            return kind

    async def _line(self) -> str:
        while b"\n" not in self.received:
            await trio.lowlevel.wait_readable(self._read_fd)
            try:
                piece = os.read(self._read_fd, 65536)
            except BlockingIOError:
                continue
            self.received += piece
            self._noise_left -= len(piece)
            if not piece or self._noise_left < 0:
                if self.received:
                    self._noise.append(self.received[:1000].decode(errors="replace"))
                what = "it ended before" if not piece else "too much was printed before"
                raise ConnectFailed(f"{self.label}: {what} a server was started at the other side")
        line, _, self.received = self.received.partition(b"\n")
        return line.decode(errors="replace").strip()


def _found(text: str) -> str:
    return f"found {text}" if text else "found none"
