"""Every message of the exec-server protocol, once: its name, its parameters and its result.

Members are named as Python names here and travel in camelCase; bytes travel as base64, `PathUri` as a
`file:` URI, milliseconds stay what they are. How a value becomes bytes is the business of `codec`.
The members and their defaults are those of protocol.md §3-§4 and §8; members that are ours alone say so,
are left out unless used, and are offered under `capabilities`.
"""

from __future__ import annotations

import sys
from typing import Any, Generic, Literal, NewType, TypeVar

from attrs import define, field, frozen

from execenv.paths import PathUri
from execenv.sandbox.policy import Sandbox

P = TypeVar("P")
R = TypeVar("R")

Base64 = NewType("Base64", bytes)
Base64Text = str | memoryview
"""Base64 that is not decoded yet; a view where it is long."""

U64 = NewType("U64", int)
StreamName = Literal["stdout", "stderr", "pty"]
Signal = Literal["interrupt"]
Inherit = Literal["all", "core", "none"]
FileKind = Literal["directory", "file"]
OpenMode = Literal["read", "replace", "update"]
WireOpenMode = Literal["read", "replace"]
RedirectPolicy = Literal["follow", "stop"]

SERVER_CAPABILITIES = {
    "environmentConfigRead": True,
    "fileTransfer": True,
    "fileWriteStreaming": True,
    "fsWatchMissing": sys.platform == "linux",
    "httpBodyWindow": True,
    "httpHeaderEnvVars": True,
    "processCloseStdin": True,
    "processOutputWindow": True,
    "processResize": True,
    "processReceipt": True,
}
"""What this server has beyond the core protocol, as `environmentInfo.capabilities` says it."""

CHUNK_OVERHEAD = 128
"""What a piece of output counts in a window beside its bytes: both ends keep more of it than those."""

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
    sandbox: Sandbox | None = None
    enforce_managed_network: bool = False
    managed_network: Any = None
    network_proxy: Any = field(default=None, metadata=extension)
    shell_snapshot: Any = field(default=None, metadata=extension)
    credential_providers: Any = field(default=None, metadata=extension)
    output_window: U64 | None = field(default=None, metadata=extension)
    """Ours: the child is held back while more than this is on its way to the client, which says with
    `process/outputTaken` what it took. Each chunk counts its bytes and `CHUNK_OVERHEAD`, at both ends.
    A server may keep to a smaller one, but not below 2 MiB: say what was taken at least for each MiB."""


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
    evicted_bytes: int = field(default=0, metadata=extension)
    """Ours: how much output the process has had that is not retained any more: all before the first
    chunk that is."""


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
    """Ours: the client took all output up to `seq`; with `window`, that is the window from now on.

    After a resume the first one also says that the client still keeps to the window that it had.
    """

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


# Files (§5). `sandbox` says what the request may touch (sandbox.md); `follow_symlinks` (later): false refuses
# links anywhere in the path (§5.12).


@frozen
class FsReadFileParams:
    path: PathUri
    sandbox: Sandbox | None = None
    follow_symlinks: bool | None = None


@frozen
class FsReadFileResult:
    data_base64: Base64


@frozen
class FsWriteFileParams:
    """`data_base64` stays text here: what is wrong with it has an error of its own (§5.3)."""

    path: PathUri
    data_base64: Base64Text
    sandbox: Sandbox | None = None
    follow_symlinks: bool | None = None


@frozen
class FsCreateDirectoryParams:
    path: PathUri
    recursive: bool | None = None
    sandbox: Sandbox | None = None
    follow_symlinks: bool | None = None


@frozen
class FsPathParams:
    """The parameters of getMetadata, canonicalize and readDirectory."""

    path: PathUri
    sandbox: Sandbox | None = None
    follow_symlinks: bool | None = None


@frozen
class FileMetadata:
    """What a file system says of a path.

    Attributes:
        is_directory, is_file: of what a symlink leads to; both false for anything else.
        is_symlink: of the path itself.
        size: bytes.
        created_at_ms, modified_at_ms: milliseconds since 1970; 0 where it is not known.
        mode: permission bits (`0o755`), `None` where the environment does not say. Ours.
    """

    is_directory: bool
    is_file: bool
    is_symlink: bool
    size: int
    created_at_ms: int
    modified_at_ms: int
    mode: int | None = field(default=None, metadata=extension)


@frozen
class FsCanonicalizeResult:
    path: PathUri


@define(unsafe_hash=True)  # not frozen, which costs three times as much: there may be a hundred thousand
class DirectoryEntry:
    """A name in a directory. The flags are those of what a symlink leads to."""

    file_name: str
    is_directory: bool
    is_file: bool


