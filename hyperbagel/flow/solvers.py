"""Euler's method along a schedule. It sets no grad mode: training differentiates through it, inference wraps it in inference_mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (x_t [B, N, C], t) -> v [B, N, C]


def euler_steps(x: Tensor, velocity: Velocity, times: Tensor) -> Iterator[tuple[int, Tensor]]:
    """x_{t'} = x_t - v(x_t, t) (t - t') along falling `times`. Yields (k, x) after each of the len(times) - 1 updates, k from 0."""
    for k in range(len(times) - 1):
        t, s = times[k], times[k + 1]
        x = x - velocity(x, float(t)) * (t - s).to(x.device)
        yield k, x


def euler(x: Tensor, velocity: Velocity, times: Tensor) -> Tensor:
    """The last state of `euler_steps`."""
    for _, state in euler_steps(x, velocity, times):
        x = state
    return x
