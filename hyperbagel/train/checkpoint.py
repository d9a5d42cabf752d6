"""Checkpoints: folders of safetensors and JSON, never pickle; whole or absent; enough to resume bit for bit on a CPU.

checkpoints/step-00001200/
    <player>.weights.safetensors    trained parameters and buffers
    <player>.ema.safetensors        their averages, if any
    <player>.optimizer.safetensors  keys "<parameter>/<slot>"
    rng.safetensors                 torch's own generators (dropout); batches draw from (seed, step) and need none
    state.json                      step, seconds, score, optimiser scalars, the stage's own state
    shards/                         instead of the players' files, if each rank holds a part of them (train.sharding)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder, read_json
from hyperbagel.model.weights import write_tensors
from hyperbagel.train.distributed import World
from hyperbagel.train.sharding import holds_shards, load_shards, save_shards, whole_tensors
from hyperbagel.train.stage import Player, Stage

_NAME = re.compile(r"step-(\d{8})")
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far training has come: optimiser steps done and seconds trained, over all resumes.

    refused: how many batches in a row gave this step no finite loss; the next attempt draws another one.
    """

    step: int
    seconds: float
    refused: int = 0


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first. What a killed write leaves behind is not listed: its name is different."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: p.name)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest score, or None."""
    if not (folder / "best.json").exists():
        return None
    path = folder / str(read_best(folder)["name"])
    return path if path.is_dir() else None


def read_best(folder: Path) -> dict[str, Any]:
    """best.json of a checkpoints folder: name, score, metric. Raises InputError for a damaged one."""
    found = read_json(folder / "best.json")
    if not {"name", "score"} <= found.keys() or not isinstance(found["score"], int | float):
        raise InputError(f"{folder / 'best.json'}: got no name with a score, expected both, remove the file and go on")
    return found


def note_best(folder: Path, stage: Stage) -> None:
    """Corrects best.json after a kill between writing a checkpoint and noting it: each checkpoint stores its own score."""
    for path in list_checkpoints(folder):
        score = read_json(path / "state.json").get("score")
        if isinstance(score, int | float) and score > best_score(folder):
            _note(folder, path, score, stage)


def _note(folder: Path, path: Path, score: float, stage: Stage) -> None:
    atomic_write_text(folder / "best.json", json.dumps({"name": path.name, "score": score, "metric": stage.best_metric}))


def averaged_tensors(path: Path, player: str) -> dict[str, Tensor]:
    """A player's averages in a checkpoint, by parameter name; its weights if no average was kept. Raises InputError for a damaged one."""
    if holds_shards(path):
        return whole_tensors(path, f"{player}/ema/") or whole_tensors(path, f"{player}/weights/")
    ema = path / f"{player}.ema.safetensors"
    try:
        return load_file(ema if ema.exists() else path / f"{player}.weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: got a damaged checkpoint ({error}), expected a whole one, remove it and resume from an older") from error


@contextmanager
def as_exported(stage: Stage, player: str, out: Path) -> Iterator[None]:
    """Inside, a player of the run in `out` has the weights to export: the averages of the best checkpoint or, if nothing was measured, of
    the last step."""
    given, best = stage.players[player], best_checkpoint(out / "checkpoints")
    with given.averaged(), torch.no_grad():
        for name, value in averaged_tensors(best, player).items() if best else ():
            given.parameters[name].copy_(value)
        yield


def save_checkpoint(
    folder: Path, stage: Stage, progress: Progress, *, keep: int, score: float | None = None, world: World | None = None
) -> Path:
    """Write a checkpoint, note it in best.json if `score` beats the noted one, then drop all but the newest `keep` and the best.

    Every rank of a sharded stage must call it; the leading one decides, renames and prunes. Raises InputError if it cannot be written.
    """
    path, world = folder / f"step-{progress.step:08d}", world or World()
    if world.leads:
        make_folder(folder)
    missing = path not in list_checkpoints(folder)  # the same step means the same weights: a whole checkpoint's are never touched
    if world.agree(missing)[0] if stage.sharded else missing:
        _write(path, stage, progress, score, world)
    if not world.leads:
        return path
    if not missing:
        _amend(path, stage, progress, score)
    if score is not None and score > best_score(folder):
        _note(folder, path, score, stage)
    _prune(folder, keep)
    return path


def _amend(path: Path, stage: Stage, progress: Progress, score: float | None) -> None:
    """Adds what was learned about a checkpoint since it was written: its score, or that its next batch was refused. Its weights stay."""
    state = read_json(path / "state.json")
    news: dict[str, Any] = {}
    if score is not None and state.get("score") is None:
        news["score"] = score
    if progress.refused:
        news |= {"seconds": progress.seconds, "refused": progress.refused, "stage": stage.state()}
    if news:
        atomic_write_text(path / "state.json", json.dumps(state | news, indent=1))


