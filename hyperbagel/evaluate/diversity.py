"""How much pictures of one prompt differ. A student that draws the same picture from any noise may gain accuracy; this is what it loses.

Meaningful only in comparison with the teacher's figure on the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from hyperbagel.evaluate.edits import match
from hyperbagel.toybox.scene import Scene

DRAWS = 4  # pictures of each prompt


def scene_diversity(scenes: Sequence[Scene]) -> float:
    """Mean of 1 - `match` over all pairs of scene graphs, in [0, 1]: whether what a prompt leaves open stays open."""
    return float(np.mean([1 - match(a, b) for a, b in combinations(scenes, 2)]))


def pixel_diversity(pictures: np.ndarray) -> float:
    """Mean root mean squared difference over all pairs of uint8 pictures [N, H, W, 3], in [0, 1]."""
    x = pictures.astype(np.float32) / 255
    return float(np.mean([np.sqrt(np.mean((x[i] - x[j]) ** 2)) for i, j in combinations(range(len(x)), 2)]))
