"""Drafters at work: the modules' weights with a cache of their own, kept in step with the target's.

Shape legend: B rows, n new slots of a round (padded), T tapped layers, E hidden size, k nodes of a tree's level, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperbagel.generate.sampling import COLDEST, draw_rows, probabilities
from hyperbagel.generate.session import Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.speculative.drafters.autoregressive import DraftModule
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.expand import Level, best_nodes, grow, level_plan
from hyperbagel.speculative.drafters.layers import Served, Sight
from hyperbagel.speculative.types import Draft, Seen

_TABLE = 2048  # largest vocabulary whose pairs are tabled


class News(NamedTuple):
    """New slots of the target as a drafter reads them, [B, n, ...]; rows are padded on the right."""

    features: Tensor  # [B, n, T, E]
    following: Tensor | None  # [B, n, E] embedding of the slot after each; of the last one: the root's
    positions: Tensor  # [B, n]


def gather_news(seen: Seen, layers: Sequence[int], root: Tensor | None) -> News:
    """Reads the taps of seen's new slots. `root` [B, E]: embedding of the roots, if `following` is wanted (needs tap 0)."""
    cache, device = seen.cache, seen.root.device
    n = max(seen.counts)
    if root is None and len(set(seen.start)) == len(set(seen.counts)) == 1:  # as they lie
        new = slice(seen.start[0], seen.start[0] + n)
        states = [cache.tapped[cache.taps.index(layer)][:, 0, new] for layer in layers]
        return News(torch.stack(states, dim=2), None, cache.positions[0][:, 0, new, 0])
    start = torch.tensor(seen.start, device=device)[:, None]
    end = start + torch.tensor(seen.counts, device=device)[:, None]  # [B, 1]
    slots = (start + torch.arange(n, device=device)).minimum((end - 1).clamp(min=0))
    rows = torch.arange(len(slots), device=device)[:, None]

    def read(store: Tensor, at: Tensor) -> Tensor:
        return store[:, 0][rows, at]  # [B, n, *]

    features = torch.stack([read(cache.tapped[cache.taps.index(layer)], slots) for layer in layers], dim=2)
    positions = read(cache.positions[0], slots)[..., 0]
    following = None
    if root is not None:
        following = read(cache.tapped[cache.taps.index(0)], (slots + 1).minimum((end - 1).clamp(min=0)))
        following = torch.where((slots + 1 >= end)[..., None], root[:, None], following)
    return News(features, following, positions)


def choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor | None]:
    """Logits [B, V] -> a token a row [B] and what it was drawn from [B, V] (greedy: None)."""
    if temperature == 0:
        return logits.argmax(-1), None
    q = probabilities(logits, temperature)
    q = torch.where(q.isfinite().all(-1, keepdim=True), q, 1 / q.shape[-1])  # a broken drafter costs speed, no request
    return draw_rows(q, generators), q


def confidence(logits: Tensor) -> Tensor:
    """How likely the drafter's greedy choice is the target's: logits [..., V] -> [...] in [0.5, 1].

    That is not its probability: where many tokens may follow, both may still have the same favourite. The first choice against the second.
    """
    best = logits.float().topk(2, dim=-1).values
    return (best[..., 0] - best[..., 1]).sigmoid()


def _drafts(tokens: list[Tensor], qs: list[Tensor | None], like: Tensor) -> Draft:
    if not tokens:
        return Draft(torch.empty(len(like), 0, dtype=torch.long, device=like.device))
    kept = [q for q in qs if q is not None]
    return Draft(torch.stack(tokens, dim=1), None, torch.stack(kept, dim=1) if kept else None)


