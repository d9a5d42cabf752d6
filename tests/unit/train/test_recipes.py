"""Every recipe is one that its stage takes, as the command in its first lines says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from hyperbagel.core.config import load_config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_one_of_its_stage_s(path: Path) -> None:
    commands = re.findall(r"hyperbagel(?:\.cli)? train (\S+) --recipe (\S+)", path.read_text(encoding="utf-8"))
    assert commands and all(ROOT / named == path for _, named in commands)
    for stage in {stage for stage, _ in commands}:
        load_config(importlib.import_module(f"hyperbagel.train.stages.{stage}").Recipe, path)
