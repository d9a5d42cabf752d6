"""Stage adp written out: who makes the pairs, where on them the generator stands, how both judges count and which way. And pixel heads."""

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
    grid_of,
    hinge_of,
    huber_of,
    mean_of,
    part_ways,
    same,
    says,
    stage_heads,
    walk,
    watched,
    write_student,
)
from tiny_base import CONFIG, make, only, settings
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.model.student import Sampler
from hyperbagel.model.vae import unpatchify
from hyperbagel.train.discriminator import PixelDiscriminator
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import adp

TEACHERS = Sampler(nfe=4, shift=2.0)  # neither the recipe's nor the defaults
KEYS: dict[str, Any] = {"latent_heads": 2, "r1_weight": 2.0, "r1_sigma": 0.5}  # a slope large enough that a wrong sign of it shows


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(base, tmp_path_factory.mktemp("first") / "student", 1, TEACHERS)


@pytest.fixture(scope="module", params=["t2i", "edit"])
def stage(request: pytest.FixtureRequest, base: Path, folder: Path) -> Any:
    """Teacher, generator, its average and the latent judge's backbone are four networks that say different things."""
    made: Any = make(adp, base, init=folder, data=only(request.param), **KEYS)
    part_ways(made)
    return made


def halfway(stage: Any) -> Any:
    """A batch whose rows stand at three times, none of them an end."""
    batch = stage.batch(0, Draws.at(0, 0))
    batch.t, batch.tau = torch.tensor([0.9, 0.3, 0.6]), torch.tensor([0.2, 0.7, 0.5])
    return batch


def predicted(stage: Any, batch: Any) -> Tensor:
    """x0_hat: the pair's x_0 in signal and x_T in noise, and from there all the way along the generator's velocity."""
    x_t = (1 - col(batch.t)) * batch.x_0 + col(batch.t) * batch.x_T
    return x_t - col(batch.t) * says(stage.network, batch.conditions, batch.scales, x_t, batch.t)


def in_latents(stage: Any, batch: Any, x: Tensor) -> list[Tensor]:
    """The latent judge at tau, with the batch's noise."""
    noised = (1 - col(batch.tau)) * x + col(batch.tau) * batch.noise
    return stage.judges.latent(batch.conditions, batch.scales, noised, batch.tau)


def in_pixels(stage: Any, batch: Any, x: Tensor) -> list[Tensor]:
    """The pixel judge on pictures without noise."""
    h, w = batch.conditions.grid
    return stage.judges.pixel(stage.base, stage.vae.decode(unpatchify(x, h, w, CONFIG.options.latent_patch_size)))


def test_a_batch_written_out(stage: Any) -> None:
    """The pair is one: x_0 is where the frozen teacher, not the trained student, comes from this very x_T, with its own sampler."""
    with watched(stage) as seen:
        batch = stage.batch(0, Draws.at(0, 0))
    c, w = batch.conditions, batch.scales
    with torch.no_grad():
        ends = [walk(n, c, w, batch.x_T, grid_of(4, 2.0))[-1] for n in (stage.teacher, stage.network, average_of(stage))]
    same(batch.x_0, ends[0])
    assert all((end - ends[0]).abs().mean() > 0.05 * ends[0].abs().mean() for end in ends[1:])
    assert [id(e) for e in seen.noises] == [id(e) for e in (batch.x_T, batch.noise, batch.r1_noise)]
    u, full, tau = seen.uniforms[-3:]
    expected = [1.0 if f < 0.5 else 1 - (1 - one) ** 3 for one, f in zip(u.tolist(), full.tolist(), strict=True)]
    torch.testing.assert_close(batch.t, torch.tensor(expected))
    torch.testing.assert_close(batch.tau, 0.98 * tau)


@pytest.mark.parametrize("full_noise", [0.0, 0.5])
def test_generator_times_lean_to_noise(full_noise: float, base: Path, folder: Path) -> None:
    """t = 1 - (1 - u)^3: mean 3/4, mean square 1 - 2/4 + 1/7 = 9/14; the share of full noise draws has 1 of both. tau: mean 0.49."""
    stage: Any = make(adp, base, init=folder, data=only("t2i"), full_noise=full_noise)
    stage.as_velocity = lambda *_: lambda x, t: torch.zeros_like(x)  # the pairs do not matter here
    conditions = stage.conditions(Draws.at(0, 0)).repeat(4000)
    stage.conditions = lambda rng: conditions
    t, rest = (batch := stage.batch(0, Draws.at(0, 1))).t, 1 - full_noise
    assert t.shape == (12_000,) and t.min() >= 0 and t.max() <= 1
    assert t.mean().item() == pytest.approx(full_noise + rest * 3 / 4, abs=0.012)
    assert t.square().mean().item() == pytest.approx(full_noise + rest * 9 / 14, abs=0.016)
    assert (t == 1).float().mean().item() == pytest.approx(full_noise, abs=0.02)
    assert batch.tau.mean().item() == pytest.approx(0.49, abs=0.012) and batch.tau.max() <= 0.98


def test_the_generators_loss_written_out(stage: Any) -> None:
    """0.85 of the latent judge's and 0.15 of the pixel judge's: high judgements are low losses. And a little of the distance to x_0."""
    batch = halfway(stage)
    x0_hat = predicted(stage, batch)
    latent, pixel = (-mean_of(judge(stage, batch, x0_hat)) for judge in (in_latents, in_pixels))
    huber = huber_of(x0_hat, batch.x_0, 0.03)
    expected = 0.85 * latent + 0.15 * pixel + 0.25 * huber
    loss, metrics = stage.loss("student", batch, 1)
    same(loss, expected)
    for key, value in (("latent", latent), ("pixel", pixel), ("huber", huber)):
        same(metrics[f"{batch.conditions.source}_{key}"], value)
    same(gradients(loss, stage.student), gradients(expected, stage.student))


