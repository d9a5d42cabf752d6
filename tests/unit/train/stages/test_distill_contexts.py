"""Conditions of a distillation batch: the same contexts, branches and velocities as generation's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_base import make, only, write_base

from hyperbagel.core.errors import InputError
from hyperbagel.data.plan import Text, VaeImage
from hyperbagel.flow.schedule import shift_time
from hyperbagel.flow.solvers import euler
from hyperbagel.generate.image import GuidedVelocity
from hyperbagel.generate.session import Parts, Session
from hyperbagel.generate.types import EDIT, TEXT_TO_IMAGE
from hyperbagel.train.contexts import Scales, make_conditions, split_sample, student_velocity, teacher_velocity, velocity
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import cfg


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


def conditions_of(stage: cfg.CfgStage, source: str):
    """Conditions whose clean latents are posterior means, as a session without a generator takes them."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        side = stage.vae.config.downsample
        eps = torch.zeros(len(pixels), stage.vae.config.z_channels, pixels.shape[2] // side, pixels.shape[3] // side)
        return stage.vae.encode(pixels, eps)

    group = stage.loader.next_group()
    rng = torch.Generator().manual_seed(0)
    return make_conditions(stage.base, source, group.samples, stage.spec, encode, rng, stage.markers), group.samples


@pytest.mark.parametrize("source", ["t2i", "edit"])
@torch.no_grad()
def test_teacher_velocity_equals_generations_own(base: Path, source: str) -> None:
    stage = make(cfg, base, data=only(source))
    conditions, samples = conditions_of(stage, source)
    parts = Parts.load(base)
    settings = replace(EDIT if source == "edit" else TEXT_TO_IMAGE, text_scale=3.0, image_scale=1.5 if source == "edit" else 1.0)
    sessions = []
    for sample in samples:
        before, _, prompt = split_sample(sample)
        session = Session.new(parts)
        for item in before:
            if isinstance(item, VaeImage):
                session.add_image(Image.fromarray(np.asarray(item.pixels)), latents=True)
        session.add_text(parts.tokenizer.decode(list(before[prompt].ids)))
        sessions.append(session)
    x = torch.randn(conditions.x0.shape, generator=torch.Generator().manual_seed(1))
    n = len(conditions)
    scales = Scales(torch.full((n,), settings.text_scale), torch.full((n,), settings.image_scale))
    for t in (0.9, 0.3):  # inside and, for captions, outside the interval
        mine = teacher_velocity(stage.base, conditions, scales, x, torch.full((n,), t), settings)
        theirs = GuidedVelocity(sessions, [conditions.grid] * n, settings)(x, t)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert conditions.is_edit == (source == "edit") and len(conditions.branches_dropped) == 1 + conditions.is_edit


@torch.no_grad()
def test_a_fresh_student_is_the_base_and_contexts_stay_untouched(base: Path) -> None:
    stage = make(cfg, base, data=only("edit"))
    conditions, _ = conditions_of(stage, "edit")
    before = [k.clone() for k in conditions.full.k]
    x, t = torch.randn(conditions.x0.shape), torch.tensor([0.2, 0.5, 1.0])
    plain = velocity(stage.base, conditions.full, conditions, x, t)
    scales = Scales(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 2.0, 2.5]))
    assert torch.equal(student_velocity(stage.network, conditions, scales, x, t), plain)
    assert all(torch.equal(a, b) for a, b in zip(before, conditions.full.k, strict=True))


def test_a_dropped_text_is_not_seen(base: Path) -> None:
    stage = make(cfg, base, data=only("t2i"))
    conditions, samples = conditions_of(stage, "t2i")
    assert not conditions.text_dropped.seen.any() and (conditions.text_dropped.position == 0).all()
    lengths = [len(sample[0].ids) + 2 for sample in samples]
    assert conditions.full.seen.sum(1).tolist() == lengths == conditions.full.position.tolist()


@pytest.mark.parametrize("source", ["t2i", "edit"])
@torch.no_grad()
def test_one_sample_alone_needs_no_mask(base: Path, source: str) -> None:
    """As at 7B, where pictures of unlike sizes make batches of one: no slot is empty, and fused attention is fastest without a mask."""
    data = only(source)
    data["sources"][source] = data["sources"][source] | {"samples": 1, "noise_copies": 2}
    stage = make(cfg, base, data=data)
    conditions, _ = conditions_of(stage, source)
    assert conditions.full.whole and conditions.image_dropped.whole and not conditions.text_dropped.whole
    x, t = torch.randn(conditions.x0.shape), torch.tensor([0.3, 0.8])
    masked = velocity(stage.base, replace(conditions.full, whole=False), conditions, x, t)
    torch.testing.assert_close(velocity(stage.base, conditions.full, conditions, x, t), masked, rtol=1e-4, atol=1e-5)
    several = make(cfg, base, data=only(source))
    assert not conditions_of(several, source)[0].full.whole


