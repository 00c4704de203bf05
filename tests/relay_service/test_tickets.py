"""Signed URLs, tokens, buckets and counts: machines, without a relay around them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from attrs import evolve

from execenv.relay_service import Settings, tokens
from execenv.relay_service.limits import Buckets, Entry, Table, TooMany
from execenv.relay_service.store import ANY_ENVIRONMENT, Role
from execenv.relay_service.tickets import BadTicket, Ticket, new_nonce, read_ticket, signed_query

KEY = b"k" * 32
TICKET = Ticket("harness", "box", "reg_1", "0123456789abcdef", "f" * 64, 1_800_000_060, "nonce")
NOW = 1_800_000_000.0


def test_ticket_comes_back_as_it_was_signed() -> None:
    for ticket in (TICKET, evolve(TICKET, role="executor", key_fingerprint="")):
        assert read_ticket("box", signed_query(ticket, KEY), KEY) == ticket


@pytest.mark.parametrize(
    "forged",
    [
        evolve(TICKET, role="executor"),
        evolve(TICKET, registration_id="reg_2"),
        evolve(TICKET, token_id="0123456789abcdee"),
        evolve(TICKET, key_fingerprint=""),
        evolve(TICKET, expires=TICKET.expires + 1),
        evolve(TICKET, nonce="other"),
        # The same bytes in a row, cut elsewhere.
        evolve(TICKET, registration_id="reg_10", token_id="123456789abcdef"),
    ],
)
def test_every_part_of_a_ticket_is_signed(forged: Ticket) -> None:
    signature = signed_query(TICKET, KEY).rpartition("=")[2]
    query = signed_query(forged, KEY).rpartition("=")[0] + "=" + signature
    with pytest.raises(BadTicket, match="signature is not ours"):
        read_ticket("box", query, KEY)


def test_ticket_is_for_its_environment_and_its_key_only() -> None:
    query = signed_query(TICKET, KEY)
    with pytest.raises(BadTicket):
        read_ticket("other", query, KEY)
    with pytest.raises(BadTicket):
        read_ticket("box", query, b"K" * 32)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "role=harness",
        "&".join(["a=b"] * 5000),
        signed_query(TICKET, KEY).replace("nonce=nonce&", ""),
        signed_query(TICKET, KEY) + "&role=executor",
        signed_query(TICKET, KEY).replace("role=harness", "role=root"),
        signed_query(TICKET, KEY).replace("expires=1", "expires=x"),
        signed_query(TICKET, KEY).replace("expires=1", "expires=" + "1" * 5000),
        signed_query(TICKET, KEY).replace("nonce=nonce", "nonce=%ff%fe"),
        signed_query(TICKET, KEY)[:-1] + "\u00e9",
        signed_query(TICKET, KEY).replace("nonce=nonce", "nonce=%ed%b0%80"),
    ],
)
def test_query_that_is_no_ticket_is_refused_without_a_word_of_it(query: str) -> None:
    with pytest.raises(BadTicket) as caught:
        read_ticket("box", query, KEY)
    assert str(caught.value) in ("it is not signed", "its signature is not ours")


def test_url_holds_no_secret_but_signature_and_nonce() -> None:
    names = [pair.partition("=")[0] for pair in signed_query(TICKET, KEY).split("&")]
    assert names == ["role", "registration", "token", "key", "expires", "nonce", "signature"]
    assert len({new_nonce() for _ in range(100)}) == 100


def test_token_has_a_secret_of_32_bytes_which_is_not_kept() -> None:
    token, record = tokens.make_token("box", "harness", "mine", now=NOW, expires=None)
    assert re.fullmatch(r"exr_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", token)
    assert tokens.token_id(token) == record.token_id
    assert token.split("_", 2)[2] not in repr(record)
    assert tokens.is_token_of(record, token)
    assert not tokens.is_token_of(record, token[:-1] + ("A" if token[-1] != "A" else "B"))


@pytest.mark.parametrize("text", ["", "exr_", "exr_0123456789abcdef_short", "sk-123", "exr_" + "0" * 200])
def test_what_does_not_look_like_a_token_has_no_id(text: str) -> None:
    assert tokens.token_id(text) is None


def test_token_holds_until_the_second_that_it_expires() -> None:
    _, record = tokens.make_token("box", "harness", "", now=NOW, expires=NOW + 10)
    assert tokens.is_current(record, NOW + 9.9)
    assert not tokens.is_current(record, NOW + 10)


def test_token_is_for_its_environment_or_for_all() -> None:
    _, record = tokens.make_token("box", "harness", "", now=NOW, expires=None)
    assert (tokens.is_for(record, "box"), tokens.is_for(record, "other")) == (True, False)
    assert tokens.is_for(evolve(record, environment_id=ANY_ENVIRONMENT), "other")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("box", True),
        ("A-z_9", True),
        ("x" * 256, True),
        ("x" * 257, False),
        ("", False),
        ("..", False),
        ("a/b", False),
        ("a b", False),
        ("box\n", False),
        ("b\u00f6x", False),
        ("\u0661", False),
    ],
)
def test_environment_ids_are_plain(text: str, good: bool) -> None:
    assert tokens.is_environment_id(text) is good


def test_bucket_gives_its_burst_and_then_its_rate() -> None:
    buckets = Buckets(rate=2, burst=3, most=10)
    assert [buckets.take("a", 0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b", 0) == 0
    assert buckets.take("a", 0.25) == 0.25
    assert buckets.take("a", 0.5) == 0
    assert buckets.take("a", 0.5) == 0.5
    assert [buckets.take("a", 100) for _ in range(4)] == [0, 0, 0, 0.5]


def test_clock_that_is_set_back_gives_nothing_and_takes_nothing() -> None:
    buckets = Buckets(rate=1, burst=1, most=10)
    assert [buckets.take("a", 100), buckets.take("a", 50), buckets.take("a", 51)] == [0, 1, 0]


def test_buckets_are_as_many_as_they_may_be_and_the_oldest_goes() -> None:
    buckets = Buckets(rate=1, burst=1, most=2)
    for key in ("a", "b", "a", "c"):
        buckets.take(key, 0)
    assert len(buckets) == 2
    assert buckets.take("a", 0) == 1
    assert buckets.take("b", 0) == 0


def entry(
    role: Role,
    environment_id: str = "box",
    token_id: str = "t",
    principal: bytes = b"",
    probe: Callable[[], None] = lambda: None,
) -> Entry:
    return Entry(role, environment_id, token_id, lambda code, reason: None, lambda: 0, principal, probe)


def test_table_takes_as_many_as_it_may_and_one_more_when_one_has_left() -> None:
    table = Table(Settings("http://x", max_sockets=4, max_environment_harnesses=2, max_token_harnesses=2))
    first = entry("harness")
    for one in (first, entry("harness", token_id="u"), entry("executor")):
        table.add(one)
    with pytest.raises(TooMany, match=r"too_many_harnesses$"):
        table.add(entry("harness", token_id="v"))
    table.add(entry("harness", "other"))
    with pytest.raises(TooMany, match="too_many_sockets"):
        table.add(entry("executor"))
    table.remove(first)
    table.add(entry("harness"))
    assert len(table) == 4


def test_table_counts_tokens_over_all_environments() -> None:
    table = Table(Settings("http://x", max_token_harnesses=2))
    table.add(entry("harness", "a"))
    table.add(entry("harness", "b"))
    with pytest.raises(TooMany, match="too_many_harnesses_of_token"):
        table.add(entry("harness", "c"))
    table.add(entry("harness", "c", "other"))


@pytest.mark.parametrize(
    ("public", "url"),
    [
        ("http://127.0.0.1:80", "ws://127.0.0.1:80/rendezvous/box?q"),
        ("https://relay.example.com/base/", "wss://relay.example.com/base/rendezvous/box?q"),
    ],
)
def test_websocket_urls_are_made_of_the_public_one(public: str, url: str) -> None:
    assert Settings(public).rendezvous_url("box", "q") == url


def test_harness_that_comes_again_has_its_other_sockets_probed_and_nobody_elses() -> None:
    """A harness whose socket died without a word cannot resume its session while that seems to be there."""
    table = Table(Settings("http://x"))
    probed: list[str] = []

    def harness(name: str, environment_id: str, principal: bytes) -> Entry:
        return entry("harness", environment_id, principal=principal, probe=lambda: probed.append(name))

    lost, kept = harness("lost", "box", b"me"), harness("kept", "box", b"me")
    for one in (lost, harness("another", "box", b"you"), harness("elsewhere", "other", b"me")):
        table.add(one)
    assert probed == []
    table.add(kept)
    assert probed == ["lost"]
    table.remove(lost)
    table.add(harness("newest", "box", b"me"))
    assert probed == ["lost", "kept"]
