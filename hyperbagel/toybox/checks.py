"""Questions whose answers follow from the words alone: a picture that is what was asked for gives these answers."""

from __future__ import annotations

import random
from collections import Counter

from hyperbagel.toybox.captions import COLOURED
from hyperbagel.toybox.phrases import NUMBERS, RELATION_WORDS, article, choose, plural
from hyperbagel.toybox.questions import COLOUR, COUNT, EXISTS, RELATION, capital, questions_about
from hyperbagel.toybox.samples import EditSample, T2ISample
from hyperbagel.toybox.scene import main_relation

Check = tuple[str, str]  # (question, answer)


def checks_of_caption(rng: random.Random, sample: T2ISample, n: int) -> list[Check]:
    """At most n questions about what a caption names: how many of each noun and in all, and colours and relations if it states them."""
    things = sample.scene.things
    numbers = Counter(t.noun for t in things)
    alone = [t for t in things if numbers[t.noun] == 1]
    found: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (COUNT, {"n": plural(noun)}, NUMBERS[number]) for noun, number in numbers.items()
    ]
    found.append((COUNT, {"n": "things"}, NUMBERS[len(things)]))
    if sample.category in (*COLOURED, "dense"):
        found += [(COLOUR, {"r": f"the {t.noun}"}, t.colour) for t in alone]
        found += [(EXISTS, {"a": article(f"{t.colour} {t.noun}")}, "yes") for t in things]
    else:
        found += [(EXISTS, {"a": article(noun)}, "yes") for noun in numbers]
    if sample.category == "position":
        a, b = things
        relation = main_relation(a, b)  # the caption states this or its mirror image, and nothing about the other axis
        assert relation is not None
        words = {"r": f"the {a.noun}", "s": f"the {b.noun}", "w": choose(rng, RELATION_WORDS[relation], "train")}
        found += [(RELATION, words, "yes"), (RELATION, words | {"r": words["s"], "s": words["r"]}, "no")]
    rng.shuffle(found)
    return [(capital(choose(rng, templates, "train").format(**words)), answer) for templates, words, answer in found[:n]]


def checks_of_edit(rng: random.Random, sample: EditSample, n: int) -> list[Check]:
    """n questions about the edited picture; their answers follow from the source picture and the instruction."""
    return [(q.question, q.answer) for q in questions_about(rng, sample.target, n)]
