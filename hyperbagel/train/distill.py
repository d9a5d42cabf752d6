"""What the stages of generation distillation share: the frozen base, a student over it, conditions, held-out figures, the export.

Shape legend: B samples, N latent tokens, C values of a token.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hyperbagel.core.config import changed
from hyperbagel.core.errors import InputError
from hyperbagel.core.progress import ProgressReport
from hyperbagel.core.values import clip
from hyperbagel.data.loader import Loader
from hyperbagel.data.mixture import DataConfig
from hyperbagel.data.plan import Sample
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import Velocity, euler, euler_steps
from hyperbagel.generate.types import PAPER_EDIT, PAPER_TEXT_TO_IMAGE, Denoising
from hyperbagel.model.student import (
    Sampler,
    Student,
    StudentNetwork,
    as_whole,
    carry_student,
    fingerprint,
    has_heads,
    load_student,
    make_adapter,
    save_student,
)
from hyperbagel.model.vae import unpatchify
from hyperbagel.model.weights import load_folder
from hyperbagel.train.alarms import alarms
from hyperbagel.train.batches import held_out_groups, open_loader, pack_spec, posterior_encoder
from hyperbagel.train.checkpoint import averaged_tensors, best_checkpoint
from hyperbagel.train.compare import Pictures, compare_sets
from hyperbagel.train.contexts import Conditions, Measured, Scales, make_conditions, student_velocity, teacher_velocity
from hyperbagel.train.discriminator import vit_features
from hyperbagel.train.distributed import World, is_sharded, join_world
from hyperbagel.train.frozen import FrozenRecipe, load_frozen
from hyperbagel.train.loop import pick_precision
from hyperbagel.train.losses.cfg import draw_scales
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.rewards import AnswerReward
from hyperbagel.train.sheet import write_sheet
from hyperbagel.train.stage import Draws, Player, Stage

log = logging.getLogger(__name__)


class DistillRecipe(FrozenRecipe):
    """Settings of every distillation stage."""

    model: Path  # the base: a folder in BAGEL's layout; frozen
    init: Path | None = None  # the student to start from; None: a fresh one
    init_base: Path | None = None  # the base that `init` was made for, if it is another one: `model` before it was trained further
    kind: Literal["lora", "full"] = "full"  # of a fresh student
    whole: bool = False  # ours: turn the low-rank changes of `init` into whole layers, and train all of these
    rank: int = Field(default=64, ge=1)
    alpha: float | None = Field(default=None, gt=0)  # None: alpha = rank
    recompute: bool = False  # keep one tensor per layer and rerun layers for their gradients: more time, far less memory
    heads: bool = True  # also train vae2llm, llm2vae and the timestep embedder
    nfe: int = Field(default=6, ge=1)  # steps that the student is sampled with
    shift: float = Field(default=3.0, gt=0)  # of the sampler and, but in adp and refl, of training times; 3.2.1: at least 3.0 was necessary
    text_range: tuple[float, float] = (1.0, 5.0)  # 3.2.1
    image_range: tuple[float, float] = (1.0, 2.5)  # 3.2.1; edits
    usual_share: float = Field(default=0.0, ge=0, le=1)  # ours: share of rows at the sampler's default scales, the ones used most
    data: DataConfig
    held_out: DataConfig | None = None  # what is measured; its mixture is not used
    held_out_groups: int = Field(default=2, ge=1)  # of each held-out source
    measure: Literal["score", "answers"] = "score"  # what the best checkpoint and the gate go by; for answers see `evaluate`
    teacher_steps: int = Field(default=24, ge=1)  # for the teacher's held-out pictures
    optim: OptimConfig = OptimConfig(lr=2e-4, warmup_steps=50, schedule="constant", ema_decay=0.99)
    export_dtype: str = Field(default="float32", pattern="^(bfloat16|float32)$")

    @model_validator(mode="after")
    def _guided(self) -> DistillRecipe:
        for name, (low, high) in (("text_range", self.text_range), ("image_range", self.image_range)):
            if not 1 <= low <= high:
                raise ValueError(f"{name} is {low} to {high}, expected 1 <= low <= high")
        if self.text_range[1] <= 1:
            raise ValueError("text_range ends at 1, which asks for a teacher without guidance; end it above 1 (the paper: 5)")
        if self.kind == "full" and self.init is None and (idle := changed(self, ("rank", "alpha"))):
            raise ValueError(
                f"{idle[0]} is of a LoRA, and a fresh student of kind full has whole layers; set kind=lora or leave {idle[0]} out"
            )
        if self.measure == "answers" and self.held_out is None:
            raise ValueError("measure=answers asks about held-out pictures and there are none; set held_out, or leave measure at score")
        return self

    def check_sources(self, key: str, names: Iterable[str]) -> None:
        """Raises InputError if a key names a source that `data` does not have."""
        if unknown := sorted(set(names) - set(self.data.sources)):
            raise InputError(f"{key}: got {unknown[0]!r}, expected some of {', '.join(self.data.sources)}; name sources of data")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, fresh layers draw from `seed`; afterwards the process's own generator is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class DistillStage(Stage):
    """A student over a frozen base. Subclasses add players and write `prepare` and `loss`."""

    best_metric = "score"
    can_shard = True
    needs_pictures = True  # whether batches need the true pictures' latents

    def __init__(self, recipe: DistillRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.dtype = pick_precision(recipe.precision, device)
        self.base, self.vae = load_frozen(recipe.model, recipe, device)
        self.base.language_model.model.recompute = recipe.recompute  # before a student is attached: its network copies the flag
        tokenizer = Tokenizer.from_folder(recipe.model)
        self.world, self.mark = join_world(device), fingerprint(self.base)  # before anything is split over ranks
        self.frozen_modules: list[nn.Module] = [self.base]
        self.spec = pack_spec(self.base.config, tokenizer)
        self.markers = self.base.embed_text(torch.tensor([[tokenizer.vision_start, tokenizer.vision_end]], device=device)).detach()
        self.tokenizer = tokenizer
        self.student = self._begin()
        self.student.sampler = self._sampler()
        self.network = self.student.network(self.base)
        self.players = {"student": Player.of(self.student, recipe.optim, ramp=recipe.init is None)}
        self.loader = self._loader(recipe.data, recipe.seed, self.world)
        self.answers = AnswerReward(self.base, self.spec, tokenizer) if recipe.measure == "answers" else None
        if self.answers:
            self.best_metric = "answers"
        self.measured: list[Measured] = []
        self.measures_start = recipe.held_out is not None  # the incoming student is the first candidate for the best: see train.gate
        self.scores: list[float] = []  # of this process's evaluations
        if recipe.held_out is not None and (self.world.leads or recipe.shard):  # the ranks that evaluate
            self._measure_teacher(recipe.held_out)

    # -- parts -----------------------------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> Student:
        return load_student(folder, self.base).to(self.device)

    def _begin(self) -> Student:
        r = self.recipe
        if r.init is None:
            return self._fresh()
        if r.init_base is None:
            student = self.load(r.init)
        else:
            student = carry_student(r.init, load_folder(r.init_base, self.device, self.dtype)[0], self.base).to(self.device)
        adapter = student.adapter
        own: dict[str, Any] = (
            {"rank": adapter.rank, "alpha": adapter.alpha} if adapter.low_rank else dict.fromkeys(("kind", "rank", "alpha"))
        )
        own["heads"] = has_heads(student)
        if wrong := [key for key in changed(r, own) if getattr(r, key) != own[key]]:
            what = f"a LoRA of rank {adapter.rank} and alpha {adapter.alpha:g}" if adapter.low_rank else "whole layers"
            got = f"{wrong[0]} {getattr(r, wrong[0])} for a student of {what}{'' if own['heads'] else ' without heads'}"
            raise InputError(f"init={r.init}: got {got}, which cannot be changed; leave {wrong[0]} out, or init")
        return as_whole(student, self.base) if r.whole else student

    def frozen(self, folder: Path) -> StudentNetwork:
        """A student that only runs."""
        return self.freeze(self.load(folder)).network(self.base)

    def freeze(self, student: Student) -> Student:
        self.frozen_modules.append(student)
        return student.requires_grad_(False)

    def _fresh(self) -> Student:
        r, widest = self.recipe, self.base.config.llm.intermediate_size
        if r.kind == "lora" and r.rank > widest:
            raise InputError(f"rank: got {r.rank}, expected at most {widest}, the widest layer of {r.model}; lower it or train kind=full")
        return Student.fresh(self.base, make_adapter(self.base, r.kind, rank=r.rank, alpha=r.alpha, heads=r.heads), Sampler())

    def _sampler(self) -> Sampler:
        """Defaults are the paper's scales, or the nearest that the student sees in training."""
        r = self.recipe
        kinds = {
            "text_scale": clip(PAPER_TEXT_TO_IMAGE.text_scale, *r.text_range),
            "edit_text_scale": clip(PAPER_EDIT.text_scale, *r.text_range),
            "edit_image_scale": clip(PAPER_EDIT.image_scale, *r.image_range),
        }
        stage = type(self).__module__.rpartition(".")[2]
        return Sampler(nfe=r.nfe, shift=r.shift, text_range=r.text_range, image_range=r.image_range, stage=stage, **kinds)

    def _loader(self, data: DataConfig, seed: int, world: World | None = None) -> Loader:
        return open_loader(data, self.base.config, self.tokenizer, seed=seed, world=world, as_served=True)

    def amp(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    # -- batches ---------------------------------------------------------------------------------------------------------------

    def batch(self, step: int, rng: Draws) -> Any:
        """Everything that needs no gradient: contexts, targets, roll-outs."""
        with torch.no_grad(), self.amp():
            return self.prepare(step, rng)

    def prepare(self, step: int, rng: Draws) -> Any:
        """What `batch` returns; called without gradients and under autocast."""
        raise NotImplementedError

    def conditions(self, rng: Draws) -> Conditions:
        """Of the loader's next group."""
        group = self.loader.next_group()
        return self._conditions(group.source, group.samples, rng, self.needs_pictures)

    def _conditions(self, source: str, samples: list[Sample], rng: Draws, pictures: bool = True) -> Conditions:
        encode = posterior_encoder(self.vae, rng.torch, self.device)
        return make_conditions(self.base, source, samples, self.spec, encode, rng.torch, self.markers, pictures)

    def uniform(self, rng: Draws, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng.torch).to(self.device)

    def noise(self, conditions: Conditions, rng: Draws) -> Tensor:
        return torch.randn(conditions.x0.shape, generator=rng.torch).to(self.device)

    def scales(self, conditions: Conditions, rng: Draws) -> Scales:
        """3.2.1: the text scale uniform in its range; likewise the image scale for edits, which is 1 without input pictures."""
        r, n = self.recipe, len(conditions)
        text = draw_scales(self.uniform(rng, n), *r.text_range)
        image = draw_scales(self.uniform(rng, n), *r.image_range)
        drawn = Scales(text, image if conditions.is_edit else torch.ones_like(image))
        if not r.usual_share:
            return drawn
        usual, own = self.uniform(rng, n) < r.usual_share, self.usual_scales(conditions)
        return Scales(torch.where(usual, own.text, drawn.text), torch.where(usual, own.image, drawn.image))

    def usual_scales(self, conditions: Conditions) -> Scales:
        """The sampler's defaults."""
        s, n = self.student.sampler, len(conditions)
        text, image = (s.edit_text_scale, s.edit_image_scale) if conditions.is_edit else (s.text_scale, s.image_scale)
        return Scales(torch.full((n,), text, device=self.device), torch.full((n,), image, device=self.device))

    # -- networks --------------------------------------------------------------------------------------------------------------

    def as_velocity(self, network: StudentNetwork, conditions: Conditions, scales: Scales) -> Velocity:
        """A student in the form that solvers take: (x [B, N, C], t) -> v."""

        def run(x: Tensor, t: float) -> Tensor:
            return student_velocity(network, conditions, scales, x, torch.full((len(x),), t, device=x.device))

        return run

    def roll_out(self, network: StudentNetwork, conditions: Conditions, scales: Scales, x_T: Tensor, times: Tensor) -> list[Tensor]:
        """All states of the Euler ODE along `times`, x_T first (3.2.3: the whole trajectory is kept)."""
        return [x_T, *(x for _, x in euler_steps(x_T, self.as_velocity(network, conditions, scales), times))]

    def settings(self, conditions: Conditions) -> Denoising:
        """The paper's sampler settings for this kind of sample (interval, renormalisation); the evaluation's teacher has them too."""
        return PAPER_EDIT if conditions.is_edit else PAPER_TEXT_TO_IMAGE

    def guided_teacher(self, conditions: Conditions, scales: Scales) -> Callable[[Tensor, float], Tensor]:
        """The base with guidance, in the form that solvers take."""
        settings = self.settings(conditions)

        def run(x: Tensor, t: float) -> Tensor:
            return teacher_velocity(self.base, conditions, scales, x, torch.full((len(x),), t, device=x.device), settings)

        return run

    def decode(self, x: Tensor, conditions: Conditions) -> Tensor:
        """Latent tokens [B, N, C] to pictures [B, 3, H, W] in [-1, 1]; always in fp32, gradients pass."""
        with torch.autocast(self.device.type, enabled=False):
            z = unpatchify(x.float(), *conditions.grid, self.base.config.options.latent_patch_size)
            return self.vae.decode(z)

    # -- held-out figures ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure_teacher(self, data: DataConfig) -> None:
        """The base's pictures for fixed conditions and noises, made once: what the student is compared with."""
        times = time_grid(self.recipe.teacher_steps, PAPER_TEXT_TO_IMAGE.shift)
        groups = held_out_groups(data, self.recipe.held_out_groups, self._loader)
        with self.reporting("measuring the teacher") as report:
            for loader, rng in report.count(groups, self.recipe.held_out_groups * len(data.sources)):
                group = loader.next_group()
                conditions = self._conditions(group.source, group.samples, rng)
                noises = torch.stack([self.noise(conditions, rng) for _ in range(2)])
                run = self.guided_teacher(conditions, self.usual_scales(conditions))
                with self.amp():
                    teacher = torch.stack([euler(x, run, times) for x in noises])
                    self.measured.append(Measured(conditions, noises, teacher, self.features(self.decoded(teacher, conditions))))

    def reporting(self, title: str) -> ProgressReport:
        """Of what takes long before the first step; only the leading rank's is seen."""
        return ProgressReport(title, stream=None if self.world.leads else io.StringIO())

    def pictures(self, conditions: Conditions, noises: Tensor) -> Tensor:
        """The student's latents [2, B, N, C], sampled as it will be in use, for noises [2, B, N, C]."""
        sampler = self.student.sampler
        run = self.as_velocity(self.network, conditions, self.usual_scales(conditions))
        return torch.stack([euler(x, run, time_grid(sampler.nfe, sampler.shift)) for x in noises])

    def decoded(self, x: Tensor, conditions: Conditions) -> list[Tensor]:
        """Latents [2, B, N, C] to the pictures [B, 3, H, W] of each noise."""
        return [self.decode(one, conditions) for one in x]

    def features(self, pictures: list[Tensor]) -> Tensor:
        """The base's own ViT features of the pictures [B, 3, H, W] of two noises: [2, B, values]."""
        depth = self.base.config.vit.layers_used - 1
        return torch.stack([vit_features(self.base, one, [depth])[0][0].float().flatten(1) for one in pictures])

    def evaluate(self, step: int) -> dict[str, float]:
        """The averaged student compared with the teacher on the same conditions (train.compare): `compare`'s figures and `score`, minus the
        energy distance; over all sources and for each.

        With `measure=answers` also `answers`: how probable the base finds the right answers about the student's pictures
        (rewards.AnswerReward), since `score` hardly sees whether a picture holds what was asked for. It is the geometric mean over a
        picture's questions, between 0 and 1, averaged over pictures.
        """
        sets: dict[str, list[Pictures]] = {}
        told: dict[str, list[float]] = {}
        with self.players["student"].averaged():
            for m in self.measured:
                source, made = m.conditions.source, self.pictures(m.conditions, m.noises)
                seen = self.decoded(made, m.conditions)
                sets.setdefault(source, []).append(Pictures(made, m.teacher, self.features(seen), m.features))
                if self.answers:
                    told.setdefault(source, []).extend(self.answers(one, m.conditions.samples).exp().mean().item() for one in seen)
        figures: dict[str, float] = {}
        for source, pictures in sets.items():
            own = compare_sets(pictures)
            if source in told:
                own["answers"] = sum(told[source]) / len(told[source])
            figures |= {f"{source}_{name}": value for name, value in own.items()}
            for name, value in own.items():  # each source counts the same
                figures[name] = figures.get(name, 0.0) + value / len(sets)
        if skipped := sum(self.loader.broken.values()):
            figures["skipped_rows"] = skipped
        return figures | self._alarms(step, figures)

    def _alarms(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """Logs each alarm, and returns it as a metric: alarm_NAME 1. None at step 0: the incoming student is not the stage's doing."""
        if step == 0 or "score" not in figures:
            return {}
        self.scores.append(figures["score"])
        found = alarms(figures, self.scores)
        for told in found.values():
            log.warning("step %d: %s", step, told)
        return {f"alarm_{name}": 1.0 for name in found}

    def sample(self, step: int, out: Path) -> None:
        """A sheet with rows of the teacher's pictures, the averaged student's for the same noise, and the true ones."""
        rows = []
        with self.players["student"].averaged():
            for m in self.measured:
                few = min(8, len(m.conditions))
                for x in (m.teacher[0], self.pictures(m.conditions, m.noises)[0], m.conditions.x0):
                    rows.append(self.decode(x[:few], m.conditions))
        if rows and self.world.leads:
            like = [row for row in rows if row.shape[2:] == rows[0].shape[2:]]
            few = min(len(row) for row in like)
            write_sheet(out / f"step-{step:08d}.png", [row[:few] for row in like])

    # -- state and export ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])

    def finish(self, out: Path) -> None:
        """export/: a student folder with the averaged weights of the best checkpoint or, without held-out figures, of the last step."""
        for name, skipped in self.loader.broken.items():
            log.warning("source %r: broken rows were skipped %d times (the same row in every pass)", name, skipped)
        player, values = self.players["student"], dict[str, Tensor]()
        if best_checkpoint(out / "checkpoints") is None:
            shadow = player.ema.shadow if player.ema else player.parameters
            values = {name: value.full_tensor() if is_sharded(value) else value for name, value in shadow.items()}  # type: ignore[attr-defined]
        if self.world.leads:
            best = best_checkpoint(out / "checkpoints")
            values = averaged_tensors(best, "student") if best else values
            dtype = getattr(torch, self.recipe.export_dtype)
            save_student(out / "export", self.student, self.mark, base_name=self.recipe.model.name, dtype=dtype, values=values)

    def close(self) -> None:
        self.loader.close()


def required(folder: Path | None, key: str, what: str) -> Path:
    """A folder that the recipe must name under `key`; `what` it should be. Raises InputError if it does not."""
    if folder is None:
        raise InputError(f"{key}: got no folder, expected {what}, set {key}=RUN/export")
    return folder
