"""A block drafter at work: one pass a round, then the block's tokens one after the other.

Shape legend: B rows, n new slots of a round (padded), K tokens of a block, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hyperbagel.generate.graphs import causal_plan
from hyperbagel.generate.sampling import COLDEST
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.choice import Pick, confidence
from hyperbagel.speculative.drafters.layers import Served
from hyperbagel.speculative.drafters.serve import News, Proposer, as_draft, gather, gather_news
from hyperbagel.speculative.drafters.static import StaticDraft, Tokens
from hyperbagel.speculative.types import Draft, Seen

_TABLE = 2048  # largest vocabulary for which the Markov head is tabulated, for all pairs of tokens


def block_plan(cache: KVCache, counts: Sequence[int], k: int) -> Plan:
    """Where row b's counts[b] new slots and then the k tokens of its block go, and what the block sees: its row, and itself causally.

    Rows are padded to the longest count; padding goes behind the block, where nothing looks.
    """
    n, ends = max(counts), [have + new for have, new in zip(cache.lengths, counts, strict=True)]
    cache.grow(max(cache.lengths) + n + k)
    if len(set(cache.lengths)) == len(set(counts)) == 1:
        return Plan(slice(cache.lengths[0], ends[0] + k), ends[0] + k, None, True)
    have, new = torch.tensor([cache.lengths, counts], device=cache.k[0].device)[..., None]  # each [B, 1]
    return rows_plan(have, new, n, k, max(ends) + k)


def rows_plan(have: Tensor, counts: Tensor, n: int, k: int, visible: int) -> Plan:
    """The same plan from lengths `have` and counts on the device, both [B, 1], with n slots per row for the new ones."""
    ahead, own = torch.arange(n, device=have.device), have + counts + torch.arange(k, device=have.device)
    slots = torch.cat([have + ahead + k * (ahead >= counts), own], dim=1)
    return replace(causal_plan(own, visible), slots=slots)  # only the block looks


class BlockProposer(Proposer):
    """Drafts a block in one pass per round. Its chances it judges by the confidence head if it samples, else by `confidence`."""

    def __init__(self, module: BlockDrafter, target: Bagel, *, depth: int | None = None, threshold: float = 0.0) -> None:
        super().__init__(module, target)
        self.module, self.threshold = module, threshold
        self.depth = min(depth or module.config.block, module.config.block)
        # For a small vocabulary the Markov head becomes a table over pairs of tokens: one look-up per token instead of two products.
        self.links, self.trust_after = None, None
        if module.config.vocab_size <= _TABLE:
            every = torch.arange(module.config.vocab_size, device=target.device)
            self.links, self.trust_after = module.link(every), module.trust_after(every)
        self.taps: tuple[int, ...] = tuple(sorted(set(module.layers_read)))
        self.width = self.depth

    def _propose(self, seen: Seen, depth: int) -> Draft:
        news = gather_news(seen, self.module.layers_read, None)
        memory = Served(self.cache, block_plan(self.cache, seen.counts, depth))
        logits, out = self._block(news, seen.root, seen.position, memory, depth)
        self.cache.advance(seen.counts)  # not the block: the next round overwrites it
        if len(logits) == 1 and self.links is not None and _plain_numbers(logits):
            if self.temperature > 0:
                return self._sampled_row(logits[0], out[0], int(seen.root[0]))
            return Draft(torch.tensor([self._greedy_row(logits[0], int(seen.root[0]))], dtype=torch.long))
        least = self.threshold if self.threshold > 0 else None
        return as_draft(*self._tokens(logits, out, seen.root, self._pick, least, early=out.device.type == "cpu"), out)

    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        news = gather(at.seen, self.module.layers_read, at.start, at.counts, n, None)
        memory = Served(at.cache, rows_plan(at.have, at.counts, n, k, at.capacity))
        logits, out = self._block(news, at.root, at.position, memory, k)
        return self._tokens(logits, out, at.root, pick, at.least, early=False)

    def static_depth(self, depth: int) -> int:
        """The whole block, since its tokens come from one pass."""
        return self.depth

    def _block(self, news: News, root: Tensor, position: Tensor, memory: Served, k: int) -> tuple[Tensor, Tensor]:
        """One pass over new slots and blocks of k tokens below root [B] at `position` [B] -> logits [B, k, V] and outputs [B, k, E]."""
        embedded = self.target.embed_text(root)[:, None]
        out = self.module(news.features, news.positions, embedded, position[:, None], memory, k)
        return self.module.lm_head(out), out

    def _tokens(self, logits: Tensor, out: Tensor, root: Tensor, pick: Pick, least: Tensor | float | None, early: bool) -> Tokens:
        """Chooses the tokens of blocks with logits [B, K, V] and outputs [B, K, E] one by one. least: the trust below which a row ends.
        early: as in `_chain`; if not, each row ends its own draft with -1."""
        previous, trust, ended = root, torch.ones_like(root, dtype=torch.float32), torch.zeros_like(root, dtype=torch.bool)
        tokens: list[Tensor] = []
        qs: list[Tensor | None] = []
        for d in range(logits.shape[1]):
            mine = logits[:, d] + (self.module.link(previous) if self.links is None else self.links[previous])
            if least is not None:  # decided before the token is drawn, so that it does not bend the distribution
                sure = self.module.trust(out[:, d], previous).float().sigmoid() if self.temperature > 0 else confidence(mine)
                trust = trust * sure
                if early and trust.mean() < least:
                    break
            previous, q = pick(mine, d)
            tokens.append(previous if early or least is None else torch.where(trust >= least, previous, -1))
            qs.append(q)
            if early and (ended := ended | (previous == self.im_end)).all():  # nothing follows
                break
        return tokens, qs

    def _greedy_row(self, logits: Tensor, root: int) -> list[int]:
        """The greedy tokens after `root`, logits [K, V]: the loop of `_tokens` for one request on a CPU, where ten calls of PyTorch per
        token take longer than their arithmetic (2.4 to 2.1 ms for a draft of ten)."""
        assert self.links is not None
        links, tokens, previous, chance = self.links.numpy(), [], root, 1.0
        for row in logits.numpy():
            mine = row + links[previous]
            previous = int(mine.argmax())
            top, mine[previous] = mine[previous], -np.inf
            chance *= 1 / (1 + math.exp(mine.max() - top))  # `confidence`
            if chance < self.threshold:
                break
            tokens.append(previous)
            if previous == self.im_end:
                break
        return tokens

    def _sampled_row(self, logits: Tensor, out: Tensor, root: int) -> Draft:
        """The same for sampled tokens, logits [K, V] and outputs [K, E]: each is drawn from softmax(logits / T) by inversion."""
        assert self.links is not None and self.trust_after is not None
        links, after, temperature = self.links.numpy(), self.trust_after.numpy(), max(self.temperature, COLDEST)
        previous, chance = root, 1.0
        uniforms = torch.rand(len(logits), generator=self.generators[0], dtype=torch.float64).tolist()
        tokens, qs = [], []
        for row, trust, u in zip(logits.numpy(), self.module.trust_of(out).tolist(), uniforms, strict=True):
            if self.threshold > 0:  # decided before the token is drawn, so that it does not bend the distribution
                chance *= 0.5 + 0.5 * math.tanh((trust + float(after[previous])) / 2)  # sigmoid
                if chance < self.threshold:
                    break
            with np.errstate(invalid="ignore", over="ignore"):
                q = row + links[previous]
                q = np.exp((q - q.max()) / temperature)
                q /= q.sum()
            if not np.isfinite(q[0]):  # a broken drafter may cost speed, not the request
                q = np.full_like(q, 1 / len(q))
            steps = q.cumsum(dtype=np.float64)
            level = min(u * steps[-1], np.nextafter(steps[-1], 0.0))  # a product may round up to the total
            previous = int(steps.searchsorted(level, side="right"))
            tokens.append(previous)
            qs.append(q)
            if previous == self.im_end:
                break
        return Draft(torch.tensor([tokens], dtype=torch.long), None, torch.from_numpy(np.stack(qs))[None] if qs else None)


def _plain_numbers(x: Tensor) -> bool:
    """Whether NumPy can read it in place."""
    return x.device.type == "cpu" and x.dtype == torch.float32