@torch.no_grad()
def test_one_prefill_serves_several_noise_draws(base: Path) -> None:
    copies = {
        "sources": {"edit": {"task": "edit", "samples": 2, "resolution": 32, "noise_copies": 3}},
        "mixture": [{"weights": {"edit": 1}}],
    }
    stage, plain = make(cfg, base, data=copies), make(cfg, base, data=only("edit"))
    many, _ = conditions_of(stage, "edit")
    assert len(many) == 6 == len(many.samples) and many.full.k[0].shape[0] == 6
    single, _ = conditions_of(plain, "edit")
    x = torch.randn(1, *many.x0.shape[1:], generator=torch.Generator().manual_seed(2)).expand(6, -1, -1)
    n = Scales(torch.full((6,), 3.0), torch.full((6,), 1.5))
    v = teacher_velocity(stage.base, many, n, x, torch.full((6,), 0.5), EDIT)
    one = Scales(n.text[:3], n.image[:3])
    expected = teacher_velocity(plain.base, single, one, x[:3], torch.full((3,), 0.5), EDIT)
    for row, sample in enumerate((0, 0, 0, 1, 1, 1)):
        torch.testing.assert_close(v[row], expected[sample], rtol=1e-4, atol=1e-5)
    assert torch.equal(many.x0[0], many.x0[2]) and not torch.equal(many.x0[2], many.x0[3])


def test_samples_that_cannot_be_distilled(base: Path) -> None:
    with pytest.raises(InputError, match="t2i and edit"):
        split_sample([Text([1, 2], enable_cfg=True)])
    stage = make(cfg, base, data={**only("t2i"), "mixture": [{"weights": {"t2i": 1}}]})
    samples = stage.loader.next_group().samples
    small = np.zeros((16, 16, 3), np.uint8)
    samples[0] = [*samples[0][:-1], VaeImage(small, loss=True)]
    with pytest.raises(InputError, match="different sizes"):
        stage._conditions("t2i", samples, Draws.at(0))


@torch.no_grad()
def test_trained_times_have_a_shift_of_their_own(base: Path) -> None:
    """The same draws, as the sampler's shift of 3 has them and as they are: t = s u / (1 + (s - 1) u)."""
    shifted, plain = (make(cfg, base, data=only("t2i"), shift=3.0, **more).prepare(0, Draws.at(0, 0)) for more in ({}, {"time_shift": 1.0}))
    torch.testing.assert_close(shifted.t, 3 * plain.t / (1 + 2 * plain.t))
    assert torch.equal(shifted.conditions.x0, plain.conditions.x0)


