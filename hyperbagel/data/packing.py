"""Plans to packed batches: tokens, positions, splits and losses of BAGEL's training sequences.

Reading order of one edit sample (S start, E end, L latent, P patch, T text), its two streams, and who sees whom:

    S L L E | S P P E | T T T | S L L E        VAE full | ViT full | text causal | noise
    . . . .   . . . .   . . .   . . . .        understanding: S E S P P E T T T S E     generation: L L L L

    mask(q, k) = (k before q  OR  same full/noise split)  AND NOT (k in ANOTHER noise split)  AND  same sample

Shape legend: as in core.types; z channels of a latent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.types import PackedBatch
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage
from hyperbagel.data.transforms import grid_positions, patchify, to_tensor

Encode = Callable[[Tensor], Tensor]  # pixels [n, 3, H, W] in [-1, 1] -> latents [n, z, H/8, W/8], scaled and shifted
Rows = Literal["one", "packed"]
UND, GEN = 0, 1


@dataclass(frozen=True)
class PackSpec:
    """What packing must know of a model: special tokens, patch sizes and the sides of the position tables."""

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
    """Where tokens of one kind stand: parallel lists of row, start in the row's stream, length."""

    row: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)

    def add(self, row: int, start: int, length: int) -> None:
        self.row.append(row)
        self.start.append(start)
        self.length.append(length)

    def slots(self, width: int) -> Tensor:
        """Flat slots in a stream of `width` a row, [sum of lengths]."""
        base = np.asarray(self.row, np.int64) * width + np.asarray(self.start, np.int64)
        return torch.from_numpy(_ramp(base, np.asarray(self.length, np.int64)))


def _ramp(start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """start[i], start[i] + 1, ... length[i] numbers of each, concatenated."""
    ends = np.cumsum(length)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
    return np.repeat(start, length) + within


class _Layout:
    """Collects runs (stretches of one kind of token), splits and cells while plans are read; `fields` expands them to tokens at once."""

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
        if item.loss:  # im_start and each id predict the next; im_end predicts nothing
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

    def fields(self, rows: int, su: int, sg: int) -> dict[str, Tensor]:
        """The [B, S] fields of the batch; a row is [understanding | generation]."""
        row, stream, start, length, order, position, step, sample, split, full, noise = np.asarray(self.runs, np.int64).T
        slots = _ramp(row * (su + sg) + stream * su + start, length)
        within = _ramp(np.zeros_like(length), length)

        def cast(values: NDArray[np.int64], padding: int = 0) -> Tensor:
            out = np.full(rows * (su + sg), padding, np.int64)
            out[slots] = values
            return torch.from_numpy(out.reshape(rows, su + sg))

        each = [np.repeat(values, length) for values in (position, step, sample, split, order, full, noise)]
        return {
            "positions": cast(each[0] + each[1] * within),
            "sample_id": cast(each[2], padding=-1),
            "split_id": cast(each[3], padding=-1),
            "order": cast(each[4] + within),
            "is_full": cast(each[5]).bool(),
            "is_noise": cast(each[6]).bool(),
        }


def assign_rows(lengths: Sequence[tuple[int, int]], layout: Rows, row_tokens: int) -> list[int]:
    """Row of each sample. "one": its own.

    "packed": as many rows as `row_tokens` (both streams) asks for on average. Both streams are padded to their fullest row, so, longest
    first, each sample joins the row where that costs least, and among equals the emptiest one.
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
) -> PackedBatch:
    """Lays out samples (after `apply_dropout`) and draws noise and timesteps.

    Args:
        encode: the frozen VAE; pictures of one size are encoded together, a picture used several times in the batch only once.
        generator: CPU generator of timesteps (first) and noise.
        shift: of the timesteps, t = sigmoid(randn), then t = s t / (1 + (s - 1) t).
        row_tokens: average length of a packed row.
        pad_to: both streams' lengths become multiples of it.
        see: pixels [n, 3, H, W] to features [n, V, H / 8, W / 8] of a frozen vision encoder, for `PackedBatch.features`.
    Raises:
        InputError: a picture does not fit the spec, or nothing is left of all samples.
    """
    row_of = assign_rows([stream_lengths(s, spec) for s in samples], rows, row_tokens)
    layout = _Layout(spec)
    for number, (row, sample) in enumerate(zip(row_of, samples, strict=True)):
        layout.add_sample(row, number, sample)
    if not layout.runs:
        raise InputError("pack: got samples of which nothing is left, expected at least one token, lower the dropout or check the data")
    su, sg = layout.width(UND, pad_to), layout.width(GEN, pad_to)
    noisy = torch.tensor([item.loss for item in layout.vae_items], dtype=torch.bool)
    tokens = torch.tensor(layout.latent.length, dtype=torch.long)
    timesteps = draw_timesteps(len(noisy), generator, shift) * noisy  # 0 for a clean latent
    latents = _encode(layout.vae_items, spec, encode)
    answers = np.asarray(layout.ce.length, np.int64)
    patches = [patchify(to_tensor(item.pixels), spec.vit_patch) for item in layout.vit_items]
    return PackedBatch(
        su=su,
        sg=sg,
        text_ids=torch.tensor(layout.text_ids, dtype=torch.long),
        text_slots=layout.text.slots(su),
        vit_patches=torch.cat(patches) if patches else torch.empty(0, 3 * spec.vit_patch**2),
        vit_positions=_positions(layout.vit_items, spec),
        vit_slots=layout.vit.slots(su),
        vit_lens=layout.vit.length,
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timesteps=timesteps.repeat_interleave(tokens),
        latent_positions=_positions(layout.vae_items, spec),
        latent_slots=layout.latent.slots(sg),
        **layout.fields(max(row_of) + 1, su, sg),
        ce_slots=layout.ce.slots(su),
        ce_labels=torch.tensor(layout.labels, dtype=torch.long),
        # an answer of n tokens weighs n * n^-1/2: long answers count more, but less than by their length
        ce_weights=torch.from_numpy(np.repeat(answers**-0.5, answers).astype(np.float32)),
        mse_index=noisy.repeat_interleave(tokens).nonzero().flatten(),
        features=_encode(layout.vae_items, spec, see) if see is not None and layout.vae_items else None,
    )


def draw_timesteps(n: int, generator: torch.Generator, shift: float) -> Tensor:
    """t of n pictures in (0, 1): the sigmoid of a normal draw, then shifted towards noise (shift > 1)."""
    t = torch.randn(n, generator=generator).sigmoid()
    return shift * t / (1 + (shift - 1) * t)


def _positions(items: Sequence[VitImage | VaeImage], spec: PackSpec) -> Tensor:
    sides = (spec.latent_per_side if isinstance(item, VaeImage) else spec.vit_per_side for item in items)
    parts = [grid_positions(*grid(item, spec), side, spec.interpolate) for item, side in zip(items, sides, strict=True)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def _encode(items: Sequence[VaeImage], spec: PackSpec, encode: Encode) -> Tensor:
    """Latent (or feature) tokens [Ng, C] of all pictures, in (p, q, c) order; each distinct picture is encoded once."""
    pictures = {id(item.pixels): item.pixels for item in items}
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for key, pixels in pictures.items():
        by_shape.setdefault(pixels.shape, []).append(key)
    tokens: dict[int, Tensor] = {}
    for keys in by_shape.values():
        latents = encode(to_tensor(np.stack([pictures[k] for k in keys])))
        tokens.update(zip(keys, patchify(latents.float(), spec.latent_patch).cpu(), strict=True))
    return torch.cat([tokens[id(item.pixels)] for item in items]) if items else torch.empty(0, spec.latent_values)
