"""The Live tab in a real browser: pictures while one types, the latest wins, a better one on a pause."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from server_world import wait_for

from benchmarks import live as benchmark
from benchmarks.browser import live_opened, live_settled
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve import realtime

Visit = Callable[..., Any]
# keeps every WebSocket that the page opens
WATCHED = """() => {
  const Plain = WebSocket;
  window.lines = [];
  window.WebSocket = class extends Plain { constructor(url) { super(url); lines.push(this); } };
}"""


def shown(page: Any) -> np.ndarray:
    """The pixels of the canvas."""
    url = page.evaluate("document.querySelector('#live canvas').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def opened(visit: Visit, **more: Any) -> Any:
    page = visit("live", **more)
    live_opened(page)
    page.fill("#live [name=seed]", "5")
    return page


def test_typing_shows_previews_and_a_pause_a_better_one(visit: Visit, model: HyperBagel) -> None:
    page = opened(visit)
    assert "While you type: student 6. On a pause: the model in 20 steps." in page.inner_text("#live [data-tiers]")
    page.locator("#live [name=prompt]").press_sequentially("a red car", delay=30)
    live_settled(page, "better")
    samples = page.evaluate("hyperbagelLive.samples")
    assert samples and all(sample["nfe"] == 6 and sample["pixels"] >= sample["server"] > 0 for sample in samples)
    assert np.array_equal(shown(page), np.asarray(model.generate("a red car", seed=5, steps=20)[0].image))
    text = page.inner_text("#live [data-timings]")
    for part in ("from input to pixels", "wait", "prefill", "denoise", "decode", "encode", "network and browser"):
        assert part in text
    assert "Median of" in page.inner_text("#live [data-median]")
    page.click("#live [data-full]")
    live_settled(page, "full")
    assert np.array_equal(shown(page), np.asarray(model.generate("a red car", seed=5)[0].image))
    before = len(page.evaluate("hyperbagelLive.samples"))
    page.press("#live [name=text_scale]", "ArrowLeft")
    page.wait_for_function(f"() => hyperbagelLive.samples.length > {before}")
    live_settled(page, "better")
    assert np.array_equal(shown(page), np.asarray(model.generate("a red car", seed=5, steps=20, text_scale=3.9)[0].image))


def test_new_input_overtakes_what_is_at_work(visit: Visit, app: Any, model: HyperBagel, monkeypatch: Any) -> None:
    """Previews that never end: each keystroke cancels the one before; Stop and Escape the last. Then quick ones: the last text is shown."""
    endless = {"student": "none", "steps": 10_000}
    quick = {"preview": {"student": "6", "steps": None}, "better": {"student": "none", "steps": 2}, "full": {"student": "none", "steps": 3}}
    monkeypatch.setattr(realtime, "SHORT", -1.0)
    monkeypatch.setattr(realtime, "tiers", lambda model: dict.fromkeys(("preview", "better", "full"), endless))
    page = opened(visit)
    page.locator("#live [name=prompt]").press_sequentially("a red", delay=60)
    page.wait_for_function("() => document.querySelector('#live').dataset.cancelled === '4'")
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('#live').dataset.cancelled === '5'")
    page.wait_for_selector("#live:not([aria-busy])")
    wait_for(lambda: app.state.metrics.get("hyperbagel_running") == 0)
    assert page.evaluate("hyperbagelLive.samples.length") == 0
    monkeypatch.setattr(realtime, "tiers", lambda model: quick)
    page = opened(visit)
    page.locator("#live [name=prompt]").press_sequentially("a red car and a dog", delay=0)
    live_settled(page, "better")
    assert np.array_equal(shown(page), np.asarray(model.generate("a red car and a dog", seed=5, steps=2)[0].image))


def test_a_source_s_context_is_reused(visit: Visit, model: HyperBagel, photo: Path) -> None:
    page = opened(visit)
    page.evaluate("""window.sent = []; const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (text) { sent.push(JSON.parse(text)); send.call(this, text); }; null""")
    page.fill("#live [name=prompt]", "make it")
    live_settled(page, "better")
    page.set_input_files("#live [data-drop] input", photo)
    page.wait_for_selector("#live [data-edit]:not([hidden])")
    page.wait_for_function("() => Number(document.querySelector('#live').dataset.reused) > 0")
    live_settled(page, "better")
    source = Image.open(photo).convert("RGB")
    assert np.array_equal(shown(page), np.asarray(model.edit(source, "make it", seed=5, steps=20)[0].image))
    assert "tokens of the picture reused" in page.inner_text("#live [data-timings]")
    assert not any(key in message for message in page.evaluate("sent") for key in ("text_scale", "image_scale")), "each tier has its own"
    assert page.locator("#live label.range output").all_inner_texts() == ["as usual"] * 2
    before = len(page.evaluate("hyperbagelLive.samples"))
    page.press("#live [name=image_scale]", "ArrowRight")
    page.wait_for_function(f"() => hyperbagelLive.samples.length > {before}")
    live_settled(page, "better")
    expected = model.edit(source, "make it", seed=5, steps=20, image_scale=2.1)[0].image
    assert np.array_equal(shown(page), np.asarray(expected)) and "text_scale" not in page.evaluate("sent.at(-1)")
    assert page.locator("#live label.range output").all_inner_texts() == ["as usual", "2.1"]
    page.click("#live [data-use]")
    assert page.locator("#edit").is_visible() and page.locator("#edit .thumb").count() == 1


def test_a_source_that_can_no_longer_be_read_is_told(visit: Visit, photo: Path) -> None:
    """Its file may change after it was chosen; the page then draws without it."""
    page = opened(visit)
    page.fill("#live [name=prompt]", "a red car")
    live_settled(page, "better")
    page.evaluate("FileReader.prototype.readAsDataURL = function () { queueMicrotask(() => this.onerror?.()); }")
    page.set_input_files("#live [data-drop] input", photo)
    page.wait_for_function("() => document.querySelector('#alert').textContent.includes('no longer be read')")
    live_settled(page, "better")
    assert page.locator("#live .thumb").count() == 0


def test_a_line_that_breaks_is_opened_again(visit: Visit, address: str) -> None:
    page = visit("draw")
    page.evaluate(WATCHED)
    page.click("#tab-live")
    live_opened(page)
    page.evaluate("lines[0].close()")
    page.wait_for_function("() => lines.length === 2 && document.querySelector('#live [data-link]').textContent === 'connected'")
    page.fill("#live [name=prompt]", "a red car")
    live_settled(page, "better")


def test_the_benchmark_reads_what_the_page_measured(visit: Visit) -> None:
    page = opened(visit)
    out = {
        "typing": benchmark.record(page, lambda: benchmark.type_texts(page, ("a red", "a car"), 20)),
        "scale": benchmark.record(page, lambda: benchmark.move_scale(page, 4, 20)),
    }
    for name, inputs in (("typing", 10), ("scale", 4)):
        found = out[name]
        assert found["inputs"] == inputs and 1 <= found["shown"] == found["runs"] <= inputs and found["evaluations"] == [6]
        assert found["low"] <= found["median"] <= found["high"]
        assert set(found["stages"]) == {*benchmark.STAGES, "network and browser"} and found["stages"]["denoise"] < found["high"]
    slow = benchmark.table({"milliseconds": {"typing": out["typing"] | {"median": 151.0}}, "tiers": ""})
    assert "151" in slow and "missed" in slow
    assert "reached" in benchmark.table({"milliseconds": {"typing": out["typing"] | {"median": 149.0}}, "tiers": ""})
