"""A distilled student: the generation expert's change, two guidance embedders, and the sampler it was made for.

FOLDER/adapter_model.safetensors, adapter_config.json   low-rank changes in PEFT's layout (kind "lora"), or
FOLDER/moe_gen.safetensors                              whole tensors under BAGEL's own names (kind "full")
FOLDER/guidance.safetensors                             the embedders
FOLDER/sampler.json                                     nfe, shift, guidance, kind, fingerprint of the base
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text, make_folder, read_json
from hyperbagel.core.hardware import check_room
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.guidance_embed import GuidanceEmbedders
from hyperbagel.model.weights import count_numbers, load_tensors, save_tensors
from hyperbagel.nn.lora import Adapter, attach, factorise
from hyperbagel.nn.quantized import QuantizedLinear, matrix_of, plain_layer, sample_of

Kind = Literal["lora", "full"]
PEFT_PREFIX = "base_model.model."
_HEADS = ("vae2llm", "llm2vae", "time_embedder.mlp.0", "time_embedder.mlp.2")
_GENERATION = re.compile(r"_moe_gen(\.|$)")
_FORMAT = 1
_LARGEST = 10_000  # no file holds more evaluations, nor a larger shift or scale, unless it is damaged
_MISSING = "a student folder has sampler.json, guidance.safetensors and its adapter"
# Values of `kind` in a sampler.json that is no student's: hyperbagel.export writes them.
OTHER_KINDS = {
    "merged": "a model with a student merged into it (give it as --model)",
    "peft": "a LoRA with the guidance folded in, for PEFT (give the student that it was made from)",
}


@dataclass(frozen=True)
class Sampler:
    """How a student is sampled; it travels with the weights. Scales are defaults: the embedders take any scale in the ranges."""

    nfe: int = 6
    shift: float = 3.0
    text_scale: float = 4.0
    image_scale: float = 1.0
    edit_text_scale: float = 4.0
    edit_image_scale: float = 2.0
    text_range: tuple[float, float] = (1.0, 5.0)
    image_range: tuple[float, float] = (1.0, 2.5)
    stage: str = ""  # the stages of training that made it


def generation_modules(model: Bagel) -> tuple[list[str], list[str]]:
    """Names of the generation expert's (linear layers, other layers with weights)."""
    linear: list[str] = []
    other: list[str] = []
    for name, module in model.named_modules():
        if _GENERATION.search(name) and next(module.children(), None) is None:
            (linear if isinstance(module, nn.Linear) else other).append(name)
    return linear, other


def generates(parameter: str) -> bool:
    """Whether a parameter of a Bagel, by name, serves drawing only: generation expert, latents in and out, timestep embedder."""
    return _GENERATION.search(parameter) is not None or parameter.startswith(tuple(f"{head}." for head in _HEADS))


