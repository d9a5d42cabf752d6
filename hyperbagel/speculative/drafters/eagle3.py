"""EAGLE-3 exactly as published (arXiv 2503.01840): the baseline. Keys are those of its checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.layers import MLP, RMSNorm
from hyperbagel.speculative.drafters.autoregressive import DraftModule
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.layers import Attention, Sight, init_normal


class MidLayer(nn.Module):
    """Attention over x = [norm(token); norm(h)], width 2E, then an MLP; the residual stream is h, not normed."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        e, eps = config.hidden_size, config.eps
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (RMSNorm(e, eps) for _ in range(3))
        self.self_attn = Attention(config, 2 * e, like_target=False)
        self.mlp = MLP(e, config.intermediate_size)

    def forward(self, h: Tensor, token: Tensor, sight: Sight) -> Tensor:
        x = torch.cat([self.input_layernorm(token), self.hidden_norm(h)], dim=-1)
        h = h + self.self_attn(x, sight, 0)
        return h + self.mlp(self.post_attention_layernorm(h))


class Eagle3(DraftModule):
    """Three features fused, one layer, a head of its own, optionally over a part of the vocabulary.

    d2t [Vd]: target id minus draft id; t2d [V]: can be drafted. Both as in EAGLE-3's checkpoints.
    """

    memory_layers = 1
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config, self.layers_read = config, config.levels
        e, small = config.hidden_size, config.draft_vocab or config.vocab_size
        self.fc = nn.Linear(3 * e, e, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(e, config.eps)
        self.lm_head = nn.Linear(e, small, bias=False)
        self.register_buffer("d2t", torch.zeros(small, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < small)

    def init_from(self, target: Bagel, generator: torch.Generator) -> None:
        """Random matrices as in EAGLE-3 (normal, 0.02); the head starts as the target's rows."""
        init_normal(self, generator)
        self.lm_head.weight.data.copy_(target.language_model.lm_head.weight.data[self.drafted()])

    def set_vocabulary(self, ids: Tensor) -> None:
        """Sets which target tokens can be drafted: sorted ids [Vd]."""
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()
        self.t2d[ids] = True

    def drafted(self) -> Tensor:
        """Target ids [Vd] of the draft vocabulary."""
        return drafted_ids(self.d2t)

    def encode(self, features: Tensor, sight: Sight) -> Tensor:
        return self.fc(features.flatten(2))

    def step(self, h: Tensor, token: Tensor, sight: Sight) -> Tensor:
        return self.midlayer(h, token, sight)

    def head(self, h: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(h))
        if self.config.draft_vocab is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return whole.index_copy(-1, self.drafted(), logits)


def drafted_ids(d2t: Tensor) -> Tensor:
    """Target ids [Vd] from the offsets that the published layout stores."""
    return d2t + torch.arange(len(d2t), device=d2t.device)
