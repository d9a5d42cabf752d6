"""Drafters beside their model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.model.config import BagelConfig, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.model.weights import load_folder, save_folder
from hyperbagel.speculative.drafters.choice import confidence
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.folder import (
    Module,
    install_drafter,
    load_module,
    make_drafter,
    make_module,
    read_acceptance,
    save_drafter,
    write_acceptance,
)

CONFIG = BagelConfig(
    llm=LLMConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=50),
    vit=ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=7),
    vae=VaeConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=2, norm_groups=2, downsample=2),
)


def module_for(llm: LLMConfig) -> Module:
    module = make_module(DrafterConfig.for_target("block", llm, block=4, rank=8))
    for parameter in module.parameters():
        torch.nn.init.ones_(parameter)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    bagel = fresh_bagel(CONFIG, torch.Generator().manual_seed(0))
    save_folder(tmp_path / "m", CONFIG, bagel.state_dict(), AutoEncoder(CONFIG.vae).state_dict(), dtype=torch.float32)
    return tmp_path / "m"


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    save_drafter(tmp_path / "d", module_for(CONFIG.llm))
    write_acceptance(tmp_path / "d", {"in_template": [0.9, 0.8]})
    return tmp_path / "d"


def test_a_drafter_is_installed_by_its_kind_or_a_name(model: Path, drafter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install", str(drafter), "--model", str(model)]) == 0
    assert capsys.readouterr().out.strip() == str(model / "drafters" / "block")
    assert install_drafter(drafter, model, "mine") == install_drafter(drafter, model, "mine")  # an older one is replaced
    assert {path.name for path in (model / "drafters").iterdir()} == {"block", "mine"}
    assert {p.name: p.read_bytes() for p in (model / "drafters" / "mine").iterdir()} == {p.name: p.read_bytes() for p in drafter.iterdir()}
    load_module(model / "drafters" / "mine", load_folder(model)[0])


@pytest.mark.parametrize("name", ["auto", "lookup", "none", "", "..", "a/b"])
def test_a_name_that_means_something_else_is_refused(name: str, model: Path, drafter: Path) -> None:
    with pytest.raises(InputError, match="choose another one"):
        install_drafter(drafter, model, name)
    assert not (model / "drafters").exists()


def test_what_does_not_fit_is_not_installed(model: Path, drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = CONFIG.llm.model_copy(update={"vocab_size": 40})
    save_drafter(tmp_path / "other", module_for(other))
    with pytest.raises(InputError, match="another model"):
        install_drafter(tmp_path / "other", model)
    (model / "drafters" / "block").mkdir(parents=True)
    (model / "drafters" / "block" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="no drafter"):
        install_drafter(drafter, model)
    assert cli.main(["install", str(drafter), "--model", str(model), "--name", "mine", "--nfe", "6"]) == 2
    assert "--nfe" in capsys.readouterr().err
    assert [path.name for path in model.glob("drafters/**/*")] == ["block", "notes.txt"]


def test_what_was_measured_is_believed_within_bounds(drafter: Path) -> None:
    """A rate of 1 would make every depth worth drafting, for ever."""
    write_acceptance(drafter, {"in_template": [1.0, 0.0, 0.5], "other": [0.7]})
    assert read_acceptance(drafter) == [0.99, 0.01, 0.5]
    for damaged in ("{}", "[]", '{"in_template": [null]}', "{"):
        (drafter / "acceptance.json").write_text(damaged)
        assert read_acceptance(drafter) == []


@pytest.mark.parametrize("kind", ["eagle3", "hyper-bagel", "block"])
def test_a_tree_is_as_wide_as_it_was_asked_for(kind: Kind) -> None:
    module, target = make_module(DrafterConfig.for_target(kind, CONFIG.llm)), fresh_bagel(CONFIG, torch.Generator().manual_seed(0))
    made = make_drafter(module, target, nodes=9, branch=3)
    assert (made.nodes, made.branch, made.width) == (9, 3, 9)
    assert make_drafter(module, target, depth=2).width == 2
    assert make_drafter(module, target, depth=99).depth == (module.config.block if kind == "block" else 99)  # all that one pass has


@pytest.mark.parametrize("other", [{"num_attention_heads": 1}, {"num_key_value_heads": 3}])
def test_a_target_with_other_heads_is_another_one(other: dict[str, int]) -> None:
    """Its weights may have the same shapes."""
    with pytest.raises(InputError, match=r"heads \(3, 1\)"):
        DrafterConfig.for_target("block", CONFIG.llm).check_target(CONFIG.llm.model_copy(update=other))


def test_depths_of_fixed_shapes_are_few_and_deep_enough() -> None:
    module, target = make_module(DrafterConfig.for_target("eagle3", CONFIG.llm)), fresh_bagel(CONFIG, torch.Generator().manual_seed(0))
    made = make_drafter(module, target, depth=10)
    depths = [made.static_depth(depth) for depth in range(1, 11)]
    assert all(wanted <= depth <= 10 for wanted, depth in enumerate(depths, 1)) and len(set(depths)) <= 5


def test_confidence_is_told_in_fp32() -> None:
    torch.testing.assert_close(confidence(torch.tensor([3.0, 0.0, 1.0]).bfloat16()), torch.tensor(2.0).sigmoid())


@pytest.mark.parametrize(("kind", "name", "value"), [("eagle3", "layers", 2), ("hyper-bagel", "queries", 4), ("block", "draft_vocab", 20)])
def test_settings_that_a_kind_cannot_have_are_refused(kind: Kind, name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name}: got {value}.*expected"):
        DrafterConfig.for_target(kind, CONFIG.llm, **{name: value})
