"""Optimisers from a recipe, and learning-rate schedules as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field
from torch import nn
from torch.optim import AdamW, Optimizer

from hyperbagel.core.config import Config
from hyperbagel.train.distributed import is_sharded
from hyperbagel.train.muon import Muon

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """One player's optimiser. Betas default to BAGEL's."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)  # of Muon: of its matrices, 0.02 is usual; the rest gets a tenth
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=100, ge=0)  # of the player's own
    schedule: Literal["constant", "cosine"] = "cosine"
    schedule_by: Literal["steps", "time"] = "steps"  # time: progress is the used share of max_seconds; not repeatable bit for bit
    final_ratio: float = Field(default=0.05, ge=0, le=1)  # cosine ends at lr * final_ratio
    clip: float = Field(default=1.0, gt=0)  # norm of the gradient
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # 0: no average is kept


def named_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Groups: weights of at least two dimensions decay; norms, biases (one dimension) and embeddings do not."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in named_trainable(module).values():
        (decay if p.ndim >= 2 and id(p) not in embeddings else plain).append(p)
    groups: list[dict] = []
    for parameters, rate in ((decay, weight_decay), (plain, 0.0)):
        for split in (False, True):  # one group never mixes whole and split parameters: the optimiser's batched operations cannot
            if some := [p for p in parameters if is_sharded(p) == split]:
                groups.append({"params": some, "weight_decay": rate})
    return groups


def make_adamw(module: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over the trainable parameters of `module`."""
    groups = decay_groups(module, config.weight_decay)
    assert groups, "a player must have trainable parameters"
    # one pass over memory a parameter: on a CPU 8 ms in place of 20 for 6.6M parameters. None leaves the choice to PyTorch elsewhere.
    fused = True if all(p.device.type == "cpu" and not is_sharded(p) for g in groups for p in g["params"]) else None
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def make_optimizer(module: nn.Module, config: OptimConfig, plain: tuple[str, ...] = ()) -> Optimizer:
    """The recipe's optimiser over the trainable parameters of `module`. Muon leaves parameters whose names start with one of `plain`
    (first and last layers), embeddings and vectors to Adam."""
    if config.kind == "adamw":
        return make_adamw(module, config)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in named_trainable(module).items():
        (matrices if p.ndim >= 2 and id(p) not in embeddings and not name.startswith(plain) else others).append(p)
    return Muon(matrices, others, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def lr_factor(config: OptimConfig, turn: int, progress: float) -> float:
    """Share of `lr` at the player's own step `turn` (from 0): linear warm-up over `warmup_steps` of them, times the schedule at `progress`
    in [0, 1] of the training."""
    warm = min(1.0, (turn + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return warm * (config.final_ratio + (1 - config.final_ratio) * cosine)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimised(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of `module` that `optimizer` moves, by name, whatever their requires_grad is right now."""
    ids = {id(p) for p in _flat(optimizer)}
    return {name: p for name, p in module.named_parameters() if id(p) in ids}


def _flat(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
