"""Trees from one pass of a block drafter, at no further pass.

A block's outputs do not depend on which tokens are chosen; only the Markov head does. So once the pass is made, the logits at depth d
after any token u are known: logits[d] + link(u). The likeliest paths through them are a tree, which the target reads about as
cheaply as a chain of as many tokens. Where a chain would end at its first wrong token, a tree may hold the right one beside it.

Shape legend: B rows, K tokens of a block, N nodes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft

MAX_GAP = 12.0  # nats below its likeliest sibling from which on a token is never a child: a chance of 6e-6

Floats = npt.NDArray[np.float32]
Link = Callable[[int], Floats]


class Node(NamedTuple):
    """A drafted token. parent: 0 for the root, else one more than the index of a node before it. chance: of the path down to it."""

    token: int
    parent: int
    chance: float


def search_best_first(
    logits: Floats, link: Link, root: int, nodes: int, *, branch: int, least: float = 0.0, stop: int = -1, scale: float = 1.0
) -> list[Node]:
    """The `nodes` likeliest paths below the token `root`, by falling chance, so that parents come first (best-first search).

    logits [K, V]; link(u) [V], what the Markov head adds to the logits after the token u. scale multiplies both.
    branch: most children of a node.
    No path of a chance below `least`, no child MAX_GAP below its siblings, no node for the token `stop`: reading its parent already
    says whether it comes, and nothing would follow it.
    """
    found: list[Node] = []
    candidates: list[tuple[float, int, int, int]] = []  # (-log chance, depth, parent, token)

    def expand(above: int, token: int, depth: int, log_chance: float) -> None:
        row = logits[depth] + link(token)
        if scale != 1.0:
            row *= scale
        most = float(row.max())
        log_all = most + math.log(np.exp(row - most).sum())
        if not math.isfinite(log_all):  # a broken drafter may cost speed, not the request
            return
        # As a rule these are fewer than `branch`, and finding them is faster than sorting out the best.
        few = np.flatnonzero(row >= max(most - MAX_GAP, floor + log_all - log_chance))
        if len(few) > branch:
            few = few[np.argpartition(row[few], -branch)[-branch:]]
        for child, x in zip(few.tolist(), row[few].tolist(), strict=True):
            if child != stop:
                heappush(candidates, (log_all - x - log_chance, depth, above, child))

    floor = math.log(least) if least > 0 else -math.inf
    with np.errstate(invalid="ignore", over="ignore"):
        expand(0, root, 0, 0.0)
        while candidates and len(found) < nodes:
            minus, depth, parent, token = heappop(candidates)
            found.append(Node(token, parent, math.exp(-minus)))
            if depth + 1 < len(logits):
                expand(len(found), token, depth + 1, -minus)
    return found


def spine_first(nodes: Sequence[Node]) -> tuple[list[int], list[int]]:
    """(tokens, parents) of `nodes`, numbered anew: first the likeliest path, then the others. What a round accepts is mostly a start of
    that path, which then lies in the cache as it must and need not be moved."""
    first: dict[int, int] = {}  # parent -> its likeliest child
    for i, node in enumerate(nodes, 1):
        first.setdefault(node.parent, i)
    spine, at = [0], first.get(0)
    while at is not None:
        spine.append(at)
        at = first.get(at)
    on = set(spine)
    order = [*spine[1:], *(i for i in range(1, len(nodes) + 1) if i not in on)]
    place = {0: 0} | {old: new for new, old in enumerate(order, 1)}
    return [nodes[i - 1].token for i in order], [place[nodes[i - 1].parent] for i in order]


def tree_draft(rows: Sequence[Sequence[Node] | None], least: float = 0.0) -> Draft:
    """The draft of several rows' nodes; None: a row that needs none. Rows share the number of columns, so ranks are dropped whose chance,
    averaged over the rows that need some, is below `least`. Without branches it is a chain, which is cheaper to read."""
    needy = [row for row in rows if row is not None]
    columns = max(map(len, needy), default=0)
    if least > 0:
        mean = [sum(row[i].chance for row in needy if i < len(row)) / len(needy) for i in range(columns)]
        columns = sum(chance >= least for chance in mean)
    made = [spine_first(row[:columns] if row is not None else []) for row in rows]
    tokens = torch.tensor([[*tokens, *[-1] * (columns - len(tokens))] for tokens, _ in made], dtype=torch.long)
    if all(parents == list(range(len(parents))) for _, parents in made):
        return Draft(tokens)
    return Draft(tokens, Tree(torch.tensor([[0, *parents, *[0] * (columns - len(parents))] for _, parents in made])))
