"""Seconds per picture, from words to pixels, which a number of evaluations does not tell.

Every row draws an item before the next item's turn, so that a machine that slows down slows all rows alike. The teacher is timed twice:
with its guidance branches one after the other (the paper's accounting), and with all in one forward (the fastest teacher we have).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from hyperbagel.core.progress import ProgressReport
from hyperbagel.evaluate.rows import is_edit, request_for
from hyperbagel.evaluate.toybox import Settings
from hyperbagel.generate.image import decode_latents, denoise, draw_noise, latent_grid
from hyperbagel.generate.session import Parts, Session
from hyperbagel.generate.types import ImageRequest, with_sampler
from hyperbagel.toybox.items import EditItem, T2IItem

IN_TURN = "teacher, branches in turn"


@torch.inference_mode()
def draw_in_turn(parts: Parts, request: ImageRequest) -> tuple[Image.Image, int]:
    """The guided model's picture with one forward per branch, and its NFE. Up to rounding, the pipeline draws the same."""
    generator = torch.Generator().manual_seed(request.seed)
    session = Session.new(parts)
    for item in request.items():
        if isinstance(item, str):
            session.add_text(item)
        else:
            session.add_image(item, latents=True, generator=generator)
    grid = latent_grid(parts.model.config, request.size or session.last_size or parts.model.config.options.default_size)
    [x], nfe = denoise([session], [grid], [draw_noise(parts, grid, generator)], request.denoising(), in_turn=True)
    return decode_latents(parts, x, grid), nfe


@torch.inference_mode()
def look(parts: Parts, request: ImageRequest) -> Session:
    """A context that holds an edit's pictures but not its text yet."""
    seen = Session.new(parts)
    for image in request.images:
        seen.add_image(image, latents=True, generator=torch.Generator().manual_seed(request.seed))
    return seen


@torch.inference_mode()
def draw_behind(model: Any, seen: Session, request: ImageRequest) -> Image.Image:
    """A student's edit of a picture that is in the cache already: text, denoising, decoding."""
    parts, generator = model.parts, torch.Generator().manual_seed(request.seed)
    session = seen.fork()
    session.add_text(request.prompt, later=True)
    grid = latent_grid(parts.model.config, session.last_size or model.default_size)
    ready = model.students.get(str(request.student))
    settings = with_sampler(request, ready.sampler)
    [x], _ = denoise([session], [grid], [draw_noise(parts, grid, generator)], settings, student=ready.network)
    return decode_latents(parts, x, grid)


def time_rows(
    model: Any, rows: Mapping[str, Settings], prompts: Sequence[T2IItem], edits: Sequence[EditItem], *, teacher: str
) -> dict[str, Any]:
    """{"t2i": {row: figures}, "edits": {...}, "edit, picture cached": {...}}. Figures: seconds (median, first and third quartile), and how
    many times faster than the teacher with its branches in turn, and batched."""
    found: dict[str, dict[str, list[float]]] = {}
    items: list[T2IItem | EditItem] = [*prompts, *edits]
    with ProgressReport("wall clock") as progress:
        for done, item in enumerate(items):  # `done` items are timed already
            part = "edits" if is_edit(item) else "t2i"
            for row, draw in _ways(model, rows, item, teacher).items():
                if done in (0, len(prompts)):
                    draw()  # the first call of each kind warms up
                start = time.perf_counter()
                draw()
                found.setdefault(part, {}).setdefault(row, []).append(time.perf_counter() - start)
            if isinstance(item, EditItem):
                for row, seconds in _cached(model, rows, item).items():
                    found.setdefault("edit, picture cached", {}).setdefault(row, []).append(seconds)
            progress.update((done + 1) / len(items), f"{done + 1}/{len(items)}")
    return {part: _figures(seconds, teacher) for part, seconds in found.items()}


def _ways(model: Any, rows: Mapping[str, Settings], item: T2IItem | EditItem, teacher: str) -> dict[str, Callable[[], Any]]:
    """For each row, a call that draws the item; without plans also the teacher's with its branches in turn."""
    requests = {row: request_for(item, s, s.seed) for row, s in rows.items()}
    in_turn = not requests[teacher].think
    ways: dict[str, Callable[[], Any]] = {IN_TURN: lambda: draw_in_turn(model.parts, requests[teacher])} if in_turn else {}
    return ways | {row: lambda request=request: model.generate_batch([request]) for row, request in requests.items()}  # type: ignore[misc]


def _cached(model: Any, rows: Mapping[str, Settings], item: EditItem) -> dict[str, float]:
    """Seconds of each student's edit if the picture has been prefilled."""
    seconds = {}
    for row, s in rows.items():
        if "student" in s.edit and not s.think:
            request = request_for(item, s, s.seed)
            seen = look(model.parts, request)
            start = time.perf_counter()
            draw_behind(model, seen, request)
            seconds[row] = time.perf_counter() - start
    return seconds


def _figures(seconds: Mapping[str, list[float]], teacher: str) -> dict[str, dict[str, float]]:
    middle = {row: statistics.median(values) for row, values in seconds.items()}
    table = {}
    for row, values in seconds.items():
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        table[row] = {"seconds": middle[row], "low": quarters[0], "high": quarters[2], "n": len(values)}
        for name, other in (("faster than in turn", IN_TURN), ("faster than batched", teacher)):
            if other in middle:
                table[row][name] = middle[other] / middle[row]
    return table
