"""`hyperbagel gate`, `average` and `install`: which student to go on with, the mean of several, and putting one beside its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_options import note
from hyperbagel.core.errors import InputError


def gate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs; of several, the best is chosen.")],
    otherwise: Annotated[Path | None, typer.Option("--else", help="What to print if none passed, e.g. the previous student.")] = None,
) -> None:
    """Say which student to go on with: print the student of the run that improved it, by the run's own held-out measure."""
    from hyperbagel.train.gate import choose

    best, verdicts = choose(runs)
    for verdict in verdicts:
        note(verdict)
    if best is not None:
        print(best.run / "export")
    elif otherwise is not None:
        print(otherwise)
    else:
        raise typer.Exit(3)


def install(
    trained: Annotated[Path, typer.Argument(help="A student's, drafter's or planner's folder (RUN/export).")],
    model: Annotated[str, typer.Option(help="The model that it was trained for: its folder, or toybox.")],
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="a student's evaluations, a drafter's kind")] = None,
    nfe: Annotated[int | None, typer.Option(help="Evaluations it is sampled with from now on.", show_default="as it was made")] = None,
) -> None:
    """Put a student or a drafter beside its model: MODEL/students/NAME (in bfloat16) or MODEL/drafters/NAME, where --student and --drafter
    find it. Or a planner: MODEL/planner, which then writes what --think asks for."""
    from hyperbagel.pipeline import model_folder

    folder = model_folder(model)
    before = {path for kind in ("students/*", "drafters/*", "planner") for path in folder.glob(kind)}
    if (trained / "drafter.json").is_file():
        from hyperbagel.speculative.drafters.folder import install_drafter

        if nfe is not None:
            raise InputError("got --nfe for a drafter, which draws nothing; leave it out")
        checks.check_folder(folder / "drafters")
        made = install_drafter(trained, folder, name)
    elif (trained / "planner.json").is_file():
        from hyperbagel.train.folder import install_planner

        if nfe is not None or name is not None:
            raise InputError("got --nfe or --name for a planner, which has neither; leave it out")
        checks.check_folder(folder / "planner")
        made = install_planner(trained, folder)
    else:
        from hyperbagel.train.folder import install_student

        checks.check_folder(folder / "students")
        made = install_student(trained, folder, name, nfe)
    if made in before:
        note(f"{made}: replaced the one that was there")
    print(made)


def average(
    students: Annotated[list[Path], typer.Argument(help="Students' folders, trained on from one another.")],
    model: Annotated[str, typer.Option(help="The model that they were distilled from: its folder, or toybox.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for their mean.")],
    rank: Annotated[int | None, typer.Option(help="Write the mean as a LoRA of this rank, whatever the students are.")] = None,
) -> None:
    """Average students, tensor by tensor, so that the flaws of single runs even out. Measure the mean beside them."""
    checks.check_folder(out)
    from hyperbagel.pipeline import model_folder
    from hyperbagel.train.folder import average_folders

    folder, lost = average_folders(students, model_folder(model), out, rank)
    if rank is not None:
        note(f"rank {rank} leaves out {lost:.1%} of the change, and all changes of norms and biases")
    print(folder)
