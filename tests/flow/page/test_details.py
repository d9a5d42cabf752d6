"""Small things of the web page, each of which a change could break without another test's notice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_world import begin, completed, end, never
from PIL import Image

from hyperbagel.data.images import save_png
from hyperbagel.pipeline import HyperBagel

Visit = Callable[..., Any]
# a drag event of files over the elements that selectors name
DRAG = """([kind, what]) => { const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array([1])], "a.png", { type: "image/png" }));
  document.querySelector(what).dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true })); }"""


def test_the_arrows_go_round_the_tabs_in_both_directions(visit: Visit) -> None:
    page = visit("draw")
    page.focus("#tab-draw")
    for key, tab in (("ArrowLeft", "live"), ("ArrowLeft", "compare"), ("ArrowRight", "live"), ("ArrowRight", "draw")):
        page.keyboard.press(key)
        assert page.locator(f"#{tab}").is_visible() and page.evaluate("document.activeElement.id") == f"tab-{tab}"


def test_an_edit_s_settings_go_to_the_edit_tab(visit: Visit, model: HyperBagel, photo: Path, tmp_path: Path) -> None:
    """With what has to be added by hand, as far as it is not there. The file can then be chosen again."""
    page, mask = visit("draw"), Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 16))
    [result] = model.edit(Image.open(photo), "make it green", seed=3, steps=2, mask=mask)
    save_png(result.image, tmp_path / "edit.png", result.settings)
    page.set_input_files("#restore", tmp_path / "edit.png")
    page.wait_for_selector("#note:not([hidden])")
    assert page.locator("#edit").is_visible() and page.input_value("#edit [name=prompt]") == "make it green"
    told = page.inner_text("#note")
    assert "add the picture it was made from" in told and "paint its mask again" in told
    assert page.input_value("#restore") == ""
    page.set_input_files("#edit [data-drop] input", photo)
    page.wait_for_selector("#edit .thumb")
    assert page.input_value("#edit [data-drop] input") == ""
    page.set_input_files("#restore", tmp_path / "edit.png")
    page.wait_for_function("() => !document.querySelector('#note').textContent.includes('add the picture')")
    assert "paint its mask again" in page.inner_text("#note")


def test_files_over_a_field_are_not_for_the_page(visit: Visit) -> None:
    """The veil that says what the page would do with them is lifted there, and once they are dropped."""
    page = visit("edit")
    veil = page.locator("#dropping")
    page.evaluate(DRAG, ["dragover", "h1"])
    assert veil.is_visible()
    page.evaluate(DRAG, ["dragover", "#edit [data-drop]"])
    assert not veil.is_visible()
    page.evaluate(DRAG, ["dragover", "h1"])
    page.evaluate(DRAG, ["drop", "#edit [data-drop] label"])
    assert not veil.is_visible()
    page.wait_for_selector("#alert:not([hidden])")
    assert "is no picture" in page.inner_text("#alert"), "told once, by the field"


def test_edit_this_leads_to_the_instruction(visit: Visit) -> None:
    page = visit("draw")
    page.fill("#draw [name=steps]", "1")
    begin(page, "draw", "a red car")
    page.get_by_role("button", name="Edit this").click()
    page.wait_for_selector("#edit .thumb")
    assert page.evaluate("document.activeElement === document.querySelector('#edit [name=prompt]')")


@pytest.mark.parametrize("length", ["1", "12"])
def test_an_answer_s_rate_is_of_what_was_decoded(length: str, visit: Visit, model: HyperBagel) -> None:
    """The first token comes with the question, the last one may end the answer. One that was cut off says so."""
    page = visit("ask")
    page.fill("#ask [name=max_tokens]", length)
    page.fill("#ask [name=prompt]", "what is it?")
    page.press("#ask [name=prompt]", "Enter")
    page.wait_for_selector("#ask .turn[data-state=done]")
    facts, answer = page.inner_text("#ask .turn .timings"), model.ask("what is it?", max_tokens=int(length))
    found = re.search(r"(\d+) tokens? · (\d+) tokens/s .* decode (\d+)\sms", facts)
    assert found is not None and int(found[1]) == answer.tokens, facts
    decoded = answer.tokens - 1 + (answer.finish_reason == "stop")
    assert abs(int(found[2]) * int(found[3]) / 1000 - decoded) <= 0.04 * decoded + 0.001 * int(found[2])
    assert ("cut off" in facts) is (answer.finish_reason == "length")


def test_what_is_typed_meanwhile_stays_when_an_answer_is_stopped(visit: Visit) -> None:
    """Else the question comes back."""
    page = visit("ask")
    page.route("**/v1/chat/completions", never)
    for typed in ("and this?", ""):
        page.fill("#ask [name=prompt]", "what is it?")
        page.press("#ask [name=prompt]", "Enter")
        page.wait_for_selector("#ask[aria-busy]")
        page.fill("#ask [name=prompt]", typed)
        end(page, "ask")
        assert page.input_value("#ask [name=prompt]") == (typed or "what is it?")


def test_a_new_conversation_ends_the_old_one_s_answer(visit: Visit) -> None:
    page = visit("ask")
    page.route("**/v1/chat/completions", never)
    page.fill("#ask [name=prompt]", "what is it?")
    page.press("#ask [name=prompt]", "Enter")
    end(page, "ask", "[data-new]")
    assert page.locator("#ask .turn").count() == 0 and page.locator("#ask .hint").is_visible()


def test_all_fields_of_a_question_are_asked(visit: Visit) -> None:
    page = visit("ask")
    page.fill("#ask [name=max_tokens]", "3")
    page.fill("#ask [name=temperature]", "0.7")
    page.select_option("#ask [name=drafter]", "lookup")
    page.check("#ask [name=think]")
    page.fill("#ask [name=prompt]", "what?")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.press("#ask [name=prompt]", "Enter")
    body = asked.value.post_data_json
    assert (body["max_tokens"], body["temperature"], body["drafter"], body["think"]) == (3, 0.7, "lookup", True)
    page.wait_for_selector("#ask .turn[data-state=done]")


def test_compare_says_how_much_faster_a_student_is(visit: Visit, photo: Path) -> None:
    """Reading and denoising together, since a student reads the text within its first evaluation."""
    page = visit("compare")

    def answer(route: Any) -> None:
        student = route.request.post_data_json["student"] == "6"
        completed(route, photo, timings={"prefill": 0.5, "denoise": 0.1} if student else {"prefill": 1.0, "denoise": 2.0})

    page.route("**/v1/images/generations", answer)
    begin(page, "compare", "a red car")
    page.wait_for_selector("#compare [data-who='6'][data-state=done] .speed")
    assert "read and denoised 5.0 times as fast as the teacher" in page.inner_text("#compare [data-who='6']")


def test_who_has_not_begun_when_a_comparison_is_cancelled_is_cancelled_too(visit: Visit) -> None:
    page = visit("compare")
    page.route("**/v1/images/generations", never)
    begin(page, "compare", "a red car")
    end(page, "compare")
    states = {who: page.get_attribute(f"#compare [data-who='{who}']", "data-state") for who in ("none", "6", "1")}
    assert states == {"none": "cancelled", "6": "cancelled", "1": "unavailable"}


def test_the_seed_that_is_shown_is_the_one_that_is_used(visit: Visit) -> None:
    """At first, and again after another was drawn by hand, though none is kept."""
    page = visit("draw")
    page.fill("#draw [name=steps]", "1")
    page.fill("#draw [name=prompt]", "x")
    seeds = [page.input_value("#draw [name=seed]")]
    page.click("#draw [type=submit]")
    page.wait_for_selector("#draw .slot[data-state=done]")
    page.click("#draw [data-dice]")
    seeds.append(page.input_value("#draw [name=seed]"))
    page.click("#draw [type=submit]")
    page.wait_for_function("() => document.querySelectorAll('#draw .slot[data-state=done]').length === 2")
    assert [slot.get_attribute("data-seed") for slot in page.locator("#draw .slot").all()] == seeds[::-1]
    assert not page.is_checked("#draw [name=lock]") and seeds[0] != seeds[1]


def test_a_scale_beyond_the_slider_s_ends_is_restored(visit: Visit, model: HyperBagel, tmp_path: Path) -> None:
    page = visit("draw")
    [result] = model.generate("a red car", seed=3, steps=1, text_scale=9.25)
    save_png(result.image, tmp_path / "a.png", result.settings)
    page.set_input_files("#restore", tmp_path / "a.png")
    page.wait_for_selector("#note:not([hidden])")
    assert page.input_value("#draw [name=text_scale]") == "9.25"
