"""What a relay takes that is not always installed, and how to get it."""

from __future__ import annotations

from execenv.errors import UsageError
from execenv.relay.noise import noise_available
from execenv.targets import Security

INSTALL = {"clear": "pip install 'execenv[relay]'", "noise": "pip install 'execenv[noise]'"}
"""What brings all that each kind of security takes."""


def relay_problem() -> str | None:
    """Why no frame of a relay can be read or written here; `None` if that works."""
    try:
        from google.protobuf.runtime_version import VersionError
    except ImportError:
        return "protobuf is not installed, or too old"
    try:
        import execenv.relay.schema_pb2  # noqa: F401
    except ImportError as error:
        return f"protobuf cannot be used: {error}"
    except VersionError as error:
        return f"protobuf is too old: {error}"
    return None


def require_extra(security: Security) -> None:
    """See that an environment behind a relay can be spoken to.

    Raises:
        UsageError: if something is missing. Says what, and how to get it.
    """
    problem = relay_problem() or (noise_available() if security == "noise" else None)
    if problem:
        raise UsageError(f"an environment behind a relay cannot be used: {problem}: {INSTALL[security]}")
