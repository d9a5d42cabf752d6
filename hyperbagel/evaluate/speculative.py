"""Measures speculative decoding: the acceptance of each drafter, and tokens per second of each way to decode beside fast plain decoding.

Acceptance is measured with drafts of a fixed length (the paper's chain of 10, a whole block, and a block's tree) from im_start on, speed
as requests are served: with the budget, from an answer's first token on, which reading the question has given. The ways of decoding take
turns on the same prompts, several times over; medians and spread are over these repeats. Each time budgets know what they learnt from as
many other prompts, and nothing of these. A stopped evaluation goes on with the cell (split, temperature, batch) that it was in.

Shape legend: B sessions, V vocabulary.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import make_folder
from hyperbagel.core.hardware import clock
from hyperbagel.data.prompts import THINK_DRAW
from hyperbagel.evaluate.records import Record, digest, run_items
from hyperbagel.evaluate.report import write_report
from hyperbagel.evaluate.speculative_report import print_tables, summarise
from hyperbagel.evaluate.toybox import drawn, planner_of, weights_of
from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.planner import Planner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import after_first
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.choose import NODES, Drafters
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.thinking import written_by
from hyperbagel.speculative.types import Speculated, Stats, Times
from hyperbagel.toybox.language import sample_edit, sample_question, sample_t2i

PLANS = "plans"
SPLITS = ("in_template", "held_out", "free_form", PLANS)
RESERVED = PLAIN, LOOKUP, AUTO = "plain", "lookup", "auto"
TREE = ", tree"  # follows the name of a drafter in rows of its trees
FREE_TOKENS = 40  # least length of a free-form answer
# requests in words that no template has
FREE = (
    "Tell a friend who cannot see this picture what is on it.", "Write a few sentences about the scene.",
    "What is going on here? Use your own words.", "Make a long caption for this picture.", "Please write down what this picture shows.",
)  # fmt: skip
_KEPT = 16  # caches of fixed shapes with their graphs: one for each set of taps and batch size, so that no turn records them anew
# what rates and tau of speed are of: kept with the records, so that no others are mixed in
COUNTS = "after the first token, choices by plain draws"
_TRIES = 20  # prompts that are tried for each one that is kept


@dataclass(frozen=True)
class Plan:
    """What is measured. Stored with the records, so that records of another plan are not mixed in."""

    prompts: int = 24  # per split
    repeats: int = 5
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batches: tuple[int, ...] = (1, 4)
    max_tokens: int = 160
    depth: int = 10  # of the drafts whose acceptance is measured
    speed: bool = True  # False: acceptance alone
    seed: int = 0
    free_tokens: int = FREE_TOKENS


QUICK = Plan(prompts=2, repeats=1, batches=(1, 2), max_tokens=12, free_tokens=1)


@dataclass(frozen=True)
class Prompt:
    """What an answer is decoded behind: a question about a picture; of the split PLANS a caption, or an instruction and its source."""

    text: str
    picture: Image.Image | None
    planned: bool = False


@dataclass(frozen=True)
class Cell:
    """One table: all ways of decoding on one split at one temperature. batch 0: acceptance instead of speed."""

    split: str
    temperature: float
    batch: int

    @property
    def id(self) -> str:
        return f"{self.split}-T{self.temperature:g}-" + (f"x{self.batch}" if self.batch else "acceptance")


@dataclass
class _Arm:
    """One way to decode: the seconds and tokens of each repeat, and statistics over all of them."""

    drafter: Adaptive | None
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    times: Times = field(default_factory=Times)
    drafted: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


def run_speculative_eval(
    model: Any, drafters: Mapping[str, Path], *, out: Path | str, plan: Plan | None = None, show: bool = True
) -> dict[str, Any]:
    """Measure every drafter in `drafters` (name -> folder) and every one that came with the model. Writes cells.jsonl and report.json into
    `out`; show: also prints the tables.

    Raises InputError for a folder that holds no drafter of this model, a name that another way of decoding has, or records in `out` that
    were made with another plan or other weights.
    """
    if taken := [name for name in (*drafters, *model.drafters.shipped()) if name in RESERVED or name.endswith(TREE)]:
        others = f"none of {', '.join(RESERVED)} and none that ends in {TREE!r}"
        raise InputError(f"got a drafter named {taken[0]!r}, expected {others}, which name rows of the tables; rename it")
    plan = plan or Plan()
    folder = make_folder(out)
    names = {name: name for name in model.drafters.shipped()} | {name: str(path) for name, path in drafters.items()}
    for name in names.values():
        model.drafters.get(name)  # a folder that cannot be used ends the run here
    work = _Bench(model, names, plan)
    cells = [Cell(s, t, b) for s in SPLITS for t in plan.temperatures for b in ((0, *plan.batches) if plan.speed else (0,))]
    weights = {name: digest(model.drafters.find(path)) for name, path in names.items()}
    marks = {"counts": COUNTS, "base": weights_of(model)["base"], "weights": weights} | planner_of(model)
    about = {"plan": asdict(plan), "drafters": names, "tree_nodes": NODES, "model": model.name, "machine": work.machine()} | marks
    header = json.loads(json.dumps(about))
    records = run_items("speculative", cells, work.cells, seed=plan.seed, batch=1, header=header, path=folder / "cells.jsonl")
    result = summarise(header, records)
    result = write_report(result, folder / "report.json")
    if show:
        print_tables(result)
    return result


class _Bench:
    def __init__(self, model: Any, names: Mapping[str, str], plan: Plan) -> None:
        self.model, self.names, self.plan = model, names, plan
        self.prompts: dict[str, list[Prompt]] = {}
        self.drafters, self.runner, planner = model.drafters, model.runner, model.planner
        if self.runner is None and model.parts.model.device.type == "cuda":  # the fastest plain decoding there is; drafts are to match it
            self.runner = GraphRunner(model.parts.model, keep=_KEPT)
            self.drafters = Drafters(model.parts, model.drafters.folder, self.runner)
            planner = Planner(model.parts.model, planner.folder, self.runner)
        self.writer, self.writers_runner = planner.get()  # of plans

    def machine(self) -> dict[str, Any]:
        target = self.model.parts.model
        kind = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else "cpu"
        found = {"device": kind, "threads": torch.get_num_threads(), "dtype": target.precision}
        return found if self.runner is None else found | {"graphs": True}

    @torch.inference_mode()
    def cells(self, cells: Sequence[Cell], seeds: Sequence[int]) -> list[Record]:
        return [self._speed(cell) if cell.batch else self._acceptance(cell) for cell in cells]

    # -- prompts ---------------------------------------------------------------------------------------------------------------

    def of_split(self, split: str, before: bool = False) -> list[Prompt]:
        """The prompts of a split; before: as many others, which warm up."""
        key = split + "/before" * before
        if key not in self.prompts:
            self.prompts[key] = self._make(split, random.Random(f"speculative/{split}/{self.plan.seed}{'/before' * before}"))
        return self.prompts[key]

    def _make(self, split: str, rng: random.Random) -> list[Prompt]:
        if split == PLANS:
            return [_to_plan(rng, edit=i % 2 == 1) for i in range(self.plan.prompts)]
        found: list[Prompt] = []
        for i in range(_TRIES * self.plan.prompts):
            if split == "in_template":
                made = sample_question(rng)
            elif split == "held_out":
                made = sample_question(rng, split="heldout", heldout_kind="template")
            else:
                made = sample_question(rng, split="heldout", kind="describe")
            prompt = Prompt(FREE[i // 2 % len(FREE)] if split == "free_form" and i % 2 else made.question, drawn(made.scene, 64))
            if split != "free_form" or self._long(prompt):
                found.append(prompt)
            if len(found) == self.plan.prompts:
                return found
        raise InputError(
            f"got {len(found)} answers of at least {self.plan.free_tokens} tokens to {_TRIES * self.plan.prompts} requests, expected "
            f"{self.plan.prompts}; this model answers too briefly for a free-form split"
        )

    def _long(self, prompt: Prompt) -> bool:
        [out] = plain_decode(self._sessions([prompt], ()), max_tokens=self.plan.max_tokens)
        return len(out.ids) >= self.plan.free_tokens

    def _sessions(self, prompts: Sequence[Prompt], taps: Sequence[int], opened: bool = False) -> list[Session]:
        made = []
        for prompt in prompts:
            session = Session.new(self.model.parts, taps)
            if prompt.planned:
                session.add_text(THINK_DRAW)
            if prompt.picture is not None:
                session.add_image(prompt.picture, latents=prompt.planned)
            session.add_text(prompt.text, later=opened)
            if prompt.planned:
                session = written_by(session, self.writer)
            if opened:
                session.open_answer()
            made.append(session)
        return made

    # -- acceptance ------------------------------------------------------------------------------------------------------------

    def _acceptance(self, cell: Cell) -> Record:
        """Acceptance of each drafter with drafts of full length, and the target's entropy in nats per token."""
        plan, prompts = self.plan, self.of_split(cell.split)
        rows: dict[str, Any] = {}
        plain = plain_decode(self._sessions(prompts, ()), **self._how(cell, range(len(prompts))), keep_logits=True)
        sure = [float(torch.distributions.Categorical(logits=x).entropy()) for out in plain for x in out.logits[: len(out.ids) + 1]]
        drafters = {LOOKUP: self.drafters.get(LOOKUP)}
        for name, path in self.names.items():
            drafters[name] = self.drafters.get(path)
            if (served := self.drafters.served(path)) is not drafters[name]:
                drafters[name + TREE] = served
        for name, drafter in drafters.items():
            tree = name.endswith(TREE)
            stats, width = Stats(), drafter.width if tree else min(plan.depth, drafter.width)
            drafter.threshold = 0.0
            for out in decode(self._sessions(prompts, drafter.taps), **self._how(cell, range(len(prompts))), drafter=drafter):
                assert isinstance(out, Speculated)
                stats.add(out.stats)
            rate = None if tree else alpha(stats.tau, width)  # defined for chains
            rows[name] = {"tau": stats.tau, "alpha": rate, "depth": width, "rates": stats.rates()}
        lengths = [len(out.ids) for out in plain]
        return {**asdict(cell), "rows": rows, "entropy": sum(sure) / len(sure), "tokens": sum(lengths), "longest": max(lengths)}

    def _how(self, cell: Cell, which: Sequence[int]) -> dict[str, Any]:
        """Arguments of decoding for the prompts of these numbers: the same generators for every way to decode."""
        generators = [torch.Generator().manual_seed(self.plan.seed + i) for i in which]
        return {"max_tokens": self.plan.max_tokens, "temperature": cell.temperature, "generators": generators}

    # -- speed -----------------------------------------------------------------------------------------------------------------

    def _speed(self, cell: Cell) -> Record:
        plan, prompts, others = self.plan, self.of_split(cell.split), self.of_split(cell.split, before=True)
        arms = {PLAIN: _Arm(None)}
        arms |= {name: _Arm(self.drafters.budgeted(path)) for name, path in {LOOKUP: LOOKUP, **self.names, AUTO: AUTO}.items()}
        groups = [range(i, min(i + cell.batch, len(prompts))) for i in range(0, len(prompts), cell.batch)]
        answers: dict[str, list[Decoded]] = {}
        budgets = {name: arm.drafter for name, arm in arms.items() if arm.drafter is not None}
        learnt: dict[str, Any] = {}
        for repeat in range(-1, plan.repeats):  # repeat -1 warms up, and drafters measure their costs in it
            if repeat <= 0:
                asked = prompts if repeat == 0 else others
                contexts = {
                    name: self._sessions(asked, () if arm.drafter is None else arm.drafter.taps, True) for name, arm in arms.items()
                }
            for name, phases in learnt.items():
                budgets[name].phases = deepcopy(phases)
            spent = dict.fromkeys(arms, 0.0)
            said: dict[str, list[Decoded]] = defaultdict(list)
            for turn, group in enumerate(groups):
                order = list(arms)
                shift = (turn + repeat) % len(order)
                for name in order[shift:] + order[:shift]:
                    arm = arms[name]
                    sessions = [contexts[name][i] for i in group]
                    how = self._how(cell, group)
                    if arm.drafter is not None:
                        arm.drafter.prepare(sessions[0], len(sessions), cell.temperature)
                    start = self._clock()
                    runner = self.writers_runner if cell.split == PLANS else self.runner
                    out = decode(sessions, **how, drafter=arm.drafter, runner=runner)
                    spent[name] += self._clock() - start
                    said[name] += out
                    if repeat >= 0 and arm.drafter is not None:
                        _add(arm, out)
            if repeat < 0:
                learnt = {name: deepcopy(budget.phases) for name, budget in budgets.items()}
            else:
                for name, arm in arms.items():
                    arm.seconds.append(spent[name])
                    arm.tokens.append(sum(after_first(len(out.ids), out.finish_reason) for out in said[name]))
                answers = said
        plain = arms[PLAIN]
        rows = {name: _row(arm, plain) for name, arm in arms.items()}
        for name, outs in answers.items():
            drafter = arms[name].drafter
            if cell.temperature == 0 or drafter is None or not drafter.draws:  # else answers have draws of their own
                rows[name]["identical"] = sum(a.ids == b.ids for a, b in zip(outs, answers[PLAIN], strict=True))
        return {**asdict(cell), "rows": rows, "answers": len(prompts)}

    def _clock(self) -> float:
        return clock(self.model.parts.model.device)


