"""Paths on the command line: `PATH` here, `ENV:PATH` elsewhere, as scp has it."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, TypeAlias

from attrs import frozen

from execenv import targets
from execenv.errors import UsageError

if TYPE_CHECKING:
    from execenv.environment import Environment

# A number behind the host is its port (possessive: never a path), unless it is only how a name begins.
_URL = re.compile(r"(wss?://(?:\[[^\]]+\]|[^/:\[]+)(?::[0-9]+(?=[:/]|\Z))?+(?:/[^:]*)?):(.*)", re.DOTALL)
# Behind a relay an environment has an id, so its URL has a path: that ends at its first colon.
_RELAY_URL = re.compile(r"(relay\+https?://(?:\[[^\]]+\]|[^/:\[]+)(?::[0-9]+)?/[^:]*):(.*)", re.DOTALL)
_NAME = re.compile(r"([^/:]+):(.*)", re.DOTALL)

Target: TypeAlias = str | list[str] | targets.Target
"""What `open_environment` takes."""
Named: TypeAlias = Callable[[str], targets.Target | None]
"""From the name of a configured environment to its target; `None` if there is no such environment."""


@frozen
class Access:
    """How the environments of one command are reached.

    Attributes:
        token: for URLs of the command line; what is configured has its own.
        recovery: seconds for a lost connection to be made again.
    """

    token: str | None = None
    recovery: float = targets.RECOVERY

    def open(self, target: Target) -> AbstractAsyncContextManager[Environment]:
        from execenv.open import open_environment

        token = self.token if isinstance(target, str) and target != "local" else None
        return open_environment(target, bearer_token=token, recovery=self.recovery)


def nothing_named(name: str) -> targets.Target | None:
    """For where nothing is configured."""
    return None


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


def parse_target(text: str, named: Named | None = None) -> Target:
    """What `--env` takes.

    `local`, a ws:// or wss:// URL, the relay+https:// URL of an environment behind a relay, the name of a
    configured environment, or a command that speaks the protocol over stdio. `local`, URLs and more than one
    word are what they are whatever is configured.

    Args:
        named: looks names up. A word that is none must then be a program that can be found.

    Raises:
        UsageError: if it is none of these.
    """
    if text == "local" or text.startswith(("ws://", "wss://")):
        return text
    if targets.is_relay_url(text):
        targets.parse_relay_url(text)
        return text
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no command: {str(error).lower()}") from None
    if not words or (len(words) == 1 and "://" in text):
        raise UsageError(
            f"{targets.shown_url(text)!r} is no environment (--env): use local, a ws:// or relay+https:// "
            "URL, a configured name or a command"
        )
    if named is not None and len(words) == 1 and "/" not in words[0]:
        target = named(words[0])
        if target is not None:
            return target
        if shutil.which(words[0]) is None:
            raise UsageError(_unknown(words[0]))
    return words


def _unknown(word: str) -> str:
    from execenv.config import close_to, shown
    from execenv.providers import known_names

    names = known_names()
    known = ", ".join(map(shown, names)) or "none"
    return (
        f"{word!r} is no environment: neither configured (known are {known}) nor a program"
        f"{close_to(word, names) or f'; add it with `execenv env add {word} TARGET`'}"
    )


def parse_location(
    text: str,
    aliases: Mapping[str, Target],
    default: Target | Callable[[], Target] = "local",
    named: Named = nothing_named,
) -> Location:
    """Read `PATH`, `ws://HOST:PORT:PATH`, `relay+https://REGISTRY/ID:PATH`, `local:PATH` or `NAME:PATH`.

    The path of a URL goes as far as its first colon, which no id of an environment has in it. A path with a
    colon in its first name is written `./a:b`, as for scp.

    Args:
        aliases: names for this call; they come before those that are configured.
        default: where a path without a place is, or what finds that out when there is such a path.
        named: looks up configured names.

    Raises:
        UsageError: if what stands before the colon is no environment.
    """
    url = _URL.fullmatch(text)
    if url:
        return Location(url[1], url[2], text)
    if text.startswith(("ws://", "wss://")):
        shown = targets.shown_url(text)
        raise UsageError(f"{shown!r} names no path: write URL:PATH, such as ws://127.0.0.1:8765:/srv")
    if targets.is_relay_url(text):
        relay = _RELAY_URL.fullmatch(text)
        targets.parse_relay_url(relay[1] if relay else text)
        if relay:
            return Location(relay[1], relay[2], text)
        raise UsageError(
            f"{targets.shown_registry(text)!r} names no path: write relay+https://REGISTRY/ID:PATH"
        )
    found = _NAME.fullmatch(text)
    if found is None:
        return Location(default() if callable(default) else default, text, text)
    name, path = found[1], found[2]
    if name in aliases:
        return Location(aliases[name], path, text)
    if name == "local":
        return Location("local", path, text)
    target = named(name)
    if target is not None:
        return Location(target, path, text)
    raise UsageError(
        f"{name!r} is no environment that is known here: name it by --alias {name}=TARGET "
        f"or `execenv env add {name} TARGET`, or write ./{text} for a file"
    )


def parse_alias(text: str, named: Named | None = None) -> tuple[str, Target]:
    """`NAME=TARGET`.

    Raises:
        UsageError: if it is not that.
    """
    name, equals, target = text.partition("=")
    if not equals or not name or "/" in name or ":" in name:
        raise UsageError(f"--alias takes NAME=TARGET, not {text!r}")
    return name, parse_target(target, named)
