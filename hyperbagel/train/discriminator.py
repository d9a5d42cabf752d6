"""Multi-head discriminators: in latent space over a trainable copy of a student, in pixel space over the base's frozen ViT.

Shape legend: B samples, N = h * w tokens of a grid, C values of a latent token, E hidden size, V hidden size of the ViT.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.data.transforms import grid_positions, patchify
from hyperbagel.generate.session import image_transform
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.model.student import Student
from hyperbagel.train.contexts import Conditions, Scales, student_velocity


class Head(nn.Module):
    """Features [B, N, E] of an h x w grid to one judgement per token, [B, N]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.inner = nn.Conv2d(size, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.norm(x.float()).transpose(1, 2).unflatten(2, grid)  # [B, E, h, w]
        return self.out(F.silu(self.inner(x))).flatten(1)


def depths_of(layers: int, heads: int) -> list[int]:
    """`heads` layer numbers (from 0), evenly spread, the last layer included; fewer if there are fewer layers. 8, 4: 1, 3, 5, 7."""
    heads = min(heads, layers)
    return [round((i + 1) * layers / heads) - 1 for i in range(heads)]


class LatentDiscriminator(nn.Module):
    """3.2.2: a trainable backbone that begins as a copy of `start` (in the paper the teacher), and a small head at each of several depths.

    Only the adapter, the embedders and the heads are its own; the base's tensors are shared.
    """

    def __init__(self, base: Bagel, start: Student, heads: int = 4, width: int = 64) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(start).requires_grad_(True)
        self.network = self.backbone.network(base)
        llm = base.config.llm
        self.depths = depths_of(llm.num_hidden_layers, heads)
        self.heads = nn.ModuleList(Head(llm.hidden_size, width) for _ in self.depths)

    def forward(self, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor) -> list[Tensor]:
        """Judgements of latents x [B, N, C] at noise level t [B]: [B, N] from each head; positive means real."""
        return self.look(conditions, scales, x, t)[1]

    def look(self, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The backbone's own velocity [B, N, C], and the judgements as in `forward`."""
        taps: list[Streams] = []
        v = student_velocity(self.network, conditions, scales, x, t, taps)
        judged = []
        for head, depth in zip(self.heads, self.depths, strict=True):
            features = taps[depth].g
            assert features is not None
            judged.append(head(features, conditions.grid))
        return v, judged


def vit_input(base: Bagel, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Pictures [B, 3, H, W] in [-1, 1] as ViT patches [B h w, P], their positions [B h w], and (h, w). They are resized as the base resizes
    pictures that it is asked about."""
    patch, options = base.config.vit.patch_size, base.config.options
    height, width = pixels.shape[2:]
    width, height = image_transform(options.vit_transform).size(width, height)
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    h, w = height // patch, width // patch
    where = grid_positions(h, w, options.vit_max_num_patch_per_side, options.interpolate_pos).repeat(len(pixels)).to(pixels.device)
    return patchify(pixels, patch).flatten(0, 1), where, (h, w)


def vit_features(base: Bagel, pixels: Tensor, depths: Sequence[int]) -> tuple[list[Tensor], tuple[int, int]]:
    """Outputs [B, h w, V] of the layers `depths` of the base's ViT, and (h, w). Gradients pass to the pixels."""
    patches, where, grid = vit_input(base, pixels)
    vit = base.vit_model.vision_model
    x = vit.embeddings(patches.to(base.dtype), where).unflatten(0, (len(pixels), -1))
    found = []
    for i, layer in enumerate(vit.encoder.layers):
        x = layer(x, None)
        if i in depths:
            found.append(x)
    return found, grid


class PixelDiscriminator(nn.Module):
    """3.2.4: judges decoded pictures. ours: features of the model's own frozen ViT (DMDX takes a segmentation model's)."""

    def __init__(self, base: Bagel, heads: int = 2, width: int = 64) -> None:
        super().__init__()
        vit = base.config.vit
        self.depths = depths_of(vit.layers_used, heads)
        self.heads = nn.ModuleList(Head(vit.hidden_size, width) for _ in self.depths)

    def forward(self, base: Bagel, pixels: Tensor) -> list[Tensor]:
        """Judgements of pictures [B, 3, H, W] in [-1, 1]: [B, h w] from each head."""
        found, grid = vit_features(base, pixels, self.depths)
        return [head(x, grid) for head, x in zip(self.heads, found, strict=True)]
