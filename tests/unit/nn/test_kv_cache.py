"""The cache against attention over everything at once: append, ragged rows, truncate, keep, fork, stack."""

import pytest
import torch
from torch import Tensor

from hyperbagel.nn.attention import attend
from hyperbagel.nn.kv_cache import KVCache

H, D = 2, 4


def fresh(rows: int) -> KVCache:
    return KVCache(1, H, D, rows=rows, device="cpu", dtype=torch.float64)


def tokens(rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, H, n, D, generator=g, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def push(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, counts: list[int], causal: bool = True) -> Tensor:
    plan = cache.plan(counts, causal)
    out = attend(q, *cache.append(0, plan, k, v), plan.mask, plan.causal)
    cache.advance(counts)
    return out


@pytest.mark.parametrize("sizes", [[5], [1, 1, 3], [2, 3], [4, 1]])
def test_causal_pieces_equal_the_whole(sizes: list[int]) -> None:
    q, k, v = tokens(1, sum(sizes))
    cache = fresh(1)
    parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    got = torch.cat([push(cache, *part, [part[0].shape[2]]) for part in parts], dim=2)
    torch.testing.assert_close(got, attend(q, k, v, causal=True))


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_rows_equal_each_row_alone(causal: bool) -> None:
    pasts, counts = [3, 0, 5], [2, 4, 1]
    singles = []
    for i, n in enumerate(pasts):
        cache = fresh(1)
        if n:
            push(cache, *tokens(1, n, seed=i), [n])
        singles.append(cache)
    q, k, v = tokens(3, max(counts), seed=9)
    together = push(KVCache.stack(singles), q, k, v, counts, causal)
    for i, (cache, n) in enumerate(zip(singles, counts, strict=True)):
        alone = push(cache, *(x[i : i + 1, :, :n] for x in (q, k, v)), [n], causal)
        torch.testing.assert_close(together[i : i + 1, :, :n], alone)


@pytest.mark.parametrize("load", [False, True])
def test_spent_rows_give_their_storage_back(load: bool) -> None:
    """Else all contexts of a batch would be held twice while it is decoded."""
    singles = [fresh(1) for _ in range(3)]
    for i, cache in enumerate(singles):
        push(cache, *tokens(1, i + 2, seed=i), [i + 2])
    want = KVCache.stack(singles, 4)
    if load:
        got = KVCache.stack([fresh(1) for _ in singles], 9)
        got.load(singles, spent=True)
    else:
        got = KVCache.stack(singles, 4, spent=True)
    assert got.lengths == want.lengths == [2, 3, 4] and [cache.lengths for cache in singles] == [[2], [3], [4]]
    for mine, theirs in zip(got.k + got.v, want.k + want.v, strict=True):
        for row, n in enumerate(got.lengths):
            assert torch.equal(mine[row, :, :n], theirs[row, :, :n])
    assert not any(cache.k or cache.v for cache in singles)


def test_ragged_rows_over_several_appends() -> None:
    """Padding of one append must be overwritten by the next."""
    singles = [fresh(1), fresh(1)]
    both = KVCache.stack([fresh(1), fresh(1)])
    for step, counts in enumerate([[3, 1], [1, 2], [2, 2]]):
        q, k, v = tokens(2, max(counts), seed=step)
        together = push(both, q, k, v, counts)
        for i, n in enumerate(counts):
            alone = push(singles[i], *(x[i : i + 1, :, :n] for x in (q, k, v)), [n])
            torch.testing.assert_close(together[i : i + 1, :, :n], alone)
    assert both.lengths == [6, 5]


def test_nothing_moves_without_advance() -> None:
    cache = fresh(1)
    push(cache, *tokens(1, 3), [3])
    q, k, v = tokens(1, 2, seed=5)
    plan = cache.plan([2], causal=False)
    first = attend(q, *cache.append(0, plan, k, v), plan.mask, plan.causal)
    other = tokens(1, 2, seed=6)
    attend(other[0], *cache.append(0, plan, *other[1:]), plan.mask, plan.causal)
    again = attend(q, *cache.append(0, plan, k, v), plan.mask, plan.causal)
    assert torch.equal(first, again) and cache.lengths == [3]


def test_fork_leaves_its_parent_alone() -> None:
    parent = fresh(1)
    push(parent, *tokens(1, 3), [3])
    before = parent.k[0][:, :, :3].clone()
    child = parent.fork()
    push(child, *tokens(1, 4, seed=2), [4])
    assert parent.lengths == [3] and child.lengths == [7]
    assert torch.equal(parent.k[0][:, :, :3], before)


def test_truncate_then_append_equals_never_having_been_longer() -> None:
    long, short = fresh(1), fresh(1)
    first, second = tokens(1, 5), tokens(1, 2, seed=3)
    push(long, *first, [5])
    long.truncate([3])
    push(short, *(x[:, :, :3] for x in first), [3])
    torch.testing.assert_close(push(long, *second, [2]), push(short, *second, [2]))
    with pytest.raises(AssertionError):
        long.truncate([99])


def test_selected_rows_go_on_as_if_the_others_had_never_been() -> None:
    """Rows of 2, 5 and 3 tokens, with taps and positions; the last and the first stay, in this order, and read on."""
    counts, (q, k, v) = [2, 5, 3], tokens(3, 5)
    whole = KVCache(1, H, D, rows=3, device="cpu", dtype=torch.float64, taps=(0,), width=1)
    plan, marks = whole.plan(counts, True), torch.arange(15.0, dtype=torch.float64).view(3, 5, 1)
    whole.append(0, plan, k, v)
    whole.tap(0, plan, [marks])
    whole.tap_positions(plan, torch.arange(15).view(3, 5))
    whole.advance(counts)
    whole.select([2, 0])
    assert whole.lengths == [3, 2] and whole.k[0].shape[0] == 2
    assert whole.tapped[0][0, 0, :3, 0].tolist() == [10, 11, 12] and whole.positions[0][1, 0, :2, 0].tolist() == [0, 1]
    more = tokens(2, 2, seed=4)
    together = push(whole, *more, [2, 2])
    for at, row in enumerate((2, 0)):
        alone = fresh(1)
        push(alone, *(x[row : row + 1, :, : counts[row]] for x in (q, k, v)), [counts[row]])
        torch.testing.assert_close(together[at : at + 1], push(alone, *(x[at : at + 1] for x in more), [2]))


def test_keep_gathers_the_accepted_path() -> None:
    cache = fresh(1)
    _, k, _ = tokens(1, 7)
    push(cache, *tokens(1, 7), [7])
    cache.keep(3, torch.tensor([4, 6]))
    assert cache.lengths == [5]
    assert torch.equal(cache.k[0][0, :, :5], k[0][:, [0, 1, 2, 4, 6]])


def test_prefix_and_view_share_storage() -> None:
    cache = fresh(2)
    push(cache, *tokens(2, 3), [3, 3])
    cache.reserve(8)
    view = cache.view(slice(1))
    _, k, v = tokens(1, 1, seed=8)
    plan = view.plan([1], causal=True)
    view.append(0, plan, k, v)
    assert torch.equal(cache.k[0][:1, :, 3:4], k)
    assert fresh(1).prefix(0).lengths == [0]
