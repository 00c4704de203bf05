"""Every limit of a relay, in one value. Seconds are floats; sizes are bytes."""

from __future__ import annotations

from attrs import frozen

from execenv.transports.channel import DEFAULT_MAX_MESSAGE


@frozen
class Settings:
    """How a relay behaves.

    Attributes:
        public_url: where it is reached from outside, `http://` or `https://`; what it gives URLs from.
        require_noise: executors that take clear text are refused.
        executor_url_ttl: seconds that an executor may use its URL, as often as it likes.
        harness_url_ttl: seconds that a harness may use its URL, once.
        authorization_ttl: seconds until an authorisation has to be validated.
        public_metrics: /metrics is for everybody, and not only for this machine.
        handshake_deadline: seconds for a client to say what it wants, and for the answer to be known.
        max_pending: connections that have not said yet what they want, and are listened to.
        max_waiting: connections that are not listened to yet. Refused is who comes then: a released executor
            whose registration is refused ends, so it had better wait.
        max_silence: seconds for a client to say what it wants, while others wait.
        max_body: of a request.
        max_sockets: websockets of this node.
        max_environment_harnesses, max_token_harnesses: harness sockets of this node for one environment, and
            opened with one token.
        max_harness_streams: of one harness socket.
        max_remembered_streams: whose owner an executor's socket knows, beside those in use.
        max_noise_frame, max_clear_frame: the largest frame, by what the executor has registered for.
        harness_queue: what may wait for a harness that reads slowly before its executor is held up.
        node_queue: the same, for all harnesses of this node together.
        node_unfinished: of frames whose end has not arrived, for all sockets of this node together. Who then
            sends more of one is cut.
        patience: seconds that an executor may be held up by one harness, before that is cut.
        token_rate, token_burst: requests with a token for an environment, per second and at once. Not with a
            token for all of them together: after a restart of the relay all executors come at once, and a
            released one that is told 429 when it registers ends (relay.md §1.4).
        failure_rate, failure_burst: failed authentications of an address, per second and at once.
        max_buckets: such pairs, and addresses, that are counted, each.
        sweep_interval: seconds between two looks at which tokens still hold.
        ping_interval, pong_timeout: see `WebsocketChannel`.
    """

    public_url: str
    require_noise: bool = False
    executor_url_ttl: float = 900.0
    harness_url_ttl: float = 60.0
    authorization_ttl: float = 60.0
    public_metrics: bool = False
    handshake_deadline: float = 10.0
    max_pending: int = 1024
    max_waiting: int = 8192
    max_silence: float = 1.0
    max_body: int = 32 * 1024
    max_sockets: int = 20_000
    max_environment_harnesses: int = 128
    max_token_harnesses: int = 1024
    max_harness_streams: int = 16
    max_remembered_streams: int = 4096
    max_noise_frame: int = 128 * 1024
    max_clear_frame: int = DEFAULT_MAX_MESSAGE + 64 * 1024
    harness_queue: int = 16 * 1024 * 1024
    node_queue: int = 512 * 1024 * 1024
    node_unfinished: int = 256 * 1024 * 1024
    patience: float = 10.0
    token_rate: float = 10.0
    token_burst: float = 200.0
    failure_rate: float = 1.0
    failure_burst: float = 20.0
    max_buckets: int = 20_000
    sweep_interval: float = 2.0
    ping_interval: float = 30.0
    pong_timeout: float = 60.0

    def rendezvous_url(self, environment_id: str, query: str) -> str:
        """The URL of a websocket here."""
        base = "ws" + self.public_url.removeprefix("http").rstrip("/")
        return f"{base}/rendezvous/{environment_id}?{query}"
