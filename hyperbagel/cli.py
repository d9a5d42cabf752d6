"""The command line: each command is a thin call that imports everything heavy inside itself, so that `--help` is instant.

Results go to stdout (file names, answers, JSON); remarks go to stderr (the seed that was drawn, timings, errors).
Exit codes: 0 done, 1 internal error or diverged training, 2 something the user can mend, 3 a gate that no run passed, 130 Ctrl-C, 143 a
training that was told to end (SIGTERM).
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
import traceback
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_chat import chat
from hyperbagel.cli_eval import app as eval_app
from hyperbagel.cli_export import export
from hyperbagel.cli_options import Device, Dtype, Json, Model, given, note
from hyperbagel.cli_requests import ask, edit, generate
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

app.command()(generate)
app.command()(edit)
app.command()(ask)


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
    if (out / "export").is_dir() and int(os.environ.get("RANK", 0)) == 0:
        print(out / "export")


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
    from hyperbagel.pipeline import HyperBagel

    pipeline = HyperBagel.from_pretrained(**given(model=model, device=device, dtype=dtype))
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
