"""Was the instruction followed, and was the rest left alone? GEdit's marks, with the exact truth instead of a judging model.

SC1 (semantic): how far the result got on the way from the source's scene graph to the target's. SC2: how well what the edit should not
touch matches the exact target. PQ1: how well the scene that was read matches the picture when it is drawn again. PQ2: how few pixels are
far off that drawing. All in [0, 10]. SC = min(SC1, SC2), PQ = min(PQ1, PQ2), O = sqrt(SC PQ).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hyperbagel.toybox.detector import Reading
from hyperbagel.toybox.items import EditItem
from hyperbagel.toybox.render import render
from hyperbagel.toybox.rerender import box_mask, psnr, rerender
from hyperbagel.toybox.scene import Scene, Thing

LOW_PSNR, PSNR_RANGE = 12.0, 18.0  # dB: 12 scores 0, 30 and more scores 10
FAR = 60  # of 255 levels: a pixel is far off if one of its channels is
THING_WORDS = ("noun", "colour", "size", "material", "cell")
PICTURE_WORDS = ("background", "style", "tone")


@dataclass(frozen=True)
class EditScore:
    """The four marks in [0, 10]; success: the scene graph equals the target's."""

    sc1: float
    sc2: float
    pq1: float
    pq2: float
    success: bool

    @property
    def o(self) -> float:
        return float(np.sqrt(min(self.sc1, self.sc2) * min(self.pq1, self.pq2)))


def score_edit(item: EditItem, picture: np.ndarray, reading: Reading) -> EditScore:
    """The marks of one edited picture, uint8 [H, H, 3]; reading: what the detector reads in it."""
    side = picture.shape[0]
    again = rerender(picture, reading)
    far = np.abs(picture.astype(np.int16) - again.picture.astype(np.int16)).max(axis=2) > FAR  # [H, H]
    return EditScore(
        sc1=10 * gain(item.source, item.target, again.scene),
        sc2=_psnr_mark(psnr(picture, render(item.target, side), untouched(item.source, item.target, side))),
        pq1=_psnr_mark(again.psnr),
        pq2=10 * max(0.0, 1 - 4 * float(far.mean())),
        success=match(again.scene, item.target) == 1.0,
    )


def gain(source: Scene, target: Scene, result: Scene) -> float:
    """How far `result` got on the way from source to target, in [0, 1]: 0 for a copy of the source or worse."""
    before = match(source, target)
    if before == 1.0:  # nothing to change: all that counts is that nothing did
        return float(match(result, target) == 1.0)
    return max(0.0, (match(result, target) - before) / (1 - before))


def match(a: Scene, b: Scene) -> float:
    """Similarity of two scene graphs in [0, 1]; exactly 1 if and only if they are equal up to order and jitter.

    Each thing counts 1, a fifth for each of its words, under the best pairing; a missing or extra thing counts as wrong. The three words
    of the whole picture count 1 together.
    """
    fewer, more = sorted((a.things, b.things), key=len)
    words = sum(getattr(a, w) == getattr(b, w) for w in PICTURE_WORDS)
    total = len(THING_WORDS) * len(PICTURE_WORDS) * (len(more) + 1)
    # integers until the division, so that equality is exact
    return (_best_pairing(fewer, more) * len(PICTURE_WORDS) + words * len(THING_WORDS)) / total


def untouched(source: Scene, target: Scene, side: int) -> np.ndarray:
    """bool [side, side]: pixels of the target that the edit should not touch.

    They lie outside the boxes of what changes, before and after. With a new background, they are the boxes of what stays. If style or tone
    change or nothing stays, every pixel is compared, since the target is exact.
    """
    stays = set(source.things) & set(target.things)
    changes = tuple(t for t in source.things + target.things if t not in stays)
    if (source.style, source.tone) != (target.style, target.tone):
        keep = np.ones((side, side), dtype=bool)
    elif source.background != target.background:
        keep = box_mask(tuple(stays), side)
    else:
        keep = ~box_mask(changes, side)
    return keep if keep.any() else np.ones((side, side), dtype=bool)


def _psnr_mark(value: float) -> float:
    return 10 * float(np.clip((value - LOW_PSNR) / PSNR_RANGE, 0, 1))


def _best_pairing(fewer: tuple[Thing, ...], more: tuple[Thing, ...]) -> int:
    """The largest number of equal words if every thing of `fewer` is paired with one of `more`."""
    best = {0: 0}  # set of `more` that is used, as bits -> equal words so far
    for a in fewer:
        after: dict[int, int] = {}
        for used, words in best.items():
            for j, b in enumerate(more):
                if not used >> j & 1:
                    value = words + sum(getattr(a, w) == getattr(b, w) for w in THING_WORDS)
                    after[used | 1 << j] = max(after.get(used | 1 << j, -1), value)
        best = after
    return max(best.values())
