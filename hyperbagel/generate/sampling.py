"""Sampling: from logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The lowest temperature used. Below it logits / T overflow fp32 (inf - inf is nan) or T itself rounds to 0; here the likeliest token
# already has all of the probability.
COLDEST = 1e-6

NOT_FINITE = "got probabilities that are not finite from the model, expected finite ones; its weights or caches are damaged"


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T) over the last dimension, in fp32; T > 0, at least COLDEST is used."""
    return (logits.float() / max(temperature, COLDEST)).softmax(-1)


def pick(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """logits [B, V] -> tokens [B]: argmax for T = 0, else one draw per row with that row's own generator (on the CPU)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature)
    if p.device.type != "cpu" and not bool(p.isfinite().all()):  # on a CPU the draw itself refuses them
        raise RuntimeError(NOT_FINITE)
    return draw_rows(p, generators)


def draw_rows(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row from p [B, V], by that row's own generator on the CPU -> [B].

    If p is on a GPU, only one number per row is drawn on the CPU and the choice is made on the GPU: copying 152,064 probabilities over
    costs, and `multinomial` takes milliseconds for a row of them on a CPU. A seed's draws therefore differ between the two.
    """
    if p.device.type == "cpu":
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)])
    uniforms = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    return draw(p, uniforms.to(p.device))


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inversion: p [B, V], uniforms [B] in [0, 1) -> [B]. A token of probability 0 is never drawn."""
    steps = p.double().cumsum(-1)
    total = steps[:, -1]
    level = (uniforms.double() * total).minimum(torch.nextafter(total, torch.zeros_like(total)))  # a product may round up to the total
    return (steps <= level[:, None]).sum(-1)
