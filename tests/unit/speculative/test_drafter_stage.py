"""The drafter stage on a tiny target: batches, learning, resume, export and the gate."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hyperbagel
from hyperbagel.core.config import load_config
from hyperbagel.core.errors import InputError
from hyperbagel.data.images import open_image
from hyperbagel.data.plan import Text, VaeImage, VitImage
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.model.config import BagelConfig, BagelOptions, ImageSizes, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder, load_tensors, save_folder
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.export import import_eagle3
from hyperbagel.speculative.drafters.folder import load_module, make_drafter, make_module
from hyperbagel.speculative.drafters.regenerate import context_of
from hyperbagel.train.distributed import World
from hyperbagel.train.launch import run_training
from hyperbagel.train.losses.drafter import block_loss
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages.drafter import DrafterStage, GateFailed, PromptConfig, Recipe, _sources, build

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes" / "toybox").glob("drafter_*.yaml"))
SMALL = [
    "device=cpu", "precision=fp32", "pool=8", "contexts=4", "passes=2", "max_tokens=10", "held_out_prompts=3", "steps=3", "anchors=4",
    "depth=3", "tree_nodes=4", "log_every=1", "optim.warmup_steps=1", "optim.schedule_by=steps", "export_dtype=float32", "max_seconds=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    config = BagelConfig(
        llm=LLMConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
            max_position_embeddings=512,
        ),
        vit=ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16),
        vae=VaeConfig(ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=3, norm_groups=2),
        options=BagelOptions(
            max_latent_size=8, vit_max_num_patch_per_side=4, vae_transform=ImageSizes(max_size=64, min_size=64, stride=16),
            vit_transform=ImageSizes(max_size=64, min_size=64, stride=16), default_size=(64, 64),
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model = fresh_bagel(config, torch.Generator().manual_seed(0), std=0.3)
    assets = Path(hyperbagel.__file__).parent / "assets" / "toybox"
    with torch.no_grad():
        model.language_model.lm_head.weight[Tokenizer.from_folder(assets).im_end] *= 2.5
    save_folder(folder, config, model.state_dict(), AutoEncoder(config.vae).state_dict(), dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets / name, folder / name)
    return folder


def recipe_of(kind: str) -> Path:
    return ROOT / "recipes" / "toybox" / f"drafter_{kind}.yaml"


def stage(target: Path, kind: str, *overrides: str) -> DrafterStage:
    return build(load_config(Recipe, recipe_of(kind), [*SMALL, f"target={target}", *overrides]), torch.device("cpu"))


def test_batches_are_functions_of_the_step(target: Path) -> None:
    """Also when a run starts in the middle of a pool; answers are the target's own, at T = 0 and T = 1 in turns."""
    a, b = stage(target, "eagle3"), stage(target, "eagle3")
    whole = [a.batch(i, Draws.at(1, i)) for i in range(10)]
    for i in (3, 9, 4):
        again = b.batch(i, Draws.at(1, i))
        assert torch.equal(again.lesson.tokens, whole[i].lesson.tokens) and torch.equal(again.lesson.logits, whole[i].lesson.logits)
        assert torch.equal(again.anchors, whole[i].anchors)
    for number, greedy in ((0, True), (4, False)):  # two cuts, two passes: a pool lasts four steps
        lesson = whole[number].lesson
        own = lesson.logits.argmax(-1)[:, :-1] == lesson.tokens[:, 1:]
        inside = lesson.valid(1)[:, :-1]
        assert bool(own[inside].all()) == greedy
    assert torch.equal(whole[0].lesson.tokens, whole[2].lesson.tokens) and not torch.equal(whole[0].anchors, whole[2].anchors)


