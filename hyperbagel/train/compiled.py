"""Decoder layers through PyTorch's compiler, for training: norms, rotations and gates become few passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch._dynamo
import torch.compiler
from torch import nn

from hyperbagel.model.qwen2_mot import Sight, Streams
from hyperbagel.nn.attention import attend

# entries a kind of row (text, latents, both), grad mode and piece, on all of which one Python function is compiled
_VARIANTS = 128


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward in place, for any length of rows; all layers share what was compiled. Measured on a CPU with bf16
    units: 1.5 to 0.86 s a step. A layer with a cache (sampling) runs as it is written."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    apart = torch._dynamo.disable(attend)  # with two free lengths in one product inductor fails; nothing to fuse there
    for layer in layers:
        assert isinstance(layer.self_attn, nn.Module)
        layer.self_attn.attend = apart
        layer.forward = _forward(layer.forward)


def _forward(written: Callable[[Streams, Sight, int, str], Streams]) -> Callable[[Streams, Sight, int, str], Streams]:
    fast: Any = torch.compile(written, dynamic=True)

    def forward(x: Streams, sight: Sight, layer: int, wanted: str = "ug") -> Streams:
        # only a cache asks which layer it is, and a number that differs would compile the layers apart
        return written(x, sight, layer, wanted) if sight.cache is not None else fast(x, sight, 2, wanted)

    return forward


def uncompiled() -> AbstractContextManager[None]:
    """Compiled layers run as they are written in here: sampling has many shapes that training never sees, and each would be compiled anew.

    A sheet of samples took 6 s so and more than 90 s compiled (one AMX core).
    """
    return torch.compiler.set_stance("force_eager")
