"""`hyperbagel eval SUITE`: each suite a thin call, everything heavy imported inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from hyperbagel import cli_checks as checks
from hyperbagel.core.errors import InputError

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder for scores and for what resumes a stopped run.")]
Model = Annotated[str | None, typer.Option(help="Model folder, or 'toybox' for the embedded model.", show_default="toybox")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16.")]
Split = Annotated[Literal["train", "heldout"] | None, typer.Option(help="Combinations seen in training, or kept from it.")]
NT2I = Annotated[int | None, typer.Option("--n-t2i", help="Pictures to draw.")]
NEdits = Annotated[int | None, typer.Option("--n-edits", help="Edits to make.")]


class Suites(TyperGroup):
    """Says which suites there are if another one is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise InputError(f"got {args[0]!r}, expected one of {', '.join(map(repr, self.list_commands(ctx)))}; choose what to measure")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Suites, no_args_is_help=True, help="Measure drawing, editing and understanding; students against their teacher.")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _counts(**counts: int | None) -> None:
    for name, count in counts.items():
        checks.check_at_least(f"--{name.replace('_', '-')}", count, 0)


def _load(model: str | None, device: str | None, dtype: str | None) -> Any:
    from hyperbagel.pipeline import HyperBagel

    return HyperBagel.from_pretrained(**_given(model=model, device=device, dtype=dtype))


@app.command()
def toybox(
    out: Out,
    model: Model = None,
    n_t2i: NT2I = None,
    n_edits: NEdits = None,
    n_questions: Annotated[int | None, typer.Option("--n-questions", help="Questions to ask.")] = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """One model on the embedded world: pictures, edits and answers."""
    _counts(n_t2i=n_t2i, n_edits=n_edits, n_questions=n_questions)
    from hyperbagel.evaluate.toybox import run_toybox_eval

    run_toybox_eval(_load(model, device, dtype), out=out, **_given(n_t2i=n_t2i, n_edits=n_edits, n_questions=n_questions, split=split))


@app.command()
def distillation(
    out: Out,
    model: Model = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="A student of the table: cfg, reflow, tscd, dmdo-tdm, 6, adp, refl, 1 ...; give it again for each."
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Only these rows, with commas.", show_default="all whose student is there")] = None,
    n_t2i: NT2I = None,
    n_edits: NEdits = None,
    n_diversity: Annotated[int | None, typer.Option("--n-diversity", help="Prompts to draw four times.")] = None,
    n_clock: Annotated[int | None, typer.Option("--n-clock", help="Pictures and edits to time.")] = None,
    n_steer: Annotated[int | None, typer.Option("--n-steer", help="Items drawn with weak and strong guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Which items and which noise.")] = 0,
    split: Split = None,
    batch: Annotated[int | None, typer.Option(help="Items drawn together.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Students beside their teacher: same prompts, seeds and noise; paired differences, diversity, seconds, a contact sheet."""
    _counts(n_t2i=n_t2i, n_edits=n_edits, n_diversity=n_diversity, n_clock=n_clock, n_steer=n_steer)
    checks.check_at_least("--batch", batch, 1)
    checks.check_seed(seed)
    from hyperbagel.evaluate.distillation import run_distillation_eval
    from hyperbagel.evaluate.rows import choose, parse_students

    wanted = None if rows is None else [name.strip() for name in rows.split(",") if name.strip()]
    choose(wanted)
    given = parse_students(student or ())
    pipeline = _load(model, device, dtype)
    shipped = {name: pipeline.students.folder / name for name in ("6", "1") if name in pipeline.students.names()}
    counts = _given(n_t2i=n_t2i, n_edits=n_edits, n_diversity=n_diversity, n_clock=n_clock, n_steer=n_steer, split=split, batch=batch)
    run_distillation_eval(pipeline, shipped | given, out=out, rows=wanted, seed=seed, **counts)


@app.command()
def speculative(
    out: Out,
    model: Model = None,
    drafter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A trained drafter; give it again for each. Shipped ones are always in.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts of a split.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Times that all ways of decoding take their turns.")] = None,
    acceptance: Annotated[bool, typer.Option("--acceptance", help="Acceptance alone, no times.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few short answers, to see that it works.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a CPU.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Drafters: acceptance and tokens a second beside plain decoding, on words of training, held-out words and free-form captions."""
    checks.check_at_least("--prompts", prompts, 1)
    checks.check_at_least("--repeats", repeats, 1)
    checks.check_at_least("--threads", threads, 1)
    folders = checks.named_folders("--drafter", drafter or ())
    from dataclasses import replace

    import torch

    from hyperbagel.evaluate.speculative import QUICK, Plan, run_speculative_eval

    torch.set_num_threads(threads)
    plan = replace(QUICK if quick else Plan(), **_given(prompts=prompts, repeats=repeats), speed=not acceptance)
    run_speculative_eval(_load(model, device, dtype), folders, out=out, plan=plan)
