"""Layers through the compiler, and out of it again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hyperbagel.model.config import LLMConfig
from hyperbagel.model.qwen2_mot import Qwen2MoT, Sight, Streams
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.train.compiled import compile_layers, uncompiled


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Identity()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Streams, sight: Sight, layer: int, wanted: str = "ug") -> Streams:
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


@pytest.mark.parametrize("grad", [False, True])
def test_a_models_own_layers_compile_and_are_asked_as_it_asks_them(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    """Packed rows and a context with a cache, before and after."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda written, dynamic: compiled(written, backend="eager", dynamic=dynamic))
    torch.manual_seed(0)
    config = LLMConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
        max_position_embeddings=32,
    )
    model, u, g = Qwen2MoT(config), torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    where, mask = torch.arange(7).expand(2, -1), torch.ones(7, 7, dtype=torch.bool).tril()

    def results() -> list[Tensor]:
        packed = model(Streams(u, g), where, mask=mask)
        cache = KVCache(2, 1, 8, rows=2, device="cpu", dtype=torch.float32)
        behind = model(Streams(u, None), where[:, :3], cache=cache, plan=cache.plan([3, 3], causal=True), wanted="")
        assert packed.u is not None and packed.g is not None and behind == (None, None)
        return [packed.u, packed.g, *cache.k, *cache.v]

    with torch.set_grad_enabled(grad):
        want = results()
        compile_layers(model.layers)
        for got, wanted in zip(results(), want, strict=True):
            torch.testing.assert_close(got, wanted)
