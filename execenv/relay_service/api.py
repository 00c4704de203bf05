"""The registry: what executors and harnesses ask for over HTTP, and what they are answered (relay.md §1).

Decisions over a store and an exchange. Nothing here knows of connections.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from attrs import evolve, field, frozen

from execenv.relay.keys import InvalidKey, PublicKey
from execenv.relay.registry import NOISE_PROFILE
from execenv.relay_service import tokens
from execenv.relay_service.audit import Caller
from execenv.relay_service.exchange import Exchange
from execenv.relay_service.limits import Buckets
from execenv.relay_service.metrics import Metrics
from execenv.relay_service.settings import Settings
from execenv.relay_service.store import (
    AuthorizationRecord,
    RegistrationRecord,
    Role,
    Store,
    StoreUnavailable,
    TokenRecord,
)
from execenv.relay_service.tickets import Ticket, new_nonce, signed_query

CLEAR_PROFILE = "clear_relay_v1"
"""What `connect` says of an executor that takes clear text."""
ROLES: Mapping[str, Role] = {"register": "executor", "connect": "harness", "validate": "executor"}
"""The operations, and who may ask for each."""
MAX_AUTHORIZATION = 4096  # relay.md §4.5
KEY_AGE = 0.1
"""Seconds in which the store is not asked again for the key that URLs are signed with."""

Clock = Callable[[], float]


@frozen
class Answer:
    """What is answered. `code` is that of the error in the body; empty for a success."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(factory=dict)

    @property
    def code(self) -> str:
        return str(self.body["error"]["code"]) if "error" in self.body else ""


