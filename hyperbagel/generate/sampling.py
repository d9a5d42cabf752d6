"""Sampling: from logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The lowest temperature used. Below it logits / T overflow fp32 (inf - inf is nan) or T itself rounds to 0; here the likeliest token
# already has all of the probability.
COLDEST = 1e-6

BROKEN = -2  # what is said where probabilities are not finite: no token, and no missing node (-1)
NOT_FINITE = "got probabilities that are not finite from the model, expected finite ones; its weights or caches are damaged"


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T) over the last dimension, in fp32; T > 0, at least COLDEST is used."""
    return (logits.float() / max(temperature, COLDEST)).softmax(-1)


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits [..., V] with -inf for all but the nucleus at T: the likeliest tokens, as few as have a probability of `top_p` together, and
    one at least (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, eq. 2). Greedy decoding needs none."""
    if temperature == 0 or top_p >= 1:
        return logits
    p, order = probabilities(logits, temperature).sort(dim=-1, descending=True, stable=True)
    outside = p.cumsum(-1) - p >= top_p  # what is likelier is enough
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


def pick(logits: Tensor, temperature: float, generators: Sequence[torch.Generator], top_p: float = 1.0) -> Tensor:
    """logits [B, V] -> tokens [B]: argmax for T = 0, else one draw per row from its `nucleus`, with that row's own generator (on the CPU);
    BROKEN where probabilities are not finite. `told` looks at them."""
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(nucleus(logits, temperature, top_p), temperature)
    return torch.where(p.isfinite().all(-1), draw_rows(p, generators), BROKEN)


def told(tokens: Tensor) -> list[int]:
    """Tokens [B] that were picked, as numbers: the one wait for the device of a step. Raises RuntimeError if one of them is BROKEN."""
    ids: list[int] = tokens.tolist()
    if BROKEN in ids:
        raise RuntimeError(NOT_FINITE)
    return ids


def draw_rows(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row from p [B, V], by that row's own generator on the CPU -> [B].

    On a CPU it is a race: argmax of p_i / e_i with exponential e_i takes i with chance p_i, and rounding changes it only where two tokens
    nearly tie, however large V is. If p is on a GPU, copying e would cost; there one number per row is copied, and inverted (`draw`). A
    seed's draws therefore differ between the two.
    """
    if p.device.type == "cpu":
        return (p / torch.stack([torch.empty(p.shape[1]).exponential_(generator=g) for g in generators])).argmax(-1)
    return draw(p, numbers(generators, 1)[:, 0].to(p.device))


def numbers(generators: Sequence[torch.Generator], n: int) -> Tensor:
    """The next n numbers in [0, 1) of each generator -> [B, n] in fp64, on the CPU."""
    return torch.stack([torch.rand(n, generator=g, dtype=torch.float64) for g in generators])


def look_ahead(generators: Sequence[torch.Generator], n: int) -> Tensor:
    """`numbers` that stay the next ones."""
    states = [g.get_state() for g in generators]
    ahead = numbers(generators, n)
    for g, state in zip(generators, states, strict=True):
        g.set_state(state)
    return ahead


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inversion: p [B, V], uniforms [B] in [0, 1) -> [B]. A token of probability 0 is never drawn."""
    steps = p.double().cumsum(-1)
    total = steps[:, -1]
    level = (uniforms.double() * total).minimum(torch.nextafter(total, torch.zeros_like(total)))  # a product may round up to the total
    return (steps <= level[:, None]).sum(-1)
