"""What the flow tests share."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from hyperbagel.model.student import Sampler, Student, make_adapter, save_student
from hyperbagel.pipeline import HyperBagel

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"stride": 16, "min_size": 32, "max_size": 32, "max_pixels": 1024}


def tiny_folder(parent: Path) -> Path:
    """A copy of the tiny golden model with picture sizes to its measure: it was made for 32-pixel pictures but says BAGEL's own sizes."""
    spec = importlib.util.spec_from_file_location("golden_archive", GOLDEN / "archive.py")
    assert spec is not None and spec.loader is not None
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)
    folder = parent / "tiny"
    shutil.copytree(archive.TINY, folder)
    config = folder / "bagel_config.json"
    options = json.loads(config.read_text("utf-8"))
    options |= {"default_size": [32, 32], "vae_transform": SMALL, "vit_transform": SMALL | {"stride": 14, "min_size": 28, "max_size": 28}}
    config.write_text(json.dumps(options), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> HyperBagel:
    """The tiny model and a student, changed at random."""
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    model = HyperBagel.from_pretrained(folder, device="cpu")
    torch.manual_seed(0)
    student = Student.fresh(model.parts.model, make_adapter(model.parts.model, "lora", rank=4), Sampler(nfe=6))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    (folder / "students").mkdir()
    save_student(folder / "students" / "6", student, model.parts.model)
    return model
