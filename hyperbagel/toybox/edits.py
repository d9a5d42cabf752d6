"""Edit instructions with their exact target scenes.

Every instruction has one meaning: what it refers to is unique, and where something goes is a named cell. What it does not name stays as it
was, even the jitter of a moved thing; an added thing has no jitter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from hyperbagel.core.errors import InputError
from hyperbagel.toybox.captions import count_phrase
from hyperbagel.toybox.heldout import heldout_kinds
from hyperbagel.toybox.phrases import article, choose, full, join, look_words, place, plural, references, sentence, words
from hyperbagel.toybox.samples import EditSample
from hyperbagel.toybox.scene import Scene, Thing, sample_scene
from hyperbagel.toybox.vocabulary import BACKGROUNDS, COLOURS, NOUNS, SIZES, TONES

GROUPS: tuple[str, ...] = ("background", "recolour", "material", "move", "style", "add", "remove", "replace", "tone")  # GEdit's form
EXTRA_GROUPS: tuple[str, ...] = ("resize", "swap", "compound")
_WEIGHTS = dict(zip((*GROUPS, *EXTRA_GROUPS), (10, 16, 7, 12, 5, 14, 12, 14, 5, 8, 6, 8)))

_RECOLOUR = (
    "make {r} {c}", "paint {r} {c}", "change the colour of {r} to {c}", "turn {r} {c}", "colour {r} {c}", "{r} should be {c}",
)  # fmt: skip
_RECOLOUR_ALL = ("make all {n} {c}", "paint every {n1} {c}", "turn all {n} {c}", "all {n} should be {c}", "colour all {n} {c}")
_REPLACE = (
    "replace {r} with {a}", "put {a} where {r} is", "swap {r} for {a}", "exchange {r} for {a}", "change {r} into {a}",
    "use {a} instead of {r}",
)  # fmt: skip
_REMOVE = ("remove {r}", "delete {r}", "take {r} away", "erase {r}", "get rid of {r}", "the picture should be without {r}")
_ADD = ("add {a} {p}", "put {a} {p}", "draw {a} {p}", "place {a} {p}", "insert {a} {p}", "there should also be {a} {p}")
_MOVE = ("move {r} to the {d}", "put {r} {p}", "shift {r} to the {d}", "bring {r} to the {d}", "{r} should be {p}", "place {r} {p}")
_RESIZE = {
    "large": ("make {r} bigger", "enlarge {r}", "make {r} large", "{r} should be large", "scale {r} up"),
    "small": ("make {r} smaller", "shrink {r}", "make {r} small", "{r} should be small", "scale {r} down"),
}
_BACKGROUND = (
    "make the background {b}", "change the background to {b}", "set the background to {b}", "use a {b} background",
    "turn the background {b}",
    "the background should be {b}",
)  # fmt: skip
_SWAP = (
    "swap {r} and {s}", "exchange the places of {r} and {s}", "let {r} and {s} change places", "swap the positions of {r} and {s}",
    "switch {r} with {s}",
)  # fmt: skip
_MATERIAL = {
    "striped": ("make {r} striped", "put stripes on {r}", "paint {r} with stripes", "{r} should have stripes", "give {r} stripes"),
    "flat": (
        "remove the stripes from {r}",
        "make {r} plain",
        "{r} should have no stripes",
        "paint {r} without stripes",
        "take the stripes off {r}",
    ),
}
_STYLE = {
    "outline": (
        "turn this into a line drawing",
        "draw only the outlines",
        "make it a line drawing",
        "show only the lines",
        "redraw this with lines only",
    ),
    "plain": (
        "fill in the colours",
        "make it a filled drawing",
        "turn this into a filled picture",
        "fill all the shapes",
        "redraw this with filled shapes",
    ),
}
_TONE = {
    "dark": ("make the picture darker", "make it night", "darken the whole picture", "use dark tones", "turn down the light"),
    "faded": ("fade the colours", "make the picture look faded", "wash out the colours", "use faded tones", "make the colours pale"),
    "normal": (
        "restore the normal tone",
        "bring back the normal colours",
        "use normal tones",
        "undo the tone of the picture",
        "make the colours normal",
    ),
}

Edit = tuple[Scene, str]  # (target, instruction)
Maker = Callable[[random.Random, Scene, str], "Edit | None"]


def _with(scene: Scene, old: Thing, *new: Thing) -> Scene:
    """The scene with `new` (none, one or several) in the place of one thing."""
    things: list[Thing] = []
    for t in scene.things:
        things += new if t == old else (t,)
    return replace(scene, things=tuple(things))


def _pick(rng: random.Random, scene: Scene) -> tuple[Thing, str]:
    """A random thing and a phrase that refers to it."""
    thing = rng.choice(scene.things)
    return thing, rng.choice(references(scene, thing))


def free_cells(scene: Scene) -> list[int]:
    """Cells where nothing stands."""
    return [c for c in range(9) if all(t.cell != c for t in scene.things)]


def _recolour(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    thing, name = _pick(rng, scene)
    colour = rng.choice([c for c in COLOURS if c != thing.colour])
    twins = [t for t in scene.things if t.noun == thing.noun]
    if len(twins) > 1 and rng.random() < 0.5:
        target = replace(scene, things=tuple(replace(t, colour=colour) if t in twins else t for t in scene.things))
        return target, choose(rng, _RECOLOUR_ALL, text_split).format(n=plural(thing.noun), n1=thing.noun, c=colour)
    return _with(scene, thing, replace(thing, colour=colour)), choose(rng, _RECOLOUR, text_split).format(r=name, c=colour)


def _replace(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    thing, name = _pick(rng, scene)
    new = replace(thing, noun=rng.choice([n for n in NOUNS if n != thing.noun]), colour=rng.choice(list(COLOURS)), material="flat")
    return _with(scene, thing, new), choose(rng, _REPLACE, text_split).format(r=name, a=article(words(new)))


def _remove(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    if len(scene.things) < 2:
        return None
    thing, name = _pick(rng, scene)
    return _with(scene, thing), choose(rng, _REMOVE, text_split).format(r=name)


def _add(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    if len(scene.things) > 3:
        return None
    new = Thing(rng.choice(NOUNS), rng.choice(list(COLOURS)), rng.choice(SIZES), rng.choice(free_cells(scene)))
    text = choose(rng, _ADD, text_split).format(a=article(words(new, size=True)), p=place(new.cell))
    return replace(scene, things=(*scene.things, new)), text


def _move(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    thing, name = _pick(rng, scene)
    moved = replace(thing, cell=rng.choice(free_cells(scene)))
    where = place(moved.cell)
    return _with(scene, thing, moved), choose(rng, _MOVE, text_split).format(r=name, p=where, d=where.split(" the ")[1])


def _resize(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    thing, name = _pick(rng, scene)
    size = "small" if thing.size == "large" else "large"
    return _with(scene, thing, replace(thing, size=size)), choose(rng, _RESIZE[size], text_split).format(r=name)


def _background(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    colour = rng.choice([b for b in BACKGROUNDS if b != scene.background])
    return replace(scene, background=colour), choose(rng, _BACKGROUND, text_split).format(b=colour)


def _swap(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    if words(a, size=True) == words(b, size=True):  # the swap would not show
        return None
    text = choose(rng, _SWAP, text_split).format(r=rng.choice(references(scene, a)), s=rng.choice(references(scene, b)))
    places = {a: b, b: a}  # each goes exactly where the other stood
    things = tuple(replace(t, cell=o.cell, dx=o.dx, dy=o.dy) if (o := places.get(t)) else t for t in scene.things)
    return replace(scene, things=things), text


def _material(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    thing, name = _pick(rng, scene)
    material = "flat" if thing.material == "striped" else "striped"
    return _with(scene, thing, replace(thing, material=material)), choose(rng, _MATERIAL[material], text_split).format(r=name)


def _style(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    if scene.tone != "normal":
        return None
    style = "plain" if scene.style == "outline" else "outline"
    return replace(scene, style=style), choose(rng, _STYLE[style], text_split)


def _tone(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    if scene.style != "plain":
        return None
    tone = rng.choice([t for t in TONES if t != scene.tone])
    return replace(scene, tone=tone), choose(rng, _TONE[tone], text_split)


_SIMPLE: dict[str, Maker] = {
    "background": _background,
    "recolour": _recolour,
    "material": _material,
    "move": _move,
    "style": _style,
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "tone": _tone,
    "resize": _resize,
    "swap": _swap,
}


def _compound(rng: random.Random, scene: Scene, text_split: str) -> Edit | None:
    """Two edits, one after the other; the second refers to the scene as it is after the first and never undoes it."""
    first, second = rng.sample(("recolour", "remove", "add", "move", "resize", "background", "replace"), 2)
    one = _SIMPLE[first](rng, scene, text_split)
    two = _SIMPLE[second](rng, one[0], text_split) if one else None
    if not one or not two:
        return None
    before, between, after = set(scene.things), set(one[0].things), set(two[0].things)
    if (between - before) - after or (before - between) & after:  # the second edit touched what the first had changed
        return None
    # The second edit's reference must mean the same thing in the source picture, since that is what the model sees.
    for touched in between - after:
        # the whole phrase must occur: "place the square at the top left" does not name "the square at the top"
        if not any(re.search(rf"{re.escape(name)}(?! (?:left|middle|right))\b", two[1]) for name in references(scene, touched)):
            return None
    return two[0], f"{one[1]} and {two[1]}"


def change(rng: random.Random, scene: Scene, group: str) -> Scene | None:
    """The scene after a random edit of one of GROUPS, "resize" or "swap"; None if none is possible. It may show what is held out."""
    made = _SIMPLE[group](rng, scene, "train")
    return made[0] if made else None


def _source(rng: random.Random, group: str, split: str, kind: str | None) -> Scene:
    """A scene that an edit of this group can begin from."""
    weights = (0, 45, 35, 20) if group in ("remove", "swap", "compound") else (15, 35, 30, 20)
    n = 4 if kind == "count" else rng.choices((1, 2, 3, 4), weights)[0]
    if group == "add" and kind != "count":
        n = min(n, 3)
    if kind in ("pair", "relation"):
        n = max(n, 2)
    scene = sample_scene(rng, n=n, split=split, kind=kind, variety=0.04)
    if group == "material" and rng.random() < 0.5:
        scene = replace(scene, things=tuple(replace(t, material=rng.choice(("flat", "striped"))) for t in scene.things))
    if group in ("style", "tone"):
        scene = replace(scene, style="plain", tone="normal")
        if rng.random() < 0.4:
            scene = replace(scene, style="outline") if group == "style" else replace(scene, tone=rng.choice(TONES[1:]))
    elif scene.style == "outline" and group in ("material", "compound"):
        scene = replace(scene, style="plain")
    return scene


def edit_think(source: Scene, target: Scene) -> str:
    """The think text of an edit: what is there now, what changes, what the picture holds afterwards."""
    before, after = set(source.things), set(target.things)
    parts = [f"there are {count_phrase(len(source.things))} now" if len(source.things) > 1 else "there is one thing now"]
    gone, come = [t for t in source.things if t not in after], [t for t in target.things if t not in before]
    if gone:
        parts.append(f"{join([full(t) for t in gone])} will change" if come else f"{join([full(t) for t in gone])} will go")
    if come:
        parts.append(f"afterwards there is {join([full(t) for t in come])}")
    if source.background != target.background:
        parts.append(f"the background goes from {source.background} to {target.background}")
    if look_words(source) != look_words(target):
        parts.append(f"all is drawn {look_words(target) or 'in the normal way'}")
    parts.append("the rest stays")
    return " ".join(sentence(p) for p in parts)


def sample_edit(
    rng: random.Random, *, split: str = "train", group: str | Mapping[str, float] | None = None, kind: str | None = None
) -> EditSample:
    """An edit with its exact target.

    group: one of GROUPS or EXTRA_GROUPS, or weights over them (None: `_WEIGHTS`). split "heldout": `kind` (None draws it) says what is new
    in the source or the target; with "template", only the wording. In the train split neither picture shows anything held out.
    Raises InputError for an unknown group, or for adding with kind "count": there is no room for a fifth thing.
    """
    if not isinstance(group, str):
        weights = group or _WEIGHTS
        group = rng.choices(list(weights), list(weights.values()))[0]
    if split == "heldout":
        kind = kind or rng.choice([k for k in ("colour", "pair", "relation", "count", "template") if not (k == "count" and group == "add")])
    text_split = "heldout" if kind == "template" else "train"
    scene_split, scene_kind = ("train", None) if kind == "template" else (split, kind)
    allowed = {scene_kind} if scene_kind else set()
    if group not in _WEIGHTS or (group, kind) == ("add", "count"):
        raise InputError(
            f"got group {group!r} with kind {kind!r}, expected one of {', '.join(_WEIGHTS)}, and no adding to four things; change them"
        )
    make = _compound if group == "compound" else _SIMPLE[group]
    while True:
        source = _source(rng, group, scene_split, scene_kind)
        for _ in range(4):
            made = make(rng, source, text_split)
            if made and heldout_kinds(made[0].things) <= allowed and made[0] != source:
                return EditSample(source, made[1], made[0], group, edit_think(source, made[0]))
