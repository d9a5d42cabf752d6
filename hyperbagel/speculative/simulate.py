"""What speculation would do, computed from teacher-forced logits: acceptance by depth and tau of chains. For greedy decoding this is exact:
the engine must show the same figures on the same prompts.

Shape legend: B rows, R entries of an answer, K drafted depths.
"""

from __future__ import annotations

from torch import Tensor

from hyperbagel.speculative.types import Stats


def simulate(accepted: Tensor, counts: Tensor) -> list[Stats]:
    """The counts of greedy rounds over each answer.

    Args:
        accepted: bool [B, R, K]: from the root at entry i, the draft of depth k + 1 is right (given that those before it were).
        counts: [B] entries of each answer; the last one's token, too, came from the target.
    """
    out = []
    for row, n in zip(accepted.tolist(), counts.tolist(), strict=True):
        stats, i = Stats(), 0
        while i < n:
            run = next((k for k, right in enumerate(row[i]) if not right), len(row[i]))
            got = min(run + 1, n - i)  # tokens of this round
            for depth in range(1, min(len(row[i]), got) + 1):
                stats.tried[depth] += 1
                stats.accepted[depth] += depth <= run
            stats.rounds += 1
            stats.tokens += got
            i += got
        out.append(stats)
    return out
