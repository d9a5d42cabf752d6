"""Mistakes that users make around a training: what they are told, and that the corrected command then works."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_base import DATA, HELD_OUT, QUICK, SOURCES, make, only

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.model.student import load_student, read_sampler
from hyperbagel.model.weights import load_folder
from hyperbagel.train.batches import warn_of_repeats
from hyperbagel.train.launch import run_training
from hyperbagel.train.stage import Draws
from hyperbagel.train.stages import cfg, refl


def recipe_of(path: Path, base: Path, **keys: Any) -> Path:
    values = {"model": str(base), "data": DATA, "precision": "fp32", "device": "cpu", "max_steps": 1, **QUICK}
    path.write_text(yaml.safe_dump(values | keys))
    return path


def captions(folder: Path, *texts: str) -> dict[str, Any]:
    """A source of rows in BAGEL's layout for pictures with captions."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def picture() -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(stream, "PNG")
        return stream.getvalue()

    folder.mkdir()
    rows = {"image": [picture() for _ in texts], "captions": [json.dumps({"caption": text}) for text in texts]}
    pq.write_table(pa.table(rows), folder / "a.parquet")
    return {"sources": {"t2i": {"kind": "t2i", "path": str(folder)}}, "mixture": [{"weights": {"t2i": 1}}]}


@pytest.mark.parametrize("measured", [False, True])
def test_a_run_that_was_refused_does_not_stand_in_the_way(measured: bool, base: Path, tmp_path: Path) -> None:
    """Its data turned out to be unusable at the first step. A run that trained is not overwritten."""
    out, bad = tmp_path / "run", captions(tmp_path / "bad", "word " * 600)
    held_out = {"held_out": HELD_OUT, "held_out_groups": 1} if measured else {}  # a checkpoint of step 0, then
    with pytest.raises(InputError, match="nothing but broken rows"):
        run_training("cfg", recipe_of(tmp_path / "a.yaml", base, data=bad, **held_out), [], out)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="nothing but broken rows"):
        run_training("cfg", recipe_of(tmp_path / "a.yaml", base, data=bad, **held_out), [], out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    good = recipe_of(tmp_path / "b.yaml", base)
    run_training("cfg", good, [], out)
    assert (out / "export" / "sampler.json").exists()
    with pytest.raises(InputError, match="holds a run"):
        run_training("cfg", good, [], out)


def test_a_run_that_fails_later_is_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stage: Any, step: int, rng: Draws, make: Any = cfg.CfgStage.batch) -> Any:
        if step == 2:
            raise InputError("the disk is gone")
        return make(stage, step, rng)

    monkeypatch.setattr(cfg.CfgStage, "batch", broken)
    with pytest.raises(InputError, match="the disk is gone"):
        run_training("cfg", recipe_of(tmp_path / "a.yaml", base, max_steps=3), [], tmp_path / "run")
    assert (tmp_path / "run" / "provenance.json").exists()
    with pytest.raises(InputError, match="holds a run"):
        run_training("cfg", recipe_of(tmp_path / "a.yaml", base, max_steps=3), [], tmp_path / "run")


def test_noise_copies_take_no_room_in_the_context(base: Path) -> None:
    """One prefilled context serves them all: 40 of 16 tokens each would not fit into 512."""
    source = SOURCES["edit"] | {"noise_copies": 40, "samples": 1}
    stage = make(cfg, base, data={"sources": {"edit": source}, "mixture": [{"weights": {"edit": 1}}]})
    assert len(stage.batch(0, Draws.at(0)).conditions) == 40 and not stage.loader.broken


