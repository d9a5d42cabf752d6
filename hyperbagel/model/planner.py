"""A planner: low-rank changes of the understanding expert's attention that write the plans before pictures, and nothing else.

ours. What stands before a plan is read by the model itself, and the finished plan, too; so answers and pictures without a plan know
nothing of a planner.

FOLDER/adapter_model.safetensors, adapter_config.json   the changes in PEFT's layout
FOLDER/planner.json                                     fingerprint of the model that it was trained for
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder, read_json
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.student import PEFT_PREFIX, fill_adapter, fingerprint, peft_config, read_scale
from hyperbagel.model.weights import load_tensors, save_tensors
from hyperbagel.nn.lora import Adapter

_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")
_FORMAT = 1


def make_planner(
    base: Bagel, rank: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32, alpha: float | None = None
) -> Adapter:
    """A planner that changes nothing yet. alpha: see nn.lora.Adapter."""
    layers = range(base.config.llm.num_hidden_layers)
    names = [f"language_model.model.layers.{i}.self_attn.{leaf}" for i in layers for leaf in _LEAVES]
    return Adapter(base, names, rank=rank, alpha=alpha, generator=generator, dtype=dtype)


def save_planner(folder: Path, planner: Adapter, base: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a planner's folder, whole or not at all. base: the model's fingerprint. Raises InputError if it cannot be written."""
    make_folder(folder.parent)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors: dict[str, Tensor] = {PEFT_PREFIX + name: value.to(dtype) for name, value in planner.state_dict().items()}
        save_tensors(temporary / "adapter_model.safetensors", tensors)
        config = peft_config(planner.low_rank, (), planner.rank, planner.alpha, "")
        atomic_write_text(temporary / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        atomic_write_text(temporary / "planner.json", json.dumps({"format": _FORMAT, "base": base}, indent=2) + "\n")


def load_planner(folder: Path, base: Bagel, dtype: torch.dtype = torch.float32) -> Adapter:
    """Reads a planner of this model, onto its device. Raises InputError for a folder that is none, is damaged, or of another model."""
    about = read_planner(folder)
    if about.get("base") != (mine := fingerprint(base)):
        raise InputError(
            f"{folder}: got a planner of another model (fingerprint {about.get('base')}), expected one of the loaded model ({mine}); "
            "train one for it (hyperbagel train planner), or take the folder away"
        )
    rank, alpha = read_scale(folder, base.config.llm.hidden_size)
    planner = make_planner(base, rank, dtype=dtype, alpha=alpha)
    tensors = load_tensors(folder / "adapter_model.safetensors")
    fill_adapter(planner, {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}, folder)
    return planner.eval()


def read_planner(folder: Path) -> dict[str, Any]:
    """What planner.json says. Raises InputError if the folder holds no planner."""
    about = read_json(folder / "planner.json", "a planner's folder has planner.json and its adapter")
    if about.get("format") != _FORMAT:
        raise InputError(f"{folder}/planner.json: got format {about.get('format')!r}, expected {_FORMAT}; train the planner again")
    return about


def planner_folder(asked: str | Path | None, model: Path) -> Path | None:
    """Where the planner is: in the folder asked for or, by default, MODEL/planner, which need not be there. None for "none": the model
    itself writes its plans. Raises InputError for a folder asked for that holds no planner."""
    if asked is None:
        return model / "planner"
    if str(asked) == "none":
        return None
    if not str(asked).strip():
        raise InputError("got an empty name of a planner, expected a folder or none; is a variable not set?")
    read_planner(Path(asked))
    return Path(asked)
