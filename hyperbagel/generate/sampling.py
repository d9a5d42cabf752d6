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
    """logits [B, V] -> tokens [B]: argmax for T = 0, else one draw per row with that row's own generator (on the CPU).

    Raises RuntimeError for probabilities that are not finite.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature)
    if not bool(p.isfinite().all()):
        raise RuntimeError(NOT_FINITE)
    return draw_rows(p, generators)


def draw_rows(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row from p [B, V], by that row's own generator on the CPU -> [B].

    On a CPU it is a race: argmax of p_i / e_i with exponential e_i takes i with chance p_i, and rounding changes it only where two tokens
    nearly tie, however large V is. If p is on a GPU, copying e would cost; there one number per row is copied, and inverted (`draw`). A
    seed's draws therefore differ between the two.
    """
    return _drawn(p, torch.stack([_noise(p, g) for g in generators]).to(p.device))


def draw_ahead(p: Tensor, depths: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, list[list[Tensor]]]:
    """What `draw_rows` would draw at each of n places from p [B, n, V], where a place takes its row's depths[b, i]-th draw from now on
    (depths [B, n] < n) -> (tokens [B, n], each generator's states after 0, 1, 2 ... draws). The generators stay as they are."""
    most = int(depths.max()) + 1 if depths.device.type == "cpu" else depths.shape[1]  # on a GPU the look would be a wait
    noise, states = [], []
    for g in generators:
        after, drawn = [g.get_state()], []
        for _ in range(most):
            drawn.append(_noise(p, g))
            after.append(g.get_state())
        g.set_state(after[0])
        noise.append(torch.stack(drawn))
        states.append(after)
    rows = torch.arange(len(p), device=p.device)[:, None]
    return _drawn(p, torch.stack(noise).to(p.device)[rows, depths]), states


def _races(p: Tensor) -> bool:
    return p.device.type == "cpu"


def _noise(p: Tensor, generator: torch.Generator) -> Tensor:
    """What one draw from p [..., V] takes from a generator, on the CPU: [V] exponentials, or [1] in [0, 1)."""
    if _races(p):
        return torch.empty(p.shape[-1]).exponential_(generator=generator)
    return torch.rand(1, generator=generator, dtype=torch.float64)


def _drawn(p: Tensor, noise: Tensor) -> Tensor:
    """p [..., V] and the noise of each draw -> tokens [...]."""
    if _races(p):
        return (p / noise).argmax(-1)
    return draw(p.flatten(0, -2), noise.flatten()).view(p.shape[:-1])


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inversion: p [B, V], uniforms [B] in [0, 1) -> [B]. A token of probability 0 is never drawn."""
    steps = p.double().cumsum(-1)
    total = steps[:, -1]
    level = (uniforms.double() * total).minimum(torch.nextafter(total, torch.zeros_like(total)))  # a product may round up to the total
    return (steps <= level[:, None]).sum(-1)
