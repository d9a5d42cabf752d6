"""The distillation table end to end on a random model: real students, real pictures, the same noise for all."""

from __future__ import annotations

import json
import shutil
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hyperbagel
from hyperbagel.core.errors import InputError
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.evaluate import distillation
from hyperbagel.evaluate.distillation import differences, run_distillation_eval
from hyperbagel.evaluate.records import read_records
from hyperbagel.evaluate.rows import ROWS, choose, parse_students
from hyperbagel.evaluate.steer import steer_worker, steering
from hyperbagel.evaluate.toybox import Settings, drawn, load_detector
from hyperbagel.evaluate.wall_clock import IN_TURN, _figures, draw_behind, draw_in_turn, look
from hyperbagel.generate.session import Parts
from hyperbagel.generate.types import PAPER_EDIT, PAPER_TEXT_TO_IMAGE, ImageRequest
from hyperbagel.model.config import BagelConfig, BagelOptions, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.student import Sampler, Student, make_adapter, save_student
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.pipeline import HyperBagel
from hyperbagel.toybox.items import edit_eval_items

TOKENIZER = Path(hyperbagel.__file__).parent / "assets" / "toybox"
CONFIG = BagelConfig(
    llm=LLMConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=1024,
        max_position_embeddings=256,
    ),
    vit=ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16),
    vae=VaeConfig(ch=4, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4, norm_groups=2, downsample=8),
    options=BagelOptions(max_latent_size=4, vit_max_num_patch_per_side=4, default_size=(64, 64)),
)  # fmt: skip
COUNTS: dict[str, Any] = {"n_t2i": 6, "n_edits": 9, "n_diversity": 1, "n_clock": 1, "n_steer": 4, "show": False}


@pytest.fixture(scope="module")
def model() -> HyperBagel:
    torch.manual_seed(0)
    bagel = fresh_bagel(CONFIG, torch.Generator().manual_seed(0), std=0.3).eval().requires_grad_(False)
    with torch.no_grad():
        bagel.llm2vae.weight.normal_(std=0.1)
    vae = AutoEncoder(CONFIG.vae).eval().requires_grad_(False)
    return HyperBagel(Parts(bagel, vae, Tokenizer.from_folder(TOKENIZER), ImageTransform(64, 64, 16), ImageTransform(64, 64, 16)), "test")


