"""EAGLE-3 and Hyper-Bagel at work: chains, or trees, a token at a time.

Shape legend: B rows, n new slots of a round (padded), E hidden size, k nodes of a tree's level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hyperbagel.generate.graphs import StaticRead, causal_plan
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.drafters.autoregressive import DraftModule
from hyperbagel.speculative.drafters.choice import Pick, confidence, shares
from hyperbagel.speculative.drafters.expand import Level, best_nodes, grow, level_plan
from hyperbagel.speculative.drafters.layers import Served, Sight
from hyperbagel.speculative.drafters.serve import News, Proposer, as_draft, gather, gather_news
from hyperbagel.speculative.drafters.static import StaticDraft, Tokens
from hyperbagel.speculative.types import Draft, Seen


class AutoregressiveDrafter(Proposer):
    """EAGLE-3 or Hyper-Bagel: a chain of `depth` tokens, or (`nodes` > 0) the best `nodes` of a tree with `branch` children per node."""

    def __init__(self, module: DraftModule, target: Bagel, *, depth: int = 5, nodes: int = 0, branch: int = 4) -> None:
        super().__init__(module, target)
        self.module, self.depth, self.nodes, self.branch = module, depth, nodes, branch
        self.taps: tuple[int, ...] = tuple(sorted({0, *module.layers_read}))
        self.width = nodes or depth

    def _fixed(self, read: StaticRead) -> StaticDraft | None:
        """For chains alone: a tree's shape depends on what it finds."""
        return None if self.nodes else super()._fixed(read)

    def _propose(self, seen: Seen, depth: int) -> Draft:
        news = gather_news(seen, self.module.layers_read, self.target.embed_text(seen.root))
        counts = torch.tensor(seen.counts, device=seen.root.device)
        h = self._read(news, counts, Served(self.cache, self.cache.plan(seen.counts, causal=True)))
        self.cache.advance(seen.counts)
        committed = list(self.cache.lengths)
        draft = self._tree(h, seen.position, depth) if self.nodes else self._grown_chain(h, seen.position, depth, counts == 0)
        self.cache.truncate(committed)
        return draft

    def _read_ahead(self, seen: Seen, cache: KVCache) -> None:
        rows, start, counts = torch.tensor([[*range(len(seen.start))], seen.start, seen.counts], device=seen.root.device)
        following = seen.cache.tapped[seen.cache.taps.index(0)][rows, 0, start + counts]  # the slots behind them, not the roots
        news = gather_news(seen, self.module.layers_read, following)
        self._read(news, counts, Served(cache, cache.plan(seen.counts, causal=True)))

    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        news = gather(at.seen, self.module.layers_read, at.start, at.counts, n, self.target.embed_text(at.root))
        new = torch.arange(n, device=at.have.device)
        h = self._read(news, at.counts[:, 0], Served(at.cache, causal_plan(at.have + new, at.capacity)))
        ends = at.have + at.counts  # padding of the news is overwritten, or lies beyond and is not seen
        return self._chain(h, at.position, k, pick, lambda d: Served(at.cache, causal_plan(ends + d, at.capacity)), None)

    def _read(self, news: News, counts: Tensor, memory: Served) -> Tensor:
        """Reads the committed slots, counts [B] per row, into the memory -> h [B, E] of each row's last one."""
        assert news.following is not None
        sight = Sight.at(news.positions, self.config, news.features.dtype, memory)
        h = self.module.step(self.module.encode(news.features, sight), news.following, sight)
        return h[torch.arange(len(h), device=h.device), (counts - 1).clamp(min=0)]

    def _grown_chain(self, h: Tensor, position: Tensor, depth: int, finished: Tensor) -> Draft:
        """A chain whose cache grows with it. finished [B]: rows that need none."""
        ones = [1] * len(h)

        def memory(d: int) -> Served:
            if d:
                self.cache.advance(ones)
            return Served(self.cache, self.cache.plan(ones, causal=True))

        return as_draft(*self._chain(h, position, depth, self._pick, memory, finished if h.device.type == "cpu" else None), h)

    def _chain(self, h: Tensor, position: Tensor, depth: int, pick: Pick, memory: Callable[[int], Served], ended: Tensor | None) -> Tokens:
        """Up to `depth` tokens below h [B, E], the first of them at `position` [B]. memory(d): where the d-th goes and what it sees. ended
        [B]: rows that need none, where the draft may end early; None: it may not, since that looks at its chances, on a GPU a wait."""
        tokens: list[Tensor] = []
        qs: list[Tensor | None] = []
        # Greedy only: a sampled draft may be good at low confidence, and what is drafted must not depend on how likely the drawn token was.
        chance = shares(ended) if ended is not None and self.threshold > 0 and self.temperature == 0 else None
        for d in range(depth):
            logits = self.module.head(h)
            token, q = pick(logits, d)
            if chance is not None:
                chance = chance * confidence(logits)
                if chance.sum() < self.threshold:
                    break
            tokens.append(token)
            qs.append(q)
            if ended is not None and (ended := ended | (token == self.im_end)).all():  # nothing follows
                break
            if d + 1 < depth:
                sight = Sight.at((position + d)[:, None], self.config, h.dtype, memory(d))
                h = self.module.step(h[:, None], self.target.embed_text(token)[:, None], sight)[:, 0]
        return tokens, qs

    def _tree(self, h: Tensor, position: Tensor, depth: int) -> Draft:
        """EAGLE-2's growth: each level expands the `branch` most probable nodes; then the best `nodes` of all are kept."""
        committed = list(self.cache.lengths)
        levels: list[Level] = [grow(None, self.module.head(h)[:, None], self.branch)]
        states = h[:, None].expand(-1, self.branch, -1)  # h of each frontier node's parent
        for d in range(depth - 1):
            level = levels[-1]
            plan = level_plan(self.cache, committed, level.seen)
            sight = Sight.at((position + d)[:, None].expand(-1, self.branch), self.config, h.dtype, Served(self.cache, plan))
            out = self.module.step(states, self.target.embed_text(level.frontier_tokens), sight)
            self.cache.advance([self.branch] * len(h))
            levels.append(grow(level, self.module.head(out), self.branch))
            states = out.gather(1, levels[-1].frontier_parent[..., None].expand(-1, -1, out.shape[-1]))
        return best_nodes(levels, self.nodes, self.threshold if h.device.type == "cpu" else 0.0)
