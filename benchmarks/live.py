"""From an input to its pixels on the Live tab: python -m benchmarks.live [--model toybox] [--texts 5] [--out FILE.json]

The server runs as users run it, in a process of its own. A headless Chromium opens the page, types texts at a person's pace and moves a
scale, without and with a picture to edit. The page itself takes the times, on one clock: from the input event to the end of the frame in
which its picture is drawn. An input that a later one overtakes gets no picture; the table says how many got one. The target is a median of
150 ms, for a student of one evaluation.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.browser import chromium, live_opened, live_settled, open_tab
from benchmarks.finish import finish, head
from benchmarks.measure import Timing
from benchmarks.server import in_ms, serving

TARGET = 150.0  # ms, for the median
STAGES = ("wait", "prefill", "denoise", "decode", "encode")  # the server's, as the page keeps them, in seconds
TEXTS = ("a red circle left of a blue square", "three green stars", "a small yellow car", "a house above a tree", "a purple umbrella")
EDITS = ("make the square green", "remove the circle", "add a small star", "turn the background navy", "make the circle larger")
KEPT = 200  # previews whose times the page keeps


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--texts", type=int, default=5, help=f"texts typed for each figure, 1 to {len(TEXTS)}")
    parser.add_argument("--delay", type=float, default=120.0, help="ms between two keys")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--note", default="", help="kept with the figures, say what else the machine was doing")
    options = parser.parse_args(given)
    if not 1 <= options.texts <= len(TEXTS):
        parser.error(f"got --texts {options.texts}, expected 1 to {len(TEXTS)}")
    options.given = sys.argv[1:] if given is None else given
    return options


def record(page: Any, act: Callable[[], int]) -> dict[str, Any]:
    """What the page measured while `act` (which returns its number of inputs) was done, in milliseconds."""
    live_settled(page)
    page.evaluate("hyperbagelLive.samples.length = 0")
    inputs = act()
    live_settled(page)
    page.wait_for_function("() => hyperbagelLive.samples.length > 0")
    samples = page.evaluate("hyperbagelLive.samples")
    if len(samples) >= KEPT:
        raise SystemExit(f"got {inputs} inputs, expected fewer than {KEPT} pictures, which is what the page keeps; lower --texts")
    found: dict[str, Any] = in_ms(Timing.of([sample["pixels"] / 1e3 for sample in samples]))
    stages = {name: statistics.median(sample[name] * 1e3 for sample in samples) for name in STAGES}
    stages["network and browser"] = statistics.median(sample["pixels"] - sample["server"] for sample in samples)
    evaluations = sorted({sample["nfe"] for sample in samples})
    return found | {"inputs": inputs, "shown": len(samples), "evaluations": evaluations, "stages": stages}


def type_texts(page: Any, texts: tuple[str, ...], delay: float) -> int:
    """Types each text, waiting for the picture of what was typed last before the next one. Returns the number of inputs."""
    for text in texts:
        page.fill("#live [name=prompt]", "")
        page.locator("#live [name=prompt]").press_sequentially(text, delay=delay)
        live_settled(page)
    return sum(map(len, texts))


def move_scale(page: Any, presses: int, delay: float) -> int:
    """Moves the slider down and back up, step by step. Returns the number of inputs."""
    page.focus("#live [name=text_scale]")
    for i in range(presses):
        page.keyboard.press("ArrowLeft" if i < presses // 2 else "ArrowRight")
        page.wait_for_timeout(delay)
    return presses


def run(options: argparse.Namespace) -> dict[str, Any]:
    found = head("live", options) | {"target": TARGET, "milliseconds": {}}
    with serving(options.model) as (api, _), chromium(timeout=60) as context:
        page = open_tab(context, api.removesuffix("v1"), "live")
        live_opened(page)
        found["tiers"] = page.inner_text("#live [data-tiers]")
        page.fill("#live [name=seed]", "0")
        page.fill("#live [name=prompt]", TEXTS[0])  # the first pictures warm up
        live_settled(page, "better")
        out = found["milliseconds"]
        out["draw, typing"] = record(page, lambda: type_texts(page, TEXTS[: options.texts], options.delay))
        out["draw, moving a scale"] = record(page, lambda: move_scale(page, 8 * options.texts, options.delay))
        live_settled(page, "better")
        source = page.evaluate("document.querySelector('#live canvas').toDataURL()")
        page.set_input_files("#live [data-drop] input", {"name": "source.png", "mimeType": "image/png", "buffer": decoded(source)})
        page.wait_for_selector("#live .thumb")
        out["edit, typing"] = record(page, lambda: type_texts(page, EDITS[: options.texts], options.delay))
        found["browser"] = context.browser.version if context.browser else page.evaluate("navigator.userAgent")
    return found


def decoded(url: str) -> bytes:
    """The bytes of a data: URL in base64."""
    return base64.b64decode(url.partition(",")[2])


def table(found: dict[str, Any]) -> str:
    lines = [f"{'input to pixels, ms':<24}{'median (10 to 90 %)':>24}{'NFE':>6}{'shown':>12}   of which, medians"]
    for name, cell in found["milliseconds"].items():
        told = f"{cell['median']:.0f} ({cell['low']:.0f} to {cell['high']:.0f})"
        evaluations, shown = "/".join(map(str, cell["evaluations"])), f"{cell['shown']} of {cell['inputs']}"
        stages = " · ".join(f"{stage} {value:.0f}" for stage, value in cell["stages"].items())
        lines.append(f"{name:<24}{told:>24}{evaluations:>6}{shown:>12}   {stages}")
    slowest = max(cell["median"] for cell in found["milliseconds"].values())
    lines.append(f"{found['tiers']} Target {TARGET:.0f} ms: {'reached' if slowest <= TARGET else 'missed'}.")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    return finish(arguments(given), run, table, lambda found: False)


if __name__ == "__main__":
    sys.exit(main())
