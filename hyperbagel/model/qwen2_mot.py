"""Qwen2 as a mixture of transformers: two experts, one attention.

Tokens travel as two streams that never mix outside attention: u (text, ViT tokens, vision markers; plain weights) and g (VAE latents;
`_moe_gen` weights). There is no router and no scatter: attention does not depend on the order of its keys.

Shape legend: B rows, Su / Sg tokens of the streams, S = Su + Sg, E hidden size, Hq / Hk heads, D values of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperbagel.model.config import LLMConfig
from hyperbagel.nn.attention import attend, prepared, readers
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.layers import MLP, RMSNorm, embedding, rope_table, rotate
from hyperbagel.nn.projections import Projections


class Streams(NamedTuple):
    """u [B, Su, E] for the understanding expert, g [B, Sg, E] for the generation expert; either may be absent."""

    u: Tensor | None
    g: Tensor | None


class Sight(NamedTuple):
    """What attention needs besides the tokens: RoPE's cos and sin [B, S, 1, D]; who sees whom; at inference a cache and its plan."""

    cos: Tensor
    sin: Tensor
    mask: Any = None
    causal: bool = False
    cache: KVCache | None = None
    plan: Plan | None = None
    backend: str = "sdpa"


EXPERTS = ("", "_moe_gen")  # suffixes of the layers' names, for the streams u and g


class SelfAttention(Projections):
    """Each expert has projections and norms of its own; all tokens attend together. Streams [B, Su, E] and [B, Sg, E] -> the same."""

    def __init__(self, cfg: LLMConfig) -> None:
        super().__init__(cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, EXPERTS)
        self.attend = attend  # an attribute, so that training can keep it out of a compiled graph
        e, q, kv = cfg.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj, self.q_proj_moe_gen = nn.Linear(e, q), nn.Linear(e, q)
        self.k_proj, self.k_proj_moe_gen = nn.Linear(e, kv), nn.Linear(e, kv)
        self.v_proj, self.v_proj_moe_gen = nn.Linear(e, kv), nn.Linear(e, kv)
        self.o_proj, self.o_proj_moe_gen = nn.Linear(q, e, bias=False), nn.Linear(q, e, bias=False)
        self.q_norm, self.q_norm_moe_gen = RMSNorm(self.head_dim, cfg.rms_norm_eps), RMSNorm(self.head_dim, cfg.rms_norm_eps)
        self.k_norm, self.k_norm_moe_gen = RMSNorm(self.head_dim, cfg.rms_norm_eps), RMSNorm(self.head_dim, cfg.rms_norm_eps)

    def forward(self, x: Streams, sight: Sight, layer: int, wanted: str = "ug") -> Streams:
        """`wanted`: streams whose output is computed; the others only contribute keys and values, and come back as None. "last": u's last
        token alone."""
        parts = [self.project(part, expert) for part, expert in zip(x, EXPERTS) if part is not None]
        qk, v = parts[0] if len(parts) == 1 else (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        qk, v = rotate(qk, sight.cos, sight.sin).transpose(1, 2), v.transpose(1, 2)  # [B, H, S, D]
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        if sight.cache is not None and sight.plan is not None:
            k, v = sight.cache.append(layer, sight.plan, k, v)
        su = 0 if x.u is None else x.u.shape[1]
        first, last = (0 if "u" in wanted else su), (q.shape[2] if "g" in wanted else su)
        if wanted == "last":
            first, last = su - 1, su
        mask, causal = sight.mask, sight.causal
        if last - first < q.shape[2]:
            if first == last:
                return Streams(None, None)
            assert not causal or first + 1 == q.shape[2], "got a causal plan for a part of the streams, expected a mask"
            causal = False  # the last token sees all
            q = q[:, :, first:last]
            mask = mask[..., first:last, :] if isinstance(mask, Tensor) and mask.shape[-2] > 1 else mask
        out = self.attend(q, k, v, mask, causal, sight.backend).transpose(1, 2).flatten(2)  # [B, S, Hq D]
        # `view`: a one-row slice has an arbitrary batch stride. FSDP2 normalises it in a forward but not where a layer is run again for
        # its gradient (`recompute`), and the shapes saved for the products would then differ.
        u, g = (part.view(part.shape) if part.shape[1] else None for part in (out[:, : su - first], out[:, su - first :]))
        return Streams(None if u is None else self.o_proj(u), None if g is None else self.o_proj_moe_gen(g))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each token through its own expert. Streams [B, Su, E] and [B, Sg, E] -> the same, if `wanted`."""

    def __init__(self, cfg: LLMConfig) -> None:
        super().__init__()
        e, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.self_attn = SelfAttention(cfg)
        self.mlp, self.mlp_moe_gen = MLP(e, cfg.intermediate_size), MLP(e, cfg.intermediate_size)
        self.input_layernorm, self.input_layernorm_moe_gen = RMSNorm(e, eps), RMSNorm(e, eps)
        self.post_attention_layernorm, self.post_attention_layernorm_moe_gen = RMSNorm(e, eps), RMSNorm(e, eps)

    def forward(self, x: Streams, sight: Sight, layer: int, wanted: str = "ug") -> Streams:
        normed = Streams(
            None if x.u is None else self.input_layernorm(x.u),
            None if x.g is None else self.input_layernorm_moe_gen(x.g),
        )
        mixed = self.self_attn(normed, sight, layer, wanted)
        u = g = None
        if x.u is not None and mixed.u is not None:
            u = x.u[:, -mixed.u.shape[1] :] + mixed.u
            u = u + self.mlp(self.post_attention_layernorm(u))
        if mixed.g is not None:
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
        wanted: str = "ug",
    ) -> Streams:
        """All layers and the final norms.

        Args:
            positions: [B, S] for RoPE, in stream order [u | g].
            mask: who sees whom where there is no cache; with one, `plan` says it.
            backend: replaces the attention that the model was made with.
            taps: collects the output of every layer. A cache with taps keeps the layers that it was made for.
            wanted: streams to return, "ug", "g", "last" (u's last token alone) or "" (a context read for its keys and values alone). The
                last layer leaves out what only the others would need.
        """
        some = x.u if x.u is not None else x.g
        assert some is not None, "a forward needs tokens"
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta, some.dtype)
        backend, causal = backend or self.attention, False
        if cache is not None and plan is not None:
            mask, causal = prepared(plan.mask, plan.causal, positions.shape[1], plan.visible, some, backend)
        sight = Sight(cos, sin, mask, causal, cache, plan, backend)
        tapped = cache if cache is not None and cache.taps else None
        if taps is not None or (tapped is not None and len(self.layers) in tapped.taps):
            wanted = "ug"
        if tapped is not None and plan is not None:
            tapped.tap_positions(plan, positions)
            tapped.tap(0, plan, x)
        texts = x.g is None and some.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with readers() if texts else nullcontext():
            for i, layer in enumerate(self.layers):
                if self.recompute and torch.is_grad_enabled():
                    x = checkpoint(layer, x, sight, i, use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is drawn
                else:
                    x = layer(x, sight, i, wanted if i + 1 == len(self.layers) else "ug")
                if taps is not None:
                    taps.append(x)
                if tapped is not None and plan is not None:
                    tapped.tap(i + 1, plan, x)
        return Streams(None if x.u is None else self.norm(x.u), None if x.g is None else self.norm_moe_gen(x.g))


class Qwen2ForCausalLM(nn.Module):
    """Exists so that keys equal the checkpoint's: language_model.model.*, language_model.lm_head.weight."""

    def __init__(self, cfg: LLMConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = Qwen2MoT(cfg, attention)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
