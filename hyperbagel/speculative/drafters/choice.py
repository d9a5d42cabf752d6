"""Which tokens a drafter drafts, from its logits. Shape legend: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperbagel.generate.sampling import draw, draw_rows, probabilities

Chosen = tuple[Tensor, Tensor | None]  # a token per row [B], and what it was drawn from [B, V] (None if greedy)
Pick = Callable[[Tensor, int], Chosen]  # logits [B, V] of a draft's token d


def choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Chosen:
    """The likeliest token of each row, or one drawn by that row's own generator (on the CPU)."""
    if temperature == 0:
        return logits.argmax(-1), None
    q = _sound(probabilities(logits, temperature))
    return draw_rows(q, generators), q


def choose_by(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Chosen:
    """One token per row at a temperature > 0 on the device (a scalar), by inversion of `uniforms` [B] in [0, 1)."""
    q = _sound((logits.float() / temperature).softmax(-1))
    return draw(q, uniforms), q


def _sound(q: Tensor) -> Tensor:
    """Makes every token of a row equally likely where the row is not finite: a broken drafter may cost speed, not the request."""
    return torch.where(q.isfinite().all(-1, keepdim=True), q, 1 / q.shape[-1])


def shares(finished: Tensor) -> Tensor:
    """What each row counts for in a mean over the rows that are not finished: bool [B] -> [B]."""
    return (~finished).float() / (~finished).sum().clamp(min=1)


def confidence(logits: Tensor) -> Tensor:
    """How likely the drafter's greedy choice is the target's as well: logits [..., V] -> [...] in [0.5, 1].

    This is not the choice's probability: where many tokens may follow, both models may still have the same favourite. So it is
    p1 / (p1 + p2) of the two likeliest tokens.
    """
    best = logits.float().topk(2, dim=-1).values
    return (best[..., 0] - best[..., 1]).sigmoid()
