"""Questions about a scene with true answers, from one word to a paragraph; a question's wording tells how long its answer should be."""

from __future__ import annotations

import random
from collections.abc import Callable

from hyperbagel.toybox.captions import count_phrase, dense
from hyperbagel.toybox.heldout import held_out, triple_held
from hyperbagel.toybox.phrases import (
    NUMBERS,
    ORDINALS,
    RELATION_WORDS,
    article,
    choose,
    full,
    join,
    place,
    plural,
    references,
    sentence,
    words,
)
from hyperbagel.toybox.samples import QuestionSample
from hyperbagel.toybox.scene import Scene, Spec, Thing, holds, sample_scene
from hyperbagel.toybox.vocabulary import BACKGROUNDS, CELL_NAMES, COLOURS, NOUNS, RELATIONS

_WEIGHTS = {
    "existence": 14, "count": 14, "colour": 12, "relation": 14, "position": 10, "comparison": 10, "describe": 10, "steps": 7, "reason": 12,
    "choice": 10,
}  # fmt: skip
KINDS: tuple[str, ...] = tuple(_WEIGHTS)
EXISTENCE_MODES: tuple[str, ...] = ("random", "popular", "adversarial")

EXISTS = (
    "is there {a} in the picture?",
    "does the picture show {a}?",
    "can you see {a}?",
    "is there {a}?",
    "do you see {a} here?",
    "does {a} appear here?",
    "is {a} in the picture?",
    "is {a} shown here?",
    "does this image contain {a}?",
)
COUNT = (
    "how many {n} are there?",
    "how many {n} do you see?",
    "count the {n}.",
    "what is the number of {n}?",
    "how many {n} does the picture show?",
    "how many {n} are in the picture?",
    "tell me how many {n} there are.",
    "give the number of {n}.",
)
COLOUR = (
    "what colour is {r}?",
    "which colour does {r} have?",
    "what is the colour of {r}?",
    "tell me the colour of {r}.",
    "name the colour of {r}.",
    "what color is {r}?",
    "what is the color of {r}?",
    "in which colour is {r} drawn?",
)
_GROUND = (
    "what colour is the background?",
    "which colour does the background have?",
    "what is behind everything?",
    "name the background colour.",
)
RELATION = (
    "is {r} {w} {s}?",
    "does {r} stand {w} {s}?",
    "would you find {r} {w} {s}?",
    "is it true that {r} is {w} {s}?",
    "do you see {r} {w} {s}?",
    "does the picture show {r} {w} {s}?",
    "tell me if {r} is {w} {s}.",
    "can {r} be seen {w} {s}?",
)
_WHERE = (
    "where is {r}?",
    "in which place is {r}?",
    "where does {r} stand?",
    "what is the place of {r}?",
    "where can I find {r}?",
    "tell me where {r} is.",
    "where in the picture is {r}?",
    "what is the position of {r}?",
)
_WHAT = (
    "what is {p}?",
    "what do you see {p}?",
    "which thing stands {p}?",
    "what can be found {p}?",
    "what is shown {p}?",
    "which thing is {p}?",
    "tell me what is {p}.",
    "name the thing {p}.",
)
_SAME = (
    "do {r} and {s} have the same colour?", "are {r} and {s} of the same colour?", "is the colour of {r} also that of {s}?",
    "same colour for {r} and {s}?",
)  # fmt: skip
_COMPARE = {
    "larger": ("which is larger, {r} or {s}?", "which one is bigger, {r} or {s}?", "is {r} or {s} larger?", "what is bigger, {r} or {s}?"),
    "higher": (
        "which is higher, {r} or {s}?", "which one stands higher, {r} or {s}?", "is {r} or {s} higher?",
        "what is further up, {r} or {s}?",
    ),
    "further left": (
        "which is further left, {r} or {s}?", "which one is more to the left, {r} or {s}?", "is {r} or {s} further left?",
        "what comes first from the left, {r} or {s}?",
    ),
}  # fmt: skip
_DESCRIBE = (
    "describe the picture in detail.",
    "what do you see? Name everything.",
    "describe everything in the picture.",
    "give a full description.",
    "tell me all about this picture.",
    "write a detailed caption.",
    "describe the picture.",
    "describe this image.",
    "what is in the picture? Tell me everything.",
    "what do you see? Describe it all.",
    "describe what you see.",
    "name everything that you see in the picture.",
    "list everything in this image.",
    "give a detailed description of the image.",
)
_STEPS = (
    "count all things step by step.",
    "how many things are there? Think step by step.",
    "list the things one by one, then give their number.",
    "go through the picture and count everything.",
    "name each thing in turn and count them.",
    "count everything in the picture step by step.",
    "name all things one by one, then count them.",
    "how many things do you see? Go through them in turn.",
    "count the things one by one.",
)
_WHY = (
    "{q} Explain.",
    "{q} Say why.",
    "{q} Give a reason.",
    "{q} How do you know?",
    "{q} Tell me your reason.",
    "{q} Why?",
    "{q} Explain your answer.",
    "{q} Tell me why.",
)
_CHOICE = ("{q} Choose one:", "{q} Answer with a letter:", "{q} Pick the right letter:", "{q} Options:", "{q} Which of these?")
_BECAUSE = ("so {c}", "that means {c}", "therefore {c}", "this shows that {c}")

