"""Stages over a model stored as codes (`quantize`): gradients, students, drafters and planners as over the unpacked matrices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_planner_stage import DATA as PLANS
from test_sharded_stages import OPTIM, losses, recipe_of, together
from tiny_base import make, run, settings, stage_of

from hyperbagel.core.config import check_config
from hyperbagel.core.errors import InputError
from hyperbagel.model.planner import load_planner
from hyperbagel.model.student import fingerprint, load_student
from hyperbagel.model.weights import load_folder
from hyperbagel.nn import quantized
from hyperbagel.nn.quantized import CODES, QuantizedLinear
from hyperbagel.train.launch import run_training
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import base as base_stage
from hyperbagel.train.stages import cfg, drafter, planner, reward

QUESTIONS = {"sources": {"asked": {"task": "question", "samples": 1, "resolution": 32}}}


def turns(stage: Any) -> list[torch.Tensor]:
    """Losses and gradients of a stage's first two turns."""
    found = []
    for step in range(2):
        player = stage.players[name := stage.turn(step)]
        with torch.random.fork_rng():
            loss, _ = stage.loss(name, stage.batch(step, Draws.at(0, step)), step)
        loss.backward()
        found += [loss.detach(), *(p.grad for p in player.parameters.values() if p.grad is not None)]
        player.optimizer.zero_grad()
    stage.close()
    return found


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", ["cfg", "tscd", "dmdo", "adp", "refl"])
def test_a_stage_equals_one_over_the_unpacked_matrices(
    name: str, codes: str, base: Path, student: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students and rewards are those of the base in numbers. recompute: layers run again, so matrices are unpacked three times."""
    mine = turns(stage_of(name, base, student, head, quantize=codes, recompute=True))
    plain = turns(stage_of(name, base, student, head))
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: F.linear(x, self.unpacked(), self.bias))  # the slow reference
    wanted = turns(stage_of(name, base, student, head, quantize=codes))
    assert len(mine) == len(wanted) > 10
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not torch.equal(mine[0], plain[0])  # the base is another one, if little


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_its_resume_and_its_student(kind: str, base: Path, tmp_path: Path) -> None:
    student: dict[str, Any] = {"kind": "lora", "rank": 8} if kind == "lora" else {"kind": "full"}
    keys: dict[str, Any] = {"quantize": "nf4", **student, "log_every": 1, "sample_every": 100, "teacher_steps": 2}
    run(cfg, base, tmp_path / "whole", max_steps=4, **keys)
    run(cfg, base, tmp_path / "parts", max_steps=2, **keys)
    run(cfg, base, tmp_path / "parts", max_steps=4, resume=True, **keys)
    models = [load_folder(base, codes=codes)[0] for codes in (None, *CODES)]
    whole, *others = (load_student(tmp_path / "whole" / "export", model) for model in models)  # serves each of them
    others.append(load_student(tmp_path / "parts" / "export", models[0]))
    for other in others:
        for (name, a), b in zip(whole.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    fresh = make(cfg, base, **student).student.state_dict()
    assert any(not torch.equal(a, fresh[name]) for name, a in whole.state_dict().items())


def test_whole_layers_begin_as_the_unpacked_ones_and_are_carried(base: Path, student: Path, tmp_path: Path) -> None:
    """`whole` and `init_base` read matrices, which codes are not."""
    stage = make(cfg, base, quantize="int8", kind="full")
    name = "language_model.model.layers.1.mlp_moe_gen.up_proj"
    layer = stage.base.get_submodule(name)
    assert isinstance(layer, QuantizedLinear) and torch.equal(stage.student.adapter.get_submodule(name).weight, layer.unpacked())
    run(cfg, base, tmp_path / "run", kind="full", max_steps=2)
    carried = make(cfg, base, quantize="int8", init=tmp_path / "run" / "export", init_base=base).student.adapter.get_submodule(name)
    plain = load_folder(base)[0]
    change = load_student(tmp_path / "run" / "export", plain).adapter.get_submodule(name).weight - plain.get_submodule(name).weight
    assert change.abs().max() > 1e-6
    torch.testing.assert_close(carried.weight - layer.unpacked(), change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", ["hyper-bagel", "block", "eagle3"])
def test_a_drafter_of_a_target_in_codes(kind: str, codes: str, base: Path, tmp_path: Path) -> None:
    """Its layers begin as the target's, unpacked; at the end its gate holds the engine, over codes too, to the simulation."""
    keys: dict[str, Any] = {"target": str(base), "kind": kind, "data": QUESTIONS, "pool": 4, "contexts": 2, "max_tokens": 12}
    keys |= {"held_out": {"asked": QUESTIONS}, "held_out_prompts": 4, "depth": 2, "steps": 2, "tree_nodes": 0, "quantize": codes}
    stage = drafter.build(check_config(drafter.Recipe, keys, "test"), torch.device("cpu"))
    last = stage.target.language_model.model.layers[-1].mlp.up_proj
    assert isinstance(last, QuantizedLinear)
    if kind != "eagle3":
        assert torch.equal(stage.module.layers[-1].mlp.up_proj.weight, last.unpacked())
    with torch.no_grad():
        batch = stage.batch(0, Draws.at(0))
    loss, _ = stage.loss("drafter", batch, 0)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.module.parameters())
    with torch.no_grad():
        stage.finish(tmp_path)  # raises GateFailed if they differ
    assert (tmp_path / "gate.json").exists()


def test_a_planner_and_a_reward_over_codes(base: Path, tmp_path: Path) -> None:
    run(planner, base, tmp_path / "planner", data=PLANS, quantize="nf4", max_steps=2)
    run(reward, base, tmp_path / "reward", quantize="nf4", max_steps=2)
    model = load_folder(base)[0]
    made = load_planner(tmp_path / "planner" / "export", model)
    assert any(value.abs().max() > 0 for name, value in made.state_dict().items() if "lora_B" in name)
    assert fingerprint(model) in (tmp_path / "reward" / "export" / "reward.json").read_text()


def test_two_processes_over_codes_equal_one(base: Path, tmp_path: Path) -> None:
    """With `shard`: the adapters are split, the codes stay whole."""
    recipe = recipe_of(tmp_path / "cfg.yaml", base, kind="lora", rank=32, max_steps=2, quantize="nf4", optim=OPTIM, shard_above=300)
    run_training("cfg", recipe, ["accumulate=2"], tmp_path / "alone")
    together([("cfg", str(recipe), ["shard=true"], str(tmp_path / "cfg"), False)])
    a, b = losses(tmp_path / "cfg"), losses(tmp_path / "alone")
    assert [x[:2] for x in a] == [x[:2] for x in b] and len(a) > 3
    for (step, key, ours), (_, _, theirs) in zip(a, b, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5), (step, key)


def test_bad_input(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"quantize.*nf4"):
        settings(cfg, base, quantize="int4")
    with pytest.raises(InputError, match="unknown key 'quantize'"):  # it trains all weights
        settings(base_stage, base, quantize="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._library.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'hyperbagel\[quantized\]'"):
        make(cfg, base, quantize="nf4")
    with pytest.raises(InputError, match="rank: got 40, expected at most 32, the hidden size"):
        make(planner, base, data=PLANS, rank=40)
    with pytest.raises(InputError, match="rank: got 64, expected at most 48, the widest layer"):  # its export could not be read
        make(cfg, base, kind="lora", rank=64)
