"""`hyperbagel export`: writes students and drafters as folders for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hyperbagel import cli_checks as checks
from hyperbagel.cli_options import note

if TYPE_CHECKING:
    from hyperbagel.export import Exported

export = typer.Typer(name="export", help="Write students and drafters for other programs.", no_args_is_help=True)

StudentName = Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder, or the name of one that came with the model.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")]
Model = Annotated[str, typer.Option(help="The model it belongs to: a folder in BAGEL's layout, or toybox.")]
TextScale = Annotated[float | None, typer.Option(help="Text guidance to fold in.", show_default="the student's own")]
ImageScale = Annotated[float | None, typer.Option(help="Image guidance to fold in.", show_default="the student's own for drawing")]
Dtype = Literal["float32", "bfloat16"]


@export.command()
def student(
    name: StudentName,
    out: Out,
    model: Model = "toybox",
    text_scale: TextScale = None,
    image_scale: ImageScale = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the weights.", show_default="as in the model's file")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Draw and edit both ways and say how much the pictures differ.")] = False,
) -> None:
    """Merge a student into its model, as a folder in BAGEL's layout that any BAGEL code runs without guidance."""
    checks.check_folder(out)
    from hyperbagel import export as exports

    done = exports.export_student(name, out, model=model, text_scale=text_scale, image_scale=image_scale, dtype=dtype)
    _tell(done)
    if verify:
        for what, mean, largest in exports.verify(done, name, model=model):
            note(f"{what}: base and student against the merged model: pixels differ by {mean:.3f} of 255 on average, at most {largest}")


@export.command()
def lora(
    name: StudentName,
    out: Out,
    model: Model = "toybox",
    text_scale: TextScale = None,
    image_scale: ImageScale = None,
    rank: Annotated[int | None, typer.Option(help="For a student of whole layers: the rank to reduce it to.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = "float32",
) -> None:
    """Write a student as a LoRA in PEFT's layout, guidance folded in."""
    checks.check_folder(out)
    from hyperbagel.export import export_lora

    _tell(export_lora(name, out, model=model, text_scale=text_scale, image_scale=image_scale, rank=rank, dtype=dtype))


@export.command()
def eagle3(
    name: Annotated[
        str, typer.Argument(metavar="DRAFTER", help="An EAGLE-3 drafter's folder, or the name of one that came with the model.")
    ],
    out: Out,
    model: Model = "toybox",
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = "bfloat16",
) -> None:
    """Write an EAGLE-3 drafter in the layout that SGLang and vLLM load."""
    checks.check_folder(out)
    from hyperbagel.export import export_drafter

    print(export_drafter(name, out, model=model, dtype=dtype))


def _tell(done: Exported) -> None:
    print(done.folder)
    note(f"guidance folded in: text {done.text_scale:g}, image {done.image_scale:g}")
    for line in done.notes:
        note(line)
