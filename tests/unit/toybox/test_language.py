"""Every sentence is true of its scene. Checked by reading the sentences, not by the code that wrote them."""

import random
import re
from collections import Counter

import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.toybox import heldout, questions
from hyperbagel.toybox.checks import checks_of_caption
from hyperbagel.toybox.language import EXTRA_GROUPS, GROUPS, KINDS, STYLES, sample_edit, sample_question, sample_t2i
from hyperbagel.toybox.near_misses import near_miss_of_caption, near_miss_of_edit, places
from hyperbagel.toybox.scene import Scene, Spec, Thing, holds, sample_scene
from hyperbagel.toybox.vocabulary import CELL_NAMES, COLOURS, NOUNS, SIZES

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SINGULAR = {**{n: n for n in NOUNS}, **{f"{n}s": n for n in NOUNS}, "crosses": "cross"}
_NOUN = "|".join(sorted(SINGULAR, key=len, reverse=True))
MENTION = re.compile(rf"\b(a|an|one|two|three|four) ((?:small|large) )?(striped )?((?:{'|'.join(COLOURS)}) )?({_NOUN})\b")
PLACE = {**{f"at the {n}": i for i, n in enumerate(CELL_NAMES)}, "in the center": 4}
RELATION = {
    "left of": ("left of", "at the left side of"),
    "right of": ("right of", "at the right side of"),
    "above": ("above", "over", "higher than", "on top of"),
    "below": ("below", "under", "lower than", "underneath"),
}


STATED = re.compile(rf"{MENTION.pattern} (?:\w+ )*?({'|'.join(w for ws in RELATION.values() for w in ws)}) {MENTION.pattern}")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def told_as(text: str) -> str:
    """The relation that the words are about."""
    return next(relation for relation, ways in RELATION.items() if any(f" {way} " in f" {text} " for way in ways))


