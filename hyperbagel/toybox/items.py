"""The items that evaluations score: fixed by (n, seed, split), distinct, each with its exact truth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hyperbagel.core.errors import InputError
from hyperbagel.toybox import questions
from hyperbagel.toybox.captions import CATEGORIES, HELDOUT_CATEGORIES, category_scene, plan, short_caption
from hyperbagel.toybox.edits import GROUPS, sample_edit
from hyperbagel.toybox.heldout import KINDS
from hyperbagel.toybox.scene import Scene

QUESTION_KINDS: tuple[str, ...] = (
    "existence-random", "existence-popular", "existence-adversarial", "count", "colour", "relation", "pair", "choice", "describe", "steps",
)  # fmt: skip
_QUESTION_SHARES = dict(zip(QUESTION_KINDS, (10, 10, 10, 16, 14, 14, 10, 10, 3, 3)))


@dataclass(frozen=True)
class Wanted:
    """One entry of GenEval's include list."""

    noun: str
    colour: str | None
    count: int


@dataclass(frozen=True)
class T2IItem:
    """A prompt to score. relation: (noun a, "left of" ..., noun b), a being placed relative to b.

    scene: one right picture. heldout: the held-out kind that the prompt asks for, "" in the train split.
    """

    id: str
    category: str
    prompt: str
    include: tuple[Wanted, ...]
    relation: tuple[str, str, str] | None
    scene: Scene
    think: str
    heldout: str = ""


@dataclass(frozen=True)
class EditItem:
    """An edit to score against its exact target."""

    id: str
    group: str
    source: Scene
    instruction: str
    target: Scene
    think: str
    heldout: str = ""


@dataclass(frozen=True)
class QuestionItem:
    """A question to score. kind: one of QUESTION_KINDS.

    pair: a name shared by items that are only right together (yes/no pairs, rotations of one choice), "" for one alone.
    """

    id: str
    kind: str
    scene: Scene
    question: str
    answer: str
    think: str
    pair: str = ""
    heldout: str = ""


def _check(n: int, split: str) -> None:
    if n < 0 or split not in ("train", "heldout"):
        raise InputError(f"got n {n} and split {split!r}, expected n >= 0 and split 'train' or 'heldout'; change them")


