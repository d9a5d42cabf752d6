"""Figures that compare a student's held-out pictures with its teacher's.

Shape legend: B conditions, N latent tokens, C values of a token, D values of a picture's features; 2: each condition with two noises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def conditional_energy(student: Tensor, teacher: Tensor) -> float:
    """Energy distance between student and teacher given the condition, divided by the teacher's own spread. Features [2, B, D].

    (2 E|s - t| - E|s - s'| - E|t - t'|) / E|t - t'|, s and t from different noises (from one noise they are alike by design). So the
    numerator's expectation is 0 if both draw from one distribution, whatever noise each picture comes from; blur, collapse and wrong
    content raise it. Divided by an estimate from the same pictures, the ratio lies a little above 0 then, the more the fewer conditions.
    """

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a - b, dim=-1).mean()

    own = apart(teacher[0], teacher[1])
    cross = apart(student[0], teacher[1]) + apart(student[1], teacher[0])
    return ((cross - apart(student[0], student[1]) - own) / own).item()


def compare(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Figures over latents [2, B, N, C]. 1 is healthy for all of them but `match`, whose best is 0.

    match: minus the root mean squared distance to the teacher, in units of the teacher's std. The others are ratios, student over teacher.
    spread: std over samples; far below 1 is contraction. diversity: distance between the pictures of the two noises; far below 1 is
    collapse. size: root mean square; above about 1.1 is over-saturation.
    """
    std = teacher.flatten(0, 1).std(0).mean()
    return {
        "match": -((student - teacher).square().mean().sqrt() / std).item(),
        "spread": (student.flatten(0, 1).std(0).mean() / std).item(),
        "diversity": ((student[0] - student[1]).square().mean() / (teacher[0] - teacher[1]).square().mean()).sqrt().item(),
        "size": (student.square().mean() / teacher.square().mean()).sqrt().item(),
    }


class Pictures(NamedTuple):
    """The student's and the teacher's pictures for some conditions: latents [2, B, N, C] and features [2, B, D]."""

    student: Tensor
    teacher: Tensor
    student_features: Tensor
    teacher_features: Tensor


def compare_sets(sets: Sequence[Pictures]) -> dict[str, float]:
    """`compare`, and `score` (minus the energy distance), over all conditions of several groups.

    Pictures of one size are compared as one set: at 7B a group is one sample, which alone would be measured by nothing but its own two
    noises. Sets of different sizes are weighted by their number of conditions.
    """
    alike: dict[torch.Size, list[Pictures]] = {}
    for one in sets:
        alike.setdefault(one.student.shape[2:], []).append(one)
    figures: dict[str, float] = {}
    total = sum(one.student.shape[1] for one in sets)
    for group in alike.values():
        whole = Pictures(*(torch.cat(parts, dim=1) for parts in zip(*group, strict=True)))
        own = compare(whole.student, whole.teacher)
        own["score"] = -conditional_energy(whole.student_features, whole.teacher_features)
        for name, value in own.items():
            figures[name] = figures.get(name, 0.0) + value * whole.student.shape[1] / total
    return figures
