"""Linear weights by columns: other strides, the same numbers."""

from __future__ import annotations

import torch
from torch import nn

from hyperbagel.nn.layers import MLP, store_by_columns


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
