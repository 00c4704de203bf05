"""What a request may touch, as the wire says it and as programs build it (sandbox.md §1). No I/O.

A `SandboxProfile` is the policy; a `Sandbox` is a profile with what its symbolic entries stand for. Both
are only values: `plan` turns them into mounts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args, overload

from attrs import evolve, frozen

from execenv.errors import InvalidParams, UsageError, wrong_type
from execenv.paths import PathUri, PathUriError
from execenv.sandbox.patterns import compile_pattern

Access = Literal["read", "write", "deny"]
Network = Literal["restricted", "enabled"]
ProfileKind = Literal["managed", "disabled", "external"]
SpecialKind = Literal["root", "minimal", "project_roots", "tmpdir", "slash_tmp", "unknown"]

MAX_LISTED = 10_000
"""How long a list on the wire may be. bubblewrap mounts some 3,000 things, and most are not there."""

_ACCESS = ("read", "write", "deny", "none")
_NETWORK = get_args(Network)
_SPECIAL = ("root", "minimal", "current_working_directory", "project_roots", "tmpdir", "slash_tmp", "unknown")
_WINDOWS_LEVELS = ("disabled", "restricted-token", "elevated", "mxc")
_PROXY_MODES = ("reconcile", "preserve")
_WILDCARDS = re.compile(r"[*?\[{]")
_NATIVE = re.compile(r"[/\\]")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@frozen
class PathRule:
    """A path and everything below it."""

    path: PathUri


@frozen
class GlobRule:
    """A native pattern (`/srv/w/**/*.env`); a relative one is from the sandbox's `cwd`.

    `*` and `?` stay within a name, `**` goes across directories, `[a-z]`, `[!a]` and `{a,b}` mean what they
    mean to a shell, and a backslash makes the next character plain. It counts with the access `deny` only,
    and for what is there when a call begins.
    """

    pattern: str


@frozen
class SpecialRule:
    """A place that has no fixed path.

    Attributes:
        subpath: below it, relative; for `project_roots`.
        path: what an `unknown` one was called by whoever knows it.
    """

    kind: SpecialKind
    subpath: str | None = None
    path: str | None = None


Rule: TypeAlias = PathRule | GlobRule | SpecialRule
Place: TypeAlias = Rule | PathUri | str | os.PathLike[str]
"""What `SandboxProfile.managed` takes for a rule."""


@frozen
class Entry:
    """What may be done at a place. `skip_missing`: a place that is not there needs no protection."""

    rule: Rule
    access: Access
    skip_missing: bool = False


@frozen
class SandboxProfile:
    """What may be touched. Made by the class methods.

    Attributes:
        entries: `None`: every file may be read and written.
        network: `"restricted"`: none at all, Unix sockets included.
        glob_scan_max_depth: how far below its fixed part a pattern reaches; `None`: to the bottom.
    """

    kind: ProfileKind
    network: Network = "restricted"
    entries: tuple[Entry, ...] | None = None
    glob_scan_max_depth: int | None = None

    @classmethod
    def read_only(cls, *, network: Network = "restricted") -> SandboxProfile:
        """Everything may be read, nothing written.

        Raises:
            UsageError: `network` is neither `"restricted"` nor `"enabled"`.
        """
        return cls("managed", _network(network), (_ROOT_READ,))

    @classmethod
    def workspace_write(
        cls,
        roots: Iterable[PathUri | str | os.PathLike[str]] | None = None,
        *,
        network: Network = "restricted",
        temporary: bool = True,
    ) -> SandboxProfile:
        """Everything may be read, and what is below some directories written.

        Directly below each of them `.git`, `.agents`, `.codex` and `.aws` stay as they are. Whoever needs one
        of them writable says so with an entry of `managed`.

        Args:
            roots: absolute paths or `file:` URIs. `None`: the workspace roots of the `Sandbox` that the
                profile is used in, whatever they are then.
            temporary: also `/tmp`, and the directory that TMPDIR of the server names.

        Raises:
            UsageError: a root is no absolute path, or a bare path was given for the roots.
        """
        if isinstance(roots, str | PathUri | os.PathLike):
            raise UsageError(f"roots are several, so a list of them is wanted: [{str(roots)!r}]")
        rules: list[Rule] = [SpecialRule("project_roots")]
        if roots is not None:
            rules = [PathRule(_given_path(root)) for root in roots]
        if temporary:
            rules += [SpecialRule("slash_tmp"), SpecialRule("tmpdir")]
        return cls("managed", _network(network), (_ROOT_READ, *(Entry(rule, "write") for rule in rules)))

    @overload
    @classmethod
    def managed(
        cls, entries: Mapping[str, Access], *, network: Network = ..., glob_scan_max_depth: int | None = ...
    ) -> SandboxProfile: ...

    @overload
    @classmethod
    def managed(
        cls, entries: Mapping[Place, Access], *, network: Network = ..., glob_scan_max_depth: int | None = ...
    ) -> SandboxProfile: ...

    @overload
    @classmethod
    def managed(
        cls,
        entries: Iterable[tuple[Place, Access] | Entry],
        *,
        network: Network = ...,
        glob_scan_max_depth: int | None = ...,
    ) -> SandboxProfile: ...

    @classmethod
    def managed(
        cls,
        entries: Mapping[str, Access] | Mapping[Place, Access] | Iterable[tuple[Place, Access] | Entry],
        *,
        network: Network = "restricted",
        glob_scan_max_depth: int | None = None,
    ) -> SandboxProfile:
        """Exactly what is listed; whatever is not below any entry is not to be seen.

        The most specific entry decides; at one path `deny` wins over `write`, and `write` over `read`.

            SandboxProfile.managed({
                ":minimal": "read",
                ":project_roots": "write",
                ":project_roots/vendor": "read",
                "/srv/w/secrets": "deny",
                GlobRule("/srv/w/**/*.env"): "deny",
            })

        Args:
            entries: places and what may be done there. A `str` is an absolute path, a `file:` URI, or one of
                `:root`, `:minimal` (what programs need to start), `:project_roots` (also with a path behind
                it), `:tmpdir` and `:slash_tmp`; an `os.PathLike` is an absolute path. A pattern is never
                guessed: names with brackets are real names, so say `GlobRule(...)`, or
                `PathRule(PathUri.parse(...))` for such a name.
            glob_scan_max_depth: how far below the fixed part of a pattern is looked for what matches; 1 is
                only what is directly there. `None`: to the bottom.

        Raises:
            UsageError: an entry means nothing: a relative path, an unknown word, a pattern that is wrong or
                has another access than `deny`, a depth below 1.
        """
        pairs: Iterable[Any] = entries.items() if isinstance(entries, Mapping) else entries
        if glob_scan_max_depth is not None and (
            type(glob_scan_max_depth) is not int or glob_scan_max_depth < 1
        ):
            raise UsageError(
                f"glob_scan_max_depth is at least 1, or None for no limit: {glob_scan_max_depth!r}"
            )
        listed = tuple(_given_entry(pair) for pair in pairs)
        return cls("managed", _network(network), listed, glob_scan_max_depth)

    @classmethod
    def unrestricted(cls, network: Network = "restricted") -> SandboxProfile:
        """Every file may be read and written; only the network may be missing."""
        return cls("managed", _network(network))

    @classmethod
    def disabled(cls) -> SandboxProfile:
        """No restriction at all."""
        return cls("disabled", "enabled")

    @classmethod
    def external(cls, network: Network = "restricted") -> SandboxProfile:
        """Something outside confines files, so they are left alone here; processes may have no network."""
        return cls("external", _network(network))

    @classmethod
    def from_sandbox_policy(cls, value: Any) -> SandboxProfile:
        """Reads the `SandboxPolicy` of older clients, in kebab-case or camelCase.

        Nothing is resolved: the workspace and the temporary directories stay symbolic, so no `cwd` is needed.

        Raises:
            InvalidParams: it is none, or it restricts what may be read (`access` or `readOnlyAccess` of the
                type `restricted`), which this shape no longer can.
        """
        members = _map(value, "internally tagged enum SandboxPolicy")
        tag = _text(_required(members, "type"))
        kind = re.sub("[A-Z]", lambda letter: "-" + letter[0].lower(), tag)
        if kind == "danger-full-access":
            return cls.disabled()
        if kind == "external-sandbox":
            return cls.external(_variant(_legacy(members, "network_access", "restricted"), _NETWORK))
        if kind not in {"read-only", "workspace-write"}:
            known = ("danger-full-access", "read-only", "external-sandbox", "workspace-write")
            raise InvalidParams(_unknown(tag, known))
        for name in ("access", "read_only_access"):
            _refuse_restricted_reads(_legacy(members, name, None))
        network: Network = "enabled" if _boolean(_legacy(members, "network_access", False)) else "restricted"
        if kind == "read-only":
            return cls.read_only(network=network)
        rules: list[Rule] = [SpecialRule("project_roots")]
        rules += [PathRule(path) for path in _paths(_legacy(members, "writable_roots", []))]
        if not _boolean(_legacy(members, "exclude_slash_tmp", False)):
            rules.append(SpecialRule("slash_tmp"))
        if not _boolean(_legacy(members, "exclude_tmpdir_env_var", False)):
            rules.append(SpecialRule("tmpdir"))
        return cls("managed", network, (_ROOT_READ, *(Entry(rule, "write") for rule in rules)))

    def without_writes(self) -> SandboxProfile:
        """The same with nothing writable: what could be written can still be read, what is denied cannot."""
        if self.entries is None:
            return SandboxProfile("managed", self.network, (_ROOT_READ,))
        readable = (
            evolve(entry, access="read") if entry.access == "write" else entry for entry in self.entries
        )
        return evolve(self, entries=tuple(readable))

    @property
    def restricts_files(self) -> bool:
        """Whether there is a file that may not be read or not be written, on the face of it."""
        entries = self._effective
        return entries is not None and (
            not any(entry.access == "write" and is_root(entry.rule) for entry in entries)
            or any(entry.access == "deny" for entry in entries)
            or any(entry.access == "read" and not is_root(entry.rule) for entry in entries)
        )

    @property
    def reads_everything(self) -> bool:
        """Whether every file may be read, on the face of it."""
        entries = self._effective
        return entries is None or (
            any(entry.access != "deny" and is_root(entry.rule) for entry in entries)
            and not any(entry.access == "deny" for entry in entries)
        )

    @property
    def restricts_network(self) -> bool:
        """Whether processes have no network."""
        return self.kind != "disabled" and self.network == "restricted"

    @property
    def enforces(self) -> bool:
        """Whether anything is to be enforced on a process."""
        return self.restricts_files or self.restricts_network

    @property
    def needs_workspace_roots(self) -> bool:
        """Whether an entry is about `project_roots`."""
        rules = [entry.rule for entry in self._effective or ()]
        return any(isinstance(rule, SpecialRule) and rule.kind == "project_roots" for rule in rules)

    @property
    def needs_cwd(self) -> bool:
        """Whether an entry has a relative pattern."""
        rules = [entry.rule for entry in self._effective or ()]
        return any(isinstance(rule, GlobRule) and not rule.pattern.startswith("/") for rule in rules)

    @property
    def _effective(self) -> tuple[Entry, ...] | None:
        """Without the grants that grant nothing: patterns, and places that only others know."""
        if self.kind != "managed" or self.entries is None:
            return None
        return tuple(
            entry for entry in self.entries if entry.access == "deny" or not _grants_nothing(entry.rule)
        )


@frozen(cache_hash=True)
class Sandbox:
    """A profile, and what it means for one request: the `sandbox` member of the wire.

    Attributes:
        cwd: what relative patterns are from.
        workspace_roots: what `project_roots` stands for.
        has_context: they came as `policyContext`.
    """

    profile: SandboxProfile
    cwd: PathUri | None = None
    workspace_roots: tuple[PathUri, ...] = ()
    user_home_dir: PathUri | None = None
    temporary_directories: tuple[PathUri, ...] = ()
    use_legacy_landlock: bool = False
    has_context: bool = False


_ROOT_READ = Entry(SpecialRule("root"), "read")


def is_root(rule: Rule) -> bool:
    """Whether a rule is about everything there is."""
    if isinstance(rule, PathRule):
        return rule.path.uri.rstrip("/") == "file:"
    return isinstance(rule, SpecialRule) and rule.kind == "root"


def _grants_nothing(rule: Rule) -> bool:
    return isinstance(rule, GlobRule) or (isinstance(rule, SpecialRule) and rule.kind == "unknown")


def check_subpath(subpath: str) -> str:
    """A subpath that cannot lead out of what it is below.

    Raises:
        InvalidParams: it could, or is no path.
    """
    if subpath.startswith("/") or "\0" in subpath or ".." in subpath.split("/"):
        raise InvalidParams(f"invalid subpath `{subpath}`, expected a relative path without `..`")
    return subpath


# From the wire.


def decode_sandbox(value: Any) -> Sandbox:
    """The `sandbox` member of a request.

    Raises:
        InvalidParams: in the words of sandbox.md §1.4.
    """
    members = _map(value, "struct FileSystemSandboxContext")
    profile = _decode_profile(_required(members, "permissions"))
    _variant(_required(members, "windowsSandboxLevel"), _WINDOWS_LEVELS)
    if members.get("windowsSandboxProxySettingsMode") is not None:
        _variant(members["windowsSandboxProxySettingsMode"], _PROXY_MODES)
    cwd, roots = _optional_path(members.get("cwd")), _paths(members.get("workspaceRoots", []))
    context, temporary = members.get("policyContext"), members.get("temporaryDirectories")
    if context is not None:
        context = _map(context, "struct FileSystemSandboxPolicyContext")
        cwd, roots = _optional_path(context.get("cwd")), _paths(context.get("workspaceRoots", []))
    return Sandbox(
        profile,
        cwd,
        roots,
        _optional_path(members.get("userHomeDir")),
        _paths([] if temporary is None else temporary),
        _boolean(members.get("useLegacyLandlock", False)),
        context is not None,
    )


def _decode_profile(value: Any) -> SandboxProfile:
    members = _map(value, "internally tagged enum PermissionProfile")
    if "type" not in members and members and members.keys() <= {"network", "file_system"}:
        return _decode_untagged(members)
    kind = _variant(_required(members, "type"), ("managed", "disabled", "external"))
    if kind == "disabled":
        return SandboxProfile.disabled()
    if kind == "external":
        return SandboxProfile("external", _variant(_required(members, "network"), _NETWORK))
    files = _map(_required(members, "file_system"), "internally tagged enum ManagedFileSystemPermissions")
    if _variant(_required(files, "type"), ("restricted", "unrestricted")) == "unrestricted":
        entries, depth = None, None
    else:
        entries, depth = _decode_entries(_required(files, "entries")), _decode_depth(files)
    return SandboxProfile("managed", _variant(_required(members, "network"), _NETWORK), entries, depth)


def _decode_untagged(members: dict[str, Any]) -> SandboxProfile:
    """The shape from before profiles had a type; what it does not grant is not granted."""
    network = members.get("network")
    enabled = network is not None and _map(network, "struct NetworkPermissions").get("enabled")
    files = members.get("file_system")
    files = {} if files is None else _map(files, "struct FileSystemPermissions")
    if files.keys() & {"read", "write"}:
        listed = [("read", files.get("read")), ("write", files.get("write"))]
        entries = tuple(
            Entry(PathRule(path), access)  # type: ignore[arg-type]
            for access, paths in listed
            for path in _paths([] if paths is None else paths)
        )
    else:
        entries = _decode_entries(_required(files, "entries") if files else [])
    wanted: Network = "enabled" if enabled is not None and _boolean(enabled) else "restricted"
    return SandboxProfile("managed", wanted, entries, _decode_depth(files))


def _decode_depth(members: dict[str, Any]) -> int | None:
    depth = members.get("glob_scan_max_depth")
    if depth is None:
        return None
    if type(depth) is not int:
        raise InvalidParams(wrong_type(depth, "a nonzero usize"))
    if not 0 < depth < 2**64:
        raise InvalidParams(f"invalid value: integer `{depth}`, expected a nonzero usize")
    return depth


def _decode_entries(value: Any) -> tuple[Entry, ...]:
    return tuple(_decode_entry(entry) for entry in _list(value))


def _decode_entry(value: Any) -> Entry:
    members = _map(value, "struct FileSystemSandboxEntry")
    rule = _decode_rule(_map(_required(members, "path"), "internally tagged enum FileSystemPath"))
    access = _variant(_required(members, "access"), _ACCESS)
    missing = members.get("missing_path_behavior")
    if missing is not None:
        _variant(missing, ("skip",))
    return Entry(rule, "deny" if access == "none" else access, missing is not None)


def _decode_rule(members: dict[str, Any]) -> Rule:
    kind = _variant(_required(members, "type"), ("path", "glob_pattern", "special"))
    if kind == "path":
        return PathRule(_file_uri(_text(_required(members, "path"))))
    if kind == "glob_pattern":
        return GlobRule(_text(_required(members, "pattern")))
    value = _map(_required(members, "value"), "internally tagged enum FileSystemSpecialPath")
    special = _variant(_required(value, "kind"), _SPECIAL)
    if special == "current_working_directory":
        special = "project_roots"
    if special == "unknown":
        return SpecialRule("unknown", path=_text(_required(value, "path")))
    subpath = value.get("subpath") if special == "project_roots" else None
    return SpecialRule(special, None if subpath is None else check_subpath(_text(subpath)))


def _map(value: Any, expected: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParams(wrong_type(value, expected))
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidParams(wrong_type(value, "a sequence"))
    if len(value) > MAX_LISTED:
        raise InvalidParams(f"a list of a sandbox has {len(value)} members, more than {MAX_LISTED}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidParams(wrong_type(value, "a string"))
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidParams(wrong_type(value, "a boolean"))
    return value


def _required(members: dict[str, Any], name: str) -> Any:
    if name not in members:
        raise InvalidParams(f"missing field `{name}`")
    return members[name]


def _variant(value: Any, known: tuple[str, ...]) -> Any:
    if not isinstance(value, str):
        raise InvalidParams(wrong_type(value, "string or map"))
    if value not in known:
        raise InvalidParams(_unknown(value, known))
    return value


def _unknown(value: str, known: tuple[str, ...]) -> str:
    quoted = [f"`{variant}`" for variant in known]
    few = len(known) < 3
    return (
        f"unknown variant `{value}`, expected {' or '.join(quoted) if few else 'one of ' + ', '.join(quoted)}"
    )


def _path(text: str) -> PathUri:
    try:
        return PathUri.parse(text)
    except PathUriError as error:
        raise InvalidParams(str(error)) from None


def _file_uri(text: str) -> PathUri:
    # `parse` takes native paths too; for an entry they are what a URL parser makes of them (§1.2).
    if _NATIVE.match(text):
        raise InvalidParams("invalid URI: relative URL without a base")
    if _DRIVE.match(text):
        raise InvalidParams(f"unsupported path URI scheme `{text[0].lower()}`")
    return _path(text)


def _optional_path(value: Any) -> PathUri | None:
    return None if value is None else _path(_text(value))


def _paths(value: Any) -> tuple[PathUri, ...]:
    return tuple(_path(_text(path)) for path in _list(value))


def _legacy(members: dict[str, Any], name: str, default: Any) -> Any:
    """A member of the old policy, under either of its spellings."""
    head, *rest = name.split("_")
    camel = head + "".join(word.capitalize() for word in rest)
    return members.get(name, members.get(camel, default))


def _refuse_restricted_reads(access: Any) -> None:
    if access is None:
        return
    kind = _text(_required(_map(access, "internally tagged enum ReadOnlyAccess"), "type"))
    if kind not in {"full-access", "fullAccess"}:
        raise InvalidParams(_unknown(kind, ("full-access",)))


# To the wire.


def encode_sandbox(sandbox: Sandbox) -> dict[str, Any]:
    """The same as JSON, in today's spelling."""
    roots = [root.uri for root in sandbox.workspace_roots]
    cwd = {} if sandbox.cwd is None else {"cwd": sandbox.cwd.uri}
    value: dict[str, Any] = {
        "permissions": _encode_profile(sandbox.profile),
        **cwd,
        "workspaceRoots": roots,
        "windowsSandboxLevel": "disabled",
        "useLegacyLandlock": sandbox.use_legacy_landlock,
    }
    if sandbox.has_context:
        value["policyContext"] = {**cwd, "workspaceRoots": roots}
    if sandbox.user_home_dir is not None:
        value["userHomeDir"] = sandbox.user_home_dir.uri
    if sandbox.temporary_directories:
        value["temporaryDirectories"] = [path.uri for path in sandbox.temporary_directories]
    return value


