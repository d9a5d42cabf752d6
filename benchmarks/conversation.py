"""How soon the next question of a conversation is answered: python -m benchmarks.conversation [--model toybox] [--out FILE.json]

Conversations of some questions about one picture go to the server, as the web page sends them: whole each time. Two arms take turns. Read
on: the server finds what it read for the question before. Read anew: the same question, with another pixel in the picture, so that it finds
nothing. Given are milliseconds from sending a question to the first text of its answer, by the question's number.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import httpx2
import torch

from benchmarks.finish import finish, head
from benchmarks.measure import Timing
from benchmarks.server import about_picture, as_png, first_text, in_ms, other_picture, serving
from hyperbagel.evaluate.toybox import drawn
from hyperbagel.toybox.language import sample_question

ARMS = "read on", "read anew"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversation", description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--questions", type=int, default=4, help="of each conversation")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--note", default="", help="kept with the figures, say what else the machine was doing")
    options = parser.parse_args(given)
    if options.conversations < 1 or options.questions < 1:
        parser.error("got no conversations or no questions, expected some of both")
    options.given = sys.argv[1:] if given is None else given
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    found, rng = head("conversation", options), random.Random(5)
    spent: dict[str, list[list[float]]] = {arm: [[] for _ in range(options.questions)] for arm in ARMS}
    tokens: list[list[int]] = [[] for _ in range(options.questions)]
    with serving(options.model) as (address, _), httpx2.Client(base_url=address, timeout=120) as client:
        for number in range(options.conversations):
            scene, said = sample_question(rng, kind="describe").scene, list[dict[str, Any]]()
            picture = drawn(scene, 64)
            for i in range(options.questions):
                asked = sample_question(rng, kind="describe").question if i % 2 == 0 else "How many things are there?"
                pictures = {ARMS[0]: picture, ARMS[1]: other_picture(picture, i + 1)}
                for arm in sorted(ARMS, reverse=number % 2 == 1):
                    body = whole(as_png(pictures[arm]), said, asked)
                    spent[arm][i].append(first_text(client, body))
                answer = client.post("/chat/completions", json=whole(as_png(picture), said, asked)).raise_for_status().json()
                tokens[i].append(answer["usage"]["prompt_tokens"])
                said += [{"role": "user", "content": asked}, answer["choices"][0]["message"]]
    found["tokens"] = [sum(n) / len(n) for n in tokens]
    return found | {"milliseconds": {arm: [in_ms(Timing.of(times)) for times in by_number] for arm, by_number in spent.items()}}


def whole(png: bytes, said: list[dict[str, Any]], question: str) -> dict[str, Any]:
    """The body of a conversation's next question; its first one holds the picture."""
    first = said[0]["content"] if said else question
    body = about_picture(png, first, max_tokens=160)
    body["messages"] += [*said[1:], {"role": "user", "content": question}] if said else []
    return body


def table(found: dict[str, Any]) -> str:
    lines = [f"{'first text, ms (10 to 90 %)':<28}" + "".join(f"{arm:>24}" for arm in ARMS) + f"{'tokens before it':>20}"]
    for i, tokens in enumerate(found["tokens"]):
        cells = [found["milliseconds"][arm][i] for arm in ARMS]
        told = [f"{cell['median']:.1f} ({cell['low']:.1f} to {cell['high']:.1f})" for cell in cells]
        lines.append(f"{f'question {i + 1}':<28}" + "".join(f"{cell:>24}" for cell in told) + f"{tokens:>20.0f}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    return finish(arguments(given), run, table, lambda found: False)


if __name__ == "__main__":
    sys.exit(main())
