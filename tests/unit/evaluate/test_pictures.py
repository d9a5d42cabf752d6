"""Runners for scorers that stand outside: their folders, a stopped run, several ranks, broken rows."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.data.images import read_settings
from hyperbagel.evaluate import gedit
from hyperbagel.evaluate import pictures as pictures_of_scorers
from hyperbagel.evaluate.gedit import run_gedit
from hyperbagel.evaluate.geneval import run_geneval
from hyperbagel.evaluate.pictures import place, read_lines
from hyperbagel.generate.types import Denoising, ImageRequest, ImageResult

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], "prompt": "two cows"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
]


class Fake:
    """Draws a field whose colour is its seed; dies before picture number `dies`, refuses a batch with a prompt over 60 letters.

    students: where they are; a folder named "6" always is."""

    name = "fake"
    default_size = (16, 16)
    usual: ClassVar[dict[str, Any]] = {}  # the model's own settings, where a request says nothing

    def __init__(
        self,
        dies: int = 10**9,
        *,
        students: Path | None = None,
        weights: torch.nn.Module | None = None,
        decoder: torch.nn.Module | None = None,
    ) -> None:
        self.seen: list[ImageRequest] = []
        self.dies = dies
        self.parts = SimpleNamespace(model=weights or torch.nn.Identity(), vae=decoder or torch.nn.Identity())
        names = sorted(p.name for p in students.iterdir()) if students else []
        self.students = SimpleNamespace(names=lambda: names, find=lambda name: Path(students or "", name))

    def settings(self, request: ImageRequest, *, warn: bool = True) -> Denoising:
        if request.student is not None and request.student not in self.students.names():
            raise InputError(f"got student {request.student!r}, expected one of {self.students.names()}")
        own = request.denoising()
        return replace(own, **{name: value for name, value in self.usual.items() if getattr(request, name) is None})

    def grid(self, request: ImageRequest) -> tuple[int, int]:
        if request.size != (16, 16):
            raise InputError(f"got size {request.size}, expected (16, 16)")
        return 1, 1

    def generate_batch(self, requests: list[ImageRequest]) -> list[ImageResult]:
        if any(len(r.prompt) > 60 for r in requests):
            raise InputError("got a prompt that is too long")
        self.seen += requests
        if len(self.seen) >= self.dies:
            raise KeyboardInterrupt
        return [ImageResult(Image.new("RGB", (16, 16), (r.seed % 256, 0, 0)), r.seed, 1, {}, None, {"seed": r.seed}) for r in requests]


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """A folder of students with one in it."""
    folder = tmp_path / "students"
    (folder / "6").mkdir(parents=True)
    (folder / "6" / "weights").write_bytes(b"one")
    return folder


def prompts(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def pictures(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): np.asarray(Image.open(p)).tobytes() for p in sorted(out.rglob("*.png"))}


def test_the_folders_of_geneval(tmp_path: Path) -> None:
    model, out = Fake(), tmp_path / "out"
    outcome = run_geneval(model, prompts(tmp_path / "p.jsonl", GENEVAL), out, n=2, batch=4, settings={"steps": 6})
    assert (outcome.made, outcome.found, outcome.broken) == (6, 0, [])
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["00000", "00001", "00002"]
    for i, row in enumerate(GENEVAL):
        lines = (out / f"{i:05d}" / "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [row]
        assert sorted(p.name for p in (out / f"{i:05d}" / "samples").iterdir()) == ["00000.png", "00001.png"]
    assert {(r.prompt, r.steps) for r in model.seen} == {(row["prompt"], 6) for row in GENEVAL}
    assert len({r.seed for r in model.seen}) == 6 and read_settings(out / "00000" / "samples" / "00000.png")["seed"] == model.seen[0].seed


def test_a_stopped_run_goes_on_and_ranks_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prompts(tmp_path / "p.jsonl", GENEVAL)
    run_geneval(Fake(), path, tmp_path / "whole", n=2, batch=2)
    with pytest.raises(KeyboardInterrupt):
        run_geneval(Fake(dies=3), path, tmp_path / "stopped", n=2, batch=2)
    assert len(pictures(tmp_path / "stopped")) == 2
    again = Fake()
    outcome = run_geneval(again, path, tmp_path / "stopped", n=2, batch=2)
    assert (outcome.made, outcome.found, len(again.seen)) == (4, 2, 4)
    drawn = []
    for rank in (1, 0):  # in any order
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        model = Fake()
        run_geneval(model, path, tmp_path / "ranks", n=2, batch=2)
        drawn.append(len(model.seen))
    assert drawn == [3, 3]
    assert pictures(tmp_path / "whole") == pictures(tmp_path / "stopped") == pictures(tmp_path / "ranks")
    assert (tmp_path / "ranks" / "00002" / "metadata.jsonl").is_file()


def test_pictures_made_otherwise_are_not_mixed(tmp_path: Path, six: Path) -> None:
    path = prompts(tmp_path / "p.jsonl", GENEVAL)
    run_geneval(Fake(), path, tmp_path / "out", n=1)
    for changes in ({"settings": {"student": "6"}}, {"seed": 1}):
        with pytest.raises(InputError, match="pictures made with"):
            run_geneval(Fake(students=six), path, tmp_path / "out", n=1, **changes)  # type: ignore[arg-type]


def test_pictures_of_other_weights_or_prompts_are_not_mixed(tmp_path: Path, six: Path) -> None:
    data = tmp_path / "data"
    suites: list[tuple[Any, list[dict[str, Any]], str]] = [(run_geneval, GENEVAL, "prompt"), (run_gedit, edit_rows(data), "instruction")]
    asked = {"student": "6"}
    for run, rows, text in suites:
        (six / "6" / "weights").write_bytes(b"one")
        path, out = prompts(data / "rows.jsonl", rows), tmp_path / run.__name__
        made = run(Fake(students=six), path, out, settings=asked).made
        assert run(Fake(students=six), path, out, settings=asked).found == made
        prompts(path, [*rows[:-1], rows[-1] | {text: "something else"}])
        with pytest.raises(InputError, match="pictures made with"):
            run(Fake(students=six), path, out, settings=asked)
        prompts(path, rows)
        with pytest.raises(InputError, match="pictures made with"):
            run(Fake(students=six, weights=torch.nn.Linear(1, 1)), path, out, settings=asked)
        with pytest.raises(InputError, match="pictures made with autoencoder"):  # stage vae trains a decoder alone, too
            run(Fake(students=six, decoder=torch.nn.Linear(1, 1)), path, out, settings=asked)
        (six / "6" / "weights").write_bytes(b"another")
        with pytest.raises(InputError, match="pictures made with"):
            run(Fake(students=six), path, out, settings=asked)


def test_pictures_depend_on_the_models_own_settings_and_not_on_its_name(tmp_path: Path, six: Path) -> None:
    """A model's own guidance and size count as if they had been asked for; how the model and its student are called does not."""
    data = tmp_path / "data"
    suites: list[tuple[Any, list[dict[str, Any]]]] = [(run_geneval, GENEVAL), (run_gedit, edit_rows(data))]
    for run, rows in suites:
        path, out = prompts(data / "rows.jsonl", rows), tmp_path / run.__name__
        made = run(Fake(), path, out).made
        moved = Fake()
        moved.name = "elsewhere/fake"
        assert run(moved, path, out, settings={"text_scale": 4.0}).found == made, "the same, spelt out"
        other = Fake()
        other.usual = {"text_scale": 2.0}
        with pytest.raises(InputError, match=r"denoising\.text_scale 4\.0, expected denoising\.text_scale 2\.0"):
            run(other, path, out)
        (six.parent / "again").mkdir(exist_ok=True)
        (six.parent / "again" / "weights").write_bytes((six / "6" / "weights").read_bytes())
        run(Fake(students=six), path, tmp_path / f"{run.__name__}-6", settings={"student": "6"})
        same = Fake(students=six)
        same.students = SimpleNamespace(names=lambda: ["mine"], find=lambda name: six.parent / "again")
        assert run(same, path, tmp_path / f"{run.__name__}-6", settings={"student": "mine"}).found == made
    larger = Fake()
    larger.default_size = (32, 32)
    with pytest.raises(InputError, match=r"size \[16, 16\], expected size \[32, 32\]"):
        run_geneval(larger, prompts(data / "rows.jsonl", GENEVAL), tmp_path / "run_geneval")


