"""What `codec` needs of pybase64, from the standard library: for a server that was shipped without it."""

from __future__ import annotations

import binascii


def b64encode(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)


def b64encode_as_string(data: bytes) -> str:
    return b64encode(data).decode()


def b64decode(text: str | memoryview, validate: bool) -> bytes:
    """The bytes behind text in the standard alphabet, padded, and nothing else in it.

    Raises:
        ValueError: if it is not that.
    """
    assert validate
    tail = text[-3:] if isinstance(text, str) else bytes(text[-3:]).decode("latin-1")
    if len(text) % 4 or tail == "===":  # the strict mode of binascii lets these pass
        raise ValueError("Incorrect padding")
    return binascii.a2b_base64(text, strict_mode=True)
