#!/usr/bin/env bash
# The README's picture: captions, edits and answers of a model at fixed seeds, unpicked.   runs/sheet.sh [MODEL] [WEBP]
set -euo pipefail
cd "$(dirname "$0")/.."
"${BIN:-.venv/bin}/python" - "${1:-hyperbagel/assets/toybox}" "${2:-docs/images/toybox.webp}" <<'PY'
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from hyperbagel.generate.session import Parts
from hyperbagel.train.previews import write_previews

with TemporaryDirectory() as folder:
    drawn = Path(folder) / "sheet.png"
    write_previews(drawn, Parts.load(Path(sys.argv[1])), 1_000_003, steps=50)  # as `hyperbagel generate` and `edit` make them
    Image.open(drawn).save(sys.argv[2], lossless=True, quality=100, method=6)
PY
