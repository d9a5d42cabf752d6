"""Adapters and student folders: the base untouched, round trips, and folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, BagelOptions, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.guidance_embed import GuidanceEmbedders
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.model.merge import folded_sampler
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.model.student import (
    Kind,
    Sampler,
    Student,
    as_whole,
    average_students,
    carry_student,
    factorised,
    fingerprint,
    load_student,
    make_adapter,
    save_student,
)
from hyperbagel.model.weights import load_tensors
from hyperbagel.nn.lora import Adapter, attach

KINDS: tuple[Kind, ...] = ("lora", "full")


def tiny(seed: int = 0) -> Bagel:
    config = BagelConfig(
        llm=LLMConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=50
        ),
        vit=ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4),
        vae=VaeConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=2, norm_groups=2, downsample=2),
        options=BagelOptions(max_latent_size=4, vit_max_num_patch_per_side=4),
    )
    model = fresh_bagel(config, torch.Generator().manual_seed(seed), std=0.3)
    with torch.no_grad():
        model.llm2vae.weight.copy_(torch.randn(model.llm2vae.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model.requires_grad_(False)


def run(model: Bagel, extra: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x, ids = torch.randn(2, 4, model.config.latent_channels, generator=g), torch.randint(0, 50, (2, 3), generator=g)
    latent = model.embed_latent(x, torch.full((2, 4), 0.5), torch.arange(4).expand(2, -1))
    latent = latent if extra is None else latent + extra
    out = model.backbone(Streams(model.embed_text(ids), latent), torch.arange(7).expand(2, -1))
    assert out.g is not None
    return model.velocity(out.g)


def shake(module: torch.nn.Module, seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_a_shaken_one_only_its_own_view(kind: Kind) -> None:
    base = tiny()
    before, keys = run(base), list(base.state_dict())
    a, b = make_adapter(base, kind, rank=4), make_adapter(base, kind, rank=4)
    first, second = attach(base, a), attach(base, b)
    assert torch.equal(run(first), before)
    shake(a)
    assert not torch.allclose(run(first), before) and torch.equal(run(second), before)
    assert torch.equal(run(base), before) and list(base.state_dict()) == keys  # bit for bit, and the checkpoint's keys stay


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_adapter_alone(kind: Kind) -> None:
    base = tiny()
    adapter = make_adapter(base, kind, rank=4)
    shake(adapter)
    run(attach(base, adapter)).square().sum().backward()
    last = f"layers.{base.config.llm.num_hidden_layers - 1}."
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapter.named_parameters() if last not in n)
    assert all(p.grad is None for p in base.parameters())


def test_low_rank_equals_its_definition_and_its_merge() -> None:
    base = tiny()
    adapter = make_adapter(base, "lora", rank=4, alpha=8, heads=False)
    shake(adapter)
    name = "language_model.model.layers.1.self_attn.q_proj_moe_gen"
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    layer, change = base.get_submodule(name), adapter.get_submodule(name)
    slow = x.double() @ (layer.weight.double() + 2 * change.lora_B.weight.double() @ change.lora_A.weight.double()).T + layer.bias.double()
    torch.testing.assert_close(attach(base, adapter).get_submodule(name)(x).double(), slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(attach(base, adapter, merged=True)), run(attach(base, adapter)), rtol=1e-4, atol=1e-5)


def test_only_the_generation_expert_is_adapted() -> None:
    base = tiny()
    adapter = make_adapter(base, "full", heads=False)
    names = {n for n, _ in adapter.named_parameters()}
    assert names == {n for n, _ in base.named_parameters() if "_moe_gen" in n}
    lora = make_adapter(base, "lora", heads=False)
    assert all("_moe_gen" in n and ("lora_A" in n or "lora_B" in n) for n, _ in lora.named_parameters())
    assert len(lora.low_rank) == 2 * 7


def test_embedders_start_silent_and_then_steer() -> None:
    guidance = GuidanceEmbedders(24)
    two = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])
    assert guidance(*two).shape == (2, 1, 24) and guidance(*two).abs().max() == 0
    guidance(*two).sum().backward()
    assert guidance.text.mlp[2].weight.grad.abs().sum() > 0  # the zero layer itself can leave zero
    shake(guidance)
    assert not torch.allclose(guidance(*two)[0], guidance(*two)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: Kind, tmp_path: Path) -> None:
    base = tiny()
    sampler = Sampler(nfe=1, shift=2.0, stage="test")
    student = Student.fresh(base, make_adapter(base, kind, rank=4, alpha=2), sampler)
    shake(student)
    save_student(tmp_path / "s", student, base, base_name="tiny")
    again = load_student(tmp_path / "s", base)
    assert again.sampler == sampler
    scales = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])
    a, b = (run(s.network(base).model, s.guidance(*scales)) for s in (student, again))
    assert torch.equal(a, b) and not torch.allclose(a, run(base))
    report = inspect_folder(tmp_path / "s")
    assert report["student"]["nfe"] == 1 and report["student"]["stage"] == "test"
    assert report["weights"]["guidance"]["parameters"] == sum(p.numel() for p in student.guidance.parameters())
    files = {p.name for p in (tmp_path / "s").iterdir()}
    own = {"adapter_model.safetensors", "adapter_config.json"} if kind == "lora" else {"moe_gen.safetensors"}
    assert files == {"guidance.safetensors", "sampler.json"} | own
    if kind == "lora":
        config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 2
        stored = load_tensors(tmp_path / "s" / "adapter_model.safetensors")
        key = "base_model.model.language_model.model.layers.0.mlp_moe_gen.up_proj.lora_A.weight"
        assert stored[key].shape == (4, 24) and "base_model.model.llm2vae.weight" in stored
        assert {"q_proj_moe_gen", "mlp_moe_gen.up_proj"} <= set(config["target_modules"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_carried_to_another_base_of_its_shape(kind: Kind, tmp_path: Path) -> None:
    """Each weight is the new base's plus what the student changed in the old one; the embedders stay."""
    old, new = tiny(), tiny(1)
    student = Student.fresh(old, make_adapter(old, kind, rank=4), Sampler())
    shake(student)
    save_student(tmp_path / "s", student, old)
    with pytest.raises(InputError, match="another base"):
        load_student(tmp_path / "s", new)
    carried = carry_student(tmp_path / "s", old, new)
    whole = {name: p for name, p in student.named_parameters() if "lora" not in name and name.startswith("adapter.")}
    assert any("llm2vae" in name for name in whole)
    for name, p in carried.named_parameters():
        before = student.get_parameter(name)
        if name in whole:
            own = name.removeprefix("adapter.")
            torch.testing.assert_close(p - new.get_parameter(own), before - old.get_parameter(own), atol=1e-6, rtol=0)
        else:
            assert torch.equal(p, before)
    for model in (old, new):
        assert torch.equal(run(model), run(tiny(int(model is new))))  # neither base was written to
    other = tiny()
    other.config = other.config.model_copy(update={"llm": other.config.llm.model_copy(update={"num_hidden_layers": 3})})
    with pytest.raises(InputError, match="llm config differs"):
        carry_student(tmp_path / "s", old, other)


