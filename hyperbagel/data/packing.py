"""From plans to packed batches: tokens, positions, splits and losses of BAGEL's training sequences.

An edit sample in reading order (S start, E end, L latent, P patch, T text), its two streams, and which token sees which:

    S L L E | S P P E | T T T | S L L E        VAE full | ViT full | text causal | noise
    . . . .   . . . .   . . .   . . . .        understanding: S E S P P E T T T S E     generation: L L L L

    mask(q, k) = (k before q  OR  same full/noise split)  AND NOT (k in ANOTHER noise split)  AND  same sample

Shape legend: as in core.types; z channels of a latent. A split is one item's tokens, markers included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.types import PackedBatch
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage
from hyperbagel.data.transforms import grid_positions, patchify, to_tensor

Whole = NDArray[np.int64]
Encode = Callable[[Tensor], Tensor]  # pixels [n, 3, H, W] in [-1, 1] -> latents [n, z, H/8, W/8], scaled and shifted
Rows = Literal["one", "packed"]
UND, GEN = 0, 1


@dataclass(frozen=True)
class PackSpec:
    """What packing must know about a model: special tokens, patch sizes and the sides of the position tables."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    vit_patch: int = 14
    vit_per_side: int = 70
    latent_patch: int = 2
    latent_stride: int = 16
    latent_per_side: int = 64
    latent_values: int = 64  # C
    interpolate: bool = False


def stream_lengths(sample: Sample, spec: PackSpec) -> tuple[int, int]:
    """Tokens of a sample after dropout in the (understanding, generation) stream."""
    lengths = [0, 0]
    for item in sample:
        if item.dropped:
            continue
        lengths[UND] += 2  # start and end
        if isinstance(item, Text):
            lengths[UND] += len(item.ids)
        else:
            h, w = grid(item, spec)
            lengths[UND if isinstance(item, VitImage) else GEN] += h * w
    return lengths[UND], lengths[GEN]


def grid(item: VitImage | VaeImage, spec: PackSpec) -> tuple[int, int]:
    """(h, w) of a picture's patches or latent tokens. Raises InputError for a size that the model cannot take."""
    vit = isinstance(item, VitImage)
    stride, limit = (spec.vit_patch, spec.vit_per_side) if vit else (spec.latent_stride, spec.latent_per_side)
    height, width = item.pixels.shape[:2]
    h, w = height // stride, width // stride
    if h * stride != height or w * stride != width or max(h, w) > limit:
        name = "ViT" if vit else "VAE"
        raise InputError(
            f"{name} picture: got {width}x{height} pixels, expected multiples of {stride} up to {limit * stride} a side, "
            f"set the {name.lower()} transform of the recipe to fit the model"
        )
    return h, w


@dataclass
class _Cells:
    """Where the tokens of one kind are: parallel lists of row, start in the row's stream, and length."""

    row: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)

    def add(self, row: int, start: int, length: int) -> None:
        self.row.append(row)
        self.start.append(start)
        self.length.append(length)

    def slots(self, width: int) -> Whole:
        """Flat slots, [sum of lengths], in a stream of `width` slots per row."""
        base = np.asarray(self.row, np.int64) * width + np.asarray(self.start, np.int64)
        return _ramp(base, np.asarray(self.length, np.int64))


def _ramp(start: Whole, length: Whole) -> Whole:
    """The ranges start[i], start[i] + 1, ... of length[i] numbers each, concatenated."""
    ends = np.cumsum(length)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
    return np.repeat(start, length) + within


