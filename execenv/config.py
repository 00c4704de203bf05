"""environments.toml: from its text to values and back (environments.md §3.5). Machine: no I/O.

`parse_config` reads with tomllib, which is strict and quick. The functions that edit give back new text, by
tomlkit where it is more than adding or leaving out a block: comments and layout stay as they are.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec
from urllib.parse import urlsplit

from attrs import define, frozen

from execenv._toml_lines import KeyPath, Statement, read_layout
from execenv.errors import ConfigError, UsageError
from execenv.targets import (
    CONNECT_TIMEOUT,
    INITIALIZE_TIMEOUT,
    SECURITIES,
    CommandTarget,
    LocalTarget,
    RelayTarget,
    Target,
    WebsocketTarget,
    check_target,
    environment_id_problem,
    is_loopback,
    is_token,
    registry_problem,
    shown_registry,
    shown_url,
)

LOCAL = "local"
"""The id of this machine; nothing else can have it."""
DISABLED = "none"
"""What stands for no environment, in any case."""
MAX_ID = 64
MAX_SECONDS = 2.0**64  # what the reference takes for a duration

TOP_KEYS = ("default", "include_local", "environments")
KEYS = (
    "id",
    "url",
    "program",
    "args",
    "env",
    "cwd",
    "connect_timeout_sec",
    "initialize_timeout_sec",
    "auth_bearer_token",
    "skills",
)
RELAY_KEYS = ("environment_id", "security", "account_id")
OUR_KEYS = ("auth_bearer_token_file", "auth_bearer_token_env", "bootstrap", "registry", *RELAY_KEYS)
"""Keys that codex does not have. They are refused in its file, which it could not read with them."""
OUR_TOKEN_KEYS = ("auth_bearer_token_file", "auth_bearer_token_env")
TOKEN_KEYS = ("auth_bearer_token", *OUR_TOKEN_KEYS)

_ID = re.compile(r"[A-Za-z0-9_-]+")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@frozen
class Snapshot:
    """Which environments there are; what a provider gives and a manager begins with.

    Attributes:
        environments: id and target of each, in order. This machine is not among them.
        default: the id of the one that is used if none is named; `None` if there is none by default.
        include_local: whether this machine is one more, `local`.
    """

    environments: tuple[tuple[str, Target], ...] = ()
    default: str | None = None
    include_local: bool = False

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all, `local` first if it is there."""
        return ((LOCAL,) if self.include_local else ()) + tuple(id_ for id_, _ in self.environments)


LOCAL_ONLY = Snapshot((), LOCAL, True)


def check_snapshot(snapshot: Snapshot) -> None:
    """See that a snapshot can be used (environments.md §3.2).

    Raises:
        UsageError: if an id is empty, reserved or there twice, a target cannot be used at all, or the default
            is not among them.
    """
    seen: set[str] = set()
    for id_, target in snapshot.environments:
        check_new_id(id_)
        if isinstance(target, LocalTarget):
            raise UsageError(f"environment {shown(id_)} is this machine: set include_local instead")
        if id_ in seen:
            raise UsageError(f"environment id {shown(id_)} is there twice")
        check_target(target)
        seen.add(id_)
    if snapshot.default is not None and snapshot.default not in snapshot.ids:
        raise UsageError(f"default environment {shown(snapshot.default)} is not configured")


def check_new_id(id_: str) -> None:
    """See that an environment may be registered under an id. Which characters it has is left open.

    Raises:
        UsageError: if it may not.
    """
    if not id_:
        raise UsageError("environment id cannot be empty")
    if id_ == LOCAL:
        raise UsageError("environment id `local` is reserved for this machine")


def parse_config(text: str, *, file: str, ours: bool = True) -> Snapshot:
    """Read the text of an environments.toml.

    Args:
        file: its path, for messages; relative paths in it begin at its folder.
        ours: whether it may have the keys that only execenv knows.

    Raises:
        ConfigError: for the first thing that is wrong with it.
    """
    return _Document(text, file, ours).snapshot()


def shown(text: str) -> str:
    """In quotes, for a message, with everything escaped that a terminal would obey."""
    return f"`{_CONTROL.sub(lambda found: found[0].encode('unicode_escape').decode(), text)}`"


