"""Drafters that read one token at a time: what EAGLE-3 and Hyper-Bagel share, from training to serving.

Slot t of the target holds a hidden state f_t; the pair (f_t, token t + 1) predicts token t + 2. A drafted token has no f: the drafter's own
output h takes its place. Training goes the same way, teacher forced (training-time test, EAGLE-3).

Shape legend: B rows, S context slots, R answer rows, T tapped layers, E hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.layers import Sight, Unrolled, diagonal_mask

Embed = Callable[[Tensor], Tensor]  # token ids [...] -> the target's embeddings [..., E]


@dataclass(frozen=True)
class Lesson:
    """What the target did, for training: contexts with its own answers behind them, padded on the right.

    Entry i of `tokens` is im_start for i = 0, then the answer; entry i of `logits` is what the target thinks follows it.
    """

    features: Tensor  # [B, S, T, E] hidden states of the drafter's layers (DraftModule.layers_read)
    following: Tensor  # [B, S, E] embedding of the slot after each slot
    positions: Tensor  # [B, S] RoPE positions
    first: Tensor  # [B] last context slot: row 0
    counts: Tensor  # [B] entries of each row, at least 1
    tokens: Tensor  # [B, R]
    logits: Tensor  # [B, R, V]

    def rows(self) -> Tensor:
        """[B, R] the slot before each entry, clamped for padding."""
        r = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (self.first[:, None] + r).clamp(max=self.features.shape[1] - 1)

    def valid(self, ahead: int) -> Tensor:
        """[B, R]: entry i + ahead exists."""
        r = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return r + ahead < self.counts[:, None]


def ahead(x: Tensor, n: int) -> Tensor:
    """Entry i + n in place of entry i of x [B, R, ...]; the last n come from the front and are never valid."""
    return x.roll(-n, dims=1)


class DraftModule(nn.Module, ABC):
    """The weights. `encode` runs once a slot, `step` once a drafted token, `head` makes logits."""

    config: DrafterConfig
    layers_read: tuple[int, ...]  # hidden states that enter these target layers
    memory_layers: int  # attention layers that remember

    @abstractmethod
    def encode(self, features: Tensor, sight: Sight) -> Tensor:
        """[B, n, T, E] of consecutive slots -> [B, n, E], what takes the place of h."""

    @abstractmethod
    def step(self, h: Tensor, token: Tensor, sight: Sight) -> Tensor:
        """h and the next token's embedding, each [B, n, E] -> the next h, not normalised."""

    @abstractmethod
    def head(self, h: Tensor) -> Tensor:
        """h [..., E] -> logits [..., V] over the target's vocabulary; -inf where a token cannot be drafted."""

    def rollout(self, lesson: Lesson, embed: Embed, steps: int) -> list[Tensor]:
        """Training-time test: logits [B, R, V] of each step; row i of step j predicts what follows entry i + j.

        Step 0 runs over all slots, causally; later steps over answer rows only, at positions + j.
        """
        memory = Unrolled(self.memory_layers)
        sight = Sight.at(lesson.positions, self.config, lesson.features.dtype, memory)
        h = self.step(self.encode(lesson.features, sight), lesson.following, sight)
        rows = lesson.rows()
        h = h.gather(1, rows[..., None].expand(-1, -1, h.shape[-1]))
        where = lesson.positions.gather(1, rows)
        out = [self.head(h)]
        for j in range(1, steps):
            memory.mask = diagonal_mask(rows, lesson.features.shape[1], j)
            sight = Sight.at(where + j, self.config, h.dtype, memory)
            h = self.step(h, embed(ahead(lesson.tokens, j)), sight)
            out.append(self.head(h))
        return out
