"""Is an answer right? Short answers go by the one word that matters, descriptions and step-by-step counts by the facts they state."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hyperbagel.evaluate.facts import NUMBERS, check
from hyperbagel.toybox.items import QuestionItem
from hyperbagel.toybox.scene import BACKGROUNDS, COLOURS

DENSE = ("describe", "steps")


@dataclass(frozen=True)
class QuestionScore:
    """score in [0, 1]. The counts are of facts; they are 0 except for descriptions and step-by-step counts."""

    score: float
    right: int = 0
    stated: int = 0
    expected: int = 0


def score_question(item: QuestionItem, text: str) -> QuestionScore:
    """The score of an answer, compared with the item's true one.

    Descriptions: facts right / facts stated. ours: if the true answer states more facts, the divisor is its number, or a single safe fact
    would get full marks.
    """
    if item.kind in DENSE:
        right, stated = check(text, item.scene)
        expected = check(item.answer, item.scene)[1]
        return QuestionScore(right / max(stated, expected, 1), right, stated, expected)
    rule = next((r for prefix, r in RULES.items() if item.kind.startswith(prefix)), plain)
    truth = rule(item.answer)
    return QuestionScore(float(truth is not None and rule(text) == truth))


def yes_no(text: str) -> str | None:
    """The first yes or no of a text; None without one."""
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found[1] if found else None


def number(text: str) -> str | None:
    """The one number in a text, as digits; None without one, or with two that differ."""
    found = {NUMBERS[w] for w in re.findall(rf"\b({'|'.join(NUMBERS)})\b", text.lower())}
    return str(found.pop()) if len(found) == 1 else None


def colour(text: str) -> str | None:
    """The one colour (of a thing or a background) in a text; None without one, or with two."""
    found = set(re.findall(rf"\b({'|'.join([*COLOURS, *BACKGROUNDS])})\b", text.lower()))
    return found.pop() if len(found) == 1 else None


def letter(text: str) -> str | None:
    """The letter of a choice: "B", "b.", "(B) red", "the answer is B"; None without one. The article "a" is not a choice."""
    found = re.fullmatch(r"\W*([A-Da-d])\W*", text) or re.match(r"\W*([A-Da-d])\)", text) or re.search(r"\b([B-D])\b|\bA\b(?! [a-z])", text)
    return (found[1] or "A").upper() if found else None


def plain(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces."""
    return " ".join(w for w in re.findall(r"\w+", text.lower()) if w not in ("a", "an", "the"))


# a kind of question, or the beginning of its name -> what is compared in the true answer and the model's
RULES: dict[str, Callable[[str], str | None]] = {
    "existence": yes_no,
    "relation": yes_no,
    "pair": yes_no,
    "count": number,
    "colour": colour,
    "choice": letter,
}
