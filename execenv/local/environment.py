"""The environment of a child process, made from ours by a policy (protocol.md §4.2). No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from execenv.protocol import EnvPolicy

CORE = frozenset(
    ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "SHELL", "TEMP", "TMP", "TMPDIR", "USER")
)
DEFAULT_EXCLUDES = ("*KEY*", "*SECRET*", "*TOKEN*")


def child_environment(
    env: Mapping[str, str], policy: EnvPolicy | None, ours: Mapping[str, str]
) -> dict[str, str]:
    """What a child gets: exactly `env`, or what the policy leaves of `ours` with `env` laid over it."""
    if policy is None:
        return dict(env)
    if policy.inherit == "none":
        base: dict[str, str] = {}
    elif policy.inherit == "all":
        base = dict(ours)
    else:
        base = {name: value for name, value in ours.items() if name.upper() in CORE}
    if not policy.ignore_default_excludes:
        base = _without(base, DEFAULT_EXCLUDES)
    base = _without(base, policy.exclude)
    base.update(policy.set)
    if policy.include_only:
        keep = _any_of(policy.include_only)
        base = {name: value for name, value in base.items() if keep.fullmatch(name)}
    base.update(env)
    return base


def _without(base: dict[str, str], patterns: Iterable[str]) -> dict[str, str]:
    drop = _any_of(patterns)
    return {name: value for name, value in base.items() if not drop.fullmatch(name)}


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    # `*` and `?` are all there is; brackets, braces and backslashes are themselves.
    alternatives = "|".join(
        "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
        for pattern in patterns
    )
    return re.compile(f"(?:{alternatives})" if alternatives else r"(?!)", re.IGNORECASE | re.DOTALL)
