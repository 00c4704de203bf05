"""The registry, asked by an executor and a harness: what is sent, what is taken, what is said of the rest."""

from __future__ import annotations

import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trustme
from attrs import evolve
from trio.testing import MockClock

from execenv.errors import ConnectFailed, UsageError
from execenv.relay import registry as registry_module
from execenv.relay.addresses import InvalidUrl, check_socket_url, parse_base_url
from execenv.relay.registry import (
    MAX_ANSWER,
    MAX_ERROR,
    Bundle,
    Registration,
    Registry,
    RegistryFailed,
    check_environment_id,
    open_registry,
    registry_pause,
)
from tests.fake_relay import (
    API_KEY,
    AUTHORIZATION,
    GARBAGE,
    HARNESS_KEY,
    ID,
    KEY,
    NOTHING,
    REGISTRATION_ID,
    SIGNATURE,
    SOCKET_URL,
    Answer,
    FakeRegistry,
    bearer,
    clear,
    connected,
    error_answer,
    open_fake_registry,
    registered,
)

Client = tuple[FakeRegistry, Registry]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """A registry in memory, and its client."""
    fake = FakeRegistry()
    async with fake.open_client() as registry:
        yield fake, registry


@asynccontextmanager
async def on_loopback() -> AsyncIterator[Client]:
    with trio.fail_after(20):
        async with (
            open_fake_registry() as fake,
            open_registry(fake.url, headers=bearer()) as registry,
        ):
            yield fake, registry


async def failure(call: Callable[[], Any]) -> RegistryFailed:
    """What the call raises; holds no secret."""
    with pytest.raises(RegistryFailed) as caught:
        await call()
    for secret in (API_KEY, AUTHORIZATION, SIGNATURE):
        assert secret not in str(caught.value)
    return caught.value


async def register_failure(client: Client, answer: Answer) -> RegistryFailed:
    fake, registry = client
    fake.answer("register", answer)
    return await failure(lambda: registry.register(ID, KEY))


async def connect_failure(client: Client, answer: Answer) -> RegistryFailed:
    fake, registry = client
    fake.answer("connect", answer)
    return await failure(lambda: registry.connect(ID, HARNESS_KEY))


# What is sent.


async def test_register_sends_suite_and_key_in_compact_json(client: Client) -> None:
    fake, registry = client
    fake.answer("register", registered())
    assert await registry.register(ID, KEY) == Registration(ID, SOCKET_URL, REGISTRATION_ID)
    (asked,) = fake.asked
    assert asked.line == f"POST /base/cloud/environment/{ID}/register HTTP/1.1"
    expected = {"security_profile": "noise_hybrid_ik_v1", "executor_public_key": KEY.to_json()}
    assert asked.body == json.dumps(expected, separators=(",", ":")).encode()
    assert asked.head.headers == {
        "host": b"registry.example",
        "accept": b"*/*",
        "authorization": f"Bearer {API_KEY}".encode(),
        "content-type": b"application/json",
        "content-length": str(len(asked.body)).encode(),
    }


async def test_register_in_clear_text_has_no_body(client: Client) -> None:
    fake, registry = client
    fake.answer("register", clear())
    assert await registry.register(ID, None) == Registration(ID, SOCKET_URL, None)
    (asked,) = fake.asked
    assert (asked.body, asked.header("content-length"), asked.header("content-type")) == (b"", "0", None)


async def test_connect_sends_the_key_of_the_harness(client: Client) -> None:
    fake, registry = client
    fake.answer("connect", connected())
    bundle = await registry.connect(ID, HARNESS_KEY)
    assert bundle == Bundle(ID, SOCKET_URL, REGISTRATION_ID, KEY, AUTHORIZATION)
    (asked,) = fake.asked
    assert asked.line == f"POST /base/cloud/environment/{ID}/connect HTTP/1.1"
    expected = {"harness_public_key": HARNESS_KEY.to_json()}
    assert asked.body == json.dumps(expected, separators=(",", ":")).encode()


