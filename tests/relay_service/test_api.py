"""The registry's answers, row by row (relay.md §1)."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio
from attrs import define

from execenv.relay.keys import SUITE, PublicKey
from execenv.relay.registry import NOISE_PROFILE
from execenv.relay_service import Settings
from execenv.relay_service.api import ROLES, Answer, Gate, Registry
from execenv.relay_service.audit import Caller
from execenv.relay_service.exchange_local import LocalExchange
from execenv.relay_service.metrics import Metrics
from execenv.relay_service.sqlite import open_sqlite
from execenv.relay_service.store import (
    AuthorizationRecord,
    RegistrationRecord,
    Store,
    StoreUnavailable,
    TokenRecord,
)
from tests.relay_service.relays import BOX, NOW, Clock, new_key, new_token, noise_body


class Away(Store):
    """A store that cannot be asked."""

    async def signing_key(self) -> bytes:
        raise StoreUnavailable

    async def add_token(self, token: TokenRecord) -> None:
        raise StoreUnavailable

    async def token(self, token_id: str) -> TokenRecord | None:
        raise StoreUnavailable

    async def tokens(self) -> Sequence[TokenRecord]:
        raise StoreUnavailable

    async def revoke_token(self, token_id: str) -> bool:
        raise StoreUnavailable

    async def register(self, registration: RegistrationRecord) -> bool:
        raise StoreUnavailable

    async def registration(self, environment_id: str) -> RegistrationRecord | None:
        raise StoreUnavailable

    async def add_authorization(self, authorization: AuthorizationRecord) -> None:
        raise StoreUnavailable

    async def take_authorization(self, digest: bytes, now: float) -> AuthorizationRecord | None:
        raise StoreUnavailable

    async def use_once(self, nonce: str, expires: float, now: float) -> bool:
        raise StoreUnavailable

    async def ping(self) -> None:
        raise StoreUnavailable


@define
class Asked:
    """A registry without a port, and who asks it."""

    store: Store
    exchange: LocalExchange
    metrics: Metrics
    clock: Clock
    nursery: trio.Nursery
    registry: Registry

    async def ask(
        self,
        operation: str,
        token: str | None,
        body: Any = None,
        environment_id: str = BOX,
        address: str = "1.2.3.4:5",
    ) -> Answer:
        data = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        authorization = None if token is None else f"Bearer {token}".encode()
        caller = Caller(address, environment=environment_id, role=ROLES[operation])
        answer, _ = await self.registry.answer(operation, caller, authorization, data)
        return answer

    async def connected(self, key: PublicKey | None, environment_id: str = BOX) -> str:
        """Register an executor and connect it; the registration's id."""
        token = await new_token(self.store, "executor", environment_id)
        body = None if key is None else noise_body(key)
        assert (await self.ask("register", token, body, environment_id)).status == 200
        registration = await self.store.registration(environment_id)
        assert registration is not None
        registration_id = registration.registration_id

        async def stay(task_status: trio.TaskStatus[None]) -> None:
            async with self.exchange.executor(environment_id, registration_id, None, lambda: None):  # type: ignore[arg-type]
                task_status.started()
                await trio.sleep_forever()

        await self.nursery.start(stay)
        return registration_id


def make(store: Store, nursery: trio.Nursery, **limits: Any) -> Asked:
    settings, metrics, clock = Settings("https://relay.example.com", **limits), Metrics(), Clock()
    exchange = LocalExchange()
    gate = Gate(store, settings, metrics, clock)
    registry = Registry(store, exchange, gate, settings, metrics, clock)
    return Asked(store, exchange, metrics, clock, nursery, registry)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Asked]:
    with trio.fail_after(20):
        async with open_sqlite(str(tmp_path / "relay.sqlite3")) as store, trio.open_nursery() as nursery:
            yield make(store, nursery)
            nursery.cancel_scope.cancel()


def refused(answer: Answer, status: int, code: str) -> bool:
    assert set(answer.body) == {"error"}
    assert set(answer.body["error"]) == {"code", "message"}
    return (answer.status, answer.code) == (status, code)


# Who asks.


