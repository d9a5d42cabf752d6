"""Decoder layers through PyTorch's compiler, for training: norms, rotations and gates take fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch._dynamo
import torch.compiler
from torch import nn

from hyperbagel.model.qwen2_mot import Sight, Streams
from hyperbagel.nn.attention import attend

# One Python function is compiled anew for each kind of row (text, latents, both), grad mode and piece of a layer; PyTorch's limit is lower.
_VARIANTS = 128


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward in place, for rows of any length; all layers share the compiled code. Measured on a CPU with bf16 units:
    from 1.5 s to 0.86 s per step. With a cache (sampling) a layer runs uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    apart = torch._dynamo.disable(attend)  # inductor fails on a product with two free lengths; nothing to fuse there
    for layer in layers:
        assert isinstance(layer.self_attn, nn.Module)
        layer.self_attn.attend = apart
        layer.forward = _forward(layer.forward)


def _forward(written: Callable[[Streams, Sight, int, str], Streams]) -> Callable[[Streams, Sight, int, str], Streams]:
    fast: Any = torch.compile(written, dynamic=True)

    def forward(x: Streams, sight: Sight, layer: int, wanted: str = "ug") -> Streams:
        # 2 stands for every layer: only a cache asks for the number, and one that changes would compile each layer separately
        return written(x, sight, layer, wanted) if sight.cache is not None else fast(x, sight, 2, wanted)

    return forward


def uncompiled() -> AbstractContextManager[None]:
    """Inside, compiled layers run uncompiled: sampling has many shapes that training never sees, and each would be compiled anew.

    A sheet of samples took 6 s this way and more than 90 s compiled (one AMX core).
    """
    return torch.compiler.set_stance("force_eager")
