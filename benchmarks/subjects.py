"""The models that are measured: a folder, the embedded model, or the 7B shape with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from torch import nn

from hyperbagel.core.errors import InputError
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.generate.session import Parts
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import decoder_layers
from hyperbagel.nn.quantized import Codes, QuantizedLinear, numbers

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(str(files("hyperbagel") / "assets" / "toybox"))
STD = 0.02  # of random weights


@dataclass(frozen=True)
class Subject:
    parts: Parts
    weights: str  # where they come from, in words


def load(shape: str, device: torch.device, precision: str | None = None) -> Subject:
    """The model of `shape` (toybox, 7b or a model folder), in bf16 on a GPU, in fp32 on a CPU; there the 7B shape is on the meta device.

    precision: a dtype as HyperBagel.from_pretrained takes it. Raises InputError if `shape` or `precision` is none of these.
    """
    dtype, codes = numbers(precision, device)
    if shape == "7b":
        if device.type == "cuda":
            return Subject(_packed(_random_7b(device, dtype), codes), "random")
        parts = shapes_only(BagelConfig())
        parts.model.codes = codes  # bytes are counted as codes
        return Subject(parts, "none, shapes only")
    if shape == "toybox" and not (ASSETS / "ema.safetensors").exists():
        return Subject(_packed(_random_toybox(device, dtype), codes), "random, of the shape in recipes/toybox/base.yaml")
    folder = ASSETS if shape == "toybox" else Path(shape)
    if not folder.is_dir():
        raise InputError(f"got --shape {shape}, expected toybox, 7b or a model folder; check the name")
    return Subject(Parts.load(folder, device, dtype, codes=codes), "trained" if shape == "toybox" else "of the folder")


def endless(parts: Parts) -> Parts:
    """The same model, but its answers never end: no token has the id -1."""
    tokenizer = copy.copy(parts.tokenizer)
    tokenizer.im_end = -1
    return replace(parts, tokenizer=tokenizer)


def _packed(parts: Parts, codes: Codes | None) -> Parts:
    """The same model with the matrices of its decoder's layers stored as codes, in place."""
    if codes is not None:
        for name in list(decoder_layers(parts.model)):  # names alone, so that each layer is let go as soon as it is packed
            layer = parts.model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            parts.model.set_submodule(name, QuantizedLinear(layer, layer.weight.detach(), codes))
        parts.model.codes = codes
    return parts


def _parts(model: Bagel, vae: AutoEncoder) -> Parts:
    """Parts with the embedded model's tokenizer, whose ids are valid in any vocabulary; times do not depend on the words."""
    options = model.config.options
    sizes = [ImageTransform(s.max_size, s.min_size, s.stride, s.max_pixels) for s in (options.vae_transform, options.vit_transform)]
    return Parts(model.eval().requires_grad_(False), vae.eval().requires_grad_(False), Tokenizer.from_folder(ASSETS), *sizes)


def _random_toybox(device: torch.device, dtype: torch.dtype) -> Parts:
    recipes = [yaml.safe_load((ROOT / "recipes" / "toybox" / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("base", "vae")]
    config = BagelConfig(**recipes[0]["shape"], vae=recipes[1]["architecture"])
    generator = torch.Generator().manual_seed(0)
    model = fresh_bagel(config, generator)
    with torch.no_grad():  # a fresh velocity head is zero
        model.llm2vae.weight.copy_(torch.randn(model.llm2vae.weight.shape, generator=generator) * STD)
    return _parts(model.to(device, dtype), AutoEncoder(config.vae).to(device))


def shapes_only(config: BagelConfig) -> Parts:
    """A model on the meta device: shapes without values. In bf16 as on a GPU, so that bytes are counted as there."""
    with torch.device("meta"):
        return _parts(Bagel(config).to(torch.bfloat16), AutoEncoder(config.vae))


def _random_7b(device: torch.device, dtype: torch.dtype) -> Parts:
    """The 7B shape with random weights made on the device: 29 GB in bf16 that host memory never holds. Norms are 1, all else is normal."""
    config = BagelConfig()
    with torch.device("meta"):
        model = Bagel(config).to(dtype)
    with torch.device(device):
        vae = AutoEncoder(config.vae)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=STD, generator=generator)
    return _parts(model, vae)
