"""Trees: the drawn masks, depths, paths; slots and sight behind rows of different lengths; what stays after a round."""

import pytest
import torch

from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.drafters.expand import grow, level_plan
from hyperbagel.speculative.tree import Tree, commit, path_to, tree_depth, tree_plan


def drawn(text: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in line.split()] for line in text.strip().splitlines()])


def test_the_drawn_mask() -> None:
    tree = Tree.of([[0, 0, 0, 1, 1, 2]])
    picture = """
        1 . . . . .
        1 1 . . . .
        1 . 1 . . .
        1 1 . 1 . .
        1 1 . . 1 .
        1 . 1 . . 1
    """
    assert torch.equal(tree.mask[0], drawn(picture))
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2, 2]]
    parents = tree.parents[0].tolist()
    for node, path in ((0, [0]), (2, [0, 2]), (4, [0, 1, 4]), (5, [0, 2, 5])):
        assert path_to(parents, node) == path
    assert tree_depth([9] * 6, parents) == 2 and tree_depth([9, 9, 9, -1, -1, -1], parents) == 1
    assert tree_depth([9] + [-1] * 5, parents) == 0 and tree_depth([9] + [0] * 5, parents) == 2  # 0 is a token


def test_chains_and_rows_that_differ() -> None:
    assert torch.equal(Tree.chain(2, 11).mask, torch.ones(2, 12, 12, dtype=torch.bool).tril())
    assert Tree.chain(1, 0).mask.tolist() == [[[True]]]
    tree = Tree.of([[0, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0, 0]])
    assert tree.depths.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    assert [path_to(row, node) for row, node in zip(tree.parents.tolist(), (6, 3), strict=True)] == [list(range(7)), [0, 3]]


@pytest.mark.parametrize("parents", [[1, 0], [0, 2, 1], [0, 1], []])
def test_broken_trees(parents: list[int]) -> None:
    with pytest.raises(AssertionError, match="parent"):
        Tree.of([parents])


def cache_of(lengths: list[int]) -> KVCache:
    cache = KVCache(1, 1, 1, rows=len(lengths), device="cpu", dtype=torch.float32, taps=(0,), width=1)
    cache.reserve(6)
    for store in cache._stores():
        for x in store:
            x.copy_(torch.arange(6).view(1, 1, 6, 1))
    cache.lengths = lengths
    return cache


def test_the_drawn_plan() -> None:
    plan = tree_plan(cache_of([1, 3]), Tree.of([[0, 0, 0]] * 2))
    first = """
        1 1 . . . .
        1 1 1 . . .
        1 1 . 1 . .
    """
    second = """
        1 1 1 1 . .
        1 1 1 1 1 .
        1 1 1 1 . 1
    """
    assert plan.mask is not None and torch.equal(plan.mask[:, 0], torch.stack([drawn(first), drawn(second)]))
    assert isinstance(plan.slots, torch.Tensor) and plan.slots.tolist() == [[1, 2, 3], [3, 4, 5]]


def test_the_drawn_level() -> None:
    first = grow(None, torch.tensor([[[1.0, 0, 0]]]), 2)
    second = grow(first, torch.tensor([[[9.0, 9, 0], [0, 0, 0]]]), 2)  # both nodes are children of the first one
    plan = level_plan(cache_of([2]), [2], second.seen)
    picture = """
        1 1 1 . 1 .
        1 1 1 . . 1
    """
    assert plan.mask is not None and torch.equal(plan.mask[0, 0], drawn(picture)) and plan.slots.tolist() == [[4, 5]]


def test_rows_of_one_length_need_no_indices() -> None:
    """The same mask as rows of other lengths get, and slots that are a slice."""
    tree = Tree.of([[0, 0, 0], [0, 0, 1]])
    alike, other = tree_plan(cache_of([2, 2]), tree), tree_plan(cache_of([2, 2, 3]), Tree.of([*tree.parents.tolist(), [0, 0, 0]]))
    assert alike.slots == slice(2, 5) and alike.visible == 5 and alike.mask is not None and other.mask is not None
    assert torch.equal(alike.mask, other.mask[:2, :, :, :5]) and not other.mask[:2, :, :, 5:].any()


def test_commit_gathers_slots_of_everything() -> None:
    cache = cache_of([5, 6, 6])
    commit(cache, [2, 2, 3], [[0, 2], [0, 1, 2], []])
    assert cache.lengths == [4, 5, 3]
    for store in cache._stores():
        for x in store:
            assert (
                x[0, 0, :4, 0].tolist() == [0, 1, 2, 4]
                and x[1, 0, :5, 0].tolist() == [0, 1, 2, 3, 4]
                and x[2, 0, :3, 0].tolist() == [0, 1, 2]
            )
