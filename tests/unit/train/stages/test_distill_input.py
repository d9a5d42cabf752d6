"""What users get wrong: broken rows, a loss that is no number, students and teachers that do not belong."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_base import CONFIG, DATA, make, write_base

from hyperbagel import cli
from hyperbagel.core.run import read_metrics
from hyperbagel.data.plan import VitImage
from hyperbagel.generate.session import image_transform
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import ImageSizes
from hyperbagel.train.checkpoint import list_checkpoints, load_checkpoint
from hyperbagel.train.discriminator import vit_input
from hyperbagel.train.launch import run_training
from hyperbagel.train.loop import Diverged
from hyperbagel.train.stages import cfg, reward

RUN = ["precision=fp32", "device=cpu", "kind=lora", "rank=2", "log_every=1", "sample_every=100", "teacher_steps=2", "nfe=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, rows: list[tuple[bytes, str]]) -> Path:
    pq.write_table(pa.table({"image": [r[0] for r in rows], "captions": [r[1] for r in rows]}), path)
    return path


def recipe(path: Path, base: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"model": str(base), "data": data}))
    return path


def test_broken_rows_are_counted_and_shown(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, torn, empty = (picture(), '["a car"]'), (picture()[:40], '["a car"]'), (picture(), '["  "]')
    rows = parquet(tmp_path / "rows.parquet", [good, torn, empty, good])
    data = {"sources": {"t2i": {"kind": "t2i", "path": str(rows), "samples": 2}}, "mixture": [{"weights": {"t2i": 1}}]}
    with caplog.at_level(logging.WARNING):
        run_training("cfg", recipe(tmp_path / "cfg.yaml", base, data), [*RUN, "max_steps=3"], tmp_path / "run")
    told = caplog.text
    assert "no caption" in told and "no picture" in told and "rows.parquet row group 0" in told
    assert "broken rows were skipped" in told
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["held_out/skipped_rows"] >= 2


def test_rows_that_are_all_broken_are_an_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = parquet(tmp_path / "rows.parquet", [(b"", "[]")] * 3)
    data = {"sources": {"t2i": {"kind": "t2i", "path": str(rows)}}, "mixture": [{"weights": {"t2i": 1}}]}
    path = recipe(tmp_path / "cfg.yaml", base, data)
    assert cli.main(["train", "cfg", "--recipe", str(path), "-o", str(tmp_path / "run"), *RUN, "max_steps=1"]) == 2
    assert "nothing but broken rows" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = cfg.CfgStage.loss

    def poisoned(self: Any, player: str, batch: Any, step: int) -> Any:
        value, metrics = loss(self, player, batch, step)
        return (value * float("nan") if step == 2 else value), metrics

    monkeypatch.setattr(cfg.CfgStage, "loss", poisoned)
    path = recipe(tmp_path / "cfg.yaml", base, DATA)
    with pytest.raises(Diverged, match=r"step 2: got nan for the loss of player 'student' .*mse"):
        run_training("cfg", path, [*RUN, "max_steps=5"], tmp_path / "run")
    monkeypatch.undo()
    [newest] = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert newest.name == "step-00000002"
    settings = cfg.Recipe.model_validate(
        {"model": str(base), "data": DATA, "precision": "fp32", "device": "cpu", "kind": "lora", "rank": 2}
    )
    stage = cfg.build(settings, torch.device("cpu"))
    load_checkpoint(newest, stage)
    assert all(torch.isfinite(p).all() for p in stage.student.parameters())
    run_training("cfg", path, [*RUN, "max_steps=4"], tmp_path / "run", True)  # and the run can go on
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000004"


def test_what_does_not_belong_is_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path / "cfg.yaml", base, DATA)
    run_training("cfg", path, [*RUN, "max_steps=0"], tmp_path / "run")
    other = write_base(tmp_path / "other", seed=1)
    for changes, told in (
        (["text_range=[1, 1]"], "teacher without guidance"),
        ([f"model={other}", f"init={tmp_path / 'run' / 'export'}"], "another base"),
        ([f"init={base}"], "sampler.json: missing"),
        ([f"init={tmp_path / 'run' / 'export'}", "rank=3"], "got rank 3 for a student of a LoRA of rank 2"),
        ([f"teacher={tmp_path / 'run' / 'export'}"], "teacher is of target=reflow, got target=guided"),
        ([f"init={tmp_path / 'run' / 'export'}", "alpha=3"], "got alpha 3.0 for a student of a LoRA of rank 2 and alpha 2"),
        ([f"init={tmp_path / 'run' / 'export'}", "heads=false"], "got heads False for a student of a LoRA"),
        (["kind=full"], "rank is of a LoRA, and a fresh student of kind full has whole layers"),
        (["target=segments", "time_shift=2"], "time_shift is of target=guided or reflow, got target=segments"),
        (["target=segments", "scale_draws=2"], "scale_draws is of target=guided"),
        (["target=reflow", "on_policy=0.5"], "on_policy is of target=guided or segments"),
        (["target=reflow", "on_policy_steps=3"], "on_policy_steps is of target=guided"),
        (["substeps=2"], "substeps is of target=segments"),
    ):
        capsys.readouterr()
        assert cli.main(["train", "cfg", "--recipe", str(path), "-o", str(tmp_path / "new"), *RUN, *changes]) == 2
        err = capsys.readouterr().err
        assert told in err and err.startswith("error: ") and err.count("\n") == 1
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "image", "own"), [((1, 5), (1, 2.5), (4, 4, 1.5)), ((1, 3), (1, 1.2), (3, 3, 1.2)), ((4.5, 5), (2, 2), (4.5, 4.5, 2))]
)
def test_a_student_s_own_scales_are_such_as_it_sees(text: Any, image: Any, own: Any, base: Path) -> None:
    """The paper's, or the nearest in the ranges: a request that names none must not be one that training never saw."""
    sampler = make(cfg, base, text_range=text, image_range=image).student.sampler
    assert (sampler.text_scale, sampler.edit_text_scale, sampler.edit_image_scale) == own


