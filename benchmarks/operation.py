"""One thing to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cost import Cost


@dataclass
class Operation:
    """A call that can be repeated, and the least work it takes."""

    call: Callable[[], Any]
    cost: Cost
    bound: str  # "matmul" or "copy": which of the device's rates limits it
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0  # text tokens that one call makes
