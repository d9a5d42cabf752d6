"""`inspect` says what each kind of folder is that training leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_stage import run

from hyperbagel.core.errors import InputError
from hyperbagel.folders import describe_folder
from hyperbagel.pipeline import model_folder


def test_a_shipped_drafter() -> None:
    report = describe_folder(model_folder("toybox") / "drafters" / "block")
    assert report["drafter"]["kind"] == "block" and report["target"]["layers"] == 8 and report["target"]["vocab_size"] == 1024
    assert 0.5 < report["acceptance"][0] < 1 and report["weights"]["drafter"]["parameters"] > 10**6


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provenance.json", '{"launches": [1]}'),
        ("provenance.json", '{"launches": {"a": 1}}'),
        ("provenance.json", '{"launches": [{"command": null}]}'),
        ("metrics.jsonl", '{"a": 1}\n'),
        ("metrics.jsonl", "3\n"),
    ],
)
def test_damaged_records_of_a_run_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "provenance.json").write_text('{"launches": [{}]}')
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="restore the file"):
        describe_folder(tmp_path)


def test_a_model_without_its_weights_is_no_autoencoder(tmp_path: Path) -> None:
    """A model's weights under another program's name, its autoencoder beside them."""
    for path in model_folder("toybox").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    (tmp_path / "ema.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"neither ema\.safetensors nor .* but model\.safetensors is"):
        describe_folder(tmp_path)
    (tmp_path / "llm_config.json").unlink()
    assert "autoencoder" in describe_folder(tmp_path)["part"]
    (tmp_path / "model.safetensors").rename(tmp_path / "ema.safetensors")
    with pytest.raises(InputError, match=r"llm_config\.json: missing"):
        describe_folder(tmp_path)


def test_a_checkpoint_without_players_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"players": null}')
    with pytest.raises(InputError, match="got no players"):
        describe_folder(tmp_path)


def test_a_run_and_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "run", 4)
    report = describe_folder(tmp_path / "run")
    assert report["run"]["step"] == 4 and report["run"]["launches"] == 1 and "none yet" in report["run"]["export"]
    assert report["last_figures"]["training"]["step"] == 4 and "score" in report["last_figures"]["held_out"]
    (tmp_path / "run" / "export").mkdir()
    provenance = tmp_path / "run" / "provenance.json"
    launches = json.loads(provenance.read_text())
    launches["launches"][0]["command"] = ["hyperbagel", "train", "cfg", "--out", "run"]
    provenance.write_text(json.dumps(launches))
    told = describe_folder(tmp_path / "run")["run"]
    assert told["stage"] == "cfg" and told["export"] == str(tmp_path / "run" / "export")

    at = describe_folder(Path(told["checkpoint"]))
    assert at["checkpoint"]["step"] == 4 and at["players"] == "even, odd" and at["weights"]["odd"]["parameters"] == 5


@pytest.mark.parametrize("name", ["drafter.json", "state.json", "provenance.json"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[1")
    with pytest.raises(InputError, match=f"{name}: got .*JSON") as caught:
        describe_folder(tmp_path)
    assert "\n" not in str(caught.value)
