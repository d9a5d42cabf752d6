"""Limits, sizes and seeds of requests, where a picture is not square, a batch not alike, or a number at its bound."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from small_world import small_parts

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.data.transforms import to_tensor
from hyperbagel.generate.contexts import Contexts
from hyperbagel.generate.graphs import GRANULE, _capacity
from hyperbagel.generate.image import GuidedVelocity, passes
from hyperbagel.generate.mask import kept_of, masked
from hyperbagel.generate.session import Session, encode_latents
from hyperbagel.generate.types import Denoising, ImageRequest, after_first, with_sampler
from hyperbagel.model.student import Sampler
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.thinking import write_plans


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "small")


def photo(width: int = 24, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_share_forwards_up_to_a_number_of_latents(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond comes after them, and looks as it would beside them."""
    assert passes([64, 2048, 2048, 64, 64, 4096, 8192]) == [[0, 1], [2, 3], [4], [5], [6]] and passes([]) == []
    requests = [ImageRequest("a car", seed=s, size=size, steps=2) for s, size in enumerate([(16, 16), (16, 24), (16, 16), (8, 8)])]
    rows: list[int] = []
    at_once = model.generate_batch(requests, on_step=lambda done, total, x: rows.append(len(x)))
    n = (16 // model.parts.model.config.latent_stride) ** 2
    monkeypatch.setattr("hyperbagel.generate.image.MOST_LATENTS", 2 * n)
    in_turn = model.generate_batch(requests, on_step=lambda done, total, x: rows.append(len(x)))
    assert rows == [4, 4, *[1, 1], *[1, 1], *[2, 2]]
    for a, b in zip(in_turn, at_once, strict=True):
        assert a.nfe == b.nfe and np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int)).max() <= 1


def test_contexts_make_room_for_the_next_ones(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperbagel.generate.image.MOST_LATENTS", 1)
    kept: list[weakref.ref[Any]] = []
    alive, own = list[int](), model._prepare

    def prepare(*given: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in kept))
        ready = own(*given)
        kept.append(weakref.ref(ready.session.cache))
        return ready

    monkeypatch.setattr(model, "_prepare", prepare)
    model.edit([photo()], "make it red", n=3, seed=0, steps=1)
    assert alive == [0, 0, 0]


def test_a_picture_of_another_shape_is_another_context(model: HyperBagel) -> None:
    contexts = Contexts()
    wide, high = (Image.new("RGB", size, "white") for size in ((24, 16), (16, 24)))
    contexts.begin(model.parts, [wide], torch.Generator().manual_seed(0))
    assert contexts.begin(model.parts, [high], torch.Generator().manual_seed(0))[1] == 0


def test_one_context_is_kept_however_large(model: HyperBagel) -> None:
    contexts = Contexts(memory=1)
    reused = [contexts.begin(model.parts, [photo()], torch.Generator().manual_seed(0))[1] for _ in range(2)]
    assert reused[0] == 0 < reused[1]


def test_a_mask_s_seam_is_soft(model: HyperBagel) -> None:
    source, mask = Image.new("RGB", (96, 96), "black"), Image.new("L", (96, 96), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 47, 95), fill=255)
    out = np.asarray(masked(model.parts, ImageRequest("x", (source,), mask=mask), Image.new("RGB", (96, 96), "white")))[48, :, 0]
    assert 0 < out[47] < 255 and out[48] == 0 and (out[:45] == 255).all()


