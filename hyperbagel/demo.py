"""A page of pictures, edits and answers made by one model on this machine: one HTML file that holds its pictures and fetches nothing.

The toybox and a seed choose what is asked, and nothing is picked out: the page shows failures too. Beside an edit stands the wanted
picture, beside an answer the right one, so that a reader can judge without knowing the toybox.
"""

from __future__ import annotations

import base64
import html
import io
import platform
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hyperbagel.core.files import atomic_write_text
from hyperbagel.toybox import language
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene

if TYPE_CHECKING:
    from hyperbagel.pipeline import HyperBagel, ImageResult

PICTURES, EDITS, ANSWERS = 8, 9, 8  # cards of each section; there are nine groups of edits


@dataclass(frozen=True)
class Card:
    """One card of the page: (label, picture) pairs, what was asked, for a question the answer and the right one, and what it took."""

    pictures: tuple[tuple[str, Image.Image], ...]
    asked: str
    answer: str = ""
    wanted: str = ""
    took: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Section:
    """`title` also names the layout of the cards in the style sheet."""

    title: str
    text: str
    cards: tuple[Card, ...]


def distinct(draw: Callable[[], Any], key: Callable[[Any], Any], n: int, tries: int = 400) -> list[Any]:
    """n draws with as many different keys as `tries` draws gave: the first of each key, then others, in the order they came."""
    first: dict[Any, Any] = {}
    spare: list[Any] = []
    for _ in range(tries):
        item = draw()
        if key(item) in first:
            spare.append(item)
        else:
            first[key(item)] = item
        if len(first) >= n:
            break
    return [*first.values(), *spare][:n]


def took(timings: Mapping[str, float], tail: str) -> dict[str, Any]:
    """A card's fields `took` (0.03 s prefill + 1.20 s denoise + 0.05 s decode, 150 NFE) and `seconds`, the sum."""
    parts = " + ".join(f"{value:.2f} s {name}" for name, value in timings.items())
    return {"took": f"{parts}, {tail}", "seconds": sum(timings.values())}


def draw_scene(scene: Scene, model: HyperBagel) -> Image.Image:
    """The scene as a square picture with the model's own height."""
    return Image.fromarray(render(scene, model.default_size[0]))


def painters(model: HyperBagel) -> list[str]:
    """Who draws each picture: the model itself ("none"), then its students from the slowest to the fastest."""
    names = model.students.names()
    return ["none", *sorted(names, key=lambda name: -model.students.sampler(name).nfe)]


def labelled(results: Sequence[ImageResult]) -> tuple[tuple[str, Image.Image], ...]:
    """Each picture, labelled with its evaluations and seconds."""
    return tuple((f"{result.nfe} NFE, {sum(result.timings.values()):.2f} s", result.image) for result in results)


def pictures(model: HyperBagel, rng: random.Random, note: Callable[[str], None]) -> Iterable[Card]:
    """A card for each caption, drawn by all of `painters` with one seed."""
    samples = distinct(lambda: language.sample_t2i(rng), lambda sample: sample.category, PICTURES)
    for i, sample in enumerate(samples):
        note(f"picture {i + 1} of {len(samples)}: {sample.prompt}")
        seed = rng.getrandbits(31)
        results = [model.generate(sample.prompt, seed=seed, student=who)[0] for who in painters(model)]
        shown = labelled(results) if len(results) > 1 else (("", results[0].image),)
        yield Card(shown, sample.prompt, **took(results[0].timings, f"{results[0].nfe} NFE, seed {seed}"))


def edits(model: HyperBagel, rng: random.Random, note: Callable[[str], None]) -> Iterable[Card]:
    """A card for each instruction: the source, the edits of all `painters` with one seed, and the wanted picture."""
    samples = distinct(lambda: language.sample_edit(rng), lambda sample: sample.group, EDITS)
    for i, sample in enumerate(samples):
        note(f"edit {i + 1} of {len(samples)}: {sample.instruction}")
        source = draw_scene(sample.source, model)
        seed = rng.getrandbits(31)
        results = [model.edit([source], sample.instruction, seed=seed, student=who)[0] for who in painters(model)]
        shown = (("before", source), *labelled(results), ("wanted", draw_scene(sample.target, model)))
        yield Card(shown, sample.instruction, **took(results[0].timings, f"{results[0].nfe} NFE, seed {seed}"))


