"""The whole evaluation with models whose score is known beforehand: an oracle, a copier, a blank."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.evaluate.distillation import _mean_nfe
from hyperbagel.evaluate.records import item_seed, open_records, read_records, run_items
from hyperbagel.evaluate.report import compare_evaluations, print_report
from hyperbagel.evaluate.summary import summarise_questions
from hyperbagel.evaluate.toybox import Settings, as_square, load_detector, run_toybox_eval
from hyperbagel.generate.types import AskRequest, Denoising, ImageRequest, ImageResult, TextResult
from hyperbagel.model.student import fingerprint
from hyperbagel.toybox.detector import Detector
from hyperbagel.toybox.items import edit_eval_items, question_eval_items, t2i_eval_prompts
from hyperbagel.toybox.render import render
from hyperbagel.toybox.scene import Scene

COUNTS = {"n_t2i": 48, "n_edits": 36, "n_questions": 100, "n_diversity": 6}


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector()


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


@dataclass
class Oracle:
    """Knows the sets, so that it can answer with the truth. Dies before batch number `dies`."""

    dies: int = 10**9
    calls: int = 0
    seeds: list[int] = field(default_factory=list)
    parts: Any = field(default_factory=lambda: SimpleNamespace(model=torch.nn.Identity()))
    students: Any = field(default_factory=lambda: SimpleNamespace(find=Path))

    def __post_init__(self) -> None:
        self.drawings: dict[Any, Scene] = {i.prompt: i.scene for i in [*t2i_eval_prompts(6, 1, "train"), *t2i_eval_prompts(48, 0, "train")]}
        for edit in edit_eval_items(36, 0, "train"):
            self.drawings[edit.instruction, picture(edit.source).tobytes()] = edit.target
        self.answers = {(q.question, picture(q.scene).tobytes()): q.answer for q in question_eval_items(100, 0, "train")}

    def draw(self, request: ImageRequest) -> Image.Image:
        key = (request.prompt, request.images[0].tobytes()) if request.images else request.prompt
        return picture(self.drawings[key])

    def say(self, request: AskRequest) -> str:
        return self.answers[request.question, request.images[0].tobytes()]

    def generate_batch(self, requests: list[ImageRequest]) -> list[ImageResult]:
        self._call()
        self.seeds += [r.seed for r in requests]
        return [ImageResult(self.draw(r), r.seed, 1, {}) for r in requests]

    def ask_batch(self, requests: list[AskRequest]) -> list[TextResult]:
        self._call()
        return [TextResult(self.say(r), 1, 1, {}) for r in requests]

    def settings(self, request: ImageRequest) -> Denoising:
        return request.denoising()

    def _call(self) -> None:
        self.calls += 1
        if self.calls >= self.dies:
            raise KeyboardInterrupt


class Copier(Oracle):
    """Returns the source of an edit, a grey field for a prompt, and says nothing."""

    def draw(self, request: ImageRequest) -> Image.Image:
        return request.images[0] if request.images else Image.new("RGB", (64, 64), (190, 190, 190))

    def say(self, request: AskRequest) -> str:
        return ""


def test_an_oracle_scores_nearly_one_and_a_copier_nothing(tmp_path: Path, detector: Detector) -> None:
    best = run_toybox_eval(Oracle(), **COUNTS, detector=detector, out=tmp_path / "oracle", calibrate=20, show=False)
    worst = run_toybox_eval(Copier(), **COUNTS, detector=detector, out=tmp_path / "copier", calibrate=20, show=False)
    assert best["t2i"]["plain"]["overall"]["mean"] > 0.96
    assert best["t2i"]["strict"]["overall"]["mean"] > 0.96
    assert best["edits"]["success"]["overall"]["mean"] > 0.95
    assert best["questions"]["right"]["overall"]["mean"] == 1.0
    assert best["questions"]["whole sets right"]["choice"]["mean"] == 1.0
    for part, column in (("t2i", "plain"), ("edits", "success"), ("questions", "right")):
        assert worst[part][column]["overall"]["mean"] == 0.0
    assert worst["edits"]["O of 10"]["overall"]["mean"] < 0.1
    assert json.loads((tmp_path / "oracle" / "report.json").read_text()) == best
    # both always draw the same: whatever they score, they have no diversity
    assert best["diversity"]["differ in scene"]["overall"]["mean"] == best["diversity"]["differ in pixel"]["overall"]["mean"] == 0.0
    # the paired comparison sees the gap, and sees that a model loses nothing to itself
    assert compare_evaluations(tmp_path / "copier", tmp_path / "oracle")["t2i"]["high"] < -0.9
    same = compare_evaluations(tmp_path / "oracle", tmp_path / "oracle")
    assert all(row["mean"] == 0 and row["lossless"] for row in same.values())
    assert not compare_evaluations(tmp_path / "copier", tmp_path / "oracle")["edits"]["lossless"]
    shown = Console(record=True, width=140, file=(tmp_path / "shown").open("w"))
    print_report(best, shown)
    text = shown.export_text()
    assert "counting" in text and "recolour" in text and "existence-popular" in text and "wrong prompts" in text


def test_a_killed_evaluation_goes_on_and_ends_the_same(tmp_path: Path, detector: Detector) -> None:
    asked: dict[str, Any] = {"n_t2i": 24, "n_edits": 0, "n_questions": 0, "batch": 5, "detector": detector, "calibrate": 4, "show": False}
    drawn = {i.prompt: i.scene for n in (24, 18) for i in t2i_eval_prompts(n, 0, "train")}
    straight, broken, second = Oracle(), Oracle(dies=3), Oracle()
    for model in (straight, broken, second):
        model.drawings = dict(drawn)
    whole = run_toybox_eval(straight, **asked, out=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run_toybox_eval(broken, **asked, out=tmp_path / "b")
    records = tmp_path / "b" / "t2i.jsonl"
    with records.open("a") as file:
        file.write('{"id": "half a li')  # as a kill in the middle of a write leaves it
    assert len(read_records(records)) == 10
    assert run_toybox_eval(second, **asked, out=tmp_path / "b") == whole
    assert second.calls == 3  # 14 items left, five at a time
    assert broken.seeds + second.seeds == straight.seeds
    # other sets bear the same ids: they are never compared
    run_toybox_eval(second, **asked | {"n_t2i": 18}, out=tmp_path / "c")
    with pytest.raises(InputError, match="one set"):
        compare_evaluations(tmp_path / "a", tmp_path / "c")
    assert records.read_bytes() == (tmp_path / "a" / "t2i.jsonl").read_bytes()


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t2i.jsonl"
    assert open_records(path, {"steps": 6}) == {}
    assert open_records(path, {"steps": 6}) == {}
    with pytest.raises(InputError, match="steps"):
        open_records(path, {"steps": 50})


def test_records_of_another_model_are_refused(tmp_path: Path, detector: Detector) -> None:
    counts = {"n_t2i": 6, "n_edits": 0, "n_questions": 0, "n_diversity": 0}
    asked: dict[str, Any] = {**counts, "detector": detector, "calibrate": 4, "show": False}
    oracle, copier = Oracle(), Copier(parts=SimpleNamespace(model=torch.nn.Linear(1, 1)))
    oracle.drawings = {i.prompt: i.scene for i in t2i_eval_prompts(6, 0, "train")}
    run_toybox_eval(oracle, **asked, out=tmp_path)
    with pytest.raises(InputError, match="got records made with"):
        run_toybox_eval(copier, **asked, out=tmp_path)
    assert copier.calls == 0
    # so are those of a student whose folder has another one now
    student = tmp_path / "student"
    student.mkdir()
    (student / "weights").write_bytes(b"one")
    settings = Settings(image={"student": str(student)})
    run_toybox_eval(oracle, **asked, settings=settings, out=tmp_path / "of-student")
    (student / "weights").write_bytes(b"another")
    with pytest.raises(InputError, match="got records made with"):
        run_toybox_eval(oracle, **asked, settings=settings, out=tmp_path / "of-student")


def test_records_of_another_number_type_are_refused(tmp_path: Path, detector: Detector) -> None:
    counts = {"n_t2i": 6, "n_edits": 0, "n_questions": 0, "n_diversity": 0}
    asked: dict[str, Any] = {**counts, "detector": detector, "calibrate": 4, "show": False}
    whole = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(whole.weight)
    torch.nn.init.ones_(whole.bias)
    first, second = (Oracle(parts=SimpleNamespace(model=model)) for model in (whole, deepcopy(whole).bfloat16()))
    assert fingerprint(first.parts.model) == fingerprint(second.parts.model)
    first.drawings = second.drawings = {i.prompt: i.scene for i in t2i_eval_prompts(6, 0, "train")}
    run_toybox_eval(first, **asked, out=tmp_path)
    with pytest.raises(InputError, match=r"records made with dtype 'float32', expected dtype 'bfloat16'; give"):
        run_toybox_eval(second, **asked, out=tmp_path)
    assert second.calls == 0
    records = tmp_path / "t2i.jsonl"
    records.write_text(records.read_text().replace('"dtype": "float32", ', "", 1))
    with pytest.raises(InputError, match="records made with"):  # of a time when nobody noted it
        run_toybox_eval(first, **asked, out=tmp_path)


WRITER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from hyperbagel.evaluate.records import run_items
def work(items, seeds):
    print("writing", flush=True)
    sys.stdin.readline()
    return [{} for _ in items]
run_items("part", [SimpleNamespace(id="a")], work, seed=0, batch=1, header={}, path=Path(sys.argv[1]))
"""


