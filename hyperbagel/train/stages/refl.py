"""Reward feedback on the one-step student (Hyper-Bagel 3.2.5), with the adversarial loss of stage adp kept on.

ours: the same for a student of several steps, with the gradient through its sampler (`gradient_steps`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import euler
from hyperbagel.train.distill import seeded
from hyperbagel.train.losses.refl import balanced_weight, refl_loss, with_gradient
from hyperbagel.train.rewards import AnswerReward, Reward, foreign_reward, load_reward
from hyperbagel.train.stages import adp
from hyperbagel.train.stages.adp import AdpStage, Prepared, some


class Recipe(adp.Recipe):
    """Settings of the stage "refl". `init`: the 1-NFE student of stage adp; `teacher`: the 6-NFE student that makes the pairs."""

    reward: Path | None = None  # folder of stage reward, or what `reward_entry` reads
    reward_kind: Literal["preferences", "answers"] = "preferences"  # answers (ours): the base is asked about the picture; needs no folder
    question: str | None = None  # answers: asked of pictures that bring no questions; {prompt} stands for what was asked for
    answer: str = "Yes"  # the right one to `question`
    reward_entry: str | None = None  # "module:function" of a reward model of your own (HPSv3 and the like)
    ceiling: float = 6.0  # 3.2.5, for HPSv3; set it to where your reward's best pictures lie
    reward_samples: int = Field(default=0, ge=0)  # pictures of a batch that are decoded and rewarded; 0: all
    gradient_steps: int = Field(default=0, ge=0)  # ours (DRaFT-K, Clark et al. 2024): last steps of the student's sampler with gradient;
    # 0: one prediction from x_t, which is the whole sampler of a 1-NFE student (the paper's)
    rewarded: list[str] | None = None  # sources whose pictures are rewarded; the others only hold the student; None: all
    reward_cap: float = Field(default=0.3, gt=0)  # ours: longest the reward's gradient may be beside the adversarial one


class ReflStage(AdpStage):
    """Players as in adp; keeps the checkpoint with the best held-out reward."""

    best_metric = "reward"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        if recipe.teacher is None:
            raise InputError("teacher: got no folder, expected the 6-NFE student of stage dmdo, set teacher=RUN/export")
        recipe.check_sources("rewarded", recipe.rewarded or ())
        super().__init__(recipe, device)
        self.feedback = recipe
        self.reward = self._reward(recipe)

    def _reward(self, recipe: Recipe) -> Reward:
        if recipe.reward_entry:
            return foreign_reward(recipe.reward_entry, recipe.reward, self.device, self.tokenizer)
        if recipe.reward_kind == "answers":
            return AnswerReward(self.base, self.spec, self.tokenizer, recipe.question, recipe.answer)
        if recipe.reward is None:
            raise InputError("reward: got no folder, expected one of stage reward, set reward=RUN/export, reward_kind or reward_entry")
        return load_reward(recipe.reward, self.base, self.spec)

    def is_rewarded(self, source: str) -> bool:
        return self.feedback.rewarded is None or source in self.feedback.rewarded

    def predict(self, batch: Prepared) -> Tensor:
        """x0_hat [B, N, C]: as in adp, or the end of the student's sampler from x_T."""
        k = self.feedback.gradient_steps
        if not k:
            return super().predict(batch)
        run = self.as_velocity(self.network, batch.conditions, batch.scales)
        times = time_grid(self.feedback.nfe, self.feedback.shift)
        split = max(0, self.feedback.nfe - k)
        with torch.no_grad():
            x = euler(batch.x_T, run, times[: split + 1])
        return euler(x, run, times[split:])

    def loss(self, player: str, batch: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        r, name = self.feedback, batch.conditions.source
        if player != "student" or not self.is_rewarded(name):
            return super().loss(player, batch, step)
        x0_hat = self.predict(batch)
        x0 = x0_hat.detach().requires_grad_()  # judges and reward are differentiated once, down to here; the student once, from here
        loss, metrics = self.judged(batch, x0)
        rows = some(len(x0), r.reward_samples)
        score = self.reward(self.decode(x0[rows], batch.conditions), batch.conditions.samples[rows])
        feedback = refl_loss(score, r.ceiling)
        adversarial, reward = (torch.autograd.grad(term, x0)[0] for term in (loss, feedback))
        # without judges only the pair holds the student, whose gradient is zero at first: nothing to be balanced against
        weight = balanced_weight(adversarial, reward, r.reward_cap) if self.judging else torch.ones_like(loss)
        metrics |= {f"{name}_reward": score.detach().mean(), f"{name}_reward_weight": weight}
        return with_gradient(x0_hat, adversarial + weight * reward, (loss + weight * feedback).detach()), metrics

    def evaluate(self, step: int) -> dict[str, float]:
        """As in adp, and the averaged student's held-out reward beside the teacher's pictures'."""
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
