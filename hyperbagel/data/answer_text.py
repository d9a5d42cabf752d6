"""The text of an answer as its tokens come, up to the first of the strings that it is to stop at."""

from __future__ import annotations

from collections.abc import Sequence

from hyperbagel.data.prompts import CLOSE, OPEN
from hyperbagel.data.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text. It ends before the stop string that is complete first, however tokens cut the text; a thought holds none.

    Text that may yet turn out to be the beginning of a stop string is held back, so what was given out never has to be taken back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), think: bool = False) -> None:
        """think: the answer may begin with a thought."""
        self._stream, self._stops, self._think = tokenizer.stream(), stops, think
        self._given = 0  # characters
        self.text = ""  # all that is known of it; once it ended, without the stop string
        self.ended_at: str | None = None  # the stop string

    def push(self, token: int) -> str:
        """The new text that is certain with this token, often ""."""
        return self._take(self._stream.push(token))

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._take(self._stream.finish(), last=True)

    def _take(self, piece: str, last: bool = False) -> str:
        if self.ended_at is not None:
            return ""
        self.text += piece
        begin = self._begin(last)
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
        ready = len(self.text) if last else self._certain(begin)
        if found:
            _, ready, self.ended_at = min(found)
            self.text = self.text[:ready]
        given, self._given = self._given, ready
        return self.text[given:ready]

    def _begin(self, last: bool) -> int:
        """Where stop strings are looked for: behind a thought. While it may yet turn out to be one, behind everything."""
        head = self.text.lstrip()
        if not self._think or not head.startswith(OPEN[: len(head)]) or (last and len(head) < len(OPEN)):
            return 0
        close = self.text.find(CLOSE)
        return len(self.text) if close < 0 else close + len(CLOSE)

    def _certain(self, begin: int) -> int:
        """How much of the text stays, whatever follows."""
        if self._stops and self._think and len(self.text.lstrip()) < len(OPEN):
            return 0  # a thought, or an answer that has not been searched
        longest = max(map(len, self._stops), default=1)
        for at in range(max(begin, len(self.text) - longest + 1), len(self.text)):
            if any(stop.startswith(self.text[at:]) for stop in self._stops):
                return at
        return len(self.text)