def test_what_a_mask_keeps_is_the_source_s_mean_latent(model: HyperBagel) -> None:
    """Of a source that is not square, too."""
    source, stride = photo(24, 16), model.parts.model.config.latent_stride
    kept = kept_of(model.parts, ImageRequest("x", (source,), mask=Image.new("L", (24, 16), 255)), (16 // stride, 24 // stride))
    assert kept is not None and torch.equal(kept.clean, encode_latents(model.parts, to_tensor(np.asarray(source)))[0][0])


def test_a_batch_needs_room_for_its_longest_context() -> None:
    caches = [KVCache(1, 1, 2, rows=1, device="cpu", dtype=torch.float32) for _ in range(2)]
    caches[0].lengths, caches[1].lengths = [3], [GRANULE]
    assert _capacity(caches, 1) == _capacity(caches[::-1], 1) == 2 * GRANULE


def test_a_picture_beyond_the_vit_s_own_table_is_refused() -> None:
    parts = small_parts()
    options = parts.model.config.options.model_copy(update={"vit_max_num_patch_per_side": 6})
    parts.model.config = parts.model.config.model_copy(update={"options": options})
    with pytest.raises(InputError, match="at most 4 a side"):
        Session.new(parts).vit_block(torch.zeros(3, 50, 50))


def test_the_last_size_is_height_and_width(model: HyperBagel) -> None:
    session = Session.new(model.parts)
    session.add_image(photo(32, 16), latents=False)
    assert session.last_size == (16, 32)


def test_an_image_scale_beyond_a_student_s_range_is_told() -> None:
    def ask(scale: float) -> Any:
        return with_sampler(ImageRequest("x", (photo(),), student="6", image_scale=scale), Sampler())

    with pytest.warns(Notice, match=r"got image_scale 4, it was made for 1 to 2\.5"):
        ask(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(2.5)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_renorm_min_is_a_share(value: float) -> None:
    with pytest.raises(InputError, match="renorm_min"):
        ImageRequest("x", renorm_min=value).denoising()


def test_the_token_that_ends_an_answer_was_decoded_too() -> None:
    assert [after_first(*of) for of in ((3, "stop"), (3, "length"), (0, "stop"), (0, "length"))] == [3, 2, 0, 0]


def test_drawn_plans_go_by_their_request_s_seed_however_they_are_grouped(model: HyperBagel) -> None:
    how: dict[str, Any] = {"steps": 1, "think": True, "think_temperature": 1.0}
    asked = [ImageRequest("a red car", seed=i, max_think_tokens=n, **how) for i, n in ((1, 9), (2, 10), (3, 9), (4, 10))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together, alone = model.generate_batch(asked), [model.generate_batch([one])[0] for one in asked]
    assert [one.thinking for one in together] == [one.thinking for one in alone]


def test_guidance_of_a_batch_in_which_not_all_have_pictures(model: HyperBagel) -> None:
    def session(*images: Image.Image) -> Session:
        made = Session.new(model.parts)
        for image in images:
            made.add_image(image, latents=True)
        made.add_text("a red car")
        return made

    settings = Denoising(text_scale=3.0, image_scale=2.0, interval=(0.0, 1.0))
    x = torch.randn(2, 4, model.parts.model.config.latent_channels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        both = GuidedVelocity([session(photo()), session()], [(2, 2)] * 2, settings)(x, 0.7)
        alone = [GuidedVelocity([s], [(2, 2)], settings)(x[i : i + 1], 0.7)[0] for i, s in enumerate((session(photo()), session()))]
    torch.testing.assert_close(both, torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:the plan was cut")
def test_tokens_of_plans_with_other_limits_are_told_by_their_own_request(model: HyperBagel) -> None:
    told: list[list[int]] = [[], []]
    asked = [ImageRequest(text, steps=1, think=True, max_think_tokens=n) for text, n in (("a car", 3), ("a dog", 2))]
    model.generate_batch(asked, on_token=lambda row, token: told[row].append(token))
    assert [len(ids) for ids in told] == [3, 2]


@pytest.mark.filterwarnings("ignore:the plan was cut")
def test_a_plan_is_read_back_with_what_follows_where_it_may_wait(model: HyperBagel) -> None:
    for later in (False, True):
        session = Session.new(model.parts)
        session.add_text("a car")
        write_plans([session], [3], later=later)
        assert bool(session.waiting) is later


def test_no_plan_is_begun_where_none_could_be_read_back(model: HyperBagel) -> None:
    session, encode = Session.new(model.parts), model.parts.tokenizer.encode
    while session.room() > 40:
        session.add_text("a " * 8)
    session.add_text(next(text for n in range(1, 40) if len(encode(text := "a " * n)) == session.room() - 4))
    assert session.room() == 2, "no more than the marks around it"
    with pytest.raises(InputError, match="expected at most"):
        write_plans([session], [None])
