"""Which drafted tokens the target accepts. Pure functions of tensors; exact for any drafter.

Greedy: a node is accepted if it is what the target would choose after its parent. Sampled: speculative sampling (Leviathan et al. 2023,
Chen et al. 2023), and for several children of one node recursive rejection without replacement (Jeon et al. 2024): each child is tried
against what is left of the target's distribution, so that the resulting token is distributed as if the target had been sampled.

Shape legend: B rows, n nodes (root included), V vocabulary. Node 0 is the root; tokens[:, 0] is ignored. A token of -1 is no draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.generate.sampling import draw


class Accepted(NamedTuple):
    """node [B]: the last accepted node (0: none but the root); token [B]: the target's own next token after it."""

    node: Tensor
    token: Tensor


def greedy_path(best: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The accepted nodes of one row's tree, root first. best, tokens, parents: of its n nodes; best is the target's argmax after each."""
    path = [0]
    for i in range(1, len(tokens)):
        if parents[i] == path[-1] and tokens[i] == best[path[-1]]:
            path.append(i)
    return path


def greedy_chain(best: Tensor, tokens: Tensor) -> Accepted:
    """The greedy rule for a chain: best [B, n], the target's argmax after each node; tokens [B, n]."""
    node = (tokens[:, 1:] == best[:, :-1]).long().cumprod(1).sum(1)
    return Accepted(node, best.gather(1, node[:, None])[:, 0])


def sampled(p: Tensor, tokens: Tensor, parents: Tensor, uniforms: Tensor, q: Tensor | None = None) -> Accepted:
    """The rule: accepts or rejects the nodes in order, then draws the final token from what is left.

    Args:
        p: [B, n, V] the target's distribution after each node.
        tokens, parents: [B, n].
        uniforms: [B, n] in [0, 1), one per node; the root's draws the final token.
        q: [B, n, V] the distribution that each node's children were drawn from, without replacement and in order of index;
            None: the drafts are a deterministic choice.
    """
    b, n, _ = p.shape
    p, rows = p.double(), torch.arange(b, device=p.device)
    at = torch.zeros(b, dtype=torch.long, device=p.device)
    left = p[:, 0]  # what the next token must be distributed as, given the rejections so far
    own = None if q is None else q[:, 0].double()
    for i in range(1, n):
        here = (parents[:, i] == at) & (tokens[:, i] >= 0)  # rows that have come as far as this node's parent
        x = tokens[:, i].clamp(min=0)
        chance = left[rows, x] if own is None else left[rows, x] / own[rows, x]
        taken = here & (uniforms[:, i] < chance)  # with probability min(1, p(x) / q(x)); a choice has q(x) = 1
        lost = (here & ~taken)[:, None]
        drawn = torch.zeros_like(left).scatter_(1, x[:, None], 1.0)  # all mass on x
        left = torch.where(lost, residual(left, drawn if own is None else own), left)
        left = torch.where(taken[:, None], p[:, i], left)
        if q is not None and own is not None:
            own = torch.where(lost, residual(own, drawn), own)
            own = torch.where(taken[:, None], q[:, i].double(), own)
        at = torch.where(taken, i, at)
    return Accepted(at, draw(left, uniforms[:, 0]))


def sampled_path(
    chances: Sequence[float], tokens: Sequence[int], parents: Sequence[int], uniforms: Sequence[float]
) -> tuple[list[int], list[int]]:
    """`sampled` for one row's tree whose tokens are a deterministic choice.

    Args:
        chances: of the n nodes, the target's probability of each token after its parent.
        tokens, parents, uniforms: as in `sampled`, of this row.

    Returns:
        The accepted nodes, root first, and the children of the last of them that were refused: their tokens must not be drawn.
    """
    path, refused, left = [0], list[int](), 1.0  # left: the probability that refusals have left over
    for i in range(1, len(tokens)):
        if parents[i] != path[-1] or tokens[i] < 0 or any(tokens[i] == tokens[j] for j in refused):
            continue
        if uniforms[i] * left < chances[i]:
            path.append(i)
            refused, left = [], 1.0
        else:
            refused.append(i)
            left -= chances[i]
    return path, refused


def sampled_chain(p: Tensor, tokens: Tensor, uniforms: Tensor, q: Tensor | None = None) -> Accepted:
    """`sampled` for a chain, all nodes at once. q: [B, >= n - 1, V] or None."""
    b, n, _ = p.shape
    p, rows = p.double(), torch.arange(b, device=p.device)
    x = tokens[:, 1:].clamp(min=0)
    chance = p[:, :-1].gather(2, x[..., None])[..., 0]
    if q is not None:
        chance = chance / q[:, : n - 1].double().gather(2, x[..., None])[..., 0]
    taken = (uniforms[:, 1:] < chance) & (tokens[:, 1:] >= 0)
    node = taken.long().cumprod(1).sum(1)
    left = p[rows, node]
    refused = torch.cat([tokens, tokens.new_full((b, 1), -1)], dim=1)[rows, node + 1]  # -1: the whole chain was accepted
    if q is None:
        minus = torch.zeros_like(left).scatter_(1, refused.clamp(min=0)[:, None], 1.0)
    else:
        minus = q.double()[rows, node.clamp(max=q.shape[1] - 1)]
    left = torch.where((refused >= 0)[:, None], residual(left, minus), left)
    return Accepted(node, draw(left, uniforms[:, 0]))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), normalised [B, V]; p where nothing is left (then a rejection has probability 0)."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(p.dtype).tiny), p)
