"""A drafter's rounds in fixed shapes and fixed buffers: new slots are read, and tokens or trees drafted and chosen, without the CPU seeing
any number, so that a GPU can replay a round as one CUDA graph (generate.graphs). On a CPU the same rounds run as they are.

Shape legend: B rows, n new slots of a round (padded), k drafted tokens, K slots of the drafter's cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hyperbagel.generate.graphs import SIZES, Captured, StaticRead, padded
from hyperbagel.generate.sampling import COLDEST, numbers
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.drafters.choice import Chosen, Pick, choose_by
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft, Seen

Tokens = tuple[list[Tensor], list[Tensor | None]]  # by drafted token: ids [B], and what they were drawn from [B, V] (None if greedy)


class StaticDrafter(Protocol):
    """What StaticDraft needs of a drafter."""

    target: Bagel
    depth: int
    threshold: float
    temperature: float
    generators: Sequence[torch.Generator]

    def new_cache(self, rows: int, slots: int) -> KVCache: ...

    def static_depth(self, depth: int) -> int:
        """How deep it drafts if `depth` tokens are wanted: one of a few depths, so that few rounds are recorded."""

    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        """k tokens after n new slots per row, from the buffers of `at` alone."""


class TreeDrafter(StaticDrafter, Protocol):
    """What StaticTree needs of a drafter."""

    im_end: int  # the token that nothing follows; while costs are measured, none

    @property
    def scale(self) -> float: ...

    def tree_static(self, at: StaticTree, n: int) -> tuple[Tensor, Tree]:
        """Tokens [B, N] and tree after n new slots per row, from the buffers of `at` alone."""


class StaticDraft:
    """Rounds of one drafter after the target's cache of `read`, with a cache of its own. Both caches stay in place from request to request.

    A round is recorded for each padded (n, k), greedy and sampled separately. Numbers that change between rounds are kept in buffers.
    """

    def __init__(self, drafter: StaticDrafter, read: StaticRead) -> None:
        rows, device = len(read.cache.lengths), drafter.target.device
        self.drafter, self.seen = drafter, read.cache
        self.capacity = read.capacity + padded(SIZES[-1] + drafter.depth)  # padded news, a draft after them; in whole eights for attention
        self.cache = drafter.new_cache(rows, self.capacity)
        # Per row: where its new slots begin in the target's cache, how many they are, and how many slots the drafter's cache holds.
        self.slots = torch.zeros(3, rows, 1, dtype=torch.long, device=device)
        self.start, self.counts, self.have = self.slots
        self.root, self.position = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self.uniforms = torch.zeros(rows, drafter.depth, dtype=torch.float64, device=device)
        self.least, self.temperature = torch.zeros((), device=device), torch.ones((), device=device)
        self.q: dict[tuple[int, int, bool], Tensor] = {}
        self.runs: dict[tuple[int, int, bool], Captured] = {}

    def release(self) -> None:
        """Frees graphs and buffers at once."""
        self.runs.clear()
        self.q.clear()

    def empty_cache(self) -> KVCache:
        """The drafter's cache for a new request, zeroed: slots beyond a row's length are only masked, and 0 * nan is nan."""
        self.cache.truncate([0] * len(self.cache.lengths))
        for store in (*self.cache.k, *self.cache.v):
            store.zero_()
        return self.cache

    def __call__(self, seen: Seen, limit: int) -> Draft:
        """A chain of at most `limit` tokens, [B, k]; -1 from where a row is too unsure."""
        drafter, sampled = self.drafter, self.drafter.temperature > 0
        k = min(limit, drafter.depth)
        key = self._load(seen), drafter.static_depth(k), sampled
        if sampled:
            self.temperature.fill_(max(drafter.temperature, COLDEST))
            self.uniforms[:, : key[1]].copy_(numbers(drafter.generators, key[1]))
        tokens = self._run(key)
        self.cache.advance(seen.counts)  # not the draft: the next round overwrites it
        return Draft(tokens[:, :k], None, self.q[key][:, :k].clone() if sampled else None)  # the next replay overwrites q

    def _load(self, seen: Seen) -> int:
        """Fills the buffers of a round; returns how many new slots it reads per row, padded."""
        assert seen.cache is self.seen, "got news of another cache"
        if self.cache.capacity > self.capacity:  # many new slots made it grow: recorded rounds hold old addresses
            self.release()
            self.capacity = self.cache.capacity
        self.slots.copy_(torch.tensor([seen.start, seen.counts, self.cache.lengths])[..., None])
        self.root.copy_(seen.root)
        self.position.copy_(seen.position)
        self.least.fill_(self.drafter.threshold)
        return padded(max(seen.counts))

    def _run(self, key: tuple[int, int, bool]) -> Tensor:
        """The round of this key: recorded at its second use, from then on replayed."""
        if key not in self.runs:
            self.runs[key] = Captured(partial(self._round, *key), self.root.device)
        return self.runs[key]()

    def _round(self, n: int, k: int, sampled: bool) -> Tensor:
        """Reads the buffers -> tokens [B, k]."""
        tokens, qs = self.drafter.draft_static(self, n, k, self._draw if sampled else _greedy)
        if sampled:
            self.q[n, k, sampled] = torch.stack([q for q in qs if q is not None], dim=1)
        return torch.stack(tokens, dim=1)

    def _draw(self, logits: Tensor, d: int) -> Chosen:
        return choose_by(logits, self.temperature, self.uniforms[:, d])


def _greedy(logits: Tensor, d: int) -> Chosen:
    return logits.argmax(-1), None


class StaticTree(StaticDraft):
    """Rounds of a drafter of trees, greedy or not: their tokens are a deterministic choice, which needs no draws."""

    drafter: TreeDrafter

    def __init__(self, drafter: TreeDrafter, read: StaticRead) -> None:
        super().__init__(drafter, read)
        self.limit, self.stop = torch.zeros(2, dtype=torch.long, device=self.root.device)
        self.scale = torch.ones((), device=self.root.device)

    def __call__(self, seen: Seen, limit: int) -> Draft:
        """A tree of at most `limit` tokens in line; -1: no node."""
        key = self._load(seen), self.drafter.depth, False
        self.limit.fill_(limit)
        self.stop.fill_(self.drafter.im_end)
        self.scale.fill_(self.drafter.scale)
        tokens, parents = self._run(key).unbind(1)
        self.cache.advance(seen.counts)
        return Draft(tokens[:, 1:], Tree(parents))

    def _round(self, n: int, k: int, sampled: bool) -> Tensor:
        """Reads the buffers -> tokens, behind a column for the root, and parents [B, 2, N + 1]."""
        tokens, tree = self.drafter.tree_static(self, n)
        return torch.stack([torch.nn.functional.pad(tokens, (1, 0)), tree.parents], dim=1)
