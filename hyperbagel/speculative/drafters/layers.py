"""Layers of drafters and the memories they attend over: a cache when serving, growing lists when training. The layers cannot tell which.

Shape legend: B rows, S context slots, R answer rows, n tokens of a forward, E hidden size, H heads, D values of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hyperbagel.nn.attention import attend
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.layers import MLP, RMSNorm, rope_table, rotate
from hyperbagel.nn.projections import Projections
from hyperbagel.nn.quantized import plain_layer
from hyperbagel.speculative.drafters.config import DrafterConfig


class Memory(Protocol):
    """Keys and values of earlier tokens."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Takes new keys and values [B, H, n, D] -> all visible ones, the mask [B, 1, n, visible] or None, and whether causal."""


class Served(NamedTuple):
    """The memory when serving: a cache and the plan of this forward."""

    cache: KVCache
    plan: Plan

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        return *self.cache.append(layer, self.plan, k, v), self.plan.mask, self.plan.causal


class Unrolled:
    """The memory when training: keys and values of every forward, with gradients. `mask` None: causal, for the first forward."""

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
        """The sight of tokens at RoPE positions [B, n]."""
        return cls(*rope_table(positions, config.head_dim, config.rope_theta, dtype), memory)


class Attention(Projections):
    """Attention over a memory. like_target: with BAGEL's biases and query and key norms, so that the target's weights fit."""

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
        """x [B, n, width] -> [B, n, E]. beside [B, m, width]: tokens before x that only give keys and values; `sight` then covers m + n."""
        n, m = x.shape[1], 0 if beside is None else beside.shape[1]
        together = beside is not None and m <= 4 * n  # computing a few unneeded queries costs less than separate calls
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
    """A decoder layer with the shape and keys of the target's understanding expert, so that it can start from its weights."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, like_target=True)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, sight: Sight, layer: int, beside: Tensor | None = None) -> Tensor:
        """x [B, n, E] -> the same. beside: as in Attention, already normed."""
        x = x + self.self_attn(self.input_layernorm(x), sight, layer, beside)
        return x + self.mlp(self.post_attention_layernorm(x))


def init_normal(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """Draws every matrix from Normal(0, std), in the order of the parameters; vectors keep their values."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def copy_layers(own: Iterable[nn.Module], target: Iterable[nn.Module]) -> None:
    """Copies the weights of target layers, which hold those of the other expert too, into drafter layers, one by one."""
    for mine, theirs in zip(own, target, strict=True):
        for name, part in mine.named_modules():
            if next(part.children(), None) is None:
                part.load_state_dict(plain_layer(theirs.get_submodule(name)).state_dict())


def diagonal_mask(rows: Tensor, slots: int, step: int) -> Tensor:
    """Who an answer row sees at step `step` >= 1 of training-time test: the context up to its slot, and of each later step only itself.

    Slots 0 1 2, rows [1, 2], step 2 (context | step 1 | step 2):

        1 1 . | 1 . | 1 .
        1 1 1 | . 1 | . 1

    rows [B, R] -> bool [B, 1, R, S + step * R].
    """
    r = rows.shape[1]
    past = torch.arange(slots, device=rows.device) <= rows[..., None]  # [B, R, S]
    own = torch.eye(r, dtype=torch.bool, device=rows.device).expand(len(rows), -1, -1)
    return torch.cat([past, *[own] * step], dim=-1).unsqueeze(1)
