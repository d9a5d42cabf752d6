"""SIGINT and SIGTERM end a training after the step at hand, with a checkpoint from which it goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_stage import TinyStage, run

from hyperbagel.core.errors import InputError
from hyperbagel.core.run import read_metrics
from hyperbagel.train.checkpoint import list_checkpoints

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A test run that a shell put into the background has an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Told(TinyStage):
    """Gets signals in the middle of step 3 (the fourth)."""

    def __init__(self, *signals: signal.Signals) -> None:
        super().__init__()
        self.signals = signals

    def loss(self, player: str, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for number in self.signals if step == 3 else ():
            signal.raise_signal(number)
        return super().loss(player, batch, step)


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize(("number", "error", "code"), [("SIGINT", KeyboardInterrupt, None), ("SIGTERM", SystemExit, 143)])
def test_a_told_run_saves_its_step_and_goes_on_from_there(
    tmp_path: Path, number: str, error: type[BaseException], code: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as ended:
        run(tmp_path / "run", 9, stage=Told(signal.Signals[number]), evaluate_every=4)
    assert code is None or ended.value.code == code  # type: ignore[attr-defined]
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before
    [told] = capsys.readouterr().err.splitlines()[1:]
    assert "stopped after step 4" in told and str(tmp_path / "run") in told and "--resume" in told
    assert steps(tmp_path / "run") == [4]
    resumed, _ = run(tmp_path / "run", 9, resume=True)
    whole, _ = run(tmp_path / "whole", 9)
    assert all(torch.equal(value, resumed.tensors()[name]) for name, value in whole.tensors().items())
    lines = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out/score" not in line]
    assert lines == list(range(1, 10))


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 9, stage=Told(signal.SIGTERM, signal.SIGINT))
    assert steps(tmp_path / "run") == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_told_in_the_last_evaluation_it_is_saved_too(tmp_path: Path) -> None:
    class Late(TinyStage):
        finished = False

        def evaluate(self, step: int) -> dict[str, float]:
            signal.raise_signal(signal.SIGINT)
            return super().evaluate(step)

        def finish(self, out: Path) -> None:
            self.finished = True

    stage = Late()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 3, stage=stage)
    assert steps(tmp_path / "run") == [3] and not stage.finished


def test_an_ignored_signal_stays_ignored_and_other_threads_set_nothing(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(tmp_path / "ignored", 5, stage=Told(signal.SIGINT))
    assert steps(tmp_path / "ignored") == [5]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = []

    class Looks(TinyStage):
        def evaluate(self, step: int) -> dict[str, float]:
            handlers.append(signal.getsignal(signal.SIGINT))
            return {}

    thread = threading.Thread(target=lambda: run(tmp_path / "thread", 5, stage=Looks()))
    thread.start()
    thread.join()
    assert steps(tmp_path / "thread") == [5] and handlers == [signal.default_int_handler]


TWO = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
from tiny_stage import TinyStage, run
from hyperbagel.train.distributed import join_world, leave_world
class Slow(TinyStage):
    def batch(self, step, rng):
        time.sleep(0.05)
        return super().batch(step, rng)
try:
    run(sys.argv[1], 10**6, stage=Slow(), world=join_world(torch.device("cpu")))
finally:
    leave_world()
"""


def wait_for(found: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not found():  # type: ignore[operator]
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_all_ranks_stop_if_one_is_told(tmp_path: Path) -> None:
    """Twice told within a second, as torchrun and a cluster do it, is told once."""
    folder = tmp_path / "run"
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(41000 + os.getpid() % 20000)}
    command = [sys.executable, "-c", TWO, str(folder), str(HERE)]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, text=True) for rank in range(2)]
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) > 3, ranks[0])
    for _ in range(2):
        ranks[1].send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert [process.wait(timeout=60) for process in ranks] == [143, 143]
    [step] = steps(folder)
    assert step == read_metrics(folder / "metrics.jsonl")[-1]["step"]


VAE = (
    "resolution=64 batch_size=4 held_out=4 architecture.ch=8 architecture.ch_mult=[1,1,1,1] architecture.num_res_blocks=1 "
    "architecture.z_channels=4 architecture.norm_groups=4 device=cpu precision=fp32 log_every=1 workers=2"
)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A terminal's Ctrl-C, `timeout` or a cluster: worker processes get it as well."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "hyperbagel.cli", "train", "vae", "--out", str(folder), *VAE.split(), "max_steps=1000000"]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) > 3, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    [step] = steps(folder)
    assert process.returncode == code and f"stopped after step {step}" in err
    assert "Traceback" not in err and (err.splitlines()[-1] == "interrupted") == (code == 130)
    assert step >= read_metrics(folder / "metrics.jsonl")[-1]["step"] > 3


@pytest.mark.slow
def test_one_training_at_a_time_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = subprocess.Popen([sys.executable, str(HERE / "tiny_stage.py"), str(folder)], stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for(lambda: steps(folder), child)
        about = (folder / "provenance.json").read_text()
        with pytest.raises(InputError, match=r"run: got a run that another process is writing, expected .* another folder"):
            run(folder, 10**6, resume=True)
        assert child.poll() is None and (folder / "provenance.json").read_text() == about
    finally:
        child.kill()
        child.wait()
    last = steps(folder)[-1]
    assert run(folder, last + 2, resume=True)[1].step == last + 2
