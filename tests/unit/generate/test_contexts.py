"""Pictures that were prefilled before: the same result, without reading them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_world import small_parts

from hyperbagel.generate.contexts import Contexts
from hyperbagel.generate.session import Session
from hyperbagel.pipeline import HyperBagel, ImageRequest


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel(small_parts(), "small")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pictures that were prefilled."""
    seen: list[Any] = []
    plain = Session.add_image

    def add(self: Session, image: Image.Image, **more: Any) -> None:
        seen.append(image)
        plain(self, image, **more)

    monkeypatch.setattr(Session, "add_image", add)
    return seen


def test_a_picture_is_read_once_and_results_stay_the_same(model: HyperBagel, read: list[Any]) -> None:
    contexts, source = Contexts(), picture()
    for text in ("a red car", "a red car and a dog", "a red car"):
        request = ImageRequest(text, (source.copy(),), seed=4, steps=2)
        [plain], [quick] = model.generate_batch([request]), model.generate_batch([request], contexts=contexts)
        assert np.array_equal(np.asarray(plain.image), np.asarray(quick.image))
    assert len(read) == 3 + 1 and quick.reused > 0 == plain.reused


def test_another_seed_order_or_picture_is_another_context(model: HyperBagel, read: list[Any]) -> None:
    contexts, a, b = Contexts(), picture(1), picture(2)
    requests = [
        ImageRequest("x", (a,), seed=1, steps=1),
        ImageRequest("x", (a,), seed=2, steps=1),
        ImageRequest("x", (a, b), seed=1, steps=1),
        ImageRequest("x", (b, a), seed=1, steps=1),
    ]
    for request in requests * 2:
        [quick], [plain] = model.generate_batch([request], contexts=contexts), model.generate_batch([request])
        assert np.array_equal(np.asarray(plain.image), np.asarray(quick.image))
    assert len(read) == 6 + 2 * 6, "read once for all four, and each time without a memory"


def test_the_oldest_are_forgotten_by_count_and_by_memory(model: HyperBagel) -> None:
    def fill(contexts: Contexts) -> list[bool]:
        reused = []
        for seed in (0, 1, 0, 2, 0, 1):
            request = ImageRequest("x", (picture(seed),), seed=0, steps=1)
            reused.append(model.generate_batch([request], contexts=contexts)[0].reused > 0)
        return reused

    assert fill(Contexts()) == [False, False, True, False, True, True]
    assert fill(Contexts(count=2)) == [False, False, True, False, True, False]
    assert fill(Contexts(memory=1)) == [False] * 6