def test_one_process_at_a_time_writes_records(tmp_path: Path) -> None:
    path, items, made = tmp_path / "t2i.jsonl", [SimpleNamespace(id="a"), SimpleNamespace(id="b")], list[str]()

    def run(path: Path) -> list[str]:
        def work(items: list[Any], seeds: list[int]) -> list[dict[str, Any]]:
            made.extend(item.id for item in items)
            return [{} for _ in items]

        return [r["id"] for r in run_items("part", items, work, seed=0, batch=1, header={}, path=path)]

    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "writing\n"
        with pytest.raises(InputError, match="another process is writing"):
            run(path)
        assert made == [] and run(tmp_path / "edits.jsonl") == ["a", "b"]  # another file is free
        other.stdin.write("\n")
    made.clear()
    assert run(path) == ["a", "b"] and made == ["b"] and run(path) == ["a", "b"] and made == ["b"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t2i.jsonl"
    for damage in ("{not json", "7", '{"plain": true}'):
        path.write_text('{}\n{"id": "a"}\n' + damage + '\n{"id": "b"}\n{"id": "torn')
        for read in (read_records, lambda path: open_records(path, {})):
            with pytest.raises(InputError, match=r"t2i.jsonl line 3: .*remove it"):
                read(path)
    path.write_text('{"n": 4\n{"id": "a"}\n')
    with pytest.raises(InputError, match="line 1: got a damaged header"):
        compare_evaluations(tmp_path, tmp_path)


def test_the_noise_of_an_item_depends_on_its_id_alone() -> None:
    seeds = {item_seed(s, f"two-{i:04d}") for s in range(3) for i in range(400)}
    assert len(seeds) == 1200
    assert all(0 <= s < 2**31 for s in seeds)


def test_options_reach_the_requests(detector: Detector) -> None:
    seen: list[ImageRequest] = []

    class Spy(Copier):
        def draw(self, request: ImageRequest) -> Image.Image:
            seen.append(request)
            return super().draw(request)

    settings = Settings(image={"steps": 6, "text_scale": 1.0}, edit={"steps": 2})
    result = run_toybox_eval(Spy(), n_t2i=6, n_edits=9, n_questions=0, settings=settings, detector=detector, calibrate=4, show=False)
    assert {(r.steps, r.text_scale) for r in seen if not r.images} == {(6, 1.0)}
    assert {(r.steps, r.text_scale) for r in seen if r.images} == {(2, None)}
    assert result["settings"]["image"]["num_steps"] == 6
    assert result["settings"]["edit"]["num_steps"] == 2 and result["settings"]["edit"]["renorm"] == "text_channel"


def test_pictures_of_another_size_are_brought_to_the_measure() -> None:
    large = Image.fromarray(render(t2i_eval_prompts(6, 0)[0].scene, 128))
    assert as_square(large, 64).shape == (64, 64, 3)
    assert np.abs(as_square(large, 64).astype(int) - render(t2i_eval_prompts(6, 0)[0].scene, 64)).mean() < 6
    with pytest.raises(InputError, match="square"):
        as_square(large.resize((64, 32)), 64)


def test_the_command_draws_with_a_student_and_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("hyperbagel.evaluate.toybox.run_toybox_eval", lambda model, **how: asked.append(how["settings"]))
    monkeypatch.setattr("hyperbagel.cli_eval._load", lambda *where: None)
    assert cli.main(["eval", "toybox", "-o", str(tmp_path / "a")]) == 0
    assert cli.main(["eval", "toybox", "-o", str(tmp_path / "b"), "--student", "1", "--think", "--split", "heldout"]) == 0
    by = {"student": "1"}
    assert asked == [Settings(), Settings("heldout", think=True, image=by, edit=by)]


def test_edits_are_compared_as_shares_and_every_group_alike(tmp_path: Path) -> None:
    header = {"n": 3, "settings": {"split": "train", "seed": 0, "side": 64}}
    for name, marks in (("ours", (4, 4, 5)), ("theirs", (5, 5, 9))):
        rows = [{"id": str(i), "group": group, "o": o} for i, (group, o) in enumerate(zip("aab", marks))]
        (tmp_path / name).mkdir()
        (tmp_path / name / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    found = compare_evaluations(tmp_path / "ours", tmp_path / "theirs")["edits"]
    assert found["mean"] == pytest.approx(-0.25) and not found["lossless"]  # -0.1 in group a, -0.4 in group b


def test_evaluations_are_a_mean() -> None:
    assert _mean_nfe([{"nfe": 6}, {"nfe": 12}]) == 9


def test_stated_facts_are_a_share_of_what_was_stated() -> None:
    record = {"id": "a", "kind": "describe", "pair": "", "score": 0.25, "right": 1, "stated": 2, "expected": 4}
    assert summarise_questions([record])["stated facts right"]["overall"]["mean"] == 0.5
