"""Objectives of distillation against slow fp64 definitions, their limits, and who gets a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hyperbagel.flow.guidance import RENORMS, guide, guide_each
from hyperbagel.flow.schedule import shift_time
from hyperbagel.train.losses.adversarial import accuracy, approximate_r1, hinge_discriminator, hinge_generator
from hyperbagel.train.losses.cfg import cfg_loss, draw_scales
from hyperbagel.train.losses.dmd import COUPLINGS, Coupling, contraction, couple, dmd_gradient, dmd_loss, fake_loss, renoise_factors
from hyperbagel.train.losses.refl import balanced_weight, preference_loss, refl_loss, with_gradient
from hyperbagel.train.losses.tscd import jump, pseudo_huber, segment_times

B, N, C = 5, 3, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- guidance ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renorm", RENORMS)
def test_guided_target_equals_the_sampler_sample_by_sample(renorm) -> None:
    v, v_text, v_image = (draw(B, N, C, seed=i) for i in range(3))
    text, image = torch.tensor([1.0, 2, 5, 3, 4]), torch.tensor([2.0, 1, 2.5, 1.5, 2])
    on = torch.tensor([True, True, True, True, False])
    target = guide_each(v, v_text, v_image, text, image, on, renorm)
    for i in range(4):
        one = slice(i, i + 1)
        assert torch.equal(target[one], guide(v[one], v_text[one], v_image[one], text[i].item(), image[i].item(), renorm))
    assert torch.equal(target[0], v[0]) and torch.equal(target[4], v[4])  # guidance 1, and outside the interval
    assert not torch.allclose(target[1], v[1])


def test_cfg_loss_and_its_gradient() -> None:
    student, target = draw(B, N, C).requires_grad_(), draw(B, N, C, seed=1).requires_grad_()
    loss = cfg_loss(student, target)
    pairs = zip(student.flatten().tolist(), target.flatten().tolist())
    slow = sum((a - b) ** 2 for a, b in pairs) / student.numel()
    assert math.isclose(loss.item(), slow, rel_tol=1e-6)
    loss.backward()
    assert target.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - target).detach() / student.numel(), rtol=1e-5, atol=1e-7)
    assert cfg_loss(target, target).item() == 0


def test_scales_stay_in_their_range() -> None:
    scales = draw_scales(uniform(1000), 1.0, 5.0)
    assert 1 <= scales.min() < 1.1 and 4.9 < scales.max() <= 5 and abs(scales.mean() - 3) < 0.1


# -- TSCD --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_segment_times_stay_in_their_segment(shift: float) -> None:
    t_n, t_m, s = segment_times(uniform(4, 2000), 3, 0.02, shift)
    bounds = shift_time(torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64), shift)
    j = (torch.bucketize(t_n, bounds) - 1).clamp(min=0)  # a start belongs to the segment below it
    low = bounds[j]
    assert (low - 1e-6 <= s).all() and (s <= t_m + 1e-9).all() and (t_m < t_n).all() and t_n.max() <= 1
    assert abs(torch.isclose(s, low, atol=1e-6).double().mean() - 0.5) < 0.05
    assert abs((j == 1).double().mean() - 1 / 3) < 0.04
    never = segment_times(uniform(4, 2000), 3, 0.02, shift, snap=0.0).s
    assert torch.isclose(never, low, atol=1e-6).double().mean() < 0.1


def test_both_ends_agree_for_a_straight_teacher() -> None:
    """Where the teacher's path is straight, jumping from t_n and stepping to t_m first end in the same place."""
    v = draw(B, N, C)
    x = draw(B, N, C, seed=1)
    t_n, t_m, s = segment_times(uniform(4, B), 3, 0.05, 3.0)
    fake, target = jump(x, v, t_n, s), jump(jump(x, v, t_n, t_m), v, t_m, s)
    torch.testing.assert_close(fake, target)
    assert pseudo_huber(fake, target, 0.01).item() < 1e-12
    assert torch.equal(jump(x, v, s, s), x)


