"""Masked edits: a mask says where an edit may change its picture; everything else stays the source's, pixel for pixel.

Two things ensure that. During denoising a latent token outside the mask moves straight from its noise to the source's clean latent,
whatever the model says, so that the model sees the surroundings it has to fit into. At the end the source's own pixels are laid over the
result outside the mask, since the autoencoder would change them slightly.

BAGEL itself has no masks: its weights are not told of them. A one-step student never sees the surroundings in its latents (its only
evaluation is at pure noise), so for it the mask is the laying over alone.

Shape legend: B requests, N latent tokens of the largest picture, C values of a token, h, w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.data.transforms import to_tensor
from hyperbagel.flow.path import velocity as straight
from hyperbagel.flow.solvers import Velocity
from hyperbagel.generate.session import Parts, encode_latents
from hyperbagel.generate.types import ImageRequest


@dataclass(frozen=True)
class Kept:
    """What one picture keeps. edit [h * w] bool: tokens that the model draws; clean [h * w, C]: latents of the source."""

    edit: Tensor
    clean: Tensor


class MaskedVelocity:
    """velocity(x_t, t) of the model where `edit`, and of the straight path noise - clean elsewhere: x_t = (1 - t) clean + t noise there."""

    def __init__(self, velocity: Velocity, kept: Sequence[Kept | None], noise: Tensor) -> None:
        """noise [B, N, C]: where denoising starts. kept: None for a picture that keeps nothing."""
        self.velocity = velocity
        self.edit = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
        self.path = torch.zeros_like(noise)
        for row, one in enumerate(kept):
            if one is not None:
                n = len(one.edit)
                self.edit[row, :n] = one.edit.to(noise.device)
                self.path[row, :n] = straight(one.clean.to(noise), noise[row, :n])
        self.edit = self.edit.unsqueeze(-1)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return torch.where(self.edit, self.velocity(x, t), self.path)


def check_mask(mask: Image.Image, source: Image.Image) -> None:
    """Raises InputError for a mask of another size than its picture, or one that lets nothing change."""
    if mask.size != source.size:
        told = f"got a mask of {mask.width}x{mask.height} for a picture of {source.width}x{source.height}"
        raise InputError(f"{told}, expected equal sizes; draw the mask over the picture itself")
    if mask.convert("L").getextrema()[1] == 0:
        raise InputError("got a mask that lets nothing change, expected some part to edit; mark one, or leave the mask out")


def edited_tokens(mask: Image.Image, grid: tuple[int, int]) -> Tensor:
    """[h * w] bool: tokens with a pixel that may change. A token on the border is drawn whole; `lay_over` cuts it to the pixel."""
    h, w = grid
    if mask.width % w or mask.height % h:
        mask = mask.resize((w * max(1, mask.width // w), h * max(1, mask.height // h)), Image.Resampling.BOX)
    values = torch.from_numpy(np.array(mask.convert("L")))
    return values.view(h, mask.height // h, w, mask.width // w).amax((1, 3)).flatten() > 0


def lay_over(result: Image.Image, source: Image.Image, mask: Image.Image, soft: float) -> Image.Image:
    """The result where the mask allows it, the source elsewhere, all of the result's size.

    soft: pixels over which the border inside the mask fades. Outside the mask every pixel is exactly the source's.
    """
    source = source if source.size == result.size else source.resize(result.size, Image.Resampling.BICUBIC)
    mask = mask.convert("L")
    mask = mask if mask.size == result.size else mask.resize(result.size, Image.Resampling.BOX)
    return Image.composite(result, source, ImageChops.darker(mask, mask.filter(ImageFilter.GaussianBlur(soft))))


def kept_of(parts: Parts, request: ImageRequest, grid: tuple[int, int]) -> Kept | None:
    """What a request's mask keeps: latents of the first picture at the result's size, the posterior's mean. None without a mask."""
    if request.mask is None:
        return None
    stride = parts.model.config.latent_stride
    size = grid[1] * stride, grid[0] * stride
    source = first_picture(request)
    source = source if source.size == size else source.resize(size, Image.Resampling.BICUBIC)
    pixels = to_tensor(np.asarray(source, dtype=np.uint8))
    return Kept(edited_tokens(request.mask, grid), encode_latents(parts, pixels)[0][0].cpu())


def masked(parts: Parts, request: ImageRequest, image: Image.Image) -> Image.Image:
    """A result with the source's pixels outside the request's mask, if there is one."""
    if request.mask is None:
        return image
    return lay_over(image, first_picture(request), request.mask, parts.model.config.latent_stride / 8)


def first_picture(request: ImageRequest) -> Image.Image:
    """The picture that a mask belongs to. Raises InputError if there is none."""
    for item in request.items():
        if isinstance(item, Image.Image):
            return item
    raise InputError("got a mask without a picture, expected the picture to edit as well; leave the mask out to draw")
