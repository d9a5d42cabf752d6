"""What a round accepts, as the decoder needs it: the rules of `verify` applied to the target's logits, and the result on the CPU.

Drafts that are a choice (q None) are compared with what the target itself says after each node, greedy or drawn. Each token of an answer
takes its row's next draw, as in plain decoding, so that a seed's answer is the same with drafts and without. Drafts that were drawn are
accepted by rejection sampling: the distribution is the target's, the draws are others.

Shape legend: B rows, n nodes (root included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.generate.sampling import NOT_FINITE, draw, look_ahead, pick, probabilities
from hyperbagel.speculative.tree import path_to, tree_depth
from hyperbagel.speculative.types import Draft
from hyperbagel.speculative.verify import chosen_chain, chosen_path, sampled, sampled_chain

_BROKEN = -2  # what the target says where its probabilities are not finite: no token, and no missing node (-1)


class Verdict(NamedTuple):
    """Per row: the target's own next token, the accepted nodes from the root on, all nodes' tokens, and the depth of the draft."""

    root: Tensor  # [B] the next token, root of the next round
    own: list[int]  # the same as numbers
    paths: list[list[int]]
    tokens: list[list[int]]
    deepest: list[int]


def accept(logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Verdict:
    """logits [B, n, V] after tokens [B, n], roots first. Waits for the device once; for trees that were drawn, several times.

    Raises RuntimeError if it samples and the model's probabilities are not finite, as plain decoding does.
    """
    if tokens.shape[1] == 1:  # as lean as a plain step, since rounds without drafts must not cost more
        root = pick(logits[:, 0], temperature, generators)
        own, before = torch.stack([root, tokens[:, 0]]).tolist()
        return Verdict(root, own, [[0]] * len(own), [[id_] for id_ in before], [0] * len(own))
    drawn = temperature > 0 and draft.q is None
    if drawn and _on_cpu(logits):
        return _walk(logits, tokens, draft, temperature, generators)
    said = _said(logits, draft, temperature, generators) if drawn else logits.argmax(-1) if temperature == 0 else None
    decide = _chain if draft.tree is None else _tree
    verdict = decide(logits, tokens, draft, said, temperature, generators)
    if min(verdict.own) < 0:
        raise RuntimeError(NOT_FINITE)
    if drawn:
        for generator, path in zip(generators, verdict.paths, strict=True):
            look_ahead(
                [generator], len(path), leave=True
            )  # a draw for each new token: those accepted behind the root, and the target's own
    return verdict


def _on_cpu(logits: Tensor) -> bool:
    return logits.device.type == "cpu"


def _walk(logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Verdict:
    """Down a choice on a CPU: draws after a node, and goes on where a node says the same, so that no draw is made in vain."""
    rows, n = tokens.shape
    above = [[0, *range(n - 1)]] * rows if draft.tree is None else draft.tree.parents.tolist()
    ids, own, paths = tokens.tolist(), list[int](), list[list[int]]()
    for b, generator in enumerate(generators):
        path: list[int] = []
        node: int | None = 0
        while node is not None:
            path.append(node)
            said = int(pick(logits[b, node][None], temperature, [generator]))
            node = next((i for i in range(node + 1, n) if above[b][i] == node and ids[b][i] == said), None)
        own.append(said)
        paths.append(path)
    return Verdict(torch.tensor(own), own, paths, ids, [tree_depth(*row) for row in zip(ids, above, strict=True)])


def _chain(
    logits: Tensor, tokens: Tensor, draft: Draft, said: Tensor | None, temperature: float, generators: Sequence[torch.Generator]
) -> Verdict:
    if said is not None:
        node, root = chosen_chain(said, tokens)
    else:
        assert draft.q is not None
        p = probabilities(logits, temperature)
        node, root = sampled_chain(p, tokens, draft.q, _for_each_node(tokens, generators))
        root = torch.where(p.isfinite().flatten(1).all(1), root, _BROKEN)  # looked at in the one wait
    rows = torch.cat([node[:, None], root[:, None], tokens], dim=1).tolist()
    paths = [list(range(row[0] + 1)) for row in rows]
    deepest = [sum(id_ >= 0 for id_ in row[3:]) for row in rows]
    return Verdict(root, [row[1] for row in rows], paths, [row[2:] for row in rows], deepest)


def _tree(
    logits: Tensor, tokens: Tensor, draft: Draft, said: Tensor | None, temperature: float, generators: Sequence[torch.Generator]
) -> Verdict:
    """The way down a tree is found on the CPU, where few of its nodes need a look."""
    assert draft.tree is not None
    parents = draft.tree.parents
    if said is not None:
        ids, above, told = torch.stack([tokens, parents, said]).tolist()
        paths = [chosen_path(*row) for row in zip(told, ids, above, strict=True)]
        own = [row[path[-1]] for row, path in zip(told, paths, strict=True)]
        root = torch.tensor(own, device=tokens.device)
    else:
        assert draft.q is not None
        p = probabilities(logits, temperature)
        if not bool(p.isfinite().all()):
            raise RuntimeError(NOT_FINITE)
        ids, above = torch.stack([tokens, parents]).tolist()
        node, root = sampled(p, tokens, parents, draft.q, _for_each_node(tokens, generators))
        paths = [path_to(row, end) for row, end in zip(above, node.tolist(), strict=True)]
        own = root.tolist()
    return Verdict(root, own, paths, ids, [tree_depth(*row) for row in zip(ids, above, strict=True)])


def _said(logits: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """What the target draws after each node of a choice [B, n], on a GPU, where a look at each node would be a wait.

    Nodes of one depth share a number, the one that plain decoding would take there, since at most one of them is on the path.
    """
    p, n = probabilities(logits, temperature), logits.shape[1]
    numbers = look_ahead(generators, n).to(p.device)
    if draft.tree is not None:
        numbers = numbers.gather(1, draft.tree.depths)
    said = torch.stack([draw(p[:, i], numbers[:, i]) for i in range(n)], dim=1)  # node by node: fp64 over V takes memory
    return torch.where(p.isfinite().flatten(1).all(1)[:, None], said, _BROKEN)


def _for_each_node(tokens: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A number in [0, 1) for each node, from its row's own generator."""
    drawn = [torch.rand(tokens.shape[1], generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(drawn).to(tokens.device)
