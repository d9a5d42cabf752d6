"""Packed batches for a stage: loader, dropout, frozen VAE, packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.types import PackedBatch
from hyperbagel.data.mixture import DataConfig, build_loader
from hyperbagel.data.packing import Encode, PackSpec, pack, stream_lengths
from hyperbagel.data.plan import Sample, apply_dropout
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.generate.session import image_transform
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.train.distributed import World
from hyperbagel.train.stage import Draws

MAX_SKIPPED = 1000


def pack_spec(config: BagelConfig, tokenizer: Tokenizer) -> PackSpec:
    """What packing must know of a model."""
    options = config.options
    return PackSpec(
        im_start=tokenizer.im_start,
        im_end=tokenizer.im_end,
        vision_start=tokenizer.vision_start,
        vision_end=tokenizer.vision_end,
        vit_patch=config.vit.patch_size,
        vit_per_side=options.vit_max_num_patch_per_side,
        latent_patch=options.latent_patch_size,
        latent_stride=config.latent_stride,
        latent_per_side=options.max_latent_size,
        latent_values=config.latent_channels,
        interpolate=options.interpolate_pos,
    )


def posterior_encoder(vae: AutoEncoder, generator: torch.Generator, device: torch.device, chunk: int = 64) -> Encode:
    """Pixels [n, 3, H, W] to latents, sampled from the posterior with noise of `generator` (CPU); no gradient, fp32."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        n, _, h, w = pixels.shape
        side = vae.config.downsample
        eps = torch.randn(n, vae.config.z_channels, h // side, w // side, generator=generator)
        with torch.autocast(device.type, enabled=False):
            parts = [vae.encode(x.to(device), e.to(device)) for x, e in zip(pixels.split(chunk), eps.split(chunk), strict=True)]
        return torch.cat(parts)

    return encode


@dataclass(frozen=True)
class NamedBatch:
    """A batch and the source it came from ("mixed" if several)."""

    source: str
    packed: PackedBatch


class Batches:
    """Endless batches; the position is in `state`, all randomness in the `Draws` of each call."""

    def __init__(
        self,
        data: DataConfig,
        model: BagelConfig,
        tokenizer: Tokenizer,
        vae: AutoEncoder,
        *,
        seed: int,
        device: torch.device,
        shift: float,
        world: World | None = None,
        see: Encode | None = None,
    ) -> None:
        self.see = see  # see data.packing.pack
        self.data, self.vae, self.device, self.shift = data, vae, device, shift
        self.spec = pack_spec(model, tokenizer)
        self.dropout = data.dropout.build()
        options = model.options
        self.loader = build_loader(
            data,
            tokenizer,
            image_transform(options.vae_transform),
            image_transform(options.vit_transform),
            seed=seed,
            rank=(world or World()).rank,
            world=(world or World()).size,
        )
        self.too_long = 0  # samples left out by `sample_tokens`

    def next(self, rng: Draws) -> NamedBatch:
        """The next batch on the device. Raises InputError if no sample fits the limits."""
        samples: list[Sample] = []
        names: set[str] = set()
        tokens = skipped = 0
        while not samples or tokens < self.data.batch_tokens:
            group = self.loader.next_group()
            for sample in group.samples:
                kept = apply_dropout(sample, self.dropout, rng.python)
                length = sum(stream_lengths(kept, self.spec))
                if 0 < length <= (self.data.sample_tokens or length):
                    samples.append(kept)
                    names.add(group.source)
                    tokens += length
                else:
                    skipped += 1
            if skipped > MAX_SKIPPED:
                raise InputError(
                    f"batch: got {skipped} samples longer than {self.data.sample_tokens} tokens, expected shorter ones, "
                    "raise data.sample_tokens or shrink the pictures"
                )
        self.too_long += skipped
        packed = pack(
            samples,
            self.spec,
            encode=posterior_encoder(self.vae, rng.torch, self.device),
            generator=rng.torch,
            shift=self.shift,
            rows=self.data.rows,
            row_tokens=self.data.row_tokens,
            pad_to=self.data.pad_to,
            see=self.see,
        )
        return NamedBatch(names.pop() if len(names) == 1 else "mixed", packed.to(self.device))

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "too_long": self.too_long}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.too_long = state["too_long"]

    def close(self) -> None:
        self.loader.close()
