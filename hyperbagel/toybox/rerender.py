"""Analysis by synthesis: draw again what was read in a picture, and compare.

A detector may be satisfied by something that only hints at a thing. A redrawn scene is not so easily fooled: it matches or it does not.

Shape legend: H = W pixels of a square picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from hyperbagel.core.errors import InputError
from hyperbagel.toybox.detector import Detection, Reading
from hyperbagel.toybox.render import object_box, render
from hyperbagel.toybox.scene import CENTRES, MATERIALS, SIZES, Scene, Thing

MOVES = tuple((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1))  # in 64ths of the picture
STEP = 1 / 64
MAX_PSNR = 100.0  # dB, given to equal pictures


@dataclass(frozen=True)
class Rerendered:
    """The best scene found, its drawing (uint8 [H, W, 3]), and that drawing's PSNR in dB against the picture."""

    scene: Scene
    picture: np.ndarray
    psnr: float


def rerender(picture: np.ndarray, reading: Reading, *, threshold: float = 0.3, limit: int = 9) -> Rerendered:
    """Draw the things read above `threshold`; for each, try positions up to one 64th of the picture away, both sizes and both materials;
    keep the best scene.

    First all things change in the same way in each drawing, and each keeps what suits its own surroundings best: 18 drawings, however many
    things there are. Then each thing's positions and sizes and its other material are tried alone, with the others in place: 19 per thing.
    limit: at most so many things are drawn. Raises InputError unless the picture is uint8 [H, H, 3].
    """
    check_square(picture)
    side = picture.shape[0]
    truth = _soften(picture)
    things = [_thing(d) for d in reading.above(threshold)[:limit]]
    scene = Scene(reading.background, tuple(things), reading.style, reading.tone)

    def error(tried: list[Thing]) -> np.ndarray:
        return (_soften(render(replace(scene, things=tuple(tried)), side)) - truth) ** 2  # [H, W, 3]

    windows = [_window(t, side) for t in things]
    lowest = [float("inf")] * len(things)
    best = list(things)
    for size, (dx, dy) in product(SIZES, MOVES if things else ()):
        tried = [replace(t, size=size, dx=t.dx + dx * STEP, dy=t.dy + dy * STEP) for t in things]
        off = error(tried)
        for i, window in enumerate(windows):
            if (value := float(off[window].sum())) < lowest[i]:
                lowest[i], best[i] = value, tried[i]
    least = float(error(best).sum())
    for i, own in enumerate(things):
        offers = [replace(own, size=size, dx=own.dx + dx * STEP, dy=own.dy + dy * STEP) for size, (dx, dy) in product(SIZES, MOVES)]
        best, least = _best_alone(best, least, i, offers, error)
        best, least = _best_alone(best, least, i, [replace(best[i], material=m) for m in MATERIALS], error)
    scene = replace(scene, things=tuple(best))
    drawn = render(scene, side)
    return Rerendered(scene, drawn, psnr(picture, drawn))


def _best_alone(
    best: list[Thing], least: float, i: int, offers: list[Thing], error: Callable[[list[Thing]], np.ndarray]
) -> tuple[list[Thing], float]:
    """The best scene so far and its summed error, after each of `offers` was tried as thing i."""
    for thing in offers:
        tried = [*best[:i], thing, *best[i + 1 :]]
        if thing != best[i] and (value := float(error(tried).sum())) < least:
            least, best = value, tried
    return best, least


def _soften(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32, each pixel averaged with its eight neighbours. Decoded pictures are soft; compared sharply, a soft dark
    outline looks like stripes."""
    x = np.pad(picture.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    x = x[:-2] + x[1:-1] + x[2:]
    return (x[:, :-2] + x[:, 1:-1] + x[:, 2:]) / 9


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures [H, W, 3], over the pixels of `mask` (bool [H, W]) if given; at most 100.

    With an empty mask nothing differs: 100.
    """
    error = (a.astype(np.float32) - b.astype(np.float32)) ** 2
    if mask is not None:
        error = error[mask]
    mse = float(error.mean()) if error.size else 0.0
    return min(MAX_PSNR, 10 * math.log10(255**2 / mse)) if mse > 0 else MAX_PSNR


def box_mask(things: tuple[Thing, ...], side: int, *, margin: int = 1) -> np.ndarray:
    """bool [side, side]: True inside the drawn box of any thing, grown by `margin` pixels."""
    mask = np.zeros((side, side), dtype=bool)
    for thing in things:
        x0, y0, x1, y1 = object_box(thing, side)
        rows = slice(max(0, int(np.floor(y0)) - margin), max(0, int(np.ceil(y1)) + margin))
        mask[rows, max(0, int(np.floor(x0)) - margin) : max(0, int(np.ceil(x1)) + margin)] = True
    return mask


def check_square(picture: np.ndarray) -> None:
    """Raises InputError unless `picture` is uint8 [H, H, 3]."""
    if picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise InputError(f"got a picture {picture.dtype} {picture.shape}, expected uint8 [H, H, 3]; make it a square RGB picture")


def _thing(d: Detection) -> Thing:
    """A detection as a thing in the nearest cell, at whole 64ths of the picture; a generated thing may be further off than the jitter."""
    col = int(np.argmin([abs(d.cx - c) for c in CENTRES]))
    row = int(np.argmin([abs(d.cy - c) for c in CENTRES]))
    dx, dy = (round((v - CENTRES[i]) / STEP) * STEP for v, i in ((d.cx, col), (d.cy, row)))
    return Thing(d.noun, d.colour, d.size, row * 3 + col, dx, dy, d.material)


def _window(thing: Thing, side: int) -> tuple[slice, slice]:
    """The pixels around a thing over which its error is summed: one 64th more than a large thing takes, so little of its neighbours."""
    half = 10.5 / 64
    low_x, high_x = int((thing.cx - half) * side), int(np.ceil((thing.cx + half) * side))
    low_y, high_y = int((thing.cy - half) * side), int(np.ceil((thing.cy + half) * side))
    return slice(max(0, low_y), max(0, high_y)), slice(max(0, low_x), max(0, high_x))
