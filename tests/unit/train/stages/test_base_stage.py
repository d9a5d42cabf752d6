"""The base stage: it learns, resumes bit for bit, and exports a folder that loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperbagel.core.config import load_config
from hyperbagel.core.errors import InputError
from hyperbagel.data.images import open_image
from hyperbagel.flow.schedule import shift_time
from hyperbagel.generate.image import denoise
from hyperbagel.model.config import VaeConfig
from hyperbagel.model.student import generates
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder, load_tensors, save_tensors
from hyperbagel.train import previews
from hyperbagel.train.checkpoint import averaged_tensors, list_checkpoints
from hyperbagel.train.gate import judge
from hyperbagel.train.launch import run_training
from hyperbagel.train.losses.flow import mixed_objective
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages.base import BaseStage, Recipe, build

RECIPES = Path(__file__).parents[4] / "recipes"
SMALL = [
    "compile=false",  # a minute of work for steps of milliseconds
    "shape.llm.hidden_size=32",
    "shape.llm.intermediate_size=48",
    "shape.llm.num_hidden_layers=2",
    "shape.llm.num_attention_heads=2",
    "shape.llm.num_key_value_heads=1",
    "shape.vit.hidden_size=16",
    "shape.vit.intermediate_size=32",
    "shape.vit.num_hidden_layers=2",
    "shape.vit.num_attention_heads=2",
    "data.row_tokens=300",
    "data.sources.t2i.samples=2",
    "data.sources.t2i_long.samples=2",
    "data.sources.edit.samples=2",
    "data.sources.question.samples=2",
    "data.sources.describe.samples=2",
    "data.mixture=[{weights: {t2i: 1, t2i_long: 1, edit: 1, question: 1}}]",
    "held_out=null",
    "optim.schedule_by=steps",
    "optim.warmup_steps=2",
]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    config = VaeConfig(resolution=64, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4)
    torch.manual_seed(0)
    save_tensors(folder / "ae.safetensors", AutoEncoder(config).state_dict())
    (folder / "vae_config.json").write_text(config.model_dump_json())
    return folder


def recipe(vae: Path, *overrides: str) -> Recipe:
    return load_config(Recipe, RECIPES / "toybox" / "base.yaml", [*SMALL, f"vae={vae}", *overrides])


def stage(vae: Path, *overrides: str) -> BaseStage:
    return build(recipe(vae, *overrides), torch.device("cpu"))


def test_one_batch_is_learnt(vae: Path) -> None:
    """Loss on one fixed batch falls by half or more."""
    s = stage(vae, "data.mixture=[{weights: {question: 1}}]")
    batch = s.batch(0, Draws.at(0))
    optimizer = torch.optim.AdamW([p for p in s.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(15):
        loss, metrics = s.loss("model", batch, step)
        assert set(metrics) == {"question_ce"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_batches_are_functions_of_the_draw(vae: Path) -> None:
    a, b = stage(vae), stage(vae)
    for i in range(3):
        x, y = a.batch(i, Draws.at(1, i)), b.batch(i, Draws.at(1, i))
        assert x.source == y.source and torch.equal(x.packed.noise, y.packed.noise) and torch.equal(x.packed.latents, y.packed.latents)


def test_gradients_reach_all_trained_parameters(vae: Path) -> None:
    s = stage(vae, "data.mixture=[{weights: {edit: 1}}]", "data.dropout={text: 0, vit: 0, vae: 0}", "frozen=[vit_model]")
    with torch.no_grad():
        s.model.llm2vae.weight.normal_(std=0.1)  # a fresh head is zero and would pass nothing on
    s.loss("model", s.batch(0, Draws.at(0)), 0)[0].backward()
    without = {n for n, p in s.model.named_parameters() if p.grad is None}
    last = f"language_model.model.layers.{s.model.config.llm.num_hidden_layers - 1}."
    # the last layer's text tokens end in nothing that is learnt here: keys and values are used, the rest is not
    for name in without:
        unused = "lm_head" in name or name == "language_model.model.norm.weight" or (name.startswith(last) and "_moe_gen" not in name)
        assert unused or name.startswith("vit_model") or name.endswith("pos_embed"), name
    assert all(p.grad is None for n, p in s.model.named_parameters() if n.startswith("vit_model"))


def test_drawing_alone_is_trained_and_answers_stay(vae: Path) -> None:
    s = stage(vae, "data.mixture=[{weights: {edit: 1}}]", "freeze_understanding=true")
    questions = stage(vae, "data.mixture=[{weights: {question: 1}}]").batch(0, Draws.at(0))
    before = {name: p.detach().clone() for name, p in s.model.named_parameters()}
    with torch.no_grad():
        answers = s.model.forward_train(questions.packed).ce
    for step in range(3):  # the head starts at zero, so the layers move from the second step on
        s.players["model"].optimizer.zero_grad()
        s.loss("model", s.batch(step, Draws.at(0, step)), step)[0].backward()
        s.players["model"].optimizer.step()
    moved = {name for name, p in s.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"llm2vae.weight", "vae2llm.weight", "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"} <= moved
    assert all("_moe_gen" in name or name.startswith(("vae2llm", "llm2vae", "time_embedder")) for name in moved)
    with torch.no_grad():
        assert torch.equal(s.model.forward_train(questions.packed).ce, answers)


def test_resume_is_bit_for_bit_and_the_export_loads(vae: Path, tmp_path: Path) -> None:
    base = RECIPES / "toybox" / "base.yaml"
    quick = [*SMALL, f"vae={vae}", "log_every=1", "sample_every=100"]
    run_training("base", base, [*quick, "max_steps=5"], tmp_path / "whole")
    # the schedule must be the same, so the first part is cut by a step limit that a constant rate does not see
    run_training("base", base, [*quick, "max_steps=5", "optim.schedule=constant"], tmp_path / "a")
    run_training("base", base, [*quick, "max_steps=3", "optim.schedule=constant"], tmp_path / "b")
    run_training("base", base, [*quick, "max_steps=5", "optim.schedule=constant"], tmp_path / "b", resume=True)
    a, b = (load_tensors(tmp_path / run / "export" / "ema.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    whole = load_tensors(tmp_path / "whole" / "export" / "ema.safetensors")
    assert any(not torch.equal(a[name], whole[name]) for name in a)
    model, _ = load_folder(tmp_path / "a" / "export")
    assert model.config.llm.hidden_size == 32
    assert {"tokenizer.json", "llm_config.json", "vit_config.json", "vae_config.json", "bagel_config.json", "ae.safetensors"} <= {
        p.name for p in (tmp_path / "a" / "export").iterdir()
    }
    logged = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5]
    sheets = sorted((tmp_path / "a" / "samples").iterdir())
    assert sheets and open_image(sheets[0]).width > 600


def test_sheets_are_of_the_toybox_and_drawn_a_few_at_a_time(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the pictures: twelve of 1024 x 1024 at once do not fit beside a 7B in training."""
    s = stage(vae)
    sizes: list[int] = []

    def noted(sessions: Any, *rest: Any) -> Any:
        sizes.append(len(sessions))
        return denoise(sessions, *rest)

    monkeypatch.setattr(previews, "denoise", noted)
    sheets = []
    for at_once in (previews.MOST_LATENTS, 1):
        monkeypatch.setattr(previews, "MOST_LATENTS", at_once)
        with torch.no_grad():
            s.sample(at_once, tmp_path)
        sheets.append(open_image(tmp_path / f"step-{at_once:08d}.png").size)
    assert sizes == [12, 4] + [1] * 16 and sheets[0] == sheets[1]
    own = s.recipe.data.sources["t2i"].model_copy(update={"kind": "t2i"})
    s.recipe = s.recipe.model_copy(update={"data": s.recipe.data.model_copy(update={"sources": {"own": own}})})
    s.sample(2, tmp_path)
    assert len(sizes) == 18 and not (tmp_path / "step-00000002.png").exists()


