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
from hyperbagel.train.muon import orthogonalise

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from tiny_stage import TinyStage, run
from hyperbagel.train.distributed import join_world, leave_world
world = join_world(torch.device("cpu"))
stage = TinyStage()
stage.even.eval()  # no dropout: each process has its own generator
run(sys.argv[1], 9, stage=stage, world=world)
leave_world()
tasks = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]  # none on other systems
assert not any("gloo" in task for task in tasks), tasks  # threads left over can abort the process as it ends
"""


MUON = """
import sys
import torch
from safetensors.torch import save_file
from hyperbagel.train.distributed import join_world, leave_world
from hyperbagel.train.muon import orthogonalise_shared
world = join_world(torch.device("cpu"))
stack = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))  # three matrices for two processes
save_file({"x": orthogonalise_shared(stack), "one": orthogonalise_shared(stack[:1])}, f"{sys.argv[1]}/rank-{world.rank}.safetensors")
leave_world()
"""


POISON = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
from tiny_stage import TinyStage, run
from hyperbagel.train import loop
from hyperbagel.train.distributed import join_world
usual = loop.save_checkpoint
def slowly(*args, **more):
    time.sleep(2)
    return usual(*args, **more)
loop.save_checkpoint = slowly
try:
    run(sys.argv[1], 9, stage=TinyStage(poison=2), world=join_world(torch.device("cpu")))
except loop.Diverged:
    from pathlib import Path
    assert list(Path(sys.argv[1]).glob("checkpoints/step-00000002/state.json")), "the first to end takes the others with it"
    sys.exit(0)
sys.exit(1)
"""


CHOICE = """
import os
import torch
from hyperbagel.core import hardware
from hyperbagel.train.distributed import join_world, leave_world
torch.cpu._is_avx512_bf16_supported = lambda: True
hardware._cpu_multiplies_bf16_faster = lambda: os.environ["RANK"] == "0"  # two measurements that disagree
join_world(torch.device("cpu"))
assert hardware.fast_bf16(torch.device("cpu"))
leave_world()
"""


def run_two(script: str, folder: Path, port: int) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + os.getpid() % 20000)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), str(Path(__file__).parent)], env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]


def test_no_process_ends_before_the_good_state_is_written(tmp_path: Path) -> None:
    run_two(POISON, tmp_path / "run", 44000)


def test_rank_0_chooses_the_precision_for_all(tmp_path: Path) -> None:
    run_two(CHOICE, tmp_path, 42000)


def test_matrices_are_shared_out_and_every_process_gets_all(tmp_path: Path) -> None:
    run_two(MUON, tmp_path, 40000)
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    want = orthogonalise(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(first["x"], second["x"]) and torch.equal(first["one"], second["one"])
    torch.testing.assert_close(first["x"], want)
    torch.testing.assert_close(first["one"], want[:1])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    run_two(WORKER, together, 20000)
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
