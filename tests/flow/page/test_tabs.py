"""Every tab of the web page in a real browser: what is seen is what the library gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from page_world import begin, drop
from PIL import Image
from server_world import wait_for

from hyperbagel.data.images import read_settings, save_png
from hyperbagel.pipeline import HyperBagel

Visit = Callable[..., Any]


def run(page: Any, tab: str, prompt: str, state: str = "done") -> Any:
    """Submits a tab's form and waits for its (first) picture."""
    begin(page, tab, prompt)
    slot = page.locator(f"#{tab} .slot").first
    page.wait_for_selector(f"#{tab} .slot[data-state={state}]")
    page.wait_for_selector(f"#{tab}:not([aria-busy])")
    return slot


def keep_seed(page: Any, tab: str, seed: int) -> None:
    page.fill(f"#{tab} [name=seed]", str(seed))  # typing one locks it


def saved(page: Any, slot: Any, path: Path) -> Path:
    """The file that the Download button gives."""
    with page.expect_download() as download:
        slot.get_by_role("button", name="Download").click()
    download.value.save_as(path)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_draw_shows_progress_previews_and_the_library_s_picture(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    page = visit("draw")
    keep_seed(page, "draw", 7)
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
        const bar = document.querySelector('#draw progress'); if (bar) window.seen.push(bar.value); }).observe(
        document.querySelector('#draw .results'), {subtree: true, childList: true, attributes: true}); }""")
    slot = run(page, "draw", "a red car")
    seen = page.evaluate("seen")
    assert len(set(seen)) > 10 and max(seen) == 50 and seen == sorted(seen), "a bar that grows over the teacher's 50 steps"
    assert slot.get_attribute("data-previews") == "3"
    text = slot.inner_text()
    assert re.search(r"seed 7 · 91 NFE · prefill \d+\sms · denoise [\d.]+\sm?s · decode \d+\sms · round trip [\d.]+\sm?s", text), text
    assert np.array_equal(pixels(saved(page, slot, tmp_path / "a.png")), np.asarray(model.generate("a red car", seed=7)[0].image))


def test_students_sizes_and_several_pictures(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    page = visit("draw")
    options = {option.get_attribute("value"): option for option in page.locator("#draw [name=student] option").all()}
    assert list(options) == ["none", "6", "1"]
    assert options["1"].is_disabled() and "not installed" in options["1"].inner_text() and not options["6"].is_disabled()
    page.select_option("#draw [name=student]", "6")
    assert page.get_attribute("#draw [name=steps]", "placeholder") == "6"
    page.select_option("#draw [name=size]", "32x48")
    page.fill("#draw [name=n]", "2")
    keep_seed(page, "draw", 2**62)
    run(page, "draw", "a red car")
    slots = page.locator("#draw .slot").all()
    assert [slot.get_attribute("data-seed") for slot in slots] == [str(2**62), str(2**62 + 1)], "seeds beyond what a number holds"
    expected = model.generate("a red car", seed=2**62, n=2, student="6", size=(48, 32))
    for i, (slot, result) in enumerate(zip(slots, expected, strict=True)):
        assert np.array_equal(pixels(saved(page, slot, tmp_path / f"{i}.png")), np.asarray(result.image))


def test_a_seed_is_drawn_anew_unless_it_is_kept(visit: Visit) -> None:
    page = visit("draw")
    page.fill("#draw [name=steps]", "1")
    seeds = []
    for _ in range(2):
        run(page, "draw", "x")
        seeds.append(page.input_value("#draw [name=seed]"))
    page.check("#draw [name=lock]")
    run(page, "draw", "x")
    assert seeds[0] != seeds[1] == page.input_value("#draw [name=seed]")
    assert [slot.get_attribute("data-seed") for slot in page.locator("#draw .slot").all()] == [seeds[1], seeds[1], seeds[0]]


def test_cancel_ends_the_work_on_the_server(visit: Visit, app: Any) -> None:
    page = visit("draw")
    page.fill("#draw [name=steps]", "10000")
    for end in (lambda: page.click("#draw [data-cancel]"), lambda: page.keyboard.press("Escape")):
        before = app.state.metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled")
        page.fill("#draw [name=prompt]", "x")
        page.press("#draw [name=prompt]", "Control+Enter")
        page.wait_for_selector("#draw .slot[data-state=drawing]")
        end()
        page.wait_for_selector("#draw .slot[data-state=cancelled] >> nth=0")
        page.wait_for_function("() => !document.querySelector('#draw').hasAttribute('aria-busy')")
        wait_for(lambda: app.state.metrics.get("hyperbagel_running") == 0)
        assert app.state.metrics.get("hyperbagel_results_total", kind="image", outcome="cancelled") == before + 1
    assert not page.locator("#alert").is_visible(), "a cancel is no error"


def test_a_dropped_png_brings_its_settings_back(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    """Restored on a fresh page and drawn again, it is the same picture, whatever made it."""
    for name, settings in {
        "model": {"steps": 3, "text_scale": 2.25, "interval": (0.2, 0.9), "renorm": "channel", "renorm_min": 0.5, "shift": 2.0},
        "student": {"student": "6", "size": (48, 32), "text_scale": 3.3},
    }.items():
        page = visit("compare")
        [result] = model.generate("a red car,\n\u201cquoted\u201d", seed=2**60 + 1, **settings)  # type: ignore[arg-type]
        save_png(result.image, tmp_path / f"{name}.png", result.settings)
        drop(page, tmp_path / f"{name}.png", "body")
        page.wait_for_selector("#note:not([hidden])")
        assert page.locator("#draw").is_visible() and "Settings restored" in page.inner_text("#note")
        assert page.is_checked("#draw [name=lock]") and page.input_value("#draw [name=seed]") == str(2**60 + 1)
        page.click("#draw [type=submit]")
        page.wait_for_selector("#draw .slot[data-state=done]")
        again = saved(page, page.locator("#draw .slot").first, tmp_path / f"{name}-again.png")
        assert np.array_equal(pixels(again), np.asarray(result.image)), name
        assert read_settings(again) == read_settings(tmp_path / f"{name}.png")


def test_a_plan_s_temperature_is_restored_and_asked_for(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    """Without a plan nothing is asked of it."""
    page, path = visit("draw"), tmp_path / "planned.png"
    [result] = model.generate("a red car", seed=3, student="6", think=True, think_temperature=1.5, max_think_tokens=4)
    save_png(result.image, path, result.settings)
    drop(page, path, "body")
    page.wait_for_selector("#note:not([hidden])")
    assert page.is_checked("#draw [name=think]") and page.input_value("#draw [name=think_temperature]") == "1.5"
    for think, wanted in ((True, 1.5), (False, None)):
        page.set_checked("#draw [name=think]", think)
        with page.expect_request("**/v1/images/generations") as asked:
            page.click("#draw [type=submit]")
        assert asked.value.post_data_json.get("think_temperature") == wanted
        page.wait_for_selector("#draw .slot[data-state=done]", timeout=60_000)


def test_a_model_that_was_not_trained_for_planned_edits(visit: Visit, model: HyperBagel, monkeypatch: Any) -> None:
    """The page says so where a plan is asked for an edit."""
    config = model.parts.model.config
    options = config.options.model_copy(update={"planned_edits": False})
    monkeypatch.setattr(model.parts.model, "config", config.model_copy(update={"options": options}))
    for tab in ("draw", "edit"):
        page = visit(tab)
        told = page.locator(f"#{tab} [data-unplanned]")
        assert not told.is_visible()
        page.check(f"#{tab} [name=think]")
        assert told.is_visible() is (tab == "edit")
        page.uncheck(f"#{tab} [name=think]")
        assert not told.is_visible()


def test_a_png_without_settings_is_explained(visit: Visit, photo: Path, tmp_path: Path) -> None:
    page = visit("draw")
    drop(page, photo, "body")
    page.wait_for_selector("#alert:not([hidden])")
    assert "carries no settings" in page.inner_text("#alert")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    page.set_input_files("#restore", tmp_path / "broken.png")
    page.wait_for_function("() => document.querySelector('#alert').textContent.includes('no picture')")
    page.click("#alert [data-close]")
    assert not page.locator("#alert").is_visible()


def test_edit_with_slider_undo_and_results_as_input(visit: Visit, model: HyperBagel, photo: Path, tmp_path: Path) -> None:
    page = visit("edit")
    page.click("#edit [type=submit]")
    page.wait_for_selector("#alert:not([hidden])")
    assert "Add the picture" in page.inner_text("#alert")
    page.set_input_files("#edit [data-drop] input", photo)
    page.wait_for_selector("#edit .thumb")
    page.fill("#edit [name=steps]", "2")
    keep_seed(page, "edit", 3)
    slot = run(page, "edit", "make it green")
    first = np.asarray(model.edit(Image.open(photo), "make it green", seed=3, steps=2)[0].image)
    assert np.array_equal(pixels(saved(page, slot, tmp_path / "first.png")), first)
    slider = slot.get_by_role("slider", name="Before and after")
    for key, at in (("Home", "0%"), ("End", "100%")):
        slider.press(key)
        assert slot.locator(".sides").evaluate("e => e.style.getPropertyValue('--at')") == at
    slot.get_by_role("button", name="Use as input").click()
    slot = run(page, "edit", "make it blue")
    second = np.asarray(model.edit(Image.fromarray(first), "make it blue", seed=3, steps=2)[0].image)
    assert np.array_equal(pixels(saved(page, slot, tmp_path / "second.png")), second)
    page.click("#edit [data-undo]")  # back to the photo
    slot = run(page, "edit", "make it green")
    assert np.array_equal(pixels(saved(page, slot, tmp_path / "third.png")), first)
    drop(page, tmp_path / "second.png", "#edit [data-drop]")  # on the field it is a picture to edit
    page.wait_for_selector("#edit .thumb >> nth=1")
    slot = run(page, "edit", "side by side")
    both = [Image.open(photo).convert("RGB"), Image.fromarray(second)]
    assert np.array_equal(
        pixels(saved(page, slot, tmp_path / "both.png")), np.asarray(model.edit(both, "side by side", seed=3, steps=2)[0].image)
    )


def test_a_brushed_mask_keeps_the_rest(visit: Visit, photo: Path, tmp_path: Path) -> None:
    page = visit("edit")
    page.set_input_files("#edit [data-drop] input", photo)
    page.fill("#edit [name=steps]", "2")
    page.wait_for_selector("#edit .stack img[src]")
    page.locator("#edit .stack canvas").scroll_into_view_if_needed()
    box = page.locator("#edit .stack canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.35, steps=4)
    page.mouse.up()
    ring, stack = page.locator("#edit .cursor").bounding_box(), page.locator("#edit .stack").bounding_box()
    for side, at in (("width", "x"), ("height", "y")):  # the brush is where the pen was
        assert abs((ring[at] + ring[side] / 2 - stack[at]) / stack[side] - 0.35) < 0.02
    slot = run(page, "edit", "make it green")
    source, made = pixels(photo).astype(int), pixels(saved(page, slot, tmp_path / "a.png")).astype(int)
    changed = np.abs(made - source).max(-1) > 0
    assert changed[8:12, 8:12].all() and not changed[18:].any() and not changed[:, 18:].any()
    assert read_settings(tmp_path / "a.png")["masked"] is True
    assert slot.locator(".asked").inner_text() == "make it green"
    page.click("#edit [data-clear]")
    slot = run(page, "edit", "make it green")
    assert (pixels(saved(page, slot, tmp_path / "b.png")).astype(int) != source).any(-1)[18:].mean() > 0.5, "no paint: everywhere"
    page.click("#edit [data-undo]")  # the paint is back
    slot = run(page, "edit", "make it green")
    assert not (pixels(saved(page, slot, tmp_path / "c.png")).astype(int) != source).any(-1)[18:].any()


def test_ask_streams_with_speed_acceptance_and_turns(visit: Visit, model: HyperBagel, photo: Path) -> None:
    page = visit("ask")
    page.set_input_files("#ask [data-drop] input", photo)
    page.wait_for_selector("#ask .thumb")
    page.fill("#ask [name=max_tokens]", "12")
    page.fill("#ask [name=prompt]", "what is it?")
    page.press("#ask [name=prompt]", "Enter")
    turn = page.locator("#ask .turn[data-state=done]").first
    turn.wait_for()
    image = Image.open(photo)
    first = model.ask("what is it?", image, max_tokens=12)
    assert turn.locator(".text").text_content() == first.text
    facts = turn.locator(".timings").inner_text()
    assert re.search(rf"{first.tokens} tokens? · \d+ tokens/s · tau \d\.\d\d", facts) and "first text after" in facts, facts
    page.select_option("#ask [name=drafter]", "none")
    page.fill("#ask [name=prompt]", "and now?")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_function("() => document.querySelectorAll('#ask .turn[data-state=done]').length === 2")
    turn = page.locator("#ask .turn[data-state=done]").nth(1)
    second = model.ask("and now?", image, turns=(("what is it?", first.text),), max_tokens=12)
    assert turn.locator(".text").text_content() == second.text and "no drafter" in turn.inner_text()
    page.click("#ask [data-new]")
    assert page.locator("#ask .turn").count() == 0 == page.locator("#ask .thumb").count()


def test_compare_puts_who_is_there_side_by_side(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    page = visit("compare")
    unavailable = page.locator("#compare [data-who='1']")
    assert unavailable.get_attribute("data-state") == "unavailable" and "Not installed" in unavailable.inner_text()
    keep_seed(page, "compare", 9)
    page.fill("#compare [name=prompt]", "a red car")
    page.click("#compare [type=submit]")
    page.wait_for_selector("#compare [data-who='6'][data-state=done] .speed")
    for who, settings in {"none": {"interval": (0.0, 1.0)}, "6": {"student": "6"}}.items():
        slot = page.locator(f"#compare [data-who='{who}']")
        [expected] = model.generate("a red car", seed=9, text_scale=4.0, **settings)  # type: ignore[arg-type]
        assert np.array_equal(pixels(saved(page, slot, tmp_path / f"{who}.png")), np.asarray(expected.image))
        assert f"seed 9 · {expected.nfe} NFE · prefill" in slot.inner_text()
    assert expected.nfe == 6 and "100 NFE" in page.inner_text("#compare [data-who='none']")
    assert page.locator("#compare [data-who='1']").get_attribute("data-state") == "unavailable"
