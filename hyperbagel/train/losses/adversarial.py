"""Hinge losses over the heads of a discriminator, and the approximate R1 penalty (3.2.2 and 3.2.4; DMDX's settings).

Shape legend: B samples, M judgements of one head; lists hold one [B, M] tensor per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.float().mean() for part in parts]).mean()


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean over heads of relu(1 - D(real)) + relu(1 + D(fake)); 2 for an undecided discriminator, 0 for a perfect one."""
    return _mean([torch.relu(1 - r) for r in real]) + _mean([torch.relu(1 + f) for f in fake])


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """Mean over heads of -D(fake)."""
    return -_mean(fake)


def approximate_r1(clean: Sequence[Tensor], noised: Sequence[Tensor]) -> Tensor:
    """Mean over heads of |D(x) - D(x + sigma n)|^2: R1's penalty on the slope at real data without second derivatives.

    For a linear D its expectation is sigma^2 |grad D|^2.
    """
    return _mean([(c - n).square() for c, n in zip(clean, noised, strict=True)])


def accuracy(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Share of judgements on the right side of 0: at 0.5 the discriminator cannot tell, at 1 the generator no longer learns from it."""
    return 0.5 * (_mean([(r > 0).float() for r in real]) + _mean([(f < 0).float() for f in fake]))
