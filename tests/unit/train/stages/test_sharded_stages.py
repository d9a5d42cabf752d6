"""Two processes that share a student's weights (FSDP2) take the steps that one process takes with both their batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_base import SOURCES, settings, write_base

from hyperbagel.core.errors import InputError
from hyperbagel.core.run import read_metrics
from hyperbagel.model.student import load_student
from hyperbagel.model.weights import load_folder
from hyperbagel.train.checkpoint import averaged_tensors, list_checkpoints
from hyperbagel.train.distributed import World
from hyperbagel.train.launch import run_training
from hyperbagel.train.sharding import holds_shards, shard_stage
from hyperbagel.train.stages import cfg, reward

WORKER = """
import json, os, sys
from pathlib import Path
from hyperbagel.train.launch import run_training
for name, recipe, overrides, out, resume in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the last run's may still be closing
    run_training(name, Path(recipe), overrides, Path(out), resume)
"""
OPTIM = {"lr": 3e-3, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.9, "clip": 0.05}
ONE = {"sources": {"edit": SOURCES["edit"] | {"samples": 1}}, "mixture": [{"weights": {"edit": 1}}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


def recipe_of(path: Path, base: Path, **keys: Any) -> Path:
    """A recipe whose batches are one sample a rank: rank r's step k is then sample 2 k + r, the r-th micro-batch of one process."""
    held_out = {"sources": {"edit": SOURCES["edit"]}, "mixture": [{"weights": {"edit": 1}}]}
    values = {"model": str(base), "data": ONE, "precision": "fp32", "device": "cpu", "log_every": 1, "optim": OPTIM, "teacher_steps": 2}
    values |= {"held_out": held_out, "held_out_groups": 1, "evaluate_every": 2, "sample_every": 2, "nfe": 2, "shard_above": 600}
    path.write_text(yaml.safe_dump(values | keys))
    return path


def together(runs: list[Any]) -> None:
    """Run trainings one after the other in two processes."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + (os.getpid() + 7) % 20000)}
    command = [sys.executable, "-c", WORKER, json.dumps(runs)]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        told = [process.communicate(timeout=200)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(told)


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [
        (line["step"], key, value) for line in read_metrics(run / "metrics.jsonl") for key, value in line.items()
        if key.endswith(("/loss", "/grad_norm", "held_out/match", "held_out/score"))
    ]  # fmt: skip


def test_two_processes_equal_one(base: Path, tmp_path: Path) -> None:
    guided = recipe_of(tmp_path / "cfg.yaml", base, kind="full", max_steps=4, on_policy=0.5)
    teacher = tmp_path / "alone-cfg" / "export"
    matched = recipe_of(tmp_path / "dmdo.yaml", base, init=str(teacher), teacher=str(teacher), max_steps=4, fake_optim=OPTIM | {"lr": 1e-2})
    alone = ["accumulate=2"]
    run_training("cfg", guided, alone, tmp_path / "alone-cfg")
    run_training("dmdo", matched, alone, tmp_path / "alone-dmdo")
    shard = ["shard=true", "recompute=true"]
    together([
        ("cfg", str(guided), [*shard, "max_steps=2"], str(tmp_path / "cfg"), False),
        ("cfg", str(guided), shard, str(tmp_path / "cfg"), True),  # resumed from shards
        ("dmdo", str(matched), shard, str(tmp_path / "dmdo"), False),
    ])  # fmt: skip
    for name in ("cfg", "dmdo"):
        a, b = losses(tmp_path / name), losses(tmp_path / f"alone-{name}")
        assert [x[:2] for x in a] == [x[:2] for x in b] and len(a) > 8
        for (step, key, ours), (_, _, theirs) in zip(a, b, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5), (name, step, key)
        newest, whole = (list_checkpoints(tmp_path / f / "checkpoints")[-1] for f in (name, f"alone-{name}"))
        assert holds_shards(newest) and not holds_shards(whole)
        files = [p for p in newest.rglob("*") if p.is_file()]
        assert {p.suffix for p in files} == {".safetensors", ".json"} and sum("shard-0000" in p.name for p in files) == 2
        parts = [load_file(p) for p in files if "shard-0000" in p.name]
        key = "student/ema/adapter.language_model.model.layers.0.mlp_moe_gen.gate_proj.weight"
        rows = [part[key].shape[0] for part in parts]
        assert rows[0] == rows[1] == sum(rows) // 2  # averages are split as well, not held twice
        split, expected = averaged_tensors(newest, "student"), averaged_tensors(whole, "student")
        assert split.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(split[key], value, rtol=1e-3, atol=2e-5)
    model, _ = load_folder(base)
    ours, theirs = (dict(load_student(tmp_path / f / "export", model).named_parameters()) for f in ("cfg", "alone-cfg"))
    for key, parameter in theirs.items():
        torch.testing.assert_close(ours[key], parameter, rtol=1e-3, atol=2e-5)
    assert len(list((tmp_path / "cfg" / "samples").glob("*.png"))) == len(list((tmp_path / "alone-cfg" / "samples").glob("*.png"))) > 0
    with pytest.raises(InputError, match="got split tensors, expected whole ones"):
        run_training("cfg", guided, ["max_steps=5"], tmp_path / "cfg", True)


def test_two_networks_over_one_base_share_a_backward(base: Path, tmp_path: Path) -> None:
    """A student and its discriminator, one row, layers run again for their gradients: FSDP2 meets each layer of the base twice."""
    run_training("cfg", recipe_of(tmp_path / "cfg.yaml", base, max_steps=1), [], tmp_path / "cfg")
    student = str(tmp_path / "cfg" / "export")
    slow = {"discriminator_optim": OPTIM, "max_steps": 2, "init": student, "teacher": student}
    runs = {"tscd": recipe_of(tmp_path / "tscd.yaml", base, **slow), "adp": recipe_of(tmp_path / "adp.yaml", base, **slow | {"nfe": 1})}
    for name, recipe in runs.items():
        run_training(name, recipe, ["accumulate=2"], tmp_path / f"alone-{name}")
    together([(name, str(recipe), ["shard=true", "recompute=true"], str(tmp_path / name), False) for name, recipe in runs.items()])
    for name in runs:
        a, b = losses(tmp_path / name), losses(tmp_path / f"alone-{name}")
        assert [x[:2] for x in a] == [x[:2] for x in b] and len(a) > 4
        for (step, key, ours), (_, _, theirs) in zip(a, b, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5), (name, step, key)


def test_what_cannot_be_split(base: Path) -> None:
    for module, keys, told in ((reward, {}, "stage of distillation"), (cfg, {"optim": {"kind": "muon"}}, "kind=muon")):
        stage = module.build(settings(module, base, **keys), torch.device("cpu"))
        with pytest.raises(InputError, match=told):
            shard_stage(stage, World(0, 2), 600)
        stage.close()
