"""Trains a planner for a frozen model: low-rank changes that write the plans before pictures (model.planner).

ours. Contexts are prefilled once by the frozen model, as for requests; the planner reads no more than im_start and its own plan behind
them, and learns the plan by cross-entropy.

Shape legend: B samples, n tokens of the longest plan, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.data.loader import Loader
from hyperbagel.data.mixture import DataConfig
from hyperbagel.data.plan import Sample, Text, VaeImage
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.model.planner import load_planner, make_planner, save_planner
from hyperbagel.model.student import fingerprint
from hyperbagel.nn.lora import attach
from hyperbagel.train.batches import held_out_groups, open_loader, pack_spec, posterior_encoder
from hyperbagel.train.checkpoint import as_exported
from hyperbagel.train.contexts import Context, behind, prefill
from hyperbagel.train.distill import seeded
from hyperbagel.train.distributed import World, join_world
from hyperbagel.train.frozen import FrozenRecipe, load_frozen
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.stage import Draws, Player, Stage

_IGNORED = -100  # a target behind a plan's end


class Recipe(FrozenRecipe):
    """Settings of the stage "planner"."""

    model: Path
    init: Path | None = None  # a planner to go on from
    rank: int = Field(default=4, ge=1)
    data: DataConfig
    held_out: DataConfig | None = None
    held_out_groups: int = Field(default=4, ge=1)
    optim: OptimConfig = OptimConfig(lr=3e-3, ema_decay=0.99, warmup_steps=50, schedule="cosine", schedule_by="time", clip=1.0)


@dataclass
class Plans:
    """Contexts of B samples and their plans: read [B, n], im_start first; wanted [B, n], im_end last, _IGNORED behind it; seen [B, n]."""

    source: str
    context: Context
    read: Tensor
    wanted: Tensor
    seen: Tensor


class PlannerStage(Stage):
    """One player, "planner"."""

    best_metric = "score"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.base, self.vae = load_frozen(recipe.model, recipe, device)
        self.mark = fingerprint(self.base)
        self.tokenizer = Tokenizer.from_folder(recipe.model)
        self.spec = pack_spec(self.base.config, self.tokenizer)
        if recipe.rank > (widest := self.base.config.llm.hidden_size):
            raise InputError(f"rank: got {recipe.rank}, expected at most {widest}, the hidden size of {recipe.model}; lower it")
        self.planner = load_planner(recipe.init, self.base) if recipe.init else make_planner(self.base, recipe.rank)
        if self.planner.rank != recipe.rank:
            raise InputError(
                f"init={recipe.init}: got a planner of rank {self.planner.rank}, expected {recipe.rank}; set rank as it was made"
            )
        self.network = attach(self.base, self.planner)
        self.players = {"planner": Player.of(self.planner, recipe.optim, ramp=recipe.init is None)}
        world = join_world(device)
        self.loader = self._loader(recipe.data, recipe.seed, world)
        self.measured: list[Plans] = []
        self.measures_start = recipe.held_out is not None
        if recipe.held_out is not None and world.leads:  # rank 0 measures, for all
            groups = held_out_groups(recipe.held_out, recipe.held_out_groups, self._loader)
            self.measured = [self._plans(loader, draws) for loader, draws in groups]

    def _loader(self, data: DataConfig, seed: int, world: World | None = None) -> Loader:
        return open_loader(data, self.base.config, self.tokenizer, seed=seed, world=world, as_served=True)

    def batch(self, step: int, rng: Draws) -> Plans:
        return self._plans(self.loader, rng)

    @torch.no_grad()
    def _plans(self, loader: Loader, rng: Draws) -> Plans:
        """The next group."""
        group = loader.next_group()
        parts = [split_plan(sample) for sample in group.samples]
        encode = posterior_encoder(self.vae, rng.torch, self.device)
        context, _ = prefill(self.base, [before for before, _ in parts], self.spec, encode, rng.torch)
        ends = self.tokenizer.im_start, self.tokenizer.im_end
        tokens = [torch.tensor([ends[0], *plan.ids, ends[1]], device=self.device) for _, plan in parts]
        pad = torch.nn.utils.rnn.pad_sequence
        read, wanted = pad([t[:-1] for t in tokens], True), pad([t[1:] for t in tokens], True, _IGNORED)
        return Plans(group.source, context, read, wanted, wanted != _IGNORED)

    def _cross_entropy(self, batch: Plans) -> Tensor:
        """Nats a token, mean over all tokens of the plans."""
        embedded = self.network.embed_text(batch.read)
        hidden = behind(self.network, batch.context, embedded)
        return F.cross_entropy(self.network.logits(hidden[batch.seen]).float(), batch.wanted[batch.seen])

    def loss(self, player: str, batch: Plans, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._cross_entropy(batch)
        return loss, {f"{batch.source}_ce": loss.detach()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out cross-entropy by source, and `score`, minus their mean. Much of it no planner can know: where free things stand."""
        found: dict[str, list[float]] = {}
        with self.players["planner"].averaged():
            for plans in self.measured:
                found.setdefault(f"{plans.source}_ce", []).append(self._cross_entropy(plans).item())
        figures = {name: sum(values) / len(values) for name, values in found.items()}
        return figures | ({"score": -sum(figures.values()) / len(figures)} if figures else {})

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])

    def finish(self, out: Path) -> None:
        """export/: the planner of the best checkpoint or, without held-out plans, of the last step."""
        with as_exported(self, "planner", out):
            save_planner(out / "export", self.planner, self.mark)

    def close(self) -> None:
        self.loader.close()


def split_plan(sample: Sample) -> tuple[Sample, Text]:
    """(what stands before the plan of a sample, the plan): the text to learn that comes right before the first picture to draw. Raises
    InputError if there is none."""
    for before, item in enumerate(sample[1:]):
        plan = sample[before]
        if isinstance(item, VaeImage) and item.loss:
            if isinstance(plan, Text) and plan.loss:
                return sample[:before], plan
            break
    raise InputError(
        "planner: got a sample without a plan before its picture, expected sources of captions or edits with think_share: 1, leave the "
        "others out of data.sources"
    )


def build(recipe: Recipe, device: torch.device) -> PlannerStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return PlannerStage(recipe, device)
