"""Small things about pictures, masks and settings on the web page: see test_details."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_world import begin, completed, drop, never
from PIL import Image

from hyperbagel.data.images import save_png
from hyperbagel.pipeline import HyperBagel

Visit = Callable[..., Any]
PAINTED = "document.querySelector('#edit canvas').getContext('2d').getImageData(0, 0, 32, 32).data.some(Boolean)"


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        Image.new("RGB", (32, 32), path.stem).save(path)
    return paths


def source(page: Any, path: Path) -> Any:
    """The Edit tab's canvas, with this picture below it."""
    page.set_input_files("#edit [data-drop] input", path)
    page.wait_for_function(
        "() => document.querySelector('#edit canvas').width === 32 && document.querySelector('#edit .stack img').complete"
    )
    canvas = page.locator("#edit .stack canvas")
    canvas.scroll_into_view_if_needed()
    return canvas


def colours(page: Any, what: str) -> list[list[int]]:
    """The first pixel of each picture that a selector names."""
    return page.evaluate(
        """async (what) => Promise.all([...document.querySelectorAll(what)].map(async (image) => {
          const pen = new OffscreenCanvas(1, 1).getContext('2d');
          pen.drawImage(await createImageBitmap(image.blob), 0, 0);
          return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => Math.round(value / 128)); }))""",
        what,
    )


def test_pictures_are_taken_away_one_by_one_and_come_back(visit: Visit, photos: list[Path]) -> None:
    page = visit("edit")
    for i, path in enumerate(photos):
        page.set_input_files("#edit [data-drop] input", path)
        page.wait_for_selector(f"#edit .thumb >> nth={i}")
    page.get_by_role("button", name="Remove picture 2").click()
    assert colours(page, "#edit .thumb img") == [[2, 0, 0], [0, 0, 2]]
    for left in (3, 2, 1, 0):
        assert page.is_enabled("#edit [data-undo]")
        page.click("#edit [data-undo]")
        page.wait_for_function(f"() => document.querySelectorAll('#edit .thumb').length === {left}")
    assert page.is_disabled("#edit [data-undo]")


def test_live_keeps_the_newest_picture(visit: Visit, photos: list[Path]) -> None:
    page = visit("live")
    for path in photos[:2]:
        page.set_input_files("#live [data-drop] input", path)
        page.wait_for_selector("#live .thumb")
    page.wait_for_function("() => document.querySelector('#live .thumb img').blob.name === 'green.png'")
    assert page.locator("#live .thumb").count() == 1


def test_the_picture_beside_an_edit_is_the_one_that_it_changed(visit: Visit, photos: list[Path]) -> None:
    """The last of several, as the model has it; with a mask the first, which lies below the paint."""
    page = visit("edit")
    canvas = source(page, photos[0])
    page.set_input_files("#edit [data-drop] input", photos[1])
    page.wait_for_selector("#edit .thumb >> nth=1")
    page.fill("#edit [name=steps]", "1")
    page.fill("#edit [name=prompt]", "side by side")
    for before in ([0, 1, 0], [2, 0, 0]):
        page.click("#edit [type=submit]")
        page.wait_for_selector("#edit .slot[data-state=done] .sides")
        page.wait_for_selector("#edit:not([aria-busy])")
        assert colours(page, "#edit .slot:first-child .sides img[alt=before]") == [before]
        canvas.scroll_into_view_if_needed()
        canvas.click()


def test_the_brush_dots_erases_and_obeys_the_left_button_alone(visit: Visit, photos: list[Path]) -> None:
    page = visit("edit")
    canvas = source(page, photos[0])
    canvas.click(button="right")
    assert not page.evaluate(PAINTED)
    canvas.click()
    assert page.evaluate(PAINTED), "a dot"
    ring, stack = page.locator("#edit .cursor").bounding_box(), page.locator("#edit .stack").bounding_box()
    assert ring["width"] / stack["width"] == pytest.approx(0.28, abs=0.02), "the ring is as wide as the stroke"
    page.check("#edit [data-erase]")
    page.fill("#edit [data-size]", "50")
    canvas.click()
    assert not page.evaluate(PAINTED)


def test_a_key_that_is_held_is_one_stroke(visit: Visit, photos: list[Path]) -> None:
    """Two presses are two, each with an undo; and the keyboard's brush stays on the picture."""
    page = visit("edit")
    source(page, photos[0]).focus()
    for _ in range(2):
        for _ in range(3):
            page.keyboard.down(" ")  # again without an end: a key that is held repeats
        page.keyboard.up(" ")
    for painted in (True, False):
        page.click("#edit [data-undo]")
        page.wait_for_function(f"() => {PAINTED} === {str(painted).lower()}")
    page.focus("#edit canvas")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("parseFloat(document.querySelector('#edit .cursor').style.left)") == 0