@pytest.fixture(scope="module")
def students(model: HyperBagel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "cfg" says what the model says without guidance, whatever the scales; "1" was changed at random."""
    folder, bagel = tmp_path_factory.mktemp("students"), model.parts.model
    save_student(folder / "cfg", Student.fresh(bagel, make_adapter(bagel, "lora", rank=2), Sampler(nfe=24)), bagel)
    changed = Student.fresh(bagel, make_adapter(bagel, "lora", rank=2), Sampler(nfe=1))
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    save_student(folder / "one", changed, bagel)
    return {"cfg": folder / "cfg", "1": folder / "one"}


@pytest.fixture(scope="module")
def table(model: HyperBagel, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("eval")
    return run_distillation_eval(model, students, out=out, rows=["teacher-6", "cfg-6", "tscd", "1"], **COUNTS), out


def test_rows_that_have_no_student_are_left_out_and_listed(table: tuple[dict[str, Any], Path]) -> None:
    result, out = table
    assert list(result["rows"]) == ["teacher", "teacher-6", "cfg-6", "1"] and result["left_out"] == ["tscd"]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(result))


def test_evaluations_of_each_row(table: tuple[dict[str, Any], Path]) -> None:
    rows = table[0]["rows"]
    nfe = {name: (row["t2i_nfe"], row["edits_nfe"]) for name, row in rows.items()}
    assert nfe["teacher"] == (100, 132) and nfe["teacher-6"] == (12, 16)  # of 6 steps, 5 lie inside (0.4, 1]
    assert nfe["cfg-6"] == (6, 6) and nfe["1"] == (1, 1)


def test_differences_are_paired_with_the_teacher(table: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    own = table[0]["rows"]["teacher"]["differences"]
    assert set(own) == {"t2i plain", "t2i strict", "edits success", "edits o"}
    assert all((d["mean"], d["low"], d["high"], d["lossless"]) == (0, 0, 0, True) for d in own.values())
    for name, rights in (("a", [1, 1, 1, 0] * 25), ("b", [1, 1, 0, 0] * 25)):
        lines = [json.dumps({"id": i, "plain": bool(r), "strict": False}) for i, r in enumerate(rights)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "t2i.jsonl").write_text("{}\n" + "\n".join(lines) + "\n")
    found = differences(tmp_path / "b", tmp_path / "a")
    assert found["t2i plain"]["mean"] == -0.25 and not found["t2i plain"]["lossless"] and found["t2i strict"]["lossless"]


@pytest.mark.parametrize(("wrong", "low", "lossless"), [(5, -0.01, True), (12, -0.02, False)])
def test_lossless_is_a_lower_bound_above_a_point_and_a_half(wrong: int, low: float, lossless: bool, tmp_path: Path) -> None:
    """5 of 1,000 lost: -0.5 points, down to about -1.0. 12: -1.2, down to about -1.9."""
    for name, lost in (("a", 0), ("b", wrong)):
        lines = [json.dumps({"id": i, "plain": i >= lost, "strict": False}) for i in range(1000)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "t2i.jsonl").write_text("{}\n" + "\n".join(lines) + "\n")
    found = differences(tmp_path / "b", tmp_path / "a")["t2i plain"]
    assert found["mean"] == -wrong / 1000 and found["low"] == pytest.approx(low, abs=0.0015) and found["lossless"] is lossless


def test_steering_tells_a_student_that_ignores_its_scales(table: tuple[dict[str, Any], Path]) -> None:
    rows = table[0]["rows"]
    for name in ("text scale, prompts", "text scale, edits", "image scale, edits"):
        assert rows["cfg-6"]["steer"][name]["mean"] == 0  # its embedders are as they started: zero
        assert rows["1"]["steer"][name]["mean"] > 0.005
    assert rows["teacher"]["steer"]["text scale, prompts"]["mean"] > 0.005


def test_seconds_of_both_teachers_and_of_cached_edits(table: tuple[dict[str, Any], Path]) -> None:
    clock = table[0]["wall_clock"]
    assert set(clock["t2i"]) == {IN_TURN, "teacher", "teacher-6", "cfg-6", "1"}
    one = clock["edits"]["1"]
    assert one["faster than in turn"] == pytest.approx(clock["edits"][IN_TURN]["seconds"] / one["seconds"], rel=1e-5)
    assert one["faster than batched"] == pytest.approx(clock["edits"]["teacher"]["seconds"] / one["seconds"], rel=1e-5)
    assert one["faster than in turn"] > 2
    assert set(clock["edit, picture cached"]) == {"cfg-6", "1"}


def test_in_think_mode_every_row_plans(
    model: HyperBagel, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seconds are compared with the teacher's as it draws: nothing of it is drawn without the plan."""
    monkeypatch.setattr(ImageRequest, "LONGEST_PLAN", 3)
    asked: list[ImageRequest] = []
    draw = model.generate_batch
    monkeypatch.setattr(model, "generate_batch", lambda requests, **more: asked.extend(requests) or draw(requests, **more))
    counts = {"n_t2i": 2, "n_edits": 1, "n_diversity": 1, "n_clock": 1, "n_steer": 2, "show": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the plan was cut")
        result = run_distillation_eval(model, students, out=tmp_path, rows=["1"], think=True, **counts)
    assert asked and all(request.think for request in asked) and result["settings"]["think"]
    assert {part: set(rows) for part, rows in result["wall_clock"].items()} == {"t2i": {"teacher", "1"}, "edits": {"teacher", "1"}}
    with pytest.raises(InputError, match="got records made with"):
        run_distillation_eval(model, students, out=tmp_path, rows=["1"], **counts)


def test_pictures_in_turn_and_behind_a_cached_picture_are_the_pipelines_own(model: HyperBagel, students: dict[str, Path]) -> None:
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for images, paper in (((), PAPER_TEXT_TO_IMAGE), ((source,), PAPER_EDIT)):
        request = ImageRequest("a red car", images, seed=3, steps=4, interval=paper.interval)
        [whole] = model.generate_batch([request])
        picture, nfe = draw_in_turn(model.parts, request)
        assert nfe == whole.nfe and np.abs(np.asarray(picture).astype(int) - np.asarray(whole.image)).max() <= 1
    request = ImageRequest("a red car", (source,), seed=3, student=str(students["1"]))
    behind = draw_behind(model, look(model.parts, request), request)
    assert behind.size == (64, 64)
    again = draw_behind(model, look(model.parts, request), request)
    assert np.array_equal(np.asarray(behind), np.asarray(again))


def test_the_contact_sheet_shows_every_row(table: tuple[dict[str, Any], Path]) -> None:
    columns, lines = sum(distillation.SHEET), 1 + 4
    with Image.open(table[1] / "contact.png") as sheet:
        assert sheet.width // columns > 100 and sheet.height // lines > 100
        colours = sheet.crop((0, sheet.height // lines, sheet.width, sheet.height)).getcolors(2**20)
    assert colours is not None and len(colours) > 50


def test_a_stopped_run_goes_on_and_other_weights_are_refused(
    model: HyperBagel, students: dict[str, Path], table: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval"
    shutil.copytree(table[1], out)
    path = out / "1" / "t2i.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # a kill in the middle of the third record
    made: list[str] = []
    batch = HyperBagel.generate_batch
    monkeypatch.setattr(HyperBagel, "generate_batch", lambda self, rs, **k: made.extend(r.prompt for r in rs) or batch(self, rs, **k))
    counts = COUNTS | {"n_clock": 0}
    again = run_distillation_eval(model, students, out=out, rows=["teacher-6", "cfg-6", "1"], detector=load_detector(), **counts)
    assert len(made) == 4 and path.read_text() == "".join(lines)
    assert again["rows"]["1"] == table[0]["rows"]["1"]
    other = tmp_path / "other"
    shutil.copytree(students["1"], other)
    (other / "sampler.json").write_text((other / "sampler.json").read_text().replace('"shift": 3.0', '"shift": 2.0'))
    with pytest.raises(InputError, match="got records made with"):
        run_distillation_eval(model, {"1": other}, out=out, rows=["1"], **counts)


def test_records_of_another_number_type_are_refused(
    model: HyperBagel, students: dict[str, Path], table: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    shutil.copytree(table[1], out)
    half = HyperBagel(replace(model.parts, model=deepcopy(model.parts.model).bfloat16()), "test")
    with pytest.raises(InputError, match=r"got records made with .*float32.* expected .*bfloat16"):
        run_distillation_eval(half, students, out=out, rows=["1"], **COUNTS)


def test_what_the_options_refuse(students: dict[str, Path], tmp_path: Path) -> None:
    assert parse_students([f"1={students['1']}"]) == {"1": students["1"]}
    for text in ("one", f"seven={students['1']}", f"1={tmp_path}"):
        with pytest.raises(InputError):
            parse_students([text])
    with pytest.raises(InputError, match="teacher-2"):
        choose(["teacher-2"])
    assert [row.name for row in choose(["1"])] == ["teacher", "1"] and choose(None) == ROWS


def test_the_table_in_words(table: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from hyperbagel.evaluate.distillation_report import print_table

    print_table(table[0], Console(width=240))
    text = capsys.readouterr().out
    assert "teacher, 6 Euler steps" in text and "left out, no student given: tscd" in text
    assert "x teacher in turn" in text and "image scale, edits" in text and "100" in text and "132" in text


def test_every_record_of_a_row_has_its_twin_in_the_teachers(table: tuple[dict[str, Any], Path]) -> None:
    for part in ("t2i", "edits", "diversity", "steer", "sheet"):
        ids = {name: [r["id"] for r in read_records(table[1] / name / f"{part}.jsonl")] for name in ("teacher", "cfg-6", "1")}
        assert ids["teacher"] == ids["cfg-6"] == ids["1"] and ids["teacher"]


def test_each_figure_of_steering_has_its_own_name() -> None:
    edit = {"edit": True, "text_scale": 0.2, "image_scale": 0.3, "from_source_weak": 0.4, "from_source_strong": 0.1}
    found = steering([{"edit": False, "text_scale": 0.5}, {"edit": False, "text_scale": 0.7}, edit])
    assert {name: value["mean"] for name, value in found.items()} == {
        "text scale, prompts": pytest.approx(0.6),
        "text scale, edits": 0.2,
        "image scale, edits": 0.3,
        "from the source, weak": 0.4,
        "from the source, strong": 0.1,
    }


def test_steering_compares_the_weak_and_the_strong_picture_with_the_source_of_an_edit() -> None:
    """A model that paints its image scale: weak 1 -> 10, strong 2.5 -> 25."""

    def generate_batch(requests: list[ImageRequest]) -> list[Any]:
        levels = [round(10 * (r.image_scale or 0)) for r in requests]
        return [SimpleNamespace(image=Image.new("RGB", (64, 64), (level,) * 3)) for level in levels]

    [item] = edit_eval_items(1, 0, "train")
    [record] = steer_worker(SimpleNamespace(generate_batch=generate_batch), Settings())([item], [0])
    source = np.asarray(drawn(item.source, 64)).astype(float)
    for name, level in (("from_source_weak", 10), ("from_source_strong", 25)):
        assert record[name] == pytest.approx(np.sqrt(((source - level) ** 2).mean()) / 255, rel=1e-5)
    assert record["image_scale"] == pytest.approx(15 / 255) and record["edit"]


def test_seconds_are_the_median_between_its_quarters() -> None:
    table = _figures({IN_TURN: [8.0], "teacher": [4.0, 4.0], "1": [1.0, 2.0, 3.0]}, "teacher")
    assert table["1"] == {"seconds": 2, "low": 1, "high": 3, "n": 3, "faster than in turn": 4, "faster than batched": 2}
    assert (table[IN_TURN]["low"], table[IN_TURN]["high"], table["teacher"]["faster than batched"]) == (8, 8, 1)
