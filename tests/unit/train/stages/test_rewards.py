"""What a picture is worth: trained on pairs, asked of the base, a model of one's own; and how it is fed back to the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_base import make, only, settings, stage_of

from hyperbagel.core.errors import InputError
from hyperbagel.data.packing import pack
from hyperbagel.data.plan import Text, VaeImage, VitImage
from hyperbagel.data.transforms import to_tensor
from hyperbagel.flow.path import x0_from_velocity
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import euler
from hyperbagel.train.contexts import student_velocity
from hyperbagel.train.losses.dmd import dmd_gradient
from hyperbagel.train.losses.refl import refl_loss
from hyperbagel.train.rewards import (
    AnswerReward,
    RewardSettings,
    checks_behind,
    foreign_reward,
    load_reward,
    open_reward,
    prompt_text,
)
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import adp, cfg, dmdo, reward


def test_a_reward_reads_picture_and_prompt(base: Path, head: Path) -> None:
    stage: Any = make(cfg, base, data=only("edit"))
    found = load_reward(head, stage.base, stage.spec)
    samples = stage.loader.next_group().samples
    pixels = torch.rand(3, 3, 32, 32).requires_grad_()
    scores = found(pixels, samples)
    scores[0].backward()
    assert scores.shape == (3,) and pixels.grad is not None and pixels.grad[0].abs().sum() > 0
    assert pixels.grad[1:].abs().max() == 0  # each picture has its own row
    swapped = found(pixels, [samples[1], samples[0], samples[2]])
    assert not torch.allclose(swapped[:2], scores[:2]) and torch.allclose(swapped[2], scores[2], atol=1e-5)
    alone = found(pixels[1:2], samples[1:2])
    torch.testing.assert_close(alone, scores[1:2], rtol=1e-4, atol=1e-5)


def test_pairs_are_learnt(base: Path) -> None:
    stage: Any = make(reward, base)
    batch = stage.batch(0, Draws.at(0))
    optimizer = torch.optim.AdamW(stage.head.parameters(), lr=1e-2)
    for step in range(30):
        loss, metrics = stage.loss("reward", batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 and next(iter(metrics.values())) == 1


def test_a_head_is_measured_and_exported_as_its_average(base: Path, tmp_path: Path) -> None:
    stage: Any = make(reward, base, held_out=only("edit"), held_out_groups=1, optim={"ema_decay": 0.9})
    before, weights = stage.evaluate(0), {name: value.clone() for name, value in stage.head.state_dict().items()}
    with torch.no_grad():
        for parameter in stage.head.parameters():
            parameter.add_(1.0)  # the average stays
    assert stage.evaluate(0) == before != stage._figures()
    stage.finish(tmp_path)
    kept = load_reward(tmp_path / "export", stage.base, stage.spec)
    assert before.items() <= json.loads((tmp_path / "export" / "reward.json").read_text()).items()
    assert all(torch.equal(value, weights[name]) for name, value in kept.head.state_dict().items())


def test_a_head_s_reward_is_in_full_precision(base: Path) -> None:
    """bf16 has two or three digits, which would tie rewards."""
    stage: Any = make(reward, base)
    x = torch.randn(64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = stage.head(x)
    assert found.dtype == torch.float32 and torch.equal(found, stage.head(x))


@pytest.mark.parametrize("source", ["t2i", "edit"])
def test_a_second_picture_is_the_worse_one(source: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = only(source)
    data["sources"] = {source: data["sources"][source] | {"near_misses": True, "noise_copies": 2}}
    stage: Any = make(reward, base, data=data, second=1.0)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(reward, "understand", lambda base, spec, pixels, samples: seen.append(pixels) or torch.zeros(len(pixels), 2))
    groups: list[Any] = []
    monkeypatch.setattr(stage.loader, "next_group", lambda take=stage.loader.next_group: groups.append(take()) or groups[-1])
    stage.batch(0, Draws.at(0))
    for i, sample in enumerate(groups[0].samples):
        drawn = [item for item in sample if isinstance(item, VaeImage) and item.loss]
        assert len(drawn) == 3 and drawn[0].pixels is drawn[1].pixels
        for pixels, at in ((seen[0], 0), (seen[1], 2)):
            torch.testing.assert_close(pixels[i], to_tensor(drawn[at].pixels))
        assert reward.second_picture(sample[:-1], drawn[0].pixels) is None


def test_one_sample_a_batch_is_compared_with_the_words_of_the_one_before(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the worse picture would always be the one with noise, and the prompt would not matter."""
    data = only("t2i")
    data["sources"] = {"t2i": data["sources"]["t2i"] | {"samples": 1}}
    stage: Any = make(reward, base, data=data)
    seen: list[tuple[torch.Tensor, Any]] = []
    words = lambda samples: list(reward.prompt_of(samples[0]).ids)  # noqa: E731
    monkeypatch.setattr(reward, "understand", lambda *args: seen.append(args[2:]) or torch.zeros(1, 2))
    states = []
    for step in range(60):
        states.append(stage.state())
        stage.batch(step, Draws.at(0, step))
    swapped = 0
    for step in range(60):
        (better, own), (worse, asked) = seen[2 * step : 2 * step + 2]
        if torch.equal(better, worse):
            swapped += 1
            assert words(asked) == words(seen[2 * step - 2][1]) != words(own)
        else:
            assert asked == own
    assert 30 <= swapped <= 56  # three quarters, but for prompts that come twice in turn
    last = seen[-2:]
    stage.load_state(states[59])
    stage.batch(59, Draws.at(0, 59))
    for a, b in zip(seen[-2:], last, strict=True):
        assert torch.equal(a[0], b[0]) and words(a[1]) == words(b[1])