@pytest.mark.parametrize("operation", ["register", "connect", "validate"])
async def test_who_shows_no_valid_token_is_asked_for_one(api: Asked, operation: str) -> None:
    role = ROLES[operation]
    good = await new_token(api.store, role)
    expired = await new_token(api.store, role, expires=NOW)
    revoked = await new_token(api.store, role)
    assert await api.store.revoke_token(revoked.split("_")[1])
    wrong_secret = good[:-1] + ("A" if good[-1] != "A" else "B")
    unknown = "what was shown is no token of this relay, or was revoked"
    for token, told in (
        (None, "a bearer token of this relay is needed"),
        ("", unknown),
        ("sk-123", unknown),
        (wrong_secret, unknown),
        (good + "x", unknown),
        (expired, "this token has expired"),
        (expired[:-1] + ("A" if expired[-1] != "A" else "B"), unknown),
        (revoked, unknown),
        (f"exr_{'0' * 16}_{'0' * 43}", unknown),
    ):
        answer = await api.ask(operation, token, {})
        assert refused(answer, 401, "not_authenticated")
        assert answer.body["error"]["message"] == f"{told}: execenv relay token create makes one"
        assert answer.headers == {"www-authenticate": "Bearer"}
    assert api.metrics.authentications_failed == 9
    assert (await api.ask(operation, good, {})).status != 401


@pytest.mark.parametrize("operation", ["register", "connect", "validate"])
async def test_token_for_something_else_is_forbidden(api: Asked, operation: str) -> None:
    other = await new_token(api.store, "executor" if ROLES[operation] == "harness" else "harness")
    assert refused(await api.ask(operation, other, {}), 403, "wrong_role")
    elsewhere = await new_token(api.store, ROLES[operation], "elsewhere")
    assert refused(await api.ask(operation, elsewhere, {}), 403, "wrong_environment")
    assert api.metrics.authentications_failed == 0


async def test_token_for_all_environments_is_good_for_each(api: Asked) -> None:
    token = await new_token(api.store, "executor", "*")
    for environment_id in ("one", "other"):
        answer = await api.ask("register", token, None, environment_id)
        assert answer.body["environment_id"] == environment_id


async def test_scheme_of_the_header_is_in_any_case_and_only_bearer(api: Asked) -> None:
    token = await new_token(api.store, "executor")
    caller = Caller("1.2.3.4:5", environment=BOX, role="executor")
    for header, status in (
        (f"bEARER  {token} ", 200),
        (f"Basic {token}", 401),
        (token, 401),
        ("Bearer", 401),
    ):
        answer, _ = await api.registry.answer("register", caller, header.encode(), b"")
        assert answer.status == status


async def test_environment_id_is_checked_before_anything_else(api: Asked) -> None:
    for environment_id in ("", "..", "a%2fb", "x" * 257):
        answer = await api.ask("register", None, None, environment_id)
        assert refused(answer, 400, "invalid_environment_id")


async def test_token_is_used_as_often_as_it_may_be(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "relay.sqlite3")) as store, trio.open_nursery() as nursery:
        api = make(store, nursery, token_rate=0.5, token_burst=3)
        token, other = await new_token(store, "executor"), await new_token(store, "executor")
        for _ in range(3):
            assert (await api.ask("register", token)).status == 200
        answer = await api.ask("register", token)
        assert refused(answer, 429, "rate_limited")
        assert answer.headers == {"retry-after": "2"}
        assert (await api.ask("register", other)).status == 200
        assert refused(await api.ask("register", token, None, "elsewhere"), 403, "wrong_environment")
        api.clock.now += 2
        assert (await api.ask("register", token)).status == 200
        assert (await api.ask("register", token)).status == 429


async def test_token_for_all_environments_is_counted_for_each(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "relay.sqlite3")) as store, trio.open_nursery() as nursery:
        api = make(store, nursery, token_rate=0.5, token_burst=1)
        token = await new_token(store, "executor", "*")
        assert [(await api.ask("register", token, None, name)).status for name in ("a", "a", "b")] == [
            200,
            429,
            200,
        ]


async def test_address_fails_as_often_as_it_may_and_a_valid_token_passes_still(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "relay.sqlite3")) as store, trio.open_nursery() as nursery:
        api = make(store, nursery, failure_rate=1, failure_burst=3)
        token = await new_token(store, "executor")
        for port in range(3):
            assert (await api.ask("register", "wrong", address=f"1.2.3.4:{port}")).status == 401
        answer = await api.ask("register", "wrong", address="1.2.3.4:9")
        assert refused(answer, 429, "too_many_failures")
        assert answer.headers == {"retry-after": "1"}
        assert (await api.ask("register", "wrong", address="[::1]:9")).status == 401
        assert (await api.ask("register", token, address="1.2.3.4:9")).status == 200


# Register.


async def test_registration_without_a_body_is_for_clear_text(api: Asked) -> None:
    answer = await api.ask("register", await new_token(api.store, "executor"))
    assert answer.status == 200
    assert set(answer.body) == {"environment_id", "url"}
    assert answer.body["url"].startswith("wss://relay.example.com/rendezvous/box?role=executor&")


