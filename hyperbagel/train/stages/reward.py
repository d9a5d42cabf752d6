"""Trains a reward for stage refl on preference pairs: a small head over the base's frozen understanding branch.

ours (the paper takes HPSv3 as it is). The better picture of a pair is the true one. The worse one is the sample's second picture to draw,
if it has one (people's second choice, or the embedded world's `near_misses`); another sample's picture (or, if a batch is one sample, the
true one under the previous batch's prompt); the unchanged source of an edit; or the true one with noise in its latents. No detector has a
say, so the reward cannot be tuned to the score that is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from hyperbagel.data.loader import Loader
from hyperbagel.data.mixture import DataConfig
from hyperbagel.data.plan import Sample, Text, VaeImage
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import to_tensor
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.train.batches import held_out_groups, open_loader, pack_spec, posterior_encoder
from hyperbagel.train.checkpoint import as_exported
from hyperbagel.train.contexts import split_sample
from hyperbagel.train.distill import seeded
from hyperbagel.train.distributed import World, join_world
from hyperbagel.train.frozen import FrozenRecipe, load_frozen
from hyperbagel.train.losses.refl import preference_loss
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.rewards import RewardHead, prompt_of, save_reward, understand
from hyperbagel.train.stage import Draws, Player, Stage


class Recipe(FrozenRecipe):
    """Settings of the stage "reward"."""

    model: Path
    data: DataConfig
    held_out: DataConfig | None = None
    held_out_groups: int = Field(default=4, ge=1)
    noise: float = Field(default=0.5, gt=0)  # largest share of noise in a damaged latent
    second: float = Field(default=0.6, ge=0, le=1)  # among samples with a second picture to draw: share where that is the worse one
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup_steps=20, schedule="cosine")


@dataclass
class Pairs:
    """Features [B, 2 E] of better and worse pictures."""

    source: str
    better: Tensor
    worse: Tensor


class RewardStage(Stage):
    """One player, "reward"."""

    best_metric = "accuracy"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.base, self.vae = load_frozen(recipe.model, recipe, device)
        self.tokenizer = Tokenizer.from_folder(recipe.model)
        self.spec = pack_spec(self.base.config, self.tokenizer)
        self.head = RewardHead(self.base.config.llm.hidden_size).to(device)
        self.players = {"reward": Player.of(self.head, recipe.optim)}
        self.loader = self._loader(recipe.data, recipe.seed, join_world(device))
        self.words: dict[str, Text] = {}  # the prompt of the last sample of each source
        self.measured: list[Pairs] = []
        self.measures_start = recipe.held_out is not None
        if recipe.held_out is not None:
            words = dict[str, Text]()
            groups = held_out_groups(recipe.held_out, recipe.held_out_groups, self._loader)
            self.measured = [self._pairs(loader, draws, words) for loader, draws in groups]

    def _loader(self, data: DataConfig, seed: int, world: World | None = None) -> Loader:
        return open_loader(data, self.base.config, self.tokenizer, seed=seed, world=world, as_served=True)

    def batch(self, step: int, rng: Draws) -> Pairs:
        return self._pairs(self.loader, rng, self.words)

    @torch.no_grad()
    def _pairs(self, loader: Loader, rng: Draws, words: dict[str, Text]) -> Pairs:
        """The next group as pairs. words: see `self.words`; read and updated."""
        group = loader.next_group()
        parts = [split_sample(sample) for sample in group.samples]
        better = torch.stack([to_tensor(target.pixels) for _, target, _ in parts]).to(self.device)
        sources = [[item for item in before if isinstance(item, VaeImage)] for before, _, _ in parts]
        damaged = damage(better, self.vae, self.recipe.noise, rng, self.device)
        worse, asked = damaged.clone(), list(group.samples)  # for the worse one, and the samples that it is shown for
        for i, given in enumerate(sources):
            kind, target = rng.python.random(), parts[i][1].pixels
            second = second_picture(group.samples[i], target)
            if second is not None and rng.python.random() < self.recipe.second:
                worse[i] = to_tensor(second).to(self.device)
            elif given and kind < 0.5 and given[-1].pixels.shape == target.shape:
                worse[i] = to_tensor(given[-1].pixels).to(self.device)  # the edit was not made
            elif kind < 0.75 and len(parts) > 1:
                worse[i] = better[(i + 1) % len(parts)]  # a good picture of something else
            elif kind < 0.75 and (other := words.get(group.source)) and list(other.ids) != list(prompt_of(group.samples[i]).ids):
                worse[i], asked[i] = better[i], with_prompt(group.samples[i], other)
        words[group.source] = prompt_of(group.samples[-1])
        features = (understand(self.base, self.spec, *of) for of in ((better, group.samples), (worse, asked)))
        return Pairs(group.source, *features)

    def loss(self, player: str, batch: Pairs, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        better, worse = self.head(batch.better), self.head(batch.worse)
        loss = preference_loss(better, worse)
        return loss, {f"{batch.source}_accuracy": (better > worse).float().mean()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Share of held-out pairs that the averaged head puts in the right order, and its mean reward of better (a ceiling for stage refl)
        and of worse pictures."""
        with self.players["reward"].averaged():
            return self._figures()

    def _figures(self) -> dict[str, float]:
        if not self.measured:
            return {}
        better = torch.cat([self.head(pairs.better) for pairs in self.measured])
        worse = torch.cat([self.head(pairs.worse) for pairs in self.measured])
        return {"accuracy": (better > worse).float().mean().item(), "better": better.mean().item(), "worse": worse.mean().item()}

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "words": {source: text.ids for source, text in self.words.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.words = {source: Text(ids, enable_cfg=True) for source, ids in state.get("words", {}).items()}

    def finish(self, out: Path) -> None:
        """export/: the head of the best checkpoint or, without held-out pairs, of the last step; for stage refl."""
        with as_exported(self, "reward", out):
            save_reward(out / "export", self.head, self.base, self._figures())

    def close(self) -> None:
        self.loader.close()


def with_prompt(sample: Sample, prompt: Text) -> Sample:
    """The sample with another prompt for its first picture to draw."""
    at = split_sample(sample)[2]
    return [*sample[:at], prompt, *sample[at + 1 :]]


def second_picture(sample: Sample, first: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The last picture to draw for the same prompt, if it differs from the first and has its size. What a further instruction in a chain of
    edits makes of the first picture does not count: it is no worse."""
    drawn: list[NDArray[np.uint8]] = []
    for item in sample:
        if drawn and not (isinstance(item, VaeImage) and item.loss):
            break
        if isinstance(item, VaeImage) and item.loss:
            drawn.append(item.pixels)
    last = drawn[-1]
    return last if last is not first and last.shape == first.shape else None


def damage(pixels: Tensor, vae: AutoEncoder, most: float, rng: Draws, device: torch.device) -> Tensor:
    """Pictures [B, 3, H, W] after noise was mixed into their latents, at most a share `most`: as a bad student draws them."""
    z = posterior_encoder(vae, rng.torch, device)(pixels)
    share = most * (0.2 + 0.8 * torch.rand(len(pixels), 1, 1, 1, generator=rng.torch)).to(device)
    noise = torch.randn(z.shape, generator=rng.torch).to(device)
    return vae.decode((1 - share) * z + share * noise)


def build(recipe: Recipe, device: torch.device) -> RewardStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return RewardStage(recipe, device)
