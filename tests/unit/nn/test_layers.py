"""Small layers as they are served: other strides, fewer calls, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperbagel.nn.layers import MLP, RMSNorm, rope_table, rotate
from hyperbagel.nn.projections import store_by_columns


def test_columns_change_strides_alone() -> None:
    torch.manual_seed(0)
    mlp, x = MLP(24, 40), torch.randn(5, 24)
    before, out = {name: value.clone() for name, value in mlp.state_dict().items()}, mlp(x)
    kept = [id(p) for p in mlp.parameters()]
    for _ in range(2):  # a second time changes nothing
        store_by_columns(mlp)
        assert mlp.up_proj.weight.stride() == (1, 40) and mlp.down_proj.weight.stride() == (1, 24)
        assert [id(p) for p in mlp.parameters()] == kept  # who shares a parameter still does
        assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
        assert torch.allclose(mlp(x), out, atol=1e-6)


def test_other_types_stay_as_they_lie() -> None:
    layer = nn.Linear(8, 4).bfloat16()
    store_by_columns(layer)
    assert layer.weight.is_contiguous()


@pytest.mark.parametrize("size", [6, 64])
def test_served_norm_is_the_trained_one(size: int) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(size, 1e-6)
    torch.nn.init.uniform_(norm.weight, -2.0, 2.0)
    x = torch.randn(3, 5, size) * torch.tensor([1e-4, 1.0, 300.0])[:, None, None]
    x[0, 0] = 0.0
    with torch.no_grad():
        served = norm(x)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(served.double(), want, atol=1e-6, rtol=2e-6)
    torch.testing.assert_close(norm(x).double(), want, atol=1e-6, rtol=2e-6)


def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    torch.manual_seed(0)
    x, positions, theta = torch.randn(2, 3, 2, 8, dtype=torch.float64), torch.tensor([[0, 1, 2], [5, 7, 7]]), 100.0
    cos, sin = rope_table(positions, 8, theta, torch.float64)
    a, b = x.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(
        torch.ones(2, 3, 1, 4, dtype=torch.float64), positions[..., None, None] * theta ** (-torch.arange(4, dtype=torch.float64) / 4)
    )
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], dim=-1), atol=2e-6, rtol=2e-6)


def test_a_first_norm_among_other_defaults_spoils_no_later_one() -> None:
    norm, x = RMSNorm(6, 3e-4), torch.randn(2, 6)
    with torch.no_grad():
        for surroundings in (torch.device("meta"), torch.device("cpu")):
            with surroundings:
                torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 3e-4).sqrt())
