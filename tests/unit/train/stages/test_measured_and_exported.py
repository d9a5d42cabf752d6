"""What stages measure and export: averages, each source alike, the best; and what they are measured on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_base import CONFIG, DATA, HELD_OUT, SOURCES, TOKENIZER, make, only, run, settings, stage_of, write_base

from hyperbagel.core.config import check_config
from hyperbagel.core.errors import InputError
from hyperbagel.data.mixture import DataConfig, RowsConfig
from hyperbagel.data.packing import pack
from hyperbagel.data.plan import VaeImage, VitImage
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import to_tensor
from hyperbagel.model.planner import load_planner
from hyperbagel.model.student import load_student
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder, load_tensors
from hyperbagel.nn.masks import dense_mask
from hyperbagel.train.batches import Batches, KeepGroup, held_out_groups, open_loader, pack_spec
from hyperbagel.train.checkpoint import averaged_tensors, list_checkpoints
from hyperbagel.train.rewards import load_reward, prompt_of, understand
from hyperbagel.train.stage import HELD_OUT_SEED, Draws
from hyperbagel.train.stages import cfg, dmdo, planner, reward


def far(player: Any) -> None:
    """An average that is not what is trained."""
    g = torch.Generator().manual_seed(0)
    for value in player.ema.shadow.values():
        value.add_(0.1 * torch.randn(value.shape, generator=g))


AVERAGED = {"lr": 1e-3, "ema_decay": 0.9}


@pytest.mark.parametrize("name", ["cfg", "refl"])
def test_held_out_figures_are_the_averaged_student_s(name: str, base: Path, student: Path, head: Path) -> None:
    s: Any = stage_of(name, base, student, head, held_out=HELD_OUT, held_out_groups=1, teacher_steps=2, optim=AVERAGED)
    player = s.players["student"]
    with torch.no_grad():
        trained = s.evaluate(0)
        far(player)
        found = s.evaluate(0)
        for key, value in player.ema.shadow.items():
            player.parameters[key].copy_(value)
        assert found == pytest.approx(s.evaluate(0), rel=1e-5)
    for figure in ("match", "score", {"cfg": "learned", "refl": "reward"}[name]):
        assert found[figure] != pytest.approx(trained[figure], rel=1e-4), figure


def test_each_source_counts_the_same(base: Path) -> None:
    s: Any = make(cfg, base, held_out=DATA, held_out_groups=1, teacher_steps=1, nfe=1)
    with torch.no_grad():
        found = s.evaluate(0)
    for figure in ("score", "match", "size", "learned"):
        assert found[figure] == pytest.approx((found[f"t2i_{figure}"] + found[f"edit_{figure}"]) / 2)


def test_the_incoming_student_raises_no_alarm_and_a_fading_one_does(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s: Any = make(cfg, base)
    assert s._alarms(0, {"score": -1.0, "size": 0.1}) == {} and s.scores == []
    assert s._alarms(1, {"score": -1.0, "size": 0.1}) == {"alarm_fading": 1.0} and s.scores == [-1.0]


def test_without_a_measure_the_averaged_student_is_exported(base: Path, tmp_path: Path) -> None:
    optim = {"lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.5}
    run(cfg, base, tmp_path / "run", max_steps=2, kind="lora", rank=2, optim=optim, log_every=1, sample_every=100)
    averages = averaged_tensors(list_checkpoints(tmp_path / "run" / "checkpoints")[-1], "student")
    found = dict(load_student(tmp_path / "run" / "export", load_folder(base)[0]).named_parameters())
    assert averages and all(torch.equal(found[name], value) for name, value in averages.items())


def test_whole_layers_stay_whole(base: Path, student: Path) -> None:
    for key, value in (("kind", "lora"), ("rank", 3), ("alpha", 3.0)):
        with pytest.raises(InputError, match=f"got {key} {value} for a student of whole layers"):
            make(cfg, base, init=student, **{key: value})


@pytest.mark.parametrize(("target", "metric"), [("guided", "learned"), ("reflow", "match"), ("segments", "match")])
def test_each_target_has_its_measure(target: str, metric: str, base: Path) -> None:
    assert make(cfg, base, target=target).best_metric == metric


@pytest.mark.parametrize("key", [{"hold_steps": 2}, {"hold_weight": 2.0}])
def test_settings_of_held_sources_without_any(key: Any, base: Path) -> None:
    with pytest.raises(InputError, match="is of sources that are held"):
        settings(dmdo, base, **key)


def test_the_reward_that_is_measured_is_the_rewarded_sources_own(base: Path, student: Path, head: Path) -> None:
    s: Any = stage_of("refl", base, student, head, held_out=DATA, held_out_groups=1, teacher_steps=2, rewarded=["edit"])
    with torch.no_grad():
        found = s.evaluate(0)
        [m] = [m for m in s.measured if m.conditions.source == "edit"]
        own, theirs = (
            s.reward(s.decode(x, m.conditions), m.conditions.samples).mean().item()
            for x in (s.pictures(m.conditions, m.noises)[0], m.teacher[0])
        )
    assert own != pytest.approx(theirs, rel=1e-4)
    assert (found["reward"], found["teacher_reward"]) == pytest.approx((own, theirs), rel=1e-5)


def test_a_reward_over_another_base_is_refused(base: Path, head: Path, tmp_path: Path) -> None:
    other = load_folder(write_base(tmp_path / "other", seed=1))[0]
    with pytest.raises(InputError, match="over another base"):
        load_reward(head, other, None)  # type: ignore[arg-type]


def test_the_better_pictures_are_called_so(base: Path) -> None:
    s: Any = make(reward, base, held_out=HELD_OUT, held_out_groups=1)
    pairs = s.measured[0]
    with torch.no_grad():
        found = s.evaluate(0)
        assert found["better"] == pytest.approx(s.head(pairs.better).mean().item())
        assert found["worse"] == pytest.approx(s.head(pairs.worse).mean().item()) and found["better"] != found["worse"]


def test_the_best_head_is_exported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(reward.RewardStage, "evaluate", lambda self, step: {"accuracy": next(scores)})
    run(reward, base, tmp_path / "run", max_steps=3, evaluate_every=1, optim={"lr": 0.1, "warmup_steps": 0}, keep=9)
    kept = averaged_tensors(tmp_path / "run" / "checkpoints" / "step-00000002", "reward")
    export = load_tensors(tmp_path / "run" / "export" / "reward.safetensors")
    assert kept and all(torch.equal(export[name], value) for name, value in kept.items())


def test_worse_pictures_are_of_every_kind(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that was not made, a picture of something else, and a damaged one; which it is goes by the batch's draws."""
    s: Any = make(reward, base, data=only("edit"))
    seen: list[Any] = []
    monkeypatch.setattr(
        reward, "understand", lambda base, spec, pixels, samples: seen.append((pixels, samples)) or torch.zeros(len(pixels), 2)
    )
    kinds = {"source": 0, "other": 0, "damaged": 0}
    for step in range(20):
        s.batch(step, Draws.at(0, step))
        (better, samples), (worse, _) = seen[-2:]
        for i, sample in enumerate(samples):
            given = [to_tensor(item.pixels) for item in sample if isinstance(item, VaeImage) and not item.loss][-1]
            kind = (
                "source" if torch.equal(worse[i], given) else "other" if torch.equal(worse[i], better[(i + 1) % len(better)]) else "damaged"
            )
            kinds[kind] += 1
    assert kinds["source"] > 15 and kinds["other"] > 5 and kinds["damaged"] > 5, kinds


