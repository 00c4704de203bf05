"""A stream whose ends acknowledge: what was sent and not yet acknowledged, what was received and is not yet
whole (relay.md §4.1). Machine: no I/O, no clock; time is an argument.

Every data frame has a sequence number, from 0 for each direction. Every frame acknowledges: `ack` is the
number that is expected next, bit i of `ack_bits` says that `ack + 1 + i` is there already. Frames keep their
order on the way, so one is missing only if a socket was lost, or if a later one is there; then it is sent
again. Where nothing later follows, `Resume` asks: who gets one says with another what it has.
"""

from __future__ import annotations

import math
from collections import deque

from attrs import define

from execenv.relay.frames import MAX_SEQ, Data

WINDOW = 256
"""Frames that may be on the way, and frames that may be kept while an earlier one is missing."""
WINDOW_BYTES = 2 * 1024 * 1024
"""Bytes that may be on the way. One frame more is sent when there are fewer."""
MAX_PAYLOAD = 64 * 1024
"""Bytes of a frame, of Noise or of a segment, at most."""
ACK_EVERY = 32
ACK_BYTES = 256 * 1024
ACK_DELAY = 0.1
"""Seconds after which an acknowledgement goes out by itself."""
STALL = 20.0
"""Seconds without progress after which the other end is asked what it has."""
ACK_BITS = 32


class StreamBroken(Exception):
    """The other end broke the rules, so that the stream cannot go on. The text is for logs."""


@define(eq=False)
class _Sent:
    data: Data
    received: bool = False  # out of order; it is kept until the ones before it are there too
    again: bool = False  # it is to be sent again


