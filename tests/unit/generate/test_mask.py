"""Masks of edits: what is kept is the source's, exactly; what is drawn has seen it; and pictures without a mask are what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from small_world import small_parts

from hyperbagel.core.errors import InputError
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import euler
from hyperbagel.generate.mask import Kept, MaskedVelocity, edited_tokens, lay_over
from hyperbagel.pipeline import HyperBagel, ImageRequest


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "small")


def picture(seed: int = 0, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def box(side: int = 24, *corners: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle(corners or (8, 8, 15, 15), fill=255)
    return mask


def test_kept_tokens_walk_straight_from_their_noise_to_the_source() -> None:
    """Whatever the model says there; and at every time between the model finds the source as noisy as everything else."""
    torch.manual_seed(0)
    clean, noise = torch.randn(6, 3), torch.randn(2, 6, 3)
    edit = torch.tensor([True, False, True, False, False, True])
    seen = []

    def wild(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append((t, x[0].clone()))
        return torch.full_like(x, 7.0)

    velocity = MaskedVelocity(wild, [Kept(edit, clean), None], noise)
    x = euler(noise, velocity, time_grid(5, 3.0))
    torch.testing.assert_close(x[0][~edit], clean[~edit])
    torch.testing.assert_close(x[0][edit], noise[0][edit] - 7)
    torch.testing.assert_close(x[1], noise[1] - 7)
    for t, state in seen:
        torch.testing.assert_close(state[~edit], ((1 - t) * clean + t * noise[0])[~edit])


def test_a_token_is_drawn_if_any_of_its_pixels_may_change() -> None:
    mask = Image.new("L", (24, 24), 0)
    mask.putpixel((8, 3), 1)  # column 8, row 3: the second token of the first row
    assert edited_tokens(mask, (3, 3)).view(3, 3).nonzero().tolist() == [[0, 1]]
    thin = Image.new("L", (100, 70), 0)
    thin.putpixel((99, 69), 255)
    assert edited_tokens(thin, (2, 3)).view(2, 3).nonzero().tolist() == [[1, 2]], "a size that the grid does not divide"


def test_outside_the_mask_pixels_are_the_source_s(model: HyperBagel) -> None:
    source, mask = picture(), box()
    free, masked = (model.edit(source, "a red car", seed=3, steps=4, mask=m)[0] for m in (None, mask))
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(masked.image)[kept], np.asarray(source)[kept])
    assert not np.array_equal(np.asarray(free.image)[kept], np.asarray(source)[kept])
    assert (np.asarray(masked.image)[~kept] != np.asarray(source)[~kept]).mean() > 0.9, "inside it is drawn"
    assert masked.nfe == free.nfe and (masked.settings["masked"], free.settings["masked"]) == (True, False)


def test_masks_of_every_form_say_the_same(model: HyperBagel, tmp_path: Path) -> None:
    """White, or transparent: may change. As a file and as a picture in memory, and as the command line reads them."""
    source, mask = picture(), box()
    clear = Image.merge("RGBA", [*picture(1).split(), ImageChops.invert(mask)])
    clear.save(tmp_path / "clear.png")
    mask.convert("RGB").save(tmp_path / "white.png")
    forms = [mask, clear, mask.convert("RGB"), tmp_path / "clear.png", str(tmp_path / "white.png")]
    first, *others = (np.asarray(model.edit(source, "a red car", seed=3, steps=2, mask=form)[0].image) for form in forms)
    assert all(np.array_equal(other, first) for other in others)
    with pytest.raises(InputError, match="got a int as a picture"):
        model.edit(source, "a red car", seed=3, steps=2, mask=7)


def test_what_is_drawn_depends_on_what_is_kept(model: HyperBagel) -> None:
    """Not only cut out at the end: inside the mask, a masked edit differs from the same edit without a mask."""
    source, mask = picture(), box()
    free, masked = (np.asarray(model.edit(source, "a red car", seed=3, steps=4, mask=m)[0].image).astype(int) for m in (None, mask))
    assert np.abs(free - masked)[10:14, 10:14].max() > 0


def test_a_mask_over_everything_is_none(model: HyperBagel) -> None:
    source = picture()
    free, all_ = (model.edit(source, "x", seed=1, steps=2, mask=m)[0].image for m in (None, Image.new("L", (24, 24), 255)))
    assert np.array_equal(np.asarray(free), np.asarray(all_))


def test_rows_of_a_batch_have_masks_of_their_own(model: HyperBagel) -> None:
    first, second = picture(1), picture(2, 16)
    requests = [
        ImageRequest("x", (first,), seed=1, steps=3, mask=box()),
        ImageRequest("y", (first, second), seed=2, steps=3, mask=box(24, 0, 0, 3, 3)),  # the first picture's, and its size
        ImageRequest("z", (second,), seed=3, steps=3),
    ]
    for request, result in zip(requests, model.generate_batch(requests)):
        alone = model.generate_batch([request])[0].image
        assert result.image.size == alone.size == request.images[0].size
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(result.image)).max() <= 1


def test_the_border_fades_inside_and_a_result_of_another_size_fits() -> None:
    white, black = Image.new("RGB", (48, 24), "white"), Image.new("RGB", (24, 24), "black")
    out = np.asarray(lay_over(white, black, box(24, 0, 0, 11, 23), 2.0))[..., 0]
    assert (out[:, 24:] == 0).all() and (out[:, :16] > 240).all()
    assert (np.diff(out[12, 12:25].astype(int)) <= 0).all() and 0 < out[12, 22] < 255


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mask": box(16)}, "equal sizes"),
        ({"mask": Image.new("L", (24, 24), 0)}, "nothing change"),
    ],
)
def test_masks_that_are_refused(model: HyperBagel, settings: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        model.edit(picture(), "x", seed=0, steps=1, **settings)
    with pytest.raises(InputError, match="without a picture"):
        model.generate("x", seed=0, steps=1, mask=box())


def test_a_mask_stays_with_its_request_behind_others(model: HyperBagel) -> None:
    """Those that are drawn apart from it."""
    masked = ImageRequest("x", (picture(),), seed=2, steps=3, mask=box())
    behind = model.generate_batch([ImageRequest("a car", seed=1, steps=2), masked])[1].image
    alone = model.generate_batch([masked])[0].image
    assert np.array_equal(np.asarray(behind), np.asarray(alone))
