"""Layers through the compiler, and out of it again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hyperbagel.model.qwen2_mot import Sight, Streams
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.train.compiled import compile_layers, uncompiled


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Identity()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Streams, sight: Sight, layer: int) -> Streams:
        assert x.u is not None
        return Streams(self.self_attn(x.u) * self.weight + (layer if sight.cache is not None else 0), None)


def run(layers: list[Layer], cache: KVCache | None = None) -> list[list[float]]:
    x, nothing = Streams(torch.ones(3), None), Tensor()
    return [out.u.tolist() for i, layer in enumerate(layers) if (out := layer(x, Sight(nothing, nothing, cache=cache), i)).u is not None]


def test_nothing_is_compiled_where_samples_are_drawn() -> None:
    layer = Layer()
    compile_layers([layer])
    counters.clear()
    with uncompiled():
        assert run([layer]) == [[1.0, 1.0, 1.0]]
    assert not counters["frames"]


def test_layers_share_what_is_compiled_and_a_cache_knows_which_is_which(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def keep(written: Callable[..., Streams], dynamic: bool) -> Callable[..., Streams]:
        made.append(written)
        return written

    monkeypatch.setattr(torch, "compile", keep)
    layers = [Layer() for _ in range(3)]
    compile_layers(layers)
    with torch.no_grad():
        layers[1].weight.fill_(2.0)
    assert len(made) == 3
    assert run(layers) == [[1.0] * 3, [2.0] * 3, [1.0] * 3]  # each its own weights
    cache = KVCache(3, 1, 2, rows=1, device=torch.device("cpu"), dtype=torch.float32)
    assert run(layers, cache) == [[1.0] * 3, [3.0] * 3, [3.0] * 3]  # and with a cache its own number
