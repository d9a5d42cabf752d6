"""Trees from a block: the search against all paths there are, its numbering, and rows that share columns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest

from hyperbagel.speculative.drafters.block_tree import MAX_GAP, Node, search_best_first, spine_first, tree_draft

V, K, ROOT = 6, 4, 2


def world(seed: int, scale: float = 1.5) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """logits [K, V] of a block and links [V, V] of a Markov head."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(K, V)) * scale).astype(np.float32), rng.normal(size=(V, V)).astype(np.float32)


def every_path(logits: npt.NDArray[np.float32], links: npt.NDArray[np.float32], stop: int = -1) -> dict[tuple[int, ...], float]:
    """The log-probability of each path below the root without `stop`."""
    found: dict[tuple[int, ...], float] = {}
    for length in range(1, K + 1):
        for path in itertools.product(range(V), repeat=length):
            if stop in path:
                continue
            total = 0.0
            for d, (before, token) in enumerate(itertools.pairwise((ROOT, *path))):
                row = (logits[d] + links[before]).astype(np.float64)
                total += row[token] - np.log(np.exp(row).sum())
            found[path] = float(total)
    return found


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """Each node's tokens from the root on; parents as numbers of nodes, 0 the root."""
    known: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        known.append((*known[parent], token))
    return known[1:]


def paths(nodes: list[Node]) -> list[tuple[int, ...]]:
    return paths_of([n.token for n in nodes], [n.parent for n in nodes])


@pytest.mark.parametrize("stop", [-1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_likeliest_paths_of_all(seed: int, stop: int) -> None:
    logits, links = world(seed)
    all_ = every_path(logits, links, stop)
    best = sorted(all_, key=lambda path: -all_[path])
    for nodes in (1, 5, 20):
        found = search_best_first(logits, links.__getitem__, ROOT, nodes, branch=V, stop=stop)
        assert paths(found) == best[:nodes]
        np.testing.assert_allclose([n.chance for n in found], [math.exp(all_[path]) for path in best[:nodes]], rtol=1e-5)
    least = math.exp(all_[best[7]]) * 0.999
    assert paths(search_best_first(logits, links.__getitem__, ROOT, 50, branch=V, least=least, stop=stop)) == best[:8]


def test_children_are_few_and_near() -> None:
    logits, links = world(0)
    found = search_best_first(logits, links.__getitem__, ROOT, 40, branch=2)
    assert len(found) == 2 + 4 + 8 + 16 and max(sum(n.parent == i for n in found) for i in range(len(found) + 1)) == 2
    logits[:, 0] = 0
    logits[:, 1:] = -MAX_GAP - 0.1
    assert paths(search_best_first(logits, (0 * links).__getitem__, ROOT, 40, branch=V)) == [(0,) * d for d in range(1, K + 1)]


def test_a_scale_flattens() -> None:
    logits, links = world(1)
    sharp, flat = (search_best_first(logits, links.__getitem__, ROOT, 1, branch=V, scale=scale)[0].chance for scale in (1.0, 0.5))
    row = (logits[0] + links[ROOT]).astype(np.float64) / 2
    assert flat < sharp and flat == pytest.approx(np.exp(row.max()) / np.exp(row).sum(), rel=1e-5)


@pytest.mark.parametrize(("broken", "usable"), [(math.nan, False), (math.inf, False), (3.4e38, True)])
def test_a_broken_block_costs_no_request(broken: float, usable: bool) -> None:
    logits, links = world(2)
    logits[1, 3] = broken
    with np.errstate(all="raise", under="ignore"):
        found = search_best_first(logits, links.__getitem__, ROOT, 15, branch=4, least=0.01)
    assert found and any(len(path) > 1 for path in paths(found)) == usable  # what lies before the broken depth still counts


def test_the_spine_comes_first() -> None:
    #      0
    #    7   3      in order of chance: 7, 3, 7-5, 3-8, 7-5-6, 7-4
    #   5 4  8
    #   6
    nodes = [Node(7, 0, 0.5), Node(3, 0, 0.4), Node(5, 1, 0.3), Node(8, 2, 0.25), Node(6, 3, 0.2), Node(4, 1, 0.1)]
    tokens, parents = spine_first(nodes)
    assert (tokens, parents) == ([7, 5, 6, 3, 8, 4], [0, 1, 2, 0, 4, 1])
    assert sorted(paths_of(tokens, parents)) == sorted(paths(nodes))
    assert spine_first([]) == ([], [])


@pytest.mark.parametrize("seed", range(4))
def test_numbering_anew_keeps_all_paths(seed: int) -> None:
    logits, links = world(seed)
    found = search_best_first(logits, links.__getitem__, ROOT, 15, branch=4)
    tokens, parents = spine_first(found)
    assert sorted(paths_of(tokens, parents)) == sorted(paths(found))
    assert all(parent <= i for i, parent in enumerate(parents))
    best = [0]
    while children := [i for i, parent in enumerate(parents, 1) if parent == best[-1]]:
        best.append(children[0])
    assert best == list(range(len(best)))  # the first child of each node, from the root on


def test_rows_share_columns() -> None:
    """Ranks go whose mean chance is too low; what is missing is -1; rows without branches are a chain."""
    long, short = [Node(1, 0, 0.9), Node(2, 1, 0.7), Node(3, 0, 0.1)], [Node(4, 0, 0.8)]
    draft = tree_draft([long, short], 0.3)
    assert draft.tree is None and draft.tokens.tolist() == [[1, 2], [4, -1]]  # means .85, .35, .05
    draft = tree_draft([long, short], 0.01)
    assert draft.tree is not None and draft.tokens.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert draft.tree.parents.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]] and draft.deepest() == [2, 1]
    assert tree_draft([long, short], 0.86).tokens.shape == (2, 0)
    assert tree_draft([long, None], 0.6).tokens.tolist() == [[1, 2], [-1, -1]]  # a finished row does not count
    assert tree_draft([[], []]).tokens.shape == (2, 0) and tree_draft([[], []]).tree is None
