"""Noise between a harness and an executor: the hybrid IK handshake, its records, and messages in them
(relay.md §5).

Machine: no I/O. `cryptography` is imported with the first key. A harness is the initiator:

    initiator = Initiator(identity, bundle.executor_key, prologue(...), authorization)
    transport = initiator.finish(answer to initiator.message1)
    for record in RecordWriter().records(message):
        ciphertext = transport.encrypt(record)

and an executor the responder, which looks at who it is before it answers:

    responder = Responder(identity, prologue(...))
    harness_key, authorization = responder.read(message1)
    message2, transport = responder.answer()

No text of an exception has anything of a key, a message or a payload in it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from attrs import frozen

from execenv.errors import UsageError
from execenv.relay.keys import MLKEM768_BYTES, X25519_BYTES, PublicKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NAME = b"Noise_hybridIK_25519+MLKEM768_AESGCM_SHA256"
"""What is hashed. Not the suite of a key object, which says X25519."""
PROLOGUE = "codex-exec-server-relay-noise/v1"
TAG = 16
CIPHERTEXT = 1088  # of ML-KEM-768
MAX_NOISE_MESSAGE = 65535
MAX_AUTHORIZATION = 4096
"""The longest authorization that an executor takes, in bytes."""
MESSAGE1_BYTES = CIPHERTEXT + 2 * (X25519_BYTES + MLKEM768_BYTES) + 3 * TAG
"""Of a first message without its authorization."""
MESSAGE2_BYTES = 2 * CIPHERTEXT + X25519_BYTES + MLKEM768_BYTES + 2 * TAG
MAX_RECORDS = 2**32 - 1
"""Per direction; there are no new keys after that."""
RECORD = 60 * 1024
"""The most plaintext in a record, in bytes."""
MAX_MESSAGE = 64 * 1024 * 1024

Buffer: TypeAlias = bytes | bytearray | memoryview


class NoiseFailed(Exception):
    """The handshake or a record is not what it should be, or the transport has ended: the stream is over."""


class MessageTooLong(Exception):
    """A message to be sent is longer than `MAX_MESSAGE`. Nothing of it was cut into records."""


def noise_available() -> str | None:
    """Why there can be no Noise here; `None` if there can, which is tried."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
    except ImportError:
        return "cryptography is not installed"
    try:
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        X25519PrivateKey.generate()
        MLKEM768PrivateKey.generate()
    except ImportError:
        return "cryptography is too old, it knows no ML-KEM"
    except UnsupportedAlgorithm:
        return "cryptography has no ML-KEM, as the OpenSSL that it was built with has none"
    return None


@contextmanager
def _failing(text: str) -> Iterator[None]:
    """Whatever cryptography has against what arrived is a `NoiseFailed`; its own texts may quote."""
    try:
        yield
    except Exception:
        raise NoiseFailed(text) from None


class Identity:
    """The private keys of one end; of these `public` alone is ever shown, and nothing can pickle them."""

    __slots__ = ("_mlkem768", "_x25519", "public")

    def __init__(self, x25519: X25519PrivateKey, mlkem768: MLKEM768PrivateKey) -> None:
        self._x25519 = x25519
        self._mlkem768 = mlkem768
        self.public = PublicKey(
            x25519.public_key().public_bytes_raw(), mlkem768.public_key().public_bytes_raw()
        )

    @classmethod
    def generate(cls) -> Identity:
        """New keys.

        Raises:
            UsageError: if there can be no Noise here.
        """
        _require()
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(X25519PrivateKey.generate(), MLKEM768PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, x25519: bytes, mlkem768: bytes) -> Identity:
        """The keys with these 32 private bytes and this seed of 64, for known answers.

        Raises:
            UsageError: if there can be no Noise here.
        """
        _require()
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(X25519PrivateKey.from_private_bytes(x25519), MLKEM768PrivateKey.from_seed_bytes(mlkem768))

    def __repr__(self) -> str:
        return f"<Identity {self.public.fingerprint}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("private keys are not pickled and not copied")

    def _exchange(self, public: bytes) -> bytes:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        with _failing("an X25519 public key is not usable"):  # of low order, that is
            return self._x25519.exchange(X25519PublicKey.from_public_bytes(public))

    def _decapsulate(self, ciphertext: bytes) -> bytes:
        with _failing("an ML-KEM ciphertext is not usable"):
            return self._mlkem768.decapsulate(ciphertext)


def _require() -> None:
    if reason := noise_available():
        raise UsageError(f"{reason}: pip install 'execenv[noise]'")


def _system_encapsulate(key: MLKEM768PublicKey) -> tuple[bytes, bytes]:
    return key.encapsulate()


