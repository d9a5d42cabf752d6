"""From logits to a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Below it, logits / T leave fp32's range (inf - inf: nan) or T itself rounds to 0; at it the likeliest token has all of the probability
# long since.
COLDEST = 1e-6


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T) over the last dimension, in fp32; T > 0 (what is below COLDEST counts as that)."""
    return (logits.float() / max(temperature, COLDEST)).softmax(-1)


def pick(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """logits [B, V] -> [B] tokens: argmax for T = 0, else one draw a row from that row's own generator (on the CPU)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)
