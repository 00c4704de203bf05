"""What a relay remembers: tokens, registrations, authorisations. One interface, in a file or in Redis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from attrs import frozen

Role = Literal["executor", "harness"]

ANY_ENVIRONMENT = "*"


class StoreUnavailable(Exception):
    """The store cannot be asked now. It may be possible in a moment; nothing was changed, or it is unknown
    whether it was."""


@frozen
class TokenRecord:
    """A token, without its secret.

    Attributes:
        token_id: what it is called in lists, logs and for `revoke`. No secret.
        digest: SHA-256 of the whole token.
        environment_id: the one that it is for, or `ANY_ENVIRONMENT`.
        name: for people.
        created, expires: seconds since the epoch; `expires` may be `None` for never.
    """

    token_id: str
    digest: bytes
    environment_id: str
    role: Role
    name: str
    created: float
    expires: float | None


@frozen
class RegistrationRecord:
    """What an executor has registered.

    Attributes:
        security_profile: `None` if it takes clear text (relay.md §1.2, legacy).
        executor_key: its public key object as compact JSON; empty for clear text.
        token_id: the token that it showed.
    """

    environment_id: str
    registration_id: str
    security_profile: str | None
    executor_key: str
    token_id: str
    created: float


@frozen
class AuthorizationRecord:
    """What a harness was given to show to the executor, once.

    Attributes:
        digest: SHA-256 of the authorisation text.
        harness_key: the public key object of the harness as compact JSON.
        expires: seconds since the epoch.
    """

    digest: bytes
    environment_id: str
    registration_id: str
    harness_key: str
    expires: float


class Store(ABC):
    """Every method may raise StoreUnavailable. Times are seconds since the epoch, given by the caller."""

    @abstractmethod
    async def signing_key(self) -> bytes:
        """The secret that URLs are signed with, the same for all nodes; made at the first call."""

    @abstractmethod
    async def add_token(self, token: TokenRecord) -> None:
        """Remember a token; one of the same id is replaced."""

    @abstractmethod
    async def token(self, token_id: str) -> TokenRecord | None:
        """One that was neither revoked nor has expired long ago: `expires` is for the caller to look at."""

    @abstractmethod
    async def tokens(self) -> Sequence[TokenRecord]:
        """All, oldest first."""

    @abstractmethod
    async def revoke_token(self, token_id: str) -> bool:
        """Forget a token; whether there was one."""

    @abstractmethod
    async def register(self, registration: RegistrationRecord) -> bool:
        """Make it the registration of its environment, and what it replaces superseded. False, and nothing is
        changed, if its `executor_key` is one that was superseded since `SUPERSEDED_FOR` seconds: newest wins,
        and an executor that lost does not come back."""

    @abstractmethod
    async def registration(self, environment_id: str) -> RegistrationRecord | None: ...

    @abstractmethod
    async def add_authorization(self, authorization: AuthorizationRecord) -> None: ...

    @abstractmethod
    async def take_authorization(self, digest: bytes, now: float) -> AuthorizationRecord | None:
        """The authorisation, which is used up by that, whoever asks; `None` without one, or if it expired."""

    @abstractmethod
    async def use_once(self, nonce: str, expires: float, now: float) -> bool:
        """Whether this is the first use of a nonce (of a signed URL). Remembered until it expires; False
        from then on."""

    @abstractmethod
    async def ping(self) -> None:
        """See that the store answers (for /readyz)."""


SUPERSEDED_FOR = 24 * 3600.0
"""Seconds that an executor's key is refused after another one took its place."""

EXPIRED_TOKENS_KEPT = 30 * 24 * 3600.0
"""Seconds that an expired token is still listed, so that its owner sees why it is refused."""