def test_pseudo_huber() -> None:
    x, y = draw(B, N, C).requires_grad_(), draw(B, N, C, seed=1).requires_grad_()
    c = 0.3
    rows = zip(x.detach().flatten(1).tolist(), y.detach().flatten(1).tolist())
    slow = sum(math.sqrt(sum((a - b) ** 2 for a, b in zip(p, q)) / (N * C) + c * c) - c for p, q in rows) / B
    loss = pseudo_huber(x, y, c)
    assert math.isclose(loss.item(), slow, rel_tol=1e-5)
    loss.backward()
    assert y.grad is None and x.grad is not None and x.grad.abs().sum() > 0
    near = pseudo_huber(y + 1e-3, y, c).item()
    assert math.isclose(near, 1e-6 / (2 * c), rel_tol=1e-2)  # quadratic near 0


# -- adversarial -------------------------------------------------------------------------------------------------------------------


def test_hinge_over_heads() -> None:
    real, fake = [draw(B, 2, seed=1), draw(B, 7, seed=2)], [draw(B, 2, seed=3), draw(B, 7, seed=4)]
    slow_d = sum(
        sum(max(0, 1 - float(r)) for r in a.flatten()) / a.numel() + sum(max(0, 1 + float(f)) for f in b.flatten()) / b.numel()
        for a, b in zip(real, fake)
    )
    assert math.isclose(hinge_discriminator(real, fake).item(), slow_d / 2, rel_tol=1e-6)
    assert math.isclose(hinge_generator(fake).item(), -(fake[0].mean() + fake[1].mean()).item() / 2, rel_tol=1e-6)
    zero = [torch.zeros(B, 2)]
    assert hinge_discriminator(zero, zero).item() == 2 and accuracy(zero, zero).item() == 0
    assert hinge_discriminator([zero[0] + 1], [zero[0] - 1]).item() == 0 and accuracy([zero[0] + 1], [zero[0] - 1]).item() == 1


def test_approximate_r1_is_the_slope_of_a_linear_judge() -> None:
    w, sigma = draw(6), 0.05
    x, n = draw(40000, 6, seed=1), draw(40000, 6, seed=2)
    found = approximate_r1([x @ w], [(x + sigma * n) @ w])
    assert math.isclose(found.item(), sigma**2 * (w @ w).item(), rel_tol=0.03)
    assert approximate_r1([x @ w], [x @ w]).item() == 0


# -- DMD ---------------------------------------------------------------------------------------------------------------------------


def test_dmd_gradient_and_loss() -> None:
    x0, fake, real = draw(B, N, C).requires_grad_(), draw(B, N, C, seed=1).requires_grad_(), draw(B, N, C, seed=2).requires_grad_()
    g = dmd_gradient(x0.detach(), fake, real)
    for i in range(B):
        pairs = zip(x0[i].flatten().tolist(), real[i].flatten().tolist())
        size = max(0.1, sum(abs(a - b) for a, b in pairs) / (N * C))
        torch.testing.assert_close(g[i], (fake[i] - real[i]) / size)
    dmd_loss(x0, g).backward()
    assert fake.grad is None and real.grad is None  # only the generator moves
    torch.testing.assert_close(x0.grad, g.detach() / x0.numel(), rtol=1e-5, atol=1e-8)


def test_no_gradient_where_fake_equals_real() -> None:
    x0, same = draw(B, N, C).requires_grad_(), draw(B, N, C, seed=1)
    loss = dmd_loss(x0, dmd_gradient(x0.detach(), same, same.clone()))
    loss.backward()
    assert loss.item() == 0 and x0.grad is not None and x0.grad.abs().max() == 0


def test_the_normaliser_is_clamped() -> None:
    x0 = draw(B, N, C)
    g = dmd_gradient(x0, x0 + 1e-3, x0)  # the real model agrees with x0_hat: without the clamp g would be huge
    torch.testing.assert_close(g, torch.full_like(g, 1e-2))


def test_fake_loss_reaches_the_fake_model_alone() -> None:
    x0 = draw(B, N, C).requires_grad_()
    v = draw(B, N, C, seed=9).requires_grad_()
    for kind in COUPLINGS:
        made = couple(kind, x0, draw(B, N, C, seed=1), x0 * 0.9, torch.full((B,), 0.2), torch.full((B,), 0.6), draw(B, N, C, seed=2))
        loss = fake_loss(v, made)
        slow = sum((made.weight[i].item() * (v[i] - made.velocity[i]).square().sum().item()) for i in range(B)) / v.numel()
        assert math.isclose(loss.item(), slow, rel_tol=1e-5)
        loss.backward()
    assert x0.grad is None and v.grad is not None


