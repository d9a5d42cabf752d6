"""One layer's attention alone, as the package calls it and in equivalent forms, to see which kernel a mask or grouped heads lead to.

Shape legend: B rows, Hq query and Hk key-value heads, G = Hq / Hk, D values of a head, n new tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cost import Cost
from benchmarks.operation import Operation
from hyperbagel.model.bagel import Bagel
from hyperbagel.nn.attention import attend

STEP_WAYS = ("no mask", "mask", "mask, heads repeated")
DECODE_WAYS = ("no mask", "mask", "mask, groups as queries")


def step_attention(model: Bagel, way: str, n: int, past: int) -> Operation:
    """Two branches of a guided step with `past` and 0 cached tokens, whose lengths need a mask. Without a mask both have `past`."""
    llm, slots = model.config.llm, past + n
    q, k, v = _random(model, 2, n, slots)
    ends = torch.tensor([slots, n], device=q.device)[:, None]
    mask = (torch.arange(slots, device=q.device) < ends)[:, None, None, :]  # [B, 1, 1, K]
    flops = 4 * n * (slots + (slots if way == "no mask" else n)) * llm.num_attention_heads * llm.head_dim
    calls: dict[str, Callable[[], Tensor]] = {
        "no mask": lambda: attend(q, k, v),
        "mask": lambda: attend(q, k, v, mask),
        "mask, heads repeated": lambda: attend(q, repeated(k, q), repeated(v, q), mask),
    }
    return Operation(calls[way], Cost(flops, 2 * k.numel() * k.element_size()), "matmul", {"rows": 2, "new": n, "past": past})


def decode_attention(model: Bagel, way: str, rows: int, past: int) -> Operation:
    """One query per row over `past` keys; with a mask, each row sees one fewer than the row before."""
    q, k, v = _random(model, rows, 1, past)
    mask = (torch.arange(past, device=q.device) < past - torch.arange(rows, device=q.device)[:, None])[:, None, None, :]
    llm = model.config.llm
    flops = 4 * rows * past * llm.num_attention_heads * llm.head_dim
    calls: dict[str, Callable[[], Tensor]] = {
        "no mask": lambda: attend(q, k, v),
        "mask": lambda: attend(q, k, v, mask),
        "mask, groups as queries": lambda: folded(q, k, v, mask),
    }
    return Operation(calls[way], Cost(flops, 2 * k.numel() * k.element_size()), "copy", {"rows": rows, "past": past})


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """[B, Hk, K, D] -> [B, Hq, K, D], for kernels without support for grouped heads."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """For one query per row: the G heads of a group see the same keys and the same mask, so they can act as G queries of one head."""
    b, hq, _, d = q.shape
    return attend(q.view(b, k.shape[1], hq // k.shape[1], d), k, v, mask).reshape(b, hq, 1, d)


def _random(model: Bagel, rows: int, new: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    llm = model.config.llm
    generator = None if model.device.type == "meta" else torch.Generator(model.device).manual_seed(0)

    def one(heads: int, tokens: int) -> Tensor:
        return torch.randn(rows, heads, tokens, llm.head_dim, generator=generator, device=model.device, dtype=model.dtype)

    return one(llm.num_attention_heads, new), one(llm.num_key_value_heads, slots), one(llm.num_key_value_heads, slots)
