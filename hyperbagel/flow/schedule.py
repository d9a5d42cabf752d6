"""The times in [0, 1] that a sampler visits: the shift, grids and segments."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): s > 1 spends more of the steps near noise (SD3, Esser et al. 2024)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_time`: t = t' / (s - (s - 1) t')."""
    return t / (shift - (shift - 1) * t)


def time_grid(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 times from 1 to 0, fp32. BAGEL's `num_timesteps` N counts the points, so N = num_steps + 1."""
    return shift_time(torch.linspace(1, 0, num_steps + 1), shift)


def times_between(start: Tensor, end: Tensor, num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 times from `start` to `end`, both [...], equally spaced in unshifted time: [num_steps + 1, ...]."""
    share = torch.linspace(0, 1, num_steps + 1, device=start.device).view(-1, *(1 for _ in start.shape))
    return shift_time(torch.lerp(unshift_time(start, shift), unshift_time(end, shift), share), shift)


def segment_bounds(segments: int) -> Tensor:
    """0 = b_0 < ... < b_k = 1, equally spaced in unshifted time (TSCD, Hyper-Bagel 3.2.2): [segments + 1]."""
    return torch.linspace(0, 1, segments + 1)