class _Proposer:
    """What serving drafters share: the target's embeddings and a cache of the drafter's own."""

    def __init__(self, module: DraftModule | BlockDrafter, target: Bagel) -> None:
        module.config.check_target(target.config.llm)
        self.target, self.config, self.memory_layers = target, module.config, module.memory_layers
        self.threshold = 0.0

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        c, model = self.config, self.target
        self.temperature, self.generators, self.im_end = temperature, generators, sessions[0].parts.tokenizer.im_end
        self.cache = KVCache(self.memory_layers, c.kv_heads, c.head_dim, rows=len(sessions), device=model.device, dtype=model.dtype)
        self.cache.reserve(max(s.cache.lengths[0] for s in sessions) + 64)

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing, and its cache goes."""
        self.__dict__.pop("cache", None)


class AutoregressiveDrafter(_Proposer):
    """EAGLE-3 or Hyper-Bagel: a chain of `depth` tokens, or (`nodes` > 0) the best `nodes` of a tree with `branch` children a node."""

    def __init__(self, module: DraftModule, target: Bagel, *, depth: int = 5, nodes: int = 0, branch: int = 4) -> None:
        super().__init__(module, target)
        self.module, self.depth, self.nodes, self.branch = module, depth, nodes, branch
        self.taps: tuple[int, ...] = tuple(sorted({0, *module.layers_read}))
        self.width = nodes or depth

    def propose(self, seen: Seen, limit: int) -> Draft:
        h = self._read(seen)
        depth = min(self.depth, limit)
        committed = list(self.cache.lengths)
        draft = self._tree(h, seen.position, depth) if self.nodes else self._chain(h, seen.position, depth)
        self.cache.truncate(committed)
        return draft

    def _read(self, seen: Seen) -> Tensor:
        """The committed slots join the memory; h [B, E] of each row's last one."""
        news = gather_news(seen, self.module.layers_read, self.target.embed_text(seen.root))
        assert news.following is not None
        sight = Sight.at(news.positions, self.config, news.features.dtype, Served(self.cache, self.cache.plan(seen.counts, causal=True)))
        h = self.module.step(self.module.encode(news.features, sight), news.following, sight)
        self.cache.advance(seen.counts)
        last = (torch.tensor(seen.counts, device=h.device) - 1).clamp(min=0)
        return h[torch.arange(len(h), device=h.device), last]

    def _chain(self, h: Tensor, position: Tensor, depth: int) -> Draft:
        ones = [1] * len(h)
        tokens: list[Tensor] = []
        qs: list[Tensor | None] = []
        # The look at the chances is a wait for the device, so on a CPU only. Greedy only: a sampled draft may be good at low confidence,
        # and what is drafted must not depend on how likely the drawn token was.
        careful = self.threshold > 0 and self.temperature == 0 and h.device.type == "cpu"
        chance, ended = torch.ones(len(h)), torch.zeros(len(h), dtype=torch.bool)
        for d in range(depth):
            logits = self.module.head(h)
            token, q = choose(logits, self.temperature, self.generators)
            if careful:
                chance = chance * confidence(logits)
                if chance.mean() < self.threshold:
                    break
            tokens.append(token)
            qs.append(q)
            if h.device.type == "cpu" and (ended := ended | (token == self.im_end)).all():  # nothing follows
                break
            if d + 1 < depth:
                plan = self.cache.plan(ones, causal=True)
                sight = Sight.at((position + d)[:, None], self.config, h.dtype, Served(self.cache, plan))
                h = self.module.step(h[:, None], self.target.embed_text(token)[:, None], sight)[:, 0]
                self.cache.advance(ones)
        return _drafts(tokens, qs, h)

    def _tree(self, h: Tensor, position: Tensor, depth: int) -> Draft:
        """EAGLE-2's growth: each level expands the `branch` most probable nodes; then the best `nodes` of all are kept."""
        committed = list(self.cache.lengths)
        levels: list[Level] = [grow(None, self.module.head(h)[:, None], self.branch)]
        states = h[:, None].expand(-1, self.branch, -1)  # h of the parent of each frontier node
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
    """Where counts[b] new slots of row b and then the K tokens of its block go, and what the block sees: its row and itself, causally.

    Rows are padded to the longest count; padding goes behind the block, where nobody looks.
    """
    n, ends = max(counts), [have + new for have, new in zip(cache.lengths, counts, strict=True)]
    cache.grow(max(ends) + k + n)
    if len(set(cache.lengths)) == len(set(counts)) == 1:
        return Plan(slice(cache.lengths[0], ends[0] + k), ends[0] + k, None, True)
    device = cache.k[0].device
    start, end = torch.tensor([cache.lengths, ends], device=device)[..., None]  # each [B, 1]
    new, own = torch.arange(n, device=device), end + torch.arange(k, device=device)
    slots = torch.cat([torch.where(start + new < end, start + new, end + k + new), own], dim=1)
    visible = max(ends) + k
    return Plan(slots, visible, (torch.arange(visible, device=device) <= own[..., None]).unsqueeze(1), False)


