"""The speculative evaluation on a small model: every row there, figures that agree with each other, a stopped run goes on."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))
from small_world import small_parts

from hyperbagel.core.errors import InputError
from hyperbagel.evaluate import speculative
from hyperbagel.evaluate.speculative import QUICK, SPLITS, Cell, alpha, run_speculative_eval
from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.session import Session
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.choose import NODES
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.folder import make_module, save_drafter
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.drafters.static import StaticTree
from hyperbagel.speculative.types import Speculated


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "small")


@pytest.fixture(scope="module")
def drafter(model: HyperBagel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = make_module(DrafterConfig.for_target("block", model.parts.model.config.llm, block=4))
    module.init_from(model.parts.model, torch.Generator().manual_seed(0))
    save_drafter(tmp_path_factory.mktemp("d") / "block", module, torch.float32)
    return next(tmp_path_factory.getbasetemp().glob("d*/block"))


@pytest.mark.parametrize(("rate", "depth"), [(0.0, 10), (0.7452, 10), (0.5, 4), (0.95, 8)])
def test_alpha_inverts_the_papers_formula(rate: float, depth: int) -> None:
    assert alpha((1 - rate ** (depth + 1)) / (1 - rate), depth) == pytest.approx(rate, abs=1e-9)


def test_the_papers_own_rows() -> None:
    """tau 3.7709 is 10-alpha 0.7452, and so on, to the digits that it prints."""
    for tau, told in ((3.7709, 0.7452), (3.6184, 0.7327), (2.8273, 0.6494), (3.6642, 0.7365), (3.4832, 0.7207)):
        assert alpha(tau, 10) == pytest.approx(told, abs=2e-4)


def test_figures_of_an_arm_by_hand() -> None:
    """Tokens a second, the gain over plain of the same repeat, tau, and milliseconds a round."""
    plain = speculative._Arm(None, seconds=[1.0, 2.0, 4.0], tokens=[100, 100, 100])
    mine = speculative._Arm(Lookup(), seconds=[0.5, 0.5, 1.0], tokens=[100, 100, 100])
    mine.stats.rounds, mine.stats.tokens = 40, 100
    mine.times.draft, mine.times.verify = 0.2, 0.4
    row = speculative._row(mine, plain)
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == (4, 2, 4)
    assert (row["tok_per_second"], row["low"], row["high"]) == (200, 100, 200)
    assert row["tau"] == 2.5 and row["ms"]["draft"] == pytest.approx(5) and row["ms"]["verify"] == pytest.approx(10)
    assert speculative._row(plain, mine)["speedup"] == 0.25


def test_every_row_and_a_run_that_goes_on(
    model: HyperBagel, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_speculative_eval(model, {"mine": drafter}, out=tmp_path, plan=QUICK)
    assert [(c["split"], c["temperature"]) for c in result["acceptance"]] == [(s, t) for s in SPLITS for t in (0.0, 1.0)]
    assert len(result["speed"]) == len(SPLITS) * 4
    for cell in result["acceptance"]:
        assert set(cell["rows"]) == {"lookup", "mine", "mine, tree"} and cell["entropy"] > 0
        assert all(1 <= row["tau"] <= row["depth"] + 1 for row in cell["rows"].values())
        assert all((row["alpha"] is None) if "tree" in name else (0 <= row["alpha"] <= 1) for name, row in cell["rows"].items())
        assert cell["rows"]["mine"]["depth"] == 4 and cell["rows"]["mine, tree"]["depth"] == NODES
    for cell in result["speed"]:
        assert list(cell["rows"]) == ["plain", "lookup", "mine", "auto"]
        assert cell["rows"]["plain"]["speedup"] == 1
        assert all(row["tok_per_second"] > 0 and row["low"] <= row["tok_per_second"] <= row["high"] for row in cell["rows"].values())
        assert all(row["identical"] == cell["answers"] for row in cell["rows"].values())  # sampled ones as well: all drafts are a choice
    assert "Speed-up" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text()) == result

    lines = (tmp_path / "cells.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_text("".join(lines[:-1]))
    made: list[Cell] = []
    true = speculative._Bench._speed
    monkeypatch.setattr(speculative._Bench, "_speed", lambda self, cell: made.append(cell) or true(self, cell))
    again = run_speculative_eval(model, {"mine": drafter}, out=tmp_path, plan=QUICK, show=False)
    assert [cell.id for cell in made] == ["plans-T1-x2"]
    assert again["acceptance"] == result["acceptance"]


def test_each_repeat_meets_prompts_that_its_budget_has_not_seen(model: HyperBagel, drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts warm up; what was learnt from these, and no more, is known when each repeat begins."""
    calls: list[tuple[list[list[int]], str]] = []
    own = speculative.decode

    def watched(sessions: Sequence[Session], **how: Any) -> Any:
        if (budget := how["drafter"]) is not None and "lookup" not in budget.drafters:
            calls.append((sessions[0].texts, repr([(phase.records, phase.firsts) for phase in budget.phases.values()])))
        return own(sessions, **how)

    monkeypatch.setattr(speculative, "decode", watched)
    work = speculative._Bench(model, {"block": str(drafter)}, replace(QUICK, prompts=3, repeats=2, batches=(1,)))
    with torch.inference_mode():
        work._speed(Cell("in_template", 0.0, 1))
    (asked, known), (first, learnt), (again, restored) = ([list(x) for x in zip(*calls[i : i + 3], strict=True)] for i in (0, 3, 6))
    assert len(calls) == 9 and first == again and not any(text in first for text in asked)
    assert restored[0] == learnt[0] not in known and learnt[2] != learnt[0]


