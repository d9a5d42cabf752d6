"""Writes a base model's vision encoder into a folder of its own, as stage vit exports one: python -m runs.eye BASE OUT"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from hyperbagel.core.files import make_folder
from hyperbagel.model.weights import save_tensors
from hyperbagel.train.folder import load_model


def main(base: Path, out: Path) -> None:
    """Writes vit.safetensors and vit_config.json."""
    make_folder(out)
    eye = load_model(base, torch.device("cpu")).vit_model
    save_tensors(out / "vit.safetensors", {name: value.contiguous() for name, value in eye.state_dict().items()})
    shutil.copyfile(base / "vit_config.json", out / "vit_config.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
