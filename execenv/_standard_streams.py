"""Our own stdin, stdout and stderr, as tasks use them. They stay blocking: others may share them with us."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from execenv.environment import Environment

PIECE = 4096  # PIPE_BUF: what a pipe that is writable takes without blocking
READ_SIZE = 64 * 1024
A_MOMENT = 0.5
"""Seconds of a lost connection that nobody needs to hear of."""

# Controls, line ends, reversals of direction, and bytes that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would obey, or could not show."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """What is wrong, for people."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        path, text = os.fsdecode(error.filename), str(error.strerror)
        text = text if path in text else f"{path}: {text}"
    return printable(" ".join(text.split())) or type(error).__name__


def complain(text: str) -> None:
    """Say on stderr, in a line, what is wrong or left out."""
    print(f"execenv: {text}", file=sys.stderr, flush=True)


async def tell_of_losses(environment: Environment) -> None:
    """Say on stderr when the connection is lost for more than a moment, and when it is there again.

    Runs until cancelled.
    """
    told = False
    async for change in environment.status:
        if change.state == "recovering" and not told:
            await trio.sleep(A_MOMENT)
            if environment.status.state == "recovering":
                told = True
                complain(f"{environment.name}: connection lost, trying to get it back")
        elif change.state == "connected" and told:
            told = False
            complain(f"{environment.name}: connected again")


async def pieces(fd: int) -> AsyncGenerator[bytes, None]:
    """What can be read from a descriptor, up to its end, as it comes."""
    while True:
        await _ready(trio.lowlevel.wait_readable, fd)
        try:
            piece = os.read(fd, READ_SIZE)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                continue
            return
        if not piece:
            return
        yield piece


async def write(fd: int, data: bytes) -> None:
    """Write all of `data`, waiting for whoever reads it.

    Raises:
        BrokenPipeError: if nobody will.
    """
    view = memoryview(data)
    while view:
        await _ready(trio.lowlevel.wait_writable, fd)
        try:
            view = view[os.write(fd, view[:PIECE]) :]
        except BlockingIOError:
            continue


async def _ready(wait: Callable[[int], Awaitable[None]], fd: int) -> None:
    try:
        await wait(fd)
    except PermissionError:  # a regular file is always ready, and epoll refuses to say so
        await trio.lowlevel.checkpoint()
