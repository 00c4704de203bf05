"""What a sandbox allows. A pure decision: nothing here looks at the machine."""

from __future__ import annotations

from typing import Any

from execenv.errors import InvalidParams


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
