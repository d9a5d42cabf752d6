"""Whole model folders for training: read one to go on from, write one at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, check_name, make_folder
from hyperbagel.generate.types import MAX_STEPS
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import VaeConfig, ViTConfig
from hyperbagel.model.planner import load_planner, save_planner
from hyperbagel.model.siglip import SiglipVisionModel
from hyperbagel.model.student import as_whole, average_students, factorised, fingerprint, load_student, save_student
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import TensorFolder, fill, load_folder, save_folder, stored_dtype

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def load_model(folder: Path, device: torch.device) -> Bagel:
    """A model folder's network, trainable, in fp32 (what the optimiser updates; autocast casts for the forward). Raises InputError."""
    model, _ = load_folder(folder, device, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("pos_embed.pos_embed"))  # the fixed tables
    return model.train()


def load_vae(folder: Path, device: torch.device) -> AutoEncoder:
    """A folder's autoencoder: fp32, frozen. Raises InputError."""
    path = folder / "vae_config.json"
    try:
        config = VaeConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else VaeConfig()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: got a file that is no VAE configuration ({error}), expected one, restore it") from error
    with torch.device("meta"):
        vae = AutoEncoder(config)
    fill(vae, TensorFolder(folder, "ae"), device, torch.float32)
    return vae.eval()


def load_vit(folder: Path, device: torch.device) -> SiglipVisionModel:
    """A pretrained vision encoder (stage vit): fp32, frozen. Raises InputError."""
    path = folder / "vit_config.json"
    try:
        config = ViTConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: got no readable configuration ({error}), expected a folder that stage vit exported") from error
    with torch.device("meta"):
        vit = SiglipVisionModel(config)
    fill(vit, TensorFolder(folder, "vit"), device, torch.float32)
    return vit


def save_model(
    folder: Path, model: Bagel, vae: AutoEncoder, tokenizer: Path, dtype: torch.dtype, vae_dtype: torch.dtype | None = None
) -> None:
    """Write a folder in BAGEL's layout (ema, ae, four JSON files, tokenizer), whole or not at all. Raises InputError."""
    make_folder(folder.parent)
    with atomic_path(folder) as temporary:
        save_folder(temporary, model.config, model.state_dict(), vae.state_dict(), dtype=dtype, vae_dtype=vae_dtype)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, temporary / name)


def install_planner(planner: Path, model: Path) -> Path:
    """Copies a planner to MODEL/planner in bfloat16; an older one is replaced. Returns its folder.

    Raises InputError for a folder that holds no planner, a planner of another model, or a place that something else has.
    """
    base, _ = load_folder(model, torch.device("cpu"), torch.bfloat16)
    loaded, target = load_planner(planner, base), model / "planner"
    if target.exists() and not (target / "planner.json").is_file():
        raise InputError(f"{target}: got something there that is no planner, expected nothing or a planner to replace; move it away")
    save_planner(target, loaded, fingerprint(base))
    return target


def install_student(student: Path, model: Path, name: str | None = None, nfe: int | None = None) -> Path:
    """Copies a student to MODEL/students/NAME in bfloat16; an older one of that name is replaced. Returns its folder.

    name: None takes its number of evaluations. nfe: how many evaluations it is sampled with from now on, for a student that takes any
    number (stage cfg); None keeps the number it was made for.
    Raises InputError for a folder that holds no student, a student of another base, or a name that no student can have.
    """
    if name is not None:
        check_name(name, "none")
    base, _ = load_folder(model, torch.device("cpu"), torch.bfloat16)  # bf16 is written and, mostly, read: no copy
    loaded = load_student(student, base)
    if nfe is not None:
        if not 1 <= nfe <= MAX_STEPS:
            raise InputError(f"got {nfe} evaluations, expected 1 to {MAX_STEPS}")
        loaded.sampler = replace(loaded.sampler, nfe=nfe)
    target = model / "students" / (name or str(loaded.sampler.nfe))
    if target.exists() and not (target / "sampler.json").is_file():
        raise InputError(f"{target}: got something that is no student there, expected nothing or a student to replace, choose another name")
    save_student(target, loaded, base, base_name=model.name, dtype=torch.bfloat16)
    return target


def average_folders(students: Sequence[Path], model: Path, out: Path, rank: int | None = None) -> tuple[Path, float]:
    """Writes the mean of several students of one model (`average_students`) to a new folder, in fp32; with `rank`, as a LoRA of that rank.

    Returns the folder, and the share of the change that is lost to the rank. Raises InputError.
    """
    if out.exists():
        raise InputError(f"{out}: exists already, expected a new folder, choose another one or remove it")
    base, _ = load_folder(model, torch.device("cpu"), stored_dtype(model))  # what is written are differences to it
    mean, lost = average_students(students, base), 0.0
    if rank is not None:
        widest = base.config.llm.intermediate_size
        if not 1 <= rank <= widest:
            raise InputError(f"got rank {rank}, expected 1 to {widest}; 64 is usual")
        mean, lost = factorised(as_whole(mean, base), base, rank)
    save_student(out, mean, base, base_name=model.name)
    return out, lost
