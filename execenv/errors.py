"""Every exception of execenv, and the one table that says which JSON-RPC code each has on the wire.

The tree says whose fault an error is:

* `RpcError` and its subclasses: the other side answered, with an error. `code` and `message` are its own.
* `ConnectionLost`, `ConnectFailed`: nobody answered. The connection is gone, or never was.
* `ProcessNotStarted`, `ProcessFailed`: the program could not be run, or ended badly.
* `HttpFailed`: the environment answered, but the server that it was to ask did not, or not well.
* `OutputGap`: output was lost for good; what follows it is still delivered.
* `UsageError`: the call itself was wrong; its message shows the right one.
* `ConfigError`: a file or a variable that says which environments there are is wrong.
"""

from __future__ import annotations

import errno
import os
import re
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from execenv.abc import KillReceipt
    from execenv.paths import PathUri

__all__ = [
    "ConfigError",
    "ConnectFailed",
    "ConnectionLost",
    "EnvironmentUnavailable",
    "ExecenvError",
    "HttpFailed",
    "InternalError",
    "InvalidParams",
    "InvalidRequest",
    "MethodNotFound",
    "NotFound",
    "NotSupported",
    "Outcome",
    "OutputGap",
    "ProcessFailed",
    "ProcessNotStarted",
    "ProtocolViolation",
    "RpcError",
    "SessionAttached",
    "UsageError",
    "error_from_code",
    "error_from_os",
    "file_error",
    "os_error_text",
    "os_from_error",
    "wrong_type",
]


Outcome = Literal["not sent", "not done", "done", "unknown"]


class ExecenvError(Exception):
    """The base of every error that execenv raises on purpose.

    Attributes:
        outcome: what became of the call that raised it. `"not sent"`: the environment never heard of it;
            `"not done"`: it did, and refused or failed; `"done"`: it was done, and what came of it is the
            error; `"unknown"`: it may have been done, or a part of it.
    """

    outcome: Outcome = "unknown"


class UsageError(ExecenvError):
    """The call was wrong: two tasks read one stream, an argument does not fit. Nothing was done."""

    outcome = "not sent"


class EnvironmentUnavailable(UsageError):
    """No such environment is known, or there is none by default. Nothing ran, here or elsewhere.

    Attributes:
        environment_id: the one that was asked for; `None` for the default.
    """

    def __init__(self, message: str, environment_id: str | None = None) -> None:
        super().__init__(message)
        self.environment_id = environment_id


