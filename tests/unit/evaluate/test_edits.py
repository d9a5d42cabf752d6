"""Marks of an edit: the calibration points, and each mark's own failure."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from itertools import permutations

import numpy as np
import pytest

from hyperbagel.evaluate.calibration import read_all
from hyperbagel.evaluate.edits import EditScore, gain, match, score_edit, untouched
from hyperbagel.evaluate.summary import summarise_edits
from hyperbagel.evaluate.toybox import load_detector
from hyperbagel.toybox.detector import Detector, Reading
from hyperbagel.toybox.edits import GROUPS
from hyperbagel.toybox.items import EditItem, edit_eval_items
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene, Thing, sample_scene

CAR, CUP = Thing("car", "red", "large", 0), Thing("cup", "blue", "small", 8)
SCENE = Scene("navy", (CAR, CUP))


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector()


@pytest.fixture(scope="module")
def items() -> list[EditItem]:
    return edit_eval_items(90, 3, "train")


def marks(detector: Detector, items: list[EditItem], pictures: list[np.ndarray]) -> list[EditScore]:
    return [score_edit(i, p, r) for i, p, r in zip(items, pictures, read_all(detector, np.stack(pictures)), strict=True)]


def mean_o(items: list[EditItem], scores: list[EditScore]) -> float:
    records = [{"group": i.group, "o": s.o, **asdict(s)} for i, s in zip(items, scores, strict=True)]
    return summarise_edits(records)["O of 10"]["overall"]["mean"]


def moved_right(picture: np.ndarray, pixels: int) -> np.ndarray:
    moved = np.roll(picture, pixels, axis=1)
    moved[:, :pixels] = picture[:, :1]
    return moved


def test_the_exact_target_is_nearly_ten(detector: Detector, items: list[EditItem]) -> None:
    scores = marks(detector, items, [render(i.target) for i in items])
    assert mean_o(items, scores) > 9.9
    assert np.mean([s.success for s in scores]) > 0.97


def test_a_copy_and_an_unrelated_scene_and_a_blank_are_nothing(detector: Detector, items: list[EditItem]) -> None:
    rng = random.Random(0)
    assert mean_o(items, marks(detector, items, [render(i.source) for i in items])) < 0.2
    assert mean_o(items, marks(detector, items, [render(sample_scene(rng)) for _ in items])) < 0.2
    assert mean_o(items, marks(detector, items, [np.full((64, 64, 3), 190, np.uint8) for _ in items])) < 0.2


def test_the_right_edit_shifted_by_three_pixels_is_about_six(detector: Detector, items: list[EditItem]) -> None:
    assert 5.3 < mean_o(items, marks(detector, items, [moved_right(render(i.target), 3) for i in items])) < 6.7


def test_mush_over_the_right_things_costs_quality(detector: Detector, items: list[EditItem]) -> None:
    noise = np.random.default_rng(0).normal(0, 60, (64, 64, 3))
    pictures = [np.clip(render(i.target) + noise, 0, 255).astype(np.uint8) for i in items]
    scores = marks(detector, items, pictures)
    assert np.mean([s.pq1 for s in scores]) < 3


def test_match_is_one_only_for_equal_graphs() -> None:
    assert match(SCENE, replace(SCENE, things=(CUP, replace(CAR, dx=0.02)))) == 1.0  # order and jitter say nothing
    for other in (
        replace(SCENE, background="mint"),
        replace(SCENE, tone="dark"),
        replace(SCENE, things=(CAR,)),
        replace(SCENE, things=(CAR, CUP, replace(CUP, cell=3))),
        replace(SCENE, things=(CAR, replace(CUP, size="large"))),
        replace(SCENE, things=(replace(CAR, material="striped"), CUP)),
    ):
        assert match(SCENE, other) == match(other, SCENE) < 1.0


def test_match_finds_the_best_pairing() -> None:
    rng = random.Random(2)
    for _ in range(50):
        a, b = sample_scene(rng, n=3), sample_scene(rng, n=4)
        best = max(
            sum(getattr(x, w) == getattr(y, w) for x, y in zip(a.things, order) for w in ("noun", "colour", "size", "material", "cell"))
            for order in permutations(b.things, 3)
        )
        words = sum(getattr(a, w) == getattr(b, w) for w in ("background", "style", "tone"))
        assert match(a, b) == pytest.approx((best / 5 + words / 3) / 5)


def test_gain_goes_from_the_source_to_the_target() -> None:
    target = replace(SCENE, things=(replace(CAR, colour="green"), CUP))
    assert gain(SCENE, target, SCENE) == 0
    assert gain(SCENE, target, target) == 1
    assert gain(SCENE, target, replace(target, background="mint")) < 1  # something else was changed as well
    half = replace(SCENE, things=(replace(CAR, colour="green", noun="boat"), CUP))
    assert gain(SCENE, replace(half, background="cream"), half) == pytest.approx(0.4 / (0.4 + 1 / 3))
    assert gain(SCENE, SCENE, SCENE) == 1


def test_untouched_leaves_out_what_the_edit_changes() -> None:
    target = replace(SCENE, things=(replace(CAR, cell=2), CUP))
    keep = untouched(SCENE, target, 64)
    assert not keep[12, 12] and not keep[12, 52]  # the old place and the new one
    assert keep[52, 52] and keep[32, 32]
    ground = untouched(SCENE, replace(SCENE, background="mint"), 64)
    assert ground[12, 12] and ground[52, 52] and not ground[32, 32]
    assert untouched(SCENE, replace(SCENE, tone="dark"), 64).all()


def test_items_cover_the_nine_groups(items: list[EditItem]) -> None:
    assert {i.group for i in items} == set(GROUPS)


def test_a_sixteenth_of_stray_pixels_costs_a_quarter_of_the_second_quality_mark(items: list[EditItem]) -> None:
    scene = Scene("gray", ())
    picture = render(scene).copy()
    picture[:4] = 0
    marked = score_edit(replace(items[0], source=scene, target=scene), picture, Reading((), "gray", "plain", "normal"))
    assert (marked.pq2, marked.sc1, marked.success) == (7.5, 10.0, True)


def test_where_nothing_is_to_change_a_change_is_nothing() -> None:
    assert gain(SCENE, SCENE, SCENE) == 1 and gain(SCENE, SCENE, replace(SCENE, tone="dark")) == 0
