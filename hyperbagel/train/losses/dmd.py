"""Distribution matching by scores, and four ways to couple a sample with noise (Hyper-Bagel 3.2.3 is the first).

Shape legend: B samples, N latent tokens, C values of a token; times [B], after the shift, t = 1 is noise.

The generator makes x0 from x_T. The real and the fake model judge x_tau. The coupling is which x_tau, and what the fake model learns there:

    paired       x_tau = lerp(x0, the SAME x_T)   3.2.3 to the letter. The fake model can infer x0 exactly, the real one (trained on
                                                  independent noise) cannot, so the student contracts: see `contraction`.
    independent  x_tau = lerp(x0, fresh n)        the usual DMD
    reflowed     as paired, but with a real model trained on the teacher's own ODE pairs (x_T, x0), so that it can infer as much
    tdm          x_tau re-noised from the state x_s at a segment's end: matches the marginals that the sampler passes through
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hyperbagel.flow.path import interpolate

Coupling = Literal["paired", "independent", "reflowed", "tdm"]
COUPLINGS: tuple[Coupling, ...] = ("paired", "independent", "reflowed", "tdm")


class Coupled(NamedTuple):
    """x_tau and the velocity that the fake model learns there, [B, N, C]; weight [B, 1, 1] of its squared error."""

    x_tau: Tensor
    velocity: Tensor
    weight: Tensor


def couple(kind: Coupling, x0: Tensor, x_T: Tensor, x_s: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> Coupled:
    """A trajectory coupled with noise at time tau. x0, x_T, x_s, noise [B, N, C]; s < tau, each [B].

    x0: the trajectory's end, or the generator's x0_hat; x_T: its start; x_s: its state at s, used by `tdm` alone.
    """
    t = tau[:, None, None]
    if kind == "tdm":
        return _renoised(x_s, s[:, None, None], t, noise)
    e = noise if kind == "independent" else x_T
    return Coupled(interpolate(x0, e, t), e - x0, torch.ones_like(t))  # 3.2.3: target x_T - x_0


def _renoised(x_s: Tensor, s: Tensor, tau: Tensor, n: Tensor) -> Coupled:
    """x_tau = a x_s + c n with a = (1 - tau) / (1 - s), c^2 = tau^2 - a^2 s^2: if x_s is a marginal of the path, so is x_tau.

    The score of x_tau is -E[n | x_tau] / c, and -E[e | x_tau] / tau for the path's own noise e. So the fake model learns e = tau n / c, as
    the velocity v = (e - x_tau) / (1 - tau). Around its mean that target has variance (S / (1 - s)^2) (tau / c)^2 / D (unit Gaussian data;
    S = (1 - s)^2 + s^2, D = (1 - tau)^2 + tau^2): far more than the usual target where s is near 1 or tau near s. The weight is the inverse
    of that but for D, so that all levels count alike; at s = 0 it is 1, and this is the independent coupling.
    """
    a, c = renoise_factors(s, tau)
    x = a * x_s + c * n
    v = (tau / c * n - x) / (1 - tau).clamp_min(1e-4)
    return Coupled(x, v, (c / tau).square() * (1 - s).square() / ((1 - s).square() + s.square()))


def renoise_factors(s: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """(a, c) of x_tau = a x_s + c n; s <= tau. tau = s gives (1, 0)."""
    a = (1 - tau) / (1 - s).clamp_min(1e-6)
    return a, (tau.square() - (a * s).square()).clamp_min(1e-12).sqrt()


def fake_loss(v_fake: Tensor, target: Coupled) -> Tensor:
    """Weighted mean of |v_fake - v|^2 at x_tau; no gradient into the trajectory."""
    return (target.weight * (v_fake.float() - target.velocity.detach().float()).square()).mean()


def dmd_gradient(x0_hat: Tensor, x0_fake: Tensor, x0_real: Tensor, floor: float = 0.1, normalise: bool = True) -> Tensor:
    """g = (x0_fake - x0_real) / mean|x0_hat - x0_real| per sample, normaliser at least `floor`. Zero where fake equals real."""
    g = x0_fake - x0_real
    if not normalise:
        return g
    size = (x0_hat - x0_real).abs().flatten(1).mean(1).clamp_min(floor)
    return g / size[:, None, None]


def dmd_loss(x0_hat: Tensor, gradient: Tensor) -> Tensor:
    """1/2 |x0_hat - sg(x0_hat - g)|^2, mean over samples and values: its gradient by x0_hat is g / (B N C)."""
    target = (x0_hat - gradient).detach()
    return 0.5 * (x0_hat.float() - target.float()).square().mean()


def contraction(times: Tensor, std: float = 1.0) -> Tensor:
    """Where DMDO to the letter (`paired`) comes to rest on a scalar Gaussian: the student's std over the teacher's.

    times: levels tau, of equal weight. Teacher data N(0, std^2), student x0 = a x_T. At x_tau = ((1 - tau) a + tau) x_T the fake model
    knows x0_fake = a x_T; the real one, trained on independent noise, gives x0_real = (1 - tau) std^2 / D x_tau with
    D = (1 - tau)^2 std^2 + tau^2. So

        g / x_T = (a tau^2 - (1 - tau) tau std^2) / D,    E[g x_T] = 0  at  a = std^2 E[tau (1 - tau) / D] / E[tau^2 / D].

    std 1, tau = u uniform in [0.02, 0.98]: 0.594; the same with shift 3: 0.351; u in [0, 1]: pi / 2 - 1 = 0.571.
    """
    spread = (1 - times).square() * std**2 + times.square()
    return std * (times * (1 - times) / spread).mean() / (times.square() / spread).mean()
