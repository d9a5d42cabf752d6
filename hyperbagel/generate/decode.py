"""Plain autoregressive decoding of a batch of sessions.

Shape legend: B sessions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperbagel.generate.sampling import pick
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import OnToken
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache


@dataclass
class Decoded:
    """One session's answer: ids without im_start and im_end."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    logits: list[Tensor] = field(default_factory=list)  # [V] a step, only if asked for


@torch.inference_mode()
def decode(
    sessions: Sequence[Session],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    generators: Sequence[torch.Generator] = (),
    on_token: OnToken | None = None,
    keep_logits: bool = False,
) -> list[Decoded]:
    """Starts from im_start behind each session's context, stops at im_end or after `max_tokens` tokens.

    The sessions stay as they were: an answer joins a conversation as text (`Session.add_text`), as in the reference.
    """
    parts = sessions[0].parts
    model, tokenizer = parts.model, parts.tokenizer
    for session in sessions:
        session.check_room(max_tokens + 1)
    cache = sessions[0].cache if len(sessions) == 1 else KVCache.stack([s.cache for s in sessions], max_tokens + 1)
    before = list(cache.lengths)
    cache.reserve(max(before) + max_tokens + 1)
    position = torch.tensor([s.position for s in sessions], device=model.device)[:, None]
    token = torch.full((len(sessions), 1), tokenizer.im_start, device=model.device)
    results = [Decoded() for _ in sessions]
    alive = set(range(len(sessions)))
    ones = [1] * len(sessions)
    try:
        for step in range(max_tokens + 1):
            plan = cache.plan(ones, causal=True)
            hidden = model.backbone(Streams(model.embed_text(token), None), position + step, cache=cache, plan=plan).u
            assert hidden is not None
            cache.advance(ones)
            logits = model.logits(hidden[:, -1])
            if keep_logits:
                for i in alive:
                    results[i].logits.append(logits[i].float())
            if step == max_tokens:
                break
            token = pick(logits, temperature, generators)[:, None]
            for i, id_ in enumerate(token[:, 0].tolist()):
                if i not in alive:
                    continue
                if id_ == tokenizer.im_end:
                    results[i].finish_reason = "stop"
                    alive.discard(i)
                    continue
                results[i].ids.append(id_)
                if on_token is not None:
                    on_token(i, id_)
            if not alive or (step == max_tokens - 1 and not keep_logits):
                break
    finally:
        cache.truncate(before)
    return results