def test_couplings_lie_on_their_paths() -> None:
    x0, x_T, x_s, n = (draw(B, N, C, seed=i) for i in range(4))
    s, tau = torch.full((B,), 0.3, dtype=torch.float64), torch.full((B,), 0.7, dtype=torch.float64)
    for kind in COUPLINGS:
        made = couple(kind, x0, x_T, x_s, s, tau, n)
        back = made.x_tau - 0.7 * made.velocity  # x0 as that velocity sees it
        noise = made.x_tau + 0.3 * made.velocity
        if kind in ("paired", "reflowed"):
            torch.testing.assert_close(back, x0)
            torch.testing.assert_close(noise, x_T)
        elif kind == "independent":
            torch.testing.assert_close(back, x0)
            torch.testing.assert_close(noise, n)
        else:
            a, c = renoise_factors(s, tau)
            torch.testing.assert_close(made.x_tau, a[0] * x_s + c[0] * n)
            torch.testing.assert_close(noise, 0.7 / c[0] * n)
    zero = torch.zeros(B, dtype=torch.float64)
    end = couple("tdm", x0, x_T, x0, zero, tau, n)  # at s = 0 TDM is the independent coupling
    torch.testing.assert_close(end.velocity, n - x0)
    torch.testing.assert_close(end.weight, torch.ones_like(end.weight))
    torch.testing.assert_close(end.x_tau, couple("independent", x0, x_T, x0, zero, tau, n).x_tau)


def test_renoising_keeps_the_marginal() -> None:
    """x_s = (1 - s) x0 + s e re-noised to tau has the mean factor 1 - tau and the noise variance tau^2, in closed form."""
    for s, tau in ((0.0, 0.5), (0.25, 0.3), (0.4, 0.99), (0.5, 0.5)):
        a, c = renoise_factors(torch.tensor(s, dtype=torch.float64), torch.tensor(tau, dtype=torch.float64))
        assert math.isclose(a * (1 - s), 1 - tau, rel_tol=1e-9)
        assert math.isclose((a * s) ** 2 + c**2, tau**2, rel_tol=1e-9)


@pytest.mark.parametrize(("s", "tau"), [(0.0, 0.5), (0.0, 0.95), (0.3, 0.35), (0.3, 0.9), (0.9, 0.92), (0.94, 0.99)])
def test_the_weight_of_tdm_evens_out_the_scatter_of_its_target(s: float, tau: float) -> None:
    x0, e, n = (draw(20000, 1, 1, seed=i) for i in range(3))
    at = [torch.full((20000,), t, dtype=torch.float64) for t in (s, tau)]
    made = couple("tdm", x0, e, (1 - s) * x0 + s * e, *at, n)
    x, v = made.x_tau.flatten(), made.velocity.flatten()
    scatter = (v - (v @ x) / (x @ x) * x).square().mean() * made.weight[0].item()  # the mean given x is linear in x
    assert math.isclose(scatter, 1 / ((1 - tau) ** 2 + tau**2), rel_tol=0.05)
    exact = (tau - (1 - tau)) / ((1 - tau) ** 2 + tau**2)  # E[v | x] = E[e - x0 | x] of the path itself
    assert abs((v @ x) / (x @ x) - exact) < 0.05 * max(1.0, made.weight[0].item() ** -0.5)


# -- the scalar Gaussian -----------------------------------------------------------------------------------------------------------

# Every function below is linear in (x_T, n), so four sign pairs give E exactly.
X_T, FRESH = (torch.tensor(signs, dtype=torch.float64) for signs in ([1, 1, -1, -1], [1, -1, 1, -1]))


def pull(kind: Coupling, a: float, tau: Tensor, std: float, s: float) -> float:
    """E[g x_T] over tau and noise for a student x0 = a x_T, with exact real and fake models; `couple` and `dmd_gradient` are the code's.

    For tdm `a` is the std of the state at s, which the student moves directly.
    """
    t = tau.repeat_interleave(4)
    x_T, n = X_T.repeat(len(tau)), FRESH.repeat(len(tau))
    x0 = a * x_T
    made = couple(kind, *(x[:, None, None] for x in (x0, x_T, x0)), torch.full_like(t, s), t, n[:, None, None])
    x = made.x_tau[:, 0, 0]
    spread = (1 - t) ** 2 * std**2 + t**2  # Var x_tau under the teacher, independent noise
    real = (1 - t) * std**2 / spread * x
    if kind == "paired":
        fake = x0
    elif kind == "reflowed":
        fake, real = x0, std * x / ((1 - t) * std + t)  # the real model knows the teacher's pairs x0 = std x_T
    elif kind == "independent":
        fake = (1 - t) * a**2 / ((1 - t) ** 2 * a**2 + t**2) * x
    else:
        ratio, c = renoise_factors(torch.full_like(t, s), t)
        eps = t / c * (c / (ratio**2 * a**2 + c**2)) * x  # E[tau n / c | x_tau]
        fake = (x - t * eps) / (1 - t)
    g = dmd_gradient(x0[:, None, None], fake[:, None, None], real[:, None, None], normalise=False)[:, 0, 0]
    return (g * x_T).mean().item()


