"""The harness's end of a relay: one stream, over one websocket after the other (relay.md §4.2, 4.4)."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from logging import getLogger

import trio

from execenv._service import open_nursery
from execenv.errors import ConnectFailed
from execenv.relay.frames import Data, Frame, Handshake, InvalidFrame, Resume
from execenv.relay.keys import PublicKey
from execenv.relay.noise import Identity, Initiator, NoiseFailed, prologue
from execenv.relay.registry import Bundle, Registry, RegistryFailed, open_registry, registry_pause
from execenv.relay.reliable import STALL, Reliable, StreamBroken, Window
from execenv.relay.streams import Cipher, RelaySocket, RelayStream
from execenv.targets import RelayTarget, WebsocketTarget, shown_registry, shown_url
from execenv.transports import websocket
from execenv.transports.channel import Channel
from execenv.transports.websocket import HandshakeRefused, Headers, WebsocketChannel

logger = getLogger(__name__)

RESUME_TIMEOUT = 10.0
"""Seconds for the executor to say, over a new socket, what it has."""
RESUME_DEADLINE = 25.0
"""Seconds after which a stream is given up. The executor waits longer: `executor.STREAM_TTL`."""
STEADY = 1.0
"""Seconds that a socket has to last for the next one to be made at once."""
MAX_FRAME = 128 * 1024
"""Bytes of a frame, where its payload is Noise: 65,535 at most."""

BURST = 64
"""Messages that a released executor is sent without a sign that it has taken some. It keeps 128 of a stream
that it has not come to (relay.md §4.7), and ends the stream that has sent one more."""
BURST_PAUSE = 0.25
"""Seconds after which it has taken them in any case: some requests are answered late, and some messages are
none."""

OpenSocket = Callable[[], Awaitable[Channel]]
"""Opens a websocket for the stream, with whatever is fresh for it. Raises ConnectFailed."""


class HarnessStream(RelayStream):
    """A stream as the harness has it.

    Args:
        first: the socket that it begins with.
        again: opens a further one.
        initiator: of the Noise handshake; `None` for clear text.
        deadline: seconds that a lost socket is replaced for; 0 for not at all.
    """

    def __init__(
        self,
        stream_id: str,
        label: str,
        first: Channel,
        again: OpenSocket,
        *,
        initiator: Initiator | None,
        identity: bytes | None,
        deadline: float,
    ) -> None:
        super().__init__(stream_id, label, max_message=math.inf)
        self.identity = identity
        self._again = again
        self._initiator = initiator
        self._deadline_of_recovery = min(deadline, RESUME_DEADLINE)
        self._resumed = trio.Event()
        self._ran = False
        self._running: RelaySocket | None = None
        self._agreed = False  # whether the other end acknowledges and resumes too
        self._burst = 0  # messages that were sent and may not have been taken
        self._burst_until = math.inf
        self.socket = RelaySocket(first)
        self._send_control(Resume(0, reliability=1))
        if initiator is None:
            self._open = True
            # Until the other end says that it acknowledges too, in case it does.
            self._reliable = Reliable()
        else:
            self._send_control(Handshake(initiator.message1))

    @property
    def _encrypts(self) -> bool:
        return self._initiator is not None or self._cipher is not None

    async def run(self, receive: Callable[[bytes], None]) -> None:
        async with open_nursery() as nursery:
            self._ran = True
            nursery.start_soon(self._keep_sockets)
            await super().run(receive)
            if self._running is not None:
                self._running.channel.close_nowait()  # behind what was sent
            else:
                nursery.cancel_scope.cancel()

    async def discard(self) -> None:
        """Close the socket of a stream that was never run; nothing of any other."""
        if not self._ran and self.socket is not None:
            await _discard(self.socket.channel)

    # Sockets.

    async def _keep_sockets(self) -> None:
        socket = self.socket
        assert socket is not None
        tries = 0
        while True:
            self._running = socket
            began = trio.current_time()
            had = 0 if self._reliable is None else self._reliable.ack
            async with open_nursery() as nursery:
                if self.interrupted:
                    nursery.start_soon(self._expect_resume, socket.channel)
                await socket.run(self._frame_received, self._invalid)
                nursery.cancel_scope.cancel()
            self._running = None
            self.detach()
            if self._closed or self._ending:
                return
            loss = socket.channel.loss or "the relay closed the connection"
            if not self._may_resume:
                self.end(loss)
                return
            self._interrupt(loss)
            if trio.current_time() - began > STEADY:
                tries = 0
            elif self._reliable is not None and self._reliable.ack != had:
                tries = min(tries, 1)  # one that was of use, if not for long, is worth another one soon
            opened = await self._open_again(tries)
            if opened is None:
                return
            tries += 1
            socket = RelaySocket(opened)
            self.attach(socket)
            self._resumed = trio.Event()
            self._ask()

    @property
    def _may_resume(self) -> bool:
        return (
            self._agreed
            and self._deadline_of_recovery > 0
            and self._reliable is not None
            and self._reliable.ack > 0  # otherwise nothing tells it from a stream that begins
        )

    async def _open_again(self, tries: int) -> Channel | None:
        """The next socket; `None` if the stream is over."""
        loss = self.interrupted
        last: Exception | None = None
        with trio.move_on_at(self._give_up_at):
            while not self._ending:
                if tries:
                    await trio.sleep(registry_pause(tries - 1))
                tries += 1
                try:
                    return await self._again()
                except ConnectFailed as error:
                    logger.debug("%s: %s", self.label, error)
                    last = error
                    if not error.retryable:
                        break
        self.end(f"{loss}; the stream could not be resumed{f': {last}' if last else ''}")
        return None

    async def _expect_resume(self, channel: Channel) -> None:
        asked = trio.current_time()
        with trio.move_on_at(min(asked + RESUME_TIMEOUT, self._give_up_at)):
            await self._resumed.wait()
            return
        seconds = trio.current_time() - asked
        channel.loss = f"the executor did not resume the stream within {seconds:.3g} s"
        if trio.current_time() >= self._give_up_at:
            self.end(f"{self.interrupted}; the stream could not be resumed: {channel.loss}")
        channel.close_nowait()

    @property
    def _give_up_at(self) -> float:
        return self.interrupted_at + self._deadline_of_recovery

    # Frames.

    def _frame_received(self, frame: Frame) -> None:
        if frame.stream_id == self.stream_id:
            if self._reliable is not None and not self._agreed and type(frame.body) is Data:
                # It has said nothing of acknowledging before it said anything else.
                self._seq = self._reliable.next_seq
                self._reliable = None
            self.receive_frame(frame)

    def _invalid(self, error: InvalidFrame) -> None:
        if error.stream_id in ("", self.stream_id):
            self._break(f"relay exec-server transport expects binary protobuf frames: {error}")

    def _resume(self, resume: Resume) -> None:
        if not resume.reliability:
            return
        if not self._agreed:
            if self._initiator is not None:
                self._reliable = Reliable()
            elif self._cipher is not None or self._reliable is None:
                return  # it said so too late
            else:
                self._segments = True
            self._agreed = True
            return
        if self._initiator is not None:
            return  # nothing was sent that could be resumed: somebody on the way would open the stream early
        super()._resume(resume)
        self._resumed.set()

    def _handshake(self, payload: bytes) -> None:
        if self._initiator is None:
            if self._cipher is not None:
                raise StreamBroken("a second handshake")
            return
        try:
            transport = self._initiator.finish(payload)
        except NoiseFailed as error:
            raise StreamBroken(f"the Noise handshake failed: {error}") from error
        self._cipher = Cipher(transport)
        self._initiator = None
        if self._reliable is None:
            self._window = Window()
        self._open = True
        self._send_more()

    def _data(self, data: Data) -> None:
        if self._initiator is not None:
            raise StreamBroken("data came before the handshake was done")
        super()._data(data)

    def _stalled(self) -> None:
        if self._asked and self._running is not None:
            # Asked before, and nothing came: what is between loses frames without an end of its socket.
            channel = self._running.channel
            channel.loss = f"nothing was acknowledged within {2 * STALL:g} s"
            channel.close_nowait()
        else:
            super()._stalled()

    # Bursts. An end that acknowledges holds us back by that.

    def _must_wait(self) -> bool:
        if self._burst < BURST or self._reliable is not None:
            return False
        if self._burst_until == math.inf:
            self._burst_until = trio.current_time() + BURST_PAUSE
            self._note_deadline()
        return True

    def _cut(self, parts: tuple[bytes, ...]) -> Iterator[tuple[bytes, int, int]]:
        if self._reliable is None:
            self._burst += 1
        return super()._cut(parts)

    def _deliver(self, message: bytes) -> None:
        if self._burst and not message.startswith(b'{"method"'):  # an answer
            self._set_burst(self._burst - 1)
        super()._deliver(message)

    def _set_burst(self, burst: int) -> None:
        held, self._burst = self._burst >= BURST, burst
        self._burst_until = math.inf
        if held:
            self._send_more()

    def _deadline(self) -> float:
        return min(super()._deadline(), self._burst_until)

    def _look_at_the_clock(self, now: float) -> None:
        if self._burst_until <= now:
            self._set_burst(0)
        else:
            super()._look_at_the_clock(now)

    def _reset(self, reason: str) -> None:
        # Of Noise the peer's text is not shown: anybody on the way could have written it (§4.4).
        self.end("Noise relay stream reset" if self._encrypts else f"relay stream reset: {reason}")

    def _break(self, reason: str) -> None:
        self.end(reason)


class RelayDialer:
    """Opens streams to an environment that a registry knows.

    Args:
        recovery: seconds that a lost socket is replaced for, before the stream is given up.
    """

    def __init__(self, target: RelayTarget, recovery: float) -> None:
        self._target = target
        self._recovery = recovery
        self._identity = Identity.generate() if target.security == "noise" else None
        self.name = f"relay {shown_registry(target.registry)}/{target.environment_id}"

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Channel]:
        """A new stream. Its Noise handshake is done while it runs: nothing is sent before that.

        Raises:
            ConnectFailed: naming the registry or the relay, and what went wrong.
        """
        target = self._target
        async with open_registry(target.registry, headers=self._headers) as registry:
            bundle, socket = await self._open(registry, None)
            stream_id = str(uuid.uuid4())
            initiator = None
            if self._identity is not None:
                assert bundle.executor_key is not None
                assert bundle.authorization is not None
                try:
                    initiator = Initiator(
                        self._identity,
                        bundle.executor_key,
                        prologue(target.environment_id, bundle.registration_id or "", stream_id),
                        bundle.authorization.encode(),
                    )
                except NoiseFailed as error:
                    await _discard(socket)
                    raise ConnectFailed(f"{self.name}: no Noise handshake can be made: {error}") from error

            async def again() -> WebsocketChannel:
                return (await self._open(registry, bundle.executor_key))[1]

            key = bundle.executor_key
            stream = HarnessStream(
                stream_id,
                self.name,
                socket,
                again,
                initiator=initiator,
                identity=None if key is None else key.x25519 + key.mlkem768,
                deadline=self._recovery,
            )
            try:
                yield stream
            finally:
                await stream.discard()

    def _headers(self) -> dict[str, str]:
        token = self._target.read_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if self._target.account_id:
            headers["chatgpt-account-id"] = self._target.account_id
        return headers

    async def _open(self, registry: Registry, known: PublicKey | None) -> tuple[Bundle, WebsocketChannel]:
        """A fresh bundle and its websocket: parts of two bundles are never mixed (relay.md §1.4).

        An executor that is just being connected again, or a relay that is busy, is waited for, as long as a
        connection may take.
        """
        give_up = trio.current_time() + self._target.connect_timeout
        tries = 0
        used_up = False
        while True:
            try:
                return await self._open_once(registry, known)
            except HandshakeRefused as error:
                again = error.retryable or (error.status == 401 and not used_up)
                used_up = used_up or error.status == 401
                failed: ConnectFailed = error
            except RegistryFailed as error:
                again = error.retryable and error.status is not None
                failed = error
            pause = registry_pause(tries)
            if not again or trio.current_time() + pause > give_up:
                raise failed
            await trio.sleep(pause)
            tries += 1

    async def _open_once(
        self, registry: Registry, known: PublicKey | None
    ) -> tuple[Bundle, WebsocketChannel]:
        target = self._target
        try:
            with trio.fail_after(target.connect_timeout):
                bundle = await registry.connect(
                    target.environment_id, None if self._identity is None else self._identity.public
                )
        except trio.TooSlowError as error:
            text = f"the registry {registry.shown} did not answer within {target.connect_timeout:g} s"
            raise ConnectFailed(text) from error
        if known is not None and bundle.executor_key != known:
            raise ConnectFailed("executor key changed during session recovery", retryable=False)
        return bundle, await _open_websocket(
            bundle.url, (), target.connect_timeout, MAX_FRAME if self._identity is not None else None
        )


@asynccontextmanager
async def dial_clear(target: WebsocketTarget, recovery: float) -> AsyncIterator[Channel]:
    """A stream in clear text over a websocket whose URL says `role=harness` (relay.md §4.2).

    Raises:
        ConnectFailed: naming the URL and what went wrong.
    """

    async def open_socket() -> WebsocketChannel:
        token = target.read_token()
        headers = [(b"Authorization", b"Bearer " + token.encode())] if token else []
        return await _open_websocket(target.url, headers, target.connect_timeout, None)

    stream = HarnessStream(
        str(uuid.uuid4()),
        f"relay {shown_url(target.url)}",
        await open_socket(),
        open_socket,
        initiator=None,
        identity=None,
        deadline=recovery,
    )
    try:
        yield stream
    finally:
        await stream.discard()


async def _discard(channel: Channel) -> None:
    """Close one that was never run."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await channel.run(lambda message: None)


async def _open_websocket(
    url: str, headers: Headers, connect_timeout: float, max_message: int | None
) -> WebsocketChannel:
    try:
        with trio.fail_after(connect_timeout):
            return await websocket.connect(url, headers=headers, max_message=max_message, binary=True)
    except trio.TooSlowError as error:
        raise ConnectFailed(
            f"no websocket connection to {shown_url(url)} within {connect_timeout:g} s"
        ) from error
