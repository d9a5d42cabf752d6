"""Pretrains the vision encoder on drawn pictures: each patch must tell what stands there. BAGEL itself starts from a trained SigLIP.

ours: a base trained from scratch learns to see from its answers alone, and one answer says little about a picture. A dense target says
everything about it and costs only the encoder (no language model runs). Only combinations of the training split are drawn.

Shape legend: B pictures, N = h x h patches of one, P values of a patch, V width of the encoder, G = 16 cells per side of the targets,
K values of one attribute.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from hyperbagel.core.config import refuse_unknown
from hyperbagel.core.files import atomic_path, make_folder
from hyperbagel.data.transforms import grid_positions, patchify
from hyperbagel.model.config import ViTConfig
from hyperbagel.model.siglip import SiglipVisionModel
from hyperbagel.model.weights import save_tensors
from hyperbagel.toybox.detector import GRID, PICTURE_VALUES, PICTURE_WIDTHS, SIDE, THING_VALUES, THING_WIDTHS, named_maps
from hyperbagel.toybox.detector_train import detector_loss, scene_targets, spoil
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene, sample_scenes
from hyperbagel.train.distill import seeded
from hyperbagel.train.folder import load_vit
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.stage import HELD_OUT_SEED, Draws, Player, Stage, TrainRecipe


class Recipe(TrainRecipe):
    """Settings of the stage "vit"."""

    vit: ViTConfig = ViTConfig()
    init: Path | None = None  # folder with vit.safetensors to start from; overrides `vit`
    per_side: int = Field(default=16, ge=1)  # positions per side of the base's table: its vit_max_num_patch_per_side
    resolution: int = Field(default=64, ge=16)
    batch_size: int = Field(default=64, ge=1)
    variety: float = Field(default=0.06, ge=0, le=0.5)  # how often materials, styles and tones vary
    crowded: float = Field(default=0.5, ge=0, le=1)  # share of scenes with four things
    held_out: int = Field(default=256, ge=1)  # pictures measured
    optim: OptimConfig = OptimConfig(kind="muon", lr=0.02, ema_decay=0.998)

    @field_validator("vit", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return refuse_unknown(ViTConfig, value)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Recipe:
        side, patch = self.resolution, self.vit.patch_size
        if side % patch or GRID % (side // patch) or side // patch > self.per_side:
            raise ValueError(
                f"resolution must be a multiple of patch_size {patch} that gives 1, 2, 4, 8 or 16 patches a side, at most per_side"
            )
        return self


class Eye(nn.Module):
    """The encoder and two linear heads, which are discarded after training: what each patch shows, and how the whole picture looks."""

    def __init__(self, vit: SiglipVisionModel, cells: int) -> None:
        super().__init__()
        width = vit.config.hidden_size
        self.vit_model = vit
        self.cells = cells  # of the targets, along one side of a patch
        self.thing = nn.Linear(width, cells * cells * sum(THING_WIDTHS.values()))
        self.picture = nn.Linear(width, sum(PICTURE_WIDTHS.values()))

    def forward(self, patches: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """patches [B, N, P], positions [N] -> the detector's maps: object [B, G, G], place [B, 3, G, G], [B, K, ...] for each attribute."""
        b, n, _ = patches.shape
        x = self.vit_model(patches.flatten(0, 1), positions.repeat(b), [n] * b).unflatten(0, (b, n))
        side = round(n**0.5)
        dense = F.pixel_shuffle(self.thing(x).transpose(1, 2).unflatten(2, (side, side)).float(), self.cells)
        return named_maps(dense, self.picture(x.mean(1)).float())


class VitStage(Stage):
    """One player, "vit"; the loss is the sum of the detector's losses, one per map."""

    best_metric = "right"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        if recipe.init is not None:
            vit = load_vit(recipe.init, device).requires_grad_(True)
        else:
            vit = SiglipVisionModel(recipe.vit)
            nn.init.normal_(vit.vision_model.embeddings.position_embedding.weight, std=0.02)  # SiglipVisionModel leaves it uninitialised
        self.config = vit.config
        side = recipe.resolution // self.config.patch_size
        self.eye = Eye(vit, GRID // side).to(device)
        self.positions = grid_positions(side, side, recipe.per_side).to(device)
        plain = ("vit_model.vision_model.embeddings", "thing", "picture")
        self.players = {"vit": Player.of(self.eye, recipe.optim, plain, ramp=recipe.init is None)}
        self.measured = self._scenes(random.Random(HELD_OUT_SEED), recipe.held_out)

    def _scenes(self, rng: random.Random, count: int) -> list[Scene]:
        return list(sample_scenes(rng, count, crowded=self.recipe.crowded, variety=self.recipe.variety))

    def _pixels(self, scenes: list[Scene]) -> Tensor:
        """[B, 3, R, R] in [0, 1]."""
        pictures = np.stack([render(scene, self.recipe.resolution) for scene in scenes])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255

    def _patches(self, pixels: Tensor) -> Tensor:
        """[B, 3, R, R] in [0, 1] -> [B, N, P] in [-1, 1], BAGEL's normalisation."""
        return patchify(pixels * 2 - 1, self.config.patch_size).to(self.device)

    def batch(self, step: int, rng: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Patches [B, N, P] of pictures, half of which are spoiled the way a decoder spoils them, and the targets of what they show."""
        scenes = self._scenes(rng.python, self.recipe.batch_size)
        pixels = self._pixels(scenes)
        spoiled = pixels.clone()
        if self.recipe.resolution == SIDE:  # `spoil` takes no other size
            spoiled[::2] = spoil(pixels[::2], rng.python, rng.torch)
        return self._patches(spoiled), {k: v.to(self.device) for k, v in scene_targets(scenes).items()}

    def loss(self, player: str, batch: tuple[Tensor, dict[str, Tensor]], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        patches, targets = batch
        losses = detector_loss(self.eye(patches, self.positions), targets)
        return torch.stack(list(losses.values())).sum(), losses

    def evaluate(self, step: int) -> dict[str, float]:
        """For each attribute, the share of things in held-out pictures for which it is read right at their cell; `right`: noun and colour
        both. For background, style and tone, the share of pictures."""
        targets = {k: v.to(self.device) for k, v in scene_targets(self.measured).items()}
        with self.players["vit"].averaged():
            maps = self.eye(self._patches(self._pixels(self.measured)), self.positions)
        there = targets["object"] > 0
        hit = {k: (maps[k].argmax(1) == targets[k])[there] for k in THING_VALUES}
        found = {k: v.float().mean().item() for k, v in hit.items()}
        found |= {k: (maps[k].argmax(1) == targets[k]).float().mean().item() for k in PICTURE_VALUES}
        return found | {"right": (hit["noun"] & hit["colour"]).float().mean().item()}

    def finish(self, out: Path) -> None:
        """export/: vit.safetensors (averaged weights) and vit_config.json, which stage base takes as `vit`."""
        make_folder(out)
        with atomic_path(out / "export") as folder, self.players["vit"].averaged():
            folder.mkdir()
            save_tensors(folder / "vit.safetensors", self.eye.vit_model.state_dict())
            (folder / "vit_config.json").write_text(self.config.model_dump_json(indent=2) + "\n")


def build(recipe: Recipe, device: torch.device) -> VitStage:
    """The stage's entry point, called by name."""
    with seeded(recipe.seed):
        return VitStage(recipe, device)
