"""The straight path of rectified flow (Liu et al. 2022) and its views. x0 data, e noise, t = 1 is noise; t broadcasts against x.

x_t = (1 - t) x0 + t e        v = dx/dt = e - x0
"""

from __future__ import annotations

from torch import Tensor


def interpolate(x0: Tensor, e: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x0 + t e."""
    return (1 - t) * x0 + t * e


def velocity(x0: Tensor, e: Tensor) -> Tensor:
    """v = e - x0."""
    return e - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """x0 = x_t - t v."""
    return x_t - t * v


def e_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """e = x_t + (1 - t) v."""
    return x_t + (1 - t) * v


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
    """v = (x_t - x0) / t, for t > 0."""
    return (x_t - x0) / t
