"""Packed batches for a stage: loader, dropout, frozen VAE, packing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.types import PackedBatch
from hyperbagel.data.loader import BrokenRow, Loader, Prepare, Source
from hyperbagel.data.mixture import DataConfig, RowsConfig, build_loader
from hyperbagel.data.packing import Encode, Layout, PackSpec, fill, lay_out, stream_lengths
from hyperbagel.data.plan import Sample, apply_dropout
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import InTurn
from hyperbagel.generate.session import image_transform
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.train.contexts import split_sample
from hyperbagel.train.distributed import World
from hyperbagel.train.stage import HELD_OUT_SEED, Draws

log = logging.getLogger(__name__)

MAX_SKIPPED = 1000


def pack_spec(config: BagelConfig, tokenizer: Tokenizer) -> PackSpec:
    """What packing must know about a model."""
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


def posterior_encoder(vae: AutoEncoder, generator: torch.Generator, device: torch.device) -> Encode:
    """Pixels [n, 3, H, W] to latents, sampled from the posterior with noise from `generator`; no gradient, fp32.

    On a CPU 64 pictures of 64 x 64 at once, which fill its caches. On a GPU 256, padded to whole chunks: cuDNN takes a tenth of a second to
    plan each new shape, and a batch of edits rarely holds as many pictures as the one before.
    """
    many = 64 if device.type == "cpu" else 256

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        n, _, h, w = pixels.shape
        side, at_once = vae.config.downsample, max(1, many * 64 * 64 // (h * w))
        eps = torch.randn(n, vae.config.z_channels, h // side, w // side, generator=generator, device=generator.device).to(device)
        pixels = pixels.to(device)
        if device.type != "cpu" and n > 1:  # one picture alone has a shape of its own anyway
            pixels, eps = (torch.cat([x, x.new_zeros(-n % at_once, *x.shape[1:])]) for x in (pixels, eps))
        with torch.autocast(device.type, enabled=False):
            parts = [vae.encode(x, e) for x, e in zip(pixels.split(at_once), eps.split(at_once), strict=True)]
        return torch.cat(parts)[:n]

    return encode


@dataclass(frozen=True)
class NamedBatch:
    """A batch and the source it came from ("mixed" if several)."""

    source: str
    packed: PackedBatch


@dataclass(frozen=True)
class Kept:
    """What is left of a group after dropout and the length limit: its samples or, where a batch is one group, their layout instead.

    tokens: of what is left. skipped: samples that were too long, or of which dropout left nothing.
    """

    samples: list[Sample]
    tokens: int
    skipped: int
    layout: Layout | None = None


@dataclass(frozen=True)
class KeepGroup:
    """Makes a group's `Kept` where the group is read, that is in the workers if there are any. A pure function of the group's number."""

    data: RowsConfig
    spec: PackSpec
    seed: int
    rank: int

    def __call__(self, source: str, samples: list[Sample], number: int) -> Kept:
        dropout, rng = self.data.dropout.build(), Draws.at(self.seed, number, self.rank).python
        kept: list[Sample] = []
        tokens = 0
        for sample in samples:
            left = apply_dropout(sample, dropout, rng)
            length = sum(stream_lengths(left, self.spec))
            if 0 < length <= (self.data.sample_tokens or length):
                kept.append(left)
                tokens += length
        skipped = len(samples) - len(kept)
        if not kept or self.data.batch_tokens:
            return Kept(kept, tokens, skipped)
        return Kept([], tokens, skipped, self.laid_out(kept))

    def laid_out(self, samples: list[Sample]) -> Layout:
        return lay_out(samples, self.spec, rows=self.data.rows, row_tokens=self.data.row_tokens, pad_to=self.data.pad_to)


def open_loader(
    data: DataConfig,
    model: BagelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    world: World | None = None,
    prepare: Prepare | None = None,
    as_served: bool = False,
) -> Loader:
    """The loader of a recipe's data with a model's own resize rules; with `world`, for this rank's part. prepare: see Loader.

    as_served: the ViT sees pictures after the latents' resize rule, as in requests (at 7B a 336 x 336 picture then has 1,369 patches),
    instead of the files' own sizes, as in BAGEL's training (576); samples longer than the model's context are broken rows.
    """
    world, options = world or World(), model.options
    vae, vit = map(image_transform, (options.vae_transform, options.vit_transform))
    seen = InTurn(vae, vit) if as_served else vit
    fits = FitsContext(pack_spec(model, tokenizer), model.llm.max_position_embeddings) if as_served else None
    return build_loader(data, tokenizer, vae, seen, seed=seed, rank=world.rank, world=world.size, prepare=prepare, check=fits)


@dataclass(frozen=True)
class FitsContext:
    """Whether a sample fits the context of the model that is to read it: what stands before the picture to draw, and that picture once."""

    spec: PackSpec
    limit: int

    def __call__(self, sample: Sample) -> None:
        """Raises BrokenRow if it does not."""
        before, picture, _ = split_sample(sample)
        if (tokens := sum(stream_lengths([*before, picture], self.spec))) > self.limit:
            raise BrokenRow(f"got a sample of {tokens} tokens, expected at most {self.limit}, the model's context")


def held_out_groups(data: DataConfig, number: int, open_: Callable[[DataConfig, int], Loader]) -> Iterator[tuple[Loader, Draws]]:
    """What a stage is measured on: for each group the loader that it is next from, and its draws. As many of each source, whatever the
    mixture. open_: called with (data, seed)."""
    for source in data.single_sources():
        loader = open_(source, HELD_OUT_SEED)
        warn_of_repeats(loader.sources, number * sum(loader.group.values()), "held_out_groups")
        for i in range(number):
            yield loader, Draws.at(HELD_OUT_SEED, i)
        loader.close()


def warn_of_repeats(sources: Mapping[str, Source], wanted: int, key: str) -> None:
    """Warns if so many held-out samples need rows twice. key: the recipe's, that says how many."""
    rows = [len(source) for source in sources.values()]
    if all(rows) and sum(rows) < wanted:  # 0: endless
        log.warning(
            "held_out: got %d rows in %s, expected %d; rows count twice, add some or lower %s", sum(rows), ", ".join(sources), wanted, key
        )


