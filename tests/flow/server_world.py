"""What the server's tests share besides fixtures."""

from __future__ import annotations

import io

from PIL import Image

KEY = "sesame"


def png(colour: str, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()
