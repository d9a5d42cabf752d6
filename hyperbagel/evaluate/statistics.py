"""Intervals for shares and paired differences; every reported figure carries one.

Shape legend: N prompts (the unit that is resampled), R bootstrap draws. Scores of several seeds of a prompt are averaged beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hyperbagel.core.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean and its two-sided confidence interval; `n` is the number of prompts behind it."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def bootstrap_mean(scores: Sequence[float], *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Estimate:
    """Percentile bootstrap of the mean of `scores` [N]: prompts are resampled with replacement.

    Raises InputError if there are no scores.
    """
    values = _vector(scores, "scores")
    means = _resampled_means(values, seed, draws)
    return _estimate(float(values.mean()), means, level, len(values))


def bootstrap_groups(groups: dict[str, Sequence[float]], *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> Estimate:
    """Bootstrap of the unweighted mean over groups (GenEval's overall, GEdit's mean over groups); prompts are resampled within groups.

    Raises InputError if there is no group, or an empty one.
    """
    if not groups:
        raise InputError("got no groups to average, expected at least one; score some items first")
    values = {name: _vector(scores, f"scores of group {name!r}") for name, scores in groups.items()}
    # another seed for each group: groups are independent samples
    means = np.mean([_resampled_means(v, seed + i, draws) for i, v in enumerate(values.values())], axis=0)
    return _estimate(float(np.mean([v.mean() for v in values.values()])), means, level, sum(map(len, values.values())))


def paired_difference(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Bootstrap of mean(ours - theirs) over prompts, with pairs kept together. Keys are item ids (same prompt, seed and noise).

    groups: the group of each item; the mean is then the unweighted one over groups, and prompts are resampled within groups.

    Raises InputError if the two do not hold the same items: a difference between different sets is not paired.
    """
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise InputError(
            f"got {len(odd)} unpaired items (first: {odd[0]!r}), expected the same items on both sides; evaluate both on one set"
        )
    if groups is None:
        return bootstrap_mean([ours[k] - theirs[k] for k in sorted(ours)], seed=seed, draws=draws, level=level)
    parts: dict[str, list[float]] = {}
    for k in sorted(ours):
        parts.setdefault(groups[k], []).append(ours[k] - theirs[k])
    return bootstrap_groups({name: parts[name] for name in sorted(parts)}, seed=seed, draws=draws, level=level)


def wilson(right: float, total: int, *, level: float = 0.95) -> Estimate:
    """Wilson score interval of the share right / total. It keeps its coverage near 0 and 1, where a bootstrap collapses to a point.

    right: how many of `total` independent items are right; an item that is right in part counts as a fraction, which makes the interval too
    wide, never too narrow.

    Raises InputError unless 0 <= right <= total and total > 0.
    """
    if not 0 <= right <= total or total == 0:
        raise InputError(f"got {right} of {total}, expected 0 <= right <= total and total > 0; count the items again")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = right / total
    scale = 1 + z * z / total
    centre = (p + z * z / (2 * total)) / scale
    half = z * ((p * (1 - p) / total + z * z / (4 * total * total)) ** 0.5) / scale
    # at p = 0 or 1 the interval touches the share; rounding must not push it past
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), total)


def _vector(scores: Sequence[float], what: str) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"got {what} of shape {values.shape}, expected a non-empty list of numbers; score some items first")
    return values


def _resampled_means(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = len(values)
    # in blocks: for a large evaluation, R x N indices at once would take tens of MB
    block = max(1, 2_000_000 // n)
    parts = [values[rng.integers(0, n, size=(min(block, draws - i), n))].mean(axis=1) for i in range(0, draws, block)]
    return np.concatenate(parts)  # [R]


def _estimate(mean: float, means: np.ndarray, level: float, n: int) -> Estimate:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), n)
