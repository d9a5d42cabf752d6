"""Small pieces of English that captions, edits and questions share."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from hyperbagel.toybox.heldout import template_split
from hyperbagel.toybox.scene import Scene, Thing
from hyperbagel.toybox.vocabulary import CELL_NAMES

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth")
_PLURALS = {"cross": "crosses", "fish": "fish"}

RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of", "at the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "at the right side of"),
    "above": ("above", "over", "higher than", "on top of"),
    "below": ("below", "under", "lower than", "underneath"),
}
BACKGROUND_WORDS: tuple[str, ...] = (
    "on a {b} background", "with a {b} background", "on {b}", "in front of a {b} background", "against a {b} backdrop",
)  # fmt: skip


def choose(rng: random.Random, family: tuple[str, ...], text_split: str) -> str:
    """A random template of a family; text_split "train" or "heldout" (a family too small to hold any out gives a train one)."""
    train, held = template_split(family)
    return rng.choice(held if text_split == "heldout" and held else train)


def article(words: str) -> str:
    """ "car" -> "a car", "orange car" -> "an orange car"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(noun: str) -> str:
    return _PLURALS.get(noun, noun + "s")


def count_of(number: int, words: str) -> str:
    """(1, "red car") -> "a red car"; (3, "red car") -> "three red cars"."""
    if number == 1:
        return article(words)
    *first, noun = words.split(" ")
    return " ".join([NUMBERS[number], *first, plural(noun)])


def join(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def words(thing: Thing, *, colour: bool = True, size: bool = False) -> str:
    """ "large striped red car"; stripes are always named."""
    parts = [thing.size] if size else []
    parts += ["striped"] if thing.material == "striped" else []
    parts += [thing.colour] if colour else []
    return " ".join([*parts, thing.noun])


def listing(things: Sequence[Thing], *, colour: bool = True, size: bool = False) -> str:
    """All things, with equal ones counted: "two red cars, a blue tree and a star"."""
    counts = Counter(words(t, colour=colour, size=size) for t in things)
    return join([count_of(n, w) for w, n in counts.items()])


def place(cell: int) -> str:
    """Where a cell is: "at the top left", "in the center"."""
    return "in the center" if cell == 4 else f"at the {CELL_NAMES[cell]}"


def full(thing: Thing) -> str:
    """Everything about a thing: "a large red car at the top left"."""
    return f"{article(words(thing, size=True))} {place(thing.cell)}"


def references(scene: Scene, thing: Thing) -> list[str]:
    """Phrases that refer to this thing and no other in the scene, shortest first; never empty."""
    twins = [t for t in scene.things if t.noun == thing.noun and t != thing]
    if not twins:
        return [f"the {thing.noun}", f"the {thing.colour} {thing.noun}"]
    found = []
    if all(t.colour != thing.colour for t in twins):
        found.append(f"the {thing.colour} {thing.noun}")
    if all(t.size != thing.size for t in twins):
        found.append(f"the {thing.size} {thing.noun}")
    for side, ahead in (("left", [thing.col < t.col for t in twins]), ("right", [thing.col > t.col for t in twins])):
        if all(ahead):
            found.append(f"the {thing.noun} on the {side}")
    for side, ahead in (("top", [thing.row < t.row for t in twins]), ("bottom", [thing.row > t.row for t in twins])):
        if all(ahead):
            found.append(f"the {thing.noun} at the {side}")
    return [*found, f"the {thing.noun} {place(thing.cell)}"]


def look_words(scene: Scene) -> str:
    """How the whole picture looks: "as a line drawing", "in dark tones", "in faded tones", or "" if it is plain."""
    if scene.style == "outline":
        return "as a line drawing"
    return "" if scene.tone == "normal" else f"in {scene.tone} tones"
