"""What a request may touch, as the wire says it and as programs build it (sandbox.md §1). No I/O.

A `SandboxProfile` is the policy; a `Sandbox` is a profile with what its symbolic entries stand for. Both
are only values: `plan` turns them into mounts.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from attrs import frozen

from execenv.errors import InvalidParams
from execenv.paths import PathUri

Access = Literal["read", "write", "deny"]
Network = Literal["restricted", "enabled"]
ProfileKind = Literal["managed", "disabled", "external"]
SpecialKind = Literal["root", "minimal", "project_roots", "tmpdir", "slash_tmp", "unknown"]


@frozen
class PathRule:
    """A path and everything below it."""

    path: PathUri


@frozen
class GlobRule:
    """A native pattern (`/srv/w/**/*.env`); a relative one is from the sandbox's `cwd`."""

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


@frozen
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


def decode_sandbox(value: Any) -> Sandbox:
    """The `sandbox` member of a request.

    Raises:
        InvalidParams: in the words of sandbox.md §1.4.
    """
    raise NotImplementedError(value)


def encode_sandbox(sandbox: Sandbox) -> dict[str, Any]:
    """The same as JSON, in today's spelling."""
    raise NotImplementedError(sandbox)


def is_unrestricted(sandbox: Any) -> bool:
    """Whether a request with this `sandbox` may do all that one without may do.

    Raises:
        InvalidParams: if it is no sandbox context.
    """
    if sandbox is None:
        return True
    if not isinstance(sandbox, dict):
        raise InvalidParams("invalid type: expected struct FileSystemSandboxContext")
    if "permissions" not in sandbox:
        raise InvalidParams("missing field `permissions`")
    permissions = sandbox["permissions"]
    return isinstance(permissions, dict) and permissions.get("type") == "disabled"
