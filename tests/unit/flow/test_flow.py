"""Round trips, closed forms and limits of the flow maths."""

import math

import pytest
import torch

from hyperbagel.flow import path
from hyperbagel.flow.guidance import guidance_on, guide, guide_each
from hyperbagel.flow.schedule import segment_bounds, shift_time, time_grid, times_between, unshift_time
from hyperbagel.flow.solvers import euler


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_four_views_of_one_point() -> None:
    x0, e = randn(3, 4), randn(3, 4, seed=1)
    for t in (0.1, 0.5, 0.9):
        x_t, v = path.interpolate(x0, e, t), path.velocity(x0, e)
        torch.testing.assert_close(path.x0_from_velocity(x_t, v, t), x0, atol=1e-14, rtol=0)
        torch.testing.assert_close(path.e_from_velocity(x_t, v, t), e, atol=1e-14, rtol=0)
        torch.testing.assert_close(path.velocity_from_x0(x_t, x0, t), v, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_and_its_inverse(shift: float) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(unshift_time(shift_time(t, shift), shift), t)
    assert shift_time(t, shift)[0] == 0 and shift_time(t, shift)[-1] == 1


def test_grid_counts_updates() -> None:
    grid = time_grid(50, 3.0)
    assert len(grid) == 51 and grid[0] == 1 and grid[-1] == 0 and bool((grid[:-1] > grid[1:]).all())
    assert segment_bounds(3).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_paper_evaluations() -> None:
    """100 for text to image at 50 updates over [0, 1]; 132 = 50 + 2 * 41 for an edit over [0.4, 1] (Hyper-Bagel, section 4)."""
    times = time_grid(50, 3.0)[:-1].tolist()
    assert sum(2 if guidance_on(t, (0.0, 1.0)) else 1 for t in times) == 100
    assert sum(3 if guidance_on(t, (0.4, 1.0)) else 1 for t in times) == 132


def test_euler_on_closed_forms() -> None:
    x = randn(2, 3)
    constant = randn(2, 3, seed=4)
    torch.testing.assert_close(euler(x, lambda x, t: constant, time_grid(7, 3.0).double()), x - constant)
    # dx/dt = x from t = 1 to 0: x(0) = x(1) / e; Euler's error is O(1 / n)
    errors = [float((euler(x, lambda x, t: x, time_grid(n, 1.0).double()) - x / math.e).abs().max()) for n in (100, 200)]
    assert errors[1] < 0.51 * errors[0]


def test_euler_keeps_the_callers_grad_mode() -> None:
    x = randn(2, 3).requires_grad_()
    euler(x, lambda x, t: x, time_grid(3, 1.0).double()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_guidance_limits(renorm) -> None:
    v, v_t, v_i = (randn(2, 5, 4, seed=s) for s in range(3))
    assert torch.equal(guide(v, v_t, v_i, 1.0, 1.0, renorm), v)
    assert torch.equal(guide(v, v_t, v_i, 1.0, 2.0, renorm), v)  # image guidance needs text guidance, as in the reference
    assert torch.equal(guide(v, None, None, 4.0, 2.0, renorm), v)
    torch.testing.assert_close(guide(v, v, v, 4.0, 2.0, renorm), v)  # nothing dropped: nothing to guide by
    together, alone = guide(v, v_t, v_i, 4.0, 2.0, renorm), guide(v[:1], v_t[:1], v_i[:1], 4.0, 2.0, renorm)
    torch.testing.assert_close(together[:1], alone)  # per sample
    plain = guide(v, v_t, v_i, 4.0, 2.0, renorm, renorm_min=1.0)  # a floor of 1 switches renormalisation off
    torch.testing.assert_close(plain, v_i + 2.0 * (v_t + 4.0 * (v - v_t) - v_i))


def test_renormalised_lengths() -> None:
    v, v_t, v_i = (randn(2, 5, 4, seed=s) for s in range(3))
    norm = torch.linalg.vector_norm
    assert bool((norm(guide(v, v_t, v_i, 4.0, 2.0, "channel"), dim=-1) <= norm(v, dim=-1) + 1e-9).all())
    assert bool((norm(guide(v, v_t, v_i, 4.0, 2.0, "global"), dim=(1, 2)) <= norm(v, dim=(1, 2)) + 1e-9).all())
    assert bool((norm(guide(v, v_t, None, 4.0, 1.0, "text_channel"), dim=-1) <= norm(v, dim=-1) + 1e-9).all())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_between_are_a_part_of_the_grid(shift: float) -> None:
    grid = time_grid(6, shift)
    torch.testing.assert_close(times_between(grid[0], grid[-1], 6, shift), grid)
    rows = times_between(grid[:3], grid[2:5], 2, shift)  # two steps of the grid from each of three places
    torch.testing.assert_close(rows, torch.stack([grid[:3], grid[1:4], grid[2:5]]))


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_a_velocity_that_guidance_shortens_stays_short(renorm) -> None:
    v = randn(2, 5, 4)
    torch.testing.assert_close(guide(v, 1.1 * v, None, 4.0, 1.0, renorm), 0.7 * v)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("with_image", [False, True])
def test_samples_of_unlike_scales_are_guided_as_each_alone(renorm, with_image: bool) -> None:
    v, v_t, v_i = (randn(4, 5, 4, seed=s) for s in range(3))
    texts, images, guided = torch.tensor([4.0, 3.0, 1.0, 4.0]), torch.tensor([0.5, 2.0, 2.0, 2.0]), torch.tensor([True, True, True, False])
    got = guide_each(v, v_t, v_i if with_image else None, texts, images, guided, renorm, 0.1)
    for i in range(4):
        one = slice(i, i + 1)
        image = float(images[i]) if with_image else 1.0
        expected = guide(v[one], v_t[one], v_i[one], float(texts[i]), image, renorm, 0.1) if guided[i] else v[one]
        torch.testing.assert_close(got[one], expected)
