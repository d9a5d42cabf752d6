"""Weights on disk: strict, memory-mapped, safetensors only (never pickle). The only model file that knows the format."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_path, atomic_write_text
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.nn.quantized import Codes, quantize

# The types of a safetensors header that PyTorch has too.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Without this flag, which Python names from 3.13 on, Linux refuses a mapping that may be written to and is larger than its memory.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_UNREAD = (".gguf", ".bin", ".pt", ".pth", ".ckpt")  # how files of weights end elsewhere


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        write_tensors(temporary, whole, {"format": "pt", **(metadata or {})})
        temporary.chmod(mode)  # safetensors makes files that only their owner can read


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous CPU tensors, not atomically: for a folder still in the making. Raises OSError with the system's reason."""
    try:
        save_file(tensors, str(path), metadata=metadata)
    except SafetensorError as error:  # the writer gives the system's reason as text only
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises InputError for a missing, truncated or foreign file."""
    file = _File(path)
    return {name: file.tensor(name).to(device) for name in file.shapes}


def count_numbers(path: Path) -> int:
    """How many numbers a safetensors file holds. Raises InputError as `load_tensors` does."""
    return sum(math.prod(shape) for shape in _File(path).shapes.values())


def save_sharded(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_bytes: int | None = None) -> None:
    """Writes stem.safetensors, or stem-0000k-of-0000n.safetensors with an index if it would pass `max_bytes`.

    None: one file whatever its size, which is all that BAGEL's own code opens.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        n = tensor.numel() * tensor.element_size()
        if max_bytes is not None and shards[-1] and size + n > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += n
    if len(shards) == 1:
        save_tensors(folder / f"{stem}.safetensors", shards[0])
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_tensors(folder / name, shard)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {k: n for n, s in zip(names, shards, strict=True) for k in s}}
    atomic_write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1))


