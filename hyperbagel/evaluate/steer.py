"""Do the guidance scales still change the picture? A student takes them as inputs, and may have learned to ignore them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperbagel.core.errors import Notice
from hyperbagel.evaluate.records import Record, Worker
from hyperbagel.evaluate.rows import is_edit, request_for
from hyperbagel.evaluate.statistics import bootstrap_mean
from hyperbagel.evaluate.toybox import Settings, as_square, drawn

ENDS = {"text_scale": (1.0, 5.0), "image_scale": (1.0, 2.5)}  # 3.2.1: the ranges that students are made for


def steer_worker(model: Any, s: Settings) -> Worker:
    """Draws each item with the weakest and the strongest scale from the same noise, and records how far apart the two pictures are, and how
    far from an edit's source."""

    def work(items: list[Any], seeds: list[int]) -> list[Record]:
        records: list[Record] = []
        for item, seed in zip(items, seeds, strict=True):
            figures: dict[str, float] = {}
            for scale in ENDS if is_edit(item) else ("text_scale",):
                pair = [request_for(item, s, seed, **{scale: end}) for end in ENDS[scale]]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Notice)  # the weak end switches guidance off: that is what is measured
                    weak, strong = (as_square(r.image, s.side) for r in model.generate_batch(pair))
                figures[scale] = _rms(weak, strong)
                if scale == "image_scale":
                    source = np.asarray(drawn(item.source, s.side))
                    figures |= {"from_source_weak": _rms(weak, source), "from_source_strong": _rms(strong, source)}
            records.append({"edit": is_edit(item), **figures})
        return records

    return work


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean squared difference of uint8 pictures, in [0, 1]."""
    return float(np.sqrt(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2))) / 255


def steering(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Mean change of a picture (rms of pixels, 0 to 1) from the weakest to the strongest scale, and distance of edits from their source."""
    prompts, edits = ([r for r in records if r["edit"] == edit] for edit in (False, True))
    names = {
        "text scale, prompts": [r["text_scale"] for r in prompts],
        "text scale, edits": [r["text_scale"] for r in edits],
        "image scale, edits": [r["image_scale"] for r in edits],
        "from the source, weak": [r["from_source_weak"] for r in edits],
        "from the source, strong": [r["from_source_strong"] for r in edits],
    }
    return {name: bootstrap_mean(values).to_dict() for name, values in names.items() if values}