def test_going_on_from_a_folder(vae: Path, tmp_path: Path) -> None:
    run_training("base", RECIPES / "toybox" / "base.yaml", [*SMALL, f"vae={vae}", "max_steps=0", "export_dtype=float32"], tmp_path / "a")
    s = build(recipe(vae, f"init={tmp_path / 'a' / 'export'}"), torch.device("cpu"))
    fresh = stage(vae)
    for (name, p), q in zip(s.model.named_parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad, name


def test_the_autoencoder_that_came_with_a_model_keeps_every_value(vae: Path, tmp_path: Path) -> None:
    """Though the model is exported in bf16: BAGEL's autoencoder is published in fp32, and nothing trains it."""
    base = RECIPES / "toybox" / "base.yaml"
    run_training("base", base, [*SMALL, f"vae={vae}", "max_steps=0", "export_dtype=float32"], tmp_path / "a")
    run_training("base", base, [*SMALL, f"init={tmp_path / 'a' / 'export'}", "vae=null", "max_steps=0"], tmp_path / "b")
    files = [tmp_path / run / "export" / "ae.safetensors" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {t.dtype for t in load_tensors(tmp_path / "b" / "export" / "ema.safetensors").values()} == {torch.bfloat16}


def test_what_is_frozen_takes_half_the_memory_and_loses_nothing(vae: Path, tmp_path: Path) -> None:
    """Weights that came in bf16, multiplied in bf16: only what is trained, norms and tables are held in fp32."""
    base = RECIPES / "toybox" / "base.yaml"
    run_training("base", base, [*SMALL, f"vae={vae}", "max_steps=0"], tmp_path / "a")  # exported in bf16
    on = [f"init={tmp_path / 'a' / 'export'}", "precision=bf16", "freeze_understanding=true", "max_steps=2", "sample_every=1"]
    on.append("data.mixture=[{weights: {t2i: 1}}]")
    s = stage(vae, *on)
    kinds = {name: p.dtype for name, p in s.model.named_parameters()}
    linear = {f"{n}.{leaf}" for n, m in s.model.named_modules() if isinstance(m, torch.nn.Linear) for leaf, _ in m.named_parameters()}
    halved = {name for name in linear if not generates(name)}
    assert halved and {name for name, kind in kinds.items() if kind == torch.bfloat16} == halved
    assert all(p.dtype == torch.float32 for p in stage(vae, on[0], *on[2:], "precision=fp32").model.parameters())
    run_training("base", base, [*SMALL, f"vae={vae}", *on], tmp_path / "b")
    a, b = (load_tensors(tmp_path / run / "export" / "ema.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a if not generates(name))
    assert any(not torch.equal(a[name], b[name]) for name in a if generates(name))


def test_held_out_figures(vae: Path) -> None:
    sources = "{t2i: {task: t2i, samples: 4}, question: {task: question, samples: 4}}"
    one = f"{{sources: {sources}, mixture: [{{weights: {{t2i: 1}}}}]}}"
    s = stage(vae, f"held_out={one}", "held_out_batches=1")
    with torch.no_grad():
        first, again = s.evaluate(0), s.evaluate(0)
    assert first == again and {"t2i_mse", "question_ce"} <= set(first)


def test_a_run_that_made_a_model_worse_is_not_passed_on(vae: Path, tmp_path: Path) -> None:
    """It is measured before the first step, the best checkpoint is exported, and the gate says which that was."""
    base = RECIPES / "toybox" / "base.yaml"
    held_out = "held_out={sources: {t2i: {task: t2i, samples: 4}}, mixture: [{weights: {t2i: 1}}]}"
    run_training("base", base, [*SMALL, f"vae={vae}", "max_steps=0", "export_dtype=float32"], tmp_path / "a")
    start = tmp_path / "a" / "export"
    on = [*SMALL, f"init={start}", "vae=null", held_out, "held_out_batches=1", "evaluate_every=2", "export_dtype=float32"]
    on += ["max_steps=2", "data.mixture=[{weights: {t2i: 1}}]", "optim.schedule=constant", "optim.warmup_steps=0", "optim.ema_decay=0.5"]
    verdicts = {}
    for name, rate in (("worse", "optim.lr=3"), ("better", "optim.lr=0.003")):
        run_training("base", base, [*on, rate], tmp_path / name)
        verdicts[name] = judge(tmp_path / name)
    assert not verdicts["worse"].passed and verdicts["better"].passed and verdicts["worse"].measure == "score"
    before, kept, moved = (load_tensors(folder / "ema.safetensors") for folder in (start, *(tmp_path / n / "export" for n in verdicts)))
    assert all(torch.equal(before[name], kept[name]) for name in before)
    assert any(not torch.equal(before[name], moved[name]) for name in before)


def test_wrong_recipes(vae: Path) -> None:
    with pytest.raises(InputError, match="hiden_size"):
        recipe(vae, "shape.llm.hiden_size=3")
    with pytest.raises(InputError, match="did you mean 'hidden_size'"):
        recipe(vae, "shape.vit.hidden_sise=3")
    for setting, words in (("seed=-1", "seed"), ("shift=.inf", "shift: got inf"), ("optim.lr=.inf", "optim.lr: got inf")):
        with pytest.raises(InputError, match=words):
            recipe(vae, setting)
    for weights, words in (
        ("{tersee: 1}", "tersee"),
        ("{terse: 0}", "a sum above"),
        ("{terse: -1}", "none below 0"),
        ("{terse: .nan}", "nan"),
    ):
        with pytest.raises(InputError, match=words):
            recipe(vae, f"data.sources.t2i.styles={weights}")
    with pytest.raises(InputError, match="frozen: got 'zzz'"):
        stage(vae, "frozen=[zzz]")
    with pytest.raises(InputError, match="covers the whole model"):
        stage(vae, "frozen=['']")
    with pytest.raises(InputError, match=r"expected below 300; take the model's own"):
        stage(vae, "shape.llm.vocab_size=300")
    with pytest.raises(InputError, match=r"optim\.betas"):
        recipe(vae, "optim.betas=[1.5, 0.9]")
    with pytest.raises(InputError, match="vae: got no folder"):
        build(load_config(Recipe, RECIPES / "toybox" / "base.yaml", SMALL), torch.device("cpu"))
    with pytest.raises(InputError, match="'drawing'"):
        stage(vae, "data.mixture=[{weights: {drawing: 1}}]")


def test_the_second_rounds_recipe_is_valid() -> None:
    settings = load_config(Recipe, RECIPES / "toybox" / "base-more.yaml")
    assert settings.align is not None and settings.vit is not None and settings.frozen == ("vit_model",)
    first = load_config(Recipe, RECIPES / "toybox" / "base.yaml").data.sources
    assert set(settings.data.sources) == set(first)


def test_the_7b_recipe_is_valid() -> None:
    settings = load_config(Recipe, RECIPES / "7b" / "base.yaml")
    assert settings.init is not None and settings.data.rows == "packed" and settings.shift == 4.0


@pytest.mark.parametrize(("source", "kind", "weight"), [("t2i", "mse", 3.0), ("question", "ce", 0.25)])
def test_the_recipe_weighs_both_losses(source: str, kind: str, weight: float, vae: Path) -> None:
    s = stage(vae, f"data.mixture=[{{weights: {{{source}: 1}}}}]", "mse_weight=3", "ce_weight=0.25")
    loss, metrics = s.loss("model", s.batch(0, Draws.at(0)), 0)
    assert loss.item() == pytest.approx(weight * metrics[f"{source}_{kind}"].item())


def far(player: Any) -> None:
    """An average that is not what is trained."""
    g = torch.Generator().manual_seed(0)
    for value in player.ema.shadow.values():
        value.add_(0.1 * torch.randn(value.shape, generator=g))


def test_held_out_figures_are_the_averages_and_the_score_their_weighted_mean(vae: Path) -> None:
    sources = "{t2i: {task: t2i, samples: 4}, edit: {task: edit, samples: 2}, question: {task: question, samples: 4}}"
    held_out = f"held_out={{sources: {sources}, mixture: [{{weights: {{t2i: 1}}}}]}}"
    s = stage(vae, held_out, "held_out_batches=1", "mse_weight=3", "ce_weight=0.25")
    far(s.players["model"])
    with torch.no_grad():
        found = s.evaluate(0)
        with s.players["model"].averaged():
            want = {}
            for batch in s.measured:
                out = s.model.forward_train(batch.packed)
                want |= {f"{batch.source}_{k}": v.item() for k, v in mixed_objective(out.mse, out.ce, batch.packed.ce_weights)[1].items()}
    assert {k: found[k] for k in want} == pytest.approx(want)
    assert found["score"] == pytest.approx(-3 * (want["t2i_mse"] + want["edit_mse"]) / 2 - 0.25 * want["question_ce"])


def test_what_is_held_out_does_not_depend_on_the_recipe_s_seed(vae: Path) -> None:
    held_out = "held_out={sources: {question: {task: question, samples: 4}}, mixture: [{weights: {question: 1}}]}"
    a, b = (stage(vae, held_out, "held_out_batches=1", f"seed={seed}").measured[0].packed for seed in (1, 2))
    assert torch.equal(a.text_ids, b.text_ids)


def test_training_times_have_the_recipe_s_shift(vae: Path) -> None:
    a, b = (stage(vae, "data.mixture=[{weights: {t2i: 1}}]", f"shift={shift}").batch(0, Draws.at(0)).packed for shift in (1, 4))
    noisy = a.timesteps > 0
    assert noisy.any() and torch.allclose(b.timesteps[noisy], shift_time(a.timesteps[noisy], 4.0))


def test_without_a_measure_the_averages_of_the_last_step_are_exported(vae: Path, tmp_path: Path) -> None:
    on = ["max_steps=3", "optim.ema_decay=0.5", "optim.warmup_steps=0", "export_dtype=float32"]
    run_training("base", RECIPES / "toybox" / "base.yaml", [*SMALL, f"vae={vae}", *on], tmp_path / "a")
    averages = averaged_tensors(list_checkpoints(tmp_path / "a" / "checkpoints")[-1], "model")
    export = load_tensors(tmp_path / "a" / "export" / "ema.safetensors")
    assert averages and all(torch.equal(export[name], value) for name, value in averages.items())
