"""Guidance distillation (Hyper-Bagel 3.2.1): one evaluation with the scales as inputs, instead of two or three.

`target: reflow` trains the same student on the teacher's ODE pairs instead: the reflow baseline, and the real model of DMDO's `reflowed`.
`target: segments` trains a student further for its sampler's own steps: each learns where several of the teacher's steps lead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hyperbagel.core.config import changed
from hyperbagel.flow.path import interpolate
from hyperbagel.flow.schedule import shift_time, time_grid, times_between
from hyperbagel.flow.solvers import euler, euler_steps
from hyperbagel.train.contexts import Conditions, Measured, Scales, student_velocity, teacher_velocity, velocity
from hyperbagel.train.distill import DistillRecipe, DistillStage, seeded
from hyperbagel.train.losses.cfg import cfg_loss
from hyperbagel.train.losses.tscd import jump
from hyperbagel.train.stage import Draws

_TOGETHER = 11  # key of the generators that all ranks share
_TARGETS_OF = {  # keys that not every target reads
    "teacher": ("reflow",),
    "reflow_steps": ("reflow",),
    "substeps": ("segments",),
    "time_shift": ("guided", "reflow"),  # segments learns the sampler's own times
    "on_policy": ("guided", "segments"),
    "on_policy_steps": ("guided",),
    "scale_draws": ("guided",),
}


class Recipe(DistillRecipe):
    """Settings of the stage "cfg"."""

    target: Literal["guided", "reflow", "segments"] = "guided"
    teacher: Path | None = None  # reflow: a guidance-distilled student whose ODE makes the pairs; None: the guided base
    reflow_steps: int = Field(default=24, ge=1)
    on_policy: float = Field(default=0.0, ge=0, le=1)  # guided, segments: share of batches whose x_t the student itself has reached
    on_policy_steps: int = Field(default=6, ge=2)  # guided: most steps it takes from noise to there
    time_shift: float | None = Field(default=None, gt=0)  # of the training times; None: `shift`, the sampler's
    substeps: int = Field(default=4, ge=1)  # segments: the teacher's steps for each step of the student's sampler
    scale_draws: int = Field(default=1, ge=1)  # guided: pairs of scales for each x_t; their targets share the teacher's evaluations

    @model_validator(mode="after")
    def _of_the_target(self) -> Recipe:
        """Refuse settings of another target, so that nobody believes a student teaches where the base does."""
        for key in changed(self, _TARGETS_OF):
            if self.target not in (targets := _TARGETS_OF[key]):
                raise ValueError(f"{key} is of target={' or '.join(targets)}, got target={self.target}; set it or leave {key} out")
        return self


@dataclass
class Prepared:
    conditions: Conditions
    scales: Scales
    x_t: Tensor  # [B, N, C]
    t: Tensor  # [B]
    target: Tensor  # [B, N, C], the velocity to learn


@dataclass
class Guided:
    """States [S, B, N, C] at times [S] on the teacher's own trajectory, its guided velocities there (target), and how much guidance changes
    them."""

    measured: Measured
    times: Tensor
    states: Tensor
    target: Tensor
    change: Tensor  # [S], mean square over all values


class CfgStage(DistillStage):
    """One player, "student". Guidance distillation is a regression and is measured by its own error: `learned` is the share of the guidance
    that the student gives, 0 for the base without guidance and 1 for the guided teacher. The other targets are measured by `match`: how
    close the student comes to the teacher's picture of the same noise.
    """

    recipe: Recipe

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.teacher = self.frozen(recipe.teacher) if recipe.teacher else None
        if recipe.measure == "score":
            self.best_metric = "learned" if recipe.target == "guided" else "match"
        self.ways: list[Guided] = []
        if recipe.target == "guided" and self.measured:
            with self.reporting("measuring the teacher's way") as report:
                self.ways = [self._way(m) for m in report.count(self.measured, len(self.measured))]

    @torch.no_grad()
    def _way(self, m: Measured, steps: int = 8) -> Guided:
        """The teacher's trajectory from the first noise, guided with `usual_scales`."""
        run, times = self.guided_teacher(m.conditions, self.usual_scales(m.conditions)), time_grid(steps, self.recipe.shift)
        with self.amp():
            states = torch.stack([m.noises[0], *(x for _, x in euler_steps(m.noises[0], run, times))])[:-1]
            target = torch.stack([run(x, float(t)) for x, t in zip(states, times[:-1], strict=True)])
            unguided = torch.stack(
                [
                    velocity(self.base, m.conditions.full, m.conditions, x, t.to(x.device).repeat(len(x)))
                    for x, t in zip(states, times[:-1], strict=True)
                ]
            )
        return Guided(m, times[:-1], states, target, (unguided - target).square().mean(dim=(1, 2, 3)))

    def evaluate(self, step: int) -> dict[str, float]:
        """Adds `learned`: 1 - |v_S - v_guided|^2 / |v - v_guided|^2 at the usual scales, over all states of the teacher's trajectory."""
        figures = super().evaluate(step)
        found: dict[str, float] = {}
        with self.players["student"].averaged():
            for way in self.ways:
                c = way.measured.conditions
                run = self.as_velocity(self.network, c, self.usual_scales(c))
                error = sum((run(x, float(t)) - v).square().mean() for x, t, v in zip(way.states, way.times, way.target, strict=True))
                found[f"{c.source}_learned"] = 1 - float(error / way.change.sum())
        if found:
            found["learned"] = sum(found.values()) / len(found)
        return figures | found

    def prepare(self, step: int, rng: Draws) -> Prepared:
        r, conditions = self.recipe, self.conditions(rng)
        scales, e = self.scales(conditions, rng), self.noise(conditions, rng)
        # the same on all ranks: where the student's layers are split over them, every rank must run it equally often
        together = Draws.at(r.seed, _TOGETHER, step).python
        on_policy = together.random() < r.on_policy
        if r.target == "segments":
            return self.segments(conditions, scales, e, on_policy=on_policy)
        t = shift_time(self.uniform(rng, len(conditions)), r.time_shift or r.shift)
        if r.target == "guided":
            if on_policy:
                x_t = self.reached(conditions, scales, e, t, together.randint(2, r.on_policy_steps))
            else:
                x_t = interpolate(conditions.x0, e, t[:, None, None])
            return self.guided(conditions, scales, x_t, t, rng)
        run = self.as_velocity(self.teacher, conditions, scales) if self.teacher else self.guided_teacher(conditions, scales)
        x0 = euler(e, run, time_grid(r.reflow_steps, r.shift))  # the pair (x_T, x_0) of the teacher's own ODE
        return Prepared(conditions, scales, interpolate(x0, e, t[:, None, None]), t, e - x0)

    def guided(self, conditions: Conditions, scales: Scales, x_t: Tensor, t: Tensor, rng: Draws) -> Prepared:
        """The teacher's velocities at x_t, under `scales` and `scale_draws` - 1 more pairs.

        ours: all pairs share the teacher's evaluations, and rows of one x_t differ by nothing but their scales.
        """
        k = self.recipe.scale_draws
        drawn = [scales, *(self.scales(conditions, rng) for _ in range(k - 1))]
        every = Scales(*(torch.stack([getattr(one, name) for one in drawn], dim=1).flatten() for name in ("text", "image")))
        target = teacher_velocity(self.base, conditions, every, x_t, t, self.settings(conditions))
        return Prepared(conditions.repeat(k), every, x_t.repeat_interleave(k, dim=0), t.repeat_interleave(k), target)

    def segments(self, conditions: Conditions, scales: Scales, e: Tensor, *, on_policy: bool) -> Prepared:
        """Every step of the sampler at once, [nfe B, N, C]: from the student's own states (`on_policy`), or from states between noise and
        data, to where `substeps` Euler steps of the guided teacher lead. The target is the mean velocity on the way.

        ours (progressive distillation, Salimans & Ho 2022, on the student's own states): the target then makes up for what few steps lose.
        """
        r, n = self.recipe, len(conditions)
        grid = time_grid(r.nfe, r.shift).to(e.device)
        if on_policy:
            states = self.roll_out(self.network, conditions, scales, e, grid)[:-1]
        else:
            states = [interpolate(conditions.x0, e, t) for t in grid[:-1]]
        every = conditions.repeat(r.nfe)
        guidance = Scales(*(one.repeat_interleave(r.nfe) for one in (scales.text, scales.image)))
        x, t, end = torch.stack(states, dim=1).flatten(0, 1), grid[:-1].repeat(n), grid[1:].repeat(n)
        y = x
        for now, then in pairwise(times_between(t, end, r.substeps, r.shift)):
            y = jump(y, teacher_velocity(self.base, every, guidance, y, now, self.settings(conditions)), now, then)
        return Prepared(every, guidance, x, t, (x - y) / (t - end)[:, None, None])

    def reached(self, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor, steps: int) -> Tensor:
        """The states that the current student reaches at times t [B], in `steps` Euler steps from noise x [B, N, C] at t = 1.

        ours (on-policy distillation; DAgger, Ross et al. 2011): guidance leads away from the path between noise and data, to states that
        the student is otherwise never shown. Sampled with few steps, it also meets its own errors.
        """
        for now, then in pairwise(times_between(torch.ones_like(t), t, steps, self.recipe.shift)):
            x = jump(x, student_velocity(self.network, conditions, scales, x, now), now, then)
        return x

    def loss(self, player: str, batch: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        v = student_velocity(self.network, batch.conditions, batch.scales, batch.x_t, batch.t)
        loss = cfg_loss(v, batch.target)
        return loss, {f"{batch.conditions.source}_mse": loss.detach()}


def build(recipe: Recipe, device: torch.device) -> CfgStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return CfgStage(recipe, device)
