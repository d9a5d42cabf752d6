"""The golden data: one archive, unpacked once into a folder beside it that git ignores. Made with `xz --lzma2=preset=9e,lc=2,lp=2`: most of
it is numbers of four bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperbagel.model.weights import load_tensors

ARCHIVE = Path(__file__).parent / "golden.tar.xz"


def _unpack() -> Path:
    digest = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()[:12]
    folder = ARCHIVE.parent / f".unpacked-{digest}"
    if not folder.exists():
        fresh = Path(tempfile.mkdtemp(dir=ARCHIVE.parent, prefix=".unpacking-"))
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(fresh, filter="data")
        try:
            os.rename(fresh, folder)
        except OSError:  # another test process was first
            shutil.rmtree(fresh)
    return folder


GOLDEN = _unpack()
TINY = GOLDEN / "tiny_model"


def scenario(name: str, precision: str = "fp32") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The call's settings and the tensors of one scenario; bf16 ones take the inputs they share with fp32 from there."""
    settings = json.loads((GOLDEN / precision / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_tensors(GOLDEN / precision / f"{name}.safetensors")
    if precision != "fp32":
        shared = load_tensors(GOLDEN / "fp32" / f"{name}.safetensors")
        tensors |= {k: v for k, v in shared.items() if k.startswith(("input_image", "init_noise", "vae_eps"))}
    return settings, tensors
