"""Reward feedback on the one-step picture (Hyper-Bagel 3.2.5), and the loss that trains a reward on preference pairs.

Shape legend: B samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def refl_loss(reward: Tensor, ceiling: float = 6.0) -> Tensor:
    """Mean of relu(ceiling - r), reward [B] (3.2.5: 6.0 for HPSv3). Pictures that have reached the ceiling no longer pull."""
    return torch.relu(ceiling - reward.float()).mean()


def preference_loss(better: Tensor, worse: Tensor) -> Tensor:
    """Bradley-Terry: mean of -log sigmoid(r_better - r_worse), both [B]; log 2 for a reward that knows nothing."""
    return F.softplus(worse.float() - better.float()).mean()


def balanced_weight(holding: Tensor, reward: Tensor, cap: float = 0.3, *, by_row: bool = False) -> Tensor:
    """ours: the weight in [0, 1] under which the reward's gradient is at most `cap` times as long as the one that holds the student.

    holding, reward: gradients of the two terms by the same tensor (x0_hat), [B, N, C]. A reward that outweighs what holds the student gets
    exploited; stop where the held-out reward peaks. by_row: a weight for each row, [B, 1, 1]; the lengths of a reward's gradients vary
    widely, and under a common weight the few longest would leave the others nothing.
    """
    over = (1, 2) if by_row else None
    limit, length = (torch.linalg.vector_norm(g.float(), dim=over, keepdim=by_row) for g in (holding, reward))
    return (cap * limit / length.clamp_min(1e-12)).clamp(max=1.0)


def with_gradient(x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar that is `value` and whose gradient by x is `gradient` (of x's shape)."""
    along = (x * gradient.detach()).sum()
    return value.detach() + along - along.detach()
