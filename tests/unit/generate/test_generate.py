"""Sessions, denoising and decoding on a model of another shape than the golden one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import small_parts

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.data.images import to_rgb
from hyperbagel.data.prompts import THINK_DRAW
from hyperbagel.generate.image import GuidedVelocity, denoise, draw_noise
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import EDIT, TEXT_TO_IMAGE, AskRequest, ImageRequest
from hyperbagel.model.config import BagelOptions
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.thinking import write_plans


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "test")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


REQUESTS = [
    ImageRequest("a red car", seed=0, size=(16, 16), steps=4),
    ImageRequest("two blue boats and a green tree", seed=1, size=(24, 12), steps=4),
    ImageRequest("a star", (photo(30, 20),), seed=2, steps=4),
    ImageRequest("swap them", (photo(30, 20), photo(9, 31, 1)), seed=3, steps=4),
    ImageRequest("make it red", (photo(16, 32, 2),), seed=4, steps=4, interval=(0.4, 1.0), image_scale=1.5),
    ImageRequest("a lamp", seed=5, steps=3, text_scale=1.0),
]


def test_each_result_of_a_batch_equals_its_result_alone(model: HyperBagel) -> None:
    together = model.generate_batch(REQUESTS)
    for request, result in zip(REQUESTS, together, strict=True):
        alone = model.generate_batch([request])[0]
        assert result.image.size == alone.image.size and result.nfe == alone.nfe
        assert np.abs(pixels(result.image) - pixels(alone.image)).max() <= 1


def test_same_seed_same_picture_and_zero_is_a_seed(model: HyperBagel) -> None:
    first, again, other = (model.generate("a car", seed=s, steps=2)[0] for s in (0, 0, 1))
    assert np.array_equal(pixels(first.image), pixels(again.image)) and first.seed == 0
    assert not np.array_equal(pixels(first.image), pixels(other.image))
    many = model.generate("a car", n=2, seed=0, steps=2)
    assert [r.seed for r in many] == [0, 1] and np.abs(pixels(many[1].image) - pixels(other.image)).max() <= 1


def test_evaluations_are_counted(model: HyperBagel) -> None:
    assert model.generate("a car", seed=0, steps=50, interval=(0, 1))[0].nfe == 100
    edit = model.edit(photo(16, 16), "x", seed=0, steps=50, interval=(0.4, 1), image_scale=1.5)[0]
    assert edit.nfe == 132
    assert model.generate("a car", seed=0, steps=5, text_scale=1.0)[0].nfe == 5


def test_size_of_an_edit_is_the_last_images(model: HyperBagel) -> None:
    assert model.edit([photo(16, 16), photo(32, 16)], "x", seed=0, steps=1)[0].image.size == (32, 16)
    assert model.generate("x", seed=0, steps=1)[0].image.size == (16, 16)


def test_defaults_by_kind() -> None:
    assert ImageRequest("x").denoising() == TEXT_TO_IMAGE
    assert ImageRequest("x", (photo(8, 8),)).denoising() == EDIT
    assert ImageRequest("x", steps=7).denoising() == replace(TEXT_TO_IMAGE, num_steps=7)


def test_a_model_may_have_guidance_of_its_own(model: HyperBagel) -> None:
    """For requests that ask for none. Drawing: both branches at each of 8 steps, and at 7 with the usual 0.4 to 1."""
    parts = small_parts()
    own_guidance = {"text_to_image": {"interval": [0.0, 1.0]}, "edit": {"image_scale": 1.0, "text_scale": 3.0}}
    options = BagelOptions.model_validate(parts.model.config.options.model_dump() | own_guidance)
    parts.model.config = parts.model.config.model_copy(update={"options": options})
    own = HyperBagel(parts, "own")
    assert model.settings(ImageRequest("a car")).interval == (0.4, 1.0)
    assert own.settings(ImageRequest("a car")) == replace(TEXT_TO_IMAGE, interval=(0.0, 1.0))
    assert own.settings(ImageRequest("a car", interval=(0.2, 0.9))).interval == (0.2, 0.9)
    assert own.settings(ImageRequest("x", (photo(8, 8),))) == replace(EDIT, image_scale=1.0, text_scale=3.0)
    assert own.settings(ImageRequest("x", (photo(8, 8),), image_scale=1.5)) == replace(EDIT, image_scale=1.5, text_scale=3.0)
    assert [m.generate("a car", seed=0, steps=8)[0].nfe for m in (model, own)] == [15, 16]
    assert [m.edit(photo(16, 16), "x", seed=0, steps=8)[0].nfe for m in (model, own)] == [24, 16]


def test_a_model_that_was_not_trained_for_planned_edits_says_so(model: HyperBagel) -> None:
    parts = small_parts()
    options = parts.model.config.options.model_copy(update={"planned_edits": False})
    parts.model.config = parts.model.config.model_copy(update={"options": options})
    own, asked = HyperBagel(parts, "own"), {"seed": 0, "steps": 1, "max_think_tokens": 2}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", Notice)
        own.edit(photo(16, 16), "x", **asked, think=True)
        assert sum("got an edit with a plan" in str(one.message) for one in told) == 1
        told.clear()
        for mine, images, think in ((own, [photo(16, 16)], False), (own, [], True), (model, [photo(16, 16)], True)):
            mine.generate_batch([ImageRequest("x", tuple(images), **asked, think=think)])
        assert not any("got an edit" in str(one.message) for one in told)


def test_an_evaluation_count_is_a_pictures_own(model: HyperBagel) -> None:
    """Also beside a request of equal settings with more branches."""
    asked = {"seed": 0, "steps": 4, "interval": (0.0, 1.0), "image_scale": 2.0, "renorm": "global"}
    draw, edit = ImageRequest("a car", **asked), ImageRequest("x", (photo(16, 16),), **asked)  # type: ignore[arg-type]
    assert [r.nfe for r in model.generate_batch([draw, edit])] == [8, 12]


@pytest.mark.parametrize(("think", "low", "nfe"), [(False, 0.0, 6), (True, 0.0, 9), (True, 0.7, 7)])
def test_branches_in_turn_are_those_of_one_batch(model: HyperBagel, think: bool, low: float, nfe: int) -> None:
    """With a plan behind the prompt the image-dropped context is another one, without it the full one."""
    request = ImageRequest("a red car", seed=3, think=think, max_think_tokens=4, image_scale=2.0, steps=3, interval=(low, 1.0))
    found = []
    for in_turn in (False, True):
        ready = model._prepare(request)
        if think:
            model._think([request], [ready])
        grid = model.grid(request)
        noise = draw_noise(model.parts, grid, ready.generator)
        found.append(denoise([ready.session], [grid], [noise], model.settings(request), in_turn=in_turn))
    (batched, n), (turned, m) = found
    assert n == m == nfe
    torch.testing.assert_close(batched[0], turned[0], rtol=1e-4, atol=1e-4)


def test_a_plan_that_could_not_be_read_back_is_refused_before_it_is_written(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = model.parts.model.config.llm.max_position_embeddings
    probe = Session.new(model.parts)
    probe.add_text(THINK_DRAW)
    room = limit - probe.cache.lengths[0] - 2
    prompt = next(text for n in range(room, 0, -1) if len(model.parts.tokenizer.encode(text := "a " * n)) <= room - 7)
    monkeypatch.setattr("hyperbagel.speculative.thinking.decode", lambda *a, **k: pytest.fail("decoded"))
    left = room - len(model.parts.tokenizer.encode(prompt))
    monkeypatch.setattr(model, "_prepare", lambda *a, **k: pytest.fail("prefilled"))
    with pytest.raises(InputError, match=rf"max_think_tokens {left - 1} behind .* at most {left - 2} \({limit} in all\); lower"):
        model.generate(prompt, seed=0, steps=1, think=True, max_think_tokens=left - 1)
    monkeypatch.undo()  # a picture is counted once it is read
    monkeypatch.setattr("hyperbagel.speculative.thinking.decode", lambda *a, **k: pytest.fail("decoded"))
    most = room - len(model.parts.tokenizer.encode("a car")) - 2
    with pytest.raises(InputError, match=rf"max_think_tokens {most} behind .*; lower"):
        model.edit(Image.new("RGB", (16, 16)), "a car", seed=0, steps=1, think=True, max_think_tokens=most)


def test_a_plan_that_was_cut_is_told_and_one_unasked_takes_what_is_left(model: HyperBagel) -> None:
    with pytest.warns(Notice, match="the plan was cut at 3 tokens"):
        model.generate("a car", seed=0, steps=1, think=True, max_think_tokens=3)
    session = Session.new(model.parts)
    session.add_text("a " * 20)
    while session.room() > 40:  # far less than a plan's own limit
        session.add_text("a " * 20)
    left = session.room()
    told: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_plans([session], [None], on_token=lambda _, token: told.append(token))
    assert len(told) == left - 2 and 0 <= session.room() < left - 2
    with pytest.raises(InputError, match="max_think_tokens 0, expected at least 1"):
        model.generate("a car", seed=0, steps=1, think=True, max_think_tokens=0)


def test_settings_in_other_forms(model: HyperBagel, tmp_path: Path) -> None:
    """Paths for masks, lists for intervals, numbers and paths for students."""
    mask = Image.new("L", (16, 16), 255)
    mask.save(tmp_path / "m.png")
    a, b = (model.edit(photo(16, 16), "x", seed=0, steps=1, mask=m)[0].image for m in (mask, tmp_path / "m.png"))
    assert np.array_equal(np.asarray(a), np.asarray(b))
    assert model.generate("x", seed=0, steps=2, interval=[0.0, 1.0])[0].nfe == 4
    with pytest.raises(InputError, match="student"):
        model.generate("x", seed=0, student=6)


def test_an_image_scale_that_nothing_comes_of_is_told(model: HyperBagel) -> None:
    with pytest.warns(Notice, match="image_scale 2.5 with text_scale 1, which switches guidance off"):
        model.edit(photo(16, 16), "x", seed=0, steps=1, text_scale=1.0, image_scale=2.5)


def test_a_shift_that_lets_times_fall_together_is_refused(model: HyperBagel) -> None:
    with pytest.raises(InputError, match="got shift 1e-08, expected"):
        model.generate("x", seed=0, steps=2, shift=1e-8)


@pytest.mark.parametrize("name", ["hpu", "privateuseone", "nothing:9"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="try --device cpu"):
        HyperBagel.from_pretrained("toybox", device=name)


def test_fork_leaves_its_parent_alone(model: HyperBagel) -> None:
    with torch.inference_mode():
        parent = Session.new(model.parts)
        parent.add_text("a red car")
        state = parent.cache.lengths[0], parent.position, parent.dropped, [k.clone() for k in parent.cache.k]
        child = parent.fork()
        child.add_image(photo(20, 20), latents=True)
        child.add_text("more")
    assert (parent.cache.lengths[0], parent.position, parent.dropped) == state[:3] and len(parent.texts) == 1
    assert all(torch.equal(a[:, :, : state[0]], b[:, :, : state[0]]) for a, b in zip(parent.cache.k, state[3], strict=True))
    assert child.cache.lengths[0] > state[0]


@torch.inference_mode()
def test_blocks_of_a_picture_share_a_forward_and_nothing_changes(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind other text and another picture: one forward a picture in place of two, the same keys, the same velocity."""
    calls: list[int] = []
    backbone = model.parts.model.backbone
    monkeypatch.setattr(model.parts.model, "backbone", lambda x, where, **how: (calls.append(where.shape[1]), backbone(x, where, **how))[1])

    def session() -> Session:
        s = Session.new(model.parts)
        s.add_text("first this")
        for i in range(2):
            s.add_image(photo(20, 20 + 10 * i, i), latents=True, generator=torch.Generator().manual_seed(i))
        s.add_text("swap them")
        return s

    together, forwards = session(), len(calls)
    monkeypatch.setattr("hyperbagel.generate.session._SHARED_FORWARD", 0)
    apart = session()
    assert (forwards, len(calls) - forwards) == (4, 6) and sum(calls[:4]) == sum(calls[4:])
    assert (together.position, together.dropped, together.cache.lengths) == (apart.position, apart.dropped, apart.cache.lengths)
    for a, b in zip(together.cache.k, apart.cache.k, strict=True):  # the same keys, those of a picture in another order
        a, b = (x[0, :, : apart.cache.lengths[0]].transpose(0, 1).flatten(1) for x in (a, b))
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(dim=0).values.max() < 1e-4 and distance.min(dim=1).values.max() < 1e-4
    x = torch.randn(1, 4, model.parts.model.config.latent_channels, generator=torch.Generator().manual_seed(3))
    v = [GuidedVelocity([s], [(2, 2)], replace(EDIT, image_scale=1.5))(x, 0.7) for s in (together, apart)]
    torch.testing.assert_close(v[0], v[1], atol=1e-5, rtol=1e-4)


