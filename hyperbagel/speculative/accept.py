"""What a round accepts, as the decoder needs it: the rules of `verify` applied to the target's logits, and the result on the CPU.

Drafts that are a choice (q None) are compared with what the target itself says after each node, greedy or drawn. Each token of an answer
takes its row's next draw, as in plain decoding, so that a seed's answer is the same with drafts and without. Drafts that were drawn are
accepted by rejection sampling: the distribution is the target's, the draws are others.

Shape legend: B rows, n nodes (root included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.generate.sampling import BROKEN, NOT_FINITE, draw, look_ahead, nucleus, numbers, pick, probabilities, told
from hyperbagel.speculative.tree import path_to, tree_depth
from hyperbagel.speculative.types import Draft
from hyperbagel.speculative.verify import chosen_chain, chosen_path, sampled, sampled_chain


class Verdict(NamedTuple):
    """Per row: the target's own next token, the accepted nodes from the root on, all nodes' tokens, and the depth of the draft."""

    root: Tensor  # [B] the next token, root of the next round
    own: list[int]  # the same as numbers
    paths: list[list[int]]
    tokens: list[list[int]]
    deepest: list[int]


def accept(
    logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator], top_p: float = 1.0
) -> Verdict:
    """logits [B, n, V] after tokens [B, n], roots first; top_p: see `nucleus`. Waits for the device once, or several times for trees that
    were drawn.

    Raises RuntimeError if it samples and the model's probabilities are not finite, as plain decoding does.
    """
    if tokens.shape[1] == 1:  # as lean as a plain step, since rounds without drafts must not cost more
        root = pick(logits[:, 0], temperature, generators, top_p)
        own, before = torch.stack([root, tokens[:, 0]]).tolist()
        if BROKEN in own:
            raise RuntimeError(NOT_FINITE)
        return Verdict(root, own, [[0]] * len(own), [[id_] for id_ in before], [0] * len(own))
    drawn = temperature > 0 and draft.q is None
    if drawn and _on_cpu(logits):
        return _walk(logits, tokens, draft, temperature, generators, top_p)
    logits = nucleus(logits, temperature, top_p)
    said = _said(logits, draft, temperature, generators) if drawn or temperature == 0 else None
    decide = _chain if draft.tree is None else _tree
    verdict = decide(logits, tokens, draft, said, temperature, generators)
    if BROKEN in verdict.own:
        raise RuntimeError(NOT_FINITE)
    if drawn:  # a draw for each new token: those accepted behind the root, and the target's own
        for generator, path in zip(generators, verdict.paths, strict=True):
            numbers([generator], len(path))
    return verdict


def _on_cpu(logits: Tensor) -> bool:
    return logits.device.type == "cpu"


def _walk(logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator], top_p: float) -> Verdict:
    """Down a choice on a CPU, drawing only after the nodes that it comes to."""
    rows, n = tokens.shape
    above = [[0, *range(n - 1)]] * rows if draft.tree is None else draft.tree.parents.tolist()
    ids = tokens.tolist()

    def says(b: int, generator: torch.Generator) -> Callable[[int], int]:
        return lambda node: told(pick(logits[b, node][None], temperature, [generator], top_p))[0]

    walks = [chosen_path(says(b, g), *row) for b, (g, *row) in enumerate(zip(generators, ids, above, strict=True))]
    own = [token for _, token in walks]
    return Verdict(torch.tensor(own), own, [path for path, _ in walks], ids, [tree_depth(*row) for row in zip(ids, above, strict=True)])


def _chain(
    logits: Tensor, tokens: Tensor, draft: Draft, said: Tensor | None, temperature: float, generators: Sequence[torch.Generator]
) -> Verdict:
    if said is not None:
        node, root = chosen_chain(said, tokens)
    else:
        assert draft.q is not None
        p = probabilities(logits, temperature)
        node, root = sampled_chain(p, tokens, draft.q, numbers(generators, tokens.shape[1]).to(p.device))
        root = torch.where(p.isfinite().flatten(1).all(1), root, BROKEN)  # looked at in the one wait
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
        ids, above, says = torch.stack([tokens, parents, said]).tolist()
        walks = [chosen_path(row.__getitem__, *tree) for row, *tree in zip(says, ids, above, strict=True)]
        paths, own = [path for path, _ in walks], [token for _, token in walks]
        root = torch.tensor(own, device=tokens.device)
    else:
        assert draft.q is not None
        p = probabilities(logits, temperature)
        if not bool(p.isfinite().all()):
            raise RuntimeError(NOT_FINITE)
        ids, above = torch.stack([tokens, parents]).tolist()
        node, root = sampled(p, tokens, parents, draft.q, numbers(generators, tokens.shape[1]).to(p.device))
        paths = [path_to(row, end) for row, end in zip(above, node.tolist(), strict=True)]
        own = root.tolist()
    return Verdict(root, own, paths, ids, [tree_depth(*row) for row in zip(ids, above, strict=True)])


def _said(logits: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """What the target says after each node of a choice [B, n]: its likeliest token, or what it draws, for all nodes at once, since on a GPU
    a look at each one would be a wait.

    Nodes of one depth share a number, the one that plain decoding would take there, since at most one of them is on the path.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, n = probabilities(logits, temperature), logits.shape[1]
    ahead = look_ahead(generators, n).to(p.device)
    if draft.tree is not None:
        ahead = ahead.gather(1, draft.tree.depths)
    said = torch.stack([draw(p[:, i], ahead[:, i]) for i in range(n)], dim=1)  # node by node: fp64 over V takes memory
    return torch.where(p.isfinite().flatten(1).all(1)[:, None], said, BROKEN)
