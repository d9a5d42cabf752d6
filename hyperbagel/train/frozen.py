"""The frozen model of a stage that trains something beside it, in numbers or in codes."""

from __future__ import annotations

from pathlib import Path

import torch

from hyperbagel.model.bagel import Bagel
from hyperbagel.model.inspection import check_memory
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder
from hyperbagel.nn.quantized import Codes, numbers
from hyperbagel.train.loop import pick_precision
from hyperbagel.train.stage import TrainRecipe


class FrozenRecipe(TrainRecipe):
    """Settings of stages that train beside a frozen model."""

    # how the matrices of the frozen model's decoder are stored (QLoRA, Dettmers et al. 2023); None: as numbers. BAGEL-7B-MoT takes 16.5 GB
    # in int8 and 10.2 in nf4, in place of 29.5 in bf16 (nn.quantized)
    quantize: Codes | None = None


def load_frozen(folder: Path, recipe: FrozenRecipe, device: torch.device) -> tuple[Bagel, AutoEncoder]:
    """A folder in BAGEL's layout as the recipe wants it. Raises InputError as `load_folder` does, or if bitsandbytes is needed and
    cannot be used, or if there is no memory for the weights."""
    dtype, codes = pick_precision(recipe.precision, device), codes_of(recipe, device)
    check_memory(folder, device, dtype, codes)
    return load_folder(folder, device, dtype, codes=codes)


def codes_of(recipe: FrozenRecipe, device: torch.device) -> Codes | None:
    """The recipe's `quantize`. Raises InputError if bitsandbytes is needed and cannot be used on this device."""
    return numbers(recipe.quantize, device)[1]
