"""`generate`, `edit` and `ask`: one request from the command line, from checking its options to telling what it took."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_options import (
    Device,
    Drafter,
    Dtype,
    Graphs,
    ImageScale,
    Interval,
    Json,
    MaxTokens,
    Model,
    Plan,
    PlanDrafter,
    Planner,
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

Output = Annotated[Path, typer.Option("-o", "--output", help="Picture to write (.png). With -n above 1: name-0.png, name-1.png ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise and of sampling; 0 is a seed too.", show_default="drawn and printed")]
RenormMin = Annotated[float | None, typer.Option(help="Lowest factor of that renormalisation, 0 to 1.")]
Shift = Annotated[float | None, typer.Option(help="Timestep shift; above 1 spends more steps on noisy times.")]
Count = Annotated[int, typer.Option("-n", help=f"Number of pictures, 1 to {checks.MAX_PICTURES}.")]


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


def _load(since: float, graphs: bool, **where: str | None) -> tuple[Any, dict[str, float]]:
    """The model, and the seconds waited so far: `start` since the command began (mostly importing torch), `load` for the model."""
    from hyperbagel.pipeline import HyperBagel

    began = time.perf_counter() - since
    pipeline = HyperBagel.from_pretrained(**given(**where, graphs=graphs or None))
    return pipeline, {"start": began, "load": pipeline.load_seconds}


def _draw(
    prompt: str, pictures: list[Path], paths: list[Path], seed: int | None, where: dict[str, Any], json: bool, **settings: Any
) -> None:
    """Draws or edits: checks, loads, works, saves every picture with its settings inside, then prints paths, seeds and times."""
    since = time.perf_counter()
    from hyperbagel.core.progress import count_step
    from hyperbagel.data.images import save_png
    from hyperbagel.generate.types import ImageRequest
    from hyperbagel.pipeline import check_request

    checks.check_plan(settings | {"planner": where["planner"]})
    settings = given(**settings | {"size": checks.parse_size(settings["size"])})
    images = checks.read_pictures(pictures)
    if "mask" in settings:
        settings["mask"] = checks.read_mask(settings["mask"])
    ImageRequest(prompt, tuple(images), **settings).denoising()  # refuses wrong settings before the model is loaded
    if settings.keys() & {"size", "max_think_tokens"}:
        check_request(where["model"] or "toybox", prompt=prompt, **settings)
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
    planner: Planner = None,
    student: Student = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    json: Json = False,
) -> None:
    """Draw a picture from a text."""
    paths = checks.check_outputs(output, n)
    checks.check_text(prompt, "prompt")
    where = {"model": model, "device": device, "dtype": dtype, "graphs": graphs, "planner": planner}
    guidance = {"text_scale": text_scale, "interval": interval, "renorm": renorm, "renorm_min": renorm_min, "shift": shift}
    plan = {"think": think, "max_think_tokens": max_think_tokens, "think_temperature": think_temperature, "drafter": drafter}
    _draw(prompt, [], paths, seed, where, json, steps=steps, size=size, student=student, **plan, **guidance)


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
    planner: Planner = None,
    student: Student = None,
    device: Device = None,
    dtype: Dtype = None,
    graphs: Graphs = False,
    json: Json = False,
) -> None:
    """Change a picture as an instruction says."""
    paths = checks.check_outputs(output, n)
    pictures, instruction = checks.split_inputs(inputs, "instruction", needs_picture=True)
    where = {"model": model, "device": device, "dtype": dtype, "graphs": graphs, "planner": planner}
    guidance = {"text_scale": text_scale, "interval": interval, "renorm": renorm, "renorm_min": renorm_min, "shift": shift}
    plan = {"think": think, "max_think_tokens": max_think_tokens, "think_temperature": think_temperature, "drafter": drafter}
    own = {"steps": steps, "size": size, "student": student, "image_scale": image_scale, "mask": mask}
    _draw(instruction, pictures, paths, seed, where, json, **own, **plan, **guidance)


def ask(
    inputs: Annotated[list[str], typer.Argument(metavar="[IMAGE...] QUESTION", help="Pictures, if any, then the question.")],
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Above temperature 0, draw from the likeliest tokens that make up this much.")] = None,
    seed: Seed = None,
    think: Plan = False,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
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
    settings = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, drafter=drafter, stop=stop or None)
    from hyperbagel.generate.types import AskRequest

    AskRequest(question, **settings)  # refuses wrong settings before the model is loaded
    pipeline, spent = _load(since, graphs, model=model, device=device, dtype=dtype)
    pipeline.drafters.keep_costs()  # one answer is over before what drafting costs could be measured
    result = pipeline.ask(question, images, seed=first(), think=think, **settings)
    spent |= result.timings
    if json:
        row = {"text": result.text, "thinking": result.thinking, "prompt_tokens": result.prompt_tokens, "tokens": result.tokens}
        row |= {"tau": result.tau, "drafter": result.drafter, "tok_per_second": result.tok_per_second}
        print(jsonlib.dumps(row | {"finish_reason": result.finish_reason, "stopped_at": result.stopped_at, "seconds": spent}, indent=2))
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