def test_pictures_of_another_number_type_are_not_mixed(tmp_path: Path) -> None:
    data, whole = tmp_path / "data", torch.nn.Linear(1, 1)
    torch.nn.init.ones_(whole.weight)
    torch.nn.init.ones_(whole.bias)
    half = deepcopy(whole).bfloat16()  # the same values: it has the same fingerprint
    suites: list[tuple[Any, list[dict[str, Any]]]] = [(run_geneval, GENEVAL), (run_gedit, edit_rows(data))]
    for run, rows in suites:
        path, out = prompts(data / "rows.jsonl", rows), tmp_path / run.__name__
        made = run(Fake(weights=whole), path, out).made
        with pytest.raises(InputError, match=r"pictures made with .*float32.* expected .*bfloat16"):
            run(Fake(weights=half), path, out)
        noted = json.loads((out / "settings.json").read_text())
        assert (noted["dtype"], noted["device"]) == ("float32", "cpu") and run(Fake(weights=whole), path, out).found == made
        (out / "settings.json").write_text(json.dumps({k: v for k, v in noted.items() if k not in ("dtype", "device")}))
        with pytest.raises(InputError, match="pictures made with"):  # of a time when nobody noted it
            run(Fake(weights=whole), path, out)


def test_settings_that_the_model_refuses_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data"
    suites: list[tuple[Any, list[dict[str, Any]]]] = [(run_gedit, edit_rows(data)), (run_geneval, GENEVAL)]
    for run, rows in suites:
        path, out = prompts(data / "rows.jsonl", rows), tmp_path / run.__name__
        for mistyped in ({"student": "66"}, {"size": (17, 16)}, {"steps": 0}):
            with pytest.raises(InputError, match=r"66|17|0 steps"):
                run(Fake(), path, out, settings=mistyped)
        assert run(Fake(), path, out).broken == []