def test_the_discriminators_loss_written_out(stage: Any) -> None:
    """Real is x_0, fake x0_hat; both hinges with the generator's weights, and the slope at real latents is a cost."""
    batch = halfway(stage)
    with torch.no_grad():
        fake = predicted(stage, batch)
    real = in_latents(stage, batch, batch.x_0)
    latent, pixel = hinge_of(real, in_latents(stage, batch, fake)), hinge_of(*(in_pixels(stage, batch, x) for x in (batch.x_0, fake)))
    near = in_latents(stage, batch, batch.x_0 + 0.5 * batch.r1_noise)
    slope = mean_of([(a - b) ** 2 for a, b in zip(real, near, strict=True)])
    expected = 0.85 * latent + 0.15 * pixel + 0.85 * 2 * slope
    loss, metrics = stage.loss("discriminator", batch, 0)
    same(loss, expected)
    for key, value in (("latent_hinge", latent), ("pixel_hinge", pixel), ("r1", slope)):
        same(metrics[f"{batch.conditions.source}_{key}"], value)
    same(gradients(loss, stage.judges), gradients(expected, stage.judges))
    assert not gradients(loss, stage.student).any() and slope > 0.01 * latent


def test_one_step_begins_at_noise(stage: Any) -> None:
    """At t = 1 the generator sees x_T alone, as its sampler does: what it learns there is what is drawn."""
    batch = stage.batch(0, Draws.at(0, 0))
    batch.t = torch.ones(3)
    with torch.no_grad():
        one = batch.x_T - says(stage.network, batch.conditions, batch.scales, batch.x_T, 1.0)
        same(one, walk(stage.network, batch.conditions, batch.scales, batch.x_T, grid_of(stage.recipe.nfe, 3.0))[-1])
        latent, pixel = -mean_of(in_latents(stage, batch, one)), -mean_of(in_pixels(stage, batch, one))
        same(stage.loss("student", batch, 1)[0], 0.85 * latent + 0.15 * pixel + 0.25 * huber_of(one, batch.x_0, 0.03))


def test_defaults_and_turns(base: Path, folder: Path) -> None:
    recipe = settings(adp, base, init=folder)
    assert (recipe.latent_weight, recipe.pixel_weight, recipe.full_noise, recipe.nfe, recipe.shift) == (0.85, 0.15, 0.5, 1, 3.0)
    assert (recipe.huber_weight, recipe.huber_c, recipe.r1_weight, recipe.r1_sigma) == (0.25, 0.03, 1.0, 0.05)
    assert (recipe.latent_heads, recipe.pixel_heads, recipe.pixel_samples) == (4, 2, 0)
    stage: Any = make(adp, base, init=folder)
    assert [stage.turn(step)[0] for step in range(4)] == list("dsds")
    with pytest.raises(InputError, match="init"):
        make(adp, base)


def test_pairs_are_a_named_teachers(base: Path, folder: Path, tmp_path: Path) -> None:
    """`init` goes on, `teacher` makes the pairs, with the sampler that its folder names; the latent judge starts as the teacher."""
    other = write_student(base, tmp_path / "other", 2, Sampler(nfe=3, shift=3.0))
    stage, alone = (make(adp, base, init=init, data=only("t2i"), **keys) for init, keys in ((folder, {"teacher": other}), (other, {})))
    batch = stage.batch(0, Draws.at(0, 0))
    with torch.no_grad():
        same(batch.x_0, walk(alone.network, batch.conditions, batch.scales, batch.x_T, grid_of(3, 3.0))[-1])
    copied = stage.judges.latent.backbone.state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in alone.student.state_dict().items())
    assert any(not torch.equal(value, copied[name]) for name, value in stage.student.state_dict().items())


def test_a_few_pictures_are_judged_in_pixels(base: Path, folder: Path) -> None:
    """`pixel_samples` of a batch, evenly spread, and the latents of all."""
    stage: Any = make(adp, base, init=folder, data=only("t2i"), pixel_samples=2)
    part_ways(stage)
    batch = halfway(stage)
    with torch.no_grad():
        x0_hat, metrics = predicted(stage, batch), stage.loss("student", batch, 1)[1]
        same(metrics["t2i_pixel"], -mean_of(in_pixels(stage, batch, x0_hat[[0, 2]])))
        same(metrics["t2i_latent"], -mean_of(in_latents(stage, batch, x0_hat)))


def test_each_pixel_head_reads_its_own_layer(stage: Any) -> None:
    """Against the outputs of the base's ViT, caught as they leave its layers."""
    judge, layers = stage.judges.pixel, stage.base.vit_model.vision_model.encoder.layers
    assert isinstance(judge, PixelDiscriminator) and len(judge.heads) == CONFIG.vit.layers_used == len(layers) == 2
    assert len(stage_heads(stage)) == 4  # with the latent judge's
    left: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *args: left.append(args[-1])) for layer in layers]
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = judge(stage.base, pixels)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(left) == 2
    for judgement, head, features in zip(found, judge.heads, left, strict=True):
        same(judgement, head(features, (4, 4)))
    for one, other in pairwise(found):
        assert not torch.allclose(one, other, atol=1e-2)