def test_ranks_draw_other_contexts_and_rank_0_measures(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for rank in range(2):
        monkeypatch.setattr("hyperbagel.train.stages.drafter.join_world", lambda device, rank=rank: World(rank, 2))
        one = stage(target, "eagle3")
        tokens.append(one.batch(0, Draws.at(1, 0)).lesson.features)
        assert bool(one.measured) == (rank == 0)
    assert tokens[0].shape != tokens[1].shape or not torch.equal(*tokens)


def test_held_out_prompts_are_measured_a_few_at_a_time(target: Path) -> None:
    """As many at once as training has contexts, which is what fits into memory; the figures are the same."""
    together, apart = stage(target, "block", "contexts=4"), stage(target, "block", "contexts=1")
    for name, pairs in together.measured.items():
        assert together.simulated(pairs) == apart.simulated(apart.measured[name])
        drafter = make_drafter(together.module, together.target, depth=3)
        assert together.engine(pairs, drafter) == apart.engine(pairs, drafter)


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_each_recipe_trains_and_passes_its_gate(path: Path, target: Path, tmp_path: Path) -> None:
    run_training("drafter", path, [*SMALL, f"target={target}", "max_steps=3"], tmp_path / "run")
    gate = json.loads((tmp_path / "run" / "gate.json").read_text())
    assert gate and all(g["simulated_tau"] == pytest.approx(g["engine_tau"]) and g["engine_tau"] >= 1 for g in gate.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("drafter/rate_1" in line for line in lines) and any("held_out/in_template_tau" in line for line in lines)
    model, _ = load_folder(target)
    module = load_module(tmp_path / "run" / "export", model)
    if module.config.kind == "eagle3":
        again = import_eagle3(tmp_path / "run" / "export-eagle3", model.config.llm)
        assert all(torch.equal(x, y) for x, y in zip(again.parameters(), module.parameters(), strict=True))
        assert any("held_out/in_template_tree_tau" in line for line in lines)


@pytest.mark.parametrize("kind", ["hyper_bagel", "block"])
def test_loss_falls_and_the_target_stays(kind: str, target: Path) -> None:
    s = stage(target, kind, "optim.lr=0.005")
    before = [p.clone() for p in s.target.parameters()]
    batch = s.batch(0, Draws.at(0))
    optimizer, losses = s.players["drafter"].optimizer, []
    for step in range(12):
        loss, _ = s.loss("drafter", batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(s.target.parameters(), before, strict=True))


def test_resume_is_bit_for_bit(target: Path, tmp_path: Path) -> None:
    quick = [*SMALL, f"target={target}", "optim.schedule=constant", "held_out={}"]
    run_training("drafter", recipe_of("eagle3"), [*quick, "max_steps=6"], tmp_path / "a")
    run_training("drafter", recipe_of("eagle3"), [*quick, "max_steps=3"], tmp_path / "b")
    run_training("drafter", recipe_of("eagle3"), [*quick, "max_steps=6"], tmp_path / "b", resume=True)
    a, b = (load_tensors(tmp_path / run / "export" / "drafter.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_run_goes_on_from_a_trained_drafter(path: Path, target: Path, tmp_path: Path) -> None:
    run_training("drafter", path, [f"target={target}", *SMALL, "max_steps=2"], tmp_path / "run")
    first = tmp_path / "run" / "export"
    stage = build(load_config(Recipe, path, [f"target={target}", f"init={first}", *SMALL]), torch.device("cpu"))
    for name, x in load_tensors(first / "drafter.safetensors").items():
        assert torch.equal(stage.module.state_dict()[name], x), name
    other = "block" if stage.recipe.kind != "block" else "eagle3"
    with pytest.raises(InputError, match="set kind and shape as it was made"):
        build(load_config(Recipe, path, [f"target={target}", f"init={first}", f"kind={other}", "shape={}", *SMALL]), torch.device("cpu"))


def test_a_smaller_draft_vocabulary_is_the_answers_own(target: Path) -> None:
    s = stage(target, "eagle3", "shape={draft_vocab: 50}")
    module = s.module
    ids = set(module.drafted().tolist())  # type: ignore[operator, union-attr]
    answers = [t for _, out in s.measured["in_template"] for t in out.ids]
    assert len(ids) == 50 and sum(t in ids for t in answers) > 0.3 * len(answers)
    loss, _ = s.loss("drafter", s.batch(0, Draws.at(0)), 0)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_the_gate_fails_when_serving_differs(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = stage(target, "eagle3")
    true = s.engine

    def worse(*given: object) -> object:
        stats = true(*given)  # type: ignore[arg-type]
        stats.rounds += stats.rounds
        return stats

    monkeypatch.setattr(s, "engine", worse)
    with torch.no_grad(), pytest.raises(GateFailed, match="in_template"):
        s.finish(tmp_path)
    assert (tmp_path / "export" / "drafter.json").exists() and (tmp_path / "gate-failed.json").exists()
    assert not (tmp_path / "gate.json").exists()  # runs/drafters.sh takes it as the sign of a finished run


def test_pictures_are_read_as_a_session_reads_them(tmp_path: Path) -> None:
    """First by the latents' rule, then by the ViT's, however many there are: the drafter serves behind such contexts."""
    Image.new("RGB", (40, 24), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image><image>what?"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": ["a.png", "a.png"], "conversations": turns}) + "\n")
    parts: Any = SimpleNamespace(
        tokenizer=Tokenizer.from_folder(Path(hyperbagel.__file__).parent / "assets" / "toybox"),
        vae_transform=ImageTransform(128, 64, 16),
        vit_transform=ImageTransform(112, 28, 14),
    )
    sources = {"chat": {"kind": "chat", "path": str(tmp_path), "images": str(tmp_path)}}
    [source] = _sources(PromptConfig.model_validate({"sources": sources}), parts, 0).values()
    seen = [item.pixels for item in source.sample(0) if isinstance(item, VitImage)]
    picture = open_image(tmp_path / "a.png")
    served = parts.vit_transform.pixels(parts.vae_transform.resize(picture))
    assert len(seen) == 2 and all(np.array_equal(pixels, served) for pixels in seen)
    assert served.shape != parts.vit_transform.pixels(picture, 2).shape


def test_held_out_rows_that_count_twice_are_told(target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps({"conversations": turns}) + "\n"))
    chat = json.dumps({"kind": "chat", "path": str(tmp_path)})
    stage(target, "block", f"held_out={{own: {{sources: {{chat: {chat}}}}}}}")
    assert "held_out: got 2 rows in chat, expected 3; rows count twice, add some or lower held_out_prompts" in caplog.text


def test_clean_latents_and_pictures_to_draw(target: Path) -> None:
    """A clean latent block and a picture to see are context, a picture to draw is not. Nothing from the first answer on is."""
    s = stage(target, "eagle3")
    text, answer = Text([5, 6]), Text([7], loss=True)
    pixels = np.zeros((64, 64, 3), np.uint8)
    clean, drawn = VaeImage(pixels), VaeImage(pixels, loss=True)
    lengths = []
    seen = VitImage(pixels)
    plans = [[text, answer], [clean, text, answer], [drawn, text, answer, text], [seen, text, answer], [seen, answer, text, answer]]
    for plan in plans:
        session = context_of(s.parts, plan, (0, 2))
        assert session is not None and session.cache.taps == (0, 2)
        lengths.append(session.cache.lengths[0])
    words = len(s.parts.tokenizer.encode(s.parts.tokenizer.decode([5, 6]))) + 2
    assert lengths == [words, words + 16 + 2, words, words + 16 + 2, 16 + 2]
    assert context_of(s.parts, [text, drawn], ()) is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("shape={colour: 1}", "colour"),
        ("accumulate=2", "accumulate"),
        ("contexts=100", "contexts"),
        ("target=/nowhere", "got no folder"),
        ("data={sources: {t2i: {task: t2i}}}", "question sources"),
    ],
)
def test_wrong_recipes(override: str, words: str, target: Path) -> None:
    with pytest.raises(InputError, match=words):
        stage(target, "eagle3", override).batch(0, Draws.at(0))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.weights={zzz: 1}", "unknown sources 'zzz'"), ("data.sources={}", "no sources"), ("temperatures=[]", "at least 1 item"),
        ("temperatures=[-1]", "greater than or equal to 0"), ("temperatures=[.nan]", "nan"),
    ],
)  # fmt: skip
def test_recipes_that_draw_nothing(target: Path, setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config(Recipe, RECIPES[0], [*SMALL, f"target={target}", setting])


def test_the_targets_own_shape_is_no_setting(target: Path) -> None:
    with pytest.raises(InputError, match="got hidden_size, which is the target's"):
        build(load_config(Recipe, RECIPES[0], [*SMALL, f"target={target}", "shape={hidden_size: 3}"]), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "billions"), [("hyper_bagel", 1.36), ("block", 0.89)])
