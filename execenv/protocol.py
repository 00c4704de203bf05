"""Every message of the exec-server protocol, once: its name, its parameters and its result.

Members are named as Python names here and travel in camelCase; bytes travel as base64, `PathUri` as a
`file:` URI, milliseconds stay what they are. How a value becomes bytes is the business of `codec`.
The members and their defaults are those of protocol.md §3-§4 and §8; members that are ours alone say so,
are left out unless used, and are offered under `capabilities`.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, NewType, TypeVar

from attrs import field, frozen

from execenv.paths import PathUri

P = TypeVar("P")
R = TypeVar("R")

Base64 = NewType("Base64", bytes)
U64 = NewType("U64", int)
StreamName = Literal["stdout", "stderr", "pty"]
Signal = Literal["interrupt"]
Inherit = Literal["all", "core", "none"]
WriteStatus = Literal["accepted", "unknownProcess", "stdinClosed", "starting"]

SERVER_CAPABILITIES = {
    "processCloseStdin": True,
    "processOutputWindow": True,
    "processResize": True,
    "processReceipt": True,
}
"""What this server has beyond the core protocol, as `environmentInfo.capabilities` says it."""

extension: dict[str, bool] = {"omit_default": True}
"""Field metadata: a member of ours alone, or one that only newer peers know. Not sent when at its default."""


@frozen
class Method(Generic[P, R]):
    """A request: its name on the wire, the types of its parameters and result, and its family.

    `family` is the word in "client must call initialize before using <family> methods" (§3.1).
    """

    name: str
    params: type[P]
    result: type[R]
    family: str


@frozen
class Notification(Generic[P]):
    """A message without an answer."""

    name: str
    params: type[P]


@frozen
class Nothing:
    """No members: `{}` as a result."""


@frozen
class Unit:
    """The parameters of a method without any: absent, `null` and `{}` alike, nothing else (§2)."""


# Handshake (§3).


@frozen
class InitializeParams:
    client_name: str
    resume_session_id: str | None = None


@frozen
class Shell:
    name: str
    path: str


@frozen
class EnvironmentInfo:
    """What an environment says of itself (§8.1). Only `shell` is certain; older servers send no more."""

    shell: Shell
    cwd: PathUri | None = None
    executor_version: str | None = field(default=None, metadata=extension)
    provider_id: str | None = field(default=None, metadata=extension)
    user_home_dir: PathUri | None = field(default=None, metadata=extension)
    temp_dir: PathUri | None = field(default=None, metadata=extension)
    temporary_directories: tuple[PathUri, ...] = field(default=(), metadata=extension)
    platform_os: str | None = field(default=None, metadata=extension)
    prepend_path_dirs: tuple[PathUri, ...] = field(default=(), metadata=extension)
    capabilities: dict[str, bool] = field(factory=dict, metadata=extension)


@frozen
class InitializeResult:
    session_id: str
    environment_info: EnvironmentInfo | None = field(default=None, metadata=extension)


# Processes (§4).


@frozen
class EnvPolicy:
    """How the environment of a child is made from the server's own (§4.2)."""

    inherit: Inherit
    ignore_default_excludes: bool
    exclude: tuple[str, ...]
    set: dict[str, str]
    include_only: tuple[str, ...]


@frozen
class ProcessStartParams:
    """A program to run (§4.1). `env` is the whole environment, or with `env_policy` what overlays it."""

    process_id: str
    argv: tuple[str, ...]
    cwd: PathUri
    env: dict[str, str]
    tty: bool
    env_policy: EnvPolicy | None = None
    pipe_stdin: bool = False
    arg0: str | None = None
    sandbox: Any = None
    enforce_managed_network: bool = False
    managed_network: Any = None
    network_proxy: Any = field(default=None, metadata=extension)
    shell_snapshot: Any = field(default=None, metadata=extension)
    credential_providers: Any = field(default=None, metadata=extension)
    output_window: U64 | None = field(default=None, metadata=extension)
    """Ours: the child is held back while more bytes than this are on their way to the client, which says
    with `process/outputTaken` what it took."""