async def test_registration_with_a_key_is_for_noise(api: Asked) -> None:
    token = await new_token(api.store, "executor")
    answer = await api.ask("register", token, noise_body(new_key()))
    assert answer.status == 200
    assert set(answer.body) == {"environment_id", "url", "security_profile", "executor_registration_id"}
    assert answer.body["security_profile"] == NOISE_PROFILE
    again = await api.ask("register", token, noise_body(new_key()))
    assert again.body["executor_registration_id"] != answer.body["executor_registration_id"]


KEY = new_key().to_json()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_request"),
        (b"[]", "invalid_request"),
        (b"null", "invalid_request"),
        (b"\xff", "invalid_request"),
        (b"[" * 30000, "invalid_request"),
        ({}, "unsupported_security_profile"),
        ({"security_profile": "none", "executor_public_key": KEY}, "unsupported_security_profile"),
        ({"transport": "direct_jsonrpc_v1"}, "unsupported_security_profile"),
        ({"security_profile": NOISE_PROFILE}, "invalid_key"),
        ({"security_profile": NOISE_PROFILE, "executor_public_key": KEY | {"more": 1}}, "invalid_key"),
        (
            {"security_profile": NOISE_PROFILE, "executor_public_key": KEY | {"suite": SUITE[1:]}},
            "invalid_key",
        ),
        (
            {"security_profile": NOISE_PROFILE, "executor_public_key": KEY | {"x25519_public_key": 1}},
            "invalid_key",
        ),
        (
            {
                "security_profile": NOISE_PROFILE,
                "executor_public_key": KEY | {"x25519_public_key": base64.b64encode(bytes(31)).decode()},
            },
            "invalid_key",
        ),
    ],
)
async def test_registration_that_cannot_be_is_refused_and_changes_nothing(
    api: Asked, body: Any, code: str
) -> None:
    answer = await api.ask("register", await new_token(api.store, "executor"), body)
    assert refused(answer, 400, code)
    assert await api.store.registration(BOX) is None


async def test_clear_text_is_refused_where_noise_is_required(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "relay.sqlite3")) as store, trio.open_nursery() as nursery:
        api = make(store, nursery, require_noise=True)
        token = await new_token(store, "executor")
        assert refused(await api.ask("register", token), 403, "clear_text_refused")
        assert (await api.ask("register", token, noise_body(new_key()))).status == 200


async def test_key_that_was_superseded_does_not_come_back(api: Asked) -> None:
    token, old, new = await new_token(api.store, "executor"), noise_body(new_key()), noise_body(new_key())
    for body in (old, old, new, new):
        assert (await api.ask("register", token, body)).status == 200
    assert refused(await api.ask("register", token, old), 409, "superseded")


# Connect.


async def test_harness_gets_a_bundle_for_an_executor_with_noise(api: Asked) -> None:
    key = new_key()
    registration_id = await api.connected(key)
    token = await new_token(api.store, "harness")
    answer = await api.ask("connect", token, {"harness_public_key": new_key().to_json()})
    assert answer.status == 200
    assert set(answer.body) == {
        "environment_id",
        "url",
        "security_profile",
        "executor_registration_id",
        "executor_public_key",
        "harness_key_authorization",
    }
    assert answer.body["executor_public_key"] == key.to_json()
    assert answer.body["executor_registration_id"] == registration_id
    assert answer.body["url"].startswith("wss://relay.example.com/rendezvous/box?role=harness&")


async def test_harness_gets_a_url_for_an_executor_of_clear_text(api: Asked) -> None:
    await api.connected(None)
    answer = await api.ask("connect", await new_token(api.store, "harness"), {})
    assert answer.status == 200
    assert set(answer.body) == {"environment_id", "url", "security_profile"}
    assert answer.body["security_profile"] == "clear_relay_v1"


async def test_harness_and_executor_must_want_the_same_profile(api: Asked) -> None:
    await api.connected(None, "clear")
    await api.connected(new_key(), "noise")
    token = await new_token(api.store, "harness", "*")
    body = {"harness_public_key": new_key().to_json()}
    clear, noise = "clear_relay_v1", "noise_hybrid_ik_v1"
    for asked, environment_id, theirs, ours in ((body, "clear", clear, noise), ({}, "noise", noise, clear)):
        answer = await api.ask("connect", token, asked, environment_id)
        assert refused(answer, 409, "security_profile_mismatch")
        assert answer.body["error"]["message"] == (
            f"the executor of this environment is registered for {theirs}, and {ours} was asked for: "
            "both ends have to ask for the same"
        )


