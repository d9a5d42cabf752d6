"""Guidance distillation (Hyper-Bagel 3.2.1): one evaluation learns what two or three guided ones say.

Shape legend: B samples, N latent tokens, C values of a token.
"""

from __future__ import annotations

from torch import Tensor

from hyperbagel.flow.guidance import Renorm, guide_each


def guided_target(
    v: Tensor,
    v_text: Tensor,
    v_image: Tensor | None,
    text_scale: Tensor,
    image_scale: Tensor,
    guided: Tensor,
    renorm: Renorm = "global",
    renorm_min: float = 0.0,
) -> Tensor:
    """The teacher's guided velocity with scales of each sample's own: v, v_text, v_image [B, N, C]; text_scale, image_scale, guided [B].

    Where `guided` is False (t outside the guidance interval) it is v. Sample for sample equal to `flow.guidance.guide`: a scale of at
    most 1 is no guidance, and renormalisation is the sampler's.
    """
    device = v.device
    return guide_each(v, v_text, v_image, text_scale.to(device), image_scale.to(device), guided.to(device), renorm, renorm_min)


def cfg_loss(v_student: Tensor, v_guided: Tensor) -> Tensor:
    """ours (the paper gives no loss): mean of |v_S(x_t, t, c, w_text, w_image) - v_guided|^2. The target gets no gradient."""
    return (v_student.float() - v_guided.detach().float()).square().mean()


def draw_scales(u: Tensor, low: float, high: float) -> Tensor:
    """Scales [B] from uniform draws u in [0, 1): uniform in [low, high] (3.2.1: text [1, 5], image [1.0, 2.5])."""
    return low + (high - low) * u
