"""Acceptance rules: fast forms against slow ones, and cases with known answers."""

import pytest
import torch

from hyperbagel.generate.sampling import draw_rows
from hyperbagel.speculative.accept import accept
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft
from hyperbagel.speculative.verify import chosen_chain, chosen_path, draw, residual, sampled, sampled_chain

V = 7


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(seed: int, rows: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(rows, n, V, generator=g).double().softmax(-1)
    q = torch.randn(rows, n, V, generator=g).double().softmax(-1)
    return p, q, torch.randint(-1, V, (rows, n), generator=g), rand(rows, n, seed=seed + 1)


def followed(said: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    path, own = chosen_path(said.__getitem__, tokens, parents)
    assert own == said[path[-1]]
    return path


def test_a_chain_is_a_tree_in_line() -> None:
    p, q, tokens, u = whole(0, 500, 5)
    tree = Tree.chain(500, 4)
    best = p.argmax(-1)
    node = chosen_chain(best, tokens).node.tolist()
    assert node == [len(followed(*row)) - 1 for row in zip(best.tolist(), tokens.tolist(), tree.parents.tolist(), strict=True)]
    assert {0, 1, 2} <= set(node)
    fast, slow = sampled_chain(p, tokens, q, u), sampled(p, tokens, tree.parents, q, u)
    assert torch.equal(fast.node, slow.node) and torch.equal(fast.token, slow.token)
    assert fast.node.unique().numel() > 3


def test_a_choice_is_followed_as_far_as_it_is_right() -> None:
    #      0
    #    1   2       tokens 3 4
    #   3 4   5      tokens 5 6 . 5
    tree = Tree.of([[0, 0, 0, 1, 1, 2]] * 3)
    tokens = torch.tensor([[0, 3, 4, 5, 6, 5]] * 3)
    best = torch.tensor([[4, 5, 5, 0, 0, 6], [3, 6, 5, 0, 1, 2], [0, 5, 5, 1, 1, 1]])
    got = [followed(*row) for row in zip(best.tolist(), tokens.tolist(), tree.parents.tolist(), strict=True)]
    assert got == [[0, 2, 5], [0, 1, 4], [0]]


def plain_draws(p: torch.Tensor, parents: list[int], tokens: list[int], generator: torch.Generator, races: bool) -> tuple[list[int], int]:
    """Slowly, as plain decoding would: draws a token, goes on from the node that says it, if there is one -> (path, own token)."""
    path = [0]
    while True:
        here = p[path[-1]][None]
        token = int(draw_rows(here, [generator]) if races else draw(here, torch.rand(1, generator=generator, dtype=torch.float64)))
        below = [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == token and i > path[-1]]
        if not below:
            return path, token
        path.append(below[0])


@pytest.mark.parametrize("races", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 50.0])
def test_what_is_drawn_after_a_choice_are_plain_decodings_draws(temperature: float, races: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains, and random trees in which siblings may say the same and nodes are missing. Generators stand where it leaves them."""
    monkeypatch.setattr("hyperbagel.speculative.accept._on_cpu", lambda logits: races)
    rows, n = 2000, 7
    g = torch.Generator().manual_seed(4)
    logits, tokens = 2 * torch.randn(rows, n, V, generator=g), torch.randint(-1, V, (rows, n), generator=g)
    random_tree = Tree(torch.stack([torch.randint(0, max(1, i), (rows,), generator=g) for i in range(n)], dim=1))
    for tree in (None, random_tree):
        ours, theirs = ([torch.Generator().manual_seed(i) for i in range(rows)] for _ in range(2))
        got = accept(logits, tokens, Draft(tokens[:, 1:], tree), temperature, ours)
        p, parents = (logits / temperature).softmax(-1), (Tree.chain(rows, n - 1) if tree is None else tree).parents.tolist()
        want = [plain_draws(*row, races) for row in zip(p, parents, tokens.tolist(), theirs, strict=True)]
        assert [(path, own) for path, own in zip(got.paths, got.own, strict=True)] == want
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))
        assert got.root.tolist() == got.own and {1, 2, 3} <= {len(path) for path in got.paths}


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("parents", [None, [0, 0, 0]])
def test_probabilities_that_are_no_numbers_end_the_request(parents: list[int] | None, drawn: bool) -> None:
    logits, tokens = torch.zeros(2, 3, V), torch.ones(2, 3, dtype=torch.long)
    q = torch.full((2, 3, V), 1 / V) if drawn else None
    draft = Draft(tokens[:, 1:], None if parents is None else Tree.of([parents] * 2), q)
    accept(logits, tokens, draft, 1.0, [torch.Generator()] * 2)
    logits[1, 0, 2] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        accept(logits, tokens, draft, 1.0, [torch.Generator()] * 2)


def test_missing_nodes_are_never_accepted() -> None:
    tokens = torch.full((4, 3), -1)
    p = torch.full((4, 3, V), 1 / V)
    assert chosen_chain(torch.zeros(4, 3, dtype=torch.long), tokens).node.tolist() == [0] * 4
    assert followed([0] * 3, [9, -1, -1], [0, 0, 1]) == [0]
    assert sampled_chain(p, tokens, p, torch.zeros(4, 3)).node.tolist() == [0] * 4
    assert sampled(p, tokens, Tree.chain(4, 2).parents, p, torch.zeros(4, 3)).node.tolist() == [0] * 4


def test_a_draft_drawn_from_the_target_is_always_accepted() -> None:
    p, _, tokens, u = whole(1, 200, 4)
    tokens = tokens.clamp(min=0)
    assert sampled_chain(p, tokens, p, u).node.tolist() == [3] * 200


def test_inversion_and_residual() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75], [0.5, 0.5, 0.0, 0.0]])
    for u, token in ((0.0, [1, 0]), (0.2499, [1, 0]), (0.25, [3, 0]), (0.5, [3, 1]), (1 - 2**-53, [3, 1])):
        assert draw(p, torch.full((2,), u, dtype=torch.float64)).tolist() == token
    got = residual(p, p.flip(0))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0, 1.0], [2 / 3, 1 / 3, 0.0, 0.0]]))
    assert torch.equal(residual(p, p), p)
