"""The models that are measured: a folder, the embedded model, or the 7B shape with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.generate.session import Parts
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import TensorFolder, fill
from hyperbagel.nn.quantized import Codes, numbers

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(str(files("hyperbagel") / "assets" / "toybox"))
STD = 0.02  # of random weights


@dataclass(frozen=True)
class Subject:
    parts: Parts
    weights: str  # where they come from, in words


def load(shape: str, device: torch.device, precision: str | None = None, random: bool = False) -> Subject:
    """The model of `shape` (toybox, 7b or a model folder), in bf16 on a GPU, in fp32 on a CPU; there the 7B shape is on the meta device,
    unless it is to have `random` weights as on a GPU.

    precision: a dtype as HyperBagel.from_pretrained takes it. Raises InputError if `shape` or `precision` is none of these.
    """
    dtype, codes = numbers(precision, device)
    if shape == "7b":
        if device.type == "cuda" or random:
            return Subject(random_model(BagelConfig(), device, dtype, codes), "random")
        parts = shapes_only(BagelConfig())
        parts.model.codes = codes  # bytes are counted as codes
        return Subject(parts, "none, shapes only")
    if shape == "toybox" and not (ASSETS / "ema.safetensors").exists():
        recipes = [yaml.safe_load((ROOT / "recipes" / "toybox" / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("base", "vae")]
        config = BagelConfig(**recipes[0]["shape"], vae=recipes[1]["architecture"])
        return Subject(random_model(config, device, dtype, codes), "random, of the shape in recipes/toybox/base.yaml")
    folder = ASSETS if shape == "toybox" else Path(shape)
    if not folder.is_dir():
        raise InputError(f"got --shape {shape}, expected toybox, 7b or a model folder; check the name")
    return Subject(Parts.load(folder, device, dtype, codes=codes), "trained" if shape == "toybox" else "of the folder")


def endless(parts: Parts) -> Parts:
    """The same model, but its answers never end: no token has the id -1."""
    tokenizer = copy.copy(parts.tokenizer)
    tokenizer.im_end = -1
    return replace(parts, tokenizer=tokenizer)


def _parts(model: Bagel, vae: AutoEncoder) -> Parts:
    """Parts with the embedded model's tokenizer, whose ids are valid in any vocabulary; times do not depend on the words."""
    options = model.config.options
    sizes = [ImageTransform(s.max_size, s.min_size, s.stride, s.max_pixels) for s in (options.vae_transform, options.vit_transform)]
    return Parts(model.eval().requires_grad_(False), vae.eval().requires_grad_(False), Tokenizer.from_folder(ASSETS), *sizes)


def shapes_only(config: BagelConfig) -> Parts:
    """A model on the meta device: shapes without values. In bf16 as on a GPU, so that bytes are counted as there."""
    with torch.device("meta"):
        return _parts(Bagel(config).to(torch.bfloat16), AutoEncoder(config.vae))


class RandomWeights(TensorFolder):
    """Tensors of a model's shapes, made one at a time on their device, as if they came from a folder. Norms are 1, all else is normal."""

    def __init__(self, model: nn.Module) -> None:
        self.folder = Path("random weights")
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.dtypes = dict.fromkeys(self.shapes, "F32")

    def tensors(self, device: str) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(device).manual_seed(0)
        for name, shape in self.shapes.items():
            norm = len(shape) == 1 and name.endswith("weight")
            yield name, torch.ones(shape, device=device) if norm else torch.randn(shape, device=device, generator=generator) * STD


def random_model(config: BagelConfig, device: torch.device, dtype: torch.dtype, codes: Codes | None) -> Parts:
    """Random weights that host memory never holds: of the 7B shape 29 GB in bf16."""
    with torch.device("meta"):
        model = Bagel(config)
    fill(model, RandomWeights(model), device, dtype, codes)
    model.codes = codes
    with torch.device(device):
        return _parts(model, AutoEncoder(config.vae))
