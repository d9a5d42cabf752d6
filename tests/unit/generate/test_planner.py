"""A model with a planner: plans are its own, all else is the model's."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import small_parts

from hyperbagel import cli
from hyperbagel.core.errors import InputError, Notice
from hyperbagel.data.prompts import THINK_DRAW
from hyperbagel.evaluate.pictures import NAMED, depends_on
from hyperbagel.evaluate.records import digest
from hyperbagel.evaluate.toybox import Settings, planner_of, resolve
from hyperbagel.generate import planner
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import AskRequest, ImageRequest
from hyperbagel.model.planner import make_planner, save_planner
from hyperbagel.model.student import fingerprint
from hyperbagel.pipeline import HyperBagel, model_folder
from hyperbagel.speculative.thinking import write_plans

pytestmark = pytest.mark.filterwarnings("ignore:the plan was cut")


@pytest.fixture(scope="module")
def plain() -> HyperBagel:
    return HyperBagel(small_parts(), "plain")


@pytest.fixture(scope="module")
def folder(plain: HyperBagel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = make_planner(plain.parts.model, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in changes.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    out = tmp_path_factory.mktemp("with") / "planner"
    save_planner(out, changes, fingerprint(plain.parts.model), torch.float32)
    return out


def with_planner(folder: Path, **more: bool) -> HyperBagel:
    return HyperBagel(small_parts(), "planned", planner=folder, **more)


def asked(seed: int = 1, **more: object) -> ImageRequest:
    return ImageRequest("a red car", seed=seed, steps=2, **({"think": True, "max_think_tokens": 12} | more))  # type: ignore[arg-type]


def test_plans_are_the_planner_s_and_all_else_is_the_model_s(plain: HyperBagel, folder: Path) -> None:
    model = with_planner(folder)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    for images in ((), (source,)):
        mine, theirs = (m.generate_batch([asked(images=images)])[0] for m in (model, plain))
        assert mine.thinking != theirs.thinking
        quiet = asked(images=images, think=False)
        assert model.generate_batch([quiet])[0].image.tobytes() == plain.generate_batch([quiet])[0].image.tobytes()
    question = AskRequest("what is this", (source,), max_tokens=12, think=True)
    assert model.ask_batch([question])[0].text == plain.ask_batch([question])[0].text


@pytest.mark.parametrize("drafter", ["none", "lookup"])
@torch.inference_mode()
def test_the_model_itself_reads_what_the_planner_wrote(folder: Path, drafter: str) -> None:
    """Its cache afterwards is that of a conversation in which the plan was given."""
    model = with_planner(folder)
    writer, runner = model.planner.get()
    assert writer is not model.parts.model and runner is None
    by = None if drafter == "none" else model.drafters.budgeted(drafter)
    sessions = [Session.new(model.parts, () if by is None else by.taps) for _ in range(2)]
    for session, prompt in zip(sessions, ("a red car", "two dogs and a cat"), strict=True):
        session.add_text(THINK_DRAW)
        session.add_text(prompt, later=True)
    plans = write_plans(sessions, [9, 9], writer=writer, drafter=by)
    for session, prompt, plan in zip(sessions, ("a red car", "two dogs and a cat"), plans, strict=True):
        given = Session.new(model.parts)
        for text in (THINK_DRAW, prompt, plan.text):
            given.add_text(text)
        assert (session.cache.lengths, session.position) == (given.cache.lengths, given.position)
        length = given.cache.lengths[0]
        for mine, theirs in zip((*session.cache.k, *session.cache.v), (*given.cache.k, *given.cache.v), strict=True):
            torch.testing.assert_close(mine[:, :, :length], theirs[:, :, :length], atol=1e-5, rtol=1e-4)


def test_drafts_batches_and_fixed_shapes_change_no_plan(folder: Path) -> None:
    model, fixed = with_planner(folder), with_planner(folder, graphs=True)
    alone = [model.generate_batch([asked(seed)])[0] for seed in (1, 2)]
    drafted = [model.generate_batch([asked(seed, drafter="lookup")])[0] for seed in (1, 2)]
    together, graphs = model.generate_batch([asked(1), asked(2)]), fixed.generate_batch([asked(1), asked(2)])
    own = fixed.planner.get()[1]
    assert own is not None and own is not fixed.runner and fixed.runner is not None and own.steps and not fixed.runner.steps
    fixed.forget_graphs()
    assert not own.steps
    for a, *others in zip(alone, drafted, together, graphs, strict=True):
        assert {other.thinking for other in others} == {a.thinking}
    assert all(result.tau is not None for result in drafted)


def test_a_plan_is_drawn_by_its_seed_and_the_noise_stays(plain: HyperBagel, folder: Path) -> None:
    """Drafted, in a batch, in fixed shapes: always the same plan. Another seed, another plan; the picture's noise is that of its seed."""
    model, fixed = with_planner(folder), with_planner(folder, graphs=True)
    warm = [asked(seed, think_temperature=1.0) for seed in (1, 2)]
    alone = [model.generate_batch([request])[0] for request in warm]
    assert len({result.thinking for result in alone}) == 2 and alone[0].thinking != model.generate_batch([asked(1)])[0].thinking
    drafted = [model.generate_batch([replace(request, drafter="lookup")])[0] for request in warm]
    mixed = model.generate_batch([warm[0], asked(1), warm[1]])
    for told, *others in zip(alone, drafted, [mixed[0], mixed[2]], fixed.generate_batch(warm), strict=True):
        assert {other.thinking for other in others} == {told.thinking}
    assert mixed[1].thinking == model.generate_batch([asked(1)])[0].thinking
    assert alone[0].settings["think_temperature"] == 1.0 and "think_temperature" not in mixed[1].settings
    cold = model.generate_batch([asked(1, think_temperature=1e-30)])[0]
    assert cold.thinking == mixed[1].thinking and cold.image.tobytes() == mixed[1].image.tobytes()


