"""How a benchmark ends: its table on the terminal, its JSON in a file that could be written before anything was measured."""

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
    """Exit status: 0, 1 if some of it `failed`, 2 with one line for what cannot be measured or written. `options.out`: the JSON file."""
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
