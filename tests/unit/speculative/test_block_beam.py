"""The search by tensors alone finds what the search one by one finds."""

from __future__ import annotations

import math

import pytest
import torch
from test_block_tree import ROOT, K, V, paths_of, world
from torch import Tensor

from hyperbagel.speculative.drafters.block_beam import search_beam
from hyperbagel.speculative.drafters.block_tree import Floats, search_best_first, spine_first

Path = tuple[int, ...]


def beam(logits: list[Floats], link: Floats, nodes: int, **how: object) -> tuple[Tensor, Tensor]:
    table = torch.from_numpy(link)

    rows = torch.stack([torch.from_numpy(row) for row in logits])
    return search_beam(rows, table.__getitem__, torch.tensor([ROOT] * len(rows)), nodes, **({"branch": V} | how))  # type: ignore[arg-type]


def paths(tokens: Tensor, parents: Tensor) -> list[Path]:
    """Those of one row's nodes."""
    assert parents[0] == 0 and all(p <= i for i, p in enumerate(parents[1:].tolist()))
    return [path for path in paths_of(tokens.tolist(), parents[1:].tolist()) if -1 not in path]


def one_by_one(logits: Floats, link: Floats, nodes: int, **how: object) -> list[Path]:
    found = search_best_first(logits, link.__getitem__, ROOT, nodes, **({"branch": V} | how))  # type: ignore[arg-type]
    return paths_of(*spine_first(found))


@pytest.mark.parametrize("how", [{}, {"stop": 4}, {"scale": 0.5, "stop": 1}])
@pytest.mark.parametrize("nodes", [1, 4, 9])
def test_the_nodes_of_the_other_search(nodes: int, how: dict[str, object]) -> None:
    """Rows of a batch each find their own; the likeliest path comes first."""
    worlds = [world(seed) for seed in range(6)]
    link = worlds[0][1]
    tokens, parents = beam([logits for logits, _ in worlds], link, nodes, **how)
    for (logits, _), row, above in zip(worlds, tokens, parents, strict=True):
        told, found = one_by_one(logits, link, nodes, **how), paths(row, above)
        assert sorted(found) == sorted(told)
        spine = next((i for i, path in enumerate(told) if len(path) != i + 1), len(told))
        assert spine and found[:spine] == told[:spine]


def test_no_deeper_than_the_limit() -> None:
    """Also where it is a number on the device, as in fixed shapes."""
    logits, link = world(3)
    for limit in range(1, K + 1):
        told = sorted(one_by_one(logits[:limit], link, 9))
        for given in (limit, torch.tensor(limit)):
            assert sorted(paths(*(x[0] for x in beam([logits], link, 9, limit=given)))) == told


def test_fewer_paths_than_nodes() -> None:
    logits, link = world(1)
    tokens, parents = beam([logits[:2]], link, 60, stop=2)
    assert tokens.shape == (1, V + V * V) and (tokens >= 0).sum() == (V - 1) + (V - 1) ** 2  # the token 2 is no node
    assert len(set(paths(tokens[0], parents[0]))) == (V - 1) + (V - 1) ** 2


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_damaged_numbers_draft_nothing_there(broken: float) -> None:
    """And leave other rows as they are."""
    logits, link = world(2)
    bad = logits.copy()
    bad[1, 3] = broken
    tokens, parents = beam([bad, logits], link, 8)
    first, second = (paths(row, above) for row, above in zip(tokens, parents, strict=True))
    assert first and all(len(path) == 1 for path in first) and sorted(second) == sorted(one_by_one(logits, link, 8))


def test_as_many_of_a_level_are_expanded_as_a_node_has_children() -> None:
    """The likeliest ones."""
    logits, link = world(4)
    found = set(paths(*(x[0] for x in beam([logits], link, 30, branch=2))))
    told = set(one_by_one(logits, link, 30, branch=2))
    assert len(found) == 2 + 3 * 4 and found < told
    for depth in range(2, K + 1):
        assert len({path[:-1] for path in found if len(path) == depth}) == 2


def test_in_bf16_the_same_nodes_as_well() -> None:
    """Numbers are added in fp32: in bf16 most sums would be ties."""
    for seed in (1, 2, 8):
        logits, link = (torch.from_numpy(x + 20).bfloat16() for x in world(seed))
        tokens, parents = search_beam(logits[None], link.__getitem__, torch.tensor([ROOT]), 9, branch=V)
        assert sorted(paths(tokens[0], parents[0])) == sorted(one_by_one(logits.float().numpy(), link.float().numpy(), 9))


def test_of_equal_paths_one_comes_first() -> None:
    even = torch.zeros(1, K, V)
    _, parents = search_beam(even, lambda u: torch.zeros(*u.shape, V), torch.tensor([ROOT]), 14, branch=2)
    best, above = [0], parents[0].tolist()
    while children := [i for i in range(1, len(above)) if above[i] == best[-1]]:
        best.append(children[0])
    assert best == list(range(len(best))) and len(best) > 1