def test_a_picture_says_all_that_it_was_asked_for(model: HyperBagel) -> None:
    """Else two pictures that differ would carry the same settings."""
    plain = model.generate("a car", seed=0, steps=1)[0].settings
    assert plain["dtype"] == "float32" and "inputs" not in plain and "max_think_tokens" not in plain
    with pytest.warns(Notice, match="cut"):
        planned = model.generate("a car", seed=0, steps=1, think=True, max_think_tokens=3)[0]
    assert planned.settings["max_think_tokens"] == 3
    assert planned.thinking is not None and "<think>" not in planned.thinking
    given = ("you draw well", photo(24, 16), "make it red")
    [mixed] = model.generate_batch([ImageRequest("make it red", seed=0, steps=1, inputs=given)])
    assert mixed.settings["inputs"] == ["you draw well", "<picture>", "make it red"] and mixed.settings["pictures"] == 1


def test_cancel_from_a_step(model: HyperBagel) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, x: torch.Tensor) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        model.generate("a car", seed=0, steps=5, on_step=stop)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate("  "), "empty prompt"),
        (lambda m: m.generate("x", size=(15, 16)), "multiples of 4; the nearest is 16x16"),
        (lambda m: m.generate("x", size=(1024, 16)), "at most 48 a side"),
        (lambda m: m.generate("x", steps=0), "expected 1 to 10000"),
        (lambda m: m.generate("x", n=0), "at least 1 picture"),
        (lambda m: m.generate("x", seed=-1), "got seed -1"),
        (lambda m: m.ask("x", seed=2**63), "expected 0 to"),
        (lambda m: m.generate("car " * 500), "expected at most 400"),
        (lambda m: m.generate("x", renorm="odd"), "expected one of"),
        (lambda m: m.generate("x", interval=(0.8, 0.2)), "interval"),
        (lambda m: m.generate("x", text_scale=-1.0), "text_scale"),
        (lambda m: m.edit([], "x"), "no image"),
        (lambda m: m.ask(""), "empty question"),
        (lambda m: m.ask("x", max_tokens=0), "max_tokens"),
        (lambda m: m.ask("x", max_tokens=5000), r"400 in all.*lower max_tokens"),
        (lambda m: m.ask("x", temperature=-1.0), "temperature"),
        (lambda m: HyperBagel.from_pretrained("/nowhere"), "got no folder"),
        (lambda m: HyperBagel.from_pretrained("toybox", device="warp"), "device"),
        (lambda m: HyperBagel.from_pretrained("toybox", device="cpu", attention="flash"), "flash"),
        (lambda m: HyperBagel.from_pretrained("toybox", device="cpu", attention="odd"), "expected one of sdpa"),
    ],
)  # fmt: skip
def test_refused_before_work_starts(model: HyperBagel, call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(model)


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK"])
def test_pictures_of_any_mode_and_paths(model: HyperBagel, tmp_path: Path, mode: str) -> None:
    given = photo(30, 20).convert(mode)
    want = model.edit(to_rgb(given), "make it red", seed=0, steps=2)[0]
    given.save(tmp_path / "a.tiff")
    for one in (given, tmp_path / "a.tiff", [str(tmp_path / "a.tiff")]):
        got = model.edit(one, "make it red", seed=0, steps=2)[0]
        assert np.array_equal(pixels(got.image), pixels(want.image)) and got.settings["pictures"] == 1
    assert model.ask("what is it?", given, max_tokens=3).text == model.ask("what is it?", to_rgb(given), max_tokens=3).text


def test_a_picture_that_is_not_finite_is_an_error_and_not_a_black_one() -> None:
    parts = small_parts()
    with torch.no_grad():
        parts.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        HyperBagel(parts, "broken").generate("a car", seed=0, steps=2)


@torch.inference_mode()
def test_a_small_picture_beside_a_large_one_has_the_velocity_it_has_alone(model: HyperBagel) -> None:
    """Also where guidance takes its norm over the whole picture: what pads the small one is no part of it."""
    sessions = [Session.new(model.parts) for _ in range(2)]
    for session, text in zip(sessions, ("a red car", "two blue boats")):
        session.add_text(text)
    settings = replace(TEXT_TO_IMAGE, renorm="global", interval=(0.0, 1.0))
    x = torch.randn(2, 36, model.parts.model.config.latent_channels, generator=torch.Generator().manual_seed(0))
    x[0, 4:] = 0
    both = GuidedVelocity(sessions, [(2, 2), (6, 6)], settings)(x, 0.7)
    alone = GuidedVelocity(sessions[:1], [(2, 2)], settings)(x[:1, :4], 0.7)
    torch.testing.assert_close(both[:1, :4], alone, atol=1e-5, rtol=1e-4)
    assert (both[0, 4:] == 0).all()


def test_tokens_of_a_batch_are_told_with_the_number_of_their_request(model: HyperBagel) -> None:
    """Requests of other settings stand between those that are decoded together."""
    asked = [AskRequest("what", max_tokens=3), AskRequest("how many", max_tokens=6), AskRequest("why is it", max_tokens=3)]
    told: list[list[int]] = [[] for _ in asked]
    results = model.ask_batch(asked, on_token=lambda row, token: told[row].append(token))
    assert [model.parts.tokenizer.decode(ids).strip() for ids in told] == [result.text for result in results]
    drawn = [ImageRequest(text, steps=1, think=think, max_think_tokens=3) for text, think in (("x", False), ("a", True), ("b", True))]
    plans: list[list[int]] = [[] for _ in drawn]
    with pytest.warns(Notice, match="cut"):
        model.generate_batch(drawn, on_token=lambda row, token: plans[row].append(token))
    assert [len(ids) for ids in plans] == [0, 3, 3]


def test_each_second_is_told_of_its_own_stage(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks(*times: float) -> None:
        left = iter(times)
        for place in ("pipeline", "speculative.answers"):
            monkeypatch.setattr(f"hyperbagel.{place}.clock", lambda device: next(left))

    ticks(0, 1, 10, 12, 16)
    assert model.generate("a car", seed=0, steps=1)[0].timings == {"prefill": 1, "denoise": 2, "decode": 4}
    ticks(0, 1, 10, 18, 20, 36, 40, 42, 46)
    planned = model.generate("a car", seed=0, steps=1, think=True, max_think_tokens=100, drafter="lookup")[0]
    assert planned.timings == {"prefill": 1, "measure": 8, "think": 16, "denoise": 2, "decode": 4}
    ticks(0, 1, 10, 12, 20, 24)
    assert model.ask("what", max_tokens=2, drafter="lookup").timings == {"prefill": 1, "measure": 2, "decode": 4}
