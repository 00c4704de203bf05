"""Public keys as the registry passes them around (relay.md §1.2). Machine; needs no `cryptography`."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

from attrs import frozen

SUITE = "Noise_hybridIK_X25519+MLKEM768_AESGCM_SHA256"
X25519_BYTES = 32
MLKEM768_BYTES = 1184


class InvalidKey(ValueError):
    """It is no key object. The text says why and quotes nothing of it."""


@frozen
class PublicKey:
    """The static public keys of one end.

    Attributes:
        x25519: 32 bytes.
        mlkem768: 1184 bytes.
    """

    x25519: bytes
    mlkem768: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both, in hexadecimal digits: a name for who has the private ones."""
        return hashlib.sha256(self.x25519 + self.mlkem768).hexdigest()

    def to_json(self) -> dict[str, str]:
        """The key object."""
        return {
            "suite": SUITE,
            "x25519_public_key": base64.b64encode(self.x25519).decode(),
            "mlkem768_public_key": base64.b64encode(self.mlkem768).decode(),
        }

    @classmethod
    def from_json(cls, value: object) -> PublicKey:
        """Read a key object.

        Raises:
            InvalidKey: also for members that are not known.
        """
        if not isinstance(value, Mapping) or set(value) != {
            "suite",
            "x25519_public_key",
            "mlkem768_public_key",
        }:
            raise InvalidKey("a key has the members suite, x25519_public_key and mlkem768_public_key")
        if value["suite"] != SUITE:
            raise InvalidKey(f"the suite of a key should be {SUITE}")
        return cls(
            _decoded(value, "x25519_public_key", X25519_BYTES),
            _decoded(value, "mlkem768_public_key", MLKEM768_BYTES),
        )


def _decoded(value: Mapping[str, Any], name: str, size: int) -> bytes:
    try:
        data = base64.b64decode(value[name], validate=True)
    except (TypeError, ValueError, binascii.Error):
        data = b""
    if len(data) != size:
        raise InvalidKey(f"{name} should be {size} bytes in base64")
    return data
