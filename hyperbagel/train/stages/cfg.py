"""Guidance distillation (Hyper-Bagel 3.2.1): one evaluation with the scales as inputs, in place of two or three.

`target: reflow` makes the same student from the teacher's ODE pairs instead: the reflow baseline, and the real model of DMDO's `reflowed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hyperbagel.flow.path import interpolate
from hyperbagel.flow.schedule import shift_time, time_grid, unshift_time
from hyperbagel.flow.solvers import euler
from hyperbagel.train.contexts import Conditions, Scales, student_velocity, teacher_velocity
from hyperbagel.train.distill import DistillRecipe, DistillStage, seeded
from hyperbagel.train.losses.cfg import cfg_loss
from hyperbagel.train.losses.tscd import jump
from hyperbagel.train.stage import Draws


class Recipe(DistillRecipe):
    """Settings of the stage "cfg"."""

    target: Literal["guided", "reflow"] = "guided"
    teacher: Path | None = None  # reflow: a guidance-distilled student whose ODE makes the pairs; None: the guided base
    reflow_steps: int = Field(default=24, ge=1)
    on_policy: float = Field(default=0.0, ge=0, le=1)  # guided: share of batches whose x_t the student itself has reached
    on_policy_steps: int = Field(default=6, ge=2)  # at most, from noise to there


@dataclass
class Prepared:
    conditions: Conditions
    scales: Scales
    x_t: Tensor  # [B, N, C]
    t: Tensor  # [B]
    target: Tensor  # [B, N, C], the velocity to learn


class CfgStage(DistillStage):
    """One player, "student". A regression: how near the teacher's picture of the same noise, is what it is measured by."""

    best_metric = "match"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.target, self.reflow_steps = recipe.target, recipe.reflow_steps
        self.on_policy, self.on_policy_steps = recipe.on_policy, recipe.on_policy_steps
        self.teacher = self.frozen(recipe.teacher) if recipe.teacher else None

    def prepare(self, step: int, rng: Draws) -> Prepared:
        conditions = self.conditions(rng)
        scales, e = self.scales(conditions, rng), self.noise(conditions, rng)
        t = shift_time(self.uniform(rng, len(conditions)), self.recipe.shift)
        if self.target == "guided":
            if rng.python.random() < self.on_policy:
                x_t = self.reached(conditions, scales, e, t, rng.python.randint(2, self.on_policy_steps))
            else:
                x_t = interpolate(conditions.x0, e, t[:, None, None])
            return Prepared(conditions, scales, x_t, t, teacher_velocity(self.base, conditions, scales, x_t, t, self.settings(conditions)))
        run = self.as_velocity(self.teacher, conditions, scales) if self.teacher else self.guided_teacher(conditions, scales)
        x0 = euler(e, run, time_grid(self.reflow_steps, self.recipe.shift))  # the pair (x_T, x_0) of the teacher's own ODE
        return Prepared(conditions, scales, interpolate(x0, e, t[:, None, None]), t, e - x0)

    def reached(self, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor, steps: int) -> Tensor:
        """Where the student as it is comes to at times t [B] in `steps` Euler steps from noise x [B, N, C] at 1.

        ours (on-policy distillation; DAgger, Ross et al. 2011): guidance leads away from the path between noise and data, and what the
        student meets there it was never shown. Sampled with few steps it also meets its own errors.
        """
        u = unshift_time(t, self.recipe.shift)
        times = shift_time(1 - torch.linspace(0, 1, steps + 1, device=x.device)[:, None] * (1 - u), self.recipe.shift)  # [steps + 1, B]
        for now, then in pairwise(times):
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
