"""A small network that reads a toybox picture: what is where, in which colour, on which background.

It is trained on drawings only (detector_train.py), is never used as a reward, and never sees a generated picture before it scores one.

Shape legend: B pictures, G = 16 cells per side of the heat map (stride 4 at 64 px), K values of one attribute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.toybox.scene import BACKGROUNDS, COLOURS, MATERIALS, NOUNS, SIZES, STYLES, TONES

SIDE = 64  # pictures are resized to this before the network
STRIDE = 4
GRID = SIDE // STRIDE

# Attributes of a thing, which are read at its cell, and of the whole picture. The order of the values is that of the logits.
THING_VALUES: dict[str, tuple[str, ...]] = {
    "noun": tuple(NOUNS),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "material": tuple(MATERIALS),
}
PICTURE_VALUES: dict[str, tuple[str, ...]] = {"background": tuple(BACKGROUNDS), "style": tuple(STYLES), "tone": tuple(TONES)}
# channels of each map over cells, and logits of each attribute of the picture, in the order of the output layers
THING_WIDTHS = {"object": 1, "place": 3} | {k: len(v) for k, v in THING_VALUES.items()}
PICTURE_WIDTHS = {k: len(v) for k, v in PICTURE_VALUES.items()}


@dataclass(frozen=True)
class Detection:
    """One thing found. Centre and extent (side of the bounding square) are fractions of the picture, confidence is in (0, 1)."""

    noun: str
    colour: str
    size: str
    material: str
    cx: float
    cy: float
    extent: float
    confidence: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 as fractions of the picture."""
        h = self.extent / 2
        return self.cx - h, self.cy - h, self.cx + h, self.cy + h


@dataclass(frozen=True)
class Reading:
    """Everything that was read in one picture; `things` come from the most to the least confident."""

    things: tuple[Detection, ...]
    background: str
    style: str
    tone: str

    def above(self, threshold: float) -> tuple[Detection, ...]:
        return tuple(d for d in self.things if d.confidence > threshold)


class _Conv(nn.Sequential):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = _Conv(c, c)
        self.second = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Detector(nn.Module):
    """About half a million parameters. `forward` takes [B, 3, 64, 64] in [0, 1] and returns named maps of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Conv(12, 32), _Conv(32, 64, stride=2), _Residual(64))  # 2x2 pixels as channels; 32 -> 16
        self.down = nn.Sequential(_Conv(64, 96, stride=2), _Residual(96))  # 16 -> 8: sees a whole large thing
        self.lift = nn.Conv2d(96, 64, 1)
        self.join = _Conv(64, 96)
        self.thing = nn.Conv2d(96, sum(THING_WIDTHS.values()), 1)
        self.picture = nn.Linear(64 + 96 + 6, sum(PICTURE_WIDTHS.values()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, 64, 64] -> object [B, G, G], place [B, 3, G, G] (dx and dy from the cell's middle, in cells; extent), and [B, K, ...] for
        each attribute."""
        fine = self.stem(F.pixel_unshuffle(x * 2 - 1, 2))  # [B, 64, 16, 16]
        coarse = self.down(fine)  # [B, 96, 8, 8]
        merged = self.join(F.relu(fine + F.interpolate(self.lift(coarse), scale_factor=2.0, mode="nearest")))
        # pooled features, and colour statistics of the border, where no thing is drawn
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=2)  # [B, 3, 4 * 64]
        pooled = torch.cat([fine.mean((2, 3)), coarse.amax((2, 3)), border.mean(2), border.std(2)], dim=1)
        return named_maps(self.thing(merged), self.picture(pooled))

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Detector:
        """An fp32 detector in inference mode from a state dict (any float type). Raises InputError if the tensors differ."""
        detector = cls()
        own = {k: v.shape for k, v in detector.state_dict().items()}
        bad = sorted(k for k in own.keys() | state.keys() if k not in own or k not in state or state[k].shape != own[k])
        if bad:
            raise InputError(
                f"got a detector file that differs at {len(bad)} tensors (first: {bad[0]!r}), expected the shipped one; reinstall it"
            )
        detector.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return detector.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, pictures: np.ndarray | Tensor, *, floor: float = 0.1) -> list[Reading]:
        """Read pictures, uint8 [B, H, W, 3] of any square size (resized to 64 first); things below confidence `floor` are left out."""
        return decode(self(as_input(pictures).to(next(self.parameters()).device)), floor=floor)


def as_input(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, 64, 64] in [0, 1]. Raises InputError on another shape or type."""
    x = torch.as_tensor(pictures)
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != torch.uint8:
        raise InputError(f"got pictures {x.dtype} {tuple(x.shape)}, expected uint8 [B, H, W, 3]; convert them to RGB first")
    x = x.permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] == (SIDE, SIDE):
        return x
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def decode(maps: dict[str, Tensor], *, floor: float) -> list[Reading]:
    """Maps of logits -> a reading for each picture. A thing's confidence is P(a thing is here) x P(its noun)."""
    heat = maps["object"].sigmoid()  # [B, G, G]
    probs = {k: maps[k].softmax(1) for k in THING_VALUES}
    confidence = heat * probs["noun"].amax(1)
    peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (confidence > floor)
    best = {k: p.argmax(1) for k, p in probs.items()}  # [B, G, G]
    picture = {k: maps[k].argmax(1) for k in PICTURE_VALUES}
    found: list[list[Detection]] = [[] for _ in range(heat.shape[0])]
    for b, row, col in peaks.nonzero().tolist():
        dx, dy, extent = maps["place"][b, :, row, col].tolist()
        noun, colour, size, material = (THING_VALUES[k][int(best[k][b, row, col])] for k in ("noun", "colour", "size", "material"))
        cx, cy = (col + 0.5 + dx) / GRID, (row + 0.5 + dy) / GRID
        found[b].append(Detection(noun, colour, size, material, cx, cy, max(extent, 1 / SIDE), float(confidence[b, row, col])))
    return [
        Reading(tuple(_one_each(things)), **{k: PICTURE_VALUES[k][int(v[b])] for k, v in picture.items()}) for b, things in enumerate(found)
    ]


def _one_each(things: list[Detection]) -> list[Detection]:
    """Greedy suppression: of peaks whose centres are no further apart than half of the larger extent, only the most confident is kept."""
    kept: list[Detection] = []
    for d in sorted(things, key=lambda d: -d.confidence):
        if all(max(abs(d.cx - k.cx), abs(d.cy - k.cy)) > 0.5 * max(d.extent, k.extent) for k in kept):
            kept.append(d)
    return kept


def named_maps(things: Tensor, picture: Tensor) -> dict[str, Tensor]:
    """[B, sum of THING_WIDTHS, G, G] and [B, sum of PICTURE_WIDTHS] split up by name; `object`, of one channel, becomes [B, G, G]."""
    named: dict[str, Tensor] = {}
    for x, widths in ((things, THING_WIDTHS), (picture, PICTURE_WIDTHS)):
        named |= zip(widths, x.split(list(widths.values()), dim=1))
    return named | {"object": named["object"][:, 0]}
