"""The trees of block_tree found by tensors alone, level by level: no number is looked at and no shape depends on one, so that a GPU need
not wait and can replay the search with the rest of a round.

Shape legend: B rows, K tokens of a block, V vocabulary, W nodes of a level that are expanded, N nodes, n = N + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperbagel.nn.trees import ancestors
from hyperbagel.speculative.drafters.expand import Level, grow, kept_nodes


def search_beam(
    logits: Tensor,
    link: Callable[[Tensor], Tensor],
    root: Tensor,
    nodes: int,
    *,
    branch: int,
    limit: Tensor | int = 10**6,
    stop: Tensor | int = -1,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The likeliest paths below the tokens root [B] -> (tokens [B, N], parents [B, n]) of N <= `nodes` nodes. Parents are numbered from 1,
    0 is the root. Where there are fewer nodes, the token is -1. The likeliest path comes first, as in `spine_first`.

    logits [B, K, V]; link(u [B, W]) [B, W, V], what the Markov head adds to the logits after each token u.
    branch: most children of a node, and W. limit: most tokens in line. stop, scale: as in `search_best_first`, whose nodes these
    are as long as no level has more than W that are expanded. For the shipped drafter W = 4 accepts as much.
    """
    logits = logits.float()  # sums of both in bf16 would be ties
    levels: list[Level] = []
    for d in range(logits.shape[1]):
        last = levels[-1] if levels else None
        above = root[:, None] if last is None else last.frontier_tokens
        levels.append(grow(last, (logits[:, d, None] + link(above)) * scale, branch, ended=limit <= d, stop=stop))
    tokens, parents, scores = kept_nodes(levels, nodes)
    return _spine_first(tokens.masked_fill(scores == -torch.inf, -1), parents, scores)


def _spine_first(tokens: Tensor, parents: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers nodes with tokens and scores [B, N] and parents [B, n] anew: the likeliest path, then the others in their order."""
    n = parents.shape[1]
    index = torch.arange(n - 1, device=tokens.device)
    better = (scores[:, None] > scores[..., None]) | ((scores[:, None] == scores[..., None]) & (index < index[:, None]))
    siblings = parents[:, 1:, None] == parents[:, None, 1:]
    likeliest = F.pad(~(siblings & better).any(-1), (1, 0), value=True)  # of its parent's children; the root of itself
    on = ~(ancestors(parents) & ~likeliest[:, None]).any(-1)
    order = (torch.arange(n, device=tokens.device) + ~on * n).argsort(dim=1)  # [B, n]; the root stays first
    place = order.argsort(dim=1)
    return tokens.gather(1, order[:, 1:] - 1), place.gather(1, parents.gather(1, order))