def test_the_7b_recipes_are_valid(kind: str, billions: float) -> None:
    """And the drafter is as large as the recipe's estimate of memory takes it to be."""
    recipe = load_config(Recipe, ROOT / "recipes" / "7b" / f"drafter_{kind}.yaml")
    assert recipe.precision == "bf16" and recipe.held_out and recipe.data.sources["chat"].kind == "chat"
    with torch.device("meta"):
        module = make_module(DrafterConfig.for_target(recipe.kind, LLMConfig(), **recipe.shape))
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("kind", ["eagle3", "hyper_bagel", "block"])
def test_a_bf16_target_teaches_an_fp32_drafter(kind: str, target: Path, tmp_path: Path) -> None:
    """What a GPU trains on: the target in the type it is served in, the drafter's own weights in fp32, measured as an engine loads it."""
    at_work = stage(target, kind, "precision=bf16")
    assert at_work.target.dtype == torch.bfloat16 and {p.dtype for p in at_work.module.parameters()} == {torch.float32}
    trained = at_work.module
    with torch.autocast("cpu", torch.bfloat16):
        batch = at_work.batch(0, Draws.at(0, 0))
        loss, _ = at_work.loss("drafter", batch, 0)
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())
    figures = at_work.evaluate(0)
    assert all(np.isfinite(value) for value in figures.values()) and at_work.module is trained
    with suppress(GateFailed):  # untrained, on three prompts: bf16's near ties are more than 2 %
        at_work.finish(tmp_path)
    [told] = [json.loads(path.read_text()) for path in tmp_path.glob("gate*.json")]
    assert all(split["engine_tau"] >= 1 for split in told.values())
    assert load_module(tmp_path / "export", at_work.target).config == trained.config