async def test_environment_without_an_executor_is_offline(api: Asked) -> None:
    token = await new_token(api.store, "harness")
    assert refused(await api.ask("connect", token, {}), 409, "environment_offline")
    await api.ask("register", await new_token(api.store, "executor"))
    assert refused(await api.ask("connect", token, {}), 409, "environment_offline")
    await api.connected(None)
    assert (await api.ask("connect", token, {})).status == 200
    await api.ask("register", await new_token(api.store, "executor"))  # and not connected yet
    assert refused(await api.ask("connect", token, {}), 409, "environment_offline")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_request"),
        (b"[]", "invalid_request"),
        ({"other": 1}, "invalid_key"),
        ({"harness_public_key": None}, "invalid_key"),
        ({"harness_public_key": KEY | {"mlkem768_public_key": "AAAA"}}, "invalid_key"),
    ],
)
async def test_connect_with_another_body_is_refused(api: Asked, body: Any, code: str) -> None:
    await api.connected(None)
    assert refused(await api.ask("connect", await new_token(api.store, "harness"), body), 400, code)


# Validate.


@define
class Bundle:
    """A harness that was let in, and the executor's token."""

    token: str
    body: dict[str, Any]


async def bundle(api: Asked) -> Bundle:
    await api.connected(new_key())
    key = new_key().to_json()
    given = (
        await api.ask("connect", await new_token(api.store, "harness"), {"harness_public_key": key})
    ).body
    body = {
        "executor_registration_id": given["executor_registration_id"],
        "harness_public_key": key,
        "harness_key_authorization": given["harness_key_authorization"],
    }
    return Bundle(await new_token(api.store, "executor", "*"), body)


async def test_authorization_is_valid_once(api: Asked) -> None:
    harness = await bundle(api)
    answers = [await api.ask("validate", harness.token, harness.body) for _ in range(2)]
    assert [(answer.status, answer.body) for answer in answers] == [
        (200, {"valid": True}),
        (200, {"valid": False}),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"executor_registration_id": "reg_other"},
        {"executor_registration_id": None},
        {"harness_public_key": new_key().to_json()},
        {"harness_public_key": KEY | {"more": 1}},
        {"harness_public_key": None},
    ],
)
async def test_authorization_is_used_up_by_a_try_that_does_not_match(
    api: Asked, change: dict[str, Any]
) -> None:
    harness = await bundle(api)
    for body in (harness.body | change, harness.body):
        answer = await api.ask("validate", harness.token, body)
        assert (answer.status, answer.body) == (200, {"valid": False})


async def test_authorization_is_for_its_environment(api: Asked) -> None:
    harness = await bundle(api)
    for environment_id in ("other", BOX):
        answer = await api.ask("validate", harness.token, harness.body, environment_id)
        assert (answer.status, answer.body) == (200, {"valid": False})


@pytest.mark.parametrize(("seconds", "valid"), [(59.9, True), (60, False)])
async def test_authorization_holds_for_a_minute(api: Asked, seconds: float, valid: bool) -> None:
    harness = await bundle(api)
    api.clock.now += seconds
    assert (await api.ask("validate", harness.token, harness.body)).body == {"valid": valid}


@pytest.mark.parametrize("text", ["", "unknown", "x" * 4097, None, 5, ["a"]])
async def test_what_is_no_authorization_is_not_valid_and_uses_up_nothing(api: Asked, text: Any) -> None:
    harness = await bundle(api)
    answer = await api.ask("validate", harness.token, harness.body | {"harness_key_authorization": text})
    assert (answer.status, answer.body) == (200, {"valid": False})
    assert (await api.ask("validate", harness.token, harness.body)).body == {"valid": True}


async def test_validate_without_an_object_is_refused(api: Asked) -> None:
    assert refused(await api.ask("validate", await new_token(api.store, "executor")), 400, "invalid_request")


# A store that is away.


@pytest.mark.parametrize(
    ("operation", "status", "code"),
    [
        ("register", 502, "authentication_service_unavailable"),
        ("connect", 503, "store_unavailable"),
        ("validate", 503, "store_unavailable"),
    ],
)
async def test_store_that_is_away_is_said_so_that_it_is_tried_again(
    operation: str, status: int, code: str, nursery: trio.Nursery
) -> None:
    api = make(Away(), nursery)
    token = f"exr_{'0' * 16}_{'0' * 43}"
    assert refused(await api.ask(operation, token, {}), status, code)
    assert api.metrics.authentications_failed == 0
    assert api.metrics.requests[operation, status] == 1
