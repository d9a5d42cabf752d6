"""Two processes that train together take the steps that one process takes with both their batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_stage import TinyStage, run

from hyperbagel.core.errors import InputError
from hyperbagel.core.run import read_metrics
from hyperbagel.train.distributed import World, join_world

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from tiny_stage import TinyStage, run
from hyperbagel.train.distributed import join_world, leave_world
world = join_world(torch.device("cpu"))
stage = TinyStage()
stage.even.eval()  # no dropout: each process has its own generator
run(sys.argv[1], 9, stage=stage, world=world)
leave_world()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(together), str(Path(__file__).parent)], env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    stage = TinyStage()
    stage.even.eval()
    run(alone, 9, stage=stage, accumulate=2)
    for name in ("even.weights", "even.ema", "even.optimizer", "odd.weights", "odd.ema", "odd.optimizer"):
        a, b = (load_file(folder / "checkpoints" / "step-00000009" / f"{name}.safetensors") for folder in (together, alone))
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-5, atol=1e-7)
    assert len(read_metrics(together / "metrics.jsonl")) == len(read_metrics(alone / "metrics.jsonl"))  # one process logs


def test_alone_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world(torch.device("cpu"))
    assert world == World() and world.leads and world.agree(1.5) == [1.5]


def test_half_a_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun"):
        join_world(torch.device("cpu"))
