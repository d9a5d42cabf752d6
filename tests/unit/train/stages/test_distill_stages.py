"""The five stages: who gets a gradient, one batch learnt, resume, exports, recipes that are refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_base import DATA, HELD_OUT, QUICK, make, only, run, settings, stage_of, write_base

from hyperbagel import cli
from hyperbagel.core.config import load_config
from hyperbagel.core.errors import InputError
from hyperbagel.model.student import load_student
from hyperbagel.model.weights import load_folder, load_tensors
from hyperbagel.pipeline import HyperBagel
from hyperbagel.train.compare import Pictures, compare, compare_sets, conditional_energy
from hyperbagel.train.contexts import Scales, velocity
from hyperbagel.train.gate import judge
from hyperbagel.train.losses.dmd import COUPLINGS
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import adp, cfg, dmdo, refl, reward, tscd

RECIPES = Path(__file__).parents[4] / "recipes"


@pytest.mark.parametrize("source", ["t2i", "edit"])
@pytest.mark.parametrize("name", ["cfg", "tscd", "dmdo", "adp", "refl"])
def test_each_turn_moves_its_own_player_alone(name: str, source: str, base: Path, student: Path, head: Path) -> None:
    stage: Any = stage_of(name, base, student, head, data=only(source))
    for step in range(2):
        turn = stage.turn(step)
        for other, player in stage.players.items():
            for p in player.parameters.values():
                p.requires_grad_(other == turn)
                p.grad = None
        loss, metrics = stage.loss(turn, stage.batch(step, Draws.at(0, step)), step)
        loss.backward()
        assert torch.isfinite(loss) and all(key.startswith(source) for key in metrics)
        for other, player in stage.players.items():
            moved = [p for p in player.parameters.values() if p.grad is not None and p.grad.abs().sum() > 0]
            assert bool(moved) == (other == turn), other
            with torch.no_grad():  # the fake model must leave the real one before there is anything to follow
                for p in moved:
                    p.sub_(0.01 * p.grad.sign())  # type: ignore[union-attr]
        assert all(p.grad is None for p in stage.base.parameters()) and all(p.grad is None for p in stage.vae.parameters())
    assert {stage.turn(step) for step in range(4)} == set(stage.players)


@pytest.mark.parametrize("name", ["cfg", "tscd", "dmdo", "refl"])
def test_bf16_runs_with_fp32_adapters(name: str, base: Path, student: Path, head: Path) -> None:
    stage: Any = stage_of(name, base, student, head, precision="bf16")
    assert stage.base.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in stage.student.parameters())
    for step in range(2):
        batch = stage.batch(step, Draws.at(0, step))
        with stage.amp():
            loss, _ = stage.loss(stage.turn(step), batch, step)
        loss.backward()
        assert torch.isfinite(loss)
    assert any(p.grad is not None for p in stage.student.parameters())


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_dmd_is_silent_while_fake_equals_real(coupling: str, base: Path, student: Path, head: Path) -> None:
    stage: Any = stage_of("dmdo", base, student, head, coupling=coupling)
    stage.batch(0, Draws.at(0, 0))
    loss, metrics = stage.loss("student", stage.batch(1, Draws.at(0, 1)), 1)  # the fake model has not moved yet
    loss.backward()
    assert loss.item() == 0 and all(value == 0 for key, value in metrics.items() if key.endswith("gap"))
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in stage.players["student"].parameters.values())


@pytest.mark.parametrize("source", ["t2i", "edit"])
def test_the_guided_base_as_the_real_model(source: str, base: Path, student: Path, head: Path) -> None:
    """Against the base's guided prediction, written out for one row at a time; at share 0 that is the base alone."""
    keys: dict[str, Any] = {"data": only(source), "real": "guided", "normaliser_floor": 1e6}  # so that the gradient is not normalised
    full: Any = stage_of("dmdo", base, student, head, **keys)
    batch = full.batch(0, Draws.at(0, 0))
    t, x, tau = batch.trajectory, batch.trajectory.states[1], torch.tensor([0.5, 0.7, 0.9])  # inside the interval of guidance
    alone = velocity(full.base, t.conditions.full, t.conditions, x, tau)
    for share in (1.0, 0.3, 0.0):
        stage: Any = stage_of("dmdo", base, student, head, guidance_share={source: share}, **keys)
        found = stage.real(t, x, tau)
        scales = Scales(1 + share * (t.scales.text - 1), 1 + share * (t.scales.image - 1))
        run = stage.guided_teacher(t.conditions, scales)
        for row in range(len(x)):
            torch.testing.assert_close(found[row], run(x, float(tau[row]))[row])
        assert torch.allclose(found, alone, atol=1e-5) == (share == 0)
    loss, metrics = full.loss("student", batch, 1)
    loss.backward()
    assert metrics[f"{source}_gap"] > 0 and any(p.grad is not None and p.grad.abs().sum() > 0 for p in full.student.parameters())