class TensorFolder:
    """Name -> tensor of `stem`.safetensors or of its shards; nothing is read before it is asked for."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if single.exists() or single.is_symlink():  # opening a dangling link then says that its file is missing
            files = [single]
        elif index.exists():
            files = [folder / name for name in _index_files(index)]
        else:
            told = _other_weights(folder) if stem == "ema" else ""
            raise InputError(f"{folder}: neither {single.name} nor {index.name} is there{told}; give a folder in BAGEL's layout")
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in files:
            file = _File(path)
            for name in file.shapes:
                if name in self.file_of:
                    raise InputError(f"{path}: {name} is also in {self.file_of[name].name}; each tensor belongs in one shard")
                self.file_of[name] = path
            self.shapes |= file.shapes
            self.dtypes |= file.dtypes

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Name -> shape against what is there. Raises InputError naming the first few missing, extra or wrongly shaped tensors."""
        missing = [f"missing {n} {list(s)}" for n, s in expected.items() if n not in self.shapes]
        extra = [f"unexpected {n} {list(s)}" for n, s in self.shapes.items() if n not in expected]
        shape = [f"{n} is {list(self.shapes[n])}, expected {list(s)}" for n, s in expected.items() if self.shapes.get(n, s) != s]
        problems = [told for row in zip_longest(missing, shape, extra) for told in row if told]  # in turn: a prefix shows at once
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise InputError(
                f"{self.folder}: {len(problems)} of {len(self.shapes.keys() | expected.keys())} tensors do not fit the folder's config: "
                f"{'; '.join(problems[:4])}{more}; check that the config files belong to these weights"
            )

    def check_numbers(self) -> None:
        """Raises InputError for tensors of integers: these are quantised, and mean nothing without their scales."""
        whole = {name: kind for name, kind in self.dtypes.items() if not kind.startswith(("F", "BF"))}
        if whole:
            name, kind = next(iter(whole.items()))
            raise InputError(
                f"{self.folder}: got {len(whole)} tensors that are not floating-point numbers, first {name} as {kind}, expected weights "
                "that are not quantised; give the model that they were made from"
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return _File(self.file_of[name]).tensor(name)

    def sizes(self) -> dict[str, Any]:
        """Number of tensors and of parameters, and their dtypes, for a report."""
        parameters = sum(math.prod(shape) for shape in self.shapes.values())
        return {"tensors": len(self.shapes), "parameters": parameters, "dtypes": sorted(set(self.dtypes.values()))}

    def tensors(self, device: str) -> Iterable[tuple[str, Tensor]]:
        """Every tensor, one at a time, straight from the memory map to the device."""
        for path in dict.fromkeys(self.file_of.values()):
            file = _File(path)
            for name in file.shapes:
                yield name, file.tensor(name).to(device)


def fill(module: nn.Module, source: TensorFolder, device: torch.device, dtype: torch.dtype, codes: Codes | None = None) -> None:
    """Loads a module built on the meta device, strictly; no second copy of the weights is made in host memory.

    codes: how the matrices of `decoder_layers` are stored, each of them packed as soon as it is on the device; None: in `dtype`.

    Raises InputError for tensors that do not fit, and for values that are not finite.
    """
    slots = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    source.check({name: tuple(slot.shape) for name, slot in slots.items()})
    source.check_numbers()
    coded = {} if codes is None else decoder_layers(module)
    for name, tensor in source.tensors(str(device)):
        value = tensor.to(dtype)
        if not torch.isfinite(value).all():
            raise InputError(f"{source.folder}: {name} holds values that are not finite; the file is damaged or its training diverged")
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if codes is not None and leaf == "weight" and owner_name in coded:
            assert isinstance(owner, nn.Linear)
            module.set_submodule(owner_name, quantize(owner, value, codes))
        elif leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value


def load_folder(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    codes: Codes | None = None,
) -> tuple[Bagel, AutoEncoder]:
    """The model and its autoencoder from a folder in BAGEL's layout, strictly, in evaluation mode.

    codes: how the matrices of the decoder's layers, 13 of BAGEL-7B-MoT's 15 thousand million weights, are stored (nn.quantized); None: in
    `dtype`. The autoencoder stays in fp32, as in the reference. Raises InputError for anything missing, extra, misshapen or not finite.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: got no folder, expected a model folder in BAGEL's layout, or the name toybox")
    config = BagelConfig.from_folder(folder)
    with torch.device("meta"):
        model, vae = Bagel(config, attention), AutoEncoder(config.vae)
    fill(model, TensorFolder(folder, "ema"), torch.device(device), dtype, codes)
    model.codes = codes
    fill(vae, TensorFolder(folder, "ae"), torch.device(device), torch.float32)
    if torch.device(device).type == "cpu":
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions on a CPU: 17 to 8 ms for 64 x 64 pixels
    return model.eval(), vae.eval()


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of both experts, by name."""
    decoder = "language_model.model.layers."
    return {name: layer for name, layer in model.named_modules() if name.startswith(decoder) and isinstance(layer, nn.Linear)}


def stored_dtype(folder: Path, stem: str = "ema") -> torch.dtype:
    """bf16 if every weight of the model (`stem` ae: of its autoencoder) is stored in it, else fp32: the least that keeps every value."""
    return torch.bfloat16 if folder.is_dir() and set(TensorFolder(folder, stem).dtypes.values()) == {"BF16"} else torch.float32


def save_folder(
    folder: Path,
    config: BagelConfig,
    model: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> None:
    """Writes a folder in BAGEL's layout (the tokenizer's files are the caller's). Weights in `dtype`, the autoencoder too unless
    `vae_dtype` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in config.files().items():
        atomic_write_text(folder / name, json.dumps(content, indent=2) + "\n")
    for stem, tensors, kind in (("ema", model, dtype), ("ae", vae, vae_dtype or dtype)):
        save_sharded(folder, stem, {k: v.detach().to("cpu", kind) for k, v in tensors.items()}, max_bytes)


class _File:
    """One safetensors file, checked when it is opened, its tensors mapped into memory when the first of them is asked for.

    The library's own reader for PyTorch maps the file as memory of the process, which Linux refuses beyond the memory of the machine:
    there a 29 GB checkpoint could not even be described, and `int8` and `nf4` are for just such machines. Its reader for NumPy does not,
    but NumPy has no bf16; so it reads and checks the header, and the tensors are views of a mapping made here. They may be written to:
    what is written stays in memory (copy on write).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="numpy"):
                pass  # it is whole, and its header fits it
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")  # of the header
                header = json.loads(file.read(length))
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing; restore the file") from error
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); download or export it again") from error
        header.pop("__metadata__", None)
        parts = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))  # as they are on the disk
        self.shapes = {name: tuple(part["shape"]) for name, part in parts.items()}
        self.dtypes = {name: part["dtype"] for name, part in parts.items()}
        self._starts = {name: 8 + length + part["data_offsets"][0] for name, part in parts.items()}
        self._mapped: mmap.mmap | None = None

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, not copied unless it begins between two of its numbers; it keeps the mapping alive."""
        shape, kind = self.shapes[name], self.dtypes[name]
        if kind not in _TYPES:
            raise InputError(f"{self.path}: got {name} as {kind}, expected one of {', '.join(_TYPES)}; export it in one of these")
        if 0 in shape:
            return torch.empty(shape, dtype=_TYPES[kind])
        if self._mapped is None:
            self._mapped = self._map()
        dtype, start = _TYPES[kind], self._starts[name]
        found = torch.frombuffer(self._mapped, dtype=torch.uint8, count=dtype.itemsize * math.prod(shape), offset=start)
        return (found.clone() if start % dtype.itemsize else found).view(dtype).view(shape)

    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            try:
                if sys.platform == "win32":
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            except (OSError, MemoryError) as error:
                raise InputError(
                    f"{self.path}: got no room to map its {self.path.stat().st_size / 1e9:.3g} GB ({error}), expected address space for "
                    "it whole, raise the limit (ulimit -v, or vm.overcommit_memory if it is 2)"
                ) from error


def _other_weights(folder: Path) -> str:
    """What a folder without the model's weights holds in their place, as the end of a sentence; '' if nothing."""
    by_size = sorted(folder.glob("*"), key=lambda path: (-path.lstat().st_size, path.name))  # the largest is the model's
    for path in by_size:
        if path.name.endswith(".safetensors") and path.name != "ae.safetensors":
            return f", but {path.name} is (rename it, if its tensors have BAGEL's names)"
    unread = [path.name for path in by_size if path.name.endswith(_UNREAD)]
    return f", but {unread[0]} is, which is not read here (only safetensors are)" if unread else ""


def _index_files(index: Path) -> list[str]:
    """Names of the shards in a safetensors index. Raises InputError for a damaged index, or one that points out of its folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({name + "" for name in weight_map.values()})  # + "": a TypeError for what is not a string
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not a safetensors index ({error}); it needs a weight_map of tensor names to files") from error
    for name in names:
        if "/" in name or "\\" in name or name.startswith("."):
            raise InputError(f"{index}: shard {name!r} is not a plain file name in the same folder")
    return names
