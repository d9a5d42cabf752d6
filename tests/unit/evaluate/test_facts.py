"""Facts found in free text, and answers judged by kind."""

from __future__ import annotations

import random

import pytest

from hyperbagel.evaluate.facts import check, facts
from hyperbagel.evaluate.questions import letter, number, score_question, yes_no
from hyperbagel.toybox.items import QuestionItem, question_eval_items
from hyperbagel.toybox.questions import sample_question
from hyperbagel.toybox.scene import Scene, Thing, sample_scene

SCENE = Scene(
    "navy", (Thing("car", "red", "large", 0), Thing("cup", "blue", "small", 8, material="striped"), Thing("cup", "pink", "small", 4))
)


@pytest.mark.parametrize(
    ("text", "right", "stated"),
    [
        ("A large red car.", 1, 1),
        ("A small red car.", 0, 1),
        ("a red car at the top left", 2, 2),
        ("At the top left there is a red car, and at the bottom right a blue cup.", 4, 4),
        ("a red car at the bottom right", 1, 2),
        ("Two cups and a car on a navy background.", 3, 3),
        ("Three cups on a mint background.", 0, 2),
        ("a striped cup, a cup", 2, 2),
        ("There are three things.", 1, 1),
        ("The red car is to the left of the blue cup.", 1, 1),
        ("The red car is to the right of the blue cup.", 0, 1),
        ("Seen from the car, the blue cup is below it.", 1, 1),
        ("The car stands on the left side of the pink cup. The blue cup is underneath the car.", 2, 2),
        ("Drawn in dark tones.", 0, 1),
        ("no boats", 1, 1),
        ("A red car. A red car. A red car.", 1, 1),  # saying it again is no new fact
        ("hello", 0, 0),
        ("", 0, 0),
    ],
)
def test_facts_of_plain_sentences(text: str, right: int, stated: int) -> None:
    assert check(text, SCENE) == (right, stated), facts(text)


def test_every_true_answer_of_the_world_is_all_facts_and_all_true() -> None:
    rng = random.Random(0)
    for kind in ("describe", "steps"):
        for _ in range(300):
            sample = sample_question(rng, kind=kind)
            right, stated = check(sample.answer, sample.scene)
            assert right == stated >= 3, sample.answer


def test_a_description_of_another_scene_scores_near_nothing() -> None:
    rng = random.Random(1)
    shares = []
    for _ in range(200):
        right, stated = check(sample_question(rng, kind="describe").answer, sample_scene(rng))
        shares.append(right / stated)
    assert sum(shares) / len(shares) < 0.12


def test_true_answers_score_one_and_foreign_ones_little() -> None:
    items = question_eval_items(300, 0, "train")
    assert {i.kind for i in items if score_question(i, i.answer).score != 1.0} == set()
    by_kind: dict[str, list[float]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(score_question(item, "I cannot say.").score)
    assert all(sum(scores) == 0 for scores in by_kind.values())


def test_one_safe_fact_is_no_full_mark() -> None:
    item = QuestionItem(
        "x", "describe", SCENE, "", "A large red car. A small pink cup. A small striped blue cup. The background is navy.", ""
    )
    assert score_question(item, "A red car.").score == 0.25
    assert score_question(item, item.answer + " A boat. A fish. A key. A lamp.").score == 0.5


def test_short_answers_are_read_leniently_and_never_guessed() -> None:
    assert [yes_no(t) for t in ("Yes.", "no, it is not", "I see", "know")] == ["yes", "no", None, None]
    assert [number(t) for t in ("three", "There are 3 cars.", "two or three", "many")] == ["3", "3", None, None]
    assert [letter(t) for t in ("B", "b.", "(C) red", "The answer is D", "A", "A) two", "a car", "none")] == [
        "B",
        "B",
        "C",
        "D",
        "A",
        "A",
        None,
        None,
    ]
