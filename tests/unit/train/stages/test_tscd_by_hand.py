"""Stage tscd written out: whose velocity is asked, at which time, what both ends are judged as, with which sign. And the latent heads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import (
    average_of,
    col,
    gradients,
    hinge_of,
    huber_of,
    mean_of,
    part_ways,
    same,
    says,
    shifted,
    stage_heads,
    watched,
    write_student,
)
from tiny_base import CONFIG, make, only, settings
from torch import Tensor

from hyperbagel.model.student import Sampler
from hyperbagel.train.discriminator import LatentDiscriminator, depths_of
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import tscd

SLOPE = {"r1_weight": 2.0, "r1_sigma": 0.5}  # large enough that a wrong sign of it shows
# A draw a column. Unshifted: [0, 1/3] at its start, s at its end; [1/3, 2/3], the teacher's step cut at 1/3; [2/3, 1], s within.
U = torch.tensor([[0.1, 0.5, 0.9], [0.0, 0.99, 0.5], [0.7, 0.5, 0.5], [0.1, 0.9, 0.9]])
T_N, T_M, S = (1 / 3, 2 / 3 - 0.33, 1 - 1 / 6), (1 / 3 - 0.02, 1 / 3, 1 - 1 / 6 - 0.02), (0.0, 1 / 3, 2 / 3 + 0.5 * (1 / 3 - 1 / 6 - 0.02))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(base, tmp_path_factory.mktemp("first") / "student", 1, Sampler())


@pytest.fixture(scope="module", params=["t2i", "edit"])
def stage(request: pytest.FixtureRequest, base: Path, folder: Path) -> Any:
    """Teacher, student, its average and the judge's backbone are four networks that say different things."""
    made: Any = make(tscd, base, init=folder, data=only(request.param), discriminator_heads=2, **SLOPE)
    part_ways(made)
    return made


def renoised(batch: Any, x: Tensor) -> Tensor:
    """From s to tau with the batch's noise: as far as the path itself would be there, in signal and in noise."""
    s, tau = col(batch.times.s), col(batch.tau)
    left = (1 - tau) / (1 - s)
    return left * x + (tau**2 - left**2 * s**2).sqrt() * batch.noise


def test_a_batch_written_out(stage: Any) -> None:
    """x_tn on the path of the true pictures; from there the teacher to t_m, then the averaged student (not the trained one) to s."""
    before = {name: value.clone() for name, value in stage.student.state_dict().items()}
    with watched(stage, {(4, 3): U}) as seen:
        batch = stage.batch(0, Draws.at(0, 0))
    t_n, t_m, s = (shifted(torch.tensor(times), 3.0) for times in (T_N, T_M, S))
    for found, expected in zip(batch.times, (t_n, t_m, s), strict=True):
        torch.testing.assert_close(found, expected)
    c, w = batch.conditions, batch.scales
    noises = [e for e in seen.noises if torch.allclose(batch.x_tn, (1 - col(t_n)) * c.x0 + col(t_n) * e, atol=1e-5)]
    assert len(noises) == 1 and len(seen.noises) == 3 and c.x0.std() > 0.1
    assert not any(noises[0] is other for other in (batch.noise, batch.r1_noise)) and batch.noise is not batch.r1_noise
    with torch.no_grad():
        x_tm = batch.x_tn + col(t_m - t_n) * says(stage.teacher, c, w, batch.x_tn, t_n)
        same(batch.target, x_tm + col(s - t_m) * says(average_of(stage), c, w, x_tm, t_m))
    same(batch.tau, s + (1 - s) * 0.98 * seen.uniforms[-1])
    assert all(torch.equal(value, before[name]) for name, value in stage.student.state_dict().items())


