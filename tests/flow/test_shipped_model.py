"""The model that ships: it loads, fits the limits, and does its three jobs for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hyperbagel
from hyperbagel.core.errors import Notice
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.pipeline import HyperBagel
from hyperbagel.serve.run import warm_up
from hyperbagel.toybox.language import sample_question, sample_t2i
from hyperbagel.toybox.render import render

ASSETS = Path(hyperbagel.__file__).parent / "assets" / "toybox"


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    return HyperBagel.from_pretrained("toybox", device="cpu")


def test_the_first_answer_does_not_wait_for_the_compiler() -> None:
    """PyTorch's own initialisation of a table on the meta device imports its compiler: a second, of which nothing is used."""
    script = """
import sys
import numpy as np
from PIL import Image
from hyperbagel.pipeline import HyperBagel
model = HyperBagel.from_pretrained("toybox", device="cpu")
picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
model.ask("What is this?", [picture], max_tokens=4, drafter="block")
model.generate("a car", student="1")
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", done.stdout


def test_it_is_a_whole_folder_within_its_limits() -> None:
    report = inspect_folder(ASSETS)  # strict: every tensor fits the config
    assert report["weights"]["ema"]["dtypes"] == ["BF16"]
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 48 * 2**20


def test_the_autoencoder_gives_drawings_back(model: HyperBagel) -> None:
    """29 dB when it was trained; the bound leaves room for the luck of 16 scenes and for weights in bf16."""
    import random

    from hyperbagel.data.transforms import to_tensor

    rng = random.Random(7)
    x = torch.stack([to_tensor(render(sample_t2i(rng).scene)) for _ in range(16)])
    vae = model.parts.vae
    with torch.inference_mode():
        z = vae.encode(x, torch.zeros(16, vae.config.z_channels, 8, 8))
        error = (vae.decode(z).clamp(-1, 1) - x).square().mean((1, 2, 3))
    assert float((10 * torch.log10(4 / error)).mean()) > 27.5
    assert 0.8 < float(z.std()) < 1.2


def test_it_draws_edits_and_answers(model: HyperBagel) -> None:
    [first] = model.generate("a red car", seed=0, steps=4)
    [again] = model.generate("a red car", seed=0, steps=4)
    assert first.image.size == (64, 64) and first.nfe <= 8
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    [edited] = model.edit(first.image, "make the car blue", seed=0, steps=4)
    assert edited.image.size == (64, 64) and edited.nfe == 8  # two branches: it is guided by the text alone
    assert model.ask("Is there a car?", first.image, max_tokens=8).tokens > 0


def test_it_has_learned_the_language_of_answers(model: HyperBagel) -> None:
    """Random weights never name a colour when asked for one: these are trained ones. How often it is the right one, the evaluation says."""
    import random

    from PIL import Image

    from hyperbagel.generate.types import AskRequest
    from hyperbagel.toybox.vocabulary import COLOURS

    rng = random.Random(11)
    asked = [sample_question(rng, kind="colour") for _ in range(40)]
    answers = model.ask_batch([AskRequest(q.question, (Image.fromarray(render(q.scene)),), max_tokens=6) for q in asked])
    assert sum(answer.text in COLOURS for answer in answers) >= 30


def test_a_picture_and_its_question_are_read_at_once(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward up to the first token, which is then there; with a second picture, too."""
    forwards: list[int] = []
    own = Bagel.backbone
    monkeypatch.setattr(Bagel, "backbone", lambda self, *given, **more: forwards.append(1) or own(self, *given, **more))
    picture = model.generate("a red car", seed=0, student="1")[0].image
    for pictures in (picture, [picture, picture]):
        forwards.clear()
        said = model.ask("What colour is the car?", pictures, max_tokens=1, drafter="none")
        assert len(forwards) == 1 and said.tokens == 1


def test_a_server_starts_though_its_first_answer_failed(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **more: object) -> None:
        raise RuntimeError("no room for\nanswers")

    monkeypatch.setattr(model, "ask_batch", fails)
    with pytest.warns(Notice, match="the first answer failed .no room for answers."):
        warm_up(model)


def test_a_warm_server_measures_nothing_in_a_request() -> None:
    fresh = HyperBagel.from_pretrained("toybox", device="cpu")
    warm_up(fresh)
    answer = fresh.ask("Is there a car?", max_tokens=8)
    assert "measure" not in answer.timings and answer.drafter is not None


def test_the_second_question_measures_nothing(tmp_path: Path) -> None:
    """`ask` keeps what drafting costs for the next process."""
    command = [sys.executable, "-m", "hyperbagel.cli", "ask", "what do you see?", "--max-tokens", "8", "--json"]
    env = os.environ | {"HYPERBAGEL_CACHE": str(tmp_path / "kept")}
    runs, kept = [], []
    for _ in range(2):
        runs.append(json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout))
        kept.append({path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()})
    first, second = runs
    assert first["seconds"]["measure"] > 0.01 and kept[0] and kept[0] == kept[1], "measured again, other seconds would be kept"
    assert second["seconds"].get("measure", 0.0) < first["seconds"]["measure"] / 4  # what finding the kept costs takes on a busy machine
    assert second["text"] == first["text"] and second["drafter"] is not None
