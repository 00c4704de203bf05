"""The harness's end of a relay: how the channel to an environment behind one is opened."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from execenv.errors import ConnectFailed
from execenv.targets import RelayTarget, WebsocketTarget, shown_registry, shown_url
from execenv.transports.channel import Channel


class RelayDialer:
    """Opens channels to one environment behind a relay.

    Attributes:
        name: of the environment, for messages.
    """

    def __init__(self, target: RelayTarget, recovery: float) -> None:
        self.name = f"relay {shown_registry(target.registry)}/{target.environment_id}"

    def dial(self) -> AbstractAsyncContextManager[Channel]:
        raise ConnectFailed(f"{self.name} cannot be reached: this version has no harness")


def dial_clear(target: WebsocketTarget) -> AbstractAsyncContextManager[Channel]:
    """A channel by the clear-text form, in which the websocket of a harness is named by its URL."""
    raise ConnectFailed(f"relay {shown_url(target.url)} cannot be reached: this version has no harness")
