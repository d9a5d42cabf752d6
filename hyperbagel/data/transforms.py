"""Picture sizes, pixel values, patches and their positions, as BAGEL defines them.

Shape legend: H, W pixels; h, w patches or latent tokens; p, q inside a patch; c channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024


@dataclass(frozen=True)
class ImageTransform:
    """Resize rule of one encoder: BAGEL's VAE is (1024, 512, 16), its ViT (980, 224, 14).

    Attributes:
        max_size: upper limit of the longer side after resizing, in pixels.
        min_size: lower limit of the shorter side; a long strip stays below it, because `max_size` and `max_pixels` take precedence.
        stride: both sides become multiples of it.
        max_pixels: upper limit of the area, divided by the number of pictures in the sample.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = DEFAULT_MAX_PIXELS

    def size(self, width: int, height: int, pictures: int = 1) -> tuple[int, int]:
        """New (width, height) in pixels."""
        scale = min(self.max_size / max(width, height), 1.0)
        scale = max(scale, self.min_size / min(width, height))
        width, height = self._scaled(width, height, scale)
        cap = self.max_pixels / pictures
        if width * height > cap:
            # The factor is the ratio of the AREAS, not its root: that shrinks too much, but it is what the weights were trained with.
            width, height = self._scaled(width, height, cap / (width * height))
        if max(width, height) > self.max_size:
            width, height = self._scaled(width, height, self.max_size / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        def side(value: int) -> int:
            return max(self.stride, round(round(value * scale) / self.stride) * self.stride)

        return side(width), side(height)

    def resize(self, image: Image.Image, pictures: int = 1) -> Image.Image:
        """Resized, bicubic with antialiasing (Pillow widens its filter when it shrinks)."""
        size = self.size(image.width, image.height, pictures)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def pixels(self, image: Image.Image, pictures: int = 1) -> NDArray[np.uint8]:
        """The resized picture as uint8 [H, W, 3], as plans hold it: a quarter of the memory of floats."""
        return np.asarray(self.resize(image, pictures), dtype=np.uint8)

    def __call__(self, image: Image.Image, pictures: int = 1) -> Tensor:
        """The resized picture as float [3, H, W] in [-1, 1]."""
        return to_tensor(self.pixels(image, pictures))


@dataclass(frozen=True)
class InTurn:
    """Two resize rules in turn, as a session reads a picture that it is asked about: first the latents' rule, so that latents and patches
    would show the same pixels, then the ViT's. Here the number of pictures makes no difference."""

    first: ImageTransform
    then: ImageTransform

    def pixels(self, image: Image.Image, pictures: int = 1) -> NDArray[np.uint8]:
        """As `ImageTransform.pixels`."""
        return self.then.pixels(self.first.resize(image))


def to_tensor(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 [..., H, W, 3] to float [..., 3, H, W]: (x / 255 - 0.5) / 0.5. A tensor stays on its device."""
    x = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels)
    x = x.movedim(-1, -3).to(torch.float32, copy=True)
    return x.div_(255).sub_(0.5).div_(0.5)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[..., c, H, W] to [..., h*w, patch*patch*c]; the values of a patch come in the order (p, q, c)."""
    *lead, c, height, width = x.shape
    h, w = height // patch, width // patch
    x = x.reshape(*lead, c, h, patch, w, patch)
    n = len(lead)
    x = x.permute(*range(n), n + 1, n + 3, n + 2, n + 4, n)  # h w p q c
    return x.reshape(*lead, h * w, patch * patch * c)


def grid_positions(h: int, w: int, max_per_side: int, interpolate: bool = False) -> Tensor:
    """Ids of an h x w grid in a position table of max_per_side^2 rows: row * max_per_side + column, [h*w].

    With `interpolate` the grid is spread over the whole table (`interpolate_pos` of a checkpoint's configuration).
    """
    rows, cols = torch.arange(h), torch.arange(w)
    if interpolate:  # the bucket k/max_per_side that i/h falls into, in integer arithmetic
        rows, cols = rows * max_per_side // h, cols * max_per_side // w
    return (rows[:, None] * max_per_side + cols).flatten()
