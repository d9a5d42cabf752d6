"""BAGEL's objective: flow matching on noise tokens and cross-entropy on answer tokens.

Path (rectified flow): x_t = (1 - t) x0 + t e, so the velocity to learn is v = dx_t / dt = e - x0.
Shape legend: Nmse noise tokens, C values of a latent token, Nce answer tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flow_loss(squared: Tensor) -> Tensor:
    """Mean over tokens and values of (v - (e - x0))^2. squared: [Nmse, C], not empty."""
    return squared.float().mean()


def answer_loss(ce: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cross-entropies. ce, weights: [Nce], not empty.

    With weights n^-1/2 (n: length of the answer) an answer counts by the root of its length.
    """
    return (ce.float() * weights).sum() / weights.sum()


def mixed_objective(
    squared: Tensor, ce: Tensor, ce_weights: Tensor, *, mse_weight: float = 1.0, ce_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """mse_weight * flow_loss + ce_weight * answer_loss, and both parts for the log; a part without tokens is left out.

    Raises:
        ValueError: a batch with neither noise nor answer tokens has nothing to learn.
    """
    parts: dict[str, Tensor] = {}
    if squared.numel():
        parts["mse"] = flow_loss(squared)
    if ce.numel():
        parts["ce"] = answer_loss(ce, ce_weights)
    if not parts:
        raise ValueError("mixed_objective: got a batch without noise and answer tokens, expected one of them, set a loss flag in its plans")
    weights = {"mse": mse_weight, "ce": ce_weight}
    return torch.stack([weights[name] * value for name, value in parts.items()]).sum(), {k: v.detach() for k, v in parts.items()}


def flow_by_time(squared: Tensor, t: Tensor, bins: int = 4) -> Tensor:
    """Mean squared error in equal bins of t, [bins]; NaN where no token fell. squared: [Nmse, C], t: [Nmse] in [0, 1]."""
    index = (t * bins).long().clamp(0, bins - 1)
    error = squared.float().mean(1)
    total = torch.zeros(bins, device=error.device).index_add_(0, index, error)
    count = torch.zeros(bins, device=error.device).index_add_(0, index, torch.ones_like(error))
    return total / count