async def test_connect_in_clear_text_sends_an_empty_object(client: Client) -> None:
    fake, registry = client
    fake.answer("connect", clear(security_profile="clear_relay_v1"))
    assert await registry.connect(ID, None) == Bundle(ID, SOCKET_URL, None, None, None)
    assert fake.asked[0].body == b"{}"


async def test_validate_sends_what_the_harness_showed_and_names_its_stream(client: Client) -> None:
    fake, registry = client
    fake.answer("validate", Answer({"valid": True}))
    assert await registry.validate("stream-1", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION) is True
    (asked,) = fake.asked
    assert asked.line == f"POST /base/cloud/environment/{ID}/validate HTTP/1.1"
    assert asked.header("x-codex-noise-stream-id") == "stream-1"
    expected = {
        "executor_registration_id": REGISTRATION_ID,
        "harness_public_key": HARNESS_KEY.to_json(),
        "harness_key_authorization": AUTHORIZATION,
    }
    assert asked.body == json.dumps(expected, separators=(",", ":")).encode()


async def test_headers_are_asked_for_at_every_request(autojump_clock: MockClock) -> None:
    keys = ["first-key", "second-key"]
    fake = FakeRegistry({"register": [clear()]})
    async with fake.open_client(
        lambda: {"authorization": f"Bearer {keys.pop(0)}", "chatgpt-account-id": "acct1"}
    ) as registry:
        await registry.register(ID, None)
        await registry.register(ID, None)
    assert [asked.header("authorization") for asked in fake.asked] == [
        "Bearer first-key",
        "Bearer second-key",
    ]
    assert fake.asked[0].header("chatgpt-account-id") == "acct1"


async def test_headers_that_cannot_be_had_are_no_request(autojump_clock: MockClock) -> None:
    def no_key() -> dict[str, str]:
        raise ConnectFailed("cannot read the token file key")

    fake = FakeRegistry()
    async with fake.open_client(no_key) as registry:
        error = await failure(lambda: registry.register(ID, KEY))
        assert (str(error), error.retryable) == ("cannot read the token file key", True)
        assert not await registry.validate("s", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert fake.asked == []


@pytest.mark.parametrize("value", ["two\r\nx: lines", "caf\xe9", "nul\0"])
async def test_header_that_cannot_be_sent_is_an_error_that_does_not_show_it(
    value: str, autojump_clock: MockClock
) -> None:
    fake = FakeRegistry()
    async with fake.open_client(lambda: {"authorization": value}) as registry:
        error = await failure(lambda: registry.register(ID, KEY))
    assert value not in str(error)
    assert (error.retryable, fake.asked) == (False, [])


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", f"/cloud/environment/{ID}/register"),
        ("/", f"/cloud/environment/{ID}/register"),
        ("/a/b///", f"/a/b/cloud/environment/{ID}/register"),
    ],
)
async def test_path_is_appended_to_a_base_url_without_its_last_slashes(base: str, path: str) -> None:
    with trio.fail_after(20):
        async with open_fake_registry() as fake:
            fake.answer("register", clear())
            async with open_registry(f"  {fake.url}{base} ", headers=bearer()) as registry:
                await registry.register(ID, None)
            (asked,) = fake.asked
            assert asked.head.path == path
            assert f"http://{asked.header('host')}" == fake.url


# Environment ids and base URLs.


@pytest.mark.parametrize("environment_id", ["a", "env_abc-1", "A" * 256, "-", "0"])
def test_environment_id_has_letters_digits_dashes_and_underscores(environment_id: str) -> None:
    check_environment_id(environment_id)


