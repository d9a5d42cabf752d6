"""Drafters that serve: a module's weights and a cache of its own, kept in step with the target's.

Shape legend: B rows, n new slots of a round (padded), T tapped layers, E hidden size, k nodes of a tree's level, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.generate.decode import taken
from hyperbagel.generate.graphs import SIZES, StaticRead, padded
from hyperbagel.generate.session import Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.drafters.autoregressive import DraftModule
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.choice import Chosen, Pick, choose
from hyperbagel.speculative.drafters.static import StaticDraft, Tokens
from hyperbagel.speculative.types import Draft, Seen


class News(NamedTuple):
    """New slots of the target, as a drafter reads them; rows are padded on the right."""

    features: Tensor  # [B, n, T, E]
    following: Tensor | None  # [B, n, E] embedding of the slot after each; after a row's last slot, of its root
    positions: Tensor  # [B, n]


def gather_news(seen: Seen, layers: Sequence[int], root: Tensor | None) -> News:
    """Reads the taps of the new slots. `root`: as in `gather`."""
    cache, device = seen.cache, seen.root.device
    n = max(seen.counts)
    if root is None and len(set(seen.start)) == len(set(seen.counts)) == 1:  # all rows alike: a slice
        new = slice(seen.start[0], seen.start[0] + n)
        states = [cache.tapped[cache.taps.index(layer)][:, 0, new] for layer in layers]
        return News(torch.stack(states, dim=2), None, cache.positions[0][:, 0, new, 0])
    start, counts = torch.tensor([seen.start, seen.counts], device=device)[..., None]
    return gather(cache, layers, start, counts, n, root)


def gather(cache: KVCache, layers: Sequence[int], start: Tensor, counts: Tensor, n: int, root: Tensor | None) -> News:
    """Reads the taps of slots [start, start + counts), each [B, 1], of the target's cache, padded to n per row.

    root [B, E]: embeddings of the roots, if `following` is wanted (which needs tap 0).
    """
    end, ahead = start + counts, torch.arange(n, device=start.device)
    slots = (start + ahead).minimum((end - 1).clamp(min=0))
    rows = torch.arange(len(slots), device=start.device)[:, None]

    def read(store: Tensor, at: Tensor) -> Tensor:
        return store[:, 0][rows, at]  # [B, n, *]

    features = torch.stack([read(cache.tapped[cache.taps.index(layer)], slots) for layer in layers], dim=2)
    positions = read(cache.positions[0], slots)[..., 0]
    following = None
    if root is not None:
        following = read(cache.tapped[cache.taps.index(0)], (slots + 1).minimum((end - 1).clamp(min=0)))
        following = torch.where((slots + 1 >= end)[..., None], root[:, None], following)
    return News(features, following, positions)


def as_draft(tokens: list[Tensor], qs: list[Tensor | None], like: Tensor) -> Draft:
    """A chain from each depth's tokens [B] and distributions [B, V]. like [B, ...]: any tensor of the rows' device."""
    if not tokens:
        return Draft(torch.empty(len(like), 0, dtype=torch.long, device=like.device))
    kept = [q for q in qs if q is not None]
    return Draft(torch.stack(tokens, dim=1), None, torch.stack(kept, dim=1) if kept else None)


class Proposer(ABC):
    """What trained drafters share when they serve: the target's embeddings, a cache of their own, and rounds in fixed shapes where the
    target's cache stays in place."""

    depth: int  # most tokens in line
    nodes: int  # most nodes of a tree; 0: it drafts chains

    def __init__(self, module: DraftModule | BlockDrafter, target: Bagel) -> None:
        module.config.check_target(target.config.llm)
        self.target, self.config, self.memory_layers = target, module.config, module.memory_layers
        self.threshold = 0.0

    @property
    def draws(self) -> bool:
        """A chain's tokens are drawn at a temperature; a tree's are the likeliest."""
        return not self.nodes

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.temperature, self.generators, self.im_end = temperature, generators, sessions[0].parts.tokenizer.im_end
        self.__dict__.pop("cache", None)

    def propose(self, seen: Seen, limit: int) -> Draft:
        fixed = None if seen.read is None else self._fixed(seen.read)
        if "cache" not in self.__dict__:  # a request's first draft
            self.cache = self.new_cache(len(seen.counts), max(seen.counts) + 64) if fixed is None else fixed.empty_cache()
        if fixed is not None and max(seen.counts) <= SIZES[-1]:  # more: a context, read once
            return fixed(seen, limit)
        return self._propose(self._read_contexts(seen), min(self.depth, limit))

    def _read_contexts(self, seen: Seen) -> Seen:
        """Reads the contexts of rows that joined, but for their last slots, and returns the news that are left. Together with the others'
        few slots they would all be padded to the longest context. Those who joined are the last rows, and seldom others with them."""
        first = next((b for b, start in enumerate(seen.start) if not start), 0)
        if not first:
            return seen
        rows, ahead = slice(first, None), [max(0, n - 1) for n in seen.counts[first:]]
        ends = [start + n for start, n in zip(seen.start[first:], ahead, strict=True)]
        self.cache.grow(max(self.cache.lengths[rows]) + max(ahead) + 1)  # here, since a view's own growth would not show
        theirs = replace(seen.of_rows(range(first, len(seen.start))), cache=seen.cache.view(rows), counts=ahead)
        self._read_ahead(theirs, self.cache.view(rows))
        self.cache.lengths[rows] = ends
        return seen.behind(ahead)

    def _fixed(self, read: StaticRead) -> StaticDraft | None:
        """This drafter's rounds in fixed shapes after the cache of `read`; None if it has none."""
        if self not in read.drafts:
            read.drafts[self] = self._static(read)
        found = read.drafts[self]
        assert isinstance(found, StaticDraft)
        return found

    def _static(self, read: StaticRead) -> StaticDraft:
        """This drafter's rounds after the cache of `read`, with buffers of their own."""
        return StaticDraft(self, read)

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache for the drafter's own keys and values, with room for `slots` per row."""
        c, model = self.config, self.target
        cache = KVCache(self.memory_layers, c.kv_heads, c.head_dim, rows=rows, device=model.device, dtype=model.dtype)
        cache.reserve(slots)
        return cache

    def static_depth(self, depth: int) -> int:
        """See StaticDrafter."""
        return min(padded(depth), self.depth)

    def _pick(self, logits: Tensor, d: int) -> Chosen:
        return choose(logits, self.temperature, self.generators)

    @abstractmethod
    def _propose(self, seen: Seen, depth: int) -> Draft:
        """A draft of at most `depth` tokens in line, in shapes that may differ from round to round."""

    @abstractmethod
    def _read_ahead(self, seen: Seen, cache: KVCache) -> None:
        """Reads slots that others follow into a cache with room for them and one more, whose lengths stay."""

    @abstractmethod
    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        """See StaticDrafter."""

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        self.generators = taken(self.generators, rows) if self.generators else ()
        if "cache" in self.__dict__:
            self.cache.select(rows)

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        self.generators = [*self.generators, *generators] if self.temperature > 0 else ()
        if "cache" in self.__dict__:
            self.cache.add([self.new_cache(len(sessions), 0)], 64)

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing; its cache is freed."""
        self.__dict__.pop("cache", None)