def close_to(word: str, known: Collection[str]) -> str:
    """What `word` may be a slip of, as the end of a message; empty if nothing is."""
    from difflib import get_close_matches

    found = get_close_matches(word, known, 1) or get_close_matches(word.lower(), known, 1)
    return f"; did you mean {shown(found[0])}?" if found else ""


# Reading.


@define
class _Entry:
    """One of `environments`, its types checked. `None`: not set."""

    at: KeyPath
    id: str
    values: dict[str, Any]

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def has(self, *keys: str) -> bool:
        return any(key in self.values for key in keys)


class _Document:
    def __init__(self, text: str, file: str, ours: bool) -> None:
        self._text = text
        self._file = file
        self._ours = ours

    def snapshot(self) -> Snapshot:
        top = self._load()
        # First what the reference's deserializer refuses, all through the document; then the rules.
        for key, value in top.items():
            self._check_key((), key, TOP_KEYS)
            if key == "default":
                self._string((key,), value)
            elif key == "include_local":
                self._boolean((key,), value)
            elif not isinstance(value, list):
                advice = "begin each environment with [[environments]], in double brackets"
                self._wrong_type((key,), value, "array of tables", advice)
        entries = [self._entry(index, value) for index, value in enumerate(top.get("environments", ()))]
        include_local = top.get("include_local", True)
        environments: dict[str, Target] = {}
        for entry in entries:
            target = self._target(entry)
            if entry.id in environments:
                self._fail((*entry.at, "id"), f"environment id {shown(entry.id)} is duplicated: rename one")
            environments[entry.id] = target
        known = ((LOCAL,) if include_local else ()) + tuple(environments)
        return Snapshot(tuple(environments.items()), self._default(top.get("default"), known), include_local)

    def _load(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._text)
        except RecursionError:
            raise self._error(None, "arrays or tables are nested too deeply", "parse") from None
        except ValueError as error:  # TOMLDecodeError, and what int() says of a number with too many digits
            problem, line = _syntax_problem(str(error), self._text)
            raise self._error(line, problem, "parse") from None

    def _default(self, given: str | None, known: tuple[str, ...]) -> str | None:
        if given is None:
            return LOCAL if LOCAL in known else None
        default = given.strip()
        choices = ", ".join(shown(id_) for id_ in (*known, DISABLED))
        if not default:
            self._fail(("default",), f"default environment id cannot be empty: use one of {choices}")
        if default.lower() == DISABLED:
            return None
        if default not in known:
            self._fail(
                ("default",),
                f"default environment {shown(default)} is not configured, expected one of {choices}"
                f"{close_to(default, known)}",
            )
        return default

    # Types.

    def _entry(self, index: int, table: object) -> _Entry:
        at = ("environments", index)
        if not isinstance(table, dict):
            self._wrong_type(at, table, "table", "begin each environment with [[environments]]")
        for key, value in table.items():
            path = (*at, key)
            self._check_key(at, key, KEYS + OUR_KEYS if self._ours else KEYS)
            _TYPES[key](self, path, value)
        if "id" not in table:
            self._fail(at, 'missing field `id`: name the environment, as in id = "devbox"', "parse", key="id")
        return _Entry(at, table["id"], table)

    def _check_key(self, table: KeyPath, key: str, known: tuple[str, ...]) -> None:
        if key in known:
            return
        if key in OUR_KEYS:
            problem = f"unknown field {shown(key)}: codex does not know it; it belongs in execenv's own file"
        else:
            names = ", ".join(f"`{name}`" for name in known)
            problem = f"unknown field {shown(key)}, expected one of {names}{close_to(key, known)}"
        self._fail((*table, key), problem, "parse")

    def _string(self, path: KeyPath, value: object) -> None:
        if not isinstance(value, str):
            self._wrong_type(path, value, "string", "write it in quotes")

    def _program_string(self, path: KeyPath, value: object) -> None:
        self._string(path, value)
        if "\0" in str(value):  # no program can be given one
            self._fail(path, f"{_name(path)} holds a NUL character: take it out", "parse")

    def _boolean(self, path: KeyPath, value: object) -> None:
        if not isinstance(value, bool):
            self._wrong_type(path, value, "boolean", "write true or false, without quotes")

    def _strings(self, path: KeyPath, value: object) -> None:
        if not isinstance(value, list):
            self._wrong_type(path, value, "array of strings", 'write it as ["one", "two"]')
        for index, item in enumerate(value):
            self._program_string((*path, index), item)

    def _variables(self, path: KeyPath, value: object) -> None:
        if not isinstance(value, dict):
            self._wrong_type(path, value, "table of strings", 'write it as { NAME = "value" }')
        for name, item in value.items():
            if not name or "=" in name or "\0" in name:
                problem = (
                    f"{shown(name)} in env cannot be the name of a variable: it is empty or has = or NUL"
                )
                self._fail((*path, name), problem, "parse")
            self._program_string((*path, name), item)

    def _seconds(self, path: KeyPath, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong_type(path, value, "number", "write seconds without quotes, as in 2.5")
        if not 0 <= value < MAX_SECONDS:  # nor nan
            problem = f"{_name(path)} cannot be {_digits(value)}: write seconds, 0 or more and finite"
            self._fail(path, problem, "parse")

    def _skills(self, path: KeyPath, value: object) -> None:
        if not isinstance(value, dict):
            self._wrong_type(path, value, "table", "write it as { required = [] }")
        for key, item in value.items():
            self._check_key(path, key, ("required",))
            if not isinstance(item, list):
                self._wrong_type((*path, key), item, "array", "write it as []")

    # Rules, in the order of the reference.

    def _target(self, entry: _Entry) -> Target:
        self._check_id(entry)
        if not entry.has("program"):
            for key in ("args", "env", "cwd"):
                if entry.has(key):
                    self._fail_in(entry, key, f"args, env and cwd require program: name it, or remove {key}")
            if entry.has("bootstrap"):
                self._fail_in(entry, "bootstrap", "bootstrap requires program: name it, or remove bootstrap")
        if not entry.has("url", "registry"):
            owners = "url or registry" if self._ours else "url"
            for key in (*TOKEN_KEYS, "connect_timeout_sec"):
                if entry.has(key):
                    self._fail_in(entry, key, f"{key} requires {owners}: a program takes none, remove it")
        if not entry.has("registry"):
            for key in RELAY_KEYS:
                if entry.has(key):
                    self._fail_in(entry, key, f"{key} requires registry: name it, or remove {key}")
        kinds: dict[str, Callable[[_Entry], Target]] = {"url": self._websocket, "program": self._command}
        if self._ours:
            kinds["registry"] = self._relay
        *others, last = kinds
        rule = f"must set exactly one of {', '.join(others)} or {last}"
        found = [key for key in kinds if entry.has(key)]
        if not found:
            self._fail_in(entry, None, f'{rule}: it has none, add one, as in url = "ws://127.0.0.1:8765"')
        if len(found) > 1:
            self._fail_in(entry, found[-1], f"{rule}: it has {' and '.join(found)}, remove all but one")
        return kinds[found[0]](entry)

    def _check_id(self, entry: _Entry) -> None:
        path, id_ = (*entry.at, "id"), entry.id
        if not id_.strip():
            self._fail(path, f'environment id cannot be empty, as {shown(id_)} is: use one like "devbox"')
        if id_ != id_.strip():
            advice = f"write {shown(id_.strip())}"
            self._fail(path, f"environment id {shown(id_)} cannot have blanks around it: {advice}")
        if id_ == LOCAL or id_.lower() == DISABLED:
            meaning = "this machine" if id_ == LOCAL else "no environment"
            self._fail(path, f"environment id {shown(id_)} is reserved for {meaning}: use another")
        if len(id_) > MAX_ID:
            problem = (
                f"environment id {shown(id_)} cannot be longer than {MAX_ID} characters: it has {len(id_)}"
            )
            self._fail(path, problem)
        if not _ID.fullmatch(id_):
            advice = re.sub(r"[^A-Za-z0-9_-]+", "-", id_)
            self._fail(
                path,
                f"environment id {shown(id_)} must contain only ASCII letters, digits, - and _: "
                f"write {shown(advice)}",
            )

    def _websocket(self, entry: _Entry) -> WebsocketTarget:
        url = entry.get("url").strip()
        if not url:
            self._fail_in(entry, "url", 'url cannot be empty: write one like "ws://127.0.0.1:8765"')
        if not url.startswith(("ws://", "wss://")):
            scheme, colon, rest = url.partition("://")
            better = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}.get(scheme.lower())
            told = f"; did you mean {shown(shown_url(f'{better}://{rest}'))}?" if colon and better else ""
            self._fail_in(entry, "url", f"url {shown(shown_url(url))} must use ws:// or wss://{told}")
        reason = _url_problem(url)
        if reason:
            self._fail_in(entry, "url", f"url {shown(shown_url(url))} is invalid: {reason}")
        self._check_one_token(entry)
        for key in TOKEN_KEYS:
            if entry.has(key) and not can_carry_token(url):
                host = shown_url(url)
                told = f"{key} needs wss:// or a loopback address: {shown(host)} would send it in clear"
                self._fail_in(entry, key, told)
        return WebsocketTarget(url, **self._token_and_times(entry))

    def _relay(self, entry: _Entry) -> RelayTarget:
        registry = entry.get("registry").strip()
        if not registry:
            told = 'registry cannot be empty: write its URL, as in registry = "https://registry.example"'
            self._fail_in(entry, "registry", told)
        problem = registry_problem(registry)
        if problem:
            told = f"registry {shown(shown_registry(registry))} cannot be used: {problem}"
            self._fail_in(entry, "registry", told)
        if not entry.has("environment_id"):
            told = "registry requires environment_id: name the environment as the registry knows it"
            self._fail_in(entry, "registry", told)
        problem = environment_id_problem(entry.get("environment_id"))
        if problem:
            found = shown(entry.get("environment_id"))
            self._fail_in(entry, "environment_id", f"environment_id {found} cannot be used: {problem}")
        security = entry.values.get("security", "noise")
        if security not in SECURITIES:
            told = f'security takes "noise" or "clear", not {shown(security)}{close_to(security, SECURITIES)}'
            self._fail_in(entry, "security", told)
        if entry.has("account_id") and not is_token(entry.get("account_id")):
            told = "account_id cannot stand in a header: it should be one line of printable ASCII"
            self._fail_in(entry, "account_id", told)
        self._check_one_token(entry)
        return RelayTarget(
            registry,
            entry.get("environment_id"),
            security=security,
            account_id=entry.get("account_id"),
            **self._token_and_times(entry),
        )

    def _token_and_times(self, entry: _Entry) -> dict[str, Any]:
        for key in TOKEN_KEYS:
            if entry.has(key):
                self._check_token(entry, key)
        path = entry.get("auth_bearer_token_file")
        return {
            "bearer_token": entry.get("auth_bearer_token"),
            "bearer_token_file": None if path is None else self._beside(path),
            "bearer_token_env": entry.get("auth_bearer_token_env"),
            "connect_timeout": float(entry.values.get("connect_timeout_sec", CONNECT_TIMEOUT)),
            "initialize_timeout": float(entry.values.get("initialize_timeout_sec", INITIALIZE_TIMEOUT)),
        }

    def _check_one_token(self, entry: _Entry) -> None:
        tokens = [key for key in TOKEN_KEYS if entry.has(key)]
        if len(tokens) > 1:
            told = f"{tokens[0]} and {tokens[1]} are both set: a token comes from one place, remove one"
            self._fail_in(entry, tokens[1], told)

    def _check_token(self, entry: _Entry, key: str) -> None:
        value: str = entry.get(key)
        if key == "auth_bearer_token" and not is_token(value):
            told = "auth_bearer_token cannot stand in a header: it should be one line of printable ASCII"
            self._fail_in(entry, key, told)
        if key == "auth_bearer_token_file" and not value.strip():
            self._fail_in(entry, key, f"{key} cannot be empty: name the file that holds the token")
        if key == "auth_bearer_token_env" and (not value.strip() or "=" in value):
            self._fail_in(entry, key, f"{key} {shown(value)} cannot be the name of a variable")

    def _command(self, entry: _Entry) -> CommandTarget:
        program = entry.get("program").strip()
        if not program:
            self._fail_in(entry, "program", 'program cannot be empty: name a program, as in program = "ssh"')
        cwd = entry.get("cwd")
        return CommandTarget(
            (program, *entry.values.get("args", ())),
            dict(entry.values.get("env", {})),
            None if cwd is None else self._beside(cwd),
            float(entry.values.get("initialize_timeout_sec", INITIALIZE_TIMEOUT)),
            bootstrap=entry.values.get("bootstrap", False),
        )

    def _beside(self, path: str) -> str:
        return os.path.normpath(os.path.join(os.path.dirname(self._file), path))

    # Failing.

    def _wrong_type(self, path: KeyPath, value: object, wanted: str, advice: str) -> NoReturn:
        # Only what is surely no secret is repeated: not what stands in env or args, and no token.
        found, of_key = _type_name(value), path[-1] if len(path) in (1, 3) else ""
        if isinstance(value, bool | int | float) and of_key and of_key not in TOKEN_KEYS:
            text = str(value).lower() if isinstance(value, bool) else _digits(value)
            found = f"the {found.partition(' ')[2]} {shown(text)}"
        elif isinstance(value, str) and of_key in ("include_local", "bootstrap", *_TIMES):
            found = f"the string {shown(value)}"
        article = "an" if wanted.startswith("a") else "a"
        self._fail(path, f"{_name(path)} takes {article} {wanted}, not {found}: {advice}", "parse")

    def _fail_in(self, entry: _Entry, key: str | None, problem: str) -> NoReturn:
        path = entry.at if key is None else (*entry.at, key)
        self._fail(path, f"environment {shown(entry.id)}: {problem}")

    def _fail(self, path: KeyPath, problem: str, verb: str = "", key: str = "") -> NoReturn:
        line = read_layout(self._text).line_of(path)
        raise self._error(line, problem, verb, _name((*path, key) if key else path, whole=True))

    def _error(self, line: int | None, problem: str, verb: str = "", key: str | None = None) -> ConfigError:
        return ConfigError(problem, file=self._file, line=line, key=key, verb=verb)


