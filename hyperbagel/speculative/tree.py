"""Trees of drafted tokens: each node's parent, and what follows from it for masks, positions and slots.

Node 0 is the root: the token that the target chose last and has not read yet. Parents come before their children.

Shape legend: B rows, n nodes (root included), K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.trees import after_past, ancestors


@dataclass(frozen=True)
class Tree:
    """parents [B, n]: parents[b, i] < i, and the root is its own parent. Rows may differ."""

    parents: Tensor

    @classmethod
    def of(cls, parents: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tree:
        """From lists, checked."""
        for row in parents:
            fine = len(row) > 0 and row[0] == 0 and all(0 <= p < i for i, p in enumerate(row) if i)
            assert fine, f"got parents {list(row)}, expected 0 first and each parent before its child"
        return cls(torch.tensor([list(row) for row in parents], device=device))

    @classmethod
    def chain(cls, rows: int, drafted: int, device: torch.device | str = "cpu") -> Tree:
        """A root and `drafted` nodes in line."""
        return cls((torch.arange(drafted + 1, device=device) - 1).clamp(min=0).expand(rows, -1))

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, n, n]: node i (row) sees node j, which is itself or an ancestor."""
        return ancestors(self.parents)

    @cached_property
    def depths(self) -> Tensor:
        """[B, n], 0 for the root: RoPE position of a node is the root's plus this."""
        return self.mask.sum(-1) - 1


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root down to `node`."""
    path = [node]
    while path[-1]:
        path.append(parents[path[-1]])
    return path[::-1]


def tree_depth(tokens: Sequence[int], parents: Sequence[int]) -> int:
    """Depth of the deepest drafted node; nodes with the token -1 are none."""
    depths = [0]
    for i in range(1, len(parents)):
        depths.append(depths[parents[i]] + 1 if tokens[i] >= 0 else 0)
    return max(depths)


def tree_plan(cache: KVCache, tree: Tree) -> Plan:
    """Slots and mask of a whole tree after each row's past."""
    rows, n = tree.parents.shape
    plan = cache.plan([n] * rows, causal=False)
    past = torch.tensor(cache.lengths, device=tree.parents.device)[:, None]
    return replace(plan, mask=after_past(tree.mask, past, plan.visible))


def commit(cache: KVCache, start: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
    """After a forward over trees: row b keeps what lies before start[b] and its nodes kept[b]; everything else is forgotten.

    Keys, values, positions and tapped features move together. A path that is a run from the root on lies in place and is not copied.
    """
    cache.truncate([at + len(path) if list(path) == list(range(len(path))) else have for at, path, have in zip(start, kept, cache.lengths)])
    for row, (at, path) in enumerate(zip(start, kept, strict=True)):
        if list(path) != list(range(len(path))):
            cache.keep(at, torch.tensor([at + i for i in path], device=cache.k[0].device), row)
