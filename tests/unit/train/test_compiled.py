"""Layers through the compiler, and out of it again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hyperbagel.train.compiled import compile_layers, uncompiled


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(x) + 1


def test_nothing_is_compiled_where_samples_are_drawn() -> None:
    layer = Layer()
    compile_layers([layer])
    counters.clear()
    with uncompiled():
        assert layer(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert not counters["frames"]