class ConfigError(ExecenvError):
    """What says which environments there are, a file or a variable, cannot be used as it is.

    The text says what is wrong with it, where, and what to write instead. It never holds a token.

    Attributes:
        file: its path; `None` for variables.
        line: the line of the file that is at fault; `None` if it is the file as a whole.
        key: the key at fault, such as `environments[0].url`, or the variable; `None` where there is none.
        problem: what is wrong, without the place.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        verb: str = "",
    ) -> None:
        where = f"{file}, line {line}" if line else file
        place = f"failed to {verb} environment config {where}: " if verb else f"{where}: " if file else ""
        super().__init__(place + problem)
        self.problem = problem
        self.file = file
        self.line = line
        self.key = key


class NotSupported(ExecenvError):
    """This environment cannot do what was asked, and nothing was done. The message says what can."""

    outcome = "not done"


class ConnectionLost(ExecenvError):
    """The connection to an environment ended, and what was asked could not be asked again.

    Calls that may be repeated wait until the connection is there again, and don't raise this then. `outcome`
    says whether the others may have been done.
    """

    def __init__(self, message: str, outcome: Outcome = "unknown") -> None:
        super().__init__(message)
        self.outcome = outcome


class ConnectFailed(ExecenvError):
    """An environment could not be reached, or did not finish the handshake. Nothing ran there.

    Attributes:
        retryable: whether it may be otherwise in a moment. False where the answer was a refusal.
    """

    outcome = "not sent"

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class ProtocolViolation(ExecenvError):
    """The other side broke the protocol so that the connection cannot go on."""


class RpcError(ExecenvError):
    """The other side answered a request with an error object (protocol.md §10).

    Attributes:
        code: the JSON-RPC error code. A subclass stands for one code each.
        message: the other side's own words.
    """

    outcome = "not done"
    code = -32603

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class InvalidRequest(RpcError):
    """-32600: refused as it stands, such as an unknown process or session, or a call out of order."""

    code = -32600


class MethodNotFound(RpcError):
    """-32601: the other side does not have this method."""

    code = -32601


class InvalidParams(RpcError):
    """-32602: the parameters do not decode, or have values that cannot be."""

    code = -32602


class InternalError(RpcError):
    """-32603: the operation itself failed, such as a spawn or a write to a process that is gone."""

    code = -32603


class NotFound(RpcError):
    """-32004: no such file or handle."""

    code = -32004


class SessionAttached(RpcError):
    """-32010: another connection holds the session; it can be resumed once that is gone."""

    code = -32010


TRANSPORT_CLOSED = (-32000, "JSON-RPC transport closed")
"""How a server behind a server says that it lost the one that was to answer (environments.md §1.4)."""

_BY_CODE: dict[int, type[RpcError]] = {
    cls.code: cls
    for cls in (InvalidRequest, MethodNotFound, InvalidParams, InternalError, NotFound, SessionAttached)
}


def error_from_code(code: int, message: str) -> ExecenvError:
    """The exception for an error object that arrived: a subclass where the code has one."""
    if (code, message) == TRANSPORT_CLOSED:
        return ConnectionLost(message)
    return _BY_CODE.get(code, RpcError)(message, code)


def file_error(number: int, path: PathUri, words: str | None = None) -> OSError:
    """The `OSError` of an errno, of its own subclass, with `path` as text for its `filename`.

    Args:
        words: for `strerror`, where there is more to say than the errno does.
    """
    return OSError(number, words or os.strerror(number), path.text)


def os_error_text(error: OSError) -> str:
    """`No such file or directory (os error 2)`, as the reference words an error of the system."""
    if error.errno is None:
        return str(error)
    return f"{os.strerror(error.errno)} (os error {error.errno})"


_REFUSED = frozenset((errno.EACCES, errno.EPERM, errno.EINVAL))
_FAILED = frozenset((errno.ENOTSUP,))


def error_from_os(error: OSError) -> RpcError:
    """The error object for an error of the system, by its kind (protocol.md §5).

    Words other than those of the system go as they are.
    """
    number = error.errno or 0
    if number and error.strerror != os.strerror(number):
        return (InternalError if number in _FAILED else InvalidRequest)(error.strerror or str(error))
    if number == errno.ENOENT:
        return NotFound(os_error_text(error))
    return (InvalidRequest if number in _REFUSED else InternalError)(os_error_text(error))


_OS_ERROR = re.compile(r"(.*) \(os error (\d+)\)", re.DOTALL)
_WORDS = (
    ("is not a file", errno.EINVAL),
    ("file is too large", errno.EFBIG),
    ("path contains a symbolic link", errno.ELOOP),
    ("fs/copy requires recursive", errno.EISDIR),
    ("at most 128 file handles", errno.EMFILE),
    ("recursive no-follow removal", errno.ENOTSUP),
)


def os_from_error(error: RpcError, path: PathUri) -> Exception:
    """What to raise for the answer to a call about `path`: an `OSError`, if it is about the file.

    The words decide before the number, which is that of the other side's operating system.
    """
    if isinstance(error, MethodNotFound):
        return NotSupported(f"the environment cannot do that with files: {error.message}")
    found = _OS_ERROR.fullmatch(error.message)
    if found:
        number = _errnos().get(found[1]) or int(found[2])
        return file_error(number, path)
    if isinstance(error, NotFound):
        return file_error(errno.ENOENT, path, error.message)
    for words, number in _WORDS:
        if words in error.message:
            return file_error(number, path, error.message)
    if isinstance(error, InvalidRequest):
        return file_error(errno.EINVAL, path, error.message)
    return error


@cache
def _errnos() -> dict[str, int]:
    return {os.strerror(number): number for number in errno.errorcode}


def wrong_type(value: object, expected: str) -> str:
    """The text of an `InvalidParams` for a JSON value that is of the wrong type."""
    if value is None:
        found = "null"
    elif isinstance(value, bool):
        found = "boolean"
    elif isinstance(value, int | float):
        found = "number"
    elif isinstance(value, memoryview):
        found = "string"
    elif isinstance(value, str):
        found = f'string "{value[:80]}"'
    else:
        found = "sequence" if isinstance(value, list) else "map"
    return f"invalid type: {found}, expected {expected}"


class ProcessNotStarted(ExecenvError):
    """A program could not be started. `__cause__` is the error that says why.

    Attributes:
        program: what was to be run.
        environment: the name of the environment that was to run it.
    """

    outcome = "not done"

    def __init__(self, program: str, environment: str, reason: str) -> None:
        super().__init__(f"cannot start {program!r} in {environment}: {reason}")
        self.program = program
        self.environment = environment
        self.reason = reason


class ProcessFailed(ExecenvError):
    """A process ended with a status other than 0 while the caller had asked for `check`.

    Attributes:
        argv: the program and its arguments.
        returncode: 0-255; death by signal n is 128 + n.
        stdout, stderr: what was captured, `None` where nothing was to be captured.
        receipt: what had to be stopped when the process ended (descendants that it left behind).
        sandbox_denied: by what it said its sandbox was the reason: a guess. `None` where the environment does
            not say.
    """

    outcome = "done"

    def __init__(
        self,
        argv: tuple[str, ...],
        environment: str,
        returncode: int,
        stdout: bytes | None,
        stderr: bytes | None,
        receipt: KillReceipt | None = None,
        sandbox_denied: bool | None = False,
    ) -> None:
        hint = " (its sandbox may be why)" if sandbox_denied else ""
        super().__init__(f"{argv[0]!r} in {environment} ended with status {returncode}{hint}")
        self.argv = argv
        self.environment = environment
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        self.receipt = receipt
        self.sandbox_denied = sandbox_denied

    def __str__(self) -> str:
        text = str(self.args[0])
        tail = (self.stderr or b"").strip().splitlines()[-1:]
        return f"{text}: {tail[0].decode(errors='replace')}" if tail else text


HttpFailure = Literal["invalid", "request", "redirect", "body", "timeout"]
_HTTP_OUTCOMES: dict[HttpFailure, Outcome] = {
    "invalid": "not done",
    "request": "unknown",  # it may have arrived, and only the answer not
    "redirect": "unknown",
    "body": "done",
    "timeout": "unknown",
}


class HttpFailed(ExecenvError):
    """An HTTP request that an environment was to make got no response, or not all of it.

    Attributes:
        method: of the request.
        url: without credentials and query.
        environment: the name of the environment that was to make it.
        kind: `"invalid"`: there can be no such request, nothing was sent; `"request"`: no response came, for
            whatever reason; `"redirect"`: too many, or one that leads out of HTTP; `"body"`: the response
            broke off; `"timeout"`: the time that it was given is over.
    """

    def __init__(self, method: str, url: str, environment: str, kind: HttpFailure, reason: str) -> None:
        super().__init__(f"{method} {url} in {environment}: {reason}")
        self.outcome = _HTTP_OUTCOMES[kind]
        self.method = method
        self.url = url
        self.environment = environment
        self.kind = kind


class OutputGap(ExecenvError):
    """Output of a process was lost for good, because its environment keeps only the newest part.

    Reading goes on behind it: the next call delivers what is still there.

    Attributes:
        from_seq, to_seq: the first and last sequence number that are missing.
        bytes: how much output that was, of all streams together; `None` if it is not known.
    """

    outcome = "done"

    def __init__(self, from_seq: int, to_seq: int, bytes: int | None = None) -> None:  # noqa: A002
        amount = "" if bytes is None else f" ({bytes} bytes)"
        super().__init__(f"output with seq {from_seq} to {to_seq}{amount} was lost before it could be read")
        self.from_seq = from_seq
        self.to_seq = to_seq
        self.bytes = bytes
