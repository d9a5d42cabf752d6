"""One attention for the whole project.

Shape legend: B rows, Hq query heads, Hk key-value heads (Hq a multiple of Hk), Sq new tokens, Sk visible keys, D values of a head.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.nn.layers import quick

BACKENDS = ("sdpa", "reference", "flash")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(D)) v with grouped heads.

    q [B, Hq, Sq, D], k and v [B, Hk, Sk, D] -> [B, Hq, Sq, D]. `mask` is a bool tensor, True where a key is seen, that broadcasts to
    [B, 1, Sq, Sk], or a flex BlockMask (which then picks the kernel). `causal` aligns bottom right: the last query sees every key.
    Give at most one of the two.
    """
    assert not (causal and mask is not None), "give a mask or causal, not both"
    if backend == "reference":
        return reference(q, k, v, causal_mask(q.shape[2], k.shape[2], q.device) if causal else mask)
    if backend == "flash" and mask is None:
        return _flash(q, k, v, causal)
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        kernel = torch.compile(flex_attention) if q.is_cuda else flex_attention
        return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if causal and q.shape[2] > 1 and q.shape[2] != k.shape[2]:
        # SDPA's own causal flag aligns top left, which is wrong after a cache.
        mask, causal = causal_mask(q.shape[2], k.shape[2], q.device), False
    causal = causal and q.shape[2] > 1
    if q.device.type == "cpu" and mask is not None and torch.is_grad_enabled() and q.requires_grad:
        return plain(q, k, v, mask)
    if q.is_cuda and mask is not None and q.shape[1] != k.shape[1]:
        return without_groups(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def prepared(mask: Any, causal: bool, sq: int, sk: int, like: Tensor, backend: str) -> tuple[Any, bool]:
    """The mask and causal flag of a forward of sq new tokens over sk keys, as `attend` needs them: converted once, not in every layer.

    In fp32 inference on a CPU a bool mask becomes numbers to add, 0 or -inf, which PyTorch would otherwise make of it in every call.
    `like`: any tensor of the forward.
    """
    if causal and backend == "sdpa" and 1 < sq < sk:
        mask, causal = causal_mask(sq, sk, like.device), False
    if isinstance(mask, Tensor) and backend == "sdpa" and quick(like):
        mask = like.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return mask, causal


class _Readers:
    """How many threads are inside `readers`, and the setting to restore: cuDNN's switch is process-wide, a server has a thread per GPU."""

    lock, inside, before = threading.Lock(), 0, True


@contextmanager
def readers() -> Iterator[None]:
    """Switches cuDNN's attention off around text-only forwards on a GPU. It makes a new plan for every number of keys (a tenth of a second
    on an H200), and a growing answer has a new number at each token. Pictures keep their sizes, so their plans are reused."""
    with _Readers.lock:
        if _Readers.inside == 0:
            _Readers.before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _Readers.inside += 1
    try:
        yield
    finally:
        with _Readers.lock:
            _Readers.inside -= 1
            if _Readers.inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(_Readers.before)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The slow definition, in at least fp32, that every backend is tested against."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / q.shape[-1] ** 0.5  # [B, Hq, Sq, Sk]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same attention as two batched matrix products in the inputs' own dtype, for training on a CPU, where the backward pass of
    PyTorch's fused kernel is up to five times slower (bf16, rows of 30 to 300 tokens)."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, Hk, groups, Sq, D]
    scores = grouped @ k.unsqueeze(2).mT * q.shape[-1] ** -0.5  # [B, Hk, groups, Sq, Sk]
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf")).unsqueeze(-3)
    weights = (scores + bias).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def without_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same attention with as many key-value heads as query heads: PyTorch's fused CUDA kernels take a mask or groups, not both.

    With one query per row, the heads of a group become the queries of one head and nothing is copied; otherwise keys and values are
    repeated.
    """
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:
        folded = q.unflatten(1, (k.shape[1], groups)).squeeze(3)  # [B, Hk, groups, D]
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).flatten(1, 2).unsqueeze(2)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(sq: int, sk: int, device: torch.device) -> Tensor:
    """bool [Sq, Sk], aligned bottom right. Two new tokens after three cached ones:

    1 1 1 1 .
    1 1 1 1 1
    """
    return torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError for a backend that is unknown, or unusable on this device with this dtype."""
    if backend not in BACKENDS:
        raise InputError(f"got attention {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise InputError("got attention 'flash', but flash-attn is not installed; install it or use sdpa")
        if device.type != "cuda" or dtype == torch.float32:
            raise InputError(f"got attention 'flash' with {dtype} on {device.type}, expected bfloat16 on a GPU; use sdpa")


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
    return out.transpose(1, 2)
