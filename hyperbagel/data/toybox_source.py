"""The embedded world as a source like any other: captions with their pictures, edits, questions with their answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hyperbagel.core.errors import InputError
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage, picture_items
from hyperbagel.data.prompts import THINK_ANSWER, planned
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.toybox.captions import without_background
from hyperbagel.toybox.checks import Check, checks_of_caption, checks_of_edit
from hyperbagel.toybox.language import KINDS, questions_about, sample_edit, sample_question, sample_t2i
from hyperbagel.toybox.near_misses import near_miss_of_caption, near_miss_of_edit
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene

Task = Literal["t2i", "edit", "question"]
TASKS: tuple[Task, ...] = ("t2i", "edit", "question")


@dataclass
class ToyboxSource:
    """Endless samples of one task, each a pure function of (seed, task, index).

    Attributes:
        resolution: side of the pictures in pixels.
        noise_copies: noise draws of a target in one sequence; they do not see each other and share the context.
        think_share: share of samples in think mode, with a system prompt and the thoughts as text to learn.
        styles: t2i: weights of caption styles; None: toybox.captions's own.
        categories: t2i: weights of what captions are about (GenEval's six and "many"), to show more of what is learned worst; None:
            toybox.captions's own.
        groups: edit: weights of the kinds of edits, likewise.
        turns: question: how many about one picture in one sequence, each seeing those before it; the picture is encoded once.
        split: "train", or "heldout" for what training never shows.
        kinds: question: weights of the kinds; None: toybox.questions's own. Drafters, which learn from answers, want long ones.
        plan_background: t2i: whether plans name the background, as toybox.captions's do, or leave it to the caption.
        near_misses: the picture to draw is followed by one that almost fits; stage reward learns that the first is better.
        checks: how many questions about the picture to draw, with their answers, follow it; stage refl asks them.
    """

    task: Task
    tokenizer: Tokenizer
    seed: int
    resolution: int = 64
    noise_copies: int = 1
    think_share: float = 0.0
    styles: Mapping[str, float] | None = None
    categories: Mapping[str, float] | None = None
    groups: Mapping[str, float] | None = None
    turns: int = 1
    split: str = "train"
    kinds: Mapping[str, float] | None = None
    plan_background: bool = True
    near_misses: bool = False
    checks: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"toybox task: got {self.task!r}, expected one of {', '.join(TASKS)}; use one of these")
        if (self.near_misses or self.checks) and self.task == "question":
            raise InputError("toybox near_misses and checks: got task 'question', expected t2i or edit, which draw; leave them out")
        if not self.plan_background and (self.task != "t2i" or not self.think_share):
            got = f"got task {self.task!r} and think_share {self.think_share:g}"
            raise InputError(f"toybox plan_background: {got}, expected t2i and some plans; leave it out")
        for name, task in (("categories", "t2i"), ("groups", "edit")):
            if getattr(self, name) is not None and (self.task, self.split) != (task, "train"):
                raise InputError(
                    f"toybox {name}: got task {self.task!r} and split {self.split!r}, expected {task} and train; leave {name} out"
                )
        if unknown := set(self.kinds or ()) - set(KINDS):
            raise InputError(f"toybox question kinds: got {min(unknown)!r}, expected some of {', '.join(KINDS)}; use these")

    def __len__(self) -> int:
        return 0  # endless

    def sample(self, index: int) -> Sample:
        """Sample `index`: a plan with uint8 pictures."""
        rng = random.Random(f"{self.seed}/{self.task}/{self.split}/{index}")
        think = rng.random() < self.think_share
        if self.task == "t2i":
            return self._t2i(rng, think)
        return self._edit(rng, think) if self.task == "edit" else self._question(rng, think)

    def _picture(self, scene: Scene) -> NDArray[np.uint8]:
        return render(scene, self.resolution)

    def _text(self, text: str, *, loss: bool = False) -> Text:
        return Text(self.tokenizer.encode(text), loss=loss)

    def _t2i(self, rng: random.Random, think: bool) -> Sample:
        drawn = sample_t2i(rng, split=self.split, style=self.styles, category=self.categories)
        thoughts = drawn.think if self.plan_background else without_background(drawn.think, drawn.scene)
        system, prompt = planned(self.tokenizer, drawn.prompt, thoughts if think else None)
        target = picture_items(self._picture(drawn.scene), None, loss=True, copies=self.noise_copies, context=False)
        if self.near_misses:
            target.append(VaeImage(self._picture(near_miss_of_caption(rng, drawn)), loss=True))
        return [*system, *prompt, *target, *self._asked(checks_of_caption(rng, drawn, self.checks) if self.checks else [])]

    def _asked(self, turns: Iterable[Check]) -> Sample:
        return [text for question, told in turns for text in (self._text(question), self._text(told, loss=True))]

    def _edit(self, rng: random.Random, think: bool) -> Sample:
        drawn = sample_edit(rng, split=self.split, group=self.groups)
        system, prompt = planned(self.tokenizer, drawn.instruction, drawn.think if think else None)
        source = self._picture(drawn.source)
        target: Sample = [VaeImage(self._picture(drawn.target), loss=True)] * self.noise_copies
        if self.near_misses:
            target.append(VaeImage(self._picture(near_miss_of_edit(rng, drawn)), loss=True))
        context = picture_items(source, source, loss=False, context=True)
        return [*system, *context, *prompt, *target, *self._asked(checks_of_edit(rng, drawn, self.checks))]

    def _question(self, rng: random.Random, think: bool) -> Sample:
        kind = None if self.kinds is None else rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        drawn = sample_question(rng, split=self.split, kind=kind)
        answer = f"<think>{drawn.think}</think>{drawn.answer}" if think else drawn.answer
        system = [self._text(THINK_ANSWER)] if think else []
        turns = [(drawn.question, answer)]
        if not think and self.split == "train":
            turns += [(more.question, more.answer) for more in questions_about(rng, drawn.scene, self.turns - 1)]
        return [*system, VitImage(self._picture(drawn.scene)), *self._asked(turns)]
