"""The commands end to end on the tiny random model: real pipeline, real files, nothing faked."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyperbagel import cli, demo
from hyperbagel.data.images import read_settings
from hyperbagel.model.weights import save_tensors


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    capsys.readouterr()
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_draw_edit_ask_and_inspect(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--model", str(folder), "--device", "cpu", "--steps", "2"]
    out, err = run(["generate", "a red car", "-o", "a.png", "-n", "2", "--seed", "5", "--size", "48x32", *small], capsys)
    assert out.split() == ["a-0.png", "a-1.png"]
    assert "48x32, seed 5, 4 NFE\n" in err and "48x32, seed 6, 4 NFE\n" in err and "denoise" in err
    assert Image.open("a-0.png").size == (48, 32)
    assert not np.array_equal(np.asarray(Image.open("a-0.png")), np.asarray(Image.open("a-1.png")))

    out, _ = run(["generate", "a red car", "-o", "b.png", "--seed", "6", "--size", "48x32", "--json", *small], capsys)
    [row] = json.loads(out)["pictures"]
    assert row["settings"] == read_settings("b.png") and row["settings"]["num_steps"] == 2
    assert np.array_equal(np.asarray(Image.open("b.png")), np.asarray(Image.open("a-1.png"))), "the seed makes the picture"

    out, _ = run(["edit", "a-0.png", "make it blue", "-o", "c.png", "--seed", "0", *small], capsys)
    assert out == "c.png\n" and read_settings("c.png")["renorm"] == "text_channel"

    out, err = run(["ask", "a-0.png", "c.png", "what is it?", "--model", str(folder), "--max-tokens", "3", "--json"], capsys)
    answer = json.loads(out)
    assert answer["tokens"] <= 3 and answer["stopped_at"] is None and len(answer["text"]) > 1
    first = answer["text"][0]
    asked = ["ask", "a-0.png", "c.png", "what is it?", "--model", str(folder), "--stop", "no such text", "--stop", first, "--json"]
    assert json.loads(run(asked, capsys)[0]).items() >= {"text": "", "finish_reason": "stop", "stopped_at": first}.items()

    assert "num_steps    2" in run(["inspect", "c.png"], capsys)[0]
    assert "parameters" in run(["inspect", str(folder)], capsys)[0]


def test_what_inspect_knows_besides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model by its name, and exports that are a part of a model."""
    assert "parameters" in run(["inspect", "toybox"], capsys)[0]
    for stem, told in (("ae", "an autoencoder"), ("vit", "a vision encoder"), ("reward", "a reward head")):
        (tmp_path / stem).mkdir()
        save_tensors(tmp_path / stem / f"{stem}.safetensors", {"a": torch.zeros(3)})
        out, _ = run(["inspect", str(tmp_path / stem), "--json"], capsys)
        assert json.loads(out)["part"].startswith(told) and json.loads(out)["weights"][stem]["parameters"] == 3


def test_names_of_any_bytes(folder: Path, tmp_path: Path) -> None:
    """A file name need not be UTF-8: it is written back as it came, and every picture is saved."""
    command = [sys.executable, "-m", "hyperbagel.cli", "generate", "a car", "-o", os.fsdecode(b"n\xe9.png"), "-n", "2", "--seed", "1"]
    command += ["--model", str(folder), "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"n\xe9-0.png", b"n\xe9-1.png"] and len(list(tmp_path.iterdir())) == 2
    talk = [sys.executable, "-m", "hyperbagel.cli", "chat", "--model", str(folder), "--max-tokens", "2"]
    lines = b"/save x\xe9.png\n/tokens 3\n"
    told = subprocess.run(talk, input=lines, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"}, check=False)
    assert told.returncode == 0 and b"at most 3 tokens" in told.stderr, told.stderr


@pytest.mark.skipif(os.name == "nt", reason="a shell's redirections")
def test_closed_streams_are_no_files(folder: Path, tmp_path: Path) -> None:
    """As daemons start programs: what would have been said is dropped, and neither the answer nor a picture takes its place."""
    words = [sys.executable, "-m", "hyperbagel.cli", "generate", "a car", "-o", "y.png", "--json", "--model", str(folder), "--steps", "1"]
    command = shlex.join(words)
    done = subprocess.run(f"{command} 0<&- 2>&-", shell=True, cwd=tmp_path, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["pictures"][0]["file"] == "y.png"
    assert read_settings(tmp_path / "y.png")["num_steps"] == 1


WRONG_FOR_THIS_MODEL = {
    "too large": (["--size", "512x512"], "128 a side"),
    "no such folder": (["--model", "nowhere"], "nowhere"),
    "no such device": (["--device", "warp"], "'warp'"),
    "no such dtype": (["--dtype", "int4"], "'int4'"),
    "no such student": (["--student", "9"], "'9'"),
    "a variable that is not set": (["--model", ""], "empty name of a model"),
}


@pytest.mark.parametrize("name", WRONG_FOR_THIS_MODEL)
def test_what_only_the_model_can_refuse(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = WRONG_FOR_THIS_MODEL[name]
    assert cli.main(["generate", "a red car", "-o", "a.png", "--model", str(folder), *options]) == 2  # no seed is told that drew nothing
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_beyond_the_context_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a red car " * 20000, "-o", "a.png", "--seed", "1", "--model", str(folder)]) == 2
    assert "shorten it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_demo_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("PICTURES", "EDITS", "ANSWERS"):
        monkeypatch.setattr(demo, count, 1)
    out, err = run(["demo", "--out", str(tmp_path / "page"), "--model", str(folder)], capsys)
    page = (tmp_path / "page" / "index.html").read_text("utf-8")
    assert out.strip() == str(tmp_path / "page" / "index.html")
    assert page.count("<article>") == 3 and page.count("data:image/png") == 5
    assert "picture 1 of 1" in err and "edit 1 of 1" in err and "question 1 of 1" in err


def test_pictures_for_outside_scorers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tag": "single_object", "prompt": "a red car"}\n')
    small = ["--model", str(folder), "--device", "cpu", "--steps", "2"]
    run(["eval", "geneval", "--prompts", str(prompts), "-o", str(tmp_path / "geneval"), "-n", "2", "--size", "32x32", *small], capsys)
    made = [tmp_path / "geneval" / "00000" / "samples" / f"0000{k}.png" for k in range(2)]
    assert not np.array_equal(*(np.asarray(Image.open(path)) for path in made)) and read_settings(made[0])["num_steps"] == 2
    Image.open(made[0]).save(tmp_path / "k_SRCIMG.png")
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"key": "k", "task_type": "color_alter", "instruction": "make it blue", "instruction_language": "en"}\n')
    _, err = run(["eval", "gedit", "--prompts", str(edits), "-o", str(tmp_path / "gedit"), *small], capsys)
    assert (tmp_path / "gedit" / "fullset" / "color_alter" / "en" / "k.png").is_file() and "1 made" in err