_TIMES = ("connect_timeout_sec", "initialize_timeout_sec")

_TYPES: Mapping[str, Callable[[_Document, KeyPath, object], None]] = {
    **dict.fromkeys(("id", "url", "auth_bearer_token", "registry", *RELAY_KEYS), _Document._string),
    **dict.fromkeys(("program", "cwd", *OUR_TOKEN_KEYS), _Document._program_string),
    **dict.fromkeys(_TIMES, _Document._seconds),
    "args": _Document._strings,
    "env": _Document._variables,
    "skills": _Document._skills,
    "bootstrap": _Document._boolean,
}


def can_carry_token(url: str) -> bool:
    """Whether a token sent there cannot be read on the way: `wss://`, or this machine."""
    return url.startswith("wss://") or is_loopback(urlsplit(url).hostname or "")


def _url_problem(url: str) -> str | None:
    """Why it is no target of a request; `None` if it is one."""
    found = re.search(r"[^!-~]", url)
    if found:
        return f"it has the character {found[0]!r}, which must be percent-encoded"
    try:
        parts = urlsplit(url)
        if not parts.hostname:
            return "it names no host, as ws://HOST:PORT does"
        parts.port  # noqa: B018 - may raise
    except ValueError:  # its text repeats what may be a piece of a password
        return "its host or its port cannot be read; write it as ws://HOST:PORT"
    return None


