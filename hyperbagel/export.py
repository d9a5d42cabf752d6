"""Exports for other programs: a student merged into a folder of BAGEL's layout or as a PEFT LoRA; EAGLE-3 drafters for SGLang and vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder, shelf
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.merge import as_low_rank, check_scales, folded_sampler, merged_tensors
from hyperbagel.model.student import PEFT_PREFIX, Sampler, Student, fingerprint, load_student, peft_config
from hyperbagel.model.weights import TensorFolder, load_folder, save_tensors, stored_dtype
from hyperbagel.nn.quantized import DTYPES
from hyperbagel.pipeline import HyperBagel, model_folder
from hyperbagel.speculative.drafters.eagle3 import Eagle3
from hyperbagel.speculative.drafters.export import export_eagle3
from hyperbagel.speculative.drafters.folder import load_module

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names
# The files of a model folder that a merged folder copies, and those that match but belong to the old weights.
_BESIDE = ("*.json", "merges.txt", "ae.safetensors", "ae-*.safetensors")
_NOT = ("ema.safetensors.index.json", "model.safetensors.index.json", "sampler.json")


@dataclass(frozen=True)
class Exported:
    """What was written.

    sampler: how it must be sampled. text_scale, image_scale: the guidance folded in. notes: what the user must know, one per line.
    """

    folder: Path
    sampler: Sampler
    text_scale: float
    image_scale: float
    notes: tuple[str, ...]


def _read(
    model: str, student: Path | str, text_scale: float | None, image_scale: float | None
) -> tuple[Path, Bagel, Student, float, float]:
    """(the model's folder, the base, the student over it, the text and the image scale to fold in)."""
    folder = model_folder(model)
    found = _find(folder, "student", student)
    base, _ = load_folder(folder, dtype=stored_dtype(folder))
    given = load_student(found, base).requires_grad_(False)
    text = given.sampler.text_scale if text_scale is None else text_scale
    image = given.sampler.image_scale if image_scale is None else image_scale
    check_scales(given.sampler, text, image)
    return folder, base, given, text, image


def _find(folder: Path, what: str, name: Path | str) -> Path:
    """The folder of a student or drafter (`what`): one that came with the model, or the path `name`.

    Raises InputError before any weight is read.
    """
    beside = folder / f"{what}s"
    found = beside / str(name)
    if found.is_dir() or Path(name).is_dir() or not folder.is_dir():  # a missing model is reported when it is loaded
        return found if found.is_dir() else Path(name)
    if what == "student":
        names = shelf(beside, "sampler.json")
    else:  # a drafter of another kind cannot be exported, so it is not offered
        names = [one for one in shelf(beside, "drafter.json") if '"eagle3"' in (beside / one / "drafter.json").read_text(encoding="utf-8")]
    own = f"one of this model's own ({', '.join(names)}) or " if names else ""
    raise InputError(f"got {what} {str(name)!r}, expected {own}a {what}'s folder, check the name")


def export_student(
    student: Path | str,
    out: Path,
    *,
    model: str = "toybox",
    text_scale: float | None = None,
    image_scale: float | None = None,
    dtype: str | None = None,
) -> Exported:
    """Merges a student into its base, with guidance folded in, and writes a folder in BAGEL's layout, whole or not at all.

    It draws from text what base and student draw. Edits differ somewhat: see `edit_note`.

    Args:
        student: its folder, or the name of one that came with the model.
        out: the folder to write; must not exist.
        model: the base, a folder or "toybox".
        text_scale, image_scale: guidance to fold in; None: the student's own for drawing.
        dtype: of the weights, a name in DTYPES; None: as in the base's file.
    Raises:
        InputError: not a student of this model, scales it was not made for, or `out` exists or cannot be written.
    """
    _check_new(out)
    folder, base, given, text, image = _read(model, student, text_scale, image_scale)
    sampler = folded_sampler(given.sampler, text, image)
    kinds = TensorFolder(folder, "ema").dtypes
    kept = DTYPES[dtype] if dtype else None

    def stored_as(name: str, x: Tensor) -> Tensor:
        return x.to(kept or _STORED.get(kinds[name], torch.float32))

    tensors = merged_tensors(base, given, text, image, stored_as)
    make_folder(out.parent)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        for path in _beside(folder):
            shutil.copyfile(path, temporary / path.name)
        save_tensors(temporary / "ema.safetensors", tensors)
        _write_sampler(temporary, "merged", sampler, base)
    stored = kept or min((_STORED.get(kind, torch.float32) for kind in kinds.values()), key=lambda kind: kind.itemsize)
    rounding = "" if stored == torch.float32 else f", up to the rounding of {str(stored).removeprefix('torch.')} weights"
    exact = f"text to image: what base and student draw together{rounding}"
    return Exported(out, sampler, text, image, (exact, edit_note(image, " (--verify measures it)"), _how(sampler)))


def export_lora(
    student: Path | str,
    out: Path,
    *,
    model: str = "toybox",
    text_scale: float | None = None,
    image_scale: float | None = None,
    rank: int | None = None,
    dtype: str = "float32",
) -> Exported:
    """Writes a student as a LoRA in PEFT's layout, with guidance folded in.

    rank: of the factors, for a student of whole layers; the notes say what that loses. Other arguments and errors as of `export_student`.
    """
    if rank is not None and rank < 1:
        raise InputError(f"got rank {rank}, expected at least 1; 64 is usual")
    _check_new(out)
    _, base, given, text, image = _read(model, student, text_scale, image_scale)
    low = as_low_rank(base, given, text, image, rank)
    sampler = folded_sampler(given.sampler, text, image)
    config = peft_config(low.layers, low.whole, low.rank, low.alpha, model)
    if low.biases:
        config["lora_bias"] = True  # PEFT's option for a bias beside B, here the change of the layer's own bias
    make_folder(out.parent)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        save_tensors(temporary / "adapter_model.safetensors", {PEFT_PREFIX + name: x.to(DTYPES[dtype]) for name, x in low.tensors.items()})
        atomic_write_text(temporary / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        _write_sampler(temporary, "peft", sampler, base)
    if given.adapter.low_rank:
        how = f"rank {low.rank}, the student's own factors: nothing is lost"
    else:
        how = f"rank {low.rank}: {low.error:.2%} of the change is missing (Frobenius norm), most in {low.worst[0]}: {low.worst[1]:.2%}"
    biases = ("changed biases are beside B (lora_bias): PEFT runs this LoRA, but merges it only into layers that have a bias",)
    return Exported(out, sampler, text, image, (how, *(biases if low.biases else ()), edit_note(image), _how(sampler)))


def export_drafter(drafter: Path | str, out: Path, *, model: str = "toybox", dtype: str = "bfloat16") -> Path:
    """Writes an EAGLE-3 drafter in the layout that SGLang and vLLM load. Returns `out`.

    Raises InputError for a drafter of another kind, which those programs do not know.
    """
    _check_new(out)
    folder = model_folder(model)
    found = _find(folder, "drafter", drafter)
    base, _ = load_folder(folder, dtype=stored_dtype(folder))
    module = load_module(found, base)
    if not isinstance(module, Eagle3):
        raise InputError(
            f"{drafter}: got a drafter of kind {module.config.kind}, expected eagle3, the only kind that SGLang and vLLM load; "
            "train one: hyperbagel train drafter --recipe recipes/toybox/drafter_eagle3.yaml"
        )
    export_eagle3(out, module, base.config.llm, DTYPES[dtype])
    return out


def edit_note(image_scale: float, measured: str = "") -> str:
    """The note that a merged student's edits are not quite those of base and student. measured: a hint how to measure the difference."""
    scale = " (fold in an image scale above 1 for edits)" if image_scale <= 1 else ""
    return (
        f"edits{scale}: the source picture's clean latents are now read by the merged weights, not by the base's as with base and student, "
        f"so edits differ somewhat{measured}; for exact ones use the student folder itself"
    )


def verify(exported: Exported, student: Path | str, *, model: str = "toybox") -> Iterator[tuple[str, float, int]]:
    """Draws and edits with base and student, then with the exported folder as an ordinary model without guidance, and compares.

    Yields (what, mean difference, largest difference) of the pixel values, 0 to 255. Both edit the picture that base and student drew. Uses
    a GPU if there is one. The two models are in memory one after the other.
    """
    own: dict[str, Any] = {"text_scale": exported.text_scale, "image_scale": exported.image_scale, "student": str(student)}
    prompt, change, source = "a red circle to the left of a blue square", "make the circle green", None
    drawn = []
    for folder, settings in ((model, own), (exported.folder, {})):
        loaded = HyperBagel.from_pretrained(folder)
        [picture] = loaded.generate(prompt, seed=0, **settings)
        source = source or picture.image
        [edited] = loaded.edit(source, change, seed=0, **settings)
        drawn.append((picture.image, edited.image))
        del loaded
    for what, before, after in zip(("text to image", "edit"), *drawn, strict=True):
        yield what, *_difference(before, after)


def _difference(a: Any, b: Any) -> tuple[float, int]:
    apart = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return float(apart.mean()), int(apart.max())


def _how(sampler: Sampler) -> str:
    """The note on how to sample, here and in the reference's code."""
    return (
        f"sample with {sampler.nfe} steps, shift {sampler.shift:g} and no guidance; in the reference's code: "
        f"num_timesteps={sampler.nfe + 1}, timestep_shift={sampler.shift:g}, cfg_text_scale=1.0, cfg_img_scale=1.0"
    )


def _write_sampler(folder: Path, kind: str, sampler: Sampler, base: Bagel) -> None:
    about = {"format": 1, "kind": kind, "base": fingerprint(base), **asdict(sampler)}
    atomic_write_text(folder / "sampler.json", json.dumps(about, indent=2) + "\n")


def _beside(folder: Path) -> list[Path]:
    """The files of a model folder that a merged folder copies."""
    found = {path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file() and path.name not in _NOT}
    return sorted(found)


def _check_new(out: Path) -> None:
    if out.exists():
        raise InputError(f"got the output {str(out)!r}, which exists, expected a new folder; choose another name or remove it")
