"""Drafter folders: drafter.json and drafter.safetensors, read strictly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyperbagel.core.config import check_config
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, check_name, make_folder, read_json
from hyperbagel.core.hardware import check_room
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, LLMConfig
from hyperbagel.model.weights import TensorFolder, load_tensors, save_tensors
from hyperbagel.nn.projections import store_by_columns
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.eagle3 import Eagle3, drafted_ids
from hyperbagel.speculative.drafters.hyper_bagel import HyperBagelDrafter
from hyperbagel.speculative.drafters.serve_blocks import BlockProposer
from hyperbagel.speculative.drafters.serve_chains import AutoregressiveDrafter

Module = Eagle3 | HyperBagelDrafter | BlockDrafter
_KINDS: dict[str, type[Eagle3] | type[HyperBagelDrafter] | type[BlockDrafter]] = {
    "eagle3": Eagle3,
    "hyper-bagel": HyperBagelDrafter,
    "block": BlockDrafter,
}


def make_module(config: DrafterConfig) -> Module:
    """A module of the config's kind with PyTorch's own initial values; `init_from` sets the right ones."""
    return _KINDS[config.kind](config)


def save_drafter(folder: Path, module: Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the folder, whole or not at all. Raises InputError if it cannot be written."""
    make_folder(folder.parent)
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in module.state_dict().items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        atomic_write_text(temporary / "drafter.json", module.config.model_dump_json(indent=1) + "\n")
        save_tensors(temporary / "drafter.safetensors", tensors)


def read_config(folder: Path) -> DrafterConfig:
    """The settings in a drafter's folder. Raises InputError for a folder that is not a drafter's, or damaged settings."""
    path = folder / "drafter.json"
    return check_config(DrafterConfig, read_json(path, "give a drafter's folder (drafter.json, drafter.safetensors)"), str(path))


def write_acceptance(folder: Path, measured: dict[str, list[float]]) -> None:
    """Writes acceptance.json into a drafter's folder: by split, how often depth 1, 2, ... was accepted if the one before was."""
    atomic_write_text(folder / "acceptance.json", json.dumps(measured, indent=1) + "\n")


def read_acceptance(folder: Path) -> list[float]:
    """The first split's rates, in [0.01, 0.99]; [] if there are none or they are damaged, since they only start an estimate."""
    try:
        rates = next(iter(json.loads((folder / "acceptance.json").read_text(encoding="utf-8")).values()))
        return [min(0.99, max(0.01, float(rate))) for rate in rates]
    except (OSError, ValueError, TypeError, AttributeError, StopIteration):
        return []


def _read(folder: Path, llm: LLMConfig, device: str, dtype: torch.dtype | None = None) -> tuple[Module, dict[str, Tensor]]:
    """(a module on the meta device, its tensors as stored). dtype: of the module that they will become; None: none. Errors: see
    `load_module`."""
    config = read_config(folder)
    config.check_target(llm, str(folder))
    with torch.device("meta"):
        module = make_module(config)
    TensorFolder(folder, "drafter").check({name: tuple(x.shape) for name, x in module.state_dict().items()})
    if dtype is not None:
        sizes = [dtype.itemsize * x.numel() for x in module.state_dict().values()]
        check_room(f"{folder}, drafter", torch.device(device), sum(sizes) + max(sizes))  # one matrix at a time is there twice
    tensors = load_tensors(folder / "drafter.safetensors", device)
    check_values(module, tensors, folder)
    return module, tensors


def load_module(folder: Path, target: Bagel) -> Module:
    """A drafter for `target`, on its device and in its dtype. Whether it fits is checked before any weight is read.

    Raises InputError: no such folder, damaged, made for another target, or no memory for it.
    """
    module, tensors = _read(folder, target.config.llm, str(target.device), target.dtype)
    module.load_state_dict({n: x.to(target.dtype) if x.is_floating_point() else x for n, x in tensors.items()}, assign=True)
    store_by_columns(module)
    return module.eval().requires_grad_(False)


def check_values(module: Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises InputError for tensors of the right names and shapes whose dtypes or values the drafter cannot run with."""
    for name, own in module.state_dict().items():
        x = tensors[name]
        if x.is_floating_point() != own.is_floating_point():
            raise InputError(f"{folder}: got {name} as {x.dtype}, expected {own.dtype} or the like, restore the file")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise InputError(f"{folder}: got values in {name} that are not finite, expected a trained drafter, restore the file")
    if isinstance(module, Eagle3):
        ids = drafted_ids(tensors["d2t"])
        if not (int(ids.min()) >= 0 and int(ids.max()) < module.config.vocab_size):
            raise InputError(
                f"{folder}: got d2t with draft tokens {int(ids.min())} to {int(ids.max())}, expected 0 to {module.config.vocab_size - 1}, "
                "restore the file"
            )


def install_drafter(drafter: Path, model: Path, name: str | None = None) -> Path:
    """Copies a drafter to MODEL/drafters/NAME (None: its kind), where `ask` finds it; an older one of that name is replaced.

    Returns its folder. Raises InputError for a folder that is no drafter, a drafter of another target, or an unusable name.
    """
    target = model / "drafters" / check_name(read_config(drafter).kind if name is None else name, "auto", "lookup", "none")
    _read(drafter, BagelConfig.from_folder(model).llm, "cpu")  # for its checks
    if target.exists() and not (target / "drafter.json").is_file():
        raise InputError(f"{target}: got something there that is no drafter, expected nothing or a drafter to replace, choose another name")
    make_folder(target.parent)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for file in ("drafter.json", "drafter.safetensors", "acceptance.json"):
            if (drafter / file).exists():
                shutil.copyfile(drafter / file, temporary / file)
    return target


def make_drafter(
    module: Module, target: Bagel, *, depth: int | None = None, nodes: int = 0, branch: int = 4
) -> AutoregressiveDrafter | BlockProposer:
    """The drafter that serves with this module: it drafts chains, or, if `nodes` > 0, trees of at most `nodes` nodes."""
    if isinstance(module, BlockDrafter):
        return BlockProposer(module, target, depth=depth, nodes=nodes, branch=branch)
    return AutoregressiveDrafter(module, target, depth=depth or 5, nodes=nodes, branch=branch)