@pytest.mark.parametrize(
    "environment_id",
    [
        "",
        " ",
        "a b",
        " a",
        "a ",
        "a\n",
        "a/b",
        "..",
        ".",
        "a%2fb",
        "\u00e9",
        "\u0661",
        "a?b",
        "A" * 257,
        "a\0",
    ],
)
async def test_other_environment_ids_are_refused_before_anything_is_sent(
    environment_id: str, client: Client
) -> None:
    fake, registry = client
    with pytest.raises(UsageError, match="environment id"):
        check_environment_id(environment_id)
    with pytest.raises(UsageError, match="environment id"):
        await registry.register(environment_id, KEY)
    with pytest.raises(UsageError, match="environment id"):
        await registry.connect(environment_id, None)
    assert not await registry.validate("s", environment_id, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert fake.asked == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://registry.example", "https://registry.example"),
        (" https://registry.example/// ", "https://registry.example"),
        ("HTTPS://Registry.Example:443/v1/", "https://registry.example/v1"),
        ("https://registry.example:8443", "https://registry.example:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.9.9.9", "http://127.9.9.9"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://[0:0::1]:81/x", "http://[::1]:81/x"),
        ("https://xn--caf-dma.example", "https://xn--caf-dma.example"),
    ],
)
def test_base_url_is_read(url: str, shown: str) -> None:
    assert str(parse_base_url(url)) == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "  ",
        "///",
        "registry.example",
        "ws://127.0.0.1",
        "ftp://registry.example",
        "https:///path",
        "https://user:secret-password@registry.example",
        "https://registry.example:443@evil.example",
        "https://registry.example?x=secret-password",
        "https://registry.example/#secret-password",
        "https://registry.example\\@evil.example",
        "https://registry.example/\\evil",
        "https://registry.example/a b",
        "https://registry.example\n.evil.example",
        "https://registry.example.",
        "https://.registry.example",
        "https://registry..example",
        "https://-registry.example",
        "https://caf\u00e9.example",
        "https://openai\u3002com",
        "https://registry.example:",
        "https://registry.example:0",
        "https://registry.example:0443",
        "https://registry.example:65536",
        "https://registry.example:443443",
        "https://registry.example:\u0664\u0664\u0663",
        "https://registry.example:+443",
        "https://" + "a" * 64 + ".example",
        "https://127.1",
        "https://0x7f.0.0.1",
        "https://2130706433",
        "https://127.0.0.01",
        "https://1.2.3.4.5",
        "https://[::1",
        "https://[fe80::1%25lo]",
        "https://[1.2.3.4]",
        "http://registry.example",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://[::ffff:127.0.0.1]",
        "http://0.0.0.0",
    ],
)
def test_other_base_urls_are_refused_without_their_secrets(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_base_url(url)
    assert "secret" not in str(caught.value)


# Answers.


@pytest.mark.parametrize("operation", ["register", "connect"])
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"environment_id": "another"}, "not about the environment env_abc-1"),
        ({"environment_id": None}, "not about the environment env_abc-1"),
        ({"environment_id": [ID]}, "not about the environment env_abc-1"),
        ({"security_profile": "other_v1"}, "its security profile is other_v1 and not noise_hybrid_ik_v1"),
        ({"security_profile": "clear_relay_v1"}, "clear_relay_v1 and not noise_hybrid_ik_v1"),
        ({"security_profile": None}, "its security profile is none and not noise_hybrid_ik_v1"),
        ({"executor_registration_id": ""}, "executor_registration_id is missing or blank"),
        ({"executor_registration_id": " \t"}, "executor_registration_id is missing or blank"),
        ({"executor_registration_id": None}, "executor_registration_id is missing or blank"),
        ({"executor_registration_id": 7}, "executor_registration_id is missing or blank"),
        ({"url": None}, "url is missing or blank"),
        ({"url": " "}, "url is missing or blank"),
        ({"url": f"https://relay.example/?{SIGNATURE}"}, "URL in its answer should be wss:// or ws://"),
        ({"url": f"ws://relay.example/?{SIGNATURE}"}, "URL in its answer is ws:// of another machine"),
        ({"url": f"wss://user:{SIGNATURE}@relay.example/"}, "URL in its answer should be"),
        ({"url": f"wss://relay.example/#{SIGNATURE}"}, "URL in its answer should be"),
        ({"url": f"wss://relay.example/\r\nx: {SIGNATURE}"}, "URL in its answer should be"),
        ({"url": "/rendezvous"}, "URL in its answer should be"),
    ],
)
async def test_answer_that_cannot_be_used_is_an_error_that_says_why(
    operation: str, changes: dict[str, Any], problem: str, client: Client
) -> None:
    if operation == "register":
        error = await register_failure(client, registered(**changes))
    else:
        error = await connect_failure(client, connected(**changes))
    assert problem in str(error)
    assert (error.status, error.code, error.retryable) == (None, None, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"harness_key_authorization": ""},
        {"harness_key_authorization": "\n"},
        {"harness_key_authorization": None},
        {"executor_public_key": None},
        {"executor_public_key": "key"},
        {"executor_public_key": KEY.to_json() | {"more": "members"}},
        {"executor_public_key": KEY.to_json() | {"suite": "Noise_XX"}},
        {"executor_public_key": KEY.to_json() | {"x25519_public_key": "AAAA"}},
        {"executor_public_key": KEY.to_json() | {"mlkem768_public_key": 7}},
    ],
)
async def test_bundle_without_authorization_or_key_is_an_error(
    changes: dict[str, Any], client: Client
) -> None:
    error = await connect_failure(client, connected(**changes))
    assert next(iter(changes)) in str(error)
    assert not error.retryable


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("register", clear(security_profile="noise_hybrid_ik_v1")),
        ("connect", clear()),
        ("connect", connected()),
    ],
)
async def test_clear_text_is_not_mixed_up_with_noise(operation: str, answer: Answer, client: Client) -> None:
    fake, registry = client
    fake.answer(operation, answer)
    error = await failure(lambda: getattr(registry, operation)(ID, None))
    assert "and not clear_relay_v1" in str(error)


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"7", b"null", b"\xff", b"[" * 60_000])
async def test_success_without_an_object_is_an_error(body: bytes, client: Client) -> None:
    error = await register_failure(client, Answer(body))
    assert "its answer is no JSON object" in str(error)
    assert not error.retryable


