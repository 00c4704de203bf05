"""The registry, as an executor and a harness ask it over HTTP (relay.md §1)."""

from __future__ import annotations

from attrs import field, frozen

from execenv.errors import ConnectFailed
from execenv.relay.keys import PublicKey

NOISE_PROFILE = "noise_hybrid_ik_v1"


class RegistryFailed(ConnectFailed):
    """The registry could not be asked, or did not give what it was asked for.

    `retryable` is for a harness (§1.4, "Harness side"); an executor goes by `status` and `code`.

    Attributes:
        status: of its HTTP answer; `None` if there was none, or if the answer itself makes no sense.
        code: the error code in the answer's body; `None` without one.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, retryable: bool
    ) -> None:
        super().__init__(message, retryable=retryable)
        self.status = status
        self.code = code


@frozen
class Registration:
    """What an executor got for registering.

    Attributes:
        url: where to connect to; a secret, as it may be signed.
        registration_id: `None` for clear text.
    """

    environment_id: str
    url: str = field(repr=False)
    registration_id: str | None


@frozen
class Bundle:
    """What a harness got to reach an executor with, once: its parts are never mixed with those of another.

    Attributes:
        url: where to connect to; a secret, as it may be signed.
        registration_id, executor_key, authorization: `None` for clear text.
    """

    environment_id: str
    url: str = field(repr=False)
    registration_id: str | None
    executor_key: PublicKey | None
    authorization: str | None = field(repr=False)