def test_a_prompt_that_the_model_refuses_costs_only_its_own_picture(tmp_path: Path) -> None:
    long = {"prompt": "a red cup " * 7}
    model, out = Fake(), tmp_path / "out"
    outcome = run_geneval(model, prompts(tmp_path / "p.jsonl", [GENEVAL[0], long, *GENEVAL[1:]]), out, n=1, batch=3)
    assert outcome.made == 3 and outcome.broken == ["00001/samples/00000.png: got a prompt that is too long"]
    assert [r.prompt for r in model.seen] == [row["prompt"] for row in GENEVAL]
    assert list((out / "00001" / "samples").iterdir()) == [], "the scorer lists this folder"
    again = run_geneval(Fake(), tmp_path / "p.jsonl", out, n=1, batch=3)
    assert (again.made, again.found, len(again.broken)) == (0, 3, 1)
    with pytest.raises(InputError, match=r"no other.*too long"):
        run_geneval(Fake(), prompts(tmp_path / "q.jsonl", [long, long]), tmp_path / "none", n=1)


def test_lines_that_editors_and_other_programs_write(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '\ufeff{"prompt": "one\u2028line"}\r\n{"prompt": "\\ud83d"}\n{"prompt": "two", "tag": "\\ud83d"}\n{"prompt": "\\ud83d\\ude00"}',
        "utf-8",
    )
    rows, broken = read_lines(path, ["prompt"])
    assert [(row["prompt"], row["_row"]) for row in rows] == [("one\u2028line", 0), ("\U0001f600", 3)]
    assert len(broken) == 2 and "row 2: a text that is no Unicode" in broken[0]
    assert run_geneval(Fake(), path, tmp_path / "out", n=1).made == 2


def test_a_rank_without_usable_rows_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prompts(tmp_path / "p.jsonl", [GENEVAL[0], {"prompt": "a red cup " * 7}])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.warns(Notice, match="rank 1: got 1 broken rows and no other"):
        assert run_geneval(Fake(), path, tmp_path / "out", n=1).made == 0
    monkeypatch.setenv("RANK", "0")
    assert run_geneval(Fake(), path, tmp_path / "out", n=1).made == 1