def test_speed_by_turns(model: HyperBagel, drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm goes first in turn, and an answer's first token, which came with its question, is no token of decoding."""
    asked: list[Any] = []
    arms: list[speculative._Arm] = []
    own, row = speculative.decode, speculative._row
    monkeypatch.setattr(speculative, "decode", lambda sessions, **how: asked.append(how["drafter"]) or own(sessions, **how))
    monkeypatch.setattr(speculative, "_row", lambda arm, plain: arms.append(arm) or row(arm, plain))
    work = speculative._Bench(model, {"block": str(drafter)}, replace(QUICK, prompts=4, repeats=1, batches=(1,)))
    with torch.inference_mode():
        work._speed(Cell("in_template", 0.0, 1))
        answers = own(work._sessions(work.of_split("in_template"), (), True), max_tokens=QUICK.max_tokens)
    repeat = asked[16:]  # after the warm-up: four prompts, four arms
    order = [arm.drafter for arm in arms]
    assert [repeat[4 * turn : 4 * turn + 4] for turn in range(4)] == [order[turn:] + order[:turn] for turn in range(4)]
    ends = [out.finish_reason == "stop" for out in answers]
    assert all(arm.tokens == [sum(len(out.ids) - 1 for out in answers) + sum(ends)] for arm in arms)


def test_acceptance_is_that_of_whole_drafts_and_entropy_has_the_token_that_ends(
    model: HyperBagel, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds: list[float] = []
    work = speculative._Bench(model, {"block": str(drafter)}, replace(QUICK, prompts=1))
    flat, sure = torch.zeros(4), torch.tensor([0.0, -1e9, -1e9, -1e9])
    monkeypatch.setattr(speculative, "plain_decode", lambda *_, **how: [Decoded([1, 2], logits=[flat, flat, sure, flat])])

    def decoded(sessions: Any, *, drafter: Any, **how: Any) -> Any:
        thresholds.append(drafter.threshold)
        out = Speculated([1, 2])
        out.stats.rounds, out.stats.tokens = 1, 2
        return [out]

    monkeypatch.setattr(speculative, "decode", decoded)
    for name in ("lookup", str(drafter)):
        for one in {work.drafters.get(name), work.drafters.served(name)} if name != "lookup" else {work.drafters.get(name)}:
            one.threshold = 0.7
    record = work._acceptance(Cell("in_template", 1.0, 1))
    assert thresholds == [0.0] * 3 and record["entropy"] == pytest.approx(2 / 3 * math.log(4)) and record["tokens"] == 2


def test_answers_with_draws_of_their_own_are_not_compared(model: HyperBagel, drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = speculative._Bench(model, {"block": str(drafter)}, replace(QUICK, prompts=2, repeats=1, batches=(1,)))
    own = work.drafters.budgeted

    def drawing(name: str) -> Any:
        budget = own(name)
        budget.draws = True
        return budget

    monkeypatch.setattr(work.drafters, "budgeted", drawing)
    with torch.inference_mode():
        greedy, drawn = (work._speed(Cell("in_template", t, 1))["rows"] for t in (0.0, 1.0))
    assert all("identical" in row for row in greedy.values()) and [name for name, row in drawn.items() if "identical" in row] == ["plain"]


def test_with_graphs_every_way_to_decode_has_fixed_shapes(drafter: Path, tmp_path: Path) -> None:
    """As a GPU is timed: neither plain decoding alone is recorded, nor drafting alone."""
    graphed = HyperBagel(small_parts(), "small", graphs=True)
    assert graphed.runner is not None
    graphed.runner.keep = 99  # so that what the last split has no use for is seen, too
    result = run_speculative_eval(graphed, {"mine": drafter}, out=tmp_path, plan=replace(QUICK, temperatures=(0.0,)), show=False)
    assert result["machine"]["graphs"] and graphed.runner.steps
    for cell in result["speed"]:
        assert all(row["identical"] == cell["answers"] for row in cell["rows"].values())
    drafts = [draft for read in graphed.runner.reads.values() for draft in read.drafts.values()]
    assert any(isinstance(draft, StaticTree) and draft.runs for draft in drafts)


def test_cells_of_other_weights_are_refused(model: HyperBagel, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative._Bench, "cells", lambda self, cells, seeds: [{"batch": 0} for _ in cells])
    mine = tmp_path / "mine"
    shutil.copytree(drafter, mine)
    for _ in range(2):
        run_speculative_eval(model, {"mine": mine}, out=tmp_path / "out", plan=QUICK, show=False)
    other = HyperBagel(small_parts(), "small")
    torch.nn.init.zeros_(other.parts.model.llm2vae.weight)
    with pytest.raises(InputError, match="got records made with"):
        run_speculative_eval(other, {"mine": mine}, out=tmp_path / "out", plan=QUICK, show=False)
    (mine / "acceptance.json").write_text('{"in_template": [0.5]}')
    with pytest.raises(InputError, match="got records made with"):
        run_speculative_eval(model, {"mine": mine}, out=tmp_path / "out", plan=QUICK, show=False)


@pytest.mark.parametrize("name", ["plain", "lookup", "auto", "block, tree"])
def test_names_of_the_other_ways_of_decoding_are_refused(model: HyperBagel, drafter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"a drafter named '{name}'"):
        run_speculative_eval(model, {name: drafter}, out=tmp_path / "out", plan=QUICK)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(model: HyperBagel, drafter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="give a drafter's folder"):
        run_speculative_eval(model, {"mine": tmp_path / "empty"}, out=tmp_path / "out", plan=QUICK)
    with pytest.raises(InputError, match="too briefly"):
        plan = replace(QUICK, speed=False, free_tokens=10_000, prompts=1)
        run_speculative_eval(model, {}, out=tmp_path / "out", plan=plan)
