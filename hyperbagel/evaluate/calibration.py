"""How far the measure itself can be trusted: the detector on drawings whose truth is known, and on prompts that are wrong by one word.

Printed with every score, since no score can be more exact than the detector behind it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from hyperbagel.evaluate.edits import match
from hyperbagel.evaluate.t2i import CONFIDENCE, COUNTING_CONFIDENCE, what_is_wrong
from hyperbagel.toybox.detector import PICTURE_VALUES, THING_VALUES, Detector, Reading
from hyperbagel.toybox.items import T2IItem
from hyperbagel.toybox.render import render
from hyperbagel.toybox.rerender import rerender
from hyperbagel.toybox.scene import COLOURS, NOUNS, Scene, sample_scene

CONDITIONS = ("clean", "noise 0.1", "blur 3x3")
VARIETY = 0.04  # share of striped things, line drawings and tones, as in the edits that are scored
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def detector_table(
    detector: Detector, items: Sequence[T2IItem], *, n: int = 600, redrawn: int = 100, seed: int = 0, side: int = 64
) -> dict[str, dict[str, float]]:
    """Shares in [0, 1] for each condition, over `n` fresh scenes (half of them with held-out combinations).

    found / sure: the number of things above confidence 0.3 / 0.9 is right. noun, colour, ...: read right, over all things or pictures.
    place: centre within one 64th. graph: drawing again recovers the whole scene graph, over the first `redrawn` scenes. right prompts /
    wrong prompts: share of pictures of `items` that pass with their own prompt, and with one that is wrong by one word.
    """
    rng = random.Random(seed)
    scenes = [sample_scene(rng, split=("train", "heldout")[i % 2], variety=VARIETY) for i in range(n)]
    drawn = np.stack([render(s, side) for s in scenes])
    prompts = np.stack([render(item.scene, side) for item in items]) if items else None
    table: dict[str, dict[str, float]] = {}
    for condition in CONDITIONS:
        pictures = spoiled(drawn, condition, seed)
        readings = read_all(detector, pictures)
        row = _words_right(scenes, readings)
        graphs = [match(rerender(p, r).scene, s) == 1.0 for p, r, s in zip(pictures[:redrawn], readings, scenes)]
        row["graph"] = float(np.mean(graphs))
        if prompts is not None:
            seen = read_all(detector, spoiled(prompts, condition, seed))
            row["right prompts"] = float(np.mean([not what_is_wrong(i, r) for i, r in zip(items, seen)]))
            row["wrong prompts"] = float(np.mean([not what_is_wrong(w, r) for i, r in zip(items, seen) for w in wrong_by_one(i, rng)]))
        table[condition] = row
    return table


def read_all(detector: Detector, pictures: np.ndarray, *, batch: int = 64) -> list[Reading]:
    """Readings of uint8 [N, H, H, 3], `batch` at a time."""
    return [r for i in range(0, len(pictures), batch) for r in detector.read(pictures[i : i + batch])]


def spoiled(pictures: np.ndarray, condition: str, seed: int) -> np.ndarray:
    """uint8 [N, H, H, 3] -> the same shape: Gaussian noise of 0.1 (of the range 0 to 1), a 3x3 box blur, or unchanged."""
    if condition == "clean":
        return pictures
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    if condition == "noise 0.1":
        x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    else:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def wrong_by_one(item: T2IItem, rng: random.Random) -> list[T2IItem]:
    """The item with one word of its prompt's meaning changed so that it is false of the scene: a noun, a colour, a count, the relation."""
    there = {t.noun for t in item.scene.things}
    wrong: list[T2IItem] = []
    for i, need in enumerate(item.include):
        others = [replace(need, noun=rng.choice([x for x in NOUNS if x not in there])), replace(need, count=need.count + 1)]
        if need.colour is not None:
            taken = {t.colour for t in item.scene.things if t.noun == need.noun}
            others.append(replace(need, colour=rng.choice([c for c in COLOURS if c not in taken])))
        if item.category == "counting" and need.count > 1:
            others.append(replace(need, count=need.count - 1))
        wrong += [replace(item, include=(*item.include[:i], other, *item.include[i + 1 :])) for other in others]
    if item.relation is not None:
        a, relation, b = item.relation
        wrong.append(replace(item, relation=(a, OPPOSITE[relation], b)))
    return wrong


def _words_right(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Each thing is compared with the detection nearest to it; a thing with none within 6/64 is wrong in every word."""
    marks: dict[str, list[bool]] = {k: [] for k in ("found", "sure", *THING_VALUES, "place", *PICTURE_VALUES)}
    for scene, reading in zip(scenes, readings):
        found = reading.above(CONFIDENCE)
        marks["found"].append(len(found) == len(scene.things))
        marks["sure"].append(len(reading.above(COUNTING_CONFIDENCE)) == len(scene.things))
        for word in PICTURE_VALUES:
            marks[word].append(getattr(reading, word) == getattr(scene, word))
        for thing in scene.things:
            apart = [(max(abs(d.cx - thing.cx), abs(d.cy - thing.cy)), d) for d in found]
            distance, nearest = min(apart, key=lambda pair: pair[0], default=(1.0, None))
            near = nearest is not None and distance < 6 / 64
            marks["place"].append(near and distance <= 1 / 64)
            for word in THING_VALUES:
                marks[word].append(near and getattr(nearest, word) == getattr(thing, word))
    return {k: float(np.mean(v)) for k, v in marks.items()}
