"""Numbers as callers give them."""

from __future__ import annotations

import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.core.values import number


@pytest.mark.parametrize("value", [True, "1", b"1"])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(InputError, match="expected a number"):
        number("steps", value)
