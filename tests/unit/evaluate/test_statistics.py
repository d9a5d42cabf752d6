"""Intervals against closed forms and against their own promise (coverage)."""

from __future__ import annotations

import numpy as np
import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.evaluate.statistics import bootstrap_groups, bootstrap_mean, paired_difference, wilson
from hyperbagel.evaluate.summary import question_units, summarise_questions


def test_wilson_matches_known_values() -> None:
    # the quadratic (p - q)^2 = z^2 q (1 - q) / n solved by hand for 8 of 10, z = 1.95996
    estimate = wilson(8, 10)
    for bound in (estimate.low, estimate.high):
        assert (0.8 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 10, rel=1e-5)
    assert estimate.low < 0.8 < estimate.high
    assert wilson(0, 20).low == 0 and wilson(20, 20).high == 1
    assert 0.8 < wilson(20, 20).low < 1  # all right is no proof of certainty


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    scores = np.random.default_rng(0).normal(0.3, 0.2, 1000)
    estimate = bootstrap_mean(scores.tolist())
    half = 1.96 * scores.std() / 1000**0.5
    assert estimate.mean == pytest.approx(scores.mean())
    assert estimate.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(scores.mean() + half, abs=0.1 * half)
    assert estimate == bootstrap_mean(scores.tolist())  # a fixed seed


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        estimate = bootstrap_mean((rng.random(80) < 0.7).astype(float).tolist(), seed=trial, draws=400)
        hits += estimate.low <= 0.7 <= estimate.high
    assert 0.89 <= hits / 200 <= 0.99


def test_groups_weigh_the_same_however_large() -> None:
    estimate = bootstrap_groups({"large": [1.0] * 90, "small": [0.0] * 10})
    assert estimate.mean == estimate.low == estimate.high == 0.5
    assert estimate.n == 100


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(400)  # how hard a prompt is, shared by both models
    theirs = {f"p{i}": float(h) for i, h in enumerate(hard)}
    ours = {f"p{i}": float(h) - 0.01 for i, h in enumerate(hard)}
    estimate = paired_difference(ours, theirs)
    assert estimate.mean == pytest.approx(-0.01)
    assert estimate.high - estimate.low < 1e-9
    with pytest.raises(InputError, match="unpaired"):
        paired_difference(ours, {k: v for k, v in theirs.items() if k != "p7"})


def test_paired_groups_weigh_the_same() -> None:
    theirs = {f"a{i}": 1.0 for i in range(90)} | {f"b{i}": 1.0 for i in range(10)}
    ours = {k: v if k[0] == "a" else v - 0.2 * (int(k[1:]) % 2) for k, v in theirs.items()}
    estimate = paired_difference(ours, theirs, groups={k: k[0] for k in theirs})
    assert estimate.mean == pytest.approx(-0.05) and estimate.n == 100
    assert -0.1 <= estimate.low < -0.05 < estimate.high <= 0
    assert paired_difference(ours, theirs).mean == pytest.approx(-0.01)


def test_questions_with_one_fate_count_once() -> None:
    """75 choices whose four rotations are right or wrong together say as much as 75 questions, not as 300."""
    kinds = ("choice", "colour")
    records = [
        {"kind": kind, "pair": f"{i}" if kind == "choice" else "", "id": f"{kind}{i}/{k}", "score": float(i % 3 > 0)}
        for kind in kinds
        for i in range(75)
        for k in range(4 if kind == "choice" else 1)
    ]  # fmt: skip
    table = summarise_questions(records)["right"]
    assert table["choice"] == table["colour"] == wilson(50, 75).to_dict()
    assert table["overall"]["n"] == 150
    assert [u["score"] for u in question_units([dict(r, score=float(k)) for k, r in enumerate(records[:4])])] == [1.5]


def test_nothing_to_average_is_an_error() -> None:
    for call in (lambda: bootstrap_mean([]), lambda: bootstrap_groups({}), lambda: wilson(0, 0), lambda: wilson(3, 2)):
        with pytest.raises(InputError):
            call()


def test_groups_are_resampled_independently() -> None:
    x = np.random.default_rng(0).random(100)
    estimate = bootstrap_groups({"a": x.tolist(), "b": (1 - x).tolist()})  # one resampling for both would always give 0.5
    assert 0.06 < estimate.high - estimate.low < 0.1


def test_the_level_of_a_paired_difference_of_groups() -> None:
    x = np.random.default_rng(0).random(100)
    ours, theirs = {f"{i:03d}": float(v) for i, v in enumerate(x)}, {f"{i:03d}": 0.0 for i in range(100)}
    wide, narrow = (paired_difference(ours, theirs, groups={k: k[-1] for k in ours}, level=level) for level in (0.95, 0.5))
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
