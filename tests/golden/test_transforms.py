"""Resize rules, pixels, patches and positions against the reference's."""

import json

import pytest
import torch
from archive import GOLDEN
from PIL import Image

from hyperbagel.data.transforms import ImageTransform, grid_positions, patchify
from hyperbagel.model.weights import load_tensors

VAE, VIT = ImageTransform(64, 32, 16), ImageTransform(112, 28, 14)  # the golden data's own

REAL_SIZES = {
    "vae_1024_512_16": (ImageTransform(1024, 512, 16), 1),
    "vit_980_224_14": (ImageTransform(980, 224, 14), 1),
    "vit_gedit_980_378_14": (ImageTransform(980, 378, 14), 1),
    "vlm_eval_980_378_14_2007040": (ImageTransform(980, 378, 14, 2_007_040), 1),
    "train_edit_vit_518_224_14": (ImageTransform(518, 224, 14), 1),
    "vit_980_224_14_img_num4": (ImageTransform(980, 224, 14), 4),
}


def test_resize_table() -> None:
    table = json.loads((GOLDEN / "fp32" / "resize_table.json").read_text())
    assert len(table) == 15
    for row in table:
        for name, (transform, pictures) in REAL_SIZES.items():
            assert list(transform.size(*row["wh"], pictures)) == row[name], (name, row["wh"])
        after_vae = REAL_SIZES["vit_980_224_14"][0].size(*REAL_SIZES["vae_1024_512_16"][0].size(*row["wh"]))
        assert list(after_vae) == row["vit_980_224_14_after_vae"], row["wh"]


@pytest.mark.parametrize("i", range(4))
def test_pixels_patches_positions(i: int) -> None:
    golden = load_tensors(GOLDEN / "fp32" / "transforms.safetensors")
    image = Image.fromarray(golden[f"in.{i}"].numpy())
    vae, vit = VAE(image), VIT(image)
    assert torch.equal(vae, golden[f"vae.{i}"])
    assert torch.equal(vit, golden[f"vit.{i}"])
    patches = patchify(vit, 14)
    assert torch.equal(patches, golden[f"vit_patches.{i}"])
    h, w = vit.shape[1] // 14, vit.shape[2] // 14
    assert torch.equal(grid_positions(h, w, 10), golden[f"vit_pos.{i}"])
    h, w = vae.shape[1] // 16, vae.shape[2] // 16
    assert torch.equal(grid_positions(h, w, 8), golden[f"vae_pos.{i}"])
    assert torch.equal(grid_positions(h, w, 8, interpolate=True), golden[f"vae_pos_interp.{i}"])
