"""The reference's training batch `train_mixed`, rebuilt as plans and packed by our code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from archive import GOLDEN
from numpy.typing import NDArray
from torch import Tensor

from hyperbagel.core.types import PackedBatch
from hyperbagel.data.packing import PackSpec, pack
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage
from hyperbagel.model.weights import load_tensors

# the tiny model's tokens and tables
SPEC = PackSpec(317, 318, 325, 326, vit_patch=14, vit_per_side=10, latent_patch=2, latent_stride=16, latent_per_side=8)
CAPTION = [97, 279, 100, 32, 312, 32, 111, 110, 263, 32, 98, 108, 117, 101, 32, 283, 102, 97, 46]
INSTRUCTION = [109, 97, 107, 101, 259, 298, 107, 121, 32, 103, 261, 280]
QUESTION = [119, 104, 278, 301, 296, 259, 300, 63]
ANSWER = [97, 279, 100, 32, 312]


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] in [-1, 1] back to the uint8 [H, W, 3] it came from."""
    return ((image.movedim(0, -1) * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()


def from_patches(patches: Tensor, h: int, w: int, p: int = 14) -> NDArray[np.uint8]:
    return to_pixels(patches.reshape(h, w, p, p, 3).permute(4, 0, 2, 1, 3).reshape(3, h * p, w * p))


def golden_samples(golden: dict[str, Tensor]) -> list[Sample]:
    """T2I, edit and question; the plans of the reference's three samples."""
    vae = [to_pixels(golden["padded_images"][i, :, : 16 * h, : 16 * w]) for i, (h, w) in enumerate(((3, 4), (2, 2), (2, 3)))]
    edit_vit, ask_vit = golden["packed_vit_tokens"].split([9, 12])
    return [
        [Text(CAPTION), VaeImage(vae[0], loss=True)],
        [VaeImage(vae[1]), VitImage(from_patches(edit_vit, 3, 3)), Text(INSTRUCTION), VaeImage(vae[2], loss=True)],
        [VitImage(from_patches(ask_vit, 3, 4)), Text(QUESTION), Text(ANSWER, loss=True)],
    ]


def golden_train_batch(rows: str = "packed") -> PackedBatch:
    """`train_mixed` with the reference's own latents, noise and timesteps. rows: "packed" (one row, as the reference) or "one"."""
    golden = load_tensors(GOLDEN / "fp32" / "train_mixed.safetensors")

    def encode(pixels: Tensor) -> Tensor:  # looks up what the reference's VAE gave; its pictures were padded to one size
        found = []
        for image in pixels:
            _, height, width = image.shape
            match = [torch.equal(image, known[:, :height, :width]) for known in golden["padded_images"]]
            found.append(golden["padded_latent"][match.index(True), :, : height // 8, : width // 8])
        return torch.stack(found)

    samples = golden_samples(golden)
    batch = pack(samples, SPEC, encode=encode, generator=torch.Generator().manual_seed(0), rows=rows, row_tokens=256)  # type: ignore[arg-type]
    # the file holds the normal draws before the sigmoid (-inf for a clean latent), its shift is 1
    return replace(batch, noise=golden["flow_noise"], timesteps=golden["packed_timesteps"].sigmoid())