def test_painted_masks_are_not_asked_for_again(visit: Visit, model: HyperBagel, photos: list[Path], tmp_path: Path) -> None:
    page, mask = visit("edit"), Image.new("L", (32, 32), 255)
    [result] = model.edit(photos[0], "make it green", seed=3, steps=1, mask=mask)
    save_png(result.image, tmp_path / "edit.png", result.settings)
    source(page, photos[0]).click()
    page.set_input_files("#restore", tmp_path / "edit.png")
    page.wait_for_selector("#note:not([hidden])")
    assert "mask" not in page.inner_text("#note") and page.evaluate(PAINTED)


def test_a_picture_dropped_on_a_field_restores_nothing(visit: Visit, photos: list[Path]) -> None:
    page = visit("edit")
    drop(page, photos[0], "#edit [data-drop]")
    page.wait_for_selector("#edit .thumb")
    page.wait_for_timeout(100)  # for what should not come
    assert not page.locator("#alert").is_visible()


def test_of_several_pictures_those_that_are_there_stay(visit: Visit, photos: list[Path]) -> None:
    """When the stream breaks off behind the first of two."""
    page = visit("draw")
    page.route("**/v1/images/generations", lambda route: completed(route, photos[0], index=0))
    page.fill("#draw [name=n]", "2")
    begin(page, "draw", "x")
    page.wait_for_selector("#alert:not([hidden])")
    assert [slot.get_attribute("data-state") for slot in page.locator("#draw .slot").all()] == ["done", "failed"]
    assert "broke off" in page.inner_text("#alert")


def test_escape_is_for_the_tab_that_is_shown(visit: Visit) -> None:
    page = visit("draw")
    page.route("**/v1/images/generations", never)
    begin(page, "draw", "x")
    page.wait_for_selector("#draw[aria-busy]")
    page.click("#tab-ask")
    page.keyboard.press("Escape")
    page.click("#tab-draw")
    page.wait_for_timeout(100)
    assert page.get_attribute("#draw", "aria-busy") == "true"
    page.keyboard.press("Escape")
    page.wait_for_selector("#draw:not([aria-busy])")
    assert page.text_content("#said") == "Cancelled."


def test_enter_sends_a_question_but_for_a_new_line_or_a_word_in_composition(visit: Visit) -> None:
    page = visit("ask")
    page.route("**/v1/chat/completions", never)
    page.fill("#ask [name=prompt]", "what")
    page.press("#ask [name=prompt]", "Shift+Enter")
    assert page.input_value("#ask [name=prompt]") == "what\n"
    for key in ("{ key: 'Enter', isComposing: true, bubbles: true }", "{ key: 'Enter', keyCode: 229, bubbles: true }"):
        page.evaluate(f"document.querySelector('#ask [name=prompt]').dispatchEvent(new KeyboardEvent('keydown', {key}))")
    assert page.get_attribute("#ask", "aria-busy") is None
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask[aria-busy]")


def test_restored_settings_are_of_who_drew(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    """One picture, and nothing of a student's that only the model itself has: those fields cannot be filled."""
    page = visit("draw")
    [result] = model.generate("a red car", seed=3, student="6")
    save_png(result.image, tmp_path / "a.png", result.settings)
    page.fill("#draw [name=n]", "3")
    page.set_input_files("#restore", tmp_path / "a.png")
    page.wait_for_selector("#note:not([hidden])")
    assert page.input_value("#draw [name=n]") == "1" and page.input_value("#draw [name=student]") == "6"
    for name in ("low", "high", "renorm", "renorm_min"):
        assert page.is_disabled(f"#draw [name={name}]") and page.input_value(f"#draw [name={name}]") == ""
    page.select_option("#draw [name=student]", "none")
    assert page.is_enabled("#draw [name=low]")


def test_a_key_may_be_pasted_with_spaces(visit: Visit, locked: str) -> None:
    page = visit("draw", at=locked, ready=False)
    page.fill("#key input", " sesame ")
    page.press("#key input", "Enter")
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("sessionStorage.getItem('hyperbagel-key')") == "sesame"


def test_live_asks_for_a_key_that_is_no_longer_right(visit: Visit, locked: str) -> None:
    """And then goes on, with what was typed meanwhile."""
    page = visit("draw", at=locked, ready=False)
    page.fill("#key input", "sesame")
    page.press("#key input", "Enter")
    page.wait_for_selector("body[data-ready]")
    page.evaluate("sessionStorage.setItem('hyperbagel-key', 'stale')")
    page.click("#tab-live")
    page.wait_for_selector("#key[open]")
    page.evaluate("document.querySelector('#live [name=prompt]').value = 'a red car'")
    page.fill("#key input", "sesame")
    page.press("#key input", "Enter")
    page.wait_for_selector("#live[data-shown]")
    assert page.inner_text("#live [data-link]") == "connected"
