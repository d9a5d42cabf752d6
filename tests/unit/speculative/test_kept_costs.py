"""Costs on disk: a second process of the same kind measures nothing, any other one does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Session
from hyperbagel.model.init import fresh_bagel
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative import adaptive, choose, kept_costs
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.kept_costs import BELIEVED, KeptCosts, cache_folder

COSTS = Costs(((1, 0.01), (16, 0.02)), {"block": DraftCost(0.003, 0.0001, 0.002), "lookup": DraftCost(0.0001)})


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel.from_pretrained("toybox")


@pytest.fixture
def drafters(model: HyperBagel) -> dict[str, Any]:
    return {"block": model.drafters.served("block"), "lookup": Lookup()}


def only_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_what_was_kept_comes_back(model: HyperBagel, drafters: dict[str, Any], tmp_path: Path) -> None:
    kept = KeptCosts(tmp_path / "new" / "folder", model.parts.model)
    assert kept.load(drafters, 1, False) is None
    kept.save(drafters, 1, False, COSTS)
    again = KeptCosts(tmp_path / "new" / "folder", model.parts.model).load(drafters, 1, False)
    assert again == COSTS and again.round_seconds("block", 3, 4, fresh=True) == COSTS.round_seconds("block", 3, 4, fresh=True)


def test_other_work_has_other_costs(model: HyperBagel, drafters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptCosts(tmp_path, model.parts.model)
    kept.save(drafters, 1, False, COSTS)
    chains = drafters | {"block": model.drafters.get("block")}  # the same weights, drafting chains
    for found in (
        kept.load(drafters, 2, False),
        kept.load(drafters, 1, True),
        kept.load({"block": drafters["block"]}, 1, False),
        kept.load(chains, 1, False),
        KeptCosts(tmp_path, model.parts.model, graphs=True).load(drafters, 1, False),
        KeptCosts(tmp_path, fresh_bagel(model.parts.model.config, torch.Generator()).to(torch.bfloat16)).load(drafters, 1, False),
    ):
        assert found is None
    monkeypatch.setattr(drafters["block"], "depth", drafters["block"].depth - 1)
    assert kept.load(drafters, 1, False) is None
    monkeypatch.undo()
    module = drafters["block"].module
    monkeypatch.setattr(module, "config", module.config.model_copy(update={"rank": 7}))
    assert kept.load(drafters, 1, False) is None
    monkeypatch.undo()
    assert kept.load(drafters, 1, False) == COSTS


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("torch.get_num_threads", lambda: 7),
        ("torch.__version__", "9.9"),
        ("torch.backends.cpu.get_cpu_capability", lambda: "slow"),
        ("hyperbagel.__version__", "9.9"),
        ("hyperbagel.__file__", None),  # set below
        ("platform.node", lambda: "elsewhere"),
        ("platform.machine", lambda: "other"),
        ("os.cpu_count", lambda: 99),
    ],
)
def test_elsewhere_it_is_measured_again(
    what: str, value: object, model: HyperBagel, drafters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeptCosts(tmp_path, model.parts.model).save(drafters, 1, False, COSTS)
    if what == "hyperbagel.__file__":
        newest = tmp_path / "package" / "new.py"
        newest.parent.mkdir()
        newest.write_text("")
        value = str(newest)
    monkeypatch.setattr(what, value)
    assert KeptCosts(tmp_path, model.parts.model).load(drafters, 1, False) is None


def test_another_model_or_setting_is_another_measurement(
    model: HyperBagel, drafters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = model.parts.model
    KeptCosts(tmp_path, target).save(drafters, 1, False, COSTS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert KeptCosts(tmp_path, target).load(drafters, 1, False) is None
    monkeypatch.undo()
    monkeypatch.setattr(target.language_model.model, "attention", "reference")
    assert KeptCosts(tmp_path, target).load(drafters, 1, False) is None
    monkeypatch.undo()
    wider = target.config.llm.model_copy(update={"intermediate_size": 9})
    monkeypatch.setattr(target, "config", target.config.model_copy(update={"llm": wider}))
    assert KeptCosts(tmp_path, target).load(drafters, 1, False) is None
    monkeypatch.undo()
    assert KeptCosts(tmp_path, target).load(drafters, 1, False) == COSTS


def test_old_files_are_removed(model: HyperBagel, drafters: dict[str, Any], tmp_path: Path) -> None:
    kept = KeptCosts(tmp_path, model.parts.model)
    kept.save(drafters, 1, False, COSTS)
    old = only_file(tmp_path)
    os.utime(old, (0, 0))
    (tmp_path / "other.json").write_text("{}")
    os.utime(tmp_path / "other.json", (0, 0))
    kept.save(drafters, 2, False, COSTS)
    assert not old.exists() and (tmp_path / "other.json").exists() and len(list(tmp_path.iterdir())) == 2


def test_it_is_believed_for_a_day(model: HyperBagel, drafters: dict[str, Any], tmp_path: Path) -> None:
    kept = KeptCosts(tmp_path, model.parts.model)
    kept.save(drafters, 1, False, COSTS)
    path = only_file(tmp_path)
    now = path.stat().st_mtime
    for age, known in ((BELIEVED - 60, True), (BELIEVED + 1, False), (-3600, False)):  # from the future: the clock was wrong
        os.utime(path, (now - age, now - age))
        assert (kept.load(drafters, 1, False) is not None) is known


@pytest.mark.parametrize(
    "change",
    [
        {"verify": []},
        {"verify": [[4, 0.1], [8, 0.2]]},
        {"verify": [[1, 0.1], [8, 0.2], [4, 0.2]]},
        {"verify": [[1, 0.0], [8, 0.2]]},
        {"verify": [[1, "fast"]]},
        {"verify": [[1, 0.2], [8, 0.1]]},
        {"verify": [[1, 0.1], [float("inf"), 0.2]]},
        {"verify": [[1, 0.1], [8, float("inf")]]},
        {"verify": [[1, 10**400]]},
        {"draft": {"block": [float("nan"), 0.1, 0.1], "lookup": [0.1, 0.1, 0.1]}},
        {"draft": {"block": [-0.1, 0.1, 0.1], "lookup": [0.1, 0.1, 0.1]}},
        {"draft": {"block": [0.1, 0.1, 10**400], "lookup": [0.1, 0.1, 0.1]}},
        {"verify": 3},
        {"draft": {"block": [0.1, 0.1, 0.1]}},
        {"draft": {"block": [0.1], "lookup": [0.1, 0.1, 0.1, 0.1]}},
        {"draft": []},
        {"about": {}},
    ],
)
def test_a_damaged_file_is_no_costs(change: dict[str, Any], model: HyperBagel, drafters: dict[str, Any], tmp_path: Path) -> None:
    kept = KeptCosts(tmp_path, model.parts.model)
    kept.save(drafters, 1, False, COSTS)
    path = only_file(tmp_path)
    whole = path.read_text()
    for text in (json.dumps(json.loads(whole) | change), whole[: len(whole) // 2], "", "[]", "[" * 100_000):
        path.write_text(text)
        assert kept.load(drafters, 1, False) is None
    kept.save(drafters, 1, False, COSTS)
    assert kept.load(drafters, 1, False) == COSTS


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(model: HyperBagel, drafters: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = KeptCosts(tmp_path / "file" / "folder", model.parts.model)
    kept.save(drafters, 1, False, COSTS)
    assert kept.load(drafters, 1, False) is None


def test_the_second_process_does_not_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if asked to keep them: a server or an evaluation measures for itself."""
    calls: list[Sequence[str]] = []

    def measured(context: Session, drafters: dict[str, Any], *how: Any, **more: Any) -> Costs:
        calls.append(list(drafters))
        return COSTS

    monkeypatch.setattr(adaptive, "measure_costs", measured)
    monkeypatch.setattr(choose, "cache_folder", lambda: tmp_path)
    for keep, times in ((False, 1), (True, 2), (True, 2), (False, 3)):
        model = HyperBagel.from_pretrained("toybox")
        if keep:
            model.drafters.keep_costs()
        for _ in range(2):
            assert model.ask("what do you see?").drafter is not None
        assert len(calls) == times and set(calls[-1]) == {"block", "lookup"}


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for own in (str(tmp_path / "own"), "~/own"):
        monkeypatch.setenv("HYPERBAGEL_CACHE", own)
        assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("HYPERBAGEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hyperbagel"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "hyperbagel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "hyperbagel"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept_costs.Path, "home", homeless)
    assert cache_folder() is None
    model = HyperBagel.from_pretrained("toybox")
    model.drafters.keep_costs()
    assert model.drafters.kept is None


def test_costs_with_graphs_are_not_those_without(
    model: HyperBagel, drafters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "cache_folder", lambda: tmp_path)
    eager, fixed = (choose.Drafters(model.parts, graphs=graphs) for graphs in (None, GraphRunner(model.parts.model)))
    for shelf in (eager, fixed):
        shelf.keep_costs()
    assert eager.kept is not None and fixed.kept is not None
    eager.kept.save(drafters, 1, False, COSTS)
    assert eager.kept.load(drafters, 1, False) == COSTS and fixed.kept.load(drafters, 1, False) is None
