"""Alarms of a distillation: what the held-out figures say when a student goes wrong, before anyone looks at a picture.

Thresholds are on ratios student / teacher of `train.compare`; docs/training/diagnostics.md says what to do about each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLLAPSE = 0.8  # diversity below it: two noises of one condition give nearly one picture
CONTRACTION = 0.85  # spread below it: samples huddle round their mean
SATURATION = 1.1  # size above it: latents too large, colours too strong
FADING = 0.85  # size below it: grey, washed-out pictures
FALLING = 5  # evaluations without a new best before a run counts as past its optimum


def alarms(figures: Mapping[str, float], scores: Sequence[float] = ()) -> dict[str, str]:
    """Name of each alarm -> what is wrong, in words.

    figures: of the latest evaluation; an absent one raises no alarm. scores: of all evaluations so far, in order; higher is better.
    """
    found: dict[str, str] = {}

    def below(name: str, key: str, limit: float, what: str) -> None:
        if figures.get(key, limit) < limit:
            found[name] = f"{key} {figures[key]:.2f} is below {limit:g}: {what}"

    below("collapse", "diversity", COLLAPSE, "the student draws the same picture from different noise; keep an earlier checkpoint")
    below("contraction", "spread", CONTRACTION, "the student's pictures huddle round their mean; see the coupling in dmdo.md")
    below("fading", "size", FADING, "washed-out pictures; lower the learning rate")
    if figures.get("size", 1.0) > SATURATION:
        found["saturation"] = (
            f"size {figures['size']:.2f} is above {SATURATION:g}: over-saturated pictures; stop, or lower the learning rate"
        )
    if len(scores) > FALLING and max(scores[-FALLING:]) < max(scores[:-FALLING]):
        found["past_best"] = f"no new best in {FALLING} evaluations: the run is past its optimum; the best checkpoint is kept"
    return found
