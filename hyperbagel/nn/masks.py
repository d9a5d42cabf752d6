"""Who sees whom in a packed training row (BAGEL's rule):

    (causal or same full / noise split) and not (key in another noise split) and same sample

Text t, a noised picture n, its clean copy c and an answer a, in reading order (rows are queries):

        t t n n c c a a
      t 1 . . . . . . .      text is causal
      t 1 1 . . . . . .
      n 1 1 1 1 . . . .      a noised picture sees the past and all of itself
      n 1 1 1 1 . . . .
      c 1 1 . . 1 1 . .      nobody but itself sees noise
      c 1 1 . . 1 1 . .
      a 1 1 . . 1 1 1 .
      a 1 1 . . 1 1 1 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperbagel.core.types import PackedBatch


def dense_mask(batch: PackedBatch) -> Tensor:
    """bool [B, 1, S, S]. Padding sees itself alone, so that no softmax row is empty."""
    q = _Side(batch, slice(None), None)
    k = _Side(batch, None, slice(None))
    seen = _rule(q, k)
    s = batch.positions.shape[1]
    return (seen | torch.eye(s, dtype=torch.bool, device=seen.device)).unsqueeze(1)


def block_mask(batch: PackedBatch) -> Any:
    """The same rule as a flex BlockMask: memory grows with blocks, not with S^2. For long packed rows on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _rule(_Side(batch, b, i), _Side(batch, b, j)) | (i == j)

    rows, s = batch.positions.shape
    return create_block_mask(rule, rows, None, s, s, device=str(batch.positions.device))


class _Side:
    """The fields of the rule, indexed for queries [B, S, 1], keys [B, 1, S], or one pair of tokens."""

    def __init__(self, batch: PackedBatch, i: Any, j: Any) -> None:
        at = (i, j) if isinstance(i, Tensor) else (slice(None), i, j)  # flex gives scalars: row, token
        self.sample = batch.sample_id[at]
        self.split = batch.split_id[at]
        self.order = batch.order[at]
        self.full = batch.is_full[at]
        self.noise = batch.is_noise[at]


def _rule(q: _Side, k: _Side) -> Tensor:
    same_split = q.split == k.split
    seen = (q.order >= k.order) | (same_split & q.full)
    return seen & ~(k.noise & ~same_split) & (q.sample == k.sample) & (q.sample >= 0)
