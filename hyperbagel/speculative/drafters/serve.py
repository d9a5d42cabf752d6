"""Drafters that serve: a module's weights and a cache of its own, kept in step with the target's.

Shape legend: B rows, n new slots of a round (padded), T tapped layers, E hidden size, k nodes of a tree's level, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperbagel.generate.graphs import SIZES, StaticRead, causal_plan, padded
from hyperbagel.generate.sampling import COLDEST
from hyperbagel.generate.session import Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.speculative.drafters.autoregressive import DraftModule
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.choice import Chosen, Pick, choose, confidence
from hyperbagel.speculative.drafters.expand import Level, best_nodes, grow, level_plan
from hyperbagel.speculative.drafters.layers import Served, Sight
from hyperbagel.speculative.drafters.static import StaticDraft, Tokens
from hyperbagel.speculative.types import Draft, Seen

_TABLE = 2048  # largest vocabulary for which the Markov head is tabulated, for all pairs of tokens


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


def _drafts(tokens: list[Tensor], qs: list[Tensor | None], like: Tensor) -> Draft:
    """A chain from each depth's tokens [B] and distributions [B, V]. like [B, ...]: any tensor of the rows' device."""
    if not tokens:
        return Draft(torch.empty(len(like), 0, dtype=torch.long, device=like.device))
    kept = [q for q in qs if q is not None]
    return Draft(torch.stack(tokens, dim=1), None, torch.stack(kept, dim=1) if kept else None)


class _Proposer(ABC):
    """What trained drafters share when they serve: the target's embeddings, a cache of their own, and rounds in fixed shapes where the
    target's cache stays in place."""

    depth: int  # most tokens in line

    def __init__(self, module: DraftModule | BlockDrafter, target: Bagel) -> None:
        module.config.check_target(target.config.llm)
        self.target, self.config, self.memory_layers = target, module.config, module.memory_layers
        self.threshold = 0.0

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.temperature, self.generators, self.im_end = temperature, generators, sessions[0].parts.tokenizer.im_end
        self.__dict__.pop("cache", None)

    def propose(self, seen: Seen, limit: int) -> Draft:
        fixed = None if seen.read is None else self._fixed(seen.read)
        if "cache" not in self.__dict__:  # a request's first draft
            self.cache = self.new_cache(len(seen.counts), max(seen.counts) + 64) if fixed is None else fixed.empty_cache()
        if fixed is not None and max(seen.counts) <= SIZES[-1]:  # more: a context, read once
            return fixed(seen, limit)
        return self._propose(seen, min(self.depth, limit))

    def _fixed(self, read: StaticRead) -> StaticDraft | None:
        """This drafter's rounds in fixed shapes after the cache of `read`; None if it has none."""
        if self not in read.drafts:
            read.drafts[self] = StaticDraft(self, read)
        found = read.drafts[self]
        assert isinstance(found, StaticDraft)
        return found

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
    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        """See StaticDrafter."""

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing; its cache is freed."""
        self.__dict__.pop("cache", None)


class AutoregressiveDrafter(_Proposer):
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
        h = self._read(news, counts, self.cache.plan(seen.counts, causal=True))
        self.cache.advance(seen.counts)
        committed = list(self.cache.lengths)
        draft = self._tree(h, seen.position, depth) if self.nodes else self._grown_chain(h, seen.position, depth)
        self.cache.truncate(committed)
        return draft

    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        news = gather(at.seen, self.module.layers_read, at.start, at.counts, n, self.target.embed_text(at.root))
        new = torch.arange(n, device=at.have.device)
        h = self._read(news, at.counts[:, 0], causal_plan(at.have + new, at.capacity), at.cache)
        ends = at.have + at.counts  # padding of the news is overwritten, or lies beyond and is not seen
        return self._chain(h, at.position, k, pick, lambda d: Served(at.cache, causal_plan(ends + d, at.capacity)), early=False)

    def _read(self, news: News, counts: Tensor, plan: Plan, cache: KVCache | None = None) -> Tensor:
        """Reads the committed slots, counts [B] per row, into the memory -> h [B, E] of each row's last one."""
        assert news.following is not None
        sight = Sight.at(news.positions, self.config, news.features.dtype, Served(self.cache if cache is None else cache, plan))
        h = self.module.step(self.module.encode(news.features, sight), news.following, sight)
        return h[torch.arange(len(h), device=h.device), (counts - 1).clamp(min=0)]

    def _grown_chain(self, h: Tensor, position: Tensor, depth: int) -> Draft:
        """A chain whose cache grows with it."""
        ones = [1] * len(h)

        def memory(d: int) -> Served:
            if d:
                self.cache.advance(ones)
            return Served(self.cache, self.cache.plan(ones, causal=True))

        return _drafts(*self._chain(h, position, depth, self._pick, memory, early=h.device.type == "cpu"), h)

    def _chain(self, h: Tensor, position: Tensor, depth: int, pick: Pick, memory: Callable[[int], Served], early: bool) -> Tokens:
        """Up to `depth` tokens below h [B, E], the first of them at `position` [B]. memory(d): where the d-th goes and what it sees. early:
        whether the draft may end early; that looks at its chances, which on a GPU would be a wait."""
        tokens: list[Tensor] = []
        qs: list[Tensor | None] = []
        # Greedy only: a sampled draft may be good at low confidence, and what is drafted must not depend on how likely the drawn token was.
        careful = early and self.threshold > 0 and self.temperature == 0
        chance, ended = torch.ones(len(h)), torch.zeros(len(h), dtype=torch.bool)
        for d in range(depth):
            logits = self.module.head(h)
            token, q = pick(logits, d)
            if careful:
                chance = chance * confidence(logits)
                if chance.mean() < self.threshold:
                    break
            tokens.append(token)
            qs.append(q)
            if early and (ended := ended | (token == self.im_end)).all():  # nothing follows
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
    return Plan(slots, visible, (torch.arange(visible, device=have.device) <= own[..., None]).unsqueeze(1), False)


class BlockProposer(_Proposer):
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
        return _drafts(*self._tokens(logits, out, seen.root, self._pick, least, early=out.device.type == "cpu"), out)

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
