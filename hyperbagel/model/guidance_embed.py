"""Guidance scales as inputs of a distilled model (Hyper-Bagel 3.2.1): two more embedders like the timestep's, added in the same place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperbagel.nn.layers import TimestepEmbedder


class GuidanceEmbedders(nn.Module):
    """Text and image scale -> one vector for all latent tokens of a sample. It starts at zero, so that the model starts as the base."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.text, self.image = TimestepEmbedder(size), TimestepEmbedder(size)
        with torch.no_grad():
            for embedder in (self.text, self.image):
                last = embedder.mlp[2]
                assert isinstance(last, nn.Linear)
                last.weight.zero_()
                last.bias.zero_()

    def forward(self, text_scale: Tensor, image_scale: Tensor) -> Tensor:
        """[B], [B] -> [B, 1, E], to be added to the latent embeddings [B, N, E] beside the timestep's (`Bagel.embed_latent`)."""
        return (self.text(text_scale) + self.image(image_scale)).unsqueeze(1)
