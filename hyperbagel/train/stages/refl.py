"""Reward feedback on the one-step student (Hyper-Bagel 3.2.5), with the adversarial loss of stage adp kept on.

ours: the same for a student of several steps, with the gradient through its sampler (`gradient_steps`).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from hyperbagel.core.config import changed
from hyperbagel.core.errors import InputError
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import euler
from hyperbagel.train.distill import seeded
from hyperbagel.train.losses.refl import balanced_weight, with_gradient
from hyperbagel.train.rewards import RewardSettings, feedback, open_reward
from hyperbagel.train.stages import adp
from hyperbagel.train.stages.adp import AdpStage, Prepared


class Recipe(adp.Recipe, RewardSettings):
    """Settings of the stage "refl". `init`: the 1-NFE student of stage adp; `teacher`: the 6-NFE student that makes the pairs."""

    # ours (DRaFT-K, Clark et al. 2024): how many last steps of the student's sampler get gradient; 0: one prediction from x_t, which is the
    # whole sampler of a 1-NFE student (the paper's)
    gradient_steps: int = Field(default=0, ge=0)
    rewarded: list[str] | None = None  # sources whose pictures are rewarded (None: all); the others only hold the student


class ReflStage(AdpStage):
    """Players as in adp; keeps the checkpoint with the best held-out reward."""

    recipe: Recipe
    best_metric = "reward"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        if recipe.teacher is None:
            raise InputError("teacher: got no folder, expected the 6-NFE student of stage dmdo, set teacher=RUN/export")
        recipe.check_sources("rewarded", recipe.rewarded or ())
        if not (recipe.latent_weight or recipe.pixel_weight) and changed(recipe, ("reward_cap",)):
            raise InputError(
                "reward_cap: got one without judges, expected some whose gradient it is relative to; set latent_weight or pixel_weight, or "
                "leave reward_cap out"
            )
        super().__init__(recipe, device)
        self.reward = open_reward(recipe, self.base, self.spec, self.tokenizer)
        held_out = [] if recipe.held_out is None else list(recipe.held_out.sources)
        if held_out and not any(map(self.is_rewarded, held_out)):
            raise InputError(f"held_out: got the sources {', '.join(held_out)}, none of them rewarded, expected one to choose the best by")

    def is_rewarded(self, source: str) -> bool:
        return self.recipe.rewarded is None or source in self.recipe.rewarded

    def predict(self, batch: Prepared) -> Tensor:
        """x0_hat [B, N, C]: as in adp or, with `gradient_steps`, the end of the student's sampler from x_T."""
        k = self.recipe.gradient_steps
        if not k:
            return super().predict(batch)
        run = self.as_velocity(self.network, batch.conditions, batch.scales)
        times = time_grid(self.recipe.nfe, self.recipe.shift)
        split = max(0, self.recipe.nfe - k)
        kind = self.device.type
        # autocast without its cache: weights that were cast without gradient must not serve the steps with gradient
        cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)
        with torch.no_grad(), cast:
            x = euler(batch.x_T, run, times[: split + 1])
        return euler(x, run, times[split:])

    def loss(self, player: str, batch: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        r, name = self.recipe, batch.conditions.source
        if player != "student" or not self.is_rewarded(name):
            return super().loss(player, batch, step)
        x0_hat = self.predict(batch)
        x0 = x0_hat.detach().requires_grad_()  # backward passes of judges and reward end here; the student's one begins here
        loss, metrics = self.judged(batch, x0)
        adversarial = torch.autograd.grad(loss, x0)[0]
        score, lack, reward = feedback(self.reward, r, lambda x: self.decode(x, batch.conditions), x0, batch.conditions.samples)
        # without judges only the pair holds the student, and that gradient is zero at first: nothing to balance against
        weight = balanced_weight(adversarial, reward, r.reward_cap) if self.judging else torch.ones_like(loss)
        metrics |= {f"{name}_reward": score, f"{name}_reward_weight": weight}
        return with_gradient(x0_hat, adversarial + weight * reward, loss + weight * lack), metrics

    def evaluate(self, step: int) -> dict[str, float]:
        """As in adp, and the mean held-out reward of the averaged student's pictures and of the teacher's."""
        figures = super().evaluate(step)
        own: list[float] = []
        theirs: list[float] = []
        with self.players["student"].averaged():
            for m in self.measured:
                if not self.is_rewarded(m.conditions.source):
                    continue
                for found, latents in ((own, self.pictures(m.conditions, m.noises)[0]), (theirs, m.teacher[0])):
                    found.append(self.reward(self.decode(latents, m.conditions), m.conditions.samples).mean().item())
        if own:
            figures |= {"reward": sum(own) / len(own), "teacher_reward": sum(theirs) / len(theirs)}
        return figures


def build(recipe: Recipe, device: torch.device) -> ReflStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return ReflStage(recipe, device)