Answered = tuple[str, str, str]  # (question, answer, think)


def capital(text: str) -> str:
    """The text with its first letter capitalised."""
    return text[0].upper() + text[1:]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def look_up(things: tuple[Thing, ...] | list[Thing]) -> str:
    """The think text of most questions: the relevant things and where they are."""
    return " ".join(sentence(f"there is {full(t)}") for t in things) if things else "There is nothing of that kind."


def _unique(rng: random.Random, scene: Scene, number: int) -> list[tuple[Thing, str]]:
    """Random distinct things, each with a phrase that refers to it alone."""
    return [(t, rng.choice(references(scene, t))) for t in rng.sample(scene.things, number)]


def existence(rng: random.Random, scene: Scene, text_split: str, *, present: bool, mode: str = "random") -> Answered | None:
    """Is there such a thing? POPE's three ways to choose an absent thing, in a world where all nouns are equally frequent.

    random: an absent noun. popular (ours): an absent noun in a colour that the picture shows. adversarial: a noun and a colour that the
    picture shows, but not together. None if the scene allows no such question.
    """
    nouns, colours = {t.noun for t in scene.things}, {t.colour for t in scene.things}
    shown = {(t.noun, t.colour) for t in scene.things}
    lost = held_out().colour
    if present:
        thing = rng.choice(scene.things)
        wanted = thing.noun if mode == "random" else f"{thing.colour} {thing.noun}"
    elif mode == "random":
        wanted = rng.choice([n for n in NOUNS if n not in nouns])
    else:
        near = nouns if mode == "adversarial" else set(NOUNS) - nouns
        pairs = sorted(f"{c} {n}" for c in colours for n in near if (n, c) not in shown and lost[n] != c)
        if not pairs:
            return None
        wanted = rng.choice(pairs)
    matching = [t for t in scene.things if wanted in (t.noun, f"{t.colour} {t.noun}")]
    return choose(rng, EXISTS, text_split).format(a=article(wanted)), _yes(present), look_up(matching)


def _existence(rng: random.Random, scene: Scene, text_split: str) -> Answered | None:
    return existence(rng, scene, text_split, present=rng.random() < 0.5, mode=rng.choice(EXISTENCE_MODES))


def count(rng: random.Random, scene: Scene, text_split: str) -> Answered:
    """How many there are of a noun, of a colour, or of all things; the answer is a number word."""
    form = rng.random()
    if form < 0.55:
        noun = rng.choice(scene.things).noun if rng.random() < 0.85 else rng.choice(NOUNS)
        name, matching = plural(noun), [t for t in scene.things if t.noun == noun]
    elif form < 0.8:
        colour = rng.choice(scene.things).colour
        name, matching = f"{colour} things", [t for t in scene.things if t.colour == colour]
    else:
        name, matching = "things", list(scene.things)
    return choose(rng, COUNT, text_split).format(n=name), NUMBERS[len(matching)], look_up(matching)


def colour(rng: random.Random, scene: Scene, text_split: str) -> Answered:
    """The colour of one thing, or of the background."""
    if rng.random() < 0.12:
        return choose(rng, _GROUND, text_split), scene.background, f"Behind the things all is {scene.background}."
    thing = rng.choice(scene.things)
    names = [r for r in references(scene, thing) if thing.colour not in r.split()]
    return choose(rng, COLOUR, text_split).format(r=rng.choice(names)), thing.colour, look_up([thing])


