"""Which drafted tokens the target accepts. Pure functions of tensors; exact for any drafter.

Drafts that are a choice: a node is accepted if it is what the target itself says after its parent, its likeliest token or one that it
draws. The chance is the target's probability of the token, the most that any rule can give a draft without chance (the maximal coupling,
Leviathan et al. 2023, Theorem 3.5 with q(x) = 1).

Drafts that were drawn: speculative sampling (Leviathan et al. 2023, Chen et al. 2023), and for several children of one node recursive
rejection without replacement (Jeon et al. 2024): each child is tried against what is left of the target's distribution, so that the
resulting token is distributed as if the target had been sampled.

Shape legend: B rows, n nodes (root included), V vocabulary. Node 0 is the root; tokens[:, 0] is ignored. A token of -1 is no draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.generate.sampling import draw


class Accepted(NamedTuple):
    """node [B]: the last accepted node (0: none but the root); token [B]: the target's own next token after it."""

    node: Tensor
    token: Tensor


def chosen_path(says: Callable[[int], int], tokens: Sequence[int], parents: Sequence[int]) -> tuple[list[int], int]:
    """(the accepted nodes of one row's tree, root first; the target's own token after them).

    tokens, parents: of its n nodes. says: what the target says after a node, asked once for each accepted one, in order.
    """
    path, own = [0], says(0)
    for i in range(1, len(tokens)):
        if parents[i] == path[-1] and tokens[i] == own:
            path.append(i)
            own = says(i)
    return path, own


def chosen_chain(said: Tensor, tokens: Tensor) -> Accepted:
    """`chosen_path` for chains: said [B, n], what the target says after each node; tokens [B, n]."""
    node = (tokens[:, 1:] == said[:, :-1]).long().cumprod(1).sum(1)
    return Accepted(node, said.gather(1, node[:, None])[:, 0])


def sampled(p: Tensor, tokens: Tensor, parents: Tensor, q: Tensor, uniforms: Tensor) -> Accepted:
    """The rule for drawn drafts: accepts or rejects the nodes in order, then draws the final token from what is left.

    Args:
        p: [B, n, V] the target's distribution after each node.
        tokens, parents: [B, n].
        q: [B, n, V] the distribution that each node's children were drawn from, without replacement and in order of index.
        uniforms: [B, n] in [0, 1), one per node; the root's draws the final token.
    """
    b, n, _ = p.shape
    p, q, rows = p.double(), q.double(), torch.arange(b, device=p.device)
    at = torch.zeros(b, dtype=torch.long, device=p.device)
    left, own = p[:, 0], q[:, 0]  # left: what the next token must be distributed as, given the rejections so far
    for i in range(1, n):
        here = (parents[:, i] == at) & (tokens[:, i] >= 0)  # rows that have come as far as this node's parent
        x = tokens[:, i].clamp(min=0)
        taken = here & (uniforms[:, i] < left[rows, x] / own[rows, x])  # with probability min(1, p(x) / q(x))
        lost = (here & ~taken)[:, None]
        drawn = torch.zeros_like(left).scatter_(1, x[:, None], 1.0)  # all mass on x
        left = torch.where(lost, residual(left, own), left)
        left = torch.where(taken[:, None], p[:, i], left)
        own = torch.where(lost, residual(own, drawn), own)
        own = torch.where(taken[:, None], q[:, i], own)
        at = torch.where(taken, i, at)
    return Accepted(at, draw(left, uniforms[:, 0]))


def sampled_chain(p: Tensor, tokens: Tensor, q: Tensor, uniforms: Tensor) -> Accepted:
    """`sampled` for a chain, all nodes at once. q: [B, >= n - 1, V]."""
    b, n, _ = p.shape
    p, q, rows = p.double(), q.double(), torch.arange(b, device=p.device)
    x = tokens[:, 1:].clamp(min=0)[..., None]
    chance = (p[:, :-1].gather(2, x) / q[:, : n - 1].gather(2, x))[..., 0]
    taken = (uniforms[:, 1:] < chance) & (tokens[:, 1:] >= 0)
    node = taken.long().cumprod(1).sum(1)
    left = p[rows, node]
    refused = torch.cat([tokens, tokens.new_full((b, 1), -1)], dim=1)[rows, node + 1]  # -1: the whole chain was accepted
    left = torch.where((refused >= 0)[:, None], residual(left, q[rows, node.clamp(max=q.shape[1] - 1)]), left)
    return Accepted(node, draw(left, uniforms[:, 0]))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), normalised [B, V]; p where nothing is left (then a rejection has probability 0)."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(p.dtype).tiny), p)