def test_the_next_edit_of_a_chain_is_no_worse_picture() -> None:
    a, b, c = (np.full((8, 8, 3), i, np.uint8) for i in range(3))
    chain: Any = [
        VaeImage(a),
        Text([1], enable_cfg=True),
        VaeImage(b, loss=True),
        VaeImage(b),
        Text([2], enable_cfg=True),
        VaeImage(c, loss=True),
    ]
    assert reward.second_picture(chain, b) is None
    assert reward.second_picture([*chain[:3], VaeImage(c, loss=True)], b) is c


def test_feedback_equals_the_plain_sum_of_both_terms(base: Path, student: Path, head: Path) -> None:
    """The cheap way (one pass through each part) against backward of adversarial + weight * feedback."""
    assert [list(range(6))[adp.some(6, n)] for n in (0, 6, 3, 2, 4)] == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 2, 4], [0, 3], [0, 2, 4]]
    stage: Any = stage_of("refl", base, student, head, data=only("edit"), pixel_samples=2)
    batch = stage.batch(1, Draws.at(0, 1))
    loss, metrics = stage.loss("student", batch, 1)
    loss.backward()
    fast = {n: p.grad.clone() for n, p in stage.student.named_parameters() if p.grad is not None}
    stage.student.zero_grad()
    x0_hat = stage.predict(batch)
    adversarial, _ = stage.judged(batch, x0_hat)
    feedback = refl_loss(stage.reward(stage.decode(x0_hat, batch.conditions), batch.conditions.samples))
    slow = adversarial + metrics["edit_reward_weight"] * feedback
    slow.backward()
    assert 0 < metrics["edit_reward_weight"] <= 1 and torch.allclose(loss, slow, rtol=1e-5)
    for name, p in stage.student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(fast[name], p.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_feedback_through_the_sampler(k: int, base: Path, student: Path, head: Path) -> None:
    """The end of the sampler whatever k, and the gradient of its last k steps."""
    alone = {"latent_weight": 0, "pixel_weight": 0, "nfe": 3, "gradient_steps": k}
    stage: Any = stage_of("refl", base, student, head, data=only("t2i"), **alone)
    batch = stage.batch(0, Draws.at(0))
    x0_hat, times = stage.predict(batch), time_grid(3, stage.recipe.shift)
    run = stage.as_velocity(stage.network, batch.conditions, batch.scales)
    torch.testing.assert_close(x0_hat, euler(batch.x_T, run, times))
    gate = torch.ones(3, requires_grad=True)  # what of each step's velocity the end depends on, through the student's weights
    x = batch.x_T
    for i in range(3):
        with torch.set_grad_enabled(i >= 3 - k):
            x = x - gate[i] * run(x, float(times[i])) * (times[i] - times[i + 1])
    x.sum().backward()
    assert gate.grad is not None and [bool(g) for g in gate.grad] == [i >= 3 - k for i in range(3)]
    theirs = {n: p.grad.clone() for n, p in stage.student.named_parameters() if p.grad is not None}
    stage.student.zero_grad()
    x0_hat.sum().backward()
    assert theirs
    for name, p in stage.student.named_parameters():
        if name in theirs:
            torch.testing.assert_close(p.grad, theirs[name])
    assert {stage.turn(step) for step in range(4)} == {"student"}
    loss, metrics = stage.loss("student", batch, 0)
    expected = stage.recipe.huber_weight * metrics["t2i_huber"] + torch.relu(6 - metrics["t2i_reward"])
    assert set(metrics) == {"t2i_huber", "t2i_reward", "t2i_reward_weight"} and torch.allclose(loss, expected, rtol=1e-4)


def test_some_sources_only_hold_the_student(base: Path, student: Path, head: Path) -> None:
    stage: Any = stage_of("refl", base, student, head, data=only("t2i"), rewarded=[])
    _, metrics = stage.loss("student", stage.batch(1, Draws.at(0, 1)), 1)
    assert set(metrics) == {"t2i_latent", "t2i_pixel", "t2i_huber"}
    with pytest.raises(InputError, match="rewarded: got 'edits'"):
        stage_of("refl", base, student, head, rewarded=["edits"])


def test_a_cap_without_judges_is_refused(base: Path, student: Path, head: Path) -> None:
    with pytest.raises(InputError, match="reward_cap: got one without judges"):
        stage_of("refl", base, student, head, latent_weight=0, pixel_weight=0, reward_cap=0.5)


def test_what_is_held_out_must_be_rewarded_in_part(base: Path, student: Path, head: Path) -> None:
    """Else no checkpoint is the best, and the gate has nothing to go by."""
    with pytest.raises(InputError, match="held_out: got the sources edit, none of them rewarded"):
        stage_of("refl", base, student, head, rewarded=["t2i"], held_out=only("edit"), held_out_groups=1)


@pytest.mark.parametrize("source", ["t2i", "edit"])
def test_the_base_is_asked_about_the_picture(source: str, base: Path) -> None:
    """The reward against each question by itself, through the model's own understanding of uint8 pictures."""
    data = only(source)
    data["sources"] = {source: data["sources"][source] | {"checks": 3}}
    stage: Any = make(cfg, base, data=data)
    samples = stage.loader.next_group().samples
    pictures = [next(item.pixels for item in sample if isinstance(item, VaeImage) and item.loss) for sample in samples]
    reward_of = AnswerReward(stage.base, stage.spec, stage.tokenizer)
    pixels = torch.stack([to_tensor(p) for p in pictures]).requires_grad_()
    found = reward_of(pixels, samples)
    for i, sample in enumerate(samples):
        told = []
        for question, answer in checks_behind(sample):
            nothing = torch.Generator().manual_seed(0)
            alone = pack(
                [[VitImage(pictures[i]), question, answer]], stage.spec, encode=lambda x: x, generator=nothing, device=stage.device
            )
            told.append(-stage.base.forward_train(alone).ce.sum())
        assert 1 <= len(told) <= 3
        torch.testing.assert_close(found[i], torch.stack(told).mean(), rtol=1e-4, atol=1e-4)
    found[0].backward()
    assert pixels.grad is not None and pixels.grad[0].abs().sum() > 0 and pixels.grad[1:].abs().max() == 0
    without = [sample[: sample.index(checks_behind(sample)[0][0])] for sample in samples]
    with pytest.raises(InputError, match="checks"):
        reward_of(pixels, without)
    general = AnswerReward(stage.base, stage.spec, stage.tokenizer, 'does this show "{prompt}"?', "yes")(pixels, without)
    for i, sample in enumerate(without):
        given = [item for item in sample if isinstance(item, VitImage)]
        asked = Text(stage.tokenizer.encode(f'does this show "{prompt_text(sample, stage.tokenizer)}"?'))
        plan = [*given, VitImage(pictures[i]), asked, Text(stage.tokenizer.encode("yes"), loss=True)]
        alone = pack([plan], stage.spec, encode=lambda x: x, generator=torch.Generator().manual_seed(0), device=stage.device)
        assert len(given) == (source == "edit")
        torch.testing.assert_close(general[i], -stage.base.forward_train(alone).ce.sum(), rtol=1e-4, atol=1e-4)


def test_feedback_by_answers_learns(base: Path, student: Path, head: Path) -> None:
    data = only("t2i")
    data["sources"] = {"t2i": data["sources"]["t2i"] | {"checks": 2}}
    keys: dict[str, Any] = {"latent_weight": 0, "pixel_weight": 0, "nfe": 2, "gradient_steps": 2, "huber_weight": 0.01, "ceiling": 0.0}
    stage: Any = stage_of("refl", base, student, head, data=data, reward_kind="answers", **keys)
    batch = stage.batch(0, Draws.at(0))
    optimizer = torch.optim.AdamW(stage.student.parameters(), lr=3e-3)
    rewards = []
    for step in range(25):
        loss, metrics = stage.loss("student", batch, step)
        rewards.append(metrics["t2i_reward"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert rewards[-1] > rewards[0] + 0.02, rewards


@pytest.mark.parametrize("cap", [0.5, 1e9])
def test_a_reward_beside_distribution_matching(cap: float, base: Path, student: Path, head: Path) -> None:
    """The student's gradient is matching's plus the reward's, written out; of no row is the reward's longer than `cap` times the other."""
    data = only("t2i")
    data["sources"] = {"t2i": data["sources"]["t2i"] | {"checks": 2}}
    keys: dict[str, Any] = {"nfe": 1, "rewarded": ["t2i"], "reward_kind": "answers", "ceiling": 0.0, "reward_cap": cap}
    stage: Any = stage_of("dmdo", base, student, head, data=data, **keys)
    with torch.no_grad():  # the fake model must leave the real one before there is anything to match
        for parameter in stage.players["fake"].parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = stage.batch(0, Draws.at(0))
    t, own = batch.trajectory, list(stage.players["student"].parameters.values())

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(own, found, strict=True)])

    loss, metrics = stage.loss("student", batch, 0)
    reward, stage.reward = stage.reward, None
    alone, plain = stage.loss("student", batch, 0)
    x0 = t.states[0] - student_velocity(stage.network, t.conditions, t.scales, t.states[0], torch.ones(len(batch.tau)))
    lack = torch.relu(0.0 - reward(stage.decode(x0, t.conditions), t.conditions.samples))
    pulls = torch.autograd.grad(lack.mean(), x0, retain_graph=True)[0].flatten(1).norm(dim=1)
    with torch.no_grad():
        x_tau = stage.coupled(batch, x0, x0).x_tau
        fake, real = (x0_from_velocity(x_tau, v, batch.tau[:, None, None]) for v in velocities(stage, batch, x_tau))
        matching = dmd_gradient(x0, fake, real, stage.recipe.normaliser_floor).flatten(1).norm(dim=1) / x0.numel()
    weights = (cap * matching / pulls).clamp(max=1.0)
    assert "t2i_reward" not in plain and metrics["t2i_reward_weight"] == pytest.approx(weights.mean().item(), rel=1e-3)
    pulled = gradient((weights * lack).mean())
    assert pulled.norm() > 1e-3 * gradient(alone).norm() > 0
    torch.testing.assert_close(gradient(loss), gradient(alone) + pulled, rtol=1e-3, atol=1e-5 * float(pulled.norm()))
    torch.testing.assert_close(loss.detach(), (alone + lack.mean()).detach())
    assert (weights < 1).any() == (cap < 1)
    stage.reward, stage.recipe.reward_samples = reward, 1  # one row is rewarded, and the weight that is told is that row's
    _, metrics = stage.loss("student", batch, 0)
    along = torch.autograd.grad(lack[0], x0, retain_graph=True)[0].norm()
    assert metrics["t2i_reward_weight"] == pytest.approx((cap * matching[0] / along).clamp(max=1.0).item(), rel=1e-3)
    stage.recipe.ceiling = -1e6  # beyond which no row pulls
    assert stage.loss("student", batch, 0)[1]["t2i_reward_weight"] == 1


def velocities(stage: Any, batch: Any, x_tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the fake and of the real model."""
    t = batch.trajectory
    return student_velocity(stage.fake, t.conditions, t.scales, x_tau, batch.tau), stage.real(t, x_tau, batch.tau)


def test_a_held_source_is_not_rewarded(base: Path) -> None:
    with pytest.raises(InputError, match="rewarded names 'edit', which is held"):
        settings(dmdo, base, held=["edit"], rewarded=["edit"])
    with pytest.raises(InputError, match="rewarded: got 'edits'"):
        settings(dmdo, base, rewarded=["edits"])
    with pytest.raises(InputError, match="reward_kind is of a reward, and rewarded names no source"):
        settings(dmdo, base, reward_kind="answers")
    assert settings(dmdo, base, reward_kind="preferences").rewarded == []  # the default, as a run's own config.yaml says it


@pytest.mark.parametrize("name", ["cfg", "dmdo", "adp"])
def test_answers_can_be_the_measure(name: str, base: Path, student: Path, head: Path) -> None:
    """Of the best checkpoint and so of the gate; against the reward of each picture, from the student's sampler."""
    held_out = only("t2i")
    held_out["sources"] = {"t2i": held_out["sources"]["t2i"] | {"checks": 2}}
    keys: dict[str, Any] = {"measure": "answers", "held_out_groups": 1, "teacher_steps": 1}
    stage: Any = stage_of(name, base, student, head, held_out=held_out, **keys)
    with torch.no_grad():
        figures = stage.evaluate(0)
        m = stage.measured[0]
        reward_of = AnswerReward(stage.base, stage.spec, stage.tokenizer)
        told = [reward_of(stage.decode(x, m.conditions), m.conditions.samples).exp() for x in stage.pictures(m.conditions, m.noises)]
    assert stage.best_metric == "answers" and 0 < figures["answers"] <= 1
    assert figures["answers"] == figures["t2i_answers"] == pytest.approx(torch.stack(told).mean().item(), rel=1e-5)
    stage = stage_of(name, base, student, head, held_out=only("t2i"), **keys)
    with pytest.raises(InputError, match="checks"), torch.no_grad():
        stage.evaluate(0)


def test_a_reward_of_ones_own(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text(
        "def build(folder, device):\n    return lambda pixels, prompts: pixels.mean((1, 2, 3)) + sum(map(len, prompts))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stage: Any = make(cfg, base, data=only("t2i"))
    found = foreign_reward("my_reward:build", None, torch.device("cpu"), stage.tokenizer)
    assert found(torch.zeros(3, 3, 8, 8), stage.loader.next_group().samples).min() > 3
    with pytest.raises(InputError, match="reward_entry"):
        foreign_reward("no_such_module:build", None, torch.device("cpu"), stage.tokenizer)


def test_a_recipe_can_name_a_reward_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reward_kind: vlm`: it is asked about the pictures with what was asked for, in words."""
    asked: list[tuple[Any, list[str]]] = []
    opened: list[Any] = []

    def score(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        asked.append((pixels, prompts))
        return pixels.mean(dim=(1, 2, 3))

    monkeypatch.setattr("hyperbagel.train.rewards.open_vlm", lambda *given: opened.append(given) or score)
    stage: Any = make(cfg, base, data=only("t2i"))
    chosen = RewardSettings(reward_kind="vlm", reward=Path("somewhere"))
    found = open_reward(chosen, stage.base, stage.spec, stage.tokenizer)
    samples, pixels = stage.loader.next_group().samples, torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(found(pixels, samples), pixels.mean(dim=(1, 2, 3)))
    assert opened == [(Path("somewhere"), torch.device("cpu"))] and asked[0][1] == [prompt_text(s, stage.tokenizer) for s in samples]