def test_a_drafter_s_average_is_measured_and_exported(target: Path, tmp_path: Path) -> None:
    s = stage(target, "block", "max_tokens=4", "held_out_prompts=2")
    shadow = s.players["drafter"].ema.shadow
    for value in shadow.values():
        value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    with s.served():
        assert all(torch.equal(s.players["drafter"].parameters[name], value) for name, value in shadow.items())
    s.finish(tmp_path)
    found = dict(load_module(tmp_path / "export", s.target).named_parameters())
    assert all(torch.equal(found[name], value) for name, value in shadow.items() if name in found) and set(shadow) <= set(found)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("block", ("ce_weight=0.1", "ce_weight=0.9")),
        ("hyper_bagel", ("decay=0.8", "decay=0.1")),
        ("hyper_bagel", ("ce_weight=0", "ce_weight=5")),
    ],
)
def test_the_recipe_s_numbers_reach_the_losses(kind: str, keys: tuple[str, str], target: Path) -> None:
    made = [stage(target, kind, key) for key in keys]
    a, b = (s.loss("drafter", s.batch(0, Draws.at(0)), 0)[0].item() for s in made)
    assert a != pytest.approx(b, rel=1e-4)


def test_block_weights_are_dsparks(target: Path) -> None:
    s = stage(target, "block", "ce_weight=0.2")
    batch = s.batch(0, Draws.at(0))
    loss, _ = s.loss("drafter", batch, 0)
    logits, confidence = s.module.rollout(batch.lesson, s.target.embed_text, batch.anchors)
    want, _ = block_loss(logits, confidence, batch.anchors, batch.lesson, ce_weight=0.2, tv_weight=0.8)
    assert loss.item() == pytest.approx(want.item())


def test_a_token_that_cannot_be_drafted_costs_no_cross_entropy(target: Path) -> None:
    """Its logit is minus infinity."""
    s = stage(target, "eagle3", "shape.draft_vocab=2", "ce_weight=0.5")
    losses = [s.loss("drafter", s.batch(i, Draws.at(0, i)), i)[0] for i in range(2)]
    assert all(loss.isfinite() for loss in losses)
