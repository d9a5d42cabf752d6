"""Sample sheets of a model in training: toybox captions drawn, edits made and questions answered, with the truth for comparison."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from hyperbagel.data.images import captioned_grid, save_png
from hyperbagel.generate.decode import decode
from hyperbagel.generate.image import MOST_LATENTS, decode_latents, denoise, draw_noise, latent_grid
from hyperbagel.generate.session import Parts, Session
from hyperbagel.generate.types import ImageRequest
from hyperbagel.toybox.language import sample_edit, sample_question, sample_t2i
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene

COLUMNS = 6
STEPS = 24


def write_previews(path: Path, parts: Parts, seed: int, steps: int = STEPS) -> None:
    """One PNG: two rows of T2I, two of edits (before, made, wanted), one of questions. Samples and noise are functions of the seed; the
    model's own defaults guide."""
    rng = random.Random(seed)
    size = parts.model.config.options.default_size
    drawn = [sample_t2i(rng, style="terse") for _ in range(2 * COLUMNS)]
    pictures = _draw(parts, [(None, sample.prompt) for sample in drawn], size, steps, seed)
    cells = [(image, sample.prompt) for image, sample in zip(pictures, drawn, strict=True)]
    edits = [sample_edit(rng) for _ in range(COLUMNS * 2 // 3)]
    made = _draw(parts, [(_picture(e.source, size), e.instruction) for e in edits], size, steps, seed)
    for edit, image in zip(edits, made, strict=True):
        cells += [(_picture(edit.source, size), edit.instruction), (image, "made"), (_picture(edit.target, size), "wanted")]
    questions = [sample_question(rng) for _ in range(COLUMNS)]
    answers = _answer(parts, [(_picture(q.scene, size), q.question) for q in questions])
    cells += [(_picture(q.scene, size), f"{q.question}\n> {answer}\n= {q.answer}") for q, answer in zip(questions, answers, strict=True)]
    save_png(captioned_grid(cells, COLUMNS, lines=7), path)


def _picture(scene: Scene, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(render(scene, size[0]))


def _draw(
    parts: Parts, inputs: Sequence[tuple[Image.Image | None, str]], size: tuple[int, int], steps: int, seed: int
) -> list[Image.Image]:
    generator, grid = torch.Generator().manual_seed(seed), latent_grid(parts.model.config, size)
    few = max(1, MOST_LATENTS // math.prod(grid))
    return [image for at in range(0, len(inputs), few) for image in _draw_few(parts, inputs[at : at + few], grid, steps, generator)]


def _draw_few(
    parts: Parts, inputs: Sequence[tuple[Image.Image | None, str]], grid: tuple[int, int], steps: int, generator: torch.Generator
) -> list[Image.Image]:
    sessions = []
    for image, text in inputs:
        session = Session.new(parts)
        if image is not None:
            session.add_image(image, latents=True, generator=generator)
        session.add_text(text)
        sessions.append(session)
    first = inputs[0][0]
    request = ImageRequest(images=() if first is None else (first,), steps=steps).with_defaults(parts.model.config.options)
    noises = [draw_noise(parts, grid, generator) for _ in sessions]
    latents, _ = denoise(sessions, [grid] * len(sessions), noises, request.denoising())
    return [decode_latents(parts, x, grid) for x in latents]


def _answer(parts: Parts, inputs: Sequence[tuple[Image.Image, str]]) -> list[str]:
    sessions = []
    for image, question in inputs:
        session = Session.new(parts)
        session.add_image(image, latents=False)
        session.add_text(question)
        sessions.append(session)
    return [parts.tokenizer.decode(out.ids) for out in decode(sessions, max_tokens=48)]
