"""Scenes as data: what stands where, and how scenes are drawn at random.

A picture is a 3 x 3 grid of cells, numbered 0..8 by row * 3 + column; 1 to 4 things stand in distinct cells.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hyperbagel.core.errors import InputError
from hyperbagel.toybox.heldout import held_out, heldout_kinds, kinds_added
from hyperbagel.toybox.vocabulary import (
    BACKGROUNDS,
    CELL_NAMES,
    CENTRES,
    COLOURS,
    EXTENT,
    JITTERS,
    MATERIALS,
    NOUNS,
    RELATIONS,
    SIZES,
    STYLES,
    TONES,
)

__all__ = [
    "BACKGROUNDS", "CELL_NAMES", "CENTRES", "COLOURS", "MATERIALS", "NOUNS", "RELATIONS", "SIZES", "STYLES", "TONES",
    "Scene", "Spec", "Thing", "holds", "main_relation", "sample_scene",
]  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One drawn thing. `dx`, `dy`: jitter, share of the picture."""

    noun: str
    colour: str
    size: str
    cell: int
    dx: float = 0.0
    dy: float = 0.0
    material: str = "flat"

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def col(self) -> int:
        return self.cell % 3

    @property
    def cx(self) -> float:
        """Centre, share of the picture's width."""
        return CENTRES[self.col] + self.dx

    @property
    def cy(self) -> float:
        """Centre, share of the picture's height."""
        return CENTRES[self.row] + self.dy

    @property
    def extent(self) -> float:
        """Side of the bounding square, share of the picture."""
        return EXTENT[self.size]


