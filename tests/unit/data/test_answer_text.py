"""Stop strings: the text ends before the one that is complete first, however it comes, and nothing given out is taken back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from hyperbagel.data.answer_text import AnswerText


class Pieces:
    """A tokenizer whose i-th token is a given piece of text; the last one may come with the end."""

    def __init__(self, pieces: Sequence[str], late: str = "") -> None:
        self.pieces, self.late = pieces, late

    def stream(self) -> Pieces:
        return self

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return self.late


def read(pieces: Sequence[str], stops: Sequence[str], think: bool = False, late: str = "") -> tuple[list[str], AnswerText]:
    """What is given out by token and at the end, and the object."""
    tokenizer: Any = Pieces(pieces, late)
    text = AnswerText(tokenizer, stops, think)
    return [*(text.push(i) for i in range(len(pieces))), text.finish()], text


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Letter by letter: the text before the first stop string to be complete, the longest of those, and that string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def pieces_of(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        n = rng.randint(0, 4)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


def test_it_ends_before_the_first_stop_string() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("ab.") for _ in range(rng.randint(0, 20)))
        stops = ["".join(rng.choice("ab.") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        given, found = read(pieces_of(text, rng), stops)
        expected, stop = cut(text, stops)
        assert ("".join(given), found.text, found.ended_at) == (expected, expected, stop), (text, stops)


def test_text_comes_at_once_unless_it_may_begin_a_stop_string() -> None:
    given, _ = read(["one ", "en", "d ", "E", "N", "D more"], ["END"])
    assert given == ["one ", "en", "d ", "", "", "", ""]
    given, _ = read(["one E", "N", "o"], ["END"])
    assert given == ["one ", "", "ENo", ""]
    assert read(["one E"], ["END"])[0] == ["one ", "E"], "at the end it is no beginning"
    assert read(["<think> E", "N"], ["END"], think=True)[0] == ["<think> E", "N", ""], "nor is it one in a thought"
    assert read(["<thi", "s> E"], [], think=True)[0] == ["<thi", "s> E", ""], "without stop strings nothing is held back"


def test_what_comes_with_the_end_counts() -> None:
    given, found = read(["one E"], ["ED"], late="D")
    assert given == ["one ", ""] and found.ended_at == "ED" and found.text == "one "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> a. b. </think> c. d.", "<think> a. b. </think> c"),
        (" \n<think>a.</think>. d", " \n<think>a.</think>"),
        ("<think> a. b. ", "<think> a. b. "),
        ("<thin. k", "<thin"),
        ("<thi", "<thi"),
        (" a <think> b. </think> c.", " a <think> b"),
        ("c. d.", "c"),
    ],
)
def test_a_thought_holds_no_stop_string(text: str, expected: str) -> None:
    for seed in range(40):
        given, found = read(pieces_of(text, random.Random(seed)), ["."], think=True)
        assert "".join(given) == found.text == expected


def test_a_stop_string_of_the_tag_s_letters() -> None:
    """Nothing of a beginning that may be a tag is given out before it is known to be none."""
    for seed in range(40):
        given, found = read(pieces_of("<thx", random.Random(seed)), ["<t"], think=True)
        assert "".join(given) == found.text == "" and found.ended_at == "<t"
    given, found = read(["<t"], ["<t"], think=True)
    assert given == ["", ""] and found.ended_at == "<t"


def test_nor_does_the_thought_s_tag() -> None:
    assert "".join(read(list("<think>a</think>b>c"), [">"], think=True)[0]) == "<think>a</think>b"


def test_a_thought_is_only_looked_for_if_asked_for() -> None:
    assert "".join(read(["<think> a. b."], ["."])[0]) == "<think> a"
