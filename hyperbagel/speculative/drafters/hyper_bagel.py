"""Hyper-Bagel's drafter (arXiv 2509.18824, section 3.1): meta queries over all layers, one target-shaped layer, then the draft layers.

The paper does not say, and we chose (ours:): fc1 comes before Dec; both skips are residuals, so that with zero-initialised projections the
drafter starts as the target's own last layers over its high feature, and every part has a gradient within the first steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.layers import RMSNorm
from hyperbagel.speculative.drafters.autoregressive import DraftModule
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.layers import Layer, Sight, copy_layers, init_normal

# Tokens of a context that are read at once: at 7B the states of all layers, normed, as keys and as values take 0.6 MB per token, 6 GB for a
# picture of 4,900 tokens.
AT_ONCE = 512


class MetaQueries(nn.Module):
    """f_c = Flatten(CA(f_q, f_i, f_i)): for each token, Q learned queries attend to its hidden states f_i of all L layers.

    [B, S, L, E] -> [B, S, Q * E].
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        e = config.hidden_size
        self.heads = config.heads
        self.queries = nn.Parameter(torch.zeros(config.queries, e))
        self.norm = RMSNorm(e, config.eps)  # ours: hidden states grow with depth
        self.depth = nn.Parameter(torch.zeros(config.target_layers, e))  # ours: which layer a state is from
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(e, e, bias=False) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.flatten(0, 1)  # [B S, L, E], each by itself
        pieces = [tokens] if torch.is_grad_enabled() else tokens.split(AT_ONCE)
        return torch.cat([self._look(piece) for piece in pieces]).unflatten(0, states.shape[:2])

    def _look(self, states: Tensor) -> Tensor:
        """[n, L, E] -> [n, Q * E]."""
        normed = self.norm(states) + self.depth

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        q = heads(self.q_proj(self.queries)).expand(len(states), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, heads(self.k_proj(normed)), heads(self.v_proj(normed)))  # [n, H, Q, D]
        return self.o_proj(out.transpose(1, 2).flatten(2)).flatten(1)


class HyperBagelDrafter(DraftModule):
    """The weights. Dec attends over the sequence, once per slot and without token embeddings; only `layers` run per drafted token."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.layers_read = tuple(range(1, config.target_layers + 1))  # what leaves each layer
        self.memory_layers = 1 + config.layers
        e = config.hidden_size
        self.meta = MetaQueries(config)
        self.fc1 = nn.Linear(3 * e, e, bias=False)
        self.dec = Layer(config)
        self.token_norm, self.feature_norm = RMSNorm(e, config.eps), RMSNorm(e, config.eps)
        self.fc2 = nn.Linear(2 * e, e, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(e, config.eps)
        self.lm_head = nn.Linear(e, config.vocab_size, bias=False)

    def init_from(self, target: Bagel, generator: torch.Generator) -> None:
        """The draft layers start as the target's last N layers, Dec as the one before them, norm and head as the target's."""
        init_normal(self, generator)
        llm, n = target.language_model, self.config.layers
        before = llm.model.layers[max(0, len(llm.model.layers) - 1 - n)]
        copy_layers([self.dec, *self.layers], [before, *llm.model.layers[-n:]])
        self.norm.load_state_dict(llm.model.norm.state_dict())
        self.lm_head.load_state_dict(llm.lm_head.state_dict())
        if self.config.zero_init:
            for linear in (self.meta.o_proj, self.dec.self_attn.o_proj, self.dec.mlp.down_proj, self.fc1, self.fc2):
                nn.init.zeros_(linear.weight)

    def encode(self, features: Tensor, sight: Sight) -> Tensor:
        picked = [features[:, :, max(level, 1) - 1] for level in self.config.levels]  # each [B, S, E]
        fused = torch.cat(picked, dim=-1) + self.meta(features)  # skip around CA
        # ours: the high feature skips fc1; Dec's own residual is the skip around Dec
        return self.dec(picked[-1] + self.fc1(fused), sight, 0)

    def step(self, h: Tensor, token: Tensor, sight: Sight) -> Tensor:
        x = h + self.fc2(torch.cat([self.token_norm(token), self.feature_norm(h)], dim=-1))  # ours: residual
        for i, layer in enumerate(self.layers):
            x = layer(x, sight, 1 + i)
        return x

    def head(self, h: Tensor) -> Tensor:
        return self.lm_head(self.norm(h))