@pytest.mark.parametrize("steps", [1, 3])
def test_held_sources_follow_their_holder(steps: int, base: Path, student: Path, head: Path) -> None:
    """From each state of the student's own way to where the holder comes; silent while the two are one and take the same steps."""
    stage: Any = stage_of("dmdo", base, student, head, data=only("edit"), held=["edit"], hold_steps=steps)
    for segment in range(3):
        batch = stage.batch(2 * segment, Draws.at(0, 2 * segment))
        batch.segment, t = segment, batch.trajectory
        y = t.states[segment]
        u = torch.linspace(1 - segment / 3, 1 - (segment + 1) / 3, steps + 1)
        for now, then in pairwise((3 * u / (1 + 2 * u)).tolist()):  # shift 3
            y = y - (now - then) * stage.as_velocity(stage.holder, t.conditions, t.scales)(y, now)
        torch.testing.assert_close(stage.lead(stage.holder, t, segment), y, rtol=1e-4, atol=1e-5)
        loss, metrics = stage.loss("student", batch, 1)
        loss.backward()
        expected = ((t.states[segment + 1] - y).square().mean((1, 2)) + 0.03**2).sqrt().mean() - 0.03
        torch.testing.assert_close(metrics["edit_hold"], expected, rtol=1e-2, atol=1e-6)
        assert (loss.item() < 1e-9) == (steps == 1)
    assert (max(p.grad.abs().max() for p in stage.student.parameters() if p.grad is not None) > 1e-5) == (steps == 3)
    assert all(p.grad is None for p in stage.holder.model.parameters())
    stage.loss("fake", stage.batch(0, Draws.at(0, 0)), 0)[0].backward()  # the fake model follows held sources too


