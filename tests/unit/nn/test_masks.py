"""The drawn mask, asserted; and the flex form of the same rule."""

from typing import Any

import torch

from hyperbagel.core.types import PackedBatch
from hyperbagel.nn.masks import block_mask, dense_mask

DRAWN = """
1.......
11......
1111....
1111....
11..11..
11..11..
11..111.
11..1111
"""  # t t n n c c a a, see nn/masks.py


def batch(splits: list[tuple[str, int]], samples: list[int], padding: int = 0) -> PackedBatch:
    """One row of text-stream tokens with the given splits (mode, length); samples[i] is the sample of split i."""
    empty: dict[str, Any] = {name: torch.zeros(0) for name in PackedBatch.__dataclass_fields__}
    ids = [i for i, (_, n) in enumerate(splits) for _ in range(n)]
    s = len(ids) + padding

    def row(values: list[Any], fill: Any) -> torch.Tensor:
        return torch.tensor([values + [fill] * padding])

    return PackedBatch(
        **empty
        | {
            "su": s,
            "sg": 0,
            "positions": torch.zeros(1, s, dtype=torch.long),
            "sample_id": row([samples[i] for i in ids], -1),
            "split_id": row(ids, -1),
            "order": row(list(range(len(ids))), 0),
            "is_full": row([splits[i][0] != "causal" for i in ids], False),
            "is_noise": row([splits[i][0] == "noise" for i in ids], False),
        }
    )


def rows(drawn: str) -> list[list[int]]:
    return [[int(c == "1") for c in line] for line in drawn.split()]


def test_drawn_mask() -> None:
    got = dense_mask(batch([("causal", 2), ("noise", 2), ("full", 2), ("causal", 2)], [0, 0, 0, 0]))
    assert got[0, 0].int().tolist() == rows(DRAWN)


def test_samples_do_not_see_each_other_and_padding_sees_itself() -> None:
    got = dense_mask(batch([("causal", 2), ("full", 2)], [0, 1], padding=1))
    assert got[0, 0].int().tolist() == rows("1....\n11...\n..11.\n..11.\n....1")


def test_flex_form_is_the_same_rule() -> None:
    b = batch([("causal", 40), ("noise", 50), ("full", 30), ("causal", 20)], [0, 0, 0, 1], padding=4)
    n = b.positions.shape[1]
    flex = block_mask(b)
    one, many = torch.tensor(0), torch.arange(n)
    got = torch.stack([flex.mask_mod(one, one, i, many) for i in many])
    assert torch.equal(got, dense_mask(b)[0, 0])
