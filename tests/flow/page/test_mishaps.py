"""What goes wrong, or another way than meant, on the page: it is said where one looks, and one can go on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Visit = Callable[..., Any]
LONG = "300"  # steps that are not over before a key is pressed


def in_sight(page: Any, what: str) -> bool:
    return page.evaluate(
        "s => { const b = document.querySelector(s).getBoundingClientRect(); return b.top >= 0 && b.bottom <= innerHeight; }", what
    )


def test_escape_cancels_what_a_click_has_started(visit: Visit) -> None:
    """The button that was pressed is disabled then, and the focus is nowhere."""
    page = visit("draw")
    page.fill("#draw [name=prompt]", "a red car")
    page.fill("#draw [name=steps]", LONG)
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw[aria-busy]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#draw .slot[data-state=cancelled]")
    page.wait_for_selector("#draw:not([aria-busy])")


def test_an_error_is_in_sight_and_goes_with_its_tab(visit: Visit) -> None:
    page = visit("edit", width=390, height=600)
    page.fill("#edit [name=prompt]", "make it blue")
    page.locator("#edit [type=submit]").scroll_into_view_if_needed()
    page.click("#edit [type=submit]")
    page.wait_for_selector("#alert:not([hidden])")
    assert "Add the picture" in page.inner_text("#alert") and in_sight(page, "#alert")
    page.evaluate("scrollTo(0, 0)")
    page.click("#tab-ask")
    assert page.locator("#alert").is_hidden()


def test_a_wrong_value_behind_closed_settings_is_shown(visit: Visit) -> None:
    page = visit("draw")
    page.fill("#draw [name=prompt]", "a red car")
    page.click("#draw summary")
    page.fill("#draw [name=low]", "7")
    page.click("#draw summary")
    assert not page.locator("#draw details").evaluate("e => e.open")
    page.click("#draw [type=submit]")
    assert page.locator("#draw details").evaluate("e => e.open") and page.locator("#draw .slot").count() == 0


def test_every_slider_has_a_name(visit: Visit) -> None:
    page = visit("draw")
    for tab in ("draw", "edit", "compare", "live"):
        page.click(f"#tab-{tab}")
        for slider in page.locator(f"#{tab} input[type=range][name]").all():
            assert slider.get_attribute("aria-label") in ("Text scale", "Picture scale")


def test_a_live_seed_can_be_typed_anew(visit: Visit) -> None:
    page = visit("live")
    page.wait_for_function("() => document.querySelector('[data-link]').textContent === 'connected'")
    page.fill("#live [name=prompt]", "a red car")
    page.focus("#live [name=seed]")
    page.keyboard.press("Control+a")
    page.keyboard.press("Backspace")
    assert page.input_value("#live [name=seed]") == ""
    page.keyboard.type("9223372036854775807")
    page.wait_for_function("() => document.querySelector('#live [data-tier]').textContent.includes('seed 9223372036854775807')")


def test_full_quality_is_of_the_previews_seed(visit: Visit) -> None:
    page = visit("live")
    page.wait_for_function("() => document.querySelector('[data-link]').textContent === 'connected'")
    page.uncheck("#live [name=lock]")
    page.fill("#live [name=prompt]", "a red car")
    page.wait_for_selector("#live[data-shown]")
    seed = page.input_value("#live [name=seed]")
    page.click("#live [data-full]")
    page.wait_for_selector("#live[data-tier=full]")
    assert f"seed {seed}" in page.inner_text("#live [data-tier]") and page.input_value("#live [name=seed]") == seed
    page.fill("#live [name=seed]", "9999999999999999999")
    page.wait_for_selector("#alert:not([hidden])")
    page.fill("#live [name=seed]", "5")
    page.wait_for_selector("#alert[hidden]", state="attached")


def test_usual_settings_that_are_restored_follow_the_student(visit: Visit, tmp_path: Path) -> None:
    page = visit("draw")
    page.fill("#draw [name=prompt]", "a red car")
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw .slot[data-state=done]", timeout=60_000)
    with page.expect_download() as saved:
        page.locator("#draw .slot").get_by_role("button", name="Download").click()
    saved.value.save_as(tmp_path / "made.png")
    page.set_input_files("#restore", tmp_path / "made.png")
    page.wait_for_selector("#note:not([hidden])")
    assert page.input_value("#draw [name=steps]") == page.input_value("#draw [name=shift]") == ""
    assert page.get_attribute("#draw [name=steps]", "placeholder") == "50"


def test_without_the_models_card_it_can_be_tried_again(visit: Visit) -> None:
    page = visit("draw")
    failing = [True]
    page.route("**/v1/models", lambda route: route.fulfill(status=500, body="{}") if failing[0] else route.continue_())
    page.reload()
    page.wait_for_selector("#alert [data-again]")
    assert page.locator("main").evaluate("e => e.inert")
    assert page.locator("#alert [data-close]").is_hidden()
    page.click("#tab-edit")  # what alone can help stays
    failing[0] = False
    page.click("#alert [data-again]")
    page.wait_for_selector("body[data-ready]")
    assert not page.locator("main").evaluate("e => e.inert") and page.locator("#alert").is_hidden()
    page.unroute_all()


def test_who_scrolls_up_while_an_answer_is_written_stays_there(visit: Visit) -> None:
    page = visit("ask", height=400)
    for _ in range(3):
        page.fill("#ask [name=max_tokens]", "30")
        page.fill("#ask [name=prompt]", "one two three")
        page.press("#ask [name=prompt]", "Enter")
        page.wait_for_selector("#ask:not([aria-busy])")
    page.fill("#ask [name=max_tokens]", "400")
    page.fill("#ask [name=prompt]", "and now?")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask[aria-busy]")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(300)
    assert page.evaluate("scrollY") == 0
    page.click("#ask [data-new]")
    page.wait_for_selector("#ask:not([aria-busy])")
    assert page.input_value("#ask [name=prompt]") == ""


@pytest.mark.parametrize("size", [(40, 24), (2048, 1024)])
def test_a_mask_is_of_the_pictures_size_whatever_is_painted_on(size: tuple[int, int], visit: Visit, tmp_path: Path) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "wide.png")
    page = visit("edit")
    page.set_input_files("#edit [data-drop] input", tmp_path / "wide.png")
    page.wait_for_selector("#edit .stack img[src]")
    page.wait_for_function("() => document.querySelector('#edit canvas').width !== 300")  # a canvas's own width until the picture is there
    painted = page.locator("#edit .stack canvas").evaluate("e => [e.width, e.height]")
    assert painted == (list(size) if max(size) <= 1024 else [1024, 512])
    page.focus("#edit .stack canvas")
    page.keyboard.down("Shift")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Shift")
    sent: list[bytes] = []
    page.route("**/v1/images/edits", lambda route: (sent.append(route.request.post_data_buffer), route.abort()))
    page.fill("#edit [name=prompt]", "make it blue")
    page.click("#edit [type=submit]")
    page.wait_for_selector("#edit .slot[data-state=failed]")
    mask = sent[0][sent[0].index(b'name="mask"') :]
    png = mask[mask.index(b"\x89PNG") :]
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == size and image.getchannel("A").getextrema() == (0, 255)
    page.click("#edit [data-undo]")  # three presses while Shift is held are one stroke
    page.wait_for_function("""() => {
        const { data } = document.querySelector("#edit canvas").getContext("2d").getImageData(0, 0, 40, 24);
        return !data.some(Boolean);
    }""")
    page.unroute_all()


def test_too_many_pictures_are_told(visit: Visit, photo: Path) -> None:
    page = visit("edit")
    most = page.evaluate("fetch('v1/models').then((r) => r.json()).then((j) => j.data[0].limits.images)")
    page.set_input_files("#edit [data-drop] input", [photo] * (most + 2))
    page.wait_for_selector("#note:not([hidden])")
    assert "the first 2 were left out" in page.inner_text("#note") and page.locator("#edit .thumb").count() == most


def test_what_firefox_keeps_over_a_reload_is_reset(visit: Visit) -> None:
    """It puts back whether a button was disabled; here the page comes with all of them enabled, as Firefox then shows it."""
    page = visit("edit")
    served = page.request.get(page.url).text()
    page.route("**/", lambda route: route.fulfill(body=served.replace(" disabled>", ">"), content_type="text/html"))
    page.reload()
    page.wait_for_selector("body[data-ready]")
    for button in ("#edit [data-undo]", "#live [data-use]", "#live [data-save]"):
        assert page.locator(button).is_disabled(), button
    page.unroute_all()


def test_the_page_works_where_nothing_may_be_stored(visit: Visit, locked: str) -> None:
    """As with all cookies blocked; the key is then kept in the page."""
    page = visit("draw", at=locked, ready=False)
    page.add_init_script("Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('no', 'SecurityError'); } });")
    page.reload()
    page.wait_for_selector("#key[open]")
    page.fill("#key input", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-ready]")
    page.click("#tab-live")
    page.wait_for_function("() => document.querySelector('#live [data-link]').textContent === 'connected'")


def test_a_canvas_that_is_read_as_noise_is_no_mask(visit: Visit, photo: Path) -> None:
    """As Firefox has it with resistFingerprinting: without paint there is no mask, with paint it is said why not."""
    page = visit("edit")
    page.add_init_script("""const read = CanvasRenderingContext2D.prototype.getImageData;
        CanvasRenderingContext2D.prototype.getImageData = function (...box) {
            const image = read.apply(this, box); image.data.fill(90); return image; };""")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.set_input_files("#edit [data-drop] input", photo)
    page.wait_for_function("() => document.querySelector('#edit canvas').width === 32")
    sent: list[bytes] = []
    page.route("**/v1/images/edits", lambda route: (sent.append(route.request.post_data_buffer), route.abort()))
    page.fill("#edit [name=prompt]", "make it blue")
    page.click("#edit [type=submit]")
    page.wait_for_selector("#edit .slot[data-state=failed]")
    assert len(sent) == 1 and b'name="prompt"' in sent[0] and b'name="mask"' not in sent[0]
    page.press("#edit .stack canvas", "Space")
    page.click("#edit [type=submit]")
    page.wait_for_function("() => document.querySelector('#alert').textContent.includes('fingerprinting')")
    assert len(sent) == 1
    page.unroute_all()


def test_a_picture_of_the_page_can_be_dropped_by_its_address(visit: Visit, photo: Path) -> None:
    """Which is all that Firefox gives of it; what else comes without a file is told."""
    page = visit("edit")
    page.set_input_files("#edit [data-drop] input", photo)
    page.wait_for_selector("#edit .thumb")
    drop = """url => { const transfer = new DataTransfer(); transfer.setData("text/uri-list", url);
        const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
        document.querySelector("#edit [data-drop]").dispatchEvent(drop); }"""
    page.evaluate(drop, page.get_attribute("#edit .thumb img", "src"))
    page.wait_for_selector("#edit .thumb >> nth=1")
    page.evaluate(drop, "https://example.org/a.png")
    page.wait_for_selector("#alert:not([hidden])")
    assert "No file was dropped" in page.inner_text("#alert") and page.locator("#edit .thumb").count() == 2


def test_a_pasted_picture_joins_the_open_tab(visit: Visit, photo: Path) -> None:
    """A copy of text that brings a picture along, as office programs make it, stays text."""
    page = visit("edit")
    paste = """([bytes, text]) => { const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
        if (text) transfer.setData("text/plain", text);
        const event = new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
        return !document.querySelector("#edit [name=prompt]").dispatchEvent(event); }"""
    taken = page.evaluate(paste, [list(photo.read_bytes()), ""])
    page.wait_for_selector("#edit .thumb")
    assert taken and not page.evaluate(paste, [list(photo.read_bytes()), "a table"])
    page.click("#tab-ask")
    assert page.evaluate(paste, [list(photo.read_bytes()), ""])
    page.wait_for_selector("#ask .thumb")
    assert page.locator("#edit .thumb").count() == page.locator("#ask .thumb").count() == 1
