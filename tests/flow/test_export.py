"""Exports are read back by code that knows nothing of students: the plain model for a merged folder, W + B A for a LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperbagel import cli
from hyperbagel.core.errors import InputError, Notice
from hyperbagel.export import _beside, _difference, export_drafter, export_lora, export_student, verify
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.model.merge import as_low_rank
from hyperbagel.model.student import PEFT_PREFIX, Kind, Sampler, Student, load_student, make_adapter, save_student
from hyperbagel.model.weights import load_folder, load_tensors, save_tensors
from hyperbagel.nn.lora import Adapter, factorise
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.export import import_eagle3
from hyperbagel.speculative.drafters.folder import make_module, save_drafter

SCALES = {"text_scale": 3.0, "image_scale": 1.5}
SAMPLER = Sampler(nfe=3, shift=2.5, stage="test")


def students(folder: Path, heads: bool = True) -> dict[str, Student]:
    """One of each kind, changed everywhere at random, under folder/students."""
    base, _ = load_folder(folder)
    made = {}
    kinds: tuple[Kind, ...] = ("lora", "full")
    for seed, kind in enumerate(kinds):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # the adapter and the embedders draw from it: else each run has another student
        student = Student.fresh(base, make_adapter(base, kind, rank=4, alpha=6, heads=heads), SAMPLER)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        save_student(folder / "students" / (kind if heads else f"{kind}-bare"), student, base)
        made[kind] = student
    return made


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Student]:
    students(folder, heads=False)
    return students(folder)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["lora", "full", "lora-bare"])
def test_a_merged_folder_without_guidance_draws_what_base_and_student_draw(name: str, made: Any, folder: Path, tmp_path: Path) -> None:
    out = export_student(name, tmp_path / "merged", model=str(folder), dtype="float32", **SCALES).folder
    both, merged = HyperBagel.from_pretrained(folder, device="cpu"), HyperBagel.from_pretrained(out, device="cpu")
    plain = {"steps": 3, "shift": 2.5, "text_scale": 1.0}  # as stock code would be told
    (out / "sampler.json").rename(tmp_path / "sampler.json")
    stock = HyperBagel.from_pretrained(out, device="cpu")
    [expected] = both.generate("a red car", seed=1, student=name, **SCALES)
    for result in (merged.generate("a red car", seed=1)[0], stock.generate("a red car", seed=1, **plain)[0]):
        assert np.abs(pixels(result.image) - pixels(expected.image)).max() <= 1 and result.nfe == 3
    [other] = both.generate("a red car", seed=1, student=name, text_scale=4.5, image_scale=1.0)
    assert np.abs(pixels(other.image) - pixels(expected.image)).max() > 1, "the scales matter, so the test can fail"
    assert both.ask("what is it?", max_tokens=8).text == stock.ask("what is it?", max_tokens=8).text
    assert stock.settings.__self__ is stock and stock.sampler is None and merged.sampler is not None


def test_unless_told_the_scales_of_a_caption_s_picture_are_folded_in(made: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "students" / "lora", tmp_path / "own")
    told = json.loads((tmp_path / "own" / "sampler.json").read_text()) | {"text_scale": 3.0, "edit_text_scale": 3.5, "image_scale": 1.0}
    (tmp_path / "own" / "sampler.json").write_text(json.dumps(told | {"edit_image_scale": 2.0}))
    exported = export_lora(tmp_path / "own", tmp_path / "out", model=str(folder))
    assert (exported.text_scale, exported.image_scale) == (3.0, 1.0)


def test_the_sampler_is_bound_to_merged_weights(made: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert cli.main(["export", "student", "full", "-o", str(out), "--model", str(folder), "--text-scale", "2", "--verify"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{out}\n" and "num_timesteps=4, timestep_shift=2.5, cfg_text_scale=1.0" in told.err
    assert "guidance folded in: text 2, image 1\n" in told.err and "read by the merged weights" in told.err
    [line] = [line for line in told.err.splitlines() if line.startswith("text to image: base and student against")]
    assert int(line.rpartition(" ")[2]) <= 1
    assert inspect_folder(out)["sampler"]["kind"] == "merged" and not (out / "students").exists()
    merged = HyperBagel.from_pretrained(out, device="cpu")
    with pytest.warns(Notice, match="this model: got num_steps 5, it was made for 3"):
        assert merged.generate("x", seed=0, steps=5)[0].nfe == 5
    assert cli.main(["generate", "x", "-o", str(tmp_path / "a.png"), "--seed", "0", "--model", str(out), "--text-scale", "4"]) == 0
    err = capsys.readouterr().err
    assert "warning: this model: got text_scale 4, it was made for 1\n" in err and ".py" not in err, "in the program's own form"
    with pytest.raises(InputError, match="give it as --model"):
        load_student(out, merged.parts.model)


def test_edits_differ_because_the_source_is_read_by_the_merged_weights(made: Any, folder: Path, tmp_path: Path) -> None:
    done = export_student("full", tmp_path / "merged", model=str(folder), **SCALES)
    (drawn, _, most), (edit, mean, _) = verify(done, "full", model=str(folder))
    assert (drawn, edit) == ("text to image", "edit") and most <= 1 < mean


def rebuilt(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """The base with a LoRA applied as PEFT defines it: W + (alpha / r) B A, biases of B scaled alike, whole modules replaced."""
    config = json.loads((out / "adapter_config.json").read_text())
    found = {n.removeprefix(PEFT_PREFIX): x for n, x in load_tensors(out / "adapter_model.safetensors").items()}
    state, scale = load_folder(folder)[0].state_dict(), config["lora_alpha"] / config["r"]
    for name, x in found.items():
        module, _, leaf = name.partition(".lora_")
        if not leaf:
            assert any(name.startswith(f"{whole}.") for whole in config["modules_to_save"])
            state[name] = x
        elif leaf == "A.weight":
            assert any(module == target or module.endswith(f".{target}") for target in config["target_modules"])
            state[f"{module}.weight"] = state[f"{module}.weight"] + scale * found[f"{module}.lora_B.weight"] @ x
        elif leaf == "B.bias" and x.any():
            assert config["lora_bias"]
            state[f"{module}.bias"] = state[f"{module}.bias"] + scale * x
    return state


@pytest.mark.parametrize(("name", "rank"), [("lora", None), ("full", 64), ("lora-bare", None), ("full-bare", 64)])
def test_a_lora_of_enough_rank_is_the_merged_model(name: str, rank: int | None, made: Any, folder: Path, tmp_path: Path) -> None:
    export_lora(name, tmp_path / "lora", model=str(folder), rank=rank, **SCALES)
    export_student(name, tmp_path / "merged", model=str(folder), dtype="float32", **SCALES)
    merged, base = load_folder(tmp_path / "merged")[0].state_dict(), load_folder(folder)[0].state_dict()
    mine = rebuilt(folder, tmp_path / "lora")
    assert mine.keys() == merged.keys()
    for tensor, x in mine.items():
        torch.testing.assert_close(x, merged[tensor], atol=2e-5, rtol=1e-4, msg=tensor)
    changed = {n for n in merged if not torch.equal(merged[n], base[n])}
    assert "time_embedder.mlp.2.bias" in changed and all("_moe_gen" in n or n.split(".")[0] in HEADS for n in changed)


HEADS = {"vae2llm", "llm2vae", "time_embedder"}


def test_the_error_of_a_small_rank_is_what_is_missing(made: dict[str, Student], folder: Path, tmp_path: Path) -> None:
    base, _ = load_folder(folder)
    errors = [as_low_rank(base, made["full"], 4.0, 1.0, rank).error for rank in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2] > 0
    notes = export_lora("full", tmp_path / "lora", model=str(folder), rank=4).notes
    assert any("so edits differ somewhat; for exact ones" in note for note in notes)  # no --verify there
    assert notes[0].startswith(f"rank 4: {errors[1]:.2%} of the change is missing")
    name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    change = made["full"].adapter.get_parameter(name) - base.get_parameter(name)
    factors = factorise(change.detach(), 4)
    s = torch.linalg.svdvals(change.detach().double())
    assert factors.missed == pytest.approx(float(s[4:].square().sum()), rel=1e-4) and factors.whole == pytest.approx(
        float(s.square().sum())
    )


def test_a_large_matrix_is_factorised_nearly_as_well() -> None:
    g = torch.Generator().manual_seed(0)
    change = torch.randn(1100, 30, generator=g) @ torch.randn(30, 1200, generator=g) + 0.1 * torch.randn(1100, 1200, generator=g)
    factors, s = factorise(change, 20), torch.linalg.svdvals(change)
    assert factors.missed <= 1.001 * float(s[20:].square().sum())


def load_plain(folder: Path) -> Any:
    """The base for PEFT, which looks for a configuration of transformers' kind."""
    base = load_folder(folder)[0]
    base.config = {"model_type": "custom"}  # type: ignore[assignment]
    return base


