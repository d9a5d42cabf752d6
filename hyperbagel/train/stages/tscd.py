"""Trajectory segmented consistency distillation (Hyper-Bagel 3.2.2): three segments in one stage, an adversarial loss. Goal: structure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from hyperbagel.flow.path import interpolate
from hyperbagel.train.contexts import Conditions, Scales, student_velocity
from hyperbagel.train.discriminator import LatentDiscriminator
from hyperbagel.train.distill import DistillRecipe, DistillStage, required, seeded
from hyperbagel.train.losses.adversarial import accuracy, approximate_r1, hinge_discriminator, hinge_generator
from hyperbagel.train.losses.dmd import renoise_factors
from hyperbagel.train.losses.tscd import SegmentTimes, jump, pseudo_huber, segment_times
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.stage import Draws, Player


class Recipe(DistillRecipe):
    """Settings of the stage "tscd". `init`: the guidance-distilled student."""

    teacher: Path | None = None  # None: `init`
    segments: int = Field(default=3, ge=1)  # 3.2.2
    teacher_step: float = Field(default=0.02, gt=0, le=1)  # length of the teacher's step, unshifted time
    snap: float = Field(default=0.5, ge=0, le=1)  # ours: share of draws with s at the segment's end
    huber_weight: float = Field(default=0.25, ge=0)  # ours: 0 is the paper's
    huber_c: float = Field(default=0.03, gt=0)
    r1_weight: float = Field(default=1.0, ge=0)
    r1_sigma: float = Field(default=0.05, gt=0)
    discriminator_heads: int = Field(default=4, ge=1)
    discriminator_optim: OptimConfig = OptimConfig(lr=2e-4, betas=(0.0, 0.95), warmup_steps=50, schedule="constant")


@dataclass
class Prepared:
    conditions: Conditions
    scales: Scales
    x_tn: Tensor  # [B, N, C]
    times: SegmentTimes
    target: Tensor  # [B, N, C]: where the averaged student lands at s from the teacher's x_tm
    tau: Tensor  # [B]: noise level at which both ends are judged
    noise: Tensor  # [B, N, C], the same for both
    r1_noise: Tensor


class TscdStage(DistillStage):
    """Players "discriminator" and "student", in turns."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.teacher = self.frozen(required(recipe.teacher or recipe.init, "init", "the student of stage cfg"))
        self.judge = LatentDiscriminator(self.base, self.student, recipe.discriminator_heads).to(device)
        self.players["discriminator"] = Player.of(self.judge, recipe.discriminator_optim)

    def turn(self, step: int) -> str:
        return ("discriminator", "student")[step % 2]

    def prepare(self, step: int, rng: Draws) -> Prepared:
        r, conditions = self.recipe, self.conditions(rng)
        scales, e, n = self.scales(conditions, rng), self.noise(conditions, rng), len(conditions)
        times = segment_times(self.uniform(rng, 4, n), r.segments, r.teacher_step, r.shift, r.snap)
        x_tn = interpolate(conditions.x0, e, times.t_n[:, None, None])
        x_tm = jump(x_tn, student_velocity(self.teacher, conditions, scales, x_tn, times.t_n), times.t_n, times.t_m)
        with self.players["student"].averaged():
            target = jump(x_tm, student_velocity(self.network, conditions, scales, x_tm, times.t_m), times.t_m, times.s)
        tau = times.s + (1 - times.s) * 0.98 * self.uniform(rng, n)
        return Prepared(conditions, scales, x_tn, times, target, tau, self.noise(conditions, rng), self.noise(conditions, rng))

    def judged(self, batch: Prepared, x_s: Tensor) -> list[Tensor]:
        """Judgements of x_s [B, N, C]. ours: both ends are re-noised to one tau, so that the judge only sees noise levels that the teacher
        has seen."""
        a, c = renoise_factors(batch.times.s[:, None, None], batch.tau[:, None, None])
        return self.judge(batch.conditions, batch.scales, a * x_s + c * batch.noise, batch.tau)

    def loss(self, player: str, batch: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        r, name = self.recipe, batch.conditions.source
        with torch.set_grad_enabled(player == "student"):
            v = student_velocity(self.network, batch.conditions, batch.scales, batch.x_tn, batch.times.t_n)
            fake = jump(batch.x_tn, v, batch.times.t_n, batch.times.s)
        if player == "student":  # 3.2.2: no MSE, the adversarial loss alone; the stabiliser is ours
            adversarial = hinge_generator(self.judged(batch, fake))
            held = pseudo_huber(fake, batch.target, r.huber_c)
            return adversarial + r.huber_weight * held, {f"{name}_adversarial": adversarial.detach(), f"{name}_huber": held.detach()}
        real_scores, fake_scores = self.judged(batch, batch.target), self.judged(batch, fake.detach())
        loss = hinge_discriminator(real_scores, fake_scores)
        metrics = {f"{name}_hinge": loss.detach(), f"{name}_accuracy": accuracy(real_scores, fake_scores).detach()}
        if r.r1_weight:
            slope = approximate_r1(real_scores, self.judged(batch, batch.target + r.r1_sigma * batch.r1_noise))
            loss, metrics[f"{name}_r1"] = loss + r.r1_weight * slope, slope.detach()
        return loss, metrics


def build(recipe: Recipe, device: torch.device) -> TscdStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return TscdStage(recipe, device)