class _LayoutBuilder:
    """Collects runs (stretches of one kind of token), splits and cells while it reads plans; `fields` then expands them to tokens."""

    def __init__(self, spec: PackSpec) -> None:
        self.spec = spec
        self.runs: list[tuple[int, ...]] = []  # row, stream, start, length, order, position, step, sample, split, full, noise
        self.filled: Counter[tuple[int, int]] = Counter()  # (row, stream) -> tokens so far
        self.order: Counter[int] = Counter()  # row -> tokens so far
        self.splits: Counter[int] = Counter()  # row -> splits so far
        self.text, self.vit, self.latent, self.ce = _Cells(), _Cells(), _Cells(), _Cells()
        self.text_ids: list[int] = []
        self.labels: list[int] = []
        self.vit_items: list[VitImage] = []
        self.vae_items: list[VaeImage] = []

    def add_sample(self, row: int, number: int, sample: Sample) -> None:
        position = 0
        for item in sample:
            if isinstance(item, Text):
                if not item.dropped:  # a dropped text leaves no gap in the positions
                    self._add_text(row, number, item, position)
                    position += len(item.ids) + 2
            else:
                if not item.dropped:
                    self._add_picture(row, number, item, position)
                if not (isinstance(item, VaeImage) and item.loss):  # a dropped picture leaves a gap; a noise picture takes no position
                    position += 1

    def _run(
        self, row: int, stream: int, length: int, position: int, step: int, number: int, full: bool, noise: bool
    ) -> tuple[int, int, int]:
        start = self.filled[row, stream]
        self.runs.append((row, stream, start, length, self.order[row], position, step, number, self.splits[row], full, noise))
        self.filled[row, stream] += length
        self.order[row] += length
        return row, start, length

    def _add_text(self, row: int, number: int, item: Text, position: int) -> None:
        cell = self._run(row, UND, len(item.ids) + 2, position, 1, number, False, False)
        self.text.add(*cell)
        self.text_ids += [self.spec.im_start, *item.ids, self.spec.im_end]
        if item.loss:  # im_start and each id predict the next token; im_end predicts nothing
            self.ce.add(row, cell[1], cell[2] - 1)
            self.labels += [*item.ids, self.spec.im_end]
        self.splits[row] += 1

    def _add_picture(self, row: int, number: int, item: VitImage | VaeImage, position: int) -> None:
        h, w = grid(item, self.spec)
        mode = (position, 0, number, True, isinstance(item, VaeImage) and item.loss)
        self.text_ids += [self.spec.vision_start, self.spec.vision_end]
        self.text.add(*self._run(row, UND, 1, *mode))
        if isinstance(item, VitImage):
            self.vit.add(*self._run(row, UND, h * w, *mode))
            self.vit_items.append(item)
        else:
            self.latent.add(*self._run(row, GEN, h * w, *mode))
            self.vae_items.append(item)
        self.text.add(*self._run(row, UND, 1, *mode))
        self.splits[row] += 1

    def width(self, stream: int, pad_to: int) -> int:
        longest = max((n for (_, s), n in self.filled.items() if s == stream), default=0)
        return -(-longest // pad_to) * pad_to

    def fields(self, rows: int, su: int, sg: int) -> dict[str, NDArray[Any]]:
        """The batch's [B, S] fields; a row is [understanding (su) | generation (sg)]."""
        row, stream, start, length, order, position, step, sample, split, full, noise = np.asarray(self.runs, np.int64).T
        slots = _ramp(row * (su + sg) + stream * su + start, length)
        within = _ramp(np.zeros_like(length), length)

        def cast(values: Whole, padding: int = 0) -> Whole:
            out = np.full(rows * (su + sg), padding, np.int64)
            out[slots] = values
            return out.reshape(rows, su + sg)

        each = [np.repeat(values, length) for values in (position, step, sample, split, order, full, noise)]
        return {
            "positions": cast(each[0] + each[1] * within),
            "sample_id": cast(each[2], padding=-1),
            "split_id": cast(each[3], padding=-1),
            "order": cast(each[4] + within),
            "is_full": cast(each[5]).astype(bool),
            "is_noise": cast(each[6]).astype(bool),
        }


def assign_rows(lengths: Sequence[tuple[int, int]], layout: Rows, row_tokens: int) -> list[int]:
    """The row of each sample. "one": a row of its own.

    "packed": as many rows as give `row_tokens` tokens (both streams) per row on average. Each stream is padded to its fullest row. So,
    longest first, each sample joins the row where it widens the padded streams least, and among equals the emptiest one.
    """
    if layout == "one":
        return list(range(len(lengths)))
    sizes = np.asarray(lengths, np.float64)
    load = np.zeros((max(1, round(sizes.sum() / max(row_tokens, 1))), 2))
    rows = [0] * len(lengths)
    for i in np.argsort(-sizes.sum(axis=1), kind="stable"):
        width = np.maximum(load + sizes[i], load.max(axis=0)).sum(axis=1)
        row = int(np.lexsort((load.sum(axis=1), width))[0])
        load[row] += sizes[i]
        rows[i] = row
    used = sorted(set(rows))
    return [used.index(row) for row in rows]


@dataclass(frozen=True)
class Pictures:
    """The uint8 pictures of a batch, each distinct one once, those of one size together; and which of them each item shows."""

    stacks: list[NDArray[np.uint8]]  # [n, H, W, 3], one for each size
    shown: list[tuple[int, int]]  # (stack, row in it) for each item, in order

    @classmethod
    def of(cls, items: Sequence[VitImage | VaeImage]) -> Pictures:
        by_shape: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}
        places: dict[int, tuple[tuple[int, ...], int]] = {}
        for item in items:
            alike = by_shape.setdefault(item.pixels.shape, [])
            if id(item.pixels) not in places:
                places[id(item.pixels)] = (item.pixels.shape, len(alike))
                alike.append(item.pixels)
        number = {shape: i for i, shape in enumerate(by_shape)}
        shown = [(number[shape], row) for shape, row in (places[id(item.pixels)] for item in items)]
        return cls([np.stack(alike) for alike in by_shape.values()], shown)

    def tokens(self, read: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """The tokens of all items, [sum of N, C]. read: pixels [n, 3, H, W] in [-1, 1] on `device` to tokens [n, N, C]."""
        made = [read(to_tensor(torch.from_numpy(stack).to(device))) for stack in self.stacks]
        if len(made) == 1:
            return made[0][torch.tensor([row for _, row in self.shown], device=made[0].device)].flatten(0, 1)
        return torch.cat([made[stack][row] for stack, row in self.shown])


@dataclass(frozen=True)
class Layout:
    """The part of a batch that needs neither a model nor random draws, in NumPy: one process makes it and sends it to another quickly."""

    su: int
    sg: int
    arrays: dict[str, NDArray[Any]]  # fields of PackedBatch
    vit_lens: list[int]
    vit: Pictures
    vae: Pictures
    vae_tokens: list[int]  # number of tokens of each VAE picture
    noisy: list[bool]  # whether each VAE picture is to be denoised


def lay_out(samples: Sequence[Sample], spec: PackSpec, *, rows: Rows = "one", row_tokens: int = 0, pad_to: int = 1) -> Layout:
    """Decide where each token goes and what it sees. Arguments and errors: as of `pack`."""
    row_of = assign_rows([stream_lengths(s, spec) for s in samples], rows, row_tokens)
    built = _LayoutBuilder(spec)
    for number, (row, sample) in enumerate(zip(row_of, samples, strict=True)):
        built.add_sample(row, number, sample)
    if not built.runs:
        raise InputError("pack: got samples of which nothing is left, expected at least one token, lower the dropout or check the data")
    su, sg = built.width(UND, pad_to), built.width(GEN, pad_to)
    noisy = [item.loss for item in built.vae_items]
    answers = np.asarray(built.ce.length, np.int64)
    arrays = {
        "text_ids": np.asarray(built.text_ids, np.int64),
        "text_slots": built.text.slots(su),
        "vit_positions": _positions(built.vit_items, spec),
        "vit_slots": built.vit.slots(su),
        "latent_positions": _positions(built.vae_items, spec),
        "latent_slots": built.latent.slots(sg),
        **built.fields(max(row_of) + 1, su, sg),
        "ce_slots": built.ce.slots(su),
        "ce_labels": np.asarray(built.labels, np.int64),
        # n tokens of weight n^-1/2: an answer counts by the root of its length
        "ce_weights": np.repeat(answers**-0.5, answers).astype(np.float32),
        "mse_index": np.repeat(np.asarray(noisy, bool), np.asarray(built.latent.length, np.int64)).nonzero()[0],
    }
    pictures = Pictures.of(built.vit_items), Pictures.of(built.vae_items)
    return Layout(su, sg, arrays, built.vit.length, *pictures, built.latent.length, noisy)


def fill(
    layout: Layout,
    spec: PackSpec,
    *,
    encode: Encode,
    generator: torch.Generator,
    shift: float = 1.0,
    see: Encode | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """The batch of a layout, on `device`: pictures are encoded there; timesteps (first) and noise are drawn on the generator's device."""
    device = torch.device(device)
    noisy = torch.tensor(layout.noisy, dtype=torch.bool, device=generator.device)
    timesteps = draw_timesteps(len(noisy), generator, shift) * noisy  # 0 for a clean latent
    latents, features = torch.empty(0, spec.latent_values, device=device), None
    if layout.noisy:
        latents = layout.vae.tokens(lambda x: patchify(encode(x).float(), spec.latent_patch), device).to(device)
        if see is not None:
            features = layout.vae.tokens(lambda x: patchify(see(x).float(), spec.latent_patch), device).to(device)
    patches = torch.empty(0, 3 * spec.vit_patch**2, device=device)
    if layout.vit_lens:
        patches = layout.vit.tokens(lambda x: patchify(x, spec.vit_patch), device)
    tokens = torch.tensor(layout.vae_tokens, dtype=torch.long, device=generator.device)
    return PackedBatch(
        su=layout.su,
        sg=layout.sg,
        vit_patches=patches,
        vit_lens=layout.vit_lens,
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator, device=generator.device).to(device),
        timesteps=timesteps.repeat_interleave(tokens).to(device),
        features=features,
        **{name: torch.from_numpy(values).to(device) for name, values in layout.arrays.items()},
    )


def pack(
    samples: Sequence[Sample],
    spec: PackSpec,
    *,
    encode: Encode,
    generator: torch.Generator,
    shift: float = 1.0,
    rows: Rows = "one",
    row_tokens: int = 0,
    pad_to: int = 1,
    see: Encode | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lays out samples (after `apply_dropout`) and draws timesteps and noise: `lay_out`, then `fill`.

    Args:
        encode: the frozen VAE; pictures of one size are encoded together, a picture that the batch holds several times only once.
        generator: for timesteps (first) and noise.
        shift: s of the timesteps: t = sigmoid(randn), then t = s t / (1 + (s - 1) t).
        rows, row_tokens: see `assign_rows`.
        pad_to: both streams' lengths become multiples of it.
        see: pixels [n, 3, H, W] to features [n, V, H / 8, W / 8] of a frozen vision encoder, for `PackedBatch.features`.
        device: of the batch, and of the pixels that `encode` and `see` are given.
    Raises:
        InputError: a picture does not fit the spec, or dropout has left nothing of all samples.
    """
    layout = lay_out(samples, spec, rows=rows, row_tokens=row_tokens, pad_to=pad_to)
    return fill(layout, spec, encode=encode, generator=generator, shift=shift, see=see, device=device)


def draw_timesteps(n: int, generator: torch.Generator, shift: float) -> Tensor:
    """Timesteps [n] in (0, 1), one per picture: the sigmoid of a normal draw, shifted towards noise if shift > 1."""
    t = torch.randn(n, generator=generator, device=generator.device).sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def _positions(items: Sequence[VitImage | VaeImage], spec: PackSpec) -> Whole:
    sides = (spec.latent_per_side if isinstance(item, VaeImage) else spec.vit_per_side for item in items)
    parts = [_grid_positions(*grid(item, spec), side, spec.interpolate) for item, side in zip(items, sides, strict=True)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


@lru_cache(maxsize=256)
def _grid_positions(h: int, w: int, side: int, interpolate: bool) -> Whole:
    return grid_positions(h, w, side, interpolate).numpy()
