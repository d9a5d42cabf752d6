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


def tapped(counts: list[int], seed: int = 0) -> KVCache:
    """Rows of so many tokens, with taps and positions; all values differ."""
    cache, n, rows = KVCache(1, H, D, rows=len(counts), device="cpu", dtype=torch.float64, taps=(0,), width=2), max(counts), len(counts)
    plan, (_, k, v) = cache.plan(counts, True), tokens(rows, n, seed=seed)
    cache.append(0, plan, k, v)
    cache.tap(0, plan, [torch.arange(2.0 * rows * n, dtype=torch.float64).view(rows, n, 2) + 100 * seed])
    cache.tap_positions(plan, torch.arange(rows * n).view(rows, n) + 100 * seed)
    cache.advance(counts)
    return cache


def contents(cache: KVCache) -> list[list[torch.Tensor]]:
    """By row: what is stored of its tokens."""
    return [[x[row, :, :n].clone() for store in cache._stores() for x in store] for row, n in enumerate(cache.lengths)]


def same(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for mine, theirs in zip(found, expected, strict=True) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("order", [[0, 5, 2, 3], [5, 4, 3, 2, 1, 0], [1, 0], [2, 3, 4], [3], [0, 1, 2, 3, 4, 5]])
def test_rows_are_selected_in_any_order(order: list[int]) -> None:
    cache = tapped([2, 5, 3, 4, 1, 6])
    before = contents(cache)
    cache.select(order)
    same(contents(cache), [before[row] for row in order])


def test_rows_take_the_places_of_those_that_left() -> None:
    """Nothing else is copied, and nothing is made, as long as there is room; then all is made anew, and what is stored stays."""
    cache, others = tapped([2, 5, 3, 4]), [tapped([4], seed=1), tapped([2, 1], seed=2), tapped([1], seed=3), tapped([30], seed=4)]
    cache.reserve(12)
    expected, places = contents(cache), cache.k[0].data_ptr()
    cache.select([3, 1])
    cache.add(others[:1], 6)
    cache.add(others[2:3], 6)
    expected = [expected[3], expected[1], *contents(others[0]), *contents(others[2])]
    same(contents(cache), expected)
    assert cache.k[0].data_ptr() == places and cache.capacity == 12
    cache.add(others[1:2], 6)
    assert cache.k[0].data_ptr() != places and cache.k[0].shape[0] == 6 and cache.capacity == 12
    expected += contents(others[1])
    same(contents(cache), expected)
    cache.select([0, 5])
    cache.add(others[3:], 6)
    assert cache.capacity >= 36
    same(contents(cache), [expected[0], expected[5], *contents(others[3])])
    cache.reserve(100)
    cache.add(others[:1], 0)
    same(contents(cache)[-1:], contents(others[0]))


def test_those_that_are_taken_in_may_be_spent() -> None:
    for spent in (False, True):
        cache, other = tapped([2, 5]), tapped([3, 4], seed=1)
        other.select([1])
        cache.add([other], 4, spent=spent)
        assert bool(other.k) is not spent and bool(other._whole) is not spent and other.lengths == [4]


def test_nothing_of_those_who_left_is_seen() -> None:
    """A masked nan is still one: 0 * nan."""
    cache = tapped([9, 8, 7, 2])
    cache.reserve(12)
    for x in (*cache.k, *cache.v):
        x[:3] = torch.nan
    cache.select([3])
    cache.add([tapped([3, 1], seed=1)], 2)
    assert all(x.isfinite().all() for x in (*cache.k, *cache.v)) and cache.k[0].shape[0] == 3
    q, k, v = tokens(3, 2, seed=5)
    assert push(cache, q, k, v, [2, 2, 2]).isfinite().all()


def test_untapped_room_is_freed() -> None:
    cache = tapped([2, 5])
    cache.select([1])
    cache.untap()
    assert cache._whole is None


def test_without_memory_nothing_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other, made, calls = tapped([2, 5]), tapped([3], seed=1), torch.Tensor.new_zeros, list[int]()

    def new_zeros(x: torch.Tensor, *shape: int) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 3:  # of four stores
            raise torch.OutOfMemoryError
        return made(x, *shape)

    before = contents(cache)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", new_zeros)
        with pytest.raises(torch.OutOfMemoryError):
            cache.add([other], 40, spent=True)
    same(contents(cache), before)
    assert other.k and all(len(x) == 2 for store in cache._stores() for x in store)
    cache.reserve(30)
    assert all(x.shape[2] >= 30 for store in cache._stores() for x in store), "also where room had been made for some"
    cache.add([other], 40)
    same(contents(cache), [*before, *contents(other)])


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
