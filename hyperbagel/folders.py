"""What a folder is: a model, a student, a drafter, a planner, a checkpoint or a run of training. Reads headers and settings, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import read_json
from hyperbagel.core.run import read_metrics
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.model.planner import read_planner
from hyperbagel.model.weights import TensorFolder
from hyperbagel.speculative.drafters.folder import read_acceptance, read_config
from hyperbagel.train.checkpoint import best_checkpoint, list_checkpoints

TRAINED = ".weights.safetensors"  # how the file of a trained player in a checkpoint ends
PARTS = {"ae": "an autoencoder (stage vae)", "vit": "a vision encoder (stage vit)", "reward": "a reward head (stage reward)"}


def describe_folder(folder: Path) -> dict[str, Any]:
    """The report that `hyperbagel inspect` prints. Raises InputError for a folder of none of these kinds, or a damaged one."""
    if (folder / "drafter.json").is_file():
        return _drafter(folder)
    if (folder / "planner.json").is_file():
        return _planner(folder)
    if (folder / "state.json").is_file():
        return _checkpoint(folder)
    if (folder / "provenance.json").is_file():
        return _run(folder)
    for stem, what in PARTS.items():  # exports of stages that train a part of a model
        of_a_model = (folder / "llm_config.json").exists() or any(folder.glob("ema*.safetensors"))
        if (folder / f"{stem}.safetensors").is_file() and not of_a_model:
            return {"folder": str(folder), "part": what, "weights": {stem: TensorFolder(folder, stem).sizes()}}
    if folder.is_dir() and not any([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        raise InputError(
            f"{folder}: got a folder without weights or settings, expected a model (llm_config.json), a student (sampler.json), a drafter "
            "(drafter.json), a planner (planner.json), a checkpoint (state.json) or a training's run (provenance.json); check the path"
        )
    return inspect_folder(folder)


def _drafter(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    target = {"hidden_size": config.hidden_size, "layers": config.target_layers, "vocab_size": config.vocab_size}
    target |= {"heads": config.heads, "kv_heads": config.kv_heads}
    rates = [round(rate, 3) for rate in read_acceptance(folder)]
    report = {"folder": str(folder), "drafter": {"kind": config.kind, "layers": config.layers}, "target": target}
    return report | {"acceptance": rates or "not measured", "weights": {"drafter": TensorFolder(folder, "drafter").sizes()}}


def _planner(folder: Path) -> dict[str, Any]:
    about, config = read_planner(folder), read_json(folder / "adapter_config.json")
    report = {"folder": str(folder), "planner": {"rank": config.get("r"), "base": about.get("base")}}
    return report | {"weights": {"adapter_model": TensorFolder(folder, "adapter_model").sizes()}}


def _checkpoint(folder: Path) -> dict[str, Any]:
    state = read_json(folder / "state.json")
    if not isinstance(state.get("players", {}), dict):
        raise InputError(f"{folder / 'state.json'}: got no players, expected those of a training, restore the file")
    report = {key: state.get(key) for key in ("step", "seconds", "score")}
    sharded = "; split over ranks (shards/)" if (folder / "shards").is_dir() else ""
    players = {path.name.removesuffix(TRAINED): path.name.removesuffix(".safetensors") for path in sorted(folder.glob(f"*{TRAINED}"))}
    weights = {name: TensorFolder(folder, stem).sizes() for name, stem in players.items()}
    return {"folder": str(folder), "checkpoint": report, "players": ", ".join(state.get("players", {})) + sharded, "weights": weights}


def _run(folder: Path) -> dict[str, Any]:
    launches = read_json(folder / "provenance.json").get("launches") or [{}]
    if not isinstance(launches, list) or not all(isinstance(one, dict) for one in launches):
        raise InputError(f"{folder / 'provenance.json'}: got no list of launches, expected one, restore the file")
    last = launches[-1]
    words = last.get("command", [])
    if not isinstance(words, list):
        raise InputError(f"{folder / 'provenance.json'}: got command {words!r}, expected a list of words, restore the file")
    command = [str(word) for word in words]
    stage = command[command.index("train") + 1] if "train" in command[:-1] else "unknown"
    lines = read_metrics(folder / "metrics.jsonl")
    report = {
        "stage": stage,
        "step": max((line["step"] for line in lines), default=0),
        "launches": len(launches),
        "started": last.get("started"),
    }
    report |= {"command": " ".join(command), "git": last.get("git"), "config": str(folder / "config.yaml")}
    kept, best = list_checkpoints(folder / "checkpoints"), best_checkpoint(folder / "checkpoints")
    report |= {"checkpoint": str(kept[-1]) if kept else "none yet", "best": str(best) if best else "none noted"}
    report["export"] = str(folder / "export") if (folder / "export").is_dir() else "none yet: it is written at the end"
    figures = {}
    for name, held_out in (("training", False), ("held_out", True)):
        of_kind = [line for line in lines if any(key.startswith("held_out/") for key in line) == held_out]
        if of_kind:
            figures[name] = {key.removeprefix("held_out/"): value for key, value in of_kind[-1].items()}
    return {"folder": str(folder), "run": report, "last_figures": figures}
