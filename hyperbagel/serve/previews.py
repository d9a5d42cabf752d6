"""Previews of pictures that are still being denoised.

Shape legend: B requests, N latent tokens of the largest picture, C values of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL.Image import Image
from torch import Tensor

from hyperbagel.flow.schedule import time_grid
from hyperbagel.pipeline import HyperBagel, ImageRequest, decode_latents


class Previews:
    """Call `at` after each step: it yields the previews that are due.

    A latent x_t is mostly noise, so what is decoded is where it is heading: x0 = x_t - t v. The velocity v of the last Euler update is the
    difference of two consecutive states over their times, which costs nothing. After the first update only one state is known, and x_t
    itself is shown.
    """

    def __init__(self, model: HyperBagel, requests: Sequence[ImageRequest], wanted: Sequence[int]) -> None:
        """wanted: the number of previews for each request, 0 to 3."""
        self.model, self.requests, self.wanted = model, requests, wanted
        self.before: Tensor | None = None
        if any(wanted):
            self.grids = [model.grid(request) for request in requests]
            self.shift = model.settings(requests[0], warn=False).shift

    def at(self, done: int, total: int, x: Tensor) -> Iterator[tuple[int, int, Image]]:
        """The previews due after update `done` of `total`, as (row, number of the preview from 0, picture). x: latents [B, N, C]."""
        before, self.before = self.before, x if any(self.wanted) else None
        due = [(row, points.index(done)) for row, count in enumerate(self.wanted) if done in (points := due_after(total, count))]
        if not due:
            return
        if before is not None:
            times = time_grid(total, self.shift)
            earlier, now = float(times[done - 1]), float(times[done])
            x = x - now * (before - x) / (earlier - now)  # x0 = x_t - t v
        for row, number in due:
            h, w = self.grids[row]
            yield row, number, decode_latents(self.model.parts, x[row, : h * w], (h, w))


def due_after(total: int, count: int) -> list[int]:
    """The updates after which `count` previews are shown: evenly spread, none after the last of `total`. Few updates give fewer."""
    return sorted({round(total * (i + 1) / (count + 1)) for i in range(count)} - {0, total})
