"""Think mode: its system prompts, in BAGEL's wording (with a space before each newline), a training sample in it, and how an answer is
split."""

from __future__ import annotations

from hyperbagel.data.plan import Sample, Text
from hyperbagel.data.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"  # around a thought
THINK_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
THINK_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer here"
)


def planned(tokenizer: Tokenizer, prompt: str, plan: str | None) -> tuple[Sample, Sample]:
    """(what comes first, the prompt) of a sample that draws; with a plan, a system prompt, and the prompt followed by the plan to learn.

    plan: with its <think> tags or without.
    """
    asked = Text(tokenizer.encode(prompt), enable_cfg=True)
    if not plan:
        return [], [asked]
    tagged = plan if OPEN in plan else f"{OPEN}{plan}{CLOSE}"
    # the plan is dropped with the prompt: guidance's text-dropped branch knows neither
    return [Text(tokenizer.encode(THINK_DRAW))], [asked, Text(tokenizer.encode(tagged), loss=True, tied=True)]


def split_thinking(text: str, think: bool) -> tuple[str | None, str]:
    """("...", answer) from "<think> ... </think> answer"; the answer is "" if the thought was cut off. (None, text) if there is no thought,
    or if `think` is off."""
    if not think or not (CLOSE in text or text.lstrip().startswith(OPEN)):
        return None, text.strip()
    thought, _, answer = text.partition(CLOSE)
    return untagged(thought), answer.strip()


def untagged(thought: str) -> str:
    """A thought without its tags."""
    return thought.replace(OPEN, "").replace(CLOSE, "").strip()
