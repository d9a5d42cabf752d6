"""Fresh weights for training from nothing."""

from __future__ import annotations

import torch
from torch import nn

from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.qwen2_mot import DecoderLayer


def fresh_bagel(config: BagelConfig, generator: torch.Generator, std: float = 0.02) -> Bagel:
    """Normal(0, std) matrices, residual outputs scaled by 1 / sqrt(2 layers) (GPT-2), velocity head at zero; norms 1, biases 0."""
    model = Bagel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            continue
        if parameter.ndim < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            continue
        width = std
        if name.startswith(("vit_model", "connector", "vae2llm")):
            width = parameter.shape[1] ** -0.5 if "position" not in name else std
        if name.endswith(("o_proj.weight", "o_proj_moe_gen.weight", "down_proj.weight")):
            width = std / (2 * config.llm.num_hidden_layers) ** 0.5
        if name.endswith(("out_proj.weight", "mlp.fc2.weight")):
            width = parameter.shape[1] ** -0.5 / (2 * config.vit.layers_used) ** 0.5
        if name.startswith("llm2vae"):
            width = 0.0
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    return model


@torch.no_grad()
def shrink_writes(model: Bagel, factor: float) -> None:
    """Divides what the understanding expert's layers add to the residual stream by `factor`, in place.

    A repair for weights that grew in training until the stream after layer 0 was a thousand times its input. Later layers then see again
    what a picture's tokens brought in, and the final norm hides the change of scale, so that text hardly changes.
    """
    for layer in model.language_model.model.layers:
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.o_proj.weight.div_(factor)
        for linear in (layer.mlp.up_proj, layer.mlp.down_proj):  # bilinear in the two, so each takes the root
            linear.weight.div_(factor**0.5)
