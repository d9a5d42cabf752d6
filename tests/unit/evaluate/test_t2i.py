"""GenEval's rules on readings written by hand, one broken word at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hyperbagel.evaluate.summary import summarise_t2i
from hyperbagel.evaluate.t2i import relations, what_is_wrong
from hyperbagel.toybox.detector import Detection, Reading
from hyperbagel.toybox.items import T2IItem, Wanted
from hyperbagel.toybox.scene import Scene


def seen(noun: str, colour: str = "red", cx: float = 0.5, cy: float = 0.5, confidence: float = 0.99) -> Detection:
    return Detection(noun, colour, "large", "flat", cx, cy, 0.3, confidence)


def reading(*things: Detection) -> Reading:
    return Reading(things, "gray", "plain", "normal")


def item(category: str, *include: Wanted, relation: tuple[str, str, str] | None = None) -> T2IItem:
    return T2IItem("x", category, "", include, relation, Scene("gray", ()), "")


CAR = seen("car")


@pytest.mark.parametrize(
    ("wanted", "things", "complaint"),
    [
        (item("single", Wanted("car", None, 1)), (CAR,), ""),
        (item("single", Wanted("car", None, 1)), (seen("boat"),), "car: found 0"),
        (item("single", Wanted("car", None, 1)), (), "car: found 0"),
        (item("single", Wanted("car", None, 1)), (replace(CAR, confidence=0.29),), "car: found 0"),
        # more than asked is wrong in counting alone
        (item("single", Wanted("car", None, 1)), (CAR, CAR), ""),
        (item("counting", Wanted("car", None, 2)), (CAR, CAR), ""),
        (item("counting", Wanted("car", None, 2)), (CAR, CAR, CAR), "exactly 2"),
        (item("counting", Wanted("car", None, 2)), (CAR,), "found 1"),
        # counting believes only what is above 0.9
        (item("counting", Wanted("car", None, 2)), (CAR, CAR, replace(CAR, confidence=0.85)), ""),
        (item("counting", Wanted("car", None, 2)), (CAR, replace(CAR, confidence=0.85)), "found 1"),
        (item("colors", Wanted("car", "red", 1)), (CAR,), ""),
        (item("colors", Wanted("car", "blue", 1)), (CAR,), "asked for blue"),
        # the colour must be on the right thing
        (item("attribute", Wanted("car", "red", 1), Wanted("cup", "blue", 1)), (CAR, seen("cup", "blue")), ""),
        (item("attribute", Wanted("car", "blue", 1), Wanted("cup", "red", 1)), (CAR, seen("cup", "blue")), "car: red"),
        (item("two", Wanted("car", None, 1), Wanted("cup", None, 1)), (CAR,), "cup: found 0"),
    ],
)
def test_the_rules(wanted: T2IItem, things: tuple[Detection, ...], complaint: str) -> None:
    wrong = what_is_wrong(wanted, reading(*things))
    assert complaint in wrong
    assert bool(wrong) == bool(complaint)


@pytest.mark.parametrize(
    ("dx", "dy", "held"),
    [
        (-0.4, 0.0, ("left of",)),
        (0.4, 0.0, ("right of",)),
        (0.0, -0.4, ("above",)),
        (0.0, 0.4, ("below",)),
        (0.4, 0.4, ("right of", "below")),  # a diagonal: (0.4 - 0.06) / 0.566 = 0.60 on both
        (0.4, 0.2, ("right of",)),  # below: (0.2 - 0.06) / 0.447 = 0.31, less than half
        (0.05, 0.0, ()),  # within the shrinking of 0.1 x (0.3 + 0.3)
        (0.0, 0.0, ()),
    ],
)
def test_directions_are_read_off_the_shrunk_offset(dx: float, dy: float, held: tuple[str, ...]) -> None:
    assert relations(seen("car", cx=0.5 + dx, cy=0.5 + dy), seen("cup")) == held


def test_position_needs_the_relation() -> None:
    wanted = item("position", Wanted("car", None, 1), Wanted("cup", None, 1), relation=("car", "left of", "cup"))
    assert what_is_wrong(wanted, reading(seen("car", cx=0.2), seen("cup", cx=0.8))) == ""
    assert what_is_wrong(wanted, reading(seen("car", cx=0.8), seen("cup", cx=0.2))) == "the car is not left of the cup"


def test_overall_is_the_unweighted_mean_of_categories() -> None:
    scored = [("single", True)] * 3 + [("counting", False)]
    table = summarise_t2i([{"category": name, "plain": right, "strict": right, "psnr": 0.0} for name, right in scored])["plain"]
    assert {name: row["mean"] for name, row in table.items()} == {"single": 1.0, "counting": 0.0, "overall": 0.5}


def test_an_offset_within_the_shrinking_has_no_direction_whatever_its_length() -> None:
    for dx in (0.01, 0.03, 0.05):
        assert relations(seen("car", cx=0.5 + dx), seen("cup")) == relations(seen("car", cx=0.5 - dx), seen("cup")) == ()