@frozen
class Randomness:
    """What of a handshake is drawn by lot. For known answers; everybody else takes `SYSTEM`.

    Attributes:
        ephemeral: a pair of keys for this handshake only.
        encapsulate: a new secret and its ciphertext for the owner of a key.
    """

    ephemeral: Callable[[], Identity] = Identity.generate
    encapsulate: Callable[[MLKEM768PublicKey], tuple[bytes, bytes]] = _system_encapsulate


SYSTEM = Randomness()


def prologue(environment_id: str, registration_id: str, stream_id: str) -> bytes:
    """What both ends must agree on before they say anything (relay.md §5.2)."""
    parts = [part.encode() for part in (PROLOGUE, environment_id, registration_id, stream_id)]
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


class Initiator:
    """The harness's side of one handshake.

    Args:
        responder: the executor's keys as the registry gave them; nobody else can answer.
        authorization: what the registry gave with them.

    Attributes:
        message1: to be sent first.

    Raises:
        NoiseFailed: if a key of the responder is malformed, or the authorization too long for an executor.
    """

    def __init__(
        self,
        identity: Identity,
        responder: PublicKey,
        prologue: bytes,
        authorization: bytes,
        randomness: Randomness = SYSTEM,
    ) -> None:
        if len(authorization) > MAX_AUTHORIZATION:
            raise NoiseFailed(f"the authorization is longer than {MAX_AUTHORIZATION} bytes")
        self._identity = identity
        ephemeral = randomness.ephemeral()
        state = _Symmetric(prologue, responder)
        secret, ciphertext = _encapsulate(randomness, responder.mlkem768)
        message = [state.encrypt(ciphertext)]  # skem
        state.mix_key_and_hash(secret)
        message += state.mix_public(ephemeral.public)  # e
        state.mix_key(ephemeral._exchange(responder.x25519))  # es
        message += [state.encrypt(identity.public.x25519), state.encrypt(identity.public.mlkem768)]  # s
        state.mix_key(identity._exchange(responder.x25519))  # ss
        message.append(state.encrypt(authorization))
        self.message1 = b"".join(message)
        self._unfinished: tuple[_Symmetric, Identity] | None = (state, ephemeral)

    def finish(self, message2: Buffer) -> Transport:
        """What the executor's answer leads to.

        Raises:
            NoiseFailed: if it is none, of somebody else, or says more than it may. There is no second try.
        """
        if self._unfinished is None:
            raise NoiseFailed("the handshake is over")
        (state, ephemeral), self._unfinished = self._unfinished, None
        if not MESSAGE2_BYTES <= len(message2) <= MAX_NOISE_MESSAGE:
            raise NoiseFailed("the second message of the handshake has the wrong length")
        message = _Cursor(message2)
        ciphertext = message.take(CIPHERTEXT)  # ekem
        state.mix_hash(ciphertext)
        state.mix_key(ephemeral._decapsulate(ciphertext))
        ciphertext = state.decrypt(message.take(CIPHERTEXT + TAG))  # skem
        state.mix_key_and_hash(self._identity._decapsulate(ciphertext))
        theirs = PublicKey(message.take(X25519_BYTES), message.take(MLKEM768_BYTES))  # e
        state.mix_public(theirs)
        state.mix_key(ephemeral._exchange(theirs.x25519))  # ee
        state.mix_key(self._identity._exchange(theirs.x25519))  # se
        if state.decrypt(message.rest()):
            raise NoiseFailed("the second message of the handshake has a payload")
        to_responder, to_initiator = state.split()
        return Transport(to_responder, to_initiator)


