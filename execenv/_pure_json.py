"""What `codec` needs of orjson, from the standard library: for a server that was shipped without it.

It takes and refuses the same texts; tests/test_bootstrap.py compares the two. The words of an error are other
ones. It is five to ten times slower. Not looked at, since only our own code encodes: keys that are no `str`,
and integers of more than 64 bits.
"""

from __future__ import annotations

import json
import math
import os
import re
from json import JSONDecodeError
from typing import Any

__all__ = ["Fragment", "JSONDecodeError", "JSONEncodeError", "dumps", "loads"]


class JSONEncodeError(TypeError):
    """Not a value that JSON can hold."""


class Fragment:
    """JSON that is encoded already."""

    __slots__ = ("contents",)

    def __init__(self, contents: bytes) -> None:
        self.contents = contents


# Decoding.

_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NONE_ALONE = re.compile(  # in JSON, where every backslash begins an escape
    rb"(?:[^\\]++|\\(?:u[dD][89aAbB]..\\u[dD][c-fC-F]..|(?!u[dD][89a-fA-F]).))*+", re.DOTALL
)


def loads(data: bytes) -> Any:
    """A value from its UTF-8.

    Raises:
        JSONDecodeError: if it is not JSON, or not UTF-8, or has a number that no float can hold.
    """
    try:
        text = data.decode()
        # Most integers are short, and those the scanner makes without calling back.
        value = (_EXACT if _LONG_NUMBER.search(data) else _FAST).decode(text)
    except UnicodeError:
        raise JSONDecodeError("str is not valid UTF-8: surrogates not allowed", "", 0) from None
    except RecursionError:
        raise JSONDecodeError("Recursion limit reached", "", 0) from None
    # In the text: the value may be without it, where a key was there twice.
    if _SURROGATE.search(data) and not _NONE_ALONE.fullmatch(data):
        raise JSONDecodeError("str is not valid UTF-8: surrogates not allowed", "", 0)
    return value


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise JSONDecodeError("number is infinity when parsed as double", "", 0)
    return number


def _int(text: str) -> int | float:
    if len(text) <= 20:  # the longest of 64 bits
        number = int(text)
        if -(2**63) <= number < 2**64:
            return number
    return _float(text)


def _constant(text: str) -> float:
    raise JSONDecodeError(f"unexpected {text}", "", 0)


_FAST = json.JSONDecoder(parse_float=_float, parse_constant=_constant)
_EXACT = json.JSONDecoder(parse_float=_float, parse_int=_int, parse_constant=_constant)


# Encoding.

_HOLE = f"<{os.urandom(16).hex()}>"  # nobody else can know it, so it can be no part of a value
_ENCODED_HOLE = json.dumps(_HOLE).encode()


def dumps(value: Any) -> bytes:
    """A value as compact UTF-8.

    Raises:
        JSONEncodeError: if it holds a lone surrogate, a float that is no number, or what is no JSON.
    """
    fragments: list[bytes] = []

    def default(member: object) -> str:
        if type(member) is not Fragment:
            raise JSONEncodeError(f"Type is not JSON serializable: {type(member).__name__}")
        fragments.append(member.contents)
        return _HOLE

    encoder = json.JSONEncoder(
        ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"), default=default
    )
    try:
        data = encoder.encode(value).encode()
    except UnicodeEncodeError:
        raise JSONEncodeError("str is not valid UTF-8: surrogates not allowed") from None
    except (ValueError, RecursionError) as error:
        raise JSONEncodeError(str(error)) from None
    if not fragments:
        return data
    first, *rest = data.split(_ENCODED_HOLE)
    pieces = [first]
    for fragment, piece in zip(fragments, rest, strict=True):
        pieces += (fragment, piece)
    return b"".join(pieces)
