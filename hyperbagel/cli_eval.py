"""`hyperbagel eval SUITE`: each suite is a thin call that imports everything heavy inside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from hyperbagel import cli_checks as checks
from hyperbagel.cli_options import (
    Device,
    Dtype,
    ImageScale,
    Interval,
    Model,
    Plan,
    Planner,
    PlanTemperature,
    PlanTokens,
    Size,
    Steps,
    Student,
    TextScale,
    given,
)
from hyperbagel.core.errors import InputError

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder for the scores; a stopped run resumes from it.")]
Split = Annotated[Literal["train", "heldout"] | None, typer.Option(help="Only combinations seen in training, or held out from it.")]
NT2I = Annotated[int | None, typer.Option("--n-t2i", help="Pictures to draw.")]
NEdits = Annotated[int | None, typer.Option("--n-edits", help="Edits to make.")]


class Suites(TyperGroup):
    """Lists the suites if an unknown one is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise InputError(f"got {args[0]!r}, expected one of {', '.join(map(repr, self.list_commands(ctx)))}; choose what to measure")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Suites, no_args_is_help=True, help="Measure drawing, editing and understanding; students against their teacher.")


def _counts(**counts: int | None) -> None:
    for name, count in counts.items():
        checks.check_at_least(f"--{name.replace('_', '-')}", count, 0)


def _load(model: str | None, device: str | None, dtype: str | None, planner: str | None = None) -> Any:
    from hyperbagel.pipeline import HyperBagel

    return HyperBagel.from_pretrained(**given(model=model, device=device, dtype=dtype, planner=planner))


