"""`execenv serve --remote`: what its options mean. Imported only where they are used."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import click
from attrs import frozen

from execenv.errors import UsageError
from execenv.relay.credentials import VARIABLES, api_key_headers, find_api_key
from execenv.relay.registry import check_environment_id
from execenv.targets import Security


@frozen
class RemoteOptions:
    """The options of `serve` that are about a relay, as they were given."""

    registry: str
    environment_id: str | None
    name: str | None
    security: Security
    api_key_file: str | None
    api_key_stdin: bool
    allow: tuple[str, ...]


def arguments(options: RemoteOptions) -> dict[str, Any]:
    """The arguments of `execenv.server.serve_remote` that they stand for. Reads the API key, and takes the
    variables that hold one out of our own environment, which all programs that we start inherit.

    Raises:
        click.ClickException: if they don't fit together, or if there is no key that the registry may see.
    """
    if options.environment_id is None:
        raise click.ClickException("--remote needs --environment-id ID: what the registry is to call this")
    if options.api_key_file is not None and options.api_key_stdin:
        raise click.ClickException("--api-key-file and --api-key-stdin: the key comes from one place")
    try:
        check_environment_id(options.environment_id)
        key = find_api_key(
            file=options.api_key_file,
            stdin=sys.stdin.buffer if options.api_key_stdin else None,
            environ=os.environ,
        )
        headers = api_key_headers(key, options.registry, options.allow)
    except UsageError as error:
        raise click.ClickException(str(error)) from error
    shown = None if key.variable is None else os.environ[key.variable].strip()
    for name in VARIABLES:  # the first is ours and nobody else's; another one may be for a program
        if name == VARIABLES[0] or os.environ.get(name, "").strip() == shown:
            _take_out(name)
    return {
        "registry_url": options.registry,
        "environment_id": options.environment_id,
        "headers": headers,
        "security": options.security,
        "name": socket.gethostname() if options.name is None else options.name,
        "connected": _told_once(options.environment_id),
    }


def _take_out(name: str) -> None:
    """Remove a variable; also from what Linux shows of this process to all others of this user, which is the
    memory that it was started with."""
    if name not in os.environ:
        return
    if sys.platform == "linux":
        import ctypes

        getenv = ctypes.CDLL(None).getenv
        getenv.argtypes, getenv.restype = [ctypes.c_char_p], ctypes.c_void_p
        if value := getenv(name.encode()):
            ctypes.memset(value, 0, len(ctypes.string_at(value)))
    del os.environ[name]


def _told_once(environment_id: str) -> Callable[[str], None]:
    told = False

    def connected(url: str) -> None:
        nonlocal told
        if not told:
            told = True
            click.echo(f"registered {environment_id} at {url}")

    return connected
