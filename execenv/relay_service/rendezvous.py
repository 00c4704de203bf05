"""Who may open a websocket, and as whom: decisions over a store, as those of the registry."""

from __future__ import annotations

from attrs import frozen

from execenv.relay_service import tokens
from execenv.relay_service.api import Clock, Denied, Gate, check_profile
from execenv.relay_service.audit import Caller
from execenv.relay_service.limits import TooMany
from execenv.relay_service.settings import Settings
from execenv.relay_service.store import RegistrationRecord, Role, Store
from execenv.relay_service.tickets import BadTicket, Ticket, read_ticket

LEGACY_QUERY = "role=harness"
"""How a harness asks that has no signed URL, but a token (relay.md §4.2)."""


@frozen
class Admission:
    """A websocket that may be opened.

    Attributes:
        nonce, expires: of a URL that is good for one; the nonce is empty for all others.
        principal: who a harness is: its token and its key. Streams belong to that.
        max_frame: in bytes.
    """

    role: Role
    environment_id: str
    registration_id: str
    token_id: str
    principal: bytes
    max_frame: int
    nonce: str
    expires: float


class Rendezvous:
    """Decides on websockets. See `Gate` for what is counted."""

    def __init__(self, store: Store, gate: Gate, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._gate = gate
        self._settings = settings
        self._clock = clock

    async def ticket(self, caller: Caller, query: str) -> Ticket | None:
        """The ticket that a URL is, expired or not; `None` if it asks for a harness's websocket without one.

        Raises:
            Denied: if it is neither.
            StoreUnavailable: if it cannot be known now.
        """
        if not tokens.is_environment_id(caller.environment):
            raise Denied(400, "invalid_environment_id", "an id has letters, digits, '-' and '_', 256 at most")
        try:
            if query == LEGACY_QUERY:
                return None
            key = await self._gate.signing_key()
            try:
                return read_ticket(caller.environment, query, key)
            except BadTicket:
                key = await self._gate.signing_key(known=key)
                return read_ticket(caller.environment, query, key)
        except BadTicket as error:
            raise self._gate.failed(caller, Denied(403, "invalid_signature", str(error))) from None

    async def admit(self, caller: Caller, ticket: Ticket | None, authorization: bytes | None) -> Admission:
        """What a ticket allows, or a harness's token for an environment of clear text.

        Raises:
            Denied: if nothing. 401 tells a harness to look the environment up again, 403 tells an executor to
                register again.
            StoreUnavailable: if it cannot be known now.
        """
        if ticket is not None:
            return await self._by_ticket(ticket)
        token = await self._gate.admit(caller, authorization)
        registration = await self._store.registration(caller.environment)
        if registration is None:
            raise Denied(409, "environment_offline", "no executor has registered this environment")
        check_profile(registration, noise=False, settings=self._settings)
        return self._admission("harness", registration, token.token_id, "", "", 0.0)

    async def _by_ticket(self, ticket: Ticket) -> Admission:
        now = self._clock()
        again = 403 if ticket.role == "executor" else 401
        if now >= ticket.expires:
            raise Denied(again, "url_expired", "this URL has expired")
        self._gate.count(ticket.token_id, ticket.environment_id)
        token = await self._store.token(ticket.token_id)
        if token is None or not tokens.is_current(token, now):
            raise Denied(403, "token_revoked", "the token of this URL is no longer valid")
        registration = await self._store.registration(ticket.environment_id)
        if registration is None or registration.registration_id != ticket.registration_id:
            raise Denied(again, "superseded", "a newer registration has this environment id")
        noise = registration.security_profile is not None
        check_profile(registration, noise=noise, settings=self._settings)
        nonce = ticket.nonce if ticket.role == "harness" else ""  # an executor's is good until it expires
        return self._admission(
            ticket.role, registration, ticket.token_id, ticket.key_fingerprint, nonce, ticket.expires
        )

    def _admission(
        self,
        role: Role,
        registration: RegistrationRecord,
        token_id: str,
        fingerprint: str,
        nonce: str,
        expires: float,
    ) -> Admission:
        settings = self._settings
        return Admission(
            role,
            registration.environment_id,
            registration.registration_id,
            token_id,
            f"{token_id} {fingerprint}".encode(),
            settings.max_clear_frame if registration.security_profile is None else settings.max_noise_frame,
            nonce,
            expires,
        )

    async def use_up(self, admission: Admission) -> None:
        """See that a URL that is good for one websocket is used for the first.

        Raises:
            Denied: if it is not.
            StoreUnavailable: if it cannot be known now.
        """
        if admission.nonce and not await self._store.use_once(
            admission.nonce, admission.expires, self._clock()
        ):
            raise Denied(401, "url_used", "this URL was used already")


def too_many(error: TooMany) -> Denied:
    """What to answer when there is no room for one more socket."""
    if error.code == "too_many_sockets":
        return Denied(503, error.code, "this relay has as many websockets as it may")
    return Denied(429, error.code, "there are as many harnesses as there may be", {"retry-after": "1"})
