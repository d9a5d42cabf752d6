"""Who sees whom among new tokens that form trees: each token sees its row's past, its ancestors and itself.

Shape legend: B rows, n and m new tokens a row, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ancestors(parents: Tensor) -> Tensor:
    """parents [B, n], the root its own and each before its children -> bool [B, n, n]: node i (row) sees node j, which is itself or an
    ancestor. Parents 0 0 0 1 1 2:

            0       1 . . . . .
           / \\      1 1 . . . .
          1   2     1 . 1 . . .
         / \\   \\    1 1 . 1 . .
        3   4   5   1 1 . . 1 .
                    1 . 1 . . 1
    """
    n = parents.shape[1]
    nodes = torch.arange(n, device=parents.device)
    seen = ((nodes[:, None] == nodes) | (parents[..., None] == nodes)).float()
    for _ in range(max(1, (n - 1).bit_length())):  # paths of twice the length each time
        seen = (seen @ seen).clamp(max=1)
    return seen > 0.5


def after_past(seen: Tensor, past: Tensor, slots: int) -> Tensor:
    """The mask of tokens that see the first `past` [B, 1] slots of their rows and, of the m new ones behind these, those in `seen`
    [B, n, m] -> bool [B, 1, n, K = slots]. Rows of 1 and 3 cached tokens, parents 0 0 0:

        row 0:  1 1 . . . .     row 1:  1 1 1 1 . .
                1 1 1 . . .             1 1 1 1 1 .
                1 1 . 1 . .             1 1 1 1 . 1
    """
    n, m = seen.shape[1:]
    node = torch.arange(slots, device=seen.device) - past  # [B, K]: which new token lies in a slot
    within = seen.gather(2, node.clamp(0, m - 1)[:, None].expand(-1, n, -1)) & ((node >= 0) & (node < m))[:, None]
    return ((node < 0)[:, None] | within).unsqueeze(1)