async def test_members_that_are_not_known_are_passed_over(client: Client) -> None:
    fake, registry = client
    fake.answer("register", registered(more={"of": "it"}))
    assert (await registry.register(ID, KEY)).url == SOCKET_URL


@pytest.mark.parametrize(
    "url",
    [
        "wss://relay.example",
        "wss://relay.example:8443/x?y=z",
        "ws://127.0.0.1:7/x",
        "ws://[::1]",
        "wss://h?a=/@:",
    ],
)
def test_url_of_a_websocket_that_nobody_can_listen_in_to_is_taken(url: str) -> None:
    check_socket_url(url, here=True)


@pytest.mark.parametrize("url", ["ws://127.0.0.1:7/x", "ws://localhost/", "wss://[::1]/", "wss://127.1.1.1/"])
def test_registry_elsewhere_leads_nobody_to_what_listens_on_his_own_machine(url: str) -> None:
    check_socket_url(url, here=True)
    with pytest.raises(InvalidUrl, match="is of this machine, where the registry is not"):
        check_socket_url(url, here=False)


def test_values_hide_what_is_secret() -> None:
    shown = repr(Registration(ID, SOCKET_URL, REGISTRATION_ID))
    shown += repr(Bundle(ID, SOCKET_URL, REGISTRATION_ID, KEY, AUTHORIZATION))
    assert SIGNATURE not in shown
    assert AUTHORIZATION not in shown


# Refusals.


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_credential_is_an_authentication_error(status: int, client: Client) -> None:
    error = await register_failure(client, error_answer(status, "bad_key", "the key has expired"))
    assert f"authentication failed ({status}): the key has expired" in str(error)
    assert (error.status, error.code, error.retryable) == (status, "bad_key", False)