class Reliable:
    """The state of one stream at one end.

    Args:
        max_message: the largest message taken, in bytes.
    """

    def __init__(
        self, *, max_message: float = math.inf, window: int = WINDOW, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._max_message = max_message
        self._window = window
        self._window_bytes = window_bytes
        # Sending: `_sent[0]` has the number `_acked`.
        self._acked = 0
        self._sent: deque[_Sent] = deque()
        self._sent_bytes = 0
        self._resends = 0
        self._resent_before = 0  # what has a lower number was sent again since a gap was last seen
        self._progress = math.inf  # when something was last acknowledged, or when the first frame went out
        # Receiving.
        self._expected = 0
        self._early: dict[int, Data] = {}
        self._early_bytes = 0
        self._segments: list[bytes] = []
        self._segment_count = 1
        self._segments_bytes = 0
        self._unacknowledged = 0
        self._unacknowledged_bytes = 0
        self._ack_at = math.inf

    # Sending.

    @property
    def next_seq(self) -> int:
        return self._acked + len(self._sent)

    @property
    def unacknowledged(self) -> int:
        """How many frames were sent and not yet acknowledged."""
        return len(self._sent)

    @property
    def room(self) -> bool:
        """Whether a new frame may be sent."""
        return len(self._sent) < self._window and self._sent_bytes < self._window_bytes

    def add(self, payload: bytes, index: int = 0, count: int = 1, *, now: float) -> Data:
        """A new frame, numbered, and kept until it is acknowledged.

        Raises:
            StreamBroken: if there are no numbers left.
        """
        seq = self.next_seq
        if seq > MAX_SEQ:
            raise StreamBroken("all sequence numbers are used")
        data = Data(seq, payload, index, count)
        if not self._sent:
            self._progress = now
        self._sent.append(_Sent(data))
        self._sent_bytes += len(payload)
        return data

    def next_resend(self) -> Data | None:
        """A frame that is to be sent again, the lowest number first."""
        if self._resends:
            for sent in self._sent:
                if sent.again:
                    sent.again = False
                    self._resends -= 1
                    return sent.data
        return None

    def acknowledged(self, ack: int, bits: int, now: float) -> None:
        """The other end says what it has.

        Raises:
            StreamBroken: if it has what was never sent.
        """
        top = ack + bits.bit_length()  # the highest number that `bits` name
        if ack > self.next_seq or (bits and top >= self.next_seq):
            raise StreamBroken("it acknowledges what was not sent")
        self._drop_before(ack, now)
        if not bits or ack < self._acked:  # an old one, overtaken
            return
        for i in range(bits.bit_length()):
            if bits >> i & 1:
                sent = self._sent[ack + 1 + i - self._acked]
                if not sent.received:
                    sent.received = True
                    self._progress = now
                    self._take_back(sent)
        # What is missing before one that is there is lost. It may be on its way again already, unless that
        # one was sent behind it.
        if top >= self._resent_before:
            for sent in list(self._sent)[: top - self._acked]:
                self._send_again(sent)
            self._resent_before = self.next_seq

    def resumed(self, next_seq: int, now: float) -> None:
        """The other end has everything before `next_seq`, and nothing else is on the way.

        Raises:
            StreamBroken: if it has what was never sent, or lacks what it had.
        """
        if not self._acked <= next_seq <= self.next_seq:
            raise StreamBroken("it resumes at a frame that is not there")
        self._drop_before(next_seq, now)
        self._progress = now if self._sent else math.inf
        self._resent_before = self.next_seq
        for sent in self._sent:
            sent.received = False  # it may have been let go since
            self._send_again(sent)

    def _drop_before(self, seq: int, now: float) -> None:
        if seq <= self._acked:
            return
        while self._acked < seq:
            sent = self._sent.popleft()
            self._sent_bytes -= len(sent.data.payload)
            self._take_back(sent)
            self._acked += 1
        self._progress = now if self._sent else math.inf

    def _send_again(self, sent: _Sent) -> None:
        if not sent.received and not sent.again:
            sent.again = True
            self._resends += 1

    def _take_back(self, sent: _Sent) -> None:
        if sent.again:
            sent.again = False
            self._resends -= 1

    # Receiving.

    @property
    def ack(self) -> int:
        """What every frame says: everything before this number was received."""
        return self._expected

    @property
    def ack_bits(self) -> int:
        bits = 0
        if self._early:
            for i in range(ACK_BITS):
                if self._expected + 1 + i in self._early:
                    bits |= 1 << i
        return bits

    def ack_sent(self) -> None:
        """A frame has gone out, with `ack` and `ack_bits`."""
        self._unacknowledged = self._unacknowledged_bytes = 0
        self._ack_at = math.inf

    def receive(self, data: Data, now: float) -> list[bytes]:
        """The messages that a frame completes, in order. One that was there before is ignored.

        Raises:
            StreamBroken: if it is too far ahead, or a message is too long or its segments do not fit.
        """
        self._unacknowledged += 1
        self._unacknowledged_bytes += len(data.payload)
        self._ack_at = min(self._ack_at, now + ACK_DELAY)
        if data.seq < self._expected or data.seq in self._early:
            return []
        if data.seq > self._expected:
            if data.seq - self._expected > self._window:
                raise StreamBroken(f"a frame is {data.seq - self._expected} ahead")
            if self._early_bytes + len(data.payload) > self._window_bytes + MAX_PAYLOAD:
                raise StreamBroken("too much is there ahead of a frame that is missing")
            self._early[data.seq] = data
            self._early_bytes += len(data.payload)
            self._unacknowledged = ACK_EVERY  # the sender should know at once
            return []
        messages: list[bytes] = []
        next_: Data | None = data
        while next_ is not None:
            self._expected += 1
            self._add_segment(next_, messages)
            next_ = self._early.pop(self._expected, None)
            if next_ is not None:
                self._early_bytes -= len(next_.payload)
        return messages

    def _add_segment(self, data: Data, messages: list[bytes]) -> None:
        if data.segment_index != len(self._segments) or (
            self._segments and data.segment_count != self._segment_count
        ):
            raise StreamBroken("the segments of a message do not fit")
        self._segments_bytes += len(data.payload)
        if self._segments_bytes > self._max_message:
            raise StreamBroken(f"a message is longer than {self._max_message} bytes")
        if data.segment_count == 1:
            messages.append(data.payload)
        else:
            self._segment_count = data.segment_count
            self._segments.append(data.payload)
            if len(self._segments) < data.segment_count:
                return
            messages.append(b"".join(self._segments))
            self._segments.clear()
        self._segments_bytes = 0

    # Time.

    def ack_due(self, now: float) -> bool:
        """Whether an acknowledgement is to go out, in a frame of its own if there is no other."""
        return (
            self._unacknowledged >= ACK_EVERY
            or self._unacknowledged_bytes >= ACK_BYTES
            or self._ack_at <= now
        )

    def stalled(self, now: float) -> bool:
        """Whether the other end is to be asked what it has. It is not asked again before `STALL` seconds."""
        if self._progress + STALL <= now:
            self._progress = now
            return True
        return False

    @property
    def deadline(self) -> float:
        """When `ack_due` or `stalled` will be true, if nothing happens before."""
        return min(self._ack_at, self._progress + STALL)


class Window:
    """The receiving end of a stream whose frames are numbered and not acknowledged: the released programs'
    (relay.md §5.5). Frames that come early wait; which come twice are ignored.

    Args:
        ahead: how far a frame may be ahead.
        max_bytes: of frames that wait.
    """

    GAP = 60.0
    """Seconds that a missing frame is waited for (§4.8)."""

    def __init__(self, ahead: int = 64, max_bytes: int = 1024 * 1024) -> None:
        self._ahead = ahead
        self._max_bytes = max_bytes
        self._expected = 0
        self._early: dict[int, bytes] = {}
        self._bytes = 0
        self.deadline = math.inf
        """When what is missing has been missing for too long."""

    def receive(self, data: Data, now: float) -> list[bytes]:
        """The payloads that are next, in order.

        Raises:
            StreamBroken: if the frame is a segment, or too far ahead.
        """
        if data.segment_count != 1:
            raise StreamBroken("a frame is a segment, which was not agreed on")
        if data.seq < self._expected or data.seq in self._early:
            return []
        if data.seq > self._expected:
            self._bytes += len(data.payload)
            if data.seq - self._expected > self._ahead or self._bytes > self._max_bytes:
                raise StreamBroken("a frame is too far ahead")
            self._early[data.seq] = data.payload
            self.deadline = min(self.deadline, now + self.GAP)
            return []
        payloads = []
        payload: bytes | None = data.payload
        while payload is not None:
            payloads.append(payload)
            self._expected += 1
            payload = self._early.pop(self._expected, None)
            if payload is not None:
                self._bytes -= len(payload)
        self.deadline = now + self.GAP if self._early else math.inf
        return payloads