@pytest.mark.parametrize("source", ["t2i", "edit"])
@torch.no_grad()
def test_several_scales_share_the_teachers_evaluations(base: Path, source: str) -> None:
    """Each state under three pairs of scales: the targets of three calls, at the price of one."""
    stage: Any = make(cfg, base, data=only(source), scale_draws=3)
    conditions, _ = conditions_of(stage, source)
    n, rng, before = len(conditions), Draws.at(0, 0), stage.base.velocity
    first = stage.scales(conditions, rng)
    x = torch.randn(conditions.x0.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.6, 0.3])[:n]
    calls = []
    stage.base.velocity = lambda g: (calls.append(len(g)), before(g))[1]
    prepared = stage.guided(conditions, first, x, t, rng)
    del stage.base.velocity
    assert calls == [n] * (1 + len(conditions.branches_dropped))
    assert len(prepared.conditions) == len(prepared.t) == len(prepared.target) == 3 * n
    assert torch.equal(prepared.scales.text[::3], first.text) and len(set(prepared.scales.text.tolist())) == 3 * n
    for draw in range(3):
        one = Scales(prepared.scales.text[draw::3], prepared.scales.image[draw::3])
        assert torch.equal(prepared.x_t[draw::3], x) and torch.equal(prepared.t[draw::3], t)
        expected = teacher_velocity(stage.base, conditions, one, x, t, stage.settings(conditions))
        torch.testing.assert_close(prepared.target[draw::3], expected, rtol=1e-5, atol=1e-6)
        # rows and contexts belong together
        v = velocity(stage.base, prepared.conditions.full, prepared.conditions, prepared.x_t, prepared.t)
        torch.testing.assert_close(v[draw::3], velocity(stage.base, conditions.full, conditions, x, t), rtol=1e-5, atol=1e-6)
    dropped = velocity(stage.base, prepared.conditions.text_dropped, prepared.conditions, prepared.x_t, prepared.t)[::3]
    torch.testing.assert_close(dropped, velocity(stage.base, conditions.text_dropped, conditions, x, t), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_learned_is_none_of_the_guidance_for_the_base_and_all_of_it_for_the_teacher(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = make(cfg, base, data=only("edit"), held_out=only("edit"), held_out_groups=1, teacher_steps=2)
    assert stage.best_metric == "learned" and abs(stage.evaluate(0)["learned"]) < 1e-4  # a fresh student is the base
    (m,) = stage.measured
    teacher = stage.guided_teacher(m.conditions, stage.usual_scales(m.conditions))
    monkeypatch.setattr(stage, "as_velocity", lambda network, conditions, scales: teacher)
    figures = stage.evaluate(1)
    assert figures["learned"] == figures["edit_learned"] == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
def test_where_the_student_arrives_is_its_own_euler_path(base: Path) -> None:
    """Rows with one time: the solver's state at that time. At time 1 nothing has moved."""
    stage: Any = make(cfg, base, data=only("t2i"), on_policy=1.0, on_policy_steps=3)
    conditions, _ = conditions_of(stage, "t2i")
    n, scales = len(conditions), Scales(torch.full((len(conditions),), 3.0), torch.ones(len(conditions)))
    e = torch.randn(conditions.x0.shape, generator=torch.Generator().manual_seed(2))
    times = shift_time(torch.linspace(1, 0.4, 4), stage.recipe.shift)
    expected = euler(e, stage.as_velocity(stage.network, conditions, scales), times)
    torch.testing.assert_close(stage.reached(conditions, scales, e, times[-1].expand(n), 3), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(stage.reached(conditions, scales, e, torch.ones(n), 3), e)
    prepared = stage.prepare(0, Draws.at(0, 0))
    between = prepared.x_t - (1 - prepared.t)[:, None, None] * prepared.conditions.x0
    noise = between / prepared.t[:, None, None]  # what x_t would be made of, were it on the data's path
    assert (noise.std() - 1).abs() > 0.02 and prepared.target.isfinite().all()


@pytest.mark.parametrize("source", ["t2i", "edit"])
def test_some_rows_at_the_usual_scales(base: Path, source: str) -> None:
    """Both scales of a row together; the other rows as they would have been drawn."""
    found = {}
    for share in (0.0, 0.5, 1.0):
        stage: Any = make(cfg, base, usual_share=share, data=only(source))
        conditions = stage._conditions(source, stage.loader.next_group().samples * 40, Draws.at(0))
        found[share] = stage.scales(conditions, Draws.at(1))
    usual = torch.stack(list(vars(stage.usual_scales(conditions)).values()))
    drawn, half, whole = (torch.stack(list(vars(one).values())) for one in found.values())
    assert torch.equal(whole, usual) and not (drawn == usual).all(0).any()
    at_usual = (half == usual).all(0)
    assert torch.equal(half, torch.where(at_usual, usual, drawn)) and 0.3 < at_usual.float().mean() < 0.7


@pytest.mark.parametrize("source", ["t2i", "edit"])
def test_scales_are_drawn_from_the_papers_ranges(base: Path, source: str) -> None:
    """3.2.1: text 1 to 5; image 1 to 2.5, for edits alone."""
    stage: Any = make(cfg, base, data=only(source))
    conditions, _ = conditions_of(stage, source)
    drawn = [stage.scales(conditions, Draws.at(0, i)) for i in range(300)]
    text, image = (torch.cat([getattr(scales, name) for scales in drawn]) for name in ("text", "image"))
    assert 1 <= text.min() < 1.05 and 4.95 < text.max() <= 5 and abs(text.mean() - 3) < 0.15
    if source == "edit":
        assert 1 <= image.min() < 1.02 and 2.48 < image.max() <= 2.5 and abs(image.mean() - 1.75) < 0.06
        assert abs(torch.corrcoef(torch.stack([text, image]))[0, 1]) < 0.1
    else:
        assert (image == 1).all()
