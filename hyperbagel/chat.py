"""A conversation in the terminal. All of it stays in one session, so that each turn reads only what is new.

Answers go to stdout as they come; remarks (timings, seeds, errors) to stderr. Ctrl-C stops the answer or the picture at its next token or
step; the conversation goes on. Without a terminal the lines of stdin are the turns.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL.Image import Image

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import one_line
from hyperbagel.core.progress import clear_line, count_step
from hyperbagel.data.images import open_image, save_png
from hyperbagel.data.prompts import THINK_ANSWER
from hyperbagel.generate.session import Session
from hyperbagel.generate.types import ImageRequest, after_first
from hyperbagel.pipeline import HyperBagel, ImageResult
from hyperbagel.speculative.choose import AUTO, NONE
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.types import Speculated

HELP = """\
TEXT               ask, or say something
/image PATH        show a picture; without PATH: the last one that was drawn
/draw PROMPT       draw a picture
/edit INSTRUCTION  change the last picture, shown or drawn
/save PATH         write the last picture (.png), with its settings inside
/new               forget the conversation
/think             think before answers and pictures, or no longer
/seed N            seed of the next picture or sampled answer
/temperature T     of answers and plans; 0 always takes the likeliest token
/tokens N          longest answer
/student NAME      distilled weights that draw, or none
/steps N           denoising steps, or 0 for the usual number
/context           how much has been said
/help              these lines
/quit              end (so does the end of input)"""


class Stopped(Exception):
    """Raised between two tokens or steps after Ctrl-C."""


class Chat:
    """One conversation. `say` answers a line; `out` takes answers, `note` takes remarks."""

    def __init__(
        self,
        model: HyperBagel,
        *,
        seed: int = 0,
        max_tokens: int = 256,
        temperature: float = 0.0,
        think: bool = False,
        drafter: str | None = None,
        student: str | None = None,
        out: Callable[[str], Any] | None = None,
        note: Callable[[str], Any] | None = None,
    ) -> None:
        """drafter: None takes the fastest of the model's own drafters and prompt lookup, or with CUDA graphs none."""
        self.drafter_name = drafter
        self.model, self.seed, self.max_tokens, self.temperature, self.think, self.steps = model, seed, max_tokens, temperature, think, 0
        self.student = self._student(student) if student else None
        name = drafter or (AUTO if model.runner is None else NONE)  # graphs were asked for, so nothing drafts
        self.drafter = None if name == NONE else model.drafters.budgeted(name)
        if self.drafter is not None:  # measured now, so that the first answer need not wait for it
            with torch.inference_mode():
                self.drafter.prepare(Session.new(model.parts), 1)
        self.out = out or (lambda text: print(text, end="", flush=True))
        self.note = note or (lambda text: print(text, file=sys.stderr, flush=True))
        self.last: Image | None = None  # shown or made
        self.settings: dict[str, Any] | None = None  # of the last picture, if it was made here
        self.stop = False
        self.new()

    def new(self) -> None:
        """Begins a new conversation; settings and the last picture stay."""
        self.session = Session.new(self.model.parts, () if self.drafter is None else self.drafter.taps)
        self.told_to_think = False

    # -- turns -----------------------------------------------------------------------------------------------------------------

    def say(self, line: str) -> bool:
        """Works on one line. False: the conversation is over. Raises InputError for what cannot be done; nothing is then lost."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self.ask(text)
            return True
        name, _, rest = text[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        command = getattr(self, f"do_{name}", None)
        if command is None:
            raise InputError(f"got /{name}, expected a command; /help lists them")
        command(rest.strip())
        return True

    @torch.inference_mode()
    def ask(self, question: str) -> None:
        """Answers, streaming to `out`. Raises InputError if question and answer may not fit; nothing has then been read."""
        session, tokenizer, began = self.session, self.model.parts.tokenizer, time.perf_counter()
        fresh = [question, *([THINK_ANSWER] if self.think and not self.told_to_think else [])]
        session.check_room(sum(len(tokenizer.encode(text)) + 2 for text in fresh) + self.max_tokens + 3)
        if self.think and not self.told_to_think:
            session.add_text(THINK_ANSWER)
            self.told_to_think = True
        session.add_text(question, later=True)
        session.open_answer()
        middle, text, ids = time.perf_counter(), tokenizer.stream(), []

        def on_token(_: int, token: int) -> None:
            ids.append(token)
            self.out(text.push(token))
            self.check()

        result = None
        try:
            generator = torch.Generator().manual_seed(self.seed)
            options: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "generators": [generator]}
            drafter = self.drafter
            if drafter is not None and self.drafter_name is None and self.temperature > 0 and not self.model.drafters.repeats(drafter):
                drafter = None  # unasked, a seed goes on meaning the same answer
            [result] = decode([session], **options, on_token=on_token, drafter=drafter, runner=self.model.runner)
        except Stopped:
            pass
        self.out(text.finish() + "\n")
        spent = time.perf_counter() - middle
        # An answer joins the conversation as text, also the part of one that was stopped.
        session.add_text(tokenizer.decode(ids))
        self.seed += self.temperature > 0
        yielded = after_first(len(ids), "" if result is None else result.finish_reason)
        told = f"{len(ids)} tokens, {yielded / max(spent, 1e-9):.1f} tok/s, first after {middle - began:.2f} s"
        if isinstance(result, Speculated) and result.stats.rounds:
            told += f", tau {result.stats.tau:.2f}"
        why = "stopped; " if result is None else "cut off, /tokens gives more; " if result.finish_reason == "length" else ""
        self.note(why + told)

    def check(self) -> None:
        """Raises Stopped if Ctrl-C was pressed."""
        if self.stop:
            raise Stopped

    def _make(self, prompt: str, images: Sequence[Image] = ()) -> None:
        """Draws, or edits `images`, and makes the result the last picture."""
        if not prompt:
            raise InputError("got an empty prompt, expected some words after the command")
        given: dict[str, Any] = {"think": self.think, "think_temperature": self.temperature or None, "steps": self.steps or None}
        given |= {"student": self.student, "drafter": self.drafter_name}
        request = ImageRequest(prompt, tuple(images), self.seed, **given)

        def on_step(done: int, total: int, latents: Any) -> None:
            count_step(done, total)
            self.check()

        try:
            [result] = self.model.generate_batch([request], on_step=on_step, on_token=lambda row, token: self.check())
        except Stopped:
            self.note(f"{clear_line()}stopped; no picture")
            return
        self._made(result)

    def _made(self, result: ImageResult) -> None:
        self.last, self.settings = result.image, result.settings
        self.seed += 1
        if result.thinking:
            self.note(f"plan: {result.thinking}")
        size, seconds = "x".join(map(str, result.image.size)), sum(result.timings.values())
        self.out(
            f"picture {size}, seed {result.seed}, {result.nfe} NFE, {seconds:.2f} s (/save PATH writes it, /image shows it to the model)\n"
        )

    # -- commands --------------------------------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        self.out(HELP + "\n")

    @torch.inference_mode()
    def do_image(self, path: str) -> None:
        if not path and self.last is None:
            raise InputError("got /image alone and no picture so far, expected a path; write /image picture.png")
        image = open_image(_path(path)) if path else self.last
        assert image is not None
        before = self.session.tokens
        self.session.add_image(image, latents=False)
        if path:
            self.last, self.settings = image, None
        self.note(f"{'x'.join(map(str, image.size))}, {self.session.tokens - before} tokens")

    def do_draw(self, prompt: str) -> None:
        self._make(prompt)

    def do_edit(self, instruction: str) -> None:
        if self.last is None:
            raise InputError("got nothing to edit, expected a picture first; show one with /image PATH or make one with /draw PROMPT")
        self._make(instruction, [self.last])

    def do_save(self, path: str) -> None:
        if self.last is None:
            raise InputError("got no picture so far, expected one; make one with /draw PROMPT")
        if Path(path).suffix.lower() != ".png":
            raise InputError(f"got the name {path!r}, expected one that ends in .png; write /save picture.png")
        save_png(self.last, _path(path), self.settings)
        self.out(f"{path}\n")

    def do_new(self, _: str) -> None:
        self.new()
        self.note("a new conversation")

    def do_think(self, word: str) -> None:
        if word not in ("", "on", "off"):
            raise InputError(f"got /think {word}, expected /think, /think on or /think off")
        self.think = not self.think if word == "" else word == "on"
        if not self.think and self.told_to_think:
            self.note("thinking off, but what was said asks for it: /new begins afresh")
        else:
            self.note(f"thinking {'on' if self.think else 'off'}")

    def do_seed(self, word: str) -> None:
        self.seed = _number(word, "seed", 0, 2**63 - 1)
        self.note(f"seed {self.seed}")

    def do_temperature(self, word: str) -> None:
        try:
            value = float(word)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 100:
            raise InputError(f"got /temperature {word}, expected a number from 0 (greedy) to 100")
        self.temperature = value
        self.note(f"temperature {value:g}")

    def do_tokens(self, word: str) -> None:
        self.max_tokens = _number(word, "tokens", 1, self.model.parts.model.config.llm.max_position_embeddings)
        self.note(f"at most {self.max_tokens} tokens an answer")

    def do_steps(self, word: str) -> None:
        self.steps = _number(word, "steps", 0, 1000)
        self.note(f"{self.steps} steps" if self.steps else "the usual number of steps")

    def do_student(self, name: str) -> None:
        self.student = self._student(name)
        self.note(f"{self.student or 'the model itself'} draws")

    def _student(self, name: str) -> str | None:
        """The name of a student, loaded; None for the model itself. Raises InputError for one that cannot be used."""
        if name in ("", "none"):
            return None
        self.model.students.get(name)
        return name

    def do_context(self, _: str) -> None:
        limit = self.model.parts.model.config.llm.max_position_embeddings
        self.out(f"{self.session.tokens} of {limit} tokens\n")


def _number(word: str, name: str, low: int, high: int) -> int:
    """The argument of command `name` as a whole number in [low, high]. Raises InputError."""
    if not word.isdecimal() or len(word) > 20 or not low <= int(word) <= high:
        raise InputError(f"got /{name} {word}, expected a whole number from {low} to {high}")
    return int(word)


def _path(text: str) -> Path:
    """A path with ~ expanded as a shell does. Raises InputError for a user without a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"got the path {text!r}, whose user has no home here, expected a path; write it out in full") from error


@contextmanager
def stoppable(chat: Chat) -> Iterator[None]:
    """Inside, the first Ctrl-C only asks the work to stop, so that it ends between two tokens or steps and leaves nothing half done; the
    second one ends the program."""

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if chat.stop:
            raise KeyboardInterrupt
        chat.stop = True

    chat.stop, before = False, signal.signal(signal.SIGINT, ask_to_stop)
    try:
        yield
    finally:
        chat.stop = False
        signal.signal(signal.SIGINT, before)


def run(chat: Chat, first: Sequence[str] = ()) -> None:
    """Says the lines of `first`, then those of stdin, until /quit or the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        chat.note(f"{chat.model.name}: /help lists the commands; Ctrl-C stops an answer; /quit ends")
    waiting = list(first)
    while True:
        try:
            line = waiting.pop(0) if waiting else input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            chat.note("(/quit ends)")
            continue
        try:
            with stoppable(chat):
                if not chat.say(line):
                    return
        except (InputError, OSError) as error:  # a path that cannot be written must not end the conversation
            chat.note(f"error: {one_line(error)}")
        except torch.OutOfMemoryError:
            chat.note("error: the device is out of memory; what was said is kept, smaller pictures or /new need less")
