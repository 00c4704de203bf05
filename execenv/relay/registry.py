"""The registry, as an executor and a harness ask it over HTTP (relay.md §1).

Nothing that is logged or raised here holds a credential, an authorisation, a key, or the query of a URL.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from logging import getLogger
from typing import TYPE_CHECKING, Any

import trio
from attrs import field, frozen

from execenv.errors import ConnectFailed, UsageError
from execenv.relay.addresses import Address, InvalidUrl, check_socket_url, parse_base_url
from execenv.relay.keys import InvalidKey, PublicKey
from execenv.transports.websocket import default_ssl

if TYPE_CHECKING:
    import ssl

    import httpcore2

logger = getLogger(__name__)

NOISE_PROFILE = "noise_hybrid_ik_v1"
CLEAR_PROFILE = "clear_relay_v1"
"""What our registry calls an executor that registered without a key."""

REQUEST_TIMEOUT = 10.0
MAX_ANSWER = 64 * 1024
"""Bytes read of an answer; the largest that makes sense has about 5 KiB."""
MAX_ERROR = 4096
"""Bytes kept of what a registry says of an error."""
TRUNCATED = " [truncated]"
SECRET = 6
"""Letters from which on a credential is worth hiding where a registry repeats it."""
STREAM_ID_HEADER = "x-codex-noise-stream-id"
RETRYABLE = (408, 429)  # besides 5xx, and 409 with the code `environment_offline`

_ENVIRONMENT_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
_HEADER = re.compile(r"[\x20-\x7e]*")
_STREAM_ID = re.compile(r"[\x21-\x7e]{1,128}")

Headers = Callable[[], Mapping[str, str]]
"""Gives the headers that say who is asking, whenever the registry is asked. May raise ConnectFailed."""


class RegistryFailed(ConnectFailed):
    """The registry could not be asked, or did not give what it was asked for.

    `retryable` is for a harness (§1.4, "Harness side"); an executor goes by `status` and `code`.

    Attributes:
        status: of its HTTP answer; `None` if there was none, or if the answer itself makes no sense.
        code: the error code in the answer's body; `None` without one.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, retryable: bool
    ) -> None:
        super().__init__(message, retryable=retryable)
        self.status = status
        self.code = code


@frozen
class Registration:
    """What an executor got for registering.

    Attributes:
        url: where to connect to; a secret, as it may be signed.
        registration_id: `None` for clear text.
    """

    environment_id: str
    url: str = field(repr=False)
    registration_id: str | None


@frozen
class Bundle:
    """What a harness got to reach an executor with, once: its parts are never mixed with those of another.

    Attributes:
        url: where to connect to; a secret, as it may be signed.
        registration_id, executor_key, authorization: `None` for clear text.
    """

    environment_id: str
    url: str = field(repr=False)
    registration_id: str | None
    executor_key: PublicKey | None
    authorization: str | None = field(repr=False)


def check_environment_id(environment_id: str) -> None:
    """See that it can stand in a path that is shown with a credential.

    Raises:
        UsageError: if it is not 1 to 256 ASCII letters, digits, `-` and `_`.
    """
    if not _ENVIRONMENT_ID.fullmatch(environment_id):
        raise UsageError(
            f"an environment id has 1 to 256 ASCII letters, digits, - and _, and not {environment_id[:300]!r}"
        )