class Batches:
    """Endless batches. `state` is the position; all randomness comes from the `Draws` of each call and the groups' numbers."""

    def __init__(
        self,
        data: RowsConfig,
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
        self.see = see  # as in data.packing.pack
        self.data, self.vae, self.device, self.shift = data, vae, device, shift
        self.spec, self.world = pack_spec(model, tokenizer), world or World()
        self.keep = KeepGroup(data, self.spec, seed, self.world.rank)
        self.loader = open_loader(data, model, tokenizer, seed=seed, world=self.world, prepare=self.keep)
        self.too_long = 0  # samples skipped so far

    def next(self, rng: Draws) -> NamedBatch:
        """The next batch on the device. Raises InputError if no sample fits the limits."""
        samples: list[Sample] = []
        names: set[str] = set()
        layout: Layout | None = None
        tokens = skipped = 0
        enough = False
        while not enough:
            group = self.loader.next_group()
            kept: Kept = group.made
            skipped += kept.skipped
            if layout is None:  # else this batch is complete and only waits for the other ranks'
                samples, layout, tokens = [*samples, *kept.samples], kept.layout, tokens + kept.tokens
                if kept.tokens:
                    names.add(group.source)
            some = layout is not None or bool(samples)
            full = layout is not None or tokens >= self.data.batch_tokens
            # All ranks stop at the same group, once one of them is full and each has something: a checkpoint stores one position for all.
            enough = self.world.all(some) and not self.world.all(not full)
            if skipped > MAX_SKIPPED:
                raise InputError(
                    f"batch: got {skipped} samples longer than {self.data.sample_tokens} tokens, expected shorter ones, "
                    "raise data.sample_tokens or shrink the pictures"
                )
        self.too_long += skipped
        generator = rng.on(self.device)
        packed = fill(
            layout or self.keep.laid_out(samples),
            self.spec,
            encode=posterior_encoder(self.vae, generator, self.device),
            generator=generator,
            shift=self.shift,
            see=self.see,
            device=self.device,
        )
        return NamedBatch(names.pop() if len(names) == 1 else "mixed", packed)

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "too_long": self.too_long}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.too_long = state["too_long"]

    def close(self) -> None:
        self.loader.close()
