"""The pace of work; counters, summaries and gauges in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable

HELP = {
    "hyperbagel_requests_total": ("counter", "HTTP requests by path and status."),
    "hyperbagel_request_seconds": ("summary", "Time from the first byte of a request to the last of its answer."),
    "hyperbagel_results_total": ("counter", "Pictures and answers by kind (image, text) and outcome (done, failed, cancelled)."),
    "hyperbagel_tokens_total": ("counter", "Text tokens decoded for finished answers."),
    "hyperbagel_evaluations_total": ("counter", "Velocity evaluations (NFE) of finished pictures."),
    "hyperbagel_batch_size": ("summary", "Pictures or answers of one batch, with those that joined it."),
    "hyperbagel_stage_seconds": ("summary", "Time of a batch by stage (prefill, denoise, decode), of its longest answer."),
    "hyperbagel_waiting": ("gauge", "Pictures and answers in the queue."),
    "hyperbagel_running": ("gauge", "Pictures and answers being worked on."),
}


class Metrics:
    """Named numbers with labels; safe to change from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = defaultdict(dict)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        with self._lock:
            self._add(name, name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds one value to a summary: to NAME_sum, and 1 to NAME_count."""
        with self._lock:
            self._add(name, f"{name}_sum", value, labels)
            self._add(name, f"{name}_count", 1, labels)

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""
        with self._lock:
            self._values[name][name] = value

    def get(self, name: str, **labels: str) -> float:
        """The current value of one sample, 0 if it was never changed. name: with _sum or _count for a summary."""
        family = next((f for f in HELP if name == f or name in (f"{f}_sum", f"{f}_count")), name)
        with self._lock:
            return self._values[family].get(_sample(name, labels), 0.0)

    def text(self) -> str:
        """All families of HELP, in that order, as Prometheus scrapes them."""
        lines = []
        with self._lock:
            for name, (kind, help_) in HELP.items():
                lines += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]
                lines += [f"{sample} {value:.12g}" for sample, value in sorted(self._values[name].items())]
        return "\n".join(lines) + "\n"

    def _add(self, family: str, name: str, value: float, labels: dict[str, str]) -> None:
        sample = _sample(name, labels)
        self._values[family][sample] = self._values[family].get(sample, 0.0) + value


def _sample(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


class Pace:
    """How long each kind of work takes, for Retry-After. Kinds come from clients, so only the latest KINDS are kept."""

    KINDS, MOST = 256, 30

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}  # of one unit

    def took(self, kind: Hashable, seconds: float, units: int) -> None:
        """A batch of one kind finished so many units in so many seconds. A moving average, to which each unit adds a fifth."""
        own = seconds / units
        before = self._seconds.pop(kind, own)
        self._seconds[kind] = own + 0.8**units * (before - own)
        if len(self._seconds) > self.KINDS:
            del self._seconds[next(iter(self._seconds))]

    def wait(self, kinds: Iterable[Hashable], devices: int) -> int:
        """Whole seconds until units of these kinds are done, 1 to MOST. Of an unknown kind a unit is taken for a second."""
        return min(self.MOST, max(1, math.ceil(sum(self._seconds.get(kind, 1.0) for kind in kinds) / devices)))
