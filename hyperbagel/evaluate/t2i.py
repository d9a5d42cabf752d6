"""Does a picture show what its prompt asked for? GenEval's rules, applied to what the detector reads.

Plain: the rules alone. Strict: in addition, the scene that was read must resemble the picture when it is drawn again (PSNR of at least
20 dB), so that a coloured blur which satisfies the detector does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hyperbagel.toybox.detector import Detection, Reading
from hyperbagel.toybox.items import T2IItem
from hyperbagel.toybox.rerender import rerender

CONFIDENCE = 0.3
COUNTING_CONFIDENCE = 0.9
STRICT_PSNR = 20.0  # dB
SHRINK = 0.1  # share of the summed sizes that is taken off a centre offset before its direction is read
DIRECTION = 0.5  # a direction holds if its component exceeds this share of the offset's length


@dataclass(frozen=True)
class T2IScore:
    """reason: the first thing that is wrong, in words; empty if nothing is. psnr: of the scene drawn again, in dB."""

    plain: bool
    strict: bool
    psnr: float
    reason: str = ""


def score_t2i(item: T2IItem, picture: np.ndarray, reading: Reading) -> T2IScore:
    """The score of one picture, uint8 [H, H, 3], for one prompt; reading: what the detector reads in it."""
    reason = what_is_wrong(item, reading)
    quality = rerender(picture, reading, threshold=CONFIDENCE).psnr
    plain = not reason
    return T2IScore(plain, plain and quality >= STRICT_PSNR, quality, reason)


def what_is_wrong(item: T2IItem, reading: Reading) -> str:
    """GenEval's check: what is wrong, in words; empty if nothing is.

    Every noun must be found as often as asked for, in its colour; more of it is wrong only in counting. A relation must hold between the
    most confident things of its two nouns.
    """
    counting = item.category == "counting"
    found = reading.above(COUNTING_CONFIDENCE if counting else CONFIDENCE)
    for need in item.include:
        same = [d for d in found if d.noun == need.noun]
        if len(same) < need.count:
            return f"{need.noun}: found {len(same)}, asked for {need.count}"
        if counting and len(same) > need.count:
            return f"{need.noun}: found {len(same)}, asked for exactly {need.count}"
        coloured = [d for d in same[: need.count] if need.colour in (None, d.colour)]
        if len(coloured) < need.count:
            return f"{need.noun}: {', '.join(d.colour for d in same[: need.count])}, asked for {need.colour}"
    if item.relation is not None:
        a, relation, b = item.relation
        first, second = ([d for d in found if d.noun == noun][:1] for noun in (a, b))
        if not first or not second or relation not in relations(first[0], second[0]):
            return f"the {a} is not {relation} the {b}"
    return ""


def relations(a: Detection, b: Detection) -> tuple[str, ...]:
    """Where a is relative to b, by GenEval's rule: each component of the centre offset is shrunk by 0.1 of the summed sizes and counts if
    it then exceeds half of the offset's length."""
    offset = np.array([a.cx - b.cx, a.cy - b.cy])
    length = float(np.hypot(*offset))
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * (a.extent + b.extent), 0)
    if length < 1e-6:
        return ()
    x, y = shrunk / length
    held = {"left of": x < -DIRECTION, "right of": x > DIRECTION, "above": y < -DIRECTION, "below": y > DIRECTION}
    return tuple(name for name, true in held.items() if true)