class Responder:
    """The executor's side of one handshake."""

    def __init__(self, identity: Identity, prologue: bytes, randomness: Randomness = SYSTEM) -> None:
        self._identity = identity
        self._randomness = randomness
        self._unread: _Symmetric | None = _Symmetric(prologue, identity.public)
        self._read: tuple[_Symmetric, PublicKey, PublicKey] | None = None

    def read(self, message1: Buffer) -> tuple[PublicKey, bytes]:
        """The keys and the authorization of who sent this, to be asked about before `answer`. The
        authorization may be anything, and a message that was sent before is not found out.

        Raises:
            NoiseFailed: if it is no first message, or not for this identity and prologue. There is no second
                try.
        """
        state, self._unread = self._unread, None
        if state is None:
            raise NoiseFailed("the first message of the handshake was there before")
        if not MESSAGE1_BYTES <= len(message1) <= MESSAGE1_BYTES + MAX_AUTHORIZATION:
            raise NoiseFailed("the first message of the handshake has the wrong length")
        message, identity = _Cursor(message1), self._identity
        ciphertext = state.decrypt(message.take(CIPHERTEXT))  # skem
        state.mix_key_and_hash(identity._decapsulate(ciphertext))
        ephemeral = PublicKey(message.take(X25519_BYTES), message.take(MLKEM768_BYTES))  # e
        state.mix_public(ephemeral)
        state.mix_key(identity._exchange(ephemeral.x25519))  # es
        static = PublicKey(  # s
            state.decrypt(message.take(X25519_BYTES + TAG)), state.decrypt(message.take(MLKEM768_BYTES + TAG))
        )
        state.mix_key(identity._exchange(static.x25519))  # ss
        authorization = state.decrypt(message.rest())
        for key in (ephemeral, static):  # now, and not when the registry has been asked about them
            _mlkem768(key.mlkem768)
        self._read = (state, ephemeral, static)
        return static, authorization

    def answer(self) -> tuple[bytes, Transport]:
        """The second message, for whoever sent the first, and what it leads to.

        Raises:
            NoiseFailed: if there is nothing to answer.
        """
        if self._read is None:
            raise NoiseFailed("there is no first message of a handshake to answer")
        (state, ephemeral, static), self._read = self._read, None
        ours = self._randomness.ephemeral()
        secret, ciphertext = _encapsulate(self._randomness, ephemeral.mlkem768)
        message = [ciphertext]  # ekem
        state.mix_hash(ciphertext)
        state.mix_key(secret)
        secret, ciphertext = _encapsulate(self._randomness, static.mlkem768)
        message.append(state.encrypt(ciphertext))  # skem
        state.mix_key_and_hash(secret)
        message += state.mix_public(ours.public)  # e
        state.mix_key(ours._exchange(ephemeral.x25519))  # ee
        state.mix_key(ours._exchange(static.x25519))  # se
        message.append(state.encrypt(b""))
        to_responder, to_initiator = state.split()
        return b"".join(message), Transport(to_initiator, to_responder)


class Transport:
    """The records of a stream after its handshake, each way in the order of `encrypt` and of `decrypt`."""

    __slots__ = ("_failed", "_received", "_receiving", "_sending", "_sent")

    def __init__(self, sending_key: bytes, receiving_key: bytes) -> None:
        self._sending = _cipher(sending_key)
        self._receiving = _cipher(receiving_key)
        self._sent = 0
        self._received = 0
        self._failed = False

    def encrypt(self, plaintext: Buffer) -> bytes:
        """The next record to be sent, 16 bytes longer than `plaintext`. It must arrive, and once only.

        Raises:
            NoiseFailed: if no more can be sent, or not so much in one record.
        """
        counter = self._sent
        if self._failed or counter >= MAX_RECORDS:
            raise NoiseFailed("the encrypted stream has ended")
        if len(plaintext) > MAX_NOISE_MESSAGE - TAG:
            raise NoiseFailed("a record to be sent is too long")
        self._sent = counter + 1
        return self._sending.encrypt(counter.to_bytes(12, "big"), plaintext, None)

    def decrypt(self, ciphertext: Buffer) -> bytes:
        """What is in the next record that was received.

        Raises:
            NoiseFailed: if it is not the next one of the peer; nothing can be sent or received then.
        """
        counter = self._received
        if self._failed or counter >= MAX_RECORDS:
            raise NoiseFailed("the encrypted stream has ended")
        self._received = counter + 1
        try:
            if len(ciphertext) <= MAX_NOISE_MESSAGE:
                return self._receiving.decrypt(counter.to_bytes(12, "big"), ciphertext, None)
        except Exception:  # noqa: S110 - said below
            pass
        self._failed = True
        raise NoiseFailed("a record cannot be decrypted") from None


class RecordWriter:
    """Cuts messages into the plaintext of records."""

    def records(self, *parts: Buffer) -> Iterator[Buffer]:
        """The records of one message, whose bytes are all `parts` in a row. They may be views of these.

        Raises:
            MessageTooLong: at once, not with the first record.
            UsageError: if the message is empty, which no receiver takes.
        """
        length = sum(map(len, parts))
        if not length:
            raise UsageError("an empty message cannot be sent; give records() at least one byte")
        if length > MAX_MESSAGE:
            raise MessageTooLong(f"a message has {length} bytes, and {MAX_MESSAGE} is the most")
        return _cut((length.to_bytes(4, "big"), *parts), length + 4)


def _cut(parts: tuple[Buffer, ...], length: int) -> Iterator[Buffer]:
    if length <= RECORD:
        yield b"".join(parts)
        return
    gathered: list[Buffer] = []
    room = RECORD
    for part in parts:
        view, start = memoryview(part), 0
        while len(view) - start >= room:
            piece = view[start : start + room]
            start += room
            yield b"".join((*gathered, piece)) if gathered else piece
            gathered, room = [], RECORD
        if start < len(view):
            gathered.append(view[start:])
            room -= len(view) - start
    if gathered:
        yield b"".join(gathered)


