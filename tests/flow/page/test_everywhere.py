"""What holds for the whole page: a phone's width, the keyboard, light and dark, the key, errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperbagel.serve import realtime

Visit = Callable[..., Any]
# name of the control with the focus and the style of the line around it (a file's field is its label)
FOCUSED = """() => {
  const e = document.activeElement;
  return e === document.body ? null : [e.name || e.textContent.trim().slice(0, 20), getComputedStyle(e.closest(".file") ?? e).outlineStyle];
}"""
# pixels of the mask that hold paint
PAINTED = """() => {
  const c = document.querySelector("#edit .stack canvas");
  return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].filter((v, i) => i % 4 === 3 && v).length;
}"""
TABS = ("draw", "edit", "ask", "compare", "live")


def test_a_phone_s_width_is_enough(visit: Visit, photo: Path) -> None:
    """No sideways scrolling, every control inside the screen and large enough for a thumb, and a picture comes."""
    page = visit("draw", width=360, height=700)
    page.set_input_files("#edit [data-drop] input", photo)
    page.fill("#draw [name=steps]", "1")
    page.fill("#draw [name=prompt]", "a red car")
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw .slot[data-state=done]")
    for tab in TABS:
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
        for control in page.locator(f"#{tab} button:visible, #{tab} select:visible, #{tab} textarea:visible").all():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360, f"{tab}: {control.evaluate('e => e.outerHTML')}"
            assert box["height"] >= 24, f"{tab}: {control.evaluate('e => e.outerHTML')}"


def test_on_a_phone_the_live_picture_stays_in_sight(visit: Visit) -> None:
    """Above what is typed, and also when one scrolls down to the buttons."""
    page = visit("live", width=360, height=640)
    top = lambda what: page.locator(f"#live {what}").bounding_box()["y"]  # noqa: E731
    assert 0 <= top("canvas") < top("[name=prompt]") < 500
    page.locator("#live [data-save]").scroll_into_view_if_needed()
    assert page.evaluate("scrollY") > 0 and 0 <= top("canvas") < 40


def test_everything_by_keyboard(visit: Visit, photo: Path) -> None:
    page = visit("draw")
    page.focus("#tab-draw")
    for tab in (*TABS[1:], TABS[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}" and page.locator(f"#{tab}").is_visible()
        assert page.evaluate("location.hash") == f"#{tab}"
    page.keyboard.press("Tab")
    page.keyboard.type("a red car")
    page.fill("#draw [name=steps]", "1")
    page.focus("#draw [name=prompt]")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#draw .slot[data-state=done]")
    # every control can be reached by Tab, and is seen when it has the focus
    page.focus("#tab-draw")
    reached, outlines = set(), set()
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUSED)
        if found is None:  # behind the last control comes the browser's own
            break
        name, outline = found
        reached.add(name)
        outlines.add(outline)
    assert {
        "prompt",
        "student",
        "steps",
        "size",
        "n",
        "text_scale",
        "seed",
        "New",
        "lock",
        "think",
        "More settings",
        "Draw",
        "Edit this",
    } <= reached
    assert outlines == {"solid"}
    # the brush
    page.set_input_files("#edit [data-drop] input", photo)
    page.click("#tab-edit")
    page.wait_for_selector("#edit .stack img[src]")
    page.focus("#edit .stack canvas")
    for key in ("ArrowLeft", "Space", "Shift+ArrowUp"):
        page.keyboard.press(key)
    painted = page.evaluate(PAINTED)
    assert 20 < painted < 32 * 32


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    values = [float(piece) / 255 for piece in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(visit: Visit, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, in both schemes; and they are different."""
    page = visit("draw")
    page.emulate_media(color_scheme=scheme)
    find = "([s, p]) => getComputedStyle(document.querySelector(s))[p]"
    back = luminance(page.evaluate(find, ["body", "backgroundColor"]))
    assert (back > 0.8) if scheme == "light" else (back < 0.05)
    for text, ground in (
        ("body", "body"),
        ("#draw .faint", "body"),
        ("#draw .main", "#draw .main"),
        ("#draw textarea", "#draw textarea"),
        ("#alert", "#alert"),
    ):
        light, dark = sorted(
            (luminance(page.evaluate(find, [text, "color"])), luminance(page.evaluate(find, [ground, "backgroundColor"])))
        )[::-1]
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fields_and_their_hints_can_be_made_out(visit: Visit, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for what stands in an empty field, 3 to 1 for a field's edge and for the ring of what has the focus."""
    page = visit("draw")
    page.emulate_media(color_scheme=scheme)
    find = "([s, p, of]) => getComputedStyle(document.querySelector(s), of)[p]"
    page_, field = (luminance(page.evaluate(find, [s, "backgroundColor", None])) for s in ("body", "#draw textarea"))
    contrast = lambda a, b: (max(a, b) + 0.05) / (min(a, b) + 0.05)  # noqa: E731
    hint = page.evaluate(find, ["#draw [name=steps]", "color", "::placeholder"])
    assert hint.startswith("rgb(") and contrast(luminance(hint), field) >= 4.5
    for control in ("textarea", "select", "[name=steps]", "[name=seed]"):
        edge = luminance(page.evaluate(find, [f"#draw {control}", "borderTopColor", None]))
        assert min(contrast(edge, page_), contrast(edge, field)) >= 3, control
    assert page.evaluate(find, ["#compare .slot.off", "opacity", None]) == "1", "that a student is not installed is to be read, too"
    page.focus("#draw textarea")
    assert contrast(luminance(page.evaluate(find, ["#draw textarea", "outlineColor", None])), page_) >= 3


def test_the_mask_s_ring_is_as_strong_as_any(visit: Visit, photo: Path) -> None:
    """Its canvas is translucent; the ring is of what is around it."""
    page = visit("edit")
    page.set_input_files("#edit [data-drop] input", photo)
    page.wait_for_selector("#edit .stack img[src]")
    page.focus("#edit [data-size]")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    style = page.locator("#edit .stack").evaluate("e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).opacity]")
    assert style == ["solid", "1"]


def test_the_chosen_tab_is_seen_in_the_system_s_colours(visit: Visit) -> None:
    page = visit("draw")
    page.emulate_media(forced_colors="active")
    edge = "s => getComputedStyle(document.querySelector(s)).borderBottomColor"
    chosen, other = (page.evaluate(edge, f"#tab-{tab}") for tab in ("draw", "edit"))
    assert other == page.evaluate("getComputedStyle(document.body).backgroundColor") != chosen


@pytest.mark.parametrize(("width", "size"), [(320, "100%"), (390, "200%")])
def test_a_narrow_screen_and_text_of_twice_the_size(visit: Visit, photo: Path, width: int, size: str) -> None:
    page = visit("draw", width=width, height=700)
    rules = "[...document.styleSheets[0].cssRules].find((r) => r.selectorText === ':root').style.fontSize"
    assert page.evaluate(rules) == "100%", "the size that was chosen in the browser's settings"
    page.evaluate("size => { document.documentElement.style.fontSize = size; }", size)
    page.set_input_files("#edit [data-drop] input", photo)
    for tab in TABS:
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        what = ", ".join(f"#{tab} {kind}:visible" for kind in ("button", "select", "textarea", "input:not([type=file])"))
        for control in page.locator(f"{what}, [role=tab], #{tab} label.check:visible").all():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, f"{tab}: {control.evaluate('e => e.outerHTML')}"
        for check in page.locator(f"#{tab} label.check:visible").all():
            assert check.bounding_box()["height"] >= 24
        for seed in page.locator(f"#{tab} [name=seed]").all():
            assert seed.evaluate("e => e.clientWidth / parseFloat(getComputedStyle(e).fontSize)") >= 6, "its digits can be read"


def test_on_a_phone_what_has_the_focus_is_not_behind_the_live_picture(visit: Visit) -> None:
    page = visit("live", width=390, height=560)
    page.focus("#live [data-full]")
    page.evaluate("scrollTo(0, 9999)")
    seen = """() => { const e = document.activeElement, box = e.getBoundingClientRect();
        const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
        return [e.name || e.textContent, e.contains(at)]; }"""
    found = []
    while not found or found[-1][0] != "prompt":
        page.keyboard.press("Shift+Tab")
        found.append(page.evaluate(seen))
        assert len(found) < 20
    assert all(free for _, free in found), found


def test_the_end_of_a_work_is_said(visit: Visit) -> None:
    """To who hears the page: in a live region that is there from the start."""
    page = visit("draw")
    assert page.locator("#said").evaluate("e => e.parentElement.role") == "status"
    page.fill("#draw [name=steps]", "1")
    page.fill("#draw [name=seed]", "3")
    page.fill("#draw [name=prompt]", "a red car")
    page.click("#draw [type=submit]")
    page.wait_for_function("() => document.querySelector('#said').textContent === 'The picture is done, seed 3.'")
    page.fill("#draw [name=steps]", "10000")
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw .slot[data-state=drawing]")
    assert page.text_content("#said") == ""
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('#said').textContent === 'Cancelled.'")
    page.click("#tab-ask")
    page.fill("#ask [name=max_tokens]", "3")
    page.fill("#ask [name=prompt]", "what?")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask .turn[data-state=done]")
    page.wait_for_selector("#ask:not([aria-busy])")
    assert page.text_content("#said") == page.text_content("#ask .turn .text")


def test_a_key_is_asked_for_and_used_everywhere(visit: Visit, locked: str) -> None:
    page = visit("draw", at=locked, ready=False)
    page.wait_for_selector("#key[open]")
    page.fill("#key input", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key[open] input:focus")
    page.fill("#key input", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-ready]")
    page.fill("#draw [name=steps]", "1")
    page.fill("#draw [name=prompt]", "a red car")
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw .slot[data-state=done]")
    page.click("#tab-live")
    page.fill("#live [name=prompt]", "a red car")
    page.wait_for_selector("#live[data-tier=better]")
    page.evaluate("sessionStorage.setItem('hyperbagel-key', 'old')")  # as if the server had been started with another
    page.click("#tab-ask")
    page.fill("#ask [name=prompt]", "what?")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#key[open]")
    page.click("#key [value=cancel]")
    page.wait_for_selector("#alert:not([hidden])")
    assert "needs an API key" in page.inner_text("#alert")


def test_errors_say_what_to_do_and_nothing_of_the_inside(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: Any) -> None:
    page = visit("draw")
    page.fill("#draw [name=prompt]", "   ")
    page.click("#draw [type=submit]")
    page.wait_for_selector("#alert:not([hidden])")
    assert "empty prompt" in page.inner_text("#alert")
    monkeypatch.setattr(app.state.engine.models[0].parts.vae, "decode", lambda z: 1 / 0)
    page.fill("#draw [name=prompt]", "a red car")
    page.fill("#draw [name=steps]", "1")
    page.click("#draw [type=submit]")
    page.wait_for_function("() => document.querySelector('#alert').textContent.includes('internal error')")
    assert "Traceback" not in page.content() and "ZeroDivision" not in page.content()
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text("hello")
    page.click("#tab-edit")
    page.set_input_files("#edit [data-drop] input", tmp_path / "a.txt")
    page.wait_for_function("() => document.querySelector('#alert').textContent.includes('a.txt is no picture')")
    page.context.set_offline(True)
    try:
        page.click("#tab-draw")
        page.click("#draw [type=submit]")
        page.wait_for_function("() => document.querySelector('#alert').textContent.includes('cannot be reached')")
    finally:
        page.context.set_offline(False)
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw .slot[data-state=done]")
    assert not page.locator("#alert").is_visible(), "what works again takes the old error away"


def test_half_an_answer_is_no_answer(visit: Visit) -> None:
    """A stream that ends too early, as behind a proxy that gives up, is told and not taken into the conversation."""
    page = visit("ask")
    half = 'data: {"choices": [{"index": 0, "delta": {"content": "a red"}, "finish_reason": null}]}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=half))
    page.fill("#ask [name=prompt]", "what is it?")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask .turn[data-state=failed]")
    assert "broke off" in page.inner_text("#alert") and page.input_value("#ask [name=prompt]") == "what is it?"
    page.unroute("**/v1/chat/completions")
    page.fill("#ask [name=max_tokens]", "2")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask .turn[data-state=done]")


def test_text_of_a_model_or_a_user_never_becomes_markup(visit: Visit) -> None:
    page = visit("ask")
    page.fill("#ask [name=max_tokens]", "2")
    page.fill("#ask [name=prompt]", "<img src=x onerror='window.hit = 1'>")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask .turn[data-state=done]")
    assert page.locator("#ask .talk img").count() == 0 and page.evaluate("window.hit") is None


def test_a_live_error_is_shown(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"student": "none", "steps": 10**9}
    monkeypatch.setattr(realtime, "tiers", lambda model: dict.fromkeys(("preview", "better", "full"), wrong))
    page = visit("live")
    page.wait_for_function("() => document.querySelector('#live [data-link]').textContent === 'connected'")
    page.fill("#live [name=prompt]", "a red car")
    page.wait_for_selector("#alert:not([hidden])")
    assert "steps" in page.inner_text("#alert")
    page.wait_for_selector("#live:not([aria-busy])")


def test_the_icon_and_every_module_are_served(visit: Visit) -> None:
    bad: list[str] = []
    page = visit("draw")
    page.on("response", lambda response: bad.append(response.url) if response.status >= 400 else None)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert bad == []
