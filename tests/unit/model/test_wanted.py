"""What a forward leaves out of its last layer changes nothing of what it returns and keeps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))
from parity_world import make_parts

from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache


@pytest.fixture(scope="module")
def model():
    return make_parts().model


def forward(model, wanted: str, mask: str = "none", taps: tuple[int, ...] = (), g: bool = True) -> tuple[Streams, KVCache]:
    """Two rows behind contexts of five and of three tokens, with other tokens in each; u [2, 2, E] and g [2, 4, E]."""
    draws = torch.Generator().manual_seed(3)
    context, u, latents = (torch.randn(2, n, model.config.llm.hidden_size, generator=draws) for n in (5, 2, 4))
    cache = model.new_cache(2, taps)
    model.backbone(
        Streams(context, None), torch.arange(5).expand(2, -1), cache=cache, plan=cache.plan([5, 5 if mask == "none" else 3], causal=True)
    )
    cache.advance([5, 5 if mask == "none" else 3])
    n = 6 if g else 2
    plan = cache.plan([n, n], causal=not g)
    where = torch.full((2, n), 7)
    out = model.backbone(Streams(u, latents if g else None), where, cache=cache, plan=plan, wanted=wanted)
    cache.advance([n, n])
    return out, cache


@pytest.mark.parametrize("mask", ["none", "rows of two lengths"])
@pytest.mark.parametrize(("wanted", "g"), [("g", True), ("u", True), ("", True), ("", False)])
@torch.inference_mode()
def test_the_rest_is_as_before(model, wanted: str, g: bool, mask: str) -> None:
    whole, kept = forward(model, "ug", mask, g=g)
    part, cache = forward(model, wanted, mask, g=g)
    for name, mine, theirs in (("u", part.u, whole.u), ("g", part.g, whole.g)):
        if name in wanted:
            torch.testing.assert_close(mine, theirs)
        else:
            assert mine is None
    for mine, theirs in zip((*cache.k, *cache.v), (*kept.k, *kept.v), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("kind", ["a text", "a picture and a text", "with latents"])
@torch.inference_mode()
def test_the_last_token_alone(model, kind: str, past: int) -> None:
    """It sees what it sees among the others, causal or behind a mask; keys and values of all are kept."""
    draws = torch.Generator().manual_seed(5)
    context, u, g = (torch.randn(1, n, model.config.llm.hidden_size, generator=draws) for n in (5, 4, 2))
    own = torch.tensor(
        [0, 0, 1, 2, 1, 1] if kind == "with latents" else [0, 0, 1, 2]
    )  # the last token sees the latents, the one before it too

    def run(wanted: str) -> tuple[torch.Tensor, KVCache]:
        cache = model.new_cache()
        if past:
            model.backbone(Streams(context, None), torch.arange(5)[None], cache=cache, plan=cache.plan([5], causal=True))
            cache.advance([5])
        plan = cache.plan([4], causal=True) if kind == "a text" else cache.plan_blocks(own)
        x, where = Streams(u, g if kind == "with latents" else None), past + torch.arange(len(own))[None]
        out = model.backbone(x, where, cache=cache, plan=plan, wanted=wanted)
        assert (out.g is None) is (wanted == "last" or x.g is None)
        return out.u, cache

    (last, kept), (whole, cache) = run("last"), run("ug")
    assert last.shape == (1, 1, model.config.llm.hidden_size)
    torch.testing.assert_close(last, whole[:, -1:])
    for mine, theirs in zip((*kept.k, *kept.v), (*cache.k, *cache.v), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wanted", ["u", "g"])
@torch.inference_mode()
def test_each_stream_keeps_its_own_rows_of_a_mask(model, wanted: str) -> None:
    draws = torch.Generator().manual_seed(4)
    u, g = (torch.randn(1, n, model.config.llm.hidden_size, generator=draws) for n in (3, 4))
    mask = (torch.rand(1, 1, 7, 7, generator=draws) < 0.5) | torch.eye(7, dtype=torch.bool)

    def run(streams: str) -> Streams:
        cache = model.new_cache()
        plan = replace(cache.plan([7], causal=False), mask=mask)
        return model.backbone(Streams(u, g), torch.arange(7)[None], cache=cache, plan=plan, wanted=streams)

    torch.testing.assert_close(getattr(run(wanted), wanted), getattr(run("ug"), wanted))


@torch.inference_mode()
def test_hidden_states_that_are_kept_are_computed(model) -> None:
    """A drafter may read what leaves the last layer, and a discriminator every layer's."""
    layers = model.config.llm.num_hidden_layers
    (_, kept), (_, cache) = (forward(model, wanted, taps=(1, layers)) for wanted in ("ug", ""))
    for mine, theirs in zip(cache.tapped, kept.tapped, strict=True):
        assert torch.equal(mine, theirs) and mine[:, :, 5:11].abs().sum() > 0
