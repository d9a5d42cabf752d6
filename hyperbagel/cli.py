"""The command line: each command is a thin call that imports everything heavy inside itself, so that `--help` is instant.

Results go to stdout (file names, answers, JSON); remarks go to stderr (the seed that was drawn, timings, errors).
Exit codes: 0 done, 1 internal error or diverged training, 2 something the user can mend, 3 a gate that no run passed, 130 Ctrl-C, 143 a
training that was told to end (SIGTERM).
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_chat import chat
from hyperbagel.cli_eval import app as eval_app
from hyperbagel.cli_export import export
from hyperbagel.cli_options import (
    Device,
    Drafter,
    Dtype,
    Graphs,
    ImageScale,
    Interval,
    MaxTokens,
    Model,
    Plan,
    PlanDrafter,
    PlanTemperature,
    PlanTokens,
    Renorm,
    Size,
    Steps,
    Student,
    Temperature,
    TextScale,
    given,
    note,
)
from hyperbagel.cli_serve import serve
from hyperbagel.cli_students import average, gate, install
from hyperbagel.core.errors import InputError, Notice

app = typer.Typer(
    name="hyperbagel",
    help="Fast understanding, drawing and editing with one unified multimodal model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[Path, typer.Option("-o", "--output", help="Picture to write (.png). With -n above 1: name-0.png, name-1.png ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise and of sampling; 0 is a seed too.", show_default="drawn and printed")]
RenormMin = Annotated[float | None, typer.Option(help="Lowest factor of that renormalisation, 0 to 1.")]
Shift = Annotated[float | None, typer.Option(help="Timestep shift; above 1 spends more steps on noisy times.")]
Count = Annotated[int, typer.Option("-n", help=f"Number of pictures, 1 to {checks.MAX_PICTURES}.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def _seed(seed: int | None) -> Callable[[], int]:
    """A function that gives the seed, checked or drawn. A drawn one is printed at that call, after everything that can be refused."""
    if seed is not None:
        checks.check_seed(seed)
        return lambda: seed
    drawn = checks.draw_seed()

    def tell() -> int:
        note(f"seed {drawn} (drawn; repeat with --seed {drawn})")
        return drawn

    return tell


def _load(since: float, model: str | None, device: str | None, dtype: str | None, graphs: bool = False) -> tuple[Any, dict[str, float]]:
    """The model, and the seconds waited so far: `start` since the command began (mostly importing torch), `load` for the model."""
    from hyperbagel.pipeline import HyperBagel

    began = time.perf_counter() - since
    pipeline = HyperBagel.from_pretrained(**given(model=model, device=device, dtype=dtype, graphs=graphs or None))
    return pipeline, {"start": began, "load": pipeline.load_seconds}


def _draw(
    prompt: str, pictures: list[Path], paths: list[Path], seed: int | None, where: dict[str, Any], json: bool, **settings: Any
) -> None:
    """Draws or edits: checks, loads, works, saves every picture with its settings inside, then prints paths, seeds and times."""
    since = time.perf_counter()
    from hyperbagel.core.progress import count_step
    from hyperbagel.data.images import save_png
    from hyperbagel.generate.types import ImageRequest
    from hyperbagel.pipeline import check_size

    checks.check_plan(settings)
    settings = given(**settings | {"size": checks.parse_size(settings["size"])})
    images = checks.read_pictures(pictures)
    if "mask" in settings:
        settings["mask"] = checks.read_mask(settings["mask"])
    ImageRequest(prompt, tuple(images), **settings).denoising()  # refuses wrong settings before the model is loaded
    if "size" in settings:
        check_size(where["model"] or "toybox", settings["size"])
    first = _seed(seed)
    pipeline, spent = _load(since, **where)
    if settings["think"]:
        pipeline.drafters.keep_costs()  # as in `ask`
    if settings.get("student", "none") != "none":
        pipeline.students.get(settings["student"])
    options = {"n": len(paths), "seed": first(), "on_step": lambda done, total, _: count_step(done, total), **settings}
    results = pipeline.edit(images, prompt, **options) if images else pipeline.generate(prompt, **options)
    for timings in {id(result.timings): result.timings for result in results}.values():  # pictures of one batch share theirs
        spent = {name: spent.get(name, 0.0) + timings.get(name, 0.0) for name in spent | timings}
    for result, path in zip(results, paths, strict=True):  # all of them, before anything that can fail
        save_png(result.image, path, result.settings)
    rows = []
    for result, path in zip(results, paths, strict=True):
        row = {"file": str(path), "size": list(result.image.size), "seed": result.seed, "nfe": result.nfe}
        row |= {"thinking": result.thinking, "tau": result.tau, "drafter": result.drafter}
        rows.append(row | {"settings": result.settings})
        if not json:
            if result.thinking:
                note(f"plan: {result.thinking}")
            print(path)
            note(f"{'x'.join(map(str, result.image.size))}, seed {result.seed}, {result.nfe} NFE")
    if json:
        print(jsonlib.dumps({"seconds": spent, "pictures": rows}, indent=2))
    else:
        note(checks.seconds(spent))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Output,
    model: Model = None,
    seed: Seed = None,
    steps: Steps = None,
    text_scale: TextScale = None,
    interval: Interval = None,
    renorm: Renorm = None,
    renorm_min: RenormMin = None,
    shift: Shift = None,
    size: Size = None,
    n: Count = 1,
    think: Plan = False,
    max_think_tokens: PlanTokens = None,
    think_temperature: PlanTemperature = None,
    drafter: PlanDrafter = None,
    student: Student = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    json: Json = False,
) -> None:
    """Draw a picture from a text."""
    paths = checks.check_outputs(output, n)
    checks.check_text(prompt, "prompt")
    where = {"model": model, "device": device, "dtype": dtype, "graphs": graphs}
    guidance = {"text_scale": text_scale, "interval": interval, "renorm": renorm, "renorm_min": renorm_min, "shift": shift}
    plan = {"think": think, "max_think_tokens": max_think_tokens, "think_temperature": think_temperature, "drafter": drafter}
    _draw(prompt, [], paths, seed, where, json, steps=steps, size=size, student=student, **plan, **guidance)


@app.command()
def edit(
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE... INSTRUCTION", help="One or more pictures, then what to change.")],
    output: Output,
    model: Model = None,
    seed: Seed = None,
    steps: Steps = None,
    text_scale: TextScale = None,
    image_scale: ImageScale = None,
    interval: Interval = None,
    renorm: Renorm = None,
    renorm_min: RenormMin = None,
    shift: Shift = None,
    size: Size = None,
    n: Count = 1,
    mask: Annotated[Path | None, typer.Option(help="Where to edit: a picture's transparent parts, or its white ones.")] = None,
    think: Plan = False,
    max_think_tokens: PlanTokens = None,
    think_temperature: PlanTemperature = None,
    drafter: PlanDrafter = None,
    student: Student = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    json: Json = False,
) -> None:
    """Change a picture as an instruction says."""
    paths = checks.check_outputs(output, n)
    pictures, instruction = checks.split_inputs(inputs, "instruction", needs_picture=True)
    where = {"model": model, "device": device, "dtype": dtype, "graphs": graphs}
    guidance = {"text_scale": text_scale, "interval": interval, "renorm": renorm, "renorm_min": renorm_min, "shift": shift}
    _draw(
        instruction,
        pictures,
        paths,
        seed,
        where,
        json,
        steps=steps,
        size=size,
        think=think,
        max_think_tokens=max_think_tokens,
        think_temperature=think_temperature,
        drafter=drafter,
        student=student,
        image_scale=image_scale,
        mask=mask,
        **guidance,
    )


@app.command()
def ask(
    inputs: Annotated[list[str], typer.Argument(metavar="[IMAGE...] QUESTION", help="Pictures, if any, then the question.")],
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    think: Plan = False,
    drafter: Drafter = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    json: Json = False,
) -> None:
    """Answer a question, about pictures or without any."""
    since = time.perf_counter()
    pictures, question = checks.split_inputs(inputs, "question", needs_picture=False)
    checks.check_at_least("--max-tokens", max_tokens, 1)
    checks.check_at_least("--temperature", temperature, 0.0)
    images = checks.read_pictures(pictures)
    first = _seed(seed if temperature else seed or 0)  # at temperature 0 nothing is drawn
    settings = given(max_tokens=max_tokens, temperature=temperature, drafter=drafter)
    from hyperbagel.generate.types import AskRequest

    AskRequest(question, **settings)  # refuses wrong settings before the model is loaded
    pipeline, spent = _load(since, model, device, dtype, graphs)
    pipeline.drafters.keep_costs()  # one answer is over before what drafting costs could be measured
    result = pipeline.ask(question, images, seed=first(), think=think, **settings)
    spent |= result.timings
    if json:
        row = {"text": result.text, "thinking": result.thinking, "prompt_tokens": result.prompt_tokens, "tokens": result.tokens}
        row |= {"tau": result.tau, "drafter": result.drafter, "tok_per_second": result.tok_per_second}
        print(jsonlib.dumps(row | {"finish_reason": result.finish_reason, "seconds": spent}, indent=2))
        return
    if result.thinking:
        note(f"thinking: {result.thinking}")
    print(result.text)
    if result.finish_reason == "length":
        note("cut off; a larger --max-tokens gives more")
    note(
        f"{checks.seconds(spent)}, {result.prompt_tokens} tokens in, {result.tokens} out, {result.tok_per_second:.1f} tok/s"
        + (f", tau {result.tau:.2f}" if result.tau else "")
    )


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A folder, or a picture made by this program.")], json: Json = False) -> None:
    """Say what a folder is (model, student, drafter, checkpoint, run), or how a picture was made."""
    if path.is_file():
        checks.check_no_weights(path)
        from hyperbagel.data.images import read_settings

        found = read_settings(path)
    else:
        from hyperbagel.folders import describe_folder
        from hyperbagel.pipeline import model_folder

        found = describe_folder(path if path.exists() else model_folder(path))  # "toybox" is a name here as well
    if json:
        print(jsonlib.dumps(found, indent=2, default=str))
    else:
        print("\n".join(checks.tree(found)))


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="The stage, e.g. vae or base.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder: settings, metrics, checkpoints.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe (YAML).", show_default="the stage's defaults")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
) -> None:
    """Train one stage from a recipe."""
    for item in overrides or ():
        if "=" not in item:
            raise InputError(f"got the setting {item!r}, expected key=value, write for instance optim.lr=1e-4")
    from hyperbagel.train.launch import run_training

    run_training(name, recipe, list(overrides or ()), out, resume)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the page (index.html).")] = Path("out"),
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Which scenes and which noise.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make a page of pictures, edits and answers, with what they took."""
    checks.check_seed(seed)
    checks.check_folder(out)
    from hyperbagel.core.files import make_folder
    from hyperbagel.demo import build_demo, painters

    pipeline, _ = _load(time.perf_counter(), model, device, dtype)
    painters(pipeline)  # a damaged student is refused before there is a folder
    print(build_demo(pipeline, make_folder(out), seed=seed, note=note))  # made only now, so that a mistyped model leaves no empty folder


