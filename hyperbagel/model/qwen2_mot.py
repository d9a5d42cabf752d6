"""Qwen2 as a mixture of transformers: two experts, one attention.

Tokens travel as two streams that never mix outside attention: u (text, ViT tokens, vision markers; plain weights) and g (VAE latents;
`_moe_gen` weights). There is no router and no scatter: attention does not depend on the order of its keys.

Shape legend: B rows, Su / Sg tokens of the streams, S = Su + Sg, E hidden size, Hq / Hk heads, D values of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperbagel.model.config import LLMConfig
from hyperbagel.nn.attention import attend
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.layers import MLP, RMSNorm, embedding, rope_table, rotate


class Streams(NamedTuple):
    """u [B, Su, E] for the understanding expert, g [B, Sg, E] for the generation expert; either may be absent."""

    u: Tensor | None
    g: Tensor | None


class Sight(NamedTuple):
    """What attention needs besides the tokens: cos, sin [B, 1, S, D]; a mask (training) or a cache with its plan (inference)."""

    cos: Tensor
    sin: Tensor
    mask: Any = None
    cache: KVCache | None = None
    plan: Plan | None = None
    backend: str = "sdpa"


class SelfAttention(nn.Module):
    """Each expert has projections and norms of its own; all tokens attend together. Streams [B, Su, E] and [B, Sg, E] -> the same."""

    def __init__(self, cfg: LLMConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.attend = attend  # of the instance, so that training can keep it out of a compiled graph
        e, q, kv = cfg.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj, self.q_proj_moe_gen = nn.Linear(e, q), nn.Linear(e, q)
        self.k_proj, self.k_proj_moe_gen = nn.Linear(e, kv), nn.Linear(e, kv)
        self.v_proj, self.v_proj_moe_gen = nn.Linear(e, kv), nn.Linear(e, kv)
        self.o_proj, self.o_proj_moe_gen = nn.Linear(q, e, bias=False), nn.Linear(q, e, bias=False)
        self.q_norm, self.q_norm_moe_gen = RMSNorm(self.head_dim, cfg.rms_norm_eps), RMSNorm(self.head_dim, cfg.rms_norm_eps)
        self.k_norm, self.k_norm_moe_gen = RMSNorm(self.head_dim, cfg.rms_norm_eps), RMSNorm(self.head_dim, cfg.rms_norm_eps)

    def _qkv(self, x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, qn: nn.Module, kn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        def heads(y: Tensor, n: int) -> Tensor:
            return y.unflatten(-1, (n, self.head_dim))

        parts = qn(heads(q(x), self.heads)), kn(heads(k(x), self.kv_heads)), heads(v(x), self.kv_heads)
        return tuple(part.transpose(1, 2) for part in parts)  # type: ignore[return-value]  # each [B, H, S, D]

    def forward(self, x: Streams, sight: Sight, layer: int) -> Streams:
        parts = []
        if x.u is not None:
            parts.append(self._qkv(x.u, self.q_proj, self.k_proj, self.v_proj, self.q_norm, self.k_norm))
        if x.g is not None:
            own = self.q_proj_moe_gen, self.k_proj_moe_gen, self.v_proj_moe_gen, self.q_norm_moe_gen, self.k_norm_moe_gen
            parts.append(self._qkv(x.g, *own))
        q, k, v = parts[0] if len(parts) == 1 else (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        q, k = rotate(q, sight.cos, sight.sin), rotate(k, sight.cos, sight.sin)
        mask, causal = sight.mask, False
        if sight.cache is not None and sight.plan is not None:
            k, v = sight.cache.append(layer, sight.plan, k, v)
            mask, causal = sight.plan.mask, sight.plan.causal
        out = self.attend(q, k, v, mask, causal, sight.backend).transpose(1, 2).flatten(2)  # [B, S, Hq D]
        su = 0 if x.u is None else x.u.shape[1]
        # `view`: a slice of one row has a stride that says nothing. FSDP2 tidies it up in a forward, not where a layer is run again for its
        # gradient (`recompute`), and the products' saved shapes then differ.
        u, g = (part.view(part.shape) for part in (out[:, :su], out[:, su:]))
        return Streams(None if x.u is None else self.o_proj(u), None if x.g is None else self.o_proj_moe_gen(g))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each token through its own expert. Streams [B, Su, E] and [B, Sg, E] -> the same."""

    def __init__(self, cfg: LLMConfig) -> None:
        super().__init__()
        e, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.self_attn = SelfAttention(cfg)
        self.mlp, self.mlp_moe_gen = MLP(e, cfg.intermediate_size), MLP(e, cfg.intermediate_size)
        self.input_layernorm, self.input_layernorm_moe_gen = RMSNorm(e, eps), RMSNorm(e, eps)
        self.post_attention_layernorm, self.post_attention_layernorm_moe_gen = RMSNorm(e, eps), RMSNorm(e, eps)

    def forward(self, x: Streams, sight: Sight, layer: int) -> Streams:
        normed = Streams(
            None if x.u is None else self.input_layernorm(x.u),
            None if x.g is None else self.input_layernorm_moe_gen(x.g),
        )
        mixed = self.self_attn(normed, sight, layer)
        u = g = None
        if x.u is not None:
            u = x.u + mixed.u
            u = u + self.mlp(self.post_attention_layernorm(u))
        if x.g is not None:
            g = x.g + mixed.g
            g = g + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(g))
        return Streams(u, g)


class Qwen2MoT(nn.Module):
    """Qwen2 as a mixture of transformers: understanding tokens u [B, Su, E] and latent tokens g [B, Sg, E], one attention over both."""

    def __init__(self, cfg: LLMConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = cfg, attention
        self.recompute = False  # training: keep only each layer's input and run the layer again for its gradient
        self.embed_tokens = embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm, self.norm_moe_gen = (RMSNorm(cfg.hidden_size, cfg.rms_norm_eps) for _ in range(2))

    def forward(
        self,
        x: Streams,
        positions: Tensor,
        *,
        mask: Any = None,
        cache: KVCache | None = None,
        plan: Plan | None = None,
        backend: str | None = None,
        taps: list[Streams] | None = None,
    ) -> Streams:
        """All layers and the final norms. positions [B, S] in stream order [u | g]. `taps` collects the output of every layer; a
        cache with taps keeps those it was made for."""
        some = x.u if x.u is not None else x.g
        assert some is not None, "a forward needs tokens"
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta, some.dtype)
        sight = Sight(cos, sin, mask, cache, plan, backend or self.attention)
        tapped = cache if cache is not None and cache.taps else None
        if tapped is not None and plan is not None:
            tapped.tap_positions(plan, positions)
            tapped.tap(0, plan, x)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, sight, i, use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is drawn
            else:
                x = layer(x, sight, i)
            if taps is not None:
                taps.append(x)
            if tapped is not None and plan is not None:
                tapped.tap(i + 1, plan, x)
        return Streams(None if x.u is None else self.norm(x.u), None if x.g is None else self.norm_moe_gen(x.g))


class Qwen2ForCausalLM(nn.Module):
    """Only here so that keys equal the checkpoint's: language_model.model.*, language_model.lm_head.weight."""

    def __init__(self, cfg: LLMConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = Qwen2MoT(cfg, attention)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