def answers(model: HyperBagel, rng: random.Random, note: Callable[[str], None]) -> Iterable[Card]:
    """A card for each question, with the model's answer and the right one."""
    samples = distinct(lambda: language.sample_question(rng), lambda sample: sample.kind, ANSWERS)
    for i, sample in enumerate(samples):
        note(f"question {i + 1} of {len(samples)}: {sample.question}")
        picture = draw_scene(sample.scene, model)
        result = model.ask(sample.question, [picture])
        drafted = "" if result.tau is None else f", {result.tau:.1f} tokens per forward"
        spent = took(result.timings, f"{result.tokens} tokens{drafted}")
        yield Card((("", picture),), sample.question, answer=result.text, wanted=sample.answer, **spent)


def build_demo(model: HyperBagel, out: Path, *, seed: int = 0, note: Callable[[str], None] = lambda text: None) -> Path:
    """Draws, edits and asks with `model`, and writes `out`/index.html (the folder must exist). Returns the path of the page.

    The seed chooses scenes, texts and noise. `note` hears one line before each piece of work.
    """
    rng = random.Random(seed)
    sections = [
        Section("Pictures", "Drawn from the text below them, by the model and each student.", tuple(pictures(model, rng, note))),
        Section("Edits", "The source, what was made of it, and what was wanted.", tuple(edits(model, rng, note))),
        Section("Answers", "A picture, a question, the model's answer and the right one.", tuple(answers(model, rng, note))),
    ]
    where = f"{platform.machine()}, {platform.system()}, python {platform.python_version()}"
    load = f"it loaded in {model.load_seconds:.2f} s"
    lead = f"Everything here was made by one model on this machine ({where}); {load}. Seed {seed}; nothing was cherry-picked."
    path = out / "index.html"
    atomic_write_text(path, page("Hyper-Bagel", lead, sections))
    return path


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def card_html(card: Card) -> str:
    figures = "".join(
        f'<figure><img src="{data_url(image)}" width="{image.width}" height="{image.height}" alt="{html.escape(label or card.asked)}">'
        + (f"<figcaption>{html.escape(label)}</figcaption>" if label else "")
        + "</figure>"
        for label, image in card.pictures
    )
    lines = [f'<p class="asked">{html.escape(card.asked)}</p>']
    if card.wanted:
        lines.append(f'<p class="answer"><b>model</b> {html.escape(card.answer or "(nothing)")}</p>')
        lines.append(f'<p class="answer wanted"><b>right</b> {html.escape(card.wanted)}</p>')
    lines.append(f'<p class="took">{html.escape(card.took)}</p>')
    return f'<article><div class="row">{figures}</div><div>{"".join(lines)}</div></article>'


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML, every text escaped."""
    body = []
    for section in sections:
        cards = "".join(map(card_html, section.cards))
        mean = sum(card.seconds for card in section.cards) / max(len(section.cards), 1)
        intro = f"{section.text} {mean:.2f} s each on average for the model itself."
        body.append(
            f'<h2>{html.escape(section.title)}</h2><p>{html.escape(intro)}</p><div class="grid {section.title.lower()}">{cards}</div>'
        )
    return TEMPLATE.format(title=html.escape(title), style=STYLE, lead=html.escape(lead), body="\n".join(body))


STYLE = """
:root { color-scheme: light dark; --ground: #f6f6f4; --card: #fff; --text: #1c1c1e; --faint: #63636b; --line: #dcdcd8; --accent: #9a4a00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #131315; --card: #1d1d20; --text: #ececee; --faint: #a0a0a8; --line: #34343a; --accent: #f0a860; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--ground); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.8rem; }
h2 { margin: 2.2rem 0 0; font-size: 1.25rem; color: var(--accent); }
p { margin: .35rem 0; overflow-wrap: anywhere; }
.grid { display: grid; gap: .9rem; margin-top: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(45%, 14rem), 1fr)); }
.grid:has(.row > :nth-child(3)), .grid.answers { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
article { padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.answers article { display: grid; grid-template-columns: 7rem 1fr; gap: 0 .8rem; align-items: start; }
.row { display: flex; gap: .5rem; }
figure { flex: 1; min-width: 0; margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: .3rem; image-rendering: pixelated; }
figcaption { font-size: .8rem; color: var(--faint); text-align: center; }
.asked { font-weight: 600; }
.answer b { display: inline-block; min-width: 3.4rem; font-weight: 400; color: var(--faint); }
.wanted { color: var(--faint); }
.took { font-size: .8rem; color: var(--faint); }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</body>
</html>
"""
