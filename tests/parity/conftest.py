"""What the parity tests share as fixtures; the rest is in parity_world."""

from __future__ import annotations

import pytest
from parity_world import make_parts

from hyperbagel.generate.session import Parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()
