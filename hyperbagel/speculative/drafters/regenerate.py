"""Contexts for a drafter's training, from planned samples; the target itself answers them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hyperbagel.data.plan import Sample, Text, VitImage
from hyperbagel.data.transforms import to_tensor
from hyperbagel.generate.session import Parts, Session


@torch.no_grad()
def context_of(parts: Parts, sample: Sample, taps: Sequence[int]) -> Session | None:
    """The session before a sample's first answer, with `taps` kept; None if the sample holds no answer."""
    if not any(isinstance(item, Text) and item.loss for item in sample):
        return None
    session = Session(parts, parts.model.new_cache(taps=taps))
    for item in sample:
        if isinstance(item, Text):
            if item.loss:
                return session
            session.add_text(parts.tokenizer.decode(item.ids))
        elif isinstance(item, VitImage):
            session.add_blocks([session.vit_block(to_tensor(item.pixels))])  # a plan's pixels are already resized
        elif not item.loss:  # a picture to be drawn is not context
            session.add_blocks([session.latent_block(to_tensor(item.pixels), None)])
    return session