class RecordReader:
    """Puts the messages together again, however their bytes were cut. Holds no more than has arrived."""

    def __init__(self) -> None:
        self._length = b""  # as much of it as is there
        self._missing = 0  # bytes of the message that has begun
        self._message = BytesIO()  # unlike a bytearray, it gives its bytes without another copy
        self._failed = False

    def feed(self, plaintext: Buffer) -> list[bytes]:
        """The messages that this record completes, in order.

        Raises:
            NoiseFailed: if the record is too long, or a message in it cannot be; what else it has is lost.
        """
        if self._failed:
            raise NoiseFailed("the encrypted stream has ended")
        if len(plaintext) > RECORD:
            self._failed = True
            raise NoiseFailed(f"a record has more than {RECORD} bytes of plaintext")
        messages: list[bytes] = []
        view, start, end = memoryview(plaintext), 0, len(plaintext)
        while start < end:
            if self._missing:
                piece = view[start : start + self._missing]
                self._message.write(piece)
                self._missing -= len(piece)
                start += len(piece)
                if not self._missing:
                    messages.append(self._message.getvalue())
                    self._message = BytesIO()
                continue
            piece = view[start : start + 4 - len(self._length)]
            start += len(piece)
            self._length += piece
            if len(self._length) < 4:
                break
            length, self._length = int.from_bytes(self._length, "big"), b""
            if not 0 < length <= MAX_MESSAGE:
                self._failed = True
                raise NoiseFailed("the length of a message is 0, or more than a message can have")
            if length <= end - start:
                messages.append(bytes(view[start : start + length]))
                start += length
            else:
                self._missing = length
        return messages


class _Symmetric:
    """Noise's SymmetricState and CipherState: the transcript so far, and the keys that follow from it."""

    def __init__(self, prologue: bytes, responder: PublicKey) -> None:
        self._hash = self._chaining_key = sha256(NAME).digest()  # the name is longer than a hash
        self._cipher: AESGCM | None = None
        self._counter = 0
        self.mix_hash(prologue)
        self.mix_public(responder)

    def mix_hash(self, data: bytes) -> None:
        self._hash = sha256(self._hash + data).digest()

    def mix_public(self, key: PublicKey) -> tuple[bytes, bytes]:
        """Mixes both keys in, and gives them as they are sent."""
        self.mix_hash(key.x25519)
        self.mix_hash(key.mlkem768)
        return key.x25519, key.mlkem768

    def mix_key(self, secret: bytes) -> None:
        self._chaining_key, key, _ = _hkdf(self._chaining_key, secret)
        self._cipher, self._counter = _cipher(key), 0

    def mix_key_and_hash(self, secret: bytes) -> None:
        self._chaining_key, hashed, key = _hkdf(self._chaining_key, secret)
        self.mix_hash(hashed)
        self._cipher, self._counter = _cipher(key), 0

    def encrypt(self, plaintext: bytes) -> bytes:
        ciphertext = plaintext
        if self._cipher is not None:
            ciphertext = self._cipher.encrypt(self._nonce(), plaintext, self._hash)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt(self, ciphertext: bytes) -> bytes:
        plaintext = ciphertext
        if self._cipher is not None:
            with _failing("a message of the handshake cannot be decrypted"):
                plaintext = self._cipher.decrypt(self._nonce(), ciphertext, self._hash)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        """The keys for records of the initiator, and of the responder."""
        to_responder, to_initiator, _ = _hkdf(self._chaining_key, b"")
        return to_responder, to_initiator

    def _nonce(self) -> bytes:
        self._counter += 1
        return (self._counter - 1).to_bytes(12, "big")


def _hkdf(chaining_key: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Noise's HKDF with three outputs. That with two has the first two of them."""
    key = hmac.digest(chaining_key, data, "sha256")
    first = hmac.digest(key, b"\x01", "sha256")
    second = hmac.digest(key, first + b"\x02", "sha256")
    return first, second, hmac.digest(key, second + b"\x03", "sha256")


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _mlkem768(public: bytes) -> MLKEM768PublicKey:
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey

    with _failing("an ML-KEM public key is malformed"):
        return MLKEM768PublicKey.from_public_bytes(public)


def _encapsulate(randomness: Randomness, public: bytes) -> tuple[bytes, bytes]:
    return randomness.encapsulate(_mlkem768(public))


class _Cursor:
    """Takes a message apart from its beginning. Its length was looked at before."""

    def __init__(self, message: Buffer) -> None:
        self._message = bytes(message)
        self._position = 0

    def take(self, size: int) -> bytes:
        start, self._position = self._position, self._position + size
        return self._message[start : self._position]

    def rest(self) -> bytes:
        return self._message[self._position :]
