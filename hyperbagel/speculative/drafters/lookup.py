"""Prompt lookup: what followed the last few tokens the last time they occurred, in the question or the answer so far. No training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hyperbagel.generate.session import Session
from hyperbagel.speculative.types import Draft, Seen


class Lookup:
    """Drafts a chain of up to `width` tokens after the longest n-gram, `longest` down to `shortest`, that occurred before."""

    taps: tuple[int, ...] = ()
    threshold = 0.0  # it has no idea of its chances

    def __init__(self, width: int = 8, longest: int = 3, shortest: int = 1) -> None:
        self.width, self.longest, self.shortest = width, longest, shortest

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.known = [[id_ for text in session.texts for id_ in text] for session in sessions]

    def propose(self, seen: Seen, limit: int) -> Draft:
        found = []
        for known, ids, root in zip(self.known, seen.ids, seen.root.tolist(), strict=True):
            known += ids
            found.append(continuation([*known, root], min(self.width, limit), self.longest, self.shortest))
        longest = max(len(row) for row in found)
        padded = [row + [-1] * (longest - len(row)) for row in found]
        return Draft(torch.tensor(padded, dtype=torch.long, device=seen.root.device).view(len(padded), longest))

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""


def continuation(ids: Sequence[int], most: int, longest: int, shortest: int) -> list[int]:
    """Up to `most` tokens after the latest earlier occurrence of the end of `ids`; the longest matching end counts, [] if there is none.

    A copy that reaches the end of `ids` goes on in what it has itself copied: "a b a b" is followed by "a b a b ...".
    """
    for size in range(min(longest, len(ids) - 1), shortest - 1, -1):
        tail = list(ids[-size:])
        for at in range(len(ids) - size - 1, -1, -1):
            if list(ids[at : at + size]) == tail:
                out = list(ids[at + size : at + size + most])
                while len(out) < most:
                    out.append([*ids, *out][at + size + len(out)])
                return out
    return []