def make_adapter(
    model: Bagel,
    kind: Kind,
    *,
    rank: int = 16,
    alpha: float | None = None,
    heads: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """An adapter of the generation expert that changes nothing yet.

    lora: low-rank changes of its linear layers. full: copies of all its layers. heads: also copies of vae2llm, llm2vae and the timestep
    embedder (the clean latents of a context are prefilled by the base and never pass through them).
    """
    linear, other = generation_modules(model)
    extra = _HEADS if heads else ()
    if kind == "full":
        return Adapter(model, copies=[*linear, *other, *extra], dtype=dtype)
    return Adapter(model, linear, extra, rank=rank, alpha=alpha, generator=generator, dtype=dtype)


class Student(nn.Module):
    """Adapter and embedders: everything that is trained, nothing of the base."""

    def __init__(self, adapter: Adapter, guidance: GuidanceEmbedders, sampler: Sampler) -> None:
        super().__init__()
        self.adapter, self.guidance, self.sampler = adapter, guidance, sampler

    @classmethod
    def fresh(cls, model: Bagel, adapter: Adapter, sampler: Sampler) -> Student:
        """A student that equals the base until it is trained, if its adapter does."""
        guidance = GuidanceEmbedders(model.config.llm.hidden_size).to(model.device)
        return cls(adapter, guidance, sampler)

    def network(self, base: Bagel, *, merged: bool = False) -> StudentNetwork:
        """The network that runs; it shares the base's tensors. `merged` (inference only): see nn.lora.attach."""
        return StudentNetwork(attach(base, self.adapter, merged=merged), self.guidance)


@dataclass(frozen=True)
class StudentNetwork:
    """`model` denoises; text in the same forward passes through the base's own weights. `guidance(text_scale [B], image_scale [B])` is
    added to the latent embeddings."""

    model: Bagel
    guidance: GuidanceEmbedders


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and up to 64 values of all tensors, the values in bf16 so that a copy in bf16 has the same one, and those
    of the weights that quantised ones were made from."""
    digest = hashlib.sha256()
    coded = {f"{name}.weight": layer.sample for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, tensor in sorted(model.state_dict().items()):
        shape, some = coded.get(name) or sample_of(tensor)
        digest.update(f"{name}{shape}".encode())
        digest.update(some.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def save_student(
    folder: Path,
    student: Student,
    base: Bagel | str,
    *,
    base_name: str = "",
    dtype: torch.dtype = torch.float32,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a student folder, whole or not at all. Raises InputError if it cannot be written.

    base: the model or its fingerprint. values: tensors to write in place of the student's present ones, by its own names.
    """
    make_folder(folder.parent)
    adapter = student.adapter
    kind: Kind = "lora" if adapter.low_rank else "full"
    state = {name: value.to(dtype) for name, value in (student.state_dict() | dict(values or {})).items()}
    tensors, embedders = ({n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("adapter.", "guidance."))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        if kind == "lora":
            config = peft_config(adapter.low_rank, adapter.copies, adapter.rank, adapter.alpha, base_name)
            save_tensors(temporary / "adapter_model.safetensors", {PEFT_PREFIX + name: value for name, value in tensors.items()})
            atomic_write_text(temporary / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        else:
            save_tensors(temporary / "moe_gen.safetensors", tensors)
        save_tensors(temporary / "guidance.safetensors", embedders)
        mark = base if isinstance(base, str) else fingerprint(base)
        about = {"format": _FORMAT, "kind": kind, "heads": has_heads(student), "base": mark}
        about |= {"base_name": base_name, **asdict(student.sampler)}
        atomic_write_text(temporary / "sampler.json", json.dumps(about, indent=2) + "\n")


def load_student(folder: Path, base: Bagel, dtype: torch.dtype = torch.float32) -> Student:
    """Reads a student of this base, onto the base's device. dtype: of its tensors, made without a copy in fp32 on the way.

    Raises InputError for a folder that is not a student's, is damaged, belongs to another base, or has no room in memory.
    """
    about = _about(folder)
    if str(about.get("kind")) in OTHER_KINDS:
        raise InputError(f"{folder}: got {OTHER_KINDS[about['kind']]}, expected a student folder")
    if about.get("format") != _FORMAT or str(about.get("kind")) not in ("lora", "full"):
        got = f"format {about.get('format')!r} and kind {about.get('kind')!r}"
        raise InputError(f"{folder}/sampler.json: got {got}, expected {_FORMAT} and lora or full; export the student again")
    if about.get("base") != (mine := fingerprint(base)):
        named = f" ({about['base_name']})" if about.get("base_name") else ""
        raise InputError(
            f"{folder}: got a student of another base{named} (fingerprint {about.get('base')}), expected one of the loaded model ({mine}); "
            "give the model it was distilled from, or distil it again"
        )
    sampler = _sampler(about, folder)
    weights = folder / f"{'adapter_model' if about['kind'] == 'lora' else 'moe_gen'}.safetensors"
    check_room(f"{folder}, student", base.device, dtype.itemsize * count_numbers(weights))
    if about["kind"] == "lora":
        rank, alpha = read_scale(folder, base.config.llm.intermediate_size)
        adapter = make_adapter(base, "lora", rank=rank, alpha=alpha, heads=about.get("heads", False), dtype=dtype)
        tensors = {n.removeprefix(PEFT_PREFIX): t for n, t in load_tensors(weights).items()}
    else:
        adapter = make_adapter(base, "full", heads=about.get("heads", False), dtype=dtype)
        tensors = load_tensors(weights)
    student = Student.fresh(base, adapter, sampler).to(dtype)
    fill_adapter(adapter, tensors, folder)
    fill_adapter(student.guidance, load_tensors(folder / "guidance.safetensors"), folder)
    return student.eval()


def carry_student(folder: Path, old: Bagel, new: Bagel) -> Student:
    """A student of `old`, as one of `new`: the same change on another model of its shape, such as `old` trained on.

    ours (task arithmetic, Ilharco et al. 2023): low-rank changes stay as they are, whole layers become new + (student - old). A start for
    further training, not yet a student of `new`. Raises InputError for models of different shapes and for what `load_student` refuses.
    """
    if (was := old.config.model_dump()) != (now := new.config.model_dump()):
        changed = ", ".join(name for name in was if was[name] != now[name])
        raise InputError(f"{folder}: got a student of a model whose {changed} config differs, expected one of the same shape")
    student = load_student(folder, old)
    with torch.no_grad():
        for name in student.adapter.copies:
            layers = (plain_layer(model.get_submodule(name)) for model in (student.adapter, old, new))
            for own, before, after in zip(*(layer.parameters() for layer in layers), strict=True):
                own.add_(after.to(own.dtype) - before.to(own.dtype))
    return student


@torch.no_grad()
def as_whole(student: Student, base: Bagel) -> Student:
    """The same student with whole layers, all trainable, in place of low-rank changes."""
    if not student.adapter.low_rank:
        return student
    given, adapter = student.adapter, make_adapter(base, "full", heads=has_heads(student))
    for name in adapter.copies:
        own = adapter.get_submodule(name)  # the base's, in fp32
        if name in given.low_rank:
            own.get_parameter("weight").add_(given.change(name))
        elif name in given.copies:
            own.load_state_dict(given.get_submodule(name).state_dict())
    return Student(adapter, student.guidance, student.sampler)


@torch.no_grad()
def factorised(student: Student, base: Bagel, rank: int) -> tuple[Student, float]:
    """A student of whole layers as a LoRA of that rank, and |error| / |change| over its matrices. Norms and biases stay the base's."""
    adapter = make_adapter(base, "lora", rank=rank, heads=has_heads(student))
    missed = whole = 0.0
    for name in adapter.low_rank:
        own, layer = student.adapter.get_submodule(name).get_parameter("weight").float(), base.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        before = matrix_of(layer).float()
        factors, change = factorise(own - before, rank), adapter.get_submodule(name)
        change.load_state_dict({"lora_A.weight": factors.a, "lora_B.weight": factors.b})
        missed, whole = missed + factors.missed, whole + factors.whole
    for name in adapter.copies:
        adapter.get_submodule(name).load_state_dict(student.adapter.get_submodule(name).state_dict())
    return Student(adapter, student.guidance, student.sampler), (missed / whole) ** 0.5 if whole else 0.0


def has_heads(student: Student) -> bool:
    return bool(set(_HEADS) & set(student.adapter.copies))


def average_students(folders: Sequence[Path], base: Bagel) -> Student:
    """The mean of students of one base, tensor by tensor; sampler settings are the first one's, `stage` names all of theirs.

    For students trained on from one another, whose weights hardly differ while their errors partly do (model soups, Wortsman et al. 2022).
    Low-rank students of one rank are averaged factor by factor, not product by product; others become whole layers first. Raises
    InputError for fewer than two, for layers that differ even then, or for different numbers of evaluations.
    """
    if len(folders) < 2:
        raise InputError(f"got {len(folders)} student to average, expected two or more")
    first, *others = (load_student(folder, base) for folder in folders)
    if any(_shape(other) != _shape(first) for other in others):
        first, *others = (as_whole(student, base) for student in (first, *others))
    for folder, other in zip(folders[1:], others, strict=True):
        if _shape(other) != _shape(first):
            raise InputError(f"{folder}: got a student with other layers than {folders[0]}, expected students trained on from one another")
        if (theirs := other.sampler.nfe) != first.sampler.nfe:
            raise InputError(f"{folder}: got a student of {theirs} evaluations, expected {first.sampler.nfe} as {folders[0]} has")
    with torch.no_grad():
        states = [student.state_dict() for student in (first, *others)]
        for name, own in states[0].items():
            own.copy_(torch.stack([state[name].float() for state in states]).mean(0))
    made = dict.fromkeys(student.sampler.stage for student in (first, *others))
    first.sampler = replace(first.sampler, stage=" + ".join(made))
    return first


def _shape(student: Student) -> tuple[Any, ...]:
    """What must be equal for a mean of tensors to make sense."""
    return student.adapter.alpha, {name: tensor.shape for name, tensor in student.state_dict().items()}


def _about(folder: Path) -> dict[str, Any]:
    """The contents of a student's sampler.json. Raises InputError."""
    if not (folder / "sampler.json").exists() and (folder / "export").is_dir():
        raise InputError(f"{folder}: got a run of training, expected a student's folder; give {folder / 'export'}")
    return read_json(folder / "sampler.json", _MISSING)


def read_sampler(folder: Path) -> Sampler:
    """The sampler of a student's folder, without its weights. Raises InputError."""
    return _sampler(_about(folder), folder)


def peft_config(layers: Sequence[str], whole: Sequence[str], rank: int, alpha: float, base_name: str) -> dict[str, Any]:
    """The contents of PEFT's adapter_config.json. layers: modules with a LoRA; whole: modules that are replaced, both by name."""
    leaves = sorted({name.rpartition(".")[2] for name in layers if ".mlp_moe_gen." not in name})
    inner = sorted({".".join(name.split(".")[-2:]) for name in layers if ".mlp_moe_gen." in name})
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": leaves + inner,
        "modules_to_save": list(whole),
        "base_model_name_or_path": base_name,
        "task_type": None,
        "inference_mode": True,
    }


def read_scale(folder: Path, widest: int) -> tuple[int, float]:
    """(rank, alpha) of the low-rank changes in a folder; widest: the largest rank there can be. Raises InputError."""
    config = read_json(folder / "adapter_config.json", _MISSING)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (type(rank) is int and 1 <= rank <= widest and is_number(alpha) and float(alpha or 0) > 0):
        raise InputError(
            f"{folder}/adapter_config.json: got r {rank!r} and lora_alpha {alpha!r}, expected 1 to {widest} and a positive number; "
            "restore the file"
        )
    return rank, float(alpha or 0)


def read_merged_sampler(folder: Path) -> Sampler | None:
    """The sampler of a model folder with a student merged into it; None for an ordinary model. Raises InputError for a damaged file."""
    path = folder / "sampler.json"
    if not path.exists():
        return None
    about = read_json(path)
    return _sampler(about, folder) if about.get("kind") == "merged" else None


def _sampler(about: Mapping[str, Any], folder: Path) -> Sampler:
    """The Sampler in a sampler.json's contents, every field checked against the type of its default. Raises InputError."""
    values: dict[str, Any] = {}
    for field in fields(Sampler):
        if field.name not in about:
            raise InputError(f"{folder}/sampler.json: {field.name} is missing; export the student again")
        value, usual = about[field.name], field.default
        if isinstance(usual, str):
            fits, want = isinstance(value, str), "a text"
        elif isinstance(usual, tuple):
            fits, want = isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1], "[low, high]"
        else:
            kind = int if field.name == "nfe" else (int, float)
            fits, want = isinstance(value, kind) and is_number(value) and 0 <= value <= _LARGEST, f"a number of at most {_LARGEST}"
        if not fits or (field.name in ("nfe", "shift") and value <= 0):
            raise InputError(f"{folder}/sampler.json: got {field.name} {value!r}, expected {want}; restore it")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return Sampler(**values)


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@torch.no_grad()
def fill_adapter(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies tensors into a module, strictly. Raises InputError for other names or shapes, or values that are not finite."""
    live = module.state_dict()
    odd = sorted(live.keys() ^ tensors.keys()) or sorted(n for n in live if live[n].shape != tensors[n].shape)
    if odd:
        raise InputError(f"{folder}: {len(odd)} tensors do not fit, first {odd[0]}; expected this base's names and shapes, export it again")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{folder}: {name} holds values that are not finite; the file is damaged or its training diverged")
        live[name].copy_(value)
