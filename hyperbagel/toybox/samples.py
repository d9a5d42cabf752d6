"""What the embedded world gives for training: a sample of each task."""

from __future__ import annotations

from dataclasses import dataclass

from hyperbagel.toybox.scene import Scene


@dataclass(frozen=True)
class T2ISample:
    """A caption and a picture of which it is true. think: a plan before the picture."""

    prompt: str
    scene: Scene
    think: str
    category: str


@dataclass(frozen=True)
class EditSample:
    """An instruction with the exact pictures before and after it. think: what is there and what changes."""

    source: Scene
    instruction: str
    target: Scene
    group: str
    think: str


@dataclass(frozen=True)
class QuestionSample:
    """A question about a picture with its true answer. think: what to look at before answering."""

    scene: Scene
    question: str
    answer: str
    kind: str
    think: str
