"""What the flow tests share."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from hyperbagel.pipeline import HyperBagel

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"stride": 16, "min_size": 32, "max_size": 32, "max_pixels": 1024}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> HyperBagel:
    """The tiny model with picture sizes to its measure."""
    spec = importlib.util.spec_from_file_location("golden_archive", GOLDEN / "archive.py")
    assert spec is not None and spec.loader is not None
    archive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archive)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(archive.TINY, folder)
    config = folder / "bagel_config.json"
    options = json.loads(config.read_text("utf-8"))
    options |= {"default_size": [32, 32], "vae_transform": SMALL, "vit_transform": SMALL | {"stride": 14, "min_size": 28, "max_size": 28}}
    config.write_text(json.dumps(options), "utf-8")
    return HyperBagel.from_pretrained(folder, device="cpu")
