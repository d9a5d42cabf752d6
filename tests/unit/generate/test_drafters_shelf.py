"""Drafters that come with a model: the default of `ask`, their budget, and what cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_world import small_parts

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.generate.types import AskRequest
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.folder import make_module, save_drafter, write_acceptance


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "test")


def drafter_folder(folder: Path, model: HyperBagel, kind: Kind, **own: object) -> Path:
    module = make_module(DrafterConfig.for_target(kind, model.parts.model.config.llm, **own))
    module.init_from(model.parts.model, torch.Generator().manual_seed(0))
    save_drafter(folder, module, torch.float32)
    return folder


@pytest.fixture(scope="module")
def with_drafters(model: HyperBagel, tmp_path_factory: pytest.TempPathFactory) -> HyperBagel:
    """The model as if two drafters had come with it, one promising and one not."""
    folder = tmp_path_factory.mktemp("drafters")
    for name, kind, rates in (("good", "block", [0.95, 0.95, 0.95]), ("bad", "eagle3", [0.05])):
        drafter_folder(folder / name, model, kind)  # type: ignore[arg-type]
        write_acceptance(folder / name, {"in_template": rates})
    return HyperBagel(model.parts, "small", drafters=folder)


def test_the_models_own_drafters_draft_unasked(model: HyperBagel, with_drafters: HyperBagel) -> None:
    """The promising one, with lookup beside it, at temperature 0; `none` switches it off; a model without drafters decodes plainly."""
    plain = model.ask("what is this", max_tokens=24)
    assert plain.tau is None and model.drafters.default() == "none"
    out = with_drafters.ask("what is this", max_tokens=24)
    assert out.text == plain.text and out.tau is not None and out.tau >= 1
    assert out.drafter in ("good", "lookup", "none")
    assert set(with_drafters.drafters.budgeted("auto").drafters) == {"good", "lookup"}
    assert with_drafters.ask("what is this", max_tokens=4, drafter="none").tau is None
    drawn = [m.ask("what is this", max_tokens=12, temperature=1.0, seed=3) for m in (model, with_drafters)]
    assert drawn[0].text == drawn[1].text and drawn[1].tau is None  # a seed goes on meaning the same answer
    assert with_drafters.ask("what is this", max_tokens=12, temperature=1.0, seed=3, drafter="auto").tau is not None


def test_costs_are_measured_once_a_batch_size(with_drafters: HyperBagel) -> None:
    budget = with_drafters.drafters.budgeted("lookup")
    asked = [AskRequest(q, max_tokens=5, drafter="lookup") for q in ("what", "how many", "why")]
    first, second = (with_drafters.ask_batch(asked)[0].timings for _ in range(2))
    assert "measure" in first and "measure" not in second
    assert list(budget.measured) == [(4, False)]


def test_an_unknown_drafter_is_refused_before_any_work(model: HyperBagel) -> None:
    said: list[int] = []
    asked = [AskRequest("what", max_tokens=4), AskRequest("what", max_tokens=5, drafter="nobody")]
    with pytest.raises(InputError, match="expected one of lookup, auto, none"):
        model.ask_batch(asked, on_token=lambda row, token: said.append(token))
    assert said == []


def test_shipped_drafters_that_cannot_be_used(model: HyperBagel, tmp_path: Path) -> None:
    """Of another model, or damaged: a warning each, and the answers come, with what is left to draft."""
    path = drafter_folder(tmp_path / "other", model, "eagle3") / "drafter.json"
    path.write_text(path.read_text().replace('"hidden_size": 48', '"hidden_size": 96'))
    weights = drafter_folder(tmp_path / "torn", model, "eagle3") / "drafter.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    told = HyperBagel(model.parts, "small", drafters=tmp_path)
    with pytest.warns(Notice, match="going on without it") as warned:
        out = told.ask("what is this", max_tokens=8)
    assert out.text == model.ask("what is this", max_tokens=8).text
    messages = [str(w.message) for w in warned]
    assert any("hidden size 96 (the model has 48)" in m for m in messages) and any("torn" in m for m in messages)
    assert list(told.drafters.budgeted("auto").drafters) == ["lookup"]
    with pytest.warns(Notice, match="answering without a drafter"):
        assert told.ask("what", max_tokens=4, drafter="other").tau is None
