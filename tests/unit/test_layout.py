"""Ground rules of the code, read from the syntax tree: who imports whom, one third-party package in one file, short files, a fast start.

A rule that fails names the file and the line, so that the message alone says what to move.
"""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hyperbagel"
MAX_LINES = 400

BELOW_PIPELINE = {"core", "nn", "flow", "model", "data", "toybox", "generate", "speculative"}
# part of the package -> the other parts it may import. Parts stand in the order of the design: imports go only up this list.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "nn": {"core"},
    "flow": {"core"},
    "toybox": {"core"},
    "model": {"core", "nn"},
    "data": {"core", "toybox"},
    "generate": {"core", "nn", "flow", "model", "data"},
    "speculative": {"core", "nn", "flow", "model", "data", "generate"},
    "pipeline": BELOW_PIPELINE,
    "train": BELOW_PIPELINE,
    "evaluate": {"core", "data", "toybox", "pipeline"},
    "demo": {"core", "data", "toybox", "pipeline"},
    "serve": {"core", "data", "flow", "pipeline"},
    "cli_checks": {"core", "data"},
    "cli_options": set(),
    "export": BELOW_PIPELINE | {"pipeline"},
    "folders": {"core", "model", "speculative", "train"},
    "chat": {"core", "data", "generate", "speculative", "pipeline"},
    "cli_serve": {"core", "pipeline", "serve", "cli_checks", "cli_options"},
    "cli_export": {"core", "export", "cli_checks", "cli_options"},
    "cli_chat": {"core", "pipeline", "chat", "cli_checks", "cli_options"},
    "cli_students": {"core", "pipeline", "train", "speculative", "cli_checks", "cli_options"},
    "cli_requests": {"core", "data", "generate", "pipeline", "cli_checks", "cli_options"},
    "cli_eval": {"core", "pipeline", "evaluate", "cli_checks", "cli_options"},
    "cli": {"core", "data", "pipeline", "train", "demo", "folders"}
    | {"cli_checks", "cli_options", "cli_serve", "cli_eval", "cli_export", "cli_chat", "cli_students", "cli_requests"},
}
# Single files that may reach further than their part, each for one reason.
EXTRA_IMPORTS: dict[str, set[str]] = {
    # the detector's weights are safetensors, and that format is read in one place only
    "hyperbagel/evaluate/toybox.py": {"model", "generate"},
    # the rows are the teacher's own settings, the clock times parts of a picture, and records bear the fingerprint of the base
    "hyperbagel/evaluate/rows.py": {"generate"},
    "hyperbagel/evaluate/wall_clock.py": {"generate"},
    "hyperbagel/evaluate/distillation.py": {"model", "generate"},
    # what no replica could load is told before Ray starts
    "hyperbagel/serve/replicas.py": {"model", "nn"},
    # the name toybox is one model everywhere
    "hyperbagel/train/launch.py": {"pipeline"},
    # these ask for pictures
    "hyperbagel/evaluate/pictures.py": {"generate"},
    "hyperbagel/evaluate/geneval.py": {"generate"},
    "hyperbagel/evaluate/gedit.py": {"generate"},
    # it times decoding itself, without contexts and words around it
    "hyperbagel/evaluate/speculative.py": {"generate", "speculative"},
}
# third-party package -> files (or folders, with a slash at the end) that may import it
HOMES: dict[str, tuple[str, ...]] = {
    "flash_attn": ("nn/attention.py",),
    "bitsandbytes": ("nn/quantized.py",),
    "tokenizers": ("data/tokenizer.py",),
    "pyarrow": ("data/sources.py",),
    "safetensors": ("model/weights.py", "train/checkpoint.py"),
    "tensorboard": ("core/run.py",),
    "torch.utils.tensorboard": ("core/run.py",),
    "yaml": ("core/config.py",),
    "typer": (
        "cli.py",
        "cli_chat.py",
        "cli_eval.py",
        "cli_export.py",
        "cli_options.py",
        "cli_requests.py",
        "cli_serve.py",
        "cli_students.py",
    ),
    "fastapi": ("serve/",),
    "uvicorn": ("serve/",),
    "ray": ("serve/replicas.py",),
    # pictures have many owners; the maths (nn, flow, model) and the command line see tensors and paths only
    "PIL": ("toybox/", "data/", "generate/", "pipeline.py", "evaluate/", "demo.py", "chat.py", "serve/", "train/previews.py"),
}
# import name -> name on the package index, where they differ
INDEX_NAMES = {"PIL": "pillow", "yaml": "pyyaml", "flash_attn": "flash-attn"}
# optional accelerators: used if installed, required by nobody
OPTIONAL = {"flash-attn"}

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str | None:
    """`hyperbagel.nn.masks` -> `nn`; the package itself and foreign modules -> None."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "hyperbagel" and len(pieces) > 1 else None


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, also those inside functions. `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: level 1 is the module's own package
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def wrong_imports(source: str, relative: str, module: str) -> list[str]:
    """What in a file breaks the table of packages, as `file:line: ...`."""
    part = part_of(module)
    if part is None or part == "__init__":
        part = "__init__"
    allowed = MAY_IMPORT.get(part, set()) | EXTRA_IMPORTS.get(relative, set()) | {part}
    return [
        f"{relative}:{line}: {part} may not import {name}"
        for line, name in imports(source, module)
        if (target := part_of(name)) is not None and target not in allowed and not target.startswith("__")
    ]


def wrong_homes(source: str, relative: str, module: str) -> list[str]:
    """Third-party imports outside the files that own the package, as `file:line: ...`."""
    inside = relative.removeprefix("hyperbagel/")
    wrong = []
    for line, name in imports(source, module):
        for package, homes in HOMES.items():
            owned = any(inside.startswith(home) if home.endswith("/") else inside == home for home in homes)
            if (name == package or name.startswith(package + ".")) and not owned:
                wrong.append(f"{relative}:{line}: {package} belongs in {', '.join(homes)}")
    return wrong


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_only_downwards(path: Path) -> None:
    assert wrong_imports(path.read_text("utf-8"), relative(path), module_name(path)) == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_one_third_party_package_in_one_file(path: Path) -> None:
    assert wrong_homes(path.read_text("utf-8"), relative(path), module_name(path)) == []


def test_every_part_of_the_package_has_its_rule() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert parts - set(MAY_IMPORT) == set()


def test_the_table_has_no_cycle() -> None:
    seen: set[str] = set()
    for part, below in MAY_IMPORT.items():
        assert below <= seen, f"{part} imports {sorted(below - seen)}, which stand below it in the table"
        seen.add(part)


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    declared = {re.split(r"[^A-Za-z0-9_.-]", item)[0].lower().replace("_", "-") for group in groups for item in group}
    missing = []
    for path in FILES:
        for line, name in imports(path.read_text("utf-8"), module_name(path)):
            top = name.split(".")[0]
            index_name = INDEX_NAMES.get(top, top).lower().replace("_", "-")
            if top not in sys.stdlib_module_names and top != "hyperbagel" and index_name not in declared | OPTIONAL:
                missing.append(f"{relative(path)}:{line}: {top} is in no dependency list of pyproject.toml")
    assert missing == []


def test_no_file_is_too_long() -> None:
    python = [path for folder in ("hyperbagel", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    lengths = {relative(path): len(path.read_text("utf-8").splitlines()) for path in python}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_the_lock_pins_every_package_and_covers_the_project() -> None:
    lines = [line for line in (ROOT / "requirements/lock.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line)] == []
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[^A-Za-z0-9_.-]", item)[0].lower() for item in wanted} - locked == set()


HEAVY = {"torch", "numpy", "PIL", "pydantic", "tokenizers", "safetensors", "pyarrow"}


def test_starting_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, hyperbagel.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert HEAVY & set(done.stdout.split()) == set()


def test_help_takes_little_more_than_the_library_that_prints_it() -> None:
    """Processor time, the best of four, in turn with a process that only imports the library: so neither a slow machine nor what it is busy
    with beside it counts. On two AVX2 cores .44 s and .31."""
    taken: dict[str, list[float]] = {"hyperbagel.cli": [], "typer.rich_utils": []}
    for module, seconds in [*taken.items()] * 4:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", module, "--help"]
        subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(taken["hyperbagel.cli"]) < 2 * min(taken["typer.rich_utils"])


def test_the_rules_catch_what_they_forbid() -> None:
    """The checks themselves: an upward import, a lazy one, a relative one, a package far from home."""
    core = ("hyperbagel/core/x.py", "hyperbagel.core.x")
    assert wrong_imports("from hyperbagel.model import vae", *core)
    assert wrong_imports("def f():\n    import hyperbagel.train.loop", *core)
    assert wrong_imports("from ..nn import masks", *core)
    assert wrong_imports("from hyperbagel import pipeline", *core)
    assert not wrong_imports("from .types import PackedBatch\nimport torch\nfrom hyperbagel.core import files", *core)
    assert not wrong_imports("from hyperbagel import __version__", *core)
    assert wrong_homes("def f():\n    from safetensors.torch import load_file", *core)
    assert wrong_homes("from torch.utils.tensorboard import SummaryWriter", *core)
    assert not wrong_homes("from safetensors.torch import load_file", "hyperbagel/model/weights.py", "hyperbagel.model.weights")
