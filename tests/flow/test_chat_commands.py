"""Words of a conversation's commands, where its limits lie, and who drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_chat import Talk

from hyperbagel import chat as module
from hyperbagel.core.errors import InputError
from hyperbagel.pipeline import HyperBagel
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.folder import make_module, save_drafter


@pytest.fixture
def talk(model: HyperBagel) -> Talk:
    return Talk(model, max_tokens=8)


def test_a_question_is_refused_that_leaves_no_room_to_read_its_answer_back(talk: Talk) -> None:
    config, asked = talk.model.parts.model.config.llm, len(talk.model.parts.tokenizer.encode("why?")) + 2
    talk.say(f"/tokens {config.max_position_embeddings - asked - 2}")  # a start, and two marks around the answer, are three
    with pytest.raises(InputError, match="expected at most"):
        talk.say("why?")


def test_an_answer_that_was_cut_says_how_to_have_more(model: HyperBagel) -> None:
    talk = Talk(model, max_tokens=1)
    talk.say("what is it?")
    assert talk.notes[-1].startswith("cut off, /tokens gives more; 1 tokens")


def test_the_drafter_that_was_named_drafts_plans_too(model: HyperBagel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, own = [], model.generate_batch
    monkeypatch.setattr(model, "generate_batch", lambda requests, **how: asked.extend(requests) or own(requests, **how))
    for drafter in (None, "lookup"):
        Talk(model, drafter=drafter, student="6").say("/draw a car")
    assert [(request.drafter, request.student) for request in asked] == [(None, "6"), ("lookup", "6")]


def test_a_trained_drafter_drafts_the_same_answers(model: HyperBagel, tmp_path: Path) -> None:
    drafter = make_module(DrafterConfig.for_target("block", model.parts.model.config.llm, block=4, rank=8))
    drafter.init_from(model.parts.model, torch.Generator().manual_seed(0))
    save_drafter(tmp_path / "d", drafter, torch.float32)
    talk = Talk(model, max_tokens=8, drafter=str(tmp_path / "d"))
    for _ in range(2):
        assert talk.answer("what is it?").strip() == model.ask("what is it?", max_tokens=8).text
        talk.say("/new")


def test_nothing_drafts_unasked_where_graphs_were_asked_for(model: HyperBagel) -> None:
    assert Talk(HyperBagel(model.parts, "fixed", graphs=True)).drafter is None and Talk(model).drafter is not None


def test_words_of_commands(talk: Talk, tmp_path: Path) -> None:
    for line, note in (
        ("/think on", "thinking on"),
        ("/think on", "thinking on"),
        ("/think off", "thinking off"),
        ("/temperature 100", "temperature 100"),
        (f"/seed {2**63 - 1}", f"seed {2**63 - 1}"),
        ("/student 6", "6 draws"),
        ("/student none", "the model itself draws"),
        ("/student", "the model itself draws"),
    ):
        talk.say(line)
        assert talk.notes[-1] == note
    for wrong in ("/temperature 100.1", f"/seed {2**63}"):
        with pytest.raises(InputError):
            talk.say(wrong)
    talk.say("/seed 1"), talk.say("/steps 1"), talk.say("/draw x"), talk.say(f"/save {tmp_path / 'A.PNG'}")
    assert (tmp_path / "A.PNG").exists() and not talk.say("/exit")


def test_thinking_that_was_asked_for_stays_asked_for(talk: Talk) -> None:
    talk.say("/think"), talk.say("why?"), talk.say("/think on")
    assert talk.notes[-1] == "thinking on"
    talk.say("/think off")
    assert "/new begins afresh" in talk.notes[-1]


def test_ctrl_c_between_lines_ends_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([KeyboardInterrupt(), "/seed 7"])

    def typed(prompt: str) -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    module.run(talk)
    assert talk.notes == ["(/quit ends)", "seed 7"]
