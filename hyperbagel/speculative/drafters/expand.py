"""Growing a draft tree level by level (EAGLE-2, Li et al. 2024), all rows at once.

Shape legend: B rows, k nodes a level that are expanded (the frontier), c candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.trees import after_past
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft

_TIE = 1e-9  # taken off the log-probability per level, so that a child of probability 1 still ranks below its parent (fp64)


@dataclass(frozen=True)
class Level:
    """Candidates [B, c] of one depth; the k best of them are the frontier [B, k]."""

    tokens: Tensor  # [B, c]
    scores: Tensor  # [B, c] log-probability of the path
    parents: Tensor  # [B, c] index among the last level's candidates
    frontier: Tensor  # [B, k] index among this level's candidates
    frontier_parent: Tensor  # [B, k] index of the parent within the last frontier
    seen: Tensor  # bool [B, k, k * depth]: a frontier node sees its ancestors, level by level, and itself

    @property
    def frontier_tokens(self) -> Tensor:
        return self.tokens.gather(1, self.frontier)


def grow(last: Level | None, logits: Tensor, branch: int, ended: Tensor | bool = False, stop: Tensor | int = -1) -> Level:
    """logits [B, k, V] after each frontier node of `last` (None: the root, k = 1) -> `branch` children each.

    ended: whether nothing follows any of them. stop: a token that is no node. Both give a score of -inf to children, as do logits that are
    not finite: a broken drafter may cost speed, not the request.
    """
    b, k, v = logits.shape
    top, ids = logits.float().topk(min(branch, v), dim=-1)  # [B, k, branch]
    log_all = logits.double().logsumexp(-1)
    before = log_all.new_zeros(b, 1) if last is None else last.scores.gather(1, last.frontier)
    scores = top - log_all[..., None] + before[..., None] - _TIE
    lost = ~log_all.isfinite() | ended
    scores = scores.masked_fill(lost[..., None] | (ids == stop), -torch.inf).flatten(1)
    at = torch.arange(k, device=logits.device).repeat_interleave(top.shape[-1]).expand(b, -1)  # parent within the frontier
    frontier = scores.topk(min(branch, scores.shape[1]), dim=1).indices
    frontier_parent = at.gather(1, frontier)
    own = torch.eye(frontier.shape[1], dtype=torch.bool, device=logits.device).expand(b, -1, -1)
    if last is None:
        return Level(ids.flatten(1), scores, at, frontier, frontier_parent, own)
    above = last.seen.gather(1, frontier_parent[..., None].expand(-1, -1, last.seen.shape[-1]))
    parents = last.frontier.gather(1, at)
    return Level(ids.flatten(1), scores, parents, frontier, frontier_parent, torch.cat([above, own], dim=-1))


def level_plan(cache: KVCache, committed: Sequence[int], seen: Tensor) -> Plan:
    """Slots and mask of a frontier in the drafter's cache: a node sees all committed slots, its ancestors and itself. A row of 2 committed
    slots, second level, k = 2, both children of the first node:

        1 1 | 1 . | 1 .
        1 1 | 1 . | . 1
    """
    k, m = seen.shape[1:]
    start = torch.tensor(list(committed), device=seen.device)[:, None]
    visible = max(committed) + m
    cache.reserve(visible)
    slots = start + (m - k) + torch.arange(k, device=seen.device)
    return Plan(slots, visible, after_past(seen, start, visible), False)


def best_nodes(levels: Sequence[Level], nodes: int, threshold: float = 0.0) -> Draft:
    """The `nodes` most probable of all candidates, level by level; the parent of each is among them.

    threshold: above 0 it drops the ranks whose probability, averaged over the rows, is lower; this waits for the device.
    """
    if threshold > 0:  # by the mean of the rows' n-th best, since rows share the number of nodes
        scores = torch.cat([level.scores for level in levels], dim=1)
        worth = scores.sort(dim=1, descending=True).values.exp().mean(0) >= threshold
        nodes = min(nodes, int(worth.sum()))
    tokens, parents, _ = kept_nodes(levels, nodes)
    return Draft(tokens, Tree(parents))


def kept_nodes(levels: Sequence[Level], nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The N <= `nodes` most probable of all candidates, level by level -> tokens [B, N], parents [B, N + 1] as in Tree, scores [B, N]."""
    offsets = [0]
    for level in levels:
        offsets.append(offsets[-1] + level.tokens.shape[1])
    tokens, scores = (torch.cat([getattr(level, name) for level in levels], dim=1) for name in ("tokens", "scores"))
    # index of the parent among all candidates, -1 for the root
    parents = torch.cat(
        [level.parents + offsets[i - 1] if i else torch.full_like(level.parents, -1) for i, level in enumerate(levels)], dim=1
    )
    kept = scores.topk(min(nodes, tokens.shape[1]), dim=1).indices.sort(dim=1).values  # [B, N]; a parent's index is smaller
    place = torch.zeros_like(tokens).scatter_(1, kept, torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept))
    above = parents.gather(1, kept)
    rows = torch.where(above < 0, 0, place.gather(1, above.clamp(min=0)))
    return tokens.gather(1, kept), F.pad(rows, (1, 0)), scores.gather(1, kept)
