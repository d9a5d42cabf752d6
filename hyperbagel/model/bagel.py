"""BAGEL: embed, backbone, heads. No loops over steps or tokens here; those live in generate and train.

Shape legend: B rows, Su / Sg tokens of the understanding / generation stream, E hidden size, C values of a latent token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperbagel.core.types import PackedBatch
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.qwen2_mot import Qwen2ForCausalLM, Streams
from hyperbagel.model.siglip import SiglipVisionModel
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.nn.layers import TimestepEmbedder, sincos_table
from hyperbagel.nn.masks import dense_mask
from hyperbagel.nn.quantized import Codes


class TrainOutput(NamedTuple):
    ce: Tensor  # [Nce], unreduced cross entropy
    mse: Tensor  # [Nmse, C], unreduced squared error of the velocity
    velocity: Tensor  # [Ng, C]


class Connector(nn.Module):
    """Two-layer MLP from the ViT's width to the language model's: [..., inner] -> [..., size]."""

    def __init__(self, inner: int, size: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inner, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FixedTable(nn.Module):
    """A fixed sin-cos table that checkpoints store as a tensor: positions [...] -> [..., size]."""

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        table = torch.empty(side * side, size)
        # On the meta device values do not matter, and computing them there imports PyTorch's compiler: seconds of start-up.
        self.pos_embed = nn.Parameter(table if table.is_meta else sincos_table(side, size), requires_grad=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.pos_embed[positions]


class Bagel(nn.Module):
    """The model of ema.safetensors; the autoencoder is a module of its own (model.vae). `attention`: one of nn.attention.BACKENDS."""

    def __init__(self, config: BagelConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.codes: Codes | None = None  # how the decoder's matrices are stored; None: as numbers of the model's dtype
        e, opt = config.llm.hidden_size, config.options
        self.language_model = Qwen2ForCausalLM(config.llm, attention)
        self.vit_model = SiglipVisionModel(config.vit)
        self.connector = Connector(config.vit.hidden_size, e)
        self.vit_pos_embed = FixedTable(opt.vit_max_num_patch_per_side, e)
        self.time_embedder = TimestepEmbedder(e)
        self.vae2llm = nn.Linear(config.latent_channels, e)
        self.llm2vae = nn.Linear(e, config.latent_channels)
        self.latent_pos_embed = FixedTable(opt.max_latent_size, e)

    @property
    def dtype(self) -> torch.dtype:
        return self.vae2llm.weight.dtype

    @property
    def precision(self) -> str:
        """What `dtype` of HyperBagel.from_pretrained says."""
        return self.codes or str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        return self.vae2llm.weight.device

    def new_cache(self, rows: int = 1, taps: Sequence[int] = ()) -> KVCache:
        """An empty cache. `taps`: layers whose incoming hidden states it also keeps, for a drafter."""
        llm = self.config.llm
        return KVCache(
            llm.num_hidden_layers,
            llm.num_key_value_heads,
            llm.head_dim,
            rows=rows,
            device=self.device,
            dtype=self.dtype,
            taps=taps,
            width=llm.hidden_size,
        )

    def embed_text(self, ids: Tensor) -> Tensor:
        """[...] -> [..., E]."""
        return self.language_model.model.embed_tokens(ids)

    def embed_vit(self, patches: Tensor, positions: Tensor, lens: Sequence[int]) -> Tensor:
        """patches [Nv, P], positions [Nv], patches per image -> [Nv, E]."""
        features = self.vit_model(patches.to(self.dtype), positions, lens)
        return self.connector(features) + self.vit_pos_embed(positions)

    def embed_latent(self, x: Tensor, t: Tensor, positions: Tensor) -> Tensor:
        """Latent tokens x [..., C] at time t [...] (0: clean) and grid positions [...] -> [..., E]."""
        return self.vae2llm(x.to(self.dtype)) + self.time_embedder(t) + self.latent_pos_embed(positions)

    def backbone(self, x: Streams, positions: Tensor, **how: Any) -> Streams:
        """Hidden states after the final norms; see Qwen2MoT.forward."""
        return self.language_model.model(x, positions, **how)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return self.language_model.lm_head(hidden)

    def velocity(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., C], in fp32 so that the sampler's state never leaves fp32."""
        return self.llm2vae(hidden).float()

    def embed_packed(self, batch: PackedBatch) -> Streams:
        """The two streams [B, Su, E] and [B, Sg, E] of a packed batch; latents are noised to their own t."""
        rows, e = batch.rows, self.config.llm.hidden_size
        # Under autocast embeddings stay fp32 while projections come out in bf16: both streams take the embeddings' dtype.
        text = self.embed_text(batch.text_ids)
        u = text.new_zeros(rows * batch.su, e).index_copy(0, batch.text_slots, text)
        if batch.vit_lens:
            seen = self.embed_vit(batch.vit_patches, batch.vit_positions, batch.vit_lens)
            u = u.index_copy(0, batch.vit_slots, seen.to(u.dtype))
        g = None
        if batch.sg:
            t = batch.timesteps.unsqueeze(-1)
            x_t = (1 - t) * batch.latents + t * batch.noise
            latent = self.embed_latent(x_t, batch.timesteps, batch.latent_positions)
            g = text.new_zeros(rows * batch.sg, e).index_copy(0, batch.latent_slots, latent.to(u.dtype)).unflatten(0, (rows, batch.sg))
        return Streams(u.unflatten(0, (rows, batch.su)), g)

    def forward_train(
        self, batch: PackedBatch, mask: Any = None, backend: str | None = None, taps: list[Streams] | None = None
    ) -> TrainOutput:
        """The mixed objective's forward: next-token cross entropy and velocity error (v = e - x0), neither reduced.

        taps: collects the output of every layer.
        """
        seen_mask = dense_mask(batch) if mask is None else mask
        hidden = self.backbone(self.embed_packed(batch), batch.positions, mask=seen_mask, backend=backend, taps=taps)
        assert hidden.u is not None
        logits = self.logits(hidden.u.flatten(0, 1)[batch.ce_slots])
        ce = F.cross_entropy(logits.float(), batch.ce_labels, reduction="none")
        if hidden.g is None:
            nothing = ce.new_zeros(0, self.config.latent_channels)
            return TrainOutput(ce, nothing, nothing)
        v = self.velocity(hidden.g.flatten(0, 1)[batch.latent_slots])
        error = v[batch.mse_index] - (batch.noise - batch.latents)[batch.mse_index]
        return TrainOutput(ce, error.square(), v)
