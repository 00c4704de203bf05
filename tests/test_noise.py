"""Noise, judged by a reference of its own: relay.md §5 with nothing but hashlib, hmac and cryptography.

`vectors/noise.json` has everything that a handshake of fixed keys says. The reference reproduces it, and so
do both of our roles; a reference that differs in one rule does neither.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import pickle
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from attrs import evolve, field, frozen
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from execenv.errors import UsageError
from execenv.relay import noise
from execenv.relay.keys import PublicKey
from execenv.relay.noise import (
    MAX_AUTHORIZATION,
    MAX_MESSAGE,
    RECORD,
    Buffer,
    Identity,
    Initiator,
    MessageTooLong,
    NoiseFailed,
    Randomness,
    RecordReader,
    RecordWriter,
    Responder,
    Transport,
    noise_available,
    prologue,
)

VECTOR = Path(__file__).parent / "vectors" / "noise.json"
LOW_ORDER = [
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes([0xEC]) + b"\xff" * 30 + b"\x7f",
    bytes([0xED]) + b"\xff" * 30 + b"\x7f",
    bytes([0xEE]) + b"\xff" * 30 + b"\x7f",
]
"""Every point, canonical or not, that X25519 takes to zero (Curve25519, "Contributory behaviour")."""
MALFORMED = b"\xff" * 1184  # coefficients above the modulus
FIRST = ("skem", "e", "es", "s", "ss")
SECOND = ("ekem", "skem", "e", "ee", "se")

repeatable = settings(max_examples=200, deadline=None, derandomize=True, database=None)


# The reference.


@frozen
class Private:
    """The private bytes of a pair of keys."""

    x25519: bytes
    mlkem768: bytes

    @property
    def x(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.x25519)

    @property
    def kem(self) -> MLKEM768PrivateKey:
        return MLKEM768PrivateKey.from_seed_bytes(self.mlkem768)

    @property
    def public(self) -> tuple[bytes, bytes]:
        return self.x.public_key().public_bytes_raw(), self.kem.public_key().public_bytes_raw()

    def dh(self, other: Private) -> bytes:
        return self.x.exchange(X25519PublicKey.from_public_bytes(other.public[0]))


@frozen
class Story:
    """All that determines a handshake, and the rules that it follows."""

    harness: Private
    executor: Private
    harness_ephemeral: Private
    executor_ephemeral: Private
    ciphertexts: Sequence[bytes]
    """To the executor's key; to the harness's ephemeral one; to its other one."""
    ids: Sequence[str]
    authorization: bytes
    answer: bytes = b""
    plaintexts: Sequence[bytes] = ()
    name: bytes = b"Noise_hybridIK_25519+MLKEM768_AESGCM_SHA256"
    label: str = "codex-exec-server-relay-noise/v1"
    length_bytes: int = 8
    order: str = "big"
    static_first: int = 0
    first: Sequence[str] = FIRST
    second: Sequence[str] = SECOND


@frozen
class Told:
    """What comes of a `Story`."""

    prologue: bytes
    message1: bytes
    message2: bytes
    keys: tuple[bytes, bytes]
    to_executor: list[bytes] = field(factory=list)
    to_harness: list[bytes] = field(factory=list)


class Transcript:
    """A whole handshake with the eyes of somebody who has every private key."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.h = self.ck = hashlib.sha256(story.name).digest()
        self.k = b""
        self.n = 0
        self.message = b""

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.sha256(self.h + data).digest()

    def hkdf(self, ikm: bytes, outputs: int) -> list[bytes]:
        temporary = hmac.new(self.ck, ikm, "sha256").digest()
        found, last = [], b""
        for number in range(1, outputs + 1):
            last = hmac.new(temporary, last + bytes([number]), "sha256").digest()
            found.append(last)
        return found

    def mix_key(self, ikm: bytes) -> None:
        self.ck, self.k = self.hkdf(ikm, 2)
        self.n = 0

    def mix_key_and_hash(self, ikm: bytes) -> None:
        self.ck, hashed, self.k = self.hkdf(ikm, 3)
        self.mix_hash(hashed)
        self.n = 0

    def clear(self, data: bytes) -> None:
        self.message += data
        self.mix_hash(data)

    def encrypt_and_hash(self, plaintext: bytes) -> None:
        sent = plaintext
        if self.k:
            sent = AESGCM(self.k).encrypt(self.nonce(self.n), plaintext, self.h)
            self.n += 1
        self.clear(sent)

    def nonce(self, n: int) -> bytes:
        return bytes(4) + n.to_bytes(8, "big" if self.story.order == "big" else "little")

    def run(self) -> Told:
        story = self.story
        size = story.length_bytes
        begin = b"".join(
            len(part.encode()).to_bytes(size, "big") + part.encode() for part in (story.label, *story.ids)
        )
        self.mix_hash(begin)
        self.mix_hash(story.executor.public[0])
        self.mix_hash(story.executor.public[1])
        for token in story.first:
            self.token(token, story.executor, story.harness_ephemeral, [story.ciphertexts[0]], [])
        self.encrypt_and_hash(story.authorization)
        message1, self.message = self.message, b""
        for token in story.second:
            self.token(
                token,
                story.harness,
                story.executor_ephemeral,
                [story.ciphertexts[2]],
                [story.ciphertexts[1]],
            )
        self.encrypt_and_hash(story.answer)
        to_executor, to_harness = self.hkdf(b"", 2)
        return Told(
            begin,
            message1,
            self.message,
            (to_executor, to_harness),
            [AESGCM(to_executor).encrypt(self.nonce(n), p, b"") for n, p in enumerate(story.plaintexts)],
            [AESGCM(to_harness).encrypt(self.nonce(n), p, b"") for n, p in enumerate(story.plaintexts)],
        )

    def token(
        self, token: str, peer: Private, ephemeral: Private, skem: Sequence[bytes], ekem: Sequence[bytes]
    ) -> None:
        story = self.story
        if token == "skem":
            self.encrypt_and_hash(skem[0])
            self.mix_key_and_hash(peer.kem.decapsulate(skem[0]))
        elif token == "ekem":
            self.clear(ekem[0])
            self.mix_key(story.harness_ephemeral.kem.decapsulate(ekem[0]))
        elif token == "e":
            for part in ephemeral.public:
                self.clear(part)
        elif token == "s":
            self.encrypt_and_hash(story.harness.public[story.static_first])
            self.encrypt_and_hash(story.harness.public[1 - story.static_first])
        elif token == "es":
            self.mix_key(story.harness_ephemeral.dh(story.executor))
        elif token == "ss":
            self.mix_key(story.harness.dh(story.executor))
        elif token == "ee":
            self.mix_key(story.harness_ephemeral.dh(story.executor_ephemeral))
        else:
            assert token == "se"
            self.mix_key(story.harness.dh(story.executor_ephemeral))


