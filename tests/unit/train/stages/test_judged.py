"""Distribution matching with heads on the fake model's features that tell the student's pictures from true ones (DMD2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_base import only, run, settings, stage_of

from hyperbagel.core.errors import InputError
from hyperbagel.flow.path import interpolate, x0_from_velocity
from hyperbagel.model.weights import load_tensors
from hyperbagel.train.contexts import student_velocity
from hyperbagel.train.losses.dmd import dmd_gradient
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import dmdo

JUDGED: dict[str, Any] = {"nfe": 1, "coupling": "independent", "judged": ["t2i"]}


def test_each_turn_moves_its_own_player_alone(base: Path, student: Path, head: Path) -> None:
    """The heads belong to the fake model: both learn in its turn, neither in the student's."""
    stage: Any = stage_of("dmdo", base, student, head, data=only("t2i"), **JUDGED)
    for step, turn in enumerate(("fake", "student")):
        for other, player in stage.players.items():
            for p in player.parameters.values():
                p.requires_grad_(other == turn)
        loss, metrics = stage.loss(turn, stage.batch(step, Draws.at(0, step)), step)
        loss.backward()
        assert turn == stage.turn(step) and ("t2i_hinge" in metrics) == (turn == "fake")
        moved = {name for player in stage.players.values() for name, p in player.parameters.items() if p.grad is not None and p.grad.any()}
        assert any(name.startswith("heads.") for name in moved) == any(name.startswith("backbone.") for name in moved) == (turn == "fake")
        assert any(name.startswith("adapter.") for name in moved) == (turn == "student")
        stage.student.zero_grad(), stage.judge.zero_grad()
    assert all(p.grad is None for p in stage.base.parameters())


@pytest.mark.parametrize("cap", [0.5, 1e9])
def test_the_students_gradient_is_matchings_and_the_judges(cap: float, base: Path, student: Path, head: Path) -> None:
    """Written out from the parts; of no row is the judges' longer than `cap` times the other."""
    stage: Any = stage_of("dmdo", base, student, head, data=only("t2i"), judge_cap=cap, **JUDGED)
    with torch.no_grad():  # the fake model must leave the real one before there is anything to match
        for p in stage.players["fake"].parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batch = stage.batch(0, Draws.at(0))
    t, tau, own = batch.trajectory, batch.tau[:, None, None], list(stage.players["student"].parameters.values())

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(own, found, strict=True)])

    loss, metrics = stage.loss("student", batch, 0)
    x0 = t.states[0] - student_velocity(stage.network, t.conditions, t.scales, t.states[0], torch.ones(len(batch.tau)))
    x_tau = interpolate(x0, batch.noise, tau)
    lack = -torch.stack([one.mean() for one in stage.judge(t.conditions, t.scales, x_tau, batch.tau)]).mean()
    pulls = torch.autograd.grad(lack, x0, retain_graph=True)[0]
    with torch.no_grad():
        v_fake = student_velocity(stage.fake, t.conditions, t.scales, x_tau, batch.tau)
        fake, real = (x0_from_velocity(x_tau, v, tau) for v in (v_fake, stage.real(t, x_tau, batch.tau)))
        matching = dmd_gradient(x0, fake, real, stage.recipe.normaliser_floor) / x0.numel()
    weights = (cap * matching.flatten(1).norm(dim=1) / pulls.flatten(1).norm(dim=1)).clamp(max=1.0)
    assert metrics["t2i_adversarial_weight"] == pytest.approx(weights.mean().item(), rel=1e-3)
    assert metrics["t2i_adversarial"] == pytest.approx(lack.item(), rel=1e-4)
    pulled = gradient((x0 * weights[:, None, None] * pulls).sum())
    assert pulled.norm() > 1e-3 * gradient((x0 * matching).sum()).norm() > 0 and (weights < 1).any() == (cap < 1)
    torch.testing.assert_close(gradient(loss), gradient((x0 * matching).sum()) + pulled, rtol=1e-3, atol=1e-5 * float(pulled.norm()))


def test_heads_learn_to_tell_true_pictures(base: Path, student: Path, head: Path) -> None:
    """On one batch: an undecided hinge is 2."""
    stage: Any = stage_of("dmdo", base, student, head, data=only("t2i"), judge_weight=1.0, **JUDGED)
    batch, optimizer, seen = stage.batch(0, Draws.at(0)), torch.optim.AdamW(stage.judge.parameters(), lr=3e-3), []
    batch.tau = torch.full_like(batch.tau, 0.1)
    for _ in range(40):
        loss, metrics = stage.loss("fake", batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((metrics["t2i_hinge"].item(), metrics["t2i_accuracy"].item()))
    assert 1.5 < seen[0][0] < 2.5 and seen[-1][0] < 1.0 and seen[-1][1] > 0.9, seen


def test_what_is_not_judged_is_as_before(base: Path, student: Path, head: Path) -> None:
    """Edits where captions are judged: no head reads them, and the loss is that of a stage without heads."""
    edit, t2i = only("edit"), only("t2i")
    data = edit | {"sources": edit["sources"] | t2i["sources"]}
    stage: Any = stage_of("dmdo", base, student, head, data=data, **JUDGED)
    batch = stage.batch(0, Draws.at(0))
    found = [stage.loss(turn, batch, 0) for turn in ("fake", "student")]
    stage.judge = None
    for turn, (loss, metrics) in zip(("fake", "student"), found, strict=True):
        assert set(metrics) <= {"edit_fake", "edit_dmd", "edit_gap", "edit_size"} and torch.equal(loss, stage.loss(turn, batch, 0)[0])


def test_resume_is_bit_for_bit(base: Path, student: Path, tmp_path: Path) -> None:
    constant = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0, "ema_decay": 0.9}
    keys: dict[str, Any] = {"init": student, "teacher": student, "log_every": 1, "optim": constant, **JUDGED}
    run(dmdo, base, tmp_path / "a", max_steps=4, **keys)
    run(dmdo, base, tmp_path / "b", max_steps=1, **keys)
    run(dmdo, base, tmp_path / "b", max_steps=4, resume=True, **keys)
    a, b = (load_tensors(tmp_path / which / "export" / "moe_gen.safetensors") for which in "ab")
    before = load_tensors(student / "moe_gen.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a) and any(not torch.equal(a[name], before[name]) for name in a)


def test_recipes_that_cannot_be_judged(base: Path) -> None:
    for keys, words in (
        ({"judged": ["t2i"]}, "judged: got coupling=tdm, expected independent"),
        ({"judged": ["edits"], "coupling": "independent"}, "judged: got 'edits'"),
        ({"judged": ["edit"], "held": ["edit"], "coupling": "independent"}, "judged names 'edit', which is held"),
        ({"judge_cap": 0.2}, "judge_cap is of judges, and judged names no source"),
    ):
        with pytest.raises(InputError, match=words):
            settings(dmdo, base, **keys)