def _shares(n: int, names: tuple[str, ...], weights: dict[str, int] | None = None) -> list[tuple[str, int]]:
    """n divided over names in proportion to the weights (None: equally); the remainder goes to the first ones."""
    weigh = weights or dict.fromkeys(names, 1)
    counts = [n * weigh[name] // sum(weigh.values()) for name in names]
    for i in range(n - sum(counts)):
        counts[i % len(counts)] += 1
    return list(zip(names, counts))


def t2i_eval_prompts(n: int, seed: int, split: str = "train") -> list[T2IItem]:
    """n distinct prompts (up to 4,000 or so), spread equally over GenEval's six categories.

    Half of the prompts are terse; half are medium ones, which may name sizes, places or the background as well. In the held-out split each
    item asks for something that training never showed: `heldout` names its kind; kinds take turns within a category.
    """
    _check(n, split)
    rng = random.Random(f"t2i {seed} {split}")
    items: list[T2IItem] = []
    seen: set[str] = set()
    for category, number in _shares(n, CATEGORIES):
        kinds = [k for k in KINDS if k == "template" or category in HELDOUT_CATEGORIES[k]] if split == "heldout" else [""]
        made = failures = 0
        while made < number:
            kind = kinds[made % len(kinds)]
            item = _t2i_item(rng, f"{category}-{made:04d}", category, kind)
            if item.prompt in seen:
                failures += 1
                if failures > 200 * number:
                    raise InputError(f"got n {n}, but category {category} has no {number} distinct prompts; ask for fewer")
                continue
            seen.add(item.prompt)
            items.append(item)
            made += 1
    return items


def _t2i_item(rng: random.Random, name: str, category: str, kind: str) -> T2IItem:
    new = kind not in ("", "template")
    text_split = "heldout" if kind == "template" else "train"
    scene = category_scene(rng, category, split="heldout" if new else "train", kind=kind if new else None)
    prompt, relation = short_caption(rng, scene, category, rng.choice(("terse", "medium")), text_split)
    names_colour = category in ("colors", "attribute")
    counts = Counter((t.noun, t.colour if names_colour else None) for t in scene.things)
    include = tuple(Wanted(noun, colour, count) for (noun, colour), count in counts.items())
    return T2IItem(name, category, prompt, include, relation, scene, plan(rng, scene, text_split), kind)


def edit_eval_items(n: int, seed: int, split: str = "train") -> list[EditItem]:
    """n edits, spread equally over the nine groups of GEdit's form; no two share both source and instruction."""
    _check(n, split)
    rng = random.Random(f"edit {seed} {split}")
    items: list[EditItem] = []
    seen: set[tuple[Scene, str]] = set()
    for group, number in _shares(n, GROUPS):
        kinds = [k for k in KINDS if not (k == "count" and group == "add")] if split == "heldout" else [""]
        made = 0
        while made < number:
            kind = kinds[made % len(kinds)]
            edit = sample_edit(rng, split=split, group=group, kind=kind or None)
            key = (edit.source, edit.instruction)
            if key not in seen:
                seen.add(key)
                items.append(EditItem(f"{group}-{made:04d}", group, edit.source, edit.instruction, edit.target, edit.think, kind))
                made += 1
    return items


# A combination that no held-out question has: among four of one noun, no noun and colour are shown but not together.
_NEVER = ("existence-adversarial", "count")


def question_eval_items(n: int, seed: int, split: str = "train") -> list[QuestionItem]:
    """n questions over QUESTION_KINDS; yes and no are equally frequent in the existence kinds, relations and pairs.

    "pair": two items on one scene, one answered yes and one no (MME). "choice": four items, with the right option at each of the four
    letters. Both are complete; step-by-step counts fill up to n.
    """
    _check(n, split)
    rng = random.Random(f"question {seed} {split}")
    items: list[QuestionItem] = []
    for kind, number in _shares(n, QUESTION_KINDS, _QUESTION_SHARES):
        whole = {"pair": 2, "choice": 4}.get(kind, 1)
        if kind == "steps":
            number = n - len(items)
        kinds = [k for k in KINDS if (kind, k) != _NEVER] if split == "heldout" else [""]
        made = group = 0
        while made < number // whole * whole:
            novelty = kinds[group % len(kinds)]
            batch = _QUESTION_MAKERS.get(kind, _plain)(rng, kind, group, novelty)
            items += batch
            made += len(batch)
            group += 1
    return items


def _scene(rng: random.Random, kind: str, novelty: str) -> tuple[Scene, str]:
    """(scene, split of the wording) for a question of this kind; novelty: what is held out, "" for nothing."""
    if novelty in ("", "template"):
        return questions.question_scene(rng, kind, "train", None), "heldout" if novelty else "train"
    return questions.question_scene(rng, kind, "heldout", novelty), "train"


_PLAIN_MAKERS = {"count": questions.count, "colour": questions.colour, "describe": questions.describe, "steps": questions.steps}


def _plain(rng: random.Random, kind: str, group: int, novelty: str) -> list[QuestionItem]:
    """One question; the answers of yes/no kinds alternate."""
    # shifted each time round: an even number of novelties takes turns, and each would otherwise have one answer only
    shift = group // (len(KINDS) - 1) if novelty and kind == _NEVER[0] else 0
    truth, (base, _, mode) = (group + shift) % 2 == 0, kind.partition("-")
    while True:
        scene, text = _scene(rng, base, novelty)
        if base == "existence":
            made = questions.existence(rng, scene, text, present=truth, mode=mode)
        elif base == "relation":
            made = questions.relation(rng, scene, text, truth=truth)
        else:
            made = _PLAIN_MAKERS[base](rng, scene, text)
        if made:
            return [QuestionItem(f"{kind}-{group:04d}", kind, scene, questions.capital(made[0]), made[1], made[2], "", novelty)]


def _pair(rng: random.Random, kind: str, group: int, novelty: str) -> list[QuestionItem]:
    """Two questions on one scene, answered yes and no."""
    while True:
        scene, text = _scene(rng, "relation", novelty)
        if group % 2:
            made = [questions.relation(rng, scene, text, truth=truth) for truth in (True, False)]
        else:
            made = [questions.existence(rng, scene, text, present=truth, mode="popular") for truth in (True, False)]
        whole = [m for m in made if m]
        if len(whole) == 2:
            name = f"pair-{group:04d}"
            return [QuestionItem(f"{name}-{a}", kind, scene, questions.capital(q), a, t, name, novelty) for q, a, t in whole]


def _choice(rng: random.Random, kind: str, group: int, novelty: str) -> list[QuestionItem]:
    """One question with the right option at each of the four letters."""
    scene, text = _scene(rng, rng.choice(("count", "colour")), novelty)
    question, options, think = questions.choice(rng, scene, text)
    name, items = f"choice-{group:04d}", []
    for right in range(4):
        ask, answer = questions.lettered(question, options, right)
        items.append(QuestionItem(f"{name}-{answer}", kind, scene, questions.capital(ask), answer, think, name, novelty))
    return items


_QUESTION_MAKERS: dict[str, Callable[[random.Random, str, int, str], list[QuestionItem]]] = {"pair": _pair, "choice": _choice}
