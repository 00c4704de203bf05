"""What this machine says of itself (protocol.md §8.1)."""

from __future__ import annotations

import os
import sys
import tempfile

from execenv._version import __version__
from execenv.local.spawn import login_shell
from execenv.paths import PathUri
from execenv.protocol import SERVER_CAPABILITIES, EnvironmentInfo, Shell

_FALLBACK_SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh")


def local_info() -> EnvironmentInfo:
    """The answer to `environment/info`, looked up anew. Reads the password database and a few paths."""
    temp = os.environ.get("TMPDIR")
    return EnvironmentInfo(
        shell=_shell(),
        cwd=_cwd(),
        executor_version=__version__,
        user_home_dir=_directory(os.path.expanduser("~")),
        temp_dir=_directory(temp or tempfile.gettempdir()),
        temporary_directories=(PathUri.from_native(temp),) if temp and os.path.isabs(temp) else (),
        platform_os="macos" if sys.platform == "darwin" else sys.platform,
        capabilities=dict(SERVER_CAPABILITIES),
    )


def _shell() -> Shell:
    # The login shell of the user; a system account's is no shell (/usr/sbin/nologin), so look further.
    for path in (login_shell(), os.environ.get("SHELL"), *_FALLBACK_SHELLS):
        if path and os.access(path, os.X_OK) and os.path.basename(path) not in ("nologin", "false", "true"):
            return Shell(os.path.basename(path), path)
    return Shell("sh", "/bin/sh")


def _cwd() -> PathUri | None:
    try:
        return PathUri.from_native(os.getcwdb())
    except OSError:  # the directory has been removed
        return None


def _directory(path: str) -> PathUri | None:
    return PathUri.from_native(path) if os.path.isabs(path) else None
