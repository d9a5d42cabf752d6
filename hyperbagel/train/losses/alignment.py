"""Representation alignment (REPA, Yu et al., ICLR 2025): noise tokens must already tell, half way up the network, what a picture will show.

ours, not in the Hyper-Bagel paper: a flow model trained from nothing spends most of its time on finding out what words look like. A vision
encoder that knows it says so directly.

Shape legend: N noise tokens, F = Q V values: Q patches of the encoder (width V) that one latent token covers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Hidden states [N, E] to predicted features [N, F]; thrown away after training."""

    def __init__(self, hidden: int, features: int) -> None:
        super().__init__(nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, features))


def alignment_loss(predicted: Tensor, features: Tensor, width: int) -> Tensor:
    """1 - mean cosine between predicted and seen features, patch by patch (REPA, eq. 6, with cosine as its similarity). No gradient
    reaches `features`. Both [N, F], F a multiple of `width`; not empty."""
    p, f = (x.float().unflatten(1, (-1, width)) for x in (predicted, features.detach()))  # [N, Q, V]
    return 1 - F.cosine_similarity(p, f, dim=-1).mean()
