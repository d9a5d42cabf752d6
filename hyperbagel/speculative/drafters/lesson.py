"""Makes a drafter's lesson of contexts and answers: one forward of the target, hidden states taken where serving takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hyperbagel.generate.session import Session
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.drafters.autoregressive import Lesson


@torch.no_grad()
def make_lesson(sessions: Sequence[Session], answers: Sequence[Sequence[int]], layers: Sequence[int]) -> Lesson:
    """The target reads im_start and each answer after its context. The sessions need taps 0 and `layers`, and stay as they were.

    B sessions, R the longest answer + 1.
    """
    parts = sessions[0].parts
    assert all(session.opened is None for session in sessions), "got sessions that have read im_start, expected none"
    assert not any(session.waiting or session.waiting_pictures for session in sessions), "got something that waits, settle it"
    model, device = parts.model, parts.model.device
    rows = [[parts.tokenizer.im_start, *answer] for answer in answers]
    counts = [len(row) for row in rows]
    first = [s.cache.lengths[0] - 1 for s in sessions]
    longest = max(counts)
    cache = KVCache.stack([s.cache for s in sessions], longest, taps=sessions[0].cache.taps)
    tokens = torch.tensor([row + [parts.tokenizer.im_end] * (longest - len(row)) for row in rows], device=device)
    where = torch.tensor([s.position for s in sessions], device=device)[:, None] + torch.arange(longest, device=device)
    hidden = model.backbone(Streams(model.embed_text(tokens), None), where, cache=cache, plan=cache.plan(counts, causal=True)).u
    assert hidden is not None
    slots = max(at + 1 + n for at, n in zip(first, counts, strict=True))

    def tapped(layer: int) -> torch.Tensor:
        return cache.tapped[cache.taps.index(layer)][:, 0, :slots]  # [B, S, E]

    return Lesson(
        features=torch.stack([tapped(layer) for layer in layers], dim=2),
        following=tapped(0).roll(-1, dims=1),
        positions=cache.positions[0][:, 0, :slots, 0],
        first=torch.tensor(first, device=device),
        counts=torch.tensor(counts, device=device),
        tokens=tokens,
        logits=model.logits(hidden),
    )
