"""Writes a folder in BAGEL-7B-MoT's layout and size, with random weights: python -m benchmarks.folder --out FOLDER

29 GB. With it everything but quality can be tried at the real size on a machine that the real weights have not reached: reading, memory,
the command line, the server, export. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.subjects import ASSETS, RandomWeights
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.vae import AutoEncoder

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def write(folder: Path, config: BagelConfig) -> None:
    """The folder, tensor by tensor, so that memory never holds the model. Raises InputError if it is there or cannot be written."""
    if folder.exists():
        raise InputError(f"{folder}: got a folder that exists, expected a new one, choose another name")
    make_folder(folder.parent)
    with torch.device("meta"):
        model, vae = Bagel(config), AutoEncoder(config.vae)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, content in config.files().items():
            atomic_write_text(temporary / name, json.dumps(content, indent=2) + "\n")
        for name in TOKENIZER:
            shutil.copyfile(ASSETS / name, temporary / name)
        _weights(temporary / "ema.safetensors", model, torch.bfloat16, "BF16")
        _weights(temporary / "ae.safetensors", vae, torch.float32, "F32")


def _weights(path: Path, module: nn.Module, dtype: torch.dtype, kind: str) -> None:
    """One safetensors file: the length of its header, the header, the numbers in the header's order. (The library's writer wants them all
    at once.)"""
    header, end = {}, 0
    source = RandomWeights(module)
    for name, shape in source.shapes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers begin where a processor likes them to
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, value in source.tensors("cpu"):
            file.write(value.to(dtype).reshape(-1).view(torch.uint8).numpy().data)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folder", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--shape", choices=("7b", "toybox"), default="7b")
    options = parser.parse_args(given)
    try:
        write(options.out, BagelConfig() if options.shape == "7b" else BagelConfig.from_folder(ASSETS))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
