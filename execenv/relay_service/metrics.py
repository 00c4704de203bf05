"""Counters, and their text for Prometheus. Labels are words of ours, never those of a client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from execenv.relay_service.limits import Table


class Metrics:
    """What a node has done. Plain integers: they are raised for every frame."""

    def __init__(self) -> None:
        self.frames_to_executor = 0
        self.frames_to_harness = 0
        self.bytes_to_executor = 0
        self.bytes_to_harness = 0
        self.frames_invalid = 0
        self.frames_foreign = 0
        self.resets_to_executor = 0
        self.resets_to_harness = 0
        self.slow_harnesses = 0
        self.links = 0
        self.waiting = 0
        """Bytes that wait for a slow harness, beside those that its websocket has."""
        self.unfinished = 0
        """Bytes of frames whose end has not arrived."""
        self.authentications_failed = 0
        self.refusals: Counter[str] = Counter()
        self.requests: Counter[tuple[str, int]] = Counter()

    def text(self, table: Table) -> str:
        """The exposition format, version 0.0.4."""
        roles = Counter(entry.role for entry in table)
        queued = self.waiting + self.unfinished + sum(entry.queued() for entry in table)
        lines: list[str] = []

        def add(name: str, kind: str, text: str, values: Iterable[tuple[str, int]]) -> None:
            lines.append(f"# HELP execenv_relay_{name} {text}")
            lines.append(f"# TYPE execenv_relay_{name} {kind}")
            lines.extend(f"execenv_relay_{name}{labels} {value}" for labels, value in values)

        add(
            "sockets",
            "gauge",
            "Open websockets.",
            [(f'{{role="{role}"}}', roles[role]) for role in ("executor", "harness")],
        )
        add("links", "gauge", "Harnesses that are tied to an executor here.", [("", self.links)])
        add(
            "queue_bytes",
            "gauge",
            "Bytes that wait to be sent, or for the rest of their frame.",
            [("", queued)],
        )
        to_executor, to_harness = '{direction="to_executor"}', '{direction="to_harness"}'
        add(
            "frames_total",
            "counter",
            "Frames passed on.",
            [(to_executor, self.frames_to_executor), (to_harness, self.frames_to_harness)],
        )
        add(
            "bytes_total",
            "counter",
            "Bytes of the frames passed on.",
            [(to_executor, self.bytes_to_executor), (to_harness, self.bytes_to_harness)],
        )
        add(
            "resets_total",
            "counter",
            "Resets that the relay itself has sent.",
            [(to_executor, self.resets_to_executor), (to_harness, self.resets_to_harness)],
        )
        add(
            "frames_dropped_total",
            "counter",
            "Frames not passed on.",
            [('{reason="invalid"}', self.frames_invalid), ('{reason="foreign"}', self.frames_foreign)],
        )
        add("slow_harnesses_total", "counter", "Harnesses cut for being slow.", [("", self.slow_harnesses)])
        add(
            "authentication_failures_total",
            "counter",
            "Tokens and signatures that were not valid.",
            [("", self.authentications_failed)],
        )
        add(
            "refusals_total",
            "counter",
            "Requests and handshakes refused.",
            [(f'{{reason="{reason}"}}', value) for reason, value in sorted(self.refusals.items())],
        )
        add(
            "requests_total",
            "counter",
            "Requests to the registry.",
            [
                (f'{{operation="{operation}",status="{status}"}}', value)
                for (operation, status), value in sorted(self.requests.items())
            ],
        )
        return "\n".join(lines) + "\n"