app.command()(serve)
app.command()(chat)
app.add_typer(export)
app.command()(gate)
app.command()(install)
app.command()(average)
app.add_typer(eval_app, name="eval")


@app.command()
def version() -> None:
    """Print the versions of hyperbagel, Python and torch."""
    from importlib.metadata import version as installed

    print(f"hyperbagel {installed('hyperbagel')}, python {sys.version.split()[0]}, torch {installed('torch')}")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; every failure is a single line on stderr.

    HYPERBAGEL_DEBUG=1 prints the traceback as well.
    """
    _prepare_process(ours=argv is None)
    try:
        with warnings.catch_warnings():
            python_form = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                """A Notice as one line; other warnings, which are for programmers, as Python shows them."""
                note(f"warning: {message}") if issubclass(category, Notice) else python_form(message, category, *where, **more)

            warnings.showwarning = show
            code = app(args=argv, prog_name="hyperbagel", standalone_mode=False)
    except Exception as error:
        return _tell_failure(error)
    if code == 130:
        from hyperbagel.core.progress import clear_line

        note(f"{clear_line()}interrupted")
    return code if isinstance(code, int) else 0


def _prepare_process(ours: bool) -> None:
    """Makes the standard streams usable. ours: nothing else runs in this process, so that its threads and encodings may be set, too."""
    for name in ("stdin", "stdout", "stderr"):  # closed by our parent: a file opened next must not take its descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    if ours:
        # torch's worker threads should sleep while they wait: spinning ones made a small model on a busy 2-core machine 60 times slower.
        # This must be set before torch is loaded; the user's own setting wins.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # file names may be any bytes, and a terminal may not encode every letter
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def _tell_failure(error: Exception) -> int:
    """Prints one line on why a command failed and returns its exit code."""
    if os.environ.get("HYPERBAGEL_DEBUG") == "1":
        traceback.print_exception(error)
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument, a bare `hyperbagel`
        message, wrong = str(error.format_message()), type(error).__name__ != "NoArgsIsHelpError"
        note(f"error: {' '.join(message.split())}" if wrong else message)
        return 2
    from hyperbagel.core.files import one_line

    if isinstance(error, InputError | OSError):
        note(f"error: {one_line(error)}")
        return 2
    if isinstance(error, FloatingPointError):  # a training that diverged; its message says what to do
        note(f"error: {one_line(error)}")
        return 1
    note(f"internal error: {type(error).__name__}: {one_line(error)}; set HYPERBAGEL_DEBUG=1 for the traceback")
    return 1


if __name__ == "__main__":
    sys.exit(main())
