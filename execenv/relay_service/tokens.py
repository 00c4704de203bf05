"""Bearer tokens: `exr_ID_SECRET`. Of the secret only a digest is kept, and it is never logged. Machine."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from execenv.relay_service.store import ANY_ENVIRONMENT, Role, TokenRecord

SECRET_BYTES = 32
_TOKEN = re.compile(r"exr_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_ENVIRONMENT_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")


def is_environment_id(text: str) -> bool:
    """Whether an environment can have that id: it stands in paths (relay.md §1.1)."""
    return _ENVIRONMENT_ID.fullmatch(text) is not None


def make_token(
    environment_id: str, role: Role, name: str, *, now: float, expires: float | None
) -> tuple[str, TokenRecord]:
    """A new token, which is not kept anywhere, and what is kept of it."""
    token_id = secrets.token_hex(8)
    token = f"exr_{token_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return token, TokenRecord(token_id, digest(token), environment_id, role, name, now, expires)


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def token_id(token: str) -> str | None:
    """The part that is no secret; `None` if no token looks like that."""
    found = _TOKEN.fullmatch(token)
    return found[1] if found else None


def is_token_of(record: TokenRecord, token: str) -> bool:
    """Whether this is the token of a record. Compares in constant time."""
    return hmac.compare_digest(digest(token), record.digest)


def is_current(record: TokenRecord, now: float) -> bool:
    """Whether it has not expired."""
    return record.expires is None or now < record.expires


def is_for(record: TokenRecord, environment_id: str) -> bool:
    return record.environment_id in (ANY_ENVIRONMENT, environment_id)
