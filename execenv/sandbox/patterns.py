"""Patterns of paths, as deny rules have them: `*` and `?`, `**`, `[a-z]`, `{a,b}` (sandbox.md §1.2). No I/O.

A pattern is taken apart into patterns without braces, and each of these into names: those in front of the
first wildcard say where to look, the others are matched one directory at a time. So a search need not
enter what cannot match.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product

from attrs import frozen

from execenv.errors import InvalidParams

MAX_ALTERNATIVES = 1000
"""How many patterns one with braces may stand for."""
MAX_TOKENS = 20_000
"""And how many characters and wildcards all of these may have: regular expressions are slow to make."""

_SHOWN = 4096

_Token = tuple[str, str]
"""A kind ("plain", "any", "star", "across", "/") and its text: a character, or a regular expression."""


@frozen
class Pattern:
    """One without braces.

    Attributes:
        fixed: the directory below which it matches, absolute.
        parts: of the names below that, each matched whole; `None` stands for any number of directories.
            Empty: the pattern is the path `fixed`.
    """

    fixed: bytes
    parts: tuple[re.Pattern[str] | None, ...]


@lru_cache(256)
def compile_pattern(text: str, base: bytes = b"/") -> tuple[Pattern, ...]:
    """What a pattern stands for; a path has to match one of them.

    `..` is resolved in the text, as in every path of a policy. `**` also counts within a name (`a**b`):
    rather too much is denied than too little.

    Args:
        base: the directory that a relative pattern is from.

    Raises:
        InvalidParams: it is no pattern.
    """
    if not text:
        raise InvalidParams("invalid glob pattern ``: it is empty")
    reader = _Reader(text)
    prefix: list[_Token] = []
    if not text.startswith("/"):
        prefix = [(("/" if c == "/" else "plain"), c) for c in _decode(base) + "/"]
    patterns: list[Pattern] = []
    for tokens in reader.read():
        if prefix and tokens[:1] == [("/", "/")]:
            raise reader.wrong("an alternative of a relative pattern is absolute")
        names = _resolve(_split(prefix + tokens), reader)
        if any(sum(kind == "across" for kind, _ in name) > 5 for name in names):
            raise reader.wrong("too many `**` in one name")
        spread = [_spread(name) for name in names]
        reader.check_count(spread)
        patterns += [
            _compile([part for parts in chosen for part in parts], reader) for chosen in product(*spread)
        ]
    return tuple(dict.fromkeys(patterns))


class _Reader:
    """From text to tokens, one list for each choice of alternatives."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._tokens = 0

    def wrong(self, why: str) -> InvalidParams:
        shown = self._text[:_SHOWN].encode("utf-8", "replace").decode()
        return InvalidParams(f"invalid glob pattern `{shown}`: {why}")

    def check_count(self, choices: list[list[list[list[_Token]]]]) -> None:
        count = 1
        for choice in choices:
            count *= len(choice)
            if count > MAX_ALTERNATIVES:
                raise self.wrong("too many alternatives")

    def read(self) -> list[list[_Token]]:
        if "\0" in self._text:
            raise self.wrong("it has a NUL")
        read = self._sequence(nested=0)
        if self._at < len(self._text):
            raise self.wrong("a `}` has no `{`")
        return read

    def _sequence(self, nested: int) -> list[list[_Token]]:
        if nested > 10:
            raise self.wrong("its braces are nested too deep")
        read: list[list[_Token]] = [[]]
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "}" or (char == "," and nested):
                break
            self._at += 1
            step = self._braces(nested + 1) if char == "{" else [[self._token(char)]]
            if len(read) * len(step) > MAX_ALTERNATIVES:
                raise self.wrong("too many alternatives")
            self._tokens += len(read) * sum(map(len, step))
            if self._tokens > MAX_TOKENS:
                raise self.wrong("it stands for too much")
            read = (
                [[*head, *tail] for head in read for tail in step]
                if len(step) > 1
                else _extend(read, step[0])
            )
        return read

    def _braces(self, nested: int) -> list[list[_Token]]:
        choices: list[list[_Token]] = []
        while True:
            choices += self._sequence(nested)
            end = self._text[self._at : self._at + 1]
            self._at += 1
            if end == "}":
                return choices
            if end != ",":
                raise self.wrong("a `{` is not closed")

    def _token(self, char: str) -> _Token:
        if char == "*":
            start = self._at
            while self._text[self._at : self._at + 1] == "*":
                self._at += 1
            return ("star", "") if self._at == start else ("across", "")
        if char == "?":
            return "any", "."
        if char == "[":
            return "any", self._class()
        if char == "\\":
            char = self._text[self._at : self._at + 1]
            self._at += 1
            if not char:
                raise self.wrong("a backslash ends it")
        return ("/" if char == "/" else "plain"), char

    def _class(self) -> str:
        negated = self._text[self._at : self._at + 1] in {"!", "^"}
        start = self._at + negated
        end = self._text.find("]", start + 1)
        if end < 0:
            raise self.wrong("a `[` is not closed")
        self._at = end + 1
        members, at = "", start
        while at < end:
            first = self._text[at]
            if at + 2 < end and self._text[at + 1] == "-":
                last = self._text[at + 2]
                if first > last:
                    raise self.wrong(f"the range `{first}-{last}` is empty")
                members += f"{re.escape(first)}-{re.escape(last)}"
                at += 3
            else:
                members += re.escape(first)
                at += 1
        return f"[{'^' * negated}{members}]"