def test_fingerprint_tells_bases_apart_and_survives_bf16() -> None:
    assert fingerprint(tiny()) == fingerprint(tiny()) == fingerprint(tiny().to(torch.bfloat16))
    assert fingerprint(tiny()) != fingerprint(tiny(1))


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    base = tiny()
    student = Student.fresh(base, make_adapter(base, "lora"), Sampler())
    folder = tmp_path / "s"
    save_student(folder, student, base)
    with pytest.raises(InputError, match="another base"):
        load_student(folder, tiny(1))
    with pytest.raises(InputError, match="missing"):
        load_student(tmp_path / "nothing", base)
    about = json.loads((folder / "sampler.json").read_text())
    for change, message in (
        ({"nfe": 0}, "nfe 0"),
        ({"nfe": 10**30}, "at most"),
        ({"format": 9}, "format 9"),
        ({"kind": "zzz"}, "kind 'zzz'"),
        ({"kind": ["a"]}, "kind .'a'."),
        ({"shift": "x"}, "shift 'x'"),
        ({"text_scale": "a"}, "text_scale 'a'"),
        ({"edit_text_scale": None}, "edit_text_scale None"),
        ({"text_range": [1]}, "low, high"),
        ({"image_range": None}, "image_range None"),
        ({"image_range": [2, 1]}, "low, high"),
    ):
        (folder / "sampler.json").write_text(json.dumps(about | change))
        with pytest.raises(InputError, match=message):
            load_student(folder, base)
    (folder / "sampler.json").write_text(json.dumps({k: v for k, v in about.items() if k != "shift"}))
    with pytest.raises(InputError, match="shift is missing"):
        load_student(folder, base)
    (folder / "sampler.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        load_student(folder, base)
    (folder / "sampler.json").write_text(json.dumps(about))
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"r": 10**9}, {"r": "4"}, {"r": True}, {"lora_alpha": float("nan")}, {"lora_alpha": 0}, {"lora_alpha": None}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match="restore the file"):
            load_student(folder, base)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(InputError, match="do not fit"):
        load_student(folder, base)
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="safetensors"):
        load_student(folder, base)


