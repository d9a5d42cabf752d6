"""What a folder is and what its weights take in memory, from configs and headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import read_json
from hyperbagel.core.hardware import check_room, free_bytes
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import TensorFolder, decoder_layers, stored_dtype
from hyperbagel.nn.quantized import CODES, DTYPES, Codes, bytes_of_a_weight


def inspect_folder(folder: Path) -> dict[str, Any]:
    """What a model folder is: shapes, parameter counts, dtypes, files, and whether the tensors fit the config. Reads headers only."""
    if not folder.is_dir():
        raise InputError(f"{folder}: got no folder, expected a model folder in BAGEL's layout")
    sampler = folder / "sampler.json"
    if sampler.exists() and not any(folder.glob("ema*.safetensors")):
        return _inspect_student(folder)
    config = BagelConfig.from_folder(folder)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"ema": Bagel(config), "ae": AutoEncoder(config.vae)}
    report: dict[str, Any] = {"folder": str(folder), "config": config.model_dump(mode="json"), "weights": {}}
    if sampler.exists():
        report["sampler"] = read_json(sampler)  # a student merged into the model
    for stem, module in parts.items():
        source = TensorFolder(folder, stem)
        source.check({name: tuple(p.shape) for name, p in module.named_parameters()})
        source.check_numbers()
        report["weights"][stem] = source.sizes() | {
            "files": sorted({path.name for path in source.file_of.values()}),
            "bytes": sum(path.stat().st_size for path in set(source.file_of.values())),
        }
    for where in ("GPU", "CPU"):
        sizes = bytes_in_memory(parts["ema"], parts["ae"], torch.device("cuda" if where == "GPU" else "cpu"))
        report[f"MB on a {where} as"] = {dtype: round(size / 1e6) for dtype, size in sizes.items()}
    return report


def _inspect_student(folder: Path) -> dict[str, Any]:
    """Sampler, base and sizes of a student (model.student). Whether it fits a base shows when it is loaded."""
    report: dict[str, Any] = {"folder": str(folder), "student": read_json(folder / "sampler.json"), "weights": {}}
    for stem in ("adapter_model", "moe_gen", "guidance"):
        if (folder / f"{stem}.safetensors").exists():
            report["weights"][stem] = TensorFolder(folder, stem).sizes()
    return report


def bytes_in_memory(model: nn.Module, vae: nn.Module, device: torch.device) -> dict[str, float]:
    """Name of a dtype -> bytes of the weights, the autoencoder's (always in fp32) included. Modules on the meta device will do."""
    layers = decoder_layers(model).values()
    inner = sum(layer.weight.numel() for layer in layers)
    outer, ae = (sum(p.numel() for p in module.parameters()) for module in (model, vae))
    outer -= inner
    width = 4 if device.type == "cpu" else 2  # of what is not in codes: fp32 or bf16
    sizes = {name: float(kind.itemsize * (inner + outer)) for name, kind in DTYPES.items()}
    for name in CODES:
        sizes[name] = sum(layer.weight.numel() * bytes_of_a_weight(name, layer.in_features) for layer in layers) + width * outer
    return {name: size + 4 * ae for name, size in sizes.items()}


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype, codes: Codes | None) -> None:
    """Raises InputError if a model's weights do not fit into what is free."""
    free = free_bytes(device) if folder.is_dir() else None
    if free is None or 5 * sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.exists()) <= free:
        return  # in no type do they take more: each number has a byte at least, and 4 in fp32
    if device.type == "cpu" and codes is None and dtype == torch.bfloat16 == stored_dtype(folder):
        return  # read from the disk as it is used, which is slow where memory is short, and works
    config = BagelConfig.from_folder(folder)
    with torch.device("meta"):
        model, vae = Bagel(config), AutoEncoder(config.vae)
    # On a CPU the head is there twice for a moment (nn.projections.store_by_columns).
    twice = 4 * config.llm.hidden_size * config.llm.vocab_size if device.type == "cpu" else 0
    needed = {name: size + twice for name, size in bytes_in_memory(model, vae, device).items()}
    asked: str = codes or next(name for name, kind in DTYPES.items() if kind == dtype)
    fits = [f"{name} ({size / 1e9:.1f} GB)" for name, size in needed.items() if size <= free]
    check_room(f"{folder} as {asked}", device, needed[asked], f"take {' or '.join(fits)} as the dtype, " if fits else "")
