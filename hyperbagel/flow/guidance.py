"""BAGEL's nested classifier-free guidance (Ho and Salimans 2022) over two dropped contexts, with its three renormalisations.

Shape legend: B samples, N latent tokens, C values of a token. Padding tokens must hold zeros in every velocity.

    u = v_t + s_t (v - v_t)       v_t: text dropped
    w = v_i + s_i (u - v_i)       v_i: images dropped
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Renorm = Literal["global", "channel", "text_channel"]
RENORMS: tuple[Renorm, ...] = ("global", "channel", "text_channel")


def guide(
    v: Tensor,
    v_text: Tensor | None,
    v_image: Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm: Renorm = "global",
    renorm_min: float = 0.0,
) -> Tensor:
    """The guided velocity, all [B, N, C].

    `v_text` is needed if text_scale > 1, and `v_image` if image_scale > 1 as well. Without text guidance image guidance is off too,
    as in the reference. `global` takes its norm over one sample (the reference takes it over the whole batch).
    """
    if text_scale <= 1 or v_text is None:
        return v
    return _guided(v, v_text, v_image if image_scale > 1 else None, text_scale, image_scale, renorm, renorm_min)


def guide_each(
    v: Tensor,
    v_text: Tensor,
    v_image: Tensor | None,
    text_scale: Tensor,
    image_scale: Tensor,
    guided: Tensor,
    renorm: Renorm = "global",
    renorm_min: float = 0.0,
) -> Tensor:
    """`guide` with scales [B], one per sample, in a single call; a sample whose `guided` [B] is False keeps its v. Returns [B, N, C]."""
    s_t, s_i = text_scale[:, None, None], image_scale[:, None, None]
    u = _guided(v, v_text, None, s_t, s_i, renorm, renorm_min)
    if v_image is not None:
        u = torch.where(s_i > 1, _guided(v, v_text, v_image, s_t, s_i, renorm, renorm_min), u)
    return torch.where(guided[:, None, None] & (s_t > 1), u, v)


def _guided(
    v: Tensor,
    v_text: Tensor,
    v_image: Tensor | None,
    text_scale: float | Tensor,
    image_scale: float | Tensor,
    renorm: Renorm,
    renorm_min: float,
) -> Tensor:
    """Text guidance, then image guidance unless `v_image` is None. Scales: numbers, or [B, 1, 1]."""
    u = v_text + text_scale * (v - v_text)
    if renorm == "text_channel":
        u = u * _ratio(v, u, (-1,), renorm_min)
    if v_image is not None:
        u = v_image + image_scale * (u - v_image)
    if renorm == "channel":
        u = u * _ratio(v, u, (-1,), renorm_min)
    if renorm == "global":
        u = u * _ratio(v, u, (-2, -1), renorm_min)
    return u


def _ratio(v: Tensor, u: Tensor, dims: tuple[int, ...], floor: float) -> Tensor:
    """|v| / |u| over `dims`, clamped to [floor, 1]: guidance may turn a velocity, never lengthen it."""
    norm_v, norm_u = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (v, u))
    return (norm_v / (norm_u + 1e-8)).clamp(floor, 1.0)


def guidance_on(t: float, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at time t (after the shift): lo < t <= hi of `interval`."""
    return interval[0] < t <= interval[1]