@pytest.mark.parametrize("value", [-0.1, 101, float("nan"), "warm"])
def test_a_temperature_of_plans_that_is_none(value: object) -> None:
    with pytest.raises(InputError, match="think_temperature"):
        asked(think_temperature=value)


def test_a_planner_that_cannot_be_used_is_told_and_the_model_plans(plain: HyperBagel, folder: Path, tmp_path: Path) -> None:
    theirs = plain.generate_batch([asked()])[0]
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"x")
    other = small_parts()
    torch.nn.init.zeros_(other.model.llm2vae.weight)
    for model in (with_planner(tmp_path / "torn"), HyperBagel(other, "other", planner=folder)):
        with pytest.warns(Notice, match="planning without it"):
            mine = model.generate_batch([asked()])[0]
        assert mine.thinking == theirs.thinking
    assert with_planner(tmp_path / "none").generate_batch([asked()])[0].thinking == theirs.thinking


def test_records_in_think_mode_depend_on_the_planner(plain: HyperBagel, folder: Path, tmp_path: Path) -> None:
    """And no others do."""
    model = with_planner(folder)
    assert planner_of(plain) == planner_of(with_planner(tmp_path / "none")) == {} and planner_of(model) == {"planner": digest(folder)}
    for think in (False, True):
        mine, theirs = (depends_on(m, asked(think=think), []) for m in (model, plain))
        assert mine.pop(NAMED) != theirs.pop(NAMED)
        assert (mine == theirs) is not think


def test_records_in_think_mode_depend_on_the_temperature(plain: HyperBagel) -> None:
    """0 is that of requests which name none."""
    for one, other, same in ((None, 0.0, True), (None, 0.5, False), (0.5, 1.0, False)):
        headers = [depends_on(plain, asked(think_temperature=t), []) for t in (one, other)]
        assert (headers[0] == headers[1]) is same
        for part in ("image", "edit"):
            told = [resolve(Settings(think=True, **{part: {"think_temperature": t} if t is not None else {}})) for t in (one, other)]  # type: ignore[arg-type]
            assert (told[0][part] == told[1][part]) is same


def test_without_memory_for_it_the_planner_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attach = with_planner(folder), planner.attach
    monkeypatch.setattr(planner, "attach", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        model.generate_batch([asked()])
    monkeypatch.setattr(planner, "attach", attach)
    assert model.planner.get()[0] is not model.parts.model


def test_costs_are_measured_for_the_batches_that_plans_are_written_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other limits, other batches. A plan without a limit leaves room for its drafts, so that nobody is warned who asked for nothing."""
    model = with_planner(folder)
    requests = [asked(seed, drafter="lookup", max_think_tokens=limit) for seed, limit in enumerate((9, 10, 9, 11))]
    first, second = (model.generate_batch(requests)[0].timings for _ in range(2))
    assert "measure" in first and "measure" not in second
    assert set(model.drafters.budgeted("lookup").measured) == {(1, False), (2, False)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="got drafts of")
        assert model.generate_batch([asked(max_think_tokens=None, drafter="lookup")])[0].tau is not None


def test_settings_of_a_drafter_s_folder_can_be_stored(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(Notice, match="going on without a drafter"):
        [result] = with_planner(folder).generate_batch([asked(drafter=tmp_path)])
    assert json.loads(json.dumps(result.settings))["drafter"] == str(tmp_path)


def test_a_planner_is_chosen_when_the_model_is_loaded(plain: HyperBagel, folder: Path, tmp_path: Path) -> None:
    """Another folder's, or none; and a picture's settings say so, if it has a plan. One that was asked for must be usable."""
    home = model_folder("toybox")
    shutil.copytree(home / "planner", tmp_path / "copy")
    default, none, copy = (HyperBagel.from_pretrained(planner=who) for who in (None, "none", tmp_path / "copy"))
    request = ImageRequest("four small red circles", seed=1, student="1", think=True)
    plans = [model.generate_batch([request])[0] for model in (default, none, copy)]
    own = HyperBagel(default.parts, "own", students=home / "students").generate_batch([request])[0]  # a model without a planner
    assert plans[2].thinking == plans[0].thinking != plans[1].thinking == own.thinking
    assert [plan.settings.get("planner") for plan in plans] == [None, "none", str(tmp_path / "copy")]
    assert "planner" not in none.generate_batch([replace(request, think=False)])[0].settings
    assert planner_of(none) == {} and planner_of(copy) == planner_of(default)
    for wrong, told in ((tmp_path / "no", "planner.json"), (folder, "planner of another model"), ("", "empty name of a planner")):
        with pytest.raises(InputError, match=told):
            HyperBagel.from_pretrained(planner=wrong)


@pytest.mark.parametrize(
    "command",
    [
        *("chat", "serve --port 0", "eval speculative -o run", "eval toybox -o run --think", "eval distillation -o run --think"),
        *("eval geneval -o run --prompts prompts.jsonl --think", "eval gedit -o run --prompts prompts.jsonl --think"),
    ],
)
def test_a_planner_reaches_the_model(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(**options: Any) -> None:
        raise InputError(f"asked for {options['planner']}")

    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "a", "tag": "colors"}\n')
    monkeypatch.setattr(HyperBagel, "from_pretrained", load)
    assert cli.main([*command.split(), "--planner", "somewhere"]) == 2
    assert "asked for somewhere" in capsys.readouterr().err