def test_teacher_student_and_average_differ(stage: Any) -> None:
    """What the test above rests on: the three networks part by more than its tolerance."""
    batch = stage.batch(0, Draws.at(0, 0))
    with torch.no_grad():
        three = [says(n, batch.conditions, batch.scales, batch.x_tn, 0.5) for n in (stage.network, average_of(stage), stage.teacher)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (three[one] - three[other]).abs().mean() > 0.05 * three[one].abs().mean()


def test_the_students_loss_written_out(stage: Any) -> None:
    """Its jump from t_n to s wants to be judged real (a high judgement is a low loss) and stays near the target."""
    batch = stage.batch(0, Draws.at(0, 0))
    c, w, t_n, s = batch.conditions, batch.scales, batch.times.t_n, batch.times.s
    fake = batch.x_tn + col(s - t_n) * says(stage.network, c, w, batch.x_tn, t_n)
    adversarial, huber = -mean_of(stage.judge(c, w, renoised(batch, fake), batch.tau)), huber_of(fake, batch.target, 0.03)
    loss, metrics = stage.loss("student", batch, 1)
    same(loss, adversarial + 0.25 * huber)
    same(metrics[f"{c.source}_adversarial"], adversarial)
    same(metrics[f"{c.source}_huber"], huber)
    same(gradients(loss, stage.student), gradients(adversarial + 0.25 * huber, stage.student))


def test_the_discriminators_loss_written_out(stage: Any) -> None:
    """Real is the target, fake the student's end; both hinges, and the slope at real ends is a cost."""
    batch = stage.batch(0, Draws.at(0, 0))
    c, w, t_n, s = batch.conditions, batch.scales, batch.times.t_n, batch.times.s
    with torch.no_grad():
        fake = batch.x_tn + col(s - t_n) * says(stage.network, c, w, batch.x_tn, t_n)
    targets = (batch.target, fake, batch.target + 0.5 * batch.r1_noise)
    real, made, near = (stage.judge(c, w, renoised(batch, x), batch.tau) for x in targets)
    hinge, slope = hinge_of(real, made), mean_of([(a - b) ** 2 for a, b in zip(real, near, strict=True)])
    loss, metrics = stage.loss("discriminator", batch, 0)
    same(loss, hinge + 2 * slope)
    same(metrics[f"{c.source}_hinge"], hinge)
    same(metrics[f"{c.source}_r1"], slope)
    same(gradients(loss, stage.judge), gradients(hinge + 2 * slope, stage.judge))
    assert not gradients(loss, stage.student).any() and slope > 0.01 * hinge
    right = mean_of([(one > 0).float() for one in real]) + mean_of([(one < 0).float() for one in made])
    assert metrics[f"{c.source}_accuracy"].item() == pytest.approx(right.item() / 2)


def test_weights_of_the_recipe_reach_the_losses(base: Path, folder: Path) -> None:
    plain, other = (make(tscd, base, init=folder, data=only("t2i"), **k) for k in ({}, {"huber_weight": 2.0, "r1_weight": 0.0}))
    for stage in (plain, other):
        part_ways(stage)
    batch = plain.batch(0, Draws.at(0, 0))
    (student, metrics), (heavy, _) = (stage.loss("student", batch, 1) for stage in (plain, other))
    same(heavy - student, 1.75 * metrics["t2i_huber"])
    loss, metrics = other.loss("discriminator", batch, 0)
    assert loss == metrics["t2i_hinge"] and "t2i_r1" not in metrics


def test_defaults_and_turns(base: Path, folder: Path) -> None:
    recipe = settings(tscd, base, init=folder)
    assert (recipe.segments, recipe.teacher_step, recipe.snap, recipe.shift, recipe.nfe) == (3, 0.02, 0.5, 3.0, 6)
    assert (recipe.huber_weight, recipe.huber_c, recipe.r1_weight, recipe.r1_sigma, recipe.discriminator_heads) == (
        0.25,
        0.03,
        1.0,
        0.05,
        4,
    )
    stage: Any = make(tscd, base, init=folder)
    assert [stage.turn(step)[0] for step in range(4)] == list("dsds")


def test_the_teacher_is_another_student_where_named(base: Path, folder: Path, tmp_path: Path) -> None:
    """And the discriminator's backbone starts as the student, as a copy of its own."""
    other = write_student(base, tmp_path / "other", 2, Sampler())
    stage: Any = make(tscd, base, init=folder, teacher=other, data=only("t2i"))
    own, copied = stage.student.state_dict(), stage.judge.backbone.state_dict()
    assert all(torch.equal(value, copied[name]) and value.data_ptr() != copied[name].data_ptr() for name, value in own.items())
    expected, batch = make(tscd, base, init=other, data=only("t2i")), stage.batch(0, Draws.at(0, 0))
    args = (batch.conditions, batch.scales, batch.x_tn, batch.times.t_n)
    with torch.no_grad():
        assert torch.equal(says(stage.teacher, *args), says(expected.network, *args))
        assert not torch.allclose(says(stage.teacher, *args), says(stage.network, *args), atol=1e-2)


def test_depths() -> None:
    """Evenly spread, the last layer among them, never a layer twice."""
    assert depths_of(8, 4) == [1, 3, 5, 7] and depths_of(28, 4) == [6, 13, 20, 27] and depths_of(26, 2) == [12, 25]
    assert depths_of(8, 1) == [7] and depths_of(2, 2) == [0, 1]
    assert depths_of(2, 4) == [0, 1] and depths_of(3, 4) == [0, 1, 2] and depths_of(1, 2) == [0]  # more heads than layers


def test_each_latent_head_reads_its_own_layer(stage: Any) -> None:
    """Against the layers' own outputs, caught as they leave them."""
    judge, batch = stage.judge, stage.batch(0, Draws.at(0, 0))
    assert isinstance(judge, LatentDiscriminator) and len(stage_heads(stage)) == len(judge.heads) == CONFIG.llm.num_hidden_layers == 2
    left: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda *args: left.append(args[-1].g)) for layer in judge.network.model.language_model.model.layers
    ]
    found = judge(batch.conditions, batch.scales, batch.x_tn, batch.tau)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(left) == 2
    for judgement, head, features in zip(found, judge.heads, left, strict=True):
        same(judgement, head(features, batch.conditions.grid))
    for one, other in pairwise(found):
        assert not torch.allclose(one, other, atol=1e-2)