@app.command()
def toybox(
    out: Out,
    model: Model = None,
    n_t2i: NT2I = None,
    n_edits: NEdits = None,
    n_questions: Annotated[int | None, typer.Option("--n-questions", help="Questions to ask.")] = None,
    student: Student = None,
    think: Plan = False,
    think_temperature: PlanTemperature = None,
    planner: Planner = None,
    split: Split = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure one model in the embedded toy world: pictures, edits and answers."""
    _counts(n_t2i=n_t2i, n_edits=n_edits, n_questions=n_questions)
    checks.check_folder(out)
    from hyperbagel.evaluate.toybox import Settings, run_toybox_eval

    drawn_by = given(student=student, think_temperature=think_temperature)
    checks.check_plan(drawn_by | {"think": think, "planner": planner})
    asked = Settings(**given(split=split), think=think, image=drawn_by, edit=drawn_by)
    counts = given(n_t2i=n_t2i, n_edits=n_edits, n_questions=n_questions)
    run_toybox_eval(_load(model, device, dtype, planner), out=out, settings=asked, **counts)


@app.command()
def distillation(
    out: Out,
    model: Model = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="A student for its row: cfg, reflow, tscd, dmdo-tdm, 6, adp, refl, 1 ...; repeat it for each."
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Only these rows, comma-separated.", show_default="all whose student is there")] = None,
    n_t2i: NT2I = None,
    n_edits: NEdits = None,
    n_diversity: Annotated[int | None, typer.Option("--n-diversity", help="Prompts to draw four times.")] = None,
    n_clock: Annotated[int | None, typer.Option("--n-clock", help="Pictures and edits to time.")] = None,
    n_steer: Annotated[int | None, typer.Option("--n-steer", help="Items to draw with weak and strong guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the items and of their noise.")] = 0,
    think: Plan = False,
    think_temperature: PlanTemperature = None,
    planner: Planner = None,
    split: Split = None,
    batch: Annotated[int | None, typer.Option(help="Items drawn together.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare students with their teacher on the same prompts and noise: paired differences, diversity, seconds, a contact sheet."""
    _counts(n_t2i=n_t2i, n_edits=n_edits, n_diversity=n_diversity, n_clock=n_clock, n_steer=n_steer)
    checks.check_at_least("--batch", batch, 1)
    checks.check_seed(seed)
    checks.check_folder(out)
    from hyperbagel.evaluate.distillation import run_distillation_eval
    from hyperbagel.evaluate.rows import choose, parse_students

    plan: dict[str, Any] = {"think": think, "think_temperature": think_temperature}
    checks.check_plan(plan | {"planner": planner})
    wanted = None if rows is None else [name.strip() for name in rows.split(",") if name.strip()]
    choose(wanted)
    folders = parse_students(student or ())
    pipeline = _load(model, device, dtype, planner)
    shipped = {name: pipeline.students.folder / name for name in ("6", "1") if name in pipeline.students.names()}
    counts = given(n_t2i=n_t2i, n_edits=n_edits, n_diversity=n_diversity, n_clock=n_clock, n_steer=n_steer, split=split, batch=batch)
    run_distillation_eval(pipeline, shipped | folders, out=out, rows=wanted, seed=seed, **plan, **counts)


@app.command()
def speculative(
    out: Out,
    model: Model = None,
    drafter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="A trained drafter; repeat it for each. Shipped ones always take part.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts of a split.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds in which every way of decoding takes its turn.")] = None,
    acceptance: Annotated[bool, typer.Option("--acceptance", help="Acceptance alone, no times.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few short answers, to see that it works.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a CPU.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    planner: Planner = None,
) -> None:
    """Drafters: acceptance and tokens a second beside plain decoding, on training wordings, held-out ones and free-form captions."""
    checks.check_at_least("--prompts", prompts, 1)
    checks.check_at_least("--repeats", repeats, 1)
    checks.check_at_least("--threads", threads, 1)
    checks.check_folder(out)
    folders = checks.named_folders("--drafter", drafter or ())
    from dataclasses import replace

    import torch

    from hyperbagel.evaluate.speculative import QUICK, Plan, run_speculative_eval

    torch.set_num_threads(threads)
    plan = replace(QUICK if quick else Plan(), **given(prompts=prompts, repeats=repeats), speed=not acceptance)
    run_speculative_eval(_load(model, device, dtype, planner), folders, out=out, plan=plan)


Prompts = Annotated[Path, typer.Option(help="The suite's file of prompts, in JSON lines.")]
Batch = Annotated[int, typer.Option(help="Pictures made together.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]


def _pictures(prompts: Path, out: Path, batch: int, seed: int, where: dict[str, str | None], **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Checks all it can, then loads the model on this rank's device -> (the model, the given settings of a request)."""
    checks.check_file("--prompts", prompts)
    checks.check_folder(out)
    checks.check_at_least("--batch", batch, 1)
    checks.check_seed(seed)
    checks.check_plan(settings | {"planner": where["planner"]})
    settings = given(**settings | {"size": checks.parse_size(settings.get("size"))})
    if settings.keys() & {"size", "max_think_tokens"}:
        from hyperbagel.pipeline import check_request

        check_request(where["model"] or "toybox", **settings)
    from hyperbagel.evaluate.pictures import place

    if where["device"] is None and (mine := place()[2]):
        import torch

        where |= {"device": mine if torch.cuda.is_available() else None}
    return _load(**where), settings


@app.command()
def geneval(
    prompts: Prompts,
    out: Out,
    model: Model = None,
    student: Student = None,
    n: Annotated[int, typer.Option("-n", help="Pictures per prompt.")] = 4,
    seed: Seed = 0,
    steps: Steps = None,
    text_scale: TextScale = None,
    interval: Interval = None,
    size: Size = None,
    think: Plan = False,
    max_think_tokens: PlanTokens = None,
    think_temperature: PlanTemperature = None,
    planner: Planner = None,
    batch: Batch = 4,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw pictures into the folders that GenEval's scorer reads; torchrun distributes them over GPUs."""
    checks.check_at_least("-n", n, 1)
    from hyperbagel.evaluate.geneval import run_geneval

    asked = {"student": student, "steps": steps, "text_scale": text_scale, "interval": interval, "size": size}
    plan = {"think": think or None, "max_think_tokens": max_think_tokens, "think_temperature": think_temperature}
    where = {"model": model, "device": device, "dtype": dtype, "planner": planner}
    pipeline, settings = _pictures(prompts, out, batch, seed, where, **plan, **asked)
    run_geneval(pipeline, prompts, out, n=n, seed=seed, batch=batch, settings=settings)


@app.command()
def gedit(
    prompts: Prompts,
    out: Out,
    model: Model = None,
    student: Student = None,
    language: Annotated[Literal["all", "en", "cn"], typer.Option(help="Language of the instructions.")] = "all",
    seed: Seed = 0,
    steps: Steps = None,
    text_scale: TextScale = None,
    image_scale: ImageScale = None,
    interval: Interval = None,
    think: Plan = False,
    max_think_tokens: PlanTokens = None,
    think_temperature: PlanTemperature = None,
    planner: Planner = None,
    batch: Batch = 4,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make edits in the folders that GEdit-Bench's scorer reads; torchrun distributes them over GPUs."""
    from hyperbagel.evaluate.gedit import run_gedit

    asked = {"student": student, "steps": steps, "text_scale": text_scale, "image_scale": image_scale, "interval": interval}
    plan = {"think": think or None, "max_think_tokens": max_think_tokens, "think_temperature": think_temperature}
    where = {"model": model, "device": device, "dtype": dtype, "planner": planner}
    pipeline, settings = _pictures(prompts, out, batch, seed, where, **plan, **asked)
    run_gedit(pipeline, prompts, out, seed=seed, batch=batch, language=language, settings=settings)
