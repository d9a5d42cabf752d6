"""What the server's tests share besides fixtures."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

from PIL import Image

KEY = "sesame"


def png(colour: str, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Until it is so; fails after `seconds`. A job is over for its client at once, for the engine only at its next step."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