def test_the_student_turn_reuses_the_fake_turns_trajectories(base: Path, student: Path, head: Path) -> None:
    stage: Any = stage_of("dmdo", base, student, head)
    kept = stage.batch(0, Draws.at(0, 0)).trajectory
    position = stage.loader.state_dict()
    assert stage.batch(1, Draws.at(0, 1)).trajectory is kept and stage.loader.state_dict() == position
    more: Any = stage_of("dmdo", base, student, head, fake_first=3, fake_steps=2)
    assert [more.turn(step)[0] for step in range(9)] == list("fffffsffs")
    assert len(kept.states) == 4 and kept.times.tolist()[0] == 1 and kept.times.tolist()[-1] == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_batch_of_guidance_is_learnt(kind: str, base: Path) -> None:
    stage: Any = make(cfg, base, kind=kind, data=only("edit"), **{"rank": 8} if kind == "lora" else {})
    batch = stage.batch(0, Draws.at(0))
    optimizer = torch.optim.AdamW(stage.student.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        loss, _ = stage.loss("student", batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_reflow_learns_the_teachers_pairs(base: Path, student: Path) -> None:
    stage: Any = make(cfg, base, target="reflow", teacher=student, reflow_steps=2)
    batch = stage.batch(0, Draws.at(0))
    t = batch.t[:, None, None]
    x0 = batch.x_t - t * batch.target
    rolled = stage.roll_out(stage.teacher, batch.conditions, batch.scales, x0 + batch.target, torch.tensor([1.0, 0.75, 0.0]))[-1]
    torch.testing.assert_close(rolled, x0, rtol=1e-3, atol=1e-4)  # shift 3: the middle of two steps is 0.75


def test_an_export_loads_and_says_what_it_is(base: Path, student: Path) -> None:
    model, _ = load_folder(base)
    loaded = load_student(student, model)
    assert loaded.sampler.nfe == 6 and loaded.sampler.shift == 3.0 and loaded.sampler.stage == "cfg"
    logged = [json.loads(line) for line in (student.parent / "metrics.jsonl").read_text().splitlines()]
    figures = {key for line in logged for key in line}
    assert {"held_out/match", "held_out/spread", "held_out/diversity", "held_out/size", "held_out/edit_score"} <= figures
    assert list((student.parent / "samples").iterdir())


def test_resume_in_the_middle_of_a_cycle_is_bit_for_bit(base: Path, student: Path, tmp_path: Path) -> None:
    keys = {"init": student, "teacher": student, "nfe": 2, "fake_steps": 2, "accumulate": 2, "log_every": 1}
    constant = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0, "ema_decay": 0.9}
    keys |= {"optim": constant}
    run(dmdo, base, tmp_path / "a", max_steps=6, **keys)
    run(dmdo, base, tmp_path / "b", max_steps=2, **keys)  # two fake turns; the student's turn is next
    run(dmdo, base, tmp_path / "b", max_steps=6, resume=True, **keys)
    a, b = (load_tensors(tmp_path / which / "export" / "moe_gen.safetensors") for which in "ab")
    before = load_tensors(student / "moe_gen.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a) and any(not torch.equal(a[name], before[name]) for name in a)


@pytest.mark.parametrize("name", ["tscd", "adp", "refl"])
def test_a_few_steps_and_an_export(name: str, base: Path, student: Path, head: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"init": student, "max_steps": 2, **QUICK, "held_out": HELD_OUT, "held_out_groups": 1}
    if name == "refl":
        keys |= {"teacher": student, "reward": head}
    run({"tscd": tscd, "adp": adp, "refl": refl}[name], base, tmp_path / "run", **keys)
    model, _ = load_folder(base)
    sampler = load_student(tmp_path / "run" / "export", model).sampler
    assert sampler.nfe == (6 if name == "tscd" else 1) and sampler.stage == name
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert ("held_out/teacher_reward" in logged) == (name == "refl")


def test_a_low_rank_student_goes_on_as_whole_layers(base: Path, tmp_path: Path) -> None:
    run(cfg, base, tmp_path / "low", kind="lora", rank=2, max_steps=2, **QUICK)
    low: Any = make(cfg, base, init=tmp_path / "low" / "export")
    whole: Any = make(cfg, base, init=tmp_path / "low" / "export", whole=True)
    batch = low.batch(0, Draws.at(0))
    assert low.student.adapter.low_rank and not whole.student.adapter.low_rank
    torch.testing.assert_close(whole.loss("student", batch, 0)[0], low.loss("student", batch, 0)[0], rtol=1e-4, atol=1e-6)
    assert len(whole.players["student"].parameters) == len(list(whole.student.parameters()))


def test_held_out_figures_cover_every_source_alike(base: Path) -> None:
    stage: Any = make(cfg, base, held_out=DATA, held_out_groups=2, teacher_steps=1, nfe=1)
    assert [m.conditions.source for m in stage.measured] == ["t2i", "t2i", "edit", "edit"]
    with torch.no_grad():
        assert {"t2i_score", "edit_score", "score"} <= set(stage.evaluate(0))


def test_trajectories_of_a_step_that_was_refused_once_are_made_again_as_they_were(base: Path, student: Path) -> None:
    """The batch after a refused one draws anew, and so must a resume in the middle of that cycle."""
    keys = {"init": student, "teacher": student, "nfe": 2}
    one, again = (make(dmdo, base, **keys) for _ in range(2))
    one.batch(0, Draws.at(0, 0, 0))
    one.refuse()
    one.batch(0, Draws.at(0, 0, 0, 1))
    again.load_state(json.loads(json.dumps(one.state())))
    for mine, theirs in zip(one.kept[0].states, again.kept[0].states, strict=True):
        assert torch.equal(mine, theirs)


def test_builds_repeat(base: Path) -> None:
    a, b = (make(cfg, base, kind="lora", rank=8) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.student.parameters(), b.student.parameters(), strict=True))


# -- figures and recipes -----------------------------------------------------------------------------------------------------------


def test_the_figures_see_what_goes_wrong() -> None:
    teacher = torch.randn(2, 64, 4, 8, generator=torch.Generator().manual_seed(0))
    healthy = compare(teacher, teacher)
    assert healthy["match"] == 0 and all(abs(healthy[key] - 1) < 1e-5 for key in ("spread", "diversity", "size"))
    assert abs(compare(0.6 * teacher, teacher)["spread"] - 0.6) < 1e-4
    collapsed = compare(teacher[:1].expand(2, -1, -1, -1), teacher)
    assert collapsed["diversity"] == 0 and collapsed["size"] > 0.9
    assert abs(compare(1.3 * teacher, teacher)["size"] - 1.3) < 1e-4


def test_groups_of_one_are_measured_as_the_set_they_make() -> None:
    """At 7B each group is one sample, and a std over its own two noises would say nothing of what lies between conditions."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 12, 4, 8, generator=g) + 2 * torch.randn(1, 12, 4, 8, generator=g) for _ in range(2))
    features = [torch.randn(2, 12, 5, generator=g) for _ in range(2)]
    parts = (student, 1.5 * teacher, *features)
    whole = compare_sets([Pictures(*parts)])
    singles = compare_sets([Pictures(*(x[:, i : i + 1] for x in parts)) for i in range(12)])
    assert whole == pytest.approx(singles) and whole["score"] == pytest.approx(-conditional_energy(*features))
    assert {name: whole[name] for name in compare(*parts[:2])} == pytest.approx(compare(*parts[:2]))
    other = Pictures(*(torch.randn(2, 4, *shape, generator=g) for shape in ((6, 8), (6, 8), (5,), (5,))))  # another size: a set of its own
    both, alone = compare_sets([Pictures(*parts), other]), compare_sets([other])
    assert both == pytest.approx({name: 0.75 * whole[name] + 0.25 * alone[name] for name in whole})


def test_the_score_is_zero_for_equal_distributions_and_sees_blur_and_collapse() -> None:
    g = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(1, 4000, 6, generator=g)  # what the condition says
    teacher, student = (centre + torch.randn(2, 4000, 6, generator=g) for _ in range(2))
    assert abs(conditional_energy(student, teacher)) < 0.02  # other noise, same distribution
    assert abs(conditional_energy(teacher, teacher)) < 1e-6  # the same noise gives no credit
    for worse in (centre + 0.5 * (student - centre), student[:1].expand(2, -1, -1), student.flip(1), student + 0.5):
        assert conditional_energy(worse, teacher) > 0.05


def test_the_best_checkpoint_is_exported_not_the_last(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0, 0.0])
    monkeypatch.setattr(cfg.CfgStage, "evaluate", lambda self, step: {"learned": next(scores)})
    seen = {}
    loss = cfg.CfgStage.loss

    def watch(self: Any, player: str, batch: Any, step: int) -> Any:
        shadow = self.players["student"].ema.shadow
        seen[step] = {name: value.clone() for name, value in shadow.items()}
        return loss(self, player, batch, step)

    monkeypatch.setattr(cfg.CfgStage, "loss", watch)
    optim = {"lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.5}
    run(cfg, base, tmp_path / "run", max_steps=4, kind="lora", rank=2, evaluate_every=1, keep=1, optim=optim)
    model, _ = load_folder(base)
    found = dict(load_student(tmp_path / "run" / "export", model).named_parameters())
    assert all(torch.equal(found[name], value) for name, value in seen[2].items())  # the average as it stood after two steps
    assert any(not torch.equal(found[name], value) for name, value in seen[3].items())


def test_a_stage_that_makes_things_worse_exports_what_came_in(base: Path, student: Path, tmp_path: Path) -> None:
    """Measured before the first step, and so the best: an absurd learning rate does the rest."""
    optim = {"lr": 10.0, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.5}
    keys: dict[str, Any] = {"held_out": HELD_OUT, "held_out_groups": 1, "teacher_steps": 2, "optim": optim}
    run(cfg, base, tmp_path / "run", init=student, max_steps=2, evaluate_every=1, log_every=1, sample_every=100, **keys)
    model, _ = load_folder(base)
    before, after = (dict(load_student(f, model).named_parameters()) for f in (student, tmp_path / "run" / "export"))
    assert all(torch.equal(before[name], value) for name, value in after.items())
    verdict = judge(tmp_path / "run")
    assert verdict.step == 0 and not verdict.passed and verdict.best == verdict.start


def test_a_student_is_installed_beside_its_model(base: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    assert cli.main(["install", str(student), "--model", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "students" / "6")  # made for 6 evaluations
    assert cli.main(["install", str(student), "--model", str(folder), "--name", "mine"]) == 0
    model = HyperBagel.from_pretrained(folder, device="cpu")
    assert model.students.names() == ["6", "mine"]
    [drawn] = model.generate("a red car", seed=0, student="6")
    assert drawn.nfe == 6
    assert cli.main(["generate", "a red car", "-o", str(tmp_path / "a.png"), "--model", str(folder), "--student", "6", "--seed", "0"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(drawn.image))
    stored = load_tensors(folder / "students" / "6" / "moe_gen.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    other = write_base(tmp_path / "other", seed=1)
    assert cli.main(["install", str(student), "--model", str(other)]) == 2
    assert "another base" in capsys.readouterr().err and not (other / "students").exists()


def test_recipes_that_are_refused(base: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without guidance"):
        settings(cfg, base, text_range=[1.0, 1.0])
    with pytest.raises(InputError, match="held-out pictures and there are none"):
        settings(cfg, base, measure="answers")
    with pytest.raises(InputError, match="init: got no folder"):
        make(tscd, base)
    with pytest.raises(InputError, match="teacher: got no folder"):
        make(dmdo, base, init=student)
    with pytest.raises(InputError, match="reward: got no folder"):
        make(refl, base, init=student, teacher=student)
    with pytest.raises(InputError, match="another base"):
        make(cfg, write_base(tmp_path / "other", seed=1), init=student)
    with pytest.raises(InputError, match="coupling"):
        settings(dmdo, base, coupling="pared")
    for wrong in ({"coupling": "reflowed"}, {"guidance_share": {"edits": 0.5}}, {"guidance_share": {"edit": 1.5}}, {"held": ["edits"]}):
        with pytest.raises(InputError, match=r"real=guided|'edits'|less than or equal"):
            settings(dmdo, base, real="guided", **wrong)
    with pytest.raises(InputError, match="held names none"):
        settings(dmdo, base, holder=student)
    with pytest.raises(InputError, match="guidance inside"):
        settings(dmdo, base, guidance_share={"edit": 0.5})
    question = {"sources": {"q": {"task": "question", "resolution": 32}}, "mixture": [{"weights": {"q": 1}}]}
    with pytest.raises(InputError, match="t2i and edit"):
        make(cfg, base, data=question).batch(0, Draws.at(0))


@pytest.mark.parametrize("size", ["toybox", "7b"])
@pytest.mark.parametrize("name", ["cfg", "tscd", "dmdo", "adp", "refl", "reward"])
def test_shipped_recipes_are_valid(name: str, size: str) -> None:
    module = {"cfg": cfg, "tscd": tscd, "dmdo": dmdo, "adp": adp, "refl": refl, "reward": reward}[name]
    recipe = load_config(module.Recipe, RECIPES / size / f"{name}.yaml")
    weights = recipe.data.mixture[0].weights
    assert weights["t2i"] == weights["edit"] > 0  # T2I : edit = 1 : 1
    assert set(DATA["sources"]) <= set(recipe.data.sources)
    assert recipe.held_out is not None and set(DATA["sources"]) <= set(recipe.held_out.sources)  # the best checkpoint and the gate need it


@pytest.mark.parametrize(("module", "recipe"), [(dmdo, "toybox/dmdo-one"), (dmdo, "7b/dmdo-one"), (refl, "toybox/refl-six")])
def test_further_recipes_are_valid(module: Any, recipe: str) -> None:
    found = load_config(module.Recipe, RECIPES / f"{recipe}.yaml")
    assert found.held_out is not None and set(found.held_out.sources) == set(found.data.sources) == set(DATA["sources"])
    assert set(found.held if module is dmdo else found.rewarded) < set(found.data.sources)


def test_held_out_groups_of_one_sample_are_enough(base: Path) -> None:
    """Pictures of a real data set differ in size, so the 7B recipes measure them one by one."""
    alone = {"sources": {name: source | {"samples": 1} for name, source in HELD_OUT["sources"].items()}, "mixture": HELD_OUT["mixture"]}
    stage = make(cfg, base, held_out=alone, held_out_groups=2, teacher_steps=2)
    with torch.no_grad():
        figures = stage.evaluate(0)
    assert {len(m.conditions) for m in stage.measured} == {1}
    assert {"learned", "score", "match", "spread", "diversity", "size"} <= set(figures) and all(np.isfinite(v) for v in figures.values())