@frozen
class FsReadDirectoryResult:
    entries: tuple[DirectoryEntry, ...]


@frozen
class FsRemoveParams:
    path: PathUri
    recursive: bool | None = None
    force: bool | None = None
    sandbox: Sandbox | None = None
    follow_symlinks: bool | None = None


@frozen
class FsCopyParams:
    source_path: PathUri
    destination_path: PathUri
    recursive: bool
    sandbox: Sandbox | None = None


@frozen
class WalkOptions:
    """How far `walk` goes (§5.10).

    Attributes:
        max_depth: 0 for the directory's own entries only.
        max_directories: directories that are opened, the first included; more than 0.
        max_entries: entries that are returned; more than 0.
        follow_directory_symlinks: links to directories are listed, and followed once; without it no link is
            listed at all. Links to files never are.
        prune_hidden_directories: list directories whose name begins with a dot, but do not look inside.
    """

    max_depth: U64
    max_directories: U64
    max_entries: U64
    follow_directory_symlinks: bool
    prune_hidden_directories: bool = False


LARGEST_WALK = WalkOptions(U64(64), U64(10_000), U64(50_000), follow_directory_symlinks=True)
"""As far as the reference goes; beyond it refuses."""

ONE_DIRECTORY = WalkOptions(U64(0), U64(1), LARGEST_WALK.max_entries, follow_directory_symlinks=True)
"""What is in a directory itself: directories and files, with names that `fs/readDirectory` cannot tell."""


@frozen
class FsWalkParams:
    path: PathUri
    options: WalkOptions
    sandbox: Sandbox | None = None


@frozen
class WalkEntry:
    """A directory or file that `walk` found."""

    path: PathUri
    kind: FileKind


@frozen
class WalkError:
    """A place that `walk` could not look at, and why."""

    path: PathUri
    message: str


@frozen
class WalkResult:
    """Entries breadth first, by name within a directory. `truncated`: a limit has cut them off."""

    entries: tuple[WalkEntry, ...]
    errors: tuple[WalkError, ...]
    truncated: bool


@frozen
class FsOpenParams:
    """`keep` (ours): `replace` leaves what is in the file, to be overwritten or continued."""

    handle_id: str
    path: PathUri
    sandbox: Sandbox | None = None
    mode: WireOpenMode = "read"
    keep: bool = field(default=False, metadata=extension)


@frozen
class FsOpenResult:
    handle_id: str


@frozen
class FsReadBlockParams:
    handle_id: str
    offset: U64
    len: U64


@frozen
class FsReadBlockResult:
    chunk: Base64
    eof: bool


@frozen
class FsWriteBlockParams:
    handle_id: str
    offset: U64
    chunk: Base64


@frozen
class FsCloseParams:
    """`sync` (ours): what was written is on the disk when this is answered."""

    handle_id: str
    sync: bool = field(default=False, metadata=extension)


@frozen
class FsWatchMissingParams:
    """Tell once when any of `missing` comes into being, or something happens to `present`."""

    watch_id: U64
    missing: tuple[PathUri, ...]
    present: PathUri | None = None


@frozen
class FsWatchMissingResult:
    """`watching` is false if there is nothing to wait for: it is not as the request has it any more."""

    watching: bool


@frozen
class FsMissingChangedParams:
    watch_id: U64


@frozen
class FsRenameParams:
    """Ours: rename(2). What is at the destination is replaced, in one step; with `sync`, also on the disk."""

    source_path: PathUri
    destination_path: PathUri
    sandbox: Sandbox | None = None
    sync: bool = field(default=False, metadata=extension)


@frozen
class FsSetMetadataParams:
    """Ours: permission bits as chmod(2), and the time of the last change; `None` leaves either as it is."""

    path: PathUri
    mode: U64 | None = None
    modified_at_ms: int | None = None
    sandbox: Sandbox | None = None


# HTTP (§7).


@frozen
class HttpHeader:
    """A header of a request or response.

    Attributes:
        value_env_var: only in a request: a variable of the server whose content is appended to `value`.
    """

    name: str
    value: str
    value_env_var: str | None = field(default=None, metadata=extension)


@frozen(kw_only=True)
class HttpRequestParams:
    """A request that the server makes (§7.1).

    Attributes:
        timeout_ms: for connecting, headers and body together.
        request_id: names the stream of the body; whatever it is, it must be there.
        body_window: ours: no more bytes of the body than this are sent before the client has said with
            `http/request/bodyTaken` that it took some.
    """

    method: str
    url: str
    headers: tuple[HttpHeader, ...] = ()
    body_base64: Base64 | None = None
    timeout_ms: U64 | None = None
    redirect_policy: RedirectPolicy = "follow"
    request_id: str
    stream_response: bool = False
    body_window: U64 | None = field(default=None, metadata=extension)


