"""Acceptance rules: fast forms against slow ones, and cases with known answers."""

import pytest
import torch

from hyperbagel.speculative.accept import accept
from hyperbagel.speculative.tree import Tree, path_to
from hyperbagel.speculative.types import Draft
from hyperbagel.speculative.verify import draw, greedy_chain, greedy_path, residual, sampled, sampled_chain, sampled_path

V = 7


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(seed: int, rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(rows, n, V, generator=g).double().softmax(-1)
    q = torch.randn(rows, n, V, generator=g).double().softmax(-1)
    return p, q, torch.randint(-1, V, (rows, n), generator=g), rand(rows, n, seed=seed + 1)


def test_a_chain_is_a_tree_in_line() -> None:
    p, q, tokens, u = whole(0, 500, 5)
    tree = Tree.chain(500, 4)
    best = p.argmax(-1)
    node = greedy_chain(best, tokens).node.tolist()
    assert node == [len(greedy_path(*row)) - 1 for row in zip(best.tolist(), tokens.tolist(), tree.parents.tolist(), strict=True)]
    assert {0, 1, 2} <= set(node)
    for own in (None, q):
        fast, slow = sampled_chain(p, tokens, u, own), sampled(p, tokens, tree.parents, u, own)
        assert torch.equal(fast.node, slow.node) and torch.equal(fast.token, slow.token)
        assert fast.node.unique().numel() > 3


def test_greedy_takes_the_deepest_right_path() -> None:
    #      0
    #    1   2       tokens 3 4
    #   3 4   5      tokens 5 6 . 5
    tree = Tree.of([[0, 0, 0, 1, 1, 2]] * 3)
    tokens = torch.tensor([[0, 3, 4, 5, 6, 5]] * 3)
    best = torch.tensor([[4, 5, 5, 0, 0, 6], [3, 6, 5, 0, 1, 2], [0, 5, 5, 1, 1, 1]])
    got = [greedy_path(*row) for row in zip(best.tolist(), tokens.tolist(), tree.parents.tolist(), strict=True)]
    assert got == [[0, 2, 5], [0, 1, 4], [0]]


def test_the_walk_down_a_sampled_tree_is_the_rule() -> None:
    """`sampled_path` decides as `sampled` does for the same numbers, on random trees in which siblings may say the same."""
    rows, n = 2000, 7
    p, _, tokens, u = whole(3, rows, n)
    p = p**2 / (p**2).sum(-1, keepdim=True)
    g = torch.Generator().manual_seed(4)
    parents = torch.stack([torch.randint(0, max(1, i), (rows,), generator=g) for i in range(n)], dim=1)
    chances = p[torch.arange(rows)[:, None], parents, tokens.clamp(min=0)]
    want, depths = sampled(p, tokens, parents, u), []
    walks = [sampled_path(*row) for row in zip(chances.tolist(), tokens.tolist(), parents.tolist(), u.tolist(), strict=True)]
    for b, (path, refused) in enumerate(walks):
        assert path == path_to(parents[b].tolist(), int(want.node[b]))
        left = p[b, path[-1]].clone()
        left[tokens[b, refused]] = 0
        assert int(draw(left[None], u[b, :1])) == int(want.token[b])
        depths.append(len(path) - 1)
    assert {0, 1, 2, 3} <= set(depths) and sum(len(refused) > 1 for _, refused in walks) > 100


@pytest.mark.parametrize("temperature", [0.7, 1.0, 50.0])
def test_a_sampled_trees_next_token(temperature: float) -> None:
    """The token after a walk is distributed as the rule's: `accept` on one tree many times, siblings that repeat and a missing node."""
    rows = 20_000
    logits = torch.randn(1, 5, V, generator=torch.Generator().manual_seed(8)).expand(rows, -1, -1)
    tokens = torch.tensor([[2, 3, 3, 5, -1]]).expand(rows, -1)
    tree = Tree(torch.tensor([[0, 0, 0, 1, 0]]).expand(rows, -1))
    generator = torch.Generator().manual_seed(9)
    got = accept(logits, tokens, Draft(tokens[:, 1:], tree), temperature, [generator] * rows)
    p = (logits[0] / temperature).softmax(-1).double()
    first = torch.tensor([row[path[1]] if len(path) > 1 else own for row, path, own in zip(got.tokens, got.paths, got.own, strict=True)])
    second = [
        row[path[2]] if len(path) > 2 else own for row, path, own in zip(got.tokens, got.paths, got.own, strict=True) if len(path) > 1
    ]
    for seen, want in ((first, p[0]), (torch.tensor(second), p[1])):
        counts, expected = torch.bincount(seen, minlength=V), want * len(seen)
        assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < 30  # chi-square of 6 degrees: 27 once in 10,000


@pytest.mark.parametrize("parents", [None, [0, 0, 0]])
def test_probabilities_that_are_no_numbers_end_the_request(parents: list[int] | None) -> None:
    logits, tokens = torch.zeros(2, 3, V), torch.ones(2, 3, dtype=torch.long)
    draft = Draft(tokens[:, 1:], None if parents is None else Tree.of([parents] * 2))
    accept(logits, tokens, draft, 1.0, [torch.Generator()] * 2)
    logits[1, 0, 2] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        accept(logits, tokens, draft, 1.0, [torch.Generator()] * 2)


def test_a_token_refused_once_is_refused_again() -> None:
    assert sampled_path([0, 0.5, 0.5], [9, 3, 3], [0, 0, 0], [0, 0.6, 0.0]) == ([0], [1])


def test_missing_nodes_are_never_accepted() -> None:
    tokens = torch.full((4, 3), -1)
    p = torch.full((4, 3, V), 1 / V)
    assert greedy_chain(torch.zeros(4, 3, dtype=torch.long), tokens).node.tolist() == [0] * 4
    assert greedy_path([0] * 3, [9, -1, -1], [0, 0, 1]) == [0] and sampled_path([1.0] * 3, [9, -1, -1], [0, 0, 1], [0.0] * 3) == ([0], [])
    assert sampled_chain(p, tokens, torch.zeros(4, 3)).node.tolist() == [0] * 4
    assert sampled(p, tokens, Tree.chain(4, 2).parents, torch.zeros(4, 3)).node.tolist() == [0] * 4


def test_a_draft_drawn_from_the_target_is_always_accepted() -> None:
    p, _, tokens, u = whole(1, 200, 4)
    tokens = tokens.clamp(min=0)
    assert sampled_chain(p, tokens, u, p).node.tolist() == [3] * 200


def test_inversion_and_residual() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75], [0.5, 0.5, 0.0, 0.0]])
    for u, token in ((0.0, [1, 0]), (0.2499, [1, 0]), (0.25, [3, 0]), (0.5, [3, 1]), (1 - 2**-53, [3, 1])):
        assert draw(p, torch.full((2,), u, dtype=torch.float64)).tolist() == token
    got = residual(p, p.flip(0))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0, 1.0], [2 / 3, 1 / 3, 0.0, 0.0]]))
    assert torch.equal(residual(p, p), p)


def test_where_refusals_leave_nothing_they_did_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded, the chances of two tokens may add up to less than 1, and a draw may then refuse both though there is no third."""
    p = torch.tensor([0.7, 0.2999999])
    monkeypatch.setattr("hyperbagel.speculative.accept.probabilities", lambda *_: torch.nn.functional.pad(p, (2, V - 4)).expand(1, 3, -1))
    monkeypatch.setattr("hyperbagel.speculative.accept._uniforms", lambda *_: torch.tensor([[0.5, 1 - 2**-53, 1 - 2**-53]]).double())
    tokens = torch.tensor([[0, 2, 3]])
    got = accept(torch.zeros(1, 3, V), tokens, Draft(tokens[:, 1:], Tree.of([[0, 0, 0]])), 1.0, [torch.Generator()])
    assert got.paths == [[0]] and got.own == [2]  # drawn as if nothing had been refused
