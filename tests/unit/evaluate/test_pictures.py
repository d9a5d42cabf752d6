"""Runners for scorers that stand outside: their folders, a stopped run, several ranks, broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.data.images import read_settings
from hyperbagel.evaluate.gedit import run_gedit
from hyperbagel.evaluate.geneval import run_geneval
from hyperbagel.generate.types import ImageRequest, ImageResult

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], "prompt": "two cows"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
]


class Fake:
    """Draws a field whose colour is its seed; dies before picture number `dies`."""

    name = "fake"

    def __init__(self, dies: int = 10**9) -> None:
        self.seen: list[ImageRequest] = []
        self.dies = dies

    def generate_batch(self, requests: list[ImageRequest]) -> list[ImageResult]:
        self.seen += requests
        if len(self.seen) >= self.dies:
            raise KeyboardInterrupt
        return [ImageResult(Image.new("RGB", (16, 16), (r.seed % 256, 0, 0)), r.seed, 1, {}, None, {"seed": r.seed}) for r in requests]


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


def test_pictures_made_otherwise_are_not_mixed(tmp_path: Path) -> None:
    path = prompts(tmp_path / "p.jsonl", GENEVAL)
    run_geneval(Fake(), path, tmp_path / "out", n=1)
    for changes in ({"settings": {"student": "6"}}, {"seed": 1}):
        with pytest.raises(InputError, match="pictures made with"):
            run_geneval(Fake(), path, tmp_path / "out", n=1, **changes)  # type: ignore[arg-type]


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


def test_the_folders_of_gedit(tmp_path: Path) -> None:
    model, out, data = Fake(), tmp_path / "out", tmp_path / "data"
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
