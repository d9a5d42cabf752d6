"""Whole model folders: what may be put beside a model, and what belongs together."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyperbagel
from hyperbagel.core.config import Config
from hyperbagel.core.errors import InputError
from hyperbagel.generate.session import Parts
from hyperbagel.generate.students import Students
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, BagelOptions, ImageSizes, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.guidance_embed import GuidanceEmbedders
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.student import Sampler, Student, load_student, make_adapter, save_student
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder, save_folder
from hyperbagel.pipeline import model_folder
from hyperbagel.train.folder import average_folders, install_student, save_model
from hyperbagel.train.launch import resolve_models

CONFIG = BagelConfig(
    llm=LLMConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=50),
    vit=ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4),
    vae=VaeConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=2, norm_groups=2, downsample=2),
    options=BagelOptions(
        max_latent_size=4, vit_max_num_patch_per_side=4, vit_transform=ImageSizes(max_size=16, min_size=4, stride=4), default_size=(16, 16)
    ),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = fresh_bagel(CONFIG, torch.Generator().manual_seed(0))
    save_folder(tmp_path / "m", CONFIG, model.state_dict(), AutoEncoder(CONFIG.vae).state_dict(), dtype=torch.float32)
    return tmp_path / "m"


@pytest.fixture
def student(folder: Path, tmp_path: Path) -> Path:
    base: Bagel = load_folder(folder)[0]
    made = Student(make_adapter(base, "lora", rank=2), GuidanceEmbedders(24), Sampler(nfe=6))
    save_student(tmp_path / "s", made, base)
    return tmp_path / "s"


def test_a_student_is_installed_by_its_evaluations_or_a_name(folder: Path, student: Path) -> None:
    assert install_student(student, folder) == folder / "students" / "6"
    assert install_student(student, folder, "edit-2.1") == folder / "students" / "edit-2.1"
    install_student(student, folder, "6")  # an older one is replaced
    assert {p.name for p in (folder / "students").iterdir()} == {"6", "edit-2.1"}


def test_a_student_is_installed_with_other_evaluations(folder: Path, student: Path) -> None:
    assert install_student(student, folder, nfe=4) == folder / "students" / "4"
    assert load_student(folder / "students" / "4", load_folder(folder)[0]).sampler == replace(Sampler(nfe=6), nfe=4)
    with pytest.raises(InputError, match="got 0 evaluations"):
        install_student(student, folder, nfe=0)


def test_the_mean_of_two_students_is_a_student(folder: Path, student: Path, tmp_path: Path) -> None:
    made, lost = average_folders([student, student], folder, tmp_path / "mean")
    assert lost == 0
    base = load_folder(folder)[0]
    same, mean = (load_student(path, base).state_dict() for path in (student, made))
    assert all(torch.equal(mean[name], value) for name, value in same.items())
    with pytest.raises(InputError, match="exists already"):
        average_folders([student, student], folder, made)


def test_a_mean_of_unlike_students_keeps_an_fp32_base_whole(tmp_path: Path) -> None:
    """Differences to a base that was rounded on the way would hold its rounding."""
    model, vae = fresh_bagel(CONFIG, torch.Generator().manual_seed(0)), AutoEncoder(CONFIG.vae)
    save_folder(tmp_path / "m", CONFIG, model.state_dict(), vae.state_dict(), dtype=torch.float32)
    for rank in (1, 2):  # students that change nothing
        save_student(tmp_path / str(rank), Student.fresh(model, make_adapter(model, "lora", rank=rank), Sampler()), model)
    made, _ = average_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "m", tmp_path / "mean")
    adapter = load_student(made, model).adapter
    assert adapter.copies and not adapter.low_rank
    for name in adapter.copies:
        for leaf, value in adapter.get_submodule(name).state_dict().items():
            assert torch.equal(value, model.get_submodule(name).state_dict()[leaf]), name


@pytest.mark.parametrize("name", [".", "..", "../../m", "a/b", "none", "", "-x"])
def test_a_name_that_leads_elsewhere_is_refused(folder: Path, student: Path, name: str) -> None:
    install_student(student, folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="choose another one"):
        install_student(student, folder, name)
    assert sorted(folder.rglob("*")) == before


def test_what_is_no_student_is_not_replaced(folder: Path, student: Path) -> None:
    (folder / "students" / "mine").mkdir(parents=True)
    (folder / "students" / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="no student there"):
        install_student(student, folder, "mine")
    assert (folder / "students" / "mine" / "notes.txt").read_text() == "keep"


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(hyperbagel.__file__).parent / "assets" / "toybox" / name, folder)
    with pytest.raises(InputError, match=r"expected below 50 \(vocab_size"):
        Parts.load(folder)


def test_what_a_killed_install_left_has_no_name(folder: Path, student: Path) -> None:
    install_student(student, folder)
    for left in (".6.tmp-1a2b3c4d", ".6.old-1a2b3c4d"):
        shutil.copytree(folder / "students" / "6", folder / "students" / left)
    assert Students(load_folder(folder)[0], folder / "students").names() == ["6"]


def test_every_key_knows_the_shipped_model() -> None:
    class Recipe(Config):
        init: Path | None = Path("toybox")
        init_base: Path | None = Path("toybox")

    settings = Recipe()
    resolve_models(settings)
    assert settings.init == settings.init_base == model_folder("toybox")


@pytest.mark.parametrize("rank", [0, 41])
def test_a_mean_has_a_rank_that_the_layers_have(rank: int, folder: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"got rank {rank}, expected 1 to 40"):
        average_folders([student, student], folder, tmp_path / "mean", rank=rank)


def test_all_files_of_a_tokenizer_go_along(tmp_path: Path) -> None:
    names = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    (tmp_path / "t").mkdir()
    for name in names:
        (tmp_path / "t" / name).write_text(name)
    save_model(
        tmp_path / "m", fresh_bagel(CONFIG, torch.Generator().manual_seed(0)), AutoEncoder(CONFIG.vae), tmp_path / "t", torch.float32
    )
    assert all((tmp_path / "m" / name).read_text() == name for name in names)
