"""What must be the same on all ranks, and what must not; layers that run again for their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_base import make, only, write_base

from hyperbagel.train import distributed
from hyperbagel.train.distributed import World
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import adp, cfg, reward, tscd


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def student(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    make(cfg, base, data=only("t2i")).finish(folder)
    return folder / "export"


def test_gradients_travel_in_messages_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "MESSAGE", 10)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (4, 6, 1, 25, 3, 7, 1)]
    assert [[p.numel() for p in some] for some in distributed._messages(parameters)] == [[4, 6], [1], [25], [3, 7], [1]]
    assert not list(distributed._messages([]))


def test_only_ranks_that_evaluate_keep_the_teachers_pictures(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for rank, shard in ((0, False), (1, False), (1, True)):
        monkeypatch.setattr("hyperbagel.train.distill.join_world", lambda device, rank=rank: World(rank, 2))
        stage: Any = make(cfg, base, data=only("t2i"), held_out=only("t2i"), held_out_groups=1, teacher_steps=2, shard=shard)
        kept[rank, shard] = len(stage.measured)
    assert kept == {(0, False): 1, (1, False): 0, (1, True): 1}


def test_all_ranks_run_the_student_as_often(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are split over ranks, a forward of one rank alone waits for the others for ever."""
    asked: list[list[int]] = []
    for rank in range(2):
        stage: Any = make(cfg, base, data=only("t2i"), on_policy=0.5, on_policy_steps=6)
        steps: list[int] = []
        monkeypatch.setattr(stage, "reached", lambda c, s, x, t, n, steps=steps: (steps.append(n), x)[1])
        for step in range(12):
            before = len(steps)
            stage.batch(step, Draws.at(0, step, rank))
            if len(steps) == before:
                steps.append(0)
        asked.append(steps)
    assert asked[0] == asked[1]
    assert 0 in asked[0] and len(set(asked[0])) > 2  # both kinds of batches, ways of several lengths


def test_ranks_judge_other_pairs(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in range(2):
        monkeypatch.setattr("hyperbagel.train.stages.reward.join_world", lambda device, rank=rank: World(rank, 2))
        seen.append(make(reward, base, data=only("t2i")).batch(0, Draws.at(0, 0, 0)).better)
    assert not torch.allclose(*seen)


class Kept:
    """Bytes that a forward keeps for the backward pass; a tensor that is kept twice counts once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.size = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in self.seen:
            self.seen.add(x.data_ptr())
            self.size += x.nbytes
        return x


@pytest.mark.parametrize("module", [cfg, tscd, adp])
def test_layers_that_run_again_give_the_same_gradients_and_keep_less(module: Any, base: Path, student: Path) -> None:
    found: list[tuple[dict[str, torch.Tensor], int]] = []
    for recompute in (False, True):
        given = {} if module is cfg else {"init": student}
        stage: Any = make(module, base, data=only("t2i"), recompute=recompute, **given)
        gradients: dict[str, torch.Tensor] = {}
        keep = Kept()
        for step in range(2):  # both players, where there are two
            player = stage.turn(step)
            batch = stage.batch(step, Draws.at(0, step))
            for name, p in stage.players.items():
                for parameter in p.parameters.values():
                    parameter.requires_grad_(name == player)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss, _ = stage.loss(player, batch, step)
            loss.backward()
            for key, parameter in stage.players[player].parameters.items():
                if parameter.grad is not None:
                    gradients[f"{step} {player} {key}"] = parameter.grad.clone()
                    parameter.grad = None
        found.append((gradients, keep.size))
    (plain, all_kept), (again, few_kept) = found
    assert plain.keys() == again.keys() and plain
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-5, atol=1e-8)
    assert few_kept < 0.8 * all_kept


def test_a_student_that_is_trained_on_has_no_ramp_in_its_average(base: Path, student: Path) -> None:
    """TSCD's targets come from that average (v_ema): with a ramp they would follow the student within a few steps."""
    optim = {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.9}
    fresh, goes_on = (make(cfg, base, data=only("t2i"), optim=optim, **more).players["student"].ema for more in ({}, {"init": student}))
    assert fresh.ramp and not goes_on.ramp