@dataclass(frozen=True)
class Scene:
    """A whole picture as data."""

    background: str
    things: tuple[Thing, ...]
    style: str = "plain"
    tone: str = "normal"

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Scene:
        """The scene written by `to_json`. Raises InputError if the text is not one."""
        try:
            raw: dict[str, Any] = json.loads(text)
            scene = Scene(**{**raw, "things": tuple(Thing(**t) for t in raw["things"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"got {text[:80]!r} ({error}), expected a scene written by Scene.to_json; pass that text unchanged") from error
        scene.check()
        return scene

    def check(self) -> None:
        """Raises InputError unless every word is known and no two things share a cell."""
        fields: list[tuple[object, Sequence[object]]] = [
            (self.background, tuple(BACKGROUNDS)),
            (self.style, STYLES),
            (self.tone, TONES),
            (len(self.things), (1, 2, 3, 4)),
        ]
        for t in self.things:
            fields += [(t.noun, NOUNS), (t.colour, tuple(COLOURS)), (t.size, SIZES), (t.cell, range(9)), (t.material, MATERIALS)]
        for value, known in fields:
            if value not in known:
                raise InputError(f"got {value!r} in a scene, expected one of {', '.join(map(str, known))}; use one of these")
        if len({t.cell for t in self.things}) != len(self.things):
            raise InputError("got two things in one cell, expected distinct cells; move one of them")
        if any(abs(d) > 0.03 for t in self.things for d in (t.dx, t.dy)):
            raise InputError("got a jitter beyond 0.03 of the picture, expected at most that; use smaller dx and dy")


def holds(a: Thing, relation: str, b: Thing) -> bool:
    """Whether a stands left of / right of / above / below b: a different column, or row, of the grid."""
    step = {"left of": b.col - a.col, "right of": a.col - b.col, "above": b.row - a.row, "below": a.row - b.row}
    return step[relation] > 0


def main_relation(a: Thing, b: Thing) -> str | None:
    """The relation that a viewer would name first, along the longer axis of the offset between the cells; None on a diagonal.

    It also holds by GenEval's rule (the shrunk component exceeds half of the distance), whatever the jitter.
    """
    along_x, along_y = abs(a.col - b.col), abs(a.row - b.row)
    if along_x == along_y:
        return None
    return next(r for r in (RELATIONS[:2] if along_x > along_y else RELATIONS[2:]) if holds(a, r, b))


@dataclass(frozen=True)
class Spec:
    """A partly decided thing; what is None is drawn at random."""

    noun: str | None = None
    colour: str | None = None
    size: str | None = None
    cell: int | None = None


def _draw(rng: random.Random, spec: Spec, free: list[int]) -> Thing:
    return Thing(
        spec.noun or rng.choice(NOUNS),
        spec.colour or rng.choice(list(COLOURS)),
        spec.size or rng.choice(SIZES),
        rng.choice(free) if spec.cell is None else spec.cell,
        rng.choice(JITTERS),
        rng.choice(JITTERS),
    )


def _place(rng: random.Random, specs: Sequence[Spec], exempt: frozenset[str], distinct: bool) -> list[Thing] | None:
    """Things for `specs`, placed one after the other; None if 24 draws gave no allowed thing for one of them.

    exempt: held-out kinds that may occur. distinct: nouns that are drawn must not repeat.
    """
    things: list[Thing] = []
    free = [c for c in range(9) if all(s.cell != c for s in specs)]
    for spec in specs:
        for _ in range(24):
            new = _draw(rng, spec, free)
            twin = distinct and spec.noun is None and any(t.noun == new.noun for t in things)
            if not twin and kinds_added(things, new) <= exempt:
                break
        else:
            return None
        things.append(new)
        if new.cell in free:
            free.remove(new.cell)
    return things


def _heldout_specs(rng: random.Random, kind: str, n: int | None) -> list[Spec]:
    """Specs that force one held-out kind; none if `n` things cannot show it."""
    held = held_out()
    if kind == "count":
        return [Spec(noun=rng.choice(sorted(held.four)))] * 4 if n in (None, 4) else []
    if kind == "colour":
        noun = rng.choice(NOUNS)
        return [Spec(noun=noun, colour=held.colour[noun])]
    if kind == "pair":
        a, b = rng.sample(sorted(rng.choice(sorted(held.pairs, key=sorted))), 2)
        return [Spec(noun=a), Spec(noun=b)]
    a, relation, b = rng.choice(sorted(held.triples))
    near, far = rng.choice(((0, 1), (1, 2), (0, 2)))
    other = rng.randrange(3)
    cells = (other * 3 + near, other * 3 + far) if relation == "left of" else (near * 3 + other, far * 3 + other)
    return [Spec(noun=a, cell=cells[0]), Spec(noun=b, cell=cells[1])]


def sample_scenes(rng: random.Random, count: int, *, crowded: float = 0.0, split: str = "train", variety: float = 0.0) -> Iterator[Scene]:
    """`count` random scenes, a share `crowded` of which have four things: more to learn in each picture."""
    for _ in range(count):
        yield sample_scene(rng, n=4 if rng.random() < crowded else None, split=split, variety=variety)


def sample_scene(
    rng: random.Random,
    *,
    n: int | None = None,
    split: str = "train",
    kind: str | None = None,
    specs: Sequence[Spec] = (),
    background: str | None = None,
    repeat: float = 0.25,
    variety: float = 0.0,
) -> Scene:
    """A random scene.

    n: number of things (1 to 4; None draws it). split: "train" shows nothing held out, "heldout" exactly one held-out kind (`kind`:
    "colour", "pair", "relation" or "count"; None draws it). specs: what is already decided about the first things. repeat: how often one
    noun occurs more than once. variety: probability (0 to 0.5) of stripes for each thing, of another style, and of another tone.
    Raises InputError if the wishes exclude each other.
    """
    if split not in ("train", "heldout") or n not in (None, 1, 2, 3, 4):
        raise InputError(f"got split {split!r} and n {n!r}, expected split 'train' or 'heldout' and n 1 to 4 or None; change them")
    exempt: frozenset[str] = frozenset()
    if split == "heldout":
        needs = {"colour": 1, "pair": 2, "relation": 2, "count": 4}
        kind = kind or rng.choice([k for k, need in needs.items() if n is None or (n == 4 if k == "count" else n >= need)])
        exempt = frozenset((kind,))
    for _ in range(200):
        wanted = list(specs) or (_heldout_specs(rng, kind, n) if kind else [])
        count = n or (4 if kind == "count" else max(len(wanted), rng.choices((1, 2, 3, 4), (25, 35, 25, 15))[0]))
        rest = count - len(wanted)
        again = rest >= 2 and not specs and rng.random() < repeat
        if again:
            twins = rng.randint(2, rest)
            colour = rng.choice(list(COLOURS)) if rng.random() < 0.5 else None
            wanted += [Spec(noun=rng.choice(NOUNS), colour=colour)] * twins
        wanted += [Spec()] * (count - len(wanted))
        things = _place(rng, wanted, exempt, distinct=not again)
        if things is None or (exempt and heldout_kinds(things) != exempt):
            continue
        if not specs:  # the order of things must not mean anything
            rng.shuffle(things)
        if variety:
            things = [replace(t, material="striped") if rng.random() < variety else t for t in things]
        look = rng.random()  # a line drawing in a tone of its own would be too faint: at most one of the two
        style = "outline" if look < variety else "plain"
        tone = rng.choice(TONES[1:]) if look >= 1 - variety else "normal"
        return Scene(background or rng.choice(list(BACKGROUNDS)), tuple(things), style, tone)
    raise InputError(f"got wishes that exclude each other (n {n}, split {split}, kind {kind}, specs {list(specs)}); drop one of them")