_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)\Z")


def _syntax_problem(message: str, text: str) -> tuple[str, int | None]:
    """What tomllib says, and the line."""
    found = _POSITION.search(message)
    if found is None:
        return message, None
    problem = message[: found.start()]
    line = int(found[1]) if found[1] else max(1, len(text.splitlines()))
    if "overwrite" in problem:  # said of the end of a value; it may have begun further up
        layout = read_layout(text)
        starts = [layout.line(statement.start) for statement in layout.statements]
        line = max((start for start in starts if start <= line), default=line)
        problem += ": the key is there twice"
    return problem[:1].lower() + problem[1:], line


def _name(path: KeyPath, *, whole: bool = False) -> str:
    """`environments[0].url`, or only `url`, for people."""
    if not whole and len(path) > 2:
        path = path[2:]
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += ("." if name else "") + (part if _ID.fullmatch(part) else repr(part))
    return name


def _type_name(value: object) -> str:
    for kind, name in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a float"),
        (str, "a string"),
        (list, "an array"),
        (dict, "a table"),
    ):
        if isinstance(value, kind):
            return name
    return "a date or time"


def _digits(value: float) -> str:
    text = repr(value)
    return text if len(text) < 40 else "so large a number"


# Editing.

P = ParamSpec("P")


def _keeping_line_ends(edit: Callable[Concatenate[str, P], str]) -> Callable[Concatenate[str, P], str]:
    """Whoever has a file with CRLF gets it back with CRLF. To TOML both are the same, in strings too."""

    @wraps(edit)
    def kept(text: str, /, *args: P.args, **options: P.kwargs) -> str:
        if not 0 < text.count("\n") == text.count("\r\n"):
            return edit(text, *args, **options)
        return edit(text.replace("\r\n", "\n"), *args, **options).replace("\n", "\r\n")

    return kept