def test_peft_loads_the_lora(made: Any, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the LoRA is checked against its definition only")
    for name, rank in (("lora", None), ("full", 64)):
        out = export_lora(name, tmp_path / name, model=str(folder), rank=rank, **SCALES).folder
        merged = export_student(name, tmp_path / f"{name}-merged", model=str(folder), dtype="float32", **SCALES).folder
        base = load_plain(folder)
        loaded = peft.PeftModel.from_pretrained(base, str(out)).get_base_model()
        for layer, expected in load_folder(merged)[0].named_modules():
            if isinstance(expected, torch.nn.Linear):
                x = torch.randn(3, expected.in_features)
                torch.testing.assert_close(loaded.get_submodule(layer)(x), expected(x), atol=1e-4, rtol=1e-4, msg=layer)
        if name == "lora":  # with biases of B PEFT cannot merge: some layers of the base have none
            state = peft.PeftModel.from_pretrained(load_plain(folder), str(out)).merge_and_unload().state_dict()
            for tensor, x in load_folder(merged)[0].state_dict().items():
                torch.testing.assert_close(state[tensor], x, atol=2e-5, rtol=1e-4, msg=tensor)


def test_the_eagle3_drafter(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, _ = load_folder(folder)
    for kind in ("eagle3", "block"):
        module = make_module(DrafterConfig.for_target(kind, target.config.llm))
        module.init_from(target, torch.Generator().manual_seed(0))
        save_drafter(tmp_path / kind, module, torch.float32)
    own = load_tensors(tmp_path / "eagle3" / "drafter.safetensors")
    options = ["-o", str(tmp_path / "out"), "--model", str(folder)]
    assert cli.main(["export", "eagle3", str(tmp_path / "eagle3"), *options, "--dtype", "float32"]) == 0
    again = import_eagle3(tmp_path / "out", target.config.llm)
    assert all(torch.equal(own[name], x) for name, x in again.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    nested = {"rope_parameters": {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}}  # as transformers 5 writes it
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | nested))
    assert import_eagle3(tmp_path / "out", target.config.llm).config == again.config
    with pytest.raises(InputError, match="kind block, expected eagle3"):
        export_drafter(tmp_path / "block", tmp_path / "other", model=str(folder))
    assert not (tmp_path / "other").exists()


def test_what_is_refused(made: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    where = ["--model", str(folder)]
    for argv, words in (
        (["student", "full", "-o", str(tmp_path / "there"), *where], "which exists"),
        (["student", "full", "-o", str(tmp_path / "a"), *where, "--text-scale", "9"], "got text scale 9, expected 1 to 5"),
        (["student", "full", "-o", str(tmp_path / "a"), *where, "--image-scale", "0.5"], "got image scale 0.5, expected 1 to 2.5"),
        (
            ["student", "nothing", "-o", str(tmp_path / "a"), *where],
            "one of this model's own (full, full-bare, lora, lora-bare) or a student's folder",
        ),
        (["student", "full", "-o", str(tmp_path / "a"), "--model", "nowhere"], "nowhere: got no folder"),
        (["student", str(folder / "students" / "full"), "-o", str(tmp_path / "a")], "another base"),
        (["lora", "full", "-o", str(tmp_path / "a"), *where], "give --rank"),
        (["lora", "full", "-o", str(tmp_path / "a"), *where, "--rank", "0"], "got rank 0"),
        (["lora", "lora", "-o", str(tmp_path / "a"), *where, "--rank", "9"], "leave the rank out"),
        (["eagle3", "nothing", "-o", str(tmp_path / "a"), *where], "expected a drafter's folder"),
    ):
        assert cli.main(["export", *argv]) == 2, argv
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_difference_of_two_pictures_knows_no_wrapping() -> None:
    dark, light = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    light[0] = 0
    assert _difference(dark, light) == _difference(light, dark) == (127.5, 255)


def test_what_a_merged_folder_shares_with_its_base(tmp_path: Path) -> None:
    """Not the base's weights, nor what says where they lie or how they are sampled."""
    shared = ["ae-00001-of-00002.safetensors", "ae.safetensors", "ae.safetensors.index.json", "bagel_config.json", "merges.txt"]
    own = ["ema.safetensors", "ema.safetensors.index.json", "model.safetensors.index.json", "sampler.json", "README.md"]
    for name in (*shared, *own):
        (tmp_path / name).write_text("x")
    (tmp_path / "students").mkdir()
    assert [path.name for path in _beside(tmp_path)] == shared


def test_the_worst_layer_misses_more_than_the_whole(made: dict[str, Student], folder: Path) -> None:
    found = as_low_rank(load_folder(folder)[0], made["full"], 4.0, 1.0, 4)
    assert found.worst[0] in found.layers and found.worst[1] >= found.error > 0


def test_a_lora_student_is_written_without_making_its_whole_matrices(
    made: dict[str, Student], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "change", lambda self, name: pytest.fail(f"made {name}"))
    assert "time_embedder.mlp.2.bias" in as_low_rank(load_folder(folder)[0], made["lora"], 4.0, 1.0).tensors


def test_a_base_of_two_kinds_of_numbers_is_told_by_the_coarser(folder: Path, tmp_path: Path) -> None:
    """Layers that are stored in bf16 round what is merged into them, however the others are stored."""
    own = tmp_path / "base"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("students"))
    tensors = load_tensors(own / "ema.safetensors")
    mixed = {name: x.float() if name.startswith("time_embedder") else x.bfloat16() for name, x in tensors.items()}
    save_tensors(own / "ema.safetensors", mixed)
    base, _ = load_folder(own)
    save_student(own / "students" / "full", Student.fresh(base, make_adapter(base, "full"), Sampler(nfe=3)), base)
    assert "rounding of bfloat16" in export_student("full", tmp_path / "merged", model=str(own)).notes[0]
