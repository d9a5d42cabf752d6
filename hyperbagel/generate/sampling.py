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
    p = probabilities(logits, temperature)
    if p.device.type != "cpu" and not bool(p.isfinite().all()):  # on a CPU the draw itself refuses them
        raise RuntimeError("got probabilities that are not finite from the model, expected finite ones; its weights or caches are damaged")
    return draw_rows(p, generators)


def draw_rows(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row from p [B, V], by that row's own generator on the CPU -> [B].

    On a GPU one number a row comes from there and the draw is made where p lies: 152,064 probabilities would have to be brought over, and
    `multinomial` takes milliseconds for a row of them on a CPU. So a seed's draws are others than on a CPU.
    """
    if p.device.type == "cpu":
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)])
    uniforms = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    return draw(p, uniforms.to(p.device))


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row by inversion: p [B, V], uniforms [B] in [0, 1) -> [B]. A token of probability 0 is never drawn."""
    steps = p.double().cumsum(-1)
    total = steps[:, -1]
    level = (uniforms.double() * total).minimum(torch.nextafter(total, torch.zeros_like(total)))  # a product may round up to the total
    return (steps <= level[:, None]).sum(-1)
