"""The work of an operation in closed form: floating-point operations, and bytes that must be read.

Only matrix products count (a multiply-add is two operations); norms, rotations and softmax are left out. Bytes are the weights, once, and
each row's keys and values, once: what no implementation can avoid at the given batch.

Shape legend: n new tokens, E hidden size, V hidden size of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from hyperbagel.model.config import BagelConfig, LLMConfig
from hyperbagel.model.vae import AutoEncoder


class Cost(NamedTuple):
    flops: float
    bytes: float


class Widths(NamedTuple):
    """Bytes of a number, and of an entry of the decoder's matrices, which may be stored as codes."""

    number: int
    entry: float


def expert_weights(llm: LLMConfig) -> int:
    """Matrix entries of one expert in all layers, without embedding and head."""
    e, q, kv = llm.hidden_size, llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    return llm.num_hidden_layers * (2 * e * q + 2 * e * kv + 3 * e * llm.intermediate_size)


def last_weights(llm: LLMConfig) -> int:
    """The part of these that is not needed if only a token's keys and values are wanted: the last layer's output projection and MLP."""
    return llm.hidden_size * (llm.num_attention_heads * llm.head_dim + 3 * llm.intermediate_size)


def attention_flops(llm: LLMConfig, queries: float, keys: float, layers: int | None = None) -> float:
    """Scores and weighted values in all layers, or in `layers` of them."""
    return 4 * queries * keys * llm.num_attention_heads * llm.head_dim * (llm.num_hidden_layers if layers is None else layers)


def cache_entries(llm: LLMConfig, slots: float) -> float:
    """Keys and values of `slots` tokens in all layers."""
    return 2 * slots * llm.num_key_value_heads * llm.head_dim * llm.num_hidden_layers


def block(config: BagelConfig, contexts: Sequence[int], understanding: int, latents: int, widths: Widths, *, wanted: bool) -> Cost:
    """One forward over rows with `contexts` cached tokens each and `understanding` + `latents` new tokens each, which see each other.

    A denoising step has (2 markers, n latents) in a row for each picture and branch, and its latents are `wanted`. A picture as context has
    (patches + 2, 0) or (2, n), and nothing but its keys and values is wanted.
    """
    llm, n, out = config.llm, understanding + latents, latents if wanted else 0
    expert, last, ends = expert_weights(llm), last_weights(llm), 2 * config.latent_channels * llm.hidden_size  # into and out of the model
    products = n * expert - (n - out) * last + latents * ends
    flops = sum(
        2 * products + attention_flops(llm, n, past + n, llm.num_hidden_layers - 1) + attention_flops(llm, out, past + n, 1)
        for past in contexts
    )
    weights = (understanding > 0) * (expert - last) + (latents > 0) * (expert - (not wanted) * last)
    return Cost(flops, widths.entry * weights + widths.number * sum(cache_entries(llm, past) for past in contexts))


def text(config: BagelConfig, n: int, widths: Widths) -> Cost:
    """The prefill of n tokens of text without context: causal, for keys and values alone."""
    llm, weights = config.llm, expert_weights(config.llm) - last_weights(config.llm)
    return Cost(2 * n * weights + attention_flops(llm, n, (n + 1) / 2, llm.num_hidden_layers - 1), widths.entry * weights)


def decode(config: BagelConfig, rows: int, past: int, widths: Widths) -> Cost:
    """One token in each of `rows` rows behind `past` cached ones, with the head over the vocabulary."""
    llm = config.llm
    expert, head = expert_weights(llm), llm.vocab_size * llm.hidden_size
    flops = rows * (2 * (expert + head) + attention_flops(llm, 1, past + 1))
    return Cost(flops, widths.entry * expert + widths.number * (head + rows * cache_entries(llm, past)))


def vision(config: BagelConfig, patches: int, width: int) -> Cost:
    """The vision tower and the connector over one picture's patches. width: bytes of a number."""
    vit, e = config.vit, config.llm.hidden_size
    v = vit.hidden_size
    layer = 4 * v * v + 2 * v * vit.intermediate_size
    weights = vit.layers_used * layer + vit.num_channels * vit.patch_size**2 * v + v * e + e * e
    return Cost(2 * patches * weights + 4 * patches**2 * v * vit.layers_used, width * weights)


def autoencoder(config: BagelConfig, size: tuple[int, int], *, encode: bool) -> Cost:
    """Encoder or decoder for one picture of `size` (height, width). Counted on the meta device, since convolutions have no short closed
    form. Weights are fp32 as in the reference."""
    with torch.device("meta"):
        vae = AutoEncoder(config.vae)
        f = config.vae.downsample
        latent = torch.empty(1, config.vae.z_channels, size[0] // f, size[1] // f)
        pixels = torch.empty(1, config.vae.in_channels, *size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        _ = vae.encode(pixels, latent) if encode else vae.decode(latent)
    side = vae.encoder if encode else vae.decoder
    return Cost(counter.get_total_flops(), 4 * sum(p.numel() for p in side.parameters()))
