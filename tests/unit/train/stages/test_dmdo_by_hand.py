"""Stage dmdo written out: trajectories, segments, noise levels, what the fake model learns, what the student follows; coupling by coupling.

And the teacher's settings by kind, which the guided base as the real model reads (train.distill).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import average_of, col, gradients, grid_of, part_ways, same, says, shifted, walk, watched, write_student
from tiny_base import make, only, settings
from torch import Tensor

from hyperbagel.generate.types import PAPER_EDIT, PAPER_TEXT_TO_IMAGE
from hyperbagel.model.student import Sampler
from hyperbagel.train.contexts import velocity
from hyperbagel.train.losses.dmd import COUPLINGS
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import cfg, dmdo

TIMES = grid_of(3, 3.0)  # 1, 6/7, 3/5, 0
SOURCE = ("t2i", "edit")


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(base, tmp_path_factory.mktemp("first") / "student", 1, Sampler())


def stage_with(base: Path, folder: Path, source: str = "t2i", **keys: Any) -> Any:
    """Student, its average, real and fake model are four networks that say different things."""
    stage: Any = make(dmdo, base, **({"init": folder, "teacher": folder, "nfe": 3, "data": only(source)} | keys))
    part_ways(stage)
    return stage


def at(stage: Any, segment: int, tau: Tensor) -> Any:
    """A batch whose rows stand at these noise levels above the end of this segment."""
    batch = stage.batch(0, Draws.at(0, 0))
    batch.segment, batch.tau = segment, tau
    return batch


def mixed(coupling: str, x0: Tensor, x_T: Tensor, x_s: Tensor, s: float, tau: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_tau, the velocity to learn there and its weight, as docs/training/dmdo.md tells them."""
    t = col(tau)
    if coupling == "tdm":  # from the state at s, so that signal and noise are the path's own at tau
        left = (1 - t) / (1 - s)
        fresh = (t**2 - left**2 * s**2).sqrt()
        x = left * x_s + fresh * noise
        e = t / fresh * noise  # the path's noise, as far as x_tau tells of it
        return x, (e - x) / (1 - t), (fresh / t) ** 2 * (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    e = noise if coupling == "independent" else x_T
    return (1 - t) * x0 + t * e, e - x0, torch.ones_like(t)


@pytest.mark.parametrize("source", SOURCE)
def test_a_trajectory_written_out(source: str, base: Path, folder: Path) -> None:
    """All states of the trained student's own Euler steps from x_T; not its average's, which is only measured, nor the teacher's."""
    stage = stage_with(base, folder, source)
    with watched(stage) as seen:
        batch = stage.batch(0, Draws.at(0, 0))
    t = batch.trajectory
    assert t.states[0] is seen.noises[0] and batch.noise is seen.noises[1] and len(seen.noises) == 2
    torch.testing.assert_close(t.times, torch.tensor(TIMES))
    with torch.no_grad():
        for found, expected in zip(t.states[1:], walk(stage.network, t.conditions, t.scales, t.states[0], TIMES)[1:], strict=True):
            same(found, expected)
        for other in (average_of(stage), stage.teacher, stage.fake):
            assert (walk(other, t.conditions, t.scales, t.states[0], TIMES)[-1] - t.states[-1]).abs().mean() > 0.05


def test_every_segment_has_its_turn(base: Path, folder: Path) -> None:
    """Evenly: 300 draws of three segments. On both turns of a cycle, each with draws of its own."""
    stage = stage_with(base, folder)
    kept = stage.batch(0, Draws.at(0, 0)).trajectory
    stage.trajectory, stage.kept = lambda rng: kept, []
    batches = [stage.batch(step, Draws.at(0, step)) for step in range(600)]
    for turn in (0, 1):
        counted = Counter(batch.segment for batch in batches[turn::2])
        assert set(counted) == {0, 1, 2} and min(counted.values()) > 70
    assert any(fake.segment != own.segment for fake, own in zip(batches[::2], batches[1::2], strict=True))
    for batch in batches:  # tdm: between a segment's ends
        assert (batch.tau > TIMES[batch.segment + 1]).all() and (batch.tau < TIMES[batch.segment]).all()


@pytest.mark.parametrize(("coupling", "span"), [*((coupling, "segment") for coupling in COUPLINGS), ("tdm", "rest")])
def test_noise_levels_written_out(coupling: str, span: str, base: Path, folder: Path) -> None:
    """After the shift, as the path that the real model was trained on; tdm: above the segment's end, up to its start or up to 1."""
    stage = stage_with(base, folder, coupling=coupling, tdm_span=span)
    kept = stage.batch(0, Draws.at(0, 0)).trajectory
    stage.trajectory, stage.kept = lambda rng: kept, []
    for step in range(8):
        with watched(stage, {(3,): torch.tensor([0.0, 0.4, 1.0])}):
            batch = stage.batch(2 * step, Draws.at(0, step))
        u = torch.tensor([0.02, 0.02 + 0.96 * 0.4, 0.98])
        end, top = TIMES[batch.segment + 1], TIMES[batch.segment] if span == "segment" else 1.0
        torch.testing.assert_close(batch.tau, end + (top - end) * u if coupling == "tdm" else shifted(u, 3.0))


@pytest.mark.parametrize("source", SOURCE)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_fake_models_loss_written_out(coupling: str, source: str, base: Path, folder: Path) -> None:
    """It learns the ends: the trajectory's last state, or (tdm) the segment's."""
    stage = stage_with(base, folder, source, coupling=coupling)
    for segment in range(3):
        s = TIMES[segment + 1]
        batch = at(stage, segment, s + (TIMES[segment] - s) * torch.tensor([0.1, 0.5, 0.9]))
        t = batch.trajectory
        x, target, weight = mixed(coupling, t.states[3], t.states[0], t.states[segment + 1], s, batch.tau, batch.noise)
        expected = (weight * (says(stage.fake, t.conditions, t.scales, x, batch.tau) - target) ** 2).mean()
        loss, metrics = stage.loss("fake", batch, 0)
        same(loss, expected)
        same(metrics[f"{t.conditions.source}_fake"], expected)
        fake = stage.players["fake"].module
        same(gradients(loss, fake), gradients(expected, fake))
        assert not gradients(loss, stage.student).any()


@pytest.mark.parametrize("source", SOURCE)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_students_loss_written_out(coupling: str, source: str, base: Path, folder: Path) -> None:
    """From a segment's start: at x_tau of its own x0_hat (tdm: of its own x_s) it leaves the fake model's picture for the real one's."""
    stage = stage_with(base, folder, source, coupling=coupling)
    for segment in range(3):
        start, s = TIMES[segment], TIMES[segment + 1]
        batch = at(stage, segment, s + (start - s) * torch.tensor([0.1, 0.5, 0.9]))
        t, tau = batch.trajectory, col(batch.tau)
        v = says(stage.network, t.conditions, t.scales, t.states[segment], start)
        x0_hat, x_s = t.states[segment] - start * v, t.states[segment] + (s - start) * v
        with torch.no_grad():
            x = mixed(coupling, x0_hat, t.states[0], x_s, s, batch.tau, batch.noise)[0]
            fake, real = (x - tau * says(network, t.conditions, t.scales, x, batch.tau) for network in (stage.fake, stage.teacher))
            size = (x0_hat - real).abs().mean((1, 2), keepdim=True).clamp(min=0.1)
            g = (fake - real) / size
        loss, metrics = stage.loss("student", batch, 1)
        same(loss, (g**2).mean() / 2)
        same(metrics[f"{t.conditions.source}_gap"], ((fake - real) ** 2).mean().sqrt())
        same(gradients(loss, stage.student), gradients((g * x0_hat).mean(), stage.student))
        assert not gradients(loss, stage.players["fake"].module).any()


def test_a_step_brings_the_student_to_the_real_model(base: Path, folder: Path) -> None:
    """Which way the gradient points: down it, x0_hat leaves what the fake model says for what the real one says."""
    stage = stage_with(base, folder, coupling="independent", nfe=1)
    batch = at(stage, 0, torch.tensor([0.3, 0.5, 0.7]))
    t = batch.trajectory
    with torch.no_grad():
        x = mixed("independent", t.states[1], t.states[0], t.states[1], 0.0, batch.tau, batch.noise)[0]
        fake, real = (x - col(batch.tau) * says(n, t.conditions, t.scales, x, batch.tau) for n in (stage.fake, stage.teacher))
    grad = torch.autograd.grad(stage.loss("student", batch, 1)[0], own := list(stage.players["student"].parameters.values()))
    with torch.no_grad():
        for p, g in zip(own, grad, strict=True):
            p.sub_(0.01 * g / torch.cat([one.flatten() for one in grad]).norm())
        after = walk(stage.network, t.conditions, t.scales, t.states[0], [1.0, 0.0])[-1]
    assert ((after - t.states[1]) * (real - fake)).sum() > 0


@pytest.mark.parametrize("source", SOURCE)
def test_the_teachers_settings_are_its_kinds(source: str, base: Path, folder: Path) -> None:
    """Text to image is guided at all times, edits above 0.4 and token by token: what a student learns is what it is compared with."""
    stages: list[Any] = [make(cfg, base, data=only(source)), stage_with(base, folder, source, real="guided")]
    for stage in stages:
        conditions = stage.conditions(Draws.at(0, 0))
        found = stage.settings(conditions)
        assert conditions.is_edit == (source == "edit") and found is (PAPER_EDIT if source == "edit" else PAPER_TEXT_TO_IMAGE)
    expected = ((0.4, 1.0), "text_channel") if source == "edit" else ((0.0, 1.0), "global")
    assert (found.interval, found.renorm, found.renorm_min) == (*expected, 0.0)


@pytest.mark.parametrize("source", SOURCE)
def test_the_guided_base_written_out(source: str, base: Path, folder: Path) -> None:
    """Both guidances and their renormalisation, row by row; an edit at tau 0.3 is below the interval, text to image is not."""
    stage = stage_with(base, folder, source, real="guided")
    batch = at(stage, 1, torch.tensor([0.3, 0.5, 0.9]))
    t, c, x = batch.trajectory, batch.trajectory.conditions, batch.trajectory.states[1]
    with torch.no_grad():
        v, v_text, v_image = (velocity(stage.base, one, c, x, batch.tau) for one in (c.full, c.text_dropped, c.image_dropped))
        found = stage.real(t, x, batch.tau)
    for row, (text, image) in enumerate(zip(t.scales.text.tolist(), t.scales.image.tolist(), strict=True)):
        guided = v_text[row] + text * (v[row] - v_text[row])
        if source == "edit":  # each token no longer than without guidance, before the picture's guidance
            guided = guided * (v[row].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)).clamp(max=1)
            guided = v_image[row] + image * (guided - v_image[row])
        else:
            guided = guided * (v[row].norm() / guided.norm()).clamp(max=1)
        assert (guided - v[row]).abs().mean() > 1e-3 and text > 1 and (image > 1) == (source == "edit")
        same(found[row], v[row] if source == "edit" and row == 0 else guided)


def test_defaults_and_turns(base: Path, folder: Path) -> None:
    recipe = settings(dmdo, base, init=folder, teacher=folder)
    assert (recipe.nfe, recipe.shift, recipe.coupling, recipe.tdm_span, recipe.real) == (6, 3.0, "tdm", "segment", "teacher")
    assert (recipe.normaliser_floor, recipe.fake_steps, recipe.fake_first) == (0.1, 1, 0)
    stage: Any = make(dmdo, base, init=folder, teacher=folder)
    assert [stage.turn(step)[0] for step in range(4)] == list("fsfs")
    own, fake = stage.student.state_dict(), stage.players["fake"].module.state_dict()
    assert all(torch.equal(value, fake[name]) for name, value in own.items())  # both begin as their folder says
