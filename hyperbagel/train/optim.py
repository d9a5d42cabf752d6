"""Optimisers from a recipe, and learning-rate schedules as pure functions."""

from __future__ import annotations

import math
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
    lr: float = Field(default=1e-3, gt=0)  # with Muon: the rate of its matrices, usually 0.02; all else gets a tenth of it
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=100, ge=0)  # counted in the player's own turns
    schedule: Literal["constant", "cosine"] = "cosine"
    schedule_by: Literal["steps", "time"] = "steps"  # time: by the share of max_seconds that has passed; not repeatable bit for bit
    final_ratio: float = Field(default=0.05, ge=0, le=1)  # cosine ends at lr * final_ratio
    clip: float = Field(default=1.0, gt=0)  # largest norm of the gradient
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # 0: no average is kept


def named_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _matrices_and_others(module: nn.Module, plain: tuple[str, ...] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable weights of at least two dimensions; and all other trainable parameters: norms and biases, embeddings, and those whose names
    start with one of `plain`."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in named_trainable(module).items():
        (matrices if p.ndim >= 2 and id(p) not in embeddings and not name.startswith(plain) else others).append(p)
    return matrices, others


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weights of at least two dimensions decay; norms, biases (one dimension) and embeddings do not."""
    matrices, others = _matrices_and_others(module)
    groups: list[dict] = []
    for parameters, rate in ((matrices, weight_decay), (others, 0.0)):
        for split in (False, True):  # no group mixes whole and split parameters: the optimiser's batched operations cannot
            if some := [p for p in parameters if is_sharded(p) == split]:
                groups.append({"params": some, "weight_decay": rate})
    return groups


def make_adamw(module: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over the trainable parameters of `module`."""
    groups = decay_groups(module, config.weight_decay)
    assert groups, "a player must have trainable parameters"
    # fused: one pass over memory per parameter; on a CPU 8 ms instead of 20 for 6.6M parameters. None leaves the choice to PyTorch.
    fused = True if all(p.device.type == "cpu" and not is_sharded(p) for g in groups for p in g["params"]) else None
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def make_optimizer(module: nn.Module, config: OptimConfig, plain: tuple[str, ...] = ()) -> Optimizer:
    """The recipe's optimiser over the trainable parameters of `module`.

    plain: beginnings of parameter names (first and last layers) that Muon leaves to Adam, as it does embeddings and vectors; without
    meaning for AdamW.
    """
    if config.kind == "adamw":
        return make_adamw(module, config)
    matrices, others = _matrices_and_others(module, plain)
    return Muon(matrices, others, config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def lr_factor(config: OptimConfig, turn: int, progress: float) -> float:
    """Factor on `lr` at the player's own step `turn` (from 0): linear warm-up over its first `warmup_steps`, times the schedule's value at
    `progress` in [0, 1] through the training."""
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
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if id(p) in ids}
