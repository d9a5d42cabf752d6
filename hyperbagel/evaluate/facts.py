"""Splits a description into facts and checks each against the scene.

It looks for words (numbers, sizes, colours, nouns, places, relations) and knows no sentence templates, so a model's own wording is scored
too. What is said twice is one fact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hyperbagel.toybox.scene import BACKGROUNDS, COLOURS, NOUNS, SIZES, Scene, Thing, holds

NUMBERS = {"no": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6} | {str(i): i for i in range(10)}
PLURALS = {n + "s": n for n in NOUNS} | {"crosses": "cross"}
LOOKS = {"line drawing": ("style", "outline"), "dark tones": ("tone", "dark"), "faded tones": ("tone", "faded")}


@dataclass(frozen=True)
class Kind:
    """What a mention says about a thing; None: nothing."""

    noun: str
    colour: str | None
    size: str | None
    material: str | None

    def fits(self, thing: Thing) -> bool:
        said = {"noun": self.noun, "colour": self.colour, "size": self.size, "material": self.material}
        return all(v is None or getattr(thing, k) == v for k, v in said.items())


@dataclass(frozen=True)
class There:
    """There are things of a kind: exactly `number` of them (None: one or more)."""

    kind: Kind
    number: int | None

    def holds_in(self, scene: Scene) -> bool:
        fitting = [t for t in scene.things if self.kind.fits(t)]
        if self.number is None:
            return bool(fitting)
        # "two trees and a striped tree": a mention without stripes may mean the things without stripes
        plain = [t for t in fitting if t.material == "flat"]
        return self.number in ((len(fitting), len(plain)) if self.kind.material is None else (len(fitting),))


@dataclass(frozen=True)
class At:
    """A thing of a kind is in a cell."""

    kind: Kind
    cell: int

    def holds_in(self, scene: Scene) -> bool:
        return any(self.kind.fits(t) and t.cell == self.cell for t in scene.things)


@dataclass(frozen=True)
class Stands:
    """A thing of kind a is `relation` ("left of", ...) one of kind b."""

    a: Kind
    relation: str
    b: Kind

    def holds_in(self, scene: Scene) -> bool:
        return any(self.a.fits(x) and self.b.fits(y) and holds(x, self.relation, y) for x in scene.things for y in scene.things)


@dataclass(frozen=True)
class Total:
    """There are `number` things in all."""

    number: int

    def holds_in(self, scene: Scene) -> bool:
        return len(scene.things) == self.number


@dataclass(frozen=True)
class Picture:
    """The picture's background, style or tone (`word`) is `value`."""

    word: str
    value: str

    def holds_in(self, scene: Scene) -> bool:
        return bool(getattr(scene, self.word) == self.value)


Fact = There | At | Stands | Total | Picture

_ADJECTIVES = "|".join([*SIZES, "striped", *COLOURS])
_NOUNS = "|".join(sorted([*NOUNS, *PLURALS, "thing", "things"], key=len, reverse=True))
_MENTION = re.compile(rf"\b(?:({'|'.join(NUMBERS)}|an?|the)\s+)?((?:(?:{_ADJECTIVES})\s+)*)({_NOUNS})\b")
_PLACE = re.compile(
    r"\b(?:at|in|on|to|near) the ((?:top|bottom|middle|cent(?:er|re))(?:[ -](?:left|right|middle|cent(?:er|re)))?|left|right)\b"
    r"(?! (?:side )?of\b(?! the picture))"
)
_RELATION = re.compile(
    r"\b(?:(?P<left>left (?:side )?of)|(?P<right>right (?:side )?of)|(?P<above>above|over|higher than|on top of)"
    r"|(?P<below>below|under|underneath|beneath|lower than))\b(?P<it> it\b)?"
)
_RELATION_NAMES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")


def facts(text: str) -> list[Fact]:
    """The facts that a text states, each once, in order."""
    found: dict[Fact, None] = {}
    for sentence in re.split(r"[.;!?\n]+", text.lower()):
        found |= dict.fromkeys(_sentence_facts(sentence))
    return list(found)


def check(text: str, scene: Scene) -> tuple[int, int]:
    """(number of facts that are right, number of facts stated)."""
    stated = facts(text)
    return sum(f.holds_in(scene) for f in stated), len(stated)


def _sentence_facts(sentence: str) -> Iterator[Fact]:
    mentions = [(m.start(), m.end(), m[1], _kind(m[2], m[3])) for m in _MENTION.finditer(sentence)]
    things = [m for m in mentions if m[3].noun not in ("thing", "things")]
    places = [(m.start(), _cell(m[1])) for m in _PLACE.finditer(sentence)]
    # "at the top there is a car and at the left a tree": if a place comes first, each belongs to the thing that follows it
    before = bool(places and things and places[0][0] < things[0][0])
    placed: dict[int, int] = {}
    for start, cell in places:
        side = [i for i, m in enumerate(things) if (m[0] > start) == before]
        if side:
            placed[side[0] if before else side[-1]] = cell
    for _, _, word, kind in mentions:
        if kind.noun in ("thing", "things") and word in NUMBERS:
            yield Total(NUMBERS[word])
    for i, (_, _, word, kind) in enumerate(things):
        # "the red car" repeats what was said before, unless it adds a place
        if word != "the":
            yield There(kind, NUMBERS.get(word or ""))
        if i in placed:
            yield At(kind, placed[i])
    for m in _RELATION.finditer(sentence):
        earlier, later = [t for t in things if t[1] <= m.start()], [t for t in things if t[0] >= m.end()]
        name = next(name for key, name in _RELATION_NAMES.items() if m[key])
        if m["it"] and len(earlier) >= 2:  # "seen from the tree, the car is above it"
            yield Stands(earlier[-1][3], name, earlier[-2][3])
        elif earlier and later:
            yield Stands(earlier[-1][3], name, later[0][3])
    for m in _BACKGROUND.finditer(sentence):
        yield Picture("background", m[1])
    for words, (word, value) in LOOKS.items():
        if words in sentence:
            yield Picture(word, value)


def _kind(adjectives: str, noun: str) -> Kind:
    said = adjectives.split()

    def last(values: tuple[str, ...]) -> str | None:
        return next((w for w in reversed(said) if w in values), None)

    return Kind(PLURALS.get(noun, noun), last(tuple(COLOURS)), last(SIZES), "striped" if "striped" in said else None)


def _cell(words: str) -> int:
    """The cell of "top left", "left", "middle left", "bottom middle", "center": what is not said is in the middle."""
    row = 0 if "top" in words else 2 if "bottom" in words else 1
    col = 0 if "left" in words else 2 if "right" in words else 1
    return row * 3 + col
