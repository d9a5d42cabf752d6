"""The recipe of the embedded model's tokenizer. Run it: python -m hyperbagel.data.toybox_tokenizer FOLDER"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from hyperbagel.data.prompts import THINK_ANSWER, THINK_DRAW
from hyperbagel.data.tokenizer import Tokenizer, train_bpe
from hyperbagel.toybox.language import sample_edit, sample_question, sample_t2i
from hyperbagel.toybox.vocabulary import BACKGROUNDS, CELL_NAMES, COLOURS, NOUNS

VOCAB_SIZE = 1024
SEED = 0
SAMPLES = 6000  # of each task and split


def corpus(seed: int, samples: int) -> Iterator[str]:
    """What the embedded model reads and writes: prompts, instructions, questions, answers and thoughts of both splits.

    Held-out sentences consist of the same words. A tokenizer that knows them gives nothing away; one that does not would make new sentences
    longer as well as new. The world's words come often enough to be one token each, at the start of a text too.
    """
    rng = random.Random(seed)
    for split in ("train", "heldout"):
        for _ in range(samples):
            drawn, edit, question = sample_t2i(rng, split=split), sample_edit(rng, split=split), sample_question(rng, split=split)
            yield drawn.prompt
            yield edit.instruction
            yield f"{question.question}\n{question.answer}"
            if rng.random() < 0.2:
                yield from (f"<think>{text}</think>" for text in (drawn.think, edit.think, question.think))
    for word in (*NOUNS, *COLOURS, *BACKGROUNDS, *CELL_NAMES, "yes", "no", "nothing"):
        yield from [f"a {word} {word}, {word}.", word] * (samples // 20)
    yield from [THINK_DRAW, THINK_ANSWER] * (samples // 5)


def build_tokenizer(folder: Path | str, seed: int = SEED, samples: int = SAMPLES) -> Tokenizer:
    """Trains and writes the tokenizer; the defaults give the shipped one, byte for byte."""
    return train_bpe(corpus(seed, samples), VOCAB_SIZE, folder)


if __name__ == "__main__":
    print(build_tokenizer(sys.argv[1]).vocab_size)