def test_a_model_without_the_named_layer_is_a_mistake() -> None:
    with pytest.raises(AttributeError):
        Adapter(tiny(), ["no.such.layer"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_students(kind: Kind, tmp_path: Path) -> None:
    base, folders = tiny(), [tmp_path / name for name in "abc"]
    for i, folder in enumerate(folders):
        student = Student(
            make_adapter(base, kind, rank=2), GuidanceEmbedders(24), Sampler(nfe=6, shift=3.0 + i, stage=("refl", "dmdo", "refl")[i])
        )
        shake(student, seed=i)
        save_student(folder, student, base)
    mean = average_students(folders, base)
    each = [load_student(folder, base).state_dict() for folder in folders]
    for name, value in mean.state_dict().items():
        torch.testing.assert_close(value, sum(one[name] for one in each) / 3)
    assert mean.sampler == Sampler(nfe=6, shift=3.0, stage="refl + dmdo")
    alone = average_students([folders[0], folders[0]], base).state_dict()
    assert all(torch.equal(value, each[0][name]) for name, value in alone.items())


def test_unlike_students_have_no_mean(tmp_path: Path) -> None:
    base = tiny()
    for name, heads, nfe in (("a", True, 6), ("heads", False, 6), ("nfe", True, 1)):
        save_student(
            tmp_path / name, Student(make_adapter(base, "lora", rank=2, heads=heads), GuidanceEmbedders(24), Sampler(nfe=nfe)), base
        )
    for others, told in (([], "two or more"), (["heads"], "with other layers"), (["nfe"], "1 evaluations, expected 6")):
        with pytest.raises(InputError, match=told):
            average_students([tmp_path / name for name in ("a", *others)], base)


@pytest.mark.parametrize("heads", [True, False])
def test_students_of_other_ranks_and_kinds_have_the_mean_of_their_weights(heads: bool, tmp_path: Path) -> None:
    base = tiny()
    for i, (kind, rank) in enumerate((("lora", 2), ("lora", 3), ("full", 1))):
        student = Student(make_adapter(base, kind, rank=rank, heads=heads), GuidanceEmbedders(24), Sampler())  # type: ignore[arg-type]
        shake(student, seed=i)
        save_student(tmp_path / str(i), student, base)
    students = [load_student(tmp_path / str(i), base) for i in range(3)]
    mean = average_students([tmp_path / str(i) for i in range(3)], base)
    views = [student.network(base, merged=True).model for student in students]
    for name in mean.adapter.copies:
        for leaf, value in mean.adapter.get_submodule(name).state_dict().items():
            torch.testing.assert_close(value, sum(view.get_submodule(name).state_dict()[leaf] for view in views) / 3)


def test_a_student_as_whole_layers_and_back(tmp_path: Path) -> None:
    """Nothing is lost at the rank it had; at a smaller one the best of that rank is left."""
    base = tiny()
    student = Student(make_adapter(base, "lora", rank=3), GuidanceEmbedders(24), Sampler())
    shake(student)
    whole = as_whole(student, base)
    assert not whole.adapter.low_rank and as_whole(whole, base) is whole
    again, lost = factorised(whole, base, 3)
    assert lost < 1e-5
    for name in student.adapter.low_rank:
        a, b = (one.adapter.get_submodule(name) for one in (student, again))
        torch.testing.assert_close(b.lora_B.weight @ b.lora_A.weight, a.lora_B.weight @ a.lora_A.weight, rtol=1e-4, atol=1e-6)
    small, lost = factorised(whole, base, 1)
    assert 0.05 < lost < 1 and small.adapter.rank == 1


def test_a_mean_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny()
    monkeypatch.setattr("hyperbagel.train.folder.load_folder", lambda *_: (base, None))
    for i in range(2):
        student = Student(make_adapter(base, "full"), GuidanceEmbedders(24), Sampler())
        shake(student, seed=i)
        save_student(tmp_path / str(i), student, base)
    given = ["average", str(tmp_path / "0"), str(tmp_path / "1"), "--model", "toybox"]
    assert cli.main([*given, "-o", str(tmp_path / "mean"), "--rank", "4"]) == 0
    assert "rank 4 leaves out" in capsys.readouterr().err and load_student(tmp_path / "mean", base).adapter.rank == 4
    assert cli.main([*given, "-o", str(tmp_path / "other"), "--rank", "0"]) == 2
    assert "got rank 0, expected 1 to" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_mean_of_loras_minds_their_alphas(tmp_path: Path) -> None:
    base = tiny()
    folders = [tmp_path / str(i) for i in range(2)]
    for i, alpha in enumerate((2, 8)):
        student = Student(make_adapter(base, "lora", rank=2, alpha=alpha), GuidanceEmbedders(24), Sampler())
        shake(student, seed=i)
        save_student(folders[i], student, base)
    name = "language_model.model.layers.1.self_attn.q_proj_moe_gen"
    students = (average_students(folders, base), *(load_student(folder, base) for folder in folders))
    mean, *views = (student.network(base, merged=True).model.get_submodule(name).weight for student in students)
    torch.testing.assert_close(mean, sum(views) / 2)


@pytest.mark.parametrize("part", ["adapter.", "guidance."])
def test_weights_that_are_no_numbers_are_refused(part: str, tmp_path: Path) -> None:
    base = tiny()
    student = Student(make_adapter(base, "full"), GuidanceEmbedders(24), Sampler())
    next(p for name, p in student.named_parameters() if name.startswith(part)).data.view(-1)[0] = float("nan")
    save_student(tmp_path / "s", student, base)
    with pytest.raises(InputError, match="not finite"):
        load_student(tmp_path / "s", base)


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    base = tiny()
    save_student(tmp_path / "s", Student(make_adapter(base, "lora", rank=2), GuidanceEmbedders(24), Sampler()), base)
    path = tmp_path / "s" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": float("inf")}))
    with pytest.raises(InputError, match="restore the file"):
        load_student(tmp_path / "s", base)


def test_a_merged_model_has_no_guidance_left() -> None:
    made = folded_sampler(Sampler(nfe=3, shift=2.5, stage="test"), 3.0, 1.5)
    neutral = dict.fromkeys(("text_scale", "image_scale", "edit_text_scale", "edit_image_scale"), 1.0)
    assert made == Sampler(3, 2.5, **neutral, text_range=(1.0, 1.0), image_range=(1.0, 1.0), stage="test, guidance 3 / 1.5 folded in")
