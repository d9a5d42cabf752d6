"""What layers keep in which precision, what of them a seed fixes, and what may run where."""

from __future__ import annotations

import pytest
import torch

from hyperbagel.core.errors import InputError
from hyperbagel.flow.guidance import guidance_on
from hyperbagel.nn import attention
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.nn.lora import Adapter, factorise


def test_a_cache_counts_keys_values_taps_and_positions() -> None:
    cache = KVCache(3, 2, 4, rows=2, device="cpu", dtype=torch.float32, taps=(0, 2), width=5)
    cache.reserve(7)
    assert cache.nbytes == 2 * 7 * (2 * 3 * 2 * 4 * 4 + 2 * 5 * 4 + 8)


def test_a_cache_takes_another_type_in_ragged_rows() -> None:
    """As autocast brings it: an index is stricter there than a slice."""
    cache = KVCache(1, 2, 4, rows=2, device="cpu", dtype=torch.float32)
    k = torch.randn(2, 2, 3, 4).bfloat16()
    for counts in ([3, 3], [3, 1]):
        cache.append(0, cache.plan(counts, causal=True), k, k)
        cache.advance(counts)
    got, _ = cache.append(0, cache.plan([2, 2], causal=True), k[:, :, :2], k[:, :, :2])
    assert got.dtype == torch.float32 and torch.equal(got[1, :, 4:6], k[1, :, :2].float())


def test_factors_are_the_same_each_time_and_leave_the_caller_s_draws() -> None:
    change = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(0))
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(factorise(change, 2))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made[0].a, made[1].a) and torch.equal(made[0].b, made[1].b)


def test_a_fresh_lora_is_its_generator_s_and_has_the_type_it_was_asked_for() -> None:
    base = torch.nn.ModuleDict({"x": torch.nn.Linear(8, 6)})
    made = [Adapter(base, ["x"], rank=2, generator=torch.Generator().manual_seed(s), dtype=torch.bfloat16) for s in (1, 1, 2)]
    first, same, other = (one.get_parameter("x.lora_A.weight") for one in made)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert {p.dtype for p in Adapter(base, ["x"], rank=2, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_flash_attention_is_for_bf16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())  # as if it were installed
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with pytest.raises(InputError, match="expected bfloat16 on a GPU"):
            attention.check_backend("flash", torch.device(device), dtype)
    attention.check_backend("flash", torch.device("cuda"), torch.bfloat16)


def test_guidance_is_off_at_the_lower_end_of_its_interval() -> None:
    assert not guidance_on(0.5, (0.5, 1.0)) and guidance_on(1.0, (0.5, 1.0))
