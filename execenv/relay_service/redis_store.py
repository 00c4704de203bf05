"""The store of many nodes, in Redis.

Each method is one command or one script, so each is done as a whole or not at all. What expires has a time to
live there; tokens, registrations and the signing key stay.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from attrs import asdict

from execenv.relay_service.store import (
    EXPIRED_TOKENS_KEPT,
    SUPERSEDED_FOR,
    AuthorizationRecord,
    RegistrationRecord,
    Store,
    TokenRecord,
)

if TYPE_CHECKING:
    from execenv.relay_service.redis_wire import Wire

R = TypeVar("R", TokenRecord, RegistrationRecord, AuthorizationRecord)

_MARGIN = 300.0
"""Seconds that a key outlives what it is for: the clocks of a node and of Redis may differ."""

_REGISTER = """
local since = redis.call('GET', KEYS[2])
if ARGV[1] ~= '' and since and tonumber(since) + tonumber(ARGV[3]) > tonumber(ARGV[4]) then
    return 0
end
local older = redis.call('HGET', KEYS[1], 'key')
if older and older ~= '' and older ~= ARGV[1] then
    redis.call('SET', KEYS[3] .. older, ARGV[4], 'PX', ARGV[5])
end
redis.call('HSET', KEYS[1], 'key', ARGV[1], 'record', ARGV[2])
return 1
"""


class RedisStore(Store):
    """What nodes remember together.

    Args:
        wire: where commands go.
        prefix: what every key begins with.
    """

    def __init__(self, wire: Wire, prefix: str) -> None:
        self._wire = wire
        self._prefix = prefix

    def _key(self, kind: str, name: str = "") -> str:
        return f"{self._prefix}{kind}:{name}" if name else f"{self._prefix}{kind}"

    async def signing_key(self) -> bytes:
        key = self._key("signing-key")
        await self._wire.call(b"SET", key, secrets.token_bytes(32), b"NX")
        return bytes(await self._wire.call(b"GET", key))

    async def add_token(self, token: TokenRecord) -> None:
        if token.expires is None:
            await self._wire.call(b"SET", self._key("token", token.token_id), _pack(token))
        else:
            until = int((token.expires + EXPIRED_TOKENS_KEPT) * 1000)
            await self._wire.call(b"SET", self._key("token", token.token_id), _pack(token), b"PXAT", until)

    async def token(self, token_id: str) -> TokenRecord | None:
        return _unpack(TokenRecord, await self._wire.call(b"GET", self._key("token", token_id)))

    async def tokens(self) -> Sequence[TokenRecord]:
        found: dict[str, TokenRecord] = {}
        cursor = b"0"
        while True:
            pattern = self._key("token", "*")
            cursor, keys = await self._wire.call(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", 1000)
            values = await self._wire.call(b"MGET", *keys) if keys else ()
            for value in values:
                token = _unpack(TokenRecord, value)
                if token is not None:  # else it was revoked between the two
                    found[token.token_id] = token
            if int(cursor) == 0:
                return sorted(found.values(), key=lambda token: (token.created, token.token_id))

    async def revoke_token(self, token_id: str) -> bool:
        return bool(await self._wire.call(b"DEL", self._key("token", token_id)))

    async def register(self, registration: RegistrationRecord) -> bool:
        environment_id, key = registration.environment_id, registration.executor_key
        digest = hashlib.sha256(key.encode()).hexdigest() if key else ""
        superseded = self._key("superseded", f"{environment_id}:")
        done = await self._wire.call(
            b"EVAL",
            _REGISTER,
            3,
            self._key("registration", environment_id),
            superseded + digest,
            superseded,
            digest,
            _pack(registration),
            repr(SUPERSEDED_FOR),
            repr(registration.created),
            int((SUPERSEDED_FOR + _MARGIN) * 1000),
        )
        return bool(done)

    async def registration(self, environment_id: str) -> RegistrationRecord | None:
        value = await self._wire.call(b"HGET", self._key("registration", environment_id), b"record")
        return _unpack(RegistrationRecord, value)

    async def add_authorization(self, authorization: AuthorizationRecord) -> None:
        until = int((authorization.expires + _MARGIN) * 1000)
        key = self._key("authorization", authorization.digest.hex())
        await self._wire.call(b"SET", key, _pack(authorization), b"PXAT", until)

    async def take_authorization(self, digest: bytes, now: float) -> AuthorizationRecord | None:
        value = await self._wire.call(b"GETDEL", self._key("authorization", digest.hex()))
        found = _unpack(AuthorizationRecord, value)
        return found if found is not None and found.expires > now else None

    async def use_once(self, nonce: str, expires: float, now: float) -> bool:
        if expires <= now:
            return False
        life = int((expires - now + _MARGIN) * 1000)
        done = await self._wire.call(b"SET", self._key("nonce", nonce), b"", b"NX", b"PX", life)
        return done is not None

    async def ping(self) -> None:
        await self._wire.call(b"PING")


def _pack(record: TokenRecord | RegistrationRecord | AuthorizationRecord) -> bytes:
    return orjson.dumps(asdict(record), default=bytes.hex)


def _unpack(kind: type[R], value: Any) -> R | None:
    if value is None:
        return None
    fields = orjson.loads(value)
    if "digest" in fields:
        fields["digest"] = bytes.fromhex(fields["digest"])
    return kind(**fields)
