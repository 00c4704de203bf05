"""Paths on the command line: `PATH` here, `ENV:PATH` elsewhere, as scp has it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from attrs import frozen

from execenv.errors import UsageError
from execenv.targets import CommandTarget

# A number behind the host is its port (possessive: never a path), unless it is only how a name begins.
_URL = re.compile(r"(wss?://(?:\[[^\]]+\]|[^/:\[]+)(?::[0-9]+(?=[:/]|\Z))?+(?:/[^:]*)?):(.*)", re.DOTALL)
_NAME = re.compile(r"([^/:]+):(.*)", re.DOTALL)

Target = str | list[str] | CommandTarget


@frozen
class Location:
    """A path and where it is.

    Attributes:
        target: for `open_environment`.
        path: as that environment has it; may be empty, for its working directory.
        text: as it was given.
    """

    target: Target
    path: str
    text: str


def parse_target(text: str) -> Target:
    """What `--env` takes: `local`, a ws:// or wss:// URL, or a command that speaks the protocol over stdio.

    Raises:
        UsageError: if it is none of these.
    """
    if text == "local" or text.startswith(("ws://", "wss://")):
        return text
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no command: {str(error).lower()}") from None
    if not words or (len(words) == 1 and "://" in text):
        raise UsageError(f"{text!r} is no environment (--env): use local, a ws:// URL or a command")
    return words


def parse_location(text: str, aliases: Mapping[str, Target], default: Target = "local") -> Location:
    """Read `PATH`, `ws://HOST:PORT:PATH`, `local:PATH` or `NAME:PATH`.

    A path with a colon in its first name is written `./a:b`, as for scp.

    Raises:
        UsageError: if what stands before the colon is no environment.
    """
    url = _URL.fullmatch(text)
    if url:
        return Location(url[1], url[2], text)
    if text.startswith(("ws://", "wss://")):
        raise UsageError(f"{text!r} names no path: write URL:PATH, such as ws://127.0.0.1:8765:/srv")
    named = _NAME.fullmatch(text)
    if named is None:
        return Location(default, text, text)
    name, path = named[1], named[2]
    if name in aliases:
        return Location(aliases[name], path, text)
    if name == "local":
        return Location("local", path, text)
    raise UsageError(
        f"{name!r} is no environment that is known here: name it by --alias {name}=TARGET, "
        f"or write ./{text} for a file"
    )


def parse_alias(text: str) -> tuple[str, Target]:
    """`NAME=TARGET`.

    Raises:
        UsageError: if it is not that.
    """
    name, equals, target = text.partition("=")
    if not equals or not name or "/" in name or ":" in name:
        raise UsageError(f"--alias takes NAME=TARGET, not {text!r}")
    return name, parse_target(target)
