"""Many questions at once: python -m benchmarks.load [--model toybox] [--clients 8] [--seconds 12] [--against CHECKOUT] [--out FILE.json]

Clients ask one question after another about pictures of the embedded world; a third of them want a description, the others a word or two.
Given are tokens a second of all clients, and how long answers of both kinds take, from request to end.

--against: a checkout of another version of this repository. Both serve in turns, block by block, and the same request must get the same
answer from both; it fails if one does not.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import torch

from benchmarks.finish import finish, head
from benchmarks.server import about_picture, as_png, serving
from hyperbagel.core.run import git_sha
from hyperbagel.evaluate.toybox import drawn
from hyperbagel.toybox.language import sample_question

QUESTIONS = 300
LONG = 0.35  # share of descriptions
HERE, THERE = "this version", "the other"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between an answer and the client's next question")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a block")
    parser.add_argument("--blocks", type=int, default=3, help="of each version, behind one to warm up")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--note", default="", help="kept with the figures, say what else the machine was doing")
    options = parser.parse_args(given)
    if options.clients < 1 or options.blocks < 1 or not options.seconds > 0 or not options.pause >= 0:
        parser.error("got no clients, blocks or seconds, or a pause below 0, expected some of each")
    if options.against is not None and not (options.against / "hyperbagel").is_dir():
        parser.error(f"got --against {options.against}, expected a checkout with a folder hyperbagel")
    options.given = sys.argv[1:] if given is None else given
    return options


def questions(seed: int = 5) -> list[tuple[bool, dict[str, Any]]]:
    """(whether a description is wanted, body) of QUESTIONS requests."""
    rng, found = random.Random(seed), []
    for _ in range(QUESTIONS):
        long = rng.random() < LONG
        made = sample_question(rng, split="heldout", kind="describe") if long else sample_question(rng)
        found.append((long, about_picture(as_png(drawn(made.scene, 64)), made.question, max_tokens=160)))
    return found


class Block:
    """Some seconds of questions to one server: what was answered, and how long it took."""

    def __init__(self, address: str, asked: Sequence[tuple[bool, dict[str, Any]]], clients: int, seconds: float, pause: float) -> None:
        self.address, self.asked, self.pause = address, asked, pause
        self.spent: dict[bool, list[float]] = {True: [], False: []}
        self.answers: dict[int, str] = {}
        self.tokens, self.at, self.lock = 0, 0, threading.Lock()
        self.failed: list[str] = []
        self.end = time.perf_counter() + seconds
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.rate = self.tokens / seconds

    def client(self, number: int) -> None:
        rng = random.Random(number)
        with httpx2.Client(base_url=self.address, timeout=120) as http:
            while time.perf_counter() < self.end:
                with self.lock:
                    i, self.at = self.at % len(self.asked), self.at + 1
                long, body = self.asked[i]
                begin = time.perf_counter()
                reply = http.post("/chat/completions", json=body)
                spent = time.perf_counter() - begin
                with self.lock:
                    if reply.status_code != 200:
                        self.failed.append(f"question {i}: got status {reply.status_code}")
                        return
                    told = reply.json()
                    text = told["choices"][0]["message"]["content"]
                    if self.answers.setdefault(i, text) != text:
                        self.failed.append(f"question {i}: got {text!r}, expected {self.answers[i]!r} as before")
                    self.spent[long].append(spent)
                    self.tokens += told["usage"]["completion_tokens"]
                if self.pause:
                    time.sleep(rng.expovariate(1 / self.pause))


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = head("load", options) | {"clients": options.clients, "pause": options.pause, "failed": [], "arms": {}}
    asked, blocks = questions(), dict[str, list[Block]]()
    if options.against is not None:
        found["against"] = git_sha(options.against)
        found["command"] = ["OTHER" if word == str(options.against) else word for word in found["command"]]
    with ExitStack() as stack:
        servers = {HERE: stack.enter_context(serving(options.model))[0]}
        if options.against is not None:
            servers[THERE] = stack.enter_context(serving(options.model, options.against))[0]
        for turn in range(options.blocks + 1):
            for name in sorted(servers, reverse=turn % 2 == 1):
                made = Block(servers[name], asked, options.clients, options.seconds if turn else options.seconds / 3, options.pause)
                blocks.setdefault(name, []).append(made)
    answers: dict[int, str] = {}
    for name, made_blocks in blocks.items():
        for block in made_blocks:
            found["failed"] += block.failed
            apart = [i for i, text in block.answers.items() if answers.setdefault(i, text) != text]
            found["failed"] += [f"question {i}: other answers in other blocks" for i in apart]
        found["arms"][name] = summary(made_blocks[1:])
    return found


def summary(blocks: Sequence[Block]) -> dict[str, Any]:
    """Tokens a second (median of the blocks) and milliseconds of answers, short and long: how many, half of them, 95 % of them."""
    out: dict[str, Any] = {"tokens_per_second": statistics.median(block.rate for block in blocks)}
    for long, name in ((False, "short"), (True, "long")):
        spent = sorted(1e3 * seconds for block in blocks for seconds in block.spent[long])
        at = [spent[min(len(spent) - 1, int(share * len(spent)))] for share in (0.5, 0.95)] if spent else [None, None]
        out[name] = {"answers": len(spent), "median": at[0], "p95": at[1]}
    return out


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['clients']} clients{'':<14}{'tokens a second':>18}{'short answers, ms (95 %)':>28}{'long answers':>22}"]
    for name, arm in found["arms"].items():
        cells = [f"{arm[kind]['median'] or 0:.0f} ({arm[kind]['p95'] or 0:.0f})" for kind in ("short", "long")]
        lines.append(f"{name:<24}{arm['tokens_per_second']:>17.0f}{cells[0]:>28}{cells[1]:>22}")
    return "\n".join([*lines, *found["failed"][:20], f"{len(found['failed'])} things were wrong"])


def main(given: list[str] | None = None) -> int:
    return finish(arguments(given), run, table, lambda found: bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
