"""Weights, gradients, averages and optimiser states split over ranks with FSDP2, and their checkpoints (DCP, as safetensors).

The unit of sharding is one linear layer or embedding table, because of the adapters: student, fake model, discriminator and base are
different trees over the same layers, and a layer that is gathered when it is called is right in each of them. Layers below a size stay
whole on every rank, since gathering a norm costs more than it saves; their gradients are averaged as in plain data-parallel training.
Matrices in codes (nn.quantized) stay whole too: they are small already, and their scales are no parameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.nn.quantized import QuantizedLinear
from hyperbagel.train.distributed import World, is_sharded, local
from hyperbagel.train.stage import Player, Stage

_SHARDS = "shards"


def shard_stage(stage: Stage, world: World, above: int) -> None:
    """Split the players' and the frozen modules' layers of at least `above` values over all ranks. The players get new optimisers, so the
    stage must not have trained yet. Raises InputError for a stage or an optimiser that cannot be split.
    """
    if not stage.can_shard:
        raise InputError(
            f"shard: got true for {type(stage).__name__}, expected a stage of distillation; without it ranks train in parallel"
        )
    if any(player.optim.kind != "adamw" for player in stage.players.values()):
        raise InputError("shard: got kind=muon, which needs whole matrices, expected optim.kind=adamw")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    modules = [*stage.frozen_modules, *(player.module for player in stage.players.values())]
    # harmless here: nothing writes in place into a linear layer's output
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(modules[0].parameters()).device.type, (world.size,))
    for layer in {id(m): m for module in modules for m in module.modules() if _large(m, above)}.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for name, player in stage.players.items():
        stage.players[name] = Player.of(player.module, player.optim, ramp=player.ema is None or player.ema.ramp)
    stage.sharded = True


def _large(module: nn.Module, above: int) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, QuantizedLinear) and module.weight.numel() >= above


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients, whole or split, to a joint norm of at most `limit`; returns the norm that they had."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([torch.zeros(()), torch.zeros(())]).to(gradients[0].device)
    for gradient in gradients:
        squares[0 if is_sharded(gradient) else 1] += local(gradient).float().square().sum()
    dist.all_reduce(squares[:1])  # whole ones are the same everywhere
    norm = squares.sum().sqrt()
    for gradient in gradients:
        local(gradient).mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


# -- checkpoints -------------------------------------------------------------------------------------------------------------------


def player_tensors(name: str, player: Player) -> dict[str, Tensor]:
    """The live tensors of a player that a checkpoint keeps, whole or split: weights, averages, optimiser states."""
    found = {f"{name}/weights/{key}": value.detach() for key, value in player.parameters.items()}
    if player.ema is not None:
        found |= {f"{name}/ema/{key}": value for key, value in player.ema.shadow.items()}
    for key, parameter in player.parameters.items():
        for slot, value in player.optimizer.state.get(parameter, {}).items():
            found[f"{name}/optimizer/{key}/{slot}"] = torch.as_tensor(value)
    return found


def save_shards(folder: Path, players: Mapping[str, Player]) -> None:
    """Every rank writes its part into FOLDER/shards; a collective."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    tensors: dict[str, Tensor] = {}
    for name, player in players.items():
        tensors |= player_tensors(name, player)
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / _SHARDS), save_distributed=True))


def load_shards(folder: Path, players: Mapping[str, Player]) -> None:
    """Put a checkpoint of `save_shards` into the players; a collective. Raises InputError if its tensors do not fit."""
    sizes = _sizes(folder)
    for name, player in players.items():  # an optimiser that has not moved yet has no states to read into: make them
        for key, parameter in player.parameters.items():
            stored = [path for path in sizes if re.fullmatch(re.escape(f"{name}/optimizer/{key}/") + r"\w+", path)]
            for path in stored:
                like = sizes[path] == parameter.shape
                empty = torch.zeros_like(parameter, requires_grad=False).detach() if like else torch.zeros(sizes[path])
                player.optimizer.state[parameter][path.rpartition("/")[2]] = empty
    live = {path: tensor for name, player in players.items() for path, tensor in player_tensors(name, player).items()}
    odd = sorted(live.keys() ^ sizes.keys()) or sorted(path for path in live if live[path].shape != sizes[path])
    if odd:
        raise InputError(
            f"{folder}: got tensors that differ from the recipe's at {odd[0]!r} ({len(odd)} in all), resume with its own recipe"
        )
    _read(folder, live)


def whole_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint whose names begin with `prefix`, put together, by the rest of their names. Not a collective: one
    process can read them alone."""
    found = {path: torch.empty(size) for path, size in _sizes(folder).items() if path.startswith(prefix)}
    _read(folder, found, alone=True)
    return {path.removeprefix(prefix): tensor for path, tensor in found.items()}


def holds_shards(folder: Path) -> bool:
    return (folder / _SHARDS).is_dir()


def _reader(folder: Path) -> object:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder / _SHARDS))


def _sizes(folder: Path) -> dict[str, torch.Size]:
    return {path: about.size for path, about in _reader(folder).read_metadata().state_dict_metadata.items()}  # type: ignore[attr-defined]


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is what was asked for
        dcp.load(tensors, storage_reader=_reader(folder), no_dist=alone)
