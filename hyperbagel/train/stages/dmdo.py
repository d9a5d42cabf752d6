"""Distribution matching distillation via ODE (Hyper-Bagel 3.2.3). Purpose: fidelity, and a student that keeps the plain Euler sampler.

Fake turn: roll out the student's few-step ODE from x_T, keep the whole trajectory, and teach the fake model where it ends. Student turn: on
the SAME trajectories, pick a segment, predict x0_hat from its start with gradient, and follow real minus fake at x_tau. `coupling` says how
x_tau is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hyperbagel.core.config import changed
from hyperbagel.flow.path import interpolate, x0_from_velocity
from hyperbagel.flow.schedule import shift_time, time_grid, times_between
from hyperbagel.flow.solvers import euler
from hyperbagel.model.student import StudentNetwork
from hyperbagel.train.contexts import Conditions, Scales, student_velocity, teacher_velocity
from hyperbagel.train.discriminator import LatentDiscriminator
from hyperbagel.train.distill import DistillRecipe, DistillStage, required, seeded
from hyperbagel.train.losses.adversarial import accuracy, hinge_discriminator, hinge_generator
from hyperbagel.train.losses.dmd import Coupled, Coupling, couple, dmd_gradient, dmd_loss, fake_loss
from hyperbagel.train.losses.refl import balanced_weight, with_gradient
from hyperbagel.train.losses.tscd import pseudo_huber
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.rewards import RewardSettings, feedback, open_reward
from hyperbagel.train.stage import Draws, Player

Share = Annotated[float, Field(ge=0, le=1)]
HOLD_C = 0.03  # c of the pseudo-Huber loss on held sources; the default of tscd and adp


class Recipe(DistillRecipe, RewardSettings):
    """Settings of the stage "dmdo". `init`: the student of stage tscd."""

    teacher: Path | None = None  # the real model: the guidance-distilled student; for `reflowed` one made with target=reflow
    # ours: `guided` takes the base with guidance as the real model (as in DMD2, Yin et al. 2024), since it still has what guidance
    # distillation lost; `teacher` then only says where the fake model starts
    real: Literal["teacher", "guided"] = "teacher"
    # real=guided, by source: how far the real model's scales go from 1 towards the student's own; 1 unless named. Full guidance overshoots
    # where the condition leaves little open (edits): contrast grows
    guidance_share: dict[str, Share] = Field(default_factory=dict)
    held: list[str] = Field(default_factory=list)  # ours: sources that are not matched but held to `holder`, segment by segment
    holder: Path | None = None  # the student whose steps from each state of the trained one's ODE are the target; None: `init`
    hold_steps: int = Field(default=1, ge=1)  # steps of the holder in each segment: with 6, a six-step student leads a one-step one
    hold_weight: float = Field(default=1.0, gt=0)
    # DMD2 (Yin et al. 2024, 4.3): sources whose x0_hat is also judged, by heads on the fake model's features that learn to tell it from the
    # true pictures: they see what matching a model that has errors of its own cannot
    judged: list[str] = Field(default_factory=list)
    judge_heads: int = Field(default=4, ge=1)
    judge_weight: float = Field(default=0.1, gt=0)  # of the heads' loss, relative to the fake model's own
    judge_cap: float = Field(default=0.5, gt=0)  # cap on the judges' gradient, relative to matching's, row by row
    rewarded: list[str] = Field(default_factory=list)  # ours: sources whose x0_hat a reward pulls as well, as in stage refl
    coupling: Coupling = "tdm"  # ours: `paired` is the paper's and contracts (losses.dmd.contraction)
    tdm_span: Literal["segment", "rest"] = "segment"  # tdm: tau up to the segment's start, or up to 1
    fake_steps: int = Field(default=1, ge=1)  # fake turns before each student turn
    fake_first: int = Field(default=0, ge=0)  # ours: fake turns before the first student turn, so that it never follows a lagging fake
    normaliser_floor: float = Field(default=0.1, gt=0)
    fake_optim: OptimConfig = OptimConfig(
        lr=8e-4, betas=(0.0, 0.95), warmup_steps=50, schedule="constant"
    )  # 3 to 5 times the student's rate

    @model_validator(mode="after")
    def _real(self) -> Recipe:
        if self.real == "guided" and self.coupling == "reflowed":
            raise ValueError("real=guided does not know the pairs that coupling=reflowed asks about; take another coupling or real=teacher")
        if self.guidance_share and self.real != "guided":
            raise ValueError("guidance_share is of real=guided (a student has its guidance inside); set it or leave guidance_share out")
        if self.holder and not self.held:
            raise ValueError("holder leads sources that are held, and held names none; set held or leave holder out")
        self.check_sources("guidance_share", self.guidance_share)
        self.check_sources("held", self.held)
        self.check_sources("rewarded", self.rewarded)
        self.check_sources("judged", self.judged)
        if self.judged and self.coupling != "independent":
            raise ValueError(f"judged: got coupling={self.coupling}, expected independent; set it or leave judged out")
        if not self.held and (idle := changed(self, ("hold_steps", "hold_weight"))):
            raise ValueError(f"{idle[0]} is of sources that are held, and held names none; set held or leave {idle[0]} out")
        if self.coupling != "tdm" and changed(self, ("tdm_span",)):
            raise ValueError(f"tdm_span is of coupling=tdm, got {self.coupling}; set it or leave tdm_span out")
        if not self.judged and (idle := changed(self, ("judge_heads", "judge_weight", "judge_cap"))):
            raise ValueError(f"{idle[0]} is of judges, and judged names no source; set judged or leave {idle[0]} out")
        if not self.rewarded and (idle := changed(self, RewardSettings.model_fields)):
            raise ValueError(f"{idle[0]} is of a reward, and rewarded names no source; set rewarded or leave {idle[0]} out")
        for key in ("rewarded", "judged"):
            if both := sorted({*self.held} & {*getattr(self, key)}):
                raise ValueError(f"{key} names {both[0]!r}, which is held and therefore not matched; leave it out of {key} or held")
        return self


@dataclass
class Trajectory:
    """The student's ODE from x_T: its states [B, N, C] at each of `times`, x_T first and x_0 last."""

    conditions: Conditions
    scales: Scales
    states: list[Tensor]
    times: Tensor