@_keeping_line_ends
def with_environment(text: str, id_: str, target: Target, *, file: str, replace: bool = False) -> str:
    """The text with one environment more, or with `replace` with another target for that id.

    What the entry has besides (comments, `skills`) stays, and an entry that is new goes to the end.

    Raises:
        ConfigError: if the text is wrong.
        UsageError: if the id or the target is, or the id is there already and may not be replaced.
    """
    before = parse_config(text, file=file)
    entry = _entry_values(id_, target)
    ids = [known for known, _ in before.environments]
    try:
        parse_config(_appended("", entry), file=file)
    except ConfigError as error:  # its line would be one that nobody has written
        raise UsageError(error.problem) from None
    if id_ not in ids:
        return _checked(_appended(text, entry), file)
    import tomlkit

    if not replace:
        raise UsageError(
            f"environment {shown(id_)} is there already, in {file}: replace it, or use another id"
        )
    index = ids.index(id_)
    span = _span(text, index)
    if span is None:  # an array in one statement
        document = tomlkit.parse(text)
        _update(document["environments"][index], entry)
        return _checked(tomlkit.dumps(document), file)
    block = text[slice(*span)]
    gap = block[len(block.rstrip()) :]
    document = tomlkit.parse(block.rstrip() + "\n")
    _update(document["environments"][0], entry)
    edited = tomlkit.dumps(document).rstrip("\r\n") + (gap or "\n")
    return _checked(text[: span[0]] + edited + text[span[1] :], file)


