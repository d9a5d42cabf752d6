"""Trains the detector on drawn pictures, spoiled the way a decoder spoils them. It takes twenty to thirty minutes of one core.

Shape legend: B pictures, C channels, G = 16 cells per side of the heat map.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperbagel.toybox.detector import GRID, PICTURE_VALUES, SIDE, THING_VALUES, Detector
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene, sample_scene

RING = 0.2  # weight of a thing's attributes at the eight cells around its centre


def train_detector(
    steps: int = 6000,
    *,
    seed: int = 0,
    batch: int = 24,
    initial: dict[str, Tensor] | None = None,
    log: Callable[[str], None] | None = None,
) -> Detector:
    """A detector trained for `steps` batches of fresh drawings; on one thread a pure function of (steps, seed, batch, initial).

    initial: weights to start from, with a new learning-rate schedule; None draws them from `seed`. log: gets a line every 100 steps.
    """
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the caller's generator is restored afterwards
        detector = Detector()
    if initial is not None:
        detector.load_state_dict(initial)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    average: dict[str, float] = {}
    start = time.monotonic()
    for step in range(steps):
        pictures, targets = draw_batch(rng, noise, batch)
        losses = detector_loss(detector(pictures), targets)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        for name, value in losses.items():
            average[name] = 0.98 * average.get(name, value.item()) + 0.02 * value.item()
        if log and (step % 100 == 99 or step + 1 == steps):
            parts = " ".join(f"{k} {v:.4f}" for k, v in average.items())
            log(f"step {step + 1}/{steps} {time.monotonic() - start:.0f} s {parts}")
    return detector.eval().requires_grad_(False)


def draw_batch(rng: random.Random, noise: torch.Generator, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`batch` spoiled pictures [B, 3, 64, 64] in [0, 1] and their targets. Both splits are drawn: a measure must know every combination."""
    # one in twelve has no things: the background alone, or with a soft blob of some colour
    scenes = [sample_scene(rng, split=rng.choice(("train", "heldout")), variety=0.12) for _ in range(batch)]
    scenes = [Scene(s.background, (), s.style, s.tone) if rng.random() < 1 / 12 else s for s in scenes]
    pixels = np.stack([render(s, SIDE) for s in scenes])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for b, scene in enumerate(scenes):
        if not scene.things and rng.random() < 0.5:
            x[b] = _add_blob(x[b], rng)
    return spoil(x, rng, noise), scene_targets(scenes)