def resting_std(kind: Coupling, shift: float, std: float = 1.0, s: float = 0.3) -> float:
    u = 0.02 + 0.96 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tau = shift_time(u, shift)
    tau = tau[tau > s + 0.01] if kind == "tdm" else tau
    low, high = 1e-3, 5.0
    assert pull(kind, low, tau, std, s) < 0 < pull(kind, high, tau, std, s)  # too narrow is widened, too wide is narrowed
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if pull(kind, middle, tau, std, s) > 0 else (middle, high)
    return low


@pytest.mark.parametrize(("shift", "found"), [(1.0, 0.594), (3.0, 0.351)])
def test_the_literal_coupling_shrinks_a_gaussian(shift: float, found: float) -> None:
    rest = resting_std("paired", shift)
    assert abs(rest - found) < 1e-3
    u = 0.02 + 0.96 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert math.isclose(rest, contraction(shift_time(u, shift)).item(), rel_tol=1e-6)


def test_contraction_has_its_closed_form() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert math.isclose(contraction(u).item(), math.pi / 2 - 1, rel_tol=1e-8)
    assert math.isclose(contraction(u, 2.0).item() * 2, resting_at_full_range(2.0), rel_tol=1e-3)


def resting_at_full_range(std: float) -> float:
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    low, high = 1e-3, 5.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if pull("paired", middle, u, std, 0.0) > 0 else (middle, high)
    return low


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_the_other_couplings_rest_at_the_teacher(shift: float, std: float) -> None:
    assert abs(resting_std("independent", shift, std) - std) < 1e-6
    assert abs(resting_std("reflowed", shift, std) - std) < 1e-6
    s = 0.3
    marginal = math.sqrt((1 - s) ** 2 * std**2 + s**2)  # of the teacher's path at s
    assert abs(resting_std("tdm", shift, std, s) - marginal) < 1e-5


# -- rewards -----------------------------------------------------------------------------------------------------------------------


def test_refl_loss_stops_at_its_ceiling() -> None:
    r = torch.tensor([5.0, 7.0, -1.0], requires_grad=True)
    loss = refl_loss(r)
    loss.backward()
    assert math.isclose(loss.item(), (1 + 0 + 7) / 3, rel_tol=1e-6)
    assert r.grad is not None and torch.allclose(r.grad, torch.tensor([-1 / 3, 0.0, -1 / 3]))


def test_preference_loss() -> None:
    better, worse = draw(B), draw(B, seed=1)
    slow = sum(-math.log(1 / (1 + math.exp(-float(b - w)))) for b, w in zip(better, worse)) / B
    assert math.isclose(preference_loss(better, worse).item(), slow, rel_tol=1e-6)
    assert math.isclose(preference_loss(better, better).item(), math.log(2), rel_tol=1e-6)


def test_the_reward_never_outweighs_the_judges() -> None:
    adversarial, reward = draw(B, N, C), draw(B, N, C, seed=1)
    for size in (0.01, 1.0, 100.0):
        weight = balanced_weight(adversarial, size * reward)
        ratio = (weight * size * reward.norm() / adversarial.norm()).item()
        assert 0 < weight <= 1 and ratio <= 0.3 + 1e-6
    assert balanced_weight(adversarial, 1e-3 * reward).item() == 1


def test_a_scalar_with_a_given_gradient() -> None:
    x, g = draw(B, N, C).requires_grad_(), draw(B, N, C, seed=1)
    loss = with_gradient(x, g, torch.tensor(2.5, dtype=torch.float64))
    loss.backward()
    assert math.isclose(loss.item(), 2.5) and torch.equal(x.grad, g)
