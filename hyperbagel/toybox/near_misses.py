"""Pictures that almost fit their words, which a reward has to tell from the right ones.

They are well drawn and all but one thing in them is as asked, so neither blur nor missing words alone give them away.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hyperbagel.toybox.edits import GROUPS, change, free_cells
from hyperbagel.toybox.heldout import heldout_kinds
from hyperbagel.toybox.samples import EditSample, T2ISample
from hyperbagel.toybox.scene import Scene

Falsifier = Callable[[random.Random, Scene], Scene | None]


def _more(rng: random.Random, scene: Scene) -> Scene | None:
    """One of the things occurs once more."""
    if len(scene.things) > 3:
        return None
    again = replace(rng.choice(scene.things), cell=rng.choice(free_cells(scene)), dx=0.0, dy=0.0)
    return replace(scene, things=(*scene.things, again))


def _mirror(rng: random.Random, scene: Scene) -> Scene:
    """Left and right, above and below exchanged, which reverses every relation between things."""
    return replace(scene, things=tuple(replace(t, cell=8 - t.cell, dx=-t.dx, dy=-t.dy) for t in scene.things))


def _exchange(rng: random.Random, scene: Scene) -> Scene | None:
    """Two things with each other's colour."""
    a, b = rng.sample(scene.things, 2)
    if a.colour == b.colour or a.noun == b.noun:
        return None
    colours = {a: b.colour, b: a.colour}
    return replace(scene, things=tuple(replace(t, colour=colours.get(t, t.colour)) for t in scene.things))


# What makes a caption of each category false. Every caption names all things and so their number, but colours and places only where it is
# about them.
_REPLACE, _REMOVE, _RECOLOUR = (partial(change, group=group) for group in ("replace", "remove", "recolour"))
_FALSIFIERS: dict[str, tuple[Falsifier, ...]] = {
    "single": (_REPLACE, _more),
    "two": (_REPLACE, _REMOVE, _more),
    "counting": (_REPLACE, _REMOVE, _more),
    "colors": (_RECOLOUR, _REPLACE),
    "position": (_mirror,),
    "attribute": (_RECOLOUR, _exchange, _REPLACE),
    "many": (_RECOLOUR, _REPLACE, _REMOVE, _more),
    "dense": (_RECOLOUR, _REPLACE, _REMOVE, _more, _mirror),
}


def near_miss_of_caption(rng: random.Random, sample: T2ISample) -> Scene:
    """A scene like the sample's of which its caption is not true."""
    ways = _FALSIFIERS[sample.category]
    while True:
        falsify = rng.choice(ways)
        scene = falsify(rng, sample.scene)
        told = places if falsify is _mirror else inventory
        if scene is not None and told(scene) != told(sample.scene) and not _shows_more(scene, sample.scene):
            return scene
        ways = (*_FALSIFIERS[sample.category], _REPLACE)  # reversing a relation may give nothing but a held-out one


def near_miss_of_edit(rng: random.Random, sample: EditSample) -> Scene:
    """Another edit of the source, of the same group where possible; or the right one with a further change that nobody asked for."""
    while True:
        group = rng.choice(GROUPS)
        if rng.random() < 0.5:
            scene = change(rng, sample.target, group)
        else:
            scene = change(rng, sample.source, sample.group if sample.group in GROUPS else group)
        if scene is not None and scene not in (sample.target, sample.source) and not _shows_more(scene, sample.target):
            return scene


def _shows_more(scene: Scene, right: Scene) -> bool:
    """Whether it shows something held out that the right picture does not: a reward would learn that what is new is worse."""
    return not heldout_kinds(scene.things) <= heldout_kinds(right.things)


def places(scene: Scene) -> list[tuple[str, str, str, str, int]]:
    """What stands where, sorted, whatever the jitter."""
    return sorted((t.noun, t.colour, t.size, t.material, t.cell) for t in scene.things)


def inventory(scene: Scene) -> list[tuple[str, str]]:
    """The nouns and colours of the things, sorted. No caption that names both is true of two scenes that differ in this."""
    return sorted((t.noun, t.colour) for t in scene.things)