class Denied(Exception):
    """Something is refused. The answer quotes nothing of what was asked."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code)
        self.answer = Answer(status, {"error": {"code": code, "message": message}}, headers or {})


class Gate:
    """Who may do what: tokens, and how often. One for all of a node."""

    def __init__(self, store: Store, settings: Settings, metrics: Metrics, clock: Clock) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._requests = Buckets(settings.token_rate, settings.token_burst, settings.max_buckets)
        self._failures = Buckets(settings.failure_rate, settings.failure_burst, settings.max_buckets)
        self._signing_key = b""
        self._signing_key_at = -math.inf

    async def signing_key(self, known: bytes = b"") -> bytes:
        """What URLs are checked with. The store is asked seldom: who guesses at URLs makes it no work.

        Args:
            known: one that a URL does not fit: the store may have lost it, and have another one since.
        """
        if self._signing_key == known and self._clock() >= self._signing_key_at + KEY_AGE:
            await self.newest_signing_key()
        return self._signing_key

    async def newest_signing_key(self) -> bytes:
        """What URLs are signed with: another node may have only just begun, and know no other."""
        self._signing_key = await self._store.signing_key()
        self._signing_key_at = self._clock()
        return self._signing_key

    async def admit(self, caller: Caller, authorization: bytes | None) -> TokenRecord:
        """The token that a caller shows, for its role and environment.

        A valid token is never refused for what others at the same address have tried, as all who come through
        a proxy have one address.

        Raises:
            Denied: if there is none that is good for that, or it is used too often.
            StoreUnavailable: if it cannot be known now.
        """
        record = await self._known(authorization)
        if record is None or not tokens.is_current(record, self._clock()):
            if record is not None:
                problem = "this token has expired"
            elif authorization is None:
                problem = "a bearer token of this relay is needed"
            else:
                problem = "what was shown is no token of this relay, or was revoked"
            challenge = {"www-authenticate": "Bearer"}
            create = "execenv relay token create makes one"
            raise self.failed(caller, Denied(401, "not_authenticated", f"{problem}: {create}", challenge))
        self.count(record.token_id, caller.environment)
        if record.role != caller.role:
            raise Denied(403, "wrong_role", f"this token has not the role {caller.role}")
        if not tokens.is_for(record, caller.environment):
            raise Denied(403, "wrong_environment", "this token is for another environment")
        return record

    def count(self, token_id: str, environment_id: str) -> None:
        """Count a request with a token that is known.

        Raises:
            Denied: if there were too many.
        """
        wait = self._requests.take(f"{token_id} {environment_id}", self._clock())
        if wait:
            raise _too_often(wait, "rate_limited")

    def failed(self, caller: Caller, denied: Denied) -> Denied:
        """Count a failed authentication; what to answer to it."""
        self._metrics.authentications_failed += 1
        wait = self._failures.take(caller.address.rpartition(":")[0], self._clock())
        return _too_often(wait, "too_many_failures") if wait else denied

    async def _known(self, authorization: bytes | None) -> TokenRecord | None:
        """The token that is shown, which may have expired: only who knows its secret is told that."""
        scheme, _, token = (authorization or b"").decode("latin-1").partition(" ")
        token = token.strip()
        token_id = tokens.token_id(token)
        if scheme.lower() != "bearer" or token_id is None:
            return None
        record = await self._store.token(token_id)
        return record if record is not None and tokens.is_token_of(record, token) else None


def _too_often(wait: float, code: str) -> Denied:
    seconds = max(1, math.ceil(wait))
    return Denied(429, code, f"too many requests: wait {seconds} s", {"retry-after": str(seconds)})


class Registry:
    """Answers the requests of §1.2."""

    def __init__(
        self, store: Store, exchange: Exchange, gate: Gate, settings: Settings, metrics: Metrics, clock: Clock
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._gate = gate
        self._settings = settings
        self._metrics = metrics
        self._clock = clock

    async def answer(
        self, operation: str, caller: Caller, authorization: bytes | None, body: bytes
    ) -> tuple[Answer, Caller]:
        """Never raises but Cancelled. Also gives back the caller, as it is known then."""
        try:
            if not tokens.is_environment_id(caller.environment):
                raise Denied(
                    400, "invalid_environment_id", "an id has letters, digits, '-' and '_', 256 at most"
                )
            token = await self._gate.admit(caller, authorization)
            caller = evolve(caller, token_id=token.token_id)
            if operation == "register":
                answer = await self._register(caller.environment, token, body)
            elif operation == "connect":
                answer = await self._connect(caller.environment, token, body)
            else:
                answer = await self._validate(caller.environment, body)
        except Denied as denied:
            answer = denied.answer
        except StoreUnavailable:
            answer = store_away(operation).answer
        self._metrics.requests[operation, answer.status] += 1
        return answer, caller

    async def _register(self, environment_id: str, token: TokenRecord, body: bytes) -> Answer:
        if body:
            members = _members(body)
            if members.get("security_profile") != NOISE_PROFILE:
                raise Denied(
                    400, "unsupported_security_profile", f"security_profile should be {NOISE_PROFILE}"
                )
            profile, executor_key = NOISE_PROFILE, _compact(_key(members, "executor_public_key"))
        elif self._settings.require_noise:
            raise Denied(403, "clear_text_refused", "this relay takes executors with Noise only")
        else:
            profile, executor_key = None, ""
        registration = RegistrationRecord(
            environment_id,
            f"reg_{secrets.token_hex(16)}",
            profile,
            executor_key,
            token.token_id,
            self._clock(),
        )
        if not await self._store.register(registration):
            raise Denied(409, "superseded", "a newer executor has this environment id")
        answer = {
            "environment_id": environment_id,
            "url": await self._url("executor", registration, token, "", self._settings.executor_url_ttl),
        }
        if profile is not None:
            answer["security_profile"] = profile
            answer["executor_registration_id"] = registration.registration_id
        return Answer(200, answer)

    async def _connect(self, environment_id: str, token: TokenRecord, body: bytes) -> Answer:
        members = _members(body)
        key = _key(members, "harness_public_key") if members else None
        registration = await self._store.registration(environment_id)
        if registration is None:
            raise Denied(409, "environment_offline", "no executor has registered this environment")
        presence = await self._exchange.presence(environment_id)
        # One with another registration is about to be replaced: a bundle for it would lead nowhere.
        if presence is None or presence.registration_id != registration.registration_id:
            raise Denied(409, "environment_offline", "the executor of this environment is not connected")
        check_profile(registration, noise=key is not None, settings=self._settings)
        ttl = self._settings.harness_url_ttl
        if key is None:
            url = await self._url("harness", registration, token, "", ttl)
            return Answer(
                200, {"environment_id": environment_id, "url": url, "security_profile": CLEAR_PROFILE}
            )
        authorization = secrets.token_urlsafe(32)
        await self._store.add_authorization(
            AuthorizationRecord(
                _digest(authorization),
                environment_id,
                registration.registration_id,
                _compact(key),
                self._clock() + self._settings.authorization_ttl,
            )
        )
        return Answer(
            200,
            {
                "environment_id": environment_id,
                "url": await self._url("harness", registration, token, key.fingerprint, ttl),
                "security_profile": NOISE_PROFILE,
                "executor_registration_id": registration.registration_id,
                "executor_public_key": orjson.loads(registration.executor_key),
                "harness_key_authorization": authorization,
            },
        )

    async def _validate(self, environment_id: str, body: bytes) -> Answer:
        members = _members(body)
        text = members.get("harness_key_authorization")
        if not isinstance(text, str) or not 0 < len(text) <= MAX_AUTHORIZATION:
            return Answer(200, {"valid": False})
        # Taken before anything is compared: who guesses the rest has one try.
        taken = await self._store.take_authorization(_digest(text), self._clock())
        try:
            key = _compact(_key(members, "harness_public_key"))
        except Denied:
            return Answer(200, {"valid": False})
        valid = (
            taken is not None
            and taken.environment_id == environment_id
            and taken.registration_id == members.get("executor_registration_id")
            and taken.harness_key == key
        )
        return Answer(200, {"valid": valid})

    async def _url(
        self, role: Role, registration: RegistrationRecord, token: TokenRecord, key: str, ttl: float
    ) -> str:
        ticket = Ticket(
            role,
            registration.environment_id,
            registration.registration_id,
            token.token_id,
            key,
            math.ceil(self._clock() + ttl),
            new_nonce(),
        )
        query = signed_query(ticket, await self._gate.newest_signing_key())
        return self._settings.rendezvous_url(registration.environment_id, query)


def store_away(operation: str = "") -> Denied:
    """What to answer while the store can't be asked."""
    if operation == "register":
        # What a released executor tries again (relay.md §1.4); after anything else it ends.
        return Denied(502, "authentication_service_unavailable", "the store of the relay is away")
    return Denied(503, "store_unavailable", "the store of the relay is away")


def check_profile(registration: RegistrationRecord, *, noise: bool, settings: Settings) -> None:
    """See that a harness and the executor agree on who may read what they say.

    Raises:
        Denied: if not.
    """
    if registration.security_profile is None and settings.require_noise:
        raise Denied(403, "clear_text_refused", "this relay passes on nothing without Noise")
    if noise != (registration.security_profile is not None):
        theirs = registration.security_profile or CLEAR_PROFILE
        ours = NOISE_PROFILE if noise else CLEAR_PROFILE
        raise Denied(
            409,
            "security_profile_mismatch",
            f"the executor of this environment is registered for {theirs}, and {ours} was asked for: "
            "both ends have to ask for the same",
        )


def _members(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise Denied(400, "invalid_request", "the body should be a JSON object")
    return value


def _key(members: Mapping[str, Any], name: str) -> PublicKey:
    try:
        return PublicKey.from_json(members.get(name))
    except InvalidKey as error:
        raise Denied(400, "invalid_key", f"{name}: {error}") from None


def _compact(key: PublicKey) -> str:
    return orjson.dumps(key.to_json()).decode()


def _digest(authorization: str) -> bytes:
    return hashlib.sha256(authorization.encode("utf-8", "surrogatepass")).digest()
