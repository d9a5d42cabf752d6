"""Adversarial distillation on ODE pairs (Hyper-Bagel 3.2.4): from six evaluations to one.

The 6-NFE student makes pairs (x_T, x_0). The generator sees an x_t between them and predicts x0_hat, which discriminators in latent and in
pixel space judge against x_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from hyperbagel.flow.path import interpolate, x0_from_velocity
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import euler
from hyperbagel.train.contexts import Conditions, Scales, some, student_velocity
from hyperbagel.train.discriminator import LatentDiscriminator, PixelDiscriminator
from hyperbagel.train.distill import DistillRecipe, DistillStage, required, seeded
from hyperbagel.train.losses.adversarial import accuracy, approximate_r1, hinge_discriminator, hinge_generator
from hyperbagel.train.losses.tscd import pseudo_huber
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.stage import Draws, Player


class Recipe(DistillRecipe):
    """Settings of the stage "adp". `init`: the 6-NFE student of stage dmdo."""

    nfe: int = Field(default=1, ge=1)
    teacher: Path | None = None  # makes the pairs with its own sampler; None: `init`
    latent_weight: float = Field(default=0.85, ge=0)  # 3.2.4, DMDX's
    pixel_weight: float = Field(default=0.15, ge=0)
    huber_weight: float = Field(default=0.25, ge=0)  # ours: the pair is known, so a little regression holds the student; the paper has 0
    huber_c: float = Field(default=0.03, gt=0)
    full_noise: float = Field(default=0.5, ge=0, le=1)  # ours: share of the generator's times that are exactly 1, where one step starts
    r1_weight: float = Field(default=1.0, ge=0)
    r1_sigma: float = Field(default=0.05, gt=0)
    latent_heads: int = Field(default=4, ge=1)
    pixel_heads: int = Field(default=2, ge=1)
    pixel_samples: int = Field(default=0, ge=0)  # ours: pictures per batch that are decoded and judged in pixels; 0: all
    discriminator_optim: OptimConfig = OptimConfig(lr=2e-4, betas=(0.0, 0.95), warmup_steps=50, schedule="constant")


class Judges(nn.Module):
    """Both discriminators as one player."""

    def __init__(self, latent: LatentDiscriminator, pixel: PixelDiscriminator) -> None:
        super().__init__()
        self.latent, self.pixel = latent, pixel


@dataclass
class Prepared:
    conditions: Conditions
    scales: Scales
    x_T: Tensor  # [B, N, C]
    x_0: Tensor  # [B, N, C], the 6-NFE student's
    t: Tensor  # [B], the generator's
    tau: Tensor  # [B], the latent discriminator's
    noise: Tensor  # [B, N, C], the same for real and fake
    r1_noise: Tensor


def cubic_time(u: Tensor) -> Tensor:
    """t = 1 - (1 - u)^3 for u in [0, 1): biased to noise, mean 3/4 (3.2.4, DMDX's)."""
    return 1 - (1 - u) ** 3


class AdpStage(DistillStage):
    """Players "discriminator" and "student", in turns."""

    recipe: Recipe
    needs_pictures = False  # what the judges take as real is the 6-NFE student's

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        folder = required(recipe.teacher or recipe.init, "init", "the 6-NFE student of stage dmdo")
        teacher = self.freeze(self.load(folder))
        self.teacher, self.teacher_sampler = teacher.network(self.base), teacher.sampler
        judging = (("latent", recipe.latent_weight, self.in_latents), ("pixel", recipe.pixel_weight, self.in_pixels))
        self.judging = [one for one in judging if one[1] > 0]
        if self.judging:
            latent = LatentDiscriminator(self.base, teacher, recipe.latent_heads)
            self.judges = Judges(latent, PixelDiscriminator(self.base, recipe.pixel_heads)).to(device)
            self.players["discriminator"] = Player.of(self.judges, recipe.discriminator_optim)

    def turn(self, step: int) -> str:
        return ("discriminator", "student")[step % 2] if self.judging else "student"

    def prepare(self, step: int, rng: Draws) -> Prepared:
        conditions = self.conditions(rng)
        scales, x_T, n = self.scales(conditions, rng), self.noise(conditions, rng), len(conditions)
        times = time_grid(self.teacher_sampler.nfe, self.teacher_sampler.shift)
        x_0 = euler(x_T, self.as_velocity(self.teacher, conditions, scales), times)
        t = cubic_time(self.uniform(rng, n))
        t = torch.where(self.uniform(rng, n) < self.recipe.full_noise, torch.ones_like(t), t)
        tau = 0.98 * self.uniform(rng, n)  # 3.2.4: uniform
        return Prepared(conditions, scales, x_T, x_0, t, tau, self.noise(conditions, rng), self.noise(conditions, rng))

    def predict(self, batch: Prepared) -> Tensor:
        """x0_hat [B, N, C] of the generator."""
        t = batch.t[:, None, None]
        x_t = interpolate(batch.x_0, batch.x_T, t)
        return x0_from_velocity(x_t, student_velocity(self.network, batch.conditions, batch.scales, x_t, batch.t), t)

    def in_latents(self, batch: Prepared, x0: Tensor) -> list[Tensor]:
        noised = interpolate(x0, batch.noise, batch.tau[:, None, None])
        return self.judges.latent(batch.conditions, batch.scales, noised, batch.tau)

    def in_pixels(self, batch: Prepared, x0: Tensor) -> list[Tensor]:
        return self.judges.pixel(self.base, self.decode(x0[some(len(x0), self.recipe.pixel_samples)], batch.conditions))

    def judged(self, batch: Prepared, x0_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss for its prediction, and metrics."""
        r, name = self.recipe, batch.conditions.source
        values = {where: hinge_generator(judge(batch, x0_hat)) for where, _, judge in self.judging}
        values["huber"] = pseudo_huber(x0_hat, batch.x_0, r.huber_c)
        loss = r.huber_weight * values["huber"] + sum(weight * values[where] for where, weight, _ in self.judging)
        return loss, {f"{name}_{key}": value.detach() for key, value in values.items()}

    def loss(self, player: str, batch: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if player == "student":
            return self.judged(batch, self.predict(batch))
        r, name = self.recipe, batch.conditions.source
        with torch.no_grad():
            fake = self.predict(batch)
        total = torch.zeros((), device=fake.device)
        metrics: dict[str, Tensor] = {}
        for where, weight, judge in self.judging:
            real_scores, fake_scores = judge(batch, batch.x_0), judge(batch, fake)
            hinge = hinge_discriminator(real_scores, fake_scores)
            metrics |= {f"{name}_{where}_hinge": hinge.detach(), f"{name}_{where}_accuracy": accuracy(real_scores, fake_scores).detach()}
            total = total + weight * hinge
            if where == "latent" and r.r1_weight:
                slope = approximate_r1(real_scores, judge(batch, batch.x_0 + r.r1_sigma * batch.r1_noise))
                total, metrics[f"{name}_r1"] = total + weight * r.r1_weight * slope, slope.detach()
        return total, metrics


def build(recipe: Recipe, device: torch.device) -> AdpStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return AdpStage(recipe, device)