def mentions(text: str) -> Counter[tuple[str, str, str, str]]:
    """(size, striped, colour, noun) -> how many the text names."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for number, size, striped, colour, noun in MENTION.findall(text.lower()):
        found[size.strip(), striped.strip(), colour.strip(), SINGULAR[noun]] += NUMBERS[number]
    return found


def fits(words: tuple[str, str, str, str], thing: Thing) -> bool:
    size, striped, colour, noun = words
    return (
        thing.noun == noun and colour in ("", thing.colour) and size in ("", thing.size) and bool(striped) == (thing.material == "striped")
    )


def names_exactly(text: str, scene: Scene) -> bool:
    """The mentions can be matched one to one with the things."""
    wanted = [w for w, n in mentions(text).items() for _ in range(n)]
    free = list(scene.things)
    for words in sorted(wanted, key=lambda w: -sum(map(bool, w))):
        match = next((t for t in free if fits(words, t)), None)
        if match is None:
            return False
        free.remove(match)
    return not free


def referent(phrase: str, scene: Scene) -> Thing:
    """The one thing that "the red car", "the car on the left", ... means; fails if there are none or several."""
    phrase, _, place = next(((p, k, v) for k, v in PLACE.items() if (p := phrase.removesuffix(" " + k)) != phrase), (phrase, "", -1))
    side = re.search(r" (?:on|at) the (left|right|top|bottom)$", phrase)
    phrase = phrase[: side.start()] if side else phrase
    *adjectives, noun = phrase.removeprefix("the ").split()
    fitting = [t for t in scene.things if t.noun == noun and all(a in (t.colour, t.size) for a in adjectives) and place in (-1, t.cell)]
    if side:
        key = {"left": lambda t: t.col, "right": lambda t: -t.col, "top": lambda t: t.row, "bottom": lambda t: -t.row}[side[1]]
        fitting = [t for t in fitting if key(t) == min(map(key, fitting))]
    assert len(fitting) == 1, (phrase, scene)
    return fitting[0]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("style", ["terse", "medium"])
def test_short_captions_name_every_thing_once(split: str, style: str) -> None:
    rng = random.Random(1)
    for _ in range(600):
        sample = sample_t2i(rng, split=split, style=style, variety=0.1)
        assert names_exactly(sample.prompt, sample.scene), sample
        for other in {"gray", "cream", "mint", "lilac", "navy"} - {sample.scene.background}:
            assert other not in sample.prompt.split()
        for match in MENTION.finditer(sample.prompt):
            place = re.match(r" ((?:at the (?:top|middle|bottom) \w+)|in the center)", sample.prompt[match.end() :])
            if place:
                words = next(iter(mentions(match.group())))
                assert any(fits(words, t) and t.cell == PLACE[place[1]] for t in sample.scene.things), sample


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_stated_relations_hold(split: str) -> None:
    rng = random.Random(2)
    for _ in range(300):
        sample = sample_t2i(rng, split=split, style="terse", category="position", kind="relation" if split == "heldout" else None)
        match = STATED.search(sample.prompt)
        assert match, sample
        a, b = (next(t for t in sample.scene.things if t.noun == match[i]) for i in (5, 11))
        relation = next(r for r, ws in RELATION.items() if match[6] in ws)
        assert holds(a, relation, b), sample
        assert heldout.triple_held(a.noun, relation, b.noun) == (split == "heldout")


def test_where_is_asked_of_one_thing() -> None:
    """With several of a noun the phrase means one of them, or nothing is asked."""
    rng, asked, refused = random.Random(12), 0, 0
    patterns = [re.compile(re.escape(template).replace(re.escape("{r}"), "(the .+)")) for template in questions._WHERE]
    while asked < 400:
        scene = sample_scene(rng, n=3, specs=[Spec("cup", "brown", "small")] * 3)
        made = questions._where(rng, scene, "train")
        if made is None:
            refused += 1
            continue
        phrase = next(match[1] for pattern in patterns if (match := pattern.fullmatch(made[0])))
        assert CELL_NAMES[referent(phrase, scene).cell] == made[1], (made, scene)
        asked += 1
    assert refused > 0


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_full_captions_state_every_thing_in_its_place(split: str) -> None:
    rng = random.Random(3)
    for _ in range(300):
        sample = sample_t2i(rng, split=split, style="full")
        sentences = [s for s in sample.prompt.split(". ") if any(p in s.lower() for p in PLACE) and MENTION.search(s.lower())]
        assert len(sentences) == len(sample.scene.things), sample
        for text in sentences:
            (words,) = mentions(text)
            cell = next(c for p, c in PLACE.items() if p in text.lower())
            assert any(fits(words, t) and t.cell == cell for t in sample.scene.things), (text, sample)
        assert f" {sample.scene.background}" in sample.prompt


def test_plans_hold_the_whole_scene() -> None:
    rng = random.Random(4)
    for _ in range(200):
        sample = sample_t2i(rng)
        assert names_exactly(sample.think, sample.scene)
        assert f"The background is {sample.scene.background}." in sample.think
        for thing in sample.scene.things:
            assert re.search(rf"{thing.size} (striped )?{thing.colour} {thing.noun} (at|in) the {CELL_NAMES[thing.cell]}", sample.think)


def test_style_weights_are_honoured() -> None:
    rng = random.Random(5)
    counts = Counter(sample_t2i(rng, style={"terse": 1, "full": 1}).category == "dense" for _ in range(400))
    assert 150 < counts[True] < 250
    assert set(STYLES) == {"terse", "medium", "full"}


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("group", [*GROUPS, *EXTRA_GROUPS])
def test_edits_change_what_they_say_and_nothing_else(group: str, split: str) -> None:
    rng = random.Random(6)
    for _ in range(60):
        edit = sample_edit(rng, split=split, group=group)
        edit.target.check()
        source, target = edit.source, edit.target
        gone, come = set(source.things) - set(target.things), set(target.things) - set(source.things)
        same_look = (source.background, source.style, source.tone) == (target.background, target.style, target.tone)
        if group in ("background", "style", "tone"):
            field = group
            assert not gone and not come and getattr(source, field) != getattr(target, field)
            if group == "background":
                assert target.background in edit.instruction
        elif group == "compound":
            assert " and " in edit.instruction and (source.things != target.things)
        else:
            assert same_look
            sizes = {"add": (0, 1), "remove": (1, 0), "swap": (2, 2)}.get(group)
            if group != "recolour":
                assert (len(gone), len(come)) == (sizes or (1, 1)), edit
            for old in gone:
                assert old.noun in edit.instruction.replace("crosses", "cross")
        if split == "train":
            assert not heldout.heldout_kinds(source.things) and not heldout.heldout_kinds(target.things)


def test_edit_references_mean_one_thing() -> None:
    rng = random.Random(7)
    for _ in range(300):
        edit = sample_edit(rng, group="remove")
        match = re.search(
            rf"the (?:(?:{'|'.join([*COLOURS, *SIZES])}) )?(?:{'|'.join(NOUNS)})(?: (?:on|at|in) the [a-z ]+)?", edit.instruction
        )
        assert match, edit
        phrase = match[0].removesuffix(" away")
        (gone,) = set(edit.source.things) - set(edit.target.things)
        assert referent(phrase, edit.source) == gone, edit


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_yes_and_no_are_right_and_balanced(split: str) -> None:
    rng, answers = random.Random(8), Counter()
    words = {f"{prefix}{w}": r for r, ws in RELATION.items() for w in ws for prefix in ("", "to the ", "on the ")}
    for _ in range(500):
        sample = sample_question(rng, split=split, kind="relation")
        found = [(w, sample.question.find(f" {w} the ")) for w in sorted(words, key=len, reverse=True)]
        word, at = max(((w, i) for w, i in found if i > 0), key=lambda x: len(x[0]))
        first = re.search(
            r"(the .*)$",
            re.sub(r"^(Is it true that|Do you see|Would you find|Does the picture show|Tell me if|Can|Does|Is) ", "", sample.question[:at])
            .removesuffix(" is")
            .removesuffix(" stand")
            .removesuffix(" be seen"),
        )
        assert first
        a, b = referent(first[1], sample.scene), referent(sample.question[at + len(word) + 2 : -1], sample.scene)
        assert (sample.answer == "yes") == holds(a, words[word], b), sample
        if split == "train":
            assert a.noun == b.noun or not heldout.triple_held(a.noun, words[word], b.noun)
        answers[sample.answer] += 1
    assert min(answers.values()) > 200


def test_existence_answers() -> None:
    rng, answers = random.Random(9), Counter()
    for _ in range(500):
        sample = sample_question(rng, kind="existence")
        (words,) = mentions(sample.question)
        _, _, colour, noun = words
        assert (sample.answer == "yes") == any(t.noun == noun and colour in ("", t.colour) for t in sample.scene.things)
        answers[sample.answer] += 1
    assert min(answers.values()) > 180


def test_counts() -> None:
    rng, answers = random.Random(10), Counter()
    for _ in range(500):
        sample = sample_question(rng, kind="count")
        subject = re.search(rf"({'|'.join(COLOURS)})? ?(things|{'|'.join(sorted(SINGULAR, key=len, reverse=True))})\b", sample.question)
        assert subject
        matching = [t for t in sample.scene.things if subject[2] == "things" or SINGULAR[subject[2]] == t.noun]
        matching = [t for t in matching if subject[1] in (None, t.colour)]
        assert sample.answer == ("zero", "one", "two", "three", "four")[len(matching)], sample
        answers[sample.answer] += 1
    assert len(answers) == 5


def test_choices_offer_the_right_answer_once() -> None:
    rng = random.Random(11)
    for _ in range(200):
        sample = sample_question(rng, kind="choice")
        options = dict(re.findall(r"([A-D])\) ([a-z ]+?)(?= [A-D]\)|$)", sample.question))
        assert len(set(options.values())) == 4 and sample.answer in options


@pytest.mark.parametrize("kind", ["describe", "steps"])
def test_long_answers_name_everything(kind: str) -> None:
    rng = random.Random(12)
    for _ in range(150):
        sample = sample_question(rng, kind=kind)
        assert 35 <= len(sample.answer.split()) <= 120
        for thing in sample.scene.things:
            assert f"{thing.colour} {thing.noun}" in sample.answer and CELL_NAMES[thing.cell] in sample.answer.lower()


def test_every_kind_of_question_exists_in_both_splits() -> None:
    rng = random.Random(13)
    for split in ("train", "heldout"):
        for kind in KINDS:
            sample = sample_question(rng, split=split, kind=kind)
            assert sample.kind == kind and sample.question[0].isupper() and sample.think


def test_impossible_wishes_are_input_errors() -> None:
    rng = random.Random(14)
    with pytest.raises(InputError, match="nonsense"):
        sample_t2i(rng, split="nonsense")
    with pytest.raises(InputError, match="nonsense"):
        sample_edit(rng, group="nonsense")
    with pytest.raises(InputError, match="adding"):
        sample_edit(rng, split="heldout", group="add", kind="count")
    with pytest.raises(InputError, match="exclude"):
        sample_t2i(rng, split="heldout", style="terse", category="two", kind="count")


def test_held_out_sentences_are_never_drawn_in_training() -> None:
    """The held-out wordings of removing: one of six never opens an instruction of the train split."""
    openings = {s: Counter(sample_edit(random.Random(i), split=s, group="remove", kind=k).instruction.split()[0] for i in range(200))
                for s, k in (("train", None), ("heldout", "template"))}  # fmt: skip
    assert len(openings["train"]) == 5 and not set(openings["train"]) & set(openings["heldout"])


def test_near_misses_make_captions_false() -> None:
    rng, categories = random.Random(8), Counter()
    for _ in range(1500):
        sample = sample_t2i(rng)
        scene = near_miss_of_caption(rng, sample)
        scene.check()
        categories[sample.category] += 1
        assert not heldout.heldout_kinds(scene.things), "what training never shows is not shown as the worse picture either"
        nouns = [{t.noun for t in one.things} for one in (scene, sample.scene)]
        if sample.category == "position" and nouns[0] == nouns[1]:  # the same two things, every relation turned round
            (a, b), (c, d) = sample.scene.things, scene.things
            assert (a.noun, a.colour, b.noun, b.colour) == (c.noun, c.colour, d.noun, d.colour)
            assert [r for r in RELATION if holds(a, r, b)] == [r for r in RELATION if holds(d, r, c)] != []
        elif sample.category == "dense":
            assert places(scene) != places(sample.scene)
        else:
            assert not names_exactly(sample.prompt, scene), (sample, scene)
            assert abs(len(scene.things) - len(sample.scene.things)) <= 1 and scene.background == sample.scene.background
            assert {t.cell for t in scene.things} & {t.cell for t in sample.scene.things}
    assert set(categories) == {"single", "two", "counting", "colors", "position", "attribute", "many", "dense"}


def test_near_misses_of_edits_are_other_pictures() -> None:
    rng, also = random.Random(9), 0
    for _ in range(600):
        edit = sample_edit(rng)
        scene = near_miss_of_edit(rng, edit)
        scene.check()
        assert scene not in (edit.source, edit.target) and not heldout.heldout_kinds(scene.things)
        also += len(set(scene.things) & set(edit.target.things)) >= len(edit.target.things) - 1
    assert also > 300  # most are nearly right


def test_checks_of_captions_follow_from_the_words() -> None:
    """Each is answered from the caption's own mentions, read as a text."""
    rng, kinds = random.Random(10), Counter()
    for _ in range(800):
        sample = sample_t2i(rng, style={"terse": 1, "medium": 1})
        named = mentions(sample.prompt)
        checks = checks_of_caption(rng, sample, 99)
        assert checks == checks_of_caption(random.Random(), sample, 0) + checks and len(checks) >= 3
        for question, answer in checks:
            asked = question.lower().rstrip("?.")
            colours = [c for c in COLOURS if c in asked.split()]
            nouns = [SINGULAR[w] for w in asked.split() if w in SINGULAR]
            fitting = sum(n for (_, _, c, noun), n in named.items() if noun in nouns and c in (colours or [c]))
            if answer in NUMBERS and answer not in ("a", "an"):
                kinds["count"] += 1
                assert NUMBERS[answer] == (fitting if nouns else sum(named.values())), (sample.prompt, question, answer)
            elif answer in COLOURS:
                kinds["colour"] += 1
                assert [c for (_, _, c, noun) in named if noun == nouns[0]] == [answer], (sample.prompt, question, answer)
            elif len(nouns) == 1:
                kinds["existence"] += 1
                assert answer == "yes" and fitting > 0, (sample.prompt, question)
            else:
                kinds["relation"] += 1
                assert sample.category == "position"
                told = STATED.search(sample.prompt)  # the caption's own words, whatever else the scene makes true
                assert told is not None, sample.prompt
                stated, relation = told_as(told[6]), told_as(asked)
                first, second = nouns
                as_told = (first, second) == (told[5], told[11])
                assert relation == (stated if as_told == (answer == "yes") else OPPOSITE[stated]), (sample.prompt, question, answer)
    assert set(kinds) == {"count", "colour", "existence", "relation"}
