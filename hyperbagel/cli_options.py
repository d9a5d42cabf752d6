"""Options that several commands share, and how commands print remarks."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

Model = Annotated[str | None, typer.Option(help="Model folder, or 'toybox' for the embedded model.", show_default="toybox")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16; int8 or nf4 store weights in 8 or 4 bits.")]
Graphs = Annotated[bool, typer.Option("--graphs", help="Decode text and plans as CUDA graphs; much faster on a GPU without a drafter.")]
Student = Annotated[str | None, typer.Option(help="Distilled model that draws: 6, 1 (evaluations), a folder, or none.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
TextScale = Annotated[float | None, typer.Option(help="Guidance towards the text; 1 is none.")]
ImageScale = Annotated[float | None, typer.Option(help="Guidance towards the source picture; 1 is none.")]
Interval = Annotated[tuple[float, float] | None, typer.Option(metavar="LO HI", help="Times t in [0, 1] between which guidance acts.")]
Renorm = Annotated[Literal["global", "channel", "text_channel"] | None, typer.Option(help="How the guided velocity is renormalised.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Picture size, both multiples of 16.", show_default="the model's own")]
Plan = Annotated[bool, typer.Option("--think", help="Let the model write its plan first.")]
PlanTokens = Annotated[int | None, typer.Option(help="Longest plan, in tokens.", show_default="1024")]
PlanTemperature = Annotated[float | None, typer.Option(help="Above 0, another seed gives another plan.", show_default="0")]
Drafter = Annotated[
    str | None,
    typer.Option(help="Who drafts ahead: auto, lookup, a name, a folder, none. Chains also change sampled answers."),
]
Planner = Annotated[str | None, typer.Option(help="Who writes plans: a planner's folder, or none.", show_default="MODEL/planner, if any")]
PlanDrafter = Annotated[str | None, typer.Option("--drafter", help="Who drafts a plan ahead: auto, lookup, a name, a folder, none.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]


def given(**options: Any) -> dict[str, Any]:
    """Only the options that the user set (not None): defaults live in the pipeline, none here."""
    return {name: value for name, value in options.items() if value is not None}


def note(text: object) -> None:
    """Prints a remark on stderr, so that stdout holds results alone."""
    print(text, file=sys.stderr)