@pytest.mark.parametrize("module", [cfg, reward])
def test_input_pictures_are_read_as_requests_read_them(module: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First by the latents' rule, then by the ViT's: a small picture has more patches than its file alone would give."""
    sizes = {
        "vae_transform": ImageSizes(max_size=64, min_size=32, stride=8),
        "vit_transform": ImageSizes(max_size=64, min_size=16, stride=8),
    }
    options = CONFIG.options.model_copy(update={**sizes, "max_latent_size": 8, "vit_max_num_patch_per_side": 8})
    monkeypatch.setattr("tiny_base.CONFIG", CONFIG.model_copy(update={"options": options}))
    folder = write_base(tmp_path / "model")
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))
    image.save(buffer, "PNG")
    rows = [{"image_list": [buffer.getvalue()] * 2, "instruction_list": ["make it red"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = {"sources": {"edit": {"kind": "edit", "path": str(tmp_path / "rows.parquet")}}, "mixture": [{"weights": {"edit": 1}}]}
    stage: Any = make(module, folder, data=data)
    [sample] = stage.loader.next_group().samples
    [seen] = [item.pixels for item in sample if isinstance(item, VitImage)]
    vae, vit = (image_transform(size) for size in sizes.values())
    assert seen.shape == (32, 40, 3) and np.array_equal(seen, vit.pixels(vae.resize(image)))
    assert vit.size(*image.size) != (40, 32)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 96), (96, 24), (40, 56), (8, 12)])
def test_drawn_pictures_are_judged_at_the_size_they_are_asked_about(height: int, width: int) -> None:
    """One scale for both sides, whatever the longest side that the ViT takes."""
    options = CONFIG.options.model_copy(
        update={"vit_transform": ImageSizes(max_size=64, min_size=16, stride=8), "vit_max_num_patch_per_side": 8}
    )
    base = Bagel(CONFIG.model_copy(update={"options": options}))
    patches, where, (h, w) = vit_input(base, torch.rand(2, 3, height, width))
    assert (w * 8, h * 8) == image_transform(options.vit_transform).size(width, height)
    assert patches.shape == (2 * h * w, 3 * 8 * 8) and where.shape == (2 * h * w,)
