"""The loop: rates, limits, what is measured at the end, and whose weights are whose."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stage import TinyStage, run

from hyperbagel.core.run import RunFolder, read_metrics
from hyperbagel.train.checkpoint import Progress, best_checkpoint, best_score, save_checkpoint
from hyperbagel.train.distributed import World
from hyperbagel.train.ema import Ema
from hyperbagel.train.loop import Diverged, train
from hyperbagel.train.optim import OptimConfig, make_optimizer
from hyperbagel.train.stage import TrainRecipe


def timed(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Ten seconds a step, by a clock of its own."""
    stage = TinyStage()
    for player in stage.players.values():
        player.optim = OptimConfig(lr=0.01, warmup_steps=0, final_ratio=0.1, schedule="cosine", schedule_by="time")
    recipe = TrainRecipe(device="cpu", precision="fp32", evaluate_every=1000, sample_every=1000, **settings)
    with RunFolder(folder, recipe, seed=0) as opened:
        train(stage, recipe, opened, clock=lambda: 10.0 * stage.seen)
    return [line for line in read_metrics(folder / "metrics.jsonl") if "steps_per_second" in line]


def test_a_rate_by_time_falls_with_the_clock(tmp_path: Path) -> None:
    lines = timed(tmp_path / "run", log_every=1, max_steps=10**6, max_seconds=40.0)
    rates = [line.get("even/lr", line.get("odd/lr")) for line in lines]
    assert rates == pytest.approx([0.01, 0.01 * (0.1 + 0.9 * 0.853553), 0.01 * 0.55, 0.01 * (0.1 + 0.9 * 0.146447)], rel=1e-4)


def test_steps_per_second_are_those_since_the_last_line(tmp_path: Path) -> None:
    lines = timed(tmp_path / "run", log_every=2, max_steps=6)
    assert [line["steps_per_second"] for line in lines] == pytest.approx([0.1] * 3)


def test_gradients_are_cut_to_the_recipe_s_norm(tmp_path: Path) -> None:
    stage = TinyStage()
    before = {f"{n}.{k}": v.detach().clone() for n, p in stage.players.items() for k, v in p.parameters.items()}
    for player in stage.players.values():
        player.optim.clip = 1e-12  # far below Adam's eps: nothing moves
    run(tmp_path / "run", 2, stage=stage)
    after = {f"{n}.{k}": v.detach() for n, p in stage.players.items() for k, v in p.parameters.items()}
    assert all((after[k] - before[k]).abs().max() < 1e-5 for k in before)


def test_a_gradient_that_is_no_number_stops_before_the_optimiser_moves(tmp_path: Path) -> None:
    class Cusp(TinyStage):
        def loss(self, player: str, batch: Any, step: int) -> Any:
            loss, metrics = super().loss(player, batch, step)
            return loss + (0 * self.odd.weight if step == 1 else torch.zeros(1)).abs().sqrt().sum(), metrics  # the slope of a root at 0

    stage = Cusp()
    with pytest.raises(Diverged, match="gradient norm of player 'odd'"):
        run(tmp_path / "run", 4, stage=stage)
    assert all(p.isfinite().all() for p in stage.odd.parameters())


def test_the_last_step_is_measured_too(tmp_path: Path) -> None:
    run(tmp_path / "run", 5)  # evaluate_every is 7
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    best = best_checkpoint(tmp_path / "run" / "checkpoints")
    assert [line["step"] for line in lines if "held_out/score" in line] == [5] and best is not None and best.name == "step-00000005"


def test_a_sheet_that_takes_too_much_memory_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Large(TinyStage):
        one_of_many = False

        def sample(self, step: int, out: Path) -> None:
            self.sharded = self.one_of_many
            with self.players["even"].averaged():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")

    whole, _ = run(tmp_path / "whole", 5)
    _, result = run(tmp_path / "run", 5, stage=(stage := Large()), sample_every=2)
    assert result.step == 5 and [record.getMessage() for record in caplog.records] == [
        f"step {step}: no sample sheet, it took too much memory (CUDA out of memory)" for step in (2, 4, 5)
    ]
    assert all(torch.equal(value, stage.tensors()[name]) for name, value in whole.tensors().items())
    stage.one_of_many = True  # other ranks wait for it: it must end them too
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "split", 5, stage=stage)


def test_adamw_has_the_recipe_s_numbers() -> None:
    config = OptimConfig(lr=0.3, betas=(0.0, 0.5), eps=1e-3, weight_decay=0.1)
    for group in make_optimizer(torch.nn.Linear(2, 2), config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.0, 0.5), 1e-3)


def test_the_trained_weights_come_back_after_an_error() -> None:
    p = {"a": torch.nn.Parameter(torch.zeros(2))}
    ema = Ema(p, 0.5)
    p["a"].data.fill_(3.0)
    with pytest.raises(ZeroDivisionError), ema.applied(p):
        raise ZeroDivisionError
    assert torch.equal(p["a"].data, torch.full((2,), 3.0))


def test_a_best_checkpoint_that_is_gone_is_none(tmp_path: Path) -> None:
    shutil.rmtree(save_checkpoint(tmp_path, TinyStage(), Progress(1, 0.0), keep=2, score=1.0))
    assert best_checkpoint(tmp_path) is None and best_score(tmp_path) == float("-inf")


def test_every_player_s_weights_are_shared_at_the_start(tmp_path: Path) -> None:
    shared: list[set[int]] = []

    class Noting(World):
        def share(self, tensors: Any) -> None:
            shared.append({id(t) for t in tensors})

    stage, _ = run(tmp_path / "run", 1, world=Noting())
    assert [{id(p) for p in player.parameters.values()} for player in stage.players.values()] == shared