def relation(rng: random.Random, scene: Scene, text_split: str, *, truth: bool | None = None) -> Answered | None:
    """Is one thing left of, right of, above or below another? A wrong relation is the opposite one, or one on the other axis.

    No question names a held-out triple that is not true, so none of the train split names one at all. None if the scene does not allow it.
    """
    if len(scene.things) < 2:
        return None
    (a, first), (b, second) = _unique(rng, scene, 2)
    truth = rng.random() < 0.5 if truth is None else truth
    fitting = [r for r in RELATIONS if holds(a, r, b) == truth and (truth or a.noun == b.noun or not triple_held(a.noun, r, b.noun))]
    if not fitting:
        return None
    named = rng.choice(fitting)
    question = choose(rng, RELATION, text_split).format(r=first, s=second, w=choose(rng, RELATION_WORDS[named], text_split))
    return question, _yes(truth), look_up([a, b])


def _where(rng: random.Random, scene: Scene, text_split: str) -> Answered | None:
    """Where one thing is; the phrase for it never gives the answer away. None if no other phrase refers to it alone."""
    thing = rng.choice(scene.things)
    names = [r for r in references(scene, thing) if place(thing.cell) not in r]
    if not names:
        if sum((t.size, t.colour, t.noun) == (thing.size, thing.colour, thing.noun) for t in scene.things) > 1:
            return None
        names = [f"the {thing.size} {thing.colour} {thing.noun}"]
    return choose(rng, _WHERE, text_split).format(r=rng.choice(names)), CELL_NAMES[thing.cell], look_up([thing])


def _position(rng: random.Random, scene: Scene, text_split: str) -> Answered | None:
    """Where a thing is, or what is in a place."""
    if rng.random() < 0.6:
        return _where(rng, scene, text_split)
    cell = rng.choice(scene.things).cell if rng.random() < 0.8 else rng.randrange(9)
    there = [t for t in scene.things if t.cell == cell]
    question = choose(rng, _WHAT, text_split).format(p=place(cell))
    return question, article(words(there[0])) if there else "nothing", look_up(there)


def _same_colour(rng: random.Random, scene: Scene, text_split: str) -> Answered | None:
    if len(scene.things) < 2:
        return None
    (a, first), (b, second) = _unique(rng, scene, 2)
    return choose(rng, _SAME, text_split).format(r=first, s=second), _yes(a.colour == b.colour), look_up([a, b])


def _comparison(rng: random.Random, scene: Scene, text_split: str) -> Answered | None:
    """Which of two things is larger, higher or further left, or whether their colours are equal."""
    if len(scene.things) < 2:
        return None
    if rng.random() < 0.25:
        return _same_colour(rng, scene, text_split)
    (a, first), (b, second) = _unique(rng, scene, 2)
    by = rng.choice(tuple(_COMPARE))
    ahead, equal = {
        "larger": (a.extent - b.extent, "same size"),
        "higher": (b.row - a.row, "same height"),
        "further left": (b.col - a.col, "same column"),
    }[by]
    answer = equal if ahead == 0 else (first if ahead > 0 else second)
    return choose(rng, _COMPARE[by], text_split).format(r=first, s=second), answer, look_up([a, b])


def describe(rng: random.Random, scene: Scene, text_split: str) -> Answered:
    """A dense caption: 60 to 120 tokens for three or four things."""
    return choose(rng, _DESCRIBE, text_split), dense(rng, scene, text_split), look_up(scene.things)


def steps(rng: random.Random, scene: Scene, text_split: str) -> Answered:
    """A step-by-step count: every thing in reading order, then the number."""
    things = sorted(scene.things, key=lambda t: t.cell)
    parts = ["I go through the picture row by row"]
    parts += [f"the {ORDINALS[i]} thing is {full(t)}" for i, t in enumerate(things)]
    kinds = {t.noun: sum(o.noun == t.noun for o in things) for t in things}
    if len(kinds) > 1:
        parts.append("there is " + join([f"{NUMBERS[n]} {noun if n == 1 else plural(noun)}" for noun, n in kinds.items()]))
    parts.append(f"so the picture shows {count_phrase(len(things))} on a {scene.background} background")
    return choose(rng, _STEPS, text_split), " ".join(sentence(p) for p in parts), f"I look at all nine places. {look_up(things)}"


def _reason(rng: random.Random, scene: Scene, text_split: str) -> Answered | None:
    """A yes/no question whose answer says what was seen."""
    maker = rng.choice((relation, _existence, _same_colour))
    made = maker(rng, scene, text_split)
    if made is None:
        return None
    question, answer, seen = made
    if maker is relation:
        clause = "this is right" if answer == "yes" else "this is not right"
    elif maker is _existence:
        clause = "the picture has it" if answer == "yes" else "it is not there"
        if answer == "no":
            seen = sentence(f"the picture shows only {join([full(t) for t in scene.things])}")
    else:
        clause = "the colours are equal" if answer == "yes" else "the colours differ"
    text = f"{capital(answer)}. {seen} {capital(choose(rng, _BECAUSE, text_split).format(c=clause))}, and the answer is {answer}."
    return choose(rng, _WHY, text_split).format(q=question), text, seen