@_keeping_line_ends
def without_environment(text: str, id_: str, *, file: str) -> str:
    """The text without an environment. Comments directly above it go with it.

    Raises:
        ConfigError: if the text is wrong.
        UsageError: if the environment is not there, or is the default.
    """
    before = parse_config(text, file=file)
    ids = [known for known, _ in before.environments]
    if id_ not in ids:
        raise UsageError(f"environment {shown(id_)} is not in {file}{close_to(id_, ids)}")
    if id_ == before.default:
        raise UsageError(f"environment {shown(id_)} is the default: make another the default first")
    index = ids.index(id_)
    span = _span(text, index)
    if span is None:
        import tomlkit

        document = tomlkit.parse(text)
        del document["environments"][index]
        return _checked(tomlkit.dumps(document), file)
    before_it, behind_it = text[: span[0]], text[span[1] :]
    return _checked(before_it + behind_it if behind_it else before_it.rstrip() + "\n", file)


@_keeping_line_ends
def with_default(text: str, id_: str | None, *, file: str) -> str:
    """The text with another default; `None` for none.

    Raises:
        ConfigError: if the text is wrong.
        UsageError: if the id is not in it.
    """
    before = parse_config(text, file=file)
    value = DISABLED if id_ is None else id_
    if id_ is not None and id_ not in before.ids:
        known = ", ".join(map(shown, (*before.ids, DISABLED)))
        raise UsageError(f"{shown(id_)} is not in {file}, which has {known}{close_to(id_, before.ids)}")
    layout = read_layout(text)
    if ("default",) in layout.offsets:
        import tomlkit

        document = tomlkit.parse(text)
        document["default"] = value
        return _checked(tomlkit.dumps(document), file)
    line = f'default = "{value}"\n'
    tops = [found for found in layout.statements if not found.is_header and len(found.path) == 1]
    headers = [found for found in layout.statements if found.is_header]
    if tops:  # behind the last of them, in a line of its own
        end = text.find("\n", tops[-1].end) + 1
        return _checked(text[:end] + line + text[end:] if end else f"{text}\n{line}", file)
    start = _begin_of(text, headers[0]) if headers else len(text)
    head, rest = text[:start], text[start:]
    if head and not head.endswith("\n"):
        head += "\n"
    return _checked(head + line + ("\n" + rest if rest else ""), file)