def scene_targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """The targets of `detector_loss`: object, its weight (0 in the ring around a centre, which is neither thing nor empty) and near (the
    weight of attributes), each [B, G, G]; place [B, 3, G, G]; the index of each attribute's value, [B, G, G] or [B]."""
    b = len(scenes)
    maps = {k: np.zeros((b, GRID, GRID), dtype=np.int64) for k in THING_VALUES}
    thing, near = np.zeros((b, GRID, GRID), dtype=np.float32), np.zeros((b, GRID, GRID), dtype=np.float32)
    place = np.zeros((b, 3, GRID, GRID), dtype=np.float32)
    for i, t in ((i, t) for i, scene in enumerate(scenes) for t in scene.things):
        row, col = int(t.cy * GRID), int(t.cx * GRID)
        rows, cols = np.arange(max(0, row - 1), min(GRID, row + 2)), np.arange(max(0, col - 1), min(GRID, col + 2))
        around = (i, slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
        thing[i, row, col] = 1.0
        near[around] = np.maximum(near[around], RING)
        place[i, 0][around[1:]] = t.cx * GRID - cols[None] - 0.5
        place[i, 1][around[1:]] = t.cy * GRID - rows[:, None] - 0.5
        place[i, 2][around[1:]] = t.extent
        for k, values in THING_VALUES.items():
            maps[k][around] = values.index(getattr(t, k))
    weight = np.where((near > 0) & (thing == 0), 0.0, 1.0).astype(np.float32)
    near[thing > 0] = 1.0
    targets = {"object": thing, "object_weight": weight, "near": near, "place": place} | maps
    pictures = {k: torch.tensor([v.index(getattr(s, k)) for s in scenes]) for k, v in PICTURE_VALUES.items()}
    return {k: torch.from_numpy(v) for k, v in targets.items()} | pictures


def detector_loss(maps: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """A scalar for each map. All cells weigh the same in `object`, so that confidence is a probability, which the thresholds of GenEval's
    rules need."""
    things = targets["object"].sum().clamp(min=1)
    near = targets["near"]
    object_loss = F.binary_cross_entropy_with_logits(maps["object"], targets["object"], targets["object_weight"], reduction="sum") / things
    place = F.smooth_l1_loss(maps["place"], targets["place"], reduction="none", beta=0.1).sum(1)
    losses = {"object": object_loss, "place": (place * near).sum() / near.sum().clamp(min=1)}
    for k in THING_VALUES:
        losses[k] = (F.cross_entropy(maps[k], targets[k], reduction="none") * near).sum() / near.sum().clamp(min=1)
    return losses | {k: F.cross_entropy(maps[k], targets[k]) for k in PICTURE_VALUES}


def spoil(x: Tensor, rng: random.Random, noise: torch.Generator) -> Tensor:
    """Blur, resampling, block quantisation, colour jitter and noise on [B, 3, 64, 64]; a fifth of the pictures get no jitter or noise."""
    parts = []
    for part in x.chunk(6):  # each sixth of a batch gets one of the spatial kinds
        kind = rng.choice(("none", "none", "blur", "box", "resample", "blocks"))
        if kind == "blur":
            part = gaussian_blur(part, rng.uniform(0.4, 1.2))
        elif kind == "box":
            part = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
        elif kind == "resample":
            side = rng.randint(36, 60)
            part = F.interpolate(part, (side, side), mode="bilinear", antialias=True, align_corners=False)
            part = F.interpolate(part, (SIDE, SIDE), mode=rng.choice(("bilinear", "bicubic")), align_corners=False)
        elif kind == "blocks":
            part = quantise_blocks(part, rng.uniform(0.05, 0.35))
        parts.append(part)
    x = torch.cat(parts)
    b = len(x)

    def normal(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=noise)

    def uniform() -> Tensor:
        return torch.rand(b, 1, 1, 1, generator=noise)

    dirty = (uniform() > 0.2).float()
    jitter = x * (1 + 0.03 * normal(3, 1, 1)) + 0.012 * normal(3, 1, 1)
    patchy = F.interpolate(normal(3, 12, 12), (SIDE, SIDE), mode="bilinear", align_corners=False)
    jitter = jitter + 0.04 * uniform() * patchy + 0.13 * uniform() ** 2 * normal(3, SIDE, SIDE)
    return (dirty * jitter + (1 - dirty) * x).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of [B, C, H, W], edges repeated."""
    radius = max(1, round(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    c = x.shape[1]
    kernel = (taps / taps.sum()).repeat(c, 1, 1, 1)  # [C, 1, 1, 2r + 1]
    x = F.pad(x, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel, groups=c), kernel.transpose(2, 3), groups=c)


def quantise_blocks(x: Tensor, step: float) -> Tensor:
    """JPEG's kind of damage to [B, C, H, W]: the 8x8 cosine coefficients of each channel, rounded to multiples of a step that grows with
    frequency."""
    n = torch.arange(8)
    basis = torch.cos(torch.pi * (2 * n[None] + 1) * n[:, None] / 16) * (2 / 8) ** 0.5  # [frequency, place]
    basis[0] /= 2**0.5
    steps = step * (1 + (n[:, None] + n[None]) / 4) / 4
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, C, H / 8, W / 8, 8, 8]
    coefficients = torch.round(basis @ blocks @ basis.T / steps) * steps
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(x.shape)


def _add_blob(x: Tensor, rng: random.Random) -> Tensor:
    """A soft disc of a random colour, since a coloured blur is not a thing."""
    ys, xs = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    cx, cy, radius = rng.uniform(8, 56), rng.uniform(8, 56), rng.uniform(5, 14)
    alpha = torch.exp(-((xs - cx) ** 2 + (ys - cy) ** 2) / (2 * (radius / 1.7) ** 2))
    colour = torch.tensor([rng.random() for _ in range(3)])[:, None, None]
    return x * (1 - alpha) + colour * alpha