@pytest.mark.parametrize(
    "given",
    [{"WORLD_SIZE": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1"}, {"RANK": "one"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "x"}],
)
def test_an_environment_that_is_not_torchruns(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1, None)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="got RANK"):
        place()


def edit_rows(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    Image.new("RGB", (24, 16), (0, 9, 0)).save(folder / "k1_SRCIMG.png")
    Image.new("RGB", (16, 16), (0, 0, 9)).save(folder / "cat.png")
    en = {"key": "k1", "task_type": "subject-add", "instruction": "add a hat", "instruction_language": "en"}
    return [
        en,
        en | {"instruction_language": "cn", "instruction": "加一顶帽子"},
        en | {"key": "k2", "task_type": "color_alter", "image": "cat.png"},
    ]


def test_the_folders_of_gedit(tmp_path: Path, six: Path) -> None:
    model, out, data = Fake(students=six), tmp_path / "out", tmp_path / "data"
    rows = edit_rows(data)
    assert run_gedit(model, prompts(data / "info.jsonl", rows), out, settings={"student": "6"}).made == 3
    assert sorted(map(str, pictures(out))) == [
        "fullset/color_alter/en/k2.png",
        "fullset/color_alter/en/k2_SRCIMG.png",
        "fullset/subject-add/cn/k1.png",
        "fullset/subject-add/cn/k1_SRCIMG.png",
        "fullset/subject-add/en/k1.png",
        "fullset/subject-add/en/k1_SRCIMG.png",
    ]
    assert Image.open(out / "fullset/subject-add/en/k1_SRCIMG.png").getpixel((0, 0)) == (0, 9, 0)
    assert [(r.prompt, r.student, r.images[0].size) for r in model.seen][1:] == [
        ("加一顶帽子", "6", (24, 16)),
        ("add a hat", "6", (16, 16)),
    ]
    assert len({r.seed for r in model.seen}) == 3
    assert run_gedit(Fake(), data / "info.jsonl", tmp_path / "cn", language="cn").made == 1


def test_a_source_that_cannot_be_written_is_no_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends the run; a row is broken by what it says, not by where its picture goes."""
    path, save = prompts(tmp_path / "data" / "info.jsonl", edit_rows(tmp_path / "data")), pictures_of_scorers.save_png

    def full(image: Image.Image, to: Path, *settings: Any) -> None:
        if to.name == "k2_SRCIMG.png":
            raise InputError(f"{to}: got a full disk")
        save(image, to, *settings)

    monkeypatch.setattr(pictures_of_scorers, "save_png", full)
    monkeypatch.setattr(gedit, "save_png", full, raising=False)
    with pytest.raises(InputError, match="full disk"):
        run_gedit(Fake(), path, tmp_path / "out", batch=1)
    monkeypatch.undo()
    outcome = run_gedit(Fake(), path, tmp_path / "out", batch=1)
    assert (outcome.made, outcome.found, outcome.broken) == (1, 2, [])


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    rows = edit_rows(tmp_path / "data")
    odd = [
        rows[0] | {"task_type": ".."},
        rows[0] | {"instruction_language": ".."},
        rows[0] | {"key": ".k1", "image": "cat.png"},
        rows[0] | {"key": "x" * 300, "image": "cat.png"},
    ]
    outcome = run_gedit(Fake(), prompts(tmp_path / "data" / "e.jsonl", [rows[0], *odd]), tmp_path / "a" / "edits")
    assert outcome.made == 1 and len(outcome.broken) == 4 and all("cannot be a file's name" in told for told in outcome.broken)
    assert sorted(pictures(tmp_path / "a")) == [f"edits/fullset/subject-add/en/k1{end}.png" for end in ("", "_SRCIMG")]


def test_rows_of_one_file_are_made_once(tmp_path: Path) -> None:
    [en, cn, other] = edit_rows(tmp_path / "data")
    again = [en | {"instruction": "add a coat"}, en | {"key": "k1_SRCIMG", "image": "cat.png"}]
    path, model = prompts(tmp_path / "data" / "e.jsonl", [en, *again, cn, other]), Fake()
    outcome = run_gedit(model, path, tmp_path / "out")
    assert outcome.made == 3 and "add a coat" not in [r.prompt for r in model.seen]
    assert [told.partition("e.jsonl ")[2] for told in outcome.broken] == [
        "row 2: key 'k1' names a file of row 1",
        "row 3: key 'k1_SRCIMG' names a file of row 1",
    ]
    again_found = run_gedit(Fake(), path, tmp_path / "out")
    assert (again_found.made, again_found.found, len(again_found.broken)) == (0, 3, 2)


def test_broken_rows_are_counted_and_all_broken_is_an_error(tmp_path: Path) -> None:
    bad = ['{"prompt": "cut o', {"tag": "single"}, {"prompt": "  "}, "[1]"]
    outcome = run_geneval(Fake(), prompts(tmp_path / "p.jsonl", [bad[0], GENEVAL[0], *bad[1:]]), tmp_path / "out", n=1)
    assert outcome.made == 1 and len(outcome.broken) == 4 and (tmp_path / "out" / "00001").is_dir()  # rows keep their numbers
    with pytest.raises(InputError, match="none can be used"):
        run_geneval(Fake(), prompts(tmp_path / "q.jsonl", bad), tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        run_geneval(Fake(), tmp_path / "absent.jsonl", tmp_path / "none")
    rows = edit_rows(tmp_path / "data")
    (tmp_path / "data" / "torn.png").write_bytes(b"\x89PNG")
    broken = [rows[0], rows[0] | {"key": "k3"}, rows[0] | {"key": "k4", "image": "torn.png"}, rows[0] | {"key": "../k5"}]
    outcome = run_gedit(Fake(), prompts(tmp_path / "data" / "e.jsonl", broken), tmp_path / "edits")
    assert outcome.made == 1 and len(outcome.broken) == 3 and not (tmp_path / "edits" / "fullset" / "k5.png").exists()
    with pytest.raises(InputError, match="no other"):
        run_gedit(Fake(), prompts(tmp_path / "data" / "f.jsonl", broken[1:3]), tmp_path / "nothing")
    with pytest.raises(InputError, match="language 'cn'"):
        run_gedit(Fake(), tmp_path / "data" / "e.jsonl", tmp_path / "edits", language="cn")


def test_broken_rows_of_the_file_are_told_by_one_rank_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    suites: list[tuple[Any, list[Any]]] = [(run_gedit, [*edit_rows(data), "[1]"]), (run_geneval, [*GENEVAL, "[1]"])]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for run, rows in suites:
        path, told = prompts(data / "rows.jsonl", rows), []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            told.append(len(run(Fake(), path, tmp_path / run.__name__).broken))
        assert told == [1, 0]