def load() -> tuple[Story, Told]:
    def data(text: str) -> bytes:
        return base64.b64decode(text, validate=True)

    stored = json.loads(VECTOR.read_text())
    told = stored["told"]

    def private(name: str) -> Private:
        return Private(data(stored[name]["x25519"]), data(stored[name]["mlkem768"]))

    story = Story(
        private("harness"),
        private("executor"),
        private("harness_ephemeral"),
        private("executor_ephemeral"),
        ciphertexts=[data(text) for text in stored["ciphertexts"]],
        ids=stored["ids"],
        authorization=stored["authorization"].encode(),
        plaintexts=[text.encode() for text in stored["plaintexts"]],
    )
    return story, Told(
        data(told["prologue"]),
        data(told["message1"]),
        data(told["message2"]),
        (data(told["keys"][0]), data(told["keys"][1])),
        [data(text) for text in told["to_executor"]],
        [data(text) for text in told["to_harness"]],
    )


STORY, TOLD = load()


# Our roles in the same story.


def identity_of(private: Private) -> Identity:
    return Identity.from_private_bytes(private.x25519, private.mlkem768)


def lots(ephemeral: Private, *encapsulations: tuple[bytes, Private]) -> Randomness:
    """Gives the ephemeral keys, and each ciphertext to the one for whom it is."""

    def encapsulate(key: MLKEM768PublicKey) -> tuple[bytes, bytes]:
        public = key.public_bytes_raw()
        ciphertext, owner = next(pair for pair in encapsulations if pair[1].public[1] == public)
        return owner.kem.decapsulate(ciphertext), ciphertext

    return Randomness(lambda: identity_of(ephemeral), encapsulate)


