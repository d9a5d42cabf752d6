"""Captions, from "a red car" to a paragraph: each is true of its scene and names every thing in it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise

from hyperbagel.toybox.heldout import held_out
from hyperbagel.toybox.phrases import (
    BACKGROUND_WORDS,
    NUMBERS,
    ORDINALS,
    RELATION_WORDS,
    article,
    choose,
    full,
    join,
    listing,
    look_words,
    place,
    sentence,
    words,
)
from hyperbagel.toybox.samples import T2ISample
from hyperbagel.toybox.scene import Scene, Spec, Thing, holds, main_relation, sample_scene
from hyperbagel.toybox.vocabulary import COLOURS, NOUNS, RELATIONS

CATEGORIES: tuple[str, ...] = ("single", "two", "counting", "colors", "position", "attribute")  # GenEval's six
STYLES: tuple[str, ...] = ("terse", "medium", "full")
COLOURED: tuple[str, ...] = ("colors", "attribute", "many")  # categories whose captions always name every colour
STYLE_WEIGHTS: dict[str, float] = {"terse": 0.6, "medium": 0.25, "full": 0.15}
_CATEGORY_WEIGHTS = {"single": 10, "two": 12, "counting": 18, "colors": 12, "position": 18, "attribute": 18, "many": 12}
HELDOUT_CATEGORIES = {"colour": ("colors", "attribute"), "pair": ("two", "attribute"), "relation": ("position",), "count": ("counting",)}

_WRAP = (
    "a picture of {s}", "draw {s}", "an image of {s}", "show me {s}", "please draw {s}", "a drawing of {s}",
    "I want to see {s}", "a scene with {s}", "a simple picture with {s}", "paint {s}",
)  # fmt: skip
_INTRO = (
    "the picture shows {n}", "this is a picture of {n}", "here we see {n}", "in this picture we see {n}", "draw a picture with {n}",
    "the scene holds {n}", "you are looking at {n}",
)  # fmt: skip
_STANDS = (
    "{a} stands {p}", "{a} is {p}", "there is {a} {p}", "{P} there is {a}", "{P} you can see {a}", "we find {a} {p}", "{P} stands {a}",
)  # fmt: skip
_RELATES = ("the {a} is {r} the {b}", "you find the {a} {r} the {b}", "the {a} stands {r} the {b}", "seen from the {b}, the {a} is {r} it")
_BACKDROP = (
    "the background is {b}", "everything stands on a {b} background", "behind {them} the background is {b}", "all of this is on {b}",
    "the whole background is plain {b}",
)  # fmt: skip
_LOOK = ("it is drawn {l}", "the whole picture is {l}", "all is shown {l}", "everything appears {l}")
_PLAN = (
    "I draw {n}.", "the picture needs {n}.", "I will place {n}.", "let me plan {n}.", "so we need {n}.",
)  # fmt: skip


Relation = tuple[str, str, str]


def count_phrase(number: int) -> str:
    return "one thing" if number == 1 else f"{NUMBERS[number]} things"


def plan(rng: random.Random, scene: Scene, text_split: str = "train") -> str:
    """The think text before a picture: which things it needs, in which cells, on which background."""
    parts = [choose(rng, _PLAN, text_split).format(n=count_phrase(len(scene.things)))]
    parts += [f"the {ORDINALS[i]} is {full(t)}." for i, t in enumerate(scene.things)]
    parts.append(_background(scene))
    if look := look_words(scene):
        parts.append(f"it is drawn {look}.")
    return " ".join(p[0].upper() + p[1:] for p in parts)


def _background(scene: Scene) -> str:
    return f"the background is {scene.background}."


def without_background(plan: str, scene: Scene) -> str:
    """A plan of the scene that leaves its background to the caption."""
    told = _background(scene)
    return plan.replace(f" {told[0].upper()}{told[1:]}", "")


def _relation_sentence(rng: random.Random, a: Thing, b: Thing, text_split: str) -> str:
    """A true sentence about where a is relative to b."""
    relation = rng.choice([r for r in RELATIONS if holds(a, r, b)])
    return choose(rng, _RELATES, text_split).format(a=words(a), b=words(b), r=choose(rng, RELATION_WORDS[relation], text_split))


def dense(rng: random.Random, scene: Scene, text_split: str = "train") -> str:
    """A paragraph that says what everything is and where; 50 to 110 tokens for two to four things."""
    things = list(scene.things)
    rng.shuffle(things)
    inventory = listing(things, colour=False) if rng.random() < 0.5 else count_phrase(len(things))
    parts = [choose(rng, _INTRO, text_split).format(n=inventory)]
    background = choose(rng, _BACKDROP, text_split).format(b=scene.background, them="it" if len(things) == 1 else "them")
    if rng.random() < 0.5:
        parts.append(background)
    for thing in things:
        where = place(thing.cell)
        template = choose(rng, _STANDS, text_split)
        parts.append(template.format(a=article(words(thing, size=True)), p=where, P=where))
    unique = [t for t in things if sum(words(o) == words(t) for o in things) == 1]
    rng.shuffle(unique)
    for a, b in list(pairwise(unique))[: 1 if len(things) == 2 else 2]:
        parts.append(_relation_sentence(rng, a, b, text_split))
    if background not in parts:
        parts.append(background)
    if look := look_words(scene):
        parts.append(choose(rng, _LOOK, text_split).format(l=look))
    return " ".join(sentence(p) for p in parts)


def _position_subject(rng: random.Random, a: Thing, b: Thing, colour: bool, size: bool, text_split: str) -> tuple[str, Relation]:
    """("a car to the left of a tree", ("car", "left of", "tree"))."""
    relation = main_relation(a, b)
    assert relation is not None
    first, second = (article(words(t, colour=colour, size=size)) for t in (a, b))
    return f"{first} {choose(rng, RELATION_WORDS[relation], text_split)} {second}", (a.noun, relation, b.noun)


def short_caption(rng: random.Random, scene: Scene, category: str, style: str, text_split: str = "train") -> tuple[str, Relation | None]:
    """(terse or medium caption, the relation it states, if any: noun, "left of" ..., noun).

    Medium captions may also name sizes, places or the background.
    """
    things = list(scene.things)
    medium = style == "medium"
    size = medium and rng.random() < 0.4
    colour = category in COLOURED or (medium and category != "counting" and rng.random() < 0.4)
    relation: Relation | None = None
    if category == "position":
        a, b = rng.sample(things, 2)
        text, relation = _position_subject(rng, a, b, colour, size, text_split)
    elif medium and rng.random() < 0.35:
        rng.shuffle(things)
        text = join([f"{article(words(t, colour=colour, size=size))} {place(t.cell)}" for t in things])
    else:
        rng.shuffle(things)
        text = listing(things, colour=colour, size=size)
    if medium and rng.random() < 0.65:
        text += " " + choose(rng, BACKGROUND_WORDS, text_split).format(b=scene.background)
    if look := look_words(scene):
        text += f" {look}"
    if text_split == "heldout" or rng.random() < 0.5:
        text = choose(rng, _WRAP, text_split).format(s=text)
    return text, relation


def category_scene(rng: random.Random, category: str, *, split: str = "train", kind: str | None = None, variety: float = 0.0) -> Scene:
    """A scene that a caption of this category can be about."""
    if category == "counting":
        held, number = held_out(), 4 if kind == "count" else rng.choice((2, 3, 4))
        noun = rng.choice(sorted(held.four) if kind == "count" else [n for n in NOUNS if number < 4 or n not in held.four])
        colour = rng.choice([c for c in COLOURS if c != held.colour[noun]]) if rng.random() < 0.7 else None
        return sample_scene(rng, n=number, split=split, kind=kind, specs=[Spec(noun, colour)] * number, variety=variety)
    number = {"single": 1, "colors": 1, "two": 2, "position": 2, "attribute": 2, "many": rng.choice((3, 3, 4))}[category]
    while True:
        scene = sample_scene(rng, n=number, split=split, kind=kind, repeat=0.35 if category == "many" else 0.0, variety=variety)
        if category != "position" or main_relation(*scene.things):
            return scene


def sample_t2i(
    rng: random.Random,
    *,
    split: str = "train",
    style: str | Mapping[str, float] | None = None,
    category: str | Mapping[str, float] | None = None,
    kind: str | None = None,
    variety: float = 0.04,
) -> T2ISample:
    """A caption with its scene.

    style: "terse", "medium" or "full", or weights over the three (None: 0.6, 0.25, 0.15). category: one of GenEval's six or "many", or
    weights over these seven; a "full" caption gets the category "dense". split "heldout": `kind` (None draws it) says what is new; with
    "template", only the wording.
    """
    if not isinstance(style, str):
        weights = style or STYLE_WEIGHTS
        style = rng.choices(list(weights), list(weights.values()))[0]
    text_split = "train"
    if isinstance(category, Mapping):
        category = rng.choices(list(category), list(category.values()))[0]
    if split == "heldout":
        kind = kind or rng.choice([*HELDOUT_CATEGORIES, "template"])
        if kind == "template":
            split, kind, text_split = "train", None, "heldout"
        else:
            category = category or rng.choice(HELDOUT_CATEGORIES[kind])
    if style == "full":
        if kind is None:
            scene = sample_scene(rng, n=rng.choice((2, 2, 3, 3, 4)), variety=variety)
        else:
            scene = category_scene(rng, category or "many", split=split, kind=kind, variety=variety)
        return T2ISample(dense(rng, scene, text_split), scene, plan(rng, scene, text_split), "dense")
    if category is None:
        category = rng.choices(list(_CATEGORY_WEIGHTS), list(_CATEGORY_WEIGHTS.values()))[0]
    scene = category_scene(rng, category, split=split, kind=kind, variety=variety)
    prompt, _ = short_caption(rng, scene, category, style, text_split)
    return T2ISample(prompt, scene, plan(rng, scene, text_split), category)
