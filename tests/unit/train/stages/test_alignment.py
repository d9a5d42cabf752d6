"""Representation alignment in stage base: the loss, where features stand, who gets a gradient, what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_base import CONFIG, DATA, HELD_OUT, only, write_base

from hyperbagel.core.config import check_config
from hyperbagel.core.errors import InputError
from hyperbagel.data.transforms import patchify
from hyperbagel.model.weights import TensorFolder
from hyperbagel.train.launch import run_training
from hyperbagel.train.losses.alignment import alignment_loss
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import base as base_module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an encoder that was hardly trained."""
    root = tmp_path_factory.mktemp("alignment")
    settings = [f"vit={CONFIG.vit.model_dump_json()}", "resolution=32", "per_side=4", "batch_size=2", "held_out=2", "max_steps=1"]
    run_training("vit", None, ["device=cpu", *settings], root / "vit")
    return write_base(root / "base"), root / "vit" / "export"


def make(base: Path, vit: Path, layer: int = 1) -> base_module.BaseStage:
    values: dict[str, Any] = {"init": str(base), "data": DATA, "held_out": HELD_OUT, "device": "cpu", "precision": "fp32"}
    values["align"] = {"vit": str(vit), "layer": layer}
    return base_module.build(check_config(base_module.Recipe, values, "test"), torch.device("cpu"))


def test_loss_is_one_minus_the_cosine_of_each_patch() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(5, 12, generator=g)
    scale = torch.tensor([2.0, 0.5, 7.0]).repeat_interleave(4)
    assert alignment_loss(features * scale, features, 4).item() == pytest.approx(0.0, abs=1e-6)  # each patch's length is free
    assert alignment_loss(features * scale, features, 12) > 0.01
    assert alignment_loss(-features, features, 4).item() == pytest.approx(2.0, abs=1e-6)
    other = torch.randn(5, 12, generator=g, dtype=torch.float64)
    slow = [1 - a @ b / (a.norm() * b.norm()) for x, y in zip(other, features.double()) for a, b in zip(x.split(4), y.split(4))]
    assert alignment_loss(other, features, 4).item() == pytest.approx(torch.stack(slow).mean().item(), abs=1e-6)


def test_features_stand_where_their_tokens_do(folders: tuple[Path, Path]) -> None:
    stage = make(*folders)
    aligner = stage.aligner
    assert aligner is not None
    seen = aligner.see(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert seen.shape == (2, 16, 8, 8)  # the autoencoder's grid; the encoder's own is 4 x 4
    packed = stage.batches.next(Draws.at(3, 0)).packed
    assert packed.features is not None and packed.features.shape == (len(packed.latents), 4 * 16)
    assert torch.equal(patchify(seen, 2)[0, 0], seen[0, :, :2, :2].permute(1, 2, 0).flatten())  # a token's cells: (p, q, V)
    stage.close()


def test_gradients_reach_model_and_projector_but_not_the_encoder(folders: tuple[Path, Path]) -> None:
    stage = make(*folders)
    aligner = stage.aligner
    assert aligner is not None
    loss, parts = stage.loss("model", stage.batch(0, Draws.at(0, 0)), 0)
    assert 0 < next(v for k, v in parts.items() if k.endswith("align")) < 2
    loss.backward()
    trained = stage.players["model"].parameters
    assert all(p.grad is not None and trained[f"projector.{name}"] is p for name, p in aligner.projector.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in aligner.vit.parameters())
    stage.close()


def test_a_run_learns_to_align_resumes_and_exports_the_model_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, vit = folders
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"init": str(base), "data": DATA, "align": {"vit": str(vit), "layer": 1}}))
    common = ["device=cpu", "precision=fp32", "log_every=1", "optim.warmup_steps=1", "optim.ema_decay=0.5", "optim.schedule=constant"]
    run_training("base", recipe, [*common, "max_steps=4"], tmp_path / "run")
    run_training("base", recipe, [*common, "max_steps=30"], tmp_path / "run", resume=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    align = [v for row in rows for k, v in row.items() if k.endswith("align")]
    assert len(align) == 30 and sum(align[-5:]) < 0.9 * sum(align[:5])
    assert set(TensorFolder(tmp_path / "run" / "export", "ema").shapes) == set(TensorFolder(base, "ema").shapes)


def test_a_layer_that_is_not_there_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"align\.layer: got 3, expected 1 to 2"):
        make(*folders, layer=3)


def test_the_weight_of_alignment(tmp_path: Path) -> None:
    sets = [f"vit={CONFIG.vit.model_dump_json()}", "resolution=32", "per_side=4", "batch_size=2", "held_out=2", "max_steps=1"]
    run_training("vit", None, ["device=cpu", *sets], tmp_path / "vit")
    values: dict[str, Any] = {"init": str(write_base(tmp_path / "base")), "data": only("t2i"), "device": "cpu", "precision": "fp32"}
    values["align"] = {"vit": str(tmp_path / "vit" / "export"), "layer": 1, "weight": 7.0}
    s = base_module.build(check_config(base_module.Recipe, values, "test"), torch.device("cpu"))
    loss, metrics = s.loss("model", s.batch(0, Draws.at(0)), 0)
    assert loss.item() == pytest.approx((metrics["t2i_mse"] + 7 * metrics["t2i_align"]).item())
