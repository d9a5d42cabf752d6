"""How far two decodings of a prompt agree, and how sure the model was where they part: kernels for other sizes round differently."""

from __future__ import annotations

from dataclasses import dataclass

from hyperbagel.generate.decode import Decoded


@dataclass(frozen=True)
class Divergence:
    """index: first token that differs (a missing one differs too); gap: between the two highest logits of plain decoding there."""

    index: int
    gap: float


def first_divergence(plain: Decoded, other: Decoded) -> Divergence | None:
    """None if the answers are equal. `plain` must have been decoded with keep_logits."""
    if plain.ids == other.ids and plain.finish_reason == other.finish_reason:
        return None
    same = zip(plain.ids, other.ids)  # lengths may differ
    index = next((i for i, (a, b) in enumerate(same) if a != b), min(len(plain.ids), len(other.ids)))
    assert index < len(plain.logits), "plain decoding must keep its logits"
    best, second = plain.logits[index].float().topk(2).values.tolist()
    return Divergence(index, best - second)