def registry_pause(tries: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds to wait before the registry is asked again, after so many tries that came to nothing and were
    waited for (§1.4): from half a second on, doubled each time, at most 5 and half as much again."""
    base = min(5.0, 0.5 * 2.0 ** min(tries, 4))
    return base + uniform(0.0, base / 2)


class Registry:
    """One registry, asked with one credential. Got from `open_registry`. Tasks may use it side by side."""

    def __init__(self, pool: httpcore2.AsyncConnectionPool, base: Address, headers: Headers) -> None:
        self._pool = pool
        self._base = base
        self._headers = headers

    @property
    def shown(self) -> str:
        """Its URL, for people."""
        return str(self._base)

    async def register(self, environment_id: str, key: PublicKey | None) -> Registration:
        """Offer an environment: encrypted with `key`, or in clear text without.

        Raises:
            RegistryFailed: if that cannot be, or the answer cannot be used; says which.
            UsageError: if the id is none, see `check_environment_id`.
        """
        body = None
        if key is not None:
            body = {"security_profile": NOISE_PROFILE, "executor_public_key": key.to_json()}
        answer = await self._checked(environment_id, "register", body, key)
        registration_id = None if key is None else self._text(answer, "executor_registration_id")
        return Registration(environment_id, self._socket_url(answer), registration_id)

    async def connect(self, environment_id: str, key: PublicKey | None) -> Bundle:
        """Look an environment up, as the harness whose `key` it is; without one in clear text.

        Raises:
            RegistryFailed: if that cannot be, or the answer cannot be used; says which.
            UsageError: if the id is none, see `check_environment_id`.
        """
        if key is None:
            answer = await self._checked(environment_id, "connect", {}, None)
            return Bundle(environment_id, self._socket_url(answer), None, None, None)
        answer = await self._checked(environment_id, "connect", {"harness_public_key": key.to_json()}, key)
        try:
            executor_key = PublicKey.from_json(answer.get("executor_public_key"))
        except InvalidKey as error:
            raise self._senseless(f"executor_public_key cannot be used: {error}") from None
        return Bundle(
            environment_id,
            self._socket_url(answer),
            self._text(answer, "executor_registration_id"),
            executor_key,
            self._text(answer, "harness_key_authorization"),
        )

    async def validate(
        self, stream_id: str, environment_id: str, registration_id: str, key: PublicKey, authorization: str
    ) -> bool:
        """Ask whether a harness with that key may use the environment now. An authorisation is used up by it.

        Whatever is not a plain yes within 10 s is no. Never raises but Cancelled, and tells nobody what the
        registry said.
        """
        body = {
            "executor_registration_id": registration_id,
            "harness_public_key": key.to_json(),
            "harness_key_authorization": authorization,
        }
        if not _STREAM_ID.fullmatch(stream_id):
            return False
        try:
            answer = await self._ask(environment_id, "validate", body, {STREAM_ID_HEADER: stream_id})
        except RegistryFailed as error:
            how = f"status {error.status}" if error.status is not None else "no answer that makes sense"
            logger.warning("the registry did not say whether a harness may come in: %s", how)
            return False
        except Exception as error:
            logger.warning("the registry could not be asked about a harness: %s", type(error).__name__)
            return False
        return answer.get("valid") is True

    # What is asked, and what is wrong with the answer.

    async def _checked(
        self, environment_id: str, operation: str, body: Mapping[str, object] | None, key: PublicKey | None
    ) -> dict[str, Any]:
        """The answer to `register` and `connect`, about that environment and of the right profile."""
        answer = await self._ask(environment_id, operation, body)
        if answer.get("environment_id") != environment_id:
            raise self._senseless(f"its answer is not about the environment {environment_id}")
        profile = answer.get("security_profile")
        expected = CLEAR_PROFILE if key is None else NOISE_PROFILE
        # The registration in clear text is older than profiles.
        if profile != expected and not (key is None and operation == "register" and profile is None):
            found = self._printable(profile)[:100] if isinstance(profile, str) else "none"
            raise self._senseless(f"its security profile is {found} and not {expected}")
        return answer

    def _text(self, answer: Mapping[str, object], name: str) -> str:
        value = answer.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self._senseless(f"{name} is missing or blank")
        return value

    def _socket_url(self, answer: Mapping[str, object]) -> str:
        url = self._text(answer, "url")
        try:
            check_socket_url(url, here=self._base.is_loopback)
        except InvalidUrl as error:
            raise self._senseless(f"the websocket URL in its answer {error}") from None
        return url

    async def _ask(
        self,
        environment_id: str,
        operation: str,
        body: Mapping[str, object] | None,
        extra: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Send one request; the object in the body of its answer."""
        import orjson

        check_environment_id(environment_id)
        status, data = await self._post(
            f"{self._base.path}/cloud/environment/{environment_id}/{operation}",
            None if body is None else orjson.dumps(body),
            {**self._credentials(), **(extra or {})},
        )
        try:
            answer = orjson.loads(data) if len(data) <= MAX_ANSWER else None
        except orjson.JSONDecodeError:
            answer = None
        if not 200 <= status < 300:
            raise self._refused(status, answer)
        if not isinstance(answer, dict):
            raise self._senseless("its answer is no JSON object")
        return answer

    def _credentials(self) -> Mapping[str, str]:
        try:
            headers = self._headers()
        except ConnectFailed as error:
            raise RegistryFailed(str(error), retryable=error.retryable) from error
        if not all(map(_HEADER.fullmatch, headers.values())):
            raise RegistryFailed(
                "a header for the registry, such as its credential, should be one line of printable ASCII",
                retryable=False,
            )
        return headers

    async def _post(self, target: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Send a request; the status and the body of its answer. Not much more than `MAX_ANSWER` is read."""
        import httpcore2

        base = self._base
        all_headers: dict[bytes | str, bytes | str] = {
            "host": base.authority,
            "accept": "*/*",
            "content-length": str(len(body or b"")),
        }
        if body is not None:
            all_headers["content-type"] = "application/json"
        all_headers.update(headers)
        # In parts, so that it leads to where `addresses` has seen it lead.
        host = f"[{base.host}]" if ":" in base.host else base.host
        url = httpcore2.URL(scheme=base.scheme, host=host, port=base.port, target=target)
        status, data = 0, bytearray()
        with trio.move_on_after(REQUEST_TIMEOUT) as scope:
            try:
                async with self._pool.stream("POST", url, headers=all_headers, content=body) as response:
                    status = response.status
                    async for piece in response.aiter_stream():
                        data += piece
                        if len(data) > MAX_ANSWER:
                            scope.cancel()  # a `break` would leave generators of httpcore2 behind
                return status, bytes(data)
            except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
                text = f"cannot ask the registry {self.shown}: {self._printable(_reason(error))}"
                raise RegistryFailed(text, retryable=not _is_distrust(error)) from error
        if len(data) > MAX_ANSWER:
            return status, bytes(data)
        text = f"cannot ask the registry {self.shown}: no answer within {REQUEST_TIMEOUT:g} s"
        raise RegistryFailed(text, retryable=True)

    # Failures.

    def _senseless(self, problem: str) -> RegistryFailed:
        return RegistryFailed(f"the registry {self.shown} cannot be used: {problem}", retryable=False)

    def _refused(self, status: int, answer: object) -> RegistryFailed:
        error = answer.get("error") if isinstance(answer, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        code = code if isinstance(code, str) and code.strip() else None
        if not isinstance(message, str) or not message.strip():
            message = "empty or malformed error body"
        told = self._printable(message)
        shown_code = f", {self._printable(code)[:100]}" if code else ""
        if status in (401, 403):
            text = f"authentication failed ({status}): {told}"
        else:
            text = f"request failed ({status}{shown_code}): {told}"
        offline = status == 409 and code == "environment_offline"
        retryable = status >= 500 or status in RETRYABLE or offline
        return RegistryFailed(
            f"the registry {self.shown}: {text}", status=status, code=code, retryable=retryable
        )

    def _printable(self, text: str) -> str:
        """Another's words, for people: one line, not without end, and without our credential."""
        try:
            values = list(self._headers().values())
        except ConnectFailed:
            values = []
        for value in values:
            secret = value.rpartition(" ")[2]
            if len(secret) >= SECRET:
                text = text.replace(secret, "***")
        line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
        kept = line.encode(errors="replace")
        if len(kept) <= MAX_ERROR:
            return kept.decode()
        return kept[:MAX_ERROR].decode(errors="ignore") + TRUNCATED


def _reason(error: BaseException) -> str:
    """What went wrong, below the names that httpcore2 and Trio have given to it."""
    text, cause = str(error), error.__cause__ or error.__context__
    while cause is not None:
        while isinstance(cause, BaseExceptionGroup):  # every address of the host was tried
            cause = cause.exceptions[0]
        text = str(cause) or text
        cause = cause.__cause__
    return text or type(error).__name__


def _is_distrust(error: BaseException | None) -> bool:
    """Whether it was the certificate of the registry."""
    import ssl

    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


@asynccontextmanager
async def open_registry(
    base_url: str,
    *,
    headers: Headers,
    ssl_context: ssl.SSLContext | None = None,
    network_backend: httpcore2.AsyncNetworkBackend | None = None,
) -> AsyncIterator[Registry]:
    """A registry by its base URL. Nothing is connected yet; leaving the block closes all connections.

    Args:
        headers: see `Headers`. Where they may go is decided by who makes them, see
            `execenv.relay.credentials`; here only `http://` of other machines is refused.
        ssl_context: whom to trust; the system's certificates if `None`, as for websockets.
        network_backend: what connects; Trio's sockets if `None`.

    Raises:
        UsageError: if the URL is none.
    """
    base = parse_base_url(base_url)
    import httpcore2

    async with httpcore2.AsyncConnectionPool(
        # Only where there is use for it: all certificates of the system are read (20 ms).
        ssl_context=ssl_context or (default_ssl() if base.scheme == "https" else None),
        max_connections=None,
        max_keepalive_connections=8,
        keepalive_expiry=5.0,
        network_backend=network_backend or httpcore2.TrioBackend(),
    ) as pool:
        yield Registry(pool, base, headers)
