"""The packed training batch, which the data package fills and the model reads.

Shape legend: B rows of a batch, Su / Sg slots of the understanding / generation stream in a row, S = Su + Sg,
Nt text tokens, Nv ViT patches, Ng latent tokens, P values of a ViT patch, C values of a latent token (64 in BAGEL).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class PackedBatch:
    """Training sequences, split into the two streams of the mixture of transformers.

    Each row holds one or more samples. A row's understanding stream (text, ViT patches, vision markers) and its generation stream
    (VAE latents, clean or noisy) are padded separately, to Su and Sg; attention sees them concatenated, [understanding | generation].
    Attention does not depend on the order of its keys, so nothing is ever scattered back into reading order: `order` says
    who may see whom, `positions` is what RoPE uses. Flat slots index [B * Su] or [B * Sg].
    """

    su: int
    sg: int
    # understanding stream
    text_ids: Tensor  # [Nt] long
    text_slots: Tensor  # [Nt] long, flat
    vit_patches: Tensor  # [Nv, P] float
    vit_positions: Tensor  # [Nv] long, row * 70 + col in BAGEL
    vit_slots: Tensor  # [Nv] long, flat
    vit_lens: list[int]  # patches of each image, sums to Nv
    # generation stream
    latents: Tensor  # [Ng, C] float, clean x0
    noise: Tensor  # [Ng, C] float, e; unused where t = 0
    timesteps: Tensor  # [Ng] float, t after the shift; 0 for a clean latent
    latent_positions: Tensor  # [Ng] long, row * max_latent_size + col
    latent_slots: Tensor  # [Ng] long, flat
    # attention, over the concatenated streams
    positions: Tensor  # [B, S] long, RoPE
    sample_id: Tensor  # [B, S] long, -1 on padding
    split_id: Tensor  # [B, S] long, unique within a row
    order: Tensor  # [B, S] long, index in reading order within the row
    is_full: Tensor  # [B, S] bool: token of a full or noise split
    is_noise: Tensor  # [B, S] bool: token of a noise split
    # losses
    ce_slots: Tensor  # [Nce] long, flat in the understanding stream: predict from here
    ce_labels: Tensor  # [Nce] long
    ce_weights: Tensor  # [Nce] float
    mse_index: Tensor  # [Nmse] long, index into the Ng latent tokens
    features: Tensor | None = None  # [Ng, F] float, what a vision encoder sees where each latent token stands (representation alignment)

    @property
    def rows(self) -> int:
        return self.positions.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)
