"""`hyperbagel chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_options import Device, Dtype, Graphs, MaxTokens, Model, Planner, Student, Temperature, given
from hyperbagel.core.errors import InputError


def chat(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures to start with.")] = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first sampled answer or picture; later ones take seed + 1, ...")] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model think first.")] = False,
    drafter: Annotated[str | None, typer.Option(help="Who drafts ahead: auto, lookup, a drafter, none.", show_default="auto")] = None,
    student: Student = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    planner: Planner = None,
) -> None:
    """Talk about pictures: ask, draw, edit. /help lists the commands. Lines may also come from a pipe."""
    checks.check_at_least("--max-tokens", max_tokens, 1)
    checks.check_at_least("--temperature", temperature, 0.0)
    if temperature is not None and temperature > 100:
        raise InputError(f"got --temperature {temperature:g}, expected 0 (greedy) to 100")
    checks.read_pictures([Path(path) for path in images or ()])  # here, so that a wrong name costs no loading of the model
    from hyperbagel.chat import Chat, run
    from hyperbagel.pipeline import HyperBagel

    loaded = HyperBagel.from_pretrained(**given(model=model, device=device, dtype=dtype, graphs=graphs or None, planner=planner))
    options = given(max_tokens=max_tokens, temperature=temperature, drafter=drafter, student=student)
    talk = Chat(loaded, seed=checks.draw_seed() if seed is None else checks.check_seed(seed), think=think, **options)
    run(talk, [f"/image {path}" for path in images or ()])
