"""What the tests share that write a stage's losses out by hand: networks that all differ, draws that are watched, arithmetic of its own.

Nothing here calls `train.losses`, `flow.path`, `flow.schedule` or `flow.solvers`: those are what the stages use, and what is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tiny_base import make
from torch import Tensor, nn

from hyperbagel.model.student import Sampler, StudentNetwork, save_student
from hyperbagel.train.contexts import Conditions, Scales, student_velocity
from hyperbagel.train.discriminator import Head
from hyperbagel.train.stages import cfg

STD = 0.05  # of what moves a network: the base's own weights have 0.2


def moved(values: Mapping[str, Tensor], seed: int) -> None:
    """Moves tensors in place, so that two networks that began as one say different things."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in values.values():
            value.add_(STD * torch.randn(value.shape, generator=generator))


def part_ways(stage: Any) -> None:
    """The trained student, its average, and whoever plays against it, away from one another and from the frozen teacher.

    A stage begins with all of them equal; a test at that place cannot tell which of them a stage asks.
    """
    for seed, player in enumerate(stage.players.values()):
        moved(player.parameters, 10 + seed)
        if player.ema:
            moved(player.ema.shadow, 20 + seed)
    for head in stage_heads(stage):
        with torch.no_grad():  # fresh heads say little more than 0: spread their judgements over both sides of the hinges' corners
            head.out.weight.mul_(8.0)


def stage_heads(stage: Any) -> list[Head]:
    """The heads of all of a stage's discriminators."""
    return [module for player in stage.players.values() for module in player.module.modules() if isinstance(module, Head)]


def write_student(base: Path, folder: Path, seed: int, sampler: Sampler) -> Path:
    """A student folder away from the base, with a sampler of its own."""
    stage: Any = make(cfg, base)
    moved(dict(stage.student.named_parameters()), seed)
    stage.student.sampler = sampler
    save_student(folder, stage.student, stage.mark)
    stage.close()
    return folder


def average_of(stage: Any) -> StudentNetwork:
    """The averaged student as a network of its own, made without `Player.averaged`."""
    student = copy.deepcopy(stage.student)
    student.load_state_dict(student.state_dict() | stage.players["student"].ema.shadow)
    return student.network(stage.base)


@dataclass
class Seen:
    """What a stage drew, in order."""

    uniforms: list[Tensor] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(stage: Any, given: Mapping[tuple[int, ...], Tensor] | None = None) -> Iterator[Seen]:
    """Notes what a stage draws. given: uniform draws to put in place of its own, by their shape."""
    seen, uniform, noise = Seen(), stage.uniform, stage.noise

    def draw(rng: Any, *shape: int) -> Tensor:
        seen.uniforms.append((given or {}).get(shape, uniform(rng, *shape)))
        return seen.uniforms[-1]

    def normal(conditions: Any, rng: Any) -> Tensor:
        seen.noises.append(noise(conditions, rng))
        return seen.noises[-1]

    stage.uniform, stage.noise = draw, normal
    try:
        yield seen
    finally:
        del stage.uniform, stage.noise


def says(network: StudentNetwork, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor | float) -> Tensor:
    """A network's velocity [B, N, C] of all rows, at times [B] or at one."""
    return student_velocity(network, conditions, scales, x, torch.as_tensor(t).expand(len(x)))


def col(t: Tensor) -> Tensor:
    """[B] as [B, 1, 1]."""
    return t.view(-1, 1, 1)


def shifted(u: Tensor, shift: float) -> Tensor:
    """An unshifted time u after the shift."""
    return u * shift / (u * shift + 1 - u)


def grid_of(steps: int, shift: float) -> list[float]:
    """A sampler's times, 1 first and 0 last."""
    return [shift * u / (shift * u + 1 - u) for u in (1 - k / steps for k in range(steps + 1))]


def walk(network: StudentNetwork, conditions: Conditions, scales: Scales, x: Tensor, times: Sequence[float]) -> list[Tensor]:
    """Euler's states along `times`, x first."""
    states = [x]
    for now, then in pairwise(times):
        states.append(states[-1] + (then - now) * says(network, conditions, scales, states[-1], now))
    return states


def mean_of(judgements: Sequence[Tensor]) -> Tensor:
    """Over judgements of a head, then over heads."""
    return sum((one.mean() for one in judgements), torch.zeros(())) / len(judgements)


def hinge_of(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """A discriminator's: real ones belong above 1, fake ones below -1."""
    return mean_of([(1 - one).clamp(min=0) for one in real]) + mean_of([(1 + one).clamp(min=0) for one in fake])


def huber_of(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mean over rows of sqrt(mean square + c^2) - c."""
    return torch.stack([((one - other).square().mean() + c**2).sqrt() - c for one, other in zip(x, y, strict=True)]).mean()


def gradients(loss: Tensor, module: nn.Module) -> Tensor:
    """By all parameters of a module, one behind the other; 0 where there is none."""
    own = list(module.parameters())
    found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(own, found, strict=True)])


def same(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, which is measured by the largest value: small ones of a long gradient are differences of large ones."""
    size = expected.detach().abs().max()
    assert size > 0 and torch.isfinite(size), "nothing to compare"
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=2e-5 * float(size))
