"""Diversity of pictures of one prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hyperbagel.evaluate.diversity import pixel_diversity, scene_diversity
from hyperbagel.toybox.scene import Scene, Thing

CAR = Scene("gray", (Thing("car", "red", "large", 0),))


def test_equal_pictures_have_none_and_differences_count_in_pairs() -> None:
    moved = replace(CAR, things=(Thing("car", "red", "large", 8),))
    assert scene_diversity([CAR, CAR, CAR]) == 0
    # one word of five, of one thing beside the words of the picture: 0.1 in two of three pairs
    assert scene_diversity([CAR, CAR, moved]) == pytest.approx(0.1 * 2 / 3)
    assert scene_diversity([CAR, replace(moved, background="navy")]) == pytest.approx((0.2 + 1 / 3) / 2)


def test_pixels() -> None:
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    assert pixel_diversity(pictures) == 0
    pictures[2] = 51
    assert pixel_diversity(pictures) == pytest.approx(0.2 * 2 / 3)
