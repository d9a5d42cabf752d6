"""Decoder layers through PyTorch's compiler, for training: norms, rotations and gates become few passes over memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch._dynamo
import torch.compiler
from torch import nn

from hyperbagel.nn.attention import attend

# one entry a layer and kind of row (text, latents, both), on all of which one Python function is compiled
_VARIANTS = 128


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward in place, for any length of rows. Measured on a CPU with bf16 units: 1.5 to 0.86 s a step."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for layer in layers:
        assert isinstance(layer.self_attn, nn.Module)
        layer.self_attn.attend = torch._dynamo.disable(attend)  # with two free lengths in one product inductor fails; nothing to fuse there
        layer.compile(dynamic=True)


def uncompiled() -> AbstractContextManager[None]:
    """Compiled layers run as they are written in here: sampling has many shapes that training never sees, and each would be compiled anew.

    A sheet of samples took 6 s so and more than 90 s compiled (one AMX core).
    """
    return torch.compiler.set_stance("force_eager")
