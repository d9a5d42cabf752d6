"""A conversation in the terminal: what was said is read once, Ctrl-C stops an answer only, lines come from a pipe."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperbagel import chat as module
from hyperbagel import cli
from hyperbagel.chat import Chat, stoppable
from hyperbagel.core.errors import InputError
from hyperbagel.data.images import read_settings
from hyperbagel.model.qwen2_mot import Qwen2MoT
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.decode import decode


class Talk(Chat):
    """Keeps what is written and remarked; `on_text` is called with each piece of an answer."""

    def __init__(self, model: HyperBagel, **options: Any) -> None:
        self.text, self.notes, self.on_text = "", [], lambda text: None  # type: ignore[var-annotated]
        super().__init__(model, out=self.write, note=self.notes.append, **options)

    def write(self, text: str) -> None:
        self.text += text
        self.on_text(text)

    def answer(self, line: str) -> str:
        """What the line is answered with."""
        before = len(self.text)
        assert self.say(line)
        return self.text[before:].rstrip("\n")


@pytest.fixture
def talk(model: HyperBagel) -> Talk:
    return Talk(model, max_tokens=8)


def test_sampled_turns_with_graphs(model: HyperBagel) -> None:
    """The first one measures what drafting costs, with the graphs that then read the conversation, which stays the one that is read."""
    fixed = HyperBagel(model.parts, "fixed", graphs=True)
    said = "what is there, and how many of them are left of the red one? tell me all of it, please, one by one"
    for drafter in ("lookup", "none"):
        talk = Talk(fixed, max_tokens=8, drafter=drafter, seed=1)
        talk.say("/temperature 0.00001")  # as good as greedy, and drawn
        assert talk.answer(said).strip() == model.ask(said, max_tokens=8).text


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_turns_are_those_of_the_library(drafter: str, model: HyperBagel, tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "a.png")
    talk, turns = Talk(model, max_tokens=8, drafter=drafter), []
    talk.say(f"/image {tmp_path / 'a.png'}")
    for question in ("what is it?", "and now?", "what is it?"):
        expected = model.ask(question, picture, turns=tuple(turns), max_tokens=8)
        answer = talk.answer(question)
        assert answer.strip() == expected.text
        turns.append((question, answer))
    assert ("tau" in talk.notes[-1]) == (drafter == "lookup")


def test_what_was_said_is_not_read_again(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.say("a question that is long enough to be noticed, and some more words")
    seen, forward = [], Qwen2MoT.forward

    def count(self: Qwen2MoT, x: Any, positions: torch.Tensor, **how: Any) -> Any:
        seen.append(positions.shape[1])
        return forward(self, x, positions, **how)

    monkeypatch.setattr(Qwen2MoT, "forward", count)
    before = talk.session.cache.lengths[0]
    talk.say("and?")
    encode = talk.model.parts.tokenizer.encode
    assert seen[0] == len(encode("and?")) + 3, "the question alone, and the start of the answer"
    assert max(seen[1:-1]) <= 1 + 10, "a root and its drafts" and before > 20
    assert talk.session.cache.lengths[0] == before + seen[0] - 1 + seen[-1], "the question and the answer joined"


def test_what_the_prefill_gave_is_no_rate(model: HyperBagel) -> None:
    talk = Talk(model, max_tokens=1, drafter="lookup")
    talk.say("what is it?")
    assert "1 tokens, 0.0 tok/s" in talk.notes[-1] and "tau" not in talk.notes[-1]
    talk.say("/tokens 6")
    talk.say("what is it?")
    assert "tau" in talk.notes[-1] and ", 0.0 tok/s" not in talk.notes[-1]


def test_a_question_that_found_no_memory_is_counted_once(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation may stand open then; what is told of it leaves im_start out."""

    def none_left(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("hyperbagel.chat.decode", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            talk.ask("what is it?")
    assert talk.session.opened is not None
    tokens = talk.session.tokens
    assert talk.answer("/context").startswith(f"{tokens} of ")
    talk.session.settle()
    assert talk.session.tokens == talk.session.cache.lengths[0] == tokens


def test_ctrl_c_stops_the_answer_and_not_the_conversation(talk: Talk) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background of a shell
    whole = talk.answer("tell me")
    talk.say("/new")
    talk.on_text = lambda text: signal.raise_signal(signal.SIGINT) if text.strip() else None
    with stoppable(talk):
        part = talk.answer("tell me")
    talk.on_text = lambda text: None
    assert part and whole.startswith(part) and part != whole and talk.notes[-1].startswith("stopped; ")
    assert signal.getsignal(signal.SIGINT) is before
    stopped = talk.session.cache.lengths[0], talk.session.position
    other = Talk(talk.model, max_tokens=8)
    other.session.add_text("tell me")
    other.session.add_text(part)
    assert stopped == (other.session.cache.lengths[0], other.session.position), "question and part of the answer are kept"
    other.say("more"), talk.say("more")
    assert other.text.splitlines()[-1] == talk.text.splitlines()[-1]


def test_a_second_ctrl_c_ends_the_program(talk: Talk) -> None:
    with pytest.raises(KeyboardInterrupt), stoppable(talk):
        signal.raise_signal(signal.SIGINT)
        assert talk.stop
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("think", [False, True])
def test_ctrl_c_stops_a_picture_also_while_it_is_planned(think: bool, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, check = [], talk.check

    def interrupted() -> None:
        calls.append(None)
        signal.raise_signal(signal.SIGINT)
        check()

    monkeypatch.setattr(talk, "check", interrupted)
    if think:
        talk.say("/think")
        monkeypatch.setattr("hyperbagel.pipeline.denoise", lambda *a, **k: pytest.fail("it was stopped before"))
    with stoppable(talk):
        talk.say("/draw a red car")
    assert len(calls) == 1 and talk.last is None and talk.notes[-1] == "stopped; no picture"


def test_drawing_editing_showing_and_saving(talk: Talk, model: HyperBagel, tmp_path: Path) -> None:
    talk.say("/seed 5"), talk.say("/steps 2")
    assert "seed 5, 4 NFE" in talk.answer("/draw a red car")
    [drawn] = model.generate("a red car", seed=5, steps=2)
    [edited] = model.edit(drawn.image, "make it blue", seed=6, steps=2)
    assert np.array_equal(np.asarray(talk.last), np.asarray(drawn.image))
    talk.say("/edit make it blue")
    assert np.array_equal(np.asarray(talk.last), np.asarray(edited.image))
    path = tmp_path / "b.png"
    assert talk.answer(f"/save {path}") == str(path) and read_settings(path)["seed"] == 6
    talk.say("/image")
    assert talk.session.last_size is not None
    assert talk.answer("what is it?").strip() == model.ask("what is it?", edited.image, max_tokens=8).text
    talk.say("/student 6"), talk.say("/steps 0")
    assert "6 NFE" in talk.answer("/draw x")
    talk.say("/new")
    assert talk.session.cache.lengths == [0] and talk.last is not None


def test_a_temperature_is_that_of_plans_too(talk: Talk, model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, own = [], model.generate_batch
    monkeypatch.setattr(model, "generate_batch", lambda requests, **how: asked.extend(requests) or own(requests, **how))
    for line in ("/think", "/steps 1", "/draw a car", "/temperature 2", "/draw a car"):
        talk.say(line)
    assert [(request.think, request.think_temperature) for request in asked] == [(True, None), (True, 2.0)]


def test_sampled_answers_are_drafted_unasked_where_a_seed_repeats_them(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-up's drafts are a choice. Where drafts were drawn, nothing drafts."""
    said = []
    for draws in (False, True, True):
        monkeypatch.setattr(model.drafters.budgeted("auto"), "draws", draws)
        talk = Talk(model, max_tokens=8, seed=1, temperature=2.0, drafter="auto" if len(said) == 2 else None)
        said.append(talk.answer("what is there, what is there, what is there"))
        assert ("tau" in "".join(talk.notes)) is not (draws and len(said) == 2)
    assert (
        said[0].strip()
        == model.ask("what is there, what is there, what is there", max_tokens=8, temperature=2.0, seed=1, drafter="none").text
    )


def test_thinking_is_asked_for_once(talk: Talk, model: HyperBagel) -> None:
    talk.say("/think")
    first = talk.answer("why?")
    assert first.strip() == model.ask("why?", think=True, max_tokens=8).text
    before, encode = talk.session.cache.lengths[0], model.parts.tokenizer.encode
    answer = talk.answer("why?")
    assert talk.session.cache.lengths[0] - before == len(encode("why?")) + len(encode(answer)) + 4


WRONG: dict[str, tuple[str, str]] = {
    "command": ("/drow x", "/help"),
    "no picture": ("/edit make it blue", "/draw PROMPT"),
    "nothing to show": ("/image", "/image picture.png"),
    "nothing to save": ("/save a.png", "make one"),
    "no file": ("/image nowhere.png", "check the path"),
    "nobody's home": ("/image ~nobody-of-this-name/x.png", "no home here"),
    "endless seed": ("/seed " + "9" * 5000, "whole number"),
    "no words": ("/draw", "empty prompt"),
    "seed": ("/seed -1", "whole number"),
    "temperature": ("/temperature hot", "number from 0"),
    "tokens": ("/tokens 0", "whole number"),
    "student": ("/student nobody", "expected one of 6"),
    "think": ("/think hard", "/think on"),
    "too long": ("word " * 20_000, "expected at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_changes_nothing(name: str, talk: Talk) -> None:
    line, words = WRONG[name]
    with pytest.raises(InputError, match=words):
        talk.say(line)
    assert talk.session.cache.lengths == [0] and talk.text == ""


def test_a_place_that_cannot_be_written_ends_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["/draw a car", f"/save {'x' * 300}.png", "/save ~nobody-of-this-name/x.png", "/save no/such/x.png", "/seed 7", "/save out.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    module.run(talk)
    errors = [note for note in talk.notes if note.startswith("error: ")]
    assert len(errors) == 3 and "too long" in errors[0] and talk.seed == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_memory_that_runs_out_ends_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversation goes on from what was said before."""
    usual, fails = module.decode, iter([True, False])

    def sometimes(*args: Any, **more: Any) -> Any:
        if next(fails):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(*args, **more)

    monkeypatch.setattr(module, "decode", sometimes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is it?\nand now?"))
    module.run(talk)
    assert [note for note in talk.notes if note.startswith("error: ")] == [
        "error: the device is out of memory; what was said is kept, smaller pictures or /new need less"
    ]
    assert talk.text.strip()


def test_lines_from_a_pipe(model: HyperBagel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("in.png")
    lines = [
        "what is it?",
        "",
        "/nothing",
        "/seed 1",
        "/steps 2",
        "/draw a car",
        "/save out.png",
        "/help",
        "/context",
        "/quit",
        "never read",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", "in.png", "--model", model.name, "--device", "cpu", "--max-tokens", "6", "--seed", "0"]) == 0
    out, err = capsys.readouterr()
    expected = model.ask("what is it?", Image.new("RGB", (32, 32), "red"), max_tokens=6).text
    assert out.strip().startswith(expected) and "picture 32x32, seed 1, 4 NFE" in out and "/edit INSTRUCTION" in out
    assert err.count("error: ") == 1 and "got /nothing" in err and "> " not in out
    assert read_settings("out.png")["prompt"] == "a car"
    assert cli.main(["chat", "nowhere.png"]) == 2


def test_every_command_is_in_the_help() -> None:
    listed = {line.split()[0].removeprefix("/") for line in module.HELP.splitlines() if line.startswith("/")}
    assert listed == {name.removeprefix("do_") for name in vars(Chat) if name.startswith("do_")} | {"quit"}


def test_answers_stream(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are written while decoding goes on, not afterwards."""
    inside: list[str] = []

    def watched(*given: Any, on_token: Callable[[int, int], None], **how: Any) -> Any:
        out = decode(*given, on_token=on_token, **how)
        inside.append(talk.text)
        return out

    monkeypatch.setattr(module, "decode", watched)
    talk.say("tell me")
    assert inside[0].strip() and talk.text.startswith(inside[0])


def test_a_seed_goes_on_behind_what_was_drawn_by_it(talk: Talk) -> None:
    talk.say("/seed 3"), talk.say("why?")
    assert talk.seed == 3, "a greedy answer draws nothing"
    talk.say("/temperature 2"), talk.say("why?")
    assert talk.seed == 4


def test_a_new_conversation_is_asked_to_think_anew(talk: Talk) -> None:
    talk.say("/think")
    first = talk.answer("why?")
    talk.say("/new")
    assert talk.answer("why?") == first


def test_a_picture_that_was_shown_is_saved_without_the_settings_of_the_one_before(talk: Talk, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    talk.say("/steps 1"), talk.say("/draw x"), talk.say(f"/image {tmp_path / 'a.png'}"), talk.say(f"/save {tmp_path / 'b.png'}")
    with pytest.raises(InputError, match="without settings"):
        read_settings(tmp_path / "b.png")


def test_an_answer_that_may_not_fit_is_refused_before_its_question_is_read(talk: Talk) -> None:
    talk.say(f"/tokens {talk.model.parts.model.config.llm.max_position_embeddings}")
    with pytest.raises(InputError, match="expected at most"):
        talk.say("why?")
    assert talk.session.cache.lengths == [0] and talk.text == ""