def _entry_values(id_: str, target: Target) -> dict[str, Any]:
    """What an entry of the file says; only what is not the default."""
    values: dict[str, Any] = {"id": id_}
    if isinstance(target, WebsocketTarget):
        values["url"] = target.url
    elif isinstance(target, RelayTarget):
        values["registry"] = target.registry
        values["environment_id"] = target.environment_id
        values["security"] = None if target.security == "noise" else target.security
        values["account_id"] = target.account_id
    elif isinstance(target, CommandTarget):
        values["program"] = target.argv[0]
        values["args"] = list(target.argv[1:]) or None
        values["env"] = dict(target.env) or None
        values["cwd"] = target.cwd
        values["bootstrap"] = target.bootstrap or None
    else:
        raise UsageError("this machine is no entry of the file: set include_local there")
    if isinstance(target, WebsocketTarget | RelayTarget):
        values["connect_timeout_sec"] = target.connect_timeout
        values["auth_bearer_token"] = target.bearer_token
        values["auth_bearer_token_file"] = target.bearer_token_file
        values["auth_bearer_token_env"] = target.bearer_token_env
    values["initialize_timeout_sec"] = target.initialize_timeout
    for key, usual in (
        ("connect_timeout_sec", CONNECT_TIMEOUT),
        ("initialize_timeout_sec", INITIALIZE_TIMEOUT),
    ):
        seconds = values.get(key)
        if seconds is not None:
            whole = math.isfinite(seconds) and seconds == int(seconds)
            values[key] = None if seconds == usual else int(seconds) if whole else seconds
    return {key: value for key, value in values.items() if value is not None}


def _update(table: Any, entry: dict[str, Any]) -> None:
    for key in (*KEYS, *OUR_KEYS):
        if key in entry:
            if key not in table or table[key] != entry[key]:
                table[key] = _item(entry[key])
        elif key in table and key != "skills":
            del table[key]


def _item(value: Any) -> Any:
    import tomlkit

    if not isinstance(value, dict):
        return value
    inline = tomlkit.inline_table()
    inline.update({key: _item(item) for key, item in value.items()})
    return inline


def _appended(text: str, entry: dict[str, Any]) -> str:
    import tomlkit
    from tomlkit.items import Array

    document = tomlkit.parse(text)
    there = document.get("environments")
    if isinstance(there, Array):
        there.append(_item(entry))
        return tomlkit.dumps(document)
    block = tomlkit.document()
    for key, value in entry.items():
        block[key] = _item(value)
    before = text if not text or text.endswith("\n") else f"{text}\n"
    gap = "\n" if text.strip() else ""
    return f"{before}{gap}[[environments]]\n{tomlkit.dumps(block)}"


def _span(text: str, index: int) -> tuple[int, int] | None:
    """From where to where an environment's tables stand, comments above them included.

    `None` if environments is an array in one statement.
    """
    headers = [found for found in read_layout(text).statements if found.is_header]
    own = [number for number, found in enumerate(headers) if found.path[:2] == ("environments", index)]
    if not own:
        return None
    after = headers[own[-1] + 1 :]
    return _begin_of(text, headers[own[0]]), _begin_of(text, after[0]) if after else len(text)


def _begin_of(text: str, header: Statement) -> int:
    """Where what belongs to a header begins: with the comments directly above it.

    Except where the file begins: a comment there is about all of it.
    """
    start = text.rfind("\n", 0, header.start) + 1
    begin = start
    while begin:
        above = text.rfind("\n", 0, begin - 1) + 1
        if not text[above:begin].lstrip(" \t").startswith("#"):
            return begin
        begin = above
    return start


def _checked(text: str, file: str) -> str:
    parse_config(text, file=file)
    return text
