"""Folders: round trip, shards, and every way a file can be wrong."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, BagelOptions, ImageSizes, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import TensorFolder, load_folder, load_tensors, save_folder, save_tensors

CONFIG = BagelConfig(
    llm=LLMConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=40),
    vit=ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4),
    vae=VaeConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, norm_groups=2, downsample=2),
    options=BagelOptions(
        max_latent_size=4, vit_max_num_patch_per_side=4, vit_transform=ImageSizes(max_size=16, min_size=4, stride=4), default_size=(16, 16)
    ),
)


def build() -> tuple[Bagel, AutoEncoder]:
    torch.manual_seed(0)
    return fresh_bagel(CONFIG, torch.Generator().manual_seed(0)), AutoEncoder(CONFIG.vae)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, vae = build()
    save_folder(tmp_path / "m", CONFIG, model.state_dict(), vae.state_dict(), dtype=torch.float32)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edit": {"text_scal": 9}}, "edit.text_scal: "),
        ({"text_to_image_interval": [0, 1]}, "text_to_image_interval: "),
        ({"vit_transform": {"max_size": 16, "min_size": 4, "stride": 6}}, "got vit_transform.stride 6, expected a multiple of 4"),
        ({"vae_transform": {"max_size": 16, "min_size": 4, "stride": 6}}, "got vae_transform.stride 6, expected a multiple of 4"),
        ({"default_size": [16, 18]}, "got default_size 18, expected a multiple of 4"),
    ],
)
def test_settings_that_this_program_does_not_know_or_cannot_follow(folder: Path, change: dict[str, Any], words: str) -> None:
    path = folder / "bagel_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(folder, "bagel_config.json", words)


def test_keys_of_the_references_own_config_pass(folder: Path) -> None:
    path = folder / "bagel_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"visual_gen": True, "connector_act": "gelu", "timestep_shift": 3.0}))
    assert load_folder(folder)[0].config == CONFIG


def test_round_trip(folder: Path) -> None:
    model, vae = load_folder(folder)
    before, vae_before = build()
    assert model.config == CONFIG
    for a, b in ((model, before), (vae, vae_before)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())


def test_shards_equal_one_file(folder: Path, tmp_path: Path) -> None:
    model, vae = build()
    save_folder(tmp_path / "s", CONFIG, model.state_dict(), vae.state_dict(), dtype=torch.float32, max_bytes=20_000)
    assert (tmp_path / "s" / "ema.safetensors.index.json").exists() and not (tmp_path / "s" / "ema.safetensors").exists()
    one, many = load_folder(folder)[0], load_folder(tmp_path / "s")[0]
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), many.state_dict().values(), strict=True))
    report = inspect_folder(tmp_path / "s")
    assert report["weights"]["ema"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(report["weights"]["ema"]["files"]) > 1


def test_a_folder_in_place_of_a_config_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "llm_config.json").unlink()
    (folder / "llm_config.json").mkdir()
    assert cli.main(["inspect", str(folder)]) == 2
    assert "llm_config.json: got a folder where a file should be, expected" in capsys.readouterr().err


def test_a_file_larger_than_the_machine_s_memory_is_mapped(tmp_path: Path) -> None:
    values = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # of two bytes each: twice the memory
    header = json.dumps({"x": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}}).encode()
    with (tmp_path / "ema.safetensors").open("wb") as file:  # sparse: the zeros take no room on the disk
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * values)
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", 0x3F80))
    source = TensorFolder(tmp_path, "ema")
    assert source.shapes == {"x": (values,)}
    found = source.tensor("x")
    assert found[0] == 0 and found[-1] == 1
    found[1] = 2  # not in the file
    assert source.tensor("x")[1] == 0


def test_a_loaded_tensor_may_be_written_to_and_its_file_stays(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([True]), "none": torch.empty(0, 4), "one": torch.tensor(7)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    found = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in tensors.items()
    )
    found["b"].mul_(2)
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["b"], tensors["b"])


def test_numbers_at_odd_addresses(tmp_path: Path) -> None:
    """Its writer pads the header, others need not."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((3 - len(header)) % 4)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<3f", 1, 2, 3))
    found = load_tensors(tmp_path / "x.safetensors")["x"]
    assert found.tolist() == [1, 2, 3] and found.data_ptr() % 4 == 0


def test_a_type_that_pytorch_lacks_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match="got x as U64, expected one of F64, "):
        load_tensors(tmp_path / "x.safetensors")