@frozen
class ProcessStartResult:
    process_id: str
    sandbox_type: str | None = field(default=None, metadata=extension)


@frozen
class ProcessReadParams:
    process_id: str
    after_seq: U64 | None = None
    max_bytes: U64 | None = None
    wait_ms: U64 | None = None


@frozen
class OutputChunk:
    """A piece of output as it was read from the pipe or terminal."""

    seq: int
    stream: StreamName
    chunk: Base64


@frozen
class ProcessReadResult:
    chunks: tuple[OutputChunk, ...]
    next_seq: int
    exited: bool
    exit_code: int | None = None
    closed: bool = False
    failure: str | None = None
    sandbox_denied: bool = False


@frozen
class ProcessWriteParams:
    process_id: str
    chunk: Base64
    write_id: str


@frozen
class ProcessWriteResult:
    status: str


@frozen
class ProcessSignalParams:
    process_id: str
    signal: Signal


@frozen
class ProcessTerminateParams:
    """`receipt` (ours): answer when the tree is gone, with a receipt, and look for descendants that an
    exited process left behind too. `grace_ms` (ours): send SIGTERM first and wait so long."""

    process_id: str
    receipt: bool = field(default=False, metadata=extension)
    grace_ms: U64 = field(default=U64(0), metadata=extension)


@frozen
class WireSurvivor:
    pid: int
    reason: str


@frozen
class WireReceipt:
    signalled: tuple[int, ...]
    seconds: float
    survivors: tuple[WireSurvivor, ...]


@frozen
class ProcessTerminateResult:
    running: bool = False
    receipt: WireReceipt | None = field(default=None, metadata=extension)


@frozen
class ProcessCloseStdinParams:
    """Ours: end of file on the stdin of a pipe process, behind all writes before it."""

    process_id: str


@frozen
class ProcessResizeParams:
    """Ours: the size of a terminal, in characters."""

    process_id: str
    rows: U64
    columns: U64


@frozen
class ProcessOutputTakenParams:
    """Ours: the client took all output up to `seq`; with `window`, that is the window from now on."""

    process_id: str
    seq: U64
    window: U64 | None = field(default=None, metadata=extension)


@frozen
class ProcessOutputParams:
    process_id: str
    seq: int
    stream: StreamName
    chunk: Base64


@frozen
class ProcessExitedParams:
    process_id: str
    seq: int
    exit_code: int
    sandbox_denied: bool | None = None


@frozen
class ProcessClosedParams:
    process_id: str
    seq: int


# Environment (§8).


@frozen
class EnvironmentStatusResult:
    status: str


INITIALIZE = Method("initialize", InitializeParams, InitializeResult, "")
INITIALIZED = Notification("initialized", Nothing)

PROCESS_START = Method("process/start", ProcessStartParams, ProcessStartResult, "exec")
PROCESS_READ = Method("process/read", ProcessReadParams, ProcessReadResult, "exec")
PROCESS_WRITE = Method("process/write", ProcessWriteParams, ProcessWriteResult, "exec")
PROCESS_SIGNAL = Method("process/signal", ProcessSignalParams, Nothing, "exec")
PROCESS_TERMINATE = Method("process/terminate", ProcessTerminateParams, ProcessTerminateResult, "exec")
PROCESS_CLOSE_STDIN = Method("process/closeStdin", ProcessCloseStdinParams, Nothing, "exec")
PROCESS_RESIZE = Method("process/resize", ProcessResizeParams, Nothing, "exec")

PROCESS_OUTPUT = Notification("process/output", ProcessOutputParams)
PROCESS_EXITED = Notification("process/exited", ProcessExitedParams)
PROCESS_CLOSED = Notification("process/closed", ProcessClosedParams)
PROCESS_OUTPUT_TAKEN = Notification("process/outputTaken", ProcessOutputTakenParams)

ENVIRONMENT_INFO = Method("environment/info", Unit, EnvironmentInfo, "environment info")
ENVIRONMENT_STATUS = Method("environment/status", Unit, EnvironmentStatusResult, "environment status")
