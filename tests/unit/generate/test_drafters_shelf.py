"""Drafters that come with a model: the default of `ask`, their budget, and what cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_world import small_parts

from hyperbagel import pipeline
from hyperbagel.core.errors import InputError, Notice
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import AskRequest, ImageRequest, ImageResult
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative import thinking
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.budget import Costs, DraftCost, best_depth
from hyperbagel.speculative.choose import LOOKUP_PRIOR
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
    """The promising one, with lookup beside it; `none` switches it off; a model without drafters decodes plainly."""
    plain = model.ask("what is this", max_tokens=24)
    assert plain.tau is None and model.drafters.default() == "none"
    out = with_drafters.ask("what is this", max_tokens=24)
    assert out.text == plain.text and out.tau is not None and out.tau >= 1
    assert out.drafter in ("good", "lookup", "none")
    assert set(with_drafters.drafters.budgeted("auto").drafters) == {"good", "lookup"}
    assert with_drafters.ask("what is this", max_tokens=4, drafter="none").tau is None


def test_drawn_answers_are_drafted_unasked_where_a_seed_repeats_them(model: HyperBagel, with_drafters: HyperBagel, tmp_path: Path) -> None:
    """In fp32, and with trees and lookup, whose drafts are a choice. Chains are drawn."""
    asked = [AskRequest("what is this", max_tokens=12, temperature=1.0, seed=seed) for seed in (3, 4, 5)]
    plain = [model.ask_batch([request])[0] for request in asked]
    assert len({out.text for out in plain}) == 3 and with_drafters.drafters.default(sampled=True) == "auto"
    alone, together = [with_drafters.ask_batch([request])[0] for request in asked], with_drafters.ask_batch(asked)
    for told, one, among in zip(plain, alone, together, strict=True):
        assert told.text == one.text == among.text and told.tau is None and one.tau is not None and among.tau is not None
    drafter_folder(tmp_path / "chains", model, "eagle3")
    chains = HyperBagel(model.parts, "small", drafters=tmp_path)
    assert (chains.drafters.default(), chains.drafters.default(sampled=True)) == ("auto", "none")
    assert chains.ask_batch(asked[:1])[0].tau is None and chains.ask_batch([replace(asked[0], drafter="chains")])[0].tau is not None
    coarse = HyperBagel(small_parts(torch.bfloat16), "small", drafters=with_drafters.drafters.folder)
    assert coarse.ask_batch(asked[:1])[0].tau is None and coarse.ask("what is this", max_tokens=4).tau is not None


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
    with pytest.warns(Notice, match="going on without a drafter"):
        assert told.ask("what", max_tokens=4, drafter="other").tau is None


# -- plans -------------------------------------------------------------------------------------------------------------------------


def planned(prompt: str, seed: int, **more: object) -> ImageRequest:
    return ImageRequest(prompt, seed=seed, steps=2, think=True, **({"max_think_tokens": 30} | more))  # type: ignore[arg-type]


def same(a: ImageResult, b: ImageResult) -> bool:
    return a.thinking == b.thinking and a.image.tobytes() == b.image.tobytes()


@pytest.mark.filterwarnings("ignore:the plan was cut")
def test_plans_are_drafted_unasked_and_stay_what_they_are(model: HyperBagel, with_drafters: HyperBagel) -> None:
    """Of pictures and edits, one by one and together. Behind them no layer's output is kept any more."""
    source = (Image.radial_gradient("L").resize((24, 16)).convert("RGB"),)
    asked = [planned("a car", 1), planned("a red car", 2), planned("a car", 3, max_think_tokens=12), planned("blue", 4, images=source)]
    plain = [model.generate_batch([request])[0] for request in asked]
    assert {result.tau for result in plain} == {None} and len({result.thinking for result in plain}) == 4
    alone = [with_drafters.generate_batch([request])[0] for request in asked]
    together = with_drafters.generate_batch(asked)
    for a, b, c in zip(plain, alone, together, strict=True):
        assert same(a, b) and a.thinking == c.thinking
        assert b.tau is not None and c.tau is not None and b.tau >= 1 and b.drafter in ("good", "lookup", "none")
    off = with_drafters.generate_batch([planned("a car", 1, drafter="none")])[0]
    assert same(off, plain[0]) and off.tau is None and off.settings["drafter"] == "none"
    assert "drafter" not in plain[0].settings and with_drafters.generate("a car", seed=1, steps=1)[0].tau is None