def test_a_file_that_the_system_does_not_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    refused(folder, "ema.safetensors: got no room to map its", "Cannot allocate memory", "raise the limit")


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    whole = load_tensors(folder / "ema.safetensors")
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del whole[name]
        else:
            whole[name] = tensor
    save_tensors(folder / "ema.safetensors", whole)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_folder(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_tensors_are_named(folder: Path) -> None:
    change(folder, llm2vae__bias=None, vae2llm__bias=torch.zeros(7), extra__one=torch.zeros(1))
    refused(folder, "3 of", "missing llm2vae.bias", "vae2llm.bias is [7], expected [24]", "unexpected extra.one")


def test_a_prefix_before_every_name_shows(folder: Path) -> None:
    tensors = load_tensors(folder / "ema.safetensors")
    save_tensors(folder / "ema.safetensors", {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in tensors.items()})
    refused(folder, f"{2 * len(tensors)} of {2 * len(tensors)} tensors", "missing ", "unexpected _fsdp_wrapped_module.")


def test_quantised_weights_are_refused(folder: Path) -> None:
    change(folder, llm2vae__bias=torch.ones(8, dtype=torch.int8))
    refused(folder, "1 tensors that are not floating-point numbers, first llm2vae.bias as I8")
    with pytest.raises(InputError, match="not quantised"):
        inspect_folder(folder)
    change(folder, llm2vae__bias=torch.zeros(8, dtype=torch.float8_e4m3fn))
    load_folder(folder)


def test_weights_under_another_name_or_behind_a_broken_link(folder: Path) -> None:
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    refused(folder, "neither ema.safetensors nor ema.safetensors.index.json is there, but model.safetensors is (rename it")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "but pytorch_model.bin is, which is not read here")
    (folder / "ema.safetensors").symlink_to("../../blobs/gone")
    refused(folder, "ema.safetensors: missing; restore the file")


def test_values_that_are_not_finite(folder: Path) -> None:
    change(folder, llm2vae__bias=torch.full((8,), float("nan")))
    refused(folder, "llm2vae.bias", "not finite")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in a zip", b"\x10\0\0\0\0\0\0\0{broken", b"\xff" * 64])
def test_foreign_files(folder: Path, content: bytes) -> None:
    (folder / "ema.safetensors").write_bytes(content)
    refused(folder, "ema.safetensors", "not a whole safetensors file")


def test_truncated_file(folder: Path) -> None:
    whole = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, "not a whole safetensors file")


def test_missing_parts(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "got no folder")
    (folder / "ae.safetensors").unlink()
    refused(folder, "ae.safetensors")
    (folder / "llm_config.json").unlink()
    refused(folder, "llm_config.json: missing")


def test_broken_json(folder: Path) -> None:
    (folder / "llm_config.json").write_text("{")
    refused(folder, "llm_config.json", "not readable as JSON")
    (folder / "llm_config.json").write_text(json.dumps({"hidden_size": "wide"}))
    refused(folder, "hidden_size", "wide")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("llm", "num_attention_heads", 0), ("llm", "num_attention_heads", 5), ("llm", "num_key_value_heads", 2), ("llm", "hidden_size", -1),
        ("llm", "hidden_size", 10**12), ("llm", "rms_norm_eps", float("nan")), ("llm", "rope_theta", 0),
        ("llm", "max_position_embeddings", -5), ("vit", "patch_size", 0), ("vit", "patch_size", 17), ("vit", "num_attention_heads", 5),
        ("vae", "norm_groups", 3), ("vae", "ch_mult", []),
        ("vae", "downsample", 4), ("vae", "scale_factor", 0), ("bagel", "default_size", [0, 64]), ("bagel", "latent_patch_size", 0),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be(folder: Path, file: str, key: str, value: object) -> None:
    path = folder / f"{file}_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(folder, path.name, "correct the file")


def test_a_config_as_transformers_5_writes_it(folder: Path) -> None:
    path = folder / "llm_config.json"
    given = json.loads(path.read_text())
    del given["rope_theta"]
    path.write_text(json.dumps(given | {"rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}}))
    assert BagelConfig.from_folder(folder).llm.rope_theta == 12345.0
    path.write_text(json.dumps(given | {"rope_parameters": None}))
    assert BagelConfig.from_folder(folder).llm.rope_theta == LLMConfig().rope_theta
    path.write_text(json.dumps(given | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}))
    refused(folder, "rope_type 'yarn'", "correct the file")
    path.write_text(json.dumps(given | {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}))
    refused(folder, "rope_type 'yarn'", "correct the file")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": {"a": 3, "b": "x"}}',
        '{"weight_map": {"a": "../outside.safetensors"}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
    ],
)
def test_broken_index(folder: Path, index: str) -> None:
    (folder / "ema.safetensors").unlink()
    (folder / "ema.safetensors.index.json").write_text(index)
    refused(folder, str(folder))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:  # as safetensors 0.4 to 0.6 tell it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("hyperbagel.model.weights.save_file", full)
    with pytest.raises(InputError, match="full disk"):
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []
