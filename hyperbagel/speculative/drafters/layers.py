"""Layers of drafters and the memories they attend over: a cache when serving, a growing list when training. The layers do not know which.

Shape legend: B rows, S context slots, R answer rows, n tokens of a forward, E hidden size, H heads, D values of a head.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hyperbagel.nn.attention import attend
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.layers import MLP, RMSNorm, rope_table, rotate
from hyperbagel.nn.projections import Projections
from hyperbagel.speculative.drafters.config import DrafterConfig


class Memory(Protocol):
    """Keys and values of earlier tokens."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """New keys and values [B, H, n, D] -> all visible ones, who sees whom (mask [B, 1, n, visible]), or causal."""


class Served(NamedTuple):
    """Memory of serving: a cache and the plan of this forward."""

    cache: KVCache
    plan: Plan

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        return *self.cache.append(layer, self.plan, k, v), self.plan.mask, self.plan.causal


class Unrolled:
    """Memory of training: every forward's keys are kept, with gradient. `mask` None: causal among this forward's own tokens."""

    def __init__(self, layers: int) -> None:
        self.k: list[list[Tensor]] = [[] for _ in range(layers)]
        self.v: list[list[Tensor]] = [[] for _ in range(layers)]
        self.mask: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        self.k[layer].append(k)
        self.v[layer].append(v)
        return torch.cat(self.k[layer], dim=2), torch.cat(self.v[layer], dim=2), self.mask, self.mask is None


class Sight(NamedTuple):
    """What attention needs besides the tokens: cos, sin [B, n, 1, D] and the memory."""

    cos: Tensor
    sin: Tensor
    memory: Memory

    @classmethod
    def at(cls, positions: Tensor, config: DrafterConfig, dtype: torch.dtype, memory: Memory) -> Sight:
        return cls(*rope_table(positions, config.head_dim, config.rope_theta, dtype), memory)


class Attention(Projections):
    """Causal attention over a memory. `like_target`: with BAGEL's biases and norms of queries and keys, so that its weights fit."""

    def __init__(self, config: DrafterConfig, width: int, like_target: bool) -> None:
        super().__init__(config.heads, config.kv_heads, config.head_dim)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, q, bias=like_target)
        self.k_proj = nn.Linear(width, kv, bias=like_target)
        self.v_proj = nn.Linear(width, kv, bias=like_target)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.eps) if like_target else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.eps) if like_target else nn.Identity()

    def forward(self, x: Tensor, sight: Sight, layer: int, beside: Tensor | None = None) -> Tensor:
        """x [B, n, width]. `beside` [B, m, width]: tokens before them that only leave keys and values; `sight` is of m + n then."""
        n, m = x.shape[1], 0 if beside is None else beside.shape[1]
        together = beside is not None and m <= 4 * n  # a few queries that nobody needs cost less than calls of their own
        qk, v = self.project(torch.cat([beside, x], dim=1) if together else x)  # type: ignore[list-item]
        cos, sin = (sight.cos, sight.sin) if together else (sight.cos[:, m:], sight.sin[:, m:])
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], dim=2)
        if beside is not None and not together:
            before, values = self.project(beside, queries=False)
            k = torch.cat([rotate(before, sight.cos[:, :m], sight.sin[:, :m]), k], dim=1)
            v = torch.cat([values, v], dim=1)
        k, v, mask, causal = sight.memory.append(layer, k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(attend(q[:, -n:].transpose(1, 2), k, v, mask, causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One decoder layer with the target's shape and keys (its plain expert), so that the target's weights can start it."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, like_target=True)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, sight: Sight, layer: int, beside: Tensor | None = None) -> Tensor:
        """`beside`: as of Attention, normed already."""
        x = x + self.self_attn(self.input_layernorm(x), sight, layer, beside)
        return x + self.mlp(self.post_attention_layernorm(x))


def diagonal_mask(rows: Tensor, slots: int, step: int) -> Tensor:
    """Who an answer row sees at test-time step `step` >= 1: the context up to its own slot, and of each step since then only itself.

    Slots 0 1 2, rows [1, 2], step 2 (context | step 1 | step 2):

        1 1 . | 1 . | 1 .
        1 1 1 | . 1 | . 1

    rows [B, R] -> bool [B, 1, R, S + step * R].
    """
    r = rows.shape[1]
    past = torch.arange(slots, device=rows.device) <= rows[..., None]  # [B, R, S]
    own = torch.eye(r, dtype=torch.bool, device=rows.device).expand(len(rows), -1, -1)
    return torch.cat([past, *[own] * step], dim=-1).unsqueeze(1)
