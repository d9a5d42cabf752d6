"""Prompt lookup (Saxena 2023): drafts what followed the last few tokens where they last occurred, in question or answer. No training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hyperbagel.generate.decode import taken
from hyperbagel.generate.session import Session
from hyperbagel.speculative.types import Draft, Seen


class Lookup:
    """Drafts a chain of up to `width` tokens after the longest n-gram (n from `longest` down to `shortest`) that occurred before."""

    taps: tuple[int, ...] = ()
    draws = False
    threshold = 0.0  # never applied: it cannot estimate its chances

    def __init__(self, width: int = 8, longest: int = 3, shortest: int = 1) -> None:
        self.width, self.depth, self.longest, self.shortest = width, width, longest, shortest

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.known = self._texts(sessions)

    def _texts(self, sessions: Sequence[Session]) -> list[NGrams]:
        return [NGrams((id_ for text in session.texts for id_ in text), self.longest, self.shortest) for session in sessions]

    def propose(self, seen: Seen, limit: int) -> Draft:
        found = []
        for known, ids, root in zip(self.known, seen.ids, seen.roots(), strict=True):
            known.extend(ids)
            found.append(known.continuation(root, min(self.width, limit)))
        longest = max(len(row) for row in found)
        padded = [row + [-1] * (longest - len(row)) for row in found]
        return Draft(torch.tensor(padded, dtype=torch.long, device=seen.root.device).view(len(padded), longest))

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        self.known = taken(self.known, rows)

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        self.known += self._texts(sessions)

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""


class NGrams:
    """A growing text and what followed each of its n-grams last: a look-up takes the same time however long the text is."""

    def __init__(self, ids: Iterable[int], longest: int, shortest: int) -> None:
        self.ids: list[int] = []
        self.sizes = range(longest, shortest - 1, -1)
        self.followed: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token behind its latest occurrence
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            for size in self.sizes:
                if len(self.ids) >= size:
                    self.followed[tuple(self.ids[-size:])] = len(self.ids)
            self.ids.append(id_)

    def continuation(self, root: int, most: int) -> list[int]:
        """Up to `most` tokens that followed the latest earlier occurrence of the longest n-gram ending in `root`; [] if there is none.

        A copy that reaches the end of the text continues with what it has copied itself: "a b a b" is followed by "a b a b ...".
        """
        whole = [*self.ids[-max(self.sizes, default=0) :], root]
        for size in self.sizes:
            tail = tuple(whole[-size:])
            if len(self.ids) >= size and tail == tuple(self.ids[-size:]):
                at = len(self.ids)  # followed by the root itself
            elif len(tail) < size or (at := self.followed.get(tail, -1)) < 0:
                continue
            out: list[int] = []
            while len(out) < most:
                i = at + len(out)
                out.append(self.ids[i] if i < len(self.ids) else [root, *out][i - len(self.ids)])
            return out
        return []
