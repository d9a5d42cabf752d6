"""Drawing with a student: the model's contexts, one evaluation a step, its own sampler, and understanding untouched."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import small_parts

from hyperbagel.core.errors import InputError
from hyperbagel.generate.image import denoise
from hyperbagel.generate.mask import Kept
from hyperbagel.generate.session import Session
from hyperbagel.generate.students import Students
from hyperbagel.generate.types import ImageRequest, with_sampler
from hyperbagel.model.student import Sampler, Student, generation_modules, make_adapter, save_student
from hyperbagel.pipeline import HyperBagel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HyperBagel:
    """A model with two students beside it: "6", changed at random, and "plain", which says what the model says."""
    parts = small_parts()
    bagel = parts.model
    folder = tmp_path_factory.mktemp("students")
    plain = Student.fresh(bagel, make_adapter(bagel, "lora", rank=4), Sampler(nfe=3))
    save_student(folder / "plain", plain, bagel)
    changed = Student.fresh(bagel, make_adapter(bagel, "lora", rank=4), Sampler(nfe=6))
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    save_student(folder / "6", changed, bagel)
    return HyperBagel(parts, "test", students=folder)


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_one_evaluation_a_step(model: HyperBagel) -> None:
    assert model.generate("a car", seed=0, student="6")[0].nfe == 6
    assert model.edit(photo(), "x", seed=0, student="6")[0].nfe == 6
    result = model.generate("a car", seed=0, student="plain")[0]
    assert result.nfe == 3 and result.settings["student"] == "plain" and result.settings["shift"] == 3.0


def test_an_untrained_student_draws_what_the_model_draws_without_guidance(model: HyperBagel) -> None:
    for request in (ImageRequest("a red car", seed=1), ImageRequest("make it red", (photo(),), seed=2)):
        draw = {"seed": request.seed, "steps": 3, "shift": 3.0}
        mine = model._pictures(ImageRequest(request.prompt, request.images, student="plain"), 1, request.seed, None)[0]
        plain = model._pictures(ImageRequest(request.prompt, request.images, text_scale=1.0, **draw), 1, request.seed, None)[0]
        assert np.abs(pixels(mine.image) - pixels(plain.image)).max() <= 1


def test_factors_draw_what_merged_matrices_draw_and_hold_less(model: HyperBagel) -> None:
    """As on a GPU, where a merged student would take as much memory as the expert that it changes."""
    base = model.parts.model
    merged, factors = (Students(base, model.students.folder, merged=how).get("6").network.model for how in (True, False))
    shared = {tensor.data_ptr() for tensor in base.state_dict().values()}
    own = [sum(t.nbytes for t in m.state_dict().values() if t.data_ptr() not in shared) for m in (merged, factors)]
    assert own[1] < own[0] - sum(base.get_submodule(n).weight.nbytes for n in generation_modules(base)[0]) / 2
    alone = HyperBagel(model.parts, "factors", students=model.students.folder)
    alone.students.merged = False
    for request in (ImageRequest("a red car", seed=1, student="6"), ImageRequest("make it red", (photo(),), seed=2, student="6")):
        a, b = (one.generate_batch([request])[0].image for one in (model, alone))
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


def test_scales_steer_a_student(model: HyperBagel) -> None:
    weak, strong = (model.generate("a car", seed=0, student="6", text_scale=s)[0] for s in (1.5, 4.5))
    assert not np.array_equal(pixels(weak.image), pixels(strong.image))
    near, far = (model.edit(photo(), "a car", seed=0, student="6", image_scale=s)[0] for s in (1.0, 2.5))
    assert not np.array_equal(pixels(near.image), pixels(far.image))


def test_understanding_and_the_models_own_pictures_stay_bit_for_bit(model: HyperBagel) -> None:
    alone = HyperBagel(model.parts, "alone")
    before = alone.ask("what is it?", photo(), max_tokens=8).text, pixels(alone.generate("a car", seed=0, steps=2)[0].image)
    state = {name: value.clone() for name, value in model.parts.model.state_dict().items()}
    mixed = [
        ImageRequest("a car", seed=0, steps=2),
        ImageRequest("a car", seed=0, student="6"),
        ImageRequest("a car", seed=0, steps=2, student="none"),
    ]
    first, drawn, last = model.generate_batch(mixed)
    assert np.array_equal(pixels(first.image), before[1]) and np.array_equal(pixels(last.image), before[1])
    assert not np.array_equal(pixels(drawn.image), before[1])
    assert model.ask("what is it?", photo(), max_tokens=8).text == before[0]
    assert list(state) == list(model.parts.model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.parts.model.state_dict().items())


def test_batches_of_students_equal_single_ones(model: HyperBagel) -> None:
    requests = [
        ImageRequest("a car", seed=0, student="6", size=(16, 16)),
        ImageRequest("two blue boats", seed=1, student="6", size=(24, 12)),
        ImageRequest("swap them", (photo(),), seed=2, student="6"),
    ]
    for request, result in zip(requests, model.generate_batch(requests), strict=True):
        assert np.abs(pixels(result.image) - pixels(model.generate_batch([request])[0].image)).max() <= 1


@pytest.mark.parametrize("kind", ["draw", "edit", "two texts", "masked"])
@torch.inference_mode()
def test_a_text_that_the_first_evaluation_reads_along_is_the_text_read_before(model: HyperBagel, kind: str) -> None:
    """A forward less, and the same latents; the session is left as it was, for whoever reads it next."""
    parts, network = model.parts, model.students.get("6").network
    noise = torch.randn(12, parts.model.config.latent_channels, generator=torch.Generator().manual_seed(5))
    settings = with_sampler(ImageRequest("x", student="6"), model.students.get("6").sampler)
    kept = (
        [Kept(torch.arange(12) % 3 == 0, torch.randn(noise.shape, generator=torch.Generator().manual_seed(6)))] if kind == "masked" else []
    )
    forwards: list[int] = []
    watched = parts.model.language_model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))

    def session(later: bool) -> Session:
        made = Session.new(parts)
        if kind == "two texts":
            made.add_text("a small one", later=later)
        if kind != "draw":
            made.add_image(photo(), latents=True)
        made.add_text("paint the big one green", later=later)
        return made

    found = []
    try:
        for later in (False, True):
            forwards.clear()
            one = session(later)
            before = list(one.cache.lengths), one.position, list(one.waiting)
            assert bool(one.waiting) is later
            latents = [denoise([one], [(3, 4)], [noise], settings, student=network, kept=kept)[0][0] for _ in range(2)]
            assert torch.equal(*latents) and before == (one.cache.lengths, one.position, one.waiting)
            made = len(forwards)
            one.settle()
            found.append((latents[0], made, one.cache.lengths, one.position, one.dropped, one.cache.k[-1]))
    finally:
        watched.remove()
    (want, most, *state, keys), (got, fewer, *mine, own) = found
    assert want.std() > 0.1 and fewer == most - 1 and state == mine
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(own[:, :, : mine[0][0]], keys[:, :, : state[0][0]])


@torch.inference_mode()
def test_several_requests_and_graphs_read_their_texts_first(model: HyperBagel) -> None:
    network, settings = model.students.get("6").network, with_sampler(ImageRequest("x", student="6"), model.students.get("6").sampler)
    noises = [torch.randn(12, model.parts.model.config.latent_channels, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def sessions(later: bool) -> list[Session]:
        made = [Session.new(model.parts) for _ in range(2)]
        for one, text in zip(made, ("a car", "two big blue boats"), strict=True):
            one.add_text(text, later=later)
        return made

    want, _ = denoise(sessions(False), [(3, 4)] * 2, noises, settings, student=network)
    both = sessions(True)
    got, _ = denoise(both, [(3, 4)] * 2, noises, settings, student=network)
    assert not any(one.waiting for one in both)
    torch.testing.assert_close(got, want)
    alone = sessions(True)[:1]
    fixed, _ = denoise(alone, [(3, 4)], noises[:1], settings, student=network, graphs=True)
    assert not alone[0].waiting
    torch.testing.assert_close(fixed[0], want[0], atol=2e-5, rtol=1e-5)


def test_the_sampler_travels_with_the_weights_and_overrides_warn() -> None:
    sampler = Sampler(nfe=1, shift=2.0, text_scale=3.0, edit_text_scale=3.5, edit_image_scale=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = with_sampler(ImageRequest("x", student="1"), sampler)
        edited = with_sampler(ImageRequest("x", (photo(),), student="1", text_scale=5.0, image_scale=1.0), sampler)
    assert (drawn.num_steps, drawn.shift, drawn.text_scale, drawn.image_scale) == (1, 2.0, 3.0, 1.0)
    assert (edited.text_scale, edited.image_scale) == (5.0, 1.0)
    for change, told in (({"steps": 4}, "made for 1"), ({"shift": 1.0}, "made for 2"), ({"text_scale": 7.0}, "made for 1 to 5")):
        with pytest.warns(UserWarning, match=told):
            with_sampler(ImageRequest("x", student="1", **change), sampler)
    with pytest.warns(UserWarning, match="renorm ignored"):
        with_sampler(ImageRequest("x", student="1", renorm="channel"), sampler)


def test_a_plan_is_told_as_it_is_written(model: HyperBagel) -> None:
    requests = [ImageRequest("a car", seed=0, steps=1), ImageRequest("a car", seed=0, steps=1, think=True, max_think_tokens=5)]
    told: list[tuple[int, int]] = []
    plain, planned = model.generate_batch(requests, on_token=lambda row, token: told.append((row, token)))
    assert plain.thinking is None and {row for row, _ in told} == {1}
    assert model.parts.tokenizer.decode([token for _, token in told]) == planned.thinking


@pytest.mark.filterwarnings("ignore:the plan was cut")
def test_a_lone_request_s_plan_is_read_by_the_first_evaluation(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another request it is read before; the pictures are the same."""
    waiting: list[bool] = []

    def watched(sessions: list[Session], *args: object, **more: object) -> object:
        waiting.extend(bool(session.waiting) for session in sessions)
        return denoise(sessions, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("hyperbagel.pipeline.denoise", watched)
    asked = [ImageRequest("make it red", (photo(),), seed=s, student="6", think=True, max_think_tokens=6) for s in (1, 2)]
    together, alone = model.generate_batch(asked), [model.generate_batch([one])[0] for one in asked]
    assert waiting == [False, False, True, True]
    for a, b in zip(together, alone, strict=True):
        assert a.thinking == b.thinking and np.abs(pixels(a.image) - pixels(b.image)).max() <= 1


def test_a_student_that_is_not_there(model: HyperBagel) -> None:
    with pytest.raises(InputError, match="6, plain, none"):
        model.generate("a car", seed=0, student="2")
