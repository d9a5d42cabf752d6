"""A model folder and recipes small enough to distil in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import hyperbagel
from hyperbagel.core.config import check_config
from hyperbagel.core.run import RunFolder
from hyperbagel.model.config import BagelConfig, BagelOptions, ImageSizes, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.train.folder import save_model
from hyperbagel.train.loop import train
from hyperbagel.train.stage import Stage
from hyperbagel.train.stages import adp, cfg, dmdo, refl, tscd

TOKENIZER = Path(hyperbagel.__file__).parent / "assets" / "toybox"
SIZES = ImageSizes(max_size=32, min_size=32, stride=8)
CONFIG = BagelConfig(
    llm=LLMConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=1024,
        max_position_embeddings=512,
    ),
    vit=ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8),
    vae=VaeConfig(resolution=32, ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, norm_groups=4, downsample=4),
    options=BagelOptions(
        max_latent_size=4, vit_max_num_patch_per_side=4, vae_transform=SIZES, vit_transform=SIZES, default_size=(32, 32)
    ),
)  # fmt: skip
SOURCES = {
    "t2i": {"task": "t2i", "samples": 3, "resolution": 32, "styles": {"terse": 1}},
    "edit": {"task": "edit", "samples": 3, "resolution": 32},
}
DATA = {"sources": SOURCES, "mixture": [{"weights": {"t2i": 1, "edit": 1}}]}
QUICK: dict[str, Any] = {"log_every": 1, "sample_every": 100, "teacher_steps": 2}
HELD_OUT = {"sources": {"edit": SOURCES["edit"]}, "mixture": [{"weights": {"edit": 1}}]}


def write_base(folder: Path, seed: int = 0) -> Path:
    model = fresh_bagel(CONFIG, torch.Generator().manual_seed(seed), std=0.2)
    torch.manual_seed(seed)
    with torch.no_grad():  # the velocity head starts at zero: give it something to say
        model.llm2vae.weight.normal_(std=0.1)
    save_model(folder, model, AutoEncoder(CONFIG.vae), TOKENIZER, torch.float32)
    return folder


def only(source: str) -> dict[str, Any]:
    return {"sources": {source: SOURCES[source]}, "mixture": [{"weights": {source: 1}}]}


def settings(module: Any, base: Path, **keys: Any) -> Any:
    """A recipe of a stage's module."""
    values: dict[str, Any] = {"model": str(base), "data": DATA, "precision": "fp32", "device": "cpu", **keys}
    return check_config(module.Recipe, {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}, "test")


def make(module: Any, base: Path, **keys: Any) -> Any:
    """A stage."""
    return module.build(settings(module, base, **keys), torch.device("cpu"))


def run(module: Any, base: Path, out: Path, *, resume: bool = False, **keys: Any) -> None:
    """A whole run of a stage, from the recipe to the export."""
    recipe = settings(module, base, **keys)
    stage = module.build(recipe, torch.device("cpu"))
    with RunFolder(out, recipe, seed=recipe.seed, resume=resume) as folder:
        train(stage, recipe, folder, resume=resume)
    stage.close()


def stage_of(name: str, base: Path, student: Path, head: Path, **keys: Any) -> Stage:
    """A stage of distillation by its name, with the folders that it asks for."""
    extra: dict[str, dict[str, Any]] = {
        "cfg": {},
        "tscd": {"init": student},
        "dmdo": {"init": student, "teacher": student, "nfe": 3},
        "adp": {"init": student, "nfe": 1},
        "refl": {"init": student, "teacher": student, "reward": head},
    }
    module = {"cfg": cfg, "tscd": tscd, "dmdo": dmdo, "adp": adp, "refl": refl}[name]
    return make(module, base, **(extra[name] | keys))