def initiator(story: Story = STORY) -> Initiator:
    return Initiator(
        identity_of(story.harness),
        identity_of(story.executor).public,
        prologue(*story.ids),
        story.authorization,
        lots(story.harness_ephemeral, (story.ciphertexts[0], story.executor)),
    )


def responder(story: Story = STORY) -> Responder:
    return Responder(
        identity_of(story.executor),
        prologue(*story.ids),
        lots(
            story.executor_ephemeral,
            (story.ciphertexts[1], story.harness_ephemeral),
            (story.ciphertexts[2], story.harness),
        ),
    )


HARNESS, EXECUTOR = Identity.generate(), Identity.generate()
PROLOGUE = prologue("env-1", "reg-1", "stream-1")


def handshake() -> tuple[Transport, Transport]:
    """The harness's end and the executor's, of fresh keys."""
    harness, executor = (
        Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b"let me"),
        Responder(EXECUTOR, PROLOGUE),
    )
    executor.read(harness.message1)
    message2, theirs = executor.answer()
    return harness.finish(message2), theirs


def test_reference_tells_the_stored_story() -> None:
    assert Transcript(STORY).run() == TOLD


def test_both_roles_tell_the_stored_story() -> None:
    harness, executor = initiator(), responder()
    assert prologue(*STORY.ids) == TOLD.prologue
    assert harness.message1 == TOLD.message1
    assert executor.read(TOLD.message1) == (PublicKey(*STORY.harness.public), STORY.authorization)
    message2, theirs = executor.answer()
    assert message2 == TOLD.message2
    ours = harness.finish(TOLD.message2)
    assert [ours.encrypt(text) for text in STORY.plaintexts] == TOLD.to_executor
    assert [theirs.encrypt(text) for text in STORY.plaintexts] == TOLD.to_harness
    assert [theirs.decrypt(record) for record in TOLD.to_executor] == STORY.plaintexts
    assert [ours.decrypt(record) for record in TOLD.to_harness] == STORY.plaintexts


