"""The demo page: everything inside one file, every text escaped, both colour schemes, the same page for the same seed."""

from __future__ import annotations

import base64
import io
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from hyperbagel import demo


class FakeModel:
    """Gives back noise, or the source picture, or the text `<b>two</b>`; counts what it was asked."""

    load_seconds = 0.5
    default_size = (64, 64)

    def __init__(self, students: dict[str, int] | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.painted: list[str] = []
        nfe = students or {}
        self.students = SimpleNamespace(names=lambda: sorted(nfe), sampler=lambda name: SimpleNamespace(nfe=nfe[name]))

    def _picture(self, seed: int) -> Any:
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        timings = {"prefill": 0.25, "denoise": 1.0, "decode": 0.25}
        return SimpleNamespace(image=Image.fromarray(pixels), seed=seed, nfe=150, timings=timings)

    def generate(self, prompt: str, *, seed: int, student: str) -> list[Any]:
        self.painted.append(student)
        self.asked.append(("generate", prompt))
        return [self._picture(seed)]

    def edit(self, images: list[Image.Image], instruction: str, *, seed: int, student: str) -> list[Any]:
        assert [image.size for image in images] == [(64, 64)]
        self.asked.append(("edit", instruction))
        return [self._picture(seed)]

    def ask(self, question: str, images: list[Image.Image]) -> Any:
        assert [image.size for image in images] == [(64, 64)]
        self.asked.append(("ask", question))
        return SimpleNamespace(text="<b>two</b>", tokens=3, tau=None, timings={"prefill": 0.5, "decode": 0.5})


class Checker(HTMLParser):
    """Collects images, and fails on a tag that is closed by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_asks_nobody(tmp_path: Path) -> None:
    model, notes = FakeModel(), []
    path = demo.build_demo(model, tmp_path, seed=3, note=notes.append)  # type: ignore[arg-type]
    text = path.read_text("utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and [file.name for file in tmp_path.iterdir()] == ["index.html"]
    kinds = [kind for kind, _ in model.asked]
    assert [kinds.count(kind) for kind in ("generate", "edit", "ask")] == [demo.PICTURES, demo.EDITS, demo.ANSWERS]
    assert len(notes) == len(model.asked) and all(asked in note for note, (_, asked) in zip(notes, model.asked, strict=True))
    assert len(checker.images) == demo.PICTURES + 3 * demo.EDITS + demo.ANSWERS
    for image in checker.images:
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64" and image["alt"]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
    assert not re.search(r"https?://|<script|<link|url\(", text)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "&lt;b&gt;two&lt;/b&gt;" in text and "<b>two</b>" not in text
    assert "1.50 s each on average for the model itself" in text and "1.00 s each on average" in text
    assert "0.25 s prefill + 1.00 s denoise + 0.25 s decode, 150 NFE" in text


def test_the_seed_makes_the_page(tmp_path: Path) -> None:
    def build(seed: int) -> str:
        return demo.build_demo(FakeModel(), tmp_path, seed=seed).read_text("utf-8")  # type: ignore[arg-type]

    assert build(1) == build(1) != build(2)


def test_students_draw_the_same_beside_their_teacher(tmp_path: Path) -> None:
    model = FakeModel({"1": 1, "6": 6})
    path = demo.build_demo(model, tmp_path, seed=3)  # type: ignore[arg-type]
    checker = Checker()
    checker.feed(path.read_text("utf-8"))
    assert model.painted[:3] == ["none", "6", "1"]
    assert len(checker.images) == 3 * demo.PICTURES + 5 * demo.EDITS + demo.ANSWERS


def test_distinct_takes_one_of_each_key_first() -> None:
    rng = random.Random(0)
    drawn = demo.distinct(lambda: rng.choice("aaaaaaaabc"), lambda item: item, 3)
    assert sorted(drawn) == ["a", "b", "c"]
    assert demo.distinct(lambda: "a", lambda item: item, 3) == ["a", "a", "a"]


def test_an_empty_answer_is_said() -> None:
    card = demo.Card(pictures=(), asked="how many?", answer="", wanted="two")
    assert "(nothing)" in demo.card_html(card)
