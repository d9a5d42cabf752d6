"""The language of the embedded world: one sample of each task at a time, every one true of its scene."""

from hyperbagel.toybox.captions import CATEGORIES, STYLES, sample_t2i
from hyperbagel.toybox.edits import EXTRA_GROUPS, GROUPS, sample_edit
from hyperbagel.toybox.heldout import template_split
from hyperbagel.toybox.questions import KINDS, questions_about, sample_question
from hyperbagel.toybox.samples import EditSample, QuestionSample, T2ISample

__all__ = [
    "CATEGORIES", "EXTRA_GROUPS", "GROUPS", "KINDS", "STYLES", "EditSample", "QuestionSample", "T2ISample",
    "questions_about", "sample_edit", "sample_question", "sample_t2i", "template_split",
]  # fmt: skip
