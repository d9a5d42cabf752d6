"""`hyperbagel chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hyperbagel import cli_checks as checks


def chat(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures to begin with.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, or 'toybox' for the embedded model.", show_default="toybox")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampled answers and of pictures; the next take seed + 1, ...")] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model think first.")] = False,
    drafter: Annotated[str | None, typer.Option(help="Who drafts ahead: auto, lookup, a drafter, none.", show_default="auto")] = None,
    student: Annotated[str | None, typer.Option(help="Distilled model that draws: 6, 1 (evaluations), a folder, or none.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Decode text as CUDA graphs: on a GPU far faster where nothing drafts.")] = False,
) -> None:
    """Talk, with pictures: ask about them, draw, edit. /help lists what can be typed. Lines may also come from a pipe."""
    checks.check_at_least("--max-tokens", max_tokens, 1)
    checks.check_at_least("--temperature", temperature, 0.0)
    checks.read_pictures([Path(path) for path in images or ()])  # a wrong name costs no model load
    from hyperbagel.chat import Chat, run
    from hyperbagel.pipeline import HyperBagel

    loaded = {"model": model, "device": device, "dtype": dtype, "graphs": graphs or None}
    where: dict[str, Any] = {k: v for k, v in loaded.items() if v is not None}
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "drafter": drafter, "student": student}
    first = checks.draw_seed() if seed is None else checks.check_seed(seed)
    talk = Chat(HyperBagel.from_pretrained(**where), seed=first, think=think, **{k: v for k, v in options.items() if v is not None})
    run(talk, [f"/image {path}" for path in images or ()])
