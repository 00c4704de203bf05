"""One structured-concurrency API for the places where work runs.

Open an environment, run programs in it, leave it:

    import execenv, trio

    async def main():
        async with execenv.open_environment("local") as env:
            done = await env.run(["uname", "-a"])
            print(done.stdout.decode())

    trio.run(main)

The map of the package: `open.py` opens a target, `environment.py` and `process.py` are what programs use,
`abc.py` is what every kind of environment implements, in `local/` and `remote/`; `server/` offers one to
others. `environments.py` has environments by name, which `config.py` and `providers.py` find in files and
variables. `sandbox/` decides what a request may touch, and `local/` enforces it. `rpc.py`, `codec.py` and
`protocol.py` are the wire, which `transports/` carries, and `relay/` to where nothing can be dialled, through
what `relay_service/` hosts. `errors.py` has every exception.

Names are imported when they are first used, so that `import execenv` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from execenv._version import __version__

if TYPE_CHECKING:
    from execenv.abc import KillReceipt, Output, Survivor
    from execenv.config import Snapshot
    from execenv.environment import CapturedOutput, CompletedProcess, Environment, captured_output
    from execenv.environment_path import EnvironmentPath
    from execenv.environments import Capabilities, EnvironmentManager, EnvironmentStatus, open_manager
    from execenv.errors import (
        ConfigError,
        ConnectFailed,
        ConnectionLost,
        EnvironmentUnavailable,
        ExecenvError,
        HttpFailed,
        NotSupported,
        OutputGap,
        ProcessFailed,
        ProcessNotStarted,
        ProtocolViolation,
        RpcError,
        UsageError,
    )
    from execenv.file import BinaryFile, TextFile
    from execenv.http import FromVariable, HttpResponse, StreamedResponse
    from execenv.open import open_environment
    from execenv.paths import PathUri
    from execenv.process import Process
    from execenv.protocol import (
        DirectoryEntry,
        EnvironmentInfo,
        EnvPolicy,
        FileMetadata,
        WalkEntry,
        WalkError,
        WalkResult,
    )
    from execenv.sandbox.policy import Entry, GlobRule, PathRule, SandboxProfile, SpecialRule
    from execenv.status import Status, StatusChange, fail_fast
    from execenv.targets import CommandTarget, LocalTarget, RelayTarget, WebsocketTarget
    from execenv.transfer import Progress, TransferReport

_WHERE = {
    "abc": ("KillReceipt", "Output", "Survivor"),
    "config": ("Snapshot",),
    "environment": ("CapturedOutput", "CompletedProcess", "Environment", "captured_output"),
    "environment_path": ("EnvironmentPath",),
    "environments": ("Capabilities", "EnvironmentManager", "EnvironmentStatus", "open_manager"),
    "errors": (
        "ConfigError",
        "ConnectFailed",
        "ConnectionLost",
        "EnvironmentUnavailable",
        "ExecenvError",
        "HttpFailed",
        "NotSupported",
        "OutputGap",
        "ProcessFailed",
        "ProcessNotStarted",
        "ProtocolViolation",
        "RpcError",
        "UsageError",
    ),
    "file": ("BinaryFile", "TextFile"),
    "http": ("FromVariable", "HttpResponse", "StreamedResponse"),
    "open": ("open_environment",),
    "paths": ("PathUri",),
    "process": ("Process",),
    "protocol": (
        "DirectoryEntry",
        "EnvPolicy",
        "EnvironmentInfo",
        "FileMetadata",
        "WalkEntry",
        "WalkError",
        "WalkResult",
    ),
    "sandbox.policy": ("Entry", "GlobRule", "PathRule", "SandboxProfile", "SpecialRule"),
    "status": ("Status", "StatusChange", "fail_fast"),
    "targets": ("CommandTarget", "LocalTarget", "RelayTarget", "WebsocketTarget"),
    "transfer": ("Progress", "TransferReport"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of _WHERE
    "__version__",
    "KillReceipt",
    "Output",
    "Survivor",
    "Snapshot",
    "CapturedOutput",
    "CompletedProcess",
    "Environment",
    "captured_output",
    "EnvironmentPath",
    "Capabilities",
    "EnvironmentManager",
    "EnvironmentStatus",
    "open_manager",
    "ConfigError",
    "ConnectFailed",
    "ConnectionLost",
    "EnvironmentUnavailable",
    "ExecenvError",
    "HttpFailed",
    "NotSupported",
    "OutputGap",
    "ProcessFailed",
    "ProcessNotStarted",
    "ProtocolViolation",
    "RpcError",
    "UsageError",
    "BinaryFile",
    "TextFile",
    "FromVariable",
    "HttpResponse",
    "StreamedResponse",
    "open_environment",
    "PathUri",
    "Process",
    "DirectoryEntry",
    "EnvPolicy",
    "EnvironmentInfo",
    "FileMetadata",
    "WalkEntry",
    "WalkError",
    "WalkResult",
    "Entry",
    "GlobRule",
    "PathRule",
    "SandboxProfile",
    "SpecialRule",
    "Status",
    "StatusChange",
    "fail_fast",
    "CommandTarget",
    "LocalTarget",
    "RelayTarget",
    "WebsocketTarget",
    "Progress",
    "TransferReport",
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'execenv' has no attribute {name!r}")
    value = getattr(import_module(f"execenv.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
