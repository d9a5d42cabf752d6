"""Drafters that read one token at a time: what EAGLE-3 and Hyper-Bagel share, from training to serving.

Slot t of the target holds a hidden state f_t; the pair (f_t, token t + 1) predicts token t + 2. A drafted token has no f: the drafter's own
output h takes its place. Training does the same, teacher forced (training-time test, EAGLE-3).

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
    """What the target did, to learn from: contexts followed by its own answers, padded on the right.

    Entry 0 of `tokens` is im_start, then comes the answer; entry i of `logits` is the target's prediction of what follows it.
    """

    features: Tensor  # [B, S, T, E] hidden states of the drafter's layers (DraftModule.layers_read)
    following: Tensor  # [B, S, E] embedding of the slot after each slot
    positions: Tensor  # [B, S] RoPE positions
    first: Tensor  # [B] last context slot, the one before entry 0
    counts: Tensor  # [B] entries of each row, at least 1
    tokens: Tensor  # [B, R]
    logits: Tensor  # [B, R, V]

    def rows(self) -> Tensor:
        """[B, R] the slot before each entry, clamped for padding."""
        r = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (self.first[:, None] + r).clamp(max=self.features.shape[1] - 1)

    def valid(self, ahead: int) -> Tensor:
        """bool [B, R]: whether entry i + ahead exists."""
        r = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return r + ahead < self.counts[:, None]


def ahead(x: Tensor, n: int) -> Tensor:
    """x [B, R, ...] with entry i + n in place of entry i; the last n wrap around and are never valid (`Lesson.valid`)."""
    return x.roll(-n, dims=1)


class DraftModule(nn.Module, ABC):
    """The weights. `encode` runs once per slot, `step` once per drafted token, `head` makes logits."""

    config: DrafterConfig
    layers_read: tuple[int, ...]  # hidden states that enter these target layers
    memory_layers: int  # attention layers with keys and values in the memory

    @abstractmethod
    def encode(self, features: Tensor, sight: Sight) -> Tensor:
        """Features [B, n, T, E] of consecutive slots -> [B, n, E], what h is at a slot of the target."""

    @abstractmethod
    def step(self, h: Tensor, token: Tensor, sight: Sight) -> Tensor:
        """h and the next token's embedding, both [B, n, E] -> the next h, not normalised."""

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
