"""Nobody drafts: rounds of one token, in a batch whose rows may come and go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hyperbagel.generate.session import Session
from hyperbagel.speculative.types import Draft, Seen


class Nobody:
    """Drafts nothing."""

    taps: tuple[int, ...] = ()
    width, depth, draws, threshold = 0, 0, False, 0.0

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        """It needs nothing."""

    def propose(self, seen: Seen, limit: int) -> Draft:
        return Draft(seen.root.new_empty(len(seen.root), 0))

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """It keeps nothing of any row."""

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        """It needs nothing."""

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""