def choice(rng: random.Random, scene: Scene, text_split: str) -> tuple[str, list[str], str]:
    """(question, four options with the right one first, think); `lettered` makes a question and its answer of it."""
    form = rng.randrange(3)
    makers: tuple[Callable[[random.Random, Scene, str], Answered | None], ...] = (colour, count, _where)
    made = makers[form](rng, scene, text_split)
    if made is None:  # no phrase refers to the thing that was drawn
        return choice(rng, scene, text_split)
    question, answer, think = made
    pool = (tuple(BACKGROUNDS) if answer in BACKGROUNDS else tuple(COLOURS), NUMBERS, CELL_NAMES)[form]
    others = rng.sample([p for p in pool if p != answer], 3)
    return choose(rng, _CHOICE, text_split).format(q=question), [answer, *others], think


def lettered(question: str, options: list[str], right: int) -> tuple[str, str]:
    """(question with options A to D, the right letter); options[0] is right and goes to position `right`."""
    order = options[1:]
    order.insert(right, options[0])
    return f"{question} " + " ".join(f"{letter}) {option}" for letter, option in zip("ABCD", order)), "ABCD"[right]


def _choice(rng: random.Random, scene: Scene, text_split: str) -> Answered:
    question, options, think = choice(rng, scene, text_split)
    return *lettered(question, options, rng.randrange(4)), think


_MAKERS: dict[str, Callable[[random.Random, Scene, str], Answered | None]] = {
    "existence": _existence, "count": count, "colour": colour, "relation": relation, "position": _position, "comparison": _comparison,
    "describe": describe, "steps": steps, "reason": _reason, "choice": _choice,
}  # fmt: skip


def question_scene(rng: random.Random, kind: str, split: str, heldout_kind: str | None) -> Scene:
    """A scene about which this kind of question is worth asking."""
    if heldout_kind is None and kind == "count" and rng.random() < 0.6:  # several of a kind, or nearly every count would be one
        n = rng.choice((2, 3, 4))
        noun = rng.choice([x for x in NOUNS if n < 4 or x not in held_out().four])
        return sample_scene(rng, n=rng.choice(range(n, 5)), split=split, specs=[Spec(noun)] * n, variety=0.02)
    low = 2 if kind in ("relation", "comparison", "reason") or heldout_kind in ("pair", "relation") else 1
    low = 3 if kind in ("describe", "steps") else low
    n = 4 if heldout_kind == "count" else rng.randint(low, 4)
    return sample_scene(rng, n=n, split=split, kind=heldout_kind, variety=0.02)


def sample_question(
    rng: random.Random, *, split: str = "train", kind: str | None = None, heldout_kind: str | None = None
) -> QuestionSample:
    """A question with its answer. kind: one of KINDS (None draws one). split "heldout": `heldout_kind` (None draws it) says what is new in
    the scene; with "template", only the wording is."""
    if kind is None:
        kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    if split == "heldout" and heldout_kind is None:
        heldout_kind = rng.choice(("colour", "pair", "relation", "count", "template"))
    text_split = "heldout" if heldout_kind == "template" else "train"
    while True:
        plain = heldout_kind in (None, "template")
        scene = question_scene(rng, kind, "train" if plain else split, None if plain else heldout_kind)
        for _ in range(4):
            if made := _MAKERS[kind](rng, scene, text_split):
                return QuestionSample(scene, capital(made[0]), made[1], kind, made[2])


def questions_about(rng: random.Random, scene: Scene, n: int) -> list[QuestionSample]:
    """`n` questions of the train split with short answers about one scene, of any kinds that fit it: further turns of a conversation."""
    found: list[QuestionSample] = []
    short = [kind for kind in _WEIGHTS if kind not in ("describe", "steps", "reason")]
    while len(found) < n:
        kind = rng.choices(short, [_WEIGHTS[k] for k in short])[0]
        if len(scene.things) < 2 and kind in ("relation", "comparison"):
            continue
        if made := _MAKERS[kind](rng, scene, "train"):
            found.append(QuestionSample(scene, capital(made[0]), made[1], kind, made[2]))
    return found