def test_held_out_pictures_are_sampled_as_in_use(base: Path) -> None:
    s: Any = make(cfg, base, held_out=HELD_OUT, held_out_groups=1, teacher_steps=1, nfe=3, shift=5.0)
    m = s.measured[0]
    velocity, x = s.as_velocity(s.network, m.conditions, s.usual_scales(m.conditions)), m.noises[1]
    with torch.no_grad():
        for a, b in ((1.0, 10 / 11), (10 / 11, 5 / 7), (5 / 7, 0.0)):  # 5 u / (1 + 4 u) at u = 1, 2/3, 1/3, 0
            x = x + (b - a) * velocity(x, a)
        torch.testing.assert_close(s.pictures(m.conditions, m.noises)[1], x, rtol=1e-4, atol=1e-5)


def test_a_planner_s_average_is_measured_and_exported(base: Path, tmp_path: Path) -> None:
    plans = only("t2i")
    plans["sources"] = {"t2i": plans["sources"]["t2i"] | {"think_share": 1.0}}
    s: Any = make(planner, base, data=plans, held_out=plans, held_out_groups=1, optim={"lr": 1e-3, "ema_decay": 0.9}, rank=2)
    player = s.players["planner"]
    far(player)
    with torch.no_grad():
        trained = s._cross_entropy(s.measured[0]).item()
        with player.averaged():
            average = s._cross_entropy(s.measured[0]).item()
        assert s.evaluate(0)["score"] == pytest.approx(-average) != pytest.approx(-trained)
        s.finish(tmp_path)  # without a best checkpoint
    found = dict(load_planner(tmp_path / "export", s.base).named_parameters())
    for name, value in player.ema.shadow.items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-2, atol=1e-2)