def _write(path: Path, stage: Stage, progress: Progress, score: float | None, world: World) -> None:
    if stage.sharded and not world.leads:
        save_shards(path.with_name(world.tell("")), stage.players)
        world.wait()  # until the leading rank has renamed it
        return
    with atomic_path(path) as temporary:
        temporary.mkdir()
        if stage.sharded:
            save_shards(path.with_name(world.tell(temporary.name)), stage.players)
            scalars = {name: {"ema_updates": player.ema.updates if player.ema else 0} for name, player in stage.players.items()}
        else:
            scalars = {name: _save_player(temporary, name, player) for name, player in stage.players.items()}
        write_tensors(temporary / "rng.safetensors", _rng_tensors())
        state: dict[str, Any] = {"format": _FORMAT, **asdict(progress), "score": score}
        state |= {"players": scalars, "stage": stage.state()}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
    if stage.sharded:
        world.wait()


def load_checkpoint(path: Path, stage: Stage) -> Progress:
    """Put a checkpoint into `stage` (weights, averages, optimisers, generators, its own state).

    Raises:
        InputError: a file is missing or damaged, or the tensors do not fit the stage.
    """
    state = read_json(path / "state.json", "remove the folder and resume from an older checkpoint")
    try:
        if holds_shards(path) != stage.sharded:
            held, own = ("split", "whole") if holds_shards(path) else ("whole", "split")
            raise InputError(
                f"{path}: got {held} tensors, expected {own} ones, resume with the shard setting and ranks that the run began with"
            )
        for name, player in stage.players.items():
            if name not in state["players"]:
                raise InputError(f"{path}: got players {sorted(state['players'])}, expected {name!r}, resume with the recipe of this run")
            if stage.sharded and player.ema is not None:
                player.ema.updates = state["players"][name]["ema_updates"]
            elif not stage.sharded:
                _load_player(path, name, player, state["players"][name])
        if stage.sharded:
            load_shards(path, stage.players)
        _set_rng(load_file(path / "rng.safetensors"))
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: got a damaged checkpoint ({error}), expected a whole one, remove it and resume from an older") from error
    stage.load_state(state["stage"])
    return Progress(state["step"], state["seconds"], state.get("refused", 0))


def trained_tensors(player: Player) -> dict[str, Tensor]:
    """What a checkpoint keeps of a module: optimised parameters and persistent buffers, the live tensors."""
    parameters = {name for name, _ in player.module.named_parameters()}
    buffers = {name: t for name, t in player.module.state_dict(keep_vars=True).items() if name not in parameters}
    return {**player.parameters, **buffers}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _save_player(folder: Path, name: str, player: Player) -> dict[str, Any]:
    """Write the player's tensors; return the rest (optimiser scalars, the average's count) for the JSON."""
    write_tensors(folder / f"{name}.weights.safetensors", _plain(trained_tensors(player)))
    if player.ema is not None:
        write_tensors(folder / f"{name}.ema.safetensors", _plain(player.ema.shadow))
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, parameter in player.parameters.items():
        for slot, value in player.optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{key}/{slot}"] = value
    write_tensors(folder / f"{name}.optimizer.safetensors", _plain(tensors))
    return {"optimizer": scalars, "ema_updates": player.ema.updates if player.ema else 0}


def _load_player(folder: Path, name: str, player: Player, scalars: dict[str, Any]) -> None:
    _copy_into(trained_tensors(player), load_file(folder / f"{name}.weights.safetensors"), folder)
    if player.ema is not None:
        _copy_into(player.ema.shadow, load_file(folder / f"{name}.ema.safetensors"), folder)
        player.ema.updates = scalars["ema_updates"]
    slots: dict[str, dict[str, Any]] = {}
    for key, value in (load_file(folder / f"{name}.optimizer.safetensors") | scalars["optimizer"]).items():
        parameter, _, slot = key.rpartition("/")
        slots.setdefault(parameter, {})[slot] = value
    # through the optimiser's own loader, which knows which slots live on which device
    names = {id(p): key for key, p in player.parameters.items()}
    order = [names[id(p)] for group in player.optimizer.param_groups for p in group["params"]]
    state = {i: slots[key] for i, key in enumerate(order) if key in slots}
    player.optimizer.load_state_dict({"state": state, "param_groups": player.optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _copy_into(live: dict[str, Tensor], stored: dict[str, Tensor], folder: Path) -> None:
    """Copy by name; names and shapes must agree exactly."""
    odd = sorted(live.keys() ^ stored.keys()) or sorted(n for n in live if live[n].shape != stored[n].shape)
    if odd:
        raise InputError(
            f"{folder}: got tensors that differ from the recipe's at {odd[0]!r} ({len(odd)} in all), expected the same model, "
            "resume with the recipe of this run"
        )
    for name, tensor in live.items():
        tensor.copy_(stored[name])


def _rng_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda{i}"], i)


def best_score(folder: Path) -> float:
    """The score of the best checkpoint, or minus infinity."""
    if best_checkpoint(folder) is None:
        return float("-inf")
    return float(read_best(folder)["score"])


def _prune(folder: Path, keep: int) -> None:
    best = best_checkpoint(folder)
    for old in list_checkpoints(folder)[:-keep]:
        if old != best:
            # the marker goes first: a half-removed folder is then no checkpoint
            (old / "state.json").unlink()
            shutil.rmtree(old)
    for rest in [*folder.glob(".step-*"), *(p for p in folder.glob("step-*") if not (p / "state.json").exists())]:
        shutil.rmtree(rest, ignore_errors=True)
