"""Numbers and sizes as callers give them: NumPy's count as well, and anything that is not one raises an InputError of one line."""

from __future__ import annotations

import operator
import re
from typing import Any

from hyperbagel.core.errors import InputError

SIZE = re.compile(r"(\d{1,6})[xX×](\d{1,6})")


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises InputError if it is not a whole number."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"got {name} {value!r}, expected a whole number") from error


def number(name: str, value: Any) -> float:
    """`value` as a float (an int stays one). Raises InputError if it is not a number; text and bool never are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"got {name} {value!r}, expected a number") from error


def clip(value: float, low: float, high: float) -> float:
    """`value`, or the nearest that is within `low` to `high`."""
    return min(max(value, low), high)


def seed_of(value: Any) -> int:
    """`value` as a seed, 0 to 2^63 - 1. Raises InputError for anything else."""
    seed = whole("seed", value)
    if not 0 <= seed < 2**63:
        raise InputError(f"got seed {seed}, expected 0 to 2^63 - 1")
    return seed


def size_of(value: Any) -> tuple[int, int]:
    """(height, width) from two whole numbers in that order or from a text "WIDTHxHEIGHT". Raises InputError."""
    if isinstance(value, str):
        if (match := SIZE.fullmatch(value.strip())) is None:
            raise InputError(f"got size {value!r}, expected WIDTHxHEIGHT, write for instance 512x512")
        return int(match[2]), int(match[1])
    height, width = _two("size", value, "(height, width) in pixels, or a text such as '512x384' (width x height)")
    return whole("height", height), whole("width", width)


def interval_of(value: Any) -> tuple[float, float]:
    """(low, high), two times. Raises InputError for anything else."""
    low, high = _two("interval", value, "two times such as (0.4, 1.0)")
    return number("interval", low), number("interval", high)


def _two(name: str, value: Any, expected: str) -> tuple[Any, Any]:
    try:
        one, other = value
    except (TypeError, ValueError) as error:
        raise InputError(f"got {name} {value!r}, expected {expected}") from error
    return one, other
