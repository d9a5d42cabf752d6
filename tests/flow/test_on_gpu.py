"""The shipped model on device "cuda", a real or a simulated one (tests/simulated_gpu.py): nothing meets the other device, results are the
CPU's, and no round waits more than once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from simulated_gpu import SimulatedGPU

from hyperbagel.generate.contexts import Contexts
from hyperbagel.generate.decode import EagerRunner
from hyperbagel.generate.graphs import StaticStep
from hyperbagel.generate.types import ImageResult, TextResult
from hyperbagel.pipeline import AskRequest, HyperBagel, ImageRequest
from hyperbagel.speculative.decode import Rounds

CAPTION, DESCRIBE, COLOUR = "a red car to the left of a blue key", "Describe the picture.", "What colour is the car?"
REAL = torch.cuda.is_available()
Results = Sequence[ImageResult | TextResult]


@pytest.fixture(scope="module")
def cpu() -> HyperBagel:
    return HyperBagel.from_pretrained("toybox", device="cpu")


@pytest.fixture(scope="module")
def picture(cpu: HyperBagel) -> Image.Image:
    return cpu.generate(CAPTION, seed=0, student="6")[0].image


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated GPU tells no time: what drafting costs is measured there, but once."""
    if not REAL:
        monkeypatch.setattr("hyperbagel.speculative.costs.REPEATS", 1)


def same(there: Results, here: Results) -> None:
    for a, b in zip(there, here, strict=True):
        if isinstance(a, ImageResult):
            assert isinstance(b, ImageResult) and (a.nfe, a.thinking) == (b.nfe, b.thinking)
            off = np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int)).max()
            assert off <= (8 if REAL else 2)  # another order of additions; a real one rounds convolutions, too
        else:
            assert isinstance(b, TextResult) and a.text == b.text and a.reused == b.reused


def pictures(model: HyperBagel, picture: Image.Image) -> Results:
    kept, mask = Contexts(4), Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, 32, 64))
    made = list(model.generate(CAPTION, seed=1, student="6", think=True))
    for instruction in ("make the car green", "make the key red"):  # the second finds the picture read
        made += model.generate_batch([ImageRequest(instruction, (picture,), seed=seed, student="1") for seed in (0, 9)], contexts=kept)
    made += model.edit([picture, picture.rotate(90)], "make the car green", seed=1, steps=2)
    return made + model.edit([picture], "make the car green", seed=1, student="1", mask=mask)


def answers(model: HyperBagel, picture: Image.Image) -> Results:
    kept, told = Contexts(8), list[TextResult]()
    for name in ("none", "lookup", "block"):
        told += model.ask_batch([AskRequest(question, (picture,), drafter=name, max_tokens=16) for question in (DESCRIBE, COLOUR)])
        told += model.ask_batch([AskRequest(DESCRIBE, (picture,), drafter=name, max_tokens=16, stop=("key",))], contexts=kept)
    return told


@pytest.mark.usefixtures("gpu")
@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("make", [pictures, answers])
def test_a_gpu_gives_what_a_cpu_gives(
    make: Callable[[HyperBagel, Image.Image], Results], graphs: bool, cpu: HyperBagel, picture: Image.Image
) -> None:
    there = HyperBagel.from_pretrained("toybox", device="cuda", dtype="float32", graphs=graphs)
    same(make(there, picture), make(cpu, picture))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_of_fewer_bits_run_there(dtype: str, gpu: SimulatedGPU | None, picture: Image.Image) -> None:
    there = HyperBagel.from_pretrained("toybox", device="cuda", dtype=dtype)  # type: ignore[arg-type]
    assert there.ask(COLOUR, [picture]).text and there.edit([picture], "make the car green", seed=1, student="1")[0].nfe == 1
    assert there.parts.model.dtype == torch.bfloat16


@pytest.mark.skipif(REAL, reason="waits are counted on a simulated GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_round_waits_once(graphs: bool, gpu: SimulatedGPU, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain step and a round of drafting, verifying and committing: the host learns all it must know in one look. Whole answers have
    their time taken, which waits, too."""
    there = HyperBagel.from_pretrained("toybox", device="cuda", dtype="float32", graphs=graphs)
    for name, temperature in itertools.product(("none", "lookup", "block"), (0.0, 0.8)):
        asked = [
            AskRequest(question, (picture,), drafter=name, temperature=temperature, seed=3, max_tokens=32)
            for question in (DESCRIBE, COLOUR)
        ]
        there.ask_batch(asked)  # costs are measured
        waits = list[Counter[str]]()

        def counted(own: Callable[..., object], found: list[Counter[str]] = waits) -> Callable[..., object]:
            def step(self: object, *given: object) -> object:
                found.append(gpu.waits.copy())
                return own(self, *given)

            return step

        kind, method = (Rounds, "round") if name != "none" else (StaticStep if graphs else EagerRunner, "__call__")
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, counted(getattr(kind, method)))
            there.ask_batch(asked)
        looks = [sum(n for name, n in seen.items() if name != "synchronize") for seen in waits]
        between = [after - before for before, after in itertools.pairwise(looks)]
        assert len(between) > 3 and set(between) == {1}
