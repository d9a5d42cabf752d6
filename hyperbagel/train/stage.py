"""The seam between the training loop and what it trains.

A stage is a file in `train/stages/` with a class `Recipe(TrainRecipe)` and a function `build(recipe, device) -> Stage`.
The loop knows players, turns, batches and losses; it never asks which stage it runs.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch import device as Device
from torch.optim import Optimizer

from hyperbagel.core.config import Config
from hyperbagel.train.ema import Ema
from hyperbagel.train.optim import OptimConfig, make_optimizer, optimised

HELD_OUT_SEED = 1_000_003  # seed of what stages are measured on, whatever the recipe's own seed


class TrainRecipe(Config):
    """Settings that every stage has; each stage adds its own."""

    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1)  # PyTorch's, on a CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_steps: int = Field(default=10_000, ge=0)
    max_seconds: float | None = Field(default=None, gt=0)  # of training, summed over resumes; at the end a checkpoint is written
    accumulate: int = Field(default=1, ge=1)  # batches per step
    log_every: int = Field(default=20, ge=1)
    evaluate_every: int = Field(default=500, ge=1)
    sample_every: int = Field(default=1000, ge=1)
    checkpoint_every_seconds: float = Field(default=300.0, gt=0)
    keep: int = Field(default=2, ge=1)  # how many of the newest checkpoints are kept, besides the best one
    shard: bool = False  # with several ranks: split weights, averages and optimiser states over them (FSDP2); not every stage can
    shard_above: int = Field(default=65536, ge=1)  # layers with fewer values stay whole


@dataclass(frozen=True)
class Draws:
    """Random generators for one batch, a pure function of (seed, step, micro-batch): a resumed run draws what an unbroken one would."""

    python: random.Random
    numpy: np.random.Generator
    torch: torch.Generator  # on the CPU
    key: tuple[int, ...] = ()  # what they were seeded with

    @classmethod
    def at(cls, *key: int) -> Draws:
        """Generators for a key such as (seed, step, micro); each number must be >= 0."""
        words = [int(w) for w in np.random.SeedSequence(key).generate_state(3, np.uint64)]
        generator = torch.Generator()
        generator.manual_seed(words[2] >> 1)
        return cls(random.Random(words[0]), np.random.default_rng(words[1]), generator, key)

    def on(self, device: Device) -> Generator:
        """A generator for draws on `device`: `torch` itself for a CPU, else a new one there with the same seed, because millions of normal
        draws are slow on a CPU."""
        if device.type == "cpu":
            return self.torch
        generator = Generator(device)
        generator.manual_seed(self.torch.initial_seed())
        return generator


@dataclass
class Player:
    """A module with its optimiser. Only the parameters in the optimiser are trained, averaged and stored in checkpoints."""

    module: nn.Module
    optimizer: Optimizer
    optim: OptimConfig
    ema: Ema | None = None

    @classmethod
    def of(cls, module: nn.Module, optim: OptimConfig, plain: tuple[str, ...] = (), ramp: bool = True) -> Player:
        """The usual player: an optimiser over the trainable parameters (`plain`: see make_optimizer), and an average of them if
        `ema_decay` > 0 (`ramp`: see train.ema)."""
        player = cls(module, make_optimizer(module, optim, plain), optim)
        if optim.ema_decay > 0:
            player.ema = Ema(player.parameters, optim.ema_decay, ramp)
        return player

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return optimised(self.module, self.optimizer)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module has the averaged weights (the trained ones if no average is kept)."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied(self.parameters):
                yield


Metrics = Mapping[str, float | Tensor]


class Stage(ABC):
    """Subclass it: fill `players`, write `batch` and `loss`; the rest has defaults."""

    players: dict[str, Player]
    best_metric: str | None = None  # a key of what `evaluate` returns; the checkpoint with the highest value is kept as the best
    can_shard: bool = False  # whether `evaluate`, `sample` and `finish` can run on every rank while only the leading one writes
    sharded: bool = False  # set by train.sharding
    frozen_modules: Sequence[nn.Module] = ()  # modules that only run; they may be split over ranks too
    measures_start: bool = False  # also evaluate before the first step, so that the initial weights are a candidate for the best

    def turn(self, step: int) -> str:
        """The player whose optimiser moves at `step`. The others' parameters get no gradient in that step."""
        return next(iter(self.players))

    @abstractmethod
    def batch(self, step: int, rng: Draws) -> Any:
        """A batch for `step`: a pure function of (step, rng), unless `state` holds the position that it also depends on."""

    @abstractmethod
    def loss(self, player: str, batch: Any, step: int) -> tuple[Tensor, Metrics]:
        """The scalar that `player` minimises, and numbers to log. Runs under autocast."""

    def evaluate(self, step: int) -> Metrics:
        """Figures on held-out data; called without gradients every `evaluate_every` steps and at the end."""
        return {}

    def sample(self, step: int, out: Path) -> None:  # noqa: B027 (nothing is a fine default)
        """Write sample sheets into the folder `out`; called without gradients."""

    def refuse(self) -> None:  # noqa: B027
        """The current batch gave no finite loss: forget whatever would bring it back. Called before `state` is stored."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beyond weights and step, ready for JSON (such as a loader's position); `load_state` gets it back."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state` returned."""

    def finish(self, out: Path) -> None:  # noqa: B027
        """Called once after the last step, without gradients: write into the run folder `out` what the next stage reads."""

    def close(self) -> None:  # noqa: B027
        """Release workers; called however the run ends."""
