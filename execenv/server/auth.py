"""Who may open a websocket (protocol.md §1.2). Pure, apart from reading the files it is given.

Secrets come from files, never from the command line, and are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from pathlib import Path

from attrs import frozen

from execenv.errors import UsageError

MIN_SECRET = 32
CLOCK_SKEW = 30.0


class Unauthorized(Exception):
    """The text is the body of the 401."""


class Authenticator(ABC):
    @abstractmethod
    def check(self, token: str) -> None:
        """Accept a bearer token.

        Raises:
            Unauthorized: with the reason, never with the token.
        """

    def check_header(self, header: bytes | None) -> None:
        """Accept the value of an `Authorization` header.

        Raises:
            Unauthorized: if it is absent, of another scheme, or its token is not accepted.
        """
        if header is None:
            raise Unauthorized("missing websocket bearer token")
        scheme, _, token = header.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("invalid authorization header")
        self.check(token.strip())


@frozen
class CapabilityToken(Authenticator):
    """One token, known by its SHA-256."""

    digest: bytes

    def check(self, token: str) -> None:
        given = hashlib.sha256(token.encode("latin-1")).digest()  # the bytes of the header, as they came
        if not hmac.compare_digest(given, self.digest):
            raise Unauthorized("invalid websocket bearer token")

    @classmethod
    def from_file(cls, path: str) -> CapabilityToken:
        token = _read_secret(path, "--ws-token-file")
        if not token:
            raise UsageError(f"the token file {path} is empty")
        return cls(hashlib.sha256(token).digest())

    @classmethod
    def from_sha256(cls, text: str) -> CapabilityToken:
        try:
            digest = bytes.fromhex(text)
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise UsageError("--ws-token-sha256 takes 64 hexadecimal digits")
        return cls(digest)


@frozen
class SignedToken(Authenticator):
    """Any JWT that is signed (HS256) with a shared secret and has not expired."""

    secret: bytes
    issuer: str | None = None
    audience: str | None = None
    clock_skew: float = CLOCK_SKEW

    def check(self, token: str) -> None:
        import jwt

        try:
            jwt.decode(
                token,
                self.secret,
                algorithms=["HS256"],
                issuer=self.issuer,
                audience=self.audience,
                leeway=self.clock_skew,
                options={
                    "require": ["exp"],
                    "verify_aud": self.audience is not None,
                    "verify_iss": self.issuer is not None,
                    "verify_iat": False,
                    "verify_sub": False,
                    "verify_jti": False,
                },
            )
        except jwt.ExpiredSignatureError:
            raise Unauthorized("expired websocket jwt") from None
        except jwt.ImmatureSignatureError:
            raise Unauthorized("websocket jwt is not valid yet") from None
        except jwt.InvalidIssuerError:
            raise Unauthorized("websocket jwt issuer mismatch") from None
        except jwt.InvalidAudienceError:
            raise Unauthorized("websocket jwt audience mismatch") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthorized(_MISSING.get(error.claim, "invalid websocket jwt")) from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise Unauthorized("invalid websocket jwt") from None

    @classmethod
    def from_file(cls, path: str, issuer: str | None, audience: str | None, clock_skew: float) -> SignedToken:
        try:
            import jwt  # noqa: F401
        except ImportError:
            raise UsageError(
                "--ws-auth signed-bearer-token needs PyJWT: pip install 'execenv[jwt]'"
            ) from None
        secret = _read_secret(path, "--ws-shared-secret-file")
        if len(secret) < MIN_SECRET:
            raise UsageError(f"the shared secret in {path} must have at least {MIN_SECRET} bytes")
        return cls(secret, issuer, audience, clock_skew)


_MISSING = {"iss": "websocket jwt issuer mismatch", "aud": "websocket jwt audience mismatch"}


def _read_secret(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(f"cannot read {option} {path}: {error.strerror}") from error


def authenticator(
    mode: str | None,
    *,
    token_file: str | None = None,
    token_sha256: str | None = None,
    shared_secret_file: str | None = None,
    issuer: str | None = None,
    audience: str | None = None,
    clock_skew: float | None = None,
) -> Authenticator | None:
    """What the `--ws-*` options ask for; `None` without any.

    Raises:
        UsageError: if they do not fit together, or a file cannot be used.
    """
    capability = {"--ws-token-file": token_file, "--ws-token-sha256": token_sha256}
    signed = {
        "--ws-shared-secret-file": shared_secret_file,
        "--ws-issuer": issuer,
        "--ws-audience": audience,
        "--ws-max-clock-skew-seconds": clock_skew,
    }
    foreign = signed if mode == "capability-token" else capability
    if mode is None:
        foreign = {**capability, **signed}
    for option, value in foreign.items():
        if value is not None:
            wanted = "signed-bearer-token" if option in signed else "capability-token"
            raise UsageError(f"{option} needs --ws-auth {wanted}")
    if mode is None:
        return None
    if mode == "capability-token":
        if (token_file is None) == (token_sha256 is None):
            raise UsageError(
                "--ws-auth capability-token needs exactly one of --ws-token-file and --ws-token-sha256"
            )
        return (
            CapabilityToken.from_file(token_file)
            if token_file
            else CapabilityToken.from_sha256(token_sha256 or "")
        )
    if shared_secret_file is None:
        raise UsageError("--ws-auth signed-bearer-token needs --ws-shared-secret-file")
    return SignedToken.from_file(
        shared_secret_file, issuer, audience, CLOCK_SKEW if clock_skew is None else clock_skew
    )