def _swaps(tokens: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Two neighbours the other way; but not `e` and the exchange after it, whose order nobody can see: one
    changes the hash alone and the other the keys alone."""
    for left, right in pairwise(range(len(tokens))):
        if tokens[left] == "e":
            continue
        swapped = list(tokens)
        swapped[left], swapped[right] = tokens[right], tokens[left]
        yield tuple(swapped)


FIRST_DIFFERS: dict[str, Callable[[Story], Story]] = {
    "the suite for a name": lambda s: evolve(s, name=b"Noise_hybridIK_X25519+MLKEM768_AESGCM_SHA256"),
    "another label": lambda s: evolve(s, label="codex-exec-server-relay-noise/v2"),
    "lengths of 32 bits": lambda s: evolve(s, length_bytes=4),
    "counters the other way": lambda s: evolve(s, order="little"),
    "the static keys the other way": lambda s: evolve(s, static_first=1),
    "another environment": lambda s: evolve(s, ids=["env-2", *s.ids[1:]]),
    "another registration": lambda s: evolve(s, ids=[s.ids[0], "reg-2", s.ids[2]]),
    "another stream": lambda s: evolve(s, ids=[*s.ids[:2], "another"]),
    "a shifted boundary of the prologue": lambda s: evolve(
        s, ids=[s.ids[0] + s.ids[1][0], s.ids[1][1:], s.ids[2]]
    ),
    **{f"tokens {' '.join(tokens)}": partial(evolve, first=tokens) for tokens in _swaps(FIRST)},
}
SECOND_DIFFERS: dict[str, Callable[[Story], Story]] = {
    f"tokens {' '.join(tokens)}": partial(evolve, second=tokens) for tokens in _swaps(SECOND)
}


@pytest.mark.parametrize("change", FIRST_DIFFERS.values(), ids=FIRST_DIFFERS)
def test_other_rule_in_the_first_message_is_another_story(change: Callable[[Story], Story]) -> None:
    told = Transcript(change(STORY)).run()
    assert told.message1 != TOLD.message1
    with pytest.raises(NoiseFailed):
        responder().read(told.message1)


@pytest.mark.parametrize("change", SECOND_DIFFERS.values(), ids=SECOND_DIFFERS)
def test_other_rule_in_the_second_message_is_another_story(change: Callable[[Story], Story]) -> None:
    told = Transcript(change(STORY)).run()
    assert told.message1 == TOLD.message1
    assert told.message2 != TOLD.message2
    with pytest.raises(NoiseFailed):
        initiator().finish(told.message2)


def test_name_is_what_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "NAME", b"Noise_hybridIK_X25519+MLKEM768_AESGCM_SHA256")
    assert initiator().message1 != TOLD.message1
    with pytest.raises(NoiseFailed):
        responder().read(TOLD.message1)


# What the roles refuse.


@pytest.mark.parametrize("size", [0, 1, 77, MAX_AUTHORIZATION])
def test_messages_have_their_lengths(size: int) -> None:
    harness, executor = (
        Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b"a" * size),
        Responder(EXECUTOR, PROLOGUE),
    )
    assert len(harness.message1) == 3568 + size
    assert executor.read(harness.message1) == (HARNESS.public, b"a" * size)
    message2, _ = executor.answer()
    assert len(message2) == 3424
    harness.finish(message2)


def test_two_handshakes_have_nothing_in_common() -> None:
    one, other = (Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b"").message1 for _ in range(2))
    assert not {one[at : at + 16] for at in range(len(one) - 15)} & {
        other[at : at + 16] for at in range(len(other) - 15)
    }


def test_every_changed_byte_of_the_first_message_is_noticed() -> None:
    for at in range(len(TOLD.message1)):
        changed = bytearray(TOLD.message1)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(NoiseFailed):
            responder().read(changed)


def test_every_changed_byte_of_the_second_message_is_noticed() -> None:
    for at in range(len(TOLD.message2)):
        changed = bytearray(TOLD.message2)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(NoiseFailed):
            initiator().finish(changed)


def test_changed_bit_that_x25519_ignores_is_noticed() -> None:
    changed = bytearray(TOLD.message1)
    changed[1088 + 31] ^= 0x80
    with pytest.raises(NoiseFailed, match="decrypted"):
        responder().read(changed)
    changed = bytearray(TOLD.message2)
    changed[1088 + 1104 + 31] ^= 0x80
    with pytest.raises(NoiseFailed, match="decrypted"):
        initiator().finish(changed)


@pytest.mark.parametrize("size", [0, 1, 1088, 2304, 3567, 3568 + len(STORY.authorization) - 1, 65536])
def test_first_message_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(NoiseFailed):
        responder().read((TOLD.message1 + bytes(65536))[:size])


@pytest.mark.parametrize("size", [0, 1, 1088, 3408, 3423, 3425, 3440, 65535, 65536])
def test_second_message_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(NoiseFailed):
        initiator().finish((TOLD.message2 + bytes(65536))[:size])


def test_other_executor_cannot_read_and_other_harness_cannot_finish() -> None:
    harness, executor = Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b"a"), Responder(EXECUTOR, PROLOGUE)
    for identity in (HARNESS, Identity.generate()):
        with pytest.raises(NoiseFailed):
            Responder(identity, PROLOGUE).read(harness.message1)
    executor.read(harness.message1)
    message2, _ = executor.answer()
    for other in (HARNESS, Identity.generate()):
        with pytest.raises(NoiseFailed):
            Initiator(other, EXECUTOR.public, PROLOGUE, b"a").finish(message2)
    harness.finish(message2)


@pytest.mark.parametrize("half", ["x25519", "mlkem768"])
def test_executor_with_one_of_two_keys_cannot_read(half: str) -> None:
    stranger = Private(b"s" * 32, b"s" * 64)
    story = evolve(STORY, executor=evolve(STORY.executor, **{half: getattr(stranger, half)}))
    impostor = identity_of(story.executor)
    impostor.public = PublicKey(*STORY.executor.public)
    with pytest.raises(NoiseFailed):
        Responder(impostor, TOLD.prologue).read(TOLD.message1)


@pytest.mark.parametrize("half", ["x25519", "mlkem768"])
def test_harness_with_one_of_two_keys_gets_nowhere(half: str) -> None:
    stranger = Private(b"s" * 32, b"s" * 64)
    thief = identity_of(evolve(STORY.harness, **{half: getattr(stranger, half)}))
    thief.public = PublicKey(*STORY.harness.public)
    harness, executor = Initiator(thief, EXECUTOR.public, PROLOGUE, b""), Responder(EXECUTOR, PROLOGUE)
    if half == "x25519":
        with pytest.raises(NoiseFailed):
            executor.read(harness.message1)
        return
    assert executor.read(harness.message1)[0] == thief.public  # nobody has asked for a proof of it yet
    with pytest.raises(NoiseFailed):
        harness.finish(executor.answer()[0])


@pytest.mark.parametrize("point", LOW_ORDER)
def test_x25519_key_of_low_order_is_refused_wherever_it_comes_from(point: bytes) -> None:
    bad, pair = PublicKey(point, HARNESS.public.mlkem768), Identity.generate()
    pair.public = bad
    with pytest.raises(NoiseFailed, match="X25519"):
        Initiator(HARNESS, bad, PROLOGUE, b"")
    with pytest.raises(NoiseFailed, match="X25519"):  # s
        Responder(EXECUTOR, PROLOGUE).read(Initiator(pair, EXECUTOR.public, PROLOGUE, b"").message1)
    ephemeral = Randomness(lambda: pair)
    with pytest.raises(NoiseFailed, match="X25519"):  # e of the first message
        Responder(EXECUTOR, PROLOGUE).read(
            Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b"", ephemeral).message1
        )
    harness, executor = (
        Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b""),
        Responder(EXECUTOR, PROLOGUE, ephemeral),
    )
    executor.read(harness.message1)
    with pytest.raises(NoiseFailed, match="X25519"):  # e of the second
        harness.finish(executor.answer()[0])


@pytest.mark.parametrize("key", [MALFORMED, b"", bytes(1183), bytes(1185)])
def test_malformed_mlkem_key_of_the_executor_is_refused(key: bytes) -> None:
    with pytest.raises(NoiseFailed, match="ML-KEM"):
        Initiator(HARNESS, PublicKey(EXECUTOR.public.x25519, key), PROLOGUE, b"")


@pytest.mark.parametrize("which", ["static", "ephemeral"])
def test_malformed_mlkem_key_of_a_harness_is_refused_before_anybody_is_asked(which: str) -> None:
    static, ephemeral = HARNESS, Identity.generate()
    if which == "static":
        static = Identity.generate()
        static.public = PublicKey(static.public.x25519, MALFORMED)
    else:
        ephemeral.public = PublicKey(ephemeral.public.x25519, MALFORMED)
    harness = Initiator(static, EXECUTOR.public, PROLOGUE, b"", Randomness(lambda: ephemeral))
    with pytest.raises(NoiseFailed, match="ML-KEM"):
        Responder(EXECUTOR, PROLOGUE).read(harness.message1)


def test_whatever_cryptography_says_of_a_ciphertext_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def decapsulate(self, ciphertext: bytes) -> bytes:
            raise RuntimeError("secret")

    executor = identity_of(STORY.executor)
    monkeypatch.setattr(executor, "_mlkem768", Failing())
    with pytest.raises(NoiseFailed, match="ciphertext is not usable") as caught:
        Responder(executor, TOLD.prologue).read(TOLD.message1)
    assert caught.value.__suppress_context__


def test_answer_with_a_payload_is_refused() -> None:
    told = Transcript(evolve(STORY, answer=b"codex-registry-authentication-rejected/v1")).run()
    with pytest.raises(NoiseFailed, match="payload"):
        initiator().finish(told.message2)


def test_authorization_has_a_limit_at_both_ends() -> None:
    with pytest.raises(NoiseFailed, match="4096"):
        Initiator(HARNESS, EXECUTOR.public, PROLOGUE, b"a" * 4097)
    told = Transcript(evolve(STORY, authorization=b"a" * 4097)).run()
    with pytest.raises(NoiseFailed, match="length"):
        responder().read(told.message1)


def test_handshake_goes_forward_only() -> None:
    harness, executor = initiator(), responder()
    with pytest.raises(NoiseFailed):
        executor.answer()
    executor.read(harness.message1)
    with pytest.raises(NoiseFailed, match="before"):
        executor.read(harness.message1)
    message2, _ = executor.answer()
    with pytest.raises(NoiseFailed):
        executor.answer()
    harness.finish(message2)
    with pytest.raises(NoiseFailed):
        harness.finish(message2)


def test_failed_handshake_has_no_second_try() -> None:
    harness, executor = initiator(), responder()
    with pytest.raises(NoiseFailed):
        executor.read(TOLD.message1[:-1])
    with pytest.raises(NoiseFailed):
        executor.read(TOLD.message1)
    with pytest.raises(NoiseFailed):
        executor.answer()
    with pytest.raises(NoiseFailed):
        harness.finish(TOLD.message2[:-1])
    with pytest.raises(NoiseFailed):
        harness.finish(TOLD.message2)


def test_handshake_takes_any_kind_of_bytes() -> None:
    executor = responder()
    executor.read(memoryview(TOLD.message1))
    initiator().finish(bytearray(executor.answer()[0]))


# Records.


def test_records_are_read_in_order_and_once() -> None:
    harness, executor = handshake()
    first, second = harness.encrypt(b"one"), harness.encrypt(b"two")
    assert (executor.decrypt(first), executor.decrypt(second)) == (b"one", b"two")
    with pytest.raises(NoiseFailed):
        executor.decrypt(second)


@pytest.mark.parametrize("wrong", ["changed", "cut", "empty", "own", "later", "long"])
def test_transport_is_over_after_a_record_that_is_not_the_next(wrong: str) -> None:
    harness, executor = handshake()
    good, later = harness.encrypt(b"one"), harness.encrypt(b"two")
    record = {
        "changed": bytes([good[0] ^ 1]) + good[1:],
        "cut": good[:-1],
        "empty": b"",
        "own": executor.encrypt(b"one"),
        "later": later,
        "long": bytes(65536),
    }[wrong]
    with pytest.raises(NoiseFailed, match="decrypted"):
        executor.decrypt(record)
    with pytest.raises(NoiseFailed, match="ended"):
        executor.decrypt(good)
    with pytest.raises(NoiseFailed, match="ended"):
        executor.encrypt(b"three")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_records_are_any_kind_of_bytes(kind: Callable[[bytes], Buffer]) -> None:
    harness, executor = handshake()
    assert executor.decrypt(kind(harness.encrypt(kind(b"one")))) == b"one"


def test_record_has_at_most_what_noise_allows() -> None:
    harness, executor = handshake()
    with pytest.raises(NoiseFailed):
        harness.encrypt(bytes(65520))
    assert executor.decrypt(harness.encrypt(bytes(65519))) == bytes(65519)
    assert executor.decrypt(harness.encrypt(b"")) == b""


def test_longer_record_is_refused_although_it_can_be_decrypted() -> None:
    to_executor, to_harness = TOLD.keys
    record = AESGCM(to_executor).encrypt(bytes(12), bytes(65520), b"")
    with pytest.raises(NoiseFailed, match="decrypted"):
        Transport(to_harness, to_executor).decrypt(record)


def test_stream_ends_before_a_counter_has_33_bits() -> None:
    harness, executor = handshake()
    harness._sent = executor._received = 2**32 - 2
    record = harness.encrypt(b"the last")
    assert executor.decrypt(record) == b"the last"
    for transport in (harness, executor):
        with pytest.raises(NoiseFailed, match="ended"):
            transport.encrypt(b"") if transport is harness else transport.decrypt(record)
    assert harness.decrypt(executor.encrypt(b"the other way")) == b"the other way"


# Messages in records.


def cut(*parts: Buffer) -> list[bytes]:
    return [bytes(record) for record in RecordWriter().records(*parts)]


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (1, [5]),
        (RECORD - 5, [RECORD - 1]),
        (RECORD - 4, [RECORD]),
        (RECORD - 3, [RECORD, 1]),
        (2 * RECORD - 4, [RECORD, RECORD]),
        (2 * RECORD - 3, [RECORD, RECORD, 1]),
        (266_707, [RECORD] * 4 + [266_711 - 4 * RECORD]),
    ],
)
def test_message_is_cut_at_60_kib(size: int, sizes: list[int]) -> None:
    message = bytes(range(251)) * (size // 251) + bytes(size % 251)
    records = cut(message)
    assert [len(record) for record in records] == sizes
    assert b"".join(records) == framed(message)
    reader = RecordReader()
    assert [reader.feed(record) for record in records] == [[]] * (len(records) - 1) + [[message]]


@repeatable
@given(
    parts=st.lists(
        st.integers(0, 200_000).map(bytes) | st.binary(max_size=50) | st.just(bytes(RECORD - 4)), max_size=6
    )
)
def test_parts_are_one_message(parts: list[bytes]) -> None:
    message = b"".join(parts)
    if not message:
        with pytest.raises(UsageError):
            cut(*parts)
        return
    records = cut(*parts)
    assert b"".join(records) == framed(message)
    assert {len(record) for record in records[:-1]} <= {RECORD}
    assert 0 < len(records[-1]) <= RECORD


def test_large_part_is_not_copied() -> None:
    part = bytes(8 * RECORD)
    tracemalloc.start()
    try:
        for record in RecordWriter().records(b"{", part, b"}"):
            assert len(record) <= RECORD
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * RECORD


@repeatable
@given(
    messages=st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    places=st.lists(st.integers(0, 2000), max_size=20),
)
def test_any_cut_gives_the_same_messages(messages: list[bytes], places: list[int]) -> None:
    stream = b"".join(map(framed, messages))
    edges = [0, *sorted(min(place, len(stream)) for place in places), len(stream)]
    reader = RecordReader()
    found = [message for start, end in pairwise(edges) for message in reader.feed(stream[start:end])]
    assert found == messages


@repeatable
@given(stream=st.binary(max_size=200), places=st.lists(st.integers(0, 200), max_size=10))
def test_reader_gives_messages_or_fails_whatever_arrives(stream: bytes, places: list[int]) -> None:
    edges = [0, *sorted(min(place, len(stream)) for place in places), len(stream)]
    reader = RecordReader()
    rest = stream
    try:
        for start, end in pairwise(edges):
            for message in reader.feed(memoryview(stream)[start:end]):
                assert rest.startswith(framed(message))
                rest = rest[4 + len(message) :]
    except NoiseFailed:
        while 0 < (length := int.from_bytes(rest[:4], "big")) <= len(rest) - 4:  # in the last record
            rest = rest[4 + length :]
        assert not 0 < length <= MAX_MESSAGE


def test_byte_by_byte() -> None:
    reader = RecordReader()
    found = [reader.feed(bytes([byte])) for byte in framed(b"ab") + framed(b"c")]
    assert found == [[], [], [], [], [], [b"ab"], [], [], [], [], [b"c"]]


@pytest.mark.parametrize("length", [0, MAX_MESSAGE + 1, 2**32 - 1])
def test_length_that_cannot_be_ends_the_stream(length: int) -> None:
    reader = RecordReader()
    with pytest.raises(NoiseFailed):
        reader.feed(framed(b"good") + length.to_bytes(4, "big"))
    with pytest.raises(NoiseFailed):
        reader.feed(framed(b"good"))


def test_record_above_60_kib_ends_the_stream() -> None:
    reader, message = RecordReader(), bytes(RECORD - 4)
    assert reader.feed(framed(message)) == [message]
    with pytest.raises(NoiseFailed):
        reader.feed(framed(message) + b"\0")
    with pytest.raises(NoiseFailed):
        reader.feed(framed(message))


def test_largest_message_goes_through_and_the_next_larger_does_not() -> None:
    part = bytes(MAX_MESSAGE // 64)
    reader = RecordReader()
    found = [message for record in RecordWriter().records(*[part] * 64) for message in reader.feed(record)]
    assert [len(message) for message in found] == [MAX_MESSAGE]
    with pytest.raises(MessageTooLong, match=str(MAX_MESSAGE + 1)):
        RecordWriter().records(*[part] * 64, b"1")


def test_memory_is_what_has_arrived_and_not_what_was_announced() -> None:
    readers = [RecordReader() for _ in range(20)]
    tracemalloc.start()
    try:
        for reader in readers:
            assert reader.feed(MAX_MESSAGE.to_bytes(4, "big") + bytes(1000)) == []
        for _ in range(1000):  # many small records must not cost more than their bytes either
            assert readers[0].feed(b"1") == []
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(held, peak) < 20 * 3000 + 10_000


# Keys, and where there are none.


def test_private_keys_are_not_shown_pickled_or_copied() -> None:
    private = Private(b"p" * 32, b"q" * 64)
    identity = identity_of(private)
    assert repr(identity) == f"<Identity {identity.public.fingerprint}>"
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="private keys"):
            take(identity)
    assert not hasattr(identity, "__dict__")


def test_generated_identities_differ_in_both_keys() -> None:
    one, other = Identity.generate().public, Identity.generate().public
    assert one.x25519 != other.x25519
    assert one.mlkem768 != other.mlkem768
    assert PublicKey.from_json(one.to_json()) == one


def test_there_is_noise_where_the_tests_run() -> None:
    assert noise_available() is None


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout


def test_importing_the_module_does_not_import_cryptography() -> None:
    assert run_python("import sys, execenv.relay.noise; print('cryptography' in sys.modules)") == "False\n"


@pytest.mark.parametrize("key", ["generate()", "from_private_bytes(bytes(32), bytes(64))"])
@pytest.mark.parametrize("missing", ["cryptography", "cryptography.hazmat.primitives.asymmetric.mlkem"])
def test_missing_library_is_told_with_the_first_key(missing: str, key: str) -> None:
    shown = run_python(
        f"""if True:
        import sys
        sys.modules[{missing!r}] = None
        from execenv.errors import UsageError
        from execenv.relay.noise import *
        print(noise_available())
        try:
            Identity.{key}
        except UsageError as error:
            print(error)
        """
    )
    reason, error = shown.splitlines()
    assert re.search(r"cryptography is (not installed|too old)", reason)
    assert error == f"{reason}: pip install 'execenv[noise]'"


def test_library_without_mlkem_is_told_with_the_first_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate() -> MLKEM768PrivateKey:
        raise UnsupportedAlgorithm("no")

    monkeypatch.setattr(MLKEM768PrivateKey, "generate", generate)
    with pytest.raises(UsageError, match=r"has no ML-KEM.*pip install 'execenv\[noise\]'"):
        Identity.generate()
