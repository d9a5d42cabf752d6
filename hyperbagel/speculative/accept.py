"""What a round accepts, as the decoder needs it: the rules of `verify` applied to the target's logits, and the result on the CPU.

Shape legend: B rows, n nodes (root included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperbagel.generate.sampling import NOT_FINITE, draw, pick, probabilities
from hyperbagel.speculative.tree import path_to, tree_depth
from hyperbagel.speculative.types import Draft
from hyperbagel.speculative.verify import greedy_chain, greedy_path, sampled, sampled_chain, sampled_path


class Verdict(NamedTuple):
    """Per row: the target's own next token, the accepted nodes from the root on, all nodes' tokens, and the depth of the draft."""

    root: Tensor  # [B] the next token, root of the next round
    own: list[int]  # the same as numbers
    paths: list[list[int]]
    tokens: list[list[int]]
    deepest: list[int]


def accept(logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Verdict:
    """logits [B, n, V] after tokens [B, n], roots first. Waits for the device once; for trees that sample, several times.

    Raises RuntimeError if it samples and the model's probabilities are not finite, as plain decoding does.
    """
    if tokens.shape[1] == 1:  # as lean as a plain step, since rounds without drafts must not cost more
        root = pick(logits[:, 0], temperature, generators)
        own, before = torch.stack([root, tokens[:, 0]]).tolist()
        return Verdict(root, own, [[0]] * len(own), [[id_] for id_ in before], [0] * len(own))
    walk = _chain if draft.tree is None else _tree
    return walk(logits, tokens, draft, temperature, generators)


def _chain(logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Verdict:
    if temperature == 0:
        node, root = greedy_chain(logits.argmax(-1), tokens)
    else:
        p = probabilities(logits, temperature)
        node, root = sampled_chain(p, tokens, _uniforms(tokens, generators), draft.q)
        root = torch.where(p.isfinite().flatten(1).all(1), root, -1)  # looked at below, in the one wait
    rows = torch.cat([node[:, None], root[:, None], tokens], dim=1).tolist()
    own = [row[1] for row in rows]
    if min(own) < 0:
        raise RuntimeError(NOT_FINITE)
    paths = [list(range(row[0] + 1)) for row in rows]
    return Verdict(root, own, paths, [row[2:] for row in rows], [sum(id_ >= 0 for id_ in row[3:]) for row in rows])


def _tree(logits: Tensor, tokens: Tensor, draft: Draft, temperature: float, generators: Sequence[torch.Generator]) -> Verdict:
    """The way down a tree is found on the CPU, where few of its nodes need a look."""
    assert draft.tree is not None
    parents = draft.tree.parents
    if temperature == 0:
        ids, above, best = torch.stack([tokens, parents, logits.argmax(-1)]).tolist()
        paths = [greedy_path(*row) for row in zip(best, ids, above, strict=True)]
        own = [row[path[-1]] for row, path in zip(best, paths, strict=True)]
        root = torch.tensor(own, device=tokens.device)
    else:
        ids, above = torch.stack([tokens, parents]).tolist()
        p, uniforms = probabilities(logits, temperature), _uniforms(tokens, generators)
        if not bool(p.isfinite().all()):
            raise RuntimeError(NOT_FINITE)
        if draft.q is None:
            chances = p[torch.arange(len(p), device=p.device)[:, None], parents, tokens.clamp(min=0)]
            walks = [sampled_path(*row) for row in zip(chances.tolist(), ids, above, uniforms.tolist(), strict=True)]
            paths, root = [path for path, _ in walks], _draw_rest(p, ids, walks, uniforms[:, 0])
        else:
            node, root = sampled(p, tokens, parents, uniforms, draft.q)
            paths = [path_to(row, end) for row, end in zip(above, node.tolist(), strict=True)]
        own = root.tolist()
    return Verdict(root, own, paths, ids, [tree_depth(*row) for row in zip(ids, above, strict=True)])


def _draw_rest(p: Tensor, ids: list[list[int]], walks: Sequence[tuple[list[int], list[int]]], uniforms: Tensor) -> Tensor:
    """Each row's own token: drawn after its last accepted node, from what refused tokens leave of p [B, n, V] there -> [B]."""
    left = p[torch.arange(len(p), device=p.device), torch.tensor([path[-1] for path, _ in walks], device=p.device)]
    refused = [(b, ids[b][i]) for b, (_, nodes) in enumerate(walks) for i in nodes]
    if refused:
        rest = left.index_put(tuple(torch.tensor(refused, device=p.device).T), left.new_zeros(()))
        left = torch.where(rest.sum(-1, keepdim=True) > 0, rest, left)  # nothing is left: then a refusal had no chance
    return draw(left, uniforms)


def _uniforms(tokens: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One in [0, 1) for each node, from its row's own generator."""
    drawn = [torch.rand(tokens.shape[1], generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(drawn).to(tokens.device)
