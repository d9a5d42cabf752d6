"""Block-parallel drafting: one pass proposes a block of tokens.

Queries are the root's embedding and learned marks for the tokens to come, causal within the block. Every layer reads the target's fused
features of all committed slots as extra keys and values (DFlash). One pass cannot know which token was chosen just before; a low-rank
Markov head adds that to the logits, as W2 W1[previous token]. A confidence head says how far a sampled chain is worth verifying (DSpark).
Trees (block_tree) do not ask it.

Shape legend: B rows, S context slots, R answer rows, A anchors, K tokens of a block, T tapped layers, E hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.layers import RMSNorm, embedding
from hyperbagel.speculative.drafters.autoregressive import Embed, Lesson
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.layers import Layer, Memory, Sight, Unrolled, copy_layers, init_normal


class BlockDrafter(nn.Module):
    """The weights. `forward` runs once per round, over the new slots and the block; `link` and `trust` once per drafted token."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config, self.layers_read, self.memory_layers = config, config.levels, config.layers
        e = config.hidden_size
        self.feature_norms = nn.ModuleList(RMSNorm(e, config.eps) for _ in range(3))  # one per feature (EAGLE-3.1)
        self.fc = nn.Linear(3 * e, e, bias=False)
        self.context_norm = RMSNorm(e, config.eps)
        self.marks = nn.Parameter(torch.zeros(config.block, e))  # the first is added to the root
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(e, config.eps)
        self.lm_head = nn.Linear(e, config.vocab_size, bias=False)
        self.markov_in = embedding(config.vocab_size, config.rank)
        self.markov_out = nn.Linear(config.rank, config.vocab_size, bias=False)
        self.confidence = nn.Linear(e + config.rank, 1)

    def init_from(self, target: Bagel, generator: torch.Generator) -> None:
        """Layers, norm and head start as the target's last ones; at first the Markov head adds nothing and confidence is constant."""
        init_normal(self, generator)
        llm = target.language_model
        copy_layers(self.layers, llm.model.layers[-self.config.layers :])
        self.norm.load_state_dict(llm.model.norm.state_dict())
        self.lm_head.load_state_dict(llm.lm_head.state_dict())
        nn.init.zeros_(self.markov_out.weight)
        nn.init.zeros_(self.confidence.weight)

    def forward(self, features: Tensor, slots: Tensor, root: Tensor, positions: Tensor, memory: Memory, k: int) -> Tensor:
        """Features [B, n, T, E] of committed slots at positions `slots` [B, n], embeddings of roots [B, A, E] at `positions` [B, A] ->
        normalised outputs [B, A * k, E] of the roots' blocks. Keys go into the memory in that order, slots first.

        k: tokens of a block, at most the K it was trained for. No token sees a later one, so a shorter block is the start of the whole.
        """
        parts = [norm(x) for norm, x in zip(self.feature_norms, features.unbind(2), strict=True)]
        fused = self.context_norm(self.fc(torch.cat(parts, dim=-1)))
        x = self.marks[:k].expand(*root.shape[:2], -1, -1)
        x = torch.cat([x[:, :, :1] + root[:, :, None], x[:, :, 1:]], dim=2).flatten(1, 2)
        ahead = (positions[..., None] + torch.arange(k, device=positions.device)).flatten(1)
        sight = Sight.at(torch.cat([slots, ahead], dim=1), self.config, x.dtype, memory)
        for i, layer in enumerate(self.layers):
            x = layer(x, sight, i, beside=fused)
        return self.norm(x)

    def link(self, previous: Tensor) -> Tensor:
        """What the Markov head adds to the logits after the tokens `previous`: [...] -> [..., V]."""
        return self.markov_out(self.markov_in(previous))

    def trust(self, out: Tensor, previous: Tensor) -> Tensor:
        """Confidence, as a logit, that the draft after `previous` [...] is accepted; out [..., E] -> [...]."""
        return self.confidence(torch.cat([out, self.markov_in(previous)], dim=-1))[..., 0]

    def rollout(self, lesson: Lesson, embed: Embed, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks after the entries `anchors` [B, A] (teacher forced) -> logits [B, A, K, V] and confidence logits [B, A, K].

        Token k of a block at entry i predicts what follows entry i + k.
        """
        k, r = self.config.block, lesson.tokens.shape[1]
        memory = Unrolled(self.memory_layers)
        last = lesson.rows().gather(1, anchors)  # the slot before each root
        memory.mask = block_mask(last, lesson.features.shape[1], k)
        where = lesson.positions.gather(1, last) + 1
        roots = embed(lesson.tokens.gather(1, anchors))
        out = self(lesson.features, lesson.positions, roots, where, memory, k).unflatten(1, (-1, k))
        at = (anchors[..., None] + torch.arange(k, device=anchors.device)).clamp(max=r - 1)  # [B, A, K]
        previous = lesson.tokens.gather(1, at.flatten(1)).view_as(at)
        return self.lm_head(out) + self.link(previous), self.trust(out, previous)


def block_mask(last: Tensor, slots: int, k: int) -> Tensor:
    """Who a block's tokens see: the slots before its root, and the block up to themselves. Slots 0 1 2, last [0, 2], K = 2:

        1 . . | 1 . . .
        1 . . | 1 1 . .
        1 1 1 | . . 1 .
        1 1 1 | . . 1 1

    last [B, A] -> bool [B, 1, A * K, S + A * K].
    """
    b, a = last.shape
    past = (torch.arange(slots, device=last.device) <= last[..., None]).repeat_interleave(k, dim=1)  # [B, A K, S]
    own = torch.block_diag(*[torch.ones(k, k, device=last.device).tril()] * a).bool()
    return torch.cat([past, own.expand(b, -1, -1)], dim=-1).unsqueeze(1)