@dataclass
class Prepared:
    trajectory: Trajectory
    segment: int  # from times[segment] to times[segment + 1]
    tau: Tensor  # [B]
    noise: Tensor  # [B, N, C]


class DmdoStage(DistillStage):
    """Players "fake" (with heads, where a source is judged) and "student"."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        teacher = required(recipe.teacher, "teacher", "the student of stage cfg (for coupling=reflowed: of stage cfg with target=reflow)")
        self.teacher = self.frozen(teacher) if recipe.real == "teacher" else None
        self.holder = self.frozen(recipe.holder or required(recipe.init, "init", "the student of stage tscd")) if recipe.held else None
        fake = self.load(teacher)  # starts as the real model
        self.judge = LatentDiscriminator(self.base, fake, recipe.judge_heads).to(device) if recipe.judged else None
        self.needs_pictures = self.judge is not None  # without judges, training sees the student's own trajectories alone
        self.fake = fake.network(self.base) if self.judge is None else self.judge.network
        self.players["fake"] = Player.of(fake if self.judge is None else self.judge, recipe.fake_optim)
        self.reward = open_reward(recipe, self.base, self.spec, self.tokenizer) if recipe.rewarded else None
        self.kept: list[Trajectory] = []  # of the last fake step, one per micro-batch
        self.kept_from: dict[str, Any] | None = None  # that step, and the loader's position before it

    def turn(self, step: int) -> str:
        after, cycle = step - self.recipe.fake_first, self.recipe.fake_steps + 1
        return "student" if after >= 0 and after % cycle == cycle - 1 else "fake"

    # -- batches ---------------------------------------------------------------------------------------------------------------

    def prepare(self, step: int, rng: Draws) -> Prepared:
        if self.turn(step) == "fake":
            if self.kept_from is None or self.kept_from["step"] != step:
                self.kept, self.kept_from = [], {"step": step, "loader": self.loader.state_dict(), "tail": list(rng.key[3:])}
            trajectory = self.trajectory(rng)
            self.kept.append(trajectory)
        else:  # 3.2.3: the generator step reuses the fake step's trajectories
            trajectory = self.kept.pop(0) if self.kept else self.trajectory(rng)
            self.kept_from = self.kept_from if self.kept else None
        segment = int(torch.randint(len(trajectory.states) - 1, (), generator=rng.torch))
        u = 0.02 + 0.96 * self.uniform(rng, len(trajectory.conditions))  # away from the ends, where scores say nothing or blow up
        return Prepared(trajectory, segment, self.level(trajectory.times, segment, u), self.noise(trajectory.conditions, rng))

    def trajectory(self, rng: Draws) -> Trajectory:
        r, conditions = self.recipe, self.conditions(rng)
        scales, x_T, times = self.scales(conditions, rng), self.noise(conditions, rng), time_grid(r.nfe, r.shift)
        return Trajectory(conditions, scales, self.roll_out(self.network, conditions, scales, x_T, times), times)

    def level(self, times: Tensor, segment: int, u: Tensor) -> Tensor:
        """tau [B] from u in (0, 1)."""
        if self.recipe.coupling != "tdm":
            return shift_time(u, self.recipe.shift)
        s = float(times[segment + 1])
        top = float(times[segment]) if self.recipe.tdm_span == "segment" else 1.0
        return s + (top - s) * u

    def refuse(self) -> None:
        self.kept, self.kept_from = [], None

    def state(self) -> dict[str, Any]:
        """In the middle of a cycle also how to make the kept trajectories again (the student has not moved since)."""
        if not self.kept or self.kept_from is None:
            return super().state()
        redo = {"step": self.kept_from["step"], "count": len(self.kept), "tail": self.kept_from["tail"]}
        return {"loader": self.kept_from["loader"], "redo": redo}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if "redo" in state:
            step, tail = state["redo"]["step"], state["redo"].get("tail", [])  # tail: not empty if the step had been refused (train.loop)
            for micro in range(state["redo"]["count"]):  # the loop's own draws
                self.batch(step, Draws.at(self.recipe.seed, step, self.world.rank * self.recipe.accumulate + micro, *tail))

    # -- losses ----------------------------------------------------------------------------------------------------------------

    def lead(self, holder: StudentNetwork, t: Trajectory, segment: int) -> Tensor:
        """Where the holder gets to at a segment's end, from the student's state at its start: [B, N, C]."""
        times = times_between(t.times[segment], t.times[segment + 1], self.recipe.hold_steps, self.recipe.shift)
        return euler(t.states[segment], self.as_velocity(holder, t.conditions, t.scales), times)

    def real(self, t: Trajectory, x: Tensor, tau: Tensor) -> Tensor:
        """The real model's velocity [B, N, C] at times tau [B]."""
        if self.teacher is None:
            share = self.recipe.guidance_share.get(t.conditions.source, 1.0)
            scales = Scales(*(1 + share * (one - 1) for one in (t.scales.text, t.scales.image)))
            return teacher_velocity(self.base, t.conditions, scales, x, tau, self.settings(t.conditions))
        return student_velocity(self.teacher, t.conditions, t.scales, x, tau)

    def coupled(self, batch: Prepared, x0: Tensor, x_s: Tensor) -> Coupled:
        s = torch.full_like(batch.tau, float(batch.trajectory.times[batch.segment + 1]))
        return couple(self.recipe.coupling, x0, batch.trajectory.states[0], x_s, s, batch.tau, batch.noise)

    def loss(self, player: str, batch: Prepared, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if player == "fake":
            return self.fake_turn(batch)
        t = batch.trajectory
        at = torch.full_like(batch.tau, float(t.times[batch.segment]))
        v = student_velocity(self.network, t.conditions, t.scales, t.states[batch.segment], at)
        if self.holder is not None and t.conditions.source in self.recipe.held:
            return self.held_turn(batch, v, self.holder)
        return self.matched_turn(batch, v)

    def held_turn(self, batch: Prepared, v: Tensor, holder: StudentNetwork) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's turn on a held source: its step, with velocity v [B, N, C], should end where the holder's steps do."""
        t = batch.trajectory
        x, at, end = t.states[batch.segment], float(t.times[batch.segment]), float(t.times[batch.segment + 1])
        with torch.no_grad():
            y = self.lead(holder, t, batch.segment)
        loss = self.recipe.hold_weight * pseudo_huber(x + (end - at) * v, y, HOLD_C)
        return loss, {f"{t.conditions.source}_hold": loss.detach()}

    def matched_turn(self, batch: Prepared, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's turn on any other source: distribution matching at x0_hat, which judges and a reward may pull as well."""
        r, t = self.recipe, batch.trajectory
        name = t.conditions.source
        x, at, end = t.states[batch.segment], float(t.times[batch.segment]), float(t.times[batch.segment + 1])
        x0_hat = x0_from_velocity(x, v, at)
        judged, rewarded = name in r.judged, name in r.rewarded
        x0 = x0_hat.detach().requires_grad_(judged or rewarded)
        with torch.set_grad_enabled(judged):
            x_tau = self.coupled(batch, x0, x + (end - at) * v.detach()).x_tau
            v_fake, judgements = self.look(t, x_tau, batch.tau)
        with torch.no_grad():
            tau = batch.tau[:, None, None]
            real, fake = (x0_from_velocity(x_tau, one, tau) for one in (self.real(t, x_tau, batch.tau), v_fake))
            g = dmd_gradient(x0, fake, real, r.normaliser_floor)
        loss = dmd_loss(x0_hat, g)
        gap = (fake - real).square().mean().sqrt()
        metrics = {f"{name}_dmd": loss.detach(), f"{name}_gap": gap, f"{name}_size": x0.detach().square().mean().sqrt()}
        pulls: list[tuple[str, Tensor, Tensor, float]] = []  # (what else pulls, its loss, the gradient of that by x0, the cap on it)
        if judged:
            lack = hinge_generator(judgements)
            metrics[f"{name}_adversarial"] = lack.detach()
            pulls.append(("adversarial", lack, torch.autograd.grad(lack, x0)[0], r.judge_cap))
        if rewarded and self.reward is not None:
            score, lack, along = feedback(self.reward, r, lambda x: self.decode(x, t.conditions), x0, t.conditions.samples)
            metrics[f"{name}_reward"] = score
            pulls.append(("reward", lack, along, r.reward_cap))
        if not pulls:
            return loss, metrics
        matching = g / g.numel()  # the gradient of dmd_loss by x0_hat; the caps are relative to its length
        gradient, value = matching, loss
        for what, lack, along, cap in pulls:
            weight = balanced_weight(matching, along, cap, by_row=True)
            gradient, value = gradient + weight * along, value + lack
            pulled = along.flatten(1).any(1)  # not rows at the reward's ceiling, or whose pictures it has not seen
            mean = (weight.flatten() * pulled).sum() / pulled.sum().clamp(min=1)
            metrics[f"{name}_{what}_weight"] = torch.where(pulled.any(), mean, 1.0)  # no wait for the device
        return with_gradient(x0_hat, gradient, value), metrics

    def look(self, t: Trajectory, x: Tensor, tau: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The fake model's velocity [B, N, C] at times tau [B], and its heads' judgements where the source is judged."""
        if self.judge is not None and t.conditions.source in self.recipe.judged:
            return self.judge.look(t.conditions, t.scales, x, tau)
        return student_velocity(self.fake, t.conditions, t.scales, x, tau), []

    def fake_turn(self, batch: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake model learns the student's pictures; its heads learn to tell them from the true ones at the same times and noise."""
        t = batch.trajectory
        name = t.conditions.source
        target = self.coupled(batch, t.states[-1], t.states[batch.segment + 1])
        v, judgements = self.look(t, target.x_tau, batch.tau)
        loss = fake_loss(v, target)
        metrics = {f"{name}_fake": loss.detach()}
        if judgements:
            true = self.look(t, interpolate(t.conditions.x0, batch.noise, batch.tau[:, None, None]), batch.tau)[1]
            hinge = hinge_discriminator(true, judgements)
            metrics |= {f"{name}_hinge": hinge.detach(), f"{name}_accuracy": accuracy(true, judgements).detach()}
            loss = loss + self.recipe.judge_weight * hinge
        return loss, metrics


def build(recipe: Recipe, device: torch.device) -> DmdoStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return DmdoStage(recipe, device)