def _encode_profile(profile: SandboxProfile) -> dict[str, Any]:
    if profile.kind == "disabled":
        return {"type": "disabled"}
    if profile.kind == "external":
        return {"type": "external", "network": profile.network}
    files: dict[str, Any] = {"type": "unrestricted"}
    if profile.entries is not None:
        files = {"type": "restricted", "entries": [_encode_entry(entry) for entry in profile.entries]}
        if profile.glob_scan_max_depth is not None:
            files["glob_scan_max_depth"] = profile.glob_scan_max_depth
    return {"type": "managed", "network": profile.network, "file_system": files}


def _encode_entry(entry: Entry) -> dict[str, Any]:
    value = {"path": _encode_rule(entry.rule), "access": entry.access}
    return {**value, "missing_path_behavior": "skip"} if entry.skip_missing else value


def _encode_rule(rule: Rule) -> dict[str, Any]:
    if isinstance(rule, PathRule):
        return {"type": "path", "path": rule.path.uri}
    if isinstance(rule, GlobRule):
        return {"type": "glob_pattern", "pattern": rule.pattern}
    value = {"kind": rule.kind, "subpath": rule.subpath, "path": rule.path}
    return {"type": "special", "value": {name: text for name, text in value.items() if text is not None}}


# From programs.


def _network(network: Network) -> Network:
    if network not in _NETWORK:
        raise UsageError(f'network is "restricted" or "enabled", not {network!r}')
    return network


