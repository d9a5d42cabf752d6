#!/usr/bin/env bash
# The README's picture: captions, edits and answers of a model at fixed seeds, unpicked.   runs/sheet.sh [MODEL] [PNG]
set -euo pipefail
cd "$(dirname "$0")/.."
"${BIN:-.venv/bin}/python" - "${1:-hyperbagel/assets/toybox}" "${2:-docs/images/toybox.png}" <<'PY'
import sys
from pathlib import Path

from hyperbagel.generate.session import Parts
from hyperbagel.train.previews import write_previews

write_previews(Path(sys.argv[2]), Parts.load(Path(sys.argv[1])), 1_000_003, steps=50)  # as `hyperbagel generate` and `edit` make them
PY
