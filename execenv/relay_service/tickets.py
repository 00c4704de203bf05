"""Signed URLs: what a rendezvous has to know of who opens a websocket, without asking anybody. Machine."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import cast
from urllib.parse import parse_qsl, urlencode

from attrs import frozen

from execenv.relay_service.store import Role

_CONTEXT = b"execenv relay: the URL of a websocket, 1"
_MAX_QUERY = 4096
_NAMES = ("role", "registration", "token", "key", "expires", "nonce", "signature")


class BadTicket(Exception):
    """The query of a URL is none that was signed here, for this environment. Quotes nothing of it."""


@frozen
class Ticket:
    """What a signed URL says.

    Attributes:
        token_id: of the token that it was given for.
        key_fingerprint: of the harness's public key; empty for an executor, and for clear text.
        expires: seconds since the epoch.
        nonce: makes it one of its kind.
    """

    role: Role
    environment_id: str
    registration_id: str
    token_id: str
    key_fingerprint: str
    expires: int
    nonce: str


def new_nonce() -> str:
    return secrets.token_urlsafe(16)


def signed_query(ticket: Ticket, key: bytes) -> str:
    """The query of the URL. Of its parts only nonce and signature are secret; the environment is the path."""
    return urlencode(
        {
            "role": ticket.role,
            "registration": ticket.registration_id,
            "token": ticket.token_id,
            "key": ticket.key_fingerprint,
            "expires": ticket.expires,
            "nonce": ticket.nonce,
            "signature": _signature(ticket, key),
        }
    )


def read_ticket(environment_id: str, query: str, key: bytes) -> Ticket:
    """What a URL for `environment_id` says, once its signature is seen to be ours.

    Whether it has expired is for the caller to see.

    Raises:
        BadTicket: if it is not.
    """
    try:
        if len(query) > _MAX_QUERY:
            raise ValueError
        pairs = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] in _NAMES]
        values = dict(pairs)
        if len(pairs) != len(_NAMES) or values.keys() != set(_NAMES):
            raise ValueError
        if values["role"] not in ("executor", "harness"):
            raise ValueError
        ticket = Ticket(
            cast(Role, values["role"]),
            environment_id,
            values["registration"],
            values["token"],
            values["key"],
            int(values["expires"]),
            values["nonce"],
        )
    except ValueError:
        raise BadTicket("it is not signed") from None
    if not hmac.compare_digest(_signature(ticket, key).encode(), values["signature"].encode()):
        raise BadTicket("its signature is not ours")
    return ticket


def _signature(ticket: Ticket, key: bytes) -> str:
    parts = (
        ticket.role,
        ticket.environment_id,
        ticket.registration_id,
        ticket.token_id,
        ticket.key_fingerprint,
        str(ticket.expires),
        ticket.nonce,
    )
    message = _CONTEXT
    for part in parts:  # each behind its length, so that nothing can move from one to the next
        data = part.encode()
        message += len(data).to_bytes(4, "big") + data
    return hmac.new(key, message, hashlib.sha256).hexdigest()