def _given_path(path: PathUri | str | os.PathLike[str]) -> PathUri:
    if isinstance(path, PathUri):
        return path
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise UsageError(f"a path is a str, an os.PathLike or a PathUri, not {path!r}")
    try:
        return PathUri.parse(text)
    except PathUriError as error:
        raise UsageError(f"{text!r} is no absolute path and no file: URI ({error})") from None


def _given_entry(pair: tuple[Place, Access] | Entry) -> Entry:
    if isinstance(pair, Entry):
        entry = pair
    elif isinstance(pair, tuple) and len(pair) == 2:
        entry = Entry(_given_rule(pair[0]), pair[1])
    else:
        raise UsageError(f"an entry is a pair of a place and an access, not {pair!r}")
    if entry.access not in get_args(Access):
        raise UsageError(f'access is "read", "write" or "deny", not {entry.access!r}')
    if isinstance(entry.rule, GlobRule) and entry.access != "deny":
        raise UsageError(
            f"a pattern can only deny, so {entry.rule.pattern!r}: {entry.access!r} would do nothing"
        )
    return entry


def _given_rule(place: Place) -> Rule:
    try:
        if isinstance(place, GlobRule):
            compile_pattern(place.pattern)
        if isinstance(place, SpecialRule) and place.subpath is not None:
            check_subpath(place.subpath)
    except InvalidParams as error:
        raise UsageError(error.message) from None
    if isinstance(place, SpecialRule) and place.kind not in get_args(SpecialKind):
        raise UsageError(f"{place.kind!r} is no place: {', '.join(get_args(SpecialKind))}")
    if isinstance(place, PathRule | GlobRule | SpecialRule):
        return place
    if isinstance(place, str) and place.startswith(":"):
        return _given_special(place)
    if isinstance(place, str) and _WILDCARDS.search(place) and not place.startswith("file:"):
        raise UsageError(
            f"{place!r} may be a pattern or a name: say GlobRule({place!r}), "
            f"or PathRule(PathUri.parse({place!r}))"
        )
    return PathRule(_given_path(place))


def _given_special(word: str) -> SpecialRule:
    kind, slash, subpath = word[1:].partition("/")
    if kind not in get_args(SpecialKind) or kind == "unknown" or (slash and kind != "project_roots"):
        known = ", ".join(f":{kind}" for kind in get_args(SpecialKind) if kind != "unknown")
        raise UsageError(f"{word!r} is no place: {known}, or a path behind :project_roots")
    if not slash:
        return SpecialRule(kind)  # type: ignore[arg-type]
    try:
        return SpecialRule("project_roots", check_subpath(subpath))
    except InvalidParams as error:
        raise UsageError(error.message) from None
