"""The audit log: a line of JSON for each connect, refusal and disconnect. No secrets go there."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

import orjson
from attrs import asdict, frozen

logger = logging.getLogger("execenv.relay.audit")

MAX_REQUEST_ID = 128


@frozen
class Caller:
    """Who asks, as far as it is known.

    Attributes:
        request_id: what the client calls its request (X-Request-ID), if that can be shown.
        token_id: empty before it is known.
    """

    address: str
    request_id: str = ""
    environment: str = ""
    role: str = ""
    token_id: str = ""


def request_id(header: bytes | None) -> str:
    """The value of X-Request-ID, if it is short and of ASCII, else nothing."""
    text = (header or b"").decode("latin-1")
    return text if text.isascii() and text.isprintable() and len(text) <= MAX_REQUEST_ID else ""


def write(event: str, caller: Caller, *, now: float, **more: str | int | float) -> None:
    """Log an event: `connect`, `refusal` or `disconnect`, or what was asked of the registry."""
    line = {"time": round(now, 3), "event": event, **asdict(caller), **more}
    logger.info("%s", orjson.dumps(line).decode())


def send_to(path: str | None) -> None:
    """Append the lines to a file that only its owner may read, or write them to stderr.

    Raises:
        OSError: if the file cannot be opened.
    """
    handler: logging.StreamHandler[TextIO]
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        handler = logging.StreamHandler(os.fdopen(fd, "w", encoding="utf-8"))
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
