"""The frame of a benchmark's command: it runs, its table goes to the terminal, its JSON into a file whose folder is made first."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text, make_folder, one_line

Found = dict[str, Any]


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
