"""What the command line checks before any work starts, so that a mistake costs a second and not the loading of a model.

Every check raises InputError with what it got, what it expected, and what to do. Sizes are (height, width) in pixels inside the program,
and WxH for the user.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperbagel.core.errors import InputError
from hyperbagel.core.values import size_of

MAX_PICTURES = 64
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def draw_seed() -> int:
    """A random seed of 31 bits, short enough to type again."""
    return secrets.randbits(31)


def check_seed(seed: int) -> int:
    """Returns the seed, which must fit a signed 64-bit integer."""
    if not 0 <= seed < 2**63:
        raise InputError(f"got --seed {seed}, expected 0 to 2^63-1, choose another or leave it out")
    return seed


def check_at_least(option: str, value: float | None, low: float) -> None:
    """None passes: the option was not given."""
    if value is not None and not value >= low:  # not `value < low`: NaN must fail too
        raise InputError(f"got {option} {value}, expected {low:g} or more, choose a larger value")


def check_plan(settings: Mapping[str, Any]) -> None:
    """Refuses settings of a plan where no plan is asked for."""
    for name in ("max_think_tokens", "think_temperature", "drafter", "planner"):
        if settings.get(name) is not None and not settings.get("think"):
            raise InputError(
                f"got --{name.replace('_', '-')} without --think, expected a plan that it is about, add --think or leave it out"
            )


def check_text(text: str, name: str) -> None:
    if not text.strip():
        raise InputError(f"got an empty {name}, expected some words, write the {name} in quotes")


def check_outputs(output: Path, n: int) -> list[Path]:
    """The n files to be written: `a.png`, or `a-0.png`, `a-1.png` ... Their folder must exist and be writable."""
    if not 1 <= n <= MAX_PICTURES:
        raise InputError(f"got -n {n}, expected 1 to {MAX_PICTURES}, choose another number of pictures")
    if output.suffix.lower() != ".png":
        raise InputError(f"got the output name {str(output)!r}, expected one that ends in .png, rename it")
    folder = output.parent
    if not folder.is_dir():
        raise InputError(f"got {str(output)!r}, expected an existing folder, create {str(folder)!r} first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"got {str(output)!r}, expected a folder you may write to, choose another one than {str(folder)!r}")
    paths = [output] if n == 1 else [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(n)]
    for path in paths:
        if path.is_dir():
            raise InputError(f"got {str(path)!r}, which is a folder, expected a file name, choose another name")
    return paths


def check_folder(folder: Path) -> None:
    """A folder to write into must be writable, or such that it can be made; nothing is made here."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise InputError(
            f"got the folder {str(folder)!r}, but {str(nearest)!r} is a file, expected a folder or nothing, choose another name"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"got the folder {str(folder)!r}, expected one you may write to, choose another one than {str(nearest)!r}")


def check_file(option: str, path: Path) -> None:
    """The path must exist and be a file, or a pipe that the shell made (`<(...)`)."""
    if not path.exists() or path.is_dir():
        raise InputError(f"got {option} {str(path)!r}, which is no file, expected one, check the path")


def check_no_weights(path: Path) -> None:
    """Refuses a single file of a model, where its whole folder is meant."""
    if path.suffix.lower() in (".safetensors", ".gguf", ".bin", ".pt", ".json"):
        raise InputError(f"got the file {str(path)!r}, expected a folder or a picture, give the folder that it is of")


def parse_size(size: str | None) -> tuple[int, int] | None:
    """ "640x480" (width x height) as (height, width); None stays None. Whether a model can draw it: `pipeline.check_request`."""
    return None if size is None else size_of(size)


def split_inputs(inputs: Sequence[str], name: str, *, needs_picture: bool) -> tuple[list[Path], str]:
    """`IMAGE... TEXT` as (paths of the pictures, text). A picture in the last place means that the text was forgotten."""
    *pictures, text = inputs
    check_text(text, name)
    if Path(text).suffix.lower() in PICTURE_SUFFIXES and len(text.split()) == 1:
        raise InputError(f"got the picture {text!r} in the last place, expected the {name} after it, add the {name} in quotes")
    if needs_picture and not pictures:
        raise InputError(f"got the {name} alone, expected a picture before it, write: hyperbagel edit picture.png {text!r} -o new.png")
    paths = [Path(picture) for picture in pictures]
    for path in paths:
        if not path.is_file():
            hint = f"put the whole {name} in quotes" if len(str(path).split()) == 1 and not path.suffix else "check its name"
            raise InputError(f"got {str(path)!r}, which is no file, expected a picture, {hint}")
    return paths, text


def read_pictures(paths: Sequence[Path]) -> list[Any]:
    """The pictures as PIL images in RGB. Raises InputError for a file that is not a picture."""
    if not paths:
        return []
    from hyperbagel.data.images import open_image

    return [open_image(path) for path in paths]


def named_folders(option: str, given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder from `NAME=FOLDER` texts with distinct names and existing folders."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or name in found:
            raise InputError(f"got {option} {text!r}, expected NAME=FOLDER with another name for each")
        if not Path(folder).is_dir():
            raise InputError(f"got {option} {text!r}, but {folder!r} is no folder, expected one, check the path")
        found[name] = Path(folder)
    return found


def read_mask(path: Path) -> Any:
    """The mask of an edit as a PIL image. Raises InputError for a file that is not a picture."""
    from hyperbagel.data.images import open_mask

    return open_mask(path)


def seconds(timings: Mapping[str, float]) -> str:
    """Timings as text, in the order of the stages: `prefill 0.03 s, denoise 1.20 s, decode 0.05 s`."""
    return ", ".join(f"{name} {value:.2f} s" for name, value in timings.items())


def tree(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Nested settings as indented lines, `key  value`; whole numbers with separators, but not a seed, which may be typed again."""
    width = max((len(key) for key, value in values.items() if not isinstance(value, Mapping)), default=0)
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}"
            yield from tree(value, indent + "  ")
        elif isinstance(value, list | tuple):
            yield f"{indent}{key:<{width}}  {', '.join(map(str, value))}"
        else:
            yield f"{indent}{key:<{width}}  {f'{value:,}' if type(value) is int and key != 'seed' else value}"
