"""What tests of the web page do in several files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

TRANSFER = """([data, name]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(data)], name, {type: "image/png"}));
  return transfer;
}"""


def drop(page: Any, path: Path, target: str) -> None:
    """Drops a file, as a person would from the desktop."""
    data = list(path.read_bytes())
    transfer = page.evaluate_handle(TRANSFER, [data, path.name])
    for kind in ("dragover", "drop"):
        page.dispatch_event(target, kind, {"dataTransfer": transfer})


def begin(page: Any, tab: str, prompt: str) -> None:
    """Submits a tab's form."""
    page.fill(f"#{tab} [name=prompt]", prompt)
    page.click(f"#{tab} [type=submit]")


def end(page: Any, tab: str, button: str = "[data-cancel]") -> None:
    """Presses a button of a tab that is at work, and waits until it is at rest."""
    page.wait_for_selector(f"#{tab}[aria-busy]")
    page.click(f"#{tab} {button}")
    page.wait_for_selector(f"#{tab}:not([aria-busy])")


def completed(route: Any, path: Path, **more: Any) -> None:
    """Answers a request for pictures with a stream that ends behind this finished one. more: fields of its event."""
    picture = base64.b64encode(path.read_bytes()).decode()
    event = {"type": "image_generation.completed", "nfe": 1, "timings": {}, "b64_json": picture, **more}
    route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\n")


def never(route: Any) -> None:
    """Leaves a request without an answer."""
