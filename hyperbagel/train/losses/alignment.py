"""Representation alignment (REPA, Yu et al., ICLR 2025): halfway up the network, noise tokens must already tell what the picture will show.

ours, not in the Hyper-Bagel paper: a flow model trained from scratch spends most of its time finding out what words look like. A vision
encoder that knows can tell it directly.

Shape legend: N noise tokens, F = Q V features of one: the encoder's width V for each of the Q autoencoder cells in a latent token.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Hidden states [N, E] to predicted features [N, F]; discarded after training."""

    def __init__(self, hidden: int, features: int) -> None:
        super().__init__(nn.Linear(hidden, 2 * hidden), nn.SiLU(), nn.Linear(2 * hidden, features))


def alignment_loss(predicted: Tensor, features: Tensor, width: int) -> Tensor:
    """1 - the mean cosine between predicted and seen features, cell by cell (REPA, eq. 6, with cosine as its similarity). No gradient
    reaches `features`. Both [N, F] with F a multiple of `width`; not empty."""
    p, f = (x.float().unflatten(1, (-1, width)) for x in (predicted, features.detach()))  # [N, Q, V]
    return 1 - F.cosine_similarity(p, f, dim=-1).mean()
