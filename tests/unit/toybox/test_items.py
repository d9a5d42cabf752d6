"""Evaluation items: fixed by the seed, distinct, in the promised shares, and right."""

from collections import Counter, defaultdict

import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.toybox.heldout import heldout_kinds
from hyperbagel.toybox.items import QUESTION_KINDS, edit_eval_items, question_eval_items, t2i_eval_prompts
from hyperbagel.toybox.language import CATEGORIES, GROUPS
from hyperbagel.toybox.scene import holds


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_t2i_prompts(split: str) -> None:
    items = t2i_eval_prompts(2400, 0, split)
    assert len({i.prompt for i in items}) == len({i.id for i in items}) == 2400
    assert Counter(i.category for i in items) == dict.fromkeys(CATEGORIES, 400)
    for item in items:
        wanted = Counter((w.noun, w.colour) for w in item.include for _ in range(w.count))
        named = item.category in ("colors", "attribute")
        assert wanted == Counter((t.noun, t.colour if named else None) for t in item.scene.things)
        assert (item.relation is not None) == (item.category == "position")
        if item.relation:
            a, b = (next(t for t in item.scene.things if t.noun == n) for n in (item.relation[0], item.relation[2]))
            assert holds(a, item.relation[1], b)
        assert heldout_kinds(item.scene.things) == ({item.heldout} - {"", "template"})
        assert bool(item.heldout) == (split == "heldout")


def test_small_sets_are_allowed_and_seeds_matter() -> None:
    assert t2i_eval_prompts(7, 3) == t2i_eval_prompts(7, 3) != t2i_eval_prompts(7, 4)
    assert len(t2i_eval_prompts(7, 3)) == 7 and t2i_eval_prompts(0, 0) == []
    with pytest.raises(InputError):
        t2i_eval_prompts(-1, 0)
    with pytest.raises(InputError):
        edit_eval_items(1, 0, "test")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_edit_items(split: str) -> None:
    items = edit_eval_items(450, 0, split)
    assert Counter(i.group for i in items) == dict.fromkeys(GROUPS, 50)
    assert len({(i.source, i.instruction) for i in items}) == 450
    assert all(i.source != i.target for i in items)
    assert items == edit_eval_items(450, 0, split)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_question_items(split: str) -> None:
    items = question_eval_items(1000, 0, split)
    assert len(items) == len({i.id for i in items}) == 1000
    counts = Counter(i.kind for i in items)
    assert set(counts) == set(QUESTION_KINDS)
    for kind in (k for k in QUESTION_KINDS if k.startswith("existence") or k == "relation"):
        answers = Counter(i.answer for i in items if i.kind == kind)
        assert abs(answers["yes"] - answers["no"]) <= 1
    pairs: dict[str, list[str]] = {}
    for item in items:
        if item.pair:
            pairs.setdefault(item.pair, []).append(item.answer)
    assert {tuple(sorted(a)) for p, a in pairs.items() if p.startswith("pair")} == {("no", "yes")}
    assert {tuple(sorted(a)) for p, a in pairs.items() if p.startswith("choice")} == {("A", "B", "C", "D")}


def test_held_out_questions_of_each_novelty_are_answered_both_ways() -> None:
    """A model that always says yes must not seem to know the new."""
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for item in question_eval_items(1200, 0, "heldout"):
        if item.kind.startswith("existence") or item.kind == "relation":
            found[item.kind, item.heldout][item.answer.lower()] += 1
    assert len(found) >= 15
    for which, answers in found.items():
        assert abs(answers["yes"] - answers["no"]) <= 1, (which, answers)
