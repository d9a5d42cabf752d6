"""What the decoder and a drafter tell each other, and what is counted.

Shape legend: B rows, N drafted nodes (without the root), n = N + 1, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hyperbagel.generate.decode import Decoded, taken
from hyperbagel.generate.graphs import StaticRead
from hyperbagel.generate.session import Session
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.tree import Tree, tree_depth


@dataclass(frozen=True)
class Seen:
    """What is new since the last round: row b's slots [start[b], start[b] + counts[b]) of the target's cache (at first, the whole context).

    A finished row has a count of 0; what is drafted for it is ignored.
    """

    cache: KVCache  # with the drafter's taps
    start: list[int]
    counts: list[int]
    ids: list[list[int]]  # tokens of the new slots, from im_start on: a context may hold pictures
    root: Tensor  # [B] the token that the target reads next
    position: Tensor  # [B] its RoPE position
    read: StaticRead | None = None  # verifies drafts in fixed shapes; `cache` is then its own and stays in place from request to request
    said: list[int] | None = None  # the roots as numbers, which the decoder has: reading them from `root` would wait for the device

    def roots(self) -> list[int]:
        return self.root.tolist() if self.said is None else self.said

    def after(self, earlier: Seen | None) -> Seen:
        """These news preceded by `earlier` ones that were not shown."""
        if earlier is None:
            return self
        counts = [a + b for a, b in zip(earlier.counts, self.counts, strict=True)]
        ids = [[*a, *b] for a, b in zip(earlier.ids, self.ids, strict=True)]
        return replace(self, start=earlier.start, counts=counts, ids=ids)

    def of_rows(self, rows: Sequence[int]) -> Seen:
        """The news of some rows, from before the others left: the cache has these rows alone."""
        at = torch.tensor(list(rows), device=self.root.device)
        start, counts, ids = taken(self.start, rows), taken(self.counts, rows), taken(self.ids, rows)
        said = None if self.said is None else taken(self.said, rows)
        return replace(self, start=start, counts=counts, ids=ids, root=self.root[at], position=self.position[at], said=said)

    def behind(self, ahead: Sequence[int]) -> Seen:
        """What is left of these news once the first ahead[b] slots of each of the last len(ahead) rows are known."""
        first = len(self.start) - len(ahead)
        known = [*[0] * first, *ahead]
        start, counts = zip(*((at + n, count - n) for at, count, n in zip(self.start, self.counts, known, strict=True)), strict=True)
        return replace(self, start=list(start), counts=list(counts))

    def with_rows(self, more: int) -> Seen:
        """The news from before so many rows joined behind the others: of them, nothing was new."""
        root, position = (torch.cat([x, x.new_zeros(more)]) for x in (self.root, self.position))
        start, counts, ids = [*self.start, *[0] * more], [*self.counts, *[0] * more], [*self.ids, *([] for _ in range(more))]
        said = None if self.said is None else [*self.said, *[0] * more]
        return replace(self, start=start, counts=counts, ids=ids, root=root, position=position, said=said)


@dataclass
class Draft:
    """N nodes per row. tree: None for a chain. q [B, >= n - 1, V]: by node, what its children were drawn from; None: not drawn.

    depths: of each row's deepest node, once the decoder has looked; what it then knows need not be waited for again.
    """

    tokens: Tensor  # [B, N]; -1: no node
    tree: Tree | None = None
    q: Tensor | None = None
    depths: list[int] | None = None

    def deepest(self) -> list[int]:
        """The depth of each row's deepest node. Waits for the device, unless `depths` are known."""
        if self.depths is not None:
            return self.depths
        rows = self.tokens.tolist()
        if self.tree is None:
            return [sum(id_ >= 0 for id_ in row) for row in rows]
        return [tree_depth([0, *row], above) for row, above in zip(rows, self.tree.parents.tolist(), strict=True)]


class Drafter(Protocol):
    """Proposes tokens, for one request at a time."""

    taps: tuple[int, ...]  # hidden states entering these layers must be in the contexts' caches
    width: int  # most nodes it drafts; so much room it needs behind an answer
    depth: int  # most tokens in line
    threshold: float  # it drafts no node believed to be accepted, along with all before it, with a lower chance, where that saves time

    @property
    def draws(self) -> bool:
        """Whether its drafts are drawn at a temperature (Draft.q), not chosen."""

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        """Forgets the last request. `temperature` 0: greedy."""

    def propose(self, seen: Seen, limit: int) -> Draft:
        """Nodes below seen.root, at most `limit` >= 1 deep; none if it has nothing to propose."""

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Between two rounds, the batch goes on with these rows alone, in this order. `counts`: of all rows so far, as in Seen."""

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        """Between two rounds, rows join the batch behind the others; their contexts, as in `begin`, are news. `counts`: as in `narrow`."""

    def end(self, counts: Sequence[int]) -> None:
        """No `propose` follows: the request is over, or only its last token is left (then `end` is called again). `counts`: as in Seen, all
        0 if the request broke off. From now on nothing of the request's caches may be held."""


@dataclass
class Stats:
    """Counts of one row. Depths count from 1."""

    rounds: int = 0  # forwards of the target
    tokens: int = 0  # that these yielded, a stop token included
    tried: Counter[int] = field(default_factory=Counter)  # depth -> rounds in which a node of that depth was decided
    accepted: Counter[int] = field(default_factory=Counter)  # depth -> rounds in which one was accepted

    @property
    def tau(self) -> float:
        """Mean tokens per round (acceptance length, the target's own token included)."""
        return self.tokens / max(1, self.rounds)

    def rates(self) -> list[float]:
        """Acceptance by depth from 1 on, given that the depth before was accepted."""
        return [self.accepted[d] / self.tried[d] for d in sorted(self.tried)]

    def add(self, other: Stats) -> None:
        """Adds another row's counts to these."""
        self.rounds += other.rounds
        self.tokens += other.tokens
        self.tried.update(other.tried)
        self.accepted.update(other.accepted)


@dataclass
class Times:
    """Seconds of one call, all rows: drafting, the target's forwards, acceptance and cache, everything else."""

    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0
    host: float = 0.0


@dataclass
class Speculated(Decoded):
    """An answer with what speculation did for it; `times` is shared by the rows of a call."""

    stats: Stats = field(default_factory=Stats)
    times: Times = field(default_factory=Times)