@pytest.mark.filterwarnings("ignore:the plan was cut")
def test_drawing_keeps_no_hidden_states(with_drafters: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a drafted plan, as without one."""
    taps: list[int] = []

    def watched(sessions: list[Session], *args: object, **more: object) -> object:
        taps.extend(len(session.cache.taps) + len(session.cache.tapped) + len(session.cache.positions) for session in sessions)
        return denoise(sessions, *args, **more)  # type: ignore[arg-type]

    denoise = pipeline.denoise
    monkeypatch.setattr(pipeline, "denoise", watched)
    tau = [result.tau for result in with_drafters.generate_batch([planned("a car", 1), planned("a dog", 2, drafter="good")])]
    assert taps == [0, 0] and None not in tau


@pytest.mark.filterwarnings("ignore:the plan was cut")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_in_bf16_are_written_as_alone(with_drafters: HyperBagel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a batch and a draft round otherwise, so that a near tie might change what a seed draws: neither happens unasked."""
    model, sizes, decode = HyperBagel(small_parts(dtype), "small", drafters=with_drafters.drafters.folder), [], thinking.decode
    monkeypatch.setattr(thinking, "decode", lambda sessions, **how: sizes.append(len(sessions)) or decode(sessions, **how))
    results = model.generate_batch([planned("a car", 1), planned("a dog", 2)])
    exact = dtype == torch.float32
    assert sizes == ([2] if exact else [1, 1]) and all((result.tau is not None) == exact for result in results)
    if not exact:
        assert [result.thinking for result in results] == [model.generate_batch([planned(p, 0)])[0].thinking for p in ("a car", "a dog")]
        assert model.generate_batch([planned("a car", 1, drafter="good")])[0].tau is not None


def test_an_unknown_drafter_of_a_plan_is_refused_and_a_damaged_one_told(model: HyperBagel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got drafter 'nobody', expected one of lookup, auto, none"):
        model.generate_batch([planned("a car", 1), ImageRequest("a car", drafter="nobody")], on_step=lambda *_: pytest.fail("drawn"))
    with pytest.warns(Notice, match="going on without a drafter"):
        assert model.generate_batch([planned("a car", 1, drafter=str(tmp_path))])[0].tau is None


# -- what a budget is made of ------------------------------------------------------------------------------------------------------


def test_nothing_drafts_unasked_where_graphs_were_asked_for(with_drafters: HyperBagel) -> None:
    """One that is named drafts with them."""
    fixed = HyperBagel(with_drafters.parts, "small", drafters=with_drafters.drafters.folder, graphs=True)
    assert (fixed.drafters.default(), with_drafters.drafters.default()) == ("none", "auto")
    assert fixed.runner is not None and fixed.drafters.budgeted("lookup").graphs is fixed.runner


def test_look_up_is_believed_to_be_right_the_further_the_more(with_drafters: HyperBagel) -> None:
    assert tuple(with_drafters.drafters.budgeted("lookup").expected_rates("lookup")[:4]) == (*LOOKUP_PRIOR, LOOKUP_PRIOR[-1])


def test_the_fastest_of_several_drafts_and_not_the_deepest(model: HyperBagel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(((1, 1.0), (16, 1.1)), {"deep": DraftCost(0.9), "fast": DraftCost(0.0, more=9.0), "lookup": DraftCost(0.1)})
    for name in ("deep", "fast"):
        drafter_folder(tmp_path / name, model, "eagle3")
        write_acceptance(tmp_path / name, {"in_template": [0.6]})
    assert best_depth(costs, "deep", [0.6] * 4)[0] > best_depth(costs, "fast", [0.6] * 4)[0] == 1
    monkeypatch.setattr(Adaptive, "prepare", lambda *given, **more: costs)
    assert set(HyperBagel(model.parts, "small", drafters=tmp_path).drafters.budgeted("auto").drafters) == {"fast", "lookup"}
