"""How an environment is reached: the union behind every name, URL and command (environments.md §1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from attrs import field, frozen

CONNECT_TIMEOUT = 10.0  # environments.md §1.1
INITIALIZE_TIMEOUT = 10.0


@frozen
class LocalTarget:
    """This machine."""


@frozen
class WebsocketTarget:
    """A websocket server.

    Attributes:
        url: `ws://` or `wss://`.
        bearer_token: for a server that wants one.
        connect_timeout, initialize_timeout: seconds for the websocket and for the handshake behind it.
    """

    url: str
    bearer_token: str | None = field(default=None, repr=False)
    connect_timeout: float = CONNECT_TIMEOUT
    initialize_timeout: float = INITIALIZE_TIMEOUT


@frozen
class CommandTarget:
    """A command that speaks the protocol over its stdin and stdout.

    Attributes:
        argv: the program, found on PATH, and its arguments. No shell.
        env: laid over this process's environment.
        cwd: where it runs; this process's own directory if `None`.
        initialize_timeout: seconds for it to start and shake hands.
        bootstrap: the command runs what is appended to it at some other side, and no execenv is needed there:
            `("ssh", "devbox")`, `("docker", "exec", "-i", "box")`. A `sh` and a Python >= 3.11 are; the
            server is sent to a cache there at the first connect, for which there is no time limit as long as
            it gets on. The other side has to know of its stdin and stdout only: no terminal.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(factory=dict, repr=False)
    cwd: str | None = None
    initialize_timeout: float = INITIALIZE_TIMEOUT
    bootstrap: bool = False


Target: TypeAlias = LocalTarget | WebsocketTarget | CommandTarget