async def test_other_refusal_has_status_code_and_message(client: Client) -> None:
    error = await register_failure(client, error_answer(422, "no_such_id", "we don't have it"))
    assert "request failed (422, no_such_id): we don't have it" in str(error)
    assert (error.status, error.code) == (422, "no_such_id")


async def test_refusal_without_a_code_has_status_and_message(client: Client) -> None:
    error = await register_failure(client, error_answer(422, message="no"))
    assert "request failed (422): no" in str(error)
    assert error.code is None


@pytest.mark.parametrize("status", [401, 500])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"oops",
        b"{}",
        b"[]",
        b'{"error":"text"}',
        b'{"error":{"code":7,"message":8}}',
        b'{"error":{"message":" "}}',
    ],
)
async def test_error_body_that_says_nothing_is_called_that(status: int, body: bytes, client: Client) -> None:
    error = await register_failure(client, Answer(body, status))
    assert f"({status}): empty or malformed error body" in str(error)
    assert error.code is None


async def test_error_message_is_cut_with_a_mark(client: Client) -> None:
    whole = await register_failure(client, error_answer(500, "c", "m" * MAX_ERROR))
    assert str(whole).endswith(": " + "m" * MAX_ERROR)
    cut = await register_failure(client, error_answer(500, "c", "m" * (MAX_ERROR + 1)))
    assert str(cut).endswith(": " + "m" * MAX_ERROR + " [truncated]")
    between = await register_failure(client, error_answer(500, "c", "m" + "\u00e9" * MAX_ERROR))
    assert str(between).endswith(": m" + "\u00e9" * (MAX_ERROR // 2 - 1) + " [truncated]")


async def test_words_of_a_registry_are_one_line_without_controls_and_without_our_key(client: Client) -> None:
    error = await register_failure(
        client, error_answer(500, "a\x1b[31m\n", f"one\r\ntwo \x1b]0;title\x07 {API_KEY} \u202e")
    )
    assert "request failed (500, a [31m): one two ]0;title ***" in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_an_error_and_is_not_followed(status: int) -> None:
    async with on_loopback() as (fake, registry), open_fake_registry() as other:
        other.answer("register", registered())
        location = f"{other.url}/cloud/environment/{ID}/register"
        fake.answer("register", Answer(b"", status, headers=(("location", location),)))
        error = await failure(lambda: registry.register(ID, KEY))
        assert f"request failed ({status}): empty or malformed error body" in str(error)
        assert (error.status, error.retryable) == (status, False)
        assert (len(fake.asked), other.asked) == (1, [])


@pytest.mark.parametrize(
    ("answer", "retryable"),
    [
        (error_answer(400), False),
        (error_answer(401), False),
        (error_answer(403), False),
        (error_answer(404), False),
        (error_answer(408), True),
        (error_answer(409), False),
        (error_answer(409, "environment_offline"), True),
        (error_answer(409, "security_profile_mismatch"), False),
        (error_answer(429), True),
        (error_answer(500), True),
        (error_answer(502, "authentication_service_unavailable"), True),
        (error_answer(503, "registration_conflict"), True),
        (error_answer(599), True),
        (NOTHING, True),
        (GARBAGE, True),
        (Answer(b"", hangs=True), True),
        (registered(environment_id="another"), False),
    ],
)
async def test_harness_may_try_again_after_what_can_pass(
    answer: Answer, retryable: bool, client: Client, autojump_clock: MockClock
) -> None:
    assert (await connect_failure(client, answer)).retryable is retryable


# Answers that never end.


async def test_answer_of_more_than_the_largest_size_is_not_taken(client: Client) -> None:
    small = registered().data
    error = await register_failure(client, Answer(small + b" " * (MAX_ANSWER + 1 - len(small))))
    assert "its answer is no JSON object" in str(error)


@pytest.mark.parametrize("status", [200, 500])
async def test_huge_answer_is_not_read_to_its_end(
    status: int, client: Client, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    error = await register_failure(client, Answer(b" " * (MAX_ANSWER + 100_000), status, hangs=True))
    assert trio.current_time() == start, "nothing was waited for"
    assert ("no JSON object" if status == 200 else "empty or malformed error body") in str(error)


async def test_answer_of_the_largest_size_is_read(client: Client) -> None:
    fake, registry = client
    small = registered().data
    fake.answer("register", Answer(small + b" " * (MAX_ANSWER - len(small))))
    assert (await registry.register(ID, KEY)).registration_id == REGISTRATION_ID


@pytest.mark.parametrize(
    "answer", [Answer(b"", hangs=True), Answer(b'{"environment_id":', hangs=True), Answer({}, delay=11)]
)
async def test_registry_has_ten_seconds_for_all_of_its_answer(
    answer: Answer, client: Client, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    error = await register_failure(client, answer)
    assert trio.current_time() - start == 10
    assert "no answer within 10 s" in str(error)
    assert (error.status, error.retryable) == (None, True)


async def test_answer_after_almost_ten_seconds_is_taken(client: Client, autojump_clock: MockClock) -> None:
    fake, registry = client
    fake.answer("register", Answer(registered().body, delay=9.9))
    assert (await registry.register(ID, KEY)).registration_id == REGISTRATION_ID


async def test_cancelled_request_is_cancelled_and_leaves_the_next_one_working(
    client: Client, autojump_clock: MockClock
) -> None:
    fake, registry = client
    fake.answer("register", Answer(b"", hangs=True), registered())
    with trio.move_on_after(1) as scope:
        await registry.register(ID, KEY)
    assert scope.cancelled_caught
    assert (await registry.register(ID, KEY)).registration_id == REGISTRATION_ID


# Connections.


async def test_registry_that_does_not_listen_is_named() -> None:
    with trio.fail_after(20):
        async with open_fake_registry() as fake:
            url = fake.url
        async with open_registry(url + "/base", headers=bearer()) as registry:
            error = await failure(lambda: registry.register(ID, KEY))
    assert f"cannot ask the registry {url}/base: " in str(error)
    assert "refused" in str(error)
    assert (error.status, error.retryable) == (None, True)


async def test_certificate_is_checked_and_a_wrong_one_is_final() -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with trio.fail_after(20):
        async with open_fake_registry(server) as fake:
            fake.answer("register", registered())
            async with open_registry(fake.url, headers=bearer(), ssl_context=trusting) as registry:
                assert (await registry.register(ID, KEY)).registration_id == REGISTRATION_ID
            async with open_registry(fake.url, headers=bearer()) as registry:
                error = await failure(lambda: registry.register(ID, KEY))
    assert "certificate verify failed" in str(error).lower()
    assert (error.retryable, len(fake.asked)) == (False, 1)


async def test_connection_that_the_registry_has_closed_since_is_not_used_again() -> None:
    async with on_loopback() as (fake, registry):
        fake.answer("register", evolve(registered(), announces_end=False))
        for _ in range(3):
            assert (await registry.register(ID, KEY)).registration_id == REGISTRATION_ID
            await fake.wait_closed()
    assert len(fake.asked) == 3


async def test_requests_go_side_by_side(client: Client, autojump_clock: MockClock) -> None:
    fake, registry = client
    fake.answer("validate", Answer({"valid": True}, delay=5))
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(32):
            nursery.start_soon(registry.validate, "s", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert (trio.current_time() - start, len(fake.asked)) == (5, 32)


# Validation.


@pytest.mark.parametrize(
    "answer",
    [
        Answer({"valid": False}),
        Answer({}),
        Answer({"valid": "true"}),
        Answer({"valid": 1}),
        Answer({"valid": None}),
        Answer([True]),
        Answer(b"true"),
        Answer(b""),
        Answer(b"garbage"),
        Answer({"valid": True}, status=307),
        Answer({"valid": True}, status=401),
        Answer({"valid": True}, status=409),
        Answer({"valid": True}, status=500),
        Answer({"valid": True}, delay=10.1),
        Answer({"valid": True}, hangs=True),
        NOTHING,
        GARBAGE,
    ],
)
async def test_whatever_is_no_plain_yes_rejects_a_harness(
    answer: Answer, client: Client, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    fake, registry = client
    fake.answer("validate", answer)
    caplog.set_level(logging.DEBUG)
    start = trio.current_time()
    assert await registry.validate("s", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION) is False
    assert trio.current_time() - start <= 10


async def test_empty_success_of_a_draft_is_no_yes(client: Client) -> None:
    fake, registry = client
    fake.answer("validate", Answer(b"", status=204))
    assert await registry.validate("s", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION) is False


@pytest.mark.parametrize("stream_id", ["", "two\r\nx: lines", "caf\xe9", " ", "s" * 129])
async def test_stream_id_that_no_header_can_have_is_rejected_without_asking(
    stream_id: str, client: Client
) -> None:
    fake, registry = client
    fake.answer("validate", Answer({"valid": True}))
    assert not await registry.validate(stream_id, ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert fake.asked == []


async def test_validation_raises_nothing_even_if_there_is_an_error_of_ours(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_args: object) -> None:
        raise RuntimeError(AUTHORIZATION)

    _, registry = client
    monkeypatch.setattr(registry, "_post", broken)
    assert not await registry.validate("s", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert "RuntimeError" in caplog.text
    assert AUTHORIZATION not in caplog.text


async def test_validation_can_be_cancelled(client: Client, autojump_clock: MockClock) -> None:
    fake, registry = client
    fake.answer("validate", Answer(b"", hangs=True))
    with trio.move_on_after(1) as scope:
        await registry.validate("s", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert scope.cancelled_caught


# Secrets.


async def test_no_secret_is_logged_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "httpcore2")  # whatever another test has set there
    key = HARNESS_KEY.to_json()
    async with on_loopback() as (fake, registry):
        fake.answer("register", registered(), error_answer(500, "c", f"you said {API_KEY}"))
        fake.answer("connect", connected(), connected(harness_key_authorization=" "))
        said = {"error": {"message": f"{AUTHORIZATION} {key} is wrong"}, "valid": False}
        fake.answer("validate", Answer({"valid": True}), Answer(said), Answer(said, status=500))
        await registry.register(ID, KEY)
        await failure(lambda: registry.register(ID, KEY))
        await registry.connect(ID, HARNESS_KEY)
        await failure(lambda: registry.connect(ID, HARNESS_KEY))
        for _ in range(3):
            await registry.validate("stream-1", ID, REGISTRATION_ID, HARNESS_KEY, AUTHORIZATION)
    assert "httpcore2" in {record.name.partition(".")[0] for record in caplog.records}
    assert "status 500" in caplog.text
    for secret in (API_KEY, SIGNATURE, AUTHORIZATION, key["x25519_public_key"], "is wrong"):
        assert secret not in caplog.text


# The pause of the registry.


def test_pause_of_the_registry_doubles_up_to_five_seconds_and_half_as_much_again() -> None:
    def least(low: float, high: float) -> float:
        return low

    def most(low: float, high: float) -> float:
        return high

    tries = [0, 1, 2, 3, 4, 5, 100_000]
    assert [registry_pause(n, least) for n in tries] == [0.5, 1, 2, 4, 5, 5, 5]
    assert [registry_pause(n, most) for n in tries] == [0.75, 1.5, 3, 6, 7.5, 7.5, 7.5]
    assert all(0.5 <= registry_pause(0) <= 0.75 for _ in range(100))


async def test_certificates_of_the_system_are_read_for_https_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 20 ms, in which nothing else moves, and a harness opens a registry for every stream."""

    def read() -> ssl.SSLContext:
        raise AssertionError("they were read")

    monkeypatch.setattr(registry_module, "default_ssl", read)
    async with open_registry("http://127.0.0.1:1", headers=dict):
        pass
    with pytest.raises(AssertionError, match="they were read"):
        async with open_registry("https://registry.example", headers=dict):
            pass