@frozen
class HttpRequestResult:
    """Header names in lower case. The body is empty if it is streamed."""

    status: int
    headers: tuple[HttpHeader, ...]
    body_base64: Base64


@frozen
class HttpBodyDeltaParams:
    """A piece of a body. The last one is empty, with `done`, and `error` if more should have come."""

    request_id: str
    seq: int
    delta_base64: Base64
    done: bool = False
    error: str | None = None


@frozen
class HttpBodyTakenParams:
    """Ours: the client took so many bytes of the body in all. With `stop` it wants nothing more of that
    request, streamed or not, and no word about it."""

    request_id: str
    taken: U64
    stop: bool = field(default=False, metadata=extension)


# Environment (§8).


@frozen
class EnvironmentStatusResult:
    status: str


@frozen
class EnvironmentConfigReadParams:
    """What a codex client wants to know of the configuration there: TOML keys, as their segments."""

    cwd: PathUri
    config_paths: tuple[tuple[str, ...], ...]
    requirements_paths: tuple[tuple[str, ...], ...]


@frozen
class ConfigLayer:
    """What one file has of the keys that were asked for. `base_dir` is what relative paths in it are from."""

    source: str
    base_dir: PathUri
    toml: str


@frozen
class ConfigLayers:
    """Layers, the weakest first. What a cloud service configures belongs in at `cloud_insertion_index`."""

    layers: tuple[ConfigLayer, ...]
    cloud_insertion_index: int


@frozen
class EnvironmentConfig:
    user_home_dir: PathUri
    codex_home_dir: PathUri
    hostname: str
    config: ConfigLayers
    requirements: ConfigLayers


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

FS_READ_FILE = Method("fs/readFile", FsReadFileParams, FsReadFileResult, "filesystem")
FS_WRITE_FILE = Method("fs/writeFile", FsWriteFileParams, Nothing, "filesystem")
FS_CREATE_DIRECTORY = Method("fs/createDirectory", FsCreateDirectoryParams, Nothing, "filesystem")
FS_GET_METADATA = Method("fs/getMetadata", FsPathParams, FileMetadata, "filesystem")
FS_CANONICALIZE = Method("fs/canonicalize", FsPathParams, FsCanonicalizeResult, "filesystem")
FS_READ_DIRECTORY = Method("fs/readDirectory", FsPathParams, FsReadDirectoryResult, "filesystem")
FS_REMOVE = Method("fs/remove", FsRemoveParams, Nothing, "filesystem")
FS_COPY = Method("fs/copy", FsCopyParams, Nothing, "filesystem")
FS_WALK = Method("fs/walk", FsWalkParams, WalkResult, "filesystem")
FS_OPEN = Method("fs/open", FsOpenParams, FsOpenResult, "filesystem")
FS_READ_BLOCK = Method("fs/readBlock", FsReadBlockParams, FsReadBlockResult, "filesystem")
FS_WRITE_BLOCK = Method("fs/writeBlock", FsWriteBlockParams, Nothing, "filesystem")
FS_CLOSE = Method("fs/close", FsCloseParams, Nothing, "filesystem")
FS_WATCH_MISSING = Method("fs/watchMissing", FsWatchMissingParams, FsWatchMissingResult, "filesystem")
FS_RENAME = Method("fs/rename", FsRenameParams, Nothing, "filesystem")
FS_SET_METADATA = Method("fs/setMetadata", FsSetMetadataParams, Nothing, "filesystem")

FS_MISSING_CHANGED = Notification("fs/missingChanged", FsMissingChangedParams)

HTTP_REQUEST = Method("http/request", HttpRequestParams, HttpRequestResult, "http")

HTTP_BODY_DELTA = Notification("http/request/bodyDelta", HttpBodyDeltaParams)
HTTP_BODY_TAKEN = Notification("http/request/bodyTaken", HttpBodyTakenParams)

ENVIRONMENT_INFO = Method("environment/info", Unit, EnvironmentInfo, "environment info")
ENVIRONMENT_CONFIG_READ = Method(
    "environmentConfig/read", EnvironmentConfigReadParams, EnvironmentConfig, "environment config"
)
ENVIRONMENT_STATUS = Method("environment/status", Unit, EnvironmentStatusResult, "environment status")
