"""Exponential moving average of trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hyperbagel.train.distributed import local


def decay_at(updates: int, decay: float, ramp: bool = True) -> float:
    """Decay of update number `updates` (from 0): min(decay, (1 + n) / (10 + n)), or without `ramp` the decay itself.

    A constant decay would remember a random start for 1 / (1 - decay) steps. The ramp forgets it at once, but for 9 / (1 - decay) steps the
    average spans fewer steps than it is meant to: after 700 it reaches back 78, not 500. So there is no ramp where training starts from
    weights that are good already (the student of the stage before).
    """
    return min(decay, (1 + updates) / (10 + updates)) if ramp else decay


class Ema:
    """fp32 shadow copies of named parameters: shadow <- d shadow + (1 - d) parameter."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, ramp: bool = True) -> None:
        self.decay, self.ramp = decay, ramp
        self.updates = 0
        self.shadow: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """One step towards `parameters` (the names given at the start)."""
        d = decay_at(self.updates, self.decay, self.ramp)
        names = list(self.shadow)
        torch._foreach_lerp_([local(self.shadow[n]) for n in names], [local(parameters[n].detach()).float() for n in names], 1 - d)
        self.updates += 1

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the averages into `parameters` for the duration of the block, then restore the trained values bit for bit."""
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        with torch.no_grad():
            for name, value in self.shadow.items():
                parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)