class BlockProposer(_Proposer):
    """One pass a round. What the drafter believes of itself is its confidence head if it samples, else its own probability."""

    def __init__(self, module: BlockDrafter, target: Bagel, *, depth: int | None = None, threshold: float = 0.0) -> None:
        super().__init__(module, target)
        self.module, self.threshold = module, threshold
        self.depth = min(depth or module.config.block, module.config.block)
        # a small vocabulary: the Markov head as a table of what follows what, one look-up instead of two products a token
        self.links, self.trust_after = None, None
        if module.config.vocab_size <= _TABLE:
            every = torch.arange(module.config.vocab_size, device=target.device)
            self.links, self.trust_after = module.link(every), module.trust_after(every)
        self.taps: tuple[int, ...] = tuple(sorted(set(module.layers_read)))
        self.width = self.depth

    def propose(self, seen: Seen, limit: int) -> Draft:
        news = gather_news(seen, self.module.layers_read, None)
        depth = min(self.depth, limit)
        plan = block_plan(self.cache, seen.counts, depth)
        root = self.target.embed_text(seen.root)[:, None]
        out = self.module(news.features, news.positions, root, seen.position[:, None], Served(self.cache, plan), depth)
        self.cache.advance(seen.counts)  # the block leaves no trace
        logits = self.module.lm_head(out)
        if len(root) == 1 and self.links is not None and _plain_numbers(logits):
            if self.temperature > 0:
                return self._sampled_row(logits[0], out[0], int(seen.root[0]))
            return Draft(torch.tensor([self._greedy_row(logits[0], int(seen.root[0]))], dtype=torch.long))
        previous, trust, ended = seen.root, torch.ones_like(seen.root, dtype=torch.float32), torch.zeros_like(seen.root, dtype=torch.bool)
        tokens: list[Tensor] = []
        qs: list[Tensor | None] = []
        for d in range(depth):
            mine = logits[:, d] + (self.module.link(previous) if self.links is None else self.links[previous])
            if self.threshold > 0:  # decided before the token is drawn, so that it does not bend the distribution
                sure = self.module.trust(out[:, d], previous).float().sigmoid() if self.temperature > 0 else confidence(mine)
                trust = trust * sure
                if trust.device.type == "cpu" and trust.mean() < self.threshold:
                    break
            previous, q = choose(mine, self.temperature, self.generators)
            # where a look at the chances would be a wait for the device, each row ends its own draft
            tokens.append(previous if trust.device.type == "cpu" else torch.where(trust >= self.threshold, previous, -1))
            qs.append(q)
            if root.device.type == "cpu" and (ended := ended | (previous == self.im_end)).all():  # nothing follows
                break
        return _drafts(tokens, qs, root)

    def _greedy_row(self, logits: Tensor, root: int) -> list[int]:
        """The greedy tokens after `root`, logits [K, V]: as the loop above, for one request on a CPU, where ten calls of PyTorch a token
        take longer than their arithmetic (2.4 to 2.1 ms a draft of ten)."""
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
            if not np.isfinite(q[0]):  # a broken drafter costs speed, no request
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
    """Whether NumPy can read it as it lies."""
    return x.device.type == "cpu" and x.dtype == torch.float32