def _to_plan(rng: random.Random, edit: bool) -> Prompt:
    """A picture that the model is to plan: an edit, or one from a caption."""
    if not edit:
        return Prompt(sample_t2i(rng).prompt, None, planned=True)
    made = sample_edit(rng)
    return Prompt(made.instruction, drawn(made.source, 64), planned=True)


def _add(arm: _Arm, out: Sequence[Decoded]) -> None:
    for row in out:
        if isinstance(row, Speculated):
            arm.stats.add(row.stats)
    first = out[0]
    if isinstance(first, Speculated):  # the rows of one call share their times
        for part, seconds in asdict(first.times).items():
            setattr(arm.times, part, getattr(arm.times, part) + seconds)
    for name, rounds in arm.drafter.rounds_drafted.items():  # type: ignore[union-attr]
        arm.drafted[name] += rounds


def _row(arm: _Arm, plain: _Arm) -> Record:
    """Tokens per second, and the speed-up over plain decoding in the same repeat. Stop tokens count, since they cost a step too; an
    answer's first token does not, since reading the question gives it."""
    rates = [n / s for n, s in zip(arm.tokens, arm.seconds, strict=True)]
    gains = [mine / (max(n, 1) / s) for mine, n, s in zip(rates, plain.tokens, plain.seconds, strict=True)]
    row: Record = {"tok_per_second": median(rates), "low": min(rates), "high": max(rates)}
    row |= {"speedup": median(gains), "speedup_low": min(gains), "speedup_high": max(gains)}
    if arm.drafter is not None:
        rounds = max(1, arm.stats.rounds)
        ms = {part: 1e3 * seconds / rounds for part, seconds in asdict(arm.times).items()}
        row |= {"tau": arm.stats.tau, "ms": ms, "rounds": arm.stats.rounds, "drafted": dict(arm.drafted)}
    return row


def alpha(tau: float, depth: int) -> float:
    """The acceptance rate a for which tau = 1 + a + ... + a^depth = (1 - a^(depth + 1)) / (1 - a): for depth 10 the paper's 10-alpha."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**k for k in range(depth + 1)) < tau:
            low = middle
        else:
            high = middle
    return low
