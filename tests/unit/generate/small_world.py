"""A small random BAGEL of another shape than the golden one, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch

import hyperbagel
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.generate.session import Parts
from hyperbagel.model.config import BagelConfig, BagelOptions, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder

TOKENIZER = Path(hyperbagel.__file__).parent / "assets" / "toybox"
CONFIG = BagelConfig(  # three heads over one, another patch, another stride than anything shipped
    llm=LLMConfig(
        hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=1024,
        max_position_embeddings=400,
    ),
    vit=ViTConfig(hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=40, patch_size=10),
    vae=VaeConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=2, downsample=2),
    options=BagelOptions(max_latent_size=12, vit_max_num_patch_per_side=4, default_size=(16, 16)),
)  # fmt: skip


def small_parts(dtype: torch.dtype = torch.float32) -> Parts:
    """Model (of `dtype`), autoencoder, tokenizer and transforms; always the same random weights."""
    torch.manual_seed(0)
    bagel = fresh_bagel(CONFIG, torch.Generator().manual_seed(0), std=0.3).eval().requires_grad_(False)
    with torch.no_grad():  # the velocity head starts at zero: give it something to say
        bagel.llm2vae.weight.copy_(torch.randn(bagel.llm2vae.weight.shape) * 0.1)
    vae, tokenizer = AutoEncoder(CONFIG.vae).eval(), Tokenizer.from_folder(TOKENIZER)
    return Parts(bagel.to(dtype), vae, tokenizer, ImageTransform(32, 8, 4), ImageTransform(40, 10, 10))
