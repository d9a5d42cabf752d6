"""The shipped model by its name, its own students and drafters by theirs, and devices: wrong ones are told with what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyperbagel import cli
from hyperbagel.core.config import Config
from hyperbagel.core.errors import InputError
from hyperbagel.core.hardware import usable_device
from hyperbagel.pipeline import model_folder
from hyperbagel.train import folder as train_folder
from hyperbagel.train.launch import resolve_models, run_training


@pytest.mark.parametrize("name", ["meta", "cpu:3"])
def test_devices_without_weights_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"got device '{name}', expected cpu, cuda or cuda:N"):
        usable_device(name)
    assert str(usable_device("cpu:0")) == "cpu"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["student", "99"], "got student '99', expected one of this model's own (1, 6) or a student's folder"),
        (["lora", "99"], "got student '99', expected one of this model's own (1, 6) or a student's folder"),
        (["eagle3", "99"], "got drafter '99', expected a drafter's folder"),  # the one that ships is no EAGLE-3
    ],
)
def test_export_of_an_unknown_name_offers_the_models_own(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *argv, "-o", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_install_knows_the_shipped_model_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[Any] = []
    monkeypatch.setattr(train_folder, "install_student", lambda student, model, name, nfe: given.append(model))
    assert cli.main(["install", "run/export", "--model", "toybox"]) == 0
    assert given == [model_folder("toybox")]


def test_recipes_know_the_shipped_model_by_name() -> None:
    class Recipe(Config):
        model: Path = Path("toybox")
        target: Path = Path("toybox/other")
        init: Path | None = None

    settings = Recipe()
    resolve_models(settings)
    assert settings == Recipe(model=model_folder("toybox"))


def test_training_begins_from_the_shipped_model_by_name(tmp_path: Path) -> None:
    """It is read, and what is refused is the student after it."""
    recipe = Path(__file__).parents[2] / "recipes" / "toybox" / "cfg.yaml"
    with pytest.raises(InputError, match=r"nowhere.sampler\.json: missing"):
        run_training("cfg", recipe, ["model=toybox", f"init={tmp_path}/nowhere", "device=cpu"], tmp_path / "run")