def test_a_reward_s_features_are_the_prompt_s_last_state_and_mean(base: Path) -> None:
    s: Any = make(cfg, base, data=only("t2i"))
    [sample, *_] = s.loader.next_group().samples
    picture, prompt = next(item.pixels for item in sample if isinstance(item, VaeImage) and item.loss), prompt_of(sample)
    batch = pack([[VitImage(picture), prompt]], s.spec, encode=lambda x: x, generator=torch.Generator().manual_seed(0), device=s.device)
    with torch.no_grad():
        hidden = s.base.backbone(s.base.embed_packed(batch), batch.positions, mask=dense_mask(batch)).u[0][
            batch.sample_id[0, : batch.su] >= 0
        ]
        want = torch.cat([hidden[-1], hidden[-len(prompt.ids) - 2 :].mean(0)])
        found = understand(s.base, s.spec, to_tensor(picture)[None], [sample])[0]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_samples_that_are_all_too_long_are_told() -> None:
    values = only("t2i") | {"sample_tokens": 5}
    values["sources"] = {"t2i": SOURCES["t2i"] | {"samples": 50}}
    data, tokenizer, vae = check_config(RowsConfig, values, "test"), Tokenizer.from_folder(TOKENIZER), AutoEncoder(CONFIG.vae)
    batches = Batches(data, CONFIG, tokenizer, vae, seed=3, device=torch.device("cpu"), shift=1.0)
    with pytest.raises(InputError, match="samples longer than 5 tokens"):
        batches.next(Draws.at(0))


def test_what_is_held_out_is_drawn_by_a_seed_of_its_own() -> None:
    seeds: list[int] = []
    empty: Any = SimpleNamespace(sources={}, group={}, close=lambda: None)

    def opened(data: DataConfig, seed: int) -> Any:
        seeds.append(seed)
        return empty

    keys = [draws.key for _, draws in held_out_groups(check_config(DataConfig, DATA, "test"), 2, opened)]
    assert seeds == [HELD_OUT_SEED] * 2 and keys == [(HELD_OUT_SEED, 0), (HELD_OUT_SEED, 1)] * 2


def test_ranks_drop_other_parts() -> None:
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    values = only("edit") | {"batch_tokens": 1, "dropout": {"text": 0.5, "vit": 0.5, "vae": 0.5}}
    values["sources"] = {"edit": SOURCES["edit"] | {"samples": 24}}
    data, spec = check_config(RowsConfig, values, "test"), pack_spec(CONFIG, tokenizer)
    samples = open_loader(data, CONFIG, tokenizer, seed=0).next_group().samples
    kept = [[[item.dropped for item in s] for s in KeepGroup(data, spec, 0, rank)("edit", samples, 0).samples] for rank in (0, 1, 0)]
    assert kept[0] == kept[2] != kept[1]
