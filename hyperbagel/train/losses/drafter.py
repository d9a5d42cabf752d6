"""What drafters learn: the target's next-token distributions, weighted by how far ahead they draft. Pure functions.

Shape legend: B rows, R entries of an answer, A anchors, K tokens of a block, N picked entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperbagel.speculative.drafters.autoregressive import Lesson, ahead

Metrics = dict[str, Tensor]


def soft_terms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q), entropy of p) for rows [N, V] -> [N] each; their sum is the soft cross-entropy -sum p log q.

    p: the target's distribution, over the tokens that the drafter can say (its other logits are -inf). q: the drafter's.
    """
    can = torch.isfinite(logits)
    log_p = target.float().masked_fill(~can, float("-inf")).log_softmax(-1)
    p = log_p.exp()
    log_q = logits.float().log_softmax(-1).masked_fill(~can, 0.0)
    entropy = -(p * log_p.masked_fill(~can, 0.0)).sum(-1)
    cross = -(p * log_q).sum(-1)
    return cross - entropy, entropy


def total_variation(logits: Tensor, target: Tensor) -> Tensor:
    """1/2 sum |p - q| for rows [..., V] -> [...]: the chance that a draft drawn from q is rejected."""
    return 0.5 * (logits.float().softmax(-1) - target.float().softmax(-1)).abs().sum(-1)


def unrolled_loss(outs: Sequence[Tensor], lesson: Lesson, *, ce_weight: float, decay: float) -> tuple[Tensor, Metrics]:
    """Mean over the steps of training-time test, step j weighted decay^j: KL(p || q) + ce_weight * CE(argmax p).

    EAGLE-3 has ce_weight 0 and decay 0.8; its soft cross-entropy is KL plus a constant. Hyper-Bagel has ce_weight 0.1.
    outs: logits [B, R, V] of each step. Metrics: `rate_k`, how often the k-th draft is the target's choice if all before it were.
    """
    total, weights = outs[0].new_zeros(()), 0.0
    right, metrics = None, {}
    for j, out in enumerate(outs):
        valid = lesson.valid(j)
        target = ahead(lesson.logits, j)
        best = target.argmax(-1)
        hit = (out.argmax(-1) == best) & valid
        base = valid if right is None else valid & right
        metrics[f"rate_{j + 1}"] = (hit & base).sum() / base.sum().clamp(min=1)
        right = hit if right is None else hit & right
        logits, goal, token = out[valid], target[valid], best[valid]
        if not len(logits):
            continue
        kl, _ = soft_terms(logits, goal)
        loss = kl
        if ce_weight:
            sayable = torch.isfinite(logits.gather(1, token[:, None]))[:, 0]
            ce = F.cross_entropy(logits.float(), token, reduction="none")
            loss = loss + ce_weight * torch.where(sayable, ce, 0.0)
        total = total + decay**j * loss.mean()
        weights += decay**j
    return total / max(weights, 1e-9), metrics


def block_loss(
    logits: Tensor, confidence: Tensor, anchors: Tensor, lesson: Lesson, *, ce_weight: float = 0.1, tv_weight: float = 0.9
) -> tuple[Tensor, Metrics]:
    """ce_weight * CE + tv_weight * total variation (DSpark: 0.1 and 0.9), token k weighted exp(-k / 4), plus the confidence head's
    cross-entropy against 1 - TV, a target without gradient.

    logits [B, A, K, V], confidence [B, A, K], anchors [B, A]. Metrics: `tv`, its mean, and `rate_k` as in `unrolled_loss`.
    """
    b, a, k, v = logits.shape
    at = anchors[..., None] + torch.arange(k, device=anchors.device)  # [B, A, K]
    valid = at < lesson.counts[:, None, None]
    inside = at.clamp(max=lesson.tokens.shape[1] - 1).flatten(1)
    target = lesson.logits.gather(1, inside[..., None].expand(-1, -1, v)).view(b, a, k, v)
    weight = (torch.exp(-torch.arange(k, device=logits.device) / 4) * valid).float()
    norm = weight.sum().clamp(min=1e-9)
    best = target.argmax(-1)
    ce = F.cross_entropy(logits.float().flatten(0, 2), best.flatten(), reduction="none").view(b, a, k)
    tv = total_variation(logits, target)
    trust = F.binary_cross_entropy_with_logits(confidence.float(), 1 - tv.detach(), reduction="none")
    loss = ((ce_weight * ce + tv_weight * tv + trust) * weight).sum() / norm
    hit = (logits.argmax(-1) == best) & valid
    metrics: Metrics = {"tv": (tv * valid).sum() / valid.sum().clamp(min=1)}
    before = valid[..., 0]
    for i in range(k):
        base = before & valid[..., i]
        metrics[f"rate_{i + 1}"] = (hit[..., i] & base).sum() / base.sum().clamp(min=1)
        before = before & hit[..., i]
    return loss, metrics
