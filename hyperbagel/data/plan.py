"""A training sample as a plan: texts, ViT pictures and VAE pictures in reading order, with loss and dropout flags (BAGEL's data format).

Plans hold nothing but token ids and uint8 pixels, so they are small and quick to pass between processes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Text:
    """im_start + ids + im_end; causal attention. loss: learn ids and im_end by cross-entropy. enable_cfg: dropout may drop it."""

    ids: Sequence[int]
    loss: bool = False
    enable_cfg: bool = False
    tied: bool = False  # dropped if the item before it is, without a draw of its own (a think text goes with its prompt)
    dropped: bool = False  # set by `apply_dropout`


@dataclass(frozen=True, eq=False)
class VitImage:
    """vision_start + patches + vision_end; full attention. pixels: uint8 [H, W, 3], sides multiples of the patch size."""

    pixels: NDArray[np.uint8]
    enable_cfg: bool = False
    dropped: bool = False


@dataclass(frozen=True, eq=False)
class VaeImage:
    """vision_start + latents + vision_end; full attention. pixels: uint8 [H, W, 3], sides multiples of the latent stride.

    loss True: a latent to denoise. Nothing outside its split sees it, and it does not advance RoPE. loss False: a clean picture, t = 0.
    """

    pixels: NDArray[np.uint8]
    loss: bool = False
    enable_cfg: bool = False
    dropped: bool = False


Item: TypeAlias = Text | VitImage | VaeImage
Sample: TypeAlias = list[Item]


@dataclass(frozen=True)
class Dropout:
    """The probability that an item with `enable_cfg` is dropped, so that the model knows guidance's contexts. Defaults are BAGEL's."""

    text: float = 0.1
    vit: float = 0.3
    vae: float = 0.3

    def of(self, item: Item) -> float:
        return self.text if isinstance(item, Text) else self.vit if isinstance(item, VitImage) else self.vae


def apply_dropout(sample: Sample, dropout: Dropout, rng: random.Random) -> Sample:
    """The sample with dropped items marked. Draws `rng.random()` once for each `enable_cfg` item that is not tied, in plan order."""
    result: Sample = []
    for item in sample:
        if isinstance(item, Text) and item.tied:
            dropped = bool(result) and result[-1].dropped
        else:
            dropped = item.enable_cfg and rng.random() < dropout.of(item)
        result.append(replace(item, dropped=dropped))
    return result


def picture_items(image: NDArray[np.uint8], vit: NDArray[np.uint8] | None, *, loss: bool, copies: int = 1, context: bool) -> Sample:
    """The items of one picture in a sequence.

    loss: begin with `copies` noise draws of it, which do not advance RoPE, so that the clean copy follows at their position.
    context: later items see it, as a clean latent and then (if `vit` is given) as ViT patches; both can be dropped.
    """
    items: Sample = [VaeImage(image, loss=True) for _ in range(copies if loss else 0)]
    if context:
        items.append(VaeImage(image, enable_cfg=True))
        if vit is not None:
            items.append(VitImage(vit, enable_cfg=True))
    return items
