"""A block drafter at work: one pass a round, then the block's tokens one after the other, or a tree of the likeliest ones.

Shape legend: B rows, n new slots of a round (padded), K tokens of a block, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hyperbagel.generate.graphs import StaticRead, causal_plan
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.block_beam import search_beam
from hyperbagel.speculative.drafters.block_tree import Floats, search_best_first, tree_draft
from hyperbagel.speculative.drafters.choice import Pick, confidence, shares
from hyperbagel.speculative.drafters.layers import Served
from hyperbagel.speculative.drafters.serve import News, Proposer, as_draft, gather, gather_news
from hyperbagel.speculative.drafters.static import StaticDraft, StaticTree, Tokens
from hyperbagel.speculative.tree import Tree
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
    """Drafts from one pass per round: a chain of `depth` tokens, or (`nodes` > 0) the likeliest `nodes` of a tree with at most `branch`
    children per node. On a CPU these are looked for one by one, on a GPU and where drafts have fixed shapes by tensors alone.

    A chain's tokens are drawn if it samples. A tree's are a deterministic choice, which the target accepts with its own probabilities.
    """

    def __init__(
        self, module: BlockDrafter, target: Bagel, *, depth: int | None = None, threshold: float = 0.0, nodes: int = 0, branch: int = 4
    ) -> None:
        super().__init__(module, target)
        self.module, self.threshold, self.nodes, self.branch = module, threshold, nodes, branch
        self.depth = min(depth or module.config.block, module.config.block)
        # For a small vocabulary the Markov head becomes a table over pairs of tokens: one look-up per token instead of two products.
        self.links, self.table = None, None
        if module.config.vocab_size <= _TABLE:
            every = torch.arange(module.config.vocab_size, device=target.device)
            self.links = module.link(every)
            self.table = self.links.detach().float().numpy() if target.device.type == "cpu" else None
        self.taps: tuple[int, ...] = tuple(sorted(set(module.layers_read)))
        self.width = max(self.depth, nodes)

    def _propose(self, seen: Seen, depth: int) -> Draft:
        news = gather_news(seen, self.module.layers_read, None)
        memory = Served(self.cache, block_plan(self.cache, seen.counts, depth))
        logits, out = self._block(news, seen.root, seen.position, memory, depth)
        self.cache.advance(seen.counts)  # not the block: the next round overwrites it
        if self.nodes:
            if seen.read is None and logits.device.type == "cpu":
                return self._tree(logits, seen)
            return Draft(*self._beam(logits, seen.root, self.scale, depth, self.im_end))
        least = self.threshold if self.threshold > 0 else None
        ended = torch.tensor([not new for new in seen.counts]) if out.device.type == "cpu" else None
        return as_draft(*self._tokens(logits, out, seen.root, self._pick, least, ended), out)

    def _read_ahead(self, seen: Seen, cache: KVCache) -> None:
        news, memory = gather_news(seen, self.module.layers_read, None), Served(cache, block_plan(cache, seen.counts, 1))
        self._block(news, seen.root, seen.position, memory, 1)  # blocks come with it; the next pass overwrites theirs

    @property
    def scale(self) -> float:
        """What logits are multiplied by to search a tree: cold target or not, what the drafter does not know is as uncertain; a hot one
        spreads its choices."""
        return 1 / max(1.0, self.temperature)

    def _tree(self, logits: Tensor, seen: Seen) -> Draft:
        """The tree below the roots from the block's logits [B, k, V], on a CPU."""
        # Rows share their columns, so what one of them hardly needs may pay in the mean. Finished ones need nothing.
        least = self.threshold / max(1, sum(map(bool, seen.counts)))
        search = partial(search_best_first, nodes=self.nodes, branch=self.branch, least=least, stop=self.im_end, scale=self.scale)
        rows = [
            search(row, self._link_of, token) if new else None
            for row, token, new in zip(logits.detach().float().numpy(), seen.roots(), seen.counts, strict=True)
        ]
        return tree_draft(rows, self.threshold)

    def _beam(self, logits: Tensor, root: Tensor, scale: Tensor | float, limit: Tensor | int, stop: Tensor | int) -> tuple[Tensor, Tree]:
        """Tokens [B, N] and tree, at most `limit` deep, below root [B] from the block's logits [B, k, V]."""
        tokens, parents = search_beam(logits, self._link, root, self.nodes, branch=self.branch, limit=limit, stop=stop, scale=scale)
        return tokens, Tree(parents)

    def _link_of(self, token: int) -> Floats:
        """What the Markov head adds after `token`, [V]."""
        if self.table is not None:
            return self.table[token]
        return self.module.link(torch.tensor(token)).detach().float().numpy()

    def _link(self, previous: Tensor) -> Tensor:
        """What the Markov head adds after `previous` [...] -> [..., V]."""
        return self.module.link(previous) if self.links is None else self.links[previous]

    def _static(self, read: StaticRead) -> StaticDraft:
        return StaticTree(self, read) if self.nodes else super()._static(read)

    def draft_static(self, at: StaticDraft, n: int, k: int, pick: Pick) -> Tokens:
        return self._tokens(*self._block_static(at, n, k), at.root, pick, at.least, None)

    def tree_static(self, at: StaticTree, n: int) -> tuple[Tensor, Tree]:
        """See TreeDrafter."""
        logits, _ = self._block_static(at, n, self.depth)
        return self._beam(logits, at.root, at.scale, at.limit, at.stop)

    def _block_static(self, at: StaticDraft, n: int, k: int) -> tuple[Tensor, Tensor]:
        """`_block` from the buffers of `at`."""
        news = gather(at.seen, self.module.layers_read, at.start, at.counts, n, None)
        memory = Served(at.cache, rows_plan(at.have, at.counts, n, k, at.capacity))
        return self._block(news, at.root, at.position, memory, k)

    def static_depth(self, depth: int) -> int:
        """The whole block, since its tokens come from one pass."""
        return self.depth

    def _block(self, news: News, root: Tensor, position: Tensor, memory: Served, k: int) -> tuple[Tensor, Tensor]:
        """One pass over new slots and blocks of k tokens below root [B] at `position` [B] -> logits [B, k, V] and outputs [B, k, E]."""
        embedded = self.target.embed_text(root)[:, None]
        out = self.module(news.features, news.positions, embedded, position[:, None], memory, k)
        return self.module.lm_head(out), out

    def _tokens(self, logits: Tensor, out: Tensor, root: Tensor, pick: Pick, least: Tensor | float | None, ended: Tensor | None) -> Tokens:
        """Chooses the tokens of blocks with logits [B, K, V] and outputs [B, K, E] one by one. least: the trust below which a row ends.
        ended [B]: rows that need none, where all end together, by the mean; None: each row ends its own draft with -1."""
        previous, trust = root, torch.ones_like(root, dtype=torch.float32) if ended is None else shares(ended)
        tokens: list[Tensor] = []
        qs: list[Tensor | None] = []
        for d in range(logits.shape[1]):
            mine = logits[:, d] + self._link(previous)
            if least is not None:  # decided before the token is drawn, so that it does not bend the distribution
                sure = self.module.trust(out[:, d], previous).float().sigmoid() if self.temperature > 0 else confidence(mine)
                trust = trust * sure
                if ended is not None and trust.sum() < least:
                    break
            previous, q = pick(mine, d)
            tokens.append(previous if ended is not None or least is None else torch.where(trust >= least, previous, -1))
            qs.append(q)
            if ended is not None and (ended := ended | (previous == self.im_end)).all():  # nothing follows
                break
        return tokens, qs
