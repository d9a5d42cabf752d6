"""Guidance distillation (Hyper-Bagel 3.2.1): one evaluation learns to give what guidance combines from two or three.

Shape legend: B samples, N latent tokens, C values of a token.
"""

from __future__ import annotations

from torch import Tensor


def cfg_loss(v_student: Tensor, v_guided: Tensor) -> Tensor:
    """ours (the paper gives no loss): mean of |v_S(x_t, t, c, w_text, w_image) - v_guided|^2. The target gets no gradient."""
    return (v_student.float() - v_guided.detach().float()).square().mean()


def draw_scales(u: Tensor, low: float, high: float) -> Tensor:
    """Scales [B] from uniform draws u in [0, 1): uniform in [low, high] (3.2.1: text [1, 5], image [1.0, 2.5])."""
    return low + (high - low) * u
