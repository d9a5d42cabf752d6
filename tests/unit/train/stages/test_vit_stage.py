"""The stage of the vision encoder: it learns what stands where, and a base takes what it exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_base import CONFIG, DATA, write_base

from hyperbagel.core.config import check_config, load_config
from hyperbagel.core.errors import InputError
from hyperbagel.data.transforms import patchify
from hyperbagel.train.folder import load_vit
from hyperbagel.train.launch import run_training
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import base as base_module
from hyperbagel.train.stages.vit import Recipe, build

SMALL = [
    "device=cpu", "batch_size=8", "held_out=16", "evaluate_every=1000", "optim.warmup_steps=5", "optim.ema_decay=0.9",
    "vit={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 2, image_size: 128, patch_size: 8}",
]  # fmt: skip
TINY = [*SMALL[:-1], f"vit={CONFIG.vit.model_dump_json()}", "resolution=32", "per_side=4", "log_every=10"]  # of the base in tiny_base


def make_base(init: Path, vit: Path) -> base_module.BaseStage:
    values = {"init": str(init), "vit": str(vit), "data": DATA, "device": "cpu", "precision": "fp32"}
    return base_module.build(check_config(base_module.Recipe, values, "test"), torch.device("cpu"))


def test_maps_have_the_detectors_cells_in_place() -> None:
    stage = build(load_config(Recipe, None, SMALL), torch.device("cpu"))
    patches, targets = stage.batch(0, Draws.at(0, 0, 0))
    assert patches.shape == (8, 64, 8 * 8 * 3) and patches.min() >= -1 and patches.max() <= 1
    with torch.no_grad():
        maps = stage.eye(patches, stage.positions)
    assert {k: maps[k].shape for k in ("object", "place", "noun", "tone")} == {
        "object": (8, 16, 16), "place": (8, 3, 16, 16), "noun": (8, 20, 16, 16), "tone": (8, maps["tone"].shape[1]),
    }  # fmt: skip
    assert set(maps) <= set(targets) | {"object_weight", "near"}
    # a patch writes the cells it covers and no others: its bias alone moves the map there
    with torch.no_grad():
        stage.eye.thing.weight.zero_()
        stage.eye.thing.bias.zero_()
        stage.eye.thing.bias[1] = 7.0  # the first value's second cell: row 0, column 1 of each 2 x 2
        heat = stage.eye(patches, stage.positions)["object"][0]
    assert (heat[0::2, 1::2] == 7).all() and heat.sum() == 7 * 64
    assert torch.equal(patchify(torch.arange(3 * 256.0).view(3, 16, 16), 8)[1, :3], torch.tensor([8.0, 264.0, 520.0]))


def test_short_training_learns_and_a_base_takes_the_encoder(tmp_path: Path) -> None:
    run_training("vit", None, [*TINY, "max_steps=200"], tmp_path / "run")
    folder = tmp_path / "run" / "export"
    state = load_vit(folder, torch.device("cpu")).state_dict()
    again = build(load_config(Recipe, None, [*TINY, f"init={folder}"]), torch.device("cpu"))
    assert all(torch.equal(state[k], v) for k, v in again.eye.vit_model.state_dict().items())
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["vit/loss"] for row in log if "vit/loss" in row]
    assert len(losses) >= 3 and sum(losses[-3:]) < 0.6 * sum(losses[:3])

    base = make_base(write_base(tmp_path / "base"), folder)
    assert all(torch.equal(state[k], v) for k, v in base.model.vit_model.state_dict().items())
    base.close()


def test_a_base_refuses_an_encoder_of_another_shape(tmp_path: Path) -> None:
    run_training("vit", None, [*SMALL, "max_steps=1"], tmp_path / "run")
    folder = tmp_path / "run" / "export"
    base = write_base(tmp_path / "base")
    with pytest.raises(InputError, match="hidden_size 32, expected 16"):
        make_base(base, folder)
    (folder / "vit_config.json").write_text("{")
    with pytest.raises(InputError, match="stage vit exported"):
        make_base(base, folder)


def test_a_grid_that_does_not_fit_the_targets_is_refused() -> None:
    with pytest.raises(InputError, match="patches a side"):
        load_config(Recipe, None, [*SMALL, "resolution=96"])
    with pytest.raises(InputError, match="unknown key 'hiden_size', did you mean 'hidden_size'"):
        load_config(Recipe, None, [*SMALL, "vit.hiden_size=64"])


def test_a_resume_without_a_recipe_takes_the_run_s_own_settings(tmp_path: Path) -> None:
    run_training("vit", None, [*TINY, "max_steps=1"], tmp_path / "run")
    assert run_training("vit", None, ["max_steps=2"], tmp_path / "run", resume=True).step == 2
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "resolution: 32\n" in settings and "max_steps: 2\n" in settings