def test_captions_beyond_the_context_are_broken_rows(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A request with such a prompt is refused, too."""
    stage = make(cfg, base, data=captions(tmp_path / "data", "a red picture", "word " * 600))
    with caplog.at_level(logging.WARNING):
        batches = [stage.batch(step, Draws.at(0, step)) for step in range(4)]
    assert len(batches) == 4 and sum(stage.loader.broken.values()) > 0
    assert "expected at most 512, the model's context" in caplog.text


def test_a_run_stopped_while_its_teacher_is_measured_is_one_to_resume(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    held_out = {"sources": SOURCES, "mixture": DATA["mixture"]}
    recipe, out = recipe_of(tmp_path / "a.yaml", base, held_out=held_out, held_out_groups=1), tmp_path / "run"

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cfg.CfgStage, "features", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_training("cfg", recipe, [], out)
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("measuring the teacher: ") and told.endswith("1/2")
    assert f"{out}: stopped before training began" in caplog.text and (out / "config.yaml").exists()
    run_training("cfg", None, [], out, resume=True)
    said = capsys.readouterr().err
    assert "measuring what comes in, before the first step" in said and "measuring the teacher's way: " in said
    run_training("cfg", recipe, [], tmp_path / "whole")
    files = [folder / "export" / "moe_gen.safetensors" for folder in (out, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_could_not_be_built_does_not_stand_in_the_way(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path / "a.yaml", base)
    with monkeypatch.context() as patch:
        patch.setattr(cfg, "CfgStage", lambda *_: torch.empty(0).view(3))  # a RuntimeError, as one of memory is
        with pytest.raises(RuntimeError):
            run_training("cfg", recipe, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_as_its_stage(base: Path, tmp_path: Path) -> None:
    run_training("cfg", recipe_of(tmp_path / "a.yaml", base), [], tmp_path / "run")
    with pytest.raises(InputError, match="got a run of stage cfg, expected one of stage tscd; resume it as cfg"):
        run_training("tscd", None, [], tmp_path / "run", resume=True)


def test_the_command_says_where_the_student_is_and_a_run_is_not_one(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = recipe_of(tmp_path / "a.yaml", base), tmp_path / "run"
    assert cli.main(["train", "cfg", "--recipe", str(recipe), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "export")
    for read in (read_sampler, lambda folder: load_student(folder, load_folder(base)[0])):
        with pytest.raises(InputError, match=r"got a run of training, expected a student's folder; give .*export"):
            read(out)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("data.sources.edit.taks=edit", "did you mean 'data.sources.edit.task'?"),
        ("data.sources.edit.zzz=1", "use one of kind, samples"),
        ("data.mixture.0.wieghts=1", "did you mean 'data.mixture.0.weights'?"),
        ("seed.below=1", "seed"),
    ],
)
def test_misspelt_keys_inside_sources(key: str, told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, name = recipe_of(tmp_path / "a.yaml", base), key.partition("=")[0]
    if name.startswith("data.mixture"):  # lists are written in the recipe alone
        recipe, key = recipe_of(tmp_path / "a.yaml", base, data=DATA | {"mixture": [{"weights": {"edit": 1}, "wieghts": 1}]}), "seed=0"
    assert cli.main(["train", "cfg", "--recipe", str(recipe), "--out", str(tmp_path / "run"), key]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and len(said.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_source_without_a_weight_is_named(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(cfg, base, data=only("edit") | {"sources": SOURCES})
    assert "source 't2i' has no weight in data.mixture" in caplog.text
    caplog.clear()
    make(cfg, base)
    assert not caplog.text


def test_held_out_rows_that_count_twice_are_told(caplog: pytest.LogCaptureFixture) -> None:
    held = {"five": range(5), "seven": range(7)}
    for sources, wanted in ((held, 12), ({**held, "endless": range(0)}, 99)):
        warn_of_repeats(sources, wanted, "held_out_groups")  # type: ignore[arg-type]
    assert not caplog.text
    warn_of_repeats(held, 13, "held_out_groups")  # type: ignore[arg-type]
    assert "got 12 rows in five, seven, expected 13; rows count twice, add some or lower held_out_groups" in caplog.text


def test_a_question_that_names_no_prompt_is_told(base: Path, student: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be meant (is the picture sharp?), but asks nothing about the prompt."""
    asked = {"init": student, "teacher": student, "reward_kind": "answers"}
    with caplog.at_level(logging.WARNING):
        make(refl, base, question="does the picture show {prompt}?", **asked)
        assert not caplog.text
        make(refl, base, question="is the picture sharp?", **asked)
    assert "without {prompt}, so every picture is asked the same" in caplog.text


def test_install_says_what_it_replaces(base: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    for told in ("", "replaced the one that was there"):
        assert cli.main(["install", str(student), "--model", str(model)]) == 0
        said = capsys.readouterr()
        assert Path(said.out.strip()).parent == model / "students"
        assert told in said.err and bool(said.err.strip()) == bool(told)