def _extend(heads: list[list[_Token]], tail: list[_Token]) -> list[list[_Token]]:
    for head in heads:
        head.extend(tail)
    return heads


def _split(tokens: list[_Token]) -> list[list[_Token]]:
    names: list[list[_Token]] = [[]]
    for token in tokens:
        if token[0] == "/":
            names.append([])
        else:
            names[-1].append(token)
    return [name for name in names if name]


def _plain(name: list[_Token]) -> str | None:
    return "".join(text for _, text in name) if all(kind == "plain" for kind, _ in name) else None


def _resolve(names: list[list[_Token]], reader: _Reader) -> list[list[_Token]]:
    resolved: list[list[_Token]] = []
    for name in names:
        plain = _plain(name)
        if plain == "..":
            if resolved and _plain(resolved[-1]) is None:
                raise reader.wrong("`..` behind a wildcard leads nowhere")
            del resolved[-1:]
        elif plain != ".":
            resolved.append(name)
    return resolved


def _spread(name: list[_Token]) -> list[list[list[_Token]]]:
    """What a name with `**` in it stands for: itself with `*` there, or several names."""
    at = next((at for at, token in enumerate(name) if token[0] == "across"), None)
    if at is None or len(name) == 1:
        return [[name]]
    star: _Token = ("star", "")
    within = _spread([*name[:at], star, *name[at + 1 :]])
    apart = [[[*name[:at], star], [("across", "")], *rest] for rest in _spread([star, *name[at + 1 :]])]
    return within + apart


def _compile(names: list[list[_Token]], reader: _Reader) -> Pattern:
    plain = [_plain(name) for name in names]
    first = next((at for at, text in enumerate(plain) if text is None), len(names))
    try:
        fixed = "".join(f"/{text}" for text in plain[:first]).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise reader.wrong("it has an unpaired surrogate") from None
    parts: list[re.Pattern[str] | None] = []
    for name in names[first:]:
        if name[0][0] != "across":
            parts.append(_regex(name))
        elif not parts or parts[-1] is not None:
            parts.append(None)
    if parts and parts[-1] is None:
        parts.append(_regex([("star", "")]))  # all that is below, not the directory itself
    return Pattern(fixed or b"/", tuple(parts))


def _regex(name: list[_Token]) -> re.Pattern[str]:
    chunks = [""]
    for kind, text in name:
        if kind == "star":
            chunks.append("")
        else:
            chunks[-1] += re.escape(text) if kind == "plain" else text
    first, *rest = chunks
    if not rest:
        return re.compile(first, re.DOTALL)
    # The shortest match of each piece but the last is as good as any: without going back, a pattern with
    # many stars takes no longer than one with few.
    middle = "".join(f"(?>.*?{chunk})" for chunk in rest[:-1])
    return re.compile(f"{first}{middle}.*{rest[-1]}", re.DOTALL)


def _decode(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
