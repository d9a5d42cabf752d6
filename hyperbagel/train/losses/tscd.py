"""Trajectory segmented consistency distillation (Hyper-Bagel 3.2.2, after Hyper-SD): times, the two ends that must agree, a stabiliser.

Shape legend: B samples, N latent tokens, C values of a token. Times [B] are after the shift, t = 1 is noise.

    b_j ......... s ......... t_m <--teacher-- t_n ......... b_{j+1}          a segment; both ends jump to s
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.flow.schedule import segment_bounds, shift_time


class SegmentTimes(NamedTuple):
    """b_j <= s <= t_m < t_n, each [B]."""

    t_n: Tensor
    t_m: Tensor
    s: Tensor


def segment_times(u: Tensor, segments: int, step: float, shift: float, snap: float = 0.5) -> SegmentTimes:
    """Times from uniform draws u [4, B] in [0, 1), which decide on the segment, t_n in it, s, and whether s is the segment's end b_j.

    step: length of the teacher's step in unshifted time, cut off at b_j. snap: share of draws with s = b_j.
    ours: snap > 0. A sampler with a step for each segment only ever jumps to b_j, one with several ends every segment with such a jump; the
    other draws teach the way there.
    """
    bounds = segment_bounds(segments).to(u)
    j = (u[0] * segments).long().clamp(max=segments - 1)
    low, high = bounds[j], bounds[j + 1]
    t_n = high - (high - low) * u[1]  # in (low, high]: includes the segment's start, where the sampler stands
    t_m = torch.maximum(t_n - step, low)
    s = torch.where(u[3] < snap, low, low + (t_m - low) * u[2])
    return SegmentTimes(*(shift_time(t, shift) for t in (t_n, t_m, s)))


def jump(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One Euler step from t to s: x + (s - t) v. x, v [B, N, C]; t, s [B]. Jumping nowhere is the identity."""
    return x + (s - t)[:, None, None] * v


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mean over samples of sqrt(|x - y|^2 / (N C) + c^2) - c: quadratic near 0, linear far from it. y gets no gradient.

    ours (the paper has no such term): a small weight of it holds the student in place where the adversarial loss alone lets it drift.
    """
    square = (x.float() - y.detach().float()).square().flatten(1).mean(1)
    return (square / (torch.sqrt(square + c * c) + c)).mean()  # = sqrt(..) - c, without its cancellation
