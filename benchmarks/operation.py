"""One thing to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cost import Cost


@dataclass
class Operation:
    """A call, ready to be repeated, and what it costs at least."""

    call: Callable[[], Any]
    cost: Cost
    bound: str  # "matmul" or "copy": which of the device's rates limits it at best
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0  # text tokens that one call makes
