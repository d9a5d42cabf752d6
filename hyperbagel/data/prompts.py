"""Think mode: its system prompts, in BAGEL's wording (with a space before each newline), and how an answer is split."""

from __future__ import annotations

THINK_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
THINK_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer here"
)


def split_thinking(text: str, think: bool) -> tuple[str | None, str]:
    """("...", answer) from "<think> ... </think> answer"; the answer is "" if the thought was cut off. (None, text) if there is no thought,
    or if `think` is off."""
    if not think or not ("</think>" in text or text.lstrip().startswith("<think>")):
        return None, text.strip()
    thought, _, answer = text.partition("</think>")
    return untagged(thought), answer.strip()


def untagged(thought: str) -> str:
    """A thought without its tags."""
    return thought.replace("<think>", "").replace("</think>", "").strip()
