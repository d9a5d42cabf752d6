"""The frame of a benchmark's command: it runs, its table goes to the terminal, its JSON into a file whose folder is made first."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text, make_folder, one_line
from hyperbagel.core.run import git_sha, versions

Found = dict[str, Any]


def head(name: str, options: argparse.Namespace) -> Found:
    """What every record of `python -m benchmarks.NAME` begins with: command, commit, time, versions, machine (CPU), and the note."""
    found: Found = {"command": ["python", "-m", f"benchmarks.{name}", *options.given], "git": git_sha(Path(__file__).parent)}
    found |= {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions()}
    return found | {"hardware": machine(torch.device("cpu")), "note": options.note}


def finish(
    options: argparse.Namespace, run: Callable[[argparse.Namespace], Found], table: Callable[[Found], str], failed: Callable[[Found], bool]
) -> int:
    """Run a benchmark and report what it found. Returns the exit status: 0, 1 if some of it `failed`, 2 (with one line on stderr) if it
    cannot be run or written. options.out: the JSON file, or None."""
    try:
        if options.out is not None:
            make_folder(options.out.parent)
        found = run(options)
        print(table(found))
        if options.out is not None:
            atomic_write_text(options.out, json.dumps(found, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 1 if failed(found) else 0
