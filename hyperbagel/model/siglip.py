"""The SigLIP vision tower, as BAGEL uses it (patch conv stored as a Linear, one layer fewer than the config says).

Shape legend: Nv patches of all images, M images, L patches of the largest image, P values of a patch, V width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.model.config import ViTConfig
from hyperbagel.nn.attention import attend
from hyperbagel.nn.layers import embedding


class Embeddings(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(cfg.num_channels * cfg.patch_size**2, cfg.hidden_size)
        self.position_embedding = embedding(cfg.positions_per_side**2, cfg.hidden_size)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding(positions)


class Attention(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(cfg.hidden_size, cfg.hidden_size) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = FeedForward(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.layers_used))


class VisionTransformer(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg)
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, patches: Tensor, positions: Tensor, lens: Sequence[int]) -> Tensor:
        """patches [Nv, P], positions [Nv], `lens` patches of each image -> [Nv, V]. An image sees only itself."""
        x = self.embeddings(patches, positions)
        longest = max(lens)
        if min(lens) == longest:
            slots, mask = None, None
            x = x.unflatten(0, (len(lens), longest))
        else:
            inside = torch.arange(longest, device=x.device) < torch.tensor(lens, device=x.device)[:, None]  # [M, L]
            slots, mask = inside.flatten().nonzero().squeeze(1), inside[:, None, None, :]
            x = x.new_zeros(len(lens) * longest, x.shape[-1]).index_copy(0, slots, x).unflatten(0, (len(lens), longest))
        for layer in self.encoder.layers:
            x = layer(x, mask)
        x = self.post_layernorm(x).flatten(0, 1)
        return x if slots is None else x.index_select(0, slots)


class SiglipVisionModel(nn.Module):
    """Exists so that keys equal the checkpoint's: vit_model.vision_model.*"""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.config = cfg
        self.vision_model = VisionTransformer(cfg)

    def forward(self, patches: Tensor, positions: Tensor, lens: Sequence[int]) -> Tensor:
        return self.vision_model(patches, positions, lens)
