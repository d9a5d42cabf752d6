"""Schedules, parameter groups, averages and Muon against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperbagel.train.ema import Ema, decay_at
from hyperbagel.train.muon import Muon, orthogonalise
from hyperbagel.train.optim import OptimConfig, decay_groups, lr_factor, make_optimizer
from hyperbagel.train.stage import Draws


def test_schedule_corners() -> None:
    cosine = OptimConfig(warmup_steps=9, final_ratio=0.1)
    assert lr_factor(cosine, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(cosine, 9, 0.0) == 1.0
    assert lr_factor(cosine, 100, 0.5) == pytest.approx(0.55)
    assert lr_factor(cosine, 100, 1.0) == lr_factor(cosine, 100, 1.7) == pytest.approx(0.1)
    assert lr_factor(OptimConfig(warmup_steps=0, schedule="constant"), 0, 0.9) == 1.0


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3))
    module[3].bias.requires_grad_(False)
    decay, plain = decay_groups(module, 0.1)
    assert {id(p) for p in decay["params"]} == {id(module[1].weight), id(module[3].weight)}
    assert {id(p) for p in plain["params"]} == {id(p) for p in (module[0].weight, module[1].bias, module[2].weight, module[2].bias)}
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_average_equals_the_recurrence_and_block_restores_bits() -> None:
    p = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    ema = Ema({"p": p}, 0.5)
    expected = p.detach().double()
    for n in range(12):
        with torch.no_grad():
            p.add_(0.1 * (n + 1))
        ema.update({"p": p})
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * p.detach().double()
    assert torch.allclose(ema.shadow["p"].double(), expected, atol=1e-6)
    before = p.detach().clone()
    with ema.applied({"p": p}):
        assert torch.equal(p.detach(), ema.shadow["p"])
    assert torch.equal(p.detach(), before)
    assert decay_at(0, 0.999) == 0.1 and decay_at(10**6, 0.999) == 0.999


def test_an_average_of_good_weights_has_its_whole_length_from_the_start() -> None:
    """The ramp is for random ones: with it 700 updates at .998 go back 78 steps in place of 500."""
    p = nn.Parameter(torch.zeros(()))
    averages = {ramp: Ema({"p": p}, 0.998, ramp) for ramp in (True, False)}
    for n in range(700):
        with torch.no_grad():
            p.fill_(float(n))
        for ema in averages.values():
            ema.update({"p": p})
    behind = {ramp: 699 - float(ema.shadow["p"]) for ramp, ema in averages.items()}
    assert 60 < behind[True] < 90 and behind[False] == pytest.approx(sum(0.998**k for k in range(1, 700)), rel=1e-3)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonalise_keeps_directions_and_levels_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalise(matrix) @ vt.T
    sizes = rotated.diagonal()
    assert ((sizes > 0.6) & (sizes < 1.3)).all()
    assert (rotated - sizes.diag()).abs().max() < 1e-6


def test_muon_fits_and_its_vectors_follow_adam() -> None:
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(64, 8, generator=generator), torch.randn(8, 8, generator=generator)
    weight, bias, twin = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    muon, adam = Muon([weight], [bias], 0.05, ratio=0.1), torch.optim.Adam([twin], 0.005, betas=(0.9, 0.95))
    losses = []
    for i in range(150):
        muon.param_groups[0]["lr"] = 0.05 * (1 - i / 150)
        loss = (x @ weight.T + bias - x @ target.T - 1).square().mean()
        loss.backward()
        twin.grad = bias.grad.clone() if bias.grad is not None else None
        muon.step()
        adam.step()
        muon.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.allclose(bias, twin, atol=1e-6)


def test_muon_decay_bounds_the_weights() -> None:
    """Under a gradient that never turns, singular values grow by lr a step without decay and rest near 1 / decay with it."""
    push = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    free, held = (nn.Parameter(torch.zeros(6, 4)) for _ in range(2))
    bias = nn.Parameter(torch.ones(4))
    optimizers = [Muon([free], [], 0.05), Muon([held], [bias], 0.05, weight_decay=0.5)]
    for _ in range(400):
        for p in (free, held):
            p.grad = push.clone()
        for optimizer in optimizers:
            optimizer.step()
    grown, rest = (torch.linalg.svdvals(p.detach()) for p in (free, held))
    assert grown.max() > 10 and ((rest > 0.5 / 0.5) & (rest < 1.5 * (6 / 4) ** 0.5 / 0.5)).all()
    assert (bias == 1).all()  # without a gradient nothing moves, and vectors never decay


def test_draws_depend_on_the_key_only() -> None:
    def numbers(*key: int) -> tuple[float, float, float]:
        d = Draws.at(*key)
        return d.python.random(), float(d.numpy.random()), torch.rand(1, generator=d.torch).item()

    assert numbers(1, 2, 3) == numbers(1, 2, 3)
    assert len({numbers(1, 2, 3), numbers(1, 3, 2), numbers(0, 2, 3), numbers(1, 2, 4)}) == 4


@pytest.mark.parametrize(("shape", "size"), [((16, 4), 2.0), ((4, 16), 1.0)])
def test_a_muon_step_is_as_long_as_the_shape_asks_for(shape: tuple[int, int], size: float) -> None:
    """More outputs than inputs: sqrt(outputs / inputs), so that what comes out of a layer moves alike whatever its shape."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], [], 1.0).step()
    moved = torch.linalg.svdvals(weight.detach())
    assert ((moved > 0.6 * size) & (moved < 1.3 * size)).all()


def test_a_recipe_s_muon_takes_matrices_and_all_its_numbers() -> None:
    module = nn.ModuleDict({"first": nn.Linear(4, 4), "middle": nn.Linear(4, 4), "words": nn.Embedding(3, 4)})
    config = OptimConfig(kind="muon", lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    matrices, others = make_optimizer(module, config, plain=("first",)).param_groups
    assert [id(p) for p in matrices["params"]] == [id(module["middle"].weight)] and matrices["muon"]
    assert len(others["params"]) == 4 and not others["muon"]
    for group in (matrices, others):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.02, (0.8, 0.9), 1e-3, 0.1)
