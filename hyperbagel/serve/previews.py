"""Pictures of a denoising that is still going on.

Shape legend: B requests, N latent tokens of the largest picture, C values of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL.Image import Image
from torch import Tensor

from hyperbagel.flow.schedule import time_grid
from hyperbagel.pipeline import HyperBagel, ImageRequest, decode_latents


class Previews:
    """`at(...)` after each step gives the previews that are due, as (row, number, picture).

    A latent at time t is mostly noise, so what is decoded is where it is heading: x0 = x_t - t v. The velocity of the last Euler update
    is read off two states in a row, which costs nothing; only after the very first update, when there is one state, is x_t itself shown.
    """

    def __init__(self, model: HyperBagel, requests: Sequence[ImageRequest], wanted: Sequence[int]) -> None:
        """wanted: previews of each request, 0 to 3."""
        self.model, self.requests, self.wanted = model, requests, wanted
        self.before: Tensor | None = None
        if any(wanted):
            self.grids = [model.grid(request) for request in requests]
            self.shift = model.settings(requests[0], warn=False).shift

    def at(self, done: int, total: int, x: Tensor) -> Iterator[tuple[int, int, Image]]:
        """After update `done` of `total`; x [B, N, C]."""
        before, self.before = self.before, x if any(self.wanted) else None
        due = [(row, points.index(done)) for row, count in enumerate(self.wanted) if done in (points := due_after(total, count))]
        if not due:
            return
        if before is not None:
            times = time_grid(total, self.shift)
            earlier, now = float(times[done - 1]), float(times[done])
            x = x - now * (before - x) / (earlier - now)
        for row, number in due:
            h, w = self.grids[row]
            yield row, number, decode_latents(self.model.parts, x[row, : h * w], (h, w))


def due_after(total: int, count: int) -> list[int]:
    """The updates after which previews are shown: evenly spread, none after the last. Few steps give fewer previews."""
    return sorted({round(total * (i + 1) / (count + 1)) for i in range(count)} - {0, total})
