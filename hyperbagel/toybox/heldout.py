"""What training never shows, so that evaluations can ask for something new.

Fixed by one constant seed: one colour of each noun, about 15 % of noun pairs, about 15 % of ordered relation triples, groups of four for
six nouns, and some sentence templates. All functions are pure.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from hyperbagel.toybox.vocabulary import COLOURS, NOUNS

if TYPE_CHECKING:
    from hyperbagel.toybox.scene import Thing

SEED = 20250923
SHARE = 0.15
KINDS: tuple[str, ...] = ("colour", "pair", "relation", "count", "template")

Triple = tuple[str, str, str]  # (a, "left of" or "above", b)
_MIRROR = {"right of": "left of", "below": "above"}


class HeldOut(NamedTuple):
    colour: dict[str, str]  # noun -> the colour it never has
    pairs: frozenset[frozenset[str]]
    triples: frozenset[Triple]  # canonical: only "left of" and "above"
    four: frozenset[str]  # nouns that never come in fours


@cache
def held_out() -> HeldOut:
    """The held-out sets."""
    rng = random.Random(SEED)
    colours = list(COLOURS) * (len(NOUNS) // len(COLOURS))
    rng.shuffle(colours)
    pairs = [frozenset((a, b)) for i, a in enumerate(NOUNS) for b in NOUNS[i + 1 :]]
    held_pairs = frozenset(rng.sample(pairs, round(SHARE * len(pairs))))
    triples = [(a, r, b) for a in NOUNS for r in ("left of", "above") for b in NOUNS if a != b]
    # The two nouns of a held-out triple are no held-out pair: training shows them together, only not in this relation.
    candidates = [t for t in triples if frozenset((t[0], t[2])) not in held_pairs]
    held_triples = frozenset(rng.sample(candidates, round(SHARE * len(triples))))
    return HeldOut(dict(zip(NOUNS, colours)), held_pairs, held_triples, frozenset(rng.sample(NOUNS, 6)))


def canonical(a: str, relation: str, b: str) -> Triple:
    """The same triple with "left of" or "above": `a right of b` is `b left of a`; `a below b` is `b above a`."""
    return (b, _MIRROR[relation], a) if relation in _MIRROR else (a, relation, b)


def triple_held(a: str, relation: str, b: str) -> bool:
    return canonical(a, relation, b) in held_out().triples


def pair_held(a: str, b: str) -> bool:
    return a != b and frozenset((a, b)) in held_out().pairs


def triples_of(a: Thing, b: Thing) -> list[Triple]:
    """The canonical relations that hold between two things: one for different columns, one for different rows."""
    found: list[Triple] = []
    if a.cell % 3 != b.cell % 3:
        found.append((a.noun, "left of", b.noun) if a.cell % 3 < b.cell % 3 else (b.noun, "left of", a.noun))
    if a.cell // 3 != b.cell // 3:
        found.append((a.noun, "above", b.noun) if a.cell < b.cell else (b.noun, "above", a.noun))
    return found


def kinds_added(things: Sequence[Thing], new: Thing) -> set[str]:
    """The held-out kinds that `new` brings into a picture of `things`."""
    held = held_out()
    kinds = {"colour"} if held.colour[new.noun] == new.colour else set()
    for thing in things:
        if pair_held(thing.noun, new.noun):
            kinds.add("pair")
        if any(t in held.triples for t in triples_of(thing, new)):
            kinds.add("relation")
    if new.noun in held.four and sum(t.noun == new.noun for t in things) >= 3:
        kinds.add("count")
    return kinds


def heldout_kinds(things: Sequence[Thing]) -> set[str]:
    """The held-out kinds that a picture shows: a subset of KINDS without "template". If empty, training may show it."""
    kinds: set[str] = set()
    for i, thing in enumerate(things):
        kinds |= kinds_added(things[:i], thing)
    return kinds


@cache
def template_split(family: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, held-out) sentences of one family of paraphrases.

    A family of four or more holds out one in five (at least one), those with the smallest hashes; a smaller family holds out none.
    """
    ranked = sorted(family, key=lambda text: hashlib.sha256(f"{SEED}|{text}".encode()).digest())
    held = set(ranked[: max(1, len(family) // 5)]) if len(family) >= 4 else set()
    return tuple(t for t in family if t not in held), tuple(t for t in family if t in held)
