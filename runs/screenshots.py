"""Pictures of the web page for the documentation: python -m runs.screenshots MODEL FOLDER

Starts a server and a headless Chromium, and uses the page as a person would. The source picture is rendered by the toybox's own code; what
the model makes of it is shown unpicked. Writes FOLDER/ui-draw.webp, ui-edit.webp, ui-ask.webp and ui-live.webp (a phone in dark
mode).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.browser import chromium, live_opened, live_settled, open_tab
from benchmarks.server import serving
from hyperbagel.core.files import atomic_write_bytes
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene, Thing

LARGEST = 60_000  # the most bytes that a file may have
PROMPT = "a red circle to the left of a blue square"
CIRCLE = Thing("circle", "red", "large", 4)
SOURCE = Scene("cream", (CIRCLE, Thing("car", "blue", "large", 8), Thing("star", "yellow", "small", 0)))


def save(page: Any, path: Path) -> None:
    """Save what the window shows in 256 colours."""
    page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    buffer = io.BytesIO()
    shot.quantize(256, dither=Image.Dither.NONE).convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=6)
    if len(buffer.getvalue()) > LARGEST:
        raise SystemExit(f"{path}: got {len(buffer.getvalue())} bytes, expected at most {LARGEST}; make the window smaller")
    atomic_write_bytes(path, buffer.getvalue())
    print(f"{path}: {shot.width}x{shot.height}, {len(buffer.getvalue())} bytes")


def upload(page: Any, tab: str) -> None:
    """Add the source picture to a tab."""
    buffer = io.BytesIO()
    Image.fromarray(render(SOURCE, 64)).save(buffer, "PNG")
    page.set_input_files(f"#{tab} [data-drop] input", {"name": "scene.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    page.wait_for_selector(f"#{tab} .thumb")


def start(page: Any, tab: str, prompt: str, seed: int = 1) -> None:
    """Submit a prompt with a fixed seed, and wait for the result."""
    page.fill(f"#{tab} [name=seed]", str(seed))
    page.fill(f"#{tab} [name=prompt]", prompt)
    page.click(f"#{tab} [type=submit]")
    page.wait_for_selector(f"#{tab}:not([aria-busy])")


def draw(page: Any) -> None:
    page.fill("#draw [name=n]", "2")
    start(page, "draw", PROMPT)


def edit(page: Any) -> None:
    """Paint a mask over the circle and make two edits."""
    upload(page, "edit")
    page.wait_for_selector("#edit .stack img[src]")
    box = page.locator("#edit .stack canvas").bounding_box()
    x, y, reach = box["x"] + box["width"] * CIRCLE.cx, box["y"] + box["height"] * CIRCLE.cy, box["width"] * CIRCLE.extent * 0.3
    page.mouse.move(x - reach, y - reach)
    page.mouse.down()
    for side in (-1, 0, 1):
        page.mouse.move(x - reach, y + side * reach, steps=3)
        page.mouse.move(x + reach, y + side * reach, steps=3)
    page.mouse.up()
    start(page, "edit", "make the circle green")
    start(page, "edit", "replace the circle with a green star", seed=2)


def ask(page: Any) -> None:
    upload(page, "ask")
    for i, question in enumerate(("What colour is the circle?", "Tell me all about this picture.")):
        page.fill("#ask [name=prompt]", question)
        page.press("#ask [name=prompt]", "Enter")
        page.locator("#ask .turn[data-state=done]").nth(i).wait_for()


def live(page: Any) -> None:
    live_opened(page)
    page.fill("#live [name=seed]", "1")
    page.locator("#live [name=prompt]").press_sequentially(PROMPT, delay=60)
    live_settled(page, "better")


def main(model: str, folder: Path) -> None:
    with serving(model) as (api, _), chromium(timeout=300) as context:
        address = api.removesuffix("v1")
        for name, act, size, scheme in (
            ("draw", draw, (1100, 660), "light"),
            ("edit", edit, (1100, 760), "light"),
            ("ask", ask, (1100, 640), "light"),
            ("live", live, (390, 900), "dark"),
        ):
            page = open_tab(context, address, name, width=size[0], height=size[1])
            page.emulate_media(color_scheme=scheme)
            act(page)
            save(page, folder / f"ui-{name}.webp")
            page.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m runs.screenshots MODEL FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
