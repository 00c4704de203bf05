"""Where the keys of a TOML document stand, which its parsers keep to themselves (machine).

For text that a parser has accepted; of other text, what stands before the first thing that makes no sense.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress

from attrs import define, field, frozen

KeyPath = tuple[str | int, ...]
"""Keys, and numbers of elements of arrays from 0: `("environments", 0, "url")`."""

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_SCALAR = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|\d{4}-\d\d-\d\d \d[^\s,\]}#]*"  # a date and a time may have a space between them
    r"|[^\s,\[\]{}#=\"']+",
    re.DOTALL,
)


class _Nonsense(Exception):
    """Nothing that TOML has begins here."""


@frozen
class Statement:
    """`key = value`, or a header in brackets; from its first character to its last.

    Attributes:
        path: of the value, or of the table that the header begins.
        is_header: whether it is a header.
    """

    path: KeyPath
    is_header: bool
    start: int
    end: int


@define
class Layout:
    """The statements of a document in their order, and the offset of each key's first mention."""

    text: str
    statements: list[Statement] = field(factory=list)
    offsets: dict[KeyPath, int] = field(factory=dict)
    _ends: list[int] = field(factory=list)

    def line(self, offset: int) -> int:
        """The number of the line with this character, from 1."""
        if not self._ends:
            self._ends = [found.end() for found in re.finditer("\n", self.text)]
        return bisect_right(self._ends, offset) + 1

    def line_of(self, path: KeyPath) -> int | None:
        """The line where a key stands, else the table that should have it; `None` for the document."""
        while path:
            if path in self.offsets:
                return self.line(self.offsets[path])
            path = path[:-1]
        return None


def read_layout(text: str) -> Layout:
    """Find the statements of a document and the keys in them."""
    layout = Layout(text)
    scanner = _Scanner(text, layout)
    with suppress(_Nonsense, RecursionError):
        layout.statements.extend(scanner.statements())
    return layout


class _Scanner:
    def __init__(self, text: str, layout: Layout) -> None:
        self._text = text
        self._at = 0
        self._layout = layout
        self._lengths: dict[KeyPath, int] = {}  # of arrays of tables

    def statements(self) -> Iterator[Statement]:
        table: KeyPath = ()
        while not self._ended():
            start = self._at
            if self._take("["):
                of_array = self._take("[")
                keys = self._keys()
                if not self._take("]" * (1 + of_array)):
                    raise _Nonsense
                table = self._table(keys, of_array)
                self._note(table, start)
                yield Statement(table, True, start, self._at)
            else:
                path = self._pair(table)
                yield Statement(path, False, start, self._at)

    def _ended(self) -> bool:
        self._skip(_BLANK)
        return self._at == len(self._text)

    def _table(self, keys: list[str], of_array: bool) -> KeyPath:
        path: KeyPath = ()
        for number, key in enumerate(keys, 1):
            path += (key,)
            if of_array and number == len(keys):
                self._lengths[path] = self._lengths.get(path, 0) + 1
            if path in self._lengths:  # a header speaks of the newest element
                path += (self._lengths[path] - 1,)
        return path

    def _pair(self, table: KeyPath) -> KeyPath:
        start = self._at
        path = table
        for key in self._keys():
            path += (key,)
            self._note(path, start)
        if not self._take("="):
            raise _Nonsense
        self._skip(_SPACE)
        self._value(path)
        return path

    def _value(self, path: KeyPath) -> None:
        if self._take("["):
            index = 0
            while not self._closed("]"):
                self._note((*path, index), self._at)
                self._value((*path, index))
                index += 1
                self._skip(_BLANK)
                self._take(",")
        elif self._take("{"):
            while not self._closed("}"):
                self._pair(path)
                self._skip(_BLANK)
                self._take(",")
        else:
            self._match(_SCALAR)

    def _closed(self, bracket: str) -> bool:
        self._skip(_BLANK)
        return self._take(bracket)

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip(_SPACE)
            token = self._match(_KEY)
            keys.append(_unquoted(token))
            self._skip(_SPACE)
            if not self._take("."):
                return keys

    def _note(self, path: KeyPath, offset: int) -> None:
        # Also its ancestors that no header of their own names, as `a` in `[a.b]`.
        for length in range(1, len(path) + 1):
            self._layout.offsets.setdefault(path[:length], offset)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise _Nonsense
        self._at = found.end()
        return found[0]

    def _take(self, token: str) -> bool:
        there = self._text.startswith(token, self._at)
        if there:
            self._at += len(token)
        return there


def _unquoted(token: str) -> str:
    if token[0] not in "\"'":
        return token
    try:
        value: str = tomllib.loads(f"key = {token}")["key"]
    except tomllib.TOMLDecodeError:
        raise _Nonsense from None
    return value
