"""Representation alignment in training: a frozen vision encoder's features of each clean picture, resampled onto its noise tokens.

The loss is in losses/alignment.py; stage base uses both (`align` in its recipe).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hyperbagel.core.config import Config
from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import fast_bf16
from hyperbagel.core.types import PackedBatch
from hyperbagel.data.transforms import grid_positions, patchify
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.train.distill import seeded
from hyperbagel.train.folder import load_vit
from hyperbagel.train.losses.alignment import Projector, alignment_loss


class Alignment(Config):
    """Representation alignment of the noise tokens with what a frozen vision encoder sees in the clean picture."""

    vit: Path  # folder that stage vit exported
    layer: int = Field(default=4, ge=1)  # the decoder layer whose output is compared, counted from 1
    weight: float = Field(default=0.5, gt=0)


class Aligner:
    """The frozen encoder, the projector that is trained along with the model, and their loss."""

    def __init__(self, config: Alignment, model: Bagel, device: torch.device) -> None:
        layers = model.config.llm.num_hidden_layers
        if config.layer > layers:
            raise InputError(f"align.layer: got {config.layer}, expected 1 to {layers}, the model has no more layers")
        self.config, self.device = config, device
        self.vit = load_vit(config.vit, device).eval()
        self.shape = self.vit.config
        options = model.config.options
        self.per_side, self.interpolate = options.vit_max_num_patch_per_side, options.interpolate_pos
        self.stride = model.config.latent_stride // options.latent_patch_size  # pixels per cell of the autoencoder
        with seeded(0):
            self.projector = Projector(model.config.llm.hidden_size, options.latent_patch_size**2 * self.shape.hidden_size).to(device)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, H, W] to features [n, V, H / stride, W / stride], on the autoencoder's grid."""
        n, _, height, width = pixels.shape
        h, w = (max(1, round(side / self.shape.patch_size)) for side in (height, width))
        fitted = (h * self.shape.patch_size, w * self.shape.patch_size)
        if fitted != (height, width):
            pixels = F.interpolate(pixels, fitted, mode="bilinear", antialias=True, align_corners=False)
        patches = patchify(pixels.to(self.device), self.shape.patch_size)
        where = grid_positions(h, w, self.per_side, self.interpolate).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            seen = self.vit(patches.flatten(0, 1), where.repeat(n), [h * w] * n)
        seen = seen.unflatten(0, (n, h, w)).permute(0, 3, 1, 2).float()
        cells = (height // self.stride, width // self.stride)
        return seen if cells == (h, w) else F.interpolate(seen, cells, mode="bilinear", align_corners=False)

    def loss(self, batch: PackedBatch, taps: list[Streams]) -> Tensor:
        """The alignment loss between the noise tokens' hidden states after `layer` and what the encoder sees at their places."""
        hidden = taps[self.config.layer - 1].g
        assert hidden is not None and batch.features is not None
        noisy = hidden.flatten(0, 1)[batch.latent_slots][batch.mse_index]
        # features of a latent token: its latent_patch_size^2 cells in the order (p, q, V), as patchify leaves them
        return alignment_loss(self.projector(noisy), batch.features[batch.mse_index], self.shape.hidden_size)
