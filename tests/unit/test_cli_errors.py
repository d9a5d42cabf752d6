"""The command line with wrong input of every kind: one clear line on stderr, the right exit code, nothing half-written, no model loaded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hyperbagel import cli, cli_checks, demo
from hyperbagel.core.errors import InputError
from hyperbagel.generate.types import TextResult
from hyperbagel.pipeline import check_request


@dataclass
class FakePicture:
    image: Image.Image
    seed: int
    timings: dict[str, float]  # shared by the pictures of one batch
    nfe: int = 150
    thinking: str = ""
    tau: float | None = None
    drafter: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class FakeModel:
    """Stands in for the pipeline: remembers each call, draws plain pictures, raises what `fails` says."""

    load_seconds = 0.25

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.fails: BaseException | None = None

    def from_pretrained(self, **options: Any) -> FakeModel:
        self.calls.append(("load", (), options))
        return self

    @property
    def drafters(self) -> FakeModel:
        return self

    def keep_costs(self) -> None:
        self.calls.append(("keep_costs", (), {}))

    def _pictures(self, name: str, positional: tuple[Any, ...], options: dict[str, Any]) -> list[FakePicture]:
        self.calls.append((name, positional, options))
        if self.fails is not None:
            raise self.fails
        timings = {"prefill": 0.01, "denoise": 1.5, "decode": 0.02}
        options.pop("on_step")(1, 1, None)
        picture = Image.new("RGB", (64, 48))
        return [FakePicture(picture, options["seed"] + i, timings, settings={"steps": 7}) for i in range(options["n"])]

    def generate(self, prompt: str, **options: Any) -> list[FakePicture]:
        return self._pictures("generate", (prompt,), options)

    def edit(self, images: list[Image.Image], instruction: str, **options: Any) -> list[FakePicture]:
        return self._pictures("edit", (images, instruction), options)

    def ask(self, question: str, images: list[Image.Image], **options: Any) -> TextResult:
        self.calls.append(("ask", (question, images), options))
        if self.fails is not None:
            raise self.fails
        return TextResult("two", 3, 9, {"prefill": 0.01, "decode": 0.1}, finish_reason="length")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeModel:
    fake = FakeModel()
    module = types.ModuleType("hyperbagel.pipeline")
    module.HyperBagel = fake  # type: ignore[attr-defined]
    module.check_request = lambda model, **settings: check_request("toybox", **settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hyperbagel.pipeline", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYPERBAGEL_DEBUG", raising=False)
    return fake


@pytest.fixture
def picture(model: FakeModel, tmp_path: Path) -> str:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "in.png")
    return "in.png"


GENERATE = ["generate", "a red car", "-o", "a.png"]
WRONG = {
    "no folder": ([*GENERATE[:-1], "nowhere/a.png"], "create 'nowhere' first"),
    "wrong suffix": ([*GENERATE[:-1], "a.jpg"], "ends in .png"),
    "no suffix": ([*GENERATE[:-1], "a"], "ends in .png"),
    "no output": (GENERATE[:2], "Missing option '-o'"),
    "empty prompt": (["generate", "  ", "-o", "a.png"], "got an empty prompt"),
    "no prompt": (["generate", "-o", "a.png"], "Missing argument"),
    "two prompts": (["generate", "a", "b", "-o", "a.png"], "unexpected extra argument"),
    "size is no size": ([*GENERATE, "--size", "64"], "expected WIDTHxHEIGHT"),
    "size is odd": ([*GENERATE, "--size", "100x64"], "got size 100x64, expected multiples of 16; the nearest is 96x64"),
    "size is zero": ([*GENERATE, "--size", "64x0"], "got size 64x0, expected multiples of 16; the nearest is 64x16"),
    "size is huge": ([*GENERATE, "--size", "4096x64"], "got a picture of 4096x64 pixels, expected at most"),
    "negative steps": ([*GENERATE, "--steps", "-1"], "got -1 steps"),
    "no steps": ([*GENERATE, "--steps", "0"], "got 0 steps"),
    "steps without end": ([*GENERATE, "--steps", "99999999999999999999"], "expected 1 to 10000; 50 is usual"),
    "steps are words": ([*GENERATE, "--steps", "many"], "'--steps'"),
    "n is zero": ([*GENERATE, "-n", "0"], "got -n 0"),
    "n is huge": ([*GENERATE, "-n", "1000"], "got -n 1000"),
    "negative seed": ([*GENERATE, "--seed", "-1"], "got --seed -1"),
    "negative scale": ([*GENERATE, "--text-scale", "-2"], "got text_scale -2"),
    "scale is nan": ([*GENERATE, "--text-scale", "nan"], "got text_scale nan"),
    "interval is reversed": ([*GENERATE, "--interval", "0.9", "0.1"], "expected two times with 0 <= LO <= HI <= 1"),
    "interval is outside": ([*GENERATE, "--interval", "0", "2"], "expected two times with 0 <= LO <= HI <= 1"),
    "unknown renorm": ([*GENERATE, "--renorm", "loud"], "'text_channel'"),
    "renorm-min is outside": ([*GENERATE, "--renorm-min", "3"], "got renorm_min 3"),
    "shift is zero": ([*GENERATE, "--shift", "0"], "got shift 0"),
    "unknown option": ([*GENERATE, "--sed", "1"], "No such option: --sed"),
    "unknown command": (["generat"], "Did you mean 'generate'"),
    "edit without a picture": (["edit", "make it blue", "-o", "a.png"], "expected a picture before it"),
    "edit without words": (["edit", "in.png", "-o", "a.png"], "expected the instruction after it"),
    "edit with two pictures, no words": (["edit", "in.png", "in.png", "-o", "a.png"], "expected the instruction after it"),
    "edit of nothing": (["edit", "other.png", "make it blue", "-o", "a.png"], "got 'other.png', which is no file"),
    "edit without quotes": (["edit", "in.png", "make", "it", "blue", "-o", "a.png"], "put the whole instruction in quotes"),
    "edit with an empty instruction": (["edit", "in.png", "", "-o", "a.png"], "got an empty instruction"),
    "edit with a wrong image scale": (["edit", "in.png", "x", "-o", "a.png", "--image-scale", "inf"], "got image_scale inf"),
    "drafting no plan": ([*GENERATE, "--drafter", "lookup"], "got --drafter without --think"),
    "a planner of no plan": ([*GENERATE, "--planner", "none"], "got --planner without --think"),
    "an evaluation's planner of no plan": (["eval", "toybox", "-o", "run", "--planner", "none"], "got --planner without --think"),
    "a temperature of no plan": ([*GENERATE, "--think-temperature", "1"], "got --think-temperature without --think"),
    "a plan that is too hot": ([*GENERATE, "--think", "--think-temperature", "101"], "got think_temperature 101"),
    "an evaluation's temperature of no plan": (
        ["eval", "distillation", "-o", "run", "--think-temperature", "1"],
        "got --think-temperature without --think",
    ),
    "a plan that cannot fit": ([*GENERATE, "--think", "--max-think-tokens", "5000"], "lower max_think_tokens (--max-think-tokens)"),
    "an evaluation's plan that cannot fit": (
        ["eval", "geneval", "-o", "run", "--prompts", "in.png", "--think", "--max-think-tokens", "5000"],
        "lower max_think_tokens (--max-think-tokens)",
    ),
    "a length of no plan": (["edit", "in.png", "x", "-o", "a.png", "--max-think-tokens", "9"], "got --max-think-tokens without --think"),
    "an evaluation's length of no plan": (
        ["eval", "geneval", "-o", "run", "--prompts", "in.png", "--max-think-tokens", "9"],
        "got --max-think-tokens without --think",
    ),
    "ask nothing": (["ask"], "Missing argument"),
    "ask with a picture alone": (["ask", "in.png"], "expected the question after it"),
    "ask with an empty question": (["ask", "in.png", " "], "got an empty question"),
    "ask about nothing": (["ask", "other.png", "what is it?"], "which is no file"),
    "ask for no tokens": (["ask", "what?", "--max-tokens", "0"], "got --max-tokens 0"),
    "ask from too much": (["ask", "what?", "--top-p", "1.5"], "got top_p 1.5, expected 0"),
    "ask with a stop that ends all": (["ask", "what?", "--stop", ".", "--stop", ""], "got stop ['.', ''], expected a text or several"),
    "ask below zero degrees": (["ask", "what?", "--temperature", "-1"], "got --temperature -1"),
    "a setting without a value": (["train", "vae", "lr", "-o", "run"], "expected key=value, write for instance optim.lr=1e-4"),
    "train nowhere": (["train", "vae"], "Missing option '-o' / '--out'"),
    "eval of what": (["eval", "imagenet", "-o", "run"], "'toybox'"),
    "eval of an unknown student": (["eval", "distillation", "-o", "run", "--student", "x=y"], "expected NAME=FOLDER"),
    "eval of an unknown row": (["eval", "distillation", "-o", "run", "--rows", "8"], "got row '8'"),
    "eval of a negative number": (["eval", "toybox", "-o", "run", "--n-t2i", "-4"], "got --n-t2i -4"),
    "eval into a file": (["eval", "toybox", "-o", "in.png/run"], "in.png' is a file"),
    "eval of no prompts": (["eval", "geneval", "-o", "run", "--prompts", "none.jsonl"], "got --prompts 'none.jsonl', which is no file"),
    "pictures into a file": (["eval", "gedit", "-o", "in.png/run", "--prompts", "in.png"], "in.png' is a file"),
    "export into a file": (["export", "student", "6", "-o", "in.png/six"], "in.png' is a file"),
    "lora into a file": (["export", "lora", "6", "-o", "in.png/six"], "in.png' is a file"),
    "drafter into a file": (["export", "eagle3", "mine", "-o", "in.png/mine"], "in.png' is a file"),
    "average into a file": (["average", "a", "b", "--model", "toybox", "-o", "in.png/mean"], "in.png' is a file"),
    "demo into a file": (["demo", "-o", "in.png/page"], "in.png' is a file"),
    "a name without end": (["inspect", "x" * 300], "got a name that is too long, expected"),
    "demo with a negative seed": (["demo", "-o", "page", "--seed", "-1"], "got --seed -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_costs_nothing(name: str, model: FakeModel, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = WRONG[name]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert model.calls == [], "the model was loaded before the mistake was found"
    assert [path.name for path in Path().iterdir()] == [picture]


def test_a_picture_that_is_none(model: FakeModel, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.png").write_text("this is text")
    assert cli.main(["edit", "text.png", "make it blue", "-o", "a.png"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "text.png" in err and err.count("\n") == 1
    assert model.calls == [] and not Path("a.png").exists()


@pytest.mark.parametrize("name", ["ema.safetensors", "model.GGUF", "llm_config.json"])
def test_inspect_of_one_file_of_a_model(name: str, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_text("{}")
    assert cli.main(["inspect", name]) == 2
    assert capsys.readouterr().err == f"error: got the file {name!r}, expected a folder or a picture, give the folder that it is of\n"


def test_output_is_a_folder(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").mkdir()
    assert cli.main(GENERATE) == 2
    assert "which is a folder" in capsys.readouterr().err


def test_output_folder_is_not_writable(model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_checks.os, "access", lambda path, mode: False)  # chmod does not stop root
    assert cli.main(GENERATE) == 2
    assert "a folder you may write to" in capsys.readouterr().err
    assert model.calls == []


def test_demo_writes_nowhere_before_it_has_a_model(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: Any) -> None:
        raise InputError("got no model")

    with monkeypatch.context() as patch:
        patch.setattr(model, "from_pretrained", refuse)
        assert cli.main(["demo", "-o", "page", "--model", "nothing"]) == 2
        assert "got no model" in capsys.readouterr().err and not Path("page").exists()
    with monkeypatch.context() as patch:
        patch.setattr(demo, "painters", lambda model: refuse())
        assert cli.main(["demo", "-o", "page"]) == 2
        assert "got no model" in capsys.readouterr().err and not Path("page").exists()
    monkeypatch.setattr(cli_checks.os, "access", lambda path, mode: False)  # chmod does not stop root
    assert cli.main(["demo", "-o", "page"]) == 2
    assert "expected one you may write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            InputError("got a prompt of 9000 tokens,\nexpected at most 512, shorten it"),
            2,
            "error: got a prompt of 9000 tokens, expected at most",
        ),
        (OSError(28, "No space left on device"), 2, "error: got a full disk, expected"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("mat1 and mat2"), 1, "internal error: RuntimeError: mat1 and mat2; set HYPERBAGEL_DEBUG=1 for the traceback"),
    ],
)
@pytest.mark.parametrize("argv", [[*GENERATE, "--seed", "1"], ["edit", "in.png", "x", "-o", "a.png", "--seed", "1"], ["ask", "what?"]])
def test_failures_inside_the_work(
    error: BaseException, code: int, text: str, argv: list[str], model: FakeModel, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model.fails = error
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(text) and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == [picture]


def test_debug_shows_the_traceback(model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYPERBAGEL_DEBUG", "1")
    model.fails = RuntimeError("boom")
    assert cli.main(GENERATE) == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_what_was_given_reaches_the_pipeline(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--seed", "0"]) == 0
    assert model.calls == [("load", (), {}), ("generate", ("a red car",), {"n": 1, "seed": 0, "think": False})]
    out, err = capsys.readouterr()
    assert out == "a.png\n"
    assert "64x48, seed 0, 150 NFE\n" in err and "load 0.25 s, prefill 0.01 s, denoise 1.50 s, decode 0.02 s\n" in err


def test_every_option_reaches_the_pipeline(model: FakeModel, picture: str) -> None:
    options = (
        "--seed 7 --steps 6 --text-scale 3 --image-scale 1.5 --interval 0.2 0.9 --renorm channel --renorm-min 0.1 --shift 2 -n 2 --think "
        "--max-think-tokens 9 --think-temperature 0.5 --drafter lookup"
    )
    where = "--model folder --device cuda --dtype bfloat16 --planner none"
    assert cli.main(["edit", picture, picture, "swap them", "-o", "b.png", *options.split(), *where.split()]) == 0
    (_, _, loaded), (kept, _, _), (name, (images, instruction), given) = model.calls
    assert kept == "keep_costs"
    assert loaded == {"model": "folder", "device": "cuda", "dtype": "bfloat16", "planner": "none"}
    assert (name, instruction, [image.size for image in images]) == ("edit", "swap them", [(64, 64)] * 2)
    assert given == {
        **{"seed": 7, "steps": 6, "text_scale": 3.0, "image_scale": 1.5, "interval": (0.2, 0.9), "renorm": "channel"},
        **{"renorm_min": 0.1, "shift": 2.0, "n": 2, "think": True, "max_think_tokens": 9, "drafter": "lookup"},
        "think_temperature": 0.5,
    }
    assert sorted(path.name for path in Path().iterdir()) == ["b-0.png", "b-1.png", picture]


def test_size_is_width_by_height_outside_and_height_by_width_inside(model: FakeModel) -> None:
    assert cli.main([*GENERATE, "--size", "96x64"]) == 0
    assert model.calls[-1][2]["size"] == (64, 96)


def test_a_drawn_seed_is_printed_and_used(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(GENERATE) == 0
    seed = model.calls[-1][2]["seed"]
    assert f"seed {seed} (drawn; repeat with --seed {seed})" in capsys.readouterr().err


def test_json_is_the_whole_of_stdout(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--seed", "3", "-n", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(row["file"], row["seed"], row["nfe"], row["size"]) for row in answer["pictures"]] == [
        ("a-0.png", 3, 150, [64, 48]),
        ("a-1.png", 4, 150, [64, 48]),
    ]
    assert answer["seconds"]["denoise"] == 1.5, "two pictures of one batch share their seconds"
    assert cli.main(["ask", "how many?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "two"


def test_inspect_reads_back_the_settings_of_a_picture(model: FakeModel, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--seed", "3"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", "a.png"]) == 0
    assert capsys.readouterr().out == "steps  7\n"
    assert cli.main(["inspect", picture]) == 2
    assert "got a picture without settings" in capsys.readouterr().err


def test_ask_prints_the_answer_alone_on_stdout(model: FakeModel, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", picture, "how many?", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out == "two\n" and "9 tokens in, 3 out, 20.0 tok/s" in err and "larger --max-tokens" in err
    assert model.calls[-1][2] == {"seed": 0, "think": False, "max_tokens": 5}
    assert [name for name, _, _ in model.calls] == ["load", "keep_costs", "ask"]


def test_the_installed_command_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "hyperbagel.cli", "generate", "a", "-o", "a.gif"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: got the output name 'a.gif'")


SLEEPER = """
import sys, time, types
from hyperbagel import cli

class Model:
    load_seconds = 0.0
    drafters = types.SimpleNamespace(keep_costs=lambda: None)
    @classmethod
    def from_pretrained(cls): return cls()
    def ask(self, question, images, **options):
        print("thinking", flush=True)
        time.sleep(60)

module = types.ModuleType("hyperbagel.pipeline")
module.HyperBagel = Model
sys.modules["hyperbagel.pipeline"] = module
sys.exit(cli.main(["ask", "what?"]))
"""


def test_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def listen() -> None:  # a test run that a shell put into the background hands down an ignored SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], cwd=tmp_path, text=True, preexec_fn=listen, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "thinking\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
